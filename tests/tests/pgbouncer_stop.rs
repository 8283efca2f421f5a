//! A PgBouncer beside the edge proxy is stopped without breaking a transaction, on each version that can be had: what a
//! signal means to it changed in 1.23.

use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::post;
use shutdown_tests::pg_clients::{Client, Ends, Load};
use shutdown_tests::process::{EdgeProxy, Stopwatch};
use shutdown_tests::servers::{Installed, Pgbouncer, Pooling, Postgres, on_each_version};

/// Clients in hot transactions, and the connections they share.
const CLIENTS: usize = 20;
const POOL: usize = 5;
/// How late the next signal may come.
const SLACK: Duration = Duration::from_millis(500);
const SHORT: &str = ",stop=INT:2s/TERM:1s/KILL:1s";

/// An edge-proxy with this companion.
fn beside(pgbouncer: &Pgbouncer, stop: &str) -> EdgeProxy {
    let pidfile = pgbouncer.pidfile();
    EdgeProxy::with_flags(["--companion", &format!("name=pgbouncer,pidfile={}{stop}", pidfile.display())])
}

/// The outcome of the stop, and the note of the only companion.
fn told(report: &Value) -> (&Value, &Value) {
    let stages = report["stages"].as_array().expect("a list");
    let stage = stages.iter().find(|stage| stage["stage"] == "companions");
    let task = &stage.unwrap_or_else(|| panic!("no companions in {report:#}"))["tasks"][0];
    assert_eq!(task["name"], "pgbouncer", "{report:#}");
    let note = &task["notes"][0];
    assert_eq!(note["subject"], "pgbouncer", "{report:#}");
    println!("  {note}");
    (&task["outcome"], note)
}

/// When the companion was gone, counted from the first signal.
fn gone_after(note: &Value) -> Duration {
    Duration::from_secs_f64(note["after_ms"].as_f64().expect("it was reached") / 1000.0)
}

#[track_caller]
fn near(time: Duration, wanted: Duration) {
    assert!(time.abs_diff(wanted) < SLACK, "{time:?}, not {wanted:?}");
}

fn exists(path: &Path) -> bool {
    path.try_exists().expect("the directory can be searched")
}

/// What becomes of hot transactions when the pooler is stopped by `stop`, which waits for its end.
fn under_load(postgres: &Postgres, installed: &Installed, stop: impl FnOnce(&mut Pgbouncer)) -> Ends {
    let mut pgbouncer = installed.start(postgres, Pooling::Transaction, POOL);
    let mut load = Load::start(postgres, &pgbouncer, CLIENTS);
    load.finish(CLIENTS);
    stop(&mut pgbouncer);
    load.stop(postgres)
}

#[test]
fn one_int_stops_a_pgbouncer_under_traffic_and_breaks_no_transaction() {
    on_each_version(|postgres, installed| {
        let ends = under_load(postgres, installed, |pgbouncer| {
            let pidfile = pgbouncer.pidfile();
            let mut proxy = beside(pgbouncer, "");
            proxy.process.signal(Signal::TERM);
            assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
            assert_eq!(pgbouncer.code(PATIENCE), 0, "{}", pgbouncer.log());
            assert_eq!(pgbouncer.signals(), ["SIGINT"], "{}", pgbouncer.log());
            assert!(!exists(&pidfile));
            let report = proxy.report();
            let (outcome, note) = told(&report);
            assert_eq!((outcome, &note["outcome"]), (&"ok".into(), &"exited".into()), "{report:#}");
            assert_eq!((&note["signal"], &note["signals"]), (&2.into(), &1.into()), "{report:#}");
            assert_eq!(note["pid"], pgbouncer.id(), "{report:#}");
        });
        println!("  {ends:?}");
        assert!(ends.broken.is_empty(), "{ends:?}");

        let control = under_load(postgres, installed, |pgbouncer| {
            if installed.is_at_least((1, 23)) {
                // The second one is an immediate end.
                pgbouncer.signal(Signal::INT);
                pgbouncer.got("SIGINT");
                pgbouncer.signal(Signal::INT);
            } else {
                pgbouncer.signal(Signal::TERM);
            }
            pgbouncer.ended(PATIENCE);
        });
        println!("  control: {control:?}");
        assert!(!control.broken.is_empty(), "control: the wrong signals must break what is under way");
    });
}

