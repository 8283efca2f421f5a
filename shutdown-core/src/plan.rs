//! Which stages run in which order, and until when: all arithmetic, no clock.
//!
//! Times are offsets from the moment the shutdown began. Budgets are caps, reserves are promises:
//!
//! ```text
//! end               = total − report reserve
//! deadline of step i = min(now + budget i, end − Σ reserves of the non-empty steps after i)
//! ```
//!
//! (the drain's is [`CUT_SETTLE`] earlier), so a step that overruns eats the time of later ones down to their reserves and no further.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::config::{ShutdownConfig, display_duration};
use crate::reason::Urgency;

/// Kept for writing the report and flushing the answers of `/terminate`.
pub const REPORT_RESERVE: Duration = Duration::from_millis(250);
/// Promised to stage Persist, whatever came before it.
pub const PERSIST_RESERVE: Duration = Duration::from_millis(500);
/// Promised to every other non-empty step.
pub const STAGE_RESERVE: Duration = Duration::from_millis(100);
/// Kept at the end of the drain, inside its reserve, for what has been cut to let go of its guards.
pub const CUT_SETTLE: Duration = Duration::from_millis(50);
/// What stage Companions has when nothing else is said and its ladders need no more.
pub const COMPANION_BUDGET: Duration = Duration::from_secs(10);
/// The most that stage Persist may take when there is time.
pub const PERSIST_BUDGET: Duration = Duration::from_secs(5);

/// A stage of the shutdown.
///
/// [`Departure`](Self::Departure) starts with the lame duck and runs beside the drain; the others run one after
/// another, in this order, once no request is left. Tasks of one stage run side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// Telling the neighbours: mDNS goodbye, peer notices, registries.
    Departure,
    /// Background tasks hear their token and finish.
    Background,
    /// Long streams are closed.
    WebSockets,
    /// Caches are flushed and closed.
    Cache,
    /// Database pools are closed.
    Database,
    /// Companion processes are stopped.
    Companions,
    /// State is put away. Always promised [`PERSIST_RESERVE`].
    Persist,
    /// A stage of the program's own, placed by [`Builder::stage`](crate::Builder::stage).
    Custom(&'static str),
}

impl Stage {
    /// The given stages in order.
    pub const GIVEN: [Self; 7] = [
        Self::Departure,
        Self::Background,
        Self::WebSockets,
        Self::Cache,
        Self::Database,
        Self::Companions,
        Self::Persist,
    ];

    /// The stage's name in reports, for example `database`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Departure => "departure",
            Self::Background => "background",
            Self::WebSockets => "websockets",
            Self::Cache => "cache",
            Self::Database => "database",
            Self::Companions => "companions",
            Self::Persist => "persist",
            Self::Custom(name) => name,
        }
    }

    /// What the stage does with these tasks, as the log says it.
    pub(crate) fn doing(self, tasks: &[Cow<'static, str>]) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::Departure => "Telling the neighbours",
            Self::Background => "Shutting down background tasks",
            Self::WebSockets => "Closing WebSocket connections",
            Self::Cache => {
                return Cow::Owned(format!("Flushing cache and closing {} connections", tasks.join(", ")));
            }
            Self::Database => "Closing database connections",
            Self::Companions => "Stopping companion processes",
            Self::Persist => "Saving state",
            Self::Custom(name) => return Cow::Owned(format!("Stage {name}")),
        })
    }

    fn budget(self, config: &ShutdownConfig) -> Duration {
        match self {
            Self::Departure => config.departure,
            Self::Background => config.background,
            Self::WebSockets => config.websocket,
            Self::Cache => config.cache,
            Self::Database => config.database,
            Self::Companions => config.companion.unwrap_or(COMPANION_BUDGET),
            Self::Persist | Self::Custom(_) => PERSIST_BUDGET,
        }
    }

    fn reserve(self) -> Duration {
        if self == Self::Persist { PERSIST_RESERVE } else { STAGE_RESERVE }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Stage {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A stage with its times and the tasks it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlannedStage {
    /// Which stage.
    pub stage: Stage,
    /// The most it may take.
    #[serde(serialize_with = "as_ms", rename = "budget_ms")]
    pub budget: Duration,
    /// What it is promised, if it has a task.
    #[serde(serialize_with = "as_ms", rename = "reserve_ms")]
    pub reserve: Duration,
    /// The names of its tasks; a stage without any costs nothing.
    pub tasks: Vec<Cow<'static, str>>,
    /// What its tasks need to end as they are meant to, where that is known.
    #[serde(skip)]
    need: Option<Need>,
}

/// What the tasks of a stage need, and how that is counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) needed: Duration,
    pub(crate) arithmetic: String,
}

/// A step whose deadline the plan knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Serving on with readiness red.
    LameDuck,
    /// Waiting for requests.
    Drain,
    /// A stage.
    Stage(Stage),
}

