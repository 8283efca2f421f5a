//! The edge proxy's state over real stops: saved at the reason and at the end, whatever the end is.

use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use shutdown_core::state::Document;
use shutdown_tests::client::{Connection, get, post, status_until};
use shutdown_tests::process::{EdgeProxy, Process, Stopwatch};
use shutdown_tests::{PATIENCE, count};

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
    u64::try_from(now.as_millis()).expect("a clock before the year 500 million")
}

fn state(dir: &Path) -> Document {
    let path = dir.join("data/state.json");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Document::parse(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A proxy in `dir`, whose next start finds what this one has left.
fn start(dir: &Path, env: &[(&str, &str)]) -> (Process, SocketAddr, SocketAddr) {
    let process = Process::start(EdgeProxy::command(dir).envs(env.iter().copied()));
    let listen = process.address("  traffic ");
    let admin = process.address("  admin ");
    (process, listen, admin)
}

/// A request that never ends.
fn occupy(listen: SocketAddr, admin: SocketAddr) -> Connection {
    let mut stuck = Connection::open(listen).expect("it serves");
    stuck.send("GET", "/never", "").expect("it reads");
    status_until(admin, |status| status["requests"]["active"] == 1);
    stuck
}

#[test]
fn a_node_that_is_killed_100_ms_after_the_signal_has_a_state_from_after_it() {
    let runs = count(50);
    let mut incarnation = 0;
    let dir = tempfile::tempdir().expect("a temporary directory");
    for _ in 0..runs {
        let (mut process, listen, admin) = start(dir.path(), &[]);
        let _stuck = occupy(listen, admin);
        let before = state(dir.path());
        assert_eq!(before.shutdown_at, None, "control: the state on disk is from before the signal");
        let signalled = unix_ms();
        process.signal(Signal::TERM);
        thread::park_timeout(Duration::from_millis(100));
        process.signal(Signal::KILL);
        assert_eq!(process.ended(PATIENCE).signal(), Some(9));
        let after = state(dir.path());
        assert!(
            after.saved_at >= signalled && after.shutdown_at.is_some_and(|at| at >= signalled),
            "{after:?}"
        );
        assert!(!after.clean, "it did not come to its last stage");
        assert!(after.incarnation > incarnation);
        incarnation = after.incarnation;
    }
    println!("{runs} kills 100 ms after the signal: {runs} states from after it");
}

#[test]
fn a_node_that_is_killed_without_a_signal_has_its_last_checkpoint() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (mut process, _, admin) = start(dir.path(), &[("EDGE_PROXY_STATE_INTERVAL", "50ms")]);
    let status =
        status_until(admin, |status| status["state"]["saves"].as_u64().is_some_and(|saves| saves >= 5));
    process.signal(Signal::KILL);
    process.ended(PATIENCE);
    let state = state(dir.path());
    assert_eq!((state.shutdown_at, state.clean), (None, false));
    // The first save is at the start; this is the fifth, or a later one.
    assert!(Some(state.saved_at) >= status["state"]["saved_at"].as_u64(), "{state:?}");
}

#[test]
fn the_state_is_saved_however_the_shutdown_is_hurried_or_held_up() {
    type Env = &'static [(&'static str, &'static str)];
    type End = fn(&mut Process, SocketAddr);
    let endings: [(&str, Env, End, i32); 5] = [
        (
            "the drain's deadline",
            &[("SHUTDOWN_GRACEFUL_TIMEOUT", "1")],
            |process, _| process.signal(Signal::TERM),
            11,
        ),
        (
            "a total of 2 s and a drain that never ends",
            &[("SHUTDOWN_TOTAL_TIMEOUT", "2s")],
            |process, _| process.signal(Signal::TERM),
            11,
        ),
        (
            "a second signal",
            &[],
            |process, admin| {
                process.signal(Signal::TERM);
                status_until(admin, |status| status["phase"] == "draining");
                thread::park_timeout(Duration::from_millis(250));
                process.signal(Signal::INT);
            },
            130,
        ),
        ("mode=fast", &[], |_, admin| _ = post(admin, "/terminate?mode=fast", ""), 11),
        ("mode=immediate", &[], |_, admin| _ = post(admin, "/terminate?mode=immediate", ""), 11),
    ];
    for (how, env, end, code) in endings {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (mut process, listen, admin) = start(dir.path(), env);
        let _stuck = occupy(listen, admin);
        let signalled = unix_ms();
        let begin = Stopwatch::start();
        end(&mut process, admin);
        assert_eq!(process.exit_code(PATIENCE), code, "{how}: {}", process.stderr());
        let state = state(dir.path());
        println!("{how}: exit {code} after {:?}, state clean {}", begin.elapsed(), state.clean);
        assert!(state.clean && state.saved_at >= signalled, "{how}: {state:?}");
        assert!(state.shutdown_at.is_some_and(|at| at >= signalled), "{how}: {state:?}");
    }
}

#[test]
fn the_next_start_says_from_when_the_state_is_and_the_second_on_a_directory_who_has_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (mut process, listen, _) = start(dir.path(), &[]);
    assert_eq!(get(listen, "/").expect("it serves").status, 200);
    assert!(process.stdout_line(|line| line.contains("  state ")).contains("none yet"));

    let mut second = Process::start(&mut EdgeProxy::command(dir.path()));
    assert_eq!(second.exit_code(PATIENCE), 1);
    let told = second.stderr();
    let sentence = told.lines().find(|line| line.contains("error:")).expect("a sentence");
    assert!(sentence.contains(&format!("process {}", process.id())), "{sentence}");

    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 0);
    let left = state(dir.path());
    let (mut again, _, admin) = start(dir.path(), &[]);
    assert!(again.stdout_line(|line| line.contains("  state ")).contains("after a shutdown that began at"));
    let said = again.stderr_so_far();
    let line = said.lines().find(|line| line.contains("state: from ")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains(&format!("shutdown_at={}", left.shutdown_at.expect("it had stopped"))), "{line}");
    let status = status_until(admin, |status| status["state"]["saves"] == 1);
    assert!(status["state"]["incarnation"].as_u64() > Some(left.incarnation), "{status:#}");
    again.signal(Signal::TERM);
    assert_eq!(again.exit_code(PATIENCE), 0);
}

#[test]
fn a_state_that_cannot_be_saved_is_named_in_the_report_and_exit_10() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (mut process, _, _) = start(dir.path(), &[]);
    // A directory cannot be replaced by a file, whoever asks: from now on every save fails.
    let path = dir.path().join("data/state.json");
    std::fs::remove_file(&path).expect("it was saved at the start");
    std::fs::create_dir_all(path.join("full")).expect("a directory");
    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 10);
    let report = shutdown_tests::process::read_report(&dir.path().join("data"));
    let mut stages = report["stages"].as_array().expect("a list").iter();
    let task = &stages.find(|stage| stage["stage"] == "persist").expect("it has a state")["tasks"][0];
    assert_eq!((&task["name"], &task["outcome"]), (&"state".into(), &"failed".into()), "{report:#}");
    assert!(task["detail"].as_str().is_some_and(|detail| detail.contains("state.json")), "{report:#}");
}
