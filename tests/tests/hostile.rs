//! Clients that mean harm: the drain keeps its deadline, memory is given back, nothing panics.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use serde_json::Value;
use shutdown_tests::client::{get, status_until};
use shutdown_tests::h2raw::PREFACE;
use shutdown_tests::process::Stopwatch;
use shutdown_tests::states::{BUDGETS, Kind, Service};
use shutdown_tests::{PATIENCE, count};

/// The width of a deadline.
const TOLERANCE: Duration = Duration::from_millis(200);
/// What another round of the same load may add, at least: the allocator's own unrest.
const MARGIN_KIB: u64 = 768;
/// How often each load comes back at least, and at most, while memory still grows.
const ROUNDS: usize = 6;
const MOST_ROUNDS: usize = 12;
/// One at a time: each load is thousands of connections.
static TURN: Mutex<()> = Mutex::new(());

/// Clients of one sort.
struct Load {
    name: &'static str,
    clients: usize,
    /// Opens one.
    open: fn(SocketAddr, usize) -> io::Result<TcpStream>,
    /// Whether each begins a request, which is then waited for to the drain's deadline.
    begins: bool,
    /// Whether the server closes them by itself; then one comes after the other.
    closed: bool,
}

/// What the stages may take after it: less than one of their budgets.
const STAGES: Duration = Duration::from_millis(1500);
/// The drain's deadline in [`BUDGETS`].
const DRAIN: Duration = Duration::from_secs(2);

fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn half_head(addr: SocketAddr, number: usize) -> io::Result<TcpStream> {
    let mut stream = connect(addr)?;
    write!(stream, "GET /slow?ms={number} HTTP/1.1\r\nhost: slowloris\r\nx-")?;
    Ok(stream)
}

fn silent(addr: SocketAddr, _: usize) -> io::Result<TcpStream> {
    connect(addr)
}

fn stopped_upload(addr: SocketAddr, _: usize) -> io::Result<TcpStream> {
    let mut stream = connect(addr)?;
    stream.write_all(b"POST /echo HTTP/1.1\r\nhost: stops\r\ncontent-length: 1000000\r\n\r\n")?;
    stream.write_all(&[b'u'; 16 * 1024])?;
    Ok(stream)
}

/// Bytes that nobody meant; the same in every run (xorshift).
fn noise(seed: usize, bytes: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15 ^ (seed as u64 + 1);
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

fn garbage(addr: SocketAddr, number: usize) -> io::Result<TcpStream> {
    let mut stream = connect(addr)?;
    let bytes = match number % 6 {
        0 => noise(number, 4096),
        1 => [&PREFACE[..], &noise(number, 4096)].concat(),
        2 => [&b"GET / HTTP/1.1\r\nhost: x\r\nx: "[..], &[b'a'; 1024 * 1024]].concat(),
        3 => vec![0; 4096],
        // A frame that says it is longer than any may be, and one of an unknown stream.
        4 => [&PREFACE[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0], &[0xff, 0xff, 0xff, 0, 1, 0, 0, 0, 7]].concat(),
        _ => [
            &b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"[..],
            &noise(number, 64),
        ]
        .concat(),
    };
    // Whoever reads nonsense may close before it has read it all.
    let _ = stream.write_all(&bytes);
    let _ = stream.shutdown(Shutdown::Write);
    Ok(stream)
}

fn loads() -> [Load; 4] {
    let load =
        |name, clients, open| Load { name, clients: count(clients), open, begins: false, closed: false };
    [
        load("half heads", 1000, half_head),
        load("silent", 5000, silent),
        Load { begins: true, ..load("stopped uploads", 1000, stopped_upload) },
        Load { closed: true, ..load("garbage", 1000, garbage) },
    ]
}

/// Memory in use, in KiB.
fn resident(service: &Service) -> u64 {
    let path = format!("/proc/{}/status", service.process.id());
    let status = std::fs::read_to_string(path).expect("our child runs, on Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("every process has one");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Opens the load and waits until the server has it.
fn round(service: &Service, load: &Load) -> Vec<TcpStream> {
    let before = status_until(service.admin, |status| status["connections"]["open"] == 0);
    let accepted = before["connections"]["accepted"].as_u64().expect("a number") + load.clients as u64;
    let mut clients = Vec::new();
    for number in 0..load.clients {
        let mut client =
            (load.open)(service.listen, number).unwrap_or_else(|error| panic!("{}: {error}", load.name));
        if load.closed {
            // An answer, an end, a reset: whatever it is, it comes.
            match client.read_to_end(&mut Vec::new()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => panic!("{}: left open", load.name),
                _ => {}
            }
        } else {
            clients.push(client);
        }
    }
    status_until(service.admin, |status| status["connections"]["accepted"] == accepted);
    if load.closed {
        status_until(service.admin, |status| status["connections"]["open"] == 0);
    } else {
        let requests = if load.begins { load.clients } else { 0 };
        status_until(service.admin, |status| {
            status["connections"]["open"] == load.clients as u64 && status["requests"]["active"] == requests
        });
    }
    clients
}

fn enough_files() {
    // Ours, and a few for everything else.
    let needed = count(5000) as u64 + 512;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < needed) {
        let most = limit.maximum.unwrap_or(needed);
        assert!(most >= needed, "this law opens {needed} files, and the hard limit (ulimit -Hn) is {most}");
        setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum: limit.maximum })
            .expect("the soft limit may rise to the hard one");
    }
}