/// The whole shutdown as arithmetic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Plan {
    /// From the reason to the exit.
    #[serde(serialize_with = "as_ms", rename = "total_ms")]
    pub total: Duration,
    /// The lame duck's time.
    #[serde(serialize_with = "as_ms", rename = "lame_duck_ms")]
    pub lame_duck: Duration,
    /// The linger's time, inside the drain.
    #[serde(serialize_with = "as_ms", rename = "linger_ms")]
    pub linger: Duration,
    /// The drain's budget.
    #[serde(serialize_with = "as_ms", rename = "drain_ms")]
    pub drain: Duration,
    /// Departure, then the closing stages in order.
    pub stages: Vec<PlannedStage>,
}

fn as_ms<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

impl Plan {
    /// The plan of `config` with the given stages, all empty.
    pub fn new(config: &ShutdownConfig) -> Self {
        let stages = Stage::GIVEN
            .into_iter()
            .map(|stage| PlannedStage {
                stage,
                budget: stage.budget(config),
                reserve: stage.reserve(),
                tasks: Vec::new(),
                need: None,
            })
            .collect();
        Self {
            total: config.total,
            lame_duck: config.lame_duck,
            linger: config.linger.min(config.graceful),
            drain: config.graceful,
            stages,
        }
    }

    /// Puts a stage of the program's own after `after`.
    ///
    /// # Panics
    ///
    /// If there is no stage `after`, or one of that name.
    pub(crate) fn insert(&mut self, after: Stage, name: &'static str, budget: Duration) {
        let stage = Stage::Custom(name);
        let place = self.place(after);
        let place =
            place.unwrap_or_else(|| panic!("there is no stage {after} to put the stage {name} after"));
        let taken = self.stages.iter().any(|planned| planned.stage.name() == name);
        assert!(!taken, "there is a stage {name} already");
        let planned = PlannedStage { stage, budget, reserve: stage.reserve(), tasks: Vec::new(), need: None };
        self.stages.insert(place + 1, planned);
    }

    /// Says what the companions' ladders need. Their stage's budget is that, unless one is given.
    #[cfg(all(unix, feature = "companions"))]
    pub(crate) fn need_of_companions(&mut self, need: Need, given: Option<Duration>) {
        let place = self.place(Stage::Companions).expect("a given stage");
        let stage = &mut self.stages[place];
        stage.budget = given.unwrap_or(COMPANION_BUDGET.max(need.needed));
        stage.need = Some(need);
    }

    /// Adds a task's name to its stage; `false` if there is no such stage.
    pub(crate) fn add_task(&mut self, stage: Stage, name: Cow<'static, str>) -> bool {
        let Some(place) = self.place(stage) else { return false };
        self.stages[place].tasks.push(name);
        true
    }

    fn place(&self, stage: Stage) -> Option<usize> {
        self.stages.iter().position(|planned| planned.stage == stage)
    }

    /// The closing stages: all but Departure, in order.
    pub fn closing(&self) -> impl Iterator<Item = &PlannedStage> {
        self.stages.iter().filter(|planned| planned.stage != Stage::Departure)
    }

    /// When everything but the report has ended, from the beginning.
    pub fn end(&self) -> Duration {
        self.total.saturating_sub(REPORT_RESERVE)
    }

