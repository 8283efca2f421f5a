//! One HTTP/2 connection.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2::Builder;
use hyper_util::rt::{TokioExecutor, TokioIo};
use pin_project_lite::pin_project;
use shutdown_core::net::FirstBytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tower::Service;
use tower::util::Oneshot;

use super::{HttpService, Opened, SETTLE};

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
    let service = Watched { inner: service, late, seen: Arc::clone(&seen) };
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
    if !opened.run(&mut connection, shutdown.requests_done()).await {
        return;
    }
    let settle = async {
        tokio::time::sleep(SETTLE).await;
        if seen.called.load(Ordering::Relaxed) {
            // The last answers may wait for the client's window: the deadline bounds them.
            std::future::pending::<()>().await;
        }
    };
    opened.run(&mut connection, settle).await;
}

/// What has happened on a connection.
#[derive(Default)]
struct Seen {
    called: AtomicBool,
    answered: Notify,
}

/// Notes the first request of a connection and, on one accepted after the lame duck began, its answer.
struct Watched<S> {
    inner: S,
    late: bool,
    seen: Arc<Seen>,
}

impl<S, B> hyper::service::Service<Request<Incoming>> for Watched<S>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Answering<Oneshot<S, Request<Incoming>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        // Looked at first, so that the line stays shared among the threads that serve the connection's streams.
        if !self.seen.called.load(Ordering::Relaxed) {
            self.seen.called.store(true, Ordering::Relaxed);
        }
        let seen = self.late.then(|| Arc::clone(&self.seen));
        Answering { future: Oneshot::new(self.inner.clone(), request), seen }
    }
}

pin_project! {
    struct Answering<F> {
        #[pin]
        future: F,
        seen: Option<Arc<Seen>>,
    }
}

impl<F: Future> Future for Answering<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let output = ready!(this.future.poll(cx));
        if let Some(seen) = this.seen {
            seen.answered.notify_one();
        }
        Poll::Ready(output)
    }
}
