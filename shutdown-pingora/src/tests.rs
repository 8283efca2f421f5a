//! The laws of this crate, against real sockets and Pingora's own engine.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::server::{ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora_core::services::background::BackgroundService;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, Result};
use pingora_proxy::{ProxyHttp, Session};
use shutdown_core::{Phase, Reason, ShutdownConfig, ShutdownCoordinator, ShutdownReport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::{Proxy, WhenDrained, run_background};

/// No test waits longer than this for anything.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_refused_request_is_answered_503_and_the_wrapped_proxy_never_sees_it() {
    let service = Service::start(|config| config.linger = Duration::ZERO).await;
    let mut idle = service.client().await;
    assert!(idle.get("/").await.starts_with("HTTP/1.1 200"));
    let mut held = service.client().await;
    held.send("GET /hold HTTP/1.1\r\nhost: t\r\n\r\n").await;
    held.read_until("first").await;
    let seen = service.hooks.seen();

    service.stop();
    service.until_refused().await;
    let refusal = idle.get("/?late").await.to_ascii_lowercase();
    assert!(refusal.starts_with("http/1.1 503"), "{refusal}");
    for header in ["retry-after: 1\r\n", "connection: close\r\n", "content-length: 0\r\n"] {
        assert!(refusal.contains(header), "{header} is not in {refusal}");
    }
    idle.ended().await;
    assert_eq!(service.hooks.seen(), seen);

    service.release.notify_one();
    held.ended().await;
    let report = service.report().await;
    assert_eq!((report.requests.refused, report.exit_code()), (1, 0));
}

#[tokio::test]
async fn a_refused_request_with_a_body_is_answered_and_not_reset() {
    let service = Service::start(|config| config.linger = Duration::ZERO).await;
    let mut idle = service.client().await;
    idle.get("/").await;
    let mut held = service.client().await;
    held.send("GET /hold HTTP/1.1\r\nhost: t\r\n\r\n").await;
    held.read_until("first").await;
    service.stop();
    service.until_refused().await;

    idle.send("POST / HTTP/1.1\r\nhost: t\r\ncontent-length: 100000\r\n\r\n").await;
    assert!(idle.read_until("\r\n\r\n").await.starts_with("HTTP/1.1 503"));
    for _ in 0..10 {
        // A reset would fail the one after the first that it answers.
        idle.send(&"x".repeat(10_000)).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    idle.ended().await;
    service.release.notify_one();
    assert_eq!(service.report().await.exit_code(), 0);
}

#[tokio::test]
async fn a_request_is_in_flight_until_the_last_byte_of_its_answer() {
    let service = Service::start(|_| {}).await;
    let mut client = service.client().await;
    client.send("GET /hold HTTP/1.1\r\nhost: t\r\n\r\n").await;
    client.read_until("first").await;
    assert_eq!(service.shutdown.active_request_count(), 1);

    service.stop();
    service.shutdown.until(Phase::Draining).await;
    assert_eq!(service.shutdown.active_request_count(), 1);
    service.release.notify_one();
    assert!(client.ended().await.ends_with("4\r\nlast\r\n0\r\n\r\n"));
    let report = service.report().await;
    assert_eq!((report.requests.drained, report.requests.cut, report.exit_code()), (1, 0, 0));
}

#[tokio::test]
async fn a_connection_that_never_sends_anything_is_closed_when_requests_are_over() {
    let service = Service::start(|config| config.linger = Duration::from_millis(100)).await;
    let mut silent = service.client().await;
    service.until_connections(1).await;
    service.stop();
    let report = service.report().await;
    assert_eq!((report.connections.cut, report.exit_code()), (0, 0));
    assert!(report.duration_ms >= 100.0, "the linger belongs to it: {}", report.duration_ms);
    assert_eq!(silent.ended().await, "");
}

#[tokio::test]
async fn a_half_sent_head_does_not_hold_the_drain_beyond_the_linger() {
    let service = Service::start(|config| config.linger = Duration::from_millis(100)).await;
    let mut half = service.client().await;
    half.send("GET /hold HT").await;
    service.until_connections(1).await;
    service.stop();
    assert_eq!(service.report().await.exit_code(), 0);
    assert_eq!(half.ended().await, "");
}

#[tokio::test]
async fn an_idle_connection_is_served_with_close_during_the_lame_duck_and_the_linger() {
    let service = Service::start(|config| config.lame_duck = Duration::from_secs(20)).await;
    let mut idle = service.client().await;
    assert!(idle.get("/").await.to_ascii_lowercase().contains("connection: keep-alive"));
    let mut fresh = service.client().await;
    service.until_connections(2).await;
    service.stop();
    service.shutdown.until(Phase::LameDuck).await;
    for client in [&mut idle, &mut fresh] {
        let answer = client.get("/").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.to_ascii_lowercase().contains("connection: close"), "{answer}");
        client.ended().await;
    }

    let service = Service::start(|config| config.linger = Duration::from_secs(5)).await;
    let mut idle = service.client().await;
    idle.get("/").await;
    service.stop();
    service.shutdown.until(Phase::Draining).await;
    let answer = idle.get("/").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.to_ascii_lowercase().contains("connection: close"));
    let report = service.report().await;
    assert!(report.duration_ms < 4000.0, "the last connection has left: {}", report.duration_ms);
}

