//! What is compared: ours first, then its peers.
//!
//! A candidate makes one loop for each thread; all loops of a candidate work on the same subject.

use std::future::Future;
use std::hint::black_box;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Waker};

use shutdown_core::{Latch, ShutdownCoordinator};
use tokio::sync::Notify;
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
