//! What is set about the neighbours: who they are, where they are heard, and by which keys they are known.
//!
//! Notices are on as soon as there is a peer or an address to hear them at. Then a key is needed: without one anybody who can
//! send a datagram could withdraw nodes.

use std::fmt;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;

use shutdown_core::peers::notice::Keys;

use super::{Sources, Value};

/// Linux's IFNAMSIZ, less the zero at the end.
const LONGEST_INTERFACE: usize = 15;
const SERVICE_TYPE: &str = "_edge._tcp.local.";

/// The neighbours, checked.
#[derive(Clone)]
pub(crate) struct Neighbours {
    pub(crate) peers: Vec<SocketAddr>,
    /// `None`: off.
    pub(crate) notices: Option<Notices>,
    /// Interfaces; none: off.
    pub(crate) mdns: Vec<String>,
    pub(crate) service_type: String,
}

/// Notices, which are on.
#[derive(Clone)]
pub(crate) struct Notices {
    /// `None`: where clients connect.
    pub(crate) listen: Option<SocketAddr>,
    pub(crate) keys: Keys,
    key_file: Option<String>,
}

impl Neighbours {
    /// Whether no peer is this proxy itself, which listens there.
    ///
    /// # Errors
    ///
    /// One is; one sentence.
    pub(crate) fn check(&self, listen: SocketAddr) -> Result<(), String> {
        let at_all = listen.ip().is_unspecified();
        let itself = |peer: &&SocketAddr| {
            peer.port() == listen.port() && (peer.ip() == listen.ip() || (at_all && is_ours(peer.ip())))
        };
        match self.peers.iter().find(itself) {
            Some(peer) if listen.port() != 0 => {
                Err(format!("--peer {peer} is where this proxy listens itself: name the others alone"))
            }
            _ => Ok(()),
        }
    }

    /// A line for each setting.
    pub(super) fn lines(&self, line: &mut dyn FnMut(&str, &dyn fmt::Display) -> fmt::Result) -> fmt::Result {
        match self.peers.as_slice() {
            [] => line("peer", &"none")?,
            peers => peers.iter().try_for_each(|peer| line("peer", peer))?,
        }
        match &self.notices {
            None => line("notices", &"off")?,
            Some(notices) => {
                match notices.listen {
                    Some(addr) => line("notice-listen", &addr)?,
                    None => line("notice-listen", &"where it listens")?,
                }
                match &notices.key_file {
                    Some(path) => line("notice keys", &format_args!("{:?} in {path}", notices.keys))?,
                    None => line("notice keys", &"none: anybody can forge notices")?,
                }
            }
        }
        match self.mdns.as_slice() {
            [] => line("mdns", &"off"),
            interfaces => {
                line("mdns", &interfaces.join(", "))?;
                line("service-type", &self.service_type)
            }
        }
    }
}

impl Sources<'_> {
    pub(super) fn neighbours(&self) -> Result<Neighbours, String> {
        let peers = self.all("peer")?.iter().map(peer).collect::<Result<Vec<_>, _>>()?;
        let listen = match self.one("notice-listen")? {
            Some(_) => Some(self.addr("notice-listen", "0.0.0.0:8080")?),
            None => None,
        };
        let keys = self.notice_keys()?;
        let mdns: Vec<String> = self.all("mdns")?.iter().map(interface).collect::<Result<_, _>>()?;
        // With a key those that mDNS finds are told as well.
        let off = listen.is_none() && peers.is_empty() && (keys.is_none() || mdns.is_empty());
        let notices = match keys {
            _ if off => None,
            Some((keys, key_file)) => Some(Notices { listen, keys, key_file }),
            None => {
                let on = if listen.is_some() { "--notice-listen" } else { "--peer" };
                return Err(format!(
                    "{on} goes with a key, without which anybody could withdraw nodes: give --notice-key-file, or \
                     --notice-insecure for tests"
                ));
            }
        };
        let service_type = self
            .one("service-type")?
            .map_or_else(|| Ok(SERVICE_TYPE.to_owned()), |value| service_type(&value))?;
        Ok(Neighbours { peers, notices, mdns, service_type })
    }

    /// The keys and the file they are in; nothing if there are none.
    fn notice_keys(&self) -> Result<Option<(Keys, Option<String>)>, String> {
        let insecure = self.switch("notice-insecure")?;
        let Some(path) = self.one("notice-key-file")? else {
            return Ok(insecure.then(|| (Keys::insecure(), None)));
        };
        if insecure {
            return Err(format!(
                "{path} and --notice-insecure exclude each other: leave the latter out, which is for tests"
            ));
        }
        let text = key_file(Path::new(&path.text))
            .map_err(|error| format!("the notice key file {path} cannot be read: {error}"))?;
        let keys = Keys::parse(&text).map_err(|error| format!("the notice key file {path}: {error}"))?;
        Ok(Some((keys, Some(path.text))))
    }
}

