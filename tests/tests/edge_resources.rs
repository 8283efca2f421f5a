//! The edge proxy's database, cache and registry, against real servers: what was answered is written down, what may be kept
//! is kept, and each is let go of in its stage.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{Answer, Connection, get, status_until};
use shutdown_tests::process::{EdgeProxy, Process, Stopwatch};
use shutdown_tests::servers::{Answer as Registered, Postgres, Redis, Registry};

/// Asks the database file of a proxy that has ended; Python's own SQLite is the judge.
fn sqlite(dir: &Path, query: &str) -> String {
    let script = "import sqlite3, sys\n\
                  for row in sqlite3.connect(sys.argv[1]).execute(sys.argv[2]): print('|'.join(map(str, row)))";
    let mut command = Command::new("python3");
    command.args(["-c", script]).arg(dir.join("data/edge-proxy.db")).arg(query);
    let mut judge = Process::start(&mut command);
    assert_eq!(judge.exit_code(PATIENCE), 0, "{}", judge.stderr());
    judge.stdout()
}

fn number(text: &str) -> usize {
    text.parse().unwrap_or_else(|_| panic!("{text:?} is no number"))
}

/// A stage's report; none if it had nothing to do.
fn stage<'a>(report: &'a Value, name: &str) -> &'a Value {
    let stages = report["stages"].as_array().expect("a list");
    stages.iter().find(|stage| stage["stage"] == name).unwrap_or(&Value::Null)
}

