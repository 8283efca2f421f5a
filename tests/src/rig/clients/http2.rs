//! HTTP/2: connections with several streams at once, which move when they are told GOAWAY.

use std::error::Error;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::Mutex;

use super::{Dice, World, in_time};
use crate::rig::tally::{Done, Failed, Group, Loss};

/// Requests at once on each connection.
pub(super) const STREAMS: u64 = 4;

/// One connection, replaced when it ends, and the streams that share it.
pub(super) async fn connection(world: Arc<World>, mut dice: Dice) {
    let shared: Shared = Arc::default();
    let streams: Vec<_> = (0..STREAMS)
        .map(|_| {
            let dice = Dice::new(dice.roll());
            tokio::spawn(stream(Arc::clone(&world), Arc::clone(&shared), dice))
        })
        .collect();
    for stream in streams {
        stream.await.expect("a stream does not panic");
    }
}

type Shared = Arc<Mutex<Option<SendRequest<Empty<Bytes>>>>>;

async fn stream(world: Arc<World>, shared: Shared, mut dice: Dice) {
    let streamed = world.kind.streamed();
    while world.think(dice.ms(0..20)).await {
        let long = dice.roll().is_multiple_of(8);
        let result = request(&world, &shared, if long { "/stream?ms=200" } else { "/" }, &streamed).await;
        world.tallies.count(Group::Http2, result);
    }
}

async fn request(world: &World, shared: &Shared, path: &str, streamed: &[u8]) -> Result<Done, Failed> {
    let mut sender = sender(world, shared).await?;
    // The authority of a fixed name: the instance is where the connection leads.
    let request =
        Request::get(format!("http://rig.test{path}")).body(Empty::new()).expect("a request of ours");
    let answer = match in_time(path, sender.send_request(request)).await? {
        Ok(answer) => answer,
        Err(error) if is_unprocessed(&error) => return Ok(Done::Moved),
        Err(error) => return Err(Failed::by(path, &error)),
    };
    if answer.status() != StatusCode::OK {
        return Err(Failed::new(Loss::BadStatus, format!("{path}: {}", answer.status())));
    }
    let body = in_time("body", answer.into_body().collect()).await?;
    let body = body.map_err(|error| Failed::by(&format!("{path}, body"), &error))?.to_bytes();
    let is_whole = if path == "/" { world.kind.is_root(&body) } else { body == streamed };
    if is_whole {
        Ok(Done::Ok)
    } else {
        Err(Failed::new(Loss::WrongBody, format!("{path}: {} bytes", body.len())))
    }
}

/// The shared connection, or a new one if that takes no requests any more.
async fn sender(world: &World, shared: &Shared) -> Result<SendRequest<Empty<Bytes>>, Failed> {
    let mut shared = shared.lock().await;
    if let Some(sender) = &*shared
        && !sender.is_closed()
    {
        return Ok(sender.clone());
    }
    *shared = None;
    let (stream, _) = world.connect(None).await?;
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) =
        in_time("handshake", handshake).await?.map_err(|error| Failed::by("handshake", &error))?;
    // Its errors reach the requests.
    tokio::spawn(connection);
    *shared = Some(sender.clone());
    Ok(sender)
}

/// Whether the server has said, or could not but mean, that it has not looked at the request: the client sends it
/// again. It is refused by name, above the last stream of a GOAWAY, or was never sent because the connection takes no
/// more of them.
fn is_unprocessed(error: &hyper::Error) -> bool {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            let told =
                error.is_remote() && error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
            return told || error.reason() == Some(h2::Reason::REFUSED_STREAM);
        }
        next = error.source();
    }
    error.is_canceled()
}
