//! Counts what is in flight, refuses what comes too late, and knows exactly when the last one is gone.
//!
//! One word a shard holds three facts that must agree: bit 0 says *closed*, bits 1–31 count the guards alive,
//! bits 32–63 count the guards ever started (modulo 2³², for reports). Starting is one atomic addition and
//! dropping is one subtraction; neither allocates, locks or waits.
//!
//! ```text
//!  63            32 31            1   0
//! ┌────────────────┬───────────────┬───┐
//! │    started     │     alive     │ C │      one word a shard, 128 bytes apart
//! └────────────────┴───────────────┴───┘
//! ```
//!
//! **Hand-over at close** (after the Linux kernel's `percpu_ref`): [`Tracker::close`] sets bit 0 of every shard
//! and adds what it found alive to one shared count, `pending`, which starts at [`BIAS`]; then it takes the bias
//! off. A drop that sees bit 0 takes one off `pending`; whoever brings it to zero wakes the drain.
//!
//! Why it is exact. A shard's modifications have one order, split by its `fetch_or`. A guard added before it and
//! not yet dropped is counted once by the `fetch_or`, and its drop comes after, sees bit 0 and takes one off
//! `pending`. A guard dropped before is in neither. An addition after it sees bit 0 and is refused, *without
//! undoing* its addition: once closed, a shard's own count decides nothing. So after the bias is off, `pending`
//! is the number of guards alive; it only falls, and reaches zero once.
//!
//! Why it orders memory. What a request did before its guard was dropped is visible to whoever sees the drain as
//! done: the drop's subtraction releases; `close` acquires it when the guard was gone before, the last
//! subtraction from `pending` acquires it when the guard outlived the close.

use std::borrow::Cow;
use std::sync::LazyLock;

use parking_lot::Mutex as RegistryMutex;
use slab::Slab;
use tokio::time::Instant;

use crate::error::ShuttingDown;
use crate::latch::{Latch, Wait};
use crate::sync::{AtomicBool, AtomicU64, Ordering, default_shards, thread_index};

const CLOSED: u64 = 1;
const ALIVE: u64 = 1 << 1;
const ALIVE_MASK: u64 = (1 << 31) - 1;
const STARTED: u64 = 1 << 32;

/// Keeps `pending` away from zero until `close` has visited every shard.
const BIAS: u64 = 1 << 62;

/// Counts guards in padded shards and hands the count over when closed.
///
/// Its memory is leaked once (a few KiB), so that a guard is one pointer of 8 bytes with no reference count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tracker {
    shards: &'static [Shard],
    shared: &'static Shared,
}

/// One moment's counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count {
    pub(crate) alive: u64,
    pub(crate) started: u64,
}

#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Shard {
    word: AtomicU64,
    shared: &'static Shared,
}

#[derive(Debug)]
struct Shared {
    pending: AtomicU64,
    closed: AtomicBool,
    drained: Latch,
    /// Guards admitted in all; valid once the bias is off.
    admitted: AtomicU64,
    /// Guards whose client left before its answer was complete.
    client_gone: AtomicU64,
    #[cfg(shutdown_loom)]
    mutant: Mutant,
}

/// Ways to break the protocol, one at a time; loom must find each.
#[cfg(shutdown_loom)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The protocol as it is.
    None,
    /// A drop publishes nothing.
    DropRelaxed,
    /// The last drop acquires nothing.
    PendingRelaxed,
    /// Closing acquires nothing.
    CloseRelaxed,
    /// Handing the count over acquires nothing.
    HandOverNoAcquire,
    /// Handing the count over publishes nothing.
    HandOverNoRelease,
    /// A refused start gives its addition back (and so can reach zero a second time).
    UndoRefused,
    /// "Closed" is read in one word and the count raised in another.
    CheckThenAdd,
}

impl Shared {
    fn new() -> Self {
        Self {
            pending: AtomicU64::new(BIAS),
            closed: AtomicBool::new(false),
            drained: Latch::with_shards(1),
            admitted: AtomicU64::new(0),
            client_gone: AtomicU64::new(0),
            #[cfg(shutdown_loom)]
            mutant: Mutant::None,
        }
    }

    #[cfg(not(shutdown_loom))]
    #[inline]
    const fn order(&self, strong: Ordering) -> Ordering {
        strong
    }

    #[cfg(shutdown_loom)]
    fn order_unless(&self, mutant: Mutant, strong: Ordering) -> Ordering {
        if self.mutant == mutant { Ordering::Relaxed } else { strong }
    }