/// What is in a file of keys: a regular one, of some hundred keys at most.
fn key_file(path: &Path) -> std::io::Result<String> {
    const MOST: u64 = 64 * 1024;
    let found = std::fs::metadata(path)?;
    if !found.is_file() || found.len() > MOST {
        return Err(std::io::Error::other("it is no regular file of up to 64 KiB"));
    }
    std::fs::read_to_string(path)
}

fn peer(value: &Value) -> Result<SocketAddr, String> {
    let wrong = |what: &str| format!("{value} {what}: write where the peer is, as 10.0.0.2:8080");
    let addr: SocketAddr = value.text.parse().map_err(|_| wrong("is not an address"))?;
    match addr {
        addr if addr.ip().is_unspecified() => Err(wrong("is no place to reach anybody at")),
        addr if addr.port() == 0 => Err(wrong("has no port between 1 and 65535")),
        addr if is_many(addr.ip()) => Err(wrong("is no address of one machine")),
        SocketAddr::V6(addr) if addr.ip().is_unicast_link_local() && addr.scope_id() == 0 => {
            Err(format!("{value} names no interface: write its number, as [fe80::1%2]:8080"))
        }
        // One place has one name.
        addr if addr.ip().to_canonical().is_ipv4() => {
            Ok(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
        }
        addr => Ok(addr),
    }
}

fn is_many(ip: IpAddr) -> bool {
    ip.is_multicast() || matches!(ip, IpAddr::V4(ip) if ip.is_broadcast())
}

/// Whether it is an address of this machine: nobody can bind another one's.
fn is_ours(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

fn interface(value: &Value) -> Result<String, String> {
    let name = value.text.trim();
    if name.is_empty() || name.len() > LONGEST_INTERFACE || name.contains(['/', ' ']) {
        return Err(format!("{value} is no name of a network interface: write one, as `ip link` shows them"));
    }
    Ok(name.to_owned())
}

/// As `_name._tcp.local.`, with the dot at its end.
fn service_type(value: &Value) -> Result<String, String> {
    let text = value.text.trim();
    let text = text.strip_suffix('.').unwrap_or(text);
    let name = text
        .strip_prefix('_')
        .and_then(|rest| rest.strip_suffix("._tcp.local").or_else(|| rest.strip_suffix("._udp.local")));
    // RFC 6335, section 5.1.
    let in_names = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let is_name = |name: &str| {
        (1..=15).contains(&name.len())
            && name.chars().all(in_names)
            && name.contains(|c: char| c.is_ascii_alphabetic())
            && !name.starts_with('-')
            && !name.ends_with('-')
            && !name.contains("--")
    };
    match name {
        Some(name) if is_name(name) => Ok(format!("{text}.")),
        _ => Err(format!(
            "{value} is no service type: write _name._tcp.local. (or _udp), the name of 1 to 15 letters, digits and hyphens"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        Value { text: text.to_owned(), from: "--flag".to_owned() }
    }

    #[test]
    fn a_service_type_has_a_dot_at_its_end_and_a_name_that_can_be_registered() {
        for (text, read) in [
            ("_edge._tcp.local.", "_edge._tcp.local."),
            ("_edge._tcp.local", "_edge._tcp.local."),
            ("_my-edge2._udp.local", "_my-edge2._udp.local."),
        ] {
            assert_eq!(service_type(&value(text)).unwrap(), read);
        }
        for text in [
            "",
            "edge",
            "_edge._tcp",
            "edge._tcp.local.",
            "_edge._sctp.local.",
            "__tcp.local.",
            "_._tcp.local.",
            "_a-._tcp.local.",
            "_a--b._tcp.local.",
            "_12._tcp.local.",
            "_sixteen-letters-x._tcp.local.",
            "_a.b._tcp.local.",
        ] {
            let error = service_type(&value(text)).unwrap_err();
            assert!(error.contains(&format!("{text:?}")) && error.contains("_name._tcp.local."), "{error}");
        }
    }

    #[test]
    fn an_interface_is_a_name_that_the_kernel_takes() {
        assert_eq!(interface(&value("eth0.100")).unwrap(), "eth0.100");
        for text in ["", " ", "a/b", "sixteen-bytes-is"] {
            assert!(interface(&value(text)).unwrap_err().contains(&format!("{text:?}")));
        }
    }

    #[test]
    fn a_peer_is_a_place_that_can_be_reached() {
        assert_eq!(peer(&value("[::1]:80")).unwrap().to_string(), "[::1]:80");
        for text in ["", "10.0.0.1", "host:80", "0.0.0.0:80", "[::]:80", "10.0.0.1:0", "http://10.0.0.1:80"] {
            let error = peer(&value(text)).unwrap_err();
            assert!(error.contains(&format!("{text:?}")) && error.contains("10.0.0.2:8080"), "{error}");
        }
    }
}
