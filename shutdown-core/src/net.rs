//! The accept loop and the connection it hands out: sockets, not HTTP.
//!
//! A [`Listener`] accepts until Draining, then empties its accept queue – connections whose client believes them
//! open – and closes. Every connection is an [`Io`] that carries its own guard and its own kill switch, so it is
//! counted to its last byte whatever protocol runs over it, and can be ended whatever state that protocol is in.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

use crate::coordinator::{ListenerGuard, ShutdownCoordinator};
use crate::inflight::ConnectionGuard;
use crate::latch::Wait;

/// The accept queue we ask for; the system may cap it (`net.core.somaxconn`).
const BACKLOG: i32 = 1024;
/// How long accepting pauses when the process or the system has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The same while the accept queue is emptied.
const DRAINING_PAUSE: Duration = Duration::from_millis(10);

/// Binds a TCP listener that can be bound again at once after a restart. An IPv6 address takes IPv6 only.
///
/// Non-blocking, for `tokio::net::TcpListener::from_std` inside the runtime that will accept.
///
/// # Errors
///
/// What the system said, for example that the address is in use.
pub fn bind(addr: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    // On Windows SO_REUSEADDR would let two processes share the port.
    #[cfg(not(windows))]
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Something that accepts connections.
pub trait Accept: Send + 'static {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;
    /// Its peer's address.
    type Addr: Send;

    /// Accepts the next connection.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Self::Stream, Self::Addr)>>;

    /// Accepts a connection that waits in the queue now, or fails with [`io::ErrorKind::WouldBlock`]. It asks the
    /// system itself: the runtime may not have heard of the newest ones yet.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when the queue is empty, else what the system said.
    fn accept_now(&self) -> io::Result<(Self::Stream, Self::Addr)>;

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// What the system said.
    fn local_addr(&self) -> io::Result<Self::Addr>;
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    type Addr = SocketAddr;

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        let (stream, addr) = ready!(Self::poll_accept(self, cx))?;
        // Answers are written whole; waiting for more to send only adds delay. A failure costs that, no more.
        let _ = stream.set_nodelay(true);
        Poll::Ready(Ok((stream, addr)))
    }

    fn accept_now(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (socket, addr) = SockRef::from(self).accept()?;
        socket.set_nonblocking(true)?;
        let _ = socket.set_tcp_nodelay(true);
        let addr = addr.as_socket().ok_or_else(|| io::Error::other("a TCP peer without an IP address"))?;
        Ok((TcpStream::from_std(socket.into())?, addr))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Self::local_addr(self)
    }
}

#[cfg(unix)]
impl Accept for tokio::net::UnixListener {
    type Stream = tokio::net::UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Self::Stream, Self::Addr)>> {
        Self::poll_accept(self, cx)
    }

    fn accept_now(&self) -> io::Result<(Self::Stream, Self::Addr)> {
        let (socket, _) = SockRef::from(self).accept()?;
        socket.set_nonblocking(true)?;
        let stream = Self::Stream::from_std(socket.into())?;
        let addr = stream.peer_addr()?;
        Ok((stream, addr))
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Self::local_addr(self)
    }
}

/// Accepts connections until Draining, then what is still queued, then closes.
#[derive(Debug)]
#[must_use = "a listener that is not polled accepts nothing and keeps the drain waiting"]
pub struct Listener<L> {
    shutdown: ShutdownCoordinator,
    draining: Wait<'static>,
    open: Option<(L, ListenerGuard)>,
}

type Accepted<L> = io::Result<(<L as Accept>::Stream, <L as Accept>::Addr)>;

impl<L: Accept> Listener<L> {
    /// Accepts from `listener` under `shutdown`.
    pub fn new(listener: L, shutdown: ShutdownCoordinator) -> Self {
        Self { shutdown, draining: shutdown.draining(), open: Some((listener, shutdown.listener_start())) }
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
                        () = tokio::time::sleep(pause) => {}
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
        match listener.accept_now() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
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

pin_project! {
    /// A connection that is counted until it is dropped and fails once the drain's deadline has cut it.
    ///
    /// After the cut every read, write, flush and shutdown gives [`io::ErrorKind::ConnectionAborted`], and
    /// whoever waits in one is woken. A protocol that waits in none of them is not: end its future with
    /// [`ShutdownCoordinator::cut`].
    #[derive(Debug)]
    pub struct Io<S> {
        #[pin]
        stream: S,
        shutdown: ShutdownCoordinator,
        // One for each half: reader and writer may be two tasks, and a wait wakes the last one that polled it.
        read_cut: Wait<'static>,
        write_cut: Wait<'static>,
        guard: ConnectionGuard,
    }
}

impl<S> Io<S> {
    /// Wraps a stream that is counted by `guard`.
    pub fn new(stream: S, shutdown: ShutdownCoordinator, guard: ConnectionGuard) -> Self {
        Self { stream, shutdown, read_cut: shutdown.cut(), write_cut: shutdown.cut(), guard }
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
}

/// Registers for the cut and fails once it has come.
macro_rules! unless_cut {
    ($cut:expr, $cx:expr) => {
        if Pin::new($cut).poll($cx).is_ready() {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "cut at the drain's deadline",
            )));
        }
    };
}

impl<S: AsyncRead> AsyncRead for Io<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        unless_cut!(this.read_cut, cx);
        this.stream.poll_read(cx, buf)
    }
}

impl<S: AsyncWrite> AsyncWrite for Io<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.project();
        unless_cut!(this.write_cut, cx);
        this.stream.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        unless_cut!(this.write_cut, cx);
        this.stream.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        unless_cut!(this.write_cut, cx);
        this.stream.poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        unless_cut!(this.write_cut, cx);
        this.stream.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
