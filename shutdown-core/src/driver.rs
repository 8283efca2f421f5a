//! The owner of the shutdown: it alone moves the phase.
//!
//! The whole story of stopping is [`stop`], read from top to bottom; what serves it stands in [`run`] (clock, plan,
//! report) and [`stages`] (running one stage).

mod run;
mod stages;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::coordinator::{Command, Core};
use crate::log::Log;
use crate::phase::Phase;
use crate::plan::{REPORT_RESERVE, Stage, Step};
use crate::reason::{Reason, Urgency};
use crate::report::ShutdownReport;
use crate::stage::Executor;
use run::Run;

/// How long a connection accepted at the last moment has for its first request.
const FIRST_REQUEST: Duration = Duration::from_millis(100);

/// What the last log lines have at least, when the report has taken the time of all.
const LAST_LINES: Duration = Duration::from_millis(20);

/// The owner of a coordinator; dropping it before [`run`](Self::run) ends leaves the shutdown undone.
#[must_use = "the shutdown only happens while the driver runs"]
pub struct Driver {
    pub(crate) core: &'static Core,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    pub(crate) executor: Executor,
    pub(crate) log: Log,
    #[cfg(feature = "files")]
    pub(crate) report_files: Option<crate::history::ReportFiles>,
    /// Called with the end of everything when the shutdown begins: arms the watchdog.
    pub(crate) on_begin: Option<Box<dyn FnOnce(Instant) + Send>>,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("phase", &self.core.phase()).finish_non_exhaustive()
    }
}

impl Driver {
    /// Waits for a reason, then runs the whole shutdown and returns its report.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: dropped half-way, the rest of the shutdown does not happen.
    pub async fn run(mut self) -> Arc<ShutdownReport> {
        let saving = save_now_and_then(self.core, self.executor.clone(), self.log.clone());
        let stopping = async {
            let run = self.first_reason().await;
            tokio::select! {
                biased;
                // Further signals and requests are heard beside the story.
                () = hear(&run, &mut self.commands) => unreachable!("the core keeps a sender"),
                report = stop(&run) => report,
            }
        };
        tokio::select! {
            biased;
            report = stopping => report,
            () = saving => unreachable!("it has no end of its own"),
        }
    }

    async fn first_reason(&mut self) -> Run {
        let (reason, began) = match self.commands.recv().await.expect("the core keeps a sender") {
            Command::Begin { reason, at } => (reason, at),
            Command::Signal { signal, at, .. } => (Reason::Signal(signal), at),
            Command::Terminate { urgency, at } => {
                self.core.urgency.send_replace(urgency);
                (Reason::Terminate { urgency }, at)
            }
        };
        if let Some(arm) = self.on_begin.take() {
            arm(began + self.core.config.total);
        }
        let run = Run::begin(self, began, reason.clone());
        if let Reason::Signal(signal) = &reason {
            run.note_signal(signal.clone(), began);
        }
        run.announce(reason);
        run
    }
}

/// The story of stopping.
async fn stop(run: &Run) -> Arc<ShutdownReport> {
    let core = run.core;
    let traffic = async {
        run.pace_sessions();
        run.enter(Phase::LameDuck);
        run.within(Step::LameDuck, std::future::pending::<()>()).await;
        run.enter(Phase::Draining);
        run.seal_stages();
        if run.within(Step::Drain, drain(run)).await.is_none() {
            run.cut().await;
        }
        run.note_requests();
    };
    // Departure starts with the lame duck and has ended before the closing stages begin.
    let leaving = async { tokio::join!(traffic, run.stage(Stage::Departure)) };
    tokio::select! {
        biased;
        _ = leaving => (),
        () = run.save_state() => unreachable!("it waits for nothing"),
    }

    run.enter(Phase::Closing);
    let closing: Vec<Stage> = run.plan().closing().map(|planned| planned.stage).collect();
    for stage in closing {
        run.stage(stage).await;
    }

    let report = run.finish();
    core.verdict.send_replace(Some(Arc::clone(&report)));
    core.answers.close();
    let soon = Instant::now() + REPORT_RESERVE;
    let _ = tokio::join!(run.write(&report), timeout_at(soon, core.answers.wait()));
    run.enter(Phase::Stopped);
    let _ = timeout_at(soon.max(Instant::now() + LAST_LINES), run.log.written()).await;
    core.released.send_replace(true);
    report
}

/// Waits until nothing accepted is left but sessions. Two trackers close at two moments: connections with the listeners,
/// requests at the end of the linger. With no connection open, neither costs time.
async fn drain(run: &Run) {
    let core = run.core;
    if run.close_listeners().await {
        // A connection that came out of the queue last has not had time to say anything, whatever the linger is.
        let linger_end = Instant::now() + run.plan().linger.max(FIRST_REQUEST);
        let _ = timeout_at(linger_end, core.connections.awaited.drained()).await;
    }
    core.requests.close();
    core.requests.drained().await;
    core.requests_done.set();
    core.connections.awaited.drained().await;
}

/// Opens the state, if nobody has or will, and saves it at its interval, each time on another thread, until a shutdown begins:
/// a save that began late would take stage Persist's time. Never ends.
#[cfg(all(unix, feature = "state"))]
async fn save_now_and_then(core: &'static Core, executor: Executor, log: Log) {
    let saving = async {
        let Some(store) = core.state else { return };
        // Installed, `install` does so, and not before a stop signal would be a whole shutdown: until then nothing is written.
        if matches!(executor, Executor::Tasks) {
            executor.start_blocking("state", move || _ = store.open()).ended().await;
        }
        let Some(every) = store.every() else { return };
        loop {
            tokio::time::sleep(every).await;
            let log = log.clone();
            executor.start_blocking("state", move || run::checkpoint(store, &log)).ended().await;
        }
    };
    tokio::select! {
        () = core.leaving.wait() => (),
        () = saving => (),
    }
    std::future::pending().await
}

#[cfg(not(all(unix, feature = "state")))]
async fn save_now_and_then(_core: &'static Core, _executor: Executor, _log: Log) {
    std::future::pending().await
}

/// Hears what comes after the first reason: a second signal hurries, and so does `/terminate`.
async fn hear(run: &Run, commands: &mut mpsc::UnboundedReceiver<Command>) {
    while let Some(command) = commands.recv().await {
        match command {
            Command::Begin { reason, .. } => run.log.line(move || {
                tracing::info!(target: "shutdown", %reason, "already shutting down: a later reason changes nothing");
            }),
            Command::Signal { signal, force, at } => {
                let number = signal.number;
                let received = signal.clone();
                run.log.line(move || tracing::info!(target: "shutdown", signal = %received, "another stop signal"));
                run.note_signal(signal, at);
                if force {
                    run.draft(|draft| _ = draft.report.forced_by.get_or_insert(number));
                    run.hurry(Urgency::Fast);
                }
            }
            Command::Terminate { urgency, .. } => run.hurry(urgency),
        }
    }
}
