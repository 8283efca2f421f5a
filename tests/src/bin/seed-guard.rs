//! The control of the response tests: the guard placed as in seed 003, a local of the handler.
//!
//! It is dropped when the handler returns, before the answer is on the wire; the process leaves when the count is
//! zero. It must lose answers in the same run in which ours loses none.

use std::convert::Infallible;
use std::error::Error;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::routing::get;
use futures_util::stream;
use shutdown_core::{ShutdownConfig, ShutdownCoordinator, Signals};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let signals = Signals::claim()?;
    let shutdown =
        ShutdownCoordinator::builder().signals(signals).config(ShutdownConfig::from_env()?).install()?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on {}", listener.local_addr()?);

    let bytes = move || async move {
        let _guard = shutdown.request_start().ok();
        (0..=250).cycle().take(8 * 1024 * 1024).collect::<Vec<u8>>()
    };
    let chunks = move || async move {
        let _guard = shutdown.request_start().ok();
        Body::from_stream(stream::unfold(0, |chunk: u8| async move {
            if chunk == 20 {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            Some((Ok::<_, Infallible>(Bytes::from(vec![b'a' + chunk; 1000])), chunk + 1))
        }))
    };
    let app = Router::new().route("/bytes", get(bytes)).route("/stream", get(chunks));
    tokio::spawn(async move { axum::serve(listener, app).await });
    shutdown.finished().await.exit()
}
