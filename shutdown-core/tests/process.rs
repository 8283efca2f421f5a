//! The laws of `install()`, seen from outside: real processes, real signals, real time, each with a deadline.
//!
//! Handlers, watchdog and exit code belong to a process, so every test runs its subject in a child: the test binary
//! itself, started again with the test's own name. [`Child::start`] is where the two ways part: in the child it
//! calls the scenario and never returns.
#![cfg(all(unix, feature = "signals", feature = "files"))]
#![expect(clippy::unwrap_used, reason = "a test's helpers, like the test, fail by panicking")]

use std::cell::RefCell;
use std::future::pending;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use shutdown_core::{
    Builder, InstallError, Outcome, Phase, Reason, ShutdownConfig, ShutdownCoordinator, ShutdownReport,
    Signals, Stage, StageReport,
};
use support::default_signals;
use tokio::time::{Instant, sleep};

#[path = "support/signals.rs"]
mod support;

/// Set in the child: the directory that is its own.
const SCENARIO: &str = "SHUTDOWN_CORE_SCENARIO";
/// No scenario takes as long, however busy the machine.
const DEADLINE: Duration = Duration::from_secs(20);
/// How far a time may be off: the scheduler's, not ours.
const SLACK: Duration = Duration::from_millis(200);
/// What the watchdog may take to have the report written.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// Longer than the time in which the same signal counts once.
const NO_ECHO: Duration = Duration::from_millis(250);

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// The name of the test that calls it, as the test binary knows it.
macro_rules! this_test {
    () => {{
        fn here() {}
        let path = std::any::type_name_of_val(&here);
        path.split("::").nth(1).expect("a test is a function of this crate")
    }};
}

/// A process under test; killed when dropped.
struct Child {
    process: std::process::Child,
    lines: Receiver<String>,
    dir: tempfile::TempDir,
}

/// How a process ended.
struct Ended {
    code: Option<i32>,
    /// The report it printed.
    report: Option<ShutdownReport>,
    /// The directory that was its own.
    dir: tempfile::TempDir,
}

impl Child {
    /// Starts `scenario` in a process of its own. In that process it does not return.
    fn start(test: &str, scenario: fn(&Path) -> ShutdownReport) -> Self {
        Self::start_with(test, scenario, Command::new)
    }

    fn start_with(
        test: &str,
        scenario: fn(&Path) -> ShutdownReport,
        command: impl FnOnce(PathBuf) -> Command,
    ) -> Self {
        if let Some(dir) = std::env::var_os(SCENARIO) {
            let report = scenario(Path::new(&dir));
            println!("report {}", serde_json::to_string(&report).unwrap());
            report.exit();
        }
        default_signals();
        // In memory where there is such a place: the last report has 100 ms, and a disk that others use may take longer.
        let memory = tempfile::tempdir_in("/dev/shm");
        let dir = memory.or_else(|_| tempfile::tempdir()).unwrap();
        let mut process = command(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(SCENARIO, dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (send, lines) = channel();
        let stdout = BufReader::new(process.stdout.take().expect("piped above"));
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        Self { process, lines, dir }
    }

    /// Waits until the child has printed `line`.
    fn until(&self, line: &str) {
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok(said) if said.ends_with(line) => return,
                Ok(_) => {}
                Err(error) => panic!("the child has not said {line:?}: {error}"),
            }
        }
    }

