//! What this machine calls itself, and how others reach a listener on it.

use std::net::SocketAddr;

/// The host's name; `localhost` if it has none.
pub fn name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".to_owned(),
        name => name.to_owned(),
    }
}

/// Where others reach a listener: its address, or the host's name where it listens on every address.
pub fn reached_at(listener: SocketAddr) -> String {
    if listener.ip().is_unspecified() {
        format!("{}:{}", name(), listener.port())
    } else {
        listener.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_told_to_connect_to_every_address() {
        assert_eq!(reached_at("10.0.0.1:80".parse().unwrap()), "10.0.0.1:80");
        for all in ["0.0.0.0:80", "[::]:80"] {
            assert_eq!(reached_at(all.parse().unwrap()), format!("{}:80", name()));
        }
    }
}
