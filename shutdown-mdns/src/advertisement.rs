//! What is said about an instance, and under which names.

use std::net::IpAddr;

use shutdown_core::peers::Incarnation;

use crate::error::Error;
use crate::interface::{self, Interface};
use crate::wire::Name;

/// The longest instance label that is made here: mdns-sd may have to add ` (99)` when the name is taken.
const LONGEST_INSTANCE: usize = crate::wire::LONGEST_LABEL - 5;
/// The longest string of a TXT record (RFC 6763 §6.1).
const LONGEST_STRING: usize = 255;
/// The longest service name, without its underscore (RFC 6763 §7.2).
const LONGEST_SERVICE: usize = 15;

/// What is advertised. All of it is asked for: nothing here has a default that is right for two services.
#[derive(Clone, Debug)]
pub struct Advertisement {
    /// The service type, such as `_edge._tcp.local.`.
    pub service_type: String,
    /// Who this is. It becomes the instance's name, in small letters and cut to fit; the TXT record has it as it is.
    pub node_id: String,
    /// Where the service is served, on every address of the interfaces.
    pub port: u16,
    /// The interfaces by name. Nothing is sent on another.
    pub interfaces: Vec<String>,
    /// Only nodes of one cluster are peers: others are not discovered, nor are those that tell none if this is not empty.
    pub cluster: String,
    /// Rises with each start, and when somebody else took our records back.
    pub incarnation: Incarnation,
    /// The version of the program.
    pub version: String,
    /// The port for departure notices, if there is one.
    pub notice_port: Option<u16>,
}

impl Advertisement {
    /// Says whether this can be advertised now, and starts nothing: for a program that wants to know before it installs
    /// anything, or on `--check`. [`Mdns::start`](crate::Mdns::start) asks the same.
    ///
    /// It opens no socket, so it does not say whether one can be had.
    ///
    /// # Errors
    ///
    /// If something cannot be said over mDNS, no interface is named, or one is not there or has no address.
    pub fn check(&self) -> Result<(), Error> {
        self.resolve().map(drop)
    }

    /// The service type and the interfaces, if this can be advertised.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub(crate) fn resolve(&self) -> Result<(Name, Vec<Interface>), Error> {
        let service = self.checked()?;
        Ok((service, interface::named(&self.interfaces)?))
    }

    /// The strings of the TXT record as it is now (RFC 6763 §6).
    pub(crate) fn strings(&self) -> Vec<(&'static str, String)> {
        let mut strings = vec![
            ("txtvers", "1".to_owned()),
            ("node_id", self.node_id.clone()),
            ("cluster", self.cluster.clone()),
            ("inc", self.incarnation.get().to_string()),
            ("ver", self.version.clone()),
        ];
        strings.extend(self.notice_port.map(|port| ("notice", port.to_string())));
        strings
    }

    /// The service type, if all texts are fit.
    ///
    /// # Errors
    ///
    /// If something cannot be said over mDNS.
    fn checked(&self) -> Result<Name, Error> {
        let service = service_name(&self.service_type)?;
        if self.interfaces.is_empty() {
            return Err(Error::NoInterfaces);
        }
        if self.node_id.is_empty() {
            return Err(Error::Text { key: "node_id", why: "is empty: give the node a name" });
        }
        for (key, value) in self.strings() {
            if key.len() + 1 + value.len() > LONGEST_STRING {
                return Err(Error::Text { key, why: "is too long: a string of a TXT record has 255 bytes" });
            }
        }
        Ok(service)
    }
}

/// The name of a service type.
///
/// # Errors
///
/// If it is none.
fn service_name(text: &str) -> Result<Name, Error> {
    let error = || Error::ServiceType(text.to_owned());
    let name =
        text.strip_suffix("._tcp.local.").or_else(|| text.strip_suffix("._udp.local.")).ok_or_else(error)?;
    let service = name.strip_prefix('_').ok_or_else(error)?;
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if !(1..=LONGEST_SERVICE).contains(&service.len()) || !service.bytes().all(is_good) {
        return Err(error());
    }
    Name::dotted(text).ok_or_else(error)
}

/// What an instance and its host are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Names {
    /// The instance's label.
    pub(crate) instance: String,
    /// The host's label: unique, so that a goodbye for our host's addresses takes nobody else's (mdns-sd withdraws
    /// a host's addresses with the first of its services).
    pub(crate) host: String,
}

