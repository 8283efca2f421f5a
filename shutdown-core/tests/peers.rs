//! The laws of the registry: who may be sent requests, and whose word counts.
#![expect(clippy::unwrap_used, reason = "a test's helpers, like the test, fail by panicking")]

use std::net::SocketAddr;

use shutdown_core::peers::notice::{Kind, Notice, Why};
use shutdown_core::peers::{
    DRAIN_CAP, Effect, FORGET, Id, MASS_WINDOW, PeerRecord, PeerRegistry, PeerState, Sighting, WINDOW,
};

/// Some moment, and the incarnation of a run that began a minute before.
const NOW: u64 = 1_795_273_877_139;
const RUN: u64 = NOW - 60_000;

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], port))
}

fn registry() -> PeerRegistry {
    PeerRegistry::new(Id::of("us"))
}

/// The registry of a node that is configured with so many peers, at ports from 1 on.
fn of(peers: u16) -> PeerRegistry {
    let registry = registry();
    (1..=peers).for_each(|port| registry.configure(at(port)));
    registry
}

/// From node `node-<port>`.
fn notice(kind: Kind, port: u16, incarnation: u64, seq: u64) -> Notice {
    Notice {
        kind,
        ack_wanted: true,
        restarting: false,
        why: Why::Term,
        attempt: 0,
        incarnation,
        seq,
        sent_at: NOW,
        drain_ms: 28_000,
        node: Id::of(&name(port)),
        cluster: Id::of("default"),
        endpoints: vec![at(port)],
    }
}

fn name(port: u16) -> String {
    format!("node-{port}")
}

fn sighting(port: u16, incarnation: u64) -> Sighting {
    Sighting {
        name: name(port),
        incarnation: Some(incarnation),
        addresses: vec![at(port)],
        notices: Some(at(port)),
    }
}

fn leave(registry: &PeerRegistry, port: u16, now: u64) -> Effect {
    registry.heard(&notice(Kind::Leaving, port, RUN, 2), now)
}

/// Where the peer at this port stands, and whether it may be sent requests.
fn stands(registry: &PeerRegistry, port: u16, now: u64) -> (PeerState, bool) {
    let peers = registry.peers(now);
    let peer = peers.iter().find(|peer| peer.addresses.contains(&at(port))).unwrap();
    (peer.state, peer.routable)
}

#[test]
fn a_configured_peer_is_sent_requests_until_it_says_that_it_leaves() {
    let registry = of(2);
    assert_eq!(stands(&registry, 1, NOW), (PeerState::Unverified, true));
    let mut changes = registry.subscribe();
    changes.mark_unchanged();
    assert_eq!(leave(&registry, 1, NOW), Effect::Departed);
    assert!(changes.has_changed().unwrap());
    assert_eq!(stands(&registry, 1, NOW), (PeerState::Draining, false));
    assert_eq!(stands(&registry, 1, NOW + 28_000), (PeerState::Departed, false));
    assert_eq!(stands(&registry, 2, NOW), (PeerState::Unverified, true));
}

#[test]
fn a_drain_without_end_ends_at_the_cap() {
    let registry = of(1);
    let endless = Notice { drain_ms: u32::MAX, ..notice(Kind::Leaving, 1, RUN, 1) };
    registry.heard(&endless, NOW);
    let cap = u64::try_from(DRAIN_CAP.as_millis()).unwrap();
    assert_eq!(stands(&registry, 1, NOW + cap - 1).0, PeerState::Draining);
    assert_eq!(stands(&registry, 1, NOW + cap).0, PeerState::Departed);
}

#[test]
fn who_has_left_comes_back_with_a_higher_incarnation_or_its_return_and_with_nothing_else() {
    let registry = of(1);
    leave(&registry, 1, NOW);
    // Another notice of the departure, late announcements, a cache, an acknowledgement on its way.
    assert_eq!(registry.heard(&notice(Kind::Leaving, 1, RUN, 3), NOW), Effect::Noted);
    assert_eq!(registry.sighted(sighting(1, RUN), NOW), Effect::Outdated);
    assert_eq!(registry.sighted(sighting(1, RUN - 1), NOW), Effect::Outdated);
    let nameless = Sighting { incarnation: None, ..sighting(1, RUN) };
    assert_eq!(registry.sighted(nameless, NOW), Effect::Outdated);
    registry.acknowledged(Id::of("node-1"), at(1), Kind::Return, NOW);
    registry.lost("node-1");
    registry.configure(at(1));
    assert!(!stands(&registry, 1, NOW).1);
    // Its own word, of the same run or a later one.
    assert_eq!(registry.heard(&notice(Kind::Return, 1, RUN, 4), NOW), Effect::Returned);
    assert_eq!(stands(&registry, 1, NOW), (PeerState::Up, true));
    registry.heard(&notice(Kind::Leaving, 1, RUN, 5), NOW);
    assert_eq!(registry.sighted(sighting(1, RUN + 1), NOW), Effect::Returned);
    assert_eq!(stands(&registry, 1, NOW), (PeerState::Up, true));
}

