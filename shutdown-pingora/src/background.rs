//! Pingora's background services as background tasks of the coordinator.

use std::borrow::Cow;
use std::sync::Arc;

use pingora_core::services::background::BackgroundService;
use shutdown_core::{ShutdownCoordinator, ShuttingDown};
use tokio::sync::watch;

/// Runs a Pingora background service as the background task `name`.
///
/// Its `ShutdownWatch` becomes `true` in stage Background, that is after the drain: requests that need the service
/// still have it. A service that does not return then is aborted at the stage's deadline and named in the report.
///
/// It calls `start`, not `start_with_ready_notifier`: nothing here depends on readiness.
///
/// # Errors
///
/// [`ShuttingDown`] once stage Background has begun.
///
/// # Panics
///
/// If there is no runtime at all; see [`ShutdownCoordinator::spawn`].
pub fn run_background<S>(
    service: Arc<S>,
    shutdown: ShutdownCoordinator,
    name: impl Into<Cow<'static, str>>,
) -> Result<(), ShuttingDown>
where
    S: BackgroundService + Send + Sync + 'static,
{
    shutdown.spawn(name, move |token| async move {
        let (tell, told) = watch::channel(false);
        let mut work = service.start(told);
        tokio::select! {
            biased;
            () = &mut work => return,
            () = token.cancelled() => {}
        }
        tell.send_replace(true);
        work.await;
    })
}
