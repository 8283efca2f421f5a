//! Looking at the first bytes of a connection and reading them again.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// The most that can be looked at: as much as the preface of HTTP/2 (RFC 9113 §3.4).
const MOST: usize = 24;

/// A stream whose first bytes can be looked at before they are read.
#[derive(Debug)]
pub struct FirstBytes<S> {
    stream: S,
    bytes: [u8; MOST],
    len: usize,
    /// How much of it has been read again. Nothing is added once it has begun.
    taken: usize,
}

impl<S> FirstBytes<S> {
    /// Wraps a stream that nothing has been read from.
    pub fn new(stream: S) -> Self {
        Self { stream, bytes: [0; MOST], len: 0, taken: 0 }
    }

    /// The wrapped stream.
    pub fn get_ref(&self) -> &S {
        &self.stream
    }

    /// What has been looked at.
    pub fn seen(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl<S: AsyncRead + Unpin> FirstBytes<S> {
    /// Whether the stream begins with `prefix`, of at most 24 bytes: reads no further than it takes to tell, and
    /// keeps what it has read. `false` when the stream ends before that.
    ///
    /// # Errors
    ///
    /// What the stream said.
    ///
    /// # Panics
    ///
    /// If `prefix` is longer.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: what was read is kept.
    pub async fn begins_with(&mut self, prefix: &[u8]) -> io::Result<bool> {
        assert!(prefix.len() <= MOST, "at most {MOST} bytes can be looked at");
        while self.len < prefix.len() && prefix.starts_with(self.seen()) {
            let read = self.stream.read(&mut self.bytes[self.len..prefix.len()]).await?;
            if read == 0 {
                return Ok(false);
            }
            self.len += read;
        }
        Ok(self.seen().starts_with(prefix))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for FirstBytes<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.taken == this.len {
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        }
        let rest = &this.bytes[this.taken..this.len];
        let fits = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..fits]);
        this.taken += fits;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FirstBytes<S> {
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
    use super::*;

    #[tokio::test]
    async fn what_was_looked_at_is_read_again_and_no_more_is_read_than_it_takes_to_tell() {
        let prefix = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        for (input, begins) in [
            (&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nrest"[..], true),
            (b"GET / HTTP/1.1\r\n\r\n", false),
            (b"PRI * HT", false),
            (b"", false),
        ] {
            let mut stream = FirstBytes::new(input);
            assert_eq!(stream.begins_with(prefix).await.unwrap(), begins);
            assert!(stream.seen().len() <= prefix.len());
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            assert_eq!(all, input);
        }
    }
}
