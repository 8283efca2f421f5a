//! A gRPC service on stock tonic that stops well: health goes red first, streams end with UNAVAILABLE, and what is in
//! flight is answered.
//!
//! The address is `TONIC_SERVICE_LISTEN` (127.0.0.1:50051); reports go to `TONIC_SERVICE_REPORTS`, if it is set.

use std::convert::Infallible;
use std::error::Error;
use std::process::ExitCode;

use shutdown_core::{Phase, ShutdownConfig, ShutdownCoordinator, Signals, start_failure};
use shutdown_tower::{RefuseGrpc, SessionLayer, ShutdownLayer, TonicIncoming};
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic_service::Clock;
use tonic_service::rpc::clock_server::ClockServer;

#[tokio::main]
async fn main() -> ExitCode {
    let Err(error) = run().await;
    start_failure("tonic-service", &*error)
}

async fn run() -> Result<Infallible, Box<dyn Error>> {
    let signals = Signals::claim()?;
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();

    let mut builder = ShutdownCoordinator::builder().program("tonic-service").signals(signals);
    if let Some(dir) = std::env::var_os("TONIC_SERVICE_REPORTS") {
        builder = builder.report_dir(dir);
    }
    let shutdown = builder.config(ShutdownConfig::from_env()?).install()?;

    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ClockServer<Clock>>().await;
    tokio::spawn(async move {
        shutdown.until(Phase::LameDuck).await;
        health.set_not_serving::<ClockServer<Clock>>().await;
        // The empty name stands for the whole server.
        health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    });

    let addr = std::env::var("TONIC_SERVICE_LISTEN").unwrap_or_else(|_| "127.0.0.1:50051".into());
    let listener = TcpListener::bind(&addr).await?;
    println!("listening on {}", listener.local_addr()?);

    let name = |request: &http::Request<tonic::body::Body>| request.uri().path().to_owned().into();
    // Health watches are open for as long as their clients live: sessions, too.
    let watches = SessionLayer::new(shutdown, |request: &http::Request<tonic::body::Body>| {
        request.uri().path().ends_with("/Watch").then_some("health watch".into())
    });
    let server = Server::builder()
        .layer(ShutdownLayer::new(shutdown).named(name).refuse_with(RefuseGrpc))
        .layer(watches)
        .add_service(health_service)
        .add_service(ClockServer::new(Clock::new(shutdown)))
        .serve_with_incoming_shutdown(TonicIncoming::new(listener, shutdown), shutdown.requests_done());
    // Not awaited here: a handler that blocks its thread would keep the report waiting.
    tokio::spawn(server);

    shutdown.finished().await.exit()
}
