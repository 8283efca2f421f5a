//! The owner of the shutdown: it alone moves the phase.
//!
//! The whole story of stopping is [`stop`], read from top to bottom. Everything else here serves it.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::coordinator::{Command, Core, Draft};
use crate::log::Log;
use crate::phase::Phase;
use crate::plan::{CUT_SETTLE, Plan, REPORT_RESERVE, Stage, Step};
use crate::reason::{Reason, SignalReceived, Urgency};
use crate::report::{
    CUT_LISTED, CutRequest, Outcome, PhaseReport, RequestsReport, ShutdownReport, SignalReport, StageReport,
    TaskReport, ms,
};
use crate::stage::{Executor, Running, StageContext, TOKEN_GRACE, Unit, When};

/// How long a listener has to empty its accept queue and close, once Draining has begun.
const LISTENER_CLOSE: Duration = Duration::from_millis(500);
/// Kept of the total for leaving, when the report's files take all the time there is.
const LEAVE: Duration = Duration::from_millis(50);
/// How long an aborted task has to be dropped, when there is time.
const ABORT_SETTLE: Duration = Duration::from_millis(20);
/// The same when later stages have no more than their reserves. Only a task that blocks its thread takes it whole.
const ABORT_SETTLE_SHORT: Duration = Duration::from_millis(5);

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
        let run = self.first_reason().await;
        tokio::select! {
            biased;
            // Further signals and requests are heard beside the story.
            () = hear(&run, &mut self.commands) => unreachable!("the core keeps a sender"),
            report = stop(&run) => report,
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
    tokio::join!(traffic, run.stage(Stage::Departure));

    run.enter(Phase::Closing);
    let closing: Vec<Stage> = run.plan().closing().map(|planned| planned.stage).collect();
    for stage in closing {
        run.stage(stage).await;
    }

    let report = run.finish();
    core.verdict.send_replace(Some(Arc::clone(&report)));
    core.answers.close();
    let soon = Instant::now() + REPORT_RESERVE;
    let _ = tokio::join!(
        run.write(&report),
        timeout_at(soon, core.answers.wait()),
        timeout_at(soon, run.log.written())
    );
    run.enter(Phase::Stopped);
    core.released.send_replace(true);
    report
}

