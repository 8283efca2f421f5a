//! Stages over real resources: requests, tasks and WebSockets use the database and the cache to their last moment, and
//! each is closed after the last one that needs it.

use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::backend::{Backend, Load, Standing, WRITES_WAIT, listen_live};
use shutdown_tests::client::{Connection, status_until};
use shutdown_tests::process::Stopwatch;
use shutdown_tests::servers::unix_ms;
use shutdown_tests::{PATIENCE, count};

const PENDING: usize = 100;
/// Iterations that are longer than the pauses between them: at any moment most of the six are in one.
const BUSY_TASKS: [(&str, &str); 2] = [("AXUM_SERVICE_INTERVAL", "10ms"), ("AXUM_SERVICE_WORK", "50ms")];

/// A request whose answer needs the database for another second and a half.
fn export(backend: &Backend) -> Connection {
    let mut connection = Connection::open(backend.service.listen).expect("it serves");
    connection.send("GET", "/export?ms=1500", "").expect("it reads");
    connection
}

/// Asks until it holds.
fn wait_for(holds: impl Fn() -> bool) {
    let begin = Stopwatch::start();
    while !holds() {
        assert!(begin.elapsed() < PATIENCE, "never");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

fn unended(backend: &Backend) -> String {
    backend.query("SELECT count(*) FROM task_runs WHERE ended IS NULL")
}

#[test]
fn every_resource_is_closed_after_the_last_one_that_needs_it() {
    for standing in Standing::both() {
        let servers = matches!(standing, Standing::Servers(_));
        let mut settings = vec![WRITES_WAIT];
        settings.extend(BUSY_TASKS);
        let mut backend = Backend::start(standing, &settings);
        let pending = backend.pay(PENDING);
        if servers {
            assert_eq!(backend.cached(&pending), 0, "the writes wait");
        }
        let monitor = servers.then(|| backend.redis().monitor());
        let live = listen_live(backend.service.listen, 20);
        let mut exports: Vec<_> = (0..8).map(|_| export(&backend)).collect();
        let load = Load::start(backend.service.listen, 4, Duration::from_millis(2));
        load.answers(count(500));

        let (begin, began_ms) = (Stopwatch::start(), unix_ms());
        backend.service.process.signal(Signal::TERM);
        let exit_code = backend.service.process.exit_code(PATIENCE);
        let took = begin.elapsed();
        let seen = load.ended();
        let stderr = backend.service.process.stderr();

        assert_eq!(exit_code, 0, "{:?}\n{stderr}", backend.stages());
        // No request saw a closed pool.
        assert_eq!(seen.broken, Vec::<String>::new(), "{stderr}");
        assert!(seen.statuses.keys().all(|status| [200, 201, 503].contains(status)), "{:?}", seen.statuses);
        for export in &mut exports {
            let answer = export.answer().expect("the whole answer");
            assert!(String::from_utf8_lossy(&answer.body).contains("line 20 of 20: "), "{answer:?}");
        }
        assert_eq!(live.join().expect("the clients"), (20, 20), "message and Close 1001");
        // Every task ended its iteration, and the last ones saw all that requests did.
        assert_eq!(backend.query("SELECT count(*) FROM task_runs"), "6");
        assert_eq!(unended(&backend), "0");
        let paid = PENDING + seen.paid.len();
        let answered = paid + seen.statuses.get(&200).copied().unwrap_or_default() + exports.len() + 20;
        let metric = |name: &str| backend.query(&format!("SELECT value FROM metrics WHERE name = '{name}'"));
        assert_eq!((metric("payments"), metric("answered")), (paid.to_string(), answered.to_string()));
        assert_eq!(backend.query("SELECT count(*) FROM webhooks WHERE delivered IS NULL"), "0");
        assert_eq!(backend.query("SELECT count(*) FROM payments WHERE ledger IS NULL"), "0");

        let stages = backend.stages();
        let names: Vec<_> =
            stages.iter().map(|(stage, outcome, _)| (stage.as_str(), outcome.as_str())).collect();
        assert_eq!(names, [("background", "ok"), ("websockets", "ok"), ("cache", "ok"), ("database", "ok")]);
        let report = backend.service.report();
        let times: Vec<_> = report["stages"]
            .as_array()
            .expect("stages")
            .iter()
            .flat_map(|stage| [&stage["start_ms"], &stage["end_ms"]])
            .map(|time| time.as_f64().expect("a time"))
            .collect();
        assert!(times.is_sorted(), "{times:?}");
        println!(
            "{}: {answered} answers, {paid} payments, exit 0 after {took:?}",
            if servers { "PostgreSQL and Redis" } else { "SQLite and memory" }
        );
        if !servers {
            continue;
        }

        let mut all = pending;
        all.extend(&seen.paid);
        assert_eq!(
            all.iter()
                .collect::<Vec<_>>()
                .chunks(1000)
                .map(|ids| { backend.cached(&ids.iter().map(|id| **id).collect::<Vec<_>>()) })
                .sum::<usize>(),
            all.len(),
            "every write has landed"
        );
        assert_eq!(backend.connections(), 0);
        // The servers' own accounts: the last statement, then the last write to Redis, then PostgreSQL loses its connections.
        let monitor = monitor.expect("started above");
        let is_write = |line: &str| line.contains("\"SET\"");
        monitor.stdout_nth(paid - 1, is_write);
        let monitor = monitor.stdout_so_far();
        let writes = monitor.lines().filter(|line| is_write(line));
        let seconds = |line: &str| line.split(' ').next().and_then(|time| time.parse::<f64>().ok());
        let written = writes.filter_map(seconds).map(|seconds| (seconds * 1000.0) as u64);
        let (first_write, last_write) =
            written.fold((u64::MAX, 0), |(first, last), at| (first.min(at), last.max(at)));
        assert_eq!(
            backend.redis().cli(&["CLIENT", "LIST", "TYPE", "normal"]).matches("127.0.0.1").count(),
            0
        );
        let log = backend.postgres().log();
        let ours: Vec<_> =
            log.iter().filter(|line| line.application_name.starts_with("axum-service-")).collect();
        let last_statement =
            ours.iter().filter(|line| line.text.contains("execute")).map(|line| line.at_ms).max();
        let disconnections: Vec<_> =
            ours.iter().filter(|line| line.text.contains("disconnection: ")).map(|line| line.at_ms).collect();
        let gone = disconnections.iter().min().copied();
        let order = [Some(began_ms), last_statement, Some(first_write), Some(last_write), gone];
        assert!(order.is_sorted(), "signal, last statement, writes, connections gone: {order:?}");
    }
}

/// Stops a backend with 100 writes that wait, by `stop`; how many have landed, and the exit code if it had one.
fn writes_landed(
    settings: &[(&str, &str)],
    stop: impl FnOnce(&mut Backend),
) -> (usize, Option<i32>, Backend) {
    let mut given = vec![WRITES_WAIT];
    given.extend(settings);
    let mut backend = Backend::start(Standing::servers(), &given);
    let pending = backend.pay(PENDING);
    let mut request = Connection::open(backend.service.listen).expect("it serves");
    // One that never ends: the drain is not over by itself.
    request.send("GET", "/never", "").expect("it reads");
    status_until(backend.service.admin, |status| status["requests"]["active"] == 1);
    stop(&mut backend);
    let code = backend.service.process.ended(PATIENCE).code();
    let landed = backend.cached(&pending);
    (landed, code, backend)
}

#[test]
fn pending_cache_writes_land_also_when_a_second_signal_forces_and_when_the_total_is_three_seconds() {
    let (landed, code, backend) = writes_landed(&[], |backend| {
        backend.service.process.signal(Signal::TERM);
        status_until(backend.service.admin, |status| status["phase"] == "draining");
        backend.service.process.signal(Signal::INT);
    });
    assert_eq!((landed, code), (PENDING, Some(130)), "{:?}", backend.stages());

    let begin = Stopwatch::start();
    let (landed, code, backend) = writes_landed(&[("SHUTDOWN_TOTAL_TIMEOUT", "3")], |backend| {
        backend.service.process.signal(Signal::TERM);
    });
    assert_eq!((landed, code), (PENDING, Some(11)), "{:?}", backend.stages());
    let total = backend.service.report()["duration_ms"].as_f64().expect("a time");
    assert!(total < 3200.0, "{total}");
    println!("second signal and a total of 3 s: {PENDING} of {PENDING} landed, each ({:?})", begin.elapsed());

    // The control: they do wait, and whoever is killed loses them.
    let (landed, code, _) = writes_landed(&[], |backend| backend.service.process.signal(Signal::KILL));
    assert_eq!((landed, code), (0, None));
}

#[test]
fn a_task_that_is_told_finishes_its_iteration_and_one_that_is_killed_does_not() {
    let mut backend = Backend::start(Standing::Embedded, &BUSY_TASKS);
    let runs =
        |backend: &Backend| backend.query("SELECT coalesce(min(runs), 0) FROM task_runs").parse::<u64>();
    wait_for(|| runs(&backend).expect("a number") >= 3);
    backend.service.process.signal(Signal::TERM);
    assert_eq!(backend.service.process.exit_code(PATIENCE), 0, "{}", backend.service.process.stderr());
    assert_eq!(unended(&backend), "0");

    let mut killed =
        Backend::start(Standing::Embedded, &[("AXUM_SERVICE_INTERVAL", "1ms"), ("AXUM_SERVICE_WORK", "1s")]);
    wait_for(|| killed.query("SELECT count(*) FROM task_runs") == "6");
    killed.service.process.signal(Signal::KILL);
    killed.service.process.ended(PATIENCE);
    assert_ne!(unended(&killed), "0");
}
