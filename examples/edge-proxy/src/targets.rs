//! Where requests go: upstreams and peers in turn, past those that have left and those whose circuit breaker does not admit.
//!
//! All that may be asked now stands in a [`Table`], which is replaced as a whole when a peer comes or goes and never changed.
//! A request takes the table with its [`Route`] and keeps it, so an index means the same target to its end. A target that
//! leaves is marked as well, which every request sees, whatever table it has. The mark stays: who comes back is a new target,
//! so what a request of before finds out tells nobody anything.
//!
//! An upstream that was given by address and is a peer leaves and comes back with that peer, and has one turn, the upstream's.
//!
//! Choosing is pure: time is an argument.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use serde_json::{Value, json};
use shutdown_core::breaker::{Breaker, Breakers, OwnedPermit};
use shutdown_core::peers::{Peer, PeerState};
use tokio::time::Instant;

use crate::upstreams::Upstream;

/// How many targets one request tries at most.
pub(crate) const MOST_TRIES: usize = 64;

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

/// Who a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Anybody.
    All,
    /// The upstreams alone: a peer has sent it, and may be sent what we pass on.
    Upstreams,
    /// The upstreams that are no peers: it has been here before.
    NoPeers,
}

/// One that requests may be sent to.
#[derive(Debug)]
pub(crate) struct Target {
    name: Arc<str>,
    at: Upstream,
    /// It is a peer, be it given as an upstream as well.
    is_peer: bool,
    /// `None`: breakers are off.
    breaker: Option<Arc<Breaker>>,
    left: AtomicBool,
}

impl Target {
    /// As `http://host:port`.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Its address now.
    ///
    /// # Errors
    ///
    /// What the resolver said.
    pub(crate) async fn addr(&self) -> std::io::Result<SocketAddr> {
        self.at.addr().await
    }

    /// Whether it is a peer, be it given as an upstream as well.
    pub(crate) fn is_peer(&self) -> bool {
        self.is_peer
    }

    /// Whether it has said that it leaves. Then no new request goes there, and its breaker hears nothing more.
    pub(crate) fn has_left(&self) -> bool {
        // Relaxed: it says nothing about other memory.
        self.left.load(Ordering::Relaxed)
    }
}

/// All that may be asked at one time.
#[derive(Debug, Default)]
struct Table {
    /// Upstreams first, and of those first the ones that are no peers.
    all: Vec<Arc<Target>>,
    /// How many of them are upstreams, and how many of those are no peers.
    upstreams: usize,
    no_peers: usize,
    /// The names of all peers, those that have left as well: they keep their breakers.
    peers: BTreeSet<Arc<str>>,
}

impl Table {
    fn of(&self, scope: Scope) -> &[Arc<Target>] {
        match scope {
            Scope::All => &self.all,
            Scope::Upstreams => &self.all[..self.upstreams],
            Scope::NoPeers => &self.all[..self.no_peers],
        }
    }
}

/// One request's way through the table.
#[derive(Debug)]
pub(crate) struct Route {
    table: Arc<Table>,
    scope: Scope,
    /// Those that it has failed to reach.
    tried: Vec<usize>,
}

impl Route {
    pub(crate) fn target(&self, index: usize) -> &Target {
        &self.table.all[index]
    }

    /// Notes that `index` could not be reached; whether there is another one to try.
    pub(crate) fn failed(&mut self, index: usize) -> bool {
        self.tried.push(index);
        self.tried.len() < MOST_TRIES && (0..self.table.of(self.scope).len()).any(|index| self.may_try(index))
    }

    fn may_try(&self, index: usize) -> bool {
        !self.tried.contains(&index) && !self.target(index).has_left()
    }
}

/// Where a request goes.
#[derive(Debug)]
pub(crate) enum Picked {
    /// To this one. The permit is its breaker's, if it is asked and told.
    To(usize, Option<OwnedPermit>),
    /// Nowhere: no breaker admits, for this long.
    AllOpen(Duration),
    /// Nowhere: there is none, or it has failed to reach one and there is no other.
    NoneLeft,
}

