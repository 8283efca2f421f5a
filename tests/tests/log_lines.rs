//! The log tells the story of a shutdown in the words of the system that we come from, in order.

use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::backend::{Backend, Standing, listen_live};
use shutdown_tests::client::get;

/// Each line of the seed, in order; `#` stands for a number. The six tasks may speak in any order.
const STORY: [&str; 21] = [
    "Shutdown signal received, initiating graceful shutdown",
    "Server received shutdown signal, stopping to accept new connections",
    "Server stopped accepting new connections, starting cleanup",
    "Step 1/4: Shutting down background tasks",
    "Metrics synchronization task shutting down",
    "Ledger ingestion task shutting down",
    "Liquidity pool sync task shutting down",
    "Trustline stats sync task shutting down",
    "RealtimeBroadcaster task shutting down",
    "Webhook dispatcher task shutting down",
    "All background tasks completed within timeout",
    "Step 2/4: Closing WebSocket connections",
    "Closing # WebSocket connections",
    "All WebSocket connections closed",
    "Step 3/4: Flushing cache and closing Redis connections",
    "Cache statistics - Hits: #, Misses: #, Invalidations: #, Hit Rate: #.#%",
    "Redis connection closed",
    "Step 4/4: Closing database connections",
    "Database connections closed successfully",
    "Graceful shutdown completed in #.#s",
    "Graceful shutdown complete",
];
const TASKS: std::ops::Range<usize> = 4..10;

/// The line's message with its numbers as `#`, without time, level and fields.
fn message(line: &str) -> Option<String> {
    let (_, text) = line.split_once(" INFO ")?;
    let mut message = String::new();
    // "Step 1/4" keeps its numbers: they are the order.
    let step = text.starts_with("Step ");
    for c in text.trim().chars() {
        match c {
            '0'..='9' if !step => {
                if !message.ends_with('#') {
                    message.push('#');
                }
            }
            c => message.push(c),
        }
    }
    Some(message)
}

/// Which line of the story it is.
fn place(message: &str) -> Option<usize> {
    // The longest: one line begins as another one does.
    (0..STORY.len())
        .filter(|place| message.starts_with(STORY[*place]))
        .max_by_key(|place| STORY[*place].len())
}

#[test]
fn the_log_tells_the_seeds_story_in_order() {
    let mut backend = Backend::start(Standing::servers(), &[]);
    let payment = backend.pay(1)[0];
    for id in [payment, payment, 4711] {
        get(backend.service.listen, &format!("/payments/{id}")).expect("it serves");
    }
    let live = listen_live(backend.service.listen, 2);
    backend.service.process.signal(Signal::TERM);
    assert_eq!(backend.service.process.exit_code(PATIENCE), 0, "{}", backend.service.process.stderr());
    live.join().expect("the clients");
    let stderr = backend.service.process.stderr();
    let mut told: Vec<_> = stderr.lines().filter_map(message).filter_map(|message| place(&message)).collect();
    told.get_mut(TASKS).expect("all lines").sort_unstable();
    assert_eq!(told, (0..STORY.len()).collect::<Vec<_>>(), "{stderr}");
    assert!(stderr.contains("Hits: 2, Misses: 1, Invalidations: 0, Hit Rate: 66.67%"), "{stderr}");
    for line in stderr.lines() {
        // One format: time, level, message, fields.
        let (time, rest) = line.split_once(' ').expect("a time");
        assert!(
            time.ends_with('Z') && [" INFO ", " WARN "].iter().any(|level| rest.starts_with(level)),
            "{line}"
        );
    }
}
