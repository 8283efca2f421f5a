//! A PostgreSQL of a test's own, from Debian's package.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use super::{STARTS, ask, command_as, dir_of, free_port, signal_family};
use crate::PATIENCE;
use crate::process::Process;

const USER: &str = "postgres";
const READY: &str = "database system is ready to accept connections";
/// How long the end may take before the server is killed: it says goodbye to no client then.
const QUIT: Duration = Duration::from_secs(5);

/// A server in a directory of its own, on a port of the loopback and a Unix socket. Every user is trusted, and nothing
/// is flushed to disk.
pub struct Postgres {
    process: Process,
    port: u16,
    dir: TempDir,
    programs: PathBuf,
    settings: Vec<String>,
}

/// A line of the server's log.
#[derive(Clone, Debug)]
pub struct LogLine {
    /// When it was written, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The number of the server's process that wrote it: one for each connection.
    pub pid: u32,
    /// What the client calls itself; empty while it has not said so.
    pub application_name: String,
    /// What it says, from its level on: `LOG:  disconnection: …`.
    pub text: String,
}

impl Postgres {
    /// Starts one that logs connections and disconnections, and waits until it answers.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// As [`start`](Self::start), with settings of its own: `log_statement=all`, `max_connections=5`.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn start_with(settings: &[&str]) -> Self {
        let programs = programs();
        let dir = dir_of(USER);
        ask(command_as(USER, &programs.join("initdb"))
            .args(["--username", USER, "--auth", "trust", "--no-sync", "--no-locale", "--encoding", "UTF8"])
            .arg("--pgdata")
            .arg(dir.path().join("data")));
        let mut said = String::new();
        for _ in 0..STARTS {
            let port = free_port();
            let process = Process::start(&mut server(&programs, dir.path(), port, settings));
            if process.stderr_line_or_end(|line| line.contains(READY)).is_some() {
                let settings = settings.iter().map(ToString::to_string).collect();
                return Self { process, port, dir, programs, settings };
            }
            said = process.stderr_so_far();
        }
        panic!("PostgreSQL did not start, {STARTS} times:\n{said}");
    }

    /// `postgres://postgres@127.0.0.1:port/postgres`
    pub fn url(&self) -> String {
        format!("postgres://{USER}@127.0.0.1:{}/postgres", self.port)
    }

    /// The same database over the Unix socket, as libpq and sqlx read it.
    pub fn url_over_socket(&self) -> String {
        format!("postgres:///postgres?host={}&port={}&user={USER}", self.dir.path().display(), self.port)
    }

    /// The directory of its Unix socket.
    pub fn socket_dir(&self) -> &Path {
        self.dir.path()
    }

    /// The port of the loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The number of the server's first process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The directory of its programs, clients among them.
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// Its program and its arguments: how another would start it.
    pub fn words(&self) -> Vec<String> {
        let mut words = vec![self.programs.join("postgres").display().to_string()];
        words.extend(arguments(self.dir.path(), self.port, &self.settings));
        words
    }

    /// Its PID file.
    pub fn pidfile(&self) -> PathBuf {
        self.dir.path().join("data/postmaster.pid")
    }

    /// Starts it again in the same place and on the same port, once it has ended.
    ///
    /// # Panics
    ///
    /// If it has not ended, or does not start.
    pub fn start_again(&mut self) {
        assert!(self.process.is_over(), "it still runs");
        self.process =
            Process::start(&mut server(&self.programs, self.dir.path(), self.port, &self.settings));
        let ready = self.process.stderr_line_or_end(|line| line.contains(READY));
        assert!(ready.is_some(), "PostgreSQL did not start again:\n{}", self.process.stderr_so_far());
    }

    /// Its exit code, once whoever stops it has done so. All of its log is there then.
    ///
    /// # Panics
    ///
    /// If it takes longer than `within` or a signal killed it.
    pub fn code(&mut self, within: Duration) -> i32 {
        let code = self.process.exit_code(within);
        self.process.stderr();
        code
    }

    /// What it has logged by now. A statement of several lines is one.
    pub fn log(&self) -> Vec<LogLine> {
        LogLine::all(&self.process.stderr_so_far())
    }

    /// Waits until it has logged a line for which `wanted` holds.
    ///
    /// # Panics
    ///
    /// If it ends or takes too long without.
    pub fn logged(&self, wanted: impl Fn(&LogLine) -> bool) -> LogLine {
        let found =
            self.process.stderr_line_or_end(|line| LogLine::parse(line).is_some_and(|line| wanted(&line)));
        let line = found.unwrap_or_else(|| panic!("never logged:\n{}", self.process.stderr_so_far()));
        LogLine::parse(&line).expect("it was found by parsing it")
    }

    /// Asks the server's own client, which calls itself `judge`: rows by lines, columns by `|`.
    ///
    /// # Panics
    ///
    /// If the statement fails or takes too long.
    pub fn query(&self, sql: &str) -> String {
        self.query_at(&self.url(), sql)
    }

    /// The same at another place, a pooler's.
    ///
    /// # Panics
    ///
    /// As [`query`](Self::query).
    pub fn query_at(&self, url: &str, sql: &str) -> String {
        ask(command_as(USER, &self.programs.join("psql"))
            .env("PGAPPNAME", "judge")
            .args(["--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set", "ON_ERROR_STOP=1"])
            .args(["--dbname", url, "--command", sql]))
    }

    /// Runs PostgreSQL's own benchmark with these arguments; what it says.
    ///
    /// # Panics
    ///
    /// If it fails.
    pub fn pgbench(&self, arguments: &[&str]) -> String {
        ask(command_as(USER, &self.programs.join("pgbench")).args(arguments))
    }

    /// How many connections clients of this name have.
    ///
    /// # Panics
    ///
    /// As [`query`](Self::query).
    pub fn connections_of(&self, application_name: &str) -> usize {
        let name = application_name.replace('\'', "''");
        let count =
            self.query(&format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}'"));
        count.parse().expect("count gives a number")
    }

    /// Stops it where it stands: connections stay open, and nobody answers.
    pub fn freeze(&self) {
        signal_family(&self.process, Signal::STOP);
    }

    /// Lets it run on.
    pub fn thaw(&self) {
        signal_family(&self.process, Signal::CONT);
    }

    /// Stops it as an operator does (SIGINT, "fast"): clients are told and disconnected.
    ///
    /// # Panics
    ///
    /// If it takes too long or ends with an error.
    pub fn stop_server(&mut self) {
        self.process.signal(Signal::INT);
        assert_eq!(self.process.exit_code(PATIENCE), 0, "{}", self.process.stderr());
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.process.is_over() {
            return;
        }
        self.thaw();
        // "Immediate": it stops its children and frees its shared memory, which it could not if it were killed.
        self.process.signal(Signal::QUIT);
        self.process.over_or_killed(QUIT);
    }
}

