//! Sessions that share an HTTP/2 connection: each is told in its turn and ends properly, long after the drain.

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::status_until;
use shutdown_tests::process::Service;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Below the 200 streams at once that a server allows.
const STREAMS: usize = 150;
const CONNECTIONS: usize = 5;

async fn open(service: &Service) -> Vec<Incoming> {
    let mut bodies = Vec::new();
    for _ in 0..CONNECTIONS {
        let stream = TcpStream::connect(service.listen).await.expect("it serves");
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .expect("it speaks HTTP/2");
        tokio::spawn(connection);
        for _ in 0..STREAMS {
            let request = Request::get("http://sse.test/sse").body(Empty::<Bytes>::new()).expect("a request");
            bodies.push(sender.send_request(request).await.expect("it answers").into_body());
        }
    }
    bodies
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_2_streams_that_are_told_late_are_kept_beyond_the_drain_and_end_properly() {
    // Told over 3 s; the drain is over after 300 ms.
    let env = [("SHUTDOWN_LINGER", "200ms"), ("SHUTDOWN_WEBSOCKET_TIMEOUT", "8")];
    let mut service = Service::start("axum-lines", env);
    let mut ends: JoinSet<_> = open(&service)
        .await
        .into_iter()
        .map(|body| async move { timeout(PATIENCE, body.collect()).await.expect("it ends") })
        .collect();
    let many = CONNECTIONS * STREAMS;
    status_until(service.admin, |status| {
        status["sessions"]["open"] == many && status["requests"]["active"] == 0
    });
    service.process.signal(Signal::TERM);
    while let Some(end) = ends.join_next().await {
        let body = end.expect("no panic").expect("a proper end").to_bytes();
        assert!(body.ends_with(b"data: Server is shutting down gracefully\n\n"), "{body:?}");
    }
    let code = tokio::task::spawn_blocking(move || (service.process.exit_code(PATIENCE), service.report()));
    let (code, report) = code.await.expect("no panic");
    assert_eq!(code, 0, "{report:#}");
    assert_eq!((&report["sessions"]["told"], &report["sessions"]["cut"]), (&many.into(), &0.into()));
    let drained = report["phases"][1]["end_ms"].as_f64().expect("a time");
    assert!(drained < 1500.0, "the drain waited for sessions: {report:#}");
}