/// An upstream that writes down what it is asked, and answers as the path says.
struct Upstream {
    addr: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Upstream {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = listener.local_addr().expect("bound");
        let (asked, over) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<AtomicBool>::default());
        let (list, end) = (Arc::clone(&asked), Arc::clone(&over));
        let thread = thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                // A client that leaves is no matter.
                let _ = Self::answer(stream, &list);
            }
        });
        Self { addr, asked, over, thread: Some(thread) }
    }

    fn answer(mut stream: TcpStream, asked: &Mutex<Vec<String>>) -> std::io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read(&mut byte)? == 0 {
                return Ok(());
            }
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let line = head.split(" HTTP").next().unwrap_or_default().to_owned();
        let number = {
            let mut asked = asked.lock().expect("no upstream panics");
            asked.push(line.clone());
            asked.len()
        };
        let headers = match line.split('/').nth(1) {
            Some("keep") => "cache-control: max-age=60\r\n",
            Some("cookie") => "cache-control: max-age=60\r\nset-cookie: a=1\r\n",
            _ => "cache-control: no-store\r\n",
        };
        let body = format!("answer {number}\n");
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )
    }

    fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// How often it was asked this, as `GET /path`.
    fn asked(&self, line: &str) -> usize {
        self.asked.lock().expect("no upstream panics").iter().filter(|asked| *asked == line).count()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One request for a host of its own, the same at every start.
fn ask(addr: SocketAddr, method: &str, path: &str, headers: &str) -> Answer {
    let mut connection = Connection::open(addr).expect("it serves");
    let head =
        format!("{method} {path} HTTP/1.1\r\nhost: edge.example\r\ncontent-length: 0\r\n{headers}\r\n");
    connection.raw(head.as_bytes()).expect("it reads");
    connection.answer().expect("answers")
}

/// Sends requests over and over, from before TERM until nobody answers; how many were answered with 200, and how many of
/// those after TERM.
fn load_during_term(proxy: &mut EdgeProxy) -> (usize, usize) {
    let (listen, termed) = (proxy.listen, AtomicBool::new(false));
    let (before, after) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let client = || {
        while let Ok(mut connection) = Connection::open(listen) {
            loop {
                let late = termed.load(Ordering::Relaxed);
                if connection.send("GET", "/slow?ms=3", "").is_err() {
                    break;
                }
                let Ok(answer) = connection.answer() else { break };
                if answer.status != 200 {
                    assert_eq!(answer.status, 503, "{answer:?}");
                    break;
                }
                if late { &after } else { &before }.fetch_add(1, Ordering::Relaxed);
                if answer.header("connection") == Some("close") {
                    break;
                }
            }
        }
    };
    thread::scope(|scope| {
        (0..8).for_each(|_| drop(scope.spawn(client)));
        // The log has begun to be written, and goes on.
        status_until(proxy.admin, |status| status["database"]["rows_written"].as_u64() > Some(50));
        termed.store(true, Ordering::Relaxed);
        proxy.process.signal(Signal::TERM);
        assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
    });
    (before.into_inner() + after.load(Ordering::Relaxed), after.into_inner())
}

const ANSWERED: &str =
    "SELECT count(*) FROM requests WHERE path = '/slow' AND status = 200 AND method = 'GET'";
const ROWS: &str = "SELECT count(*) FROM requests";
const COUNTED: &str = "SELECT sum(value) FROM counters WHERE name LIKE 'requests%'";
const LINGER: (&str, &str) = ("SHUTDOWN_LINGER", "400ms");

#[test]
fn every_request_that_was_answered_while_it_stopped_is_in_the_log_in_sqlite() {
    let mut proxy = EdgeProxy::start([LINGER, ("SHUTDOWN_LAME_DUCK", "300ms")]);
    let (answers, late) = load_during_term(&mut proxy);
    let rows = number(&sqlite(proxy.dir(), ANSWERED));
    println!("{answers} answers, {late} of them after TERM; {rows} rows");
    assert!(late > 0, "the load went on after TERM");
    assert_eq!(rows, answers);
    assert_eq!(sqlite(proxy.dir(), ROWS), sqlite(proxy.dir(), COUNTED));
}

#[test]
fn every_request_that_was_answered_while_it_stopped_is_in_the_log_in_postgres() {
    let postgres = Postgres::start();
    let mut proxy =
        EdgeProxy::start([LINGER, ("SHUTDOWN_LAME_DUCK", "300ms"), ("EDGE_PROXY_DATABASE", &postgres.url())]);
    let (answers, late) = load_during_term(&mut proxy);
    let rows = number(&postgres.query(ANSWERED));
    println!("{answers} answers, {late} of them after TERM; {rows} rows");
    assert!(late > 0, "the load went on after TERM");
    assert_eq!(rows, answers);
    assert_eq!(postgres.query(ROWS), postgres.query(COUNTED));
}

#[test]
fn control_a_proxy_that_is_killed_loses_the_rows_that_wait() {
    let postgres = Postgres::start();
    let mut proxy = EdgeProxy::start([("EDGE_PROXY_DATABASE", &*postgres.url())]);
    postgres.freeze();
    let mut connection = Connection::open(proxy.listen).expect("it serves");
    for _ in 0..50 {
        connection.send("GET", "/slow?ms=0", "").expect("it reads");
        assert_eq!(connection.answer().expect("answers").status, 200);
    }
    proxy.process.signal(Signal::KILL);
    proxy.process.ended(PATIENCE);
    postgres.thaw();
    let rows = number(&postgres.query(ANSWERED));
    println!("50 answers, {rows} rows");
    assert!(rows < 50);
}

#[test]
fn what_is_cut_and_what_becomes_a_tunnel_has_a_row_and_what_is_refused_has_none() {
    let mut proxy = EdgeProxy::start([("SHUTDOWN_LINGER", "300ms"), ("SHUTDOWN_GRACEFUL_TIMEOUT", "1500ms")]);
    let (listen, admin) = (proxy.listen, proxy.admin);
    let mut kept = Connection::open(listen).expect("it serves");
    kept.send("GET", "/", "").expect("it reads");
    assert_eq!(kept.answer().expect("answers").status, 200);
    let mut tunnel = Connection::open(listen).expect("it serves");
    tunnel.upgrade("/ws").expect("an echo");
    let mut stuck = Connection::open(listen).expect("it serves");
    stuck.send("GET", "/never?secret=1", "").expect("it reads");
    status_until(admin, |status| status["requests"]["active"] == 1);
    proxy.process.signal(Signal::TERM);
    status_until(admin, |status| status["requests"]["refusing"] == true);
    kept.send("GET", "/", "").expect("still kept");
    assert_eq!(kept.answer().expect("an answer, be it a refusal").status, 503);
    assert_eq!(proxy.process.exit_code(PATIENCE), 11, "{}", proxy.process.stderr());
    let rows = sqlite(proxy.dir(), "SELECT path, status, cache FROM requests ORDER BY path, id");
    assert_eq!(rows, "/|200|miss\n/never|0|miss\n/ws|101|none");
}

#[test]
fn a_second_get_asks_no_upstream_but_where_http_or_the_request_says_so() {
    let upstream = Upstream::start();
    let mut proxy = EdgeProxy::start([("EDGE_PROXY_UPSTREAM", upstream.url())]);
    let listen = proxy.listen;
    let first = ask(listen, "GET", "/keep/a?x=1", "");
    assert_eq!(first.header("cache-status"), None);
    let second = ask(listen, "GET", "/keep/a?x=1", "");
    assert_eq!((second.status, &second.body), (200, &first.body));
    assert_eq!((second.header("age"), second.header("cache-status")), (Some("0"), Some("edge-proxy; hit")));
    assert_eq!(upstream.asked("GET /keep/a?x=1"), 1);

    for (path, headers) in [
        ("/no-store", ""),
        ("/cookie", ""),
        ("/keep/mine", "cookie: a=1\r\n"),
        ("/keep/mine", "authorization: Basic YTpi\r\n"),
        ("/keep/if", "if-none-match: \"1\"\r\n"),
    ] {
        let before = upstream.asked(&format!("GET {path}"));
        for _ in 0..2 {
            assert_eq!(ask(listen, "GET", path, headers).header("cache-status"), None, "{path} {headers}");
        }
        assert_eq!(upstream.asked(&format!("GET {path}")), before + 2, "{path} {headers}");
    }
    // Another host, query or wish is another answer; a change makes the old one untrue.
    ask(listen, "GET", "/keep/a?x=2", "");
    ask(listen, "GET", "/keep/a?x=1", "cache-control: no-cache\r\n");
    assert_eq!((upstream.asked("GET /keep/a?x=2"), upstream.asked("GET /keep/a?x=1")), (1, 2));
    ask(listen, "POST", "/keep/a?x=1", "");
    assert_ne!(ask(listen, "GET", "/keep/a?x=1", "").body, first.body);
    assert_eq!(upstream.asked("GET /keep/a?x=1"), 3);

    let status = get(proxy.admin, "/status").expect("answers").json();
    assert_eq!(
        (&status["cache"]["hits"], &status["cache"]["invalidations"]),
        (&1.into(), &1.into()),
        "{status:#}"
    );
    let metrics = String::from_utf8(get(proxy.admin, "/metrics").expect("answers").body).expect("text");
    assert!(metrics.contains("\nedge_proxy_cache_hits_total 1\n"), "{metrics}");
    assert!(metrics.contains("\nedge_proxy_request_log_dropped_total 0\n"), "{metrics}");
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
    assert_eq!(sqlite(proxy.dir(), "SELECT value FROM counters WHERE name = 'cache_hit'"), "1");
}

#[test]
fn a_hit_is_served_while_it_drains_and_its_client_is_asked_to_leave() {
    let upstream = Upstream::start();
    let env = [("EDGE_PROXY_UPSTREAM", upstream.url()), ("SHUTDOWN_LAME_DUCK", "1".to_owned())];
    let mut proxy = EdgeProxy::start(env);
    ask(proxy.listen, "GET", "/keep", "");
    status_until(proxy.admin, |status| status["requests"]["active"] == 0);
    proxy.process.signal(Signal::TERM);
    status_until(proxy.admin, |status| status["phase"] == "lame_duck");
    let hit = ask(proxy.listen, "GET", "/keep", "");
    assert_eq!(
        (hit.header("cache-status"), hit.header("connection")),
        (Some("edge-proxy; hit"), Some("close"))
    );
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
    assert_eq!(proxy.report()["requests"]["drained"], 1);
}

/// What a proxy that keeps its writes for a minute leaves in Redis when it is ended so.
fn left_in_redis(redis: &Redis, upstream: &Upstream, end: Signal) -> String {
    let mut proxy = EdgeProxy::start([
        ("EDGE_PROXY_CACHE", redis.url()),
        ("EDGE_PROXY_CACHE_INTERVAL", "60s".to_owned()),
        ("EDGE_PROXY_UPSTREAM", upstream.url()),
    ]);
    ask(proxy.listen, "GET", "/keep", "");
    assert_eq!(get(proxy.admin, "/status").expect("answers").json()["cache"]["pending"], 1);
    assert_eq!(redis.cli(&["DBSIZE"]), "0", "it has not landed yet");
    proxy.process.signal(end);
    let status = proxy.process.ended(PATIENCE);
    assert_eq!(status.code(), (end == Signal::TERM).then_some(0), "{}", proxy.process.stderr());
    redis.cli(&["DBSIZE"])
}

#[test]
fn what_the_last_moment_has_kept_lands_in_redis_and_is_there_after_a_restart() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    assert_eq!(left_in_redis(&redis, &upstream, Signal::KILL), "0", "control: killed, it is lost");
    assert_eq!(left_in_redis(&redis, &upstream, Signal::TERM), "1");
    let asked = upstream.asked("GET /keep");
    let mut proxy =
        EdgeProxy::start([("EDGE_PROXY_CACHE", redis.url()), ("EDGE_PROXY_UPSTREAM", upstream.url())]);
    assert_eq!(ask(proxy.listen, "GET", "/keep", "").header("cache-status"), Some("edge-proxy; hit"));
    assert_eq!(upstream.asked("GET /keep"), asked);
    // What somebody else has written is a miss.
    let key = redis.cli(&["KEYS", "*"]);
    redis.cli(&["SET", &key, "not ours"]);
    assert_eq!(ask(proxy.listen, "GET", "/keep", "").status, 200);
    assert_eq!(upstream.asked("GET /keep"), asked + 1);
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
}

