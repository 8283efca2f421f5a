//! The handle everybody holds: it can look, count in and ask; it cannot move the phase.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::builder::Builder;
use crate::config::{LameDuckPolicy, ShutdownConfig};
use crate::connections::{ConnectionGuard, Connections};
use crate::error::{AddStageTaskError, BoxError, ShuttingDown};
use crate::inflight::{NamedRequestGuard, Registry, RequestGuard, Tracker};
use crate::latch::{Latch, Wait};
use crate::log::Log;
use crate::phase::Phase;
use crate::plan::{Plan, Stage};
use crate::reason::{Reason, SignalReceived, Urgency};
use crate::report::{
    CUT_LISTED, CutRequest, CutSession, Outcome, ShutdownReport, StageReport, TaskReport, ms,
};
use crate::sessions::{Session, Sessions};
use crate::snapshot::{self, InFlight, Requests, Snapshot};
use crate::stage::{StageContext, Unit, When, boxed};
use crate::tasks::{Policy, TaskOutput, Tasks};

/// What is said to the driver. All reasons share this channel; the first begins the shutdown.
#[derive(Debug)]
pub(crate) enum Command {
    /// Stop, for this reason; ignored when the shutdown has begun.
    Begin { reason: Reason, at: Instant },
    /// A stop signal, and whether it is the second one or later.
    #[cfg_attr(
        not(all(unix, feature = "signals")),
        expect(dead_code, reason = "only an installed coordinator hears signals")
    )]
    Signal { signal: SignalReceived, force: bool, at: Instant },
    /// Begin or hurry: the urgency only rises.
    Terminate { urgency: Urgency, at: Instant },
}

/// The state shared by the driver and every handle; leaked once.
pub(crate) struct Core {
    pub(crate) program: Cow<'static, str>,
    pub(crate) config: ShutdownConfig,
    /// The phase as a byte, for the request path; the driver writes it together with `phase_watch`.
    phase: AtomicU8,
    phase_watch: watch::Sender<Phase>,
    commands: mpsc::UnboundedSender<Command>,
    pub(crate) urgency: watch::Sender<Urgency>,
    pub(crate) requests: Tracker,
    pub(crate) connections: Connections,
    pub(crate) sessions: Sessions,
    pub(crate) named: Registry,
    pub(crate) leaving: Latch,
    /// When the lame duck began.
    left: OnceLock<Instant>,
    /// Answers and connections that asked whether it is their turn, under [`LameDuckPolicy::Gradual`].
    asked: AtomicU64,
    /// Requests refused by [`LameDuckPolicy::ReadOnly`].
    turned_away: AtomicU64,
    pub(crate) draining: Latch,
    pub(crate) requests_done: Latch,
    pub(crate) cut: Latch,
    pub(crate) listeners: TaskTracker,
    pub(crate) tasks: Tasks,
    pub(crate) stages: Mutex<Stages>,
    pub(crate) runtime: OnceLock<Handle>,
    pub(crate) own_runtime: OnceLock<Handle>,
    /// The driver's log, of an installed coordinator.
    pub(crate) log: OnceLock<Log>,
    pub(crate) signals: AtomicU32,
    /// The report as far as it has been written; see `report` for why it is true at every moment.
    pub(crate) draft: Mutex<Option<Draft>>,
    /// Wakes who shows the draft's current stage.
    pub(crate) stage_changed: watch::Sender<()>,
    /// The report, once it is final.
    pub(crate) verdict: watch::Sender<Option<Arc<ShutdownReport>>>,
    /// Whether the process may leave.
    pub(crate) released: watch::Sender<bool>,
    pub(crate) answers: TaskTracker,
    #[cfg(all(unix, feature = "state"))]
    pub(crate) state: Option<&'static crate::state::StateStore>,
}

/// A report in the making.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) report: ShutdownReport,
    pub(crate) began: Instant,
    pub(crate) current_stage: Option<Stage>,
}

/// The stage tasks before they run.
pub(crate) struct Stages {
    pub(crate) plan: Plan,
    pub(crate) units: Vec<(Stage, Unit)>,
    /// Departure has begun: a task added to it would never run.
    pub(crate) departed: bool,
    pub(crate) sealed: bool,
}

