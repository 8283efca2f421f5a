//! Thousands of WebSocket clients, in a process of their own.
//!
//! ```text
//! ws-clients COUNT stay   ADDR[/ADMIN]…     each connects, and waits for its end
//! ws-clients COUNT move   ADDR[/ADMIN]…     each connects, and when it is sent away connects to a node that is ready
//! ```
//!
//! It prints `connected COUNT`, with `move` also `moved COUNT`, and at the end one line of JSON. With `move` the end
//! is the end of stdin.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::json;
use shutdown_tests::client::get;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

type Socket = WebSocketStream<TcpStream>;

/// Handshakes at a time: the accept queue has an end.
const AT_ONCE: usize = 200;
/// How often a client connects whose socket is closed right after the handshake.
const TRIES: usize = 10;
/// How often a node's readiness is asked for.
const PROBE: Duration = Duration::from_millis(50);

/// A node that clients can be sent to.
struct Node {
    addr: SocketAddr,
    admin: Option<SocketAddr>,
    ready: AtomicBool,
}

struct Nodes {
    all: Vec<Node>,
    next: AtomicUsize,
    /// Sockets that were closed right after the handshake.
    again: AtomicUsize,
    handshakes: Semaphore,
}

impl Nodes {
    /// A node that is ready, one after another.
    fn pick(&self) -> Option<SocketAddr> {
        let from = self.next.fetch_add(1, Ordering::Relaxed);
        let ready = |node: &&Node| node.ready.load(Ordering::Acquire);
        let count = self.all.len();
        (0..count).map(|step| &self.all[(from + step) % count]).find(ready).map(|node| node.addr)
    }

    /// A socket that has echoed once. A proxy's tunnel may be closed right after its 101 (cloudflare/pingora#946): then
    /// once more, and counted.
    async fn connect(&self) -> Result<Socket, String> {
        for _ in 0..TRIES {
            let mut socket = self.shake_hands().await?;
            if socket.send(Message::text("here")).await.is_ok()
                && matches!(socket.next().await, Some(Ok(Message::Text(text))) if text == "here")
            {
                return Ok(socket);
            }
            self.again.fetch_add(1, Ordering::Relaxed);
        }
        Err(format!("closed {TRIES} times right after the handshake"))
    }

    async fn shake_hands(&self) -> Result<Socket, String> {
        let addr = self.pick().ok_or("no node is ready")?;
        let _turn = self.handshakes.acquire().await.map_err(|error| error.to_string())?;
        let socket = TcpSocket::new_v4().map_err(|error| error.to_string())?;
        let stream = socket.connect(addr).await.map_err(|error| format!("{addr}: {error}"))?;
        let config = WebSocketConfig::default().read_buffer_size(1024).write_buffer_size(0);
        let shaken = client_async_with_config(format!("ws://{addr}/ws"), stream, Some(config)).await;
        shaken.map(|(socket, _)| socket).map_err(|error| format!("{addr}: {error}"))
    }
}

/// How a socket ended.
struct End {
    message: bool,
    close: Option<u16>,
    at: Instant,
}

async fn end(socket: &mut Socket) -> End {
    let (mut message, mut close) = (false, None);
    // The library answers the Close while it is polled for what comes after it.
    while let Some(Ok(received)) = socket.next().await {
        match received {
            Message::Text(text) => message |= text.contains("server_shutdown"),
            Message::Close(frame) => close = frame.map(|frame| u16::from(frame.code)),
            _ => {}
        }
    }
    End { message, close, at: Instant::now() }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let count: usize = args.next().ok_or("COUNT is missing")?.parse()?;
    let moves = match args.next().as_deref() {
        Some("stay") => false,
        Some("move") => true,
        other => return Err(format!("{other:?} is neither stay nor move").into()),
    };
    let all = args.map(|node| parse(&node)).collect::<Result<Vec<_>, _>>()?;
    let nodes = Arc::new(Nodes {
        all,
        next: AtomicUsize::new(0),
        again: AtomicUsize::new(0),
        handshakes: Semaphore::new(AT_ONCE),
    });
    for node in 0..nodes.all.len() {
        let nodes = Arc::clone(&nodes);
        // A thread of its own: the plain client blocks.
        std::thread::spawn(move || probe(&nodes.all[node]));
    }

    let mut connecting = JoinSet::new();
    for _ in 0..count {
        let nodes = Arc::clone(&nodes);
        connecting.spawn(async move { nodes.connect().await });
    }
    let mut sockets = Vec::with_capacity(count);
    while let Some(socket) = connecting.join_next().await {
        sockets.push(socket??);
    }
    println!("connected {}", sockets.len());

    if moves { stay_and_move(sockets, &nodes).await } else { stay(sockets, &nodes).await }
}

