//! Tells all peers, over UDP sockets of its own.
//!
//! What the kernel does that one must know (Linux):
//!
//! * A datagram to a neighbour that does not answer ARP waits in the socket's send buffer for three seconds. With the default
//!   buffer 256 of them leave no room for one to a peer that lives. So the buffer is large, a full one is waited for beside
//!   everything else, and the peers that were heard from are told first.
//! * `IP_RECVERR` stays off: with it an ICMP error from a dead peer makes the next send fail, to whomever.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep_until};

use crate::error::BoxError;
use crate::peers::notice::identity::Identity;
use crate::peers::notice::keys::Keys;
use crate::peers::notice::outbox::{Letter, Outbox};
use crate::peers::notice::receiver::{BUFFER, unix_ms};
use crate::peers::notice::wire::{Ack, Datagram, MOST_BYTES, Notice, Refusal, Why};
use crate::peers::registry::PeerRegistry;
use crate::report::{TaskNote, ms};
use crate::stage::StageContext;

/// After so many datagrams the acknowledgements are looked at, so that they do not overflow their buffer.
const BREATH: usize = 64;
/// After so many that were heard, somebody else has a turn.
const MOST_HEARD: usize = 1024;

/// Tells the peers of a registry what becomes of this node. Clones are the same sender.
#[derive(Clone, Debug)]
pub struct Sender {
    identity: Identity,
    keys: Keys,
    peers: PeerRegistry,
}

/// What became of one notice.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Told {
    /// Each peer, in the order in which they were told.
    pub letters: Vec<Letter>,
    /// How long it took until every peer had been told once; `None` if it did not come to that.
    pub first_round: Option<Duration>,
}

impl Told {
    /// How many have acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.letters.iter().filter(|letter| letter.acknowledged.is_some()).count()
    }

    /// How many datagrams were sent.
    pub fn sends(&self) -> u64 {
        self.letters.iter().map(|letter| u64::from(letter.sends)).sum()
    }
}

impl Sender {
    /// Speaks for this node.
    pub fn new(identity: Identity, keys: Keys, peers: PeerRegistry) -> Self {
        Self { identity, keys, peers }
    }

    /// Tells every peer that this node leaves, as a task of stage Departure: until all have acknowledged, or the stage's time
    /// is up. What became of each stands in the report. `drain` is how long requests under way still have.
    ///
    /// A peer that does not acknowledge is no failure of the stop: it may be gone itself.
    ///
    /// # Errors
    ///
    /// No peer could be told, because there is no socket.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: who has been told has been told.
    pub async fn leave(&self, stage: StageContext, why: Why, drain: Duration) -> Result<(), BoxError> {
        let told = self.tell(self.identity.leaving(why, drain), stage.token.cancelled()).await?;
        let (peers, acknowledged, sends) = (told.letters.len(), told.acknowledged(), told.sends());
        // What went wrong first: the report has room for a hundred.
        let mut letters = told.letters;
        letters.sort_by_key(|letter| letter.acknowledged.is_some());
        letters.iter().for_each(|letter| stage.note(note(letter)));
        stage.log(move || {
            if peers == 0 {
                tracing::info!(target: "shutdown", "no peer is there to hear that this node leaves");
            } else if acknowledged == peers {
                tracing::info!(target: "shutdown", peers, sends, "every peer has heard that this node leaves");
            } else {
                let not = letters.iter().filter(|letter| letter.acknowledged.is_none()).take(3);
                let not: Vec<_> = not.map(|letter| letter.to.addr.to_string()).collect();
                tracing::warn!(
                    target: "shutdown", peers, acknowledged, sends, first = not.join(", "),
                    "not every peer has said that it heard that this node leaves"
                );
            }
        });
        Ok(())
    }

