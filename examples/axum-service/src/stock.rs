//! The same service under stock `axum::serve`, for programs that must keep it.
//!
//! It refuses, counts and ends as the other does; what it cannot do is said at
//! [`Listener`].

mod routes;

use std::convert::Infallible;
use std::error::Error;
use std::process::ExitCode;

use shutdown_core::{ShutdownConfig, ShutdownCoordinator, Signals, net, start_failure};
use shutdown_tower::admin::Admin;
use shutdown_tower::{Listener, ShutdownLayer};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> ExitCode {
    let Err(error) = run().await;
    start_failure("axum-stock", &*error)
}

async fn run() -> Result<Infallible, Box<dyn Error>> {
    let signals = Signals::claim()?;
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();

    let mut builder = ShutdownCoordinator::builder().program("axum-stock").signals(signals);
    if let Some(dir) = std::env::var_os("AXUM_SERVICE_REPORTS") {
        builder = builder.report_dir(dir);
    }
    let shutdown = builder.config(ShutdownConfig::from_env()?).install()?;

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
    let app = routes::router(shutdown).layer(ShutdownLayer::new(shutdown).named(name));
    let listener = Listener::new(listener, shutdown);
    let server = axum::serve(listener, app).with_graceful_shutdown(shutdown.requests_done());
    // Not awaited here: a handler that blocks its thread would keep the report waiting.
    tokio::spawn(server.into_future());

    shutdown.finished().await.exit()
}
