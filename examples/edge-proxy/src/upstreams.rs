//! Where requests go: round robin, past those that were down a moment ago.
//!
//! Choosing is pure: time is an argument, counted from the start of the process.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

/// How long an upstream that could not be reached is passed over.
pub(crate) const DOWN: Duration = Duration::from_secs(2);
/// As many as a [`Tried`] can remember.
pub(crate) const MOST: usize = 64;

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

/// All upstreams and what is known of them. Health is passive: only real requests find out.
#[derive(Debug)]
pub(crate) struct Upstreams {
    all: Vec<Known>,
    next: AtomicUsize,
    born: Instant,
}

#[derive(Debug)]
struct Known {
    upstream: Upstream,
    /// Until when it is passed over, in milliseconds from `born`; 0 if it is not.
    down_until: AtomicU64,
}

/// Which upstreams a request has failed to reach.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tried(u64);

impl Upstreams {
    /// At least one and at most [`MOST`].
    pub(crate) fn new(upstreams: Vec<Upstream>) -> Self {
        let all =
            upstreams.into_iter().map(|upstream| Known { upstream, down_until: AtomicU64::new(0) }).collect();
        Self { all, next: AtomicUsize::new(0), born: Instant::now() }
    }

    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    pub(crate) fn get(&self, index: usize) -> &Upstream {
        &self.all[index].upstream
    }

    /// The time that this is about.
    pub(crate) fn now(&self) -> Duration {
        self.born.elapsed()
    }

    /// The next one in turn that was not tried, better one that is not down; `None` when all were tried.
    pub(crate) fn pick(&self, tried: Tried, now: Duration) -> Option<usize> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let in_turn = || {
            (0..self.all.len())
                .map(|step| turn.wrapping_add(step) % self.all.len())
                .filter(|index| tried.0 & (1 << index) == 0)
        };
        in_turn().find(|index| !self.is_down(*index, now)).or_else(|| in_turn().next())
    }

    /// Passes `index` over for [`DOWN`]; whether there is another one to try.
    pub(crate) fn failed(&self, index: usize, tried: &mut Tried, now: Duration) -> bool {
        tried.0 |= 1 << index;
        self.all[index].down_until.store(millis(now + DOWN), Ordering::Relaxed);
        (tried.0.count_ones() as usize) < self.all.len()
    }

    /// Notes that `index` was reached.
    pub(crate) fn reached(&self, index: usize) {
        self.all[index].down_until.store(0, Ordering::Relaxed);
    }

    fn is_down(&self, index: usize, now: Duration) -> bool {
        millis(now) < self.all[index].down_until.load(Ordering::Relaxed)
    }

    /// For `/status`.
    pub(crate) fn shown(&self) -> Value {
        let now = self.now();
        let one =
            |index: usize| json!({ "url": self.get(index).to_string(), "down": self.is_down(index, now) });
        (0..self.len()).map(one).collect()
    }
}

impl fmt::Display for Upstreams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> = self.all.iter().map(|known| known.upstream.to_string()).collect();
        f.write_str(&all.join(", "))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn three() -> Upstreams {
        Upstreams::new(
            (1..=3).map(|port| Upstream::parse(&format!("http://127.0.0.1:{port}")).unwrap()).collect(),
        )
    }

    #[test]
    fn upstreams_take_turns() {
        let upstreams = three();
        let picked: Vec<_> = (0..6).map(|_| upstreams.pick(Tried::default(), NOW).unwrap()).collect();
        assert_eq!(picked, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn one_that_failed_is_passed_over_until_its_time_is_up_or_it_is_reached() {
        let upstreams = three();
        upstreams.failed(1, &mut Tried::default(), NOW);
        let picks =
            |now| -> Vec<_> { (0..3).map(|_| upstreams.pick(Tried::default(), now).unwrap()).collect() };
        assert!(!picks(NOW + DOWN / 2).contains(&1));
        assert!(picks(NOW + DOWN).contains(&1));
        upstreams.failed(1, &mut Tried::default(), NOW);
        upstreams.reached(1);
        assert!(picks(NOW).contains(&1));
    }

    #[test]
    fn a_request_tries_each_upstream_once_even_if_all_are_down() {
        let upstreams = three();
        let mut tried = Tried::default();
        let mut order = Vec::new();
        while let Some(index) = upstreams.pick(tried, NOW) {
            order.push(index);
            assert_eq!(upstreams.failed(index, &mut tried, NOW), order.len() < 3);
        }
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2]);
    }

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
