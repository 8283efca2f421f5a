//! Any value that knows whether its service is stopping.

use shutdown_core::{RequestGuard, ShutdownCoordinator, ShuttingDown};

/// A value with its coordinator beside it: for code that is neither a tower service nor HTTP.
#[derive(Clone, Copy, Debug)]
pub struct ShutdownAware<S> {
    inner: S,
    shutdown: ShutdownCoordinator,
}

impl<S> ShutdownAware<S> {
    /// Puts `inner` under `shutdown`.
    pub fn new(inner: S, shutdown: ShutdownCoordinator) -> Self {
        Self { inner, shutdown }
    }

    /// The value.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// The value, to change it.
    pub fn inner_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The value, without its coordinator.
    pub fn into_inner(self) -> S {
        self.inner
    }

    /// Its coordinator.
    pub fn coordinator(&self) -> ShutdownCoordinator {
        self.shutdown
    }

    /// Whether a reason to stop has been taken up.
    pub fn is_shutting_down(&self) -> bool {
        self.shutdown.is_shutting_down()
    }

    /// Counts a request in; hold the guard to its true end.
    ///
    /// # Errors
    ///
    /// [`ShuttingDown`] once new requests are refused.
    pub fn track_request(&self) -> Result<RequestGuard, ShuttingDown> {
        self.shutdown.request_start()
    }
}
