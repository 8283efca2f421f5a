//! What is compared: ours first, then its peers.
//!
//! A candidate makes one loop for each thread; all loops of a candidate work on the same subject.

use std::future::Future;
use std::hint::black_box;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use shutdown_core::breaker::{Breaker, Config};
use shutdown_core::{Latch, ShutdownCoordinator};
use tokio::sync::{Notify, RwLock};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Calls its argument, a batch of so many operations, until told to stop.
pub(crate) type Loop = Box<dyn Fn(&mut dyn FnMut(&mut dyn FnMut(u32))) + Send + Sync>;

pub(crate) struct Candidate {
    pub(crate) name: &'static str,
    pub(crate) ours: bool,
    /// Runs `drive` with a closure that performs a batch of operations.
    pub(crate) run: Loop,
}

/// A candidate whose operation needs nothing from one call to the next.
fn plain(name: &'static str, ours: bool, operation: impl Fn() + Send + Sync + 'static) -> Candidate {
    let run: Loop = Box::new(move |drive| drive(&mut |batch| (0..batch).for_each(|_| operation())));
    Candidate { name, ours, run }
}

/// The shape many services have today: a flag in one word, a count in another, an `Arc` in the guard. It admits
/// requests after the drain was declared done.
struct FlagAndCount {
    stopping: AtomicBool,
    count: Arc<AtomicUsize>,
}

struct FlagAndCountGuard(Arc<AtomicUsize>);

impl FlagAndCount {
    fn start(&self) -> Option<FlagAndCountGuard> {
        if self.stopping.load(Ordering::Acquire) {
            return None;
        }
        self.count.fetch_add(1, Ordering::AcqRel);
        Some(FlagAndCountGuard(Arc::clone(&self.count)))
    }
}

impl Drop for FlagAndCountGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Start and end of a request.
pub(crate) fn guards() -> Vec<Candidate> {
    let (shutdown, driver) = ShutdownCoordinator::builder().build().expect("the default plan holds");
    // Nobody asks for a shutdown, so the driver would only wait.
    drop(driver);
    let tracker = TaskTracker::new();
    let (asked, checked) = (tracker.clone(), tracker.clone());
    let token = CancellationToken::new();
    let seed = FlagAndCount { stopping: AtomicBool::new(false), count: Arc::default() };
    let word = AtomicUsize::new(0);
    vec![
        plain("RequestGuard (ours)", true, move || drop(black_box(shutdown.request_start()))),
        plain("TaskTracker::token", false, move || drop(black_box(tracker.token()))),
        plain("TaskTracker is_closed + token", false, move || {
            if !asked.is_closed() {
                drop(black_box(asked.token()));
            }
        }),
        plain("CancellationToken::is_cancelled + TaskTracker::token", false, move || {
            if !token.is_cancelled() {
                drop(black_box(checked.token()));
            }
        }),
        plain("flag + Arc<AtomicUsize> (wrong: admits late)", false, move || drop(black_box(seed.start()))),
        plain("fetch_add + fetch_sub (no refusal: the floor of one word)", false, move || {
            black_box(word.fetch_add(1, Ordering::Acquire));
            black_box(word.fetch_sub(1, Ordering::Release));
        }),
    ]
}

/// A candidate that polls a pending future again and again, as a connection does each time it is woken.
fn polled<S, F>(name: &'static str, ours: bool, subject: S, wait: fn(&'static S) -> F) -> Candidate
where
    S: Send + Sync + 'static,
    F: Future + 'static,
{
    let subject: &'static S = Box::leak(Box::new(subject));
    let run: Loop = Box::new(move |drive| {
        let mut future = pin!(wait(subject));
        let mut context = Context::from_waker(Waker::noop());
        assert!(future.as_mut().poll(&mut context).is_pending(), "nothing has happened");
        drive(&mut |batch| {
            for _ in 0..batch {
                let _ = black_box(future.as_mut().poll(&mut context).is_pending());
            }
        });
    });
    Candidate { name, ours, run }
}

/// Another poll of a wait that is pending.
pub(crate) fn polls() -> Vec<Candidate> {
    let flag = AtomicBool::new(false);
    vec![
        polled("Latch::wait (ours)", true, Latch::new(), Latch::wait),
        polled("Notify::notified", false, Notify::new(), Notify::notified),
        polled("CancellationToken::cancelled", false, CancellationToken::new(), CancellationToken::cancelled),
        plain("AtomicBool load (nobody is woken: the floor)", false, move || {
            black_box(flag.load(Ordering::Acquire));
        }),
    ]
}

/// A call through a closed breaker: asked for, and well. Each asks `clock` once.
pub(crate) fn breakers(clock: impl Fn() -> Instant + Copy + Send + Sync + 'static) -> Vec<Candidate> {
    let ours = Breaker::new("a", Config::default(), Instant::now());
    let seed = SeedBreaker::default();
    let locked = LockedBreaker::default();
    let word = AtomicU64::new(0);
    vec![
        plain("Breaker (ours)", true, move || {
            let now = clock();
            if let Ok(permit) = black_box(&ours).try_acquire(now) {
                permit.success(now);
            }
        }),
        plain("tokio::sync::RwLock, one write and two reads", false, move || {
            spin(async {
                if black_box(&seed).should_allow_request(clock).await {
                    seed.record_success().await;
                }
            });
        }),
        plain("std::sync::Mutex around state and window", false, move || black_box(&locked).call(clock)),
        plain("fetch_add on one word (no breaker: the floor of one word)", false, move || {
            black_box(clock());
            black_box(word.fetch_add(1, Ordering::Relaxed));
        }),
    ]
}

/// Polls again at once: kinder to a lock of tokio's than parking the thread until it is woken.
fn spin<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::hint::spin_loop(),
        }
    }
}

/// The shape of the system we come from: state and window behind locks of tokio's, a write lock for each call to see
/// whether the (tumbling) window is over, and the counters beside it.
struct SeedBreaker {
    state: RwLock<Closed>,
    window_start: RwLock<Instant>,
    total: AtomicU64,
    failed: AtomicU64,
}

#[derive(Clone, Copy)]
struct Closed;

impl Default for SeedBreaker {
    fn default() -> Self {
        Self {
            state: RwLock::new(Closed),
            window_start: RwLock::new(Instant::now()),
            total: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }
}

/// As ours by default.
const WINDOW: Duration = Duration::from_secs(10);

impl SeedBreaker {
    async fn should_allow_request(&self, clock: impl Fn() -> Instant) -> bool {
        let mut start = self.window_start.write().await;
        // Its only look at the clock.
        let now = clock();
        if now - *start >= WINDOW {
            *start = now;
            self.total.store(0, Ordering::SeqCst);
            self.failed.store(0, Ordering::SeqCst);
        }
        drop(start);
        let Closed = black_box(*self.state.read().await);
        true
    }

    async fn record_success(&self) {
        self.total.fetch_add(1, Ordering::SeqCst);
        let Closed = black_box(*self.state.read().await);
    }
}

/// What one would write first: everything behind one lock, taken to ask and taken to answer.
struct LockedBreaker(Mutex<(bool, Instant, u64)>);

impl Default for LockedBreaker {
    fn default() -> Self {
        Self(Mutex::new((true, Instant::now(), 0)))
    }
}

impl LockedBreaker {
    fn call(&self, clock: impl Fn() -> Instant) {
        let closed = black_box(self.0.lock().expect("nobody panics").0);
        if closed {
            let now = clock();
            let mut all = self.0.lock().expect("nobody panics");
            if now - all.1 >= WINDOW {
                (all.1, all.2) = (now, 0);
            }
            all.2 += 1;
        }
    }
}
