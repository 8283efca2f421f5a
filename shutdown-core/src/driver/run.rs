//! One shutdown under way: its clock, its plan, and the means to write its report.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::{Instant, sleep_until, timeout_at};

use super::Driver;
use crate::coordinator::{Core, Draft};
use crate::log::Log;
use crate::phase::Phase;
use crate::plan::{CUT_SETTLE, Plan, Step};
use crate::reason::{Reason, SignalReceived, Urgency};
use crate::report::{
    CutRequest, CutSession, EXIT_CLEAN, PhaseReport, RequestsReport, ShutdownReport, SignalReport, ms,
};
use crate::stage::Executor;

/// How long a listener has at least to empty its accept queue and close, once Draining has begun; the linger, if that
/// is longer: a process without file descriptors gets some back only as connections end.
const LISTENER_CLOSE: Duration = Duration::from_millis(500);
/// A shutdown with nothing to wait for is over by then, and one save is enough.
#[cfg(all(unix, feature = "state"))]
const AT_ONCE: Duration = Duration::from_millis(20);
/// Kept of the total for leaving, when the report's files take all the time there is.
#[cfg(feature = "files")]
const LEAVE: Duration = Duration::from_millis(50);
/// What the report's files are given at least: a process that was stopped (SIGSTOP, a paused machine) may wake up when
/// its total has passed.
#[cfg(feature = "files")]
const WRITE: Duration = Duration::from_millis(100);

/// One shutdown under way: its clock, its plan, and the means to write its report.
pub(super) struct Run {
    pub(super) core: &'static Core,
    pub(super) executor: Executor,
    pub(super) log: Log,
    #[cfg(feature = "files")]
    report_files: Option<crate::history::ReportFiles>,
    pub(super) began: Instant,
    /// Counts at the beginning, to report what changed since.
    started_before: u64,
    accepted_before: u64,
    gone_before: u64,
    pub(super) step: AtomicUsize,
}

/// Saves the state, and has the log say what there is to say.
#[cfg(all(unix, feature = "state"))]
pub(super) fn checkpoint(store: &'static crate::state::StateStore, log: &Log) {
    if let Some(news) = store.checkpoint() {
        log.line(move || store.log(news));
    }
}

impl Run {
    pub(super) fn begin(driver: &Driver, began: Instant, reason: Reason) -> Self {
        let core = driver.core;
        let now_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let started_unix = now_unix.saturating_sub(began.elapsed());
        let mut report = ShutdownReport::new(
            core.program.clone(),
            reason,
            u64::try_from(started_unix.as_millis()).unwrap_or(u64::MAX),
            core.config.total,
        );
        report.urgency = *core.urgency.borrow();
        #[cfg(all(unix, feature = "state"))]
        if let Some(store) = core.state {
            store.stopping(report.started_unix_ms);
        }
        let requests = core.requests.count();
        report.requests.in_flight_at_start = requests.alive;
        report.connections.open_at_start = core.connections.alive();
        report.sessions.open_at_start = core.sessions.tracker.alive();
        core.tasks.note_failures();
        *core.draft.lock() = Some(Draft { report, began, current_stage: None });
        Self {
            core,
            executor: driver.executor.clone(),
            log: driver.log.clone(),
            #[cfg(feature = "files")]
            report_files: driver.report_files.clone(),
            began,
            started_before: requests.started,
            accepted_before: core.connections.accepted(),
            gone_before: core.requests.client_gone(),
            step: AtomicUsize::new(0),
        }
    }

    pub(super) fn note_signal(&self, signal: SignalReceived, at: Instant) {
        let at_ms = ms(at.saturating_duration_since(self.began));
        self.draft(|draft| draft.report.signals.push(SignalReport { signal, at_ms }));
    }

    pub(super) fn hurry(&self, urgency: Urgency) {
        let raised = self.core.urgency.send_if_modified(|now| {
            let higher = urgency > *now;
            if higher {
                *now = urgency;
            }
            higher
        });
        if raised {
            self.draft(|draft| draft.report.urgency = urgency);
            self.core.sessions.hurried.set();
            self.log.line(move || {
                tracing::warn!(target: "shutdown", %urgency, "hurrying: waits are skipped, reserves kept");
            });
        }
    }

    pub(super) fn announce(&self, reason: Reason) {
        let (requests, connections) = self.draft(|draft| {
            (draft.report.requests.in_flight_at_start, draft.report.connections.open_at_start)
        });
        let total_ms = ms(self.core.config.total);
        self.log.line(move || {
            let what = match reason {
                Reason::Signal(_) => "Shutdown signal received",
                _ => "Shutdown requested",
            };
            let sender = if let Reason::Signal(signal) = &reason { Some(signal) } else { None };
            let (pid, uid) = (sender.and_then(|signal| signal.pid), sender.and_then(|signal| signal.uid));
            tracing::info!(
                target: "shutdown", %reason, pid, uid, total_ms, requests, connections,
                "{what}, initiating graceful shutdown"
            );
        });
    }