    #[cfg(shutdown_loom)]
    fn hand_over_order(&self) -> Ordering {
        match self.mutant {
            Mutant::HandOverNoAcquire => Ordering::Release,
            Mutant::HandOverNoRelease => Ordering::Acquire,
            _ => Ordering::AcqRel,
        }
    }
}

impl Tracker {
    pub(crate) fn new() -> Self {
        Self::with_shards(default_shards())
    }

    /// A tracker with `shards` shards, rounded up to a power of two.
    pub(crate) fn with_shards(shards: usize) -> Self {
        Self::leak(shards, Shared::new())
    }

    #[cfg(shutdown_loom)]
    pub(crate) fn mutated(shards: usize, mutant: Mutant) -> Self {
        Self::leak(shards, Shared { mutant, ..Shared::new() })
    }

    fn leak(shards: usize, shared: Shared) -> Self {
        let shared: &'static Shared = Box::leak(Box::new(shared));
        let shards = (0..shards.next_power_of_two())
            .map(|_| Shard { word: AtomicU64::new(0), shared })
            .collect::<Vec<_>>()
            .leak();
        Self { shards, shared }
    }

    /// Starts one, or refuses because the tracker is closed.
    #[inline]
    pub(crate) fn start(&self) -> Result<Guard, ShuttingDown> {
        self.start_at(thread_index())
    }

    /// [`start`](Self::start) on the shard of `index`.
    #[inline]
    pub(crate) fn start_at(&self, index: usize) -> Result<Guard, ShuttingDown> {
        // The shard count is a power of two.
        let shard = &self.shards[index & (self.shards.len() - 1)];
        #[cfg(shutdown_loom)]
        if self.shared.mutant == Mutant::CheckThenAdd {
            if self.shared.closed.load(Ordering::SeqCst) {
                return Err(ShuttingDown);
            }
            shard.word.fetch_add(STARTED | ALIVE, Ordering::SeqCst);
            return Ok(Guard(shard));
        }
        // Relaxed: the word's own modification order decides between admitted and refused; a request that is
        // admitted reads nothing that closing wrote.
        let before = shard.word.fetch_add(STARTED | ALIVE, Ordering::Relaxed);
        if before & CLOSED != 0 {
            #[cfg(shutdown_loom)]
            if self.shared.mutant == Mutant::UndoRefused {
                shard.leave();
            }
            return Err(ShuttingDown);
        }
        Ok(Guard(shard))
    }

    /// Refuses all that start from now on and returns how many are alive. Only the first call does anything.
    pub(crate) fn close(&self) -> u64 {
        // Relaxed: only the driver closes.
        if self.shared.closed.swap(true, Ordering::Relaxed) {
            return self.alive();
        }
        #[cfg(not(shutdown_loom))]
        let order = self.shared.order(Ordering::Acquire);
        #[cfg(shutdown_loom)]
        let order = self.shared.order_unless(Mutant::CloseRelaxed, Ordering::Acquire);
        // Acquire: pairs with the Release in `leave`, for the guards dropped before.
        let (mut alive, mut admitted) = (0, 0);
        for shard in self.shards {
            let word = shard.word.fetch_or(CLOSED, order);
            alive += alive_in(word);
            admitted += word / STARTED;
        }
        // Relaxed: published by the hand-over below.
        self.shared.admitted.store(admitted, Ordering::Relaxed);
        #[cfg(not(shutdown_loom))]
        let order = self.shared.order(Ordering::AcqRel);
        #[cfg(shutdown_loom)]
        let order = self.shared.hand_over_order();
        // AcqRel, with `leave_closed`: acquires what the guards did that were dropped since then, and passes what
        // was acquired above on to the guard that will be the last.
        let before = self.shared.pending.fetch_add(alive.wrapping_sub(BIAS), order);
        if before.wrapping_add(alive).wrapping_sub(BIAS) == 0 {
            self.shared.drained.set();
        }
        alive
    }

    /// Whether every start from now on is refused.
    #[inline]
    pub(crate) fn refuses(&self) -> bool {
        // Acquire: pairs with the bias being taken off, which comes after every shard's `fetch_or`.
        self.shared.pending.load(Ordering::Acquire) < BIAS / 2
    }

    /// Whether the tracker is closed and no guard is left.
    #[cfg(test)]
    pub(crate) fn is_drained(&self) -> bool {
        self.shared.drained.is_set()
    }

