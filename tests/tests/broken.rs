//! Each resource broken in turn: the total holds, later stages run, the report names the culprit, the exit code is the
//! documented one, and PostgreSQL keeps no connection.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_tests::PATIENCE;
use shutdown_tests::backend::{Backend, Standing, WRITES_WAIT};
use shutdown_tests::client::{Connection, post, status_until};
use shutdown_tests::process::{Process, Stopwatch, binary};
use shutdown_tests::servers::sqlite;

/// Short enough to be waited for; the total is more than their sum.
const BUDGETS: [(&str, &str); 7] = [
    ("SHUTDOWN_TOTAL_TIMEOUT", "8"),
    ("SHUTDOWN_GRACEFUL_TIMEOUT", "1500ms"),
    ("SHUTDOWN_LINGER", "100ms"),
    ("SHUTDOWN_BACKGROUND_TIMEOUT", "1"),
    ("SHUTDOWN_WEBSOCKET_TIMEOUT", "1"),
    ("SHUTDOWN_CACHE_TIMEOUT", "1"),
    ("SHUTDOWN_DB_TIMEOUT", "2"),
];
/// The sum of the budgets above, and what leaving takes on a busy machine.
const AT_MOST: Duration = Duration::from_millis(1500 + 1000 + 1000 + 1000 + 2000 + 700);

/// What PostgreSQL logs of a query that somebody has had cancelled.
const CANCELLED: &str = "canceling statement due to user request";

/// What came of it.
struct Ended {
    backend: Backend,
    code: i32,
    stages: Vec<(String, String, String)>,
    report: Value,
}

impl Ended {
    /// The outcome of a stage, and what its tasks said.
    fn stage(&self, name: &str) -> (&str, &str) {
        let found = self.stages.iter().find(|(stage, _, _)| stage == name);
        let (_, outcome, details) = found.unwrap_or_else(|| panic!("no stage {name}: {:?}", self.stages));
        (outcome, details)
    }

    /// Every stage but these ended well, and the database's was the last.
    fn others_are_well(&self, broken: &[&str]) {
        for (stage, outcome, details) in &self.stages {
            assert!(outcome == "ok" || broken.contains(&stage.as_str()), "{stage}: {outcome} {details}");
        }
        assert_eq!(self.stages.last().map(|(stage, _, _)| stage.as_str()), Some("database"));
    }

    /// PostgreSQL keeps no connection, but for the moment in which it hears of the last one's end: less than the two
    /// seconds after which it would look for its client itself.
    fn no_connection_is_left(self) {
        self.no_connection_is_left_after(Duration::from_secs(1));
    }

    fn no_connection_is_left_after(mut self, time: Duration) {
        let begin = Stopwatch::start();
        while self.backend.connections() > 0 {
            let left = self
                .backend
                .postgres()
                .query("SELECT state, query FROM pg_stat_activity WHERE application_name LIKE 'axum%'");
            assert!(begin.elapsed() < time, "{left}");
        }
    }
}

/// Starts a backend on real servers, breaks something, stops it, and waits.
fn broken<T>(settings: &[(&str, &str)], broken: impl FnOnce(&mut Backend) -> T) -> (Ended, T) {
    let mut given = BUDGETS.to_vec();
    given.push(("AXUM_SERVICE_INTERVAL", "50ms"));
    given.extend(settings);
    let mut backend = Backend::start(Standing::servers(), &given);
    let kept = broken(&mut backend);
    let begin = Stopwatch::start();
    backend.service.process.signal(Signal::TERM);
    let code = backend.service.process.exit_code(PATIENCE);
    let took = begin.elapsed();
    let stages = backend.stages();
    assert!(took < AT_MOST, "{took:?}: {stages:?}");
    let report = backend.service.report();
    assert_eq!(report["exit_code"], code);
    assert_eq!(report["watchdog"], false);
    (Ended { code, stages, report, backend }, kept)
}