impl Core {
    pub(crate) fn new(
        program: Cow<'static, str>,
        config: ShutdownConfig,
        stages: Stages,
        #[cfg(all(unix, feature = "state"))] state: Option<&'static crate::state::StateStore>,
    ) -> (&'static Self, mpsc::UnboundedReceiver<Command>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        let critical = commands.clone();
        let core = Self {
            program,
            config,
            phase: AtomicU8::new(Phase::Running as u8),
            phase_watch: watch::Sender::new(Phase::Running),
            commands,
            urgency: watch::Sender::new(Urgency::Graceful),
            requests: Tracker::new(),
            connections: Connections::new(),
            sessions: Sessions::new(),
            named: Registry::new(),
            leaving: Latch::new(),
            left: OnceLock::new(),
            asked: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
            draining: Latch::new(),
            requests_done: Latch::new(),
            cut: Latch::new(),
            listeners: TaskTracker::new(),
            tasks: Tasks::new(Box::new(move |task, error| {
                let reason = Reason::CriticalTask { task: task.to_owned(), error };
                // Without a driver there is nobody left to stop.
                let _ = critical.send(Command::Begin { reason, at: Instant::now() });
            })),
            stages: Mutex::new(stages),
            runtime: OnceLock::new(),
            own_runtime: OnceLock::new(),
            log: OnceLock::new(),
            signals: AtomicU32::new(0),
            draft: Mutex::new(None),
            stage_changed: watch::Sender::new(()),
            verdict: watch::Sender::new(None),
            released: watch::Sender::new(false),
            answers: TaskTracker::new(),
            #[cfg(all(unix, feature = "state"))]
            state,
        };
        (Box::leak(Box::new(core)), receiver)
    }

    /// The next of numbers in 0..1 that are spread evenly, however many are taken: multiples of the golden ratio.
    fn next_share(&self) -> f64 {
        (self.asked.fetch_add(1, Ordering::Relaxed) as f64 * 0.618_033_988_749_894_9).fract()
    }

    /// Moves the phase forward. Only the driver calls it.
    pub(crate) fn enter(&self, phase: Phase) {
        // Release: pairs with the Acquire in `phase`, so who sees the phase sees what led to it.
        self.phase.store(phase as u8, Ordering::Release);
        match phase {
            Phase::LameDuck => {
                let _ = self.left.set(Instant::now());
                self.leaving.set();
            }
            Phase::Draining => self.draining.set(),
            _ => {}
        }
        self.phase_watch.send_replace(phase);
    }

    #[inline]
    pub(crate) fn phase(&self) -> Phase {
        // Acquire: pairs with the Release in `enter`.
        Phase::from_u8(self.phase.load(Ordering::Acquire))
    }

    pub(crate) fn command(&self, command: Command) {
        // The receiver is gone only when the driver has been dropped or has ended: nothing is left to stop.
        let _ = self.commands.send(command);
    }

    /// The report as it stands at `now`, if a shutdown has begun.
    pub(crate) fn draft_at(&self, now: Instant) -> Option<ShutdownReport> {
        let Draft { mut report, began, .. } = self.draft.lock().clone()?;
        report.duration_ms = ms(now.saturating_duration_since(began));
        if let Some(last) = report.phases.last_mut() {
            last.end_ms = report.duration_ms;
        }
        report.requests.refused = self.refused();
        if self.phase() < Phase::Closing && !self.cut.is_set() {
            // The drain has not ended: should the process leave now, it takes these with it.
            self.count_as_cut(&mut report, now);
        }
        report.sessions.told = self.sessions.told();
        if !self.sessions.cut.is_set() {
            self.count_sessions_as_cut(&mut report, now);
            report.connections.cut += self.connections.left_behind();
        }
        let not_begun = self.not_begun(&report);
        report.stages.extend(not_begun);
        report.exit_code = report.exit_code();
        Some(report)
    }

