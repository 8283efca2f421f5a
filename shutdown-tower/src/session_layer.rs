//! The layer that makes sessions of requests whose handlers know nothing of them.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::header::{CONTENT_TYPE, HeaderMap};
use http::{HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use shutdown_core::{Session, ShutdownCoordinator, Told};
use tower::{Layer, Service};

use crate::refusal::grpc_unavailable;

/// Makes sessions of the requests that a function names: long streams of handlers that one cannot change, such as the
/// health watches of gRPC.
///
/// When it is told to, the stream ends: a gRPC answer with the status `UNAVAILABLE` (14), any other as if it were
/// complete. Take it for streams of which any prefix is an answer, and put it inside
/// [`ShutdownLayer`](crate::ShutdownLayer). Handlers of your own say more with [`UntilTold`](crate::UntilTold).
///
/// A request that is refused as a session, because stage WebSockets has begun, stays a request.
#[derive(Clone, Copy)]
pub struct SessionLayer<F> {
    shutdown: ShutdownCoordinator,
    name: F,
}

impl<F> fmt::Debug for SessionLayer<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionLayer").field("shutdown", &self.shutdown).finish_non_exhaustive()
    }
}

impl<F> SessionLayer<F> {
    /// A layer under `shutdown` for the requests that `name` gives a name to.
    pub fn new<B>(shutdown: ShutdownCoordinator, name: F) -> Self
    where
        F: Fn(&Request<B>) -> Option<Cow<'static, str>> + Clone,
    {
        Self { shutdown, name }
    }
}

impl<S, F: Clone> Layer<S> for SessionLayer<F> {
    type Service = Sessions<S, F>;

    fn layer(&self, inner: S) -> Self::Service {
        Sessions { inner, layer: self.clone() }
    }
}

/// A service some of whose requests are sessions; made by [`SessionLayer`].
#[derive(Clone, Copy, Debug)]
pub struct Sessions<S, F> {
    inner: S,
    layer: SessionLayer<F>,
}

impl<S, F, A, B> Service<Request<A>> for Sessions<S, F>
where
    S: Service<Request<A>, Response = Response<B>>,
    F: Fn(&Request<A>) -> Option<Cow<'static, str>> + Clone,
{
    type Response = Response<SessionBody<B>>;
    type Error = S::Error;
    type Future = SessionFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let name = (self.layer.name)(&request);
        let session = name.and_then(|name| self.layer.shutdown.session_start(name).ok());
        SessionFuture { future: self.inner.call(request), session }
    }
}

pin_project! {
    /// The answer of a [`Sessions`] service.
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct SessionFuture<Fut> {
        #[pin]
        future: Fut,
        session: Option<Session>,
    }
}

impl<Fut, B, E> Future for SessionFuture<Fut>
where
    Fut: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<SessionBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = ready!(this.future.poll(cx))?;
        let is_grpc = |kind: &HeaderValue| kind.as_bytes().starts_with(b"application/grpc");
        let grpc = response.headers().get(CONTENT_TYPE).is_some_and(is_grpc);
        let told = this.session.take().map(|session| {
            let told = session.told();
            response.extensions_mut().insert(session);
            told
        });
        Poll::Ready(Ok(response.map(|body| SessionBody { body, told, grpc, over: false })))
    }
}

pin_project! {
    /// A body that ends when its session, if it is one, is told to.
    #[derive(Debug)]
    pub struct SessionBody<B> {
        #[pin]
        body: B,
        told: Option<Told>,
        grpc: bool,
        over: bool,
    }
}

impl<B: Body> Body for SessionBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        if *this.over {
            return Poll::Ready(None);
        }
        // First: a stream that always has something ready is told, too.
        let told = this.told.as_mut().is_some_and(|told| Pin::new(told).poll(cx).is_ready());
        if !told {
            let frame = ready!(this.body.poll_frame(cx));
            *this.over = frame.is_none();
            return Poll::Ready(frame);
        }
        *this.over = true;
        Poll::Ready(this.grpc.then(|| {
            let mut trailers = HeaderMap::with_capacity(2);
            grpc_unavailable(&mut trailers);
            Ok(Frame::trailers(trailers))
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