/// Waits until nothing accepted is left. Two trackers close at two moments: connections with the listeners,
/// requests at the end of the linger. With no connection open, neither costs time.
async fn drain(run: &Run) {
    let core = run.core;
    if run.close_listeners().await {
        let linger_end = Instant::now() + run.plan().linger;
        let _ = timeout_at(linger_end, core.connections.drained()).await;
    }
    core.requests.close();
    core.requests.drained().await;
    core.requests_done.set();
    core.connections.drained().await;
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

/// One shutdown under way: its clock, its plan, and the means to write its report.
struct Run {
    core: &'static Core,
    executor: Executor,
    log: Log,
    #[cfg(feature = "files")]
    report_files: Option<crate::history::ReportFiles>,
    began: Instant,
    /// Counts at the beginning, to report what changed since.
    started_before: u64,
    accepted_before: u64,
    gone_before: u64,
    step: std::sync::atomic::AtomicUsize,
}

impl Run {
    fn begin(driver: &Driver, began: Instant, reason: Reason) -> Self {
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
        let requests = core.requests.count();
        let connections = core.connections.count();
        report.requests.in_flight_at_start = requests.alive;
        report.connections.open_at_start = connections.alive;
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
            accepted_before: connections.started,
            gone_before: core.requests.client_gone(),
            step: std::sync::atomic::AtomicUsize::new(0),
        }
    }

    fn note_signal(&self, signal: SignalReceived, at: Instant) {
        let at_ms = ms(at.saturating_duration_since(self.began));
        self.draft(|draft| draft.report.signals.push(SignalReport { signal: signal.clone(), at_ms }));
        self.log.line(move || {
            let SignalReceived { signal, pid, uid, .. } = signal;
            tracing::info!(target: "shutdown", signal, pid, uid, "stop signal received");
        });
    }

    fn hurry(&self, urgency: Urgency) {
        let raised = self.core.urgency.send_if_modified(|now| {
            let higher = urgency > *now;
            if higher {
                *now = urgency;
            }
            higher
        });
        if raised {
            self.draft(|draft| draft.report.urgency = urgency);
            self.log.line(move || {
                tracing::warn!(target: "shutdown", %urgency, "hurrying: waits are skipped, reserves kept");
            });
        }
    }

    fn announce(&self, reason: Reason) {
        let (requests, connections) = self.draft(|draft| {
            (draft.report.requests.in_flight_at_start, draft.report.connections.open_at_start)
        });
        let total_ms = ms(self.core.config.total);
        self.log.line(move || {
            tracing::info!(target: "shutdown", %reason, total_ms, requests, connections, "initiating graceful shutdown");
        });
    }

    fn now(&self) -> Duration {
        Instant::now().saturating_duration_since(self.began)
    }

    fn draft<T>(&self, change: impl FnOnce(&mut Draft) -> T) -> T {
        change(self.core.draft.lock().as_mut().expect("written by `begin`"))
    }

    /// The plan with everything it has to do by now.
    fn plan(&self) -> Plan {
        crate::ShutdownCoordinator { core: self.core }.plan()
    }

    fn enter(&self, phase: Phase) {
        let now = ms(self.now());
        self.draft(|draft| {
            if let Some(last) = draft.report.phases.last_mut() {
                last.end_ms = now;
            }
            draft.report.phases.push(PhaseReport { phase, start_ms: now, end_ms: now });
        });
        self.core.enter(phase);
        self.log
            .line(move || tracing::info!(target: "shutdown", phase = phase.as_str(), at_ms = now, "phase"));
    }

    /// Waits for `work` until the step's deadline, which comes nearer when the urgency rises. `work` is polled
    /// at least once, however little time there is.
    async fn within<T>(&self, step: Step, work: impl Future<Output = T>) -> Option<T> {
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

    fn seal_stages(&self) {
        self.core.stages.lock().sealed = true;
    }

    /// Waits until every listener has emptied its queue and closed, then refuses connections. Whether any
    /// is open.
    async fn close_listeners(&self) -> bool {
        let core = self.core;
        core.listeners.close();
        if timeout_at(Instant::now() + LISTENER_CLOSE, core.listeners.wait()).await.is_err() {
            let listeners = core.listeners.len();
            self.log.line(move || {
                tracing::warn!(target: "shutdown", listeners, "a listener did not close in time");
            });
        }
        let connections = core.connections.close();
        self.log.line(move || {
            tracing::info!(target: "shutdown", connections, "stopped accepting new connections");
        });
        connections > 0
    }

    /// Cuts what is still in flight at the deadline, names it, and lets it fall.
    async fn cut(&self) {
        let core = self.core;
        core.listeners.close();
        core.connections.close();
        core.requests.close();
        let latest = self.began + self.plan().latest(Step::Drain);
        if core.requests.alive() == 0 && !core.requests_done.is_set() {
            // The linger was cut short. Idle connections are closed, not cut: there is nothing of theirs to lose.
            core.requests_done.set();
            let _ =
                timeout_at((Instant::now() + CUT_SETTLE / 2).min(latest), core.connections.drained()).await;
        }
        let now = Instant::now();
        let cut_requests: Vec<_> = core
            .named
            .list()
            .into_iter()
            .take(CUT_LISTED)
            .map(|request| CutRequest {
                age_ms: ms(now.saturating_duration_since(request.started)),
                route: request.route,
            })
            .collect();
        let (requests, connections) = (core.requests.alive(), core.connections.alive());
        let named = cut_requests.clone();
        self.log.line(move || {
            for CutRequest { route, age_ms } in named {
                tracing::warn!(target: "shutdown", route = &*route, age_ms, "request cut");
            }
            if requests + connections > 0 {
                tracing::warn!(target: "shutdown", requests, connections, "drain deadline: cutting what is left");
            }
        });
        self.draft(|draft| {
            draft.report.requests.cut = requests;
            draft.report.requests.client_gone = core.requests.client_gone() - self.gone_before;
            draft.report.requests.cut_requests = cut_requests;
            draft.report.connections.cut = connections;
        });
        core.requests_done.set();
        core.cut.set();
        let settled = async { tokio::join!(core.requests.drained(), core.connections.drained()) };
        let _ = timeout_at((now + CUT_SETTLE).min(latest), settled).await;
    }

    /// Writes down what became of the requests and connections.
    fn note_requests(&self) {
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
                core.connections.started().saturating_sub(self.accepted_before);
            draft.report.requests.clone()
        });
        let refused = core.requests.refused();
        self.log.line(move || {
            let RequestsReport { drained, cut, client_gone, .. } = requests;
            tracing::info!(target: "shutdown", drained, refused, cut, client_gone, "requests drained");
        });
    }

    /// Runs one stage: its hooks before, its tasks side by side, its hooks after, all within its deadline.
    /// However it ends, this returns in time for the next one.
    async fn stage(&self, stage: Stage) {
        let core = self.core;
        let units = self.take_units(stage);
        let background = stage == Stage::Background;
        // From here on no background task can be spawned, so an empty stage stays empty.
        let names = if background { core.tasks.close() } else { Vec::new() };
        if units.is_empty() && names.is_empty() {
            return;
        }
        let plan = self.plan();
        let start = self.now();
        let urgency = *core.urgency.borrow();
        let deadline = plan.deadline(Step::Stage(stage), start, urgency);
        let budget =
            plan.stages.iter().find(|planned| planned.stage == stage).map_or(Duration::ZERO, |p| p.budget);
        let given = deadline.saturating_sub(start);
        self.begin_stage(stage, &units, names, start, given, budget, &plan);
        if urgency == Urgency::Immediate && stage != Stage::Persist {
            self.draft(|draft| {
                let report = last_stage(draft, stage);
                report.tasks.iter_mut().for_each(|task| task.outcome = Outcome::Skipped);
            });
            self.end_stage(stage, start);
            return;
        }
        let token = CancellationToken::new();
        let context = StageContext { deadline: self.began + deadline, token: token.clone() };
        let mut work = StageRun { run: self, stage, start, context, units, running: Vec::new() };
        let tell = given.saturating_sub(TOKEN_GRACE.min(given / 10));
        let told = async {
            let mut urgencies = core.urgency.subscribe();
            let hurried = urgencies.wait_for(|now| *now > urgency);
            let _ = timeout_at(self.began + start + tell, hurried).await;
            token.cancel();
            std::future::pending::<()>().await;
        };
        let whole = async {
            tokio::select! { biased; () = work.all() => (), () = told => () }
        };
        if self.within(Step::Stage(stage), whole).await.is_none() {
            token.cancel();
            work.abort().await;
        }
        work.note();
        self.end_stage(stage, start);
    }

    fn take_units(&self, stage: Stage) -> Vec<Unit> {
        let mut stages = self.core.stages.lock();
        stages.departed |= stage == Stage::Departure;
        let (mine, rest) = std::mem::take(&mut stages.units).into_iter().partition(|(of, _)| *of == stage);
        stages.units = rest;
        mine.into_iter().map(|(_, unit): (Stage, Unit)| unit).collect()
    }

    #[expect(clippy::too_many_arguments, reason = "one call, each argument a line of the report")]
    fn begin_stage(
        &self,
        stage: Stage,
        units: &[Unit],
        background: Vec<std::borrow::Cow<'static, str>>,
        start: Duration,
        given: Duration,
        budget: Duration,
        plan: &Plan,
    ) {
        let names = units.iter().map(|unit| unit.name.clone()).chain(background);
        let tasks: Vec<_> = names
            .map(|name| TaskReport { name, outcome: Outcome::TimedOut, detail: None, elapsed_ms: ms(given) })
            .collect();
        let count = tasks.len();
        self.draft(|draft| {
            draft.current_stage = Some(stage);
            draft.report.stages.push(StageReport {
                stage: stage.name().into(),
                outcome: Outcome::TimedOut,
                start_ms: ms(start),
                end_ms: ms(start + given),
                budget_ms: ms(given),
                shrunk_from_ms: (given < budget).then(|| ms(budget)),
                tasks,
            });
        });
        if stage == Stage::Departure {
            self.log.line(move || {
                tracing::info!(target: "shutdown", stage = stage.name(), tasks = count, "{}", stage.doing());
            });
            return;
        }
        let step = self.step.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
        let ahead = plan.closing().skip_while(|planned| planned.stage != stage).skip(1);
        let of = step + ahead.filter(|planned| !planned.tasks.is_empty()).count();
        let (name, budget_ms) = (stage.name(), ms(given));
        self.log.line(move || {
            tracing::info!(target: "shutdown", stage = name, tasks = count, budget_ms, "Step {step}/{of}: {}", stage.doing());
        });
    }

    fn end_stage(&self, stage: Stage, start: Duration) {
        let end = self.now();
        let report = self.draft(|draft| {
            if draft.current_stage == Some(stage) {
                draft.current_stage = None;
            }
            let report = last_stage(draft, stage);
            report.end_ms = ms(end);
            report.outcome = report.tasks.iter().map(|task| task.outcome).fold(Outcome::Ok, Outcome::worse);
            report.clone()
        });
        let elapsed_ms = ms(end.saturating_sub(start));
        self.log.line(move || log_stage(&report, elapsed_ms));
    }

    fn finish(&self) -> Arc<ShutdownReport> {
        let report = Arc::new(self.core.draft_at(Instant::now()).expect("written by `begin`"));
        self.draft(|draft| draft.report = (*report).clone());
        let (exit_code, duration_ms) = (report.exit_code, report.duration_ms);
        self.log.line(move || {
            let seconds = duration_ms / 1000.0;
            tracing::info!(target: "shutdown", exit_code, duration_ms, "Graceful shutdown completed in {seconds:.2}s");
        });
        report
    }

    /// Writes the report's files, if there are any. A slow disk may take what is left of the total.
    #[cfg(feature = "files")]
    async fn write(&self, report: &Arc<ShutdownReport>) {
        let Some(files) = self.report_files.clone() else { return };
        let report = Arc::clone(report);
        let deadline = self.began + self.core.config.total - LEAVE;
        let context = StageContext { deadline, token: CancellationToken::new() };
        let task = crate::stage::boxed(move |_| async move { Ok(files.write(&report)?) });
        let mut written = self.executor.start("report".into(), task, context);
        let error = match timeout_at(deadline, written.ended()).await {
            Ok(finish) if finish.outcome == Outcome::Ok => return,
            Ok(finish) => finish.detail.clone(),
            Err(_) => Some("the disk took too long".to_owned()),
        };
        self.log.line(move || tracing::error!(target: "shutdown", error, "the report could not be written"));
    }

    #[cfg(not(feature = "files"))]
    async fn write(&self, _report: &Arc<ShutdownReport>) {}
}