    /// Writes what is in flight at `now` into the report as cut.
    pub(crate) fn count_as_cut(&self, report: &mut ShutdownReport, now: Instant) {
        report.requests.cut = self.requests.alive();
        report.connections.cut = self.connections.awaited.alive();
        let cut = self.named.list().into_iter().take(CUT_LISTED).map(|request| CutRequest {
            age_ms: ms(now.saturating_duration_since(request.started)),
            route: request.route,
        });
        report.requests.cut_requests = cut.collect();
    }

    /// Writes the sessions that are left at `now` into the report as cut.
    pub(crate) fn count_sessions_as_cut(&self, report: &mut ShutdownReport, now: Instant) {
        report.sessions.cut = self.sessions.tracker.alive();
        let cut = self.sessions.names.list().into_iter().take(CUT_LISTED).map(|session| CutSession {
            age_ms: ms(now.saturating_duration_since(session.started)),
            name: session.route,
        });
        report.sessions.cut_sessions = cut.collect();
    }

    /// Requests refused because they came too late, or by the lame duck's policy.
    pub(crate) fn refused(&self) -> u64 {
        self.requests.refused() + self.turned_away.load(Ordering::Relaxed)
    }

    /// The name under which the sessions stand in the plan and the report.
    pub(crate) const SESSIONS: &'static str = "sessions";

    /// The plan as it stands, with the tasks and sessions there are.
    pub(crate) fn plan(&self) -> Plan {
        let mut plan = self.stages.lock().plan.clone();
        for name in self.tasks.names() {
            plan.add_task(Stage::Background, name);
        }
        if self.sessions.tracker.alive() + self.connections.kept.alive() + self.sessions.told() > 0 {
            plan.add_task(Stage::WebSockets, Self::SESSIONS.into());
        }
        plan
    }

    /// The stages that have something to do and no line in `report` yet: skipped, unless their turn still comes.
    fn not_begun(&self, report: &ShutdownReport) -> Vec<StageReport> {
        let plan = self.plan();
        let begun = |stage: Stage| report.stages.iter().any(|begun| begun.stage == stage.name());
        let ahead =
            plan.stages.into_iter().filter(|planned| !planned.tasks.is_empty() && !begun(planned.stage));
        ahead
            .map(|planned| StageReport {
                stage: planned.stage.name().into(),
                outcome: Outcome::Skipped,
                start_ms: report.duration_ms,
                end_ms: report.duration_ms,
                budget_ms: 0.0,
                shrunk_from_ms: None,
                tasks: planned
                    .tasks
                    .into_iter()
                    .map(|name| TaskReport::new(name, Outcome::Skipped, 0.0))
                    .collect(),
            })
            .collect()
    }
}

/// The handle of the shutdown: `Copy`, 8 bytes, valid for the life of the process.
///
/// It looks ([`phase`](Self::phase), [`snapshot`](Self::snapshot)), counts in ([`request_start`](Self::request_start),
/// [`spawn`](Self::spawn)) and asks ([`initiate_shutdown`](Self::initiate_shutdown)); only the
/// [`Driver`](crate::Driver) moves the phase.
#[derive(Clone, Copy)]
pub struct ShutdownCoordinator {
    pub(crate) core: &'static Core,
}

impl fmt::Debug for ShutdownCoordinator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShutdownCoordinator").field("phase", &self.phase()).finish_non_exhaustive()
    }
}

/// Requests and connections.
impl ShutdownCoordinator {
    /// Starts to build a coordinator; everything has a default.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Counts a request in. One atomic addition; no lock, no allocation.
    ///
    /// # Errors
    ///
    /// [`ShuttingDown`] once new requests are refused: after the linger, or from Draining on where no listener is
    /// used. A refused request is never counted as in flight.
    #[inline]
    pub fn request_start(&self) -> Result<RequestGuard, ShuttingDown> {
        self.core.requests.start().map(RequestGuard)
    }

    /// Counts a request in under a name and with its start time, for `/status` and the report.
    ///
    /// Costs a short lock more than [`request_start`](Self::request_start). Keep secrets out of the name.
    ///
    /// # Errors
    ///
    /// As [`request_start`](Self::request_start).
    pub fn request_start_named(
        &self,
        route: impl Into<Cow<'static, str>>,
    ) -> Result<NamedRequestGuard, ShuttingDown> {
        let guard = self.core.requests.start()?;
        Ok(self.core.named.enter(guard, route.into(), Instant::now()))
    }

