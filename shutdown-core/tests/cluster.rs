//! A thousand nodes, a rolling restart, and a network that loses, repeats, reorders and parts: simulated to the last
//! millisecond. What runs is the registry, the inbox and the outbox of every node, as they run in a process; time and network
//! are this file's.
//!
//! `SHUTDOWN_TESTS_LONG=1` takes 1,000 nodes and another seed each time, else there are 150 and always the same. A run that
//! fails prints its seed; `SHUTDOWN_TESTS_SEED=n` runs that one again.
#![expect(clippy::unwrap_used, reason = "a test's helpers, like the test, fail by panicking")]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use shutdown_core::peers::notice::{Datagram, Identity, Inbox, Keys, Kind, Outbox, Why};
use shutdown_core::peers::{Id, Incarnation, PeerRecord, PeerRegistry, PeerState};

/// When the simulation begins, milliseconds since the Unix epoch.
const EPOCH: u64 = 1_795_273_877_139;
/// How long a node has for its departure, and how long it is away.
const DRAIN: u64 = 1_000;
const AWAY: u64 = 2_000;

/// What the network does.
#[derive(Clone, Copy, Debug)]
struct Network {
    loss: f64,
    repeats: f64,
    /// Datagrams that are late by up to two seconds: they come after everything that was sent behind them.
    late: f64,
    /// From when until when the two halves do not hear one another.
    parted: (u64, u64),
    /// Clocks are off by so many milliseconds at most, either way.
    skew: u64,
}

const CALM: Network = Network { loss: 0.0, repeats: 0.0, late: 0.0, parted: (0, 0), skew: 0 };
const ROUGH: Network = Network { loss: 0.1, repeats: 0.02, late: 0.05, parted: (8_000, 28_000), skew: 5_000 };

/// Chance that can be had again (xorshift64*).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn is(&mut self, probability: f64) -> bool {
        self.next() < probability
    }

    fn up_to(&mut self, most: u64) -> u64 {
        (self.next() * most as f64) as u64
    }
}

/// One run of a node.
struct Run {
    incarnation: u64,
    identity: Identity,
    peers: PeerRegistry,
    inbox: Inbox,
    outbox: Outbox,
    /// When the outbox began.
    since: u64,
    /// When it began to hear.
    began: u64,
    /// How far its clock is off, in milliseconds.
    skew: i64,
}

enum Event {
    /// To the node that this number has; from that one.
    Datagram {
        to: usize,
        from: usize,
        bytes: Rc<[u8]>,
    },
    /// A round of this run's notice is due.
    Round {
        of: usize,
        incarnation: u64,
        kind: Kind,
    },
    Leave(usize),
    Stop(usize),
    Start(usize),
}

/// Who is wrong about whom, and what it knows.
type Wrong = (usize, usize, Option<(PeerState, u64)>);

struct Simulation {
    network: Network,
    chance: Chance,
    now: u64,
    nodes: Vec<Option<Run>>,
    /// What each left behind.
    states: Vec<Vec<PeerRecord>>,
    /// One in ten is killed, and leaves nothing.
    killed: Vec<bool>,
    incarnations: Vec<u64>,
    /// How far each clock is off, in milliseconds.
    skews: Vec<i64>,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: std::collections::HashMap<u64, Event>,
    next: u64,
    keys: Keys,
    /// Peers that had not heard of a departure when its node was gone.
    unheard: u64,
    /// Departures that were told again to who has acknowledged them.
    repeated: u64,
    departures: u64,
    datagrams: u64,
}

fn addr(node: usize) -> SocketAddr {
    let [.., high, middle, low] = u32::try_from(node).unwrap().to_be_bytes();
    SocketAddr::from(([10, high, middle, low], 8443))
}

fn name(node: usize) -> String {
    format!("node-{node}")
}

