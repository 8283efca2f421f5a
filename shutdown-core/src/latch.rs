//! An event that happens once and is never missed: "drain has begun", "the last guard is gone", "cut".
//!
//! Invariants. The flag goes up before any waker is taken, and a waiter looks at the flag again under its
//! shard's lock before it links its waker; so a waiter either sees the flag or is found by [`Latch::set`]:
//!
//! ```text
//! waiter: lock shard ── flag? no ── link ── unlock           waiter: lock shard ── flag? yes ── ready
//! setter:                                  flag up ─ lock ─ wake     setter: flag up ─ lock (nothing linked)
//! ```
//!
//! A pending waiter that is polled again by the same task takes no lock: a connection polls its drain event
//! each time anything else wakes it, and tokio's `Notified` would take a process-wide mutex each time.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use slab::Slab;

use crate::sync::{AtomicBool, Mutex, Ordering, default_shards, thread_index};

/// How many wakers leave a shard at a time: a task woken runs while the next batch is taken.
const BATCH: usize = 64;

/// A one-way flag that futures can wait for.
#[derive(Debug)]
pub struct Latch {
    set: AtomicBool,
    shards: Box<[Shard]>,
    #[cfg(shutdown_loom)]
    pub(crate) mutant: Mutant,
}

/// Ways to break the protocol, one at a time; loom must find each.
#[cfg(shutdown_loom)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The protocol as it is.
    None,
    /// A waiter links its waker without looking at the flag again.
    SkipRecheck,
    /// The flag goes up after the wakers were taken.
    FlagLast,
    /// The setter publishes nothing.
    SetRelaxed,
    /// A waiter that sees the flag acquires nothing.
    SeenRelaxed,
    /// A waiter that moved to another task keeps its first waker.
    KeepFirstWaker,
}

/// On its own pair of cache lines: neighbours are prefetched together.
#[repr(align(128))]
struct Shard(Mutex<Slab<Waker>>);

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shard")
    }
}

impl Default for Latch {
    fn default() -> Self {
        Self::new()
    }
}

impl Latch {
    /// A latch that is not set, with shards for this machine.
    pub fn new() -> Self {
        Self::with_shards(default_shards())
    }

    pub(crate) fn with_shards(shards: usize) -> Self {
        Self {
            set: AtomicBool::new(false),
            shards: (0..shards.max(1)).map(|_| Shard(Mutex::new(Slab::new()))).collect(),
            #[cfg(shutdown_loom)]
            mutant: Mutant::None,
        }
    }

    /// Whether the event has happened. What the setter wrote before is visible after `true`.
    #[inline]
    pub fn is_set(&self) -> bool {
        #[cfg(shutdown_loom)]
        if self.mutant == Mutant::SeenRelaxed {
            return self.set.load(Ordering::Relaxed);
        }
        // Acquire: pairs with the swap in `set`.
        self.set.load(Ordering::Acquire)
    }

    /// Makes the event happen and wakes everyone who waits. The second call does nothing.
    pub fn set(&self) {
        #[cfg(shutdown_loom)]
        match self.mutant {
            Mutant::FlagLast => {
                self.wake_all();
                self.set.store(true, Ordering::Release);
                return;
            }
            Mutant::SetRelaxed => {
                self.set.store(true, Ordering::Relaxed);
                return self.wake_all();
            }
            _ => {}
        }
        // Release: what came before the event, to every `is_set`.
        if !self.set.swap(true, Ordering::Release) {
            self.wake_all();
        }
    }

    fn wake_all(&self) {
        let mut batch = Vec::new();
        for shard in &self.shards {
            loop {
                {
                    let mut waiting = shard.0.lock();
                    let keys: Vec<usize> = waiting.iter().map(|(key, _)| key).take(BATCH).collect();
                    batch.extend(keys.into_iter().map(|key| waiting.remove(key)));
                }
                if batch.is_empty() {
                    break;
                }
                // Outside the lock: a waker may run anything, also another waiter's registration.
                batch.drain(..).for_each(Waker::wake);
            }
        }
    }

    /// Waits for the event.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future forgets the waiter and nothing else.
    pub fn wait(&self) -> Wait<'_> {
        Wait { latch: self, linked: None }
    }
}

/// Waits for a [`Latch`]; resolves at once when it is set already.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct Wait<'a> {
    latch: &'a Latch,
    linked: Option<Linked>,
}

#[derive(Debug)]
struct Linked {
    shard: usize,
    key: usize,
    waker: Waker,
}

impl Wait<'_> {
    /// The latch this waits for.
    pub fn latch(&self) -> &Latch {
        self.latch
    }
}