    /// Whether every [`request_start`](Self::request_start) from now on is refused.
    #[inline]
    pub fn refuses_requests(&self) -> bool {
        self.core.requests.refuses()
    }

    /// Requests in flight; a moment's value.
    pub fn active_request_count(&self) -> u64 {
        self.core.requests.alive()
    }

    /// Counts a connection in.
    ///
    /// # Errors
    ///
    /// [`ShuttingDown`] once the listeners are closed.
    pub fn connection_start(&self) -> Result<ConnectionGuard, ShuttingDown> {
        ConnectionGuard::start(self.core)
    }

    /// Connections open; a moment's value.
    pub fn open_connection_count(&self) -> u64 {
        self.core.connections.alive()
    }

    /// Registers a WebSocket or another long stream under a name; see [`Session`].
    ///
    /// # Errors
    ///
    /// [`ShuttingDown`] once stage WebSockets has begun.
    pub fn session_start(&self, name: impl Into<Cow<'static, str>>) -> Result<Session, ShuttingDown> {
        Session::start(self.core, name.into())
    }

    /// Sessions open; a moment's value.
    pub fn active_session_count(&self) -> u64 {
        self.core.sessions.tracker.alive()
    }

    /// Registers a listener: until the guard is dropped, the drain takes it that connections are still accepted.
    ///
    /// An accept loop holds it until it has seen [`draining`](Self::draining), has emptied its accept queue and
    /// has closed its socket. Loops of [`net`](crate::net) do so.
    pub fn listener_start(&self) -> ListenerGuard {
        ListenerGuard { _token: self.core.listeners.token() }
    }
}

/// Phases and events.
impl ShutdownCoordinator {
    /// Where the service stands. One atomic load.
    #[inline]
    pub fn phase(&self) -> Phase {
        self.core.phase()
    }

    /// Whether a reason to stop has been taken up: every phase but Running.
    #[inline]
    pub fn is_shutting_down(&self) -> bool {
        self.phase() != Phase::Running
    }

    /// Whether the answer at hand should ask its client to leave (`Connection: close`): from the lame duck on, or, under
    /// [`LameDuckPolicy::Gradual`], for a share of the answers that grows over the lame duck. Ask once an answer: each
    /// question takes its share. One atomic load while the service runs.
    #[inline]
    pub fn asks_to_leave(&self) -> bool {
        self.is_shutting_down() && self.asks_now(Instant::now())
    }

    #[cold]
    fn asks_now(&self, now: Instant) -> bool {
        let core = self.core;
        if core.config.lame_duck_policy != LameDuckPolicy::Gradual || self.phase() != Phase::LameDuck {
            return true;
        }
        let Some(left) = core.left.get() else { return false };
        let share = now.saturating_duration_since(*left).as_secs_f64() / core.config.lame_duck.as_secs_f64();
        core.next_share() < share
    }

    /// Whether the lame duck's policy refuses a request: one that may change something (not `safe`, RFC 9110
    /// §9.2.1) under [`LameDuckPolicy::ReadOnly`]. Then it is counted as refused: ask once a request.
    #[inline]
    pub fn turns_away(&self, safe: bool) -> bool {
        let refused =
            !safe && self.core.config.lame_duck_policy == LameDuckPolicy::ReadOnly && self.is_shutting_down();
        if refused {
            self.core.turned_away.fetch_add(1, Ordering::Relaxed);
        }
        refused
    }

    /// Watches the phase. A subscriber that comes late sees the phase as it is.
    pub fn subscribe(&self) -> watch::Receiver<Phase> {
        self.core.phase_watch.subscribe()
    }

