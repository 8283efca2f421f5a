//! The layer for HTTP services: counts in, refuses, and asks clients to leave.
//!
//! A request costs one atomic addition and one subtraction: no lock, no allocation, no `Arc` – hyper-util clones
//! the whole service stack for every request, and one reference count in it costs more than the guard.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::header::{CONNECTION, CONTENT_LENGTH};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
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
///   connection that it came over is kept for it. Where the connection is not known – over HTTP/2 under a stock
///   server, or behind a layer that hands requests to another task – it stays a request as well: the drain waits for
///   it, until it ends as it is told to. The answer's body, or whoever the connection is upgraded for, holds
///   another clone of the session, as [`UntilTold`](crate::UntilTold) and [`on_upgrade`](crate::on_upgrade) do.
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

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        match self.inner.poll_ready(cx) {
            Poll::Ready(Ok(())) => Poll::Ready(Ok(())),
            // A service that is not ready must not keep a refusal waiting. Asked only now: nearly always it is.
            _ if self.layer.shutdown.refuses_requests() => Poll::Ready(Ok(())),
            not_ready => not_ready,
        }
    }

    #[inline]
    fn call(&mut self, request: Request<A>) -> Self::Future {
        let version = request.version();
        let shutdown = self.layer.shutdown;
        if shutdown.is_shutting_down() && shutdown.turns_away(request.method().is_safe()) {
            return ResponseFuture {
                kind: Kind::Refused { response: Some(refused(&self.layer.refuse, version)) },
            };
        }
        match self.layer.track.start(shutdown, &request) {
            Ok(guard) => ResponseFuture {
                kind: Kind::Admitted {
                    shutdown,
                    version,
                    head: *request.method() == Method::HEAD,
                    connection: ConnectionId::of_this_task(),
                    counted: Counted { future: self.inner.call(request), guard: Some(guard) },
                },
            },
            Err(_) => ResponseFuture {
                kind: Kind::Refused { response: Some(refused(&self.layer.refuse, version)) },
            },
        }
    }
}

/// Apart, so that the way of a request that is served stays short.
#[cold]
#[inline(never)]
fn refused<B>(refuse: &impl Refuse<B>, version: Version) -> Box<Response<Option<B>>> {
    let mut response = refuse.refuse(version);
    response.extensions_mut().insert(AskedToLeave);
    answer_in(version, &mut response);
    Box::new(response)
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
            head: bool,
        },
        // Boxed, so that a future that was admitted is moved and dropped without it.
        Refused {
            response: Option<Box<Response<Option<B>>>>,
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
    }

    impl<Fut, G> PinnedDrop for Counted<Fut, G>
    where
        G: InFlight,
    {
        #[inline]
        fn drop(this: Pin<&mut Self>) {
            if let Some(guard) = this.project().guard {
                left_early(guard);
            }
        }
    }
}

/// Apart, so that the drop of a future that has resolved is short enough to be inlined.
#[cold]
fn left_early(guard: &impl InFlight) {
    if !std::thread::panicking() {
        guard.client_gone();
    }
}

impl<Fut, B, E, G> Future for ResponseFuture<Fut, B, G>
where
    Fut: Future<Output = Result<Response<B>, E>>,
    B: Body,
    G: InFlight,
{
    type Output = Result<Response<ShutdownBody<B, G>>, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().kind.project() {
            KindProj::Admitted { counted, shutdown, version, connection, head } => {
                let counted = counted.project();
                let mut result = ready!(counted.future.poll(cx));
                let mut guard = counted.guard.take().expect("a future is not polled after it has resolved");
                let mut length = None;
                // By reference, and the answer moved once below: it is large.
                if let Ok(response) = &mut result {
                    // An upgrade keeps its `Connection` header, and its connection.
                    if shutdown.asks_to_leave() && !response.status().is_informational() {
                        ask_to_leave(response, *version);
                    }
                    if let Some(session) = response.extensions().get::<Session>() {
                        become_session(session, *connection, &mut guard);
                    }
                    length =
                        if *head || (response.status() != StatusCode::OK && is_bodiless(response.status())) {
                            Some(0)
                        } else {
                            response.body().size_hint().exact().or_else(|| content_length(response.headers()))
                        };
                }
                // With an error the guard ends here: there is no body to carry it.
                let admitted = |body| ShutdownBody::admitted(body, guard, length);
                Poll::Ready(result.map(|response| response.map(admitted)))
            }
            KindProj::Refused { response } => {
                let response = response.take().expect("a future is not polled after it has resolved");
                Poll::Ready(Ok((*response).map(ShutdownBody::refused)))
            }
        }
    }
}

/// In the extensions of an answer: `Connection: close` is the shutdown's, not the service's own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AskedToLeave;

#[cold]
#[inline(never)]
fn ask_to_leave<B>(response: &mut Response<B>, version: Version) {
    if !response.headers().contains_key(CONNECTION) {
        response.extensions_mut().insert(AskedToLeave);
    }
    close(response.headers_mut(), version);
    answer_in(version, response);
}

/// hyper tells a client of HTTP/1.0 that the connection is kept, unless the answer says that it speaks 1.0, too.
fn answer_in<B>(version: Version, response: &mut Response<B>) {
    if version <= Version::HTTP_10 {
        *response.version_mut() = version;
    }
}

/// Ends a request that has become a session, which is counted since before.
#[cold]
#[inline(never)]
fn become_session<G: InFlight>(session: &Session, connection: Option<ConnectionId>, request: &mut G) {
    if connection.is_some_and(|connection| session.carried_by(connection)) {
        request.end();
    }
}

/// The length that the answer's head promises, and that a server holds it to.
fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Answers without a body, whatever their headers say (RFC 9110 §6.4.1), and upgrades.
#[inline]
fn is_bodiless(status: StatusCode) -> bool {
    status.is_informational() || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED
}