#[test]
fn a_notice_counts_once_and_an_older_one_not_at_all() {
    let registry = of(1);
    leave(&registry, 1, NOW);
    assert_eq!(leave(&registry, 1, NOW), Effect::Repeated);
    assert_eq!(registry.heard(&notice(Kind::Return, 1, RUN + 5, 1), NOW), Effect::Returned);
    // What the earlier run said, again; and a RETURN that was overtaken by the departure after it.
    assert_eq!(leave(&registry, 1, NOW), Effect::Outdated);
    registry.heard(&notice(Kind::Leaving, 1, RUN + 5, 7), NOW);
    assert_eq!(registry.heard(&notice(Kind::Return, 1, RUN + 5, 6), NOW), Effect::Repeated);
    assert!(!stands(&registry, 1, NOW).1);
}

#[test]
fn a_node_that_was_not_known_is_remembered_as_gone_and_is_no_peer() {
    let registry = of(1);
    assert_eq!(leave(&registry, 7, NOW), Effect::Noted);
    assert_eq!(registry.peers(NOW).len(), 1);
    assert_eq!(registry.sighted(sighting(7, RUN), NOW), Effect::Outdated);
    assert_eq!(registry.sighted(sighting(7, RUN + 1), NOW), Effect::Returned);
    assert_eq!(stands(&registry, 7, NOW), (PeerState::Up, true));
    // One that says that it is there has not been asked for either.
    assert_eq!(registry.heard(&notice(Kind::Return, 8, RUN, 1), NOW), Effect::Noted);
    assert_eq!(registry.peers(NOW).len(), 2);
}

#[test]
fn what_discovery_says_never_makes_a_notice_look_outdated() {
    let registry = of(1);
    let forged = NOW + u64::try_from(WINDOW.as_millis()).unwrap();
    assert_eq!(registry.sighted(sighting(1, forged), NOW), Effect::Noted);
    assert_eq!(leave(&registry, 1, NOW), Effect::Departed);
    // The future is nobody's.
    assert_eq!(registry.sighted(sighting(1, forged + 1), NOW), Effect::Outdated);
    assert_eq!(registry.sighted(sighting(1, u64::MAX), NOW), Effect::Outdated);
    assert_eq!(registry.heard(&notice(Kind::Return, 1, RUN + 1, 1), NOW), Effect::Returned);
}

#[test]
fn a_goodbye_heard_by_discovery_takes_the_peer_away_and_one_that_is_lost_is_unverified() {
    let registry = registry();
    registry.sighted(sighting(1, RUN), NOW);
    registry.sighted(sighting(2, RUN), NOW);
    registry.sighted(sighting(3, RUN), NOW);
    registry.configure(at(3));
    assert_eq!(registry.goodbye("node-1", Some(RUN), NOW), Effect::Departed);
    assert_eq!(registry.goodbye("node-1", Some(RUN), NOW), Effect::Repeated);
    assert_eq!(registry.goodbye("stranger", None, NOW), Effect::Noted);
    assert_eq!(stands(&registry, 1, NOW), (PeerState::Departed, false));
    registry.lost("node-2");
    assert_eq!(stands(&registry, 2, NOW), (PeerState::Unverified, false));
    registry.sighted(sighting(2, RUN), NOW);
    assert_eq!(stands(&registry, 2, NOW), (PeerState::Up, true));
    registry.lost("node-3");
    assert_eq!(stands(&registry, 3, NOW), (PeerState::Up, true));
}