#[tokio::test]
async fn a_request_begun_before_the_shutdown_and_answered_in_it_is_answered_with_close() {
    let service = Service::start(|_| {}).await;
    let mut client = service.client().await;
    client.send("GET /late HTTP/1.1\r\nhost: t\r\n\r\n").await;
    service.until_requests(1).await;
    service.stop();
    service.shutdown.until(Phase::Draining).await;
    service.release.notify_one();
    let answer = client.ended().await.to_ascii_lowercase();
    assert!(answer.starts_with("http/1.1 200") && answer.contains("connection: close"), "{answer}");
    assert_eq!(service.report().await.exit_code(), 0);
}

#[tokio::test]
async fn a_hook_that_never_returns_is_cut_too() {
    let service = Service::start(|config| {
        config.linger = Duration::ZERO;
        config.graceful = Duration::from_millis(200);
    })
    .await;
    let mut client = service.client().await;
    client.send("GET /hang HTTP/1.1\r\nhost: t\r\n\r\n").await;
    service.until_requests(1).await;
    service.stop();
    assert_eq!(service.report().await.exit_code(), 11);
    assert_eq!(client.ended().await, "");
    assert_eq!(service.shutdown.active_request_count(), 0);
}

#[tokio::test]
async fn what_runs_at_the_deadline_is_cut_and_named_without_its_query() {
    let service = Service::start(|config| {
        config.linger = Duration::ZERO;
        config.graceful = Duration::from_millis(200);
    })
    .await;
    let mut client = service.client().await;
    client.send("GET /never?token=secret HTTP/1.1\r\nhost: t\r\n\r\n").await;
    service.until_requests(1).await;
    service.stop();
    let report = service.report().await;
    assert_eq!((report.requests.cut, report.connections.cut, report.exit_code()), (1, 1, 11));
    assert_eq!(report.requests.cut_requests[0].route, "GET /never");
    assert!(report.duration_ms < 1000.0, "{}", report.duration_ms);
    assert_eq!(client.ended().await, "");
    assert_eq!(service.shutdown.active_request_count(), 0);
}

#[tokio::test]
async fn a_client_that_left_is_noted() {
    let service = Service::start(|_| {}).await;
    let mut client = service.client().await;
    client.send("GET /never HTTP/1.1\r\nhost: t\r\n\r\n").await;
    service.until_requests(1).await;
    drop(client);
    service.until_requests(0).await;
    assert_eq!(service.shutdown.snapshot().requests.client_gone, 1);
}

