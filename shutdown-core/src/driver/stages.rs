//! Running one stage: its hooks before, its tasks side by side, its hooks after, all within its deadline.

use std::borrow::Cow;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::run::Run;
use crate::coordinator::{Core, Draft};
use crate::plan::{Plan, Stage, Step};
use crate::reason::Urgency;
use crate::report::{Outcome, StageReport, TaskReport, ms};
use crate::stage::{Running, StageContext, TOKEN_GRACE, Unit, When};

/// How long an aborted task has to be dropped, when there is time.
const ABORT_SETTLE: Duration = Duration::from_millis(20);
/// The same when later stages have no more than their reserves. Only a task that blocks its thread takes it whole.
const ABORT_SETTLE_SHORT: Duration = Duration::from_millis(5);

impl Run {
    /// Runs one stage: its hooks before, its tasks side by side, its hooks after, all within its deadline.
    /// However it ends, this returns in time for the next one.
    pub(super) async fn stage(&self, stage: Stage) {
        let core = self.core;
        let units = self.take_units(stage);
        // From here on no background task and no session can begin, so an empty stage stays empty.
        let names = match stage {
            Stage::Background => core.tasks.close(),
            Stage::WebSockets => {
                let open = core.sessions.tracker.close() + core.connections.kept.close();
                // Sessions that were told and have ended already are this stage's work as well; when there is no time for
                // it, they are nobody's.
                let immediate = *core.urgency.borrow() == Urgency::Immediate;
                let told = if immediate { 0 } else { core.sessions.told() };
                if open + told > 0 { vec![Core::SESSIONS.into()] } else { Vec::new() }
            }
            _ => Vec::new(),
        };
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
        if stage == Stage::Background {
            core.tasks.tell();
        }
        if urgency == Urgency::Immediate && stage != Stage::Persist {
            if stage == Stage::WebSockets {
                self.cut_sessions();
            }
            self.draft(|draft| {
                let report = last_stage(draft, stage);
                report.tasks.iter_mut().for_each(|task| task.outcome = Outcome::Skipped);
            });
            self.end_stage(stage, start);
            return;
        }
        let token = CancellationToken::new();
        let context = StageContext::with_log(self.began + deadline, token.clone(), self.log.clone());
        let mut work = StageRun { run: self, stage, start, context, units, running: Vec::new(), cut: (0, 0) };
        let tell = given.saturating_sub(TOKEN_GRACE.min(given / 10));
        let half = self.began + start + given / 2;
        let hurry_sessions = async {
            tokio::time::sleep_until(half).await;
            core.sessions.hurried.set();
            std::future::pending::<()>().await;
        };
        let told = async {
            let mut urgencies = core.urgency.subscribe();
            let hurried = urgencies.wait_for(|now| *now > urgency);
            let _ = timeout_at(self.began + start + tell, hurried).await;
            token.cancel();
            std::future::pending::<()>().await;
        };
        let whole = async {
            tokio::select! {
                biased;
                () = work.all() => (),
                () = told => (),
                () = hurry_sessions, if stage == Stage::WebSockets => (),
            }
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
        background: Vec<Cow<'static, str>>,
        start: Duration,
        given: Duration,
        budget: Duration,
        plan: &Plan,
    ) {
        let names: Vec<_> = units.iter().map(|unit| unit.name.clone()).chain(background).collect();
        let tasks: Vec<_> =
            names.iter().cloned().map(|name| TaskReport::new(name, Outcome::TimedOut, ms(given))).collect();
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
        self.core.stage_changed.send_replace(());
        if stage == Stage::Departure {
            self.log.line(move || {
                tracing::info!(target: "shutdown", stage = stage.name(), tasks = count, "{}", stage.doing(&names));
            });
            return;
        }
        let step = self.step.fetch_add(1, Ordering::Relaxed) + 1;
        let ahead = plan.closing().skip_while(|planned| planned.stage != stage).skip(1);
        let of = step + ahead.filter(|planned| !planned.tasks.is_empty()).count();
        let (name, budget_ms) = (stage.name(), ms(given));
        let sessions = self.core.sessions.tracker.alive();
        self.log.line(move || {
            let doing = stage.doing(&names);
            tracing::info!(target: "shutdown", stage = name, tasks = count, budget_ms, "Step {step}/{of}: {doing}");
            if stage == Stage::WebSockets {
                tracing::info!(target: "shutdown", "Closing {sessions} WebSocket connections");
            }
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
        self.core.stage_changed.send_replace(());
        let elapsed_ms = ms(end.saturating_sub(start));
        self.log.line(move || log_stage(&report, elapsed_ms));
    }
}

fn log_stage(report: &StageReport, elapsed_ms: f64) {
    let well = |outcome| matches!(outcome, Outcome::Ok | Outcome::Skipped);
    let (stage, outcome) = (&*report.stage, report.outcome.as_str());
    if well(report.outcome) {
        let what = match stage {
            _ if report.outcome == Outcome::Skipped => "stage ended",
            "background" => "All background tasks completed within timeout",
            "websockets" => "All WebSocket connections closed",
            _ => "stage ended",
        };
        tracing::info!(target: "shutdown", stage, outcome, elapsed_ms, "{what}");
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

fn sessions_report((sessions, left_behind): (u64, u64), elapsed_ms: f64) -> TaskReport {
    let cut = sessions + left_behind > 0;
    let outcome = if cut { Outcome::TimedOut } else { Outcome::Ok };
    let detail =
        cut.then(|| format!("cut: {sessions} sessions, {left_behind} connections kept for ended ones"));
    TaskReport { detail, ..TaskReport::new(Core::SESSIONS.into(), outcome, elapsed_ms) }
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
    /// How many sessions and kept connections were cut.
    cut: (u64, u64),
}

impl StageRun<'_> {
    /// Hooks before, tasks side by side, hooks after.
    async fn all(&mut self) {
        let mut after = Vec::new();
        let mut during = Vec::new();
        for unit in std::mem::take(&mut self.units) {
            match unit.when {
                When::Beside => self.start(unit),
                When::Before => {
                    self.start(unit);
                    self.running.last_mut().expect("just started").ended().await;
                }
                When::During => during.push(unit),
                When::After => after.push(unit),
            }
        }
        for unit in during {
            self.start(unit);
        }
        let core = self.run.core;
        match self.stage {
            Stage::Background => core.tasks.ended().await,
            Stage::WebSockets => {
                core.sessions.tracker.drained().await;
                core.connections.kept.drained().await;
            }
            _ => {}
        }
        for running in &mut self.running {
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
        match self.stage {
            Stage::Background => core.tasks.abort(),
            Stage::WebSockets => self.cut = self.run.cut_sessions(),
            _ => {}
        }
        let settled = async {
            for running in &mut self.running {
                running.ended().await;
            }
            match self.stage {
                Stage::Background => core.tasks.ended().await,
                Stage::WebSockets => core.sessions.tracker.drained().await,
                _ => {}
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
                let report = TaskReport::new(running.name.clone(), outcome, elapsed_ms);
                TaskReport { detail, notes: running.notes(), ..report }
            })
            .collect();
        match self.stage {
            Stage::Background => ended.extend(self.run.core.tasks.report(start, now)),
            Stage::WebSockets => {
                ended.push(sessions_report(self.cut, ms(now.saturating_duration_since(start))))
            }
            _ => {}
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