    /// Waits for this long, in which the child must live and say nothing.
    fn is_quiet_for(&self, time: Duration) {
        assert_eq!(self.lines.recv_timeout(time), Err(RecvTimeoutError::Timeout));
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Waits for the end.
    fn ended(mut self) -> Ended {
        let mut report = None;
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok(line) => {
                    // The test harness may have begun the line.
                    if let Some(start) = line.find("report {") {
                        report = Some(serde_json::from_str(&line[start + "report ".len()..]).unwrap());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("the child is still there"),
            }
        }
        let code = self.process.wait().unwrap().code();
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        Ended { code, report, dir }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It has ended already, unless the test failed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Ended {
    /// The report it printed, which its exit code must agree with.
    fn report(&self) -> &ShutdownReport {
        let report = self.report.as_ref().expect("it printed a report");
        assert_eq!(self.code, Some(i32::from(report.exit_code())));
        report
    }

    /// The report on disk.
    fn last(&self) -> ShutdownReport {
        let files = shutdown_core::ReportFiles::new(self.dir.path());
        let history = std::fs::read_to_string(files.history()).unwrap();
        let last: ShutdownReport = serde_json::from_slice(&std::fs::read(files.last()).unwrap()).unwrap();
        assert_eq!(serde_json::from_str::<ShutdownReport>(history.lines().last().unwrap()).unwrap(), last);
        last
    }
}

// What the scenarios are made of.

fn say(line: impl std::fmt::Display) {
    println!("{line}");
}

fn builder(dir: &Path, total: Duration) -> Builder {
    let mut config = ShutdownConfig::default();
    config.total = total;
    ShutdownCoordinator::builder().config(config).report_dir(dir)
}

/// Says `signals n` whenever a signal was counted, from a thread that nothing else uses.
fn say_signals(shutdown: ShutdownCoordinator) {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut said = 0;
            loop {
                let signals = shutdown.snapshot().signals;
                if signals != said {
                    said = signals;
                    say(format_args!("signals {said}"));
                }
                sleep(ms(2)).await;
            }
        });
    });
}

/// Blocks the calling thread for ever.
fn block() {
    let (keep, never) = channel::<()>();
    let _ = never.recv();
    drop(keep);
}

fn ready_and_wait(shutdown: ShutdownCoordinator) -> ShutdownReport {
    say_signals(shutdown);
    say("ready");
    (*shutdown.wait()).clone()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn stage<'a>(report: &'a ShutdownReport, name: &str) -> &'a StageReport {
    report.stages.iter().find(|stage| stage.stage == name).expect("the stage had something to do")
}

fn ends(report: &ShutdownReport, of: &str) -> Vec<(String, Outcome)> {
    stage(report, of).tasks.iter().map(|task| (task.name.to_string(), task.outcome)).collect()
}

fn took_about(report: &ShutdownReport, expected: Duration) {
    let off = (report.duration_ms - expected.as_secs_f64() * 1000.0).abs();
    assert!(off <= SLACK.as_secs_f64() * 1000.0, "{} ms instead of {expected:?}", report.duration_ms);
}

// Signals.

#[test]
fn a_stop_signal_between_claim_and_install_leaves_at_once_with_its_number() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::QUIT, 131), (Signal::HUP, 129)] {
        let child = Child::start(this_test!(), |_| {
            let _signals = Signals::claim_with(&Signals::QUIT_AND_HUP).unwrap();
            say("claimed");
            block();
            unreachable!("it blocks for ever")
        });
        child.until("claimed");
        child.signal(signal);
        assert_eq!(child.ended().code, Some(code));
    }
}

#[test]
fn a_stop_signal_begins_the_shutdown_and_is_named_with_its_sender() {
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT"), (Signal::HUP, "SIGHUP")] {
        let child = Child::start(this_test!(), |dir| {
            let signals = Signals::claim_with(&Signals::QUIT_AND_HUP).unwrap();
            ready_and_wait(builder(dir, ms(5000)).signals(signals).install().unwrap())
        });
        child.until("ready");
        child.signal(signal);
        let ended = child.ended();
        let report = ended.report();
        assert_eq!(ended.code, Some(0));
        let Reason::Signal(received) = &report.reason else { panic!("{:?}", report.reason) };
        assert_eq!((&*received.signal, received.number), (name, signal.as_raw()));
        assert_eq!(received.pid, Some(i32::try_from(std::process::id()).unwrap()));
        assert_eq!(received.uid, Some(rustix::process::getuid().as_raw()));
        assert_eq!((report.signals.len(), report.forced_by), (1, None));
        assert_eq!(&ended.last(), report);
    }
}