    /// Until when `step` may run when it starts at `now` (both from the beginning).
    ///
    /// # Panics
    ///
    /// If the plan has no such stage.
    pub fn deadline(&self, step: Step, now: Duration, urgency: Urgency) -> Duration {
        let (budget, reserve) = match step {
            Step::LameDuck => (self.lame_duck, Duration::ZERO),
            Step::Drain => (self.drain, STAGE_RESERVE),
            Step::Stage(stage) => {
                let place = self.place(stage).expect("a stage that runs is in its plan");
                (self.stages[place].budget, self.stages[place].reserve)
            }
        };
        let wanted = match (urgency, step) {
            (Urgency::Graceful, _) => budget,
            (Urgency::Immediate, step) if step != Step::Stage(Stage::Persist) => Duration::ZERO,
            // A drain that was asked to hurry waits for nobody.
            (Urgency::Fast, Step::Drain) => Duration::ZERO,
            _ => reserve.min(budget),
        };
        let settle = if step == Step::Drain { CUT_SETTLE } else { Duration::ZERO };
        (now + wanted).min(self.latest(step).saturating_sub(settle)).max(now.min(self.end()))
    }

    /// When `step` must have let go of everything: what comes after it is promised to later steps.
    pub(crate) fn latest(&self, step: Step) -> Duration {
        let later = match step {
            Step::LameDuck => STAGE_RESERVE + self.reserves_after(None),
            Step::Drain => self.reserves_after(None),
            // Departure runs beside the drain and ends before the closing stages.
            Step::Stage(stage) => self.reserves_after(self.place(stage)),
        };
        self.end().saturating_sub(later)
    }

    /// The reserves of the non-empty stages after `place`; of all closing stages for `None`.
    fn reserves_after(&self, place: Option<usize>) -> Duration {
        let first = place.map_or(0, |place| place + 1);
        self.stages[first..]
            .iter()
            .filter(|planned| planned.stage != Stage::Departure && !planned.tasks.is_empty())
            .map(|planned| planned.reserve)
            .sum()
    }

    /// Checks that the plan can hold.
    ///
    /// # Errors
    ///
    /// The sum of the reserves, or the lame duck with them, is more than the total, or a companion's ladder is longer than its
    /// stage can be; with the arithmetic.
    pub fn check(&self) -> Result<(), PlanError> {
        let mut promised = vec![(Cow::Borrowed("drain"), STAGE_RESERVE)];
        promised.extend(
            self.closing()
                .filter(|planned| !planned.tasks.is_empty())
                .map(|planned| (Cow::Borrowed(planned.stage.name()), planned.reserve)),
        );
        promised.push((Cow::Borrowed("report"), REPORT_RESERVE));
        if !self.lame_duck.is_zero() {
            promised.insert(0, (Cow::Borrowed("lame duck (SHUTDOWN_LAME_DUCK)"), self.lame_duck));
        }
        let needed = promised.iter().map(|(_, reserve)| *reserve).sum();
        if needed > self.total {
            return Err(PlanError(Impossible::Total { promised, needed, total: self.total }));
        }
        for planned in self.closing() {
            let Some(need) = &planned.need else { continue };
            // What is left when nothing takes any time but the lame duck, which takes it always.
            let latest = self.latest(Step::Stage(planned.stage)).saturating_sub(self.lame_duck);
            if need.needed > planned.budget.min(latest) {
                let (needed, budget) = (need.clone(), planned.budget);
                return Err(PlanError(Impossible::Ladders { needed, budget, latest, total: self.total }));
            }
        }
        Ok(())
    }

    /// The sum of all budgets of the steps that have something to do, the report's reserve included.
    pub fn worst_case(&self) -> Duration {
        self.lame_duck
            + self.drain
            + self
                .closing()
                .filter(|planned| !planned.tasks.is_empty())
                .map(|planned| planned.budget)
                .sum::<Duration>()
            + REPORT_RESERVE
    }
}

