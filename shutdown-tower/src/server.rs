//! An accept loop for HTTP/1 and HTTP/2 whose connections hear every phase at its moment.

mod bodies;
mod http1;
mod http2;
mod one_head;

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use shutdown_core::net::{Accept, FirstBytes, Io, Listener};
use shutdown_core::{BoxError, ConnectionHandle, ShutdownCoordinator};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep_until};
use tower::Service;

/// The first bytes of an HTTP/2 client; RFC 9113 §3.4.
const H2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long an HTTP/2 client may take to answer our PING; more than a slow round trip.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// How long a connection has to end by itself when requests are over and nothing of it is left to send.
const SETTLE: Duration = Duration::from_millis(100);

/// Serves HTTP under a coordinator: `axum::serve` for services that must stop well.
///
/// Stock servers have one trigger for everything that stopping means. This loop has a moment for each:
///
/// | moment | HTTP/1 | HTTP/2 |
/// |---|---|---|
/// | lame duck | answers carry `Connection: close` (the layer); pipelined requests are answered first (not behind a chunked body) | GOAWAY at once; connections accepted later get it after their first answer |
/// | Draining | the accept queue is emptied, then closed; a fresh connection has 100 ms for its first request | the same |
/// | linger | idle connections stay; their next answer closes them | streams that come before the client has heard are served |
/// | requests are over | closed, half a head or not, once nothing of it is left to send | the final GOAWAY; closed when the client has not answered our PING for a second and nothing is left to send |
/// | the deadline | cut | cut |
///
/// The service carries [`ShutdownLayer`](crate::ShutdownLayer) somewhere: what is not counted is not waited for.
///
/// ```no_run
/// # use shutdown_core::ShutdownCoordinator;
/// # use shutdown_tower::{Server, ShutdownLayer};
/// # async fn example(shutdown: ShutdownCoordinator, app: axum::Router) -> Result<(), Box<dyn std::error::Error>> {
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
/// tokio::spawn(Server::new(shutdown).serve(listener, app.layer(ShutdownLayer::new(shutdown))));
/// # Ok(())
/// # }
/// ```
///
/// No time limit is set for a request's head: hyper's counts the time between two requests as well, and a server that
/// closes idle connections before its balancer does loses requests. Set one with [`http1`](Self::http1) where clients
/// are strangers.
#[must_use = "it serves when `serve` is polled"]
pub struct Server<T = Plain> {
    shutdown: ShutdownCoordinator,
    http1: hyper::server::conn::http1::Builder,
    http2: hyper::server::conn::http2::Builder<TokioExecutor>,
    handshake: T,
}

impl<T> fmt::Debug for Server<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("shutdown", &self.shutdown).finish_non_exhaustive()
    }
}

impl Server {
    /// A server under `shutdown`, without TLS.
    pub fn new(shutdown: ShutdownCoordinator) -> Self {
        let mut http1 = hyper::server::conn::http1::Builder::new();
        // With a timer hyper's default is 30 s, and counts the time between two requests.
        http1.timer(TokioTimer::new()).header_read_timeout(None);
        let mut http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http2.timer(TokioTimer::new());
        Self { shutdown, http1, http2, handshake: Plain }
    }
}

impl<T> Server<T> {
    /// Changes hyper's settings for HTTP/1.
    pub fn http1(mut self, change: impl FnOnce(&mut hyper::server::conn::http1::Builder)) -> Self {
        change(&mut self.http1);
        self
    }

    /// Changes hyper's settings for HTTP/2.
    pub fn http2(
        mut self,
        change: impl FnOnce(&mut hyper::server::conn::http2::Builder<TokioExecutor>),
    ) -> Self {
        change(&mut self.http2);
        self
    }

    /// Accepts TLS, or whatever comes between the socket and HTTP, with a function from the accepted connection to
    /// the stream that HTTP is spoken on: `move |io| acceptor.accept(io)` with a `tokio_rustls::TlsAcceptor`.
    ///
    /// It runs in the connection's own task, so one that never finishes holds up nobody: it has ten seconds, and no
    /// longer than requests are served.
    pub fn tls<H>(self, handshake: H) -> Server<H> {
        Server { shutdown: self.shutdown, http1: self.http1, http2: self.http2, handshake }
    }

    /// Serves until Draining, then empties the accept queue, closes it and returns.
    ///
    /// Connections then go on by themselves, in tasks of the current runtime, counted by their own guards: wait for
    /// [`ShutdownCoordinator::finished`] before that runtime is dropped.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it closes its socket at once and loses what is in the accept queue; connections go on.
    pub async fn serve<L, S>(self, listener: L, service: S)
    where
        L: Accept,
        T: Handshake<Io<L::Stream>>,
        S: HttpService,
    {
        self.serve_each(listener, |_| service.clone()).await;
    }

