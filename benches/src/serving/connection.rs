//! Both ends of a connection in memory: hyper's server around a candidate, and a client that costs next to nothing.
//!
//! The client writes bytes made beforehand and looks only for the end of the answer: what is measured is the server.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tower::Service;

use crate::serving::servers::Server;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    /// The word for it on the command line.
    pub(crate) const fn key(self) -> &'static str {
        match self {
            Self::Http1 => "h1",
            Self::Http2 => "h2",
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP/1",
            Self::Http2 => "HTTP/2",
        }
    }

    pub(crate) fn named(key: &str) -> Option<Self> {
        [Self::Http1, Self::Http2].into_iter().find(|protocol| protocol.key() == key)
    }
}

/// What the pipe holds in each direction; more than any request or answer here.
const PIPE: usize = 16 * 1024;

/// The service behind every candidate: a short answer at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hello;

impl Service<Request<Incoming>> for Hello {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Incoming>) -> Self::Future {
        ready(Ok(Response::new(Full::new(Bytes::from_static(ANSWER)))))
    }
}

const ANSWER: &[u8] = b"hello\n";

/// Opens a connection on the current runtime. Its `Date` header is off: it reads the clock, and would make one
/// request in many thousands do more than the others.
pub(crate) async fn connect<S: Server>(candidate: &S, protocol: Protocol) -> Client {
    let (near, far) = tokio::io::duplex(PIPE);
    let far = TokioIo::new(far);
    let service = TowerToHyperService::new(candidate.service());
    match protocol {
        Protocol::Http1 => {
            let mut builder = http1::Builder::new();
            tokio::spawn(candidate.watch(builder.auto_date_header(false).serve_connection(far, service)));
            Client::Http1(Http1 { pipe: near })
        }
        Protocol::Http2 => {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            tokio::spawn(candidate.watch(builder.auto_date_header(false).serve_connection(far, service)));
            Client::Http2(Http2::open(near).await)
        }
    }
}

/// The client's end.
pub(crate) enum Client {
    Http1(Http1),
    Http2(Http2),
}

impl Client {
    /// Sends so many requests, each after the whole answer to the one before.
    pub(crate) async fn requests(&mut self, count: u32) {
        for _ in 0..count {
            match self {
                Self::Http1(client) => client.request().await,
                Self::Http2(client) => client.request().await,
            }
        }
    }
}

const OPEN: &str = "the server lives as long as its runtime";

pub(crate) struct Http1 {
    pipe: DuplexStream,
}

impl Http1 {
    async fn request(&mut self) {
        self.pipe.write_all(b"GET /hello HTTP/1.1\r\nhost: in.memory\r\n\r\n").await.expect(OPEN);
        let mut answer = [0; 1024];
        let mut length = 0;
        while !answer[..length].ends_with(ANSWER) {
            let more = self.pipe.read(&mut answer[length..]).await.expect(OPEN);
            assert!(more > 0, "{OPEN}");
            length += more;
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "nobody asked for a shutdown");
    }
}

/// Frames as RFC 9113 §4.1 has them: length (3 bytes), type, flags, stream (4 bytes).
const FRAME_HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const WINDOW_UPDATE: u8 = 8;
/// On DATA and HEADERS: the answer ends here. On SETTINGS: an acknowledgement.
const END_STREAM_OR_ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;

pub(crate) struct Http2 {
    pipe: DuplexStream,
    /// What was read and is not yet understood.
    input: Vec<u8>,
    stream: u32,
}

impl Http2 {
    async fn open(pipe: DuplexStream) -> Self {
        let mut client = Self { pipe, input: Vec::with_capacity(PIPE), stream: 1 };
        client.pipe.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect(OPEN);
        client.send(SETTINGS, 0, 0, &[]).await;
        // The largest window there is (RFC 9113 §6.9.1): no request waits for another update.
        client.send(WINDOW_UPDATE, 0, 0, &(0x7fff_ffff_u32 - 0xffff).to_be_bytes()).await;
        client
    }

    async fn request(&mut self) {
        // HPACK (RFC 7541 appendix A): GET, http, / by their numbers, then `:authority` as it is.
        const BLOCK: &[u8] = b"\x82\x86\x84\x01\x09in.memory";
        self.send(HEADERS, END_STREAM_OR_ACK | END_HEADERS, self.stream, BLOCK).await;
        while !self.frame().await {}
        self.stream += 2;
    }

    /// Takes a frame; `true`: it ends the answer.
    async fn frame(&mut self) -> bool {
        self.fill(FRAME_HEAD).await;
        let head: [u8; FRAME_HEAD] = self.input[..FRAME_HEAD].try_into().expect("so many were asked for");
        let [a, b, c, kind, flags, stream @ ..] = head;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        self.fill(FRAME_HEAD + length).await;
        self.input.drain(..FRAME_HEAD + length);
        match kind {
            DATA | HEADERS => {
                assert_eq!(stream, self.stream.to_be_bytes(), "one request at a time");
                return flags & END_STREAM_OR_ACK != 0;
            }
            SETTINGS if flags & END_STREAM_OR_ACK == 0 => {
                self.send(SETTINGS, END_STREAM_OR_ACK, 0, &[]).await
            }
            SETTINGS | WINDOW_UPDATE => {}
            _ => panic!("frame of type {kind}: nobody asked for a shutdown"),
        }
        false
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = [0; 64];
        let length = u32::try_from(payload.len()).expect("frames here are short");
        frame[..3].copy_from_slice(&length.to_be_bytes()[1..]);
        frame[3..5].copy_from_slice(&[kind, flags]);
        frame[5..FRAME_HEAD].copy_from_slice(&stream.to_be_bytes());
        frame[FRAME_HEAD..FRAME_HEAD + payload.len()].copy_from_slice(payload);
        self.pipe.write_all(&frame[..FRAME_HEAD + payload.len()]).await.expect(OPEN);
    }

    /// Reads until at least so many bytes are there.
    async fn fill(&mut self, enough: usize) {
        while self.input.len() < enough {
            let more = self.pipe.read_buf(&mut self.input).await.expect(OPEN);
            assert!(more > 0, "{OPEN}");
        }
    }
}
