//! Model checks of the hand-made primitives, and proof that the checks can fail.
//!
//! Run with `RUSTFLAGS="--cfg shutdown_loom" cargo test -p shutdown-core --features breaker --release --lib loom_tests`.
//!
//! Every law is a model, a plain function of a [`Tracker`] or a [`Latch`]; those of the circuit breaker are in a file of
//! their own. A law's test runs it on the protocol as
//! it is; a mutant's test runs the same function on a protocol broken in one place, in a process of its own
//! (loom's deadlock may end in an abort), and wants to see it fail with the law's own words.
//!
//! What is not a mutant, because no execution can tell it from the protocol: starting with a stronger order than
//! Relaxed (an admitted request reads nothing that closing wrote), and `BIAS` as 0 (`close` hands the shards'
//! counts over in one addition, and a wrapped count is not mistaken for zero; it is kept so that `alive` can tell
//! a count that was handed over from one that was not).

#[cfg(feature = "breaker")]
mod breaker;

use std::future::Future;
use std::pin::{Pin, pin};
use std::process::Command;
use std::task::{Context, Waker};

use loom::future::block_on;
use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::sync::atomic::Ordering::Relaxed;
use loom::thread::{self, JoinHandle};

use crate::inflight::{Mutant, Tracker};
use crate::latch::{self, Latch};

/// What a worker has written about its request.
const NOTHING: usize = 0;
const WORKING: usize = 1;
const DONE: usize = 2;

/// A worker's request: what it wrote, and whether it was admitted.
struct Worker {
    wrote: Arc<AtomicUsize>,
    admitted: JoinHandle<bool>,
}

impl Worker {
    /// Starts one request on the shard of `index`, writes, and ends it.
    fn start(tracker: Tracker, index: usize) -> Self {
        let wrote = Arc::new(AtomicUsize::new(NOTHING));
        let admitted = thread::spawn({
            let wrote = Arc::clone(&wrote);
            move || {
                let Ok(guard) = tracker.start_at(index) else { return false };
                wrote.store(WORKING, Relaxed);
                wrote.store(DONE, Relaxed);
                drop(guard);
                true
            }
        });
        Self { wrote, admitted }
    }

    fn seen(&self) -> usize {
        self.wrote.load(Relaxed)
    }
}

/// The law of the drain, from what the drainer saw of each worker when it was told that the drain is done.
fn admitted_means_finished_and_visible(workers: Vec<Worker>, seen: &[usize]) -> u64 {
    let mut admitted = 0;
    for (worker, &seen) in workers.into_iter().zip(seen) {
        let was_admitted = worker.admitted.join().expect("a worker does not panic");
        let expected = if was_admitted { DONE } else { NOTHING };
        assert!(
            seen == expected,
            "law broken: admitted={was_admitted}, but the drain was declared done when its work stood at {seen}"
        );
        admitted += u64::from(was_admitted);
    }
    admitted
}

fn counts_are_exact(tracker: Tracker, admitted: u64, tries: u64) {
    let counts = (tracker.alive(), tracker.started(), tracker.refused());
    assert!(counts == (0, admitted, tries - admitted), "law broken: alive, started, refused are {counts:?}");
    assert!(tracker.is_drained() && tracker.refuses());
}

/// Two requests race with the close; the closer waits for the drain.
fn close_waits_for_every_admitted_request(tracker: Tracker, shards: [usize; 2]) {
    let workers: Vec<_> = shards.into_iter().map(|index| Worker::start(tracker, index)).collect();
    tracker.close();
    block_on(tracker.drained());
    let seen: Vec<_> = workers.iter().map(Worker::seen).collect();
    let admitted = admitted_means_finished_and_visible(workers, &seen);
    counts_are_exact(tracker, admitted, 2);
}

