//! Who is still to be told, and when again: no socket, no clock. [`Sender`](super::Sender) brings both.
//!
//! All peers are told at once and again at 50, 150, 350 and 750 ms, each time those that have not acknowledged. Against
//! independent losses of 30 % each way that leaves some three in a thousand unheard, with two datagrams a peer; three sends
//! without acknowledgement leave ten times as many with three.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::peers::id::Id;
use crate::peers::notice::keys::Keys;
use crate::peers::notice::wire::{Ack, Kind, Notice};
use crate::peers::registry::{Peer, PeerRegistry, PeerState};
use crate::random::fraction;

/// When all that have not acknowledged are told again, each up to a fifth earlier or later: senders that began at the same
/// moment, as in a power cut, do not stay in step.
pub const ROUNDS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(350),
    Duration::from_millis(750),
];
const JITTER: f64 = 0.2;
/// After these a RETURN, which has no deadline, is told at twice the distance each time, up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A peer to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipient {
    /// Where it hears notices.
    pub addr: SocketAddr,
    /// Who it is, if that is known: then only that node can acknowledge. Else whoever answers from this address can.
    pub id: Option<Id>,
}

/// One notice on its way to all peers.
#[derive(Debug)]
pub struct Outbox {
    notice: Notice,
    keys: Keys,
    letters: Vec<Letter>,
    /// Those that have not acknowledged, in the order they are told.
    pending: Vec<usize>,
    by_id: HashMap<Id, usize>,
    by_addr: HashMap<SocketAddr, usize>,
    /// Rounds that have begun.
    rounds: u32,
    datagram: Vec<u8>,
}

/// What has become of one recipient.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Letter {
    /// Who.
    pub to: Recipient,
    /// How often the notice was sent.
    pub sends: u32,
    /// When it was acknowledged, from the first round on.
    pub acknowledged: Option<Duration>,
    /// Why the last attempt was not sent.
    pub error: Option<String>,
    /// The last round in which it was tried.
    round: u32,
}

impl Outbox {
    /// `notice` to every peer that hears notices, those first that were heard from. Who has left is not told that somebody
    /// leaves; it is told that somebody is back, because a departure that only the state knows of may be over.
    pub fn to_peers(notice: Notice, keys: Keys, peers: &PeerRegistry, now_ms: u64) -> Self {
        let mut peers = peers.peers(now_ms);
        let has_left = |peer: &Peer| matches!(peer.state, PeerState::Draining | PeerState::Departed);
        peers.retain(|peer| notice.kind == Kind::Return || !has_left(peer));
        peers.sort_by_key(|peer| peer.state != PeerState::Up);
        // What discovery says who somebody is does not say whose acknowledgement counts.
        let id = |peer: &Peer| peer.id.filter(|_| peer.authenticated);
        let recipient = |peer: Peer| Some(Recipient { addr: peer.notices?, id: id(&peer) });
        Self::new(notice, keys, peers.into_iter().filter_map(recipient).collect())
    }

    /// `notice` to these peers, in this order. What differs from one attempt to the next is filled in.
    pub fn new(notice: Notice, keys: Keys, recipients: Vec<Recipient>) -> Self {
        let letter = |to| Letter { to, sends: 0, acknowledged: None, error: None, round: 0 };
        let numbered = || recipients.iter().enumerate();
        Self {
            by_id: numbered().filter_map(|(index, to)| Some((to.id?, index))).collect(),
            by_addr: numbered()
                .filter(|(_, to)| to.id.is_none())
                .map(|(index, to)| (to.addr, index))
                .collect(),
            pending: (0..recipients.len()).collect(),
            letters: recipients.into_iter().map(letter).collect(),
            notice,
            keys,
            rounds: 0,
            datagram: Vec::new(),
        }
    }

    /// When the next round begins, from the first one on; `None` if there is none to come.
    pub fn next_round(&self) -> Option<Duration> {
        let another = match self.notice.kind {
            Kind::Leaving => (self.rounds as usize) < ROUNDS.len(),
            Kind::Return => true,
        };
        (another && !self.pending.is_empty()).then(|| round_at(self.rounds, self.notice.incarnation))
    }