#[test]
fn a_redis_that_is_not_there_is_done_without_until_it_comes() {
    let mut redis = Redis::start();
    let (url, port) = (redis.url(), redis.port());
    redis.stop();
    let upstream = Upstream::start();
    let env = [("EDGE_PROXY_CACHE", url), ("EDGE_PROXY_UPSTREAM", upstream.url())];
    let mut proxy = EdgeProxy::start(env);
    let warned = |line: &str| line.contains("cache cannot be reached");
    proxy.process.stderr_line(warned);
    for _ in 0..5 {
        assert_eq!(ask(proxy.listen, "GET", "/no-store", "").status, 200);
    }
    let redis = Redis::start_on(port);
    proxy.process.stderr_line(|line| line.contains("cache reached again"));
    ask(proxy.listen, "GET", "/keep", "");
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
    assert_eq!(redis.cli(&["DBSIZE"]), "1");
    assert_eq!(proxy.process.stderr().lines().filter(|line| warned(line)).count(), 1);
}

#[test]
fn a_database_that_cannot_be_used_at_the_start_is_exit_1_and_named_without_its_password() {
    let nobody = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    for (url, named) in [
        (format!("postgres://me:secret@{nobody}/orders"), format!("postgres://{nobody}/orders")),
        ("sqlite:/nowhere/edge.db".to_owned(), "sqlite:/nowhere/edge.db".to_owned()),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut process = Process::start(EdgeProxy::command(dir.path()).args(["--database", &url]));
        assert_eq!(process.exit_code(PATIENCE), 1);
        let stderr = process.stderr();
        let sentence = stderr.lines().find(|line| line.contains("error:")).expect("a sentence");
        println!("{sentence}");
        for part in ["the database", &named, "cannot be used: ", "--database"] {
            assert!(sentence.contains(part), "{part:?} is not in {sentence:?}");
        }
        assert!(!stderr.contains("secret"), "{stderr}");
    }
}

