//! The circuit breaker: places that are never given twice, and the failure that opens.

use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::AtomicUsize;
use loom::sync::atomic::Ordering::SeqCst;
use loom::thread;
use tokio::time::Instant;

use super::{check, must_break};
use crate::breaker::{Breaker, Config, Mutant, State};

const SLEEP: Duration = Duration::from_secs(5);

fn breaker(config: &str, now: Instant, mutant: Mutant) -> Arc<Breaker> {
    let config: Config = config.parse().expect("a breaker that can be");
    let mut breaker = Breaker::new("a", config, now);
    breaker.mutant = mutant;
    Arc::new(breaker)
}

/// Two ask for the one place of a breaker whose sleep is over.
fn a_place_is_given_once(mutant: Mutant) {
    let now = Instant::now();
    let breaker = breaker("volume=1,probes=1", now, mutant);
    breaker.try_acquire(now).expect("closed").failure(now);
    let later = now + SLEEP;
    let outstanding = loom::sync::Arc::new(AtomicUsize::new(0));
    let probe = {
        let (breaker, outstanding) = (Arc::clone(&breaker), outstanding);
        move || {
            let Ok(permit) = breaker.try_acquire(later) else { return };
            let others = outstanding.fetch_add(1, SeqCst);
            assert!(others == 0, "law broken: a place was given twice");
            outstanding.fetch_sub(1, SeqCst);
            permit.release();
        }
    };
    let other = thread::spawn(probe.clone());
    probe();
    other.join().expect("a probe does not panic");
    let snapshot = breaker.snapshot(later);
    assert!(
        (snapshot.state, snapshot.probes) == (State::HalfOpen, 0),
        "law broken: a place was lost: {snapshot:?}"
    );
}

/// Two failures are needed, and two threads have one each.
fn the_last_failure_needed_opens(mutant: Mutant) {
    let now = Instant::now();
    let breaker = breaker("volume=2,percent=100", now, mutant);
    let fail = {
        let breaker = Arc::clone(&breaker);
        move || {
            if let Ok(permit) = breaker.try_acquire(now) {
                permit.failure(now);
            }
        }
    };
    let other = thread::spawn(fail.clone());
    fail();
    other.join().expect("a failure does not panic");
    let snapshot = breaker.snapshot(now);
    assert!(snapshot.state == State::Open, "law broken: two failures, and it is closed");
}

/// A probe of before the last opening ends while one of after it begins.
fn a_late_probe_frees_no_place(mutant: Mutant) {
    let now = Instant::now();
    let breaker = breaker("volume=1,probes=2", now, mutant);
    breaker.try_acquire(now).expect("closed").failure(now);
    let (first, second) = (now + SLEEP, now + 2 * SLEEP);
    let late = breaker.try_acquire_owned(first).expect("its time is over");
    breaker.try_acquire(first).expect("a second place").failure(first);
    let other = thread::spawn(move || late.release());
    let probe = breaker.try_acquire(second).expect("its time is over again");
    other.join().expect("a release does not panic");
    assert!(breaker.snapshot(second).probes == 1, "law broken: a late probe gave a place back");
    drop(probe);
}

#[test]
fn a_place_is_given_to_one_and_given_back() {
    check(|| a_place_is_given_once(Mutant::None));
}

#[test]
fn of_two_failures_that_are_needed_the_last_one_opens() {
    check(|| the_last_failure_needed_opens(Mutant::None));
}

#[test]
fn a_probe_of_before_frees_no_place_of_now() {
    check(|| a_late_probe_frees_no_place(Mutant::None));
}

#[test]
fn a_place_looked_at_before_it_is_taken_is_found() {
    must_break("breaker::a_place_looked_at_before_it_is_taken_is_found", "a place was given twice", || {
        a_place_is_given_once(Mutant::LookThenTake);
    });
}

#[test]
fn failures_added_up_before_this_one_is_counted_are_found() {
    must_break("breaker::failures_added_up_before_this_one_is_counted_are_found", "and it is closed", || {
        the_last_failure_needed_opens(Mutant::SumThenCount);
    });
}

#[test]
fn a_place_given_back_whatever_the_generation_is_found() {
    must_break("breaker::a_place_given_back_whatever_the_generation_is_found", "gave a place back", || {
        a_late_probe_frees_no_place(Mutant::AnyGeneration);
    });
}
