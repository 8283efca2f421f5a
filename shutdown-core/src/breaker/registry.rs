//! One breaker a key, however many ask for it at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::time::Instant;

use crate::breaker::circuit::{Breaker, Snapshot};
use crate::breaker::config::Config;
use crate::breaker::record::Record;
use crate::sync::{AtomicU64, Ordering};

/// The breakers of a program, by key, all with one [`Config`].
#[derive(Debug)]
pub struct Breakers {
    config: Config,
    born: Instant,
    all: RwLock<BTreeMap<Arc<str>, Arc<Breaker>>>,
    opened: Arc<AtomicU64>,
}

impl Breakers {
    /// An empty registry. No time that it is given later may be before `now`.
    pub fn new(config: Config, now: Instant) -> Self {
        Self { config, born: now, all: RwLock::default(), opened: Arc::new(AtomicU64::new(0)) }
    }

    /// What every breaker here is like.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The breaker of `key`, made closed if there is none. Keep it: this takes a lock.
    pub fn get(&self, key: &str) -> Arc<Breaker> {
        if let Some(known) = self.all.read().get(key) {
            return Arc::clone(known);
        }
        let key: Arc<str> = key.into();
        // Looked for once more under the lock that makes it: of two who come at once one makes it.
        let mut all = self.all.write();
        let made = || Breaker::counted(Arc::clone(&key), self.config, self.born, Arc::clone(&self.opened));
        Arc::clone(all.entry(Arc::clone(&key)).or_insert_with(|| Arc::new(made())))
    }

    /// Forgets the breaker of `key`, and with it its series; whether there was one. Who still holds it may use it.
    pub fn remove(&self, key: &str) -> bool {
        self.all.write().remove(key).is_some()
    }

    /// How often any breaker has opened, those removed since included.
    pub fn opened_total(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// One moment of each, by key. It changes nothing: one that is open and whose time is over shows half-open.
    pub fn snapshot(&self, now: Instant) -> Vec<Snapshot> {
        self.all.read().values().map(|breaker| breaker.snapshot(now)).collect()
    }

    /// One moment of each, to be written down.
    pub fn export(&self, now: Instant) -> Vec<Record> {
        self.snapshot(now).into_iter().map(Record::from).collect()
    }

    /// Brings back what was written down `age` ago, by wall clock and never negative; how many were restored.
    ///
    /// * One that was open stays open for what remained less `age`, and never longer than its sleep. Where nothing says
    ///   what remained, it is taken for a whole sleep.
    /// * One that was half-open, and one with nothing left, is half-open.
    /// * One that was closed is made when it is asked for: closed, with an empty window.
    /// * A breaker that has seen a result already knows better and is left alone; of two records of one key the first
    ///   counts; a record without a key is passed over.
    pub fn import(&self, records: &[Record], age: Duration, now: Instant) -> usize {
        let mut seen = BTreeSet::new();
        records
            .iter()
            .filter(|record| !record.peer.is_empty() && seen.insert(&*record.peer))
            .filter(|record| {
                let remaining = record.remaining(age, self.config.settings().sleep);
                remaining.is_some_and(|remaining| self.get(&record.peer).restore(remaining, now))
            })
            .count()
    }
}