#[test]
fn a_stop_while_the_database_is_being_opened_is_the_whole_shutdown() {
    let postgres = Postgres::start();
    postgres.freeze();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut process = Process::start(EdgeProxy::command(dir.path()).args(["--database", &postgres.url()]));
    process.stderr_line(|line| line.contains("state: none yet"));
    let begin = Stopwatch::start();
    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    let report = shutdown_tests::process::read_report(&dir.path().join("data"));
    assert_eq!(stage(&report, "database")["outcome"], "ok", "{report:#}");
}

#[test]
fn rows_wait_for_a_database_that_does_not_answer_and_are_written_when_it_does() {
    let postgres = Postgres::start();
    let mut proxy = EdgeProxy::start([("EDGE_PROXY_DATABASE", postgres.url())]);
    postgres.freeze();
    for _ in 0..20 {
        assert_eq!(get(proxy.listen, "/slow?ms=0").expect("served without it").status, 200);
    }
    let warned = |line: &str| line.contains("request log cannot be written");
    proxy.process.stderr_line(warned);
    assert_eq!(get(proxy.admin, "/status").expect("answers").json()["database"]["rows_queued"], 20);
    postgres.thaw();
    proxy.process.stderr_line(|line| line.contains("request log is written again"));
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
    assert_eq!(proxy.process.stderr().lines().filter(|line| warned(line)).count(), 1);
    assert!(number(&postgres.query(ANSWERED)) >= 20);
}

