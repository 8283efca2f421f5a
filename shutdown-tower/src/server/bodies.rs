//! How much of its answers an HTTP/2 connection has yet to write.
//!
//! h2 takes a body's frames whole and keeps what the client's windows do not let through; nobody can ask how much that
//! is. So what goes in is counted, and what comes out: the DATA frames written to the socket. Bytes of a stream that was
//! reset never come out; then more is left than there is. Bytes of a tunnel (CONNECT) come out and never went in: a
//! connection that carries one is kept as a session's, or is not waited for.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Buf;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use shutdown_core::net;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// The length of a frame's head, and the type of DATA; RFC 9113 §4.1 and §6.1.
const HEAD: usize = 9;
const DATA: u8 = 0;

/// What one connection's bodies have given, and what of it has been written.
#[derive(Debug)]
pub(super) struct Bodies {
    given: AtomicU64,
    written: AtomicU64,
    began: Instant,
    /// When DATA was last written, in milliseconds since the beginning.
    last: AtomicU64,
}

impl Bodies {
    /// Of a connection that begins now.
    pub(super) fn new() -> Self {
        Self {
            given: AtomicU64::new(0),
            written: AtomicU64::new(0),
            began: Instant::now(),
            last: AtomicU64::new(0),
        }
    }

    /// By when a client that reads at all has read what was written.
    pub(super) fn surely_read_by(&self) -> Instant {
        let last = self.began + Duration::from_millis(self.last.load(Ordering::Relaxed));
        net::surely_read_by(last, self.written.load(Ordering::Relaxed))
    }

    /// Whether anything that a body has given has yet to be written. Exact for bodies that have been dropped since: who
    /// has heard of that sees what they gave.
    pub(super) fn have_unwritten(&self) -> bool {
        self.given.load(Ordering::Relaxed) > self.written.load(Ordering::Relaxed)
    }
}

pin_project! {
    /// A body that is counted as it gives.
    pub(super) struct Counted<B> {
        #[pin]
        body: B,
        bodies: Arc<Bodies>,
    }
}

impl<B> Counted<B> {
    pub(super) fn new(body: B, bodies: Arc<Bodies>) -> Self {
        Self { body, bodies }
    }
}

impl<B: Body> Body for Counted<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let frame = ready!(this.body.poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            this.bodies.given.fetch_add(data.remaining() as u64, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Follows frames through writes of any size.
#[derive(Debug, Default)]
struct Frames {
    head: [u8; HEAD],
    /// How much of the head is here.
    have: usize,
    /// How much of the payload is to come.
    left: usize,
}

impl Frames {
    /// Takes what was written; how many bytes of it are DATA.
    fn take(&mut self, mut bytes: &[u8]) -> u64 {
        let mut data = 0;
        while !bytes.is_empty() {
            if self.left == 0 {
                let fits = bytes.len().min(HEAD - self.have);
                self.head[self.have..self.have + fits].copy_from_slice(&bytes[..fits]);
                self.have += fits;
                bytes = &bytes[fits..];
                if self.have == HEAD {
                    self.have = 0;
                    let [high, middle, low, ..] = self.head.map(usize::from);
                    self.left = high << 16 | middle << 8 | low;
                }
                continue;
            }
            let fits = bytes.len().min(self.left);
            self.left -= fits;
            bytes = &bytes[fits..];
            if self.head[3] == DATA {
                data += fits as u64;
            }
        }
        data
    }
}

/// A stream whose written DATA is counted.
#[derive(Debug)]
pub(super) struct Written<S> {
    stream: S,
    frames: Frames,
    bodies: Arc<Bodies>,
}

impl<S> Written<S> {
    pub(super) fn new(stream: S, bodies: Arc<Bodies>) -> Self {
        Self { stream, frames: Frames::default(), bodies }
    }

    fn wrote(&mut self, bytes: &[u8]) {
        let data = self.frames.take(bytes);
        if data > 0 {
            self.bodies.written.fetch_add(data, Ordering::Relaxed);
            let last = u64::try_from(self.bodies.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.bodies.last.store(last, Ordering::Relaxed);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Written<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Written<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        self.wrote(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs))?;
        let mut left = written;
        for buf in bufs {
            let part = left.min(buf.len());
            self.wrote(&buf[..part]);
            left -= part;
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However the frames are cut into writes, their DATA is counted to the byte.
        #[test]
        fn data_is_counted_to_the_byte(
            frames in proptest::collection::vec((0_usize..2000, 0_u8..10), 1..20),
            cut in 1_usize..500,
        ) {
            let mut bytes = Vec::new();
            let mut data = 0;
            for (length, kind) in frames {
                bytes.extend_from_slice(&u32::try_from(length).expect("small").to_be_bytes()[1..]);
                bytes.extend_from_slice(&[kind, 0, 0, 0, 0, 1]);
                bytes.resize(bytes.len() + length, 0xff);
                data += if kind == DATA { length as u64 } else { 0 };
            }
            let mut follows = Frames::default();
            let counted: u64 = bytes.chunks(cut).map(|piece| follows.take(piece)).sum();
            prop_assert_eq!(counted, data);
        }
    }
}
