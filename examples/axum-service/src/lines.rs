//! The shortest correct axum program: what is ours is marked, ten lines.
//!
//! ```text
//! cargo run -p axum-service --bin axum-lines   # then: curl -N 127.0.0.1:3000/stream & kill -TERM <pid>
//! ```
//!
//! The address is `AXUM_SERVICE_LISTEN` (127.0.0.1:3000), the admin routes are on `AXUM_SERVICE_ADMIN` and reports in
//! `AXUM_SERVICE_REPORTS`, if they are set.

mod routes;

use std::convert::Infallible;
use std::error::Error;
use std::process::ExitCode;

use shutdown_core::{ShutdownConfig, ShutdownCoordinator, Signals, net, start_failure}; // 1
use shutdown_tower::admin::Admin;
use shutdown_tower::{Server, ShutdownLayer}; // 2
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> ExitCode {
    let Err(error) = run().await;
    start_failure("axum-lines", &*error) // 1 or 2, and one sentence
}

async fn run() -> Result<Infallible, Box<dyn Error>> {
    let signals = Signals::claim()?; // 3: the first statement
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();

    let mut builder = ShutdownCoordinator::builder().program("axum-lines").signals(signals); // 4
    if let Some(dir) = std::env::var_os("AXUM_SERVICE_REPORTS") {
        builder = builder.report_dir(dir);
    }
    let shutdown = builder.config(ShutdownConfig::from_env()?).install()?; // 5

    if let Ok(addr) = std::env::var("AXUM_SERVICE_ADMIN") {
        let listener = net::bind(addr.parse()?)?;
        println!("admin on {}", listener.local_addr()?);
        Admin::new(shutdown).serve(listener)?;
    }
    let addr = std::env::var("AXUM_SERVICE_LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".into());
    let listener = TcpListener::bind(&addr).await?;
    println!("listening on {}", listener.local_addr()?);

    let name =
        |request: &axum::extract::Request| format!("{} {}", request.method(), request.uri().path()).into();
    let app = routes::router(shutdown).layer(ShutdownLayer::new(shutdown).named(name)); // 6
    tokio::spawn(Server::new(shutdown).serve(listener, app)); // 7

    shutdown.finished().await.exit() // 8
}