/// As above, but somebody waits who did not close.
fn a_bystander_sees_what_the_closer_sees(tracker: Tracker, shards: [usize; 2]) {
    let workers: Vec<_> = shards.into_iter().map(|index| Worker::start(tracker, index)).collect();
    let closer = thread::spawn(move || tracker.close());
    block_on(tracker.drained());
    let seen: Vec<_> = workers.iter().map(Worker::seen).collect();
    admitted_means_finished_and_visible(workers, &seen);
    closer.join().expect("closing does not panic");
}

/// A request starts here and ends on another thread while a third one starts and the tracker closes.
fn a_guard_may_end_anywhere(tracker: Tracker) {
    let guard = tracker.start_at(0).expect("nobody has closed");
    let wrote = Arc::new(AtomicUsize::new(WORKING));
    let other = thread::spawn({
        let wrote = Arc::clone(&wrote);
        move || {
            wrote.store(DONE, Relaxed);
            drop(guard);
            true
        }
    });
    let workers = vec![Worker { wrote, admitted: other }, Worker::start(tracker, 1)];
    assert!(tracker.close() <= 2);
    block_on(tracker.drained());
    let seen: Vec<_> = workers.iter().map(Worker::seen).collect();
    let admitted = admitted_means_finished_and_visible(workers, &seen);
    counts_are_exact(tracker, admitted, 2);
}

#[test]
fn no_admitted_request_outlives_the_drain_on_one_shard() {
    check(|| close_waits_for_every_admitted_request(Tracker::with_shards(1), [0, 0]));
}

#[test]
fn no_admitted_request_outlives_the_drain_on_two_shards() {
    check(|| close_waits_for_every_admitted_request(Tracker::with_shards(2), [0, 1]));
}

#[test]
fn whoever_waits_sees_the_work_of_every_admitted_request() {
    check(|| a_bystander_sees_what_the_closer_sees(Tracker::with_shards(2), [0, 1]));
}

#[test]
fn a_guard_handed_to_another_thread_ends_its_request_there() {
    check(|| a_guard_may_end_anywhere(Tracker::with_shards(1)));
    check(|| a_guard_may_end_anywhere(Tracker::with_shards(2)));
}

/// Complete up to three preemptions: every mutant below falls within them, and the rest would take minutes.
fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

fn latch(mutant: latch::Mutant) -> &'static Latch {
    let mut latch = Latch::with_shards(1);
    latch.mutant = mutant;
    Box::leak(Box::new(latch))
}

/// One waits, one sets.
fn a_waiter_hears(latch: &'static Latch) {
    let setter = thread::spawn(move || latch.set());
    block_on(latch.wait());
    setter.join().expect("setting does not panic");
}

/// Two wait, one sets, twice; each waiter sees what came before the event.
fn every_waiter_hears(latch: &'static Latch) {
    let before = Arc::new(AtomicUsize::new(NOTHING));
    let hear = {
        let before = Arc::clone(&before);
        move || {
            block_on(latch.wait());
            let seen = before.load(Relaxed);
            assert!(seen == DONE, "law broken: woken, but what came before the event is not visible");
        }
    };
    let waiter = thread::spawn(hear.clone());
    let setter = thread::spawn(move || {
        before.store(DONE, Relaxed);
        latch.set();
        latch.set();
    });
    hear();
    waiter.join().expect("the other waiter hears, too");
    setter.join().expect("setting does not panic");
}

/// A waiter is polled by one task, moves to another, and a third waiter gives up meanwhile.
fn a_waiter_may_move_and_another_give_up(latch: &'static Latch) {
    let setter = thread::spawn(move || latch.set());
    let mut gives_up = Box::pin(latch.wait());
    let mut moves = pin!(latch.wait());
    let mut nobody = Context::from_waker(Waker::noop());
    let _ = gives_up.as_mut().poll(&mut nobody);
    let heard = moves.as_mut().poll(&mut nobody).is_ready();
    drop(gives_up);
    if !heard {
        block_on(Pin::new(&mut moves));
    }
    setter.join().expect("setting does not panic");
}

