//! Which interfaces there are, and what addresses each has at this moment.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::error::Error;

/// An interface as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) index: u32,
    pub(crate) addresses: Vec<IpAddr>,
}

impl Interface {
    /// Its first IPv4 address: what a socket names the interface by.
    pub(crate) fn v4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
    }

    /// Whether there is an IPv6 address that multicast can use. On loopback there is no group to join.
    pub(crate) fn has_v6(&self) -> bool {
        self.addresses
            .iter()
            .any(|address| matches!(address, IpAddr::V6(address) if *address != Ipv6Addr::LOCALHOST))
    }
}

/// The interfaces of these names, each once.
///
/// # Errors
///
/// If one is not there or has no address.
pub(crate) fn named(names: &[String]) -> Result<Vec<Interface>, Error> {
    let all = all()?;
    let mut found: Vec<Interface> = Vec::new();
    for name in names {
        if found.iter().any(|interface| interface.name == *name) {
            continue;
        }
        match all.get(name) {
            Some(interface) if interface.v4().is_some() || interface.has_v6() => {
                found.push(interface.clone())
            }
            Some(_) => return Err(Error::NoAddress(name.clone())),
            None => return Err(missing(name, &all)),
        }
    }
    Ok(found)
}

/// An interface that getifaddrs knows no address of may still be there.
fn missing(name: &str, all: &BTreeMap<String, Interface>) -> Error {
    let is_there = !name.contains('/') && std::path::Path::new("/sys/class/net").join(name).exists();
    if is_there && !name.is_empty() && !name.starts_with('.') {
        return Error::NoAddress(name.to_owned());
    }
    Error::UnknownInterface { name: name.to_owned(), known: all.keys().cloned().collect() }
}

/// The addresses that the interface of this name has now; none if it is gone.
pub(crate) fn addresses(name: &str) -> Vec<IpAddr> {
    all().ok().and_then(|mut all| all.remove(name)).map(|interface| interface.addresses).unwrap_or_default()
}

fn all() -> Result<BTreeMap<String, Interface>, Error> {
    let mut all: BTreeMap<String, Interface> = BTreeMap::new();
    for address in if_addrs::get_if_addrs().map_err(Error::Interfaces)? {
        let ip = address.ip();
        let index = address.index.unwrap_or(0);
        let interface = all.entry(address.name.clone()).or_insert_with(|| Interface {
            name: address.name.clone(),
            index,
            addresses: Vec::new(),
        });
        if crate::advertisement::is_announced(&ip) && !interface.addresses.contains(&ip) {
            interface.addresses.push(ip);
        }
    }
    Ok(all)
}
