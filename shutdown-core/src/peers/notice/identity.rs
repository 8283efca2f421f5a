//! Who speaks: what every notice of this run has in common, and how many there were.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::peers::id::{Id, Incarnation};
use crate::peers::notice::wire::{Kind, Notice, Refusal, Why};
use crate::peers::registry::canonical;

/// This node, as its notices name it. Clones are the same node: they share the numbering and the counts.
#[derive(Clone, Debug)]
pub struct Identity {
    pub(crate) node: Id,
    pub(crate) cluster: Id,
    incarnation: Incarnation,
    endpoints: Arc<[SocketAddr]>,
    run: Arc<Run>,
}

#[derive(Debug, Default)]
struct Run {
    /// Twice the number of notices made, and one more once this node leaves: a notice that it is there must have been made
    /// before the one that it leaves, or not be made at all.
    notices: AtomicU64,
    sent: AtomicU64,
    acknowledged: AtomicU64,
    received: AtomicU64,
    answered: AtomicU64,
    refused: [AtomicU64; Refusal::ALL.len()],
}

/// How many notices there were, both ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct NoticeCounts {
    /// Datagrams sent, repetitions included.
    pub sent: u64,
    /// Peers that have acknowledged one of our notices, once for each notice.
    pub acknowledged: u64,
    /// Notices that came and passed every check, repetitions included.
    pub received: u64,
    /// Acknowledgements given.
    pub answered: u64,
    /// Datagrams refused, whatever the cause.
    pub refused: u64,
}

impl Identity {
    /// The node of this name in the cluster of this name, in this run of it. `endpoints` are the addresses that others may
    /// know it by: where it serves, where it hears notices; the first eight are told.
    pub fn new(node: &str, cluster: &str, incarnation: Incarnation, endpoints: Vec<SocketAddr>) -> Self {
        Self {
            node: Id::of(node),
            cluster: Id::of(cluster),
            incarnation,
            endpoints: endpoints.into_iter().map(canonical).collect(),
            run: Arc::default(),
        }
    }

    /// Which node this is.
    pub fn node(&self) -> Id {
        self.node
    }

    /// The counts so far.
    pub fn counts(&self) -> NoticeCounts {
        let run = &self.run;
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        NoticeCounts {
            sent: load(&run.sent),
            acknowledged: load(&run.acknowledged),
            received: load(&run.received),
            answered: load(&run.answered),
            refused: run.refused.iter().map(load).sum(),
        }
    }

    /// How many datagrams were refused for each cause.
    pub fn refused(&self) -> impl Iterator<Item = (Refusal, u64)> + '_ {
        let load = |cause| self.run.refused[cause as usize].load(Ordering::Relaxed);
        Refusal::ALL.into_iter().map(move |cause| (cause, load(cause)))
    }

    /// The notice that this node leaves; from here on nobody is told that it stays. `drain` is how long requests under way
    /// still have.
    pub fn leaving(&self, why: Why, drain: Duration) -> Notice {
        let drain_ms = u32::try_from(drain.as_millis()).unwrap_or(u32::MAX);
        // Relaxed, here and below: the word says nothing about other memory.
        let made =
            self.run.notices.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |made| Some((made + 2) | 1));
        Notice { why, drain_ms, ..self.notice(Kind::Leaving, made.unwrap_or_default() / 2 + 1) }
    }

    /// The notice that this node is there; `None` once it leaves.
    pub fn returning(&self) -> Option<Notice> {
        let stays = |made: u64| (made & 1 == 0).then_some(made + 2);
        let made = self.run.notices.fetch_update(Ordering::Relaxed, Ordering::Relaxed, stays).ok()?;
        Some(self.notice(Kind::Return, made / 2 + 1))
    }

    /// An [`Outbox`](super::Outbox) fills in what differs from one attempt to the next.
    fn notice(&self, kind: Kind, seq: u64) -> Notice {
        Notice {
            kind,
            ack_wanted: true,
            restarting: false,
            why: Why::Unsaid,
            attempt: 0,
            incarnation: self.incarnation.get(),
            seq,
            sent_at: 0,
            drain_ms: 0,
            node: self.node,
            cluster: self.cluster,
            endpoints: self.endpoints.to_vec(),
        }
    }

    pub(crate) fn leaves(&self) -> bool {
        self.run.notices.load(Ordering::Relaxed) & 1 == 1
    }

    pub(crate) fn note_sent(&self) {
        self.run.sent.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_acknowledged(&self) {
        self.run.acknowledged.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_received(&self) {
        self.run.received.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_answered(&self) {
        self.run.answered.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_refused(&self, cause: Refusal) {
        self.run.refused[cause as usize].fetch_add(1, Ordering::Relaxed);
    }
}
