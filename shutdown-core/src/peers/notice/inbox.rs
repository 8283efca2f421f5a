//! What becomes of a datagram that comes: no socket, no clock. [`Receiver`](super::Receiver) brings both.
//!
//! A datagram that is refused changes nothing and gets no answer, whatever the cause: only a count tells.

use std::net::SocketAddr;
use std::time::Duration;

use crate::peers::notice::identity::Identity;
use crate::peers::notice::keys::Keys;
use crate::peers::notice::wire::{Ack, Datagram, Kind, Notice, Refusal};
use crate::peers::registry::{Effect, PeerRegistry, WINDOW, ms};

/// Judges what comes, and has the registry act on it.
#[derive(Debug)]
pub struct Inbox {
    identity: Identity,
    keys: Keys,
    peers: PeerRegistry,
}

/// What a notice has done, and what is to be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Heard {
    /// The notice.
    pub notice: Notice,
    /// What it has changed.
    pub effect: Effect,
    /// The acknowledgement to send back, if one is due.
    pub answer: Option<Vec<u8>>,
}

impl Inbox {
    /// Hears notices for this node.
    pub fn new(identity: Identity, keys: Keys, peers: PeerRegistry) -> Self {
        Self { identity, keys, peers }
    }

    /// Takes a datagram from `from` at `now_ms`, when it has been hearing for `heard_for`: what was sent before that may have been
    /// heard by an earlier run, whose memory died with it.
    ///
    /// # Errors
    ///
    /// The first check that it does not pass. Then nothing has changed but that check's count.
    pub fn receive(
        &self,
        datagram: &[u8],
        from: SocketAddr,
        heard_for: Duration,
        now_ms: u64,
    ) -> Result<Heard, Refusal> {
        let judged = match Datagram::decode(datagram, &self.keys) {
            Ok(Datagram::Notice(notice)) => self.judge(notice, from, heard_for, now_ms),
            Ok(Datagram::Ack(_)) => Err(Refusal::Unexpected),
            Err(cause) => Err(cause),
        };
        match &judged {
            Ok(_) => self.identity.note_received(),
            Err(cause) => self.identity.note_refused(*cause),
        }
        judged
    }

    /// Counts an answer.
    pub(super) fn note_answered(&self) {
        self.identity.note_answered();
    }

    fn judge(
        &self,
        mut notice: Notice,
        from: SocketAddr,
        heard_for: Duration,
        now_ms: u64,
    ) -> Result<Heard, Refusal> {
        let identity = &self.identity;
        if notice.cluster != identity.cluster {
            return Err(Refusal::Cluster);
        }
        if notice.sent_at.abs_diff(now_ms) > ms(WINDOW) {
            return Err(Refusal::Window);
        }
        // From now backwards: a clock that is set does not make it deaf. Both times are cut to the millisecond before.
        if notice.sent_at < now_ms.saturating_sub(ms(heard_for).saturating_add(1)) {
            return Err(Refusal::BeforeStart);
        }
        if notice.node == identity.node {
            return Err(Refusal::OwnNode);
        }
        if notice.incarnation > now_ms.saturating_add(ms(WINDOW)) {
            return Err(Refusal::FutureIncarnation);
        }
        // Another machine's loopback is not ours.
        let reaches_us = |endpoint: &SocketAddr| {
            let (ip, from) = (endpoint.ip(), from.ip().to_canonical());
            !ip.is_unspecified() && (!ip.is_loopback() || from.is_loopback())
        };
        notice.endpoints.retain(reaches_us);
        let effect = self.peers.heard(&notice, now_ms);
        if effect == Effect::Outdated {
            return Err(Refusal::OldIncarnation);
        }
        // Who leaves does not tell anybody who comes that it is there.
        let due = notice.ack_wanted && !(notice.kind == Kind::Return && identity.leaves());
        let answer = due.then(|| {
            let ack = Ack {
                node: notice.node,
                incarnation: notice.incarnation,
                seq: notice.seq,
                attempt: notice.attempt,
                sent_at: now_ms,
                cluster: identity.cluster,
                by: identity.node,
            };
            ack.encode(&self.keys)
        });
        Ok(Heard { notice, effect, answer })
    }
}
