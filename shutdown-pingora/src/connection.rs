//! The IO object handed to Pingora: a counted connection with a kill switch.
//!
//! Layers, outermost first:
//!
//! ```text
//! Connection      Pingora's traits
//!   BufWriter     joins a head and a short body into one segment, as Pingora's own stream does
//!     FirstBytes  reads again what `try_peek` looked at
//!       Io        the guard that counts the connection, the cut, and the end without a reset
//!         TcpStream
//! ```
//!
//! Pingora flushes at the end of every message and `BufWriter` passes a flush and a shutdown down, so nothing stays
//! behind in the buffer when the guard below it is dropped.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use pingora_core::protocols::raw_connect::ProxyDigest;
use pingora_core::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest,
    UniqueID, UniqueIDType,
};
use shutdown_core::net::{FirstBytes, Io, surely_read_by};
use shutdown_core::{ConnectionHandle, ShutdownCoordinator, Wait};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufWriter, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

/// A counted TCP connection that Pingora can serve.
///
/// It is open, for the coordinator, until it is dropped. Once the drain's deadline has cut it every operation
/// fails; see [`Io`].
pub struct Connection {
    io: BufWriter<FirstBytes<Io<TcpStream>>>,
    digest: Arc<SocketDigest>,
    established: SystemTime,
    /// Of an HTTP/2 connection: has it told to leave, and ends it when it does not.
    leave: Option<Leave>,
    /// Tells Pingora that an HTTP/2 client is to leave.
    tell: Option<watch::Sender<bool>>,
    /// Whether bytes wait for the socket to take them.
    unsent: bool,
    /// Of an HTTP/2 connection: bytes written, and when the last of them were.
    written: (u64, Instant),
}

impl Connection {
    /// Wraps an accepted connection of `peer`.
    pub fn new(io: Io<TcpStream>, peer: SocketAddr) -> Self {
        let digest = socket_digest(io.get_ref());
        // Ours is the only reference and the cell is new, so this cannot fail.
        let _ = digest.peer_addr.set(Some(peer.into()));
        Self {
            io: BufWriter::with_capacity(WRITE_BUFFER, FirstBytes::new(io)),
            digest: Arc::new(digest),
            established: SystemTime::now(),
            leave: None,
            tell: None,
            unsent: false,
            written: (0, Instant::now()),
        }
    }

    /// Says through `tell`, once, when an HTTP/2 client is to leave. HTTP/1 is asked answer by answer, by
    /// [`Coordinated`](crate::Coordinated): Pingora, told, would close after every answer.
    pub(crate) fn telling(mut self, tell: watch::Sender<bool>) -> Self {
        self.tell = Some(tell);
        self
    }

    /// Looks at this connection when Pingora owns it.
    pub fn handle(&self) -> ConnectionHandle {
        self.tracked().handle()
    }

    fn tracked(&self) -> &Io<TcpStream> {
        self.io.get_ref().get_ref()
    }

    /// Notes after a write or a flush whether anything is left to send.
    fn wrote<T>(&mut self, done: &Poll<T>, bytes: usize, cx: &Context<'_>) {
        if bytes > 0 && self.leave.is_some() {
            self.written = (self.written.0 + bytes as u64, Instant::now());
        }
        let unsent = done.is_pending() || !self.io.buffer().is_empty();
        if self.unsent && !unsent && self.leave.is_some() {
            // Reading may have waited for this.
            cx.waker().wake_by_ref();
        }
        self.unsent = unsent;
    }
}

/// The bytes of a write that has happened.
fn count(done: &Poll<io::Result<usize>>) -> usize {
    match done {
        Poll::Ready(Ok(bytes)) => *bytes,
        _ => 0,
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.digest.peer_addr())
            .field("established", &self.established)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Peek for Connection {
    /// Looks at the first bytes, for as long as they may become the HTTP/2 preface, and puts them back.
    ///
    /// Pingora's own waits for 24 bytes whatever they are and whatever happens: a connection that never sends
    /// anything would hold the drain to its deadline. This one ends when requests are over, and a request shorter
    /// than the preface is not kept waiting.
    async fn try_peek(&mut self, buf: &mut [u8]) -> io::Result<bool> {
        let shutdown = self.tracked().shutdown_coordinator();
        let speaks_h2 = tokio::select! {
            // Reading first: what has arrived is answered, be it with 503.
            biased;
            begins = self.io.get_mut().begins_with(H2_PREFACE) => begins?,
            () = shutdown.requests_done() => {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "closed unused by the shutdown"));
            }
        };
        let seen = self.io.get_ref().seen();
        if seen.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Zeros where nothing came: the preface has none, so what is incomplete is no preface.
        buf.fill(0);
        let fits = seen.len().min(buf.len());
        buf[..fits].copy_from_slice(&seen[..fits]);
        if speaks_h2 {
            // HTTP/2 clients go on sending window updates while they read.
            self.handle().hear_out(true);
            let asked = async move { shutdown.asked_to_leave().await };
            self.leave = Some(Leave::Serving(Box::pin(asked), self.tell.take()));
        }
        Ok(true)
    }
}