    /// Waits until the tracker is closed and no guard is left.
    pub(crate) fn drained(&self) -> Wait<'static> {
        self.shared.drained.wait()
    }

    /// Guards alive and ever started, for use before the close. The two agree: each shard's word holds both.
    pub(crate) fn count(&self) -> Count {
        self.shards.iter().fold(Count { alive: 0, started: 0 }, |count, shard| {
            let word = shard.word.load(Ordering::Relaxed);
            Count { alive: count.alive + alive_in(word), started: count.started + word / STARTED }
        })
    }

    /// Guards alive; a moment's value while others start and end.
    pub(crate) fn alive(&self) -> u64 {
        let pending = self.shared.pending.load(Ordering::Relaxed);
        if pending < BIAS / 2 { pending } else { self.sum(alive_in) }
    }

    /// Guards ever started, each shard modulo 2³².
    pub(crate) fn started(&self) -> u64 {
        if self.refuses() {
            self.shared.admitted.load(Ordering::Relaxed)
        } else {
            self.sum(|word| word / STARTED)
        }
    }

    /// Starts refused since the close: what the shards have counted as started beyond those admitted.
    pub(crate) fn refused(&self) -> u64 {
        if !self.refuses() {
            return 0;
        }
        self.sum(|word| word / STARTED) - self.shared.admitted.load(Ordering::Relaxed)
    }

    /// Guards marked with [`Guard::client_gone`].
    pub(crate) fn client_gone(&self) -> u64 {
        self.shared.client_gone.load(Ordering::Relaxed)
    }

    fn sum(&self, part: impl Fn(u64) -> u64) -> u64 {
        self.shards.iter().map(|shard| part(shard.word.load(Ordering::Relaxed))).sum()
    }
}

fn alive_in(word: u64) -> u64 {
    (word / ALIVE) & ALIVE_MASK
}

impl Shard {
    #[inline]
    fn leave(&self) {
        #[cfg(not(shutdown_loom))]
        let order = self.shared.order(Ordering::Release);
        #[cfg(shutdown_loom)]
        let order = self.shared.order_unless(Mutant::DropRelaxed, Ordering::Release);
        // Release: what the request did, to whoever sees the drain as done (acquired by `close`).
        if self.word.fetch_sub(ALIVE, order) & CLOSED != 0 {
            self.leave_closed();
        }
    }

    #[cold]
    fn leave_closed(&self) {
        #[cfg(not(shutdown_loom))]
        let order = self.shared.order(Ordering::AcqRel);
        #[cfg(shutdown_loom)]
        let order = self.shared.order_unless(Mutant::PendingRelaxed, Ordering::AcqRel);
        // AcqRel: the last one acquires what all the others did and passes it on through the latch.
        if self.shared.pending.fetch_sub(1, order) == 1 {
            self.shared.drained.set();
        }
    }
}

