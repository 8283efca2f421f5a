//! Stop signals against the real proxy: the first, the second, the third, and those that do not count.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{Connection, status_until};
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
    send_counted(&proxy, Signal::TERM, 1);
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
