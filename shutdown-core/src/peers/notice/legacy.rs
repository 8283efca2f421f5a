//! Reads the announcements of the system we come from: ASCII, unauthenticated, and so acted on by nobody here.
//!
//! `SWEETMCP|build|port` says that a node is there, with `|GOODBYE` behind it that it leaves (both to 224.0.0.251:5353), and
//! `SWEETMCP|build|SHUTDOWN|port` the same to one peer. Its own receivers wanted three parts and so heard the first alone.

/// What an announcement says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// It is there.
    Here,
    /// It leaves: said to everybody.
    Goodbye,
    /// It leaves: said to a peer.
    Shutdown,
}

/// An announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement<'a> {
    /// What it says.
    pub says: Says,
    /// The build of the program that says so.
    pub build: &'a str,
    /// The port it serves at; the address is the datagram's.
    pub port: u16,
}

/// Reads one; `None` for everything else.
pub fn decode(datagram: &[u8]) -> Option<Announcement<'_>> {
    let text = std::str::from_utf8(datagram).ok().filter(|text| text.is_ascii())?;
    let mut parts = text.strip_prefix("SWEETMCP|")?.split('|');
    let parts = [parts.next(), parts.next(), parts.next(), parts.next()];
    let (says, build, port) = match parts {
        [Some(build), Some(port), None, None] => (Says::Here, build, port),
        [Some(build), Some("SHUTDOWN"), Some(port), None] => (Says::Shutdown, build, port),
        [Some(build), Some(port), Some("GOODBYE"), None] => (Says::Goodbye, build, port),
        _ => return None,
    };
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| digits && *port != 0)?;
    (!build.is_empty()).then_some(Announcement { says, build, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_announcement_of_the_old_system_reads_as_what_it_says() {
        let read =
            |text: &'static str| decode(text.as_bytes()).map(|read| (read.says, read.build, read.port));
        assert_eq!(read("SWEETMCP|0a1b2c3d-x86_64|8443"), Some((Says::Here, "0a1b2c3d-x86_64", 8443)));
        assert_eq!(read("SWEETMCP|0a1b2c3d|8443|GOODBYE"), Some((Says::Goodbye, "0a1b2c3d", 8443)));
        assert_eq!(read("SWEETMCP|0a1b2c3d|SHUTDOWN|8443"), Some((Says::Shutdown, "0a1b2c3d", 8443)));
        for other in [
            "",
            "SWEETMCP",
            "SWEETMCP|a",
            "SWEETMCP||1",
            "SWEETMCP|a|0",
            "SWEETMCP|a|+1",
            "SWEETMCP|a|65536",
            "SWEETMCP|a|1|extra",
            "SWEETMCP|a|1|GOODBYE|",
            "SWEETMCP|a|SHUTDOWN|1|",
            "sweetmcp|a|1",
            "SWEETMCP|a|1\n",
            "SWEETMCP|ä|1",
        ] {
            assert_eq!(read(other), None, "{other:?}");
        }
    }
}