fn log_stage(report: &StageReport, elapsed_ms: f64) {
    let well = |outcome| matches!(outcome, Outcome::Ok | Outcome::Skipped);
    let (stage, outcome) = (&*report.stage, report.outcome.as_str());
    if well(report.outcome) {
        tracing::info!(target: "shutdown", stage, outcome, elapsed_ms, "stage ended");
        return;
    }
    for task in report.tasks.iter().filter(|task| !well(task.outcome)) {
        tracing::warn!(
            target: "shutdown",
            stage,
            task = &*task.name,
            outcome = task.outcome.as_str(),
            error = task.detail.as_deref(),
            elapsed_ms = task.elapsed_ms,
            "stage task did not end well"
        );
    }
    tracing::warn!(target: "shutdown", stage, outcome, elapsed_ms, "stage ended");
}

fn last_stage(draft: &mut Draft, stage: Stage) -> &mut StageReport {
    let report = draft.report.stages.iter_mut().rev().find(|report| report.stage == stage.name());
    report.expect("written by `begin_stage`")
}

/// A stage under way.
struct StageRun<'a> {
    run: &'a Run,
    stage: Stage,
    start: Duration,
    context: StageContext,
    units: Vec<Unit>,
    running: Vec<Running>,
}

impl StageRun<'_> {
    /// Hooks before, tasks side by side, hooks after.
    async fn all(&mut self) {
        let mut after = Vec::new();
        let mut during = Vec::new();
        for unit in std::mem::take(&mut self.units) {
            match unit.when {
                When::Before => {
                    self.start(unit);
                    self.running.last_mut().expect("just started").ended().await;
                }
                When::During => during.push(unit),
                When::After => after.push(unit),
            }
        }
        let first = self.running.len();
        for unit in during {
            self.start(unit);
        }
        if self.stage == Stage::Background {
            self.run.core.tasks.ended().await;
        }
        for running in &mut self.running[first..] {
            running.ended().await;
        }
        for unit in after {
            self.start(unit);
            self.running.last_mut().expect("just started").ended().await;
        }
    }

    fn start(&mut self, unit: Unit) {
        let running = self.run.executor.start(unit.name, unit.task, self.context.clone());
        self.running.push(running);
    }

    /// Aborts what has not ended and gives it a moment to be dropped.
    async fn abort(&mut self) {
        let core = self.run.core;
        self.running.iter().for_each(Running::abort);
        let background = self.stage == Stage::Background;
        if background {
            core.tasks.abort();
        }
        let settled = async {
            for running in &mut self.running {
                running.ended().await;
            }
            if background {
                core.tasks.ended().await;
            }
        };
        let now = Instant::now();
        let latest = self.run.began + self.run.plan().latest(Step::Stage(self.stage));
        let until = (now + ABORT_SETTLE).min(latest.max(now + ABORT_SETTLE_SHORT));
        let _ = timeout_at(until, settled).await;
    }

    /// Writes how each task ended into the report.
    fn note(&mut self) {
        let start = self.run.began + self.start;
        let now = Instant::now();
        let mut ended: Vec<TaskReport> = self
            .running
            .iter_mut()
            .map(|running| {
                let (outcome, detail, at) = match running.finish() {
                    Some(finish) => (finish.outcome, finish.detail.clone(), finish.at),
                    None => {
                        (Outcome::TimedOut, Some("it blocks its thread and was left behind".to_owned()), now)
                    }
                };
                let elapsed_ms = ms(at.saturating_duration_since(start));
                TaskReport { name: running.name.clone(), outcome, detail, elapsed_ms }
            })
            .collect();
        if self.stage == Stage::Background {
            ended.extend(self.run.core.tasks.report(start, now));
        }
        self.run.draft(|draft| {
            let report = last_stage(draft, self.stage);
            for task in &mut report.tasks {
                match ended.iter().position(|end| end.name == task.name) {
                    Some(place) => *task = ended.remove(place),
                    // Its turn never came: a hook before it took the whole stage.
                    None => task.outcome = Outcome::Skipped,
                }
            }
        });
    }
}
