//! Connections for a stock tonic server.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use shutdown_core::net::{Accept, Io, Listener};
use shutdown_core::{ShutdownCoordinator, Wait};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// A listener's connections as stock tonic takes them, for `serve_with_incoming_shutdown`.
///
/// From Draining on it empties the accept queue and closes. It ends when requests are over, and not earlier: tonic
/// closes its connections when this ends as well as at its signal, which is
/// [`ShutdownCoordinator::requests_done`]. Refuse with [`RefuseGrpc`](crate::RefuseGrpc).
///
/// ```no_run
/// # use shutdown_core::ShutdownCoordinator;
/// # use shutdown_tower::{RefuseGrpc, ShutdownLayer, TonicIncoming};
/// # async fn example(shutdown: ShutdownCoordinator, routes: tonic::service::Routes) -> Result<(), Box<dyn std::error::Error>> {
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:50051").await?;
/// let server = tonic::transport::Server::builder()
///     .layer(ShutdownLayer::new(shutdown).refuse_with(RefuseGrpc))
///     .add_routes(routes)
///     .serve_with_incoming_shutdown(TonicIncoming::new(listener, shutdown), shutdown.requests_done());
/// tokio::spawn(server);
/// # Ok(())
/// # }
/// ```
///
/// tonic has one trigger for everything that stopping means, so its clients hear GOAWAY when the last request has
/// finished. With [`Server`](crate::Server), which serves tonic's `Routes` as well, they hear it in the lame duck.
#[must_use = "streams do nothing unless polled"]
pub struct TonicIncoming<L: Accept> {
    /// `None` once the listener has closed.
    next: Option<Next<L>>,
    over: Wait<'static>,
}

/// The listener, lent to the wait for its next connection.
type Next<L> = Pin<Box<dyn Future<Output = Option<(TonicIo<<L as Accept>::Stream>, Listener<L>)>> + Send>>;

impl<L: Accept> fmt::Debug for TonicIncoming<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TonicIncoming").field("open", &self.next.is_some()).finish()
    }
}

impl<L: Accept + Sync> TonicIncoming<L> {
    /// Accepts from `listener` under `shutdown`.
    pub fn new(listener: L, shutdown: ShutdownCoordinator) -> Self {
        Self { next: Some(next(Listener::new(listener, shutdown))), over: shutdown.requests_done() }
    }
}

fn next<L: Accept + Sync>(mut listener: Listener<L>) -> Next<L> {
    Box::pin(async move {
        let (io, _) = listener.accept().await?;
        Some((TonicIo(io), listener))
    })
}

impl<L: Accept + Sync> Stream for TonicIncoming<L> {
    type Item = io::Result<TonicIo<L::Stream>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(waiting) = &mut self.next {
            let (io, rest) = ready!(waiting.as_mut().poll(cx)).unzip();
            self.next = rest.map(next);
            if let Some(io) = io {
                return Poll::Ready(Some(Ok(io)));
            }
        }
        Pin::new(&mut self.over).poll(cx).map(|()| None)
    }
}

/// A counted connection with the information that tonic gives to its handlers.
#[derive(Debug)]
pub struct TonicIo<S>(Io<S>);

impl<S: Connected> Connected for TonicIo<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> S::ConnectInfo {
        self.0.get_ref().connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TonicIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TonicIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}