    /// Waits until the phase is `phase` or later.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn until(&self, phase: Phase) {
        let mut phases = self.subscribe();
        // The sender is leaked with the core, so this only ends by the condition.
        let _ = phases.wait_for(|now| *now >= phase).await;
    }

    /// Resolves when the lame duck begins: clients are asked to leave. For one wait per connection.
    pub fn leaving(&self) -> Wait<'static> {
        self.core.leaving.wait()
    }

    /// Resolves when a connection is to be told to leave: when the lame duck begins, or, under
    /// [`LameDuckPolicy::Gradual`], at this caller's turn in it.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe; the next call takes a turn of its own.
    pub async fn asked_to_leave(&self) {
        self.leaving().await;
        let config = &self.core.config;
        if config.lame_duck_policy == LameDuckPolicy::Gradual {
            let turn = config.lame_duck.mul_f64(self.core.next_share());
            let _ = tokio::time::timeout(turn, self.draining()).await;
        }
    }

    /// Resolves when Draining begins: listeners empty their queue and close.
    pub fn draining(&self) -> Wait<'static> {
        self.core.draining.wait()
    }

    /// Resolves when new requests are refused and the last admitted one has finished: the moment to close idle
    /// connections. Until then an idle connection that sends a request gets an answer, be it 503.
    pub fn requests_done(&self) -> Wait<'static> {
        self.core.requests_done.wait()
    }

    /// Resolves when the drain's deadline has passed: what is still in flight is cut, and so is every connection that
    /// carries no session. For a connection take [`ConnectionHandle::cut`](crate::ConnectionHandle::cut).
    pub fn cut(&self) -> Wait<'static> {
        self.core.cut.wait()
    }

    /// Asks for a shutdown. The first reason wins, later ones are only logged. Returns at once.
    pub fn initiate_shutdown(&self, reason: Reason) {
        self.core.command(Command::Begin { reason, at: Instant::now() });
    }

    /// Asks for a shutdown of this urgency, or raises that of a running one. Returns at once.
    pub fn terminate(&self, urgency: Urgency) {
        self.core.command(Command::Terminate { urgency, at: Instant::now() });
    }

    /// Waits until everything has ended and returns the report; every caller gets the same one.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn finished(&self) -> Arc<ShutdownReport> {
        let mut released = self.core.released.subscribe();
        let _ = released.wait_for(|released| *released).await;
        self.core
            .verdict
            .borrow()
            .clone()
            .expect("the driver writes the verdict before it releases the process")
    }

    /// [`finished`](Self::finished) for threads without a runtime: blocks the calling thread.
    ///
    /// # Panics
    ///
    /// Inside an asynchronous context; use [`finished`](Self::finished) there.
    pub fn wait(&self) -> Arc<ShutdownReport> {
        // `block_in_place`-free: a runtime without drivers only parks this thread.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime without drivers needs nothing from the system");
        runtime.block_on(self.finished())
    }

    /// Joins the shutdown's result for an answer to somebody: the report as soon as it is known, while the
    /// process waits for the [`Join`] to be dropped, for at most the report's reserve.
    pub fn join(&self) -> Join {
        Join { core: self.core, _token: Arc::new(self.core.answers.token()) }
    }
}

/// Tasks, stages and looking in.
impl ShutdownCoordinator {
    /// Spawns a background task that finishes its iteration: it hears `token` in stage Background and ends by
    /// itself. One that does not is aborted at the stage's deadline and named in the report.
    ///
    /// It runs on the current runtime, else on the one [`install`](crate::Builder) found.
    ///
    /// # Errors
    ///
    /// [`ShuttingDown`] once stage Background has begun.
    ///
    /// # Panics
    ///
    /// If there is no runtime at all.
    pub fn spawn<F, Fut>(&self, name: impl Into<Cow<'static, str>>, task: F) -> Result<(), ShuttingDown>
    where
        F: FnOnce(CancellationToken) -> Fut,
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        self.core.tasks.spawn(&self.task_runtime(), name.into(), Policy::FinishIteration, task)
    }

