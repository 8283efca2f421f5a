//! Where requests go: round robin, past those whose circuit breaker does not admit.
//!
//! Choosing is pure: time is an argument.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use shutdown_core::breaker::{Breaker, Breakers, OwnedPermit};
use tokio::time::Instant;

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

/// What becomes of a request when no upstream's breaker admits it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum WhenAllOpen {
    /// 503, with the time after which the first of them half-opens.
    #[default]
    Refuse,
    /// It goes to the next one in turn. How that ends tells no breaker anything.
    Try,
}

impl WhenAllOpen {
    /// The policy of this name.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        [Self::Refuse, Self::Try].into_iter().find(|policy| policy.as_str() == text)
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Try => "try",
        }
    }
}

impl fmt::Display for WhenAllOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// All upstreams. Health is passive: only real requests find out, and only the breakers remember.
#[derive(Debug)]
pub(crate) struct Upstreams {
    all: Vec<Guarded>,
    next: AtomicUsize,
    when_all_open: WhenAllOpen,
    /// Whether it was said that none admits.
    all_open: AtomicBool,
}

#[derive(Debug)]
struct Guarded {
    upstream: Upstream,
    /// `None`: breakers are off.
    breaker: Option<Arc<Breaker>>,
}

/// Which upstreams a request has failed to reach.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tried(u64);

impl Tried {
    fn has(self, index: usize) -> bool {
        self.0 & (1 << index) != 0
    }
}

/// Where a request goes.
#[derive(Debug)]
pub(crate) enum Picked {
    /// To this one. The permit is its breaker's, if it is asked and told.
    To(usize, Option<OwnedPermit>),
    /// Nowhere: no breaker admits, for this long.
    AllOpen(Duration),
    /// Nowhere: it has failed to reach one, and there is no other.
    NoneLeft,
}

