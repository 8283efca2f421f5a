//! The coordinator of a process: handlers, a driver on its own thread, and a watchdog.
//!
//! Four threads, all parked while the service runs:
//!
//! ```text
//! shutdown-signals   reads stop signals, counts them, tells the driver; never logs, never blocks
//! shutdown-log       writes the driver's log lines, whatever blocks there
//! shutdown-driver    the coordinator's own runtime: the driver, then whatever was spawned on it, to the end
//! shutdown-watchdog  woken when the shutdown begins; at the total it leaves, whatever hangs
//! ```

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::runtime::{Handle, Runtime};
use tokio::time::Instant;

use crate::builder::Builder;
use crate::coordinator::{Core, ShutdownCoordinator};
use crate::error::{AlreadyInstalled, InstallError};
use crate::latch::Latch;
use crate::log::Log;
use crate::signals::Signals;
use crate::stage::Executor;

static INSTALLED: AtomicBool = AtomicBool::new(false);

/// How long the watchdog waits for its snapshot to be written.
const LAST_WORDS: Duration = Duration::from_millis(100);

impl Builder {
    /// Makes this process's coordinator: claims the signals if they were not, starts the driver and the watchdog,
    /// and returns once a stop signal begins a shutdown.
    ///
    /// It works inside a runtime and in a plain `fn main` without one. Stage tasks and background tasks run on the
    /// runtime given with [`runtime`](Self::runtime), else on the current one, else on the coordinator's own.
    ///
    /// # Errors
    ///
    /// There is one already, the plan cannot hold, the system refuses a handler or a thread, or the state's place cannot
    /// be used.
    ///
    /// # Panics
    ///
    /// As [`plan`](Self::plan).
    pub fn install(self) -> Result<ShutdownCoordinator, InstallError> {
        // Before anything can be refused halfway. Only a coordinator that works counts as installed.
        self.plan()?;
        // Relaxed: the flag guards only itself.
        if INSTALLED.swap(true, Ordering::Relaxed) {
            return Err(InstallError::AlreadyInstalled(AlreadyInstalled));
        }
        let installed = self.install_first();
        if installed.as_ref().is_err_and(|error| !error.is_late()) {
            INSTALLED.store(false, Ordering::Relaxed);
        }
        installed
    }

    fn install_first(mut self) -> Result<ShutdownCoordinator, InstallError> {
        let signals = match self.signals.take() {
            Some(signals) => signals,
            None => Signals::claim().map_err(InstallError::Signals)?,
        };
        let own = runtime("shutdown-driver")?;
        let hearing = runtime("shutdown-signals")?;
        let listening = {
            let _inside = hearing.enter();
            signals.listen().map_err(InstallError::Signals)?
        };

        let service = self.runtime.take().or_else(|| Handle::try_current().ok());
        let gone = Arc::new(Latch::new());
        let executor = Executor::Threads {
            runtime: service.clone().unwrap_or_else(|| own.handle().clone()),
            gone: Arc::clone(&gone),
            own: own.handle().clone(),
        };
        if let Some(service) = &service {
            watch_runtime(service, gone);
        }
        self.runtime = Some(service.unwrap_or_else(|| own.handle().clone()));

        let (shutdown, mut driver) = self.build_with(executor)?;
        let core = shutdown.core;
        driver.log = Log::thread().map_err(|source| InstallError::Thread { name: "shutdown-log", source })?;
        let _ = core.own_runtime.set(own.handle().clone());
        let _ = core.log.set(driver.log.clone());

        let (arm, armed) = mpsc::channel();
        driver.on_begin = Some(Box::new(move |deadline| {
            // The watchdog only ends with the process.
            let _ = arm.send(deadline);
        }));
        #[cfg(feature = "files")]
        let files = driver.report_files.clone();
        spawn("shutdown-watchdog", move || {
            watchdog(
                core,
                &armed,
                #[cfg(feature = "files")]
                files,
            );
        })?;
        spawn("shutdown-driver", move || {
            own.block_on(async {
                driver.run().await;
                // Answers may still be on their way out, and the admin listener lives to the end.
                std::future::pending::<()>().await;
            });
        })?;
        // Disarmed last: should a thread be refused, a stop signal still leaves.
        let armed_handlers = listening.handlers();
        spawn("shutdown-signals", move || hearing.block_on(listening.run(core)))?;
        armed_handlers.disarm();

        if let Some(grace) = core.config.grace_period
            && grace < core.config.total
        {
            tracing::warn!(
                target: "shutdown",
                grace_period_ms = crate::report::ms(grace),
                total_ms = crate::report::ms(core.config.total),
                "the platform kills before the shutdown may end: lower SHUTDOWN_TOTAL_TIMEOUT below \
                 SHUTDOWN_GRACE_PERIOD, or raise the platform's grace period"
            );
        }
        // Last: a stop signal now begins a shutdown, whose last stage saves what has been read.
        #[cfg(feature = "state")]
        if let Some(store) = core.state {
            store.open().map_err(InstallError::State)?;
        }
        Ok(shutdown)
    }
}

fn runtime(name: &'static str) -> Result<Runtime, InstallError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name(name)
        .build()
        .map_err(|source| InstallError::Thread { name, source })
}

fn spawn(name: &'static str, run: impl FnOnce() + Send + 'static) -> Result<(), InstallError> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(run);
    thread.map(drop).map_err(|source: io::Error| InstallError::Thread { name, source })
}

/// Sets `gone` when `service` is dropped: a runtime drops its tasks, and this task never ends otherwise.
fn watch_runtime(service: &Handle, gone: Arc<Latch>) {
    struct SetOnDrop(Arc<Latch>);
    impl Drop for SetOnDrop {
        fn drop(&mut self) {
            self.0.set();
        }
    }
    let canary = SetOnDrop(gone);
    service.spawn(async move {
        let _canary = canary;
        std::future::pending::<()>().await;
    });
}

/// Waits for the shutdown to begin, then for its total; whoever is still here then is ended.
fn watchdog(
    core: &'static Core,
    armed: &mpsc::Receiver<Instant>,
    #[cfg(feature = "files")] files: Option<crate::history::ReportFiles>,
) {
    let Ok(deadline) = armed.recv() else { return };
    // No runtime here: only the clock. Nothing is ever sent again, so this waits until the deadline.
    let (never, forever) = mpsc::channel::<()>();
    let _ = forever.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    drop(never);

    // Another thread writes: its lock or its disk may be what hangs. Its code is the fallback's, too.
    let (code, coded) = mpsc::channel();
    let (done, written) = mpsc::channel();
    let last_words = thread::Builder::new().name("shutdown-last-words".to_owned()).spawn(move || {
        let Some(mut report) = core.draft_at(Instant::now()) else { return };
        report.watchdog = true;
        report.exit_code = report.exit_code();
        let _ = code.send(report.exit_code);
        #[cfg(feature = "files")]
        if let Some(files) = files {
            let _ = files.write(&report);
        }
        let _ = done.send(());
        tracing::error!(target: "shutdown", exit_code = report.exit_code, "the watchdog ends the process: the total has passed");
    });
    let mut exit_code = crate::report::EXIT_STAGE;
    if last_words.is_ok() {
        let _ = written.recv_timeout(LAST_WORDS);
        exit_code = coded.try_recv().unwrap_or(exit_code);
    }
    // Not std::process::exit: it waits for an exit that is already under way.
    signal_hook::low_level::exit(i32::from(exit_code))
}