#[test]
fn a_peer_known_by_its_address_and_the_same_known_by_its_name_are_one() {
    let registry = of(2);
    // Discovery finds it, with an address more.
    let found = Sighting { addresses: vec![at(1), at(101)], ..sighting(1, RUN) };
    registry.sighted(found, NOW);
    // Discovery has found it elsewhere, and then it tells its configured address itself.
    registry.sighted(Sighting { addresses: vec![at(102)], notices: None, ..sighting(2, RUN) }, NOW);
    assert_eq!(registry.peers(NOW).len(), 3);
    let tells = Notice { endpoints: vec![at(2), at(102)], ..notice(Kind::Leaving, 2, RUN, 1) };
    assert_eq!(registry.heard(&tells, NOW), Effect::Departed);
    let peers = registry.peers(NOW);
    assert_eq!(peers.len(), 2);
    let second = peers.iter().find(|peer| peer.id == Some(Id::of("node-2"))).unwrap();
    assert_eq!((second.configured, &second.addresses[..]), (Some(at(2)), &[at(2), at(102)][..]));
    assert_eq!((second.notices, second.routable), (Some(at(2)), false));
}

#[test]
fn an_acknowledgement_says_who_is_at_a_configured_address() {
    let registry = of(1);
    registry.acknowledged(Id::of("node-1"), at(1), Kind::Return, NOW);
    let peer = &registry.peers(NOW)[0];
    assert_eq!((peer.id, peer.state), (Some(Id::of("node-1")), PeerState::Up));
    // Without an endpoint the notice is matched by what the acknowledgement said.
    let nowhere = Notice { endpoints: Vec::new(), ..notice(Kind::Leaving, 1, RUN, 1) };
    assert_eq!(registry.heard(&nowhere, NOW), Effect::Departed);
    // Another node at that address is not the peer that is known there.
    registry.acknowledged(Id::of("node-9"), at(1), Kind::Return, NOW);
    assert_eq!(registry.peers(NOW)[0].id, Some(Id::of("node-1")));
}

#[test]
fn when_most_leave_at_once_the_rest_is_kept_and_one_may_always_leave() {
    for (peers, may) in [(1, 1), (2, 1), (3, 1), (4, 2), (10, 5), (11, 5)] {
        let registry = of(peers);
        let effects: Vec<_> = (1..=peers).map(|port| leave(&registry, port, NOW)).collect();
        let departed = effects.iter().filter(|effect| **effect == Effect::Departed).count();
        assert_eq!(departed, may, "{peers} peers");
        assert_eq!(registry.withheld(), u64::from(peers) - may as u64);
        assert!(effects[may..].iter().all(|effect| *effect == Effect::Withheld));
        let routable = registry.peers(NOW).iter().filter(|peer| peer.routable).count();
        assert_eq!(routable, usize::from(peers) - may);
    }
}

#[test]
fn those_that_are_back_and_those_that_left_long_ago_do_not_count_as_a_mass_departure() {
    let registry = of(4);
    for round in 0..20 {
        let port = 1 + round % 4;
        let run = RUN + u64::from(round);
        assert_eq!(registry.heard(&notice(Kind::Leaving, port, run, 2), NOW), Effect::Departed, "{round}");
        assert_eq!(registry.heard(&notice(Kind::Return, port, run + 1, 1), NOW), Effect::Returned);
    }
    // One after another, each long enough after the one before: a cluster that is made smaller.
    let registry = of(4);
    let minutes = u64::try_from(MASS_WINDOW.as_millis()).unwrap() + 1;
    for port in 1..=4 {
        assert_eq!(leave(&registry, port, NOW + u64::from(port) * minutes), Effect::Departed);
    }
}

#[test]
fn without_a_threshold_all_are_believed() {
    let registry = PeerRegistry::with_threshold(Id::of("us"), 0);
    (1..=10).for_each(|port| registry.configure(at(port)));
    assert!((1..=10).all(|port| leave(&registry, port, NOW) == Effect::Departed));
}

/// A later run of the node whose registry this was.
fn restarted(registry: &PeerRegistry, configured: u16, later: u64) -> PeerRegistry {
    let records = serde_json::to_string(&registry.export(NOW)).unwrap();
    let records: Vec<PeerRecord> = serde_json::from_str(&records).unwrap();
    let next = of(configured);
    next.import(&records, NOW, later);
    next
}

#[test]
fn a_restored_peer_is_unverified_until_it_is_heard_from() {
    let registry = registry();
    registry.sighted(sighting(1, RUN), NOW);
    registry.sighted(sighting(2, RUN), NOW);
    let next = restarted(&registry, 0, NOW + 5_000);
    assert_eq!(stands(&next, 1, NOW), (PeerState::Unverified, false));
    assert_eq!(next.peers(NOW)[0].name.as_deref(), Some("node-1"));
    next.acknowledged(Id::of("node-1"), at(1), Kind::Return, NOW + 5_000);
    next.sighted(sighting(2, RUN), NOW + 5_000);
    assert_eq!(stands(&next, 1, NOW), (PeerState::Up, true));
    assert_eq!(stands(&next, 2, NOW), (PeerState::Up, true));
}