impl Future for Wait<'_> {
    type Output = ();

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if this.latch.is_set() {
            return Poll::Ready(());
        }
        #[cfg(shutdown_loom)]
        if this.linked.is_some() && this.latch.mutant == Mutant::KeepFirstWaker {
            return Poll::Pending;
        }
        if let Some(linked) = &this.linked
            && linked.waker.will_wake(cx.waker())
        {
            return Poll::Pending;
        }
        this.link(cx)
    }
}

impl Wait<'_> {
    /// Leaves the waker to the setter; the first poll, and one by another task.
    #[inline(never)]
    fn link(&mut self, cx: &Context<'_>) -> Poll<()> {
        let shard = match &self.linked {
            Some(linked) => linked.shard,
            None => thread_index() % self.latch.shards.len(),
        };
        let (waker, ours) = (cx.waker().clone(), cx.waker().clone());
        let mut waiting = self.latch.shards[shard].0.lock();
        let recheck = self.latch.is_set();
        #[cfg(shutdown_loom)]
        let recheck = recheck && self.latch.mutant != Mutant::SkipRecheck;
        if recheck {
            return Poll::Ready(());
        }
        match &mut self.linked {
            Some(linked) => {
                let slot = waiting.get_mut(linked.key).expect("not set, so nobody has taken the waker");
                let old = std::mem::replace(slot, waker);
                // A waker's last owner drops what it wakes, perhaps another wait: never under the lock.
                drop(waiting);
                drop(old);
                linked.waker = ours;
            }
            None => {
                let key = waiting.insert(waker);
                self.linked = Some(Linked { shard, key, waker: ours });
            }
        }
        Poll::Pending
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if let Some(linked) = self.linked.take() {
            // `try_remove`: `set` may have taken the waker; after it no key is ever handed out again.
            let taken = self.latch.shards[linked.shard].0.lock().try_remove(linked.key);
            // Outside the lock, for the same reason as in `link`.
            drop(taken);
        }
    }
}

#[cfg(all(test, not(shutdown_loom)))]
mod tests {
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    #[test]
    fn a_latch_set_before_anyone_waits_is_not_missed() {
        let latch = Latch::new();
        latch.set();
        assert_ready!(task::spawn(latch.wait()).poll());
    }

    #[test]
    fn every_waiter_is_woken_once_and_late_ones_do_not_wait() {
        let latch = Latch::with_shards(1);
        let mut waiters: Vec<_> = (0..3 * BATCH).map(|_| task::spawn(latch.wait())).collect();
        for waiter in &mut waiters {
            assert_pending!(waiter.poll());
        }
        latch.set();
        latch.set();
        for waiter in &mut waiters {
            assert!(waiter.is_woken());
            assert_ready!(waiter.poll());
        }
        assert_ready!(task::spawn(latch.wait()).poll());
    }

    #[test]
    fn a_dropped_waiter_leaves_no_waker_behind() {
        let latch = Latch::with_shards(1);
        for _ in 0..1000 {
            let mut waiter = task::spawn(latch.wait());
            assert_pending!(waiter.poll());
            assert_pending!(waiter.poll());
        }
        assert!(latch.shards[0].0.lock().is_empty());
    }

    /// Wakes nothing, and owns a wait that goes when it goes.
    struct Owner(#[expect(dead_code, reason = "held for its Drop")] Mutex<Wait<'static>>);

    impl std::task::Wake for Owner {
        fn wake(self: std::sync::Arc<Self>) {}
    }

    fn owner(latch: &'static Latch) -> Waker {
        let mut owned = latch.wait();
        assert_pending!(Pin::new(&mut owned).poll(&mut Context::from_waker(Waker::noop())));
        std::sync::Arc::new(Owner(Mutex::new(owned))).into()
    }

    #[test]
    fn a_waker_that_owns_another_wait_may_go_with_its_own() {
        let latch: &'static Latch = Box::leak(Box::new(Latch::with_shards(1)));
        let (given_up, moved) = (owner(latch), owner(latch));
        let mut first = latch.wait();
        assert_pending!(Pin::new(&mut first).poll(&mut Context::from_waker(&given_up)));
        let mut second = latch.wait();
        assert_pending!(Pin::new(&mut second).poll(&mut Context::from_waker(&moved)));
        // From here on the latch's waiters are the wakers' last owners.
        drop((given_up, moved));
        assert_pending!(Pin::new(&mut second).poll(&mut Context::from_waker(Waker::noop())));
        drop(first);
        drop(second);
        assert!(latch.shards[0].0.lock().is_empty());
    }

    #[test]
    fn a_waiter_that_moves_to_another_task_is_woken_there() {
        let latch = Latch::with_shards(1);
        let mut wait = latch.wait();
        let mut first = task::spawn(std::future::poll_fn(|cx| Pin::new(&mut wait).poll(cx)));
        assert_pending!(first.poll());
        drop(first);
        let mut second = task::spawn(wait);
        assert_pending!(second.poll());
        latch.set();
        assert!(second.is_woken());
    }
}
