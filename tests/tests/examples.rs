//! Every small example, run as a real process and signalled in the middle of its work.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::Connection;
use shutdown_tests::process::{Process, binary, read_report};

fn start(name: &str, variable: &str) -> (Process, SocketAddr) {
    let process = Process::start(Command::new(binary(name)).env(variable, "127.0.0.1:0"));
    let addr = process.address("listening on ");
    (process, addr)
}

#[test]
fn plain_main_finishes_its_job_writes_its_ledger_and_takes_no_other() {
    let mut process = Process::start(&mut Command::new(binary("plain-main")));
    process.stdout_line(|line| line == "working");
    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
    let stdout = process.stdout();
    assert!(stdout.contains("none lost") && stdout.contains("ledger written"), "{stdout}");
}

#[test]
fn hyper_service_finishes_the_request_under_way() {
    let (mut process, addr) = start("hyper-service", "HYPER_SERVICE_LISTEN");
    let mut idle = Connection::open(addr).expect("it serves");
    idle.send("GET", "/", "").expect("it reads");
    assert_eq!(idle.answer().expect("answers").status, 200);
    let mut slow = Connection::open(addr).expect("it serves");
    slow.send("GET", "/slow", "").expect("it reads");
    // Served in order on one connection each: when this answers, the slow one has been accepted.
    idle.send("GET", "/", "").expect("kept");
    idle.answer().expect("answers");
    process.signal(Signal::TERM);
    let answer = slow.answer().expect("the request under way finishes");
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
}

#[test]
fn tower_lines_answers_the_line_under_way_and_says_goodbye() {
    let (mut process, addr) = start("tower-lines", "TOWER_LINES_LISTEN");
    let mut stream = TcpStream::connect(addr).expect("it serves");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut lines = BufReader::new(stream.try_clone().expect("a socket")).lines().map_while(Result::ok);
    stream.write_all(b"hello\n").expect("it reads");
    assert_eq!(lines.next().as_deref(), Some("HELLO"));
    stream.write_all(b"slow\n").expect("it reads");
    process.signal(Signal::TERM);
    assert_eq!(lines.next().as_deref(), Some("SLOW"));
    assert_eq!((lines.next().as_deref(), lines.next()), (Some("bye"), None));
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
}

#[test]
fn axum_service_names_the_request_it_had_to_cut() {
    let reports = tempfile::tempdir().expect("a temporary directory");
    let mut command = Command::new(binary("axum-lines"));
    command.env("AXUM_SERVICE_LISTEN", "127.0.0.1:0").env("AXUM_SERVICE_REPORTS", reports.path());
    let mut process = Process::start(command.env("SHUTDOWN_GRACEFUL_TIMEOUT", "300ms"));
    let addr = process.address("listening on ");
    let mut stuck = Connection::open(addr).expect("it serves");
    stuck.send("GET", "/never", "").expect("it reads");
    let mut other = Connection::open(addr).expect("it serves");
    other.send("GET", "/", "connection: close\r\n").expect("it reads");
    assert_eq!(other.answer().expect("answers").status, 200);
    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 11, "{}", process.stderr());
    let report = read_report(reports.path());
    assert_eq!(report["requests"]["cut_requests"][0]["route"], "GET /never", "{report:#}");
    assert!(stuck.answer().is_err(), "cut");
}

#[test]
fn every_example_says_a_bad_budget_in_one_sentence_and_exits_with_2() {
    for name in ["axum-lines", "hyper-service", "tower-lines", "plain-main"] {
        let mut process = Process::start(Command::new(binary(name)).env("SHUTDOWN_TOTAL_TIMEOUT", "soon"));
        assert_eq!(process.exit_code(PATIENCE), 2);
        let stderr = process.stderr();
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.contains(name) && stderr.contains("SHUTDOWN_TOTAL_TIMEOUT"), "{stderr}");
        let mut process = Process::start(Command::new(binary(name)).env("SHUTDOWN_TOTAL_TIMEOUT", "1ms"));
        assert_eq!(process.exit_code(PATIENCE), 2);
        assert!(process.stderr().contains("impossible"), "{}", process.stderr());
    }
}

#[test]
fn sql_state_counts_over_a_stop_and_a_kill_and_tells_a_second_process_to_leave() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let start = || {
        let mut command = Command::new(binary("sql-state"));
        Process::start(command.current_dir(dir.path()))
    };
    let restored = |process: &Process| -> u64 {
        let line = process.stdout_line(|line| line.contains("jobs done until"));
        line.split(' ').next().and_then(|jobs| jobs.parse().ok()).expect("a number")
    };
    let mut first = start();
    first.stdout_line(|line| line == "working");
    let mut second = start();
    assert_eq!(second.exit_code(PATIENCE), 1);
    assert!(second.stderr().contains("in use by another process"), "{}", second.stderr());
    first.signal(Signal::TERM);
    assert_eq!(first.exit_code(PATIENCE), 0, "{}", first.stderr());
    let done: u64 = first
        .stdout()
        .lines()
        .find_map(|line| line.strip_suffix(" jobs done, none lost")?.parse().ok())
        .expect("it says how many");

    let mut killed = start();
    assert_eq!(restored(&killed), done, "the last save was after the last job");
    killed.stdout_line(|line| line == "working");
    killed.signal(Signal::KILL);
    killed.ended(PATIENCE);

    let mut last = start();
    assert!(restored(&last) >= done);
    last.signal(Signal::TERM);
    assert_eq!(last.exit_code(PATIENCE), 0, "{}", last.stderr());

    // A file that is no database any more is moved away, and named; the service starts.
    std::fs::write(dir.path().join("sql-state.db"), "no database at all, whatever its name may say")
        .expect("a file");
    let mut anew = start();
    anew.stdout_line(|line| line == "working");
    let said = anew.stderr_so_far();
    assert!(said.contains("sql-state.db.damaged"), "{said}");
    anew.signal(Signal::TERM);
    assert_eq!(anew.exit_code(PATIENCE), 0, "{}", anew.stderr());
}