impl Simulation {
    fn new(nodes: usize, network: Network, seed: u64) -> Self {
        let mut simulation = Self {
            network,
            chance: Chance(seed.wrapping_mul(2).wrapping_add(1)),
            now: 0,
            nodes: (0..nodes).map(|_| None).collect(),
            states: vec![Vec::new(); nodes],
            killed: vec![false; nodes],
            incarnations: vec![0; nodes],
            skews: vec![0; nodes],
            queue: BinaryHeap::new(),
            events: Default::default(),
            next: 0,
            keys: Keys::parse("1:000102030405060708090a0b0c0d0e0f").unwrap(),
            unheard: 0,
            repeated: 0,
            departures: 0,
            datagrams: 0,
        };
        for node in 0..nodes {
            let skewed = simulation.chance.up_to(2 * network.skew) as i64 - network.skew as i64;
            simulation.skews[node] = skewed;
            let at = simulation.chance.up_to(500);
            simulation.at(at, Event::Start(node));
        }
        simulation
    }

    fn at(&mut self, when: u64, event: Event) {
        self.next += 1;
        self.queue.push(Reverse((when, self.next)));
        self.events.insert(self.next, event);
    }

    /// Runs until nothing happens any more, or until then.
    fn run(&mut self, until: u64) {
        while let Some(Reverse((when, number))) = self.queue.peek().copied()
            && when <= until
        {
            self.queue.pop();
            self.now = when;
            let event = self.events.remove(&number).unwrap();
            self.handle(event);
        }
        self.now = until;
    }

