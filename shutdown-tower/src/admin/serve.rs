//! A small HTTP/1 server for the admin routes, on the coordinator's own runtime.
//!
//! The rule it keeps: who has asked before the report was final is answered before the process leaves, and so is who was
//! connected by then and asks in the time that is kept for the report. Everything that may still be asked something holds
//! a [`Join`], lets go of it at the last call, and lives on without:
//!
//! ```text
//!   report final ── one turn of the I/O driver: what had arrived is seen ── last call
//!      listener       accepts                                                lets go
//!      connection, nothing asked yet                                         holds on, to the end of its first answer
//!      connection, kept alive                                                lets go, closes when idle
//!      /terminate     answers, then lets go
//! ```

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::header::CONNECTION;
use http::{HeaderValue, Request};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use shutdown_core::{Join, ShutdownCoordinator};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tower::Service;

use super::{Admin, AdminService};

/// How long a client has to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long accepting pauses when there is no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A timer fires behind a turn of the I/O driver, which has seen by then what had arrived before.
const TURN: Duration = Duration::from_millis(1);

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
        let shutdown = self.shutdown;
        runtime.spawn(accept(listener, self.at(addr), shutdown));
        Ok(addr)
    }
}

/// Accepts until the process ends. What the queue held when the report became final keeps the process.
async fn accept(listener: TcpListener, service: AdminService, shutdown: ShutdownCoordinator) {
    let mut join = Some(shutdown.join());
    let mut last_call = pin!(last_call(shutdown.join()));
    loop {
        tokio::select! {
            biased;
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(tokio::spawn(connection(stream, service.clone(), shutdown))),
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
            () = &mut last_call, if join.is_some() => join = None,
        }
    }
}

/// Resolves when the report is final and everything has been seen that had arrived by then.
async fn last_call(join: Join) {
    join.report().await;
    tokio::time::sleep(TURN).await;
}

/// Serves one connection to its last byte, and keeps the process until then if it carries the final answer, or if that
/// may still be asked for.
async fn connection(stream: TcpStream, mut service: AdminService, shutdown: ShutdownCoordinator) {
    if let Ok(addr) = stream.local_addr() {
        service.at.addr = addr;
    }
    let (asked, called) = (AtomicBool::new(false), AtomicBool::new(false));
    let held: Arc<OnceLock<Join>> = Arc::default();
    let answer = service_fn(|request: Request<Incoming>| {
        // Relaxed, as below: one task.
        asked.store(true, Ordering::Relaxed);
        let (answer, held) = (service.clone().call(request), Arc::clone(&held));
        let called = &called;
        async move {
            let mut response = answer.await?;
            if let Some(join) = response.extensions_mut().remove::<Join>() {
                let _ = held.set(join);
            }
            if called.load(Ordering::Relaxed) {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let join = shutdown.join();
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        // Who has said everything and waits for the report has not hung up.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), answer);
    let mut serving = pin!(serving);
    // A client's mistakes are its own.
    tokio::select! {
        biased;
        _ = &mut serving => return,
        () = last_call(shutdown.join()) => called.store(true, Ordering::Relaxed),
    }
    if asked.load(Ordering::Relaxed) {
        drop(join);
        serving.as_mut().graceful_shutdown();
        let _ = serving.await;
    } else {
        let _ = serving.await;
        drop(join);
    }
}