/// The upstreams and the peers. Health is passive: only real requests find out, and only the breakers remember.
#[derive(Debug)]
pub(crate) struct Targets {
    /// As configured.
    upstreams: Vec<Upstream>,
    breakers: Option<Arc<Breakers>>,
    table: ArcSwap<Table>,
    /// Whose turn it is, for each scope: requests that come from peers shift nobody else's.
    turns: [AtomicUsize; 3],
    when_all_open: WhenAllOpen,
    /// Whether it was said that none admits.
    all_open: AtomicBool,
}

impl Targets {
    /// These upstreams, and no peers yet; each with the breaker of its name.
    pub(crate) fn new(
        upstreams: Vec<Upstream>,
        breakers: Option<Arc<Breakers>>,
        when_all_open: WhenAllOpen,
    ) -> Self {
        // One that is given twice has one turn.
        let mut given = HashSet::new();
        let upstreams = upstreams.into_iter().filter(|upstream| given.insert(upstream.to_string())).collect();
        let targets = Self {
            upstreams,
            breakers,
            table: ArcSwap::default(),
            turns: Default::default(),
            when_all_open,
            all_open: AtomicBool::new(false),
        };
        targets.update(&[]);
        targets
    }

    /// Replaces the table by what these peers make of it. One caller at a time.
    pub(crate) fn update(&self, peers: &[Peer]) {
        let old = self.table.load_full();
        let addresses = |wanted: fn(&Peer) -> bool| -> HashSet<SocketAddr> {
            peers.iter().filter(|peer| wanted(peer)).flat_map(|peer| peer.vouched.iter().copied()).collect()
        };
        // Not by discovery's word alone: anybody on the link could take an upstream away.
        let there = addresses(|peer| peer.routable);
        let gone = addresses(|peer| matches!(peer.state, PeerState::Draining | PeerState::Departed));
        let has_left = |addr: SocketAddr| gone.contains(&addr) && !there.contains(&addr);

        let mut table = Table::default();
        let known: HashMap<_, _> =
            old.all.iter().map(|target| ((target.is_peer, &*target.name), target)).collect();
        let kept_or_new = |at: &Upstream, name: Arc<str>, is_peer: bool| match known.get(&(is_peer, &*name)) {
            Some(known) => Arc::clone(known),
            None => Arc::new(self.target(at, name, is_peer)),
        };
        let at_peers = addresses(|_| true);
        for are_peers in [false, true] {
            for upstream in &self.upstreams {
                let at = upstream.given_addr();
                if at.is_some_and(|at| at_peers.contains(&at)) == are_peers && !at.is_some_and(has_left) {
                    table.all.push(kept_or_new(upstream, upstream.to_string().into(), are_peers));
                }
            }
            table.upstreams = table.all.len();
            if !are_peers {
                table.no_peers = table.upstreams;
            }
        }
        let given: HashSet<_> = self.upstreams.iter().filter_map(Upstream::given_addr).collect();
        // Two nodes at one address are one place.
        let mut taken = HashSet::new();
        for peer in peers {
            let Some(addr) = target_of(peer).filter(|addr| !given.contains(addr)) else { continue };
            let at = Upstream::from(addr);
            let name: Arc<str> = at.to_string().into();
            table.peers.insert(Arc::clone(&name));
            if peer.routable && taken.insert(addr) {
                table.all.push(kept_or_new(&at, name, true));
            }
        }

        let kept: HashSet<_> = table.all.iter().map(Arc::as_ptr).collect();
        for target in old.all.iter().filter(|target| !kept.contains(&Arc::as_ptr(target))) {
            // Before the table is replaced: nobody may find it there unmarked.
            target.left.store(true, Ordering::Relaxed);
        }
        let forgotten: Vec<_> = old.peers.difference(&table.peers).cloned().collect();
        self.table.store(Arc::new(table));
        if let Some(breakers) = &self.breakers {
            forgotten.iter().for_each(|name| _ = breakers.remove(name));
        }
    }