    fn unix(&self) -> u64 {
        EPOCH + self.now
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Start(node) => self.start(node),
            Event::Leave(node) => {
                let now = self.unix();
                let run = self.nodes[node].as_mut().unwrap();
                let notice = run.identity.leaving(Why::Term, Duration::from_millis(DRAIN));
                run.outbox = Outbox::to_peers(notice, self.keys.clone(), &run.peers, now);
                run.since = self.now;
                self.departures += 1;
                self.round(node);
                self.at(self.now + DRAIN, Event::Stop(node));
            }
            Event::Stop(node) => {
                let run = self.nodes[node].take().unwrap();
                self.killed[node] = self.chance.is(0.1);
                if !self.killed[node] {
                    self.states[node] = run.peers.export(self.unix());
                }
                self.note_unheard(node, &run);
                self.at(self.now + AWAY, Event::Start(node));
            }
            Event::Round { of, incarnation, kind } => {
                let runs = |run: &Run| run.incarnation == incarnation && run.outbox.kind() == kind;
                if self.nodes[of].as_ref().is_some_and(runs) {
                    self.round(of);
                }
            }
            Event::Datagram { to, from, bytes } => self.deliver(to, from, &bytes),
        }
    }

    fn start(&mut self, node: usize) {
        let now = self.unix();
        let incarnation = now.saturating_add_signed(self.skews[node]).max(self.incarnations[node] + 1);
        self.incarnations[node] = incarnation;
        let identity = Identity::new(&name(node), "default", Incarnation::new(incarnation), vec![addr(node)]);
        let peers = PeerRegistry::new(identity.node());
        (0..self.nodes.len()).filter(|other| *other != node).for_each(|other| peers.configure(addr(other)));
        peers.import(&self.states[node], now, now);
        let inbox = Inbox::new(identity.clone(), self.keys.clone(), peers.clone());
        let notice = identity.returning().unwrap();
        let outbox = Outbox::to_peers(notice, self.keys.clone(), &peers, now);
        let since = self.now;
        let (began, skew) = (self.now, self.skews[node]);
        self.nodes[node] = Some(Run { incarnation, identity, peers, inbox, outbox, since, began, skew });
        self.round(node);
    }

    /// Begins a round, and says when the next one is due.
    fn round(&mut self, node: usize) {
        let now = self.unix();
        let run = self.nodes[node].as_mut().unwrap();
        if run.outbox.settle() || run.outbox.next_round().is_none() {
            return;
        }
        run.outbox.begin_round(now.saturating_add_signed(run.skew));
        let bytes: Rc<[u8]> = run.outbox.datagram().into();
        let mut told = Vec::new();
        run.outbox.tell(|to, datagram| {
            told.push(to);
            Some(Ok(datagram.len()))
        });
        let (incarnation, kind) = (run.incarnation, run.outbox.kind());
        let next = run.outbox.next_round().map(|at| run.since + u64::try_from(at.as_millis()).unwrap());
        for to in told {
            let SocketAddr::V4(to) = to else { unreachable!("all are IPv4") };
            let to = usize::try_from(u32::from_be_bytes(to.ip().octets()) & 0x00ff_ffff).unwrap();
            self.send(to, node, Rc::clone(&bytes));
        }
        if let Some(next) = next {
            self.at(next.max(self.now + 1), Event::Round { of: node, incarnation, kind });
        }
    }

    fn send(&mut self, to: usize, from: usize, bytes: Rc<[u8]>) {
        self.datagrams += 1;
        let network = self.network;
        let half = self.nodes.len() / 2;
        let parted = (network.parted.0..network.parted.1).contains(&self.now);
        if self.chance.is(network.loss) || (parted && (to < half) != (from < half)) {
            return;
        }
        for _ in 0..1 + usize::from(self.chance.is(network.repeats)) {
            let delay =
                if self.chance.is(network.late) { self.chance.up_to(2_000) } else { self.chance.up_to(20) };
            self.at(self.now + delay, Event::Datagram { to, from, bytes: Rc::clone(&bytes) });
        }
    }

    fn deliver(&mut self, to: usize, from: usize, bytes: &[u8]) {
        let now = self.unix();
        let Some(run) = &mut self.nodes[to] else { return };
        let Ok(Datagram::Ack(ack)) = Datagram::decode(bytes, &self.keys) else {
            let heard_for = Duration::from_millis(self.now - run.began);
            let theirs = now.saturating_add_signed(run.skew);
            if let Ok(heard) = run.inbox.receive(bytes, addr(from), heard_for, theirs)
                && let Some(answer) = heard.answer
            {
                self.send(from, to, answer.into());
            }
            return;
        };
        let elapsed = Duration::from_millis(self.now - run.since);
        if let Some(recipient) = run.outbox.acknowledge(&ack, addr(from), elapsed) {
            run.peers.acknowledged(ack.by, recipient.addr, run.outbox.kind(), now);
        }
    }

    /// Looks who still routes to a node that is gone. Nobody does who has acknowledged its departure.
    fn note_unheard(&mut self, node: usize, run: &Run) {
        let now = self.unix();
        let acknowledged = |other: &usize| {
            let letters = run.outbox.letters();
            letters.iter().any(|letter| letter.to.addr == addr(*other) && letter.acknowledged.is_some())
        };
        let routes: Vec<usize> = (0..self.nodes.len())
            .filter(|other| {
                let theirs = self.nodes[*other].as_ref();
                theirs
                    .and_then(|theirs| theirs.peers.get(Id::of(&name(node)), now))
                    .is_some_and(|peer| peer.routable)
            })
            .collect();
        // Who has begun anew since may not remember: what it is told is that the node is configured to be there.
        let began_since = |other: &usize| {
            self.nodes[*other].as_ref().is_some_and(|theirs| theirs.began + DRAIN + AWAY >= self.now)
        };
        let liar = routes.iter().find(|other| acknowledged(other) && !began_since(other));
        assert_eq!(liar, None, "it has acknowledged that {node} leaves and still routes to it");
        self.unheard += routes.len() as u64;
        let heard = run.outbox.letters().iter().filter(|letter| letter.acknowledged.is_some());
        self.repeated += heard.map(|letter| u64::from(letter.sends - 1)).sum::<u64>();
    }

    /// Restarts all, so many at once. When it is over.
    fn rolling_restart(&mut self, begin: u64, at_once: usize) -> u64 {
        let mut when = begin;
        let all: Vec<usize> = (0..self.nodes.len()).collect();
        for batch in all.chunks(at_once) {
            for node in batch {
                let at = when + self.chance.up_to(200);
                self.at(at, Event::Leave(*node));
            }
            when += DRAIN + AWAY + 500;
        }
        when
    }

    /// Who does not know what is true of whom.
    fn not_converged(&self) -> Vec<Wrong> {
        let now = self.unix();
        let mut wrong = Vec::new();
        for (node, run) in self.nodes.iter().enumerate() {
            let run = run.as_ref().expect("all are back");
            for (other, incarnation) in
                self.incarnations.iter().enumerate().filter(|(other, _)| *other != node)
            {
                let known = run.peers.get(Id::of(&name(other)), now);
                let known = known.map(|peer| (peer.state, peer.incarnation));
                // Who has lost its memory knows that a peer is up, for it has acknowledged, and not since when.
                let forgot = self.killed[node].then_some((PeerState::Up, 0));
                if known != Some((PeerState::Up, *incarnation)) && (forgot.is_none() || known != forgot) {
                    wrong.push((node, other, known));
                }
            }
        }
        wrong
    }
}