    /// Saves the state as it is at the reason, beside everything else; unless all is over at once, and the last save due
    /// already. Never ends.
    pub(super) async fn save_state(&self) {
        #[cfg(all(unix, feature = "state"))]
        if let Some(store) = self.core.state {
            tokio::time::sleep(AT_ONCE).await;
            let log = self.log.clone();
            drop(self.executor.start_blocking("state at the reason", move || checkpoint(store, &log)));
        }
        std::future::pending().await
    }

    pub(super) fn now(&self) -> Duration {
        Instant::now().saturating_duration_since(self.began)
    }

    pub(super) fn draft<T>(&self, change: impl FnOnce(&mut Draft) -> T) -> T {
        change(self.core.draft.lock().as_mut().expect("written by `begin`"))
    }

    /// The plan with everything it has to do by now.
    pub(super) fn plan(&self) -> Plan {
        self.core.plan()
    }

    pub(super) fn enter(&self, phase: Phase) {
        let now = ms(self.now());
        let (by_signal, clean) = self.draft(|draft| {
            if let Some(last) = draft.report.phases.last_mut() {
                last.end_ms = now;
            }
            draft.report.phases.push(PhaseReport { phase, start_ms: now, end_ms: now });
            (matches!(draft.report.reason, Reason::Signal(_)), draft.report.is_clean())
        });
        self.core.enter(phase);
        let doing = match phase {
            Phase::Draining if !by_signal => "Stopping to accept new connections",
            Phase::Stopped if !clean => "Shutdown complete",
            phase => phase.doing(),
        };
        self.log
            .line(move || tracing::info!(target: "shutdown", phase = phase.as_str(), at_ms = now, "{doing}"));
    }

    /// Waits for `work` until the step's deadline, which comes nearer when the urgency rises. `work` is polled
    /// at least once, however little time there is.
    pub(super) async fn within<T>(&self, step: Step, work: impl Future<Output = T>) -> Option<T> {
        let mut urgency = self.core.urgency.subscribe();
        let mut work = pin!(work);
        let mut deadline = Duration::MAX;
        loop {
            let now_urgency = *urgency.borrow_and_update();
            deadline = deadline.min(self.plan().deadline(step, self.now(), now_urgency));
            tokio::select! {
                biased;
                output = &mut work => return Some(output),
                // A timer would be late by up to a millisecond.
                () = std::future::ready(()), if deadline <= self.now() => return None,
                () = sleep_until(self.began + deadline) => return None,
                changed = urgency.changed() => changed.expect("the core keeps the sender"),
            }
        }
    }

    /// Spreads the sessions over their window; before they hear that it is time to leave. The window ends in time for
    /// the last ones to answer within their stage.
    pub(super) fn pace_sessions(&self) {
        let config = &self.core.config;
        let window = config.session_window.min(config.lame_duck + config.websocket / 2);
        if *self.core.urgency.borrow() > Urgency::Graceful {
            self.core.sessions.hurried.set();
        }
        self.core.sessions.pace(self.began + self.now(), window);
    }

    /// Cuts the sessions that are left, and names them; and the connections kept for sessions that are over. How many
    /// of each.
    pub(super) fn cut_sessions(&self) -> (u64, u64) {
        let core = self.core;
        let now = Instant::now();
        let left_behind = core.connections.left_behind();
        let sessions = self.draft(|draft| {
            core.count_sessions_as_cut(&mut draft.report, now);
            draft.report.connections.cut += left_behind;
            draft.report.sessions.clone()
        });
        core.sessions.cut.set();
        let cut = sessions.cut;
        self.log.line(move || {
            for CutSession { name, age_ms } in sessions.cut_sessions {
                tracing::warn!(target: "shutdown", session = &*name, age_ms, "session cut");
            }
            if cut > 0 {
                tracing::warn!(target: "shutdown", sessions = cut, "stage websockets: cutting what is left");
            }
        });
        (cut, left_behind)
    }

    pub(super) fn seal_stages(&self) {
        self.core.stages.lock().sealed = true;
    }

    /// Waits until every listener has emptied its queue and closed, then refuses connections. Whether any
    /// is open.
    pub(super) async fn close_listeners(&self) -> bool {
        let core = self.core;
        core.listeners.close();
        let within = LISTENER_CLOSE.max(self.plan().linger);
        if timeout_at(Instant::now() + within, core.listeners.wait()).await.is_err() {
            let listeners = core.listeners.len();
            self.log.line(move || {
                tracing::warn!(target: "shutdown", listeners, "a listener did not close in time");
            });
        }
        let connections = core.connections.awaited.close();
        self.log.line(move || {
            tracing::info!(target: "shutdown", connections, "listeners closed");
        });
        connections > 0
    }

