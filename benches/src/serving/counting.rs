//! The request layer that the peers do not ship: as lean as ours, no boxing, the guard dropped with the body.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::Service;

/// How a peer counts a request in.
pub(crate) trait Count {
    type Guard;

    /// `None`: it is refused.
    fn start(&self) -> Option<Self::Guard>;
}

/// A service whose requests are counted until their answer's body is dropped.
#[derive(Clone)]
pub(crate) struct Counting<S, C> {
    pub(crate) inner: S,
    pub(crate) count: C,
}

impl<S, C, A, B> Service<Request<A>> for Counting<S, C>
where
    S: Service<Request<A>, Response = Response<B>>,
    C: Count,
    B: Default,
{
    type Response = Response<CountedBody<B, C::Guard>>;
    type Error = S::Error;
    type Future = CountedFuture<S::Future, C::Guard>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        match self.count.start() {
            Some(guard) => CountedFuture { future: Some(self.inner.call(request)), guard: Some(guard) },
            None => CountedFuture { future: None, guard: None },
        }
    }
}

pin_project! {
    pub(crate) struct CountedFuture<F, G> {
        // `None`: refused.
        #[pin]
        future: Option<F>,
        guard: Option<G>,
    }
}

impl<F, B, E, G> Future for CountedFuture<F, G>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Default,
{
    type Output = Result<Response<CountedBody<B, G>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = match this.future.as_pin_mut() {
            Some(future) => ready!(future.poll(cx))?,
            None => {
                let mut response = Response::new(B::default());
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                response
            }
        };
        let (head, body) = response.into_parts();
        Poll::Ready(Ok(Response::from_parts(head, CountedBody { body, guard: this.guard.take() })))
    }
}

pin_project! {
    pub(crate) struct CountedBody<B, G> {
        #[pin]
        body: B,
        guard: Option<G>,
    }
}

impl<B: Body, G> Body for CountedBody<B, G> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.project().body.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