#[test]
fn rows_that_cannot_be_written_at_the_end_are_exit_10_and_named() {
    let postgres = Postgres::start();
    let mut proxy =
        EdgeProxy::start([("EDGE_PROXY_DATABASE", postgres.url()), ("SHUTDOWN_DB_TIMEOUT", "1".to_owned())]);
    status_until(proxy.admin, |status| status["phase"] == "running");
    postgres.freeze();
    assert_eq!(get(proxy.listen, "/").expect("served without it").status, 200);
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 10, "{}", proxy.process.stderr());
    let report = proxy.report();
    let task = &stage(&report, "background")["tasks"][0];
    assert_eq!((&task["name"], &task["outcome"]), (&"request log".into(), &"failed".into()), "{report:#}");
    let detail = task["detail"].as_str().expect("why");
    assert!(detail.starts_with("1 row not written to postgres://127.0.0.1:"), "{detail}");
}

#[test]
fn a_registry_hears_of_the_node_and_of_its_leaving_once_while_it_still_serves() {
    let registry = Registry::start();
    let mut proxy = EdgeProxy::start([
        ("EDGE_PROXY_REGISTRY", registry.url().as_str()),
        ("EDGE_PROXY_NODE_ID", "edge-1"),
        ("SHUTDOWN_LAME_DUCK", "2"),
    ]);
    let put = registry.asked(|request| request.method == "PUT");
    let told: Value = serde_json::from_str(&put.body).expect("JSON");
    assert_eq!((put.path.as_str(), &told["node_id"]), ("/edge-1", &"edge-1".into()));
    assert_eq!(told["address"], proxy.listen.to_string());
    proxy.process.signal(Signal::TERM);
    registry.asked(|request| request.method == "DELETE" && request.path == "/edge-1");
    assert_eq!(get(proxy.listen, "/").expect("the listener is open").status, 200);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
    let methods: Vec<_> = registry.requests().into_iter().map(|request| request.method).collect();
    assert_eq!(methods.iter().filter(|method| *method == "DELETE").count(), 1);
    assert_eq!(methods.last().map(String::as_str), Some("DELETE"));
}

