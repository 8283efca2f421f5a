//! Answers under way when the stop comes: every byte arrives, and the process is gone soon after.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::process::Signal;
use shutdown_tests::client::{Connection, small_socket};
use shutdown_tests::process::{EdgeProxy, Process, Stopwatch, binary};
use shutdown_tests::{PATIENCE, count};

/// How long after the last connection's end the process may still be there.
const GONE_WITHIN: Duration = Duration::from_millis(300);
/// How many tries run side by side.
const SIDE_BY_SIDE: usize = 2;

fn pattern() -> Vec<u8> {
    (0..=250).cycle().take(8 * 1024 * 1024).collect()
}

/// What `/stream?ms=2000` of axum-service and of the control gives.
fn letters() -> Vec<u8> {
    (0..20).flat_map(|chunk| [b'a' + chunk; 1000]).collect()
}

/// What it gives in edge-proxy's demo.
fn numbered() -> Vec<u8> {
    (1..=20).flat_map(|chunk| format!("chunk {chunk} of 20\n").into_bytes()).collect()
}

/// A moment's rest of a reader that is slow on purpose.
fn rest(time: Duration) {
    thread::park_timeout(time);
}

/// Something that serves `/stream?ms=2000` and `/bytes`, and its process.
struct Subject {
    process: Process,
    addr: SocketAddr,
    streamed: fn() -> Vec<u8>,
    _proxy_dir: Option<Arc<dyn Send + Sync>>,
}

fn axum_service() -> (Process, SocketAddr) {
    let process =
        Process::start(Command::new(binary("axum-lines")).env("AXUM_SERVICE_LISTEN", "127.0.0.1:0"));
    let addr = process.address("listening on ");
    (process, addr)
}

fn seed_guard() -> (Process, SocketAddr) {
    let process = Process::start(&mut Command::new(binary("seed-guard")));
    let addr = process.address("listening on ");
    (process, addr)
}

impl Subject {
    fn plain((process, addr): (Process, SocketAddr)) -> Self {
        Self { process, addr, streamed: letters, _proxy_dir: None }
    }

    fn edge_proxy() -> Self {
        let (process, addr, dir) = EdgeProxy::with_defaults().into_parts();
        Self { process, addr, streamed: numbered, _proxy_dir: Some(Arc::new(dir)) }
    }
}

/// A reader's middle: it says so and goes on once the signal has been sent.
#[derive(Clone)]
struct Middle {
    reached: Sender<()>,
    go_on: Arc<OnceLock<()>>,
}

impl Middle {
    fn new() -> (Self, Receiver<()>, Arc<OnceLock<()>>) {
        let (reached, middles) = channel();
        let go_on = Arc::default();
        (Self { reached, go_on: Arc::clone(&go_on) }, middles, go_on)
    }

    fn reach(&self) {
        // Nobody listens any more when another reader has failed.
        if self.reached.send(()).is_ok() {
            self.go_on.wait();
        }
    }
}

/// Reads both answers at once over HTTP/1, each with a middle of its own.
fn read_h1(addr: SocketAddr, streamed: &[u8], middle: Middle) -> Result<(), String> {
    let (middle_of_stream, middle_of_bytes) = (middle.clone(), middle);
    thread::scope(|scope| {
        let stream = scope.spawn(move || {
            let mut connection = Connection::open(addr).map_err(|e| format!("stream: {e}"))?;
            connection.send("GET", "/stream?ms=2000", "").map_err(|e| format!("stream: {e}"))?;
            let mut met = false;
            let answer = connection.answer_slowly(4096, |read| {
                // More than a head: its first chunk is here.
                if read > 0 && !met {
                    met = true;
                    middle_of_stream.reach();
                }
            });
            let answer = answer.map_err(|error| format!("stream: {error}"))?;
            if answer.body == streamed { Ok(()) } else { Err("stream: other bytes".to_owned()) }
        });
        let bytes = scope.spawn(move || {
            let mut connection = Connection::open_small(addr).map_err(|e| format!("bytes: {e}"))?;
            connection.send("GET", "/bytes", "").map_err(|e| format!("bytes: {e}"))?;
            let mut met = false;
            let answer = connection.answer_slowly(64 * 1024, |read| {
                if read > 1024 * 1024 && !met {
                    met = true;
                    middle_of_bytes.reach();
                }
                rest(Duration::from_millis(5));
            });
            let answer = answer.map_err(|error| format!("bytes: {error}"))?;
            if answer.body == pattern() { Ok(()) } else { Err("bytes: other bytes".to_owned()) }
        });
        let (stream, bytes) = (stream.join(), bytes.join());
        stream.expect("the reader does not panic").and(bytes.expect("the reader does not panic"))
    })
}

