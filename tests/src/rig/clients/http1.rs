//! HTTP/1: fresh, busy and long-idle connections, slow uploads, slow downloads.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONNECTION, CONTENT_LENGTH, HOST};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;

use super::{Dice, World, in_time};
use crate::rig::tally::{Done, Failed, Group, Loss};

/// A download is larger than all buffers on its way.
const DOWNLOAD: usize = 8 * 1024 * 1024;
/// The receive buffer of a slow reader.
const SMALL: u32 = 64 * 1024;
/// An upload comes in this many pieces of this size, each a byte of its own.
const PIECES: u8 = 8;
const PIECE: usize = 2048;

type Body = UnsyncBoxBody<Bytes, Infallible>;
type Result<T = Done> = std::result::Result<T, Failed>;

/// A connection for each request.
pub(super) async fn fresh(world: Arc<World>, mut dice: Dice) {
    while world.think(dice.ms(0..4)).await {
        let mut connection = None;
        let result = root(&world, &mut connection).await;
        world.tallies.count(Group::Fresh, result);
    }
}

/// Keep-alive, milliseconds between requests.
pub(super) async fn busy(world: Arc<World>, mut dice: Dice) {
    let mut connection = None;
    while world.think(dice.ms(0..20)).await {
        let result = root(&world, &mut connection).await;
        world.tallies.count(Group::Busy, result);
    }
}

/// Keep-alive, seconds between requests.
pub(super) async fn idle(world: Arc<World>, mut dice: Dice) {
    let mut connection = None;
    // The first at once: a connection must exist to be idle.
    let mut pause = Duration::ZERO;
    while world.think(pause).await {
        let result = root(&world, &mut connection).await;
        world.tallies.count(Group::Idle, result);
        pause = dice.ms(500..2000);
    }
}

/// Bodies sent in pieces.
pub(super) async fn upload(world: Arc<World>, mut dice: Dice) {
    let mut connection = None;
    while world.think(dice.ms(0..50)).await {
        let result = echo(&world, &mut connection, &mut dice).await;
        world.tallies.count(Group::Upload, result);
    }
}

/// Bodies read in pieces, over a small receive buffer.
pub(super) async fn download(world: Arc<World>, mut dice: Dice) {
    let expected: Vec<u8> = (0..=250).cycle().take(DOWNLOAD).collect();
    while world.think(dice.ms(100..1000)).await {
        let result = bytes(&world, &expected).await;
        world.tallies.count(Group::Download, result);
    }
}

async fn root(world: &World, connection: &mut Option<Connection>) -> Result {
    let kept = take(world, connection, None).await?;
    let (answer, kept) = kept.send("GET", "/", None).await?;
    let body = whole(answer).await?;
    *connection = kept;
    if world.kind.is_root(&body) { Ok(Done::Ok) } else { Err(wrong_body("/", &body)) }
}

async fn echo(world: &World, connection: &mut Option<Connection>, dice: &mut Dice) -> Result {
    let pause = dice.ms(200..500) / u32::from(PIECES);
    let pieces = stream::iter(0..PIECES).then(move |piece| async move {
        tokio::time::sleep(pause).await;
        Ok(Frame::data(Bytes::from(vec![b'A' + piece; PIECE])))
    });
    let kept = take(world, connection, None).await?;
    let (answer, kept) =
        kept.send("POST", "/echo", Some(UnsyncBoxBody::new(StreamBody::new(pieces)))).await?;
    let body = whole(answer).await?;
    *connection = kept;
    let sent: Vec<u8> = (0..PIECES).flat_map(|piece| [b'A' + piece; PIECE]).collect();
    if body == sent { Ok(Done::Ok) } else { Err(wrong_body("/echo", &body)) }
}

async fn bytes(world: &World, expected: &[u8]) -> Result {
    let connection = take(world, &mut None, Some(SMALL)).await?;
    let (answer, _kept) = connection.send("GET", &format!("/bytes?n={DOWNLOAD}"), None).await?;
    let mut body = answer.into_body();
    let (mut read, mut rested) = (0, 0);
    while let Some(frame) = in_time("download", body.frame()).await? {
        let frame = frame.map_err(|e| Failed::by(&format!("download, after {read} bytes"), &e))?;
        let piece = frame.into_data().unwrap_or_default();
        if expected.get(read..read + piece.len()) != Some(&piece[..]) {
            return Err(Failed::new(Loss::WrongBody, format!("download: other bytes after {read}")));
        }
        read += piece.len();
        // A pause for each 128 KiB: 64 of them make it last a second and more.
        if read - rested >= 128 * 1024 {
            rested = read;
            tokio::time::sleep(Duration::from_millis(16)).await;
        }
    }
    if read == expected.len() {
        Ok(Done::Ok)
    } else {
        Err(Failed::new(Loss::Eof, format!("download: the end after {read} bytes")))
    }
}

/// An HTTP/1 connection.
struct Connection {
    sender: SendRequest<Body>,
    host: String,
    /// Whether an answer came over it before.
    used: bool,
}

/// The connection that was kept, or else a new one.
async fn take(
    world: &World,
    kept: &mut Option<Connection>,
    receive_buffer: Option<u32>,
) -> Result<Connection> {
    if let Some(kept) = kept.take() {
        return Ok(kept);
    }
    let (stream, instance) = world.connect(receive_buffer).await?;
    let mut http1 = http1::Builder::new();
    if let Some(size) = receive_buffer {
        // No reading ahead.
        http1.max_buf_size(size as usize);
    }
    let (sender, connection) =
        http1.handshake(TokioIo::new(stream)).await.map_err(|e| Failed::by("handshake", &e))?;
    // Its errors reach the request.
    tokio::spawn(connection);
    Ok(Connection { sender, host: instance.addr.to_string(), used: false })
}

impl Connection {
    /// One request; its answer, and the connection if it may be used again.
    async fn send(
        mut self,
        method: &str,
        path: &str,
        body: Option<Body>,
    ) -> Result<(Response<Incoming>, Option<Self>)> {
        let what = format!("{method} {path} on a {} connection", if self.used { "kept" } else { "new" });
        let mut request = Request::builder().method(method).uri(path).header(HOST, &self.host);
        if body.is_some() {
            request = request.header(CONTENT_LENGTH, usize::from(PIECES) * PIECE);
        }
        let body = body.unwrap_or_else(|| UnsyncBoxBody::new(Empty::new()));
        let request = request.body(body).expect("a request of ours");
        let answer = in_time(&what, async {
            self.sender.ready().await?;
            self.sender.send_request(request).await
        });
        let answer = answer.await?.map_err(|error| Failed::by(&what, &error))?;
        if answer.status() != StatusCode::OK {
            return Err(Failed::new(Loss::BadStatus, format!("{what}: {}", answer.status())));
        }
        let leave = answer.headers().get(CONNECTION).is_some_and(|value| value == "close");
        self.used = true;
        Ok((answer, (!leave).then_some(self)))
    }
}

async fn whole(answer: Response<Incoming>) -> Result<Bytes> {
    let body = in_time("body", answer.into_body().collect()).await?;
    Ok(body.map_err(|error| Failed::by("body", &error))?.to_bytes())
}

fn wrong_body(path: &str, body: &[u8]) -> Failed {
    let start = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
    Failed::new(Loss::WrongBody, format!("{path}: {} bytes: {start:?}", body.len()))
}
