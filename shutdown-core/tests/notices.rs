//! The laws of notices: what is refused changes nothing and gets no answer; what is true is heard once, and acknowledged.
#![expect(clippy::unwrap_used, reason = "a test's helpers, like the test, fail by panicking")]

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use shutdown_core::peers::notice::{
    ACK_BYTES, Ack, Datagram, Identity, Inbox, Keys, Kind, Notice, Outbox, ROUNDS, Recipient, Refusal, Why,
};
use shutdown_core::peers::{Effect, Id, Incarnation, PeerRecord, PeerRegistry, PeerState};

const NOW: u64 = 1_795_273_877_139;
const BEGAN: u64 = NOW - 3_600_000;
const RUN: u64 = NOW - 60_000;
const KEY: &str = "1:000102030405060708090a0b0c0d0e0f";

fn keys(text: &str) -> Keys {
    Keys::parse(text).unwrap()
}

fn leaver() -> SocketAddr {
    "10.0.0.1:8443".parse().unwrap()
}

fn notice() -> Notice {
    Notice {
        kind: Kind::Leaving,
        ack_wanted: true,
        restarting: false,
        why: Why::Term,
        attempt: 0,
        incarnation: RUN,
        seq: 2,
        sent_at: NOW,
        drain_ms: 28_000,
        node: Id::of("leaver"),
        cluster: Id::of("default"),
        endpoints: vec![leaver()],
    }
}

/// A node that has the leaver among its peers.
struct Node {
    identity: Identity,
    peers: PeerRegistry,
    inbox: Inbox,
    began_ms: u64,
}

impl Node {
    fn new() -> Self {
        Self::began(BEGAN, &[])
    }

    fn began(began_ms: u64, earlier: &[PeerRecord]) -> Self {
        let identity = Identity::new("us", "default", Incarnation::new(BEGAN), Vec::new());
        let peers = PeerRegistry::new(identity.node());
        peers.configure(leaver());
        peers.configure("10.0.0.2:8443".parse().unwrap());
        peers.import(earlier, NOW, began_ms);
        let inbox = Inbox::new(identity.clone(), keys(KEY), peers.clone());
        Self { identity, peers, inbox, began_ms }
    }

    fn receive(&self, datagram: &[u8], now: u64) -> Result<(Effect, Option<Vec<u8>>), Refusal> {
        let heard =
            self.inbox.receive(datagram, leaver(), Duration::from_millis(now - self.began_ms), now)?;
        Ok((heard.effect, heard.answer))
    }

    /// Takes what must be refused, and looks whether anything has changed but one count.
    fn refuses(&self, datagram: &[u8], now: u64) -> Refusal {
        let before = (self.peers.peers(now), *self.peers.subscribe().borrow(), self.identity.counts());
        let refusal = self.receive(datagram, now).expect_err("it is to be refused");
        let mut counts = before.2;
        counts.refused += 1;
        let changes = *self.peers.subscribe().borrow();
        assert_eq!((self.peers.peers(now), changes, self.identity.counts()), (before.0, before.1, counts));
        refusal
    }

    fn leaver(&self) -> (PeerState, bool) {
        let peers = self.peers.peers(NOW);
        let peer = peers.iter().find(|peer| peer.configured == Some(leaver())).unwrap();
        (peer.state, peer.routable)
    }
}

fn ack_of(answer: Option<Vec<u8>>) -> Ack {
    match Datagram::decode(&answer.expect("it is acknowledged"), &keys(KEY)) {
        Ok(Datagram::Ack(ack)) => ack,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_true_notice_is_acted_on_and_acknowledged_by_a_datagram_that_is_not_longer() {
    let node = Node::new();
    let datagram = notice().encode(&keys(KEY));
    let (effect, answer) = node.receive(&datagram, NOW + 1).unwrap();
    assert_eq!(effect, Effect::Departed);
    assert!(answer.as_ref().is_some_and(|answer| answer.len() <= datagram.len()));
    let ack = ack_of(answer);
    assert_eq!((ack.node, ack.by, ack.seq), (Id::of("leaver"), Id::of("us"), 2));
    assert_eq!(node.leaver(), (PeerState::Draining, false));
    assert_eq!((node.identity.counts().received, node.identity.counts().refused), (1, 0));
}

#[test]
fn every_flipped_byte_changes_nothing_and_gets_no_answer() {
    let node = Node::new();
    let datagram = notice().encode(&keys(KEY));
    for place in 0..datagram.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut flipped = datagram.clone();
            flipped[place] ^= flip;
            node.refuses(&flipped, NOW);
        }
    }
    assert!(node.leaver().1);
    assert_eq!(
        node.receive(&datagram, NOW).unwrap().0,
        Effect::Departed,
        "the control: the true one is heard"
    );
}

