//! A real process under test.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use signals::default_signals;
use tokio::time::Instant;

use crate::PATIENCE;

#[path = "../../shutdown-core/tests/support/signals.rs"]
mod signals;

/// The path of a binary of this workspace, built by `tests/run` beside the tests and by the benches beside themselves.
///
/// # Panics
///
/// If it is not there.
pub fn binary(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("a program knows its own path");
    let beside = this.parent().expect("a file is in a directory");
    // Programs live in target/<profile>, tests in target/<profile>/deps.
    let profile = if beside.ends_with("deps") { beside.parent().unwrap_or(beside) } else { beside };
    let path = profile.join(name);
    assert!(path.exists(), "{} is not built: run tests/run, which builds it", path.display());
    path
}

/// What a process printed so far, and who waits for more.
#[derive(Default)]
struct Printed {
    lines: Mutex<(Vec<String>, bool)>,
    more: Condvar,
}

impl Printed {
    fn read(self: &Arc<Self>, from: impl Read + Send + 'static) {
        let printed = Arc::clone(self);
        std::thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                printed.lines.lock().expect("no reader panics").0.push(line);
                printed.more.notify_all();
            }
            printed.lines.lock().expect("no reader panics").1 = true;
            printed.more.notify_all();
        });
    }

    fn wait(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        self.wait_nth(0, wanted)
    }

    /// Waits for a line for which `wanted` holds and before which so many others did.
    fn wait_nth(&self, before: usize, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let lines = self.lines.lock().expect("no reader panics");
        let (lines, _) = self
            .more
            .wait_timeout_while(lines, PATIENCE, |(lines, end)| {
                !*end && lines.iter().filter(|line| wanted(line)).count() <= before
            })
            .expect("no reader panics");
        lines.0.iter().filter(|line| wanted(line)).nth(before).cloned()
    }

    fn all(&self) -> String {
        let lines = self.lines.lock().expect("no reader panics");
        let (lines, _) =
            self.more.wait_timeout_while(lines, PATIENCE, |(_, end)| !*end).expect("no reader panics");
        lines.0.join("\n")
    }
}

/// A process that is ended with its handle.
pub struct Process {
    child: Child,
    status: Option<ExitStatus>,
    stdout: Arc<Printed>,
    stderr: Arc<Printed>,
    stdin: Option<PipeWriter>,
    unread: Option<(PipeReader, PipeWriter)>,
}

