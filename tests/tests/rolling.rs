//! Rolling restarts lose nothing, in no group of clients; two controls in the same run do.
//!
//! One run at a time: each wants the machine for itself.

use std::sync::{Mutex, MutexGuard, PoisonError};

use shutdown_tests::rig::affinity::on_one_processor;
use shutdown_tests::rig::{Group, Kind, Loss, Mode, Outcome, run};
use shutdown_tests::{count, is_long};

/// In a long run; a tenth of the restarts, and what requests come meanwhile, else.
const RESTARTS: usize = 12;
const REQUESTS: usize = 100_000;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // A law that failed does not fail the next one.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn patient(kind: Kind) -> Mode {
    Mode::patient(kind).at_least(count(RESTARTS), if is_long() { REQUESTS } else { 0 })
}

/// Every group asked and lost nothing, and no server says that something is wrong.
fn loses_nothing(outcome: &Outcome) {
    for group in Group::ALL {
        assert!(
            outcome.groups.get(&group).is_some_and(|tally| tally.ok > 0),
            "{group:?} never asked: {outcome}"
        );
    }
    assert!(outcome.lost() == 0 && outcome.wrong.is_empty(), "{outcome}");
}

/// Killed, it must lose.
fn abrupt_loses(kind: Kind) {
    let abrupt = run(&Mode::abrupt(kind).until(Group::Fresh, Loss::Refused, 5));
    print!("{abrupt}");
    for group in [Group::Fresh, Group::Busy] {
        assert!(abrupt.groups[&group].lost() > 0, "a kill must cost {group:?} something: {abrupt}");
    }
}

/// With a lame duck shorter than the balancer's lag it must refuse.
fn impatient_loses(kind: Kind) {
    let impatient = run(&Mode::impatient(kind).until(Group::Fresh, Loss::Refused, 5));
    print!("{impatient}");
    assert!(impatient.lost_by(Group::Fresh, Loss::Refused) > 0, "nobody was refused: {impatient}");
}

fn law(kind: Kind) {
    let _alone = alone();
    let ours = run(&patient(kind));
    print!("{ours}");
    abrupt_loses(kind);
    impatient_loses(kind);
    loses_nothing(&ours);
}

fn law_on_one_processor(kind: Kind) {
    let _alone = alone();
    let (cpu, ours) = on_one_processor(|| {
        let ours = run(&patient(kind));
        print!("on one processor: {ours}");
        abrupt_loses(kind);
        if is_long() {
            impatient_loses(kind);
        }
        ours
    });
    assert!(ours.processors.iter().eq([&cpu]), "not pinned to {cpu}: {:?}", ours.processors);
    loses_nothing(&ours);
}

#[test]
fn a_rolling_restart_of_serve_loses_nothing_and_both_controls_do() {
    law(Kind::Serve);
}

#[test]
fn a_rolling_restart_of_edge_proxy_loses_nothing_and_both_controls_do() {
    law(Kind::EdgeProxy);
}

#[test]
fn a_rolling_restart_of_serve_on_one_processor_loses_nothing_and_a_kill_does() {
    law_on_one_processor(Kind::Serve);
}

#[test]
fn a_rolling_restart_of_edge_proxy_on_one_processor_loses_nothing_and_a_kill_does() {
    law_on_one_processor(Kind::EdgeProxy);
}
