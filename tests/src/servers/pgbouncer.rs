//! A PgBouncer of a test's own, of each version that tests/run has found.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use super::postgres::programs;
use super::{Postgres, as_user, ask, dir_of, give_away};
use crate::PATIENCE;
use crate::process::Process;

/// It refuses to be root, and PostgreSQL's socket is this user's.
const USER: &str = "postgres";
/// Written once it listens and has its PID file.
const READY: &str = "process up: ";
const PORT: u16 = 6432;

/// A PgBouncer that can be started.
#[derive(Clone, Debug)]
pub struct Installed {
    program: PathBuf,
    version: String,
}

/// What a server connection is a client's for.
#[derive(Clone, Copy, Debug)]
pub enum Pooling {
    /// A transaction.
    Transaction,
    /// As long as the client stays.
    Session,
}

/// A pooler in a directory of its own, in front of a [`Postgres`], on a Unix socket only: one that finds a port taken
/// starts without it. Every user is let in, and is `postgres`.
pub struct Pgbouncer {
    process: Process,
    installed: Installed,
    dir: TempDir,
}

/// A directory with the files of a PgBouncer that does not run yet.
pub struct LaidOut {
    installed: Installed,
    dir: TempDir,
}

/// Every PgBouncer of `PGBOUNCER_BINS` (paths with colons between), Debian's own without it.
///
/// # Panics
///
/// If there is none, or one that does not run.
pub fn pgbouncers() -> Vec<Installed> {
    let bins = std::env::var_os("PGBOUNCER_BINS").unwrap_or_default();
    let mut programs: Vec<PathBuf> =
        std::env::split_paths(&bins).filter(|path| !path.as_os_str().is_empty()).collect();
    if programs.is_empty() {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
        programs.extend(dirs.map(|dir| dir.join("pgbouncer")).find(|program| program.is_file()));
    }
    assert!(!programs.is_empty(), "PgBouncer is not installed: run tests/run, which installs it");
    programs.into_iter().map(Installed::at).collect()
}

/// Which versions tests/run could not have, a line each; empty if none is missing.
pub fn missing_pgbouncers() -> String {
    std::env::var("PGBOUNCER_MISSING").unwrap_or_default()
}

/// Runs a law on each version, in front of one database, and says which could not be had.
///
/// # Panics
///
/// If there is none, or the law is broken.
pub fn on_each_version(law: impl Fn(&Postgres, &Installed)) {
    let postgres = Postgres::start();
    for installed in pgbouncers() {
        println!("PgBouncer {installed}:");
        law(&postgres, &installed);
    }
    for line in missing_pgbouncers().lines() {
        println!("not run on {line}");
    }
}

impl Installed {
    fn at(program: PathBuf) -> Self {
        let said = ask(Command::new(&program).arg("--version"));
        // `PgBouncer 1.18.0`; libraries below.
        let version = said.lines().next().and_then(|line| line.strip_prefix("PgBouncer "));
        let version = version.unwrap_or_else(|| panic!("{}: {said}", program.display())).to_owned();
        Self { program, version }
    }

    /// Whether it is this version or a newer one: `(1, 23)`.
    ///
    /// # Panics
    ///
    /// If its version is not two numbers with a dot between, whatever follows.
    pub fn is_at_least(&self, wanted: (u32, u32)) -> bool {
        let mut parts = self.version.split('.').map(|part| part.parse().expect("a number"));
        let mut next = || parts.next().expect("major.minor");
        (next(), next()) >= wanted
    }

