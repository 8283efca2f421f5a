//! For programs that keep Pingora's `Server`: it is told to stop when the drain is over.

use async_trait::async_trait;
use pingora_core::server::{ShutdownSignal, ShutdownSignalWatch};
use shutdown_core::ShutdownCoordinator;

/// Tells Pingora's `Server` to stop when the coordinator's drain is over.
///
/// Take [`Proxy`](crate::Proxy) instead where you can: it has none of the limits below. With `Server`:
///
/// ```no_run
/// # use pingora_core::server::{RunArgs, Server, configuration::ServerConf};
/// # use shutdown_core::{ShutdownCoordinator, Signals};
/// # use shutdown_pingora::WhenDrained;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let signals = Signals::claim()?;
/// let shutdown = ShutdownCoordinator::builder().signals(signals).install()?;
/// let conf = ServerConf {
///     grace_period_seconds: Some(0),
///     graceful_shutdown_timeout_seconds: Some(0),
///     ..ServerConf::default()
/// };
/// let mut server = Server::new_with_opt_and_conf(None, conf);
/// server.bootstrap();
/// // server.add_service(http_proxy_service(&server.configuration, Coordinated::new(app, shutdown)));
/// server.run(RunArgs { shutdown_signal: Box::new(WhenDrained::new(shutdown)) });
/// shutdown.wait().exit()
/// # }
/// ```
///
/// Wrap the app in [`Coordinated`](crate::Coordinated): it counts requests, closes connections after their answer
/// from LameDuck on, and refuses once Draining has begun.
///
/// # Limits
///
/// * Set both periods to `Some(0)` as above. The grace period is an unconditional sleep (default 300 s), and the
///   timeout after it does not wait for requests: it drops them. The drain has waited already.
/// * The listener is Pingora's and stays open while the coordinator drains: new connections are accepted and
///   answered 503 instead of refused. There is no linger, because the coordinator sees no listener.
/// * Connections are not counted: an idle one is closed when `Server` stops, not before, and one whose last bytes
///   are still in Pingora's hands when its request's guard is dropped is not waited for.
/// * Nothing cuts a connection at the drain's deadline but the end of `Server` itself, which follows at once.
/// * A stop signal reaches the coordinator only: `Server` has no handler of its own when it is run with this. A
///   second one ends the drain, and with it `Server`, at once.
/// * `run_forever` leaves the process with 0, whatever the report says and before it may be written. Use `run`, then
///   [`wait`](ShutdownCoordinator::wait).
#[derive(Clone, Copy, Debug)]
pub struct WhenDrained {
    shutdown: ShutdownCoordinator,
}

impl WhenDrained {
    /// A signal that comes when `shutdown` has drained, or has cut, its requests.
    pub fn new(shutdown: ShutdownCoordinator) -> Self {
        Self { shutdown }
    }
}

#[async_trait]
impl ShutdownSignalWatch for WhenDrained {
    async fn recv(&self) -> ShutdownSignal {
        self.shutdown.requests_done().await;
        // Not FastShutdown: that skips telling background services.
        ShutdownSignal::GracefulTerminate
    }
}
