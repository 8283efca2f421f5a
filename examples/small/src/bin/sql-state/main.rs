//! A program whose state is in a SQL database: it counts its jobs over all its runs.
//!
//! ```text
//! cargo run -p small-examples --bin sql-state     # kill -TERM or kill -9 it, and start it again
//! ```
//!
//! The database is `SQL_STATE_DATABASE` (sqlite:sql-state.db?mode=rwc).

mod backend;

use std::convert::Infallible;
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use shutdown_core::state::{StateSource, StateStore};
use shutdown_core::{ShutdownConfig, ShutdownCoordinator, Signals, start_failure};

use crate::backend::SqlState;

fn main() -> ExitCode {
    let Err(error) = run();
    start_failure("sql-state", &*error)
}

fn run() -> Result<Infallible, Box<dyn Error>> {
    let signals = Signals::claim()?;
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let url = std::env::var("SQL_STATE_DATABASE").unwrap_or_else(|_| "sqlite:sql-state.db?mode=rwc".into());

    let done = Arc::new(AtomicU64::new(0));
    let (captured, restored) = (Arc::clone(&done), Arc::clone(&done));
    let jobs = StateSource::new(
        "jobs",
        move || Ok(captured.load(Ordering::Relaxed)),
        move |jobs: u64, saved| {
            println!("{jobs} jobs done until {:.1} s ago", saved.age.as_secs_f64());
            restored.store(jobs, Ordering::Relaxed);
            Ok(())
        },
    );
    let state = StateStore::new(SqlState::new(&url)?).source(jobs).interval(Duration::from_secs(1));
    let shutdown = ShutdownCoordinator::builder()
        .program("sql-state")
        .signals(signals)
        .config(ShutdownConfig::from_env()?)
        .state(state)
        .install()?;

    println!("working");
    let worker = thread::spawn(move || {
        while let Ok(job) = shutdown.request_start_named("job") {
            // The work: here it only takes its time.
            thread::park_timeout(Duration::from_millis(20));
            done.fetch_add(1, Ordering::Relaxed);
            drop(job);
        }
        println!("{} jobs done, none lost", done.load(Ordering::Relaxed));
    });

    let report = shutdown.wait();
    worker.join().map_err(|_| "the worker panicked")?;
    report.exit()
}
