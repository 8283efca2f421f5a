//! What the service serves: answers that take their time, so that a stop has something to wait for.

use std::convert::Infallible;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Query;
use axum::routing::get;
use futures_util::stream;
use serde::Deserialize;

/// The routes.
pub(crate) fn router() -> Router {
    Router::new()
        .route("/", get(async || "hello\n"))
        .route("/slow", get(slow))
        .route("/stream", get(chunks))
        .route("/bytes", get(bytes))
        .route("/never", get(std::future::pending::<String>))
}

#[derive(Deserialize)]
struct Timing {
    #[serde(default = "Timing::two_seconds")]
    ms: u64,
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
