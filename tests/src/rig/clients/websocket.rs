//! WebSockets: messages that must be echoed, until the server says goodbye in its way.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::{Dice, World, in_time};
use crate::rig::balancer::Instance;
use crate::rig::servers::Goodbye;
use crate::rig::tally::{Done, Failed, Group, Loss};

/// An echo that was on its way for so long was lost before the cut, not by it.
const ECHO: Duration = Duration::from_secs(1);

/// One socket, opened anew whenever it has ended.
pub(super) async fn socket(world: Arc<World>, mut dice: Dice) {
    while world.think(dice.ms(1..50)).await {
        if let Err(failed) = session(&world, &mut dice).await {
            world.tallies.count(Group::WebSocket, Err(failed));
        }
    }
}

/// From the handshake to the end; each echo counts. Before the first one a tunnel is not taken for open.
async fn session(world: &World, dice: &mut Dice) -> Result<(), Failed> {
    let (stream, instance) = world.connect(None).await?;
    let open = in_time("/ws", client_async(format!("ws://{}/ws", instance.addr), stream)).await?;
    let (mut socket, _) = open.map_err(|error| failed("handshake", error))?;
    let guard = instance.socket();
    for number in 0_u64.. {
        let pause = dice.ms(20..100);
        let ended = tokio::select! {
            message = socket.next() => Some(message),
            go_on = world.think(pause) => {
                if !go_on {
                    // Nothing is in flight: the end is ours.
                    let _ = socket.close(None).await;
                    return Ok(());
                }
                None
            }
        };
        let ended = match ended {
            Some(message) => Some((message, Duration::ZERO)),
            None => echo(&mut socket, number).await?,
        };
        let Some((message, on_its_way)) = ended else {
            world.tallies.count(Group::WebSocket, Ok(Done::Ok));
            continue;
        };
        if number == 0 && world.kind.goodbye() == Goodbye::Cut && matches!(message, None | Some(Err(_))) {
            // Pingora closes some tunnels right after their 101, whether the proxy stops or not
            // (cloudflare/pingora#946): the client, which has not had an echo yet, connects anew.
        } else if goodbye(world, &mut socket, &instance, message, on_its_way).await? {
            guard.cut();
        }
        world.tallies.count(Group::WebSocket, Ok(Done::Moved));
        return Ok(());
    }
    Ok(())
}

type Received = Option<Result<Message, Error>>;

/// Sends a message. What came instead of its echo, and how long that had been on its way.
async fn echo(
    socket: &mut WebSocketStream<TcpStream>,
    number: u64,
) -> Result<Option<(Received, Duration)>, Failed> {
    let begin = Instant::now();
    let sent = Message::text(number.to_string());
    if let Err(error) = in_time("send", socket.send(sent.clone())).await? {
        return Ok(Some((Some(Err(error)), Duration::ZERO)));
    }
    match in_time("echo", socket.next()).await? {
        Some(Ok(message)) if message == sent => Ok(None),
        Some(Ok(Message::Text(text))) if text.starts_with(|c: char| c.is_ascii_digit()) => {
            Err(Failed::new(Loss::WrongBody, format!("{text} is not the echo of {number}")))
        }
        other => Ok(Some((other, begin.elapsed()))),
    }
}

/// Looks at the end of a socket, which begins with `message`; whether the server has cut it as its kind does.
async fn goodbye(
    world: &World,
    socket: &mut WebSocketStream<TcpStream>,
    instance: &Instance,
    message: Received,
    on_its_way: Duration,
) -> Result<bool, Failed> {
    match world.kind.goodbye() {
        Goodbye::Told => told(socket, message).await.map(|()| false),
        Goodbye::None => Err(unexpected("the end of a WebSocket", message)),
        Goodbye::Cut => {
            let told_ago = instance.told_ago();
            if told_ago.is_none_or(|ago| ago < world.lame_duck) {
                let what = format!("the server was told {told_ago:?} ago");
                return Err(unexpected(&what, message));
            }
            if on_its_way > ECHO {
                return Err(unexpected(&format!("{on_its_way:?} without an echo"), message));
            }
            match message {
                None | Some(Err(_)) => Ok(true),
                message => Err(unexpected("not a cut", message)),
            }
        }
    }
}

/// The message that says so, then Close 1001, then the end.
async fn told(socket: &mut WebSocketStream<TcpStream>, message: Received) -> Result<(), Failed> {
    match &message {
        Some(Ok(Message::Text(text)))
            if serde_json::from_str::<Value>(text).is_ok_and(|text| text["type"] == "server_shutdown") => {}
        _ => return Err(unexpected("not the message of the shutdown", message)),
    }
    loop {
        match in_time("close", socket.next()).await? {
            // The echo of what was sent before we were told.
            Some(Ok(Message::Text(_))) => {}
            Some(Ok(Message::Close(Some(frame)))) if frame.code == CloseCode::Away => break,
            other => return Err(unexpected("not Close 1001", other)),
        }
    }
    // Reading on answers the Close, and the server then ends the connection.
    match in_time("end", socket.next()).await? {
        None => Ok(()),
        other => Err(unexpected("after Close 1001", other)),
    }
}

fn unexpected(what: &str, message: Received) -> Failed {
    match message {
        None => Failed::new(Loss::Eof, format!("{what}: the end")),
        Some(Ok(message)) => Failed::new(Loss::WrongBody, format!("{what}: {message:?}")),
        Some(Err(error)) => failed(what, error),
    }
}

fn failed(what: &str, error: Error) -> Failed {
    match error {
        Error::ConnectionClosed | Error::AlreadyClosed | Error::Protocol(_) => {
            Failed { loss: Loss::Eof, ..Failed::by(what, &error) }
        }
        Error::Http(ref answer) => Failed::new(Loss::BadStatus, format!("{what}: {}", answer.status())),
        error => Failed::by(what, &error),
    }
}
