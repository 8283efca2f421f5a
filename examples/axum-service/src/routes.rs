//! What the service serves: answers that take their time, so that a stop has something to wait for.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Query, State, WebSocketUpgrade};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Extension, Router};
use futures_util::stream;
use serde::Deserialize;
use shutdown_core::ShutdownCoordinator;
use shutdown_tower::UntilTold;

/// The routes.
pub(crate) fn router(shutdown: ShutdownCoordinator) -> Router {
    Router::new()
        .route("/", get(async || "hello\n"))
        .route("/slow", get(slow))
        .route("/stream", get(chunks))
        .route("/bytes", get(bytes))
        .route("/never", get(std::future::pending::<String>))
        .route("/echo", post(async |body: Bytes| body).layer(DefaultBodyLimit::max(64 * 1024 * 1024)))
        .route("/ws", any(chat))
        .route("/sse", get(events))
        .with_state(shutdown)
}

/// A WebSocket that echoes. It is a session: told to end when the service does, with a message and Close 1001.
async fn chat(
    State(shutdown): State<ShutdownCoordinator>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, StatusCode> {
    let session = shutdown.session_start("GET /ws").map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    Ok(shutdown_tower::on_upgrade(upgrade, session, async |mut socket| {
        while let Some(Ok(message)) = socket.recv().await {
            use axum::extract::ws::Message::{Binary, Text};
            // axum answers pings and closes itself.
            if matches!(message, Text(_) | Binary(_)) && socket.send(message).await.is_err() {
                return;
            }
        }
    }))
}

/// An event every 200 ms, until the service stops: then a last one, and a proper end.
async fn events(State(shutdown): State<ShutdownCoordinator>) -> Result<impl IntoResponse, StatusCode> {
    let session = shutdown.session_start("GET /sse").map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let events = stream::unfold(1_u64, |event| async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        Some((Ok::<_, Infallible>(format!("id: {event}\ndata: event {event}\n\n")), event + 1))
    });
    let goodbye = "event: server_shutdown\ndata: Server is shutting down gracefully\n\n".to_owned();
    let body = Body::from_stream(UntilTold::new(&session, events).last(Ok(goodbye)));
    Ok((Extension(session), [(header::CONTENT_TYPE, "text/event-stream")], body))
}

/// How long an answer takes.
#[derive(Deserialize)]
pub(crate) struct Timing {
    #[serde(default = "Timing::two_seconds")]
    pub(crate) ms: u64,
}

impl Timing {
    fn two_seconds() -> u64 {
        2000
    }
}

/// Answers after `ms` milliseconds.
async fn slow(Query(timing): Query<Timing>) -> &'static str {
    tokio::time::sleep(Duration::from_millis(timing.ms)).await;
    "slow\n"
}

/// Streams 20 chunks of 1,000 bytes over `ms` milliseconds.
async fn chunks(Query(timing): Query<Timing>) -> Body {
    const CHUNKS: u8 = 20;
    let pause = Duration::from_millis(timing.ms / u64::from(CHUNKS));
    Body::from_stream(stream::unfold(0, move |chunk| async move {
        if chunk == CHUNKS {
            return None;
        }
        tokio::time::sleep(pause).await;
        Some((Ok::<_, Infallible>(Bytes::from(vec![b'a' + chunk; 1000])), chunk + 1))
    }))
}

#[derive(Deserialize)]
struct Size {
    #[serde(default = "Size::eight_mib")]
    n: usize,
}

impl Size {
    fn eight_mib() -> usize {
        8 * 1024 * 1024
    }
}

/// Answers `n` bytes (at most 64 MiB) in one chunk: byte i is i modulo 251.
async fn bytes(Query(size): Query<Size>) -> Vec<u8> {
    let n = size.n.min(64 * 1024 * 1024);
    (0..=250).cycle().take(n).collect()
}
