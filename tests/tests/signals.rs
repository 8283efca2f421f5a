//! Stop signals against the real proxy: the first, the second, the third, and those that do not count.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{Connection, get, status_until};
use shutdown_tests::process::{EdgeProxy, Process, Stopwatch, read_report};

/// A proxy with a request that never ends, so that a shutdown has something to wait for.
fn busy() -> (EdgeProxy, Connection) {
    let proxy = EdgeProxy::with_defaults();
    let mut stuck = Connection::open(proxy.listen).expect("it serves");
    stuck.send("GET", "/never", "").expect("it reads");
    status_until(proxy.admin, |status| status["requests"]["active"] == 1);
    (proxy, stuck)
}

/// Sends `signal` and waits until `/status` shows `counted` signals.
fn send_counted(proxy: &EdgeProxy, signal: Signal, counted: u64) {
    proxy.process.signal(signal);
    status_until(proxy.admin, |status| status["signals"] == counted);
}

/// Lets the time pass in which the same signal counts once.
fn let_the_echo_pass(proxy: &EdgeProxy) {
    let echo = shutdown_core::SAME_SIGNAL + Duration::from_millis(50);
    status_until(proxy.admin, |status| {
        status["shutting_down_for_ms"].as_f64().is_some_and(|ms| ms > echo.as_secs_f64() * 1000.0)
    });
}

#[test]
fn term_and_int_each_end_an_idle_proxy_cleanly_and_say_who_sent_them() {
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
        let mut proxy = EdgeProxy::with_defaults();
        proxy.process.signal(signal);
        assert_eq!(proxy.process.exit_code(PATIENCE), 0);
        let report = proxy.report();
        assert_eq!(report["reason"]["signal"], name);
        assert_eq!(report["reason"]["pid"], std::process::id());
        assert_eq!(report["reason"]["uid"], rustix::process::getuid().as_raw());
        let stderr = proxy.process.stderr();
        assert!(stderr.contains(name) && stderr.contains("Graceful shutdown completed"), "{stderr}");
    }
}

#[test]
fn a_second_signal_forces_and_the_report_says_by_which() {
    for (second, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let (mut proxy, _stuck) = busy();
        send_counted(&proxy, Signal::TERM, 1);
        let_the_echo_pass(&proxy);
        let begin = Stopwatch::start();
        proxy.process.signal(second);
        assert_eq!(proxy.process.exit_code(PATIENCE), code);
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        let report = proxy.report();
        assert_eq!((&report["forced_by"], &report["exit_code"]), (&(code - 128).into(), &code.into()));
        assert_eq!(report["signals"].as_array().map(Vec::len), Some(2));
        assert_eq!(report["requests"]["cut_requests"][0]["route"], "GET /never");
        assert!(proxy.process.stderr().contains("hurrying"));
    }
}

#[test]
fn the_same_signal_within_200_ms_counts_once() {
    let (mut proxy, stuck) = busy();
    // Together: however slow this machine, both are within the time.
    proxy.process.signal(Signal::TERM);
    status_until(proxy.admin, |status| status["signals"] == 1);
    proxy.process.signal(Signal::TERM);
    let_the_echo_pass(&proxy);
    let status = status_until(proxy.admin, |_| true);
    assert_eq!((&status["signals"], &status["urgency"]), (&1.into(), &"graceful".into()), "{status:#}");
    drop(stuck);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
    assert_eq!(proxy.report()["signals"].as_array().map(Vec::len), Some(1));
}

#[test]
fn a_signal_ignored_at_start_is_left_alone() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let proxy = EdgeProxy::command(dir.path());
    let mut ignoring = Command::new("sh");
    ignoring.args(["-c", r#"trap "" INT; exec "$0" "$@""#]).arg(proxy.get_program()).args(proxy.get_args());
    ignoring.current_dir(dir.path());
    let mut process = Process::start(&mut ignoring);
    let admin = process.address("  admin ");
    process.signal(Signal::INT);
    // Signals are handled in their order: were INT counted, it would be seen before TERM.
    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 0);
    let report = read_report(&dir.path().join("data"));
    assert_eq!(report["reason"]["signal"], "SIGTERM", "admin {admin}: {report:#}");
    assert_eq!(report["signals"].as_array().map(Vec::len), Some(1), "{report:#}");
}

