//! The laws of a whole shutdown, on a stopped clock: `build()` gives the driver, the test polls it.
#![expect(clippy::unwrap_used, reason = "a test's helpers, like the test, fail by panicking")]

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use proptest::prelude::*;
use shutdown_core::{
    AddStageTaskError, BoxError, Builder, Outcome, PERSIST_RESERVE, Phase, REPORT_RESERVE, Reason,
    STAGE_RESERVE, ShutdownConfig, ShutdownCoordinator, ShutdownReport, ShuttingDown, Stage, StageContext,
    StageReport, TaskNote, Urgency,
};
use tokio::time::{Instant, sleep, timeout};

/// The clock of a stopped runtime moves in whole milliseconds, so every wait may be one late.
const TICK: f64 = 2.0;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn config(change: impl FnOnce(&mut ShutdownConfig)) -> ShutdownConfig {
    let mut config = ShutdownConfig::default();
    change(&mut config);
    config
}

fn with_total(total: Duration) -> Builder {
    ShutdownCoordinator::builder().config(config(|config| config.total = total))
}

fn reason() -> Reason {
    Reason::requested("a test")
}

/// A coordinator whose driver runs.
fn start(builder: Builder) -> ShutdownCoordinator {
    let (shutdown, driver) = builder.build().unwrap();
    tokio::spawn(driver.run());
    shutdown
}

/// Runs a whole shutdown: its report and how long it took.
async fn stop(builder: Builder) -> (Arc<ShutdownReport>, Duration) {
    finish(start(builder)).await
}

/// Asks for the shutdown and waits for its end.
async fn finish(shutdown: ShutdownCoordinator) -> (Arc<ShutdownReport>, Duration) {
    let begin = Instant::now();
    shutdown.initiate_shutdown(reason());
    let report = timeout(ms(60_000), shutdown.finished()).await.expect("a shutdown ends within its total");
    (report, begin.elapsed())
}

fn stage<'a>(report: &'a ShutdownReport, name: &str) -> &'a StageReport {
    report.stages.iter().find(|stage| stage.stage == name).expect("the stage had something to do")
}

/// The tasks of a stage with how they ended.
fn ends(report: &ShutdownReport, of: &str) -> Vec<(String, Outcome)> {
    stage(report, of).tasks.iter().map(|task| (task.name.to_string(), task.outcome)).collect()
}

fn ends_are(report: &ShutdownReport, of: &str, expected: &[(&str, Outcome)]) {
    let expected: Vec<_> = expected.iter().map(|(name, outcome)| ((*name).to_owned(), *outcome)).collect();
    assert_eq!(ends(report, of), expected);
}

/// What happened, in order.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn note(&self, what: impl Into<String>) {
        self.0.lock().push(what.into());
    }

    /// A stage task that notes its name and ends.
    fn task(
        &self,
        name: &'static str,
    ) -> impl FnOnce(StageContext) -> std::future::Ready<Result<(), BoxError>> + Send + 'static {
        let log = self.clone();
        move |_| {
            log.note(name);
            std::future::ready(Ok(()))
        }
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().clone()
    }
}

/// What a stage task does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    Ends,
    Fails,
    Panics,
    PanicsBeforeItsFuture,
    Hangs,
    ComesLate,
    HearsItsToken,
}

impl Does {
    const ALL: [Self; 7] = [
        Self::Ends,
        Self::Fails,
        Self::Panics,
        Self::PanicsBeforeItsFuture,
        Self::Hangs,
        Self::ComesLate,
        Self::HearsItsToken,
    ];

    fn outcome(self) -> Outcome {
        match self {
            Self::Ends | Self::HearsItsToken => Outcome::Ok,
            Self::Fails => Outcome::Failed,
            Self::Panics | Self::PanicsBeforeItsFuture => Outcome::Panicked,
            Self::Hangs | Self::ComesLate => Outcome::TimedOut,
        }
    }

    async fn run(self, context: StageContext) -> Result<(), BoxError> {
        match self {
            Self::Ends => Ok(()),
            Self::Fails => Err("it failed".into()),
            Self::Panics => panic(),
            Self::PanicsBeforeItsFuture => unreachable!("see `add`"),
            Self::Hangs => pending().await,
            Self::ComesLate => {
                tokio::time::sleep_until(context.deadline + ms(5)).await;
                Ok(())
            }
            Self::HearsItsToken => {
                context.token.cancelled().await;
                Ok(())
            }
        }
    }

    fn add(self, builder: Builder, stage: Stage, name: &'static str) -> Builder {
        builder.stage_task(stage, name, move |context| {
            if self == Self::PanicsBeforeItsFuture {
                panic();
            }
            self.run(context)
        })
    }
}

/// A panic that prints nothing.
fn panic() -> ! {
    std::panic::resume_unwind(Box::new("it panicked"))
}

/// A builder with a task in each of these stages that hangs on, so that time is short for all after it.
fn all_stages_hang(mut builder: Builder) -> Builder {
    for stage in Stage::GIVEN {
        builder = Does::Hangs.add(builder, stage, "hangs");
    }
    builder
}

// Budgets and reserves.

#[tokio::test(start_paused = true)]
async fn a_shutdown_with_nothing_to_do_takes_no_time() {
    let (report, took) = stop(ShutdownCoordinator::builder()).await;
    assert_eq!(took, Duration::ZERO);
    assert_eq!((report.exit_code(), report.stages.len(), report.duration_ms), (0, 0, 0.0));
}