    /// Its program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Puts settings as they are deployed, and a list of users, into a directory of their own, which replaces
    /// `/etc/pgbouncer` and `/run/pgbouncer` in them. It will listen on a Unix socket only.
    ///
    /// # Panics
    ///
    /// If that cannot be written.
    pub fn lay_out(&self, settings: &str, users: &str) -> LaidOut {
        let dir = dir_of(USER);
        let here = dir.path().display().to_string();
        let lines = settings.lines().filter(|line| !line.starts_with("listen_addr"));
        let mut text: String = lines.flat_map(|line| [line, "\n"]).collect();
        for place in ["/etc/pgbouncer", "/run/pgbouncer"] {
            text = text.replace(place, &here);
        }
        for (name, text) in [("pgbouncer.ini", text.as_str()), ("userlist.txt", users)] {
            let file = dir.path().join(name);
            std::fs::write(&file, text).expect("a temporary directory");
            std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).expect("our own file");
            give_away(&file, USER);
        }
        LaidOut { installed: self.clone(), dir }
    }

    /// Starts one with a pool of so many connections, and waits until it takes clients.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start(&self, postgres: &Postgres, pooling: Pooling, pool_size: usize) -> Pgbouncer {
        let dir = dir_of(USER);
        let file = settings(dir.path());
        let pooling = match pooling {
            Pooling::Transaction => "transaction",
            Pooling::Session => "session",
        };
        let settings = format!(
            "[databases]\n\
             postgres = host={host} port={port} user={USER}\n\
             [pgbouncer]\n\
             unix_socket_dir = {dir}\n\
             listen_port = {PORT}\n\
             pidfile = {pidfile}\n\
             auth_type = any\n\
             pool_mode = {pooling}\n\
             default_pool_size = {pool_size}\n\
             max_client_conn = 200\n\
             ignore_startup_parameters = extra_float_digits\n",
            host = postgres.socket_dir().display(),
            port = postgres.port(),
            dir = dir.path().display(),
            pidfile = pidfile(dir.path()).display(),
        );
        std::fs::write(&file, settings).expect("a temporary directory");
        let process =
            self.run(dir.path()).unwrap_or_else(|said| panic!("PgBouncer {self} did not start:\n{said}"));
        Pgbouncer { process, installed: self.clone(), dir }
    }

    /// `1.24.1`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Starts one with a file of the caller's, without a server behind it, and waits until it takes clients.
    ///
    /// In the file, `{D}` is its directory, and `{P}` the parameters that it needs to start: all but `[pgbouncer]`. The userlist
    /// is `{D}/userlist.txt`.
    ///
    /// # Errors
    ///
    /// It ends instead: what it said.
    ///
    /// # Panics
    ///
    /// If its files cannot be written.
    pub fn start_file(&self, ini: &[u8], userlist: &[u8]) -> Result<Pgbouncer, String> {
        let dir = dir_of(USER);
        let path = dir.path().display();
        let parameters = format!(
            "unix_socket_dir = {path}\nlisten_port = {PORT}\npidfile = {}\n",
            pidfile(dir.path()).display()
        );
        let ini = replaced(&replaced(ini, "{P}", &parameters), "{D}", &path.to_string());
        std::fs::write(settings(dir.path()), ini).expect("a temporary directory");
        std::fs::write(dir.path().join("userlist.txt"), userlist).expect("a temporary directory");
        let process = self.run(dir.path())?;
        Ok(Pgbouncer { process, installed: self.clone(), dir })
    }

    /// As [`start`](Self::start), for services that bring databases of their own: `postgres` and `pgbouncer` are let in by name,
    /// without a password, and `pgbouncer` administers it. Its files are such as people write.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn start_for_services(&self, postgres: &Postgres, pooling: Pooling) -> Pgbouncer {
        let mut pgbouncer = self.start(postgres, pooling, 20);
        pgbouncer.signal(Signal::INT);
        pgbouncer.ended(PATIENCE);
        let dir = pgbouncer.dir.path();
        let users = dir.join("userlist.txt");
        std::fs::write(&users, "\"postgres\" \"\"\n\"pgbouncer\" \"\"\n").expect("a temporary directory");
        let file = settings(dir);
        let said = std::fs::read_to_string(&file).expect("it was written");
        let said = said
            .replace("[databases]\n", "; by hand\n[databases]\n\n")
            .replace("[pgbouncer]\n", "\n  # the rest\n[pgbouncer]\nadmin_users = pgbouncer\n")
            .replace("auth_type = any\n", &format!("auth_type=trust \nauth_file = {}\n", users.display()));
        std::fs::write(&file, said).expect("a temporary directory");
        give_away(&file, USER);
        pgbouncer.start_again().expect("it starts with them");
        pgbouncer
    }

    /// Starts one in this directory and waits until it takes clients; what it said if it ends instead.
    fn run(&self, dir: &Path) -> Result<Process, String> {
        let mut process = Process::start(as_user(USER, &self.program).arg(settings(dir)));
        if process.stderr_line_or_end(|line| line.contains(READY)).is_none() {
            process.ended(PATIENCE);
            return Err(process.stderr());
        }
        let written = std::fs::read_to_string(pidfile(dir)).expect("it is written before READY");
        assert_eq!(written, format!("{}\n", process.id()));
        Ok(process)
    }
}

impl LaidOut {
    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts it and waits until it takes clients.
    ///
    /// # Errors
    ///
    /// It ends instead: what it said.
    pub fn start(self) -> Result<Pgbouncer, String> {
        let process = self.installed.run(self.dir.path())?;
        Ok(Pgbouncer { process, installed: self.installed, dir: self.dir })
    }
}

impl fmt::Display for Installed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.version)
    }
}

impl Pgbouncer {
    /// Its number.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Its program and its arguments: how another would start it.
    pub fn words(&self) -> Vec<String> {
        [self.installed.program.as_path(), &settings(self.dir.path())]
            .map(|path| path.display().to_string())
            .into()
    }