impl Process {
    /// Starts `command`, reading what it prints.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start(command: &mut Command) -> Self {
        Self::spawn(command.stdin(Stdio::null()))
    }

    fn spawn(command: &mut Command) -> Self {
        default_signals();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (stdout, stderr) = (Arc::new(Printed::default()), Arc::new(Printed::default()));
        stdout.read(child.stdout.take().expect("piped"));
        stderr.read(child.stderr.take().expect("piped"));
        Self { child, status: None, stdout, stderr, stdin: None, unread: None }
    }

    /// Starts `command` with a stdin that stays open until [`close_stdin`](Self::close_stdin).
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start_with_stdin(command: &mut Command) -> Self {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let mut process = Self::spawn(command.stdin(reader));
        command.stdin(Stdio::null());
        process.stdin = Some(writer);
        process
    }

    /// Writes a line to its stdin.
    ///
    /// # Panics
    ///
    /// If that is closed.
    pub fn say(&self, line: &str) {
        let mut stdin = self.stdin.as_ref().expect("started with a stdin");
        writeln!(stdin, "{line}").expect("it reads");
    }

    /// Ends its stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Starts `command` with a stderr that nobody reads; [`block_stderr`](Self::block_stderr) fills it.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start_unread(command: &mut Command) -> Self {
        default_signals();
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let theirs = writer.try_clone().expect("a descriptor");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(theirs);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // The command keeps a descriptor of its own otherwise.
        command.stderr(Stdio::null());
        let stdout = Arc::new(Printed::default());
        stdout.read(child.stdout.take().expect("piped"));
        Self {
            child,
            status: None,
            stdout,
            stderr: Arc::default(),
            stdin: None,
            unread: Some((reader, writer)),
        }
    }

    /// Closes the unread stderr's other end: from now on every line written to it fails.
    ///
    /// # Panics
    ///
    /// If stderr is read.
    pub fn break_stderr(&mut self) {
        drop(self.unread.take().expect("started with an unread stderr"));
    }

    /// Fills the unread stderr: from now on whoever writes a line to it blocks.
    ///
    /// # Panics
    ///
    /// If stderr is read.
    pub fn block_stderr(&self) {
        let (_, writer) = self.unread.as_ref().expect("started with an unread stderr");
        let blocking = fcntl_getfl(writer).expect("a pipe");
        fcntl_setfl(writer, blocking | OFlags::NONBLOCK).expect("a pipe");
        // Single bytes at the end: a pipe takes no part of a small write.
        for size in [4096, 1] {
            while (&mut &*writer).write(&[b'.'; 4096][..size]).is_ok() {}
        }
        fcntl_setfl(writer, blocking).expect("a pipe");
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it prints a line to stdout for which `wanted` holds.
    ///
    /// # Panics
    ///
    /// If it ends or takes too long without.
    pub fn stdout_line(&self, wanted: impl Fn(&str) -> bool) -> String {
        self.stdout.wait(wanted).unwrap_or_else(|| panic!("never printed; stderr: {}", self.stderr_so_far()))
    }

    /// As [`stdout_line`](Self::stdout_line); nothing if it ends or takes too long without.
    pub fn stdout_line_or_end(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        self.stdout.wait(wanted)
    }

    /// Waits until it prints a line to stderr for which `wanted` holds; nothing if it ends or takes too long without.
    pub fn stderr_line_or_end(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        self.stderr.wait(wanted)
    }

    /// Waits until it has printed a line to stdout for which `wanted` holds, beside so many before.
    ///
    /// # Panics
    ///
    /// If it ends or takes too long without.
    pub fn stdout_nth(&self, before: usize, wanted: impl Fn(&str) -> bool) -> String {
        let line = self.stdout.wait_nth(before, wanted);
        line.unwrap_or_else(|| panic!("never printed; stderr: {}", self.stderr_so_far()))
    }

    /// Waits until it prints a line to stderr for which `wanted` holds.
    ///
    /// # Panics
    ///
    /// If it ends or takes too long without.
    pub fn stderr_line(&self, wanted: impl Fn(&str) -> bool) -> String {
        self.stderr.wait(wanted).unwrap_or_else(|| panic!("never printed; stderr: {}", self.stderr_so_far()))
    }

    /// The address behind `prefix` in a line of stdout.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn address(&self, prefix: &str) -> SocketAddr {
        let line = self.stdout_line(|line| line.contains(prefix));
        let rest = &line[line.find(prefix).expect("found above") + prefix.len()..];
        let text: String = rest
            .trim()
            .trim_start_matches("http://")
            .chars()
            .take_while(|c| !c.is_whitespace() && *c != '/')
            .collect();
        text.parse().unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// Sends a signal.
    ///
    /// # Panics
    ///
    /// If it has been waited for already.
    pub fn signal(&self, signal: Signal) {
        assert!(self.status.is_none(), "the process has ended; its number may be another's");
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")).expect("a pid is not zero");
        // A process that has ended but was not waited for still takes signals: the number is ours.
        kill_process(pid, signal).expect("our own child");
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// If it takes longer than `within`.
    pub fn ended(&mut self, within: Duration) -> ExitStatus {
        let (status, killed) = self.over_or_killed(within);
        assert!(!killed, "not gone within {within:?}; stderr:\n{}", self.stderr_so_far());
        status
    }

    /// Waits for its end, kills it when `within` has passed, and says whether it had to.
    ///
    /// # Panics
    ///
    /// If it is not our child.
    pub fn over_or_killed(&mut self, within: Duration) -> (ExitStatus, bool) {
        if let Some(status) = self.status {
            return (status, false);
        }
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")).expect("a pid is not zero");
        let killer = Deadline::new(within, move || {
            let _ = kill_process(pid, Signal::KILL);
        });
        let status = self.child.wait().expect("our own child");
        self.status = Some(status);
        (status, killer.cancel())
    }

    /// Whether it has ended, waited for or not.
    pub fn is_over(&self) -> bool {
        // Z is who has ended and was not waited for (proc(5)): the number is still its own.
        self.status.is_some() || self.state().is_none_or(|state| state == 'Z')
    }

    /// Waits until it waits for something itself, or is over: a program of one thread has done by then what it was woken for.
    ///
    /// # Panics
    ///
    /// If it is busy for too long.
    pub fn until_idle(&self) {
        let begin = Stopwatch::start();
        while !self.is_over() && self.state() != Some('S') {
            assert!(begin.elapsed() < PATIENCE, "never idle; stderr: {}", self.stderr_so_far());
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }

    /// Its state, as the kernel tells it; nothing if there is no such process.
    fn state(&self) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    /// Waits for its end and gives the exit code.
    ///
    /// # Panics
    ///
    /// If it takes longer than `within` or a signal killed it.
    pub fn exit_code(&mut self, within: Duration) -> i32 {
        let status = self.ended(within);
        status.code().unwrap_or_else(|| panic!("{status}; stderr:\n{}", self.stderr_so_far()))
    }

    /// All it printed to stdout, once it has ended.
    pub fn stdout(&self) -> String {
        self.stdout.all()
    }

    /// All it printed to stderr, once it has ended.
    pub fn stderr(&self) -> String {
        self.stderr.all()
    }

    /// What it printed to stdout by now.
    pub fn stdout_so_far(&self) -> String {
        self.stdout.lines.lock().expect("no reader panics").0.join("\n")
    }

    /// What it printed to stderr by now.
    pub fn stderr_so_far(&self) -> String {
        self.stderr.lines.lock().expect("no reader panics").0.join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs something when a time is over, unless cancelled before.
struct Deadline {
    cancel: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<bool>,
}

impl Deadline {
    fn new(within: Duration, act: impl FnOnce() + Send + 'static) -> Self {
        let (cancel, cancelled) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let late = cancelled.recv_timeout(within).is_err();
            if late {
                act();
            }
            late
        });
        Self { cancel, thread }
    }

    /// Whether it has acted.
    fn cancel(self) -> bool {
        let _ = self.cancel.send(());
        self.thread.join().expect("the deadline's thread does not panic")
    }
}

/// What systemd sets, for the case that it runs the tests.
const FROM_SYSTEMD: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// An edge-proxy in a directory of its own.
pub struct EdgeProxy {
    /// The process.
    pub process: Process,
    /// Where it serves.
    pub listen: SocketAddr,
    /// Where it is administered.
    pub admin: SocketAddr,
    dir: tempfile::TempDir,
}

impl EdgeProxy {
    /// A command for an edge-proxy on free ports, its data below `dir`.
    pub fn command(dir: &Path) -> Command {
        Self::command_at(dir, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// The same, but that it listens there.
    pub fn command_at(dir: &Path, listen: SocketAddr) -> Command {
        let mut command = Command::new(binary("edge-proxy"));
        command
            .args(["--listen", &listen.to_string(), "--admin", "127.0.0.1:0", "--data-dir"])
            .arg(dir.join("data"))
            .current_dir(dir);
        for name in shutdown_core::ShutdownConfig::VARIABLES.iter().chain(&FROM_SYSTEMD) {
            command.env_remove(name);
        }
        command
    }

    /// Starts one with these budgets and waits until it serves.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start<K: AsRef<OsStr>, V: AsRef<OsStr>>(env: impl IntoIterator<Item = (K, V)>) -> Self {
        Self::start_in(tempfile::tempdir().expect("a temporary directory"), env)
    }

    /// As [`start`](Self::start), with what an earlier one has left in `dir`; see [`into_dir`](Self::into_dir).
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn start_in<K: AsRef<OsStr>, V: AsRef<OsStr>>(
        dir: tempfile::TempDir,
        env: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let process = Process::start(Self::command(dir.path()).envs(env));
        Self::serving(process, dir)
    }

    /// Starts one with the default budgets.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn with_defaults() -> Self {
        Self::start([("EDGE_PROXY_UNUSED", "")])
    }

    /// Starts one with these flags and the default budgets, and waits until it serves.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn with_flags<S: AsRef<OsStr>>(flags: impl IntoIterator<Item = S>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let process = Process::start(Self::command(dir.path()).args(flags));
        Self::serving(process, dir)
    }

    /// Starts one by this command, made for `dir`, and waits until it serves.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn run(dir: tempfile::TempDir, command: &mut Command) -> Self {
        Self::serving(Process::start(command), dir)
    }

    fn serving(process: Process, dir: tempfile::TempDir) -> Self {
        let listen = process.address("  traffic ");
        let admin = process.address("  admin ");
        Self { process, listen, admin, dir }
    }

    /// Its process, where it serves, and the directory that must outlive it.
    pub fn into_parts(self) -> (Process, SocketAddr, tempfile::TempDir) {
        (self.process, self.listen, self.dir)
    }

    /// Its directory, once it has ended, for the next one.
    ///
    /// # Panics
    ///
    /// If it has not ended.
    pub fn into_dir(self) -> tempfile::TempDir {
        assert!(self.process.status.is_some(), "it still uses its directory");
        self.dir
    }

    /// Its directory; its data is in `data`.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The last report on disk.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn report(&self) -> Value {
        read_report(&self.dir.path().join("data"))
    }
}