#[tokio::test]
async fn a_request_shorter_than_the_http2_preface_is_not_kept_waiting() {
    let service = Service::start(|_| {}).await;
    let mut client = service.client().await;
    client.send("GET / HTTP/1.0\r\n\r\n").await;
    assert!(client.ended().await.starts_with("HTTP/1.1 200"));
    // The preface's own first bytes, in pieces, and then something else.
    let mut client = service.client().await;
    client.send("P").await;
    tokio::task::yield_now().await;
    client.send("RIVATE / HTTP/1.0\r\n\r\n").await;
    assert!(client.ended().await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn an_http2_client_is_told_to_leave_and_an_idle_one_holds_nothing() {
    let service = Service::start(|config| config.linger = Duration::from_secs(5)).await;
    let mut client = service.client().await;
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    client.frame(SETTINGS, 0, &[]).await;
    assert_eq!(client.next_frame().await.unwrap().0, SETTINGS);
    service.stop();
    let mut goaways = 0;
    while let Some((kind, flags, payload)) = client.next_frame().await {
        match (kind, flags & ACK) {
            (GOAWAY, _) => goaways += 1,
            (SETTINGS, 0) => client.frame(SETTINGS, ACK, &[]).await,
            (PING, 0) => client.frame(PING, ACK, &payload).await,
            _ => {}
        }
    }
    assert!(goaways > 0);
    let report = service.report().await;
    assert!(report.exit_code() == 0 && report.duration_ms < 4000.0, "{report:?}");
}

#[tokio::test]
async fn an_http2_client_that_answers_no_ping_does_not_hold_the_drain_to_its_deadline() {
    for first in [[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0].as_slice(), &[]] {
        let service = Service::start(|config| config.linger = Duration::from_millis(100)).await;
        let mut stuck = service.client().await;
        stuck.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        stuck.stream.write_all(first).await.unwrap();
        service.until_connections(1).await;
        service.stop();
        let report = service.report().await;
        assert_eq!((report.connections.cut, report.exit_code()), (0, 0));
        while stuck.next_frame().await.is_some() {}
    }
}

#[tokio::test]
async fn an_http2_client_that_reads_slowly_gets_its_whole_answer() {
    let service = Service::start(|_| {}).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = socket.connect(service.addr).await.unwrap();
    let mut client = Client { stream, got: Vec::new() };
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    client.frame(SETTINGS, 0, &[]).await;
    // RFC 7541: GET, http, `:path: /big`, `:authority: t`.
    client.frame_of(1, HEADERS, END_STREAM | END_HEADERS, b"\x82\x86\x04\x04/big\x01\x01t").await;
    let mut received = 0;
    while let Some((kind, flags, payload)) = client.next_frame().await {
        match (kind, flags & ACK) {
            (DATA, _) => {
                if received == 0 {
                    service.stop();
                }
                received += payload.len();
                // As clients do: these are still on their way when the server has said everything.
                let more = u32::try_from(payload.len()).unwrap().to_be_bytes();
                client.frame_of(0, WINDOW_UPDATE, 0, &more).await;
                client.frame_of(1, WINDOW_UPDATE, 0, &more).await;
            }
            (PING, 0) => client.frame(PING, ACK, &payload).await,
            _ => {}
        }
    }
    assert_eq!(received, BIG);
    assert_eq!(service.report().await.exit_code(), 0);
}

#[tokio::test]
async fn a_connection_accepted_after_the_lame_duck_began_is_told_too() {
    let service = Service::start(|config| config.lame_duck = Duration::from_secs(20)).await;
    service.stop();
    service.shutdown.until(Phase::LameDuck).await;
    let mut client = service.client().await;
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    client.frame(SETTINGS, 0, &[]).await;
    while client.next_frame().await.expect("a GOAWAY before the end").0 != GOAWAY {}
}

#[tokio::test]
async fn the_wrapped_proxy_knows_its_client_and_logs_each_request_once() {
    let service = Service::start(|_| {}).await;
    let mut client = service.client().await;
    let local = client.stream.local_addr().unwrap();
    client.get("/").await;
    client.get("/").await;
    assert_eq!(*service.hooks.client.lock().unwrap(), Some(local.to_string()));
    assert_eq!(service.hooks.logged.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_background_service_is_told_after_the_drain_and_waited_for() {
    struct Told(AtomicUsize);
    #[async_trait]
    impl BackgroundService for Told {
        async fn start(&self, mut shutdown: ShutdownWatch) {
            shutdown.wait_for(|stop| *stop).await.unwrap();
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let (shutdown, driver) = ShutdownCoordinator::builder().build().unwrap();
    let driver = tokio::spawn(driver.run());
    let service = Arc::new(Told(AtomicUsize::new(0)));
    run_background(Arc::clone(&service), shutdown, "discovery").unwrap();
    let request = shutdown.request_start().unwrap();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::Draining).await;
    assert_eq!(service.0.load(Ordering::SeqCst), 0);
    drop(request);
    let report = driver.await.unwrap();
    assert_eq!((service.0.load(Ordering::SeqCst), report.exit_code()), (1, 0));
    assert_eq!(report.stages[0].tasks[0].name, "discovery");
}

#[tokio::test]
async fn pingoras_server_is_told_when_the_last_request_is_gone_and_not_before() {
    let (shutdown, driver) = ShutdownCoordinator::builder().build().unwrap();
    tokio::spawn(driver.run());
    let watch = WhenDrained::new(shutdown);
    let request = shutdown.request_start().unwrap();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::Draining).await;
    let mut told = watch.recv();
    assert!(timeout(Duration::from_millis(20), &mut told).await.is_err());
    drop(request);
    assert!(matches!(told.await, ShutdownSignal::GracefulTerminate));
}

/// A proxy under its own coordinator, with an upstream behind it.
struct Service {
    shutdown: ShutdownCoordinator,
    addr: SocketAddr,
    driver: JoinHandle<Arc<ShutdownReport>>,
    hooks: Arc<Hooks>,
    release: Arc<Notify>,
}

impl Service {
    async fn start(configure: impl FnOnce(&mut ShutdownConfig)) -> Self {
        let mut config = ShutdownConfig::default();
        configure(&mut config);
        let (shutdown, driver) = ShutdownCoordinator::builder().config(config).build().unwrap();
        let driver = tokio::spawn(driver.run());
        let release = Arc::new(Notify::new());
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let hooks = Arc::new(Hooks::default());
        let app = App { upstream: upstream.local_addr().unwrap(), hooks: Arc::clone(&hooks) };
        tokio::spawn(serve_upstream(upstream, Arc::clone(&release)));
        let listener = shutdown_core::net::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(Proxy::new(app, shutdown).serve(listener));
        Self { shutdown, addr, driver, hooks, release }
    }

    async fn client(&self) -> Client {
        Client { stream: TcpStream::connect(self.addr).await.unwrap(), got: Vec::new() }
    }

    fn stop(&self) {
        self.shutdown.initiate_shutdown(Reason::requested("a test"));
    }

    async fn until(&self, what: impl Fn(&ShutdownCoordinator) -> bool) {
        // The counts wake nobody, so a test has to look.
        let looking = async {
            while !what(&self.shutdown) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, looking).await.unwrap();
    }

    async fn until_refused(&self) {
        self.until(ShutdownCoordinator::refuses_requests).await;
    }

    async fn until_connections(&self, count: u64) {
        self.until(|shutdown| shutdown.open_connection_count() == count).await;
    }

    async fn until_requests(&self, count: u64) {
        self.until(|shutdown| shutdown.active_request_count() == count).await;
    }

    async fn report(&self) -> Arc<ShutdownReport> {
        assert!(!self.driver.is_finished() || self.shutdown.phase() == Phase::Stopped);
        timeout(PATIENCE, self.shutdown.finished()).await.unwrap()
    }
}

#[derive(Default)]
struct Hooks {
    filtered: AtomicUsize,
    logged: AtomicUsize,
    client: std::sync::Mutex<Option<String>>,
}

impl Hooks {
    fn seen(&self) -> (usize, usize) {
        (self.filtered.load(Ordering::SeqCst), self.logged.load(Ordering::SeqCst))
    }
}

struct App {
    upstream: SocketAddr,
    hooks: Arc<Hooks>,
}

#[async_trait]
impl ProxyHttp for App {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn early_request_filter(&self, session: &mut Session, _: &mut ()) -> Result<()> {
        self.hooks.filtered.fetch_add(1, Ordering::SeqCst);
        *self.hooks.client.lock().unwrap() = session.client_addr().map(ToString::to_string);
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, _: &mut ()) -> Result<bool> {
        if session.req_header().uri.path() == "/hang" {
            std::future::pending::<()>().await;
        }
        Ok(false)
    }

    async fn upstream_peer(&self, _: &mut Session, _: &mut ()) -> Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.upstream, false, String::new())))
    }

    async fn logging(&self, _: &mut Session, _: Option<&Error>, _: &mut ()) {
        self.hooks.logged.fetch_add(1, Ordering::SeqCst);
    }
}

