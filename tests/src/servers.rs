//! Real servers for the tests: PostgreSQL, PgBouncer, Redis; and a small registry over HTTP, and a local proxy that keeps
//! its PID file locked.
//!
//! Each is started by its test, in a directory of its own, on a free port of the loopback and a Unix socket (PgBouncer:
//! only that), without privileges, and is gone when its handle is dropped. What runs on the machine already is neither
//! used nor touched.

mod exporter;
mod local_proxy;
mod pgbouncer;
mod postgres;
mod redis;
mod registry;

pub use exporter::{Exporter, exporters, missing_exporters, target};
pub use local_proxy::LocalProxy;
pub use pgbouncer::{
    Installed, LaidOut, Pgbouncer, Pooling, missing_pgbouncers, on_each_version, pgbouncers,
};
pub use postgres::{LogLine, Postgres};
pub use redis::{Redis, RedisLine};
pub use registry::{Answer, Recorded, Registry};

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

use crate::PATIENCE;
use crate::process::Process;

/// How often a server that finds its port taken is started. Between our look for a free port and its bind somebody
/// else may be faster.
const STARTS: usize = 3;

/// Milliseconds since the Unix epoch, as the servers' logs count them.
///
/// # Panics
///
/// If the clock stands before 1970.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
    u64::try_from(since.as_millis()).expect("a time before the year 500,000,000")
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port of the loopback");
    listener.local_addr().expect("it is bound").port()
}

/// A directory that this user's process can use. Directly below `/tmp`: a Unix socket's path has 107 bytes, and
/// `TMPDIR` may be root's alone.
///
/// # Panics
///
/// If it cannot be made.
pub fn dir_of(user: &str) -> TempDir {
    let dir = tempfile::Builder::new().prefix("shutdown-").tempdir_in("/tmp").expect("a temporary directory");
    give_away(dir.path(), user);
    dir
}

/// Makes this user the owner, where this process is root.
fn give_away(path: &Path, user: &str) {
    if geteuid().is_root() {
        let (uid, gid) = ids_of(user);
        chown(path, Some(uid), Some(gid)).expect("root may give away what it has made");
    }
}

/// The numbers of a user in `/etc/passwd`.
fn ids_of(user: &str) -> (u32, u32) {
    let passwd = std::fs::read_to_string("/etc/passwd").expect("/etc/passwd can be read");
    let mut users = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    users
        .find(|fields| fields.first() == Some(&user))
        .and_then(|fields| Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?)))
        .unwrap_or_else(|| panic!("no user {user}: its package makes it; run tests/run, which installs that"))
}

/// A command that runs `program` as `user` where this process is root, and as oneself else. `setpriv` becomes the
/// program: its number is the server's.
fn command_as(user: &str, program: &Path) -> Command {
    command_with(user, &[], program)
}

/// The same for a program that may stand in a directory of root's alone, as a target folder in root's home does: another
/// user's process, that files are no obstacle to.
pub fn as_user(user: &str, program: &Path) -> Command {
    command_with(user, &["--inh-caps=+dac_override", "--ambient-caps=+dac_override"], program)
}

/// The same with options for `setpriv`, which has some only where this process is root.
fn command_with(user: &str, options: &[&str], program: &Path) -> Command {
    let mut command = if geteuid().is_root() {
        let mut command = Command::new("setpriv");
        // Its group may be called otherwise.
        let (uid, gid) = ids_of(user);
        command.args([&format!("--reuid={uid}"), &format!("--regid={gid}"), "--init-groups"]);
        command.args(options).arg("--").arg(program);
        command
    } else {
        Command::new(program)
    };
    // Logs in English and in UTC, and nothing that libpq or redis-cli would listen to.
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LC_ALL", "C").env("TZ", "UTC");
    command
}

/// Asks a SQLite file through Python, which has a SQLite of its own: rows by lines, columns by `|`.
///
/// # Panics
///
/// If the statement fails.
pub fn sqlite(file: &Path, sql: &str) -> String {
    const SCRIPT: &str = "import sqlite3, sys\n\
        for row in sqlite3.connect(sys.argv[1], timeout=10).execute(sys.argv[2]):\n \
        print('|'.join('' if value is None else str(value) for value in row))";
    assert!(file.exists(), "{} is not there", file.display());
    ask(Command::new("python3").args(["-c", SCRIPT]).arg(file).arg(sql))
}

/// Runs a server's own client and gives what it prints, without the last newline.
fn ask(command: &mut Command) -> String {
    let mut client = Process::start(command);
    let code = client.exit_code(PATIENCE);
    assert_eq!(code, 0, "{command:?}: {}", client.stderr());
    client.stdout().trim_end().to_owned()
}

/// A process and all that descend from it, itself first.
fn family(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = std::fs::read_dir("/proc")
        .expect("/proc is mounted")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, parent_of(pid)?)))
        .collect();
    let mut family = vec![root];
    let mut next = 0;
    while let Some(&parent) = family.get(next) {
        family.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| pid));
        next += 1;
    }
    family
}

/// The parent of a process; none if that is gone.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // `pid (name) state ppid …`, and a name may hold anything (proc(5)).
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// Sends a signal to a server of ours and its children: to the parent first, so that a stopped one makes no more.
fn signal_family(process: &Process, signal: Signal) {
    let mut told = Vec::new();
    // Until nobody is new: a child may have been made while we looked.
    loop {
        let family: Vec<_> = family(process.id()).into_iter().filter(|pid| !told.contains(pid)).collect();
        if family.is_empty() {
            return;
        }
        for pid in family {
            let number = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process has a number");
            // A child that ended in between is nobody's to signal.
            let _ = kill_process(number, signal);
            told.push(pid);
        }
    }
}