    /// Begins the next round at `now_ms`.
    pub fn begin_round(&mut self, now_ms: u64) {
        self.notice.attempt = u8::try_from(self.rounds).unwrap_or(u8::MAX);
        self.notice.sent_at = now_ms;
        self.datagram = self.notice.encode(&self.keys);
        self.rounds += 1;
    }

    /// The datagram of this round.
    pub fn datagram(&self) -> &[u8] {
        &self.datagram
    }

    /// Gives every peer that has yet to be told in this round to `send`, which says what became of it; `None`: not now.
    /// Whether one was left.
    pub fn tell(
        &mut self,
        mut send: impl FnMut(SocketAddr, &[u8]) -> Option<std::io::Result<usize>>,
    ) -> bool {
        let mut left = false;
        for index in &self.pending {
            let letter = &mut self.letters[*index];
            if letter.round == self.rounds || letter.acknowledged.is_some() {
                continue;
            }
            match send(letter.to.addr, &self.datagram) {
                None => left = true,
                Some(sent) => {
                    letter.round = self.rounds;
                    letter.sends += u32::from(sent.is_ok());
                    letter.error = sent.err().map(|error| error.to_string());
                }
            }
        }
        left
    }

    /// Takes an acknowledgement that came from `from`; who is it that has heard for the first time.
    pub fn acknowledge(&mut self, ack: &Ack, from: SocketAddr, now: Duration) -> Option<Recipient> {
        let notice = &self.notice;
        let ours = ack.node == notice.node && ack.cluster == notice.cluster;
        if !ours || (ack.incarnation, ack.seq) != (notice.incarnation, notice.seq) || ack.by == notice.node {
            return None;
        }
        let index = *self.by_id.get(&ack.by).or_else(|| self.by_addr.get(&from))?;
        let letter = &mut self.letters[index];
        if letter.acknowledged.is_some() {
            return None;
        }
        letter.acknowledged = Some(now);
        letter.to.id = Some(ack.by);
        // From here on it is that node's, and that node is nowhere else.
        self.by_id.insert(ack.by, index);
        self.by_addr.remove(&from);
        let to = letter.to;
        Some(to)
    }

    /// Lets go of those that have acknowledged; whether all have.
    pub fn settle(&mut self) -> bool {
        let letters = &self.letters;
        self.pending.retain(|index| letters[*index].acknowledged.is_none());
        self.pending.is_empty()
    }

    /// What it says.
    pub fn kind(&self) -> Kind {
        self.notice.kind
    }

    /// What has become of each.
    pub fn letters(&self) -> &[Letter] {
        &self.letters
    }
}

/// When a round begins, from the first one on.
fn round_at(round: u32, seed: u64) -> Duration {
    let last = ROUNDS[ROUNDS.len() - 1];
    let at = match ROUNDS.get(round as usize) {
        Some(at) => *at,
        None => {
            let later = round + 1 - ROUNDS.len() as u32;
            let mut at = last;
            let mut pause = last;
            for _ in 0..later {
                at += pause;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            at
        }
    };
    at.mul_f64(1.0 + JITTER * (2.0 * fraction(seed ^ u64::from(round)) - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn rounds_come_in_order_and_a_fifth_off_at_most() {
        for seed in 0..200 {
            let mut before = Duration::ZERO;
            for (round, planned) in (0..5).zip(ROUNDS) {
                let at = round_at(round, seed);
                assert!(at >= planned.mul_f64(0.8) && at <= planned.mul_f64(1.2), "{round}: {at:?}");
                assert!(round == 0 || at > before);
                before = at;
            }
        }
        assert_ne!(round_at(3, 1), round_at(3, 2));
    }

    #[test]
    fn a_return_is_told_for_ever_and_ever_less_often() {
        let planned = [750, 1_500, 3_000, 6_000, 12_000, 24_000, 48_000, 96_000, 156_000];
        for (round, planned) in (4..).zip(planned) {
            let at = round_at(round, 7);
            assert!(at >= ms(planned).mul_f64(0.8) && at <= ms(planned).mul_f64(1.2), "{round}: {at:?}");
        }
    }
}
