//! Hands out one request head at a time, so that it is known whether a client has sent more.
//!
//! hyper reads all there is and parses one request of it; how much it has left nobody can ask. This stream stops each
//! read at the end of a head (an empty line) and keeps the rest. So when a request begins, exactly its head has been
//! handed out, and while it is answered, *more has come than its body is long* means that the client has pipelined. A
//! body may be cut at an empty line, too, which changes nothing but the size of a read. Not known is it behind a chunked
//! body, and behind heads whose lines end in a bare line feed.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use memchr::memmem;
use shutdown_core::ShutdownCoordinator;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The end of a head.
const END: &[u8] = b"\r\n\r\n";
/// How much is read ahead at most to see whether there is more.
const AHEAD: usize = 4096;

/// How far a connection has been read.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// Bytes handed out.
    read: AtomicU64,
    /// Bytes kept back.
    kept: AtomicU64,
    /// What will have been handed out when the request in progress has been read whole.
    whole: AtomicU64,
}

impl Reading {
    /// A request begins, with a body of this length, if that is known.
    pub(super) fn begin_request(&self, body: Option<u64>) {
        let head = self.read.load(Ordering::Relaxed);
        self.whole.store(body.map_or(u64::MAX, |body| head.saturating_add(body)), Ordering::Relaxed);
    }

    /// Whether the client has sent more than the request in progress.
    pub(super) fn has_more(&self) -> bool {
        let come = self.read.load(Ordering::Relaxed) + self.kept.load(Ordering::Relaxed);
        come > self.whole.load(Ordering::Relaxed)
    }
}

/// A stream that is read one head at a time.
#[derive(Debug)]
pub(super) struct OneHead<S> {
    stream: S,
    kept: BytesMut,
    /// What the read ahead met, for the next read to tell.
    failed: Option<io::Error>,
    /// The last bytes handed out, at most three: an empty line may be split between two reads.
    tail: Vec<u8>,
    reading: Arc<Reading>,
    shutdown: ShutdownCoordinator,
}

impl<S> OneHead<S> {
    pub(super) fn new(stream: S, reading: Arc<Reading>, shutdown: ShutdownCoordinator) -> Self {
        Self { stream, kept: BytesMut::new(), failed: None, tail: Vec::with_capacity(3), reading, shutdown }
    }

    /// Notes what is handed out; `ends` when it ends a head.
    fn hand_out(&mut self, bytes: &[u8], ends: bool) {
        let read = &self.reading.read;
        // One task reads: nobody adds in between.
        read.store(read.load(Ordering::Relaxed) + bytes.len() as u64, Ordering::Relaxed);
        self.tail.extend_from_slice(&bytes[bytes.len().saturating_sub(3)..]);
        let old = if ends { self.tail.len() } else { self.tail.len().saturating_sub(3) };
        self.tail.drain(..old);
    }
}

/// Where the first head ends in `fresh`, which comes after `tail`.
fn end_of_head(tail: &[u8], fresh: &[u8]) -> Option<usize> {
    let split = (1..END.len()).find(|&part| tail.ends_with(&END[..part]) && fresh.starts_with(&END[part..]));
    split.map(|part| END.len() - part).or_else(|| memmem::find(fresh, END).map(|at| at + END.len()))
}

impl<S: AsyncRead + Unpin> OneHead<S> {
    /// Reads what the client has sent by now, if nothing is kept: whether there is more decides what an answer says.
    fn read_ahead(&mut self, cx: &mut Context<'_>) {
        if !self.kept.is_empty() || self.failed.is_some() || !self.shutdown.is_shutting_down() {
            return;
        }
        let mut ahead = [0; AHEAD];
        let mut ahead = ReadBuf::new(&mut ahead);
        match Pin::new(&mut self.stream).poll_read(cx, &mut ahead) {
            Poll::Ready(Ok(())) => self.kept.extend_from_slice(ahead.filled()),
            Poll::Ready(Err(error)) => self.failed = Some(error),
            Poll::Pending => {}
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for OneHead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        let end = if this.kept.is_empty() {
            if let Some(error) = this.failed.take() {
                return Poll::Ready(Err(error));
            }
            ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
            let fresh = &buf.filled()[before..];
            let end = end_of_head(&this.tail, fresh);
            if let Some(end) = end {
                this.kept.extend_from_slice(&fresh[end..]);
                buf.set_filled(before + end);
            }
            end
        } else {
            let end = end_of_head(&this.tail, &this.kept);
            let wanted = end.unwrap_or(this.kept.len());
            let fits = wanted.min(buf.remaining());
            buf.put_slice(&this.kept[..fits]);
            this.kept.advance(fits);
            end.filter(|end| *end == fits)
        };
        this.hand_out(&buf.filled()[before..], end.is_some());
        this.read_ahead(cx);
        this.reading.kept.store(this.kept.len() as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for OneHead<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
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
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    use super::*;

    fn coordinator() -> ShutdownCoordinator {
        let (shutdown, driver) = ShutdownCoordinator::builder().build().expect("the default plan holds");
        drop(driver);
        shutdown
    }

    #[tokio::test]
    async fn a_read_ends_where_a_head_ends_and_it_is_known_that_there_is_more() {
        let input = b"GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\n";
        let reading = Arc::new(Reading::default());
        let mut stream = OneHead::new(&input[..], Arc::clone(&reading), coordinator());
        let mut buf = [0; 512];
        let half = input.len() / 2;
        assert_eq!(stream.read(&mut buf).await.expect("there is more"), half);
        reading.begin_request(Some(0));
        assert!(reading.has_more());
        reading.begin_request(Some(half as u64));
        assert!(!reading.has_more(), "the rest is its body");
        reading.begin_request(None);
        assert!(!reading.has_more(), "nobody knows");
        reading.begin_request(Some(0));
        assert_eq!(stream.read(&mut buf).await.expect("there is more"), half);
        assert!(reading.has_more(), "read while the first request is answered");
        reading.begin_request(Some(0));
        assert!(!reading.has_more());
        assert_eq!(stream.read(&mut buf).await.expect("the end"), 0);
    }

    proptest! {
        /// However the bytes arrive and however they are asked for, the same bytes come out.
        #[test]
        fn nothing_is_lost_added_or_moved(
            pieces in proptest::collection::vec("[a\r\n]{1,12}", 1..20),
            room in 1_usize..40,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("no drivers");
            runtime.block_on(async {
                let mut mock = tokio_test::io::Builder::new();
                pieces.iter().for_each(|piece| _ = mock.read(piece.as_bytes()));
                let mut stream = OneHead::new(mock.build(), Arc::default(), coordinator());
                let (mut all, mut buf) = (Vec::new(), vec![0; room]);
                loop {
                    let read = stream.read(&mut buf).await.expect("a mock does not fail");
                    if read == 0 {
                        break;
                    }
                    // No read goes on behind an empty line.
                    let (_, last) = buf[..read].split_at(read.saturating_sub(4));
                    let inner = memmem::find(&buf[..read], END).is_none_or(|at| at + 4 == read);
                    prop_assert!(inner, "{last:?}");
                    all.extend_from_slice(&buf[..read]);
                }
                prop_assert_eq!(all, pieces.concat().into_bytes());
                Ok(())
            })?;
        }
    }
}
