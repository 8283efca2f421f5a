//! Pingora's engine on our socket, accept loop and IO object.

use std::fmt;
use std::io;
use std::sync::Arc;

use pingora_core::apps::{HttpServerApp, HttpServerOptions, ServerApp};
use pingora_core::protocols::http::v2::server::H2Options;
use pingora_core::server::ShutdownWatch;
use pingora_core::server::configuration::ServerConf;
use pingora_proxy::{HttpProxy, ProxyHttp, http_proxy};
use shutdown_core::ShutdownCoordinator;
use shutdown_core::net::Listener;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::connection::Connection;
use crate::coordinated::Coordinated;

/// A Pingora proxy under a coordinator. See the crate's example.
///
/// Nearly the same are Pingora's `http_proxy_service` in a `Server`, which owns the process (see
/// [`WhenDrained`](crate::WhenDrained)), and `Service::start_service` on a runtime of your own, which closes idle
/// connections at once and neither counts connections nor can end one.
#[must_use = "it serves when `serve` is polled"]
pub struct Proxy<P> {
    app: P,
    shutdown: ShutdownCoordinator,
    conf: Arc<ServerConf>,
    options: HttpServerOptions,
    h2_options: Option<H2Options>,
}

impl<P> fmt::Debug for Proxy<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("options", &self.options).finish_non_exhaustive()
    }
}

impl<P> Proxy<P>
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync + 'static,
{
    /// A proxy of `app` under `shutdown`, with Pingora's defaults but for two: HTTP/2 with prior knowledge works
    /// beside HTTP/1, and the engine is sized for all cores.
    pub fn new(app: P, shutdown: ShutdownCoordinator) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut options = HttpServerOptions::default();
        options.h2c = true;
        Self {
            app,
            shutdown,
            conf: Arc::new(ServerConf { threads: cores, ..ServerConf::default() }),
            options,
            h2_options: None,
        }
    }

    /// Pingora's configuration. Only what concerns upstreams is used: pools, addresses to bind to, retries. Its
    /// grace period and timeout are not; the plan of the coordinator has them.
    pub fn conf(mut self, conf: Arc<ServerConf>) -> Self {
        self.conf = conf;
        self
    }

    /// How clients are served. Replaces the default, in which `h2c` is on.
    pub fn options(mut self, options: HttpServerOptions) -> Self {
        self.options = options;
        self
    }

    /// The settings of HTTP/2 connections to clients.
    pub fn h2_options(mut self, options: H2Options) -> Self {
        self.h2_options = Some(options);
        self
    }

    /// Serves until Draining, then empties the accept queue, closes it and returns. Bind with
    /// [`shutdown_core::net::bind`].
    ///
    /// Connections then go on by themselves, in tasks of the current runtime, counted by their own guards: wait for
    /// [`ShutdownCoordinator::finished`] before that runtime is dropped. Each ends
    ///
    /// * after the answer in progress, once LameDuck has begun (HTTP/1), or after its GOAWAY (HTTP/2);
    /// * when it is idle and requests are over;
    /// * at the drain's deadline, in whatever state.
    ///
    /// # Errors
    ///
    /// The runtime cannot take the socket.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it closes its socket at once and loses what is in the accept queue; connections go on.
    pub async fn serve(self, listener: std::net::TcpListener) -> io::Result<()> {
        let shutdown = self.shutdown;
        // The runtime needs it so; `bind` has done it, others may not.
        listener.set_nonblocking(true)?;
        let mut listener = Listener::new(TcpListener::from_std(listener)?, shutdown);
        let mut engine = http_proxy(&self.conf, Coordinated::new(self.app, shutdown));
        engine.server_options = Some(self.options);
        engine.h2_options = self.h2_options;
        let engine = Arc::new(engine);
        tokio::spawn(end_idle(Arc::clone(&engine), shutdown));
        while let Some((io, peer)) = listener.accept().await {
            // Nobody looks at `watch` itself, so that its clones see a change whenever they are made.
            let (tell, watch) = watch::channel(false);
            let connection = Connection::new(io, peer).telling(tell);
            tokio::spawn(serve_connection(Arc::clone(&engine), connection, watch));
        }
        Ok(())
    }
}

/// Ends connections that wait for a request, when requests are over. Not earlier: until then one that sends a request
/// gets an answer.
async fn end_idle<P>(engine: Arc<HttpProxy<Coordinated<P>>>, shutdown: ShutdownCoordinator)
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync + 'static,
{
    shutdown.requests_done().await;
    engine.http_cleanup().await;
}

async fn serve_connection<P>(
    engine: Arc<HttpProxy<Coordinated<P>>>,
    connection: Connection,
    watch: ShutdownWatch,
) where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync + 'static,
{
    let cut = connection.handle().cut();
    tokio::select! {
        biased;
        // The kill switch: drops the exchange in whatever state, and with it its guards.
        () = cut => {}
        // What is given back for another round is no use to anybody: HTTP returns `None`.
        _ = engine.process_new(Box::new(connection), &watch) => {}
    }
}