impl LogLine {
    /// The lines of a server's log. A statement of several lines is one.
    pub fn all(log: &str) -> Vec<Self> {
        let mut lines: Vec<Self> = Vec::new();
        for line in log.lines() {
            match (Self::parse(line), lines.last_mut()) {
                (Some(line), _) => lines.push(line),
                (None, Some(last)) => last.text.extend(["\n", line.trim_start()]),
                (None, None) => {}
            }
        }
        lines
    }

    /// `time pid name<tab>text`, as `log_line_prefix` of [`server`] has it.
    fn parse(line: &str) -> Option<Self> {
        let (prefix, text) = line.split_once('\t')?;
        let mut fields = prefix.splitn(3, ' ');
        let (seconds, millis) = fields.next()?.split_once('.')?;
        let at_ms = seconds.parse::<u64>().ok()? * 1000 + millis.parse::<u64>().ok()?;
        let pid = fields.next()?.parse().ok()?;
        let name = fields.next()?;
        // What it writes for a client that has not said yet.
        let application_name = if name == "[unknown]" { String::new() } else { name.to_owned() };
        Some(Self { at_ms, pid, application_name, text: text.to_owned() })
    }
}

fn server(programs: &Path, dir: &Path, port: u16, settings: &[impl AsRef<str>]) -> std::process::Command {
    let mut command = command_as(USER, &programs.join("postgres"));
    command.args(arguments(dir, port, settings));
    command
}

fn arguments(dir: &Path, port: u16, settings: &[impl AsRef<str>]) -> Vec<String> {
    let (data, socket_dir) = (dir.join("data").display().to_string(), dir.display().to_string());
    let mut arguments: Vec<String> =
        ["-D", &data, "-k", &socket_dir, "-p", &port.to_string()].map(Into::into).into();
    let ours = [
        "listen_addresses=127.0.0.1",
        "fsync=off",
        // In the directory: what a kill leaves goes with it.
        "dynamic_shared_memory_type=mmap",
        "log_connections=on",
        "log_disconnections=on",
        // %n: the Unix epoch with milliseconds. A name has no tab (PostgreSQL makes a ? of it).
        "log_line_prefix=%n %p %a\t",
        "log_timezone=UTC",
    ];
    for setting in ours.into_iter().chain(settings.iter().map(AsRef::as_ref)) {
        arguments.extend(["-c".to_owned(), setting.to_owned()]);
    }
    arguments
}

/// The newest of Debian's. They are not in the path; what is there may be a wrapper that looks for clusters.
pub(super) fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .max()
        .expect("PostgreSQL is not installed: run tests/run, which installs it");
    Path::new("/usr/lib/postgresql").join(newest.to_string()).join("bin")
}