/// `/` answers at once, `/hold` sends one chunk and waits to be released, `/late` waits before its answer, `/never`
/// gives none, `/big` gives [`BIG`] bytes.
async fn serve_upstream(listener: TcpListener, release: Arc<Notify>) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let release = Arc::clone(&release);
        tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await?);
            }
            let head = String::from_utf8_lossy(&head).into_owned();
            if head.contains("/hold") {
                let first = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n";
                stream.write_all(first.as_bytes()).await?;
                release.notified().await;
                stream.write_all(b"4\r\nlast\r\n0\r\n\r\n").await?;
            } else if head.contains("/late") {
                release.notified().await;
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await?;
            } else if head.contains("/big") {
                stream
                    .write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {BIG}\r\n\r\n").as_bytes())
                    .await?;
                stream.write_all(&vec![b'x'; BIG]).await?;
            } else if head.contains("/never") {
                while stream.read(&mut [0; 64]).await? > 0 {}
            } else {
                let answer = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";
                stream.write_all(answer.as_bytes()).await?;
            }
            io::Result::Ok(())
        });
    }
}

struct Client {
    stream: TcpStream,
    got: Vec<u8>,
}

const BIG: usize = 2_000_000;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

impl Client {
    async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    async fn read_until(&mut self, end: &str) -> String {
        let reading = async {
            while !String::from_utf8_lossy(&self.got).contains(end) {
                let read = self.stream.read_buf(&mut self.got).await.unwrap();
                assert!(read > 0, "ended before {end:?}: {}", String::from_utf8_lossy(&self.got));
            }
        };
        timeout(PATIENCE, reading).await.unwrap();
        String::from_utf8(std::mem::take(&mut self.got)).unwrap()
    }

