//! Everything a shutdown needs is given here, before it can be forgotten.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::config::ShutdownConfig;
use crate::coordinator::{Core, ShutdownCoordinator, Stages};
use crate::driver::Driver;
use crate::error::BoxError;
use crate::plan::{Plan, PlanError, Stage};
use crate::stage::{Executor, StageContext, StageFn, Unit, When, boxed};

/// The name under which the state's last save stands in the plan and the report.
#[cfg(all(unix, feature = "state"))]
const STATE: &str = "state";

/// Builds a [`ShutdownCoordinator`]. Everything has a default.
#[must_use = "nothing happens before `build` or `install`"]
pub struct Builder {
    pub(crate) program: Cow<'static, str>,
    pub(crate) config: ShutdownConfig,
    pub(crate) runtime: Option<Handle>,
    #[cfg(all(unix, feature = "signals"))]
    pub(crate) signals: Option<crate::signals::Signals>,
    #[cfg(feature = "files")]
    pub(crate) report_dir: Option<std::path::PathBuf>,
    #[cfg(all(unix, feature = "state"))]
    state: Option<crate::state::StateStore>,
    #[cfg(all(unix, feature = "companions"))]
    companions: Option<crate::plan::Need>,
    stages: Vec<(Stage, &'static str, Duration)>,
    units: Vec<(Stage, Unit)>,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("program", &self.program)
            .field("config", &self.config)
            .field("units", &self.units.iter().map(|(stage, unit)| (stage, &unit.name)).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            program: Cow::Borrowed("service"),
            config: ShutdownConfig::default(),
            runtime: None,
            #[cfg(all(unix, feature = "signals"))]
            signals: None,
            #[cfg(feature = "files")]
            report_dir: None,
            #[cfg(all(unix, feature = "state"))]
            state: None,
            #[cfg(all(unix, feature = "companions"))]
            companions: None,
            stages: Vec::new(),
            units: Vec::new(),
        }
    }

    /// The program's name in the report.
    pub fn program(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.program = name.into();
        self
    }

    /// The budgets. Default: [`ShutdownConfig::default`].
    pub fn config(mut self, config: ShutdownConfig) -> Self {
        self.config = config;
        self
    }

    /// The runtime that stage tasks and background tasks run on. Default: the one `install` is called in, else
    /// the coordinator's own.
    ///
    /// A current-thread runtime must be driven to the end, by awaiting
    /// [`finished`](ShutdownCoordinator::finished) in it: timers and sockets of the tasks stand still while nobody
    /// polls it.
    pub fn runtime(mut self, handle: Handle) -> Self {
        self.runtime = Some(handle);
        self
    }

    /// The signals claimed at the top of `main`. Default: `install` claims TERM and INT.
    #[cfg(all(unix, feature = "signals"))]
    pub fn signals(mut self, signals: crate::signals::Signals) -> Self {
        self.signals = Some(signals);
        self
    }

    /// Writes `last-shutdown.json` and a line of `history.jsonl` into this directory when the shutdown ends. It is
    /// made with mode 0700 if it is not there by then. Under [`build`](Self::build) the runtime that polls the driver
    /// waits for the disk.
    #[cfg(feature = "files")]
    pub fn report_dir(mut self, dir: impl Into<std::path::PathBuf>) -> Self {
        self.report_dir = Some(dir.into());
        self
    }

    /// Keeps this state: `install` opens and restores it before it returns, and blocks on the disk for that; it is saved
    /// at its interval, when a shutdown begins, and as the first thing in stage Persist, beside that stage's hooks and
    /// tasks: what they still put into it would be refused. Under [`build`](Self::build) the driver opens it when it is
    /// polled first, unless [`load_state`](ShutdownCoordinator::load_state) has, and the runtime that polls the driver
    /// waits for the disk.
    #[cfg(all(unix, feature = "state"))]
    pub fn state(mut self, store: crate::state::StateStore) -> Self {
        self.state = Some(store);
        self
    }

    /// Ends these processes in stage Companions, a task for each: groups one after another, those of a group at once. Unless
    /// [`ShutdownConfig::companion`] is given, the stage's budget is what their ladders need, at least
    /// [`COMPANION_BUDGET`](crate::COMPANION_BUDGET).
    ///
    /// Once: a second set of companions would know nothing of the first one's groups. The runtime that stage tasks run on must have
    /// I/O enabled, as those of `#[tokio::main]` have.
    ///
    /// # Panics
    ///
    /// If there are companions already.
    #[cfg(all(unix, feature = "companions"))]
    pub fn companions(mut self, companions: &crate::companions::Companions) -> Self {
        assert!(self.companions.is_none(), "a service has one set of companions");
        self.companions = companions.need();
        let tasks = companions.stage_tasks();
        let units = tasks.into_iter().map(|(name, task)| Unit { name, when: When::During, task });
        self.units.extend(units.map(|unit| (Stage::Companions, unit)));
        self
    }

