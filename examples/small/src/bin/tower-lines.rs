//! Tower without HTTP: a TCP service that answers each line, upper-cased, from a tower service.
//!
//! [`ShutdownAware`] tells the connection loop when to say goodbye; [`GuardLayer`] counts and refuses the calls.

use std::convert::Infallible;
use std::error::Error;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use shutdown_core::net::{Io, Listener, bind};
use shutdown_core::{ShutdownConfig, ShutdownCoordinator, Signals, start_failure};
use shutdown_tower::{GuardError, GuardLayer, ShutdownAware};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufStream};
use tokio::net::{TcpListener, TcpStream};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};

#[tokio::main]
async fn main() -> ExitCode {
    let Err(error) = run().await;
    start_failure("tower-lines", &*error)
}

async fn run() -> Result<Infallible, Box<dyn Error>> {
    let signals = Signals::claim()?;
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let shutdown = ShutdownCoordinator::builder()
        .program("tower-lines")
        .signals(signals)
        .config(ShutdownConfig::from_env()?)
        .install()?;

    let addr: SocketAddr =
        std::env::var("TOWER_LINES_LISTEN").as_deref().unwrap_or("127.0.0.1:3002").parse()?;
    let mut listener = Listener::new(TcpListener::from_std(bind(addr)?)?, shutdown);
    println!("listening on {}", listener.local_addr()?);

    let service = ServiceBuilder::new().layer(GuardLayer::new(shutdown)).service(service_fn(upper_case));
    while let Some((io, _)) = listener.accept().await {
        let aware = ShutdownAware::new(service, shutdown);
        // A client that goes away is no error of ours.
        tokio::spawn(async move { drop(lines(io, aware).await) });
    }
    shutdown.finished().await.exit()
}

async fn lines<S>(io: Io<TcpStream>, mut service: ShutdownAware<S>) -> Result<(), Box<dyn Error>>
where
    S: Service<String, Response = String, Error = GuardError<Infallible>>,
{
    let mut io = BufStream::new(io);
    let mut line = String::new();
    loop {
        // Only an idle connection is closed: an answer that is being written is written.
        let read = tokio::select! {
            read = io.read_line(&mut line) => read?,
            () = service.coordinator().requests_done() => 0,
        };
        if read == 0 {
            return Ok(());
        }
        let answer = match service.inner_mut().ready().await?.call(std::mem::take(&mut line)).await {
            Ok(answer) => answer,
            Err(error) => format!("sorry: {error}\n"),
        };
        io.write_all(answer.as_bytes()).await?;
        if service.is_shutting_down() {
            io.write_all(b"bye\n").await?;
            io.flush().await?;
            return Ok(());
        }
        io.flush().await?;
    }
}

async fn upper_case(line: String) -> Result<String, Infallible> {
    if line.starts_with("slow") {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(line.to_uppercase())
}