#[test]
fn a_redis_that_is_stopped_fails_its_stage_with_the_number_of_writes_and_the_database_is_closed() {
    let (ended, _) = broken(&[WRITES_WAIT], |backend| {
        backend.pay(7);
        backend.redis().freeze();
    });
    assert_eq!(ended.code, 10);
    let (outcome, details) = ended.stage("cache");
    assert_eq!(outcome, "failed");
    // What it tried, and what came of it.
    assert!(
        details.starts_with("Redis: failed 7 writes have not landed in Redis: ") && details.contains("time"),
        "{details}"
    );
    ended.others_are_well(&["cache"]);
    ended.no_connection_is_left();
}

#[test]
fn a_postgres_that_has_gone_fails_the_tasks_that_need_it_and_the_writes_land() {
    let (mut ended, payments) = broken(&[WRITES_WAIT], |backend| {
        let payments = backend.pay(7);
        backend.postgres().stop_server();
        payments
    });
    assert_eq!(ended.code, 10);
    let (outcome, details) = ended.stage("background");
    // The pool tries again for a while, and some are still at it when their time is over.
    assert!(outcome == "failed" || outcome == "timed_out", "{outcome}");
    for task in [
        "metrics sync",
        "ledger ingestion",
        "pool sync",
        "trustline stats",
        "broadcaster",
        "webhook dispatcher",
    ] {
        assert!(
            details.contains(&format!("{task}: failed")) || details.contains(&format!("{task}: timed_out")),
            "{details}"
        );
    }
    ended.others_are_well(&["background"]);
    assert_eq!(ended.backend.cached(&payments), 7);
}

#[test]
fn a_postgres_that_is_stopped_in_a_query_holds_nothing_up_beyond_its_stages() {
    let (mut ended, mut request) = broken(&[WRITES_WAIT], |backend| {
        let request = long_query(backend);
        backend.postgres().freeze();
        request
    });
    assert_eq!(ended.code, 11);
    assert_eq!(ended.report["requests"]["cut_requests"][0]["route"], "GET /query");
    request.answer().unwrap_err();
    let (outcome, details) = ended.stage("background");
    assert!(outcome == "timed_out" && details.contains("ledger ingestion: timed_out"), "{details}");
    let (outcome, details) = ended.stage("database");
    assert!(outcome == "failed" && details.contains("it does not answer"), "{outcome} {details}");
    ended.others_are_well(&["background", "database"]);
    // Nobody could tell it to cancel; it looks after its clients itself.
    ended.backend.postgres().thaw();
    ended.no_connection_is_left_after(Duration::from_secs(10));
}

/// Has the service run a query that takes a minute.
fn long_query(backend: &mut Backend) -> Connection {
    let mut request = Connection::open(backend.service.listen).expect("it serves");
    request.send("GET", "/query?ms=60000", "").expect("it reads");
    backend.postgres().logged(|line| line.text.contains("execute") && line.text.contains("pg_sleep"));
    request
}

#[test]
fn a_query_of_a_minute_is_cut_with_its_request_and_cancelled_on_the_server() {
    let (mut ended, _request) = broken(&[], long_query);
    assert_eq!(ended.code, 11);
    assert_eq!(ended.report["requests"]["cut_requests"][0]["route"], "GET /query");
    let (outcome, details) = ended.stage("database");
    assert_eq!(outcome, "failed");
    assert!(details.contains("cancelled what still ran: SELECT 1 FROM pg_sleep($1 / 1000.0)"), "{details}");
    ended.others_are_well(&["database"]);
    ended.backend.postgres().logged(|line| line.text.contains(CANCELLED));
    ended.no_connection_is_left();

    // The control: nobody cancels for one that is killed. The server finds out when it looks for its client.
    let mut killed = Backend::start(Standing::servers(), &[]);
    let _request = long_query(&mut killed);
    killed.service.process.signal(Signal::KILL);
    killed.service.process.ended(PATIENCE);
    killed.postgres().logged(|line| line.text.contains("connection to client lost"));
    assert!(!killed.postgres().log().iter().any(|line| line.text.contains(CANCELLED)));
}

#[test]
fn a_query_that_ends_in_its_stage_is_waited_for_and_not_cancelled() {
    // Its request is cut half a second before it ends.
    let (ended, _request) = broken(&[("SHUTDOWN_GRACEFUL_TIMEOUT", "200ms")], |backend| {
        let mut request = Connection::open(backend.service.listen).expect("it serves");
        request.send("GET", "/query?ms=900", "").expect("it reads");
        status_until(backend.service.admin, |status| status["requests"]["active"] == 1);
        request
    });
    assert_eq!(ended.code, 11);
    ended.others_are_well(&[]);
    ended.no_connection_is_left();
}