    /// Puts a stage of the program's own right after `after`, with its budget; tasks are added to
    /// [`Stage::Custom(name)`](Stage::Custom).
    pub fn stage(mut self, after: Stage, name: &'static str, budget: Duration) -> Self {
        self.stages.push((after, name, budget));
        self
    }

    /// Adds a task to a stage. Tasks of one stage run side by side.
    pub fn stage_task<F, Fut>(self, stage: Stage, name: impl Into<Cow<'static, str>>, task: F) -> Self
    where
        F: FnOnce(StageContext) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        self.unit(stage, name.into(), When::During, boxed(task))
    }

    /// Adds a hook that runs before the stage's tasks, inside its budget; hooks run one after another.
    pub fn before<F, Fut>(self, stage: Stage, name: impl Into<Cow<'static, str>>, hook: F) -> Self
    where
        F: FnOnce(StageContext) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        self.unit(stage, name.into(), When::Before, boxed(hook))
    }

    /// Adds a hook that runs after the stage's tasks, inside its budget, also when one failed or panicked. When one
    /// is still running at the stage's deadline there is no time left for the hook: it is reported as `skipped`.
    pub fn after<F, Fut>(self, stage: Stage, name: impl Into<Cow<'static, str>>, hook: F) -> Self
    where
        F: FnOnce(StageContext) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        self.unit(stage, name.into(), When::After, boxed(hook))
    }

    fn unit(mut self, stage: Stage, name: Cow<'static, str>, when: When, task: StageFn) -> Self {
        self.units.push((stage, Unit { name, when, task }));
        self
    }

    /// The plan as it would be built.
    ///
    /// # Errors
    ///
    /// The plan cannot hold.
    ///
    /// # Panics
    ///
    /// If a task's stage is a [`Stage::Custom`] that was not built in with [`stage`](Self::stage), or a stage of the
    /// program's own has a name twice or stands after one that is not there.
    pub fn plan(&self) -> Result<Plan, PlanError> {
        let mut plan = self.empty_plan();
        #[cfg(all(unix, feature = "state"))]
        if self.state.is_some() {
            plan.add_task(Stage::Persist, STATE.into());
        }
        for (stage, unit) in &self.units {
            assert!(
                plan.add_task(*stage, unit.name.clone()),
                "stage {stage} is not in the plan: add it with Builder::stage"
            );
        }
        plan.check()?;
        Ok(plan)
    }

    fn empty_plan(&self) -> Plan {
        let mut plan = Plan::new(&self.config);
        for (after, name, budget) in &self.stages {
            plan.insert(*after, name, *budget);
        }
        #[cfg(all(unix, feature = "companions"))]
        if let Some(need) = self.companions.clone() {
            plan.need_of_companions(need, self.config.companion);
        }
        plan
    }

    /// Makes a coordinator and its driver: no thread, no signal handler, no exit. Poll
    /// [`Driver::run`] to let it work; stage tasks run as tasks of the runtime that polls it.
    ///
    /// For tests, which can make thousands of them under paused time, and for programs that own the process
    /// themselves. The coordinator's state (a few KiB) is leaked.
    ///
    /// # Errors
    ///
    /// The plan cannot hold.
    ///
    /// # Panics
    ///
    /// As [`plan`](Self::plan).
    pub fn build(self) -> Result<(ShutdownCoordinator, Driver), PlanError> {
        self.build_with(Executor::Tasks)
    }

    pub(crate) fn build_with(self, executor: Executor) -> Result<(ShutdownCoordinator, Driver), PlanError> {
        let plan = self.empty_plan();
        plan.check()?;
        let mut stages = Stages { plan, units: Vec::new(), departed: false, sealed: false };
        #[cfg(all(unix, feature = "state"))]
        let state: Option<&'static _> = self.state.map(|store| &*Box::leak(Box::new(store)));
        #[cfg(all(unix, feature = "state"))]
        if let Some(store) = state {
            let task = boxed(move |_| async move { Ok(store.finish()?) });
            stages.add(Stage::Persist, Unit { name: STATE.into(), when: When::Beside, task })?;
        }
        for (stage, unit) in self.units {
            stages.add(stage, unit)?;
        }
        let (core, commands) = Core::new(
            self.program,
            self.config,
            stages,
            #[cfg(all(unix, feature = "state"))]
            state,
        );
        if let Some(runtime) = self.runtime {
            let _ = core.runtime.set(runtime);
        }
        let driver = Driver {
            core,
            commands,
            executor,
            log: crate::log::Log::Inline,
            #[cfg(feature = "files")]
            report_files: self.report_dir.map(crate::history::ReportFiles::new),
            on_begin: None,
        };
        Ok((ShutdownCoordinator { core }, driver))
    }
}