/// A busy proxy whose every log line blocks.
fn busy_with_a_blocked_stderr() -> (Process, std::net::SocketAddr, tempfile::TempDir, Connection) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let process = Process::start_unread(&mut EdgeProxy::command(dir.path()));
    let (listen, admin) = (process.address("  traffic "), process.address("  admin "));
    let mut stuck = Connection::open(listen).expect("it serves");
    stuck.send("GET", "/never", "").expect("it reads");
    status_until(admin, |status| status["requests"]["active"] == 1);
    process.block_stderr();
    (process, admin, dir, stuck)
}

/// The same, once it has heard TERM and would count a second one.
fn stopping_with_a_blocked_stderr() -> (Process, std::net::SocketAddr, tempfile::TempDir, Connection) {
    let (process, admin, dir, stuck) = busy_with_a_blocked_stderr();
    process.signal(Signal::TERM);
    status_until(admin, |status| status["phase"] == "draining");
    assert_eq!(get(admin, "/readyz").expect("answers").status, 503);
    let echo = (shutdown_core::SAME_SIGNAL + Duration::from_millis(50)).as_secs_f64() * 1000.0;
    status_until(admin, |status| status["shutting_down_for_ms"].as_f64().is_some_and(|ms| ms > echo));
    (process, admin, dir, stuck)
}

#[test]
fn a_blocked_stderr_holds_up_neither_readiness_nor_force_nor_the_report() {
    let (mut process, _, dir, _stuck) = stopping_with_a_blocked_stderr();
    let begin = Stopwatch::start();
    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 143);
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    let report = read_report(&dir.path().join("data"));
    assert_eq!((&report["forced_by"], &report["requests"]["cut"]), (&15.into(), &1.into()));
}

#[test]
fn a_third_signal_leaves_from_inside_its_handler() {
    // The second one's report waits a moment for the log; that moment is the third one's.
    let (mut process, admin, _dir, _stuck) = stopping_with_a_blocked_stderr();
    process.signal(Signal::TERM);
    status_until(admin, |status| status["signals"] == 2);
    process.signal(Signal::INT);
    assert_eq!(process.exit_code(PATIENCE), 130, "TERM alone would have left with 143");
}

#[test]
fn the_echo_of_a_first_signal_is_no_third_one() {
    // A terminal's INT to the whole group, a manager's TERM, and the INT once more from a parent that forwards it.
    let (mut process, admin, dir, _stuck) = busy_with_a_blocked_stderr();
    process.signal(Signal::INT);
    status_until(admin, |status| status["signals"] == 1);
    process.signal(Signal::TERM);
    status_until(admin, |status| status["signals"] == 2);
    process.signal(Signal::INT);
    assert_eq!(process.exit_code(PATIENCE), 143, "an echo left from its handler");
    let report = read_report(&dir.path().join("data"));
    assert_eq!(report["signals"].as_array().map(Vec::len), Some(2), "{report:#}");
}

#[test]
fn a_stderr_whose_reader_is_gone_keeps_nothing_from_happening() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut process = Process::start_unread(&mut EdgeProxy::command(dir.path()));
    let (listen, admin) = (process.address("  traffic "), process.address("  admin "));
    let mut slow = Connection::open(listen).expect("it serves");
    slow.send("GET", "/slow?ms=700", "connection: close\r\n").expect("it reads");
    status_until(admin, |status| status["requests"]["active"] == 1);
    process.break_stderr();
    process.signal(Signal::TERM);
    status_until(admin, |status| status["phase"] == "draining");
    assert_eq!(slow.answer().expect("finishes").status, 200);
    assert_eq!(process.exit_code(PATIENCE), 0);
    assert_eq!(read_report(&dir.path().join("data"))["requests"]["drained"], 1);
}

#[test]
fn a_process_that_wakes_up_after_its_total_still_writes_its_report() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let total = Duration::from_secs(2);
    let mut process = Process::start(EdgeProxy::command(dir.path()).env("SHUTDOWN_TOTAL_TIMEOUT", "2"));
    let (listen, admin) = (process.address("  traffic "), process.address("  admin "));
    let mut stuck = Connection::open(listen).expect("it serves");
    stuck.send("GET", "/never", "").expect("it reads");
    status_until(admin, |status| status["requests"]["active"] == 1);
    process.signal(Signal::TERM);
    status_until(admin, |status| status["phase"] == "draining");
    process.signal(Signal::STOP);
    std::thread::park_timeout(total + Duration::from_millis(200));
    process.signal(Signal::CONT);
    assert_eq!(process.exit_code(PATIENCE), 11);
    assert_eq!(read_report(&dir.path().join("data"))["requests"]["cut"], 1);
}
