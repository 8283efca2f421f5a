//! An upstream as it is written, and what it is called.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

const NO_PORT: &str = "has no port between 1 and 65535: write http://host:port";

/// One upstream, `http://host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Upstream {
    host: Host,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    Ip(IpAddr),
    Name(String),
}

impl Upstream {
    /// Reads `http://host:port`.
    ///
    /// # Errors
    ///
    /// What is wrong with it and how to write it, as one sentence.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| Err(format!("upstream {text:?} {what}"));
        let is_name = |name: &str| {
            let in_names = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
            !name.is_empty() && name.chars().all(in_names)
        };
        let Some((scheme, rest)) = text.split_once("://") else {
            let with_scheme = format!("http://{text}");
            let usable = Self::parse(&with_scheme).is_ok();
            let suggestion = if usable { &with_scheme } else { "http://host:port" };
            return wrong(&format!("has no scheme: write {suggestion}"));
        };
        if !scheme.eq_ignore_ascii_case("http") {
            return wrong(&format!("has the scheme {scheme:?}: only http://host:port is supported"));
        }
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains(['/', '?', '#', '@']) {
            return wrong("is more than a host and a port: write http://host:port");
        }
        if let Ok(addr) = authority.parse::<SocketAddr>() {
            return if addr.port() == 0 { wrong(NO_PORT) } else { Ok(Self::from(addr)) };
        }
        let Some((host, port)) = authority.rsplit_once(':').filter(|(host, _)| !host.contains([':', '[']))
        else {
            let with_port = format!("{authority}:80");
            let usable = with_port.parse::<SocketAddr>().is_ok() || is_name(authority);
            let suggestion = if usable { with_port } else { "host:port".to_owned() };
            return wrong(&format!("has no port: write http://{suggestion}"));
        };
        if !is_name(host) {
            return wrong("has no host name: write http://host:port");
        }
        match port.parse() {
            Ok(port) if port != 0 && !authority.contains('+') => {
                Ok(Self { host: Host::Name(host.to_owned()), port })
            }
            _ => wrong(NO_PORT),
        }
    }

    /// Its address, if it was given as one; an IPv4 address in IPv6's clothes is an IPv4 address.
    pub(crate) fn given_addr(&self) -> Option<SocketAddr> {
        match &self.host {
            Host::Ip(ip) => Some(SocketAddr::new(ip.to_canonical(), self.port)),
            Host::Name(_) => None,
        }
    }

    /// Its address now. A name is resolved each time: what it stands for may change.
    ///
    /// # Errors
    ///
    /// What the resolver said.
    pub(crate) async fn addr(&self) -> std::io::Result<SocketAddr> {
        match &self.host {
            Host::Ip(ip) => Ok(SocketAddr::new(*ip, self.port)),
            Host::Name(name) => tokio::net::lookup_host((name.as_str(), self.port))
                .await?
                .next()
                .ok_or_else(|| std::io::Error::other(format!("{name} has no address"))),
        }
    }
}

impl From<SocketAddr> for Upstream {
    fn from(addr: SocketAddr) -> Self {
        Self { host: Host::Ip(addr.ip()), port: addr.port() }
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => write!(f, "http://{}", SocketAddr::new(*ip, self.port)),
            Host::Name(name) => write!(f, "http://{name}:{}", self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_reads_back_as_it_is_shown() {
        for text in ["http://127.0.0.1:80", "http://[::1]:9000", "http://orders.internal:8080"] {
            assert_eq!(Upstream::parse(text).unwrap().to_string(), text);
            assert_eq!(Upstream::parse(&format!("{text}/")).unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_wrong_upstream_is_one_sentence_with_the_way_to_write_it() {
        for (text, fix) in [
            ("127.0.0.1:80", "upstream \"127.0.0.1:80\" has no scheme: write http://127.0.0.1:80"),
            ("https://a:1", "only http://host:port"),
            ("http://a", "write http://a:80"),
            ("http://[::1]", "write http://[::1]:80"),
            ("http://a:b", "between 1 and 65535"),
            ("http://127.0.0.1:0", "between 1 and 65535"),
            ("http://a:0", "between 1 and 65535"),
            ("http://a:1/path", "write http://host:port"),
            ("http://user@a:1", "write http://host:port"),
            ("http://:80", "write http://host:port"),
            ("a", "write http://host:port"),
            ("", "write http://host:port"),
            ("//a:80", "write http://host:port"),
            ("http://[::1", "write http://host:port"),
            ("http://127.0.0.1:80:90", "write http://host:port"),
            ("http://127.0.0.1:+80", "between 1 and 65535"),
        ] {
            let error = Upstream::parse(text).unwrap_err();
            assert!(error.contains(fix) && error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