    /// Starts it again in the same place, once it has ended.
    ///
    /// # Errors
    ///
    /// It ends instead of taking clients: what it said.
    ///
    /// # Panics
    ///
    /// If it has not ended.
    pub fn start_again(&mut self) -> Result<(), String> {
        assert!(self.process.is_over(), "it still runs");
        self.process = self.installed.run(self.dir.path())?;
        Ok(())
    }

    /// Its configuration.
    pub fn config(&self) -> PathBuf {
        settings(self.dir.path())
    }

    /// Where PostgreSQL's own clients find a database of it.
    pub fn url(&self, database: &str, user: &str) -> String {
        format!("postgres:///{database}?host={}&port={PORT}&user={user}", self.dir.path().display())
    }

    /// Its PID file.
    pub fn pidfile(&self) -> PathBuf {
        pidfile(self.dir.path())
    }

    /// The directory of its Unix socket.
    pub fn socket_dir(&self) -> &Path {
        self.dir.path()
    }

    /// Asks its admin console: rows by the names of their columns.
    ///
    /// # Panics
    ///
    /// If it refuses.
    pub fn console(&self, command: &str) -> Vec<BTreeMap<String, String>> {
        let said = ask(self.psql("pgbouncer", "").args(["-c", command]));
        let mut rows = said.split('\x1e').map(|row| row.split('\x1f').map(str::to_owned).collect::<Vec<_>>());
        let names = rows.next().expect("a header");
        rows.map(|row| names.iter().cloned().zip(row).collect()).collect()
    }

    /// Whether a user gets to the admin console by this password. It must be among its `stats_users`.
    pub fn lets_in(&self, user: &str, password: &str) -> bool {
        let mut client = Process::start(self.psql(user, password).args(["-c", "SHOW VERSION"]));
        let code = client.exit_code(PATIENCE);
        let said = client.stderr();
        let refusals = [
            "authentication failed",
            "no password supplied",
            // By the rules of an auth_hba_file.
            "login rejected",
            "no authentication method",
        ];
        assert!(code == 0 || refusals.iter().any(|refusal| said.contains(refusal)), "{user:?}: {said}");
        code == 0
    }

    /// A client of its admin console, that separates rows and columns by characters that no name has.
    fn psql(&self, user: &str, password: &str) -> Command {
        let mut psql = as_user(USER, &programs().join("psql"));
        psql.env("PGPASSWORD", password).args([
            "--no-psqlrc",
            "--no-password",
            "--no-align",
            "--pset",
            "footer=off",
        ]);
        psql.args(["--field-separator", "\x1f", "--record-separator", "\x1e"]);
        psql.args([
            "-h",
            &self.dir.path().display().to_string(),
            "-p",
            &PORT.to_string(),
            "-U",
            user,
            "pgbouncer",
        ]);
        psql
    }

    /// What its Unix socket is named after.
    pub fn port(&self) -> u16 {
        PORT
    }

    /// Sends a signal.
    ///
    /// # Panics
    ///
    /// If it has been waited for already.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits until it has logged that it was sent this one: `SIGINT`.
    ///
    /// # Panics
    ///
    /// If it ends or takes too long without.
    pub fn got(&self, signal: &str) {
        let wanted = format!(" got {signal}");
        self.process.stderr_line(|line| line.contains(&wanted));
    }

    /// The signals that it has logged, in their order: `SIGINT`.
    pub fn signals(&self) -> Vec<String> {
        let log = self.process.stderr_so_far();
        let got = log.lines().filter_map(|line| line.split_once(" got SIG")?.1.split([',', ' ']).next());
        got.map(|name| format!("SIG{name}")).collect()
    }

    /// Waits for its end, by itself or by whoever stops it. All of its log is there then.
    ///
    /// # Panics
    ///
    /// If it takes longer than `within`.
    pub fn ended(&mut self, within: Duration) -> ExitStatus {
        let status = self.process.ended(within);
        self.process.stderr();
        status
    }

    /// Its exit code, or less than zero the signal that ended it. As [`ended`](Self::ended) else.
    ///
    /// # Panics
    ///
    /// If it takes longer than `within`.
    pub fn code(&mut self, within: Duration) -> i32 {
        let status = self.ended(within);
        status.code().or(status.signal().map(|signal| -signal)).expect("one of both")
    }

    /// Its log by now.
    pub fn log(&self) -> String {
        self.process.stderr_so_far()
    }
}

/// Bytes with every occurrence of a text replaced.
fn replaced(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((first, behind)) = rest.split_first() {
        match rest.strip_prefix(from.as_bytes()) {
            Some(behind) => {
                text.extend_from_slice(to.as_bytes());
                rest = behind;
            }
            None => {
                text.push(*first);
                rest = behind;
            }
        }
    }
    text
}

fn settings(dir: &Path) -> PathBuf {
    dir.join("pgbouncer.ini")
}

fn pidfile(dir: &Path) -> PathBuf {
    dir.join("pgbouncer.pid")
}
