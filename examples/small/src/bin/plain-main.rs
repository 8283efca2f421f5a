//! A plain `fn main` without a runtime: a thread that works through jobs and loses none.
//!
//! Each job is a request: the shutdown waits for the one at hand and refuses the next.

use std::convert::Infallible;
use std::error::Error;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use shutdown_core::{ShutdownConfig, ShutdownCoordinator, Signals, Stage, start_failure};

fn main() -> ExitCode {
    let Err(error) = run();
    start_failure("plain-main", &*error)
}

fn run() -> Result<Infallible, Box<dyn Error>> {
    let signals = Signals::claim()?;
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let shutdown = ShutdownCoordinator::builder()
        .program("plain-main")
        .signals(signals)
        .config(ShutdownConfig::from_env()?)
        .stage_task(Stage::Persist, "ledger", |_| async {
            println!("ledger written");
            Ok(())
        })
        .install()?;

    let worker = thread::spawn(move || {
        let mut done = 0_u64;
        while let Ok(job) = shutdown.request_start_named("job") {
            // The work: here it only takes its time.
            thread::park_timeout(Duration::from_millis(50));
            done += 1;
            if done == 1 {
                println!("working");
            }
            drop(job);
        }
        println!("{done} jobs done, none lost");
    });

    let report = shutdown.wait();
    worker.join().map_err(|_| "the worker panicked")?;
    report.exit()
}