fn nodes() -> usize {
    if std::env::var_os("SHUTDOWN_TESTS_LONG").is_some() { 1_000 } else { 150 }
}

fn seed() -> u64 {
    match std::env::var("SHUTDOWN_TESTS_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        // The same each time, but for a long run.
        Err(_) if std::env::var_os("SHUTDOWN_TESTS_LONG").is_none() => 6,
        Err(_) => std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(),
    }
}

/// A rolling restart, a twentieth at once, and then time for the last repetition.
fn restarted(nodes: usize, network: Network, seed: u64) -> Simulation {
    let mut simulation = Simulation::new(nodes, network, seed);
    let over = simulation.rolling_restart(3_000, (nodes / 20).max(1));
    simulation.run(over.max(network.parted.1.min(over + 600_000)) + 300_000);
    simulation
}

#[test]
fn every_node_knows_every_other_after_a_rolling_restart_through_loss_reordering_and_a_partition() {
    let (nodes, seed) = (nodes(), seed());
    println!("{nodes} nodes, seed {seed}");
    let simulation = restarted(nodes, ROUGH, seed);
    let pairs = (nodes * (nodes - 1)) as u64;
    println!(
        "{} departures, {} datagrams ({:.2} for each of {} notices and its acknowledgement), {} of {pairs} peers unheard when the node was gone",
        simulation.departures,
        simulation.datagrams,
        simulation.datagrams as f64 / (3 * pairs) as f64,
        3 * pairs,
        simulation.unheard,
    );
    assert_eq!(simulation.departures, nodes as u64);
    let wrong = simulation.not_converged();
    assert!(wrong.is_empty(), "seed {seed}: {} of {pairs} are wrong, first {:?}", wrong.len(), wrong[0]);
    // The partition is what most do not hear through; a half of all that leave meanwhile.
    assert!(simulation.unheard > 0, "seed {seed}: the network was to be rough");
}

#[test]
fn in_a_calm_network_everybody_hears_every_departure_before_its_node_is_gone() {
    let simulation = restarted(60, CALM, seed());
    assert_eq!((simulation.unheard, simulation.not_converged()), (0, Vec::new()));
    // Every peer that was there was told once.
    assert_eq!(simulation.repeated, 0);
}

#[test]
fn a_partition_that_does_not_end_is_not_overlooked() {
    // The control: what says that all has converged must be able to say that it has not.
    let apart = Network { parted: (2_000, u64::MAX), ..CALM };
    let wrong = restarted(40, apart, seed()).not_converged();
    assert_eq!(wrong.len(), 2 * 20 * 20, "each knows its own half");
}

#[test]
fn the_same_seed_is_the_same_run() {
    let count = |seed| {
        let simulation = restarted(30, ROUGH, seed);
        (simulation.datagrams, simulation.unheard)
    };
    assert_eq!(count(7), count(7));
    assert_ne!(count(7), count(8));
}
