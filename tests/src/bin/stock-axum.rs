//! A control: axum as its documentation says, with the graceful shutdown that it comes with.
//!
//! `STOCK_AXUM_DELAY_MS` serves on for a time after the signal, as a preStop hook that sleeps would have it.

use std::convert::Infallible;
use std::error::Error;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::routing::{any, get, post};
use futures_util::stream;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let delay = std::env::var("STOCK_AXUM_DELAY_MS").map_or(Ok(0), |text| text.parse())?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on {}", listener.local_addr()?);
    let app = Router::new()
        .route("/", get(async || "hello\n"))
        .route("/stream", get(stream_letters))
        .route("/bytes", get(async || (0..=250).cycle().take(8 * 1024 * 1024).collect::<Vec<u8>>()))
        .route("/echo", post(async |body: Bytes| body))
        .route("/ws", any(async |upgrade: WebSocketUpgrade| upgrade.on_upgrade(echo)));
    let leave = async move {
        terminate.recv().await;
        tokio::time::sleep(Duration::from_millis(delay)).await;
    };
    axum::serve(listener, app).with_graceful_shutdown(leave).await?;
    Ok(())
}

async fn stream_letters() -> Body {
    Body::from_stream(stream::unfold(0, |chunk: u8| async move {
        if chunk == 20 {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        Some((Ok::<_, Infallible>(Bytes::from(vec![b'a' + chunk; 1000])), chunk + 1))
    }))
}

async fn echo(mut socket: WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        if matches!(message, Message::Text(_)) && socket.send(message).await.is_err() {
            return;
        }
    }
}