#[test]
fn a_registry_that_cannot_be_reached_is_a_warning_and_at_the_end_exit_10_and_named() {
    let registry = Registry::start();
    registry.answer(Registered::Refuse);
    let mut proxy = EdgeProxy::start([("EDGE_PROXY_REGISTRY", registry.url())]);
    proxy.process.stderr_line(|line| line.contains("cannot be registered yet"));
    assert_eq!(get(proxy.listen, "/").expect("it serves").status, 200);
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 10, "{}", proxy.process.stderr());
    let report = proxy.report();
    let task = &stage(&report, "departure")["tasks"][0];
    assert_eq!((&task["name"], &task["outcome"]), (&"registry".into(), &"failed".into()), "{report:#}");
}

#[test]
fn the_stages_come_in_order_and_each_closes_its_own() {
    let (postgres, redis, registry) = (Postgres::start(), Redis::start(), Registry::start());
    let mut proxy = EdgeProxy::start([
        ("EDGE_PROXY_DATABASE", postgres.url()),
        ("EDGE_PROXY_CACHE", redis.url()),
        ("EDGE_PROXY_REGISTRY", registry.url()),
    ]);
    registry.asked(|request| request.method == "PUT");
    assert_eq!(get(proxy.listen, "/cached").expect("it serves").status, 200);
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
    let report = proxy.report();
    let mut stages = Vec::new();
    for stage in report["stages"].as_array().into_iter().flatten() {
        assert_eq!(stage["outcome"], "ok", "{report:#}");
        let tasks = stage["tasks"].as_array().into_iter().flatten();
        stages.extend(tasks.map(|task| format!("{}: {}", stage["stage"], task["name"]).replace('"', "")));
    }
    assert_eq!(
        stages,
        [
            "departure: registry",
            "background: request log",
            "cache: Redis",
            "database: PostgreSQL",
            "persist: state"
        ]
    );
    let went = postgres.logged(|line| {
        line.text.contains("disconnection: ") && line.application_name.starts_with("edge-proxy-")
    });
    let left = registry.asked(|request| request.method == "DELETE");
    assert!(left.at_ms <= went.at_ms, "{left:?} {went:?}");
    assert_eq!(redis.cli(&["DBSIZE"]), "1");
}

#[test]
fn the_plan_has_their_tasks_and_no_password() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut process = Process::start(EdgeProxy::command(dir.path()).args([
        "--check",
        "--database",
        "postgres://me:secret@db/edge",
        "--cache",
        "redis://me:secret@cache:6379",
        "--registry",
        "http://registry:80/nodes",
    ]));
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
    let plan = process.stdout();
    for part in ["postgres://db:5432/edge", "redis://cache:6379", "http://registry:80/nodes"] {
        assert!(plan.contains(part), "{part:?} is not in:\n{plan}");
    }
    for (stage, task) in [
        ("departure", "registry"),
        ("background", "request log"),
        ("cache", "Redis"),
        ("database", "PostgreSQL"),
    ] {
        let is_it = |line: &&str| line.split_whitespace().next() == Some(stage) && line.ends_with(task);
        assert!(plan.lines().any(|line| is_it(&line)), "{stage}: {task} is not in:\n{plan}");
    }
    assert!(!plan.contains("secret"), "{plan}");
    let mut off = Process::start(EdgeProxy::command(dir.path()).args([
        "--check",
        "--database",
        "off",
        "--cache",
        "off",
    ]));
    assert_eq!(off.exit_code(PATIENCE), 0);
    assert!(!off.stdout().contains("request log") && !off.stdout().contains("in-process cache"));
    assert!(std::fs::read_dir(dir.path()).expect("a directory").next().is_none(), "it writes nothing");
}
