//! The manifest's command and its preStop, with a PgBouncer that is PID 1 of a namespace as in a container.
//!
//! Needs unshare of util-linux and root, or user namespaces.

use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;
use shutdown_tests::PATIENCE;
use shutdown_tests::process::{Process, Stopwatch};
use shutdown_tests::servers::{Installed, LaidOut, Postgres, as_user, pgbouncers};

use crate::manifests::containers;
use crate::settings::with_server;
use crate::{file, name_what_is_missing, replaced};

const USERS: &str = "\"app\" \"a password\"\n";
/// How long a PgBouncer that is sent TERM may take in the manifests: grace.rs.
const TERM: Duration = Duration::from_secs(5);
/// Written once it listens.
const READY: &str = "process up: ";

/// The container of a manifest that is PgBouncer.
fn pooler(manifest: &str) -> Value {
    let containers = containers(&file(&format!("deploy/pgbouncer/kubernetes/{manifest}")));
    containers.into_iter().find(|container| container["name"] == "pgbouncer").expect("PgBouncer")
}

/// `sh -c SCRIPT`
fn script(command: &Value) -> String {
    let words: Vec<_> = command.as_array().expect("words").iter().filter_map(Value::as_str).collect();
    match words[..] {
        ["sh", "-c", script] => script.to_owned(),
        _ => panic!("{words:?} is no script"),
    }
}

/// A PgBouncer that is PID 1 of a namespace of its own.
struct Contained {
    process: Process,
    laid_out: LaidOut,
}

impl Contained {
    /// Runs a script as the container's command; what it said if it ends instead of listening.
    fn start(installed: &Installed, laid_out: LaidOut, script: &str) -> Result<Self, String> {
        let dir = laid_out.dir().display().to_string();
        let script = script
            .replace("/etc/pgbouncer", &dir)
            .replace("/run/pgbouncer", &dir)
            .replace("exec pgbouncer ", &format!("exec {} ", installed.program().display()));
        // The user is changed within: only then may the user's shell signal it.
        let mut command = Command::new("unshare");
        if !geteuid().is_root() {
            command.args(["--user", "--map-current-user"]);
        }
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]);
        add(&mut command, &as_user("postgres", "sh".as_ref()));
        let mut process = Process::start(command.args(["-c", &script]));
        if process.stderr_line_or_end(|line| line.contains(READY)).is_none() {
            process.ended(PATIENCE);
            return Err(process.stderr());
        }
        Ok(Self { process, laid_out })
    }

    /// The number of its PID 1 from outside, while there is one.
    fn child(&self) -> Option<u32> {
        let path = format!("/proc/{0}/task/{0}/children", self.process.id());
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// The same of one that runs.
    fn pid(&self) -> u32 {
        self.child().unwrap_or_else(|| panic!("it has ended: {}", self.process.stderr_so_far()))
    }

    /// Runs a script as a hook, or the kubelet, in its namespace; ends with the namespace at the latest.
    fn run(&self, script: &str) -> Process {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid().to_string(), "--pid"]);
        if !geteuid().is_root() {
            command.args(["--user", "--preserve-credentials"]);
        }
        add(&mut command, &as_user("postgres", "sh".as_ref()));
        Process::start(command.args(["-c", script]))
    }

    /// A client with a transaction that takes so long from now on. Its statement is no other's.
    fn transaction(&self, postgres: &Postgres, seconds: &str) -> Process {
        let asked = format!("SELECT pg_sleep({seconds}) /* of {} */", self.pid());
        let url = format!("host={} port=6432 user=app dbname=app", self.laid_out.dir().display());
        let mut psql = Command::new(postgres.programs().join("psql"));
        psql.args(["--no-psqlrc", "--set", "ON_ERROR_STOP=1", "--dbname", &url]);
        psql.args(["--command", "BEGIN"]);
        psql.args(["--command", &asked]);
        psql.args(["--command", "INSERT INTO done VALUES (1)", "--command", "COMMIT"]);
        let client = Process::start(psql.env("PGPASSWORD", "a password"));
        postgres.logged(|line| line.text.contains(&asked));
        client
    }
}

/// `unshare` asks that its child is killed with it, and the kernel forgets that when the child changes its user.
impl Drop for Contained {
    fn drop(&mut self) {
        if self.process.is_over() {
            return;
        }
        let child = self.child().and_then(|child| i32::try_from(child).ok());
        if let Some(pid) = child.and_then(Pid::from_raw) {
            // Its number is its own until `unshare` has waited for it.
            let _ = kill_process(pid, Signal::KILL);
        }
        self.process.over_or_killed(PATIENCE);
    }
}

/// Appends a command's words.
fn add(to: &mut Command, command: &Command) {
    to.arg(command.get_program()).args(command.get_args());
}

