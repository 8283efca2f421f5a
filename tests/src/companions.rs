//! Processes beside an edge proxy: programs under names of a test's own, and what a report says of them.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;
use tempfile::TempDir;

use crate::PATIENCE;
use crate::process::{Process, Stopwatch};

/// A script that writes down each TERM and INT with its own number, in `$1/signals`, and does this then. It has no child that
/// would keep a pipe open, and goes soon after its directory.
pub fn writes_down_signals(then: &str) -> String {
    format!(
        r#"mkfifo "$1/never.$$"; exec 9<>"$1/never.$$"
        for signal in TERM INT; do trap "echo $$ $signal >> '$1/signals'; {then}" $signal; done
        echo $$ >> "$1/ready"
        while [[ -d $1 ]]; do read -r -t 5 -u 9; done"#
    )
}

/// A directory with programs of a test's own names.
pub struct Lab {
    dir: TempDir,
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Lab {
    /// An empty one.
    ///
    /// # Panics
    ///
    /// If it cannot be made.
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a temporary directory") }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// What is called so in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A program of this name that sleeps: coreutils' own, copied.
    pub fn sleeper(&self, name: &str) -> PathBuf {
        self.install(Path::new("/bin/sleep"), name)
    }

    /// A program of this name that is this script.
    ///
    /// # Panics
    ///
    /// If it cannot be written.
    pub fn script(&self, name: &str, script: &str) -> PathBuf {
        let source = self.at(&format!("{name}.source"));
        std::fs::write(&source, format!("#!/bin/bash\n{script}\n")).expect("a temporary directory");
        self.install(&source, name)
    }

    /// By another process: a file that this one had open for writing could not be run while another test starts a process, which
    /// has it open until its exec (ETXTBSY).
    fn install(&self, from: &Path, name: &str) -> PathBuf {
        let to = self.at(name);
        let mut process = Process::start(Command::new("install").arg("-m755").arg(from).arg(&to));
        assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
        to
    }

    /// A PID file with this in it.
    ///
    /// # Panics
    ///
    /// If it cannot be written.
    pub fn pid_file(&self, name: &str, content: impl ToString) -> PathBuf {
        std::fs::write(self.at(name), format!("{}\n", content.to_string())).expect("a temporary directory");
        self.at(name)
    }

    /// What has been written down in a file by now.
    pub fn lines(&self, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.at(name)).unwrap_or_default();
        text.lines().map(ToOwned::to_owned).collect()
    }

    /// The same, once there are so many lines.
    ///
    /// # Panics
    ///
    /// If that takes too long.
    pub fn lines_when(&self, name: &str, count: usize) -> Vec<String> {
        until(|| self.lines(name).len() >= count, &|| format!("{name} has {:?}", self.lines(name)));
        self.lines(name)
    }
}

/// A process that is killed with its handle, and everything in its group with it. What it prints is not read.
pub struct Running(Child);

impl Running {
    /// Starts one.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start(command: &mut Command) -> Self {
        let command =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has not ended.
    ///
    /// # Panics
    ///
    /// If it is not our child.
    pub fn is_alive(&mut self) -> bool {
        self.0.try_wait().expect("our own child").is_none()
    }

    /// Kills it, and waits for its end.
    ///
    /// # Panics
    ///
    /// If it is not our child.
    pub fn kill(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).expect("our own child");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = kill_process_group(number(self.id()), Signal::KILL);
        let _ = self.0.wait();
    }
}

/// Words as a command of `launch=` has them.
///
/// # Panics
///
/// If one has a quote.
pub fn quoted(words: &[String]) -> String {
    assert!(words.iter().all(|word| !word.contains('\'')), "{words:?}");
    words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ")
}

/// A companion's task in a report: its outcome, its detail, and its note as `note`.
///
/// # Panics
///
/// If it has none.
pub fn told(report: &Value, companion: &str) -> Value {
    let stages = report["stages"].as_array().expect("a list");
    let stage = stages.iter().find(|stage| stage["stage"] == "companions");
    let tasks = stage.unwrap_or_else(|| panic!("no companions in {report:#}"))["tasks"].as_array();
    let task = tasks.expect("a list").iter().find(|task| task["name"] == companion);
    let mut task = task.unwrap_or_else(|| panic!("no {companion} in {report:#}")).clone();
    task["note"] = task["notes"][0].clone();
    task
}

/// Whether there is a process of this number that has not ended.
pub fn is_alive(pid: u32) -> bool {
    state(pid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

fn state(pid: u32) -> Option<char> {
    // `pid (name) state …`, and a name may hold anything (proc(5)).
    std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?.rsplit_once(") ")?.1.chars().next()
}

/// Waits until the process of this number has ended.
///
/// # Panics
///
/// If it takes longer than `within`.
pub fn gone(pid: u32, within: Duration) {
    let begin = Stopwatch::start();
    until(|| !is_alive(pid) || begin.elapsed() > within, &|| format!("process {pid} has not ended"));
    assert!(!is_alive(pid), "process {pid} has not ended within {within:?}");
}

/// The command lines of all processes that name this path and have not ended.
///
/// # Panics
///
/// Without `/proc`.
pub fn processes_of(path: &Path) -> Vec<String> {
    let wanted = path.display().to_string();
    let processes = std::fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let lines = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(&wanted)).collect()
}

/// Sends a signal to a process of a test's own, which nobody has waited for yet.
///
/// # Panics
///
/// If there is none.
pub fn send(pid: u32, signal: Signal) {
    kill_process(number(pid), signal).expect("it runs");
}

fn number(pid: u32) -> Pid {
    i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process has a number")
}

/// Looks until it is so.
///
/// # Panics
///
/// If that takes too long.
pub fn until(is_so: impl Fn() -> bool, otherwise: &dyn Fn() -> String) {
    let begin = Stopwatch::start();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{}", otherwise());
        thread::park_timeout(Duration::from_millis(2));
    }
}