#[test]
fn every_truncation_and_every_byte_too_many_changes_nothing_and_gets_no_answer() {
    let node = Node::new();
    let datagram = notice().encode(&keys(KEY));
    (0..datagram.len()).for_each(|length| _ = node.refuses(&datagram[..length], NOW));
    for length in [129, 512, 513, 1_500, 65_507] {
        let mut longer = datagram.clone();
        longer.resize(length, 0);
        node.refuses(&longer, NOW);
        // Its own word about its length is right as well.
        longer[8..10].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
        node.refuses(&longer, NOW);
    }
    assert!(node.leaver().1);
}

#[test]
fn each_cause_of_refusal_is_counted_as_that() {
    let node = Node::new();
    let seal = |change: fn(&mut Notice)| {
        let mut notice = notice();
        change(&mut notice);
        notice.encode(&keys(KEY))
    };
    let with = |place: usize, byte: u8| {
        let mut datagram = notice().encode(&keys(KEY));
        datagram[place] = byte;
        datagram
    };
    let ack = Ack {
        node: Id::of("us"),
        incarnation: BEGAN,
        seq: 1,
        attempt: 0,
        sent_at: NOW,
        cluster: Id::of("default"),
        by: Id::of("leaver"),
    };
    let cases = [
        (vec![0; ACK_BYTES - 1], Refusal::Length),
        (with(3, b'n'), Refusal::Magic),
        (with(4, 2), Refusal::Version),
        (with(8, 1), Refusal::TotalLength),
        (with(7, 2), Refusal::UnknownKey),
        (notice().encode(&keys("1:ff0102030405060708090a0b0c0d0e0f")), Refusal::Mac),
        (seal(|notice| notice.cluster = Id::of("other")), Refusal::Cluster),
        (seal(|notice| notice.sent_at = NOW - 30_001), Refusal::Window),
        (seal(|notice| notice.sent_at = NOW + 31_000), Refusal::Window),
        (seal(|notice| notice.sent_at = u64::MAX), Refusal::Window),
        (seal(|notice| notice.sent_at = 0), Refusal::Window),
        (seal(|notice| notice.node = Id::of("us")), Refusal::OwnNode),
        (seal(|notice| notice.incarnation = NOW + 30_001), Refusal::FutureIncarnation),
        (seal(|notice| notice.incarnation = u64::MAX), Refusal::FutureIncarnation),
        (ack.encode(&keys(KEY)), Refusal::Unexpected),
    ];
    for (datagram, cause) in &cases {
        assert_eq!(node.refuses(datagram, NOW), *cause);
    }
    // A run that is over: its node has begun another one.
    node.receive(&seal(|notice| (notice.kind, notice.incarnation) = (Kind::Return, RUN + 1)), NOW).unwrap();
    assert_eq!(node.refuses(&notice().encode(&keys(KEY)), NOW), Refusal::OldIncarnation);
    // The window's edges are inside.
    for sent_at in [NOW - 30_000, NOW + 30_000] {
        let datagram = Notice { sent_at, incarnation: RUN + 1, ..notice() }.encode(&keys(KEY));
        assert!(node.receive(&datagram, NOW).is_ok());
    }
    let counted: u64 = node.identity.refused().map(|(_, count)| count).sum();
    assert_eq!(counted, cases.len() as u64 + 1);
    let window = node.identity.refused().find(|(cause, _)| *cause == Refusal::Window);
    assert_eq!(window, Some((Refusal::Window, 4)));
}

#[test]
fn a_key_is_replaced_without_a_moment_in_which_a_notice_is_not_heard() {
    let (old, new) = (KEY, "2:f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff");
    // What signs and verifies at each step, and at the one before and after it.
    let steps = [old.to_owned(), format!("{old}\n{new}"), format!("{new}\n{old}"), new.to_owned()];
    for (one, other) in steps.iter().zip(&steps[1..]).flat_map(|(one, other)| [(one, other), (other, one)]) {
        let datagram = notice().encode(&keys(one));
        assert!(Datagram::decode(&datagram, &keys(other)).is_ok());
    }
    assert_eq!(Datagram::decode(&notice().encode(&keys(new)), &keys(old)), Err(Refusal::UnknownKey));
}