#[tokio::test(start_paused = true)]
async fn every_stage_is_given_its_reserve_whatever_the_ones_before_it_do() {
    let (report, took) = stop(all_stages_hang(with_total(ms(1600)))).await;
    for stage in report.stages.iter().filter(|stage| stage.stage != "departure") {
        let reserve = if stage.stage == "persist" { PERSIST_RESERVE } else { STAGE_RESERVE };
        assert!(stage.budget_ms >= reserve.as_secs_f64() * 1000.0 - TICK, "{stage:?}");
        assert_eq!(stage.outcome, Outcome::TimedOut);
    }
    assert_eq!(report.stages.len(), Stage::GIVEN.len());
    assert!(took <= ms(1600 + 20), "{took:?}");
    assert_eq!(report.exit_code(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_cut_at_the_end_of_all_time_takes_nothing_from_the_reserves() {
    let shutdown = start(all_stages_hang(with_total(ms(1600))));
    let request = shutdown.request_start().unwrap();
    let connection = shutdown.connection_start().unwrap();
    let (report, took) = finish(shutdown).await;
    assert_eq!((report.requests.cut, report.connections.cut), (1, 1));
    for stage in report.stages.iter().filter(|stage| stage.stage != "departure") {
        let reserve = if stage.stage == "persist" { PERSIST_RESERVE } else { STAGE_RESERVE };
        assert!(stage.budget_ms >= reserve.as_secs_f64() * 1000.0 - TICK, "{stage:?}");
    }
    assert!(took <= ms(1600 + 20), "{took:?}");
    drop((request, connection));
}

#[tokio::test(start_paused = true)]
async fn a_stage_that_is_given_less_than_its_budget_says_from_what_it_shrank() {
    let builder = Does::Hangs.add(with_total(ms(3000)), Stage::Database, "pool");
    let (report, _) = stop(Does::Ends.add(builder, Stage::Persist, "state")).await;
    let database = stage(&report, "database");
    assert_eq!(database.shrunk_from_ms, Some(5000.0));
    assert!((database.budget_ms - 2250.0).abs() <= TICK, "{database:?}");
    assert!((database.end_ms - 2250.0).abs() <= TICK, "{database:?}");
    assert_eq!(stage(&report, "persist").outcome, Outcome::Ok);
}

#[tokio::test(start_paused = true)]
async fn a_stage_that_has_its_budget_does_not_say_that_it_shrank() {
    let (report, took) = stop(Does::Hangs.add(with_total(ms(28_000)), Stage::Database, "pool")).await;
    assert_eq!(stage(&report, "database").shrunk_from_ms, None);
    assert!((took.as_secs_f64() - 5.0).abs() < 0.01, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_plan_whose_promises_exceed_the_total_is_refused_with_the_arithmetic() {
    let builder = Does::Ends.add(with_total(ms(800)), Stage::Persist, "state");
    let error = builder.build().unwrap_err().to_string();
    for part in ["drain 100ms", "persist 500ms", "report 250ms", "850ms", "SHUTDOWN_TOTAL_TIMEOUT=800ms"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
}

// Stages and their tasks.

#[tokio::test(start_paused = true)]
async fn however_a_task_ends_it_is_named_with_its_outcome_and_all_others_run() {
    for does in Does::ALL {
        let log = Log::default();
        let builder = does.add(ShutdownCoordinator::builder(), Stage::Cache, "subject");
        let builder = builder
            .stage_task(Stage::Cache, "beside", log.task("beside"))
            .stage_task(Stage::Database, "after", log.task("after"))
            .stage_task(Stage::Persist, "last", log.task("last"));
        let (report, took) = stop(builder).await;
        ends_are(&report, "cache", &[("subject", does.outcome()), ("beside", Outcome::Ok)]);
        assert_eq!(stage(&report, "cache").outcome, does.outcome());
        assert_eq!(log.all(), ["beside", "after", "last"]);
        assert_eq!(report.exit_code(), if does.outcome() == Outcome::Ok { 0 } else { 10 }, "{does:?}");
        assert!(took <= ms(5021), "{does:?} {took:?}");
        let detail = stage(&report, "cache").tasks[0].detail.as_deref();
        match does.outcome() {
            Outcome::Ok => assert_eq!(detail, None),
            Outcome::TimedOut => assert_eq!(detail, Some("aborted")),
            _ => assert!(detail.is_some_and(|detail| detail.starts_with("it ")), "{detail:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn tasks_of_one_stage_run_side_by_side_and_stages_one_after_another() {
    let mut builder = ShutdownCoordinator::builder();
    for name in ["a", "b", "c"] {
        for stage in [Stage::Cache, Stage::Database] {
            builder = builder.stage_task(stage, name, |_| async {
                sleep(ms(1000)).await;
                Ok(())
            });
        }
    }
    let (report, took) = stop(builder).await;
    assert!(took >= ms(2000) && took <= ms(2010), "{took:?}");
    let (cache, database) = (stage(&report, "cache"), stage(&report, "database"));
    assert!(cache.end_ms <= database.start_ms, "{cache:?} {database:?}");
}

#[tokio::test(start_paused = true)]
async fn stages_run_in_their_order_and_a_programs_own_right_after_the_one_it_named() {
    let log = Log::default();
    let own = Stage::Custom("uploads");
    let mut builder = ShutdownCoordinator::builder().stage(Stage::Cache, "uploads", ms(700));
    // Added in the wrong order on purpose.
    let added = [Stage::Persist, Stage::Companions, own, Stage::Database, Stage::Cache, Stage::Background];
    for stage in added.into_iter().chain([Stage::WebSockets, Stage::Departure]) {
        builder = builder.stage_task(stage, stage.name(), log.task(stage.name()));
    }
    let (report, _) = stop(builder).await;
    let order =
        ["departure", "background", "websockets", "cache", "uploads", "database", "companions", "persist"];
    assert_eq!(log.all(), order);
    assert_eq!(report.stages.iter().map(|stage| &*stage.stage).collect::<Vec<_>>(), order);
    assert_eq!(stage(&report, "uploads").budget_ms, 700.0);
}

#[tokio::test(start_paused = true)]
async fn hooks_before_run_first_and_hooks_after_run_though_a_task_failed() {
    let log = Log::default();
    let failing = log.clone();
    let builder = ShutdownCoordinator::builder()
        .after(Stage::Cache, "count", log.task("after 1"))
        .after(Stage::Cache, "log", log.task("after 2"))
        .stage_task(Stage::Cache, "flush", move |_| {
            failing.note("task");
            async { Err("disk full".into()) }
        })
        .before(Stage::Cache, "pause", log.task("before 1"))
        .before(Stage::Cache, "fence", log.task("before 2"));
    let (report, _) = stop(builder).await;
    assert_eq!(log.all(), ["before 1", "before 2", "task", "after 1", "after 2"]);
    let names: Vec<_> = ends(&report, "cache").into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["after count", "after log", "flush", "before pause", "before fence"]);
    assert_eq!(stage(&report, "cache").outcome, Outcome::Failed);
}

#[tokio::test(start_paused = true)]
async fn what_a_task_has_noted_is_its_own_and_stays_when_it_fails_or_is_aborted() {
    let noting = |subject: &'static str, hangs: bool| {
        move |stage: StageContext| async move {
            stage.note(TaskNote::new(subject, "heard").with("sends", 2.0));
            if hangs {
                pending::<()>().await;
            }
            Err::<(), BoxError>("for another reason".into())
        }
    };
    let builder = ShutdownCoordinator::builder()
        .stage_task(Stage::Departure, "fails", noting("peer 1", false))
        .stage_task(Stage::Departure, "hangs", noting("peer 2", true));
    let (report, _) = stop(builder).await;
    let departure = stage(&report, "departure");
    let noted: Vec<_> =
        departure.tasks.iter().map(|task| (task.outcome, task.notes[0].subject.as_str())).collect();
    assert_eq!(noted, [(Outcome::Failed, "peer 1"), (Outcome::TimedOut, "peer 2")]);
    assert_eq!(departure.tasks[0].notes, [TaskNote::new("peer 1", "heard").with("sends", 2.0)]);
}

#[tokio::test(start_paused = true)]
async fn a_failed_hook_does_not_keep_the_tasks_from_running() {
    let log = Log::default();
    let builder = ShutdownCoordinator::builder()
        .before(Stage::Cache, "fence", |_| async { panic!("no fence") })
        .stage_task(Stage::Cache, "flush", log.task("task"));
    let (report, _) = stop(builder).await;
    assert_eq!(log.all(), ["task"]);
    ends_are(&report, "cache", &[("before fence", Outcome::Panicked), ("flush", Outcome::Ok)]);
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_hangs_leaves_the_rest_of_its_stage_skipped_and_later_stages_untouched() {
    let log = Log::default();
    let builder = ShutdownCoordinator::builder()
        .before(Stage::Cache, "fence", |_| pending())
        .stage_task(Stage::Cache, "flush", log.task("never"))
        .after(Stage::Cache, "count", log.task("never"))
        .stage_task(Stage::Database, "pool", log.task("pool"));
    let (report, took) = stop(builder).await;
    assert_eq!(log.all(), ["pool"]);
    let skipped = Outcome::Skipped;
    ends_are(
        &report,
        "cache",
        &[("before fence", Outcome::TimedOut), ("flush", skipped), ("after count", skipped)],
    );
    assert!((took.as_secs_f64() - 5.0).abs() < 0.01, "{took:?}");
    assert_eq!(report.exit_code(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_stage_task_hears_its_token_before_it_is_aborted() {
    let heard = Arc::new(Mutex::new(None));
    let told = Arc::clone(&heard);
    let builder = ShutdownCoordinator::builder().stage_task(Stage::Cache, "flush", move |stage| async move {
        stage.token.cancelled().await;
        *told.lock() = Some(stage.deadline - Instant::now());
        pending().await
    });
    let (report, _) = stop(builder).await;
    let left = heard.lock().expect("it heard");
    assert!(left >= ms(48) && left <= shutdown_core::TOKEN_GRACE, "{left:?}");
    ends_are(&report, "cache", &[("flush", Outcome::TimedOut)]);
}

#[tokio::test(start_paused = true)]
async fn two_tasks_of_one_name_are_two_lines() {
    let builder = Does::Fails.add(ShutdownCoordinator::builder(), Stage::Cache, "redis");
    let (report, _) = stop(Does::Ends.add(builder, Stage::Cache, "redis")).await;
    ends_are(&report, "cache", &[("redis", Outcome::Failed), ("redis", Outcome::Ok)]);
}

#[tokio::test(start_paused = true)]
async fn a_stage_task_can_be_added_until_draining_and_runs() {
    let log = Log::default();
    let shutdown = start(ShutdownCoordinator::builder().config(config(|config| config.lame_duck = ms(1000))));
    shutdown.add_stage_task(Stage::Cache, "while running", log.task("while running")).unwrap();
    shutdown.initiate_shutdown(reason());
    shutdown.until(Phase::LameDuck).await;
    shutdown.add_stage_task(Stage::Cache, "while leaving", log.task("while leaving")).unwrap();
    let request = shutdown.request_start().unwrap();
    shutdown.until(Phase::Draining).await;
    let late = shutdown.add_stage_task(Stage::Cache, "late", log.task("late"));
    assert_eq!(late, Err(AddStageTaskError::ShuttingDown(ShuttingDown)));
    drop(request);
    let (report, _) = finish(shutdown).await;
    assert_eq!(log.all(), ["while running", "while leaving"]);
    assert_eq!(ends(&report, "cache").len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_departure_task_that_comes_after_the_departure_began_is_refused_and_not_forgotten() {
    let log = Log::default();
    let shutdown = start(ShutdownCoordinator::builder().config(config(|config| config.lame_duck = ms(1000))));
    shutdown.initiate_shutdown(reason());
    shutdown.until(Phase::LameDuck).await;
    let late = shutdown.add_stage_task(Stage::Departure, "goodbye", log.task("goodbye"));
    let (report, _) = finish(shutdown).await;
    assert_eq!(late, Err(AddStageTaskError::ShuttingDown(ShuttingDown)));
    assert_eq!((log.all().len(), report.stages.len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_stage_task_that_breaks_the_plan_is_refused_and_leaves_it_as_it_was() {
    let shutdown = start(with_total(ms(800)));
    let before = shutdown.plan();
    let refused = shutdown.add_stage_task(Stage::Persist, "state", |_| async { Ok(()) });
    assert!(matches!(refused, Err(AddStageTaskError::Plan(_))), "{refused:?}");
    assert_eq!(shutdown.plan(), before);
    let (report, _) = finish(shutdown).await;
    assert_eq!((report.exit_code(), report.stages.len()), (0, 0));
}

// Departure.

#[tokio::test(start_paused = true)]
async fn departure_starts_with_the_lame_duck_runs_beside_the_drain_and_ends_before_closing() {
    let log = Log::default();
    let (begin, end) = (log.clone(), log.clone());
    let builder = ShutdownCoordinator::builder()
        .config(config(|config| config.departure = ms(900)))
        .stage_task(Stage::Departure, "goodbye", move |_| async move {
            begin.note("departure begins");
            sleep(ms(800)).await;
            begin.note("departure ends");
            Ok(())
        })
        .stage_task(Stage::Background, "flush", end.task("closing"));
    let shutdown = start(builder);
    let request = shutdown.request_start().unwrap();
    tokio::spawn({
        let log = log.clone();
        async move {
            shutdown.until(Phase::Draining).await;
            sleep(ms(300)).await;
            log.note("last request");
            drop(request);
        }
    });
    let (report, took) = finish(shutdown).await;
    assert_eq!(log.all(), ["departure begins", "last request", "departure ends", "closing"]);
    assert!(took >= ms(800) && took <= ms(810), "{took:?}");
    assert_eq!(stage(&report, "departure").start_ms, 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_departure_that_hangs_is_cut_at_its_budget_while_requests_drain_on() {
    let shutdown = start(Does::Hangs.add(ShutdownCoordinator::builder(), Stage::Departure, "goodbye"));
    let request = shutdown.request_start().unwrap();
    tokio::spawn(async move {
        sleep(ms(3000)).await;
        drop(request);
    });
    let (report, took) = finish(shutdown).await;
    let departure = stage(&report, "departure");
    assert_eq!(departure.outcome, Outcome::TimedOut);
    assert!((departure.end_ms - 1000.0).abs() <= TICK, "{departure:?}");
    assert!(took >= ms(3000) && took <= ms(3010), "{took:?}");
    assert_eq!((report.requests.cut, report.exit_code()), (0, 10));
}

// Background tasks.

#[tokio::test(start_paused = true)]
async fn a_background_task_hears_its_token_and_finishes_its_iteration() {
    let shutdown = start(ShutdownCoordinator::builder());
    let finished = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&finished);
    shutdown
        .spawn("sync", |token| async move {
            while !token.is_cancelled() {
                // An iteration is never torn: the token is looked at between two of them only.
                sleep(ms(400)).await;
                count.fetch_add(1, Ordering::Relaxed);
            }
        })
        .unwrap();
    sleep(ms(1000)).await;
    assert_eq!(finished.load(Ordering::Relaxed), 2);
    let (report, took) = finish(shutdown).await;
    assert_eq!(finished.load(Ordering::Relaxed), 3);
    assert!(took >= ms(199) && took <= ms(205), "{took:?}");
    ends_are(&report, "background", &[("sync", Outcome::Ok)]);
    assert_eq!(report.exit_code(), 0);
}

/// Notes that it was dropped.
struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_cancellable_task_is_dropped_at_its_await_at_once() {
    let shutdown = start(ShutdownCoordinator::builder());
    let gone = Arc::new(AtomicBool::new(false));
    let flag = Dropped(Arc::clone(&gone));
    shutdown
        .spawn_cancellable("poll", async move {
            let _flag = flag;
            pending::<()>().await;
        })
        .unwrap();
    sleep(ms(1)).await;
    assert!(!gone.load(Ordering::Relaxed));
    let (report, took) = finish(shutdown).await;
    assert!(gone.load(Ordering::Relaxed));
    assert_eq!(took, Duration::ZERO);
    ends_are(&report, "background", &[("poll", Outcome::Ok)]);
}

#[tokio::test(start_paused = true)]
async fn a_background_task_that_ignores_its_token_is_dropped_at_the_deadline_and_named() {
    let shutdown = start(ShutdownCoordinator::builder());
    let gone = Arc::new(AtomicBool::new(false));
    let flag = Dropped(Arc::clone(&gone));
    shutdown
        .spawn("deaf", |_| async move {
            let _flag = flag;
            pending::<()>().await;
        })
        .unwrap();
    shutdown.spawn("good", |token| async move { token.cancelled().await }).unwrap();
    shutdown.initiate_shutdown(reason());
    sleep(ms(9_990)).await;
    assert!(!gone.load(Ordering::Relaxed), "the whole budget is its own");
    let (report, _) = finish(shutdown).await;
    assert!(gone.load(Ordering::Relaxed));
    let mut ended = ends(&report, "background");
    ended.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(ended, [("deaf".to_owned(), Outcome::TimedOut), ("good".to_owned(), Outcome::Ok)]);
    assert_eq!(report.exit_code(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_background_task_that_fails_or_panics_when_told_is_named_with_its_error() {
    let shutdown = start(ShutdownCoordinator::builder());
    shutdown
        .spawn("fails", |token| async move {
            token.cancelled().await;
            Err::<(), BoxError>("no disk".into())
        })
        .unwrap();
    shutdown
        .spawn("panics", |token| async move {
            token.cancelled().await;
            assert!(!token.is_cancelled(), "no luck");
        })
        .unwrap();
    let (report, _) = finish(shutdown).await;
    let mut tasks = stage(&report, "background").tasks.clone();
    tasks.sort_by(|a, b| a.name.cmp(&b.name));
    let named: Vec<_> =
        tasks.iter().map(|task| (&*task.name, task.outcome, task.detail.as_deref().unwrap())).collect();
    assert_eq!(named, [("fails", Outcome::Failed, "no disk"), ("panics", Outcome::Panicked, "no luck")]);
    assert_eq!(report.exit_code(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_background_task_that_fails_while_requests_drain_is_named() {
    let shutdown = start(ShutdownCoordinator::builder());
    shutdown
        .spawn("sync", |_| async {
            sleep(ms(500)).await;
            Err::<(), BoxError>("no disk".into())
        })
        .unwrap();
    let request = shutdown.request_start().unwrap();
    tokio::spawn(async move {
        sleep(ms(1000)).await;
        drop(request);
    });
    let (report, _) = finish(shutdown).await;
    ends_are(&report, "background", &[("sync", Outcome::Failed)]);
    assert_eq!(report.exit_code(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_background_task_that_ended_before_the_shutdown_is_not_in_its_report() {
    let shutdown = start(ShutdownCoordinator::builder());
    shutdown.spawn("early", |_| async { Err::<(), BoxError>("long ago".into()) }).unwrap();
    sleep(ms(1)).await;
    let (report, _) = finish(shutdown).await;
    assert_eq!((report.stages.len(), report.exit_code()), (0, 0));
}

/// On a real runtime: a task may end between being told and being counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_background_task_that_ends_the_moment_it_is_told_is_never_missing() {
    for _ in 0..300 {
        let shutdown = start(ShutdownCoordinator::builder());
        for _ in 0..4 {
            shutdown
                .spawn("quick", |token| async move {
                    token.cancelled().await;
                    Err::<(), BoxError>("no disk".into())
                })
                .unwrap();
        }
        let (report, _) = finish(shutdown).await;
        assert_eq!(ends(&report, "background"), vec![("quick".to_owned(), Outcome::Failed); 4]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_spawned_during_the_drain_is_taken_and_one_spawned_after_it_is_refused() {
    let shutdown = start(Does::ComesLate.add(ShutdownCoordinator::builder(), Stage::Cache, "slow"));
    let request = shutdown.request_start().unwrap();
    shutdown.initiate_shutdown(reason());
    shutdown.until(Phase::Draining).await;
    shutdown.spawn("late", |token| async move { token.cancelled().await }).unwrap();
    drop(request);
    shutdown.until(Phase::Closing).await;
    sleep(ms(1)).await;
    assert_eq!(shutdown.spawn("too late", |_| async {}), Err(ShuttingDown));
    let (report, _) = finish(shutdown).await;
    ends_are(&report, "background", &[("late", Outcome::Ok)]);
}

#[tokio::test(start_paused = true)]
async fn a_critical_task_that_fails_or_panics_is_a_reason_and_its_good_end_is_not() {
    for (panics, expected) in [(false, "no quorum"), (true, "gone mad")] {
        let shutdown = start(ShutdownCoordinator::builder());
        shutdown
            .spawn_critical("ledger", move |_| async move {
                assert!(!panics, "gone mad");
                Err::<(), BoxError>("no quorum".into())
            })
            .unwrap();
        let report = timeout(ms(1000), shutdown.finished()).await.expect("its failure stops the service");
        let error = expected.to_owned();
        assert_eq!(report.reason, Reason::CriticalTask { task: "ledger".into(), error });
        assert_eq!(report.exit_code(), 10);
    }
    let shutdown = start(ShutdownCoordinator::builder());
    shutdown.spawn_critical("migration", |_| async {}).unwrap();
    shutdown.spawn("ordinary", |_| async { Err::<(), BoxError>("it happens".into()) }).unwrap();
    sleep(ms(1000)).await;
    assert_eq!(shutdown.phase(), Phase::Running);
}

// Requests and connections.

#[tokio::test(start_paused = true)]
async fn a_request_holds_the_drain_until_its_guard_is_dropped() {
    let shutdown = start(ShutdownCoordinator::builder());
    let request = shutdown.request_start().unwrap();
    shutdown.initiate_shutdown(reason());
    sleep(ms(7000)).await;
    assert_eq!((shutdown.phase(), shutdown.active_request_count()), (Phase::Draining, 1));
    drop(request);
    let (report, took) = finish(shutdown).await;
    assert_eq!(took, Duration::ZERO);
    assert_eq!((report.requests.in_flight_at_start, report.requests.drained), (1, 1));
    assert_eq!((report.requests.cut, report.exit_code()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn without_a_listener_requests_are_refused_as_soon_as_draining_begins() {
    let shutdown = start(ShutdownCoordinator::builder());
    let request = shutdown.request_start().unwrap();
    shutdown.initiate_shutdown(reason());
    shutdown.until(Phase::Draining).await;
    assert_eq!(shutdown.request_start().unwrap_err(), ShuttingDown);
    assert_eq!(shutdown.request_start_named("GET /").unwrap_err(), ShuttingDown);
    assert_eq!(shutdown.active_request_count(), 1);
    drop(request);
    let (report, _) = finish(shutdown).await;
    assert_eq!((report.requests.refused, report.requests.drained), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn with_a_connection_open_requests_are_served_for_the_linger_and_refused_after_it() {
    let shutdown = start(ShutdownCoordinator::builder());
    let listener = shutdown.listener_start();
    let connection = shutdown.connection_start().unwrap();
    shutdown.initiate_shutdown(reason());
    shutdown.until(Phase::Draining).await;
    // Still in the accept queue.
    let queued = shutdown.connection_start().unwrap();
    drop(listener);
    sleep(ms(1)).await;
    assert_eq!(shutdown.connection_start().unwrap_err(), ShuttingDown);
    drop(queued);
    sleep(ms(2_490)).await;
    let last = shutdown.request_start().expect("the linger is not over");
    sleep(ms(20)).await;
    assert_eq!(shutdown.request_start().unwrap_err(), ShuttingDown);
    let idle = async {
        shutdown.requests_done().await;
        Instant::now()
    };
    let answered = async {
        sleep(ms(500)).await;
        drop(last);
        Instant::now()
    };
    let (idle, answered) = tokio::join!(idle, answered);
    assert_eq!(idle, answered, "idle connections are closed when the last request is answered");
    assert_eq!(shutdown.phase(), Phase::Draining);
    drop(connection);
    let (report, _) = finish(shutdown).await;
    assert_eq!((report.requests.drained, report.requests.refused, report.exit_code()), (1, 1, 0));
    assert_eq!((report.connections.open_at_start, report.connections.accepted), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn the_linger_ends_with_the_last_connection() {
    let shutdown = start(ShutdownCoordinator::builder());
    let connection = shutdown.connection_start().unwrap();
    tokio::spawn(async move {
        sleep(ms(300)).await;
        drop(connection);
    });
    let (report, took) = finish(shutdown).await;
    assert!(took >= ms(300) && took <= ms(302), "{took:?}");
    assert_eq!(report.exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_listener_without_a_connection_costs_no_linger() {
    let shutdown = start(ShutdownCoordinator::builder());
    let listener = shutdown.listener_start();
    tokio::spawn(async move {
        shutdown.draining().await;
        drop(listener);
    });
    let (report, took) = finish(shutdown).await;
    assert_eq!((took, report.exit_code()), (Duration::ZERO, 0));
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_never_closes_is_waited_for_no_longer_than_the_linger() {
    let shutdown = start(ShutdownCoordinator::builder());
    let _listener = shutdown.listener_start();
    let (report, took) = finish(shutdown).await;
    assert!(took >= ms(2500) && took <= ms(2505), "{took:?}");
    assert_eq!(report.exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_never_ends_is_cut_at_the_drains_deadline_with_its_route_and_age() {
    let builder = ShutdownCoordinator::builder().config(config(|config| config.graceful = ms(4000)));
    let shutdown = start(builder);
    let old = shutdown.request_start_named("GET /old").unwrap();
    sleep(ms(1000)).await;
    let young = shutdown.request_start_named("GET /young").unwrap();
    let nameless = shutdown.request_start().unwrap();
    let answered = shutdown.request_start_named("GET /answered").unwrap();
    let begin = Instant::now();
    shutdown.initiate_shutdown(reason());
    shutdown.until(Phase::Draining).await;
    drop(answered);
    shutdown.cut().await;
    let cut_after = begin.elapsed();
    assert!(cut_after >= ms(4000) && cut_after <= ms(4002), "{cut_after:?}");
    let (report, _) = finish(shutdown).await;
    assert_eq!((report.requests.cut, report.requests.drained, report.exit_code()), (3, 1, 11));
    let cut: Vec<_> =
        report.requests.cut_requests.iter().map(|cut| (&*cut.route, cut.age_ms.round())).collect();
    assert_eq!(cut, [("GET /old", 5000.0), ("GET /young", 4000.0)]);
    drop((old, young, nameless));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_never_closes_is_cut_and_is_no_clean_exit() {
    let builder = ShutdownCoordinator::builder().config(config(|config| config.graceful = ms(4000)));
    let shutdown = start(builder);
    let connection = shutdown.connection_start().unwrap();
    tokio::spawn(async move {
        shutdown.cut().await;
        drop(connection);
    });
    let (report, took) = finish(shutdown).await;
    assert_eq!((report.requests.cut, report.connections.cut, report.exit_code()), (0, 1, 11));
    assert!(took >= ms(4000) && took <= ms(4002), "what lets go when cut is not waited for: {took:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_cut_at_the_end_of_all_time_still_has_a_moment_to_fall_before_the_stages() {
    let log = Log::default();
    let shutdown = start(with_total(ms(2000)).stage_task(Stage::Cache, "flush", log.task("stage")));
    let connection = shutdown.connection_start().unwrap();
    tokio::spawn({
        let log = log.clone();
        async move {
            shutdown.cut().await;
            sleep(ms(20)).await;
            log.note("fell");
            drop(connection);
        }
    });
    let (report, _) = finish(shutdown).await;
    assert_eq!(log.all(), ["fell", "stage"]);
    assert_eq!((report.connections.cut, report.exit_code()), (1, 11));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_left_is_counted_as_gone_and_neither_as_drained_nor_cut() {
    let shutdown = start(ShutdownCoordinator::builder());
    let before = shutdown.request_start().unwrap();
    before.client_gone();
    drop(before);
    let left = shutdown.request_start_named("GET /slow").unwrap();
    let stayed = shutdown.request_start().unwrap();
    shutdown.initiate_shutdown(reason());
    shutdown.until(Phase::Draining).await;
    left.client_gone();
    drop((left, stayed));
    let (report, _) = finish(shutdown).await;
    let requests = &report.requests;
    assert_eq!((requests.client_gone, requests.drained, requests.cut), (1, 1, 0));
    assert_eq!((requests.in_flight_at_start, report.exit_code()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_request_refused_while_the_stages_run_is_counted_as_refused() {
    let shutdown = start(ShutdownCoordinator::builder().stage_task(Stage::Cache, "flush", |_| async {
        sleep(ms(100)).await;
        Ok(())
    }));
    shutdown.initiate_shutdown(reason());
    shutdown.until(Phase::Closing).await;
    assert_eq!(shutdown.request_start().unwrap_err(), ShuttingDown);
    let (report, _) = finish(shutdown).await;
    assert_eq!((report.requests.refused, report.exit_code()), (1, 0));
}

// Phases, reasons, callers.

#[tokio::test(start_paused = true)]
async fn phases_come_in_order_and_only_forward_and_a_late_subscriber_sees_where_it_stands() {
    let builder = ShutdownCoordinator::builder()
        .config(config(|config| config.lame_duck = ms(300)))
        .stage_task(Stage::Cache, "flush", |_| async {
            sleep(ms(200)).await;
            Ok(())
        });
    let shutdown = start(builder);
    let request = shutdown.request_start().unwrap();
    let mut phases = shutdown.subscribe();
    let mut seen = vec![*phases.borrow_and_update()];
    shutdown.initiate_shutdown(reason());
    tokio::spawn(async move {
        sleep(ms(400)).await;
        drop(request);
    });
    while *phases.borrow() != Phase::Stopped {
        phases.changed().await.unwrap();
        seen.push(*phases.borrow_and_update());
        assert_eq!(*shutdown.subscribe().borrow(), *seen.last().unwrap());
        assert_eq!(shutdown.phase(), *seen.last().unwrap());
    }
    assert_eq!(seen, Phase::ALL);
    let report = shutdown.finished().await;
    let spent: Vec<_> = report
        .phases
        .iter()
        .map(|phase| (phase.phase, phase.start_ms.round(), phase.end_ms.round()))
        .collect();
    let expected =
        [(Phase::LameDuck, 0.0, 300.0), (Phase::Draining, 300.0, 400.0), (Phase::Closing, 400.0, 600.0)];
    assert_eq!(spent, expected);
}

#[tokio::test(start_paused = true)]
async fn the_first_reason_wins() {
    let shutdown = start(Does::HearsItsToken.add(ShutdownCoordinator::builder(), Stage::Cache, "flush"));
    shutdown.initiate_shutdown(Reason::requested("first"));
    shutdown.initiate_shutdown(Reason::requested("second"));
    sleep(ms(1)).await;
    shutdown.terminate(Urgency::Graceful);
    let (report, _) = finish(shutdown).await;
    assert_eq!((&report.reason, report.urgency), (&Reason::requested("first"), Urgency::Graceful));
}

#[tokio::test(start_paused = true)]
async fn every_caller_gets_the_same_report_also_one_who_comes_late() {
    let (shutdown, driver) = ShutdownCoordinator::builder().build().unwrap();
    let driver = tokio::spawn(driver.run());
    let callers: Vec<_> = (0..20).map(|_| tokio::spawn(async move { shutdown.finished().await })).collect();
    let join = shutdown.join();
    shutdown.initiate_shutdown(reason());
    let joined = join.report().await;
    drop(join);
    let report = driver.await.unwrap();
    for caller in callers {
        assert!(Arc::ptr_eq(&caller.await.unwrap(), &report));
    }
    assert!(Arc::ptr_eq(&shutdown.finished().await, &report));
    assert!(Arc::ptr_eq(&joined, &report));
}

#[tokio::test(start_paused = true)]
async fn an_answer_on_its_way_holds_the_process_for_the_reports_reserve_and_no_longer() {
    let shutdown = start(ShutdownCoordinator::builder());
    let join = shutdown.join();
    let (_, took) = finish(shutdown).await;
    assert!(took >= REPORT_RESERVE && took <= REPORT_RESERVE + ms(2), "{took:?}");
    drop(join);

    let shutdown = start(ShutdownCoordinator::builder());
    let join = shutdown.join();
    let clone = join.clone();
    tokio::spawn(async move {
        clone.report().await;
        sleep(ms(30)).await;
        drop((join, clone));
    });
    let (_, took) = finish(shutdown).await;
    assert!(took >= ms(30) && took <= ms(32), "{took:?}");
}

// Urgency.

#[tokio::test(start_paused = true)]
async fn fast_skips_the_waits_and_leaves_every_stage_its_reserve() {
    let builder = ShutdownCoordinator::builder().config(config(|config| config.lame_duck = ms(5000)));
    let builder = Does::Hangs.add(builder, Stage::Cache, "flush");
    let shutdown = start(Does::Hangs.add(builder, Stage::Persist, "state"));
    let request = shutdown.request_start().unwrap();
    let begin = Instant::now();
    shutdown.terminate(Urgency::Fast);
    shutdown.cut().await;
    assert!(begin.elapsed() <= ms(2), "no lame duck, no drain: {:?}", begin.elapsed());
    drop(request);
    let report = shutdown.finished().await;
    assert!((stage(&report, "cache").budget_ms - 100.0).abs() <= TICK, "{report:?}");
    assert!((stage(&report, "persist").budget_ms - 500.0).abs() <= TICK, "{report:?}");
    assert_eq!((report.requests.cut, report.exit_code()), (1, 11));
    assert_eq!(
        (&report.reason, report.urgency),
        (&Reason::Terminate { urgency: Urgency::Fast }, Urgency::Fast)
    );
}

#[tokio::test(start_paused = true)]
async fn a_stage_that_runs_when_fast_is_asked_for_is_told_at_once_and_keeps_its_reserve() {
    let told = Arc::new(Mutex::new(None));
    let note = Arc::clone(&told);
    let shutdown =
        start(ShutdownCoordinator::builder().stage_task(Stage::Cache, "flush", |stage| async move {
            stage.token.cancelled().await;
            *note.lock() = Some(Instant::now());
            pending().await
        }));
    shutdown.initiate_shutdown(reason());
    sleep(ms(2000)).await;
    let asked = Instant::now();
    shutdown.terminate(Urgency::Fast);
    let report = shutdown.finished().await;
    assert_eq!(told.lock().unwrap(), asked);
    let took = asked.elapsed();
    assert!(took >= STAGE_RESERVE && took <= STAGE_RESERVE + ms(3), "{took:?}");
    assert_eq!((report.exit_code(), report.urgency), (10, Urgency::Fast));
}

#[tokio::test(start_paused = true)]
async fn immediate_runs_persist_and_nothing_else() {
    let log = Log::default();
    let mut builder = ShutdownCoordinator::builder();
    for stage in Stage::GIVEN {
        builder = builder.stage_task(stage, stage.name(), log.task(stage.name()));
    }
    let shutdown = start(builder);
    shutdown.spawn("sync", |_| pending::<()>()).unwrap();
    let begin = Instant::now();
    shutdown.terminate(Urgency::Immediate);
    let report = shutdown.finished().await;
    assert_eq!(log.all(), ["persist"]);
    assert_eq!(begin.elapsed(), Duration::ZERO);
    for stage in &report.stages {
        let expected = if stage.stage == "persist" { Outcome::Ok } else { Outcome::Skipped };
        assert_eq!(stage.outcome, expected, "{stage:?}");
    }
    assert_eq!(report.stages.len(), Stage::GIVEN.len());
}

#[tokio::test(start_paused = true)]
async fn urgency_only_rises() {
    let shutdown = start(Does::Hangs.add(ShutdownCoordinator::builder(), Stage::Persist, "state"));
    shutdown.terminate(Urgency::Immediate);
    shutdown.terminate(Urgency::Graceful);
    let begin = Instant::now();
    let report = shutdown.finished().await;
    assert_eq!(report.urgency, Urgency::Immediate);
    assert!(begin.elapsed() <= PERSIST_RESERVE + ms(3), "{:?}", begin.elapsed());
}

// All of it at once.

fn does() -> impl Strategy<Value = Does> {
    proptest::sample::select(Does::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_stage_however_it_ends_takes_a_later_ones_reserve_or_the_total(
        given in proptest::collection::vec((proptest::sample::select(Stage::GIVEN.to_vec()), does()), 0..12),
        total in 1600_u64..40_000,
        lame_duck in 0_u64..250,
        hung in any::<bool>(),
        hurry_after in proptest::option::of((0_u64..30_000, any::<bool>())),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut builder = ShutdownCoordinator::builder().config(config(|config| {
                config.total = ms(total);
                config.lame_duck = ms(lame_duck);
            }));
            for (stage, does) in &given {
                builder = does.add(builder, *stage, "task");
            }
            let shutdown = start(builder);
            let request = hung.then(|| shutdown.request_start().unwrap());
            if let Some((after, immediate)) = hurry_after {
                tokio::spawn(async move {
                    sleep(ms(after)).await;
                    shutdown.terminate(if immediate { Urgency::Immediate } else { Urgency::Fast });
                });
            }
            // Whoever asks first is the reason, so this is never later than the hurry.
            let (report, took) = finish(shutdown).await;
            prop_assert!(took <= ms(total + 20), "{took:?} of {total}");
            let mut lost = hung;
            for stage in &report.stages {
                let tasks: Vec<_> =
                    given.iter().filter(|(of, _)| of.name() == stage.stage).map(|(_, does)| *does).collect();
                prop_assert_eq!(tasks.len(), stage.tasks.len());
                if report.urgency == Urgency::Graceful {
                    let reserve = if stage.stage == "persist" { 500.0 } else { 100.0 };
                    prop_assert!(stage.budget_ms >= reserve - TICK, "{:?}", stage);
                    for (task, does) in stage.tasks.iter().zip(&tasks) {
                        prop_assert_eq!(task.outcome, does.outcome());
                    }
                } else if stage.stage == "persist" {
                    prop_assert!(stage.budget_ms >= 500.0 - TICK, "{:?}", stage);
                    prop_assert!(stage.outcome != Outcome::Skipped);
                }
                lost |= !matches!(stage.outcome, Outcome::Ok | Outcome::Skipped);
            }
            prop_assert_eq!(report.exit_code() == 0, !lost);
            drop(request);
            Ok(())
        })?;
    }
}

#[tokio::test(start_paused = true)]
async fn an_endless_loop_is_a_background_task_and_is_dropped_when_it_may_be_cancelled() {
    let (shutdown, driver) = ShutdownCoordinator::builder().build().unwrap();
    let run = tokio::spawn(driver.run());
    let beat = async {
        loop {
            sleep(Duration::from_secs(1)).await;
        }
    };
    shutdown.spawn_cancellable("heartbeat", beat).unwrap();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    let report = run.await.unwrap();
    assert_eq!((&*report.stages[0].tasks[0].name, report.exit_code()), ("heartbeat", 0));
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_and_not_cut_when_the_shutdown_hurries() {
    let shutdown = start(ShutdownCoordinator::builder());
    let idle = shutdown.connection_start().unwrap();
    tokio::spawn(async move {
        shutdown.requests_done().await;
        drop(idle);
    });
    shutdown.terminate(Urgency::Fast);
    let report = shutdown.finished().await;
    assert_eq!((report.connections.cut, report.exit_code()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_critical_task_that_fails_beside_another_reason_is_named_all_the_same() {
    let shutdown = start(ShutdownCoordinator::builder());
    shutdown.initiate_shutdown(reason());
    // Fails before the driver has taken up the reason.
    shutdown.spawn_critical("ledger", |_| async { Err::<(), _>("gone") }).unwrap();
    let report = shutdown.finished().await;
    assert_eq!(report.reason, reason());
    let ledger = &report.stages[0].tasks[0];
    assert_eq!((&*ledger.name, ledger.outcome, report.exit_code()), ("ledger", Outcome::Failed, 10));
}

#[test]
#[should_panic(expected = "there is no stage indx")]
fn a_stage_of_the_programs_own_is_not_put_after_one_that_is_not_there() {
    let _ = ShutdownCoordinator::builder().stage(Stage::Custom("indx"), "search", ms(100)).build();
}

#[test]
#[should_panic(expected = "there is a stage cache already")]
fn two_stages_never_share_a_name() {
    let _ = ShutdownCoordinator::builder().stage(Stage::Cache, "cache", ms(100)).build();
}