    /// Cuts what is still in flight at the deadline, names it, and lets it fall.
    pub(super) async fn cut(&self) {
        let core = self.core;
        core.listeners.close();
        core.connections.awaited.close();
        core.requests.close();
        let latest = self.began + self.plan().latest(Step::Drain);
        if core.requests.alive() == 0 && !core.requests_done.is_set() {
            // The linger was cut short. Idle connections are closed, not cut: there is nothing of theirs to lose.
            core.requests_done.set();
            let _ =
                timeout_at((Instant::now() + CUT_SETTLE / 2).min(latest), core.connections.awaited.drained())
                    .await;
        }
        let now = Instant::now();
        let (requests, connections) = self.draft(|draft| {
            core.count_as_cut(&mut draft.report, now);
            draft.report.requests.client_gone = core.requests.client_gone() - self.gone_before;
            (draft.report.requests.clone(), draft.report.connections.cut)
        });
        self.log.line(move || {
            for CutRequest { route, age_ms } in requests.cut_requests {
                tracing::warn!(target: "shutdown", route = &*route, age_ms, "request cut");
            }
            if requests.cut + connections > 0 {
                let requests = requests.cut;
                tracing::warn!(target: "shutdown", requests, connections, "drain deadline: cutting what is left");
            }
        });
        core.requests_done.set();
        core.cut.set();
        let settled = async { tokio::join!(core.requests.drained(), core.connections.awaited.drained()) };
        let _ = timeout_at((now + CUT_SETTLE).min(latest), settled).await;
    }

    /// Writes down what became of the requests and connections.
    pub(super) fn note_requests(&self) {
        let core = self.core;
        let requests = self.draft(|draft| {
            let requests = &mut draft.report.requests;
            if requests.cut == 0 {
                requests.client_gone = core.requests.client_gone() - self.gone_before;
            }
            let admitted = core.requests.started().saturating_sub(self.started_before);
            requests.drained =
                (requests.in_flight_at_start + admitted).saturating_sub(requests.cut + requests.client_gone);
            draft.report.connections.accepted =
                core.connections.accepted().saturating_sub(self.accepted_before);
            draft.report.requests.clone()
        });
        let refused = core.refused();
        self.log.line(move || {
            let RequestsReport { drained, cut, client_gone, .. } = requests;
            tracing::info!(target: "shutdown", drained, refused, cut, client_gone, "requests drained");
        });
    }

    pub(super) fn finish(&self) -> Arc<ShutdownReport> {
        let report = Arc::new(self.core.draft_at(Instant::now()).expect("written by `begin`"));
        self.draft(|draft| draft.report = (*report).clone());
        let (exit_code, duration_ms) = (report.exit_code, report.duration_ms);
        let ended = report.companions_ended().join(", ");
        self.log.line(move || {
            let seconds = duration_ms / 1000.0;
            let ended = (!ended.is_empty()).then_some(&*ended);
            if exit_code == EXIT_CLEAN {
                tracing::info!(
                    target: "shutdown", exit_code, duration_ms, ended, "Graceful shutdown completed in {seconds:.2}s"
                );
            } else {
                tracing::warn!(
                    target: "shutdown", exit_code, duration_ms, ended,
                    "Shutdown completed in {seconds:.2}s, not all of it well"
                );
            }
        });
        report
    }

    /// Writes the report's files, if there are any. A slow disk may take what is left of the total.
    #[cfg(feature = "files")]
    pub(super) async fn write(&self, report: &Arc<ShutdownReport>) {
        let Some(files) = self.report_files.clone() else { return };
        let report = Arc::clone(report);
        let deadline = (self.began + self.core.config.total - LEAVE).max(Instant::now() + WRITE);
        let (token, log) = (tokio_util::sync::CancellationToken::new(), self.log.clone());
        let context = crate::stage::StageContext::with_log(deadline, token, log);
        let task = crate::stage::boxed(move |_| async move { Ok(files.write(&report)?) });
        let mut written = self.executor.start("report".into(), task, context);
        let error = match timeout_at(deadline, written.ended()).await {
            Ok(finish) if finish.outcome == crate::report::Outcome::Ok => return,
            Ok(finish) => finish.detail.clone(),
            Err(_) => Some("the disk took too long".to_owned()),
        };
        self.log.line(move || tracing::error!(target: "shutdown", error, "the report could not be written"));
    }

    #[cfg(not(feature = "files"))]
    pub(super) async fn write(&self, _report: &Arc<ShutdownReport>) {}
}