/// Asks a node whether it is ready, until the process ends.
fn probe(node: &Node) {
    let Some(admin) = node.admin else { return };
    loop {
        let ready = get(admin, "/readyz").is_ok_and(|answer| answer.status == 200);
        node.ready.store(ready, Ordering::Release);
        std::thread::park_timeout(PROBE);
    }
}

fn parse(node: &str) -> Result<Node, Box<dyn std::error::Error>> {
    let (addr, admin) = match node.split_once('/') {
        Some((addr, admin)) => (addr, Some(admin.parse()?)),
        None => (node, None),
    };
    Ok(Node { addr: addr.parse()?, admin, ready: AtomicBool::new(true) })
}

async fn stay(sockets: Vec<Socket>, nodes: &Nodes) -> Result<(), Box<dyn std::error::Error>> {
    let mut ends = JoinSet::new();
    for mut socket in sockets {
        ends.spawn(async move { end(&mut socket).await });
    }
    let ends = ends.join_all().await;
    let first = ends.iter().map(|end| end.at).min().ok_or("no clients")?;
    let mut spread = BTreeMap::<u128, usize>::new();
    for end in &ends {
        *spread.entry((end.at - first).as_millis() / 100).or_default() += 1;
    }
    let last = spread.keys().last().copied().unwrap_or_default();
    let spread: Vec<_> = (0..=last).map(|slot| spread.get(&slot).copied().unwrap_or_default()).collect();
    let of = |wanted: fn(&&End) -> bool| ends.iter().filter(wanted).count();
    print(&json!({
        "message": of(|end| end.message),
        "close_1001": of(|end| end.close == Some(1001)),
        "cut": of(|end| end.close.is_none()),
        "per_100_ms": spread,
        "closed_after_handshake": nodes.again.load(Ordering::Relaxed),
    }))
}

async fn stay_and_move(sockets: Vec<Socket>, nodes: &Arc<Nodes>) -> Result<(), Box<dyn std::error::Error>> {
    let count = sockets.len();
    let moved = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for mut socket in sockets {
        let (nodes, moved) = (Arc::clone(nodes), Arc::clone(&moved));
        clients.spawn(async move {
            let mut moves = 0;
            loop {
                end(&mut socket).await;
                moves += 1;
                socket = match nodes.connect().await {
                    Ok(socket) => socket,
                    Err(error) => return Err(error),
                };
                if moved.fetch_add(1, Ordering::AcqRel) + 1 == count {
                    println!("moved {count}");
                }
                // Sent away again: it had landed on a node that was leaving.
                if moves > 1 {
                    return Ok::<_, String>(moves);
                }
            }
        });
    }
    let mut stdin = Vec::new();
    let mut again = 0;
    let mut failed = Vec::new();
    tokio::select! {
        read = async { tokio::io::stdin().read_to_end(&mut stdin).await } => { read?; }
        () = async {
            while let Some(client) = clients.join_next().await {
                match client {
                    Ok(Ok(_)) => again += 1,
                    Ok(Err(error)) => failed.push(error),
                    Err(error) => failed.push(error.to_string()),
                }
            }
            std::future::pending().await
        } => {}
    }
    print(&json!({ "moves": moved.load(Ordering::Acquire), "moved_again": again, "failed": failed }))
}

fn print(line: &serde_json::Value) -> Result<(), Box<dyn std::error::Error>> {
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