#[test]
fn a_configured_peer_keeps_what_was_known_of_it_over_a_restart() {
    let registry = of(2);
    registry.acknowledged(Id::of("node-1"), at(1), Kind::Return, NOW);
    leave(&registry, 2, NOW);
    for next in [restarted(&registry, 2, NOW), restarted(&registry, 0, NOW)] {
        let peers = next.peers(NOW);
        assert_eq!(peers.len(), 2);
        assert!(peers.iter().all(|peer| peer.id.is_some()));
        // It is configured to be there, and nobody has said otherwise; the other has said that it goes.
        assert_eq!(stands(&next, 1, NOW), (PeerState::Unverified, peers[0].configured.is_some()));
        assert_eq!(stands(&next, 2, NOW), (PeerState::Departed, false));
    }
}

#[test]
fn a_departure_outlives_the_restart_of_who_heard_it() {
    let registry = of(1);
    registry.heard(&notice(Kind::Return, 1, RUN, 1), NOW);
    leave(&registry, 1, NOW);
    leave(&registry, 7, NOW);
    let next = restarted(&registry, 1, NOW + 1_000);
    assert_eq!(next.peers(NOW).len(), 1, "a mere tombstone is no peer");
    assert_eq!(leave(&next, 1, NOW), Effect::Repeated);
    assert_eq!(leave(&next, 7, NOW), Effect::Repeated);
    assert_eq!(next.sighted(sighting(1, RUN), NOW), Effect::Outdated);
    assert_eq!(next.sighted(sighting(7, RUN), NOW), Effect::Outdated);
    // It has come back while nobody was there to hear it: it acknowledges that we are.
    next.acknowledged(Id::of("node-1"), at(1), Kind::Leaving, NOW + 2_000);
    assert!(!stands(&next, 1, NOW).1, "who leaves itself acknowledges a departure as well");
    next.acknowledged(Id::of("node-1"), at(1), Kind::Return, NOW + 2_000);
    assert_eq!(stands(&next, 1, NOW), (PeerState::Up, true));
}

#[test]
fn what_was_not_heard_from_for_long_is_forgotten() {
    let registry = registry();
    registry.sighted(sighting(1, RUN), NOW);
    let limit = u64::try_from(FORGET.as_millis()).unwrap();
    assert_eq!(restarted(&registry, 0, NOW + limit).peers(NOW).len(), 1);
    assert_eq!(restarted(&registry, 0, NOW + limit + 1).peers(NOW).len(), 0);
    // Who is up is there, though it has said so long ago.
    assert_eq!(registry.export(NOW + limit + 1)[0].last_seen, Some(NOW + limit + 1));
    registry.lost("node-1");
    assert_eq!(registry.export(NOW + limit + 1), []);
    assert_eq!(registry.peers(NOW), [], "and is no peer any more");
    // A clock that was set back makes nothing old, and nothing from the future.
    registry.sighted(sighting(1, RUN), NOW);
    let next = restarted(&registry, 0, NOW - 3_600_000);
    assert_eq!(next.peers(NOW)[0].last_seen, NOW - 3_600_000);
}

#[test]
fn a_record_that_cannot_be_understood_costs_nobody_else_anything() {
    let legacy = r#"[{"addr": "10.0.0.1:1"}, {"addr": "nowhere"}, {}, {"node": "xyz"},
        {"addr": "10.0.0.1:2", "unknown": [1], "incarnation": 7, "last_seen": "noon", "heard": [1], "member": 3,
         "also": {}, "name": 5, "left_at": -1}, {"addr": "10.0.0.1:2"}, {"addr": 7}]"#;
    let records: Vec<PeerRecord> = serde_json::from_str(legacy).unwrap();
    let registry = registry();
    assert_eq!(registry.import(&records, NOW - 1_000, NOW), 2);
    let peers = registry.peers(NOW);
    assert_eq!(peers.len(), 2);
    assert!(peers.iter().all(|peer| peer.state == PeerState::Unverified && !peer.routable));
    // The old system's notices went to where a peer serves.
    assert_eq!((peers[0].notices, peers[0].last_seen), (Some(at(1)), NOW - 1_000));
    assert_eq!(peers[1].incarnation, 7);
}

#[test]
fn a_v4_peer_in_v6_clothes_is_the_same_peer() {
    let registry = of(1);
    registry.configure("[::ffff:10.0.0.1]:1".parse().unwrap());
    assert_eq!(registry.peers(NOW).len(), 1);
}

