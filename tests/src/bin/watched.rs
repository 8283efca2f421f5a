//! A service with one thread that says when it is ready, and can be blocked: what a watchdog is there for.
//!
//! A line of stdin has a task block the service's only thread for ever; once it does, it prints "blocked".

use std::error::Error;
use std::sync::mpsc;

use shutdown_core::systemd::Systemd;
use shutdown_core::{ShutdownConfig, ShutdownCoordinator, Signals};
use tokio::runtime::Builder;

fn main() -> Result<(), Box<dyn Error>> {
    let signals = Signals::claim()?;
    let systemd = Systemd::from_env()?;
    let service = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let shutdown = ShutdownCoordinator::builder()
        .signals(signals)
        .config(ShutdownConfig::from_env()?)
        .runtime(service.handle().clone())
        .install()?;
    systemd.ready(shutdown, "here to be blocked");
    println!("ready");

    let handle = service.handle().clone();
    std::thread::spawn(move || {
        for _ in std::io::stdin().lines() {
            handle.spawn(async {
                println!("blocked");
                let (_never, forever) = mpsc::channel::<()>();
                let _ = forever.recv();
            });
        }
    });
    shutdown.wait().exit()
}
