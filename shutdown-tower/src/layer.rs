//! The layer for HTTP services: counts in, refuses, and asks clients to leave.
//!
//! A request costs one atomic addition and one subtraction: no lock, no allocation, no `Arc` – hyper-util clones
//! the whole service stack for every request, and one reference count in it costs more than the guard.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::header::CONTENT_LENGTH;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body;
use pin_project_lite::pin_project;
use shutdown_core::{ConnectionId, Session, ShutdownCoordinator};
use tower::{Layer, Service};

use crate::body::ShutdownBody;
use crate::refusal::{Refuse, Refuse503, close};
use crate::track::{Anonymous, InFlight, Named, Track};

/// Puts an HTTP service under a coordinator.
///
/// * A request is counted from the call until its answer's body is dropped.
/// * One that is dropped before its end is reported as a client that left, whoever dropped it: a timeout layer around
///   this one does so, too.
/// * Once new requests are refused, `call` answers 503 without touching the service.
/// * From the lame duck on, HTTP/1 answers carry `Connection: close`, as
///   [`LameDuckPolicy`](shutdown_core::LameDuckPolicy) says.
/// * An answer whose extensions hold a [`Session`] is one: from its head on it is no request any more, and the
///   connection that it came over is kept for it.
///
/// `poll_ready` is the service's own; once requests are refused it is ready at once.
#[derive(Clone, Copy)]
pub struct ShutdownLayer<T = Anonymous, F = Refuse503> {
    shutdown: ShutdownCoordinator,
    track: T,
    refuse: F,
}

impl<T, F> fmt::Debug for ShutdownLayer<T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShutdownLayer").field("shutdown", &self.shutdown).finish_non_exhaustive()
    }
}

impl ShutdownLayer {
    /// A layer that counts anonymously and refuses with 503.
    pub fn new(shutdown: ShutdownCoordinator) -> Self {
        Self { shutdown, track: Anonymous, refuse: Refuse503 }
    }
}

impl<T, F> ShutdownLayer<T, F> {
    /// Counts requests under a name, so that `/status` and the report can say which route hangs. Costs a short
    /// lock a request. Use the route's pattern rather than the path, and keep secrets out of it.
    pub fn named<N, B>(self, name: N) -> ShutdownLayer<Named<N>, F>
    where
        N: Fn(&Request<B>) -> Cow<'static, str> + Clone,
    {
        ShutdownLayer { shutdown: self.shutdown, track: Named(name), refuse: self.refuse }
    }

    /// Answers refused requests with this instead; `Connection: close` is added on HTTP/1.
    pub fn refuse_with<R>(self, refuse: R) -> ShutdownLayer<T, R> {
        ShutdownLayer { shutdown: self.shutdown, track: self.track, refuse }
    }
}

impl<S, T: Clone, F: Clone> Layer<S> for ShutdownLayer<T, F> {
    type Service = Shutdown<S, T, F>;

    fn layer(&self, inner: S) -> Self::Service {
        Shutdown { inner, layer: self.clone() }
    }
}

/// An HTTP service under a coordinator; made by [`ShutdownLayer`].
#[derive(Clone, Copy, Debug)]
pub struct Shutdown<S, T = Anonymous, F = Refuse503> {
    inner: S,
    layer: ShutdownLayer<T, F>,
}

impl<S, T, F, A, B> Service<Request<A>> for Shutdown<S, T, F>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Body,
    T: Track<Request<A>>,
    F: Refuse<B>,
{
    type Response = Response<ShutdownBody<B, T::Guard>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, B, T::Guard>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // A service that is not ready must not keep a refusal waiting.
        if self.layer.shutdown.refuses_requests() {
            return Poll::Ready(Ok(()));
        }
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let version = request.version();
        let shutdown = self.layer.shutdown;
        if shutdown.turns_away(request.method().is_safe()) {
            return ResponseFuture { kind: Kind::Refused { response: Some(self.layer.refuse.refuse(version)) } };
        }
        match self.layer.track.start(shutdown, &request) {
            Ok(guard) => ResponseFuture {
                kind: Kind::Admitted {
                    counted: Counted {
                        head: *request.method() == Method::HEAD,
                        future: self.inner.call(request),
                        guard: Some(guard),
                    },
                    shutdown,
                    version,
                    connection: ConnectionId::of_this_task(),
                },
            },
            Err(_) => {
                ResponseFuture { kind: Kind::Refused { response: Some(self.layer.refuse.refuse(version)) } }
            }
        }
    }
}

pin_project! {
    /// The answer of a [`Shutdown`] service.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<Fut, B, G>
    where
        G: InFlight,
    {
        #[pin]
        kind: Kind<Fut, B, G>,
    }
}

impl<Fut, B, G: InFlight> fmt::Debug for ResponseFuture<Fut, B, G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<Fut, B, G>
    where
        G: InFlight,
    {
        Admitted {
            #[pin]
            counted: Counted<Fut, G>,
            shutdown: ShutdownCoordinator,
            version: Version,
            connection: Option<ConnectionId>,
        },
        Refused {
            response: Option<Response<Option<B>>>,
        },
    }
}

pin_project! {
    /// Dropped before it resolved, the client has left (or the handler has panicked).
    struct Counted<Fut, G>
    where
        G: InFlight,
    {
        #[pin]
        future: Fut,
        guard: Option<G>,
        head: bool,
    }

    impl<Fut, G> PinnedDrop for Counted<Fut, G>
    where
        G: InFlight,
    {
        fn drop(this: Pin<&mut Self>) {
            if let Some(guard) = this.project().guard && !std::thread::panicking() {
                guard.client_gone();
            }
        }
    }
}

impl<Fut, B, E, G> Future for ResponseFuture<Fut, B, G>
where
    Fut: Future<Output = Result<Response<B>, E>>,
    B: Body,
    G: InFlight,
{
    type Output = Result<Response<ShutdownBody<B, G>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().kind.project() {
            KindProj::Admitted { counted, shutdown, version, connection } => {
                let counted = counted.project();
                let result = ready!(counted.future.poll(cx));
                let guard = counted.guard.take().expect("a future is not polled after it has resolved");
                let mut response = match result {
                    Ok(response) => response,
                    // The guard ends here: there is no body to carry it.
                    Err(error) => return Poll::Ready(Err(error)),
                };
                // An upgrade keeps its `Connection` header, and its connection.
                if !response.status().is_informational() && shutdown.asks_to_leave() {
                    close(&mut response, *version);
                }
                if let Some(session) = response.extensions_mut().remove::<Session>() {
                    if let Some(connection) = *connection {
                        session.carried_by(connection);
                    }
                    // The request is over, and the session counted since before.
                    drop(guard);
                    return Poll::Ready(Ok(response.map(|body| ShutdownBody::session(body, session))));
                }
                let length = if *counted.head || is_bodiless(response.status()) {
                    Some(0)
                } else {
                    content_length(&response)
                };
                Poll::Ready(Ok(response.map(|body| ShutdownBody::admitted(body, guard, length))))
            }
            KindProj::Refused { response } => {
                let response = response.take().expect("a future is not polled after it has resolved");
                Poll::Ready(Ok(response.map(ShutdownBody::refused)))
            }
        }
    }
}

/// The length that the answer's head promises, and that a server holds it to.
fn content_length<B>(response: &Response<B>) -> Option<u64> {
    response.headers().get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Answers without a body, whatever their headers say (RFC 9110 §6.4.1), and upgrades.
fn is_bodiless(status: StatusCode) -> bool {
    status.is_informational() || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED
}