fn server() -> (Postgres, String) {
    let postgres = Postgres::start_with(&["log_statement=all"]);
    postgres.query("CREATE ROLE app LOGIN");
    postgres.query("CREATE DATABASE app OWNER app");
    let url =
        format!("host={} port={} user=app dbname=app", postgres.socket_dir().display(), postgres.port());
    let mut psql = Command::new(postgres.programs().join("psql"));
    let (made, why) = crate::said(psql.args(["--dbname", &url, "--command", "CREATE TABLE done (n int)"]));
    assert!(made, "{why}");
    let settings = with_server(&postgres);
    (postgres, settings)
}

#[test]
fn the_manifests_hook_lets_a_transaction_end_and_then_ends_with_pgbouncer() {
    name_what_is_missing();
    let (postgres, settings) = server();
    let pooler = pooler("pgbouncer.yaml");
    let command = script(&pooler["command"]);
    let hook = script(&pooler["lifecycle"]["preStop"]["exec"]["command"]);
    // The nodes are told in this test already.
    let hook = replaced(&hook, "sleep 3; ", "");
    let patience = Duration::from_secs(15);
    for installed in pgbouncers() {
        let start = || Contained::start(&installed, installed.lay_out(&settings, USERS), &command);
        let mut contained = start().unwrap_or_else(|said| panic!("{installed}: {said}"));
        let mut client = contained.transaction(&postgres, "1.2");
        let begin = Stopwatch::start();
        let mut hook = contained.run(&hook);
        assert_eq!(client.exit_code(PATIENCE), 0, "PgBouncer {installed}: {}", client.stderr());
        contained.process.ended(patience);
        hook.ended(patience);
        // Not the 20 s of its sleep: the namespace has ended, and the hook with it.
        assert!(begin.elapsed() < patience, "{:?}", begin.elapsed());
        println!(
            "PgBouncer {installed}: a transaction of 1.2 s committed; ended after {:?}",
            begin.elapsed()
        );

        // A hook that returns: the kubelet's TERM is next, and the transaction is cut.
        let mut contained = start().unwrap_or_else(|said| panic!("{installed}: {said}"));
        let mut client = contained.transaction(&postgres, "30");
        let mut hook = contained.run("kill -INT 1; sleep 0.5");
        assert_eq!(hook.exit_code(PATIENCE), 0, "{}", hook.stderr());
        let mut kubelet = contained.run("kill -TERM 1");
        kubelet.ended(PATIENCE);
        contained.process.ended(TERM);
        assert_ne!(client.exit_code(PATIENCE), 0, "PgBouncer {installed}: it committed after all");
    }
}

#[test]
fn a_sidecar_is_gone_when_it_is_sent_term_after_its_clients() {
    name_what_is_missing();
    let (postgres, settings) = server();
    let command = script(&pooler("app-with-sidecar.yaml")["command"]);
    for installed in pgbouncers() {
        let contained = Contained::start(&installed, installed.lay_out(&settings, USERS), &command);
        let mut contained = contained.unwrap_or_else(|said| panic!("{installed}: {said}"));
        // Its connection to the server stays in the pool.
        assert_eq!(contained.transaction(&postgres, "0").exit_code(PATIENCE), 0);
        let mut kubelet = contained.run("kill -TERM 1");
        let begin = Stopwatch::start();
        kubelet.ended(PATIENCE);
        contained.process.ended(TERM);
        println!("PgBouncer {installed}: gone after {:?}", begin.elapsed());

        // With a client TERM is not enough from 1.23 on, which is why it comes after the application.
        if installed.is_at_least((1, 23)) {
            let contained = Contained::start(&installed, installed.lay_out(&settings, USERS), &command);
            let mut contained = contained.unwrap_or_else(|said| panic!("{installed}: {said}"));
            let mut client = contained.transaction(&postgres, "2.5");
            contained.run("kill -TERM 1").ended(PATIENCE);
            assert_eq!(
                client.exit_code(PATIENCE),
                0,
                "PgBouncer {installed} did not wait: {}",
                client.stderr()
            );
            contained.process.ended(TERM);
        }
    }
}

#[test]
fn the_pid_file_of_a_killed_container_does_not_keep_the_next_one_from_starting() {
    name_what_is_missing();
    let (_postgres, settings) = server();
    let command = script(&pooler("pgbouncer.yaml")["command"]);
    let bare = replaced(&command, "rm -f /run/pgbouncer/pgbouncer.pid && ", "");
    for installed in pgbouncers() {
        let left = || {
            let laid_out = installed.lay_out(&settings, USERS);
            // In a container every PgBouncer is 1, this one too.
            std::fs::write(laid_out.dir().join("pgbouncer.pid"), "1\n").expect("a temporary file");
            laid_out
        };
        let refused = Contained::start(&installed, left(), &bare).err().expect("the control must be red");
        assert!(refused.contains("another instance running"), "PgBouncer {installed}: {refused}");
        let contained = Contained::start(&installed, left(), &command);
        let contained = contained.unwrap_or_else(|said| panic!("PgBouncer {installed}: {said}"));
        let pid = contained.pid();
        drop(contained);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "the test leaves {pid} behind");
    }
}
