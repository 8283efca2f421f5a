//! Plain hyper without a framework: our listener, hyper's connections, the layer around a tower service.

use std::convert::Infallible;
use std::error::Error;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use shutdown_core::net::{Listener, bind};
use shutdown_core::{ShutdownConfig, ShutdownCoordinator, Signals, start_failure};
use shutdown_tower::ShutdownLayer;
use tokio::net::TcpListener;
use tower::{ServiceBuilder, service_fn};

#[tokio::main]
async fn main() -> ExitCode {
    let Err(error) = run().await;
    start_failure("hyper-service", &*error)
}

async fn run() -> Result<Infallible, Box<dyn Error>> {
    let signals = Signals::claim()?;
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let shutdown = ShutdownCoordinator::builder()
        .program("hyper-service")
        .signals(signals)
        .config(ShutdownConfig::from_env()?)
        .install()?;

    let addr: SocketAddr =
        std::env::var("HYPER_SERVICE_LISTEN").as_deref().unwrap_or("127.0.0.1:3001").parse()?;
    let mut listener = Listener::new(TcpListener::from_std(bind(addr)?)?, shutdown);
    println!("listening on {}", listener.local_addr()?);

    let service = ServiceBuilder::new().layer(ShutdownLayer::new(shutdown)).service(service_fn(answer));
    while let Some((io, _)) = listener.accept().await {
        let service = TowerToHyperService::new(service);
        tokio::spawn(async move {
            let builder = auto::Builder::new(TokioExecutor::new());
            let mut connection =
                std::pin::pin!(builder.serve_connection_with_upgrades(TokioIo::new(io), service));
            // The last answers, then the idle connections; a client's mistakes are its own.
            let result = tokio::select! {
                result = connection.as_mut() => result,
                () = shutdown.requests_done() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            drop(result);
        });
    }
    shutdown.finished().await.exit()
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.uri().path() == "/slow" {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(Response::new(Full::new(Bytes::from_static(b"hello\n"))))
}