    /// Spawns a background task that may be dropped at any `.await` once it is told.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn).
    ///
    /// # Panics
    ///
    /// As [`spawn`](Self::spawn).
    pub fn spawn_cancellable<Fut>(
        &self,
        name: impl Into<Cow<'static, str>>,
        task: Fut,
    ) -> Result<(), ShuttingDown>
    where
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        self.core.tasks.spawn(&self.task_runtime(), name.into(), Policy::Cancel, |_| task)
    }

    /// As [`spawn`](Self::spawn), for a task the service cannot live without: if it fails or panics, that is a
    /// reason to stop, and the exit code is not 0. Ending well is not.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn).
    ///
    /// # Panics
    ///
    /// As [`spawn`](Self::spawn).
    pub fn spawn_critical<F, Fut>(
        &self,
        name: impl Into<Cow<'static, str>>,
        task: F,
    ) -> Result<(), ShuttingDown>
    where
        F: FnOnce(CancellationToken) -> Fut,
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        self.core.tasks.spawn(&self.task_runtime(), name.into(), Policy::Critical, task)
    }

    fn task_runtime(&self) -> Handle {
        Handle::try_current().ok().or_else(|| self.core.runtime.get().cloned()).expect(
            "a background task needs a tokio runtime: spawn it inside one, or install the coordinator",
        )
    }

    /// Adds a task to a stage of the running coordinator.
    ///
    /// # Errors
    ///
    /// Draining has begun (for [`Stage::Departure`]: the lame duck), or the stage's reserve no longer fits the total.
    ///
    /// # Panics
    ///
    /// If `stage` is a [`Stage::Custom`] that was not built in.
    pub fn add_stage_task<F, Fut>(
        &self,
        stage: Stage,
        name: impl Into<Cow<'static, str>>,
        task: F,
    ) -> Result<(), AddStageTaskError>
    where
        F: FnOnce(StageContext) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        let mut stages = self.core.stages.lock();
        if stages.sealed || (stages.departed && stage == Stage::Departure) {
            return Err(AddStageTaskError::ShuttingDown(ShuttingDown));
        }
        let unit = Unit { name: name.into(), when: When::During, task: boxed(task) };
        stages.add(stage, unit).map_err(AddStageTaskError::Plan)
    }

    /// One moment's numbers.
    pub fn snapshot(&self) -> Snapshot {
        let core = self.core;
        let now = Instant::now();
        let draft = core.draft.lock().clone();
        let elapsed = draft.as_ref().map(|draft| now.saturating_duration_since(draft.began));
        Snapshot {
            program: core.program.clone(),
            pid: std::process::id(),
            phase: core.phase(),
            reason: draft.as_ref().map(|draft| draft.report.reason.clone()),
            urgency: *core.urgency.borrow(),
            signals: core.signals.load(Ordering::Relaxed),
            shutting_down_for_ms: elapsed.map(ms),
            left_ms: elapsed.map(|elapsed| ms(core.config.total.saturating_sub(elapsed))),
            // Before the sessions: a request that becomes one is a session first, so it is seen as either.
            requests: Requests {
                active: core.requests.alive(),
                started: core.requests.started(),
                refused: core.refused(),
                refusing: core.requests.refuses(),
                client_gone: core.requests.client_gone(),
            },
            connections: snapshot::Connections {
                open: core.connections.alive(),
                accepted: core.connections.accepted(),
            },
            sessions: snapshot::Sessions {
                open: core.sessions.tracker.alive(),
                opened: core.sessions.tracker.started(),
                told: core.sessions.told(),
            },
            oldest_in_flight: core.named.oldest().map(|request| InFlight {
                age_ms: ms(now.saturating_duration_since(request.started)),
                route: request.route,
            }),
            background_tasks: core.tasks.names(),
            current_stage: draft
                .as_ref()
                .and_then(|draft| draft.current_stage)
                .map(|stage| Cow::Borrowed(stage.name())),
            stages: draft.map(|draft| draft.report.stages).unwrap_or_default(),
            #[cfg(all(unix, feature = "state"))]
            state: core.state.map(crate::state::StateStore::status),
            #[cfg(not(all(unix, feature = "state")))]
            state: None,
            plan: self.plan(),
        }
    }

    /// Writes a log line behind the coordinator's own, so that all are in order: for what a background task says of its
    /// end, say. Installed, a thread of its own writes them.
    pub fn log(&self, line: impl FnOnce() + Send + 'static) {
        self.core.log.get().unwrap_or(&Log::Inline).line(line);
    }

    /// The plan as it stands, with the tasks and sessions it has so far.
    pub fn plan(&self) -> Plan {
        self.core.plan()
    }

    /// The configuration.
    pub fn config(&self) -> &'static ShutdownConfig {
        &self.core.config
    }

    /// The coordinator's own runtime, of an installed one: it runs until the process ends and does not belong to
    /// the service, so it is the place for an admin listener that outlives the traffic.
    pub fn own_runtime(&self) -> Option<Handle> {
        self.core.own_runtime.get().cloned()
    }

    /// How long a refused client should wait before it tries again: one second, time to be sent elsewhere.
    pub const RETRY_AFTER: Duration = Duration::from_secs(1);
}

