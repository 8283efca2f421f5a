//! Two small upstreams inside the process, for trying things out and for tests.
//!
//! | route | answer |
//! |---|---|
//! | `/` | which of the two it is |
//! | `/slow?ms=2000` | after that time |
//! | `/stream?ms=2000&chunks=20` | that many chunks over that time |
//! | `/bytes?n=8388608` | that many bytes in one piece: 0, 1, …, 250, 0, 1, … |
//! | `/sse` | an event every 200 ms, for ever |
//! | `/ws` | a WebSocket that echoes |
//! | `/status?code=503` | with that status, 200 to 599 |
//! | `/cached?seconds=60` | which answer this is of all it has given; to be kept for that time |
//! | `/never` | none |
//! | `POST /echo` | the body |
//!
//! They are not the service: nobody counts their connections or waits for them.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use futures_util::stream;
use tokio::net::TcpListener;

use crate::upstreams::Upstream;

const NAMES: [&str; 2] = ["one", "two"];
/// The most that `/bytes` gives: all of it is in memory.
const MOST_BYTES: usize = 256 * 1024 * 1024;

/// Starts both on free loopback ports.
pub(crate) async fn start() -> io::Result<Vec<Upstream>> {
    let mut upstreams = Vec::new();
    for name in NAMES {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        upstreams.push(Upstream::from(listener.local_addr()?));
        tokio::spawn(async move { axum::serve(listener, routes(name)).await });
    }
    Ok(upstreams)
}

fn routes(name: &'static str) -> Router {
    Router::new()
        .route("/", get(|State(name): State<&'static str>| async move { format!("demo upstream {name}\n") }))
        .route("/slow", get(slow))
        .route("/stream", get(stream_chunks))
        .route("/bytes", get(bytes))
        .route("/sse", get(sse))
        .route("/ws", any(|upgrade: WebSocketUpgrade| async { upgrade.on_upgrade(echo) }))
        .route("/status", any(status))
        .route("/cached", get(cached))
        .route("/never", any(std::future::pending::<()>))
        .route("/echo", post(|body: Bytes| async { body }).layer(DefaultBodyLimit::disable()))
        .with_state(name)
}

type Parameters = Query<Vec<(String, u64)>>;

fn parameter(parameters: &Parameters, name: &str, default: u64) -> u64 {
    parameters.iter().find(|(key, _)| key == name).map_or(default, |(_, value)| *value)
}

async fn slow(parameters: Parameters) -> String {
    let ms = parameter(&parameters, "ms", 2000);
    tokio::time::sleep(Duration::from_millis(ms)).await;
    format!("{ms} ms later\n")
}

async fn stream_chunks(parameters: Parameters) -> Response {
    let chunks = parameter(&parameters, "chunks", 20).max(1);
    let pause =
        Duration::from_millis(parameter(&parameters, "ms", 2000)) / u32::try_from(chunks).unwrap_or(u32::MAX);
    let body = stream::unfold(1, move |chunk| async move {
        if chunk > chunks {
            return None;
        }
        tokio::time::sleep(pause).await;
        Some((Ok::<_, Infallible>(format!("chunk {chunk} of {chunks}\n")), chunk + 1))
    });
    Body::from_stream(body).into_response()
}

async fn bytes(parameters: Parameters) -> Response {
    let wanted = parameter(&parameters, "n", 8_388_608);
    match usize::try_from(wanted) {
        Ok(wanted) if wanted <= MOST_BYTES => {
            (0..=250_u8).cycle().take(wanted).collect::<Vec<_>>().into_response()
        }
        _ => (StatusCode::BAD_REQUEST, format!("n is at most {MOST_BYTES}\n")).into_response(),
    }
}

async fn status(parameters: Parameters) -> (StatusCode, String) {
    let wanted = parameter(&parameters, "code", 503);
    let code = u16::try_from(wanted).ok().filter(|code| (200..600).contains(code));
    match code.and_then(|code| StatusCode::from_u16(code).ok()) {
        Some(code) => (code, format!("{code}\n")),
        None => (StatusCode::BAD_REQUEST, "code is 200 to 599\n".to_owned()),
    }
}

/// One that comes out of a cache has the number of an earlier one.
async fn cached(State(name): State<&'static str>, parameters: Parameters) -> impl IntoResponse {
    static ANSWERS: AtomicU64 = AtomicU64::new(0);
    let seconds = parameter(&parameters, "seconds", 60);
    let number = ANSWERS.fetch_add(1, Ordering::Relaxed) + 1;
    ([(header::CACHE_CONTROL, format!("max-age={seconds}"))], format!("answer {number}, by {name}\n"))
}

async fn sse() -> Response {
    let events = stream::unfold(1_u64, |event| async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        Some((Ok::<_, Infallible>(format!("id: {event}\ndata: event {event}\n\n")), event + 1))
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response()
}

async fn echo(mut socket: WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        let answer = match message {
            Message::Text(_) | Message::Binary(_) => message,
            // axum answers pings and closes itself.
            _ => continue,
        };
        if socket.send(answer).await.is_err() {
            return;
        }
    }
}