impl Upstreams {
    /// At least one and at most [`MOST`], each with the breaker of its name.
    pub(crate) fn new(
        upstreams: Vec<Upstream>,
        breakers: Option<&Breakers>,
        when_all_open: WhenAllOpen,
    ) -> Self {
        let guarded = |upstream: Upstream| {
            let breaker = breakers.map(|breakers| breakers.get(&upstream.to_string()));
            Guarded { upstream, breaker }
        };
        Self {
            all: upstreams.into_iter().map(guarded).collect(),
            next: AtomicUsize::new(0),
            when_all_open,
            all_open: AtomicBool::new(false),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    /// Their names, in the order of their indices.
    pub(crate) fn names(&self) -> Vec<String> {
        self.all.iter().map(|guarded| guarded.upstream.to_string()).collect()
    }

    pub(crate) fn get(&self, index: usize) -> &Upstream {
        &self.all[index].upstream
    }

    /// The next one in turn that was not tried and whose breaker admits.
    pub(crate) fn pick(&self, tried: Tried, now: Instant) -> Picked {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let in_turn = || {
            let all = (0..self.all.len()).map(|step| turn.wrapping_add(step) % self.all.len());
            all.filter(|index| !tried.has(*index))
        };
        let mut soonest = Duration::MAX;
        for index in in_turn() {
            let Some(breaker) = &self.all[index].breaker else { return Picked::To(index, None) };
            match breaker.try_acquire_owned(now) {
                Ok(permit) => {
                    self.admitted(&permit);
                    return Picked::To(index, Some(permit));
                }
                Err(rejected) => {
                    soonest = soonest.min(rejected.retry_after);
                    // Its turn is over, too: else all of it would fall on its neighbour.
                    self.next.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let Some(next) = in_turn().next() else { return Picked::NoneLeft };
        let none_tried = tried.0 == 0;
        if none_tried {
            self.none_admits(soonest);
        }
        match self.when_all_open {
            WhenAllOpen::Try => Picked::To(next, None),
            WhenAllOpen::Refuse if none_tried => Picked::AllOpen(soonest),
            WhenAllOpen::Refuse => Picked::NoneLeft,
        }
    }

    /// Notes that `index` could not be reached; whether there is another one to try.
    pub(crate) fn failed(&self, index: usize, tried: &mut Tried) -> bool {
        tried.0 |= 1 << index;
        (tried.0.count_ones() as usize) < self.all.len()
    }

    /// Says once that none admits.
    fn none_admits(&self, soonest: Duration) {
        if !self.all_open.swap(true, Ordering::Relaxed) {
            let policy = self.when_all_open.as_str();
            tracing::warn!(policy, half_open_in = ?soonest, "no upstream's circuit breaker admits requests");
        }
    }

    /// Says once that one admits again. A probe does not yet mean that.
    fn admitted(&self, permit: &OwnedPermit) {
        if self.all_open.load(Ordering::Relaxed)
            && !permit.is_probe()
            && self.all_open.swap(false, Ordering::Relaxed)
        {
            tracing::info!(upstream = permit.breaker().key(), "an upstream admits requests again");
        }
    }

    /// For `/status`.
    pub(crate) fn shown(&self) -> Value {
        self.all.iter().map(|guarded| json!({ "url": guarded.upstream.to_string() })).collect()
    }
}

impl fmt::Display for Upstreams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> = self.all.iter().map(|guarded| guarded.upstream.to_string()).collect();
        f.write_str(&all.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three(spec: &str, when_all_open: WhenAllOpen, now: Instant) -> Upstreams {
        let upstreams =
            (1..=3).map(|port| Upstream::parse(&format!("http://127.0.0.1:{port}")).unwrap()).collect();
        let breakers = Breakers::new(spec.parse().unwrap(), now);
        Upstreams::new(upstreams, Some(&breakers), when_all_open)
    }

    fn picked(upstreams: &Upstreams, now: Instant) -> (usize, OwnedPermit) {
        match upstreams.pick(Tried::default(), now) {
            Picked::To(index, Some(permit)) => (index, permit),
            other => panic!("{other:?}"),
        }
    }

    fn open_all(upstreams: &Upstreams, now: Instant) {
        while let Picked::To(_, Some(permit)) = upstreams.pick(Tried::default(), now) {
            permit.failure(now);
        }
    }

    #[test]
    fn upstreams_take_turns_with_breakers_and_without() {
        let now = Instant::now();
        let upstreams = three("", WhenAllOpen::Refuse, now);
        let order: Vec<_> = (0..6).map(|_| picked(&upstreams, now).0).collect();
        assert_eq!(order, [0, 1, 2, 0, 1, 2]);
        let off = Upstreams::new(vec![upstreams.get(0).clone()], None, WhenAllOpen::Refuse);
        assert!(matches!(off.pick(Tried::default(), now), Picked::To(0, None)));
    }

    #[test]
    fn one_whose_breaker_is_open_is_passed_over_until_it_half_opens() {
        let now = Instant::now();
        let upstreams = three("volume=1,sleep=5s", WhenAllOpen::Refuse, now);
        picked(&upstreams, now).1.failure(now);
        let picks = |now| -> Vec<_> { (0..4).map(|_| picked(&upstreams, now).0).collect() };
        assert!(!picks(now).contains(&0));
        assert!(picks(now + Duration::from_secs(5)).contains(&0));
    }

    #[test]
    fn the_load_of_an_open_one_is_spread_over_all_others() {
        let now = Instant::now();
        let upstreams = three("volume=1,sleep=5s", WhenAllOpen::Refuse, now);
        picked(&upstreams, now).1.failure(now);
        let mut loads = [0; 3];
        (0..300).for_each(|_| loads[picked(&upstreams, now).0] += 1);
        assert_eq!(loads, [0, 150, 150]);
    }

    #[test]
    fn a_request_tries_each_upstream_once() {
        let now = Instant::now();
        let upstreams = three("", WhenAllOpen::Refuse, now);
        let mut tried = Tried::default();
        let mut order = Vec::new();
        while let Picked::To(index, permit) = upstreams.pick(tried, now) {
            drop(permit);
            order.push(index);
            assert_eq!(upstreams.failed(index, &mut tried), order.len() < 3);
        }
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2]);
        assert!(matches!(upstreams.pick(tried, now), Picked::NoneLeft));
    }

    #[test]
    fn when_all_are_open_the_policy_decides_and_a_try_tells_no_breaker() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let refusing = three("volume=1,sleep=5s", WhenAllOpen::Refuse, now);
        open_all(&refusing, now);
        let left = Duration::from_secs(4);
        assert!(matches!(refusing.pick(Tried::default(), later), Picked::AllOpen(after) if after == left));
        let trying = three("volume=1,sleep=5s", WhenAllOpen::Try, now);
        // The first round opened them; here it never ends with a permit either.
        open_all(&trying, now);
        let turns: Vec<_> = (0..3)
            .map(|_| match trying.pick(Tried::default(), later) {
                Picked::To(index, None) => index,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(turns.len(), 3);
        assert_ne!(turns[0], turns[1]);
    }

    #[test]
    fn one_that_failed_to_connect_while_the_others_are_open_is_a_failure_and_no_refusal() {
        let now = Instant::now();
        let upstreams = three("volume=1,sleep=5s", WhenAllOpen::Refuse, now);
        open_all(&upstreams, now);
        let mut tried = Tried::default();
        upstreams.failed(0, &mut tried);
        assert!(matches!(upstreams.pick(tried, now), Picked::NoneLeft));
    }

    #[test]
    fn a_policy_reads_back() {
        for policy in [WhenAllOpen::Refuse, WhenAllOpen::Try] {
            assert_eq!(WhenAllOpen::parse(&policy.to_string()), Some(policy));
        }
        assert_eq!(WhenAllOpen::parse("refused"), None);
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
