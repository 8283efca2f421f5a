//! The laws of companions, with real processes: coreutils' `sleep` under names of its own, shells that trap signals.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test's helpers, like the test, fail by panicking")]

use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use shutdown_core::companions::{
    Companion, Companions, Ending, Launch, OnExit, PidFile, PidFileKind, Refusal, StopSignal,
};
use shutdown_core::{
    Outcome, Phase, Reason, ShutdownConfig, ShutdownCoordinator, ShutdownReport, TaskNote, TaskReport,
    Urgency,
};
use support::default_signals;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

#[path = "support/signals.rs"]
mod support;

const LONG: Duration = Duration::from_secs(20);

/// A directory with programs of the test's own names.
struct Lab {
    dir: TempDir,
}

impl Lab {
    fn new() -> Self {
        default_signals();
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A program of this name that sleeps: coreutils' own, copied.
    fn sleeper(&self, name: &str) -> Running {
        let program = self.at(name);
        if !program.exists() {
            install(Path::new("/bin/sleep"), &program);
        }
        Running::start(Command::new(program).arg("300"))
    }

    /// A program of this name that is a shell script: `$1` is a directory for what it writes down.
    fn script(&self, name: &str, script: &str) -> Running {
        Running::start(Command::new(self.write_script(name, script)).arg(self.dir.path()))
    }

    fn write_script(&self, name: &str, script: &str) -> PathBuf {
        let program = self.at(name);
        if !program.exists() {
            std::fs::write(self.at("script"), format!("#!/bin/bash\n{script}\n")).unwrap();
            install(&self.at("script"), &program);
        }
        program
    }

    fn pid_file(&self, name: &str, content: impl ToString) -> PidFile {
        std::fs::write(self.at(name), content.to_string()).unwrap();
        PidFile::new(self.at(name), PidFileKind::Plain)
    }

    /// What has been written down, once there is that much of it.
    async fn read(&self, name: &str, lines: usize) -> Vec<String> {
        let until = Instant::now() + LONG;
        loop {
            let text = std::fs::read_to_string(self.at(name)).unwrap_or_default();
            let read: Vec<_> = text.lines().map(ToOwned::to_owned).collect();
            if read.len() >= lines {
                return read;
            }
            assert!(Instant::now() < until, "{name} has {read:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Makes a program, by another process: a file that this one had open for writing could not be run while another test
/// starts a process, which has it open until its exec (ETXTBSY).
fn install(from: &Path, to: &Path) {
    assert!(Command::new("install").arg("-m755").args([from, to]).status().unwrap().success());
}

/// A process that is killed with its handle, and everything in its group.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).process_group(0).spawn().unwrap())
    }

    fn id(&self) -> u32 {
        self.0.id()
    }

    /// Stops it, and waits until it has stopped: a signal that came sooner would still end it.
    async fn freeze(&self) {
        kill_process(pid(self.id()), Signal::STOP).unwrap();
        while state(self.id()) != Some('T') {
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process_group(pid(self.id()), Signal::KILL);
        let _ = self.0.wait();
    }
}

fn pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

/// Whether there is a process of this number that has not ended.
fn is_alive(pid: u32) -> bool {
    state(pid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

async fn gone(pid: u32) {
    let until = Instant::now() + LONG;
    while is_alive(pid) {
        assert!(Instant::now() < until, "process {pid} has not ended");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A service with these companions, whose driver runs.
fn service(companions: &Companions, config: impl FnOnce(&mut ShutdownConfig)) -> ShutdownCoordinator {
    let mut budgets = ShutdownConfig::default();
    config(&mut budgets);
    let builder = ShutdownCoordinator::builder().config(budgets).companions(companions);
    let (shutdown, driver) = builder.build().unwrap();
    tokio::spawn(driver.run());
    shutdown
}

async fn finish(shutdown: ShutdownCoordinator) -> Arc<ShutdownReport> {
    shutdown.initiate_shutdown(Reason::requested("a test"));
    timeout(LONG * 2, shutdown.finished()).await.expect("a shutdown ends within its total")
}

/// Ends one companion: its task in the report, and its note.
async fn end(companion: Companion) -> (TaskReport, TaskNote) {
    let report = finish(service(&Companions::new([companion]), |_| ())).await;
    let (task, note) = one(&report);
    assert_eq!(report.exit_code, if task.outcome == Outcome::Ok { 0 } else { 10 });
    (task, note)
}

fn tasks(report: &ShutdownReport) -> &[TaskReport] {
    &report.stages.iter().find(|stage| stage.stage == "companions").expect("there are companions").tasks
}

fn one(report: &ShutdownReport) -> (TaskReport, TaskNote) {
    let [task] = tasks(report) else { panic!("{report:?}") };
    (task.clone(), task.notes[0].clone())
}

#[tokio::test]
async fn a_companion_that_hears_the_first_signal_has_exited() {
    let lab = Lab::new();
    let mut running = lab.sleeper("pgbouncer");
    let file = lab.pid_file("pid", format!("{}\n", running.id()));
    let (task, note) = end(Companion::with_pid_file("pgbouncer", file)).await;
    assert_eq!((task.outcome, &*note.subject, &*note.outcome), (Outcome::Ok, "pgbouncer", "exited"));
    assert_eq!((note.numbers["signal"], note.numbers["signals"]), (15.0, 1.0));
    assert_eq!(note.numbers["pid"], f64::from(running.id()));
    assert!(!running.is_alive());
    assert!(!lab.at("pid").exists(), "it could not remove its PID file, so that is done for it");
}

#[tokio::test]
async fn one_that_ignores_the_first_signal_gets_the_next_when_its_time_is_over() {
    let lab = Lab::new();
    // What is ignored stays ignored over exec.
    let mut running = Running::start(Command::new("bash").args(["-c", "trap '' TERM; exec sleep 300"]));
    while !is_called(running.id(), "sleep") {
        sleep(Duration::from_millis(5)).await;
    }
    let file = lab.pid_file("pid", running.id());
    let companion = Companion::with_pid_file("sleep", file).ladder("TERM:400ms/INT:5s".parse().unwrap());
    let began = Instant::now();
    let (task, note) = end(companion).await;
    assert_eq!((task.outcome, &*note.outcome), (Outcome::Ok, "escalated"));
    assert_eq!((note.numbers["signal"], note.numbers["signals"]), (2.0, 2.0));
    assert!((400..5000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    assert!(!running.is_alive());
}

fn is_called(pid: u32, name: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name)
}

#[tokio::test]
async fn one_that_ignores_everything_has_timed_out_and_the_exit_code_is_10() {
    let lab = Lab::new();
    let running = Running::start(Command::new("bash").args(["-c", "trap '' TERM INT; exec sleep 300"]));
    while !is_called(running.id(), "sleep") {
        sleep(Duration::from_millis(5)).await;
    }
    let file = lab.pid_file("pid", running.id());
    let companion = Companion::with_pid_file("sleep", file).ladder("TERM:100ms/INT:100ms".parse().unwrap());
    let (task, note) = end(companion).await;
    assert_eq!((task.outcome, &*note.outcome), (Outcome::Failed, "timed out"));
    assert!(task.detail.unwrap().contains(&format!("process {} still runs", running.id())));
    assert!(is_alive(running.id()) && lab.at("pid").exists());
}

#[tokio::test]
async fn a_stopped_process_is_killed() {
    let lab = Lab::new();
    let mut running = lab.sleeper("redis-server");
    running.freeze().await;
    let file = lab.pid_file("pid", running.id());
    let companion =
        Companion::with_pid_file("redis-server", file).ladder("TERM:100ms/KILL:5s".parse().unwrap());
    let (_, note) = end(companion).await;
    assert_eq!((&*note.outcome, note.numbers["signal"]), ("escalated", 9.0));
    assert!(!running.is_alive());
}

#[tokio::test]
async fn what_says_no_process_that_could_be_the_companion_is_refused_and_nobody_is_signalled() {
    let lab = Lab::new();
    let mut stranger = lab.sleeper("stranger");
    let parent = rustix::process::getppid().unwrap().as_raw_nonzero().to_string();
    let cases = [
        ("0\n".to_owned(), "says 0"),
        ("-1\n".to_owned(), "negative"),
        (format!("-{}\n", stranger.id()), "negative"),
        ("1\n".to_owned(), "says 1"),
        (std::process::id().to_string(), "this service itself"),
        (parent, "this service itself, or its parent"),
        (String::new(), "is empty"),
        ("pgbouncer\n".to_owned(), "something else than a number"),
        (format!("{} {}", stranger.id(), stranger.id()), "something else than a number"),
        ("99999999".to_owned(), "larger"),
        (stranger.id().to_string(), "is called stranger"),
    ];
    for (content, why) in cases {
        let file = lab.pid_file("pid", &content);
        let (task, note) = end(Companion::with_pid_file("pgbouncer", file)).await;
        assert_eq!((task.outcome, &*note.outcome), (Outcome::Failed, "refused"), "{content:?}");
        let detail = task.detail.unwrap();
        assert!(detail.contains(why) && detail.contains("no signal was sent"), "{content:?}: {detail}");
        assert_eq!(std::fs::read_to_string(lab.at("pid")).unwrap(), content, "left as it is");
    }
    assert!(stranger.is_alive());
}

#[tokio::test]
async fn a_look_alike_is_nobodys_companion() {
    let lab = Lab::new();
    let mut exporter = lab.sleeper("pgbouncer_exporter");
    let file = lab.pid_file("pid", exporter.id());
    let (task, _) = end(Companion::with_pid_file("pgbouncer", file.clone()).find_by_name()).await;
    // Refused by the file, and nobody is called so.
    assert_eq!(task.outcome, Outcome::Ok, "{task:?}");
    assert_eq!(task.notes[0].outcome, "not running");
    let (task, _) = end(Companion::with_pid_file("pgbouncer_expo", file.clone())).await;
    assert_eq!(task.notes[0].outcome, "refused");
    assert!(exporter.is_alive());
    let (task, _) = end(Companion::with_pid_file("pgbouncer_exporter", file)).await;
    assert_eq!(task.notes[0].outcome, "exited", "{task:?}");
}

#[tokio::test]
async fn a_process_that_is_younger_than_its_pid_file_is_another_one() {
    let lab = Lab::new();
    let mut running = lab.sleeper("pgbouncer");
    let file = lab.pid_file("pid", running.id());
    let written = std::fs::File::options().write(true).open(lab.at("pid")).unwrap();
    written.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
    let (task, _) = end(Companion::with_pid_file("pgbouncer", file)).await;
    assert_eq!(task.notes[0].outcome, "refused");
    assert!(task.detail.unwrap().contains("after its PID file was written"));
    assert!(running.is_alive());
}

#[tokio::test]
async fn a_file_that_anybody_could_have_made_is_refused() {
    let lab = Lab::new();
    let mut running = lab.sleeper("pgbouncer");
    lab.pid_file("real", running.id());
    symlink(lab.at("real"), lab.at("link")).unwrap();
    let open = lab.pid_file("open", running.id());
    std::fs::set_permissions(lab.at("open"), std::os::unix::fs::PermissionsExt::from_mode(0o622)).unwrap();
    for file in [PidFile::new(lab.at("link"), PidFileKind::Plain), open] {
        let (task, note) = end(Companion::with_pid_file("pgbouncer", file)).await;
        assert_eq!(note.outcome, "refused", "{task:?}");
    }
    if rustix::process::geteuid().is_root() {
        let foreign = lab.pid_file("foreign", running.id());
        std::os::unix::fs::chown(lab.at("foreign"), Some(12345), None).unwrap();
        let (task, note) = end(Companion::with_pid_file("pgbouncer", foreign)).await;
        assert_eq!(note.outcome, "refused", "{task:?}");
        assert!(task.detail.unwrap().contains("belongs to user 12345"));
    }
    assert!(running.is_alive());
}

#[tokio::test]
async fn what_is_not_running_is_no_failure() {
    let lab = Lab::new();
    let mut ended = Running::start(&mut Command::new("true"));
    let number = ended.id();
    while is_alive(number) {
        sleep(Duration::from_millis(5)).await;
    }
    let file = lab.pid_file("zombie", number);
    let (task, note) = end(Companion::with_pid_file("true", file)).await;
    assert_eq!((task.outcome, &*note.outcome), (Outcome::Ok, "not running"), "a zombie");
    ended.0.wait().unwrap();
    let file = lab.pid_file("stale", number);
    let (task, note) = end(Companion::with_pid_file("true", file)).await;
    assert_eq!((task.outcome, &*note.outcome), (Outcome::Ok, "not running"), "a stale file");
    assert!(lab.at("stale").exists(), "nobody of ours: left as it is");
    // A thread has it now, which is no process.
    let (tell, told) = std::sync::mpsc::channel();
    let (end_it, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_nonzero()).unwrap();
        let _ = ended.recv();
    });
    let file = lab.pid_file("thread", told.recv().unwrap());
    let (task, note) = end(Companion::with_pid_file("pgbouncer", file)).await;
    assert_eq!((task.outcome, &*note.outcome), (Outcome::Ok, "not running"), "a thread's number");
    drop(end_it);
    thread.join().unwrap();
    let missing = PidFile::new(lab.at("no/pid"), PidFileKind::Plain);
    let (_, note) = end(Companion::with_pid_file("true", missing)).await;
    assert_eq!(note.outcome, "not running", "no directory");
    let unheld = PidFile::new(lab.at("stale"), PidFileKind::Locked);
    let (_, note) = end(Companion::with_pid_file("true", unheld)).await;
    assert_eq!(note.outcome, "not running", "nobody holds the lock");
}

#[tokio::test]
async fn who_holds_the_lock_of_its_pid_file_is_ended_and_the_file_stays() {
    let lab = Lab::new();
    // As `flock` does it: the shell holds the lock.
    let mut proxy = lab.script(
        "local_proxy",
        "exec 9>>$1/lp.pid; flock -n 9 || exit 3; echo $$ >&9; exec 8>$1/ready; echo up >&8; \
         trap 'exit 0' TERM; while :; do sleep 300 & wait; done",
    );
    lab.read("ready", 1).await;
    let file = PidFile::new(lab.at("lp.pid"), PidFileKind::Locked);
    let (task, note) = end(Companion::with_pid_file("local_proxy", file)).await;
    assert_eq!(note.outcome, "exited", "{task:?}");
    assert!(!proxy.is_alive());
    assert!(lab.at("lp.pid").exists(), "a locked file is never removed");
}

#[tokio::test]
async fn by_name_the_only_one_is_ended_and_several_are_refused() {
    let lab = Lab::new();
    let name = format!("twin-{}", std::process::id() % 100_000);
    let missing = || PidFile::new(lab.at("missing"), PidFileKind::Plain);
    let mut first = lab.sleeper(&name);
    let mut second = lab.sleeper(&name);
    let (task, note) = end(Companion::with_pid_file(&name, missing()).find_by_name()).await;
    assert_eq!(note.outcome, "refused", "{task:?}");
    let detail = task.detail.unwrap();
    assert!(
        detail.contains(&first.id().to_string()) && detail.contains(&second.id().to_string()),
        "{detail}"
    );
    assert!(first.is_alive() && second.is_alive());
    drop(second);
    let (_, note) = end(Companion::with_pid_file(&name, missing())).await;
    assert_eq!(note.outcome, "not running", "it was not asked for by name");
    let (_, note) = end(Companion::named(&name)).await;
    assert_eq!((&*note.outcome, note.numbers["pid"]), ("exited", f64::from(first.id())));
    assert!(!first.is_alive());
}

#[tokio::test]
async fn by_name_the_first_process_of_a_program_of_several_is_it() {
    let lab = Lab::new();
    let name = format!("tree-{}", std::process::id() % 100_000);
    let script = "if [ \"$1\" = child ]; then while :; do sleep 300 & wait; done; fi; \
                  $0 child & echo up > $1/ready; trap 'kill $!; exit 0' TERM; wait";
    let mut parent = lab.script(&name, script);
    lab.read("ready", 1).await;
    let (task, note) = end(Companion::named(&name)).await;
    assert_eq!(note.outcome, "exited", "{task:?}");
    assert_eq!(note.numbers["pid"], f64::from(parent.id()));
    assert!(!parent.is_alive());
}

#[tokio::test]
async fn a_group_is_ended_when_the_one_before_it_is_gone() {
    let lab = Lab::new();
    let script = "trap 'sleep 1; date +%s%N > $1/$(basename $0).end; exit 0' TERM; \
         trap 'date +%s%N > $1/$(basename $0).end; exit 0' INT; echo up >> $1/ready; while :; do sleep 300 & wait; done";
    let running: Vec<_> = ["proxy-a", "proxy-b", "database"].map(|name| lab.script(name, script)).into();
    lab.read("ready", 3).await;
    let companions = Companions::new([
        Companion::with_pid_file("database", lab.pid_file("0", running[2].id()))
            .ladder("INT:5s/KILL:1s".parse().unwrap())
            .group(7),
        Companion::with_pid_file("proxy-a", lab.pid_file("1", running[0].id())).group(2),
        Companion::with_pid_file("proxy-b", lab.pid_file("2", running[1].id())).group(2),
    ]);
    let report = finish(service(&companions, |_| ())).await;
    assert_eq!(report.exit_code, 0, "{report:?}");
    assert_eq!(report.companions_ended(), ["database", "proxy-a", "proxy-b"]);
    let mut ends = Vec::new();
    for name in ["proxy-a", "proxy-b", "database"] {
        ends.push(lab.read(&format!("{name}.end"), 1).await[0].parse::<u64>().unwrap());
    }
    assert!(ends[2] > ends[0] && ends[2] > ends[1], "{ends:?}");
    let apart = ends[0].abs_diff(ends[1]);
    assert!(apart < 900_000_000, "those of a group are ended at once: {apart} ns apart");
}

#[tokio::test]
async fn fifty_are_ended_at_once_each_by_one_signal() {
    let lab = Lab::new();
    let script = "trap 'echo $$ >> $1/signals; sleep 0.2; exit 0' TERM; echo up >> $1/ready; while :; do sleep 300 & wait; done";
    let mut running: Vec<_> = (0..50).map(|_| lab.script("worker", script)).collect();
    lab.read("ready", 50).await;
    let companion = |(place, running): (usize, &Running)| {
        Companion::with_pid_file("worker", lab.pid_file(&format!("pid{place}"), running.id()))
    };
    let companions = Companions::new(running.iter().enumerate().map(companion));
    let began = Instant::now();
    let report = finish(service(&companions, |_| ())).await;
    assert!(
        began.elapsed() < Duration::from_secs(6),
        "one after another they take 10 s: {:?}",
        began.elapsed()
    );
    assert_eq!(report.exit_code, 0, "{report:?}");
    assert_eq!(report.companions_ended().len(), 50);
    assert!(running.iter_mut().all(|running| !running.is_alive()));
    let signals = lab.read("signals", 50).await;
    assert_eq!(signals.len(), 50, "each has had one");
}

#[tokio::test]
async fn two_companions_that_are_one_process_signal_it_once() {
    let lab = Lab::new();
    let script = "trap 'echo $$ >> $1/signals; sleep 0.3; exit 0' TERM; echo up >> $1/ready; while :; do sleep 300 & wait; done";
    let running = lab.script("worker", script);
    lab.read("ready", 1).await;
    let file = |name| lab.pid_file(name, running.id());
    let twice =
        [Companion::with_pid_file("worker", file("a")), Companion::with_pid_file("worker", file("b"))];
    let report = finish(service(&Companions::new(twice), |_| ())).await;
    let mut outcomes: Vec<_> = tasks(&report).iter().map(|task| task.notes[0].outcome.clone()).collect();
    outcomes.sort();
    assert_eq!(outcomes, ["exited", "refused"]);
    assert_eq!(lab.read("signals", 1).await.len(), 1);
}

#[tokio::test]
async fn a_stage_with_less_time_than_the_ladder_still_sends_its_last_signal() {
    let lab = Lab::new();
    let mut running = lab.sleeper("redis-server");
    running.freeze().await;
    let companion = Companion::with_pid_file("redis-server", lab.pid_file("pid", running.id()))
        .ladder("TERM:600ms/INT:600ms/KILL:400ms".parse().unwrap());
    let shutdown = service(&Companions::new([companion]), |config| {
        config.total = Duration::from_millis(2000);
        config.graceful = Duration::from_millis(800);
    });
    // A request that never ends takes the drain's time, and leaves the stage some 900 ms.
    let request = shutdown.request_start().unwrap();
    let report = finish(shutdown).await;
    drop(request);
    let (task, note) = one(&report);
    assert_eq!((&*note.outcome, note.numbers["signal"]), ("escalated", 9.0), "{task:?}");
    assert!(!running.is_alive());
}

#[tokio::test]
async fn a_shutdown_that_is_hurried_shortens_a_ladder_that_is_under_way() {
    let lab = Lab::new();
    let mut running = lab.sleeper("redis-server");
    running.freeze().await;
    let companion = Companion::with_pid_file("redis-server", lab.pid_file("pid", running.id()))
        .ladder("TERM:20s/KILL:1s".parse().unwrap());
    let shutdown = service(&Companions::new([companion]), |_| ());
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::Closing).await;
    sleep(Duration::from_millis(100)).await;
    let began = Instant::now();
    shutdown.terminate(Urgency::Fast);
    let report = timeout(LONG, shutdown.finished()).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(one(&report).1.numbers["signal"], 9.0);
    assert!(!running.is_alive());
}

#[test]
fn ladders_that_are_longer_than_their_stage_are_an_impossible_plan_with_the_arithmetic() {
    let lab = Lab::new();
    let companion = |ladder: &str, group| {
        Companion::with_pid_file("a", lab.pid_file("pid", 2)).ladder(ladder.parse().unwrap()).group(group)
    };
    let plan = |companions: &Companions, companion: Option<u64>, total: u64| {
        let mut config = ShutdownConfig::default();
        config.companion = companion.map(Duration::from_secs);
        config.total = Duration::from_secs(total);
        ShutdownCoordinator::builder().config(config).companions(companions).plan()
    };
    // Side by side the longer one counts, one after another both.
    let side_by_side = Companions::new([companion("INT:6s/KILL:1s", 0), companion("TERM:8s/KILL:2s", 0)]);
    plan(&side_by_side, Some(10), 28).unwrap();
    let in_order = Companions::new([companion("INT:6s/KILL:1s", 0), companion("TERM:8s/KILL:2s", 1)]);
    let error = plan(&in_order, Some(10), 28).unwrap_err().to_string();
    let expected = "companions: a INT:6s/KILL:1s = 7s, then a TERM:8s/KILL:2s = 10s; together 17s is more than \
                    SHUTDOWN_COMPANION_TIMEOUT=10s: raise it, or shorten the ladders";
    assert!(error.ends_with(expected), "{error}");
    assert!(plan(&in_order, Some(17), 28).is_ok());
    assert!(plan(&in_order, None, 28).is_ok(), "not given, the budget follows the ladders");
    let error = plan(&in_order, None, 17).unwrap_err().to_string();
    assert!(error.contains("SHUTDOWN_TOTAL_TIMEOUT=17s leaves"), "{error}");
}

#[tokio::test]
async fn a_launched_companion_is_ended_and_its_exit_code_and_group_with_it() {
    let lab = Lab::new();
    let program = lab
        .write_script("server", "sleep 301 & echo $! > $1/helper; trap 'exit 7' TERM; echo $$ > $1/up; wait");
    let launch = Launch::new([program.to_str().unwrap(), lab.dir.path().to_str().unwrap()]);
    let companions = Companions::new([Companion::launched("server", launch)]);
    // A plan that is only looked at changes nothing.
    drop(ShutdownCoordinator::builder().companions(&companions));
    let shutdown = service(&companions, |_| ());
    companions.launch(shutdown).unwrap();
    let server: u32 = lab.read("up", 1).await[0].parse().unwrap();
    let helper: u32 = lab.read("helper", 1).await[0].parse().unwrap();
    assert_eq!(companions.status()[0].pid, Some(server));
    assert!(companions.has_launched(server) && !companions.has_launched(helper));
    let group = rustix::process::getpgid(Some(pid(server))).unwrap();
    assert_eq!(group, pid(server), "Ctrl-C in our terminal is not for it");
    let report = finish(shutdown).await;
    let (_, note) = one(&report);
    assert_eq!((&*note.outcome, note.numbers["code"]), ("exited", 7.0));
    gone(server).await;
    gone(helper).await;
}

#[tokio::test]
async fn a_launched_companion_that_ends_is_started_again_and_not_once_a_shutdown_has_begun() {
    let lab = Lab::new();
    let program = lab.write_script(
        "server",
        "echo $$ >> $1/starts; [ $(wc -l < $1/starts) = 3 ] && exec sleep 302; exit 4",
    );
    let launch = || Launch::new([program.to_str().unwrap(), lab.dir.path().to_str().unwrap()]);
    let companions = Companions::new([Companion::launched("sleep", launch())]);
    let shutdown = service(&companions, |_| ());
    companions.launch(shutdown).unwrap();
    let starts = lab.read("starts", 3).await;
    let last: u32 = starts[2].parse().unwrap();
    while companions.status()[0].pid != Some(last) {
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(companions.status()[0].restarts, 2);
    // It ends during the drain.
    let request = shutdown.request_start().unwrap();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::Draining).await;
    kill_process(pid(last), Signal::KILL).unwrap();
    while companions.status()[0].last_exit.is_none() {
        sleep(Duration::from_millis(5)).await;
    }
    sleep(Duration::from_millis(300)).await;
    drop(request);
    let report = finish(shutdown).await;
    let (task, note) = one(&report);
    assert_eq!((task.outcome, &*note.outcome, note.numbers["ended_by"]), (Outcome::Ok, "not running", 9.0));
    assert_eq!(lab.read("starts", 3).await.len(), 3);
}

#[tokio::test]
async fn the_end_of_a_companion_that_is_fatal_ends_the_service() {
    let lab = Lab::new();
    let program = lab.write_script("server", "exit 3");
    let launch = Launch::new([program.to_str().unwrap()]).on_exit(OnExit::Fatal);
    let companions = Companions::new([Companion::launched("server", launch)]);
    let shutdown = service(&companions, |_| ());
    companions.launch(shutdown).unwrap();
    let report = timeout(LONG, shutdown.finished()).await.unwrap();
    let expected =
        Reason::CriticalTask { task: "companion server".to_owned(), error: "exited with code 3".to_owned() };
    assert_eq!((&report.reason, report.exit_code), (&expected, 10));
}

#[tokio::test]
async fn what_cannot_be_launched_is_named_and_nothing_is_left_behind() {
    let lab = Lab::new();
    let first = Companion::launched("sleep", Launch::new(["sleep", "303"]));
    let second = Companion::launched("ghost", Launch::new([lab.at("ghost").to_str().unwrap()]));
    let companions = Companions::new([first, second]);
    let shutdown = service(&companions, |_| ());
    let error = companions.launch(shutdown).unwrap_err();
    assert_eq!(
        shutdown_core::sentence(&error),
        format!(
            "the companion ghost cannot be started: the program {:?}: No such file or directory (os error 2)",
            lab.at("ghost")
        )
    );
    assert!(!is_running(&["sleep", "303"]));
    finish(shutdown).await;
}

/// Whether a process has exactly this command line.
fn is_running(command: &[&str]) -> bool {
    let wanted: Vec<u8> = command.iter().flat_map(|arg| [arg.as_bytes(), b"\0"].concat()).collect();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .into_iter()
        .any(|entry| std::fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == wanted))
}

#[tokio::test]
async fn one_that_runs_already_is_not_launched_beside_itself_and_a_stale_file_does_not_hinder_it() {
    let lab = Lab::new();
    let mut running = lab.sleeper("server");
    let launch = || Launch::new([lab.at("server").to_str().unwrap(), "304"]);
    let beside = |file: PidFile| Companions::new([Companion::launched("server", launch()).pid_file(file)]);
    let companions = beside(lab.pid_file("pid", running.id()));
    let shutdown = service(&companions, |_| ());
    let error = companions.launch(shutdown).unwrap_err().to_string();
    assert!(error.contains(&format!("runs already, as process {}", running.id())), "{error}");
    assert!(running.is_alive());
    // The number is another's by now; or it was the companion's own as the first process of a container.
    let mut stranger = lab.sleeper("stranger");
    for number in [stranger.id(), 1] {
        let companions = beside(lab.pid_file("deep.pid", number));
        let shutdown = service(&companions, |_| ());
        companions.launch(shutdown).unwrap();
        assert!(!lab.at("deep.pid").exists(), "{number}");
        finish(shutdown).await;
    }
    assert!(stranger.is_alive() && running.is_alive());
}

#[tokio::test]
async fn a_companion_that_forks_away_is_followed_by_its_pid_file() {
    let lab = Lab::new();
    let program = lab.write_script(
        "daemon",
        "if [ \"$1\" = 1 ]; then trap 'kill $!; exit 0' TERM; while :; do sleep 305 & wait; done; fi; \
         setsid $0 1 & echo $! > $1/pids/daemon.pid; exit 0",
    );
    let launch = Launch::new([program.to_str().unwrap(), lab.dir.path().to_str().unwrap()]);
    // Its directory is made.
    let file = PidFile::new(lab.at("pids/daemon.pid"), PidFileKind::Plain);
    let companions = Companions::new([Companion::launched("daemon", launch).pid_file(file)]);
    let shutdown = service(&companions, |_| ());
    companions.launch(shutdown).unwrap();
    let daemon: u32 = lab.read("pids/daemon.pid", 1).await[0].parse().unwrap();
    let until = Instant::now() + LONG;
    while companions.status()[0].pid != Some(daemon) {
        assert!(Instant::now() < until, "{:?}", companions.status());
        sleep(Duration::from_millis(5)).await;
    }
    let report = finish(shutdown).await;
    let (task, note) = one(&report);
    assert_eq!(
        (task.outcome, &*note.outcome, note.numbers["pid"]),
        (Outcome::Ok, "exited", f64::from(daemon))
    );
    gone(daemon).await;
}

#[tokio::test]
async fn what_is_wrong_with_a_pid_file_can_be_said_at_the_start() {
    let lab = Lab::new();
    let stranger = lab.sleeper("stranger");
    let fine = lab.sleeper("fine");
    let companions = Companions::new([
        Companion::with_pid_file("fine", lab.pid_file("fine.pid", fine.id())),
        Companion::with_pid_file("late", PidFile::new(lab.at("late.pid"), PidFileKind::Plain)),
        Companion::with_pid_file("nowhere", PidFile::new(lab.at("no/pid"), PidFileKind::Plain)),
        Companion::with_pid_file("other", lab.pid_file("other.pid", stranger.id())),
    ]);
    let warnings = companions.warnings().await;
    let names: Vec<_> = warnings.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["nowhere", "other"], "{warnings:?}");
    assert!(warnings[0].1.contains(&Path::new("no/pid").display().to_string()), "{warnings:?}");
}

#[tokio::test]
async fn a_companion_behind_a_script_is_the_one_that_its_pid_file_names() {
    let lab = Lab::new();
    let looping =
        "trap 'echo $(basename $0) >> $1/ends; kill $!; exit 0' TERM; while :; do sleep 306 & wait; done";
    lab.write_script("server", &format!("echo $$ > $1/server.pid; {looping}"));
    let script = lab.write_script("start-server", &format!("$(dirname $0)/server $1 & {looping}"));
    let launch = Launch::new([script.to_str().unwrap(), lab.dir.path().to_str().unwrap()]);
    let file = PidFile::new(lab.at("server.pid"), PidFileKind::Plain);
    let companions = Companions::new([Companion::launched("server", launch).pid_file(file)]);
    let shutdown = service(&companions, |_| ());
    companions.launch(shutdown).unwrap();
    assert!(companions.ready(LONG).await.is_empty());
    let server: u32 = lab.read("server.pid", 1).await[0].parse().unwrap();
    let script = companions.status()[0].pid.unwrap();
    let report = finish(shutdown).await;
    let (task, _) = one(&report);
    assert_eq!(task.outcome, Outcome::Ok, "{report:?}");
    assert_eq!(lab.read("ends", 2).await, ["server", "start-server"]);
    assert!(!lab.at("server.pid").exists());
    gone(server).await;
    gone(script).await;
}

#[tokio::test]
async fn a_launched_companion_is_ready_when_its_pid_file_says_so() {
    let lab = Lab::new();
    let looping = "trap 'kill $!; exit 0' TERM; while :; do sleep 307 & wait; done";
    let lines = r"$$\n/data\n1795914908\n5432\n/tmp\n\n  1 2\n";
    let script = format!(
        "printf \"{lines}starting\\n\" > $1/postmaster.pid; sleep 0.4; \
         printf \"{lines}ready   \\n\" > $1/postmaster.pid; {looping}"
    );
    let program = lab.write_script("postgres", &script);
    let launch = Launch::new([program.to_str().unwrap(), lab.dir.path().to_str().unwrap()]);
    let file = PidFile::new(lab.at("postmaster.pid"), PidFileKind::Postmaster);
    let companions = Companions::new([Companion::launched("postgres", launch).pid_file(file)]);
    let shutdown = service(&companions, |_| ());
    let began = Instant::now();
    companions.launch(shutdown).unwrap();
    assert_eq!(companions.ready(Duration::from_millis(100)).await, ["postgres"]);
    assert!(companions.ready(LONG).await.is_empty());
    assert!(began.elapsed() >= Duration::from_millis(400), "{:?}", began.elapsed());
    assert_eq!(finish(shutdown).await.exit_code, 0);
}

#[tokio::test]
async fn hurried_groups_share_what_is_left_and_each_still_has_its_last_signal() {
    let lab = Lab::new();
    let mut running = [lab.sleeper("first"), lab.sleeper("second")];
    let mut companions = Vec::new();
    for (group, (name, running)) in (0..).zip(["first", "second"].into_iter().zip(&running)) {
        running.freeze().await;
        let file = lab.pid_file(&format!("{name}.pid"), running.id());
        let companion = Companion::with_pid_file(name, file);
        companions.push(companion.ladder("INT:3s/TERM:3s/KILL:1s".parse().unwrap()).group(group));
    }
    let shutdown = service(&Companions::new(companions), |_| ());
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::Closing).await;
    sleep(Duration::from_millis(100)).await;
    shutdown.terminate(Urgency::Fast);
    let report = timeout(LONG, shutdown.finished()).await.unwrap();
    assert_eq!(report.companions_ended(), ["first", "second"], "{report:?}");
    assert!(running.iter_mut().all(|running| !running.is_alive()));
}

#[tokio::test]
async fn a_launched_companion_and_one_that_its_pid_file_names_are_signalled_once() {
    let lab = Lab::new();
    let looping = "echo $$ > $1/server.pid; trap 'echo $$ >> $1/signals; sleep 0.3; kill $!; exit 0' TERM; while :; do sleep 308 & wait; done";
    let program = lab.write_script("server", looping);
    let launch = Launch::new([program.to_str().unwrap(), lab.dir.path().to_str().unwrap()]);
    let file = PidFile::new(lab.at("server.pid"), PidFileKind::Plain);
    let twice = [Companion::launched("server", launch), Companion::with_pid_file("server", file)];
    let companions = Companions::new(twice);
    let shutdown = service(&companions, |_| ());
    companions.launch(shutdown).unwrap();
    lab.read("server.pid", 1).await;
    let report = finish(shutdown).await;
    let mut outcomes: Vec<_> = tasks(&report).iter().map(|task| task.notes[0].outcome.clone()).collect();
    outcomes.sort();
    assert_eq!(outcomes, ["exited", "refused"]);
    assert_eq!(lab.read("signals", 1).await.len(), 1);
}

#[tokio::test]
async fn when_the_stage_is_skipped_launched_companions_are_killed_with_their_groups_and_others_left_alone() {
    let lab = Lab::new();
    let program = lab.write_script("server", "sleep 309 & echo $! > $1/helper; echo $$ > $1/up; wait");
    let launch = Launch::new([program.to_str().unwrap(), lab.dir.path().to_str().unwrap()]);
    let mut other = lab.sleeper("other");
    let companions = Companions::new([
        Companion::launched("server", launch),
        Companion::with_pid_file("other", lab.pid_file("other.pid", other.id())),
    ]);
    let shutdown = service(&companions, |_| ());
    companions.launch(shutdown).unwrap();
    let server: u32 = lab.read("up", 1).await[0].parse().unwrap();
    let helper: u32 = lab.read("helper", 1).await[0].parse().unwrap();
    shutdown.terminate(Urgency::Immediate);
    let report = timeout(LONG, shutdown.finished()).await.unwrap();
    assert!(tasks(&report).iter().all(|task| task.outcome == Outcome::Skipped), "{report:?}");
    gone(server).await;
    gone(helper).await;
    assert!(other.is_alive());
}

#[tokio::test]
async fn what_may_run_already_is_not_launched_beside_itself() {
    let lab = Lab::new();
    let mut running = lab.sleeper("server");
    let file = lab.pid_file("pid", running.id());
    let written = std::fs::File::options().write(true).open(lab.at("pid")).unwrap();
    written.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
    let launch = Launch::new([lab.at("server").to_str().unwrap(), "310"]);
    let companions = Companions::new([Companion::launched("server", launch).pid_file(file)]);
    let shutdown = service(&companions, |_| ());
    let error = companions.launch(shutdown).unwrap_err().to_string();
    assert!(error.contains("may run already") && error.contains("remove the file"), "{error}");
    assert!(running.is_alive() && lab.at("pid").exists());
    let error = companions.launch(shutdown).unwrap_err().to_string();
    assert!(error.contains("launched before"), "{error}");
}

#[test]
fn a_runtime_that_goes_away_is_not_the_companions_end() {
    let lab = Lab::new();
    let mut running = lab.sleeper("server");
    let file = lab.pid_file("pid", running.id());
    for _ in 0..20 {
        let file = file.clone();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            // What cannot be caught but by KILL, which never comes.
            running.freeze().await;
            let companion = Companion::with_pid_file("server", file).ladder("INT:20s".parse().unwrap());
            let shutdown = service(&Companions::new([companion]), |_| ());
            shutdown.initiate_shutdown(Reason::requested("a test"));
            shutdown.until(Phase::Closing).await;
            sleep(Duration::from_millis(10)).await;
        });
        drop(runtime);
        assert!(running.is_alive() && lab.at("pid").exists());
    }
}

#[tokio::test]
async fn the_pid_file_that_a_killed_launched_companion_leaves_is_removed() {
    let lab = Lab::new();
    let program =
        lab.write_script("server", "trap '' TERM; echo $$ > $1/server.pid; while :; do sleep 0.05; done");
    let launch = Launch::new([program.to_str().unwrap(), lab.dir.path().to_str().unwrap()]);
    let file = PidFile::new(lab.at("server.pid"), PidFileKind::Plain);
    let companion = Companion::launched("server", launch).pid_file(file);
    let companions = Companions::new([companion.ladder("TERM:100ms/KILL:5s".parse().unwrap())]);
    let shutdown = service(&companions, |_| ());
    companions.launch(shutdown).unwrap();
    assert!(companions.ready(LONG).await.is_empty());
    let report = finish(shutdown).await;
    let (task, note) = one(&report);
    assert_eq!((&*note.outcome, note.numbers["ended_by"]), ("escalated", 9.0), "{task:?}");
    assert!(!lab.at("server.pid").exists());
}

#[tokio::test]
async fn one_by_itself_is_found_sent_one_signal_and_ended_and_a_stranger_is_not() {
    let lab = Lab::new();
    // Not HUP, which this process may have been started to ignore.
    let script = "trap 'echo USR1 >> \"$1/heard\"' USR1; trap 'echo TERM >> \"$1/heard\"; exit 0' TERM; echo $$ > \"$1/ready\"; \
                  while :; do sleep 300 & wait; done";
    let reloads = lab.script("reloads", script);
    lab.read("ready", 1).await;
    let companion = || Companion::with_pid_file("reloads", lab.pid_file("pid", reloads.id()));
    assert_eq!(companion().find().await, Ok(reloads.id()));
    assert_eq!(companion().signal(StopSignal::Usr1).await, Ok(reloads.id()));
    assert_eq!(lab.read("heard", 1).await, ["USR1"]);
    assert!(is_alive(reloads.id()));
    let another = Companion::with_pid_file("another", lab.pid_file("pid", reloads.id()));
    let refused = |ending: &Ending| matches!(ending, Ending::Refused(Refusal::AnotherProgram { .. }));
    assert!(another.find().await.is_err_and(|ending| refused(&ending)));
    assert!(another.signal(StopSignal::Kill).await.is_err_and(|ending| refused(&ending)));
    assert!(refused(&another.end().await) && is_alive(reloads.id()));
    let ended = companion().ladder("TERM:20s/KILL:1s".parse().unwrap()).end().await;
    assert_eq!(ended, Ending::Exited { pid: reloads.id(), exit: None });
    assert_eq!(lab.read("heard", 2).await, ["USR1", "TERM"]);
    // Not yet waited for, and then gone.
    assert!(matches!(companion().find().await, Err(Ending::NotRunning(_))));
}