impl fmt::Display for Plan {
    /// The effective plan and its arithmetic, a line a step.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = display_duration;
        writeln!(f, "{:<18} {:>9} {:>9} {:>13}  tasks", "step", "budget", "reserve", "ends by")?;
        let lame_duck_end = self.deadline(Step::LameDuck, Duration::ZERO, Urgency::Graceful);
        writeln!(
            f,
            "{:<18} {:>9} {:>9} {:>13}",
            "lame duck",
            d(self.lame_duck),
            d(Duration::ZERO),
            d(lame_duck_end)
        )?;
        let mut now = self.deadline(Step::Drain, lame_duck_end, Urgency::Graceful);
        writeln!(f, "{:<18} {:>9} {:>9} {:>13}", "drain", d(self.drain), d(STAGE_RESERVE), d(now))?;
        for planned in &self.stages {
            if planned.tasks.is_empty() {
                writeln!(f, "{:<18} {:>9} {:>9} {:>13}", planned.stage, d(planned.budget), "-", "-")?;
                continue;
            }
            let start = if planned.stage == Stage::Departure { Duration::ZERO } else { now };
            let deadline = self.deadline(Step::Stage(planned.stage), start, Urgency::Graceful);
            if planned.stage != Stage::Departure {
                now = deadline;
            }
            writeln!(
                f,
                "{:<18} {:>9} {:>9} {:>13}  {}",
                planned.stage,
                d(planned.budget),
                d(planned.reserve),
                d(deadline),
                planned.tasks.join(", ")
            )?;
        }
        writeln!(
            f,
            "{:<18} {:>9} {:>9} {:>13}",
            "report",
            d(REPORT_RESERVE),
            d(REPORT_RESERVE),
            d(self.total)
        )?;
        let worst = self.worst_case();
        write!(f, "sum of budgets {}, total {}", d(worst), d(self.total))?;
        if worst > self.total {
            write!(f, ": a step that overruns shortens later ones, down to their reserves")?;
        }
        Ok(())
    }
}

/// The plan cannot hold. The configuration's mistake: a program exits with 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanError(Impossible);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Impossible {
    /// The promises are more than the total.
    Total { promised: Vec<(Cow<'static, str>, Duration)>, needed: Duration, total: Duration },
    /// The companions' ladders are longer than their stage can be.
    Ladders { needed: Need, budget: Duration, latest: Duration, total: Duration },
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the shutdown plan is impossible: ")?;
        let d = display_duration;
        match &self.0 {
            Impossible::Total { promised, needed, total } => {
                for (index, (name, reserve)) in promised.iter().enumerate() {
                    let plus = if index == 0 { "" } else { " + " };
                    write!(f, "{plus}{name} {}", d(*reserve))?;
                }
                let (needed, total) = (d(*needed), d(*total));
                write!(
                    f,
                    " = {needed} is more than SHUTDOWN_TOTAL_TIMEOUT={total}: raise the total to at least {needed}"
                )
            }
            Impossible::Ladders { needed: Need { needed, arithmetic }, budget, latest, total } => {
                write!(f, "companions: {arithmetic}; together {} is more than ", d(*needed))?;
                if budget < latest {
                    write!(f, "SHUTDOWN_COMPANION_TIMEOUT={}: raise it, or shorten the ladders", d(*budget))
                } else {
                    write!(
                        f,
                        "the {} that SHUTDOWN_TOTAL_TIMEOUT={} leaves beside the lame duck and the reserves: raise it, or shorten the \
                         ladders",
                        d(*latest),
                        d(*total)
                    )
                }
            }
        }
    }
}

impl std::error::Error for PlanError {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn plan(total: u64, stages: &[Stage]) -> Plan {
        let mut plan = Plan::new(&ShutdownConfig { total: ms(total), ..Default::default() });
        for stage in stages {
            assert!(plan.add_task(*stage, "t".into()));
        }
        plan
    }

    #[test]
    fn a_stage_ends_with_its_budget_when_there_is_time() {
        let plan = plan(28_000, &[Stage::Database, Stage::Persist]);
        assert_eq!(plan.deadline(Step::Stage(Stage::Database), ms(1000), Urgency::Graceful), ms(6000));
    }

