//! The connection that servers are handed: counted, cut from outside, and closed without losing its tail.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::connections::{ConnectionGuard, ConnectionHandle, Cut};
use crate::coordinator::ShutdownCoordinator;

/// How long a peer that was told the end may be silent before we take it that it has nothing more to say.
const QUIET: Duration = Duration::from_secs(1);

/// How long a peer that goes on talking is heard out.
const LONGEST: Duration = Duration::from_secs(5);

pin_project! {
    /// A connection that is counted until it is dropped and fails once it has been cut: at the drain's deadline, or,
    /// while it carries sessions, at the end of their stage.
    ///
    /// After the cut every read, write, flush and shutdown gives [`io::ErrorKind::ConnectionAborted`], and
    /// whoever waits in one is woken. A protocol that waits in none of them is not: end its future with
    /// [`ConnectionHandle::cut`].
    ///
    /// **Closing.** What a peer sends after its connection has been closed resets it, and a reset throws away the rest
    /// of the answer that is still on its way. An HTTP/2 client does so with every window update. So where the
    /// protocol asks for it ([`ConnectionHandle::hear_out`]), a connection that was written to in the last second of a
    /// shutdown is closed in two steps: it ends its own half, then hears the peer out, until that closes, or has been
    /// silent for a second, or five have passed. What is heard is thrown away.
    pub struct Io<S> {
        #[pin]
        stream: S,
        shutdown: ShutdownCoordinator,
        guard: ConnectionGuard,
        // One for each half: reader and writer may be two tasks, and a wait wakes the last one that polled it.
        read_cut: Cut,
        write_cut: Cut,
        unsent: bool,
        // Kept during a shutdown only: a clock costs more than the write it times.
        written: Option<Instant>,
        // Until when the peer is heard out at most, and until when if it stays silent.
        closing: Option<(Instant, Pin<Box<Sleep>>)>,
    }
}

impl<S> fmt::Debug for Io<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Io").field("guard", &self.guard).finish_non_exhaustive()
    }
}

impl<S> Io<S> {
    /// Wraps a stream that is counted by `guard`.
    pub fn new(stream: S, shutdown: ShutdownCoordinator, guard: ConnectionGuard) -> Self {
        let (read_cut, write_cut) = (guard.handle().cut(), guard.handle().cut());
        Self { stream, shutdown, guard, read_cut, write_cut, unsent: false, written: None, closing: None }
    }

    /// The wrapped stream.
    pub fn get_ref(&self) -> &S {
        &self.stream
    }

    /// The wrapped stream.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The coordinator that counts this connection.
    pub fn shutdown_coordinator(&self) -> ShutdownCoordinator {
        self.shutdown
    }

    /// Looks at this connection when a server owns it.
    pub fn handle(&self) -> ConnectionHandle {
        self.guard.handle().clone()
    }
}

/// Registers for the cut and fails once it has come; notes which connection this task works on.
macro_rules! unless_cut {
    ($this:expr, $cut:ident, $cx:expr) => {
        $this.guard.id().polled();
        if Pin::new($this.$cut).poll($cx).is_ready() {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "cut at the deadline of the shutdown",
            )));
        }
    };
}

/// Notes what became of a write.
macro_rules! wrote {
    ($this:expr, $done:expr) => {
        if *$this.unsent != $done.is_pending() {
            *$this.unsent = $done.is_pending();
            $this.guard.handle().set_unsent(*$this.unsent);
        }
        if $this.shutdown.is_shutting_down() {
            *$this.written = Some(Instant::now());
        }
    };
}

impl<S: AsyncRead> AsyncRead for Io<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        unless_cut!(this, read_cut, cx);
        this.stream.poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite> AsyncWrite for Io<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.project();
        unless_cut!(this, write_cut, cx);
        let done = this.stream.poll_write(cx, buf);
        wrote!(this, done);
        done
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        unless_cut!(this, write_cut, cx);
        this.stream.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut this = self.project();
        unless_cut!(this, write_cut, cx);
        let (end, quiet) = match this.closing {
            Some(closing) => closing,
            None => {
                ready!(this.stream.as_mut().poll_shutdown(cx))?;
                let quiet = this.written.is_none_or(|written| written.elapsed() > QUIET);
                if quiet || !this.guard.handle().hears_out() {
                    return Poll::Ready(Ok(()));
                }
                this.guard.handle().set_unsent(true);
                this.closing.insert((Instant::now() + LONGEST, Box::pin(sleep(QUIET))))
            }
        };
        let mut scratch = [0; 1024];
        loop {
            let mut scratch = ReadBuf::new(&mut scratch);
            match this.stream.as_mut().poll_read(cx, &mut scratch) {
                Poll::Pending => {
                    ready!(quiet.as_mut().poll(cx));
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(())) if Instant::now() >= *end => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(())) if !scratch.filled().is_empty() => {
                    quiet.as_mut().reset((Instant::now() + QUIET).min(*end));
                }
                Poll::Ready(_) => return Poll::Ready(Ok(())),
            }
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        unless_cut!(this, write_cut, cx);
        let done = this.stream.poll_write_vectored(cx, bufs);
        wrote!(this, done);
        done
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