/// A service of the examples, with its admin routes, in a directory of its own.
pub struct Service {
    /// The process.
    pub process: Process,
    /// Where it serves.
    pub listen: SocketAddr,
    /// Where it is administered.
    pub admin: SocketAddr,
    dir: tempfile::TempDir,
}

impl Service {
    /// Starts `axum-lines`, `axum-stock` or `axum-service` with these budgets and waits until it serves.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start<K: AsRef<OsStr>, V: AsRef<OsStr>>(
        name: &str,
        env: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let process = Process::start(Self::command(name, dir.path()).envs(env));
        let admin = process.address("admin on ");
        let listen = process.address("listening on ");
        Self { process, listen, admin, dir }
    }

    /// A command for one on free ports that works in `dir`, with the default budgets.
    pub fn command(name: &str, dir: &Path) -> Command {
        let mut command = Command::new(binary(name));
        for name in shutdown_core::ShutdownConfig::VARIABLES {
            command.env_remove(name);
        }
        for name in ["DATABASE_URL", "CACHE_URL", "REGISTRY_URL", "PGBOUNCER_CONFIG", "PGBOUNCER_DATABASE"] {
            command.env_remove(name);
        }
        command
            .env("AXUM_SERVICE_LISTEN", "127.0.0.1:0")
            .env("AXUM_SERVICE_ADMIN", "127.0.0.1:0")
            .env("AXUM_SERVICE_REPORTS", dir)
            .current_dir(dir);
        command
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The last report on disk.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn report(&self) -> Value {
        read_report(self.dir.path())
    }
}

/// The last report in `dir`.
///
/// # Panics
///
/// If there is none.
pub fn read_report(dir: &Path) -> Value {
    let path = dir.join("last-shutdown.json");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).expect("a report is JSON")
}

/// Measures from its making.
#[derive(Clone, Copy)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// What has passed.
    pub fn elapsed(self) -> Duration {
        self.0.elapsed()
    }
}
