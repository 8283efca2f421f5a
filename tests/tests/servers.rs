//! The servers that other tests rely on: each starts, answers, freezes, comes back, and leaves nothing behind.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::pg_clients::{Client, Load};
use shutdown_tests::servers::{
    Answer, Pooling, Postgres, Redis, Registry, missing_pgbouncers, pgbouncers, unix_ms,
};

/// How long a frozen server is listened to: it would have answered in a hundredth of that.
const SILENCE: Duration = Duration::from_millis(300);

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Whether a process of this number is there, be it a zombie.
fn is_there(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// The processes whose parent is this one.
fn children_of(parent: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let of = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1));
        of == Some(&parent.to_string())
    })
    .collect()
}

/// The segments of System V shared memory that this process made or attached last (proc_sysvipc(5): cpid and lpid).
fn shared_memory_of(pid: u32) -> usize {
    let table = std::fs::read_to_string("/proc/sysvipc/shm").expect("the kernel lists its segments");
    let pid = pid.to_string();
    table.lines().filter(|line| line.split_whitespace().skip(4).take(2).any(|of| of == pid)).count()
}

/// What a connection hears within the silence.
fn hears(stream: &mut TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(SILENCE)).expect("a socket");
    let mut heard = vec![0; 512];
    let count = stream.read(&mut heard).unwrap_or(0);
    heard.truncate(count);
    heard
}

#[test]
fn postgres_answers_over_both_ways_and_logs_who_came_and_went_in_utc() {
    let before = unix_ms();
    let postgres = Postgres::start_with(&["log_statement=all"]);
    assert_eq!(postgres.query("SELECT 6 * 7"), "42");
    let came = postgres.logged(|line| line.text.contains("connection authorized: user=postgres"));
    assert!(came.text.contains("application_name=judge"), "{came:?}");
    let said = postgres.logged(|line| line.text.contains("statement: SELECT 6 * 7"));
    assert_eq!((said.application_name.as_str(), said.pid), ("judge", came.pid));
    let went = postgres.logged(|line| line.text.contains("disconnection: "));
    assert_eq!((went.application_name.as_str(), went.pid), ("judge", came.pid));
    assert!(before <= came.at_ms && came.at_ms <= went.at_ms && went.at_ms <= unix_ms(), "{came:?} {went:?}");
    assert_eq!((postgres.connections_of("judge"), postgres.connections_of("nobody")), (1, 0));
    assert!(postgres.log().iter().any(|line| line.text.contains("connection received: host=127.0.0.1")));

    let over_socket = postgres.url_over_socket();
    assert!(over_socket.len() < 107, "{over_socket}");
    let psql = std::fs::read_dir("/usr/lib/postgresql").expect("it is installed").flatten().next();
    let psql = psql.expect("it is installed").path().join("bin/psql");
    let mut client = shutdown_tests::process::Process::start(std::process::Command::new(psql).args([
        "-XAtd",
        &over_socket,
        "-c",
        "SELECT 1",
    ]));
    assert_eq!(client.exit_code(PATIENCE), 0, "{}", client.stderr());
    postgres.logged(|line| line.text.contains("connection received: host=[local]"));
}

#[test]
fn a_frozen_postgres_takes_connections_and_says_nothing_and_a_thawed_one_answers() {
    let postgres = Postgres::start();
    postgres.freeze();
    let mut stream = TcpStream::connect(loopback(postgres.port())).expect("the kernel takes it");
    // SSLRequest (PostgreSQL's protocol, 55.7): one byte is the answer.
    stream.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).expect("the kernel takes it");
    assert_eq!(hears(&mut stream), b"");
    postgres.thaw();
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut answer = [0];
    stream.read_exact(&mut answer).expect("it answers now");
    assert_eq!(&answer, b"N");
    assert_eq!(postgres.query("SELECT 1"), "1");
}

#[test]
fn of_a_postgres_nothing_is_left_whether_it_was_stopped_dropped_or_dropped_frozen() {
    for how in ["stopped", "dropped", "dropped frozen"] {
        let mut postgres = Postgres::start();
        let (pid, mut all) = (postgres.id(), children_of(postgres.id()));
        assert!(all.len() >= 3, "its helpers: {all:?}");
        assert_eq!(shared_memory_of(pid), 1, "what must be gone later is there now");
        all.push(pid);
        match how {
            "stopped" => postgres.stop_server(),
            "dropped frozen" => postgres.freeze(),
            _ => {}
        }
        drop(postgres);
        let left: Vec<_> = all.iter().filter(|pid| is_there(**pid)).collect();
        assert!(left.is_empty(), "{how}: {left:?} are left of {all:?}");
        assert_eq!(shared_memory_of(pid), 0, "{how}");
    }
}

#[test]
fn redis_answers_and_logs_who_came_and_went_in_utc() {
    let before = unix_ms();
    let redis = Redis::start();
    assert_eq!(redis.cli(&["SET", "key", "value"]), "OK");
    assert_eq!(redis.cli(&["GET", "key"]), "value");
    let mut stream = TcpStream::connect(loopback(redis.port())).expect("it listens");
    stream.write_all(b"PING\r\n").expect("it reads");
    assert_eq!(hears(&mut stream), b"+PONG\r\n");
    let here = stream.local_addr().expect("connected").to_string();
    drop(stream);
    let came = redis.logged(|line| line.text == format!("Accepted {here}"));
    let went =
        redis.logged(|line| line.text.starts_with("Client closed connection") && line.text.contains(&here));
    assert!(before <= came.at_ms && came.at_ms <= went.at_ms && went.at_ms <= unix_ms(), "{came:?} {went:?}");
    assert!(redis.log().len() > 2);
}