/// One in flight; dropping it, on any thread, ends it.
#[derive(Debug)]
#[must_use = "what is in flight ends when its guard is dropped"]
pub(crate) struct Guard(&'static Shard);

impl Guard {
    pub(crate) fn client_gone(&self) {
        self.0.shared.client_gone.fetch_add(1, Ordering::Relaxed);
    }
}

/// Where a guard counts that ended before it is dropped. It stays one pointer, and a request pays no branch for it.
static ENDED: LazyLock<Tracker> = LazyLock::new(|| Tracker::with_shards(1));

impl Guard {
    fn end(&mut self) {
        *self = ENDED.start().expect("nobody closes it");
    }
}

impl Drop for Guard {
    #[inline]
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A request in flight. Hold it to the request's true end: the last byte of the answer, not the call's return.
///
/// 8 bytes; starting and dropping it are one atomic operation each. A refused request never has one.
#[derive(Debug)]
#[must_use = "the request ends when its guard is dropped"]
pub struct RequestGuard(pub(crate) Guard);

impl RequestGuard {
    /// Ends the request now; the guard counts nothing from here on. For a request that has become a
    /// [`Session`](crate::Session).
    pub fn end(&mut self) {
        self.0.end();
    }

    /// Notes that the client left before its answer was complete, for the report. Drop the guard after it.
    pub fn client_gone(&self) {
        self.0.client_gone();
    }
}

/// A named request or session: kept for the report and for `/status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedRequest {
    /// The route or the session's name, in the words of whoever named it.
    pub route: Cow<'static, str>,
    /// When it started.
    pub started: Instant,
}

/// The named requests in flight, or the sessions, in shards of one lock each. Anonymous requests do not touch it.
#[derive(Debug)]
pub(crate) struct Registry {
    shards: Box<[RegistryMutex<Slab<NamedRequest>>]>,
}

impl Registry {
    pub(crate) fn new() -> Self {
        Self { shards: (0..default_shards()).map(|_| RegistryMutex::new(Slab::new())).collect() }
    }

    pub(crate) fn enter(
        &'static self,
        guard: Guard,
        route: Cow<'static, str>,
        now: Instant,
    ) -> NamedRequestGuard {
        let shard = thread_index() % self.shards.len();
        let key = self.shards[shard].lock().insert(NamedRequest { route, started: now });
        NamedRequestGuard { registry: self, shard, key: Some(key), guard: RequestGuard(guard) }
    }

    /// The named request in flight that started first.
    pub(crate) fn oldest(&self) -> Option<NamedRequest> {
        let of_shard = |shard: &RegistryMutex<Slab<NamedRequest>>| {
            shard.lock().iter().min_by_key(|(_, request)| request.started).map(|(_, request)| request.clone())
        };
        self.shards.iter().filter_map(of_shard).min_by_key(|request| request.started)
    }

    /// Every named request in flight, oldest first.
    pub(crate) fn list(&self) -> Vec<NamedRequest> {
        let mut all: Vec<_> = self
            .shards
            .iter()
            .flat_map(|shard| shard.lock().iter().map(|(_, r)| r.clone()).collect::<Vec<_>>())
            .collect();
        all.sort_by_key(|request| request.started);
        all
    }
}

/// A request in flight that the report can name. Costs a short lock to start and to drop.
#[derive(Debug)]
#[must_use = "the request ends when its guard is dropped"]
pub struct NamedRequestGuard {
    registry: &'static Registry,
    shard: usize,
    /// `None` once the request has ended.
    key: Option<usize>,
    guard: RequestGuard,
}

impl NamedRequestGuard {
    /// Ends the request now; the guard counts nothing from here on. For a request that has become a
    /// [`Session`](crate::Session).
    pub fn end(&mut self) {
        self.forget_name();
        self.guard.end();
    }

    fn forget_name(&mut self) {
        if let Some(key) = self.key.take() {
            self.registry.shards[self.shard].lock().remove(key);
        }
    }

    /// Notes that the client left before its answer was complete, for the report. Drop the guard after it.
    pub fn client_gone(&self) {
        self.guard.client_gone();
    }
}

impl Drop for NamedRequestGuard {
    fn drop(&mut self) {
        // The name goes first, so a request that is not counted is never listed.
        self.forget_name();
    }
}

#[cfg(all(test, not(shutdown_loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64 as StdU64;

    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    #[test]
    fn a_guard_is_eight_bytes_also_inside_an_option() {
        assert_eq!(size_of::<RequestGuard>(), 8);
        assert_eq!(size_of::<Option<RequestGuard>>(), 8);
    }

    #[test]
    fn the_drain_is_done_when_the_last_guard_is_dropped_and_not_before() {
        let tracker = Tracker::with_shards(4);
        let guards: Vec<_> = (0..8).map(|i| tracker.start_at(i).unwrap()).collect();
        let mut drained = task::spawn(tracker.drained());
        assert_pending!(drained.poll());
        assert_eq!(tracker.close(), 8);
        for guard in guards {
            assert_pending!(drained.poll());
            drop(guard);
        }
        assert_ready!(drained.poll());
    }

    #[test]
    fn a_guard_that_was_ended_counts_no_more_and_its_drop_ends_nothing_else() {
        let tracker = Tracker::with_shards(1);
        let (mut ended, kept) = (tracker.start().unwrap(), tracker.start().unwrap());
        ended.end();
        assert_eq!(tracker.alive(), 1);
        assert_eq!(tracker.close(), 1);
        drop(ended);
        assert!(!tracker.is_drained());
        drop(kept);
        assert!(tracker.is_drained());
    }

    #[test]
    fn closing_with_nothing_in_flight_is_done_at_once() {
        let tracker = Tracker::with_shards(4);
        drop(tracker.start().unwrap());
        assert!(!tracker.is_drained());
        assert_eq!(tracker.close(), 0);
        assert!(tracker.is_drained());
    }

    #[test]
    fn a_refused_start_is_never_counted_as_alive_and_always_as_refused() {
        let tracker = Tracker::with_shards(2);
        let kept = tracker.start_at(0).unwrap();
        drop(tracker.start_at(1).unwrap());
        tracker.close();
        for index in 0..10 {
            assert_eq!(tracker.start_at(index).unwrap_err(), ShuttingDown);
        }
        assert_eq!((tracker.alive(), tracker.refused(), tracker.started()), (1, 10, 2));
        drop(kept);
        assert_eq!((tracker.alive(), tracker.refused(), tracker.started()), (0, 10, 2));
        assert!(tracker.is_drained());
        assert!(tracker.start_at(0).is_err());
        assert_eq!((tracker.alive(), tracker.refused(), tracker.started()), (0, 11, 2));
    }

    #[test]
    fn a_guard_may_be_dropped_on_another_thread_and_shard_counts_go_negative_nowhere() {
        let tracker = Tracker::with_shards(2);
        let guards: Vec<_> = (0..100).map(|i| tracker.start_at(i).unwrap()).collect();
        std::thread::spawn(move || drop(guards)).join().unwrap();
        assert_eq!(tracker.alive(), 0);
        assert_eq!(tracker.started(), 100);
    }

    /// The control of `no_start_is_admitted_after_the_drain_was_declared_done`: the order of seed 003, a flag in
    /// one word and the count in another.
    #[derive(Default)]
    struct CheckThenAdd {
        closed: AtomicBool,
        count: StdU64,
    }

    impl CheckThenAdd {
        fn start(&self) -> bool {
            use std::sync::atomic::Ordering::SeqCst;
            if self.closed.load(SeqCst) {
                return false;
            }
            self.count.fetch_add(1, SeqCst);
            true
        }

        fn close_and_see_none(&self) -> bool {
            use std::sync::atomic::Ordering::SeqCst;
            self.closed.store(true, SeqCst);
            self.count.load(SeqCst) == 0
        }
    }

    /// Two threads meet at one try: one starts, one closes. Returns (admitted, declared done).
    fn race<T: Send + Sync + 'static>(
        tries: usize,
        make: impl Fn() -> T,
        start: fn(&T) -> bool,
        close: fn(&T) -> bool,
    ) -> usize {
        use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
        let subjects: Arc<Vec<T>> = Arc::new((0..tries).map(|_| make()).collect());
        let turn = Arc::new(AtomicUsize::new(0));
        let admitted = {
            let (subjects, turn) = (Arc::clone(&subjects), Arc::clone(&turn));
            std::thread::spawn(move || {
                let mut admitted = Vec::with_capacity(subjects.len());
                for (index, subject) in subjects.iter().enumerate() {
                    meet(&turn, 2 * index);
                    admitted.push(start(subject));
                }
                admitted
            })
        };
        let mut done = Vec::with_capacity(tries);
        for (index, subject) in subjects.iter().enumerate() {
            meet(&turn, 2 * index);
            // Vary who is first by a few cycles.
            for _ in 0..index % 64 {
                std::hint::spin_loop();
            }
            done.push(close(subject));
        }
        let admitted = admitted.join().expect("the starter does not panic");
        let late = admitted.iter().zip(&done).filter(|(admitted, done)| **admitted && **done).count();
        assert!(turn.load(SeqCst) == 2 * tries);
        late
    }

    /// Both threads leave together; yielding keeps it quick where they share one CPU.
    fn meet(turn: &std::sync::atomic::AtomicUsize, from: usize) {
        use std::sync::atomic::Ordering::SeqCst;
        turn.fetch_add(1, SeqCst);
        let mut spins = 0_u32;
        while turn.load(SeqCst) < from + 2 {
            spins += 1;
            if spins.is_multiple_of(4096) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }

    #[test]
    fn no_start_is_admitted_after_the_drain_was_declared_done() {
        let tries = if std::env::var_os("SHUTDOWN_TESTS_LONG").is_some() { 200_000 } else { 20_000 };
        let ours = race(
            tries,
            || Tracker::with_shards(2),
            // The guard is kept: a start admitted after "done" would have to be seen as alive.
            |tracker| tracker.start().map(std::mem::ManuallyDrop::new).is_ok(),
            |tracker| {
                tracker.close();
                tracker.is_drained()
            },
        );
        let control =
            race(20_000, CheckThenAdd::default, CheckThenAdd::start, CheckThenAdd::close_and_see_none);
        println!(
            "{tries} tries: {ours} admitted after done; control (flag and count apart): {control} of 20000"
        );
        assert_eq!(ours, 0);
        assert!(control > 0, "the control must lose, else this run proves nothing");
    }

    #[test]
    fn named_requests_are_listed_oldest_first_until_dropped() {
        let registry: &'static Registry = Box::leak(Box::new(Registry::new()));
        let tracker = Tracker::with_shards(1);
        let now = Instant::now();
        let second = std::time::Duration::from_secs(1);
        let late = registry.enter(tracker.start().unwrap(), "GET /late".into(), now + second);
        let early = registry.enter(tracker.start().unwrap(), "GET /early".into(), now);
        let routes: Vec<_> = registry.list().into_iter().map(|r| r.route).collect();
        assert_eq!(routes, ["GET /early", "GET /late"]);
        drop(early);
        assert_eq!(registry.list().len(), 1);
        drop(late);
        assert!(registry.list().is_empty());
        assert_eq!(tracker.alive(), 0);
    }
}