#[test]
fn a_second_signal_skips_the_waits_keeps_the_reserves_and_is_the_exit_code() {
    let child = Child::start(this_test!(), |dir| {
        let builder = builder(dir, ms(28_000)).stage_task(Stage::Persist, "state", |_| async {
            sleep(ms(100)).await;
            Ok(())
        });
        let shutdown = builder.install().unwrap();
        let request = shutdown.request_start_named("GET /never").unwrap();
        let report = ready_and_wait(shutdown);
        drop(request);
        report
    });
    child.until("ready");
    child.signal(Signal::TERM);
    child.until("signals 1");
    child.is_quiet_for(NO_ECHO);
    child.signal(Signal::TERM);
    let ended = child.ended();
    let report = ended.report();
    assert_eq!((ended.code, report.forced_by), (Some(143), Some(15)));
    assert_eq!((report.signals.len(), report.requests.cut), (2, 1));
    assert_eq!(ends(report, "persist"), [("state".to_owned(), Outcome::Ok)]);
    assert!(report.duration_ms < 2000.0, "{}", report.duration_ms);
    assert_eq!(&ended.last(), report);
}

#[test]
fn the_same_signal_within_200_ms_counts_once_and_another_one_counts() {
    let child = Child::start(this_test!(), |dir| {
        let shutdown = builder(dir, ms(28_000)).install().unwrap();
        let request = shutdown.request_start().unwrap();
        let report = ready_and_wait(shutdown);
        drop(request);
        report
    });
    child.until("ready");
    child.signal(Signal::TERM);
    child.signal(Signal::TERM);
    child.until("signals 1");
    child.signal(Signal::TERM);
    child.is_quiet_for(NO_ECHO);
    child.signal(Signal::INT);
    child.until("signals 2");
    let ended = child.ended();
    assert_eq!((ended.code, ended.report().signals.len()), (Some(130), 2));
}

/// The driver's thread is stuck, so only the handler can have left.
fn stuck_driver(dir: &Path, total: Duration) -> ShutdownReport {
    let builder = builder(dir, total).stage_task(Stage::Persist, "state", |_| async { Ok(()) });
    let shutdown = builder.install().unwrap();
    shutdown.own_runtime().unwrap().spawn(async move {
        shutdown.until(Phase::LameDuck).await;
        block();
    });
    // Held, so that the shutdown cannot be over before the driver is stuck.
    let request = shutdown.request_start();
    let report = ready_and_wait(shutdown);
    drop(request);
    report
}

#[test]
fn the_third_signal_leaves_from_its_handler_though_the_driver_is_stuck() {
    for (third, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let child = Child::start(this_test!(), |dir| stuck_driver(dir, ms(28_000)));
        child.until("ready");
        child.signal(Signal::TERM);
        child.until("signals 1");
        child.is_quiet_for(NO_ECHO);
        child.signal(Signal::TERM);
        child.until("signals 2");
        if third == Signal::TERM {
            child.is_quiet_for(NO_ECHO);
        }
        let sent = Instant::now();
        child.signal(third);
        let ended = child.ended();
        assert!(sent.elapsed() < ms(1000), "{:?}", sent.elapsed());
        assert_eq!((ended.code, ended.report.is_none()), (Some(code), true));
    }
}