    fn target(&self, at: &Upstream, name: Arc<str>, is_peer: bool) -> Target {
        let breaker = self.breakers.as_ref().map(|breakers| breakers.get(&name));
        Target { name, at: at.clone(), is_peer, breaker, left: AtomicBool::new(false) }
    }

    /// The way of a request that begins now.
    pub(crate) fn route(&self, scope: Scope) -> Route {
        Route { table: self.table.load_full(), scope, tried: Vec::new() }
    }

    /// The next one in turn that was not tried, has not left and whose breaker admits.
    pub(crate) fn pick(&self, route: &Route, now: Instant) -> Picked {
        let all = route.table.of(route.scope);
        let turns = &self.turns[route.scope as usize];
        let turn = turns.fetch_add(1, Ordering::Relaxed);
        let in_turn = || {
            let all = (0..all.len()).map(|step| turn.wrapping_add(step) % all.len());
            all.filter(|index| route.may_try(*index))
        };
        let mut soonest = Duration::MAX;
        for index in in_turn() {
            let Some(breaker) = &all[index].breaker else { return Picked::To(index, None) };
            match breaker.try_acquire_owned(now) {
                Ok(permit) => {
                    self.admitted(&permit);
                    return Picked::To(index, Some(permit));
                }
                Err(rejected) => {
                    soonest = soonest.min(rejected.retry_after);
                    // Its turn is over, too: else all of it would fall on its neighbour.
                    turns.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let Some(next) = in_turn().next() else { return Picked::NoneLeft };
        let none_tried = route.tried.is_empty();
        if none_tried {
            self.none_admits(soonest);
        }
        match self.when_all_open {
            WhenAllOpen::Try => Picked::To(next, None),
            WhenAllOpen::Refuse if none_tried => Picked::AllOpen(soonest),
            WhenAllOpen::Refuse => Picked::NoneLeft,
        }
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

    /// The upstreams, for `/status`.
    pub(crate) fn shown(&self) -> Value {
        let table = self.table.load();
        let shown = |upstream: &Upstream| {
            let url = upstream.to_string();
            let left = !table.of(Scope::Upstreams).iter().any(|target| *target.name == *url);
            json!({ "url": url, "left": left })
        };
        self.upstreams.iter().map(shown).collect()
    }
}

/// The upstreams, as configured.
impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> = self.upstreams.iter().map(ToString::to_string).collect();
        f.write_str(&all.join(", "))
    }
}

/// Where a peer is sent requests: where it is configured to be, else at the first of its addresses that others than its
/// neighbours on the link reach, else at the first.
pub(crate) fn target_of(peer: &Peer) -> Option<SocketAddr> {
    let reached_from_afar = || peer.addresses.iter().find(|addr| !is_link_local(addr)).copied();
    peer.configured.or_else(reached_from_afar).or_else(|| peer.addresses.first().copied())
}

/// Whether it is told over one link alone, and in IPv6 not without an interface.
pub(crate) fn is_link_local(addr: &SocketAddr) -> bool {
    match addr.ip() {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use shutdown_core::peers::notice::{Kind, Notice, Why};
    use shutdown_core::peers::{Id, PeerRegistry, Sighting};

    use super::*;

    fn now() -> Instant {
        Instant::now()
    }

    fn upstreams(count: u16) -> Vec<Upstream> {
        (1..=count).map(|port| Upstream::from(at(port))).collect()
    }

    fn at(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn three(spec: &str, when_all_open: WhenAllOpen, now: Instant) -> Targets {
        let breakers = Breakers::new(spec.parse().unwrap(), now);
        Targets::new(upstreams(3), Some(Arc::new(breakers)), when_all_open)
    }

    fn picked(targets: &Targets, now: Instant) -> (usize, OwnedPermit) {
        match targets.pick(&targets.route(Scope::All), now) {
            Picked::To(index, Some(permit)) => (index, permit),
            other => panic!("{other:?}"),
        }
    }

    fn open_all(targets: &Targets, now: Instant) {
        while let Picked::To(_, Some(permit)) = targets.pick(&targets.route(Scope::All), now) {
            permit.failure(now);
        }
    }

    /// The ports of the next `count` requests, each without any trouble.
    fn ports(targets: &Targets, scope: Scope, count: usize) -> Vec<u16> {
        let port = |_| {
            let route = targets.route(scope);
            match targets.pick(&route, now()) {
                Picked::To(index, _) => route.target(index).at.given_addr().unwrap().port(),
                other => panic!("{other:?}"),
            }
        };
        (0..count).map(port).collect()
    }

    /// A registry with peers at these ports, and the targets of `count` upstreams beside them.
    struct Rig {
        registry: PeerRegistry,
        targets: Targets,
        breakers: Arc<Breakers>,
        seq: u64,
    }

    impl Rig {
        fn new(count: u16, peers: impl IntoIterator<Item = u16>) -> Self {
            let registry = PeerRegistry::with_threshold(Id::of("own"), 0);
            peers.into_iter().for_each(|port| registry.configure(at(port)));
            let breakers = Arc::new(Breakers::new("volume=1,sleep=5s".parse().unwrap(), now()));
            let targets = Targets::new(upstreams(count), Some(Arc::clone(&breakers)), WhenAllOpen::Refuse);
            let rig = Self { registry, targets, breakers, seq: 0 };
            rig.update();
            rig
        }

        fn update(&self) {
            self.targets.update(&self.registry.peers(1_000));
        }

        /// The peer at this port says this.
        fn says(&mut self, kind: Kind, port: u16) {
            self.seq += 1;
            let notice = Notice {
                kind,
                ack_wanted: true,
                restarting: false,
                why: Why::default(),
                attempt: 0,
                incarnation: 500,
                seq: self.seq,
                sent_at: 1_000,
                drain_ms: 28_000,
                node: Id::of(&format!("edge-{port}")),
                cluster: Id::of("default"),
                endpoints: vec![at(port)],
            };
            self.registry.heard(&notice, 1_000);
            self.update();
        }
    }

    #[test]
    fn upstreams_take_turns_with_breakers_and_without() {
        let now = now();
        let targets = three("", WhenAllOpen::Refuse, now);
        let order: Vec<_> = (0..6).map(|_| picked(&targets, now).0).collect();
        assert_eq!(order, [0, 1, 2, 0, 1, 2]);
        let off = Targets::new(upstreams(1), None, WhenAllOpen::Refuse);
        assert!(matches!(off.pick(&off.route(Scope::All), now), Picked::To(0, None)));
    }

    #[test]
    fn peers_take_turns_with_upstreams_and_a_peer_s_requests_go_to_upstreams_alone() {
        let rig = Rig::new(2, [11, 12]);
        assert_eq!(ports(&rig.targets, Scope::All, 6), [1, 2, 11, 12, 1, 2]);
        assert_eq!(ports(&rig.targets, Scope::Upstreams, 4), [1, 2, 1, 2]);
        assert_eq!(ports(&rig.targets, Scope::All, 2), [11, 12], "nobody's turn was taken");
    }

    #[test]
    fn a_request_that_has_been_here_before_goes_to_no_upstream_that_is_a_peer() {
        let rig = Rig::new(2, [2, 11]);
        assert_eq!(ports(&rig.targets, Scope::All, 3), [1, 2, 11]);
        assert_eq!(ports(&rig.targets, Scope::Upstreams, 2), [1, 2]);
        assert_eq!(ports(&rig.targets, Scope::NoPeers, 2), [1, 1]);
        let only = Rig::new(1, [1]);
        let route = only.targets.route(Scope::NoPeers);
        assert!(matches!(only.targets.pick(&route, now()), Picked::NoneLeft));
    }

    #[test]
    fn a_request_that_comes_from_a_peer_and_finds_no_upstream_goes_nowhere() {
        let mut rig = Rig::new(1, [1, 11]);
        rig.says(Kind::Leaving, 1);
        let route = rig.targets.route(Scope::Upstreams);
        assert!(matches!(rig.targets.pick(&route, now()), Picked::NoneLeft));
    }

    #[test]
    fn a_peer_that_leaves_gets_no_new_request_and_one_that_is_back_does() {
        let mut rig = Rig::new(1, [11, 12]);
        rig.says(Kind::Leaving, 11);
        assert!(!ports(&rig.targets, Scope::All, 9).contains(&11));
        rig.says(Kind::Return, 11);
        assert!(ports(&rig.targets, Scope::All, 9).contains(&11));
    }

    #[test]
    fn a_request_under_way_does_not_go_on_to_a_peer_that_has_left_meanwhile() {
        let mut rig = Rig::new(1, [11, 12]);
        let mut route = rig.targets.route(Scope::All);
        rig.says(Kind::Leaving, 11);
        assert!(route.failed(0), "12 is left");
        assert!(matches!(rig.targets.pick(&route, now()), Picked::To(2, _)));
        assert!(!route.failed(2));
        rig.says(Kind::Return, 11);
        assert!(!route.failed(2), "the one that is back is another");
        assert!(route.target(1).has_left());
    }

    #[test]
    fn who_leaves_keeps_its_breaker_until_it_is_forgotten() {
        let mut rig = Rig::new(1, [11]);
        let (name, now) = ("http://127.0.0.1:11", now());
        rig.breakers.get(name).try_acquire(now).unwrap().failure(now);
        rig.says(Kind::Leaving, 11);
        rig.says(Kind::Return, 11);
        assert_eq!(ports(&rig.targets, Scope::All, 4), [1; 4], "still open");
        rig.targets.update(&[]);
        let names: Vec<_> =
            rig.breakers.snapshot(now).iter().map(|breaker| breaker.peer.to_string()).collect();
        assert_eq!(names, ["http://127.0.0.1:1"]);
    }

    #[test]
    fn an_upstream_that_is_a_peer_has_one_turn_and_leaves_and_comes_back_with_it() {
        let mut rig = Rig::new(2, [2]);
        assert_eq!(ports(&rig.targets, Scope::All, 4), [1, 2, 1, 2]);
        let route = rig.targets.route(Scope::All);
        assert!(route.target(1).is_peer(), "it is both");
        rig.says(Kind::Leaving, 2);
        assert_eq!(ports(&rig.targets, Scope::All, 3), [1; 3]);
        assert!(route.target(1).has_left());
        let left = |rig: &Rig| rig.targets.shown()[1]["left"].clone();
        assert_eq!(left(&rig), true);
        rig.says(Kind::Return, 2);
        assert!(ports(&rig.targets, Scope::All, 2).contains(&2));
        assert_eq!(left(&rig), false);
    }

    #[test]
    fn hundreds_of_targets_take_turns_and_one_request_tries_a_limited_number() {
        let rig = Rig::new(1, 1_000..1_200);
        let mut seen = ports(&rig.targets, Scope::All, 201);
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 201);
        let mut route = rig.targets.route(Scope::All);
        let mut tried = BTreeSet::new();
        while let Picked::To(index, _) = rig.targets.pick(&route, now()) {
            assert!(tried.insert(index));
            if !route.failed(index) {
                break;
            }
        }
        assert_eq!(tried.len(), MOST_TRIES);
    }

    #[test]
    fn a_peer_is_asked_where_it_is_configured_else_where_others_than_its_neighbours_reach_it() {
        let registry = PeerRegistry::new(Id::of("own"));
        let sighted = |name: &str, addresses: &[&str]| {
            let addresses = addresses.iter().map(|addr| addr.parse().unwrap()).collect();
            registry.sighted(Sighting { name: name.into(), incarnation: None, addresses, notices: None }, 1);
            target_of(&registry.get(Id::of(name), 1).unwrap()).unwrap().to_string()
        };
        assert_eq!(sighted("a", &["[fe80::1]:80", "169.254.0.1:80", "10.0.0.1:80"]), "10.0.0.1:80");
        assert_eq!(sighted("b", &["[fe80::2]:80", "169.254.0.2:80"]), "[fe80::2]:80");
        registry.configure("169.254.0.3:80".parse().unwrap());
        assert_eq!(sighted("c", &["10.0.0.3:80", "169.254.0.3:80"]), "169.254.0.3:80");
    }

    #[test]
    fn one_whose_breaker_is_open_is_passed_over_until_it_half_opens() {
        let now = now();
        let targets = three("volume=1,sleep=5s", WhenAllOpen::Refuse, now);
        picked(&targets, now).1.failure(now);
        let picks = |now| -> Vec<_> { (0..4).map(|_| picked(&targets, now).0).collect() };
        assert!(!picks(now).contains(&0));
        assert!(picks(now + Duration::from_secs(5)).contains(&0));
    }

    #[test]
    fn the_load_of_an_open_one_is_spread_over_all_others() {
        let now = now();
        let targets = three("volume=1,sleep=5s", WhenAllOpen::Refuse, now);
        picked(&targets, now).1.failure(now);
        let mut loads = [0; 3];
        (0..300).for_each(|_| loads[picked(&targets, now).0] += 1);
        assert_eq!(loads, [0, 150, 150]);
    }

    #[test]
    fn a_request_tries_each_upstream_once() {
        let now = now();
        let targets = three("", WhenAllOpen::Refuse, now);
        let mut route = targets.route(Scope::All);
        let mut order = Vec::new();
        while let Picked::To(index, permit) = targets.pick(&route, now) {
            drop(permit);
            order.push(index);
            assert_eq!(route.failed(index), order.len() < 3);
        }
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2]);
        assert!(matches!(targets.pick(&route, now), Picked::NoneLeft));
    }

    #[test]
    fn when_all_are_open_the_policy_decides_and_a_try_tells_no_breaker() {
        let now = now();
        let later = now + Duration::from_secs(1);
        let refusing = three("volume=1,sleep=5s", WhenAllOpen::Refuse, now);
        open_all(&refusing, now);
        let left = Duration::from_secs(4);
        assert!(
            matches!(refusing.pick(&refusing.route(Scope::All), later), Picked::AllOpen(after) if after == left)
        );
        let trying = three("volume=1,sleep=5s", WhenAllOpen::Try, now);
        // The first round opened them; here it never ends with a permit either.
        open_all(&trying, now);
        let turns: Vec<_> = (0..3)
            .map(|_| match trying.pick(&trying.route(Scope::All), later) {
                Picked::To(index, None) => index,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(turns.len(), 3);
        assert_ne!(turns[0], turns[1]);
    }

    #[test]
    fn one_that_failed_to_connect_while_the_others_are_open_is_a_failure_and_no_refusal() {
        let now = now();
        let targets = three("volume=1,sleep=5s", WhenAllOpen::Refuse, now);
        open_all(&targets, now);
        let mut route = targets.route(Scope::All);
        route.failed(0);
        assert!(matches!(targets.pick(&route, now), Picked::NoneLeft));
    }

    #[test]
    fn a_policy_reads_back() {
        for policy in [WhenAllOpen::Refuse, WhenAllOpen::Try] {
            assert_eq!(WhenAllOpen::parse(&policy.to_string()), Some(policy));
        }
        assert_eq!(WhenAllOpen::parse("refused"), None);
    }
}