#[test]
fn discovery_cannot_say_who_is_at_a_configured_address() {
    let registry = of(1);
    let evil = Sighting { name: "evil".to_owned(), ..sighting(1, RUN) };
    registry.sighted(evil, NOW);
    assert_eq!(registry.goodbye("evil", None, NOW), Effect::Noted);
    assert!(stands(&registry, 1, NOW).1);
    // Its own word counts, and it is one peer still.
    assert_eq!(leave(&registry, 1, NOW), Effect::Departed);
    assert_eq!(registry.peers(NOW).len(), 1);
    assert!(!stands(&registry, 1, NOW).1);
    // So does its acknowledgement.
    let registry = of(1);
    registry.sighted(Sighting { name: "evil".to_owned(), ..sighting(1, RUN) }, NOW);
    registry.acknowledged(Id::of("node-1"), at(1), Kind::Return, NOW);
    let peer = &registry.peers(NOW)[0];
    assert_eq!((peer.id, peer.authenticated), (Some(Id::of("node-1")), true));
    assert_eq!(registry.goodbye("node-1", None, NOW), Effect::Noted, "it says itself when it leaves");
}

#[test]
fn an_address_that_discovery_alone_tells_is_not_vouched_for() {
    let registry = registry();
    registry.sighted(sighting(1, RUN), NOW);
    assert_eq!(registry.peers(NOW)[0].vouched, []);
    let tells = Notice { endpoints: vec![at(1), at(7)], ..notice(Kind::Return, 1, RUN, 1) };
    registry.heard(&tells, NOW);
    assert_eq!(registry.peers(NOW)[0].vouched, [at(1), at(7)]);
}

#[test]
fn a_goodbye_of_an_earlier_run_does_not_take_the_later_one_away() {
    let registry = registry();
    registry.sighted(sighting(1, RUN + 1), NOW);
    assert_eq!(registry.goodbye("node-1", Some(RUN), NOW), Effect::Outdated);
    assert!(stands(&registry, 1, NOW).1);
    assert_eq!(registry.goodbye("node-1", Some(RUN + 1), NOW), Effect::Departed);
}

#[test]
fn a_departure_that_was_not_believed_is_believed_when_there_are_not_too_many_any_more() {
    let registry = of(3);
    assert_eq!(leave(&registry, 1, NOW), Effect::Departed);
    assert_eq!(leave(&registry, 2, NOW), Effect::Withheld);
    registry.export(NOW + 1_000);
    assert!(stands(&registry, 2, NOW).1);
    let mut changes = registry.subscribe();
    changes.mark_unchanged();
    let later = NOW + u64::try_from(MASS_WINDOW.as_millis()).unwrap() + 1;
    registry.export(later);
    assert!(changes.has_changed().unwrap());
    assert_eq!(stands(&registry, 2, later), (PeerState::Departed, false));
    // Who has come back meanwhile stays.
    let registry = of(3);
    leave(&registry, 1, NOW);
    leave(&registry, 2, NOW);
    registry.heard(&notice(Kind::Return, 2, RUN + 1, 1), NOW);
    registry.export(later);
    assert!(stands(&registry, 2, later).1);
}

#[test]
fn whoever_watches_hears_when_two_entries_become_one() {
    let registry = of(1);
    // Its notice names no address that is configured; its late acknowledgement comes from there.
    let elsewhere = Notice { endpoints: vec![at(9)], ..notice(Kind::Leaving, 1, RUN, 1) };
    assert_eq!(registry.heard(&elsewhere, NOW), Effect::Noted);
    let mut changes = registry.subscribe();
    changes.mark_unchanged();
    registry.acknowledged(Id::of("node-1"), at(1), Kind::Return, NOW);
    assert!(changes.has_changed().unwrap());
    assert!(!stands(&registry, 1, NOW).1);
}

#[test]
fn two_configured_addresses_are_two_places_whoever_answers() {
    let registry = of(2);
    registry.acknowledged(Id::of("twin"), at(1), Kind::Return, NOW);
    registry.acknowledged(Id::of("twin"), at(2), Kind::Return, NOW);
    assert_eq!(registry.peers(NOW).iter().filter(|peer| peer.routable).count(), 2);
}

#[test]
fn a_node_is_not_its_own_peer() {
    let registry = registry();
    let own = Sighting { name: "us".to_owned(), ..sighting(1, RUN) };
    assert_eq!(registry.sighted(own, NOW), Effect::Outdated);
    assert_eq!(registry.peers(NOW), []);
}