/// When the drain was over, after the signal.
fn drained(report: &Value) -> Duration {
    let phases = report["phases"].as_array().expect("a report has phases");
    let closing = phases.iter().find(|phase| phase["phase"] == "closing").expect("it came to the stages");
    Duration::from_secs_f64(closing["start_ms"].as_f64().expect("a time") / 1000.0)
}

fn withstands(kind: Kind) {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    enough_files();
    for load in loads() {
        // One arena of glibc's allocator: with one for each thread, memory given back in one is taken anew in another.
        let env = BUDGETS.into_iter().chain([("MALLOC_ARENA_MAX", "1")]);
        let mut service = Service::start(kind, env);
        assert_eq!(get(service.listen, "/").expect("it serves").status, 200);
        let before = resident(&service);
        let (mut clients, mut with) = (Vec::new(), Vec::new());
        let is_flat = |with: &[u64]| {
            // Memory that is not given back would be taken again, whole, in every round. The first ones are for growing into:
            // the allocator reaches its plateau in about five, later on a busy machine, and takes a step now and then after that.
            let margin = MARGIN_KIB.max(with[1].saturating_sub(before) / 4);
            with[2..].windows(2).any(|round| round[1] <= round[0] + margin)
        };
        while with.len() < ROUNDS || with.len() < MOST_ROUNDS && !is_flat(&with) {
            drop(clients);
            clients = round(&service, &load);
            with.push(resident(&service));
        }
        assert_eq!(get(service.listen, "/").expect("it still serves").status, 200);

        let begin = Stopwatch::start();
        service.process.signal(Signal::TERM);
        let code = service.process.exit_code(PATIENCE);
        let gone = begin.elapsed();
        drop(clients);
        println!(
            "{kind}, {} {}: {before} KiB without, {with:?} with them, round after round; gone {gone:?} after TERM, {code}",
            load.clients, load.name,
        );
        // Without a request to wait for, the linger's end; thousands of connections take a moment to close.
        let (earliest, wanted_code) = if load.begins { (DRAIN - TOLERANCE, 11) } else { (Duration::ZERO, 0) };
        let drained = drained(&service.report());
        assert!(drained >= earliest && drained <= DRAIN + TOLERANCE, "{}: drained {drained:?}", load.name);
        // Then the stages: the edge proxy writes down each request that was cut.
        assert!(gone <= drained + STAGES, "{}: gone after {gone:?}, drained {drained:?}", load.name);
        assert_eq!(code, wanted_code, "{}: {}", load.name, service.process.stderr());
        assert!(is_flat(&with), "{}: {before} KiB without, {with:?} with them", load.name);
        let stderr = service.process.stderr();
        assert!(!stderr.contains("panicked"), "{}: {stderr}", load.name);
    }
}

#[test]
fn our_accept_loop_withstands_slowloris_silence_stopped_uploads_and_garbage() {
    withstands(Kind::Serve);
}

#[test]
fn the_edge_proxy_withstands_slowloris_silence_stopped_uploads_and_garbage() {
    withstands(Kind::EdgeProxy);
}
