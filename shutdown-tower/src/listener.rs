//! A listener for stock `axum::serve` whose connections are counted to their last byte.

use std::io;

use shutdown_core::net::{self, Accept, Io};
use shutdown_core::{ListenerGuard, ShutdownCoordinator};
use tokio::time::{Duration, timeout};

/// Wraps a tokio TCP or Unix listener for [`axum::serve()`]. Any other listener of axum's goes into [`Wrapped`].
///
/// [`Server`](crate::Server) does more than stock `axum::serve` can: it answers half a request, tells HTTP/2 clients in
/// the lame duck, and ends what stock serve waits for. Take this one where `axum::serve` must stay.
///
/// A guard in the body ends when the last frame is handed over, not when it is on the wire: with a slow reader
/// megabytes may still wait. Each connection of this listener therefore carries its own guard, and the drain is
/// over when the connections are. Each has a kill switch, too: `axum::serve` alone waits for ever on half a head
/// or a client that stopped reading; here the drain's deadline ends it, and the exit code is 11, for nobody can tell
/// half a head from a request on its way.
///
/// From Draining on it empties the accept queue and closes. Tell axum to close idle connections with
/// [`ShutdownCoordinator::requests_done`]:
///
/// ```no_run
/// # use shutdown_core::ShutdownCoordinator;
/// # use shutdown_tower::{Listener, ShutdownLayer};
/// # async fn example(shutdown: ShutdownCoordinator, app: axum::Router) -> Result<(), Box<dyn std::error::Error>> {
/// let listener = Listener::new(tokio::net::TcpListener::bind("127.0.0.1:3000").await?, shutdown);
/// let server = axum::serve(listener, app.layer(ShutdownLayer::new(shutdown)));
/// // Not awaited in `main`: a handler that blocks its thread would keep the report waiting.
/// tokio::spawn(server.with_graceful_shutdown(shutdown.requests_done()).into_future());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Listener<L> {
    inner: net::Listener<L>,
}

impl<L: Accept> Listener<L> {
    /// Accepts from `listener` under `shutdown`.
    pub fn new(listener: L, shutdown: ShutdownCoordinator) -> Self {
        Self { inner: net::Listener::new(listener, shutdown) }
    }
}

impl<L: Accept> axum::serve::Listener for Listener<L> {
    type Io = Io<L::Stream>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.inner.accept().await {
            Some(accepted) => accepted,
            // Closed: axum leaves its loop when its own signal comes.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.inner.local_addr()
    }
}

/// How long a listener that cannot be asked for what is queued is given to bring it.
const QUEUED: Duration = Duration::from_millis(100);

/// Wraps any listener of axum's – one that shakes hands, limits, or taps – as [`Listener`] wraps tokio's.
///
/// Such a listener can only be waited for, not asked whether a connection is queued: when Draining begins it is over
/// once it has brought none for 100 ms.
#[derive(Debug)]
pub struct Wrapped<L> {
    shutdown: ShutdownCoordinator,
    /// `None` once it has closed.
    open: Option<(L, ListenerGuard)>,
}

impl<L: axum::serve::Listener> Wrapped<L> {
    /// Accepts from `listener` under `shutdown`.
    pub fn new(listener: L, shutdown: ShutdownCoordinator) -> Self {
        Self { shutdown, open: Some((listener, shutdown.listener_start())) }
    }

    async fn next(&mut self) -> Option<(L::Io, L::Addr)> {
        let (listener, _) = self.open.as_mut()?;
        let last = {
            // One wait across the moment: it may be in the middle of a handshake.
            let mut accepting = std::pin::pin!(listener.accept());
            tokio::select! {
                biased;
                () = self.shutdown.draining() => {}
                accepted = &mut accepting => return Some(accepted),
            }
            timeout(QUEUED, accepting).await.ok()
        };
        if last.is_none() {
            self.open = None;
        }
        last
    }
}

impl<L: axum::serve::Listener> axum::serve::Listener for Wrapped<L> {
    type Io = Io<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        while let Some((stream, addr)) = self.next().await {
            if let Ok(guard) = self.shutdown.connection_start() {
                return (Io::new(stream, self.shutdown, guard), addr);
            }
        }
        // Closed: axum leaves its loop when its own signal comes.
        std::future::pending().await
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        match &self.open {
            Some((listener, _)) => listener.local_addr(),
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "the listener has closed")),
        }
    }
}