#[test]
fn a_frozen_redis_says_nothing_and_a_thawed_one_answers() {
    let redis = Redis::start();
    let mut stream = TcpStream::connect(loopback(redis.port())).expect("it listens");
    redis.freeze();
    stream.write_all(b"PING\r\n").expect("the kernel takes it");
    assert_eq!(hears(&mut stream), b"");
    redis.thaw();
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut answer = [0; 7];
    stream.read_exact(&mut answer).expect("it answers now");
    assert_eq!(&answer, b"+PONG\r\n");
}

#[test]
fn a_redis_that_was_stopped_comes_back_empty_on_its_port_and_nothing_is_left_of_any() {
    let mut redis = Redis::start();
    redis.cli(&["SET", "key", "value"]);
    redis.stop();
    assert!(!is_there(redis.id()));
    let again = Redis::start_on(redis.port());
    assert_eq!(again.cli(&["EXISTS", "key"]), "0");
    let pid = again.id();
    again.freeze();
    drop(again);
    assert!(!is_there(pid), "dropped frozen");
    assert!(TcpStream::connect(loopback(redis.port())).is_err(), "its port is free");
}

#[test]
fn two_of_each_do_not_collide() {
    let postgres = [Postgres::start(), Postgres::start()];
    let redis = [Redis::start(), Redis::start()];
    postgres[0].query("CREATE TABLE only_here ()");
    assert_eq!(postgres[1].query("SELECT count(*) FROM pg_tables WHERE tablename = 'only_here'"), "0");
    redis[0].cli(&["SET", "only", "here"]);
    assert_eq!(redis[1].cli(&["EXISTS", "only"]), "0");
}

/// A request of its own connection, and what comes back.
fn put(registry: &Registry, path: &str, body: &str) -> std::io::Result<String> {
    let addr: SocketAddr = registry.url().trim_start_matches("http://").parse().expect("its address");
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(SILENCE))?;
    let length = body.len();
    write!(stream, "PUT {path} HTTP/1.1\r\nHost: {addr}\r\nContent-Length: {length}\r\n")?;
    write!(stream, "Connection: close\r\n\r\n{body}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn the_registry_writes_down_what_it_is_asked_and_fails_as_it_is_told() {
    let registry = Registry::start();
    let before = unix_ms();
    let answer = put(&registry, "/nodes/a?up=1", "hello").expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let asked = registry.asked(|request| request.method == "PUT");
    assert_eq!((asked.path.as_str(), asked.body.as_str()), ("/nodes/a?up=1", "hello"));
    assert!(before <= asked.at_ms && asked.at_ms <= unix_ms());

    registry.answer(Answer::Status(500));
    assert!(put(&registry, "/nodes/b", "").expect("it answers").starts_with("HTTP/1.1 500 "));
    registry.answer(Answer::Hang);
    put(&registry, "/nodes/c", "").expect_err("nothing comes");
    registry.asked(|request| request.path == "/nodes/c");
    registry.answer(Answer::Refuse);
    let refused = put(&registry, "/nodes/d", "").expect_err("nobody listens");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    registry.answer(Answer::Status(204));
    assert!(put(&registry, "/nodes/e", "").expect("it is back").starts_with("HTTP/1.1 204 "));
    let paths: Vec<_> = registry.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(paths, ["/nodes/a?up=1", "/nodes/b", "/nodes/c", "/nodes/e"]);
}

#[test]
fn a_pgbouncer_of_each_version_pools_clients_and_tells_which_signals_it_got() {
    let postgres = Postgres::start();
    println!("missing: {:?}", missing_pgbouncers());
    for installed in pgbouncers() {
        let mut pooler = installed.start(&postgres, Pooling::Transaction, 5);
        let mut load = Load::start(&postgres, &pooler, 20);
        load.finish(50);
        let of_pooler = postgres.query("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%load_%'");
        assert!(of_pooler.parse::<usize>().expect("a number") <= 5 + 1, "{of_pooler} with our own");
        pooler.signal(Signal::INT);
        pooler.got("SIGINT");
        assert_eq!(pooler.code(PATIENCE), 0, "{}", pooler.log());
        assert_eq!((pooler.signals(), pooler.pidfile().exists()), (vec!["SIGINT".to_owned()], false));
        println!("PgBouncer {installed}: {:?}", load.stop(&postgres));

        let mut pooler = installed.start(&postgres, Pooling::Session, 5);
        let mut client = Client::open(&pooler);
        client.run("SELECT 1").expect("an answer");
        pooler.signal(Signal::INT);
        pooler.got("SIGINT");
        pooler.signal(Signal::TERM);
        pooler.ended(PATIENCE);
        assert_eq!(pooler.signals(), ["SIGINT", "SIGTERM"], "{}", pooler.log());
        client.run("SELECT 1").expect_err("nobody is there");
    }
}