#[test]
fn a_waiter_is_woken_or_sees_the_flag_never_neither() {
    loom::model(|| a_waiter_hears(latch(latch::Mutant::None)));
    check(|| every_waiter_hears(latch(latch::Mutant::None)));
}

#[test]
fn a_waiter_that_moves_to_another_task_is_woken_there_and_one_that_gives_up_harms_nobody() {
    loom::model(|| a_waiter_may_move_and_another_give_up(latch(latch::Mutant::None)));
}

const DRAIN_LAW: &str = "the drain was declared done when its work stood at";
const VISIBLE_LAW: &str = "what came before the event is not visible";
/// Somebody waits for ever.
const MISSED: &str = "deadlock";
/// A waiter that is polled again finds that its waker was taken although it sees no flag: the same mistake as
/// a missed event, met earlier.
const TAKEN: &str = "not set, so nobody has taken the waker";

/// Runs `model` in a child process and wants it to fail with `law`.
fn must_break(test: &str, law: &str, model: impl Fn() + Sync + Send + 'static) {
    const CHILD: &str = "SHUTDOWN_LOOM_MUTANT";
    if std::env::var_os(CHILD).is_some() {
        return check(model);
    }
    let output = Command::new(std::env::current_exe().expect("a test knows its own file"))
        .args([&format!("loom_tests::{test}"), "--exact", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .expect("the test can be started again");
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(text.contains("running 1 test"), "no test is called {test}: {text}");
    assert!(!output.status.success(), "the mutant lives");
    assert!(text.contains(law), "the mutant died of something else: {text}");
}

macro_rules! mutants {
    ($($name:ident: $law:ident, $model:expr;)*) => {$(
        #[test]
        fn $name() {
            must_break(stringify!($name), $law, || $model);
        }
    )*};
}

mutants! {
    a_drop_that_publishes_nothing_is_found: DRAIN_LAW,
        close_waits_for_every_admitted_request(Tracker::mutated(1, Mutant::DropRelaxed), [0, 0]);
    a_last_drop_that_acquires_nothing_is_found: DRAIN_LAW,
        close_waits_for_every_admitted_request(Tracker::mutated(1, Mutant::PendingRelaxed), [0, 0]);
    a_close_that_acquires_nothing_is_found: DRAIN_LAW,
        close_waits_for_every_admitted_request(Tracker::mutated(1, Mutant::CloseRelaxed), [0, 0]);
    a_hand_over_that_acquires_nothing_is_found: DRAIN_LAW,
        close_waits_for_every_admitted_request(Tracker::mutated(1, Mutant::HandOverNoAcquire), [0, 0]);
    a_hand_over_that_publishes_nothing_is_found: DRAIN_LAW,
        a_bystander_sees_what_the_closer_sees(Tracker::mutated(2, Mutant::HandOverNoRelease), [0, 1]);
    a_refused_start_that_gives_its_addition_back_is_found: MISSED,
        a_bystander_sees_what_the_closer_sees(Tracker::mutated(1, Mutant::UndoRefused), [0, 0]);
    a_flag_apart_from_its_count_is_found: DRAIN_LAW,
        close_waits_for_every_admitted_request(Tracker::mutated(2, Mutant::CheckThenAdd), [0, 1]);
    a_waiter_that_does_not_look_again_is_found: TAKEN,
        a_waiter_hears(latch(latch::Mutant::SkipRecheck));
    a_flag_raised_after_the_wakers_were_taken_is_found: TAKEN,
        a_waiter_hears(latch(latch::Mutant::FlagLast));
    a_setter_that_publishes_nothing_is_found: VISIBLE_LAW,
        every_waiter_hears(latch(latch::Mutant::SetRelaxed));
    a_waiter_that_acquires_nothing_is_found: VISIBLE_LAW,
        every_waiter_hears(latch(latch::Mutant::SeenRelaxed));
    a_waiter_that_keeps_its_first_waker_is_found: MISSED,
        a_waiter_may_move_and_another_give_up(latch(latch::Mutant::KeepFirstWaker));
}
