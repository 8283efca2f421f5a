//! The same on one processor: a thread that is pinned before it makes its runtime and its children, which inherit it.

use std::collections::BTreeSet;
use std::thread;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Does `work` on a new thread, on the last processor that this one may use; gives its number, too.
///
/// # Panics
///
/// If the system does not let a thread pin itself, or if `work` panics.
pub fn on_one_processor<T: Send>(work: impl FnOnce() -> T + Send) -> (usize, T) {
    let cpu = *of(None).last().expect("this thread runs somewhere");
    let pinned = move || {
        let mut one = CpuSet::new();
        one.set(cpu);
        sched_setaffinity(None, &one).expect("a thread may give processors up");
        work()
    };
    let done = thread::scope(|scope| scope.spawn(pinned).join());
    (cpu, done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// The processors on which this thread may run.
pub fn of_this_thread() -> BTreeSet<usize> {
    of(None)
}

/// The processors on which any thread of this process may run.
///
/// # Panics
///
/// If it is gone.
pub fn of_process(id: u32) -> BTreeSet<usize> {
    let threads = std::fs::read_dir(format!("/proc/{id}/task")).expect("our own child is there");
    let id = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    threads.filter_map(id).filter_map(Pid::from_raw).flat_map(|thread| of(Some(thread))).collect()
}

fn of(thread: Option<Pid>) -> BTreeSet<usize> {
    // A thread that has ended meanwhile runs nowhere.
    sched_getaffinity(thread)
        .map(|set| (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
        .unwrap_or_default()
}
