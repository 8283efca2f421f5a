//! What keeping a state adds to a drain: nothing, or it would be seen here.
//!
//! Each stop is a process of its own. It installs a coordinator, with a state or without one, is asked to stop with one
//! request in flight, and measures from the end of that request to the end of the drain. The request ends 21 ms
//! after the reason: the save at the reason, which begins after 20, is under way.

use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use shutdown_core::{Phase, Reason, ShutdownCoordinator};
use tokio::time::Instant;

use crate::state::full;
use crate::table::median;

/// Stops of each kind.
const STOPS: usize = 101;
/// How long the request goes on after the reason.
const REQUEST: Duration = Duration::from_millis(21);

/// One stop, in this process, with a state in `dir` or without one: prints the microseconds from the end of the last
/// request to that of the drain.
pub(crate) fn once(dir: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let mut builder = ShutdownCoordinator::builder();
    if let Some(dir) = dir {
        builder = builder.state(full(shutdown_core::state::StateStore::in_dir(dir)));
    }
    let shutdown = builder.install()?;
    let request = shutdown.request_start()?;
    let (drained, at) = mpsc::channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("it needs no driver");
        runtime.block_on(shutdown.until(Phase::Closing));
        drained.send(Instant::now())
    });
    shutdown.initiate_shutdown(Reason::requested("a measurement"));
    thread::park_timeout(REQUEST);
    let ended = Instant::now();
    drop(request);
    println!("{}", at.recv()?.saturating_duration_since(ended).as_micros());
    shutdown.wait();
    Ok(())
}

/// Both kinds in turn: a table's text.
pub(crate) fn compare(dir: &Path) -> std::io::Result<String> {
    let [mut with, mut without] = [const { Vec::new() }; 2];
    for _ in 0..STOPS {
        without.push(stop(None)?);
        with.push(stop(Some(&dir.join("stopping")))?);
    }
    let (with, without) = (median(with.into_iter()), median(without.into_iter()));
    Ok(format!(
        "## From the end of the last request to the end of the drain\n\n| | median µs |\n|---|---|\n\
         | without a state | {without:.0} |\n| with this state, its save at the reason under way | {with:.0} |\n\n\
         {STOPS} stops each, in turn, each in a process of its own. Saving is on another thread; what it adds is its share \
         of two processors.\n"
    ))
}

fn stop(dir: Option<&Path>) -> std::io::Result<f64> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("stop");
    let output = command.args(dir).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    text.trim().parse().map_err(|_| std::io::Error::other(format!("a stop failed: {text}{said}")))
}