#[test]
fn a_replay_within_the_window_is_acknowledged_again_and_has_no_second_effect() {
    let node = Node::new();
    let datagram = notice().encode(&keys(KEY));
    assert_eq!(node.receive(&datagram, NOW).unwrap().0, Effect::Departed);
    let changes = *node.peers.subscribe().borrow();
    let (effect, answer) = node.receive(&datagram, NOW + 30_000).unwrap();
    assert_eq!(effect, Effect::Repeated);
    assert_eq!(ack_of(answer).seq, 2);
    assert_eq!(*node.peers.subscribe().borrow(), changes);
    assert_eq!(node.refuses(&datagram, NOW + 30_001), Refusal::Window);
}

#[test]
fn a_replay_does_not_undo_what_its_node_has_said_since() {
    let node = Node::new();
    let keys = keys(KEY);
    let leaving = notice().encode(&keys);
    node.receive(&leaving, NOW).unwrap();
    // It stays after all, in the same run.
    let stays = Notice { kind: Kind::Return, seq: 3, ..notice() }.encode(&keys);
    assert_eq!(node.receive(&stays, NOW).unwrap().0, Effect::Returned);
    assert_eq!(node.receive(&leaving, NOW + 1).unwrap().0, Effect::Repeated);
    assert!(node.leaver().1);
    // It leaves and is back in a later run.
    node.receive(&Notice { seq: 4, ..notice() }.encode(&keys), NOW).unwrap();
    let back = Notice { kind: Kind::Return, incarnation: NOW, seq: 1, ..notice() }.encode(&keys);
    assert_eq!(node.receive(&back, NOW).unwrap().0, Effect::Returned);
    assert_eq!(node.refuses(&leaving, NOW + 2), Refusal::OldIncarnation);
    // A RETURN that comes twice, or after the departure that followed it, changes nothing either.
    assert_eq!(node.receive(&back, NOW).unwrap().0, Effect::Repeated);
    node.receive(&Notice { incarnation: NOW, seq: 2, ..notice() }.encode(&keys), NOW).unwrap();
    assert_eq!(node.receive(&back, NOW).unwrap().0, Effect::Repeated);
    assert!(!node.leaver().1);
}

#[test]
fn a_replay_has_no_effect_after_the_receivers_restart_whether_its_state_was_saved_or_not() {
    let node = Node::new();
    let keys = keys(KEY);
    let leaving = notice().encode(&keys);
    node.receive(&leaving, NOW).unwrap();
    let back = Notice { kind: Kind::Return, incarnation: NOW, seq: 1, ..notice() };
    node.receive(&back.encode(&keys), NOW).unwrap();
    let leaving = Notice { incarnation: NOW, seq: 2, sent_at: NOW + 10, ..notice() };
    // The state knows the run before; the kill took the rest.
    let killed = Node::began(NOW + 1_000, &[]);
    assert_eq!(killed.refuses(&leaving.encode(&keys), NOW + 1_001), Refusal::BeforeStart);
    assert!(killed.leaver().1);
    // And what was saved is remembered, whatever its replay claims: it cannot be sealed with another time.
    node.receive(&leaving.encode(&keys), NOW + 10).unwrap();
    let stopped = Node::began(NOW, &node.peers.export(NOW + 20));
    assert_eq!(stopped.receive(&leaving.encode(&keys), NOW + 20).unwrap().0, Effect::Repeated);
}

#[test]
fn a_clock_that_is_set_back_does_not_make_a_node_deaf() {
    // It began while its clock was an hour fast; two minutes later that was put right.
    let node = Node::new();
    let datagram = notice().encode(&keys(KEY));
    let heard = node.inbox.receive(&datagram, leaver(), Duration::from_secs(120), NOW + 5);
    assert_eq!(heard.unwrap().effect, Effect::Departed);
    // And what was sent before it began is refused by how long it has heard, whatever its clock said then.
    let node = Node::new();
    let early = node.inbox.receive(&datagram, leaver(), Duration::from_secs(2), NOW + 2_002);
    assert_eq!(early, Err(Refusal::BeforeStart));
    // What is sent in the same millisecond is not early, wherever the clock's ticks fall.
    let same = node.inbox.receive(&datagram, leaver(), Duration::from_micros(900), NOW + 1);
    assert_eq!(same.unwrap().effect, Effect::Departed);
}

#[test]
fn who_leaves_cannot_be_told_to_be_there_any_more() {
    let identity = Identity::new("us", "default", Incarnation::new(BEGAN), Vec::new());
    assert_eq!(identity.returning().unwrap().seq, 1);
    assert_eq!(identity.leaving(Why::Term, Duration::ZERO).seq, 2);
    assert_eq!(identity.returning(), None);
    assert_eq!(identity.leaving(Why::Term, Duration::ZERO).seq, 3);
}

