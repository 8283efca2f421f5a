//! One HTTP/1 connection.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::header::CONNECTION;
use http::{Method, Request, Response, StatusCode};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::TokioIo;
use pin_project_lite::pin_project;
use shutdown_core::ConnectionHandle;
use shutdown_core::net::FirstBytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout};
use tower::Service;
use tower::util::Oneshot;

use super::one_head::{OneHead, Reading};
use super::{HttpService, Opened, SETTLE};
use crate::layer::AskedToLeave;

/// Serves until the client or the shutdown ends it.
pub(super) async fn serve<I, S>(builder: &Builder, io: FirstBytes<I>, service: S, opened: Opened)
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    S: HttpService,
{
    let reading = Arc::new(Reading::default());
    let io = TokioIo::new(OneHead::new(io, Arc::clone(&reading), opened.shutdown));
    let service =
        AnswerPipelined { inner: service, reading: Arc::clone(&reading), handle: opened.handle.clone() };
    let mut connection = builder.serve_connection(io, service).with_upgrades();

    let shutdown = opened.shutdown;
    if !opened.run(&mut connection, shutdown.requests_done()).await {
        return;
    }
    // Requests behind the last one are refused one by one; hyper's graceful shutdown would drop them.
    let unread = poll_fn(|_| if reading.has_more() { Poll::Pending } else { Poll::Ready(()) });
    if !opened.run(&mut connection, async { _ = timeout(SETTLE, unread).await }).await {
        return;
    }
    Pin::new(&mut connection).graceful_shutdown();
    // Nothing is left but half a head, a body that nobody wants, an answer on its way to a slow reader, or a session.
    opened.let_go(&mut connection, Instant::now() + SETTLE, || false).await;
}

/// Answers what a client has pipelined before it is asked to leave: after `Connection: close` nothing more is read
/// (RFC 9112 §9.6), so the requests behind it would get no answer.
struct AnswerPipelined<S> {
    inner: S,
    reading: Arc<Reading>,
    handle: ConnectionHandle,
}

impl<S, B> hyper::service::Service<Request<Incoming>> for AnswerPipelined<S>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Answering<Oneshot<S, Request<Incoming>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.reading.begin_request(request.body().size_hint().exact());
        let reading = Arc::clone(&self.reading);
        let connect = *request.method() == Method::CONNECT;
        let handle = self.handle.clone();
        Answering { future: Oneshot::new(self.inner.clone(), request), reading, handle, connect }
    }
}

pin_project! {
    struct Answering<F> {
        #[pin]
        future: F,
        reading: Arc<Reading>,
        handle: ConnectionHandle,
        connect: bool,
    }
}

impl<F, B, E> Future for Answering<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        this.handle.id().polled();
        let mut response = ready!(this.future.poll(cx))?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS
            || (*this.connect && response.status().is_success())
        {
            this.handle.hear_out(false);
        }
        if response.extensions_mut().remove::<AskedToLeave>().is_some() && this.reading.has_more() {
            response.headers_mut().remove(CONNECTION);
        }
        Poll::Ready(Ok(response))
    }
}
