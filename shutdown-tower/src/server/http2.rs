//! One HTTP/2 connection.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2::Builder;
use hyper_util::rt::{TokioExecutor, TokioIo};
use pin_project_lite::pin_project;
use shutdown_core::ConnectionId;
use shutdown_core::net::FirstBytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::Instant;
use tower::Service;
use tower::util::Oneshot;

use super::bodies::{Bodies, Counted, Written};
use super::{ANSWER_TIME, HttpService, Opened, SETTLE};

/// Serves until the client or the shutdown ends it.
pub(super) async fn serve<I, S>(
    builder: &Builder<TokioExecutor>,
    io: FirstBytes<I>,
    service: S,
    opened: Opened,
) where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    S: HttpService,
{
    let shutdown = opened.shutdown;
    let seen = Arc::new(Seen::default());
    let late = shutdown.is_shutting_down();
    let bodies = Arc::new(Bodies::new());
    let io = Written::new(io, Arc::clone(&bodies));
    let service = Watched {
        inner: service,
        late,
        seen: Arc::clone(&seen),
        bodies: Arc::clone(&bodies),
        connection: opened.handle.id(),
    };
    let mut connection = builder.serve_connection(TokioIo::new(io), service);

    let told = async {
        shutdown.asked_to_leave().await;
        if late {
            // Its client chose us for a request and shall have the answer before it is sent away.
            tokio::select! {
                () = seen.answered.notified() => {}
                () = shutdown.requests_done() => {}
            }
        }
    };
    if !opened.run(&mut connection, told).await {
        return;
    }
    // GOAWAY with the highest number there is, and a PING; its answer says that the client has heard, and the final
    // GOAWAY names the last stream that is served (RFC 9113 §6.8).
    Pin::new(&mut connection).graceful_shutdown();
    let answered_by = Instant::now() + ANSWER_TIME;
    if !opened.run(&mut connection, shutdown.requests_done()).await {
        return;
    }
    // A client that has answered the PING ends the connection with its last answer. One that has not may never: it is
    // gone, or was never there. Or the PING still waits behind an answer that the client reads slowly.
    let mut over_at = Instant::now() + SETTLE;
    if seen.called.load(Ordering::Relaxed) {
        over_at = over_at.max(answered_by).max(bodies.surely_read_by() + ANSWER_TIME);
    }
    // What waits for the client's window is bounded by the deadline.
    let keeps = || bodies.have_unwritten() || seen.tunnel.load(Ordering::Relaxed);
    opened.let_go(&mut connection, over_at, keeps).await;
}

/// What has happened on a connection.
#[derive(Default)]
struct Seen {
    called: AtomicBool,
    /// A CONNECT: nobody counts what goes through it.
    tunnel: AtomicBool,
    answered: Notify,
}

/// Notes the first request of a connection and, on one accepted after the lame duck began, its answer; counts what bodies
/// give.
struct Watched<S> {
    inner: S,
    late: bool,
    seen: Arc<Seen>,
    bodies: Arc<Bodies>,
    connection: ConnectionId,
}

impl<S, B> hyper::service::Service<Request<Incoming>> for Watched<S>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
{
    type Response = Response<Counted<B>>;
    type Error = S::Error;
    type Future = Answering<Oneshot<S, Request<Incoming>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        // Looked at first, so that the line stays shared among the threads that serve the connection's streams.
        if !self.seen.called.load(Ordering::Relaxed) {
            self.seen.called.store(true, Ordering::Relaxed);
        }
        if *request.method() == Method::CONNECT {
            self.seen.tunnel.store(true, Ordering::Relaxed);
        }
        let seen = self.late.then(|| Arc::clone(&self.seen));
        let (bodies, connection) = (Some(Arc::clone(&self.bodies)), self.connection);
        Answering { future: Oneshot::new(self.inner.clone(), request), seen, bodies, connection }
    }
}

pin_project! {
    struct Answering<F> {
        #[pin]
        future: F,
        seen: Option<Arc<Seen>>,
        bodies: Option<Arc<Bodies>>,
        connection: ConnectionId,
    }
}

impl<F, B, E> Future for Answering<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<Counted<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        // Each stream is answered in a task of its own.
        this.connection.polled();
        let output = ready!(this.future.poll(cx));
        if let Some(seen) = this.seen {
            seen.answered.notify_one();
        }
        let bodies = this.bodies.take().expect("a future is not polled after it has resolved");
        Poll::Ready(output.map(|response| response.map(|body| Counted::new(body, bodies))))
    }
}