    /// As [`serve`](Self::serve), with a service for each connection, made from its peer's address.
    ///
    /// # Cancel safety
    ///
    /// As [`serve`](Self::serve).
    pub async fn serve_each<L, S>(self, listener: L, mut service: impl FnMut(&L::Addr) -> S)
    where
        L: Accept,
        T: Handshake<Io<L::Stream>>,
        S: HttpService,
    {
        let mut listener = Listener::new(listener, self.shutdown);
        let server = Arc::new(self);
        while let Some((io, peer)) = listener.accept().await {
            tokio::spawn(Arc::clone(&server).connection(io, service(&peer)));
        }
    }

    async fn connection<I, S>(self: Arc<Self>, io: Io<I>, service: S)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        T: Handshake<Io<I>>,
        S: HttpService,
    {
        let connection = Opened { shutdown: self.shutdown, handle: io.handle() };
        let Some((stream, speaks_h2)) = connection.before_http(self.hello(io)).await else { return };
        connection.handle.hear_out(true);
        if speaks_h2 {
            http2::serve(&self.http2, stream, service, connection).await;
        } else {
            http1::serve(&self.http1, stream, service, connection).await;
        }
    }

    /// The handshake, and whether the client speaks HTTP/2. Its preface says so, with ALPN or without.
    async fn hello<I>(&self, io: Io<I>) -> io::Result<(FirstBytes<T::Stream>, bool)>
    where
        T: Handshake<Io<I>>,
    {
        let stream = match tokio::time::timeout(HANDSHAKE, self.handshake.handshake(io)).await {
            Ok(stream) => stream?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        };
        let mut stream = FirstBytes::new(stream);
        let speaks_h2 = stream.begins_with(H2_PREFACE).await?;
        Ok((stream, speaks_h2))
    }
}

/// A connection, as the tasks that serve it see it.
struct Opened {
    shutdown: ShutdownCoordinator,
    handle: ConnectionHandle,
}

impl Opened {
    /// What comes before the first request: until requests are over.
    async fn before_http<V>(&self, hello: impl Future<Output = io::Result<V>>) -> Option<V> {
        tokio::select! {
            // Reading first: what has arrived is answered, be it with 503.
            biased;
            hello = hello => hello.ok(),
            () = self.shutdown.requests_done() => None,
            () = self.handle.cut() => None,
        }
    }

    /// Runs a connection until it ends by itself, is cut, or `until` resolves; whether it was the last.
    async fn run<C>(&self, connection: &mut C, until: impl Future<Output = ()>) -> bool
    where
        C: Future + Unpin,
    {
        tokio::select! {
            biased;
            () = self.handle.cut() => false,
            _ = connection => false,
            () = until => true,
        }
    }

    /// Runs a connection to its end, but no longer than `until` unless something of it would be lost: it carries
    /// sessions, has bytes to send, or `keeps` says so. That is bounded by the cut.
    async fn let_go<C>(&self, connection: &mut C, until: Instant, keeps: impl Fn() -> bool)
    where
        C: Future + Unpin,
    {
        if !self.run(connection, sleep_until(until)).await {
            return;
        }
        // Looked at whenever the connection has been woken.
        let over = poll_fn(|_| {
            let kept = self.handle.has_unsent() || self.handle.carries_sessions() || keeps();
            if kept { Poll::Pending } else { Poll::Ready(()) }
        });
        self.run(connection, over).await;
    }
}

/// What a [`Server`] serves: implemented by every tower service from hyper's requests to answers, axum's `Router` and
/// tonic's `Routes` among them.
pub trait HttpService:
    Service<Request<Incoming>, Response = Response<Self::ResBody>, Error: Into<BoxError>, Future: Send>
    + Clone
    + Send
    + 'static
{
    /// The body of its answers.
    type ResBody: Body<Data: Send, Error: Into<BoxError>> + Send + 'static;
}

impl<S, B> HttpService for S
where
    S: Service<Request<Incoming>, Response = Response<B>, Error: Into<BoxError>, Future: Send>
        + Clone
        + Send
        + 'static,
    B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    type ResBody = B;
}

/// What stands between an accepted connection and HTTP. Implemented by [`Plain`] and by functions from the connection
/// to a future of the stream.
pub trait Handshake<I>: Send + Sync + 'static {
    /// What HTTP is spoken on.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Shakes hands.
    fn handshake(&self, io: I) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

/// HTTP is spoken on the socket itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl<I: AsyncRead + AsyncWrite + Send + Unpin + 'static> Handshake<I> for Plain {
    type Stream = I;

    async fn handshake(&self, io: I) -> io::Result<I> {
        Ok(io)
    }
}

impl<I, F, Fut, S> Handshake<I> for F
where
    I: Send,
    F: Fn(I) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = io::Result<S>> + Send,
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Stream = S;

    fn handshake(&self, io: I) -> impl Future<Output = io::Result<S>> + Send {
        self(io)
    }
}
