//! The proxy as process 1 of a container that has no init.
//!
//! Needs unshare of util-linux and user namespaces, or root.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{Connection, get, status_until};
use shutdown_tests::process::{EdgeProxy, Process, Stopwatch, read_report};

/// A proxy that is process 1 of a namespace of its own.
struct Contained {
    /// `unshare`, which ends as the proxy does.
    process: Process,
    dir: tempfile::TempDir,
}

impl Contained {
    /// Starts one with these flags. `before` is run by a shell that then becomes the proxy.
    fn start(before: &str, flags: &[&str], prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        prepare(dir.path());
        let proxy = EdgeProxy::command(dir.path());
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]);
        command.args(["sh", "-c", &format!(r#"{before} exec "$0" "$@""#)]).arg(proxy.get_program());
        let process = Process::start(command.args(proxy.get_args()).args(flags).current_dir(dir.path()));
        Self { process, dir }
    }

    /// The proxy's number as seen from here.
    fn proxy(&self) -> u32 {
        // The fork of unshare is there before what it prints is.
        match children(self.process.id())[..] {
            [(proxy, _)] => proxy,
            ref other => panic!("{other:?}; {}", self.process.stderr_so_far()),
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.proxy().try_into().expect("a number")).expect("not zero");
        kill_process(pid, signal).expect("it runs");
    }

    fn fifo(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
}

/// The children of a process, each with its state.
fn children(of: u32) -> Vec<(u32, char)> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("Linux").flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((_, rest)) = stat.rsplit_once(") ") else { continue };
        let mut fields = rest.split(' ');
        let state = fields.next().and_then(|state| state.chars().next()).expect("a state");
        if fields.next().and_then(|parent| parent.parse().ok()) == Some(of) {
            children.push((number, state));
        }
    }
    children.sort_unstable();
    children
}

/// Looks until the children of `of` are in these states.
fn until_children_are(of: u32, states: &str) {
    let begin = Stopwatch::start();
    loop {
        let now: String = children(of).into_iter().map(|(_, state)| state).collect();
        if now == states {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{now:?}, never {states:?}");
        thread::park_timeout(Duration::from_millis(2));
    }
}

fn make_fifos(dir: &Path, names: &[&str]) {
    let mut command = Command::new("mkfifo");
    let mut process = Process::start(command.args(names).current_dir(dir));
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
}

/// Opens a fifo for writing, which takes until it is read, and closes it: its reader ends.
fn end_reader(fifo: &Path) {
    drop(OpenOptions::new().write(true).open(fifo).expect("a fifo"));
}

#[test]
fn as_process_1_term_is_a_whole_shutdown() {
    let mut contained = Contained::start("", &[], |_| {});
    let (listen, admin) = (contained.process.address("  traffic "), contained.process.address("  admin "));
    assert!(contained.process.stdout_so_far().contains("pid 1\n"));
    let mut slow = Connection::open(listen).expect("it serves");
    slow.send("GET", "/slow?ms=500", "connection: close\r\n").expect("it reads");
    status_until(admin, |status| status["requests"]["active"] == 1);
    contained.signal(Signal::TERM);
    assert_eq!(slow.answer().expect("finishes").status, 200);
    assert_eq!(contained.process.exit_code(PATIENCE), 0);
    let report = read_report(&contained.dir.path().join("data"));
    assert_eq!((&report["reason"]["signal"], &report["requests"]["drained"]), (&"SIGTERM".into(), &1.into()));
}

#[test]
fn as_process_1_a_second_term_forces() {
    let mut contained = Contained::start("", &[], |_| {});
    let (listen, admin) = (contained.process.address("  traffic "), contained.process.address("  admin "));
    let mut stuck = Connection::open(listen).expect("it serves");
    stuck.send("GET", "/never", "").expect("it reads");
    status_until(admin, |status| status["requests"]["active"] == 1);
    contained.signal(Signal::TERM);
    let echo = (shutdown_core::SAME_SIGNAL + Duration::from_millis(50)).as_secs_f64() * 1000.0;
    status_until(admin, |status| status["shutting_down_for_ms"].as_f64().is_some_and(|ms| ms > echo));
    contained.signal(Signal::TERM);
    assert_eq!(contained.process.exit_code(PATIENCE), 143);
    assert_eq!(read_report(&contained.dir.path().join("data"))["forced_by"], 15);
}

#[test]
fn as_process_1_term_before_install_leaves_at_once() {
    let flags = ["--config", "config"];
    let mut contained = Contained::start("", &flags, |dir| make_fifos(dir, &["config"]));
    // It has claimed its signals and waits for its configuration, which never comes.
    let config = OpenOptions::new().write(true).open(contained.fifo("config")).expect("it is read");
    contained.signal(Signal::TERM);
    assert_eq!(contained.process.exit_code(PATIENCE), 143);
    assert!(!contained.dir.path().join("data").exists(), "it wrote something");
    drop(config);
}

/// A shell script that leaves two orphans, each alive until its fifo is read to its end.
const ORPHANS: &str = r#"sh -c 'cat early >/dev/null 2>&1 & cat late >/dev/null 2>&1 &';"#;

/// A proxy that waits for its configuration, with two orphans of which one has ended.
fn with_orphans(flags: &[&str]) -> Contained {
    let flags: Vec<_> = ["--config", "config"].iter().chain(flags).copied().collect();
    let contained = Contained::start(ORPHANS, &flags, |dir| make_fifos(dir, &["config", "early", "late"]));
    // The shell is the proxy by the time that this is read.
    let config = OpenOptions::new().write(true).open(contained.fifo("config")).expect("it is read");
    end_reader(&contained.fifo("early"));
    until_children_are(contained.proxy(), "ZS");
    drop(config);
    contained
}

#[test]
fn with_reap_an_orphan_is_waited_for_whenever_it_ends() {
    let mut contained = with_orphans(&["--reap"]);
    let listen = contained.process.address("  traffic ");
    // One that ended before there was a handler, and one that ends now.
    until_children_are(contained.proxy(), "S");
    end_reader(&contained.fifo("late"));
    until_children_are(contained.proxy(), "");
    assert_eq!(get(listen, "/").expect("it serves").status, 200);
    contained.signal(Signal::TERM);
    assert_eq!(contained.process.exit_code(PATIENCE), 0);
    assert!(!contained.process.stderr().contains("WARN"), "{}", contained.process.stderr());
}

#[test]
fn without_reap_the_zombies_stay() {
    let mut contained = with_orphans(&[]);
    let listen = contained.process.address("  traffic ");
    end_reader(&contained.fifo("late"));
    until_children_are(contained.proxy(), "ZZ");
    assert_eq!(get(listen, "/slow?ms=300").expect("it serves").status, 200);
    until_children_are(contained.proxy(), "ZZ");
    contained.signal(Signal::TERM);
    assert_eq!(contained.process.exit_code(PATIENCE), 0);
}

#[test]
fn reap_where_no_orphans_come_is_one_warning() {
    let mut proxy = EdgeProxy::start([("EDGE_PROXY_REAP", "true")]);
    assert_eq!(get(proxy.listen, "/").expect("it serves").status, 200);
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
    let stderr = proxy.process.stderr();
    let warnings: Vec<_> = stderr.lines().filter(|line| line.contains(" WARN ")).collect();
    assert!(warnings.len() == 1 && warnings[0].contains("--reap does nothing"), "{stderr}");
}
