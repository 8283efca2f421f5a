//! Saves a state that can be told from a torn one, to be killed while it does.
//!
//! ```text
//! state-saver once DIR   prints "opening", "opened N", saves N + 1, prints "saved N + 1"
//! state-saver loop DIR   saves N + 1, N + 2, … and prints each, until it is killed
//! state-saver step DIR   prints "opened N"; saves at every line of stdin, until it ends
//! state-saver grow DIR   as loop, each state a KiB larger, until a save fails
//! state-saver show DIR   prints what it has loaded as one line of JSON
//! state-saver naive FILE as loop, written into place: the control
//! ```
//!
//! One thread. Log lines go to stderr; a failure is one more line there and exit code 1.

use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};
use shutdown_core::sentence;
use shutdown_core::state::{Loaded, StateError};
use shutdown_tests::saved::{Counter, LENGTH, SECTION, check, content};

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).without_time().init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["once", dir] => once(dir.as_ref()),
        ["loop", dir] => forever(dir.as_ref(), |_| LENGTH),
        ["grow", dir] => forever(dir.as_ref(), |n| 1024 * n),
        ["step", dir] => step(dir.as_ref()),
        ["show", dir] => show(dir.as_ref()),
        ["naive", file] => naive(file.as_ref()),
        _ => {
            eprintln!("usage: state-saver once|loop|step|grow|show DIR, or naive FILE");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("state-saver: {}", sentence(&*error));
            ExitCode::FAILURE
        }
    }
}

type Done = Result<(), Box<dyn Error>>;

fn opened(counter: &Counter) -> Result<&Loaded, StateError> {
    let loaded = counter.store.open()?;
    println!("opened {}", counter.n());
    Ok(loaded)
}

fn once(dir: &Path) -> Done {
    let counter = Counter::in_dir(dir);
    println!("opening");
    opened(&counter)?;
    let n = counter.bump();
    counter.store.save()?;
    println!("saved {n}");
    Ok(())
}

fn forever(dir: &Path, length: impl Fn(u64) -> u64) -> Done {
    let counter = Counter::in_dir(dir);
    opened(&counter)?;
    loop {
        let n = counter.bump();
        counter.set_length(length(n));
        counter.store.save()?;
        println!("saved {n}");
    }
}

fn step(dir: &Path) -> Done {
    let counter = Counter::in_dir(dir);
    opened(&counter)?;
    for line in std::io::stdin().lines() {
        line?;
        let n = counter.bump();
        counter.store.save()?;
        println!("saved {n}");
    }
    Ok(())
}

fn show(dir: &Path) -> Done {
    let counter = Counter::in_dir(dir);
    let loaded = counter.store.open()?;
    let content: Option<Value> = loaded.sections.get(SECTION)?;
    let checked = content.as_ref().map(check).transpose();
    let shown = json!({
        "found": format!("{:?}", loaded.found),
        "n": checked.as_ref().ok().copied().flatten().map(|(n, _)| n),
        "torn": checked.err(),
        "restored": counter.n(),
        "length": counter.length(),
        "from_the_future": loaded.from_the_future,
        "set_aside": loaded.set_aside.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "was": loaded.incarnation,
        "incarnation": counter.store.incarnation(),
    });
    println!("{shown}");
    Ok(())
}

/// What a program does that has not thought about it: the file is empty, or has a part, for a moment in every save.
fn naive(file: &Path) -> Done {
    let read = std::fs::read(file).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    let mut n = read.and_then(|content| check(&content).ok()).map_or(0, |(n, _)| n);
    println!("opened {n}");
    loop {
        n += 1;
        serde_json::to_writer(File::create(file)?, &content(n, LENGTH))?;
        println!("saved {n}");
    }
}
