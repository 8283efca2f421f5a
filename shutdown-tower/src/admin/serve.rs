//! A small HTTP/1 server for the admin routes, on the coordinator's own runtime.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use shutdown_core::Join;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tower::Service;

use super::{Admin, AdminService};

/// How long a client has to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long accepting pauses when there is no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl Admin {
    /// Serves the routes on `listener` until the process ends, on the coordinator's own runtime if it is installed,
    /// else on the current one. Returns the address.
    ///
    /// `Host` must be the address that each connection arrived at, so a wildcard listener works, too.
    ///
    /// # Errors
    ///
    /// There is no runtime, or the listener cannot be used.
    pub fn serve(self, listener: std::net::TcpListener) -> io::Result<SocketAddr> {
        let runtime = match self.shutdown.own_runtime() {
            Some(runtime) => runtime,
            None => Handle::try_current().map_err(io::Error::other)?,
        };
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let listener = {
            let _inside = runtime.enter();
            TcpListener::from_std(listener)?
        };
        let service = self.at(addr);
        runtime.spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => drop(tokio::spawn(connection(stream, service.clone()))),
                    Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                }
            }
        });
        Ok(addr)
    }
}

/// Serves one connection to its last byte, and keeps the process until then if it carries the final answer.
async fn connection(stream: TcpStream, mut service: AdminService) {
    if let Ok(addr) = stream.local_addr() {
        service.addr = addr;
    }
    let held: Arc<OnceLock<Join>> = Arc::default();
    let answer = service_fn(|request: Request<Incoming>| {
        let (answer, held) = (service.clone().call(request), Arc::clone(&held));
        async move {
            let mut response = answer.await?;
            if let Some(join) = response.extensions_mut().remove::<Join>() {
                let _ = held.set(join);
            }
            Ok::<_, Infallible>(response)
        }
    });
    // A client's mistakes are its own.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
    drop(held);
}