#[test]
fn a_session_that_never_ends_keeps_a_pgbouncer_until_term_is_due() {
    on_each_version(|postgres, installed| {
        let mut pgbouncer = installed.start(postgres, Pooling::Session, POOL);
        let mut session = Client::open(&pgbouncer);
        session.run("SELECT 1").expect("an answer");
        let mut proxy = beside(&pgbouncer, SHORT);
        proxy.process.signal(Signal::TERM);
        pgbouncer.got("SIGINT");
        let since_int = Stopwatch::start();
        pgbouncer.ended(PATIENCE);
        near(since_int.elapsed(), Duration::from_secs(2));
        assert_eq!(pgbouncer.signals(), ["SIGINT", "SIGTERM"], "{}", pgbouncer.log());
        session.run("SELECT 1").expect_err("it is gone");

        assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
        let report = proxy.report();
        let (outcome, note) = told(&report);
        assert_eq!((outcome, &note["outcome"]), (&"ok".into(), &"escalated".into()), "{report:#}");
        assert_eq!((&note["signal"], &note["signals"]), (&15.into(), &2.into()), "{report:#}");
        near(gone_after(note), Duration::from_secs(2));
        assert!(!exists(&pgbouncer.pidfile()));
    });
}

#[test]
fn a_frozen_pgbouncer_is_killed_and_the_pid_file_it_leaves_is_removed() {
    on_each_version(|postgres, installed| {
        let mut pgbouncer = installed.start(postgres, Pooling::Transaction, POOL);
        pgbouncer.signal(Signal::STOP);
        let mut proxy = beside(&pgbouncer, SHORT);
        proxy.process.signal(Signal::TERM);
        assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
        assert_eq!(pgbouncer.code(PATIENCE), -Signal::KILL.as_raw(), "{}", pgbouncer.log());
        assert!(pgbouncer.signals().is_empty(), "{}", pgbouncer.log());
        let report = proxy.report();
        let (outcome, note) = told(&report);
        assert_eq!((outcome, &note["outcome"]), (&"ok".into(), &"escalated".into()), "{report:#}");
        assert_eq!((&note["signal"], &note["signals"]), (&9.into(), &3.into()), "{report:#}");
        near(gone_after(note), Duration::from_secs(3));
        assert!(!exists(&pgbouncer.pidfile()));

        let mut control = installed.start(postgres, Pooling::Transaction, POOL);
        control.signal(Signal::KILL);
        control.ended(PATIENCE);
        assert!(exists(&control.pidfile()), "control: by itself it would be there");
    });
}

#[test]
fn however_many_ask_for_the_stop_a_pgbouncer_gets_one_int() {
    on_each_version(|postgres, installed| {
        let mut pgbouncer = installed.start(postgres, Pooling::Transaction, POOL);
        let mut client = Client::open(&pgbouncer);
        client.run("BEGIN").expect("an answer");
        let mut proxy = beside(&pgbouncer, "");
        let admin = proxy.admin;
        let callers: Vec<_> = (0..2)
            .map(|_| thread::spawn(move || post(admin, "/terminate", "").expect("flushed before the exit")))
            .collect();
        pgbouncer.got("SIGINT");
        // Behind /terminate it is the first signal, not the one that forces.
        proxy.process.signal(Signal::TERM);
        client.run("SELECT pg_sleep(1)").expect("the transaction goes on");
        client.run("COMMIT").expect("to its end");
        assert_eq!(pgbouncer.code(PATIENCE), 0, "{}", pgbouncer.log());
        assert_eq!(pgbouncer.signals(), ["SIGINT"], "{}", pgbouncer.log());
        assert!(!exists(&pgbouncer.pidfile()));

        assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
        let report = proxy.report();
        for caller in callers {
            let answer = caller.join().expect("answered");
            assert_eq!((answer.status, answer.json()), (200, report.clone()));
        }
        let (outcome, note) = told(&report);
        assert_eq!((outcome, &note["outcome"]), (&"ok".into(), &"exited".into()), "{report:#}");
        assert_eq!((&note["signal"], &note["signals"]), (&2.into(), &1.into()), "{report:#}");
    });
}