impl Names {
    /// For a node; `unique` tells two starts on one host apart.
    pub(crate) fn of(node_id: &str, unique: u32) -> Self {
        let instance = instance_label(node_id);
        let letters = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let mut host: String = instance.chars().map(letters).take(48).collect();
        host = host.trim_matches('-').to_owned();
        if host.is_empty() {
            "node".clone_into(&mut host);
        }
        // Not digits alone behind the hyphen: mdns-sd would count them up when the name is taken.
        Self { instance, host: format!("{host}-{unique:08x}") }
    }
}

/// A node's label: small letters, because mdns-sd 0.21.7 does not find a name with others again for its second
/// announcement; no dots, which it does not escape when it reads; cut between characters, with a hash of the whole behind.
fn instance_label(node_id: &str) -> String {
    let plain: String = node_id
        .chars()
        .flat_map(char::to_lowercase)
        .map(|c| if c == '.' || c == '\\' || c == ':' || c.is_control() { '-' } else { c })
        .collect();
    if plain.len() <= LONGEST_INSTANCE {
        return plain;
    }
    let mut end = LONGEST_INSTANCE - 9;
    while !plain.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{:08x}", &plain[..end], hash(node_id.as_bytes()))
}

/// FNV-1a.
pub(crate) fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Strings as they stand in a TXT record.
pub(crate) fn txt(strings: &[(&'static str, String)]) -> Vec<Vec<u8>> {
    strings.iter().map(|(key, value)| format!("{key}={value}").into_bytes()).collect()
}

/// Whether an address may be announced: what others can reach us by.
pub(crate) fn is_announced(address: &IpAddr) -> bool {
    !address.is_unspecified() && !address.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_between_characters_and_stays_its_own() {
        let long = "ä".repeat(60);
        let (one, other) = (instance_label(&format!("{long}1")), instance_label(&format!("{long}2")));
        assert!(one.len() <= LONGEST_INSTANCE && one.starts_with("ää"), "{one}");
        assert_ne!(one, other);
        assert_eq!(instance_label("Edge-1.example:8080"), "edge-1-example-8080");
        for node_id in ["edge-1", "ß.ü", &long, "...", "\u{130}x"] {
            let names = Names::of(node_id, 0x1234_abcd);
            assert!(Name::of([&names.instance[..], "_edge", "_tcp", "local"]).is_some(), "{names:?}");
            assert!(names.host.len() <= 63 && names.host.ends_with("-1234abcd"), "{names:?}");
            assert!(names.host.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "{names:?}");
        }
    }

    #[test]
    fn a_key_has_nine_characters_at_most_and_the_incarnation_is_what_it_is_now() {
        let mut advertisement = Advertisement {
            service_type: "_edge._tcp.local.".to_owned(),
            node_id: "edge-1".to_owned(),
            port: 80,
            interfaces: vec!["eth0".to_owned()],
            cluster: "default".to_owned(),
            incarnation: Incarnation::new(7),
            version: "0.1.0".to_owned(),
            notice_port: Some(7946),
        };
        advertisement.checked().expect("it is whole");
        // RFC 6763 §6.4.
        assert!(advertisement.strings().iter().all(|(key, _)| key.len() <= 9));
        // A clone is the same.
        advertisement.incarnation.clone().refute(101);
        assert!(txt(&advertisement.strings()).contains(&b"inc=101".to_vec()));
        advertisement.version = "1".repeat(252);
        assert_eq!(
            advertisement.checked().map(drop).map_err(|error| error.to_string()),
            Err("TXT ver is too long: a string of a TXT record has 255 bytes".to_owned())
        );
        advertisement.version.clear();
        for bad in [
            "_edge._tcp",
            "edge._tcp.local.",
            "_edge.tcp.local.",
            "_a-name-too-long-._tcp.local.",
            "_._udp.local.",
        ] {
            advertisement.service_type = bad.to_owned();
            assert!(advertisement.checked().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_check_names_what_is_wrong_and_starts_nothing() {
        let mut advertisement = Advertisement {
            service_type: "_edge._tcp.local.".to_owned(),
            node_id: "edge-1".to_owned(),
            port: 80,
            interfaces: vec!["no such".to_owned()],
            cluster: String::new(),
            incarnation: Incarnation::new(7),
            version: String::new(),
            notice_port: None,
        };
        let unknown = advertisement.check();
        assert!(
            matches!(&unknown, Err(Error::UnknownInterface { name, .. }) if name == "no such"),
            "{unknown:?}"
        );
        advertisement.interfaces.clear();
        assert!(matches!(advertisement.check(), Err(Error::NoInterfaces)));
        advertisement.node_id.clear();
        advertisement.interfaces.push("lo".to_owned());
        assert!(matches!(advertisement.check(), Err(Error::Text { key: "node_id", .. })));
    }
}