/// The state that is kept over restarts.
#[cfg(all(unix, feature = "state"))]
impl ShutdownCoordinator {
    /// Changes sections of the state in memory; the next save writes them. `change` must not use the state otherwise.
    ///
    /// # Errors
    ///
    /// No state is kept, its place cannot be used, or stage Persist is saving it: what comes then would be lost.
    pub fn update_state<T>(
        &self,
        change: impl FnOnce(&mut crate::state::Sections) -> T,
    ) -> Result<T, crate::state::StateError> {
        self.state_store()?.update(change)
    }

    /// What the previous run left; `None` if there was nothing that could be used, of which
    /// [`state_store`](Self::state_store) and its [`loaded`](crate::state::StateStore::loaded) know more. `install` has read it already; under
    /// [`build`](Builder::build) the first call does, and blocks on the disk.
    ///
    /// # Errors
    ///
    /// No state is kept, or its place cannot be used.
    pub fn load_state(&self) -> Result<Option<&'static crate::state::Loaded>, crate::state::StateError> {
        let loaded = self.state_store()?.open()?;
        Ok((loaded.found != crate::state::Found::Nothing).then_some(loaded))
    }

    /// Saves the state now. Blocks the calling thread on the disk.
    ///
    /// # Errors
    ///
    /// As [`StateStore::save`](crate::state::StateStore::save), or no state is kept.
    pub fn save_state(&self) -> Result<(), crate::state::StateError> {
        self.state_store()?.save()
    }

    /// The state that is kept.
    ///
    /// # Errors
    ///
    /// [`NotConfigured`](crate::state::StateError::NotConfigured): none is.
    pub fn state_store(&self) -> Result<&'static crate::state::StateStore, crate::state::StateError> {
        self.core.state.ok_or(crate::state::StateError::NotConfigured)
    }
}

impl Stages {
    /// Adds a unit and checks the plan; leaves everything as it was when the plan does not hold.
    pub(crate) fn add(&mut self, stage: Stage, unit: Unit) -> Result<(), crate::plan::PlanError> {
        let mut plan = self.plan.clone();
        let name = match unit.when {
            When::Before => Cow::Owned(format!("before {}", unit.name)),
            When::Beside | When::During => unit.name.clone(),
            When::After => Cow::Owned(format!("after {}", unit.name)),
        };
        assert!(
            plan.add_task(stage, name.clone()),
            "stage {stage} is not in the plan: build it in with Builder::stage"
        );
        plan.check()?;
        self.plan = plan;
        self.units.push((stage, Unit { name, ..unit }));
        Ok(())
    }
}

/// A listener that still accepts; see [`ShutdownCoordinator::listener_start`].
#[derive(Debug)]
#[must_use = "the listener counts as closed when its guard is dropped"]
pub struct ListenerGuard {
    _token: TaskTrackerToken,
}

/// Somebody who will be told the report before the process leaves; see [`ShutdownCoordinator::join`].
#[derive(Clone)]
#[must_use = "the process stops waiting for the answer when this is dropped"]
pub struct Join {
    core: &'static Core,
    _token: Arc<TaskTrackerToken>,
}

impl fmt::Debug for Join {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Join")
    }
}

impl Join {
    /// Waits for the report. The process does not leave before this `Join` and its clones are dropped, or the
    /// report's reserve has passed.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn report(&self) -> Arc<ShutdownReport> {
        let mut verdict = self.core.verdict.subscribe();
        match verdict.wait_for(Option::is_some).await {
            Ok(report) => Arc::clone(report.as_ref().expect("waited for")),
            Err(_) => unreachable!("the sender is leaked with the core"),
        }
    }
}
