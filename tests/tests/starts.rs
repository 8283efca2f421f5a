//! A stop at any moment of a start: it ends the process at once, or it is a whole shutdown. Nothing between.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::process::{EdgeProxy, Process, Stopwatch, read_report};
use shutdown_tests::{PATIENCE, count};

/// How long a start takes here and now, until it says that it serves.
fn a_start() -> Duration {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let begin = Stopwatch::start();
    let process = Process::start(&mut EdgeProxy::command(dir.path()));
    process.address("  admin ");
    begin.elapsed()
}

#[test]
fn a_stop_at_any_moment_of_a_start_ends_it_at_once_or_is_a_whole_shutdown() {
    let mut seen = BTreeMap::<&str, usize>::new();
    let random = RandomState::new();
    // From before the first moment of the program to well after it serves.
    let window = 2 * a_start();
    for start in 0..count(200) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let data = dir.path().join("data");
        let mut process = Process::start(&mut EdgeProxy::command(dir.path()));
        // From exec on: any moment, a few at the very beginning.
        let micros = random.hash_one(start) % (window.as_micros() as u64);
        thread::park_timeout(Duration::from_micros(if start % 4 == 0 { micros / 8 } else { micros }));
        process.signal(Signal::TERM);
        let status = process.ended(PATIENCE);
        let how = match (status.signal(), status.code()) {
            (Some(15), _) => {
                assert!(!data.exists(), "killed before claim, yet it wrote");
                "by the signal, before claim"
            }
            (_, Some(143)) => {
                assert!(!data.exists(), "left before install, yet it wrote: {}", process.stderr());
                "143, before install"
            }
            (_, Some(0)) => {
                let report = read_report(&data);
                assert_eq!(report["reason"]["signal"], "SIGTERM");
                assert_eq!(report["exit_code"], 0);
                "0, with a report"
            }
            _ => panic!("{status} after {micros} µs:\n{}", process.stderr()),
        };
        *seen.entry(how).or_default() += 1;
    }
    println!("{} starts: {seen:?}", count(200));
    assert!(seen.len() >= 2, "the moments were not spread: {seen:?}");
}