    #[test]
    fn a_drain_leaves_the_reserves_of_every_non_empty_stage_after_it() {
        let plan = plan(28_000, &[Stage::Database, Stage::Cache, Stage::Persist]);
        let deadline = plan.deadline(Step::Drain, ms(0), Urgency::Graceful);
        assert_eq!(deadline, ms(28_000 - 250 - 500 - 100 - 100 - 50));
    }

    #[test]
    fn an_empty_stage_reserves_nothing() {
        assert_eq!(plan(28_000, &[]).deadline(Step::Drain, ms(0), Urgency::Graceful), ms(27_700));
    }

    #[test]
    fn a_second_signal_leaves_each_stage_its_reserve_and_the_drain_nothing() {
        let plan = plan(28_000, &[Stage::Database, Stage::Persist]);
        assert_eq!(plan.deadline(Step::Drain, ms(40), Urgency::Fast), ms(40));
        assert_eq!(plan.deadline(Step::Stage(Stage::Database), ms(40), Urgency::Fast), ms(140));
        assert_eq!(plan.deadline(Step::Stage(Stage::Persist), ms(40), Urgency::Fast), ms(540));
        assert_eq!(plan.deadline(Step::Stage(Stage::Database), ms(40), Urgency::Immediate), ms(40));
        assert_eq!(plan.deadline(Step::Stage(Stage::Persist), ms(40), Urgency::Immediate), ms(540));
    }

    #[test]
    fn an_impossible_plan_is_refused_with_its_arithmetic_in_one_line() {
        let error = plan(600, &[Stage::Persist]).check().unwrap_err().to_string();
        assert_eq!(
            error,
            "the shutdown plan is impossible: drain 100ms + persist 500ms + report 250ms = 850ms is more than \
             SHUTDOWN_TOTAL_TIMEOUT=600ms: raise the total to at least 850ms"
        );
        assert!(plan(850, &[Stage::Persist]).check().is_ok());
    }

    #[test]
    fn a_lame_duck_that_leaves_no_room_for_the_reserves_is_refused() {
        let mut plan = plan(5_000, &[]);
        plan.lame_duck = ms(4_700);
        assert!(plan.check().unwrap_err().to_string().contains("SHUTDOWN_LAME_DUCK"));
        plan.lame_duck = ms(4_650);
        assert!(plan.check().is_ok());
    }

    #[test]
    fn a_stage_of_the_programs_own_stands_where_it_was_put() {
        let mut plan = plan(28_000, &[]);
        plan.insert(Stage::Cache, "search index", ms(700));
        let names: Vec<_> = plan.closing().map(|planned| planned.stage.name()).collect();
        assert_eq!(
            names,
            ["background", "websockets", "cache", "search index", "database", "companions", "persist"]
        );
    }

    proptest! {
        /// Whatever each step takes, up to its deadline, every later non-empty stage still gets its reserve and
        /// everything ends by the total.
        #[test]
        fn reserves_are_honoured_however_the_earlier_steps_end(
            total in 2_000_u64..60_000,
            lame_duck in 0_u64..500,
            used in proptest::collection::vec(0.0_f64..=1.0, 9),
        ) {
            let mut plan = plan(total, &Stage::GIVEN);
            plan.lame_duck = ms(lame_duck);
            prop_assert!(plan.check().is_ok());
            let mut now = Duration::ZERO;
            let mut used = used.into_iter();
            let mut advance = |now: &mut Duration, deadline: Duration| {
                *now += deadline.saturating_sub(*now).mul_f64(used.next().unwrap_or(1.0));
            };
            let deadline = plan.deadline(Step::LameDuck, now, Urgency::Graceful);
            advance(&mut now, deadline);
            let deadline = plan.deadline(Step::Drain, now, Urgency::Graceful);
            prop_assert!(deadline >= now + STAGE_RESERVE - CUT_SETTLE);
            advance(&mut now, deadline);
            for planned in plan.closing() {
                let deadline = plan.deadline(Step::Stage(planned.stage), now, Urgency::Graceful);
                prop_assert!(deadline >= now + planned.reserve.min(planned.budget), "{} {now:?} {deadline:?}", planned.stage);
                advance(&mut now, deadline);
            }
            prop_assert!(now <= plan.end());
        }
    }
}