    /// One request without a body, and the head and short body of its answer.
    async fn get(&mut self, path: &str) -> String {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: t\r\n\r\n")).await;
        let mut answer = self.read_until("\r\n\r\n").await;
        while answer.starts_with("HTTP/1.1 200") && !answer.ends_with("\r\n\r\nok") {
            answer += &self.read_until("k").await;
        }
        answer
    }

    /// What still comes before the connection ends well.
    async fn ended(&mut self) -> String {
        let reading = self.stream.read_to_end(&mut self.got);
        timeout(PATIENCE, reading).await.unwrap().unwrap();
        String::from_utf8(std::mem::take(&mut self.got)).unwrap()
    }

    async fn frame(&mut self, kind: u8, flags: u8, payload: &[u8]) {
        self.frame_of(0, kind, flags, payload).await;
    }

    async fn frame_of(&mut self, stream: u8, kind: u8, flags: u8, payload: &[u8]) {
        let mut frame = vec![0, 0, payload.len() as u8, kind, flags, 0, 0, 0, stream];
        frame.extend_from_slice(payload);
        // The other side may have left already.
        let _ = self.stream.write_all(&frame).await;
    }

    /// The next HTTP/2 frame: type, flags, payload.
    async fn next_frame(&mut self) -> Option<(u8, u8, Vec<u8>)> {
        let reading = async {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            self.stream.read_exact(&mut payload).await.ok()?;
            Some((head[3], head[4], payload))
        };
        timeout(PATIENCE, reading).await.unwrap()
    }
}
