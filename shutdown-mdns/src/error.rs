//! Why there is no advertising.

use std::fmt;
use std::io;

/// What went wrong at the start.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Not a service type: the caller's.
    ServiceType(String),
    /// No interface was named: the caller's.
    NoInterfaces,
    /// A string of the TXT record: the caller's.
    Text {
        /// Its key.
        key: &'static str,
        /// What is wrong, and what to do.
        why: &'static str,
    },
    /// An interface that this machine does not have.
    UnknownInterface {
        /// As it was named.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// An interface that has no address.
    NoAddress(String),
    /// The list of interfaces could not be read.
    Interfaces(io::Error),
    /// No socket of ours on an interface.
    Socket {
        /// The interface.
        interface: String,
        /// What the system says.
        source: io::Error,
    },
    /// No thread or runtime.
    Thread(io::Error),
    /// What mdns-sd says.
    Daemon(mdns_sd::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ServiceType(text) => {
                write!(
                    f,
                    "service type {text:?}: write it like _edge._tcp.local., its name at most 15 letters, digits and hyphens"
                )
            }
            Self::NoInterfaces => f.write_str("mDNS on no interface: name at least one"),
            Self::Text { key, why } => write!(f, "TXT {key} {why}"),
            Self::UnknownInterface { name, known } => {
                write!(f, "there is no interface {name}: name one of {}", known.join(", "))
            }
            Self::NoAddress(name) => {
                write!(
                    f,
                    "interface {name} has no address to advertise: give it one, or name another interface"
                )
            }
            Self::Interfaces(_) => f.write_str("the list of network interfaces cannot be read"),
            Self::Socket { interface, .. } => {
                write!(f, "no mDNS socket (UDP port 5353) on interface {interface}")
            }
            Self::Thread(_) => f.write_str("no thread for mDNS"),
            Self::Daemon(_) => f.write_str("mdns-sd"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Interfaces(error) | Self::Thread(error) | Self::Socket { source: error, .. } => Some(error),
            Self::Daemon(error) => Some(error),
            _ => None,
        }
    }
}
