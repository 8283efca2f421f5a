//! The accept loop: until Draining, then what is still queued.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

use crate::coordinator::{ListenerGuard, ShutdownCoordinator};
use crate::latch::Wait;
use crate::net::{Accept, Io};

/// How long accepting pauses when the process or the system has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The same while the accept queue is emptied.
const DRAINING_PAUSE: Duration = Duration::from_millis(10);

/// How long handshakes under way have to be completed; on a local network they take less than one.
const HANDSHAKES: Duration = Duration::from_millis(5);

/// Accepts connections until Draining, then what is still queued, then closes.
#[derive(Debug)]
#[must_use = "a listener that is not polled accepts nothing and keeps the drain waiting"]
pub struct Listener<L> {
    shutdown: ShutdownCoordinator,
    draining: Wait<'static>,
    open: Option<(L, ListenerGuard)>,
    /// Set when Draining begins: until when handshakes under way are waited for, if no others can begin.
    last_ones: Option<Option<Pin<Box<Sleep>>>>,
}

type Accepted<L> = io::Result<(<L as Accept>::Stream, <L as Accept>::Addr)>;

impl<L: Accept> Listener<L> {
    /// Accepts from `listener` under `shutdown`.
    pub fn new(listener: L, shutdown: ShutdownCoordinator) -> Self {
        Self {
            shutdown,
            draining: shutdown.draining(),
            open: Some((listener, shutdown.listener_start())),
            last_ones: None,
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotConnected`] once it has closed, else what the system said.
    pub fn local_addr(&self) -> io::Result<L::Addr> {
        match &self.open {
            Some((listener, _)) => listener.local_addr(),
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "the listener has closed")),
        }
    }

    /// Accepts the next connection; `None` once the queue is empty and the listener closed.
    ///
    /// Errors do not end it: a connection that died in the queue is passed over, and without file descriptors it
    /// pauses for 100 ms.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no connection is lost.
    pub async fn accept(&mut self) -> Option<(Io<L::Stream>, L::Addr)> {
        loop {
            let accepted = std::future::poll_fn(|cx| self.poll_accept(cx)).await?;
            match accepted {
                Ok((stream, addr)) => {
                    // Refused only if this listener was too slow to close: the client sees a reset.
                    if let Ok(guard) = self.shutdown.connection_start() {
                        return Some((Io::new(stream, self.shutdown, guard), addr));
                    }
                }
                Err(error) if is_of_the_connection(&error) => {}
                Err(error) => {
                    tracing::error!(target: "shutdown", %error, "accept failed");
                    // While the queue is emptied, connections that end give their descriptors back.
                    let draining = self.draining.latch().is_set();
                    let pause = if draining { DRAINING_PAUSE } else { ACCEPT_PAUSE };
                    tokio::select! {
                        () = sleep(pause) => {}
                        () = self.shutdown.draining(), if !draining => {}
                        () = self.shutdown.cut() => {
                            self.open = None;
                            return None;
                        }
                    }
                }
            }
        }
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<Accepted<L>>> {
        let Some((listener, _)) = &self.open else { return Poll::Ready(None) };
        if Pin::new(&mut self.draining).poll(cx).is_pending() {
            return listener.poll_accept(cx).map(Some);
        }
        let last_ones = self
            .last_ones
            .get_or_insert_with(|| listener.begin_no_more().then(|| Box::pin(sleep(HANDSHAKES))));
        match listener.accept_now() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if last_ones.as_mut().is_some_and(|wait| wait.as_mut().poll(cx).is_pending()) {
                    return listener.poll_accept(cx).map(Some);
                }
                self.open = None;
                Poll::Ready(None)
            }
            accepted => Poll::Ready(Some(accepted)),
        }
    }
}

/// Whether the error is of a connection that died in the queue, and not of the listener.
fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}
