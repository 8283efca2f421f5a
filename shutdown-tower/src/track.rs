//! How a request is counted: anonymously, or under a name that the report can give.

use std::borrow::Cow;

use shutdown_core::{NamedRequestGuard, RequestGuard, ShutdownCoordinator, ShuttingDown};

/// Counts a request of type `R` in. Implemented by [`Anonymous`] and [`Named`].
pub trait Track<R>: Clone {
    /// What holds the request until its true end.
    type Guard: InFlight;

    /// Counts the request in, or refuses it.
    ///
    /// # Errors
    ///
    /// New requests are refused.
    fn start(&self, shutdown: ShutdownCoordinator, request: &R) -> Result<Self::Guard, ShuttingDown>;
}

/// A guard that can note that the client left.
pub trait InFlight {
    /// Ends the request now: it has become a session.
    fn end(&mut self);

    /// Notes that the client left before its answer was complete.
    fn client_gone(&self);
}

impl InFlight for RequestGuard {
    fn end(&mut self) {
        Self::end(self);
    }

    fn client_gone(&self) {
        Self::client_gone(self);
    }
}

impl InFlight for NamedRequestGuard {
    fn end(&mut self) {
        Self::end(self);
    }

    fn client_gone(&self) {
        Self::client_gone(self);
    }
}

/// Counts requests without a name: one atomic addition, a guard of 8 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Anonymous;

impl<R> Track<R> for Anonymous {
    type Guard = RequestGuard;

    #[inline]
    fn start(&self, shutdown: ShutdownCoordinator, _request: &R) -> Result<RequestGuard, ShuttingDown> {
        shutdown.request_start()
    }
}

/// Counts requests under the name that a function gives them; see [`ShutdownLayer::named`](crate::ShutdownLayer::named).
#[derive(Clone, Copy, Debug)]
pub struct Named<F>(pub(crate) F);

impl<R, F> Track<R> for Named<F>
where
    F: Fn(&R) -> Cow<'static, str> + Clone,
{
    type Guard = NamedRequestGuard;

    fn start(&self, shutdown: ShutdownCoordinator, request: &R) -> Result<NamedRequestGuard, ShuttingDown> {
        shutdown.request_start_named((self.0)(request))
    }
}