#[test]
fn a_node_acknowledges_for_one_address_alone() {
    // Two machines that were given one name, or an acknowledgement that somebody has replayed from another address.
    let addr = |last: u8| SocketAddr::from(([10, 0, 0, last], 1));
    let to = |last| Recipient { addr: addr(last), id: None };
    let mut outbox = Outbox::new(notice(), keys(KEY), vec![to(1), to(2)]);
    outbox.begin_round(NOW);
    assert!(outbox.acknowledge(&ack("twin"), addr(1), Duration::ZERO).is_some());
    assert_eq!(outbox.acknowledge(&ack("twin"), addr(2), Duration::ZERO), None);
    assert!(!outbox.settle());
    assert!(outbox.acknowledge(&ack("other"), addr(2), Duration::ZERO).is_some());
}

#[test]
fn an_incarnation_from_the_edge_of_the_window_does_not_poison_its_node() {
    let node = Node::new();
    let keys = keys(KEY);
    for incarnation in [0, NOW + 30_000] {
        node.receive(&Notice { incarnation, ..notice() }.encode(&keys), NOW).unwrap();
    }
    // The next run of that node, once the clock is there.
    let later = NOW + 30_001;
    let back = Notice { kind: Kind::Return, incarnation: later, seq: 1, sent_at: later, ..notice() };
    assert_eq!(node.receive(&back.encode(&keys), later).unwrap().0, Effect::Returned);
}

#[test]
fn another_machines_loopback_is_not_ours() {
    let loopback: SocketAddr = "127.0.0.1:8443".parse().unwrap();
    let node = Node::new();
    node.peers.configure(loopback);
    let claims = Notice { endpoints: vec![loopback, "0.0.0.0:8443".parse().unwrap()], ..notice() };
    let datagram = claims.encode(&keys(KEY));
    let heard = node.inbox.receive(&datagram, leaver(), Duration::MAX, NOW).unwrap();
    assert_eq!((heard.effect, heard.notice.endpoints), (Effect::Noted, Vec::new()));
    let heard =
        Node::new().inbox.receive(&datagram, "127.0.0.1:9".parse().unwrap(), Duration::MAX, NOW).unwrap();
    assert_eq!(heard.notice.endpoints, [loopback]);
}

#[test]
fn who_leaves_acknowledges_departures_and_no_returns() {
    let node = Node::new();
    let keys = keys(KEY);
    let back = Notice { kind: Kind::Return, ..notice() }.encode(&keys);
    assert!(node.receive(&back, NOW).unwrap().1.is_some());
    let sender = shutdown_core::peers::notice::Sender::new(
        node.identity.clone(),
        keys.clone(),
        PeerRegistry::new(Id::of("us")),
    );
    let told = tokio_util::sync::CancellationToken::new();
    let stage = shutdown_core::StageContext::new(tokio::time::Instant::now(), told);
    tokio_test::block_on(sender.leave(stage, Why::Term, Duration::ZERO)).unwrap();
    assert!(node.receive(&back, NOW).unwrap().1.is_none());
    assert!(node.receive(&Notice { seq: 3, ..notice() }.encode(&keys), NOW).unwrap().1.is_some());
    // Who does not ask for an answer gets none.
    let mute = Notice { ack_wanted: false, seq: 4, ..notice() }.encode(&keys);
    assert!(node.receive(&mute, NOW).unwrap().1.is_none());
}

/// Two peers, one known by name and one by address only.
fn outbox() -> Outbox {
    let known = Recipient { addr: "10.0.0.2:1".parse().unwrap(), id: Some(Id::of("known")) };
    let unknown = Recipient { addr: "10.0.0.3:1".parse().unwrap(), id: None };
    Outbox::new(notice(), keys(KEY), vec![known, unknown])
}

fn ack(by: &str) -> Ack {
    Ack {
        node: Id::of("leaver"),
        incarnation: RUN,
        seq: 2,
        attempt: 0,
        sent_at: NOW,
        cluster: Id::of("default"),
        by: Id::of(by),
    }
}