    /// Tells every peer that this node is there, and repeats it ever less often until each has acknowledged or `until` ends.
    /// Who acknowledges is up. Once this node [leaves](Self::leave) it tells nobody.
    ///
    /// # Errors
    ///
    /// No peer could be told, because there is no socket.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn announce_return(&self, until: impl Future<Output = ()>) -> Result<Told, BoxError> {
        match self.identity.returning() {
            Some(notice) => self.tell(notice, until).await,
            None => Ok(Told { letters: Vec::new(), first_round: None }),
        }
    }

    async fn tell(&self, notice: Notice, until: impl Future<Output = ()>) -> Result<Told, BoxError> {
        let mut outbox = Outbox::to_peers(notice, self.keys.clone(), &self.peers, unix_ms());
        let sockets = Sockets::for_these(outbox.letters())?;
        // Known to have room: however little time there is, the first round is sent.
        sockets.writable().await?;
        let start = Instant::now();
        let mut until = pin!(until);
        let mut first_round = None;
        loop {
            // What has been acknowledged by now is not told again, however late we are.
            self.hear(&mut outbox, &sockets, start);
            if outbox.settle() {
                break;
            }
            let next = outbox.next_round().map(|at| start + at);
            if next.is_some_and(|at| at <= Instant::now()) {
                outbox.begin_round(unix_ms());
                continue;
            }
            let blocked = self.send(&mut outbox, &sockets, start);
            if !blocked.any() && first_round.is_none() {
                first_round = Some(start.elapsed());
            }
            let due = async {
                match next {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = &mut until => break,
                () = sockets.ready(blocked) => {}
                () = due => {}
            }
        }
        Ok(Told { letters: outbox.letters().to_vec(), first_round })
    }

    /// Sends what this round has yet to send; which sockets have no room.
    fn send(&self, outbox: &mut Outbox, sockets: &Sockets, start: Instant) -> Blocked {
        let mut blocked = Blocked::default();
        loop {
            let mut sent = 0;
            let left = outbox.tell(|to, datagram| {
                if sent == BREATH || *blocked.of(to) {
                    return None;
                }
                let result = sockets.send(to, datagram);
                if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                    *blocked.of(to) = true;
                    return None;
                }
                sent += 1;
                if result.is_ok() {
                    self.identity.note_sent();
                }
                Some(result)
            });
            if !left || sent < BREATH {
                return blocked;
            }
            self.hear(outbox, sockets, start);
        }
    }

    /// Takes acknowledgements that are there; not more at once than a flood of others may hold up.
    fn hear(&self, outbox: &mut Outbox, sockets: &Sockets, start: Instant) {
        let mut buffer = [0; MOST_BYTES + 1];
        for socket in [&sockets.v4, &sockets.v6].into_iter().flatten() {
            for _ in 0..MOST_HEARD {
                let Ok((length, from)) = socket.try_recv_from(&mut buffer) else { break };
                match self.judge(&buffer[..length]) {
                    Ok(ack) => {
                        if let Some(to) = outbox.acknowledge(&ack, from, start.elapsed()) {
                            self.identity.note_acknowledged();
                            self.peers.acknowledged(ack.by, to.addr, outbox.kind(), unix_ms());
                        }
                    }
                    Err(cause) => self.identity.note_refused(cause),
                }
            }
        }
    }

    fn judge(&self, datagram: &[u8]) -> Result<Ack, Refusal> {
        match Datagram::decode(datagram, &self.keys)? {
            Datagram::Ack(ack) => Ok(ack),
            Datagram::Notice(_) => Err(Refusal::Unexpected),
        }
    }
}

fn note(letter: &Letter) -> TaskNote {
    let subject = match letter.to.id {
        Some(id) => format!("{} ({id})", letter.to.addr),
        None => letter.to.addr.to_string(),
    };
    let outcome = match (&letter.acknowledged, &letter.error) {
        (Some(_), _) => "acknowledged".to_owned(),
        (None, Some(error)) => format!("not sent: {error}"),
        (None, None) => "not acknowledged".to_owned(),
    };
    let note = TaskNote::new(subject, outcome).with("sends", letter.sends.into());
    match letter.acknowledged {
        Some(after) => note.with("after_ms", ms(after)),
        None => note,
    }
}

/// A socket for each family that is needed.
#[derive(Debug)]
struct Sockets {
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
}

/// Which sockets have no room.
#[derive(Clone, Copy, Debug, Default)]
struct Blocked {
    v4: bool,
    v6: bool,
}

impl Blocked {
    fn of(&mut self, to: SocketAddr) -> &mut bool {
        if to.is_ipv4() { &mut self.v4 } else { &mut self.v6 }
    }

    fn any(self) -> bool {
        self.v4 || self.v6
    }
}

impl Sockets {
    /// An error only if there is a recipient and no socket at all.
    fn for_these(letters: &[Letter]) -> io::Result<Self> {
        let wanted = |v4: bool| letters.iter().any(|letter| letter.to.addr.is_ipv4() == v4);
        let open = |v4| if wanted(v4) { open(v4).map(Some) } else { Ok(None) };
        match (open(true), open(false)) {
            (Ok(v4), Ok(v6)) => Ok(Self { v4, v6 }),
            (Ok(v4 @ Some(_)), Err(_)) => Ok(Self { v4, v6: None }),
            (Err(_), Ok(v6 @ Some(_))) => Ok(Self { v4: None, v6 }),
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    fn send(&self, to: SocketAddr, datagram: &[u8]) -> io::Result<usize> {
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        let Some(socket) = socket else { return Err(io::ErrorKind::AddrNotAvailable.into()) };
        match socket.try_send_to(datagram, to) {
            // Somebody else's, left over in the socket: some systems tell even without being asked. It is gone now.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                socket.try_send_to(datagram, to)
            }
            result => result,
        }
    }

    /// Waits until each has room, as a new one has at once.
    async fn writable(&self) -> io::Result<()> {
        for socket in [&self.v4, &self.v6].into_iter().flatten() {
            socket.writable().await?;
        }
        Ok(())
    }

    /// Resolves when there is something to hear, or room again in a socket that had none.
    async fn ready(&self, blocked: Blocked) {
        tokio::select! {
            () = ready(self.v4.as_ref(), blocked.v4) => {}
            () = ready(self.v6.as_ref(), blocked.v6) => {}
        }
    }
}

async fn ready(socket: Option<&UdpSocket>, blocked: bool) {
    let Some(socket) = socket else { return std::future::pending().await };
    let interest = if blocked { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
    // An error is found by whoever uses the socket.
    let _ = socket.ready(interest).await;
}

/// An own socket, so that acknowledgements come to who waits for them, also when another process takes over.
fn open(v4: bool) -> io::Result<UdpSocket> {
    let (domain, any) = match v4 {
        true => (Domain::IPV4, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))),
        false => (Domain::IPV6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))),
    };
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    if !v4 {
        socket.set_only_v6(true)?;
    }
    let _ = socket.set_send_buffer_size(BUFFER);
    let _ = socket.set_recv_buffer_size(BUFFER);
    socket.set_nonblocking(true)?;
    socket.bind(&any.into())?;
    UdpSocket::from_std(socket.into())
}
