//! Ratios against peers, in one process, interleaved in an order shuffled every round.
//!
//! `cargo run --release -p shutdown-benches` prints them; `-- --save` also writes `benches/results/`. What the
//! numbers mean stands in `benches/README.md`.

mod candidates;
mod harness;
mod table;

use std::process::ExitCode;

use crate::candidates::Candidate;
use crate::harness::{Threads, measure};
use crate::table::{Goal, Table};

fn main() -> ExitCode {
    let save = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [flag] if flag == "--save" => true,
        arguments => {
            eprintln!("what is {arguments:?}? The only argument is --save");
            return ExitCode::from(2);
        }
    };
    if cfg!(debug_assertions) {
        eprintln!("these numbers mean nothing without --release");
        return ExitCode::from(2);
    }
    let tables = [
        run(
            "Counting a request in and out",
            &candidates::guards(),
            &[
                Goal { threads: Threads::One, peer: "TaskTracker::token", at_most: 0.72 },
                Goal { threads: Threads::Two, peer: "TaskTracker::token", at_most: 0.25 },
            ],
        ),
        run(
            "Polling a pending \"has the drain begun?\" again",
            &candidates::polls(),
            &[
                Goal { threads: Threads::One, peer: "Notify::notified", at_most: 0.10 },
                Goal { threads: Threads::Two, peer: "Notify::notified", at_most: 0.05 },
            ],
        ),
    ];
    let text = table::page(&tables);
    println!("{text}");
    if save {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/results/guards.md");
        if let Err(error) = std::fs::write(path, text) {
            eprintln!("benches/results/guards.md: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn run(title: &'static str, candidates: &[Candidate], goals: &[Goal]) -> Table {
    let one = measure(candidates, Threads::One);
    let two = measure(candidates, Threads::Two);
    Table::new(title, candidates, one, two, goals)
}
