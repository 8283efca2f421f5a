//! The accept loop and the connection it hands out: sockets, not HTTP.
//!
//! A [`Listener`] accepts until Draining, then empties its accept queue – connections whose client believes them
//! open – and closes. Every connection is an [`Io`] that carries its own guard and its own kill switch, so it is
//! counted to its last byte whatever protocol runs over it, and can be ended whatever state that protocol is in.

mod first_bytes;
mod io_object;
mod listener;

use std::io;
use std::net::SocketAddr;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

pub use first_bytes::FirstBytes;
pub use io_object::Io;
pub use listener::Listener;

/// The accept queue we ask for; the system may cap it (`net.core.somaxconn`).
const BACKLOG: i32 = 1024;

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

/// By when a peer that reads at all has read what was written: `written` bytes in all, the last of them at `last`.
///
/// What has been written may be in the system's buffers still, and nobody but the peer knows. Taken is that it reads at
/// 64 KiB a second at least, and that the buffers hold 4 MiB at most (Linux's default, `net.ipv4.tcp_wmem`).
pub fn surely_read_by(last: Instant, written: u64) -> Instant {
    const SLOWEST_READER: u64 = 64 * 1024;
    const MOST_BUFFERED: u64 = 4 * 1024 * 1024;
    last + Duration::from_millis(written.min(MOST_BUFFERED) * 1000 / SLOWEST_READER)
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

    /// Has the system begin no more connections, while those under way are still brought; whether it can.
    ///
    /// Between a last look into the accept queue and the closing of the socket a connection may be completed: its
    /// client believes it open, and is reset. A listener that begins none has no such moment.
    fn begin_no_more(&self) -> bool {
        false
    }
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

    /// On Linux: drops the first packet (SYN) of every new connection. Its client sends it again after a second, when the
    /// socket has closed, and is refused, as it would have been a moment later.
    ///
    /// Not for a socket that systemd holds as well: the filter would stay on it when we close it, and drop every
    /// connection to the next start. Nor is it needed: what is completed after the last look waits for that start.
    #[cfg(target_os = "linux")]
    fn begin_no_more(&self) -> bool {
        #[cfg(feature = "systemd")]
        if is_shared(&SockRef::from(self)) {
            return false;
        }
        use socket2::SockFilter;
        // Classic BPF (linux/bpf_common.h, linux/filter.h) over the TCP header; RFC 9293 §3.1: the flags are byte 13.
        const LOAD_BYTE: u16 = 0x30;
        const AND: u16 = 0x54;
        const JUMP_IF_EQUAL: u16 = 0x15;
        const RETURN: u16 = 0x06;
        const SYN: u32 = 0x02;
        const ACK: u32 = 0x10;
        let no_syn = [
            SockFilter::new(LOAD_BYTE, 0, 0, 13),
            SockFilter::new(AND, 0, 0, SYN | ACK),
            SockFilter::new(JUMP_IF_EQUAL, 0, 1, SYN),
            SockFilter::new(RETURN, 0, 0, 0),
            SockFilter::new(RETURN, 0, 0, u32::MAX),
        ];
        SockRef::from(self).attach_filter(&no_syn).is_ok()
    }
}

/// The sockets that systemd holds as well, by the kernel's cookies, which are never used again (`SO_COOKIE`, socket(7)).
///
/// For the whole process, because it is a fact about the socket: whoever accepts from it, through whatever type, cannot
/// forget to say so.
#[cfg(all(target_os = "linux", feature = "systemd"))]
static SHARED: parking_lot::Mutex<Vec<u64>> = parking_lot::Mutex::new(Vec::new());

/// Notes that systemd holds this socket as well.
#[cfg(all(unix, feature = "systemd"))]
pub(crate) fn note_shared(listener: &std::net::TcpListener) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    SHARED.lock().push(SockRef::from(listener).cookie()?);
    // Elsewhere there is no filter to keep away from it.
    #[cfg(not(target_os = "linux"))]
    let _ = listener;
    Ok(())
}

#[cfg(all(target_os = "linux", feature = "systemd"))]
fn is_shared(socket: &SockRef<'_>) -> bool {
    socket.cookie().is_ok_and(|cookie| SHARED.lock().contains(&cookie))
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::net::TcpStream as StdStream;

    use super::*;

    #[tokio::test]
    async fn a_listener_that_begins_no_more_brings_what_it_has_begun_and_nothing_else() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = Accept::local_addr(&listener).unwrap();
        let queued = StdStream::connect(addr).unwrap();
        assert!(listener.begin_no_more());
        // Its first packet is dropped: no answer, and nothing in the queue.
        StdStream::connect_timeout(&addr, Duration::from_millis(200)).unwrap_err();
        let (_, peer) = listener.accept_now().unwrap();
        assert_eq!(peer, queued.local_addr().unwrap());
        assert_eq!(listener.accept_now().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[cfg(feature = "systemd")]
    #[tokio::test]
    async fn a_socket_that_systemd_holds_as_well_gets_no_filter() {
        let given = bind(([127, 0, 0, 1], 0).into()).unwrap();
        note_shared(&given).unwrap();
        let addr = given.local_addr().unwrap();
        let systemds = given.try_clone().unwrap();
        let ours = TcpListener::from_std(given).unwrap();
        assert!(!ours.begin_no_more());
        drop(ours);
        let client = StdStream::connect_timeout(&addr, Duration::from_secs(5)).unwrap();
        assert_eq!(systemds.accept().unwrap().1, client.local_addr().unwrap());
    }
}
