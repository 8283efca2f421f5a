//! Ratios against peers, in one process, interleaved in an order shuffled every round.
//!
//! `cargo run --release -p shutdown-benches` prints them; `-- --save` also writes `benches/results/`. What the
//! numbers mean stands in `benches/README.md`.

mod added;
mod candidates;
mod harness;
mod instructions;
mod notices;
mod serving;
mod state;
mod stopping;
mod table;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use tokio::time::Instant;

use crate::candidates::Candidate;
use crate::harness::{Pace, Threads, measure};
use crate::serving::{CONTENDERS, Protocol};
use crate::table::{Goal, Table};

/// One operation takes nanoseconds.
const OPERATIONS: Pace =
    Pace { window: Duration::from_micros(150), batch: 128, enough: 301, patience: Duration::from_secs(40) };

/// One request takes a microsecond or four.
const REQUESTS: Pace =
    Pace { window: Duration::from_millis(1), batch: 8, enough: 1001, patience: Duration::from_secs(60) };

const USAGE: &str = "\
usage: shutdown-benches [guards|breaker|hyper|instructions|notices|state] [--save]
       shutdown-benches count <candidate> <h1|h2> <requests>
       shutdown-benches stop [<directory>]
Without a subject it measures guards, breaker and hyper. --save also writes benches/results/.
count serves so many requests and prints nothing; instructions runs it under callgrind. stop is one shutdown, with a
state in that directory or without one; state runs it.";

fn main() -> ExitCode {
    if cfg!(debug_assertions) {
        eprintln!("these numbers mean nothing without --release");
        return ExitCode::from(2);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let save = words.last() == Some(&"--save");
    if save {
        words.pop();
    }
    let done = match words.as_slice() {
        [] => {
            show("guards", &guards(), save)
                && show("breaker", &breaker(), save)
                && show("hyper", &hyper(), save)
        }
        ["guards"] => show("guards", &guards(), save),
        ["breaker"] => show("breaker", &breaker(), save),
        ["hyper"] => show("hyper", &hyper(), save),
        ["instructions"] => match instructions::compare() {
            Ok((page, met)) => show("instructions", &page, save) && met,
            Err(sentence) => {
                eprintln!("{sentence}");
                false
            }
        },
        ["state"] => match state::compare() {
            Ok(page) => show("state", &page, save),
            Err(error) => {
                eprintln!("the disk under the program: {error}");
                false
            }
        },
        ["notices"] => match notices::compare() {
            Ok(page) => show("notices", &page, save),
            Err(error) => {
                eprintln!("the loopback: {error}");
                false
            }
        },
        ["count", key, protocol, requests] if !save => {
            let contender = CONTENDERS.iter().find(|contender| contender.key == *key);
            let (Some(contender), Some(protocol), Ok(requests)) =
                (contender, Protocol::named(protocol), requests.parse())
            else {
                return usage();
            };
            (contender.serve)(protocol, requests);
            true
        }
        ["stop", dir @ ..] if !save && dir.len() < 2 => match stopping::once(dir.first().map(Path::new)) {
            Ok(()) => true,
            Err(error) => {
                eprintln!("{error}");
                false
            }
        },
        _ => return usage(),
    };
    if done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn usage() -> ExitCode {
    let keys: Vec<_> = CONTENDERS.iter().map(|contender| contender.key).collect();
    eprintln!("{USAGE}\nThe candidates are {}.", keys.join(", "));
    ExitCode::from(2)
}

/// Prints a page, and saves it if told to; `false` if it could not.
fn show(name: &str, page: &str, save: bool) -> bool {
    println!("{page}");
    let path = format!("{}/results/{name}.md", env!("CARGO_MANIFEST_DIR"));
    if save && let Err(error) = std::fs::write(path, page) {
        eprintln!("benches/results/{name}.md: {error}");
        return false;
    }
    true
}

/// The operations alone.
fn guards() -> String {
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
    table::page("Guards and waits against their peers", &tables)
}

/// A call through a closed circuit breaker.
fn breaker() -> String {
    const SEED: &str = "tokio::sync::RwLock, one write and two reads";
    let goals = [Threads::One, Threads::Two].map(|threads| Goal { threads, peer: SEED, at_most: 0.15 });
    let noon = Instant::now();
    let tables = [
        run("A call, each with one look at the clock", &candidates::breakers(Instant::now), &goals),
        run("The same without the clock: what the breaker adds", &candidates::breakers(move || noon), &goals),
    ];
    table::page("Asking a closed circuit breaker and telling it of a success", &tables)
}

fn run(title: &'static str, candidates: &[Candidate], goals: &[Goal]) -> Table {
    let one = measure(candidates, Threads::One, OPERATIONS);
    let two = measure(candidates, Threads::Two, OPERATIONS);
    Table::new(title, candidates, &one, &two, goals)
}

/// Whole requests.
fn hyper() -> String {
    let tables = [Protocol::Http1, Protocol::Http2].map(|protocol| {
        let candidates = CONTENDERS.map(|contender| contender.candidate(protocol));
        let one = measure(&candidates, Threads::One, REQUESTS);
        let two = measure(&candidates, Threads::Two, REQUESTS);
        added::table(&format!("A request over {}", protocol.name()), &one, &two)
    });
    table::page("Whole requests through hyper, with a shutdown and without", &tables)
}