#[test]
fn all_are_told_at_once_and_then_those_that_have_not_acknowledged() {
    let mut outbox = outbox();
    let mut told = Vec::new();
    for round in 0..ROUNDS.len() {
        assert!(outbox.next_round().is_some());
        outbox.begin_round(NOW + round as u64);
        let left = outbox.tell(|to, datagram| {
            let Ok(Datagram::Notice(sent)) = Datagram::decode(datagram, &keys(KEY)) else { panic!() };
            assert_eq!((usize::from(sent.attempt), sent.sent_at), (round, NOW + round as u64));
            told.push((round, to.ip().to_string()));
            Some(Ok(datagram.len()))
        });
        assert!(!left);
        // Once in a round.
        outbox.tell(|_, _| panic!("all have been told in this round"));
        if round == 1 {
            let heard = outbox.acknowledge(&ack("known"), "10.9.9.9:1".parse().unwrap(), ROUNDS[1]);
            assert_eq!(heard.unwrap().addr.to_string(), "10.0.0.2:1");
            assert!(!outbox.settle());
        }
    }
    let sends: Vec<_> = outbox.letters().iter().map(|letter| letter.sends).collect();
    assert_eq!((sends, told.len()), (vec![2, 5], 7));
    assert_eq!(outbox.next_round(), None, "a departure is not told for ever");
    outbox.acknowledge(&ack("late"), "10.0.0.3:1".parse().unwrap(), ROUNDS[4]);
    assert!(outbox.settle());
}

#[test]
fn an_acknowledgement_is_taken_from_the_peer_alone() {
    let from: SocketAddr = "10.0.0.3:1".parse().unwrap();
    let elsewhere: SocketAddr = "10.0.0.4:1".parse().unwrap();
    let mut outbox = outbox();
    outbox.begin_round(NOW);
    let forged = [
        (Ack { node: Id::of("other"), ..ack("known") }, from),
        (Ack { cluster: Id::of("other"), ..ack("known") }, from),
        (Ack { incarnation: RUN - 1, ..ack("known") }, from),
        (Ack { seq: 1, ..ack("known") }, from),
        // Our own word about ourselves, sent back.
        (ack("leaver"), from),
        // Nobody whom we have told, from nowhere we have told.
        (ack("stranger"), elsewhere),
    ];
    for (ack, from) in forged {
        assert_eq!(outbox.acknowledge(&ack, from, Duration::ZERO), None, "{ack:?}");
    }
    // Known by address only: who answers there says who it is. A second time says nothing.
    assert_eq!(outbox.acknowledge(&ack("third"), from, Duration::ZERO).unwrap().id, Some(Id::of("third")));
    assert_eq!(outbox.acknowledge(&ack("third"), from, Duration::ZERO), None);
    assert!(!outbox.settle());
}

#[test]
fn who_could_not_be_told_is_told_later_in_the_same_round() {
    let mut outbox = outbox();
    outbox.begin_round(NOW);
    let mut told = HashSet::new();
    // The first socket has no room; the second peer is refused by the system.
    let left = outbox.tell(|to, _| {
        told.insert(to);
        (told.len() > 1).then(|| Err(std::io::ErrorKind::PermissionDenied.into()))
    });
    assert!(left);
    assert!(!outbox.tell(|to, datagram| {
        assert_eq!(to.to_string(), "10.0.0.2:1");
        Some(Ok(datagram.len()))
    }));
    let letters = outbox.letters();
    assert_eq!((letters[0].sends, letters[1].sends), (1, 0));
    assert!(letters[1].error.as_ref().unwrap().contains("permission"));
}

#[test]
fn a_return_is_told_until_it_is_heard() {
    let recipient = Recipient { addr: leaver(), id: None };
    let mut outbox = Outbox::new(Notice { kind: Kind::Return, ..notice() }, keys(KEY), vec![recipient]);
    for _ in 0..300 {
        assert!(outbox.next_round().is_some());
        outbox.begin_round(NOW);
    }
}

#[test]
fn those_that_were_heard_from_are_told_first_and_those_that_have_left_only_of_a_return() {
    let peers = PeerRegistry::new(Id::of("us"));
    let at = |last: u8| SocketAddr::from(([10, 0, 0, last], 1));
    (1..=4).for_each(|last| peers.configure(at(last)));
    peers.acknowledged(Id::of("up"), at(4), Kind::Return, NOW);
    let gone = Notice { node: Id::of("gone"), endpoints: vec![at(1)], ..notice() };
    assert_eq!(peers.heard(&gone, NOW), Effect::Departed);
    let told = |kind| -> Vec<SocketAddr> {
        let outbox = Outbox::to_peers(Notice { kind, ..notice() }, keys(KEY), &peers, NOW);
        outbox.letters().iter().map(|letter| letter.to.addr).collect()
    };
    assert_eq!(told(Kind::Leaving), [at(4), at(2), at(3)]);
    assert_eq!(told(Kind::Return), [at(4), at(1), at(2), at(3)]);
}
