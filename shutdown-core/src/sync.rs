//! The primitives that loom replaces, under one roof.
//!
//! Everything whose interleavings are model-checked imports from here and nothing else. The cfg is
//! `shutdown_loom`, this project's alone, because tokio hides its network half under `--cfg loom`.

#[cfg(not(shutdown_loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[cfg(not(shutdown_loom))]
pub(crate) use parking_lot::Mutex;

#[cfg(shutdown_loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// loom's mutex with `parking_lot`'s signature: a poisoned model has failed already.
#[cfg(shutdown_loom)]
#[derive(Debug)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

#[cfg(shutdown_loom)]
impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        self.0.lock().expect("a model that panicked under the lock has failed already")
    }
}

/// The calling thread's place among the shards: handed out once a thread, so two busy threads rarely meet.
///
/// While the thread's locals are being torn down it is 0, which is correct and merely shared.
#[cfg(not(shutdown_loom))]
#[inline]
pub(crate) fn thread_index() -> usize {
    use std::cell::Cell;
    use std::sync::atomic::AtomicUsize;

    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static INDEX: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    INDEX
        .try_with(|index| {
            let known = index.get();
            if known != usize::MAX {
                return known;
            }
            let fresh = NEXT.fetch_add(1, Ordering::Relaxed);
            index.set(fresh);
            fresh
        })
        .unwrap_or(0)
}

#[cfg(shutdown_loom)]
pub(crate) fn thread_index() -> usize {
    0
}

/// How many shards this machine wants: twice the hardware threads, rounded up to a power of two, so that
/// threads handed consecutive indexes land on different ones.
pub(crate) fn default_shards() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get).next_power_of_two() * 2
}