#[test]
fn a_task_that_ignores_its_token_is_aborted_and_named() {
    // An iteration of an hour.
    let (ended, _) = broken(&[("AXUM_SERVICE_WORK", "3600s")], |_| ());
    assert_eq!(ended.code, 10);
    let (outcome, details) = ended.stage("background");
    assert_eq!(outcome, "timed_out");
    assert_eq!(details.matches("timed_out aborted").count(), 6, "{details}");
    ended.others_are_well(&["background"]);
    ended.no_connection_is_left();
}

#[test]
fn a_websocket_whose_client_never_answers_is_cut_and_named() {
    let (ended, _socket) = broken(&[], |backend| {
        let mut socket = Connection::open(backend.service.listen).expect("it serves");
        socket.upgrade("/live").expect("a WebSocket");
        status_until(backend.service.admin, |status| status["sessions"]["open"] == 1);
        socket
    });
    assert_eq!(ended.code, 11);
    assert_eq!(ended.report["sessions"]["cut_sessions"][0]["name"], "GET /live");
    assert_eq!(ended.stage("websockets").0, "timed_out");
    ended.others_are_well(&["websockets"]);
    ended.no_connection_is_left();
}

#[test]
fn on_a_full_disk_a_payment_is_refused_or_lasts_and_with_room_it_goes_on() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // A disk of its own, most of it taken; and without that so large that the log, which is folded into the database at 4 MB, never
    // fills it.
    let script = r#"mount -t tmpfs -o size=32m,mode=700 tmpfs "$1" && cd "$1" && head -c 33030144 /dev/zero > ballast && exec "$0""#;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]);
    command.arg(binary("axum-service")).arg(dir.path());
    command.env("AXUM_SERVICE_LISTEN", "127.0.0.1:0").env("AXUM_SERVICE_INTERVAL", "100ms");
    for name in ["AXUM_SERVICE_ADMIN", "AXUM_SERVICE_REPORTS", "DATABASE_URL", "CACHE_URL", "REGISTRY_URL"] {
        command.env_remove(name);
    }
    let mut process = Process::start(&mut command);
    let addr = process.address("listening on ");
    let asset = "A".repeat(500);
    let pay = || post(addr, &format!("/payments?asset={asset}"), "").expect("it serves");
    let mut ids = std::collections::BTreeSet::new();
    let mut refused = 0;
    while refused < 20 {
        let answer = pay();
        match answer.status {
            201 => assert!(ids.insert(answer.json()["id"].as_i64().expect("an id")), "one id, two payments"),
            500 => refused += 1,
            _ => panic!("{answer:?}"),
        }
        assert!(ids.len() < 10_000, "the disk is never full");
    }
    let root = PathBuf::from(format!("/proc/{}/root", process.id()))
        .join(dir.path().strip_prefix("/").expect("absolute"));
    std::fs::remove_file(root.join("ballast")).expect("our ballast");
    let begin = Stopwatch::start();
    loop {
        let answer = pay();
        if answer.status == 201 {
            ids.insert(answer.json()["id"].as_i64().expect("an id"));
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "it does not go on: {answer:?}");
    }
    // Its disk goes with it: a copy of the file and its log, while nobody writes.
    process.signal(Signal::STOP);
    let copy = tempfile::tempdir().expect("a temporary directory");
    for file in ["axum-service.db", "axum-service.db-wal"] {
        std::fs::copy(root.join(file), copy.path().join(file)).expect("its file");
    }
    process.signal(Signal::CONT);
    let rows = sqlite(&copy.path().join("axum-service.db"), "SELECT id FROM payments ORDER BY id");
    let rows: std::collections::BTreeSet<i64> = rows.lines().map(|row| row.parse().expect("an id")).collect();
    assert_eq!(
        ids.difference(&rows).collect::<Vec<_>>(),
        Vec::<&i64>::new(),
        "answered with 201 and not there"
    );
    println!("{} payments, {refused} refused, {} rows", ids.len(), rows.len());
    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
}