/// How an HTTP/2 connection is told to leave, and ends if its client does not answer our PING, which h2 waits for
/// without a limit.
///
/// The PING goes out with the GOAWAY, when the lame duck begins or at this connection's turn in it. Once it has had
/// [`ANSWER_TIME`], requests are over, and the client has had the time to read what stands before the PING, nothing is
/// left to say but the final GOAWAY: the connection reads as ended, unless bytes of an answer still wait for the
/// socket. Those are sent first, or cut at the deadline.
enum Leave {
    Serving(Pin<Box<dyn Future<Output = ()> + Send + Sync>>, Option<watch::Sender<bool>>),
    Told(Pin<Box<Sleep>>),
    Unanswered(Wait<'static>),
    Over(Pin<Box<Sleep>>),
}

impl Leave {
    /// `read_by`: when the client has read what was written to it.
    fn poll(&mut self, shutdown: ShutdownCoordinator, read_by: Instant, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            *self = match self {
                Self::Serving(asked, tell) => {
                    ready!(asked.as_mut().poll(cx));
                    if let Some(tell) = tell {
                        tell.send_replace(true);
                    }
                    Self::Told(Box::pin(tokio::time::sleep(ANSWER_TIME)))
                }
                Self::Told(answer) => {
                    ready!(answer.as_mut().poll(cx));
                    Self::Unanswered(shutdown.requests_done())
                }
                Self::Unanswered(over) => {
                    ready!(Pin::new(over).poll(cx));
                    *self = Self::Over(Box::pin(tokio::time::sleep_until(read_by + ANSWER_TIME)));
                    // Once more around: the last answer may still be with h2, which has yet to write it.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Self::Over(read) => {
                    if read.deadline() < read_by + ANSWER_TIME {
                        read.as_mut().reset(read_by + ANSWER_TIME);
                    }
                    return read.as_mut().poll(cx);
                }
            };
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let shutdown = this.tracked().shutdown_coordinator();
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        if let (Poll::Pending, Some(leave)) = (&read, &mut this.leave)
            && leave.poll(shutdown, surely_read_by(this.written.1, this.written.0), cx).is_ready()
            && !this.unsent
        {
            // Nothing in `buf`: the end.
            return Poll::Ready(Ok(()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.io).poll_write(cx, buf);
        self.wrote(&done, count(&done), cx);
        done
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.io).poll_flush(cx);
        self.wrote(&done, 0, cx);
        done
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.wrote(&done, count(&done), cx);
        done
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.io.buffer().is_empty() {
            // Pingora leaves some error answers unflushed and relies on its stream to try once, as this does.
            let mut cx = Context::from_waker(Waker::noop());
            let _ = Pin::new(&mut self.io).poll_flush(&mut cx);
        }
    }
}

#[async_trait]
impl Shutdown for Connection {
    async fn shutdown(&mut self) {
        // The peer may be gone already; there is nobody left to tell.
        let _ = AsyncWriteExt::shutdown(self).await;
    }
}

impl UniqueID for Connection {
    fn id(&self) -> UniqueIDType {
        unique_id(self.tracked().get_ref())
    }
}

/// Plain TCP: no TLS to tell about.
impl Ssl for Connection {}

impl GetTimingDigest for Connection {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        vec![Some(TimingDigest { established_ts: self.established, ..TimingDigest::default() })]
    }
}

/// It was not made through a proxy.
impl GetProxyDigest for Connection {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for Connection {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        Some(Arc::clone(&self.digest))
    }

    fn set_socket_digest(&mut self, digest: SocketDigest) {
        self.digest = Arc::new(digest);
    }
}

#[cfg(unix)]
fn socket_digest(stream: &TcpStream) -> SocketDigest {
    SocketDigest::from_raw_fd(std::os::fd::AsRawFd::as_raw_fd(stream))
}

#[cfg(windows)]
fn socket_digest(stream: &TcpStream) -> SocketDigest {
    SocketDigest::from_raw_socket(std::os::windows::io::AsRawSocket::as_raw_socket(stream))
}

#[cfg(unix)]
fn unique_id(stream: &TcpStream) -> UniqueIDType {
    std::os::fd::AsRawFd::as_raw_fd(stream)
}

#[cfg(windows)]
fn unique_id(stream: &TcpStream) -> UniqueIDType {
    std::os::windows::io::AsRawSocket::as_raw_socket(stream) as UniqueIDType
}

/// The first bytes of an HTTP/2 client; RFC 9113, section 3.4.
const H2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// One segment of an Ethernet path; also the size of Pingora's own write buffer.
const WRITE_BUFFER: usize = 1460;
/// How long an HTTP/2 client may take to answer our PING; more than a slow round trip.
const ANSWER_TIME: Duration = Duration::from_secs(1);
