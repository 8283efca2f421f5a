//! Hears notices on a UDP socket and answers them.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::time::Instant;

use crate::peers::notice::identity::Identity;
use crate::peers::notice::inbox::{Heard, Inbox};
use crate::peers::notice::keys::Keys;
use crate::peers::notice::wire::{Kind, MOST_BYTES, Refusal};
use crate::peers::registry::{Effect, PeerRegistry};

/// What is asked of the system for the buffers of a socket. Linux's default holds 256 small datagrams, fewer than a cluster
/// may send at once; it gives at most `net.core.rmem_max` (`wmem_max`), twice.
pub(super) const BUFFER: usize = 4 * 1024 * 1024;
/// After an error of the socket's own.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket on which notices come; they wait in it until a [`Receiver`] runs.
#[derive(Debug)]
pub struct Bound {
    socket: std::net::UdpSocket,
    since: Instant,
}

impl Bound {
    /// Where they come.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

/// Opens a socket to hear notices on: for one process alone, with buffers for many at once. IPv6 means IPv6 only. What was
/// sent before this moment will be refused.
///
/// # Errors
///
/// What the system said; another process that listens there is [`io::ErrorKind::AddrInUse`].
pub fn bind(addr: SocketAddr) -> io::Result<Bound> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Smaller ones work as well; a burst may then be heard at its repetition.
    let _ = socket.set_recv_buffer_size(BUFFER);
    let _ = socket.set_send_buffer_size(BUFFER);
    socket.set_nonblocking(true)?;
    // Neither SO_REUSEADDR nor SO_REUSEPORT: with the one the last to come would take all, with the other each a share.
    socket.bind(&addr.into())?;
    Ok(Bound { socket: socket.into(), since: Instant::now() })
}

/// Hears notices until it is dropped.
#[derive(Debug)]
#[must_use = "nothing is heard while it does not run"]
pub struct Receiver {
    bound: Bound,
    inbox: Inbox,
}

impl Receiver {
    /// Hears for this node on a socket of [`bind`].
    pub fn new(bound: Bound, identity: Identity, keys: Keys, peers: PeerRegistry) -> Self {
        Self { bound, inbox: Inbox::new(identity, keys, peers) }
    }

    /// Hears and answers. Give it a thread of its own where a flood of forged datagrams must not slow down anything else: each
    /// costs a system call and, if it looks like one of ours, a MAC.
    ///
    /// # Errors
    ///
    /// The socket cannot be used; else it does not end.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a notice whose acknowledgement was not sent is sent again.
    pub async fn run(self) -> io::Result<std::convert::Infallible> {
        let Self { bound: Bound { socket, since }, inbox } = self;
        let socket = UdpSocket::from_std(socket)?;
        // One byte more than any notice has: a longer datagram is cut by the system, and would else pass for a shorter one.
        let mut buffer = [0; MOST_BYTES + 1];
        let mut said = Vec::new();
        loop {
            match socket.recv_from(&mut buffer).await {
                Ok((length, from)) => {
                    let heard = match inbox.receive(&buffer[..length], from, since.elapsed(), unix_ms()) {
                        Ok(heard) => heard,
                        Err(cause) => {
                            complain(cause, from, &mut said);
                            continue;
                        }
                    };
                    log(&heard, from);
                    if let Some(answer) = heard.answer {
                        // First: who gets it may look. One that does not leave now is given again at the repetition.
                        inbox.note_answered();
                        let _ = socket.try_send_to(&answer, from);
                    }
                }
                Err(error) => {
                    tracing::debug!(target: "shutdown", %error, "hearing notices");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Says once what is wrong with a member of the cluster: who has no key is not worth a line.
fn complain(cause: Refusal, from: SocketAddr, said: &mut Vec<Refusal>) {
    let what = match cause {
        Refusal::OwnNode => {
            "a notice in this node's own name: another node has its id, or it is its own peer"
        }
        Refusal::Window | Refusal::FutureIncarnation => {
            "a notice that is not of now: its clock or ours is off, or somebody repeats it"
        }
        Refusal::Cluster => "a notice of another cluster with the same key",
        _ => return,
    };
    if !said.contains(&cause) {
        said.push(cause);
        tracing::warn!(target: "shutdown", %from, %cause, "{what}");
    }
}

fn log(heard: &Heard, from: SocketAddr) {
    let notice = &heard.notice;
    let (peer, incarnation) = (notice.node, notice.incarnation);
    match heard.effect {
        Effect::Departed => {
            let (why, drain_ms) = (notice.why, notice.drain_ms);
            tracing::info!(target: "shutdown", %peer, %from, incarnation, %why, drain_ms, "a peer leaves: no new requests to it");
        }
        Effect::Returned => {
            tracing::info!(target: "shutdown", %peer, %from, incarnation, "a peer is back: it is sent requests again");
        }
        Effect::Noted if notice.kind == Kind::Leaving => {
            tracing::debug!(target: "shutdown", %peer, %from, incarnation, "a node leaves that was sent no requests");
        }
        _ => {}
    }
}

/// The time of day; 0 before 1970.
pub(super) fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