/// The same over one HTTP/2 connection with small windows.
fn read_h2(addr: SocketAddr, streamed: &[u8], middle: Middle) -> Result<(), String> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    runtime.block_on(async {
        let socket = small_socket(addr).map_err(|e| e.to_string())?;
        socket.set_nonblocking(true).map_err(|e| e.to_string())?;
        let stream = tokio::net::TcpStream::from_std(socket.into()).map_err(|e| e.to_string())?;
        let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(128 * 1024)
            .initial_connection_window_size(256 * 1024)
            .handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
            .await
            .map_err(|e| e.to_string())?;
        tokio::spawn(connection);
        let get = |path: &str| {
            let uri = format!("http://{addr}{path}");
            let request = Request::get(uri).body(Empty::<Bytes>::new());
            let mut sender = sender.clone();
            async move {
                sender.send_request(request.map_err(|e| e.to_string())?).await.map_err(|e| e.to_string())
            }
        };
        // Both are read on one thread: the first says it is there, the second waits for both.
        let first = Mutex::new(true);
        let in_the_middle = || {
            if std::mem::take(&mut *first.lock().expect("one thread")) {
                let _ = middle.reached.send(());
            } else {
                middle.reach();
            }
        };
        let read = async |path: &str, half: usize, pause: Duration| {
            let mut body = get(path).await.map_err(|e| format!("{path}: {e}"))?.into_body();
            let (mut all, mut met) = (Vec::new(), false);
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|e| format!("{path}: {e} after {} bytes", all.len()))?;
                all.extend_from_slice(&frame.into_data().unwrap_or_default());
                if all.len() > half && !met {
                    met = true;
                    in_the_middle();
                }
                tokio::time::sleep(pause).await;
            }
            Ok::<_, String>(all)
        };
        let (stream, bytes) = tokio::join!(
            read("/stream?ms=2000", 0, Duration::ZERO),
            read("/bytes", 1024 * 1024, Duration::from_millis(1))
        );
        if stream? != streamed {
            return Err("stream: other bytes".to_owned());
        }
        if bytes? != pattern() { Err("bytes: other bytes".to_owned()) } else { Ok(()) }
    })
}

type Read = fn(SocketAddr, &[u8], Middle) -> Result<(), String>;

/// One try: both answers under way, TERM, both read to their end. How long the process outlived them.
fn try_once(start: &(dyn Fn() -> Subject + Sync), read: Read) -> Result<Duration, String> {
    let mut subject = start();
    let (middle, middles, go_on) = Middle::new();
    let (addr, streamed) = (subject.addr, (subject.streamed)());
    let read = thread::scope(|scope| {
        let reader = scope.spawn(move || read(addr, &streamed, middle));
        // Fails when a reader has ended before its middle: then there is nothing to interrupt.
        if (0..2).all(|_| middles.recv_timeout(PATIENCE).is_ok()) {
            subject.process.signal(Signal::TERM);
        }
        let _ = go_on.set(());
        drop(middles);
        reader.join().expect("the reader does not panic")
    });
    let ended = Stopwatch::start();
    read?;
    let code = subject.process.exit_code(PATIENCE);
    if code == 0 {
        Ok(ended.elapsed())
    } else {
        Err(format!("exit code {code}: {}", subject.process.stderr()))
    }
}

/// Runs `tries`, some side by side; the failures, and the longest time a process outlived its connections.
fn run(tries: usize, start: &(dyn Fn() -> Subject + Sync), read: Read) -> (Vec<String>, Duration) {
    let results = Mutex::new((Vec::new(), Duration::ZERO));
    let next = std::sync::atomic::AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE.min(tries) {
            scope.spawn(|| {
                while next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < tries {
                    let result = try_once(start, read);
                    let mut results = results.lock().expect("no try panics");
                    match result {
                        Ok(outlived) => results.1 = results.1.max(outlived),
                        Err(error) => results.0.push(error),
                    }
                }
            });
        }
    });
    results.into_inner().expect("no try panics")
}

fn law(what: &str, start: &(dyn Fn() -> Subject + Sync), read: Read) {
    let tries = count(100);
    let (lost, longest) = run(tries, start, read);
    println!(
        "{what}: {} of {tries} whole, gone at most {longest:?} after the connections",
        tries - lost.len()
    );
    assert!(lost.is_empty(), "{lost:#?}");
    assert!(longest <= GONE_WITHIN, "{longest:?}");
}

#[test]
fn axum_service_loses_no_byte_of_an_answer_under_way() {
    law("axum-service, HTTP/1", &|| Subject::plain(axum_service()), read_h1);
}

#[test]
fn edge_proxy_loses_no_byte_of_an_answer_under_way_over_http_1() {
    law("edge-proxy, HTTP/1", &Subject::edge_proxy, read_h1);
}

#[test]
fn edge_proxy_loses_no_byte_of_an_answer_under_way_over_http_2() {
    law("edge-proxy, HTTP/2", &Subject::edge_proxy, read_h2);
}

#[test]
fn the_control_with_its_guard_in_the_handler_loses_them() {
    let tries = count(20);
    let (lost, _) = run(tries, &|| Subject::plain(seed_guard()), read_h1);
    println!("control, guard as in seed 003: {} of {tries} lost", lost.len());
    assert_eq!(lost.len(), tries, "the control must lose, else the laws above prove nothing: {lost:#?}");
}

#[test]
fn axum_service_loses_no_byte_of_an_answer_under_way_over_http_2() {
    law("axum-service, HTTP/2", &|| Subject::plain(axum_service()), read_h2);
}
