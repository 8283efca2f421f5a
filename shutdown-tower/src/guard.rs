//! The layer for services that answer no HTTP: what is too late is refused with an error.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project_lite::pin_project;
use shutdown_core::{RequestGuard, ShutdownCoordinator, ShuttingDown};
use tower::{Layer, Service};

/// Puts any tower service under a coordinator: a call is counted until its future ends, and refused with
/// [`GuardError::ShuttingDown`] once new requests are refused.
///
/// For HTTP take [`ShutdownLayer`](crate::ShutdownLayer), which counts to the end of the body.
#[derive(Clone, Copy, Debug)]
pub struct GuardLayer {
    shutdown: ShutdownCoordinator,
}

impl GuardLayer {
    /// A layer under `shutdown`.
    pub fn new(shutdown: ShutdownCoordinator) -> Self {
        Self { shutdown }
    }
}

impl<S> Layer<S> for GuardLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, shutdown: self.shutdown }
    }
}

/// A service under a coordinator; made by [`GuardLayer`].
#[derive(Clone, Copy, Debug)]
pub struct Guarded<S> {
    inner: S,
    shutdown: ShutdownCoordinator,
}

impl<S, R> Service<R> for Guarded<S>
where
    S: Service<R>,
{
    type Response = S::Response;
    type Error = GuardError<S::Error>;
    type Future = GuardFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // A service that is not ready must not keep a refusal waiting.
        if self.shutdown.refuses_requests() {
            return Poll::Ready(Ok(()));
        }
        self.inner.poll_ready(cx).map_err(GuardError::Service)
    }

    fn call(&mut self, request: R) -> Self::Future {
        match self.shutdown.request_start() {
            Ok(guard) => GuardFuture { kind: Kind::Admitted { future: self.inner.call(request), guard } },
            Err(error) => GuardFuture { kind: Kind::Refused { error } },
        }
    }
}

pin_project! {
    /// The answer of a [`Guarded`] service; holds the call's guard.
    #[must_use = "futures do nothing unless polled"]
    #[derive(Debug)]
    pub struct GuardFuture<Fut> {
        #[pin]
        kind: Kind<Fut>,
    }
}

pin_project! {
    #[project = KindProj]
    #[derive(Debug)]
    enum Kind<Fut> {
        Admitted { #[pin] future: Fut, guard: RequestGuard },
        Refused { error: ShuttingDown },
    }
}

impl<Fut, T, E> Future for GuardFuture<Fut>
where
    Fut: Future<Output = Result<T, E>>,
{
    type Output = Result<T, GuardError<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().kind.project() {
            KindProj::Admitted { future, .. } => future.poll(cx).map_err(GuardError::Service),
            KindProj::Refused { error } => Poll::Ready(Err(GuardError::ShuttingDown(*error))),
        }
    }
}

/// The error of a [`Guarded`] service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardError<E> {
    /// The call came too late; the service was not touched. Ask another instance.
    ShuttingDown(ShuttingDown),
    /// The service's own error.
    Service(E),
}

impl<E: fmt::Display> fmt::Display for GuardError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ShuttingDown(error) => error.fmt(f),
            Self::Service(error) => error.fmt(f),
        }
    }
}

impl<E: std::error::Error + 'static> std::error::Error for GuardError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::ShuttingDown(_) => None,
            Self::Service(error) => error.source(),
        }
    }
}