#[test]
fn a_signal_that_was_ignored_at_start_is_left_alone() {
    let child = Child::start_with(
        this_test!(),
        |dir| {
            let signals = Signals::claim().unwrap();
            say(format_args!("claimed {:?}", signals.numbers().collect::<Vec<_>>()));
            ready_and_wait(builder(dir, ms(5000)).signals(signals).install().unwrap())
        },
        |exe| {
            let mut command = Command::new("sh");
            command.args(["-c", r#"trap "" TERM; exec "$0" "$@""#]).arg(exe);
            command
        },
    );
    child.until("claimed [2]");
    child.until("ready");
    child.signal(Signal::TERM);
    child.is_quiet_for(NO_ECHO);
    child.signal(Signal::INT);
    let ended = child.ended();
    assert_eq!((ended.code, ended.report().signals.len()), (Some(0), 1));
}

// Installing.

#[test]
fn there_is_one_coordinator_a_process_and_a_refused_plan_is_none() {
    let child = Child::start(this_test!(), |dir| {
        let impossible = builder(dir, ms(100)).install().unwrap_err();
        assert!(matches!(impossible, InstallError::Plan(_)), "{impossible:?}");
        let first = builder(dir, ms(5000)).install().unwrap();
        let second = builder(dir, ms(5000)).install().unwrap_err();
        assert!(matches!(second, InstallError::AlreadyInstalled(_)), "{second:?}");
        say("refused");
        first.initiate_shutdown(Reason::requested("the first one"));
        (*first.wait()).clone()
    });
    child.until("refused");
    assert_eq!(child.ended().report().exit_code(), 0);
}

#[test]
fn a_plain_main_without_a_runtime_has_stages_and_background_tasks() {
    let child = Child::start(this_test!(), |dir| {
        let shutdown = builder(dir, ms(5000))
            .stage_task(Stage::Cache, "flush", |_| async {
                sleep(ms(20)).await;
                Ok(())
            })
            .install()
            .unwrap();
        shutdown.spawn("sync", |token| async move { token.cancelled().await }).unwrap();
        ready_and_wait(shutdown)
    });
    child.until("ready");
    child.signal(Signal::TERM);
    let ended = child.ended();
    assert_eq!(ends(ended.report(), "background"), [("sync".to_owned(), Outcome::Ok)]);
    assert_eq!(ends(ended.report(), "cache"), [("flush".to_owned(), Outcome::Ok)]);
    assert_eq!(ended.code, Some(0));
}

#[test]
fn the_report_says_how_long_it_really_took() {
    let child = Child::start(this_test!(), |dir| {
        let builder = builder(dir, ms(5000)).stage_task(Stage::Cache, "flush", |_| async {
            sleep(ms(300)).await;
            Ok(())
        });
        let shutdown = builder.install().unwrap();
        // The report is known before it is written; how long the disk takes is not its matter.
        let off = runtime().block_on(async {
            let join = shutdown.join();
            let begin = Instant::now();
            kill_process(rustix::process::getpid(), Signal::TERM).unwrap();
            let report = join.report().await;
            begin.elapsed().as_secs_f64() * 1000.0 - report.duration_ms
        });
        say(format_args!("off by {off} ms"));
        say(if (0.0..=50.0).contains(&off) { "the report agrees" } else { "the report lies" });
        (*shutdown.wait()).clone()
    });
    child.until("the report agrees");
    let ended = child.ended();
    assert!(ended.report().duration_ms >= 300.0);
}

// Stages that block, and the watchdog.

#[test]
fn a_stage_that_blocks_its_thread_starves_nobody_and_the_total_holds() {
    let child = Child::start(this_test!(), |dir| {
        let shutdown = builder(dir, ms(2000))
            .stage_task(Stage::Cache, "blocks", |_| async {
                block();
                Ok(())
            })
            .stage_task(Stage::Cache, "beside", |_| async { Ok(()) })
            .stage_task(Stage::Database, "blocks, too", |_| {
                block();
                async { Ok(()) }
            })
            .stage_task(Stage::Persist, "state", |_| async {
                sleep(ms(400)).await;
                Ok(())
            })
            .install()
            .unwrap();
        // Also in the service's runtime, though it has one worker only.
        let runtime = runtime();
        let report =
            runtime.block_on(async { tokio::task::spawn_blocking(move || ready_and_wait(shutdown)).await });
        drop(runtime);
        report.unwrap()
    });
    child.until("ready");
    child.signal(Signal::TERM);
    let ended = child.ended();
    let report = ended.report();
    assert_eq!(
        ends(report, "cache"),
        [("blocks".to_owned(), Outcome::TimedOut), ("beside".to_owned(), Outcome::Ok)]
    );
    assert_eq!(
        stage(report, "cache").tasks[0].detail.as_deref(),
        Some("it blocks its thread and was left behind")
    );
    assert_eq!(stage(report, "database").outcome, Outcome::TimedOut);
    assert!(stage(report, "database").budget_ms >= 60.0, "{report:?}");
    assert!(stage(report, "persist").budget_ms >= 440.0, "{report:?}");
    assert_eq!(stage(report, "persist").outcome, Outcome::Ok);
    // The last stage needs 400 ms of its 500.
    took_about(report, ms(2000 - 250 - 100));
    assert_eq!((ended.code, report.watchdog), (Some(10), false));
}

#[test]
fn an_exit_that_hangs_is_ended_by_the_watchdog_at_the_total() {
    /// Dropped while the process exits, as a destructor registered with `atexit` would be.
    struct Hangs;
    impl Drop for Hangs {
        fn drop(&mut self) {
            say("hangs");
            block();
        }
    }
    thread_local! {
        static HANGS: RefCell<Option<Hangs>> = const { RefCell::new(None) };
    }
    let child = Child::start(this_test!(), |dir| {
        HANGS.set(Some(Hangs));
        ready_and_wait(builder(dir, ms(1500)).install().unwrap())
    });
    child.until("ready");
    let begin = Instant::now();
    child.signal(Signal::TERM);
    child.until("hangs");
    assert!(begin.elapsed() < ms(1000), "the shutdown itself is quick: {:?}", begin.elapsed());
    let ended = child.ended();
    let took = begin.elapsed();
    assert!(took >= ms(1500) - SLACK && took <= ms(1500) + LAST_WORDS + SLACK, "{took:?}");
    let last = ended.last();
    assert_eq!((ended.code, last.exit_code, last.watchdog), (Some(10), 10, true));
}

#[test]
fn a_stuck_driver_is_ended_by_the_watchdog_at_the_total_with_a_report() {
    let child = Child::start(this_test!(), |dir| stuck_driver(dir, ms(1500)));
    child.until("ready");
    let begin = Instant::now();
    child.signal(Signal::TERM);
    let ended = child.ended();
    let took = begin.elapsed();
    assert!(took >= ms(1500) - SLACK && took <= ms(1500) + LAST_WORDS + SLACK, "{took:?}");
    let last = ended.last();
    // The request it held goes down with it, and the report says so.
    assert_eq!((ended.code, last.exit_code, last.watchdog), (Some(11), 11, true));
    assert_eq!(last.requests.cut, 1);
    took_about(&last, ms(1500));
    assert_eq!(ends(&last, "persist"), [("state".to_owned(), Outcome::Skipped)]);
    assert!(matches!(last.reason, Reason::Signal(_)));
}

// A runtime that is dropped too early.

#[test]
fn what_ran_on_a_runtime_that_was_dropped_is_named_and_the_later_stages_run() {
    let child = Child::start(this_test!(), |dir| {
        let runtime = runtime();
        let shutdown = runtime.block_on(async {
            let shutdown = builder(dir, ms(10_000))
                .stage_task(Stage::Background, "pool", |_| {
                    say("stage begins");
                    pending()
                })
                .stage_task(Stage::Cache, "flush", |_| async { Ok(()) })
                .stage_task(Stage::Persist, "state", |_| async {
                    sleep(ms(20)).await;
                    Ok(())
                })
                .install()
                .unwrap();
            shutdown.spawn("sync", |_| pending::<()>()).unwrap();
            shutdown.initiate_shutdown(Reason::requested("an early return"));
            shutdown.until(Phase::Closing).await;
            // One more turn: the stage has its task on the runtime.
            sleep(ms(50)).await;
            shutdown
        });
        drop(runtime);
        (*shutdown.wait()).clone()
    });
    let ended = child.ended();
    let report = ended.report();
    let gone = Outcome::RuntimeGone;
    assert_eq!(ends(report, "background"), [("pool".to_owned(), gone), ("sync".to_owned(), gone)]);
    assert_eq!(stage(report, "cache").outcome, Outcome::Ok);
    assert_eq!(stage(report, "persist").outcome, Outcome::Ok);
    assert!(report.duration_ms < 5000.0, "nobody waits for what is gone: {}", report.duration_ms);
    assert_eq!(ended.code, Some(10));
}

#[test]
fn a_background_task_whose_runtime_goes_during_the_drain_is_named() {
    let child = Child::start(this_test!(), |dir| {
        let runtime = runtime();
        let (shutdown, request) = runtime.block_on(async {
            let shutdown = builder(dir, ms(10_000)).install().unwrap();
            shutdown.spawn("sync", |_| pending::<()>()).unwrap();
            let request = shutdown.request_start().unwrap();
            shutdown.initiate_shutdown(Reason::requested("an early return"));
            shutdown.until(Phase::Draining).await;
            (shutdown, request)
        });
        drop(runtime);
        drop(request);
        (*shutdown.wait()).clone()
    });
    let ended = child.ended();
    assert_eq!(ends(ended.report(), "background"), [("sync".to_owned(), Outcome::RuntimeGone)]);
    assert_eq!(ended.code, Some(10));
}

/// A place whose save at the reason does not end before it is let go.
#[cfg(feature = "state")]
struct SlowDisk {
    saves: std::sync::atomic::AtomicU32,
    let_go: parking_lot::Mutex<Receiver<()>>,
}

#[cfg(feature = "state")]
impl shutdown_core::state::StateBackend for SlowDisk {
    fn open(
        &self,
        _: u64,
    ) -> Result<Vec<shutdown_core::state::Generation>, shutdown_core::state::StateError> {
        Ok(Vec::new())
    }

    fn save(&self, _: &[u8]) -> Result<(), shutdown_core::state::StateError> {
        match self.saves.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            0 => say("saved at the start"),
            1 => {
                say("saving at the reason");
                self.let_go.lock().recv().unwrap();
                say("saved at the reason");
            }
            _ => say("saved in stage persist"),
        }
        Ok(())
    }

    fn set_aside(&self, _: usize, _: u64) -> Result<Option<String>, shutdown_core::state::StateError> {
        Ok(None)
    }

    fn place(&self) -> std::borrow::Cow<'_, str> {
        "a slow disk".into()
    }
}

#[cfg(feature = "state")]
#[test]
fn a_save_at_the_reason_that_hangs_holds_up_neither_the_drain_nor_a_stage_before_persist() {
    let child = Child::start(this_test!(), |dir| {
        let (release, let_go) = channel();
        let disk = SlowDisk { saves: 0.into(), let_go: parking_lot::Mutex::new(let_go) };
        let shutdown = builder(dir, ms(10_000))
            .state(shutdown_core::state::StateStore::new(disk))
            .before(Stage::Persist, "held up", |_| async {
                // Hooks cannot hold up the state.
                pending::<()>().await;
                Ok(())
            })
            .stage_task(Stage::Companions, "letting go", move |_| async move {
                say("the last stage before persist");
                release.send(()).unwrap();
                Ok(())
            })
            .install()
            .unwrap();
        let request = shutdown.request_start().unwrap();
        std::thread::spawn(move || {
            // The save at the reason begins within this time.
            runtime().block_on(async {
                shutdown.until(Phase::Draining).await;
                sleep(ms(300)).await;
            });
            drop(request);
        });
        ready_and_wait(shutdown)
    });
    child.until("saved at the start");
    child.until("ready");
    child.signal(Signal::TERM);
    child.until("saving at the reason");
    child.until("the last stage before persist");
    child.until("saved at the reason");
    child.until("saved in stage persist");
    let ended = child.ended();
    let report = ended.report();
    assert_eq!((report.exit_code, report.requests.drained), (10, 1));
    assert_eq!(
        ends(report, "persist"),
        [("state".to_owned(), Outcome::Ok), ("before held up".to_owned(), Outcome::TimedOut)]
    );
}
