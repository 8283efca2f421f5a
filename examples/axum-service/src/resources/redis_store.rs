//! Redis behind a list of writes that have not landed yet.
//!
//! A write is put into the list and is done for its caller; one task sends the list now and then, in one pipeline. So a
//! request never waits for a write, and stage Cache knows what is still to be done: the list. The newest write of a key
//! replaces an older one that waits. A batch without an answer is sent again; what another instance has written in between
//! is then overwritten, until the entry's time is over.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{AsyncCommands, RedisError, RedisResult};
use shutdown_core::BoxError;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

/// Writes that may wait, and what they may weigh: more are refused.
const MOST_PENDING: usize = 10_000;
const MOST_BYTES: usize = 32 * 1024 * 1024;
/// Removals may wait beyond that, because a reader would miss them.
const MOST_REMOVALS: usize = 10 * MOST_PENDING;
/// Writes sent at once, and what they weigh; a single one may be heavier.
const BATCH: usize = 1000;
const BATCH_BYTES: usize = 512 * 1024;
/// Between two tries to reach the server, while nobody waits for a flush: doubled each time, up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long an answer is waited for.
const ANSWER: Duration = Duration::from_millis(500);
/// And a connection.
const CONNECT: Duration = Duration::from_secs(1);

#[derive(Clone)]
enum Write {
    /// A value, and until when it is good.
    Put(Arc<[u8]>, Instant),
    Remove,
}

impl Write {
    fn weight(&self) -> usize {
        match self {
            Self::Put(value, _) => value.len(),
            Self::Remove => 0,
        }
    }
}

/// Writes in the order they came, by their number.
#[derive(Default)]
struct Pending {
    writes: BTreeMap<u64, (String, Write)>,
    newest: HashMap<String, u64>,
    taken: u64,
    bytes: usize,
}

impl Pending {
    /// Takes a write; `false` if too many wait. A value that is refused takes an older one that waits with it.
    fn take(&mut self, key: String, write: Write) -> bool {
        if let Some(older) = self.newest.remove(&key)
            && let Some((_, older)) = self.writes.remove(&older)
        {
            self.bytes -= older.weight();
        }
        let room = match &write {
            Write::Put(..) => self.writes.len() < MOST_PENDING && self.bytes + write.weight() <= MOST_BYTES,
            Write::Remove => self.writes.len() < MOST_REMOVALS,
        };
        if room {
            self.bytes += write.weight();
            self.newest.insert(key.clone(), self.taken);
            self.writes.insert(self.taken, (key, write));
        }
        self.taken += 1;
        room
    }

    /// The number of the first one that waits; every one below has landed.
    fn first(&self) -> u64 {
        self.writes.first_key_value().map_or(self.taken, |(number, _)| *number)
    }

    fn batch(&self) -> Vec<(u64, String, Write)> {
        let mut bytes = 0;
        let light = self.writes.iter().take(BATCH).take_while(|(_, (_, write))| {
            let first = bytes == 0;
            bytes += write.weight() + 1;
            first || bytes <= BATCH_BYTES
        });
        light.map(|(number, (key, write))| (*number, key.clone(), write.clone())).collect()
    }

    fn landed(&mut self, batch: &[(u64, String, Write)]) {
        for (number, key, write) in batch {
            // Not one that was replaced meanwhile.
            if self.writes.remove(number).is_some() {
                self.bytes -= write.weight();
                self.newest.remove(key);
            }
        }
    }
}

struct Shared {
    client: redis::Client,
    connection: Mutex<ConnectionManager>,
    place: String,
    pending: Mutex<Pending>,
    dropped: AtomicU64,
    reachable: AtomicBool,
    /// What the last try failed with, while it does.
    trouble: Mutex<Option<String>>,
    /// There is something to do.
    wake: Notify,
    /// How many wait for a flush.
    flushing: watch::Sender<usize>,
    /// [`Pending::first`].
    landed: watch::Sender<u64>,
}

pub(super) struct RedisStore {
    shared: Arc<Shared>,
    writer: AbortHandle,
}

fn connection(client: &redis::Client) -> ConnectionManager {
    // Tries are the writer's affair.
    let config = ConnectionManagerConfig::new()
        .set_number_of_retries(0)
        .set_connection_timeout(Some(CONNECT))
        .set_response_timeout(Some(ANSWER));
    ConnectionManager::new_lazy_with_config(client.clone(), config)
        .expect("it only refuses subscriptions without a receiver, and there are none")
}

impl RedisStore {
    /// Starts the writer, which connects by itself.
    pub(super) fn start(client: redis::Client, interval: Duration) -> Self {
        let shared = Arc::new(Shared {
            connection: Mutex::new(connection(&client)),
            place: format!("redis://{}", client.get_connection_info().addr()),
            client,
            pending: Mutex::default(),
            dropped: AtomicU64::new(0),
            // Until the writer has found out, reads are tried.
            reachable: AtomicBool::new(true),
            trouble: Mutex::default(),
            wake: Notify::new(),
            flushing: watch::Sender::new(0),
            landed: watch::Sender::new(0),
        });
        let writer = tokio::spawn(write(Arc::clone(&shared), interval)).abort_handle();
        Self { shared, writer }
    }

    pub(super) fn pending(&self) -> usize {
        self.shared.pending.lock().writes.len()
    }

    pub(super) fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    pub(super) fn is_reachable(&self) -> bool {
        self.shared.reachable.load(Ordering::Relaxed)
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.shared.trouble.lock().clone()
    }

    pub(super) async fn get(&self, key: &str) -> Option<Vec<u8>> {
        let shared = &self.shared;
        {
            let pending = shared.pending.lock();
            if let Some(number) = pending.newest.get(key) {
                return match &pending.writes[number].1 {
                    Write::Put(value, until) if *until > Instant::now() => Some(value.to_vec()),
                    Write::Put(..) | Write::Remove => None,
                };
            }
        }
        if !self.is_reachable() {
            return None;
        }
        let mut connection = shared.connection.lock().clone();
        match connection.get(key).await {
            Ok(found) => found,
            // The server's answer: somebody else has put something else there.
            Err(error) if error.code().is_some() => None,
            Err(error) => {
                shared.lost(&error);
                shared.wake.notify_one();
                None
            }
        }
    }

    pub(super) fn put(&self, key: String, value: Vec<u8>, lives: Duration) {
        self.take(key, Write::Put(value.into(), Instant::now() + lives));
    }

    pub(super) fn remove(&self, key: String) {
        self.take(key, Write::Remove);
    }

    fn take(&self, key: String, write: Write) {
        if !self.shared.pending.lock().take(key, write) {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.shared.wake.notify_one();
    }

    /// Waits until what was taken by now has landed; as long as that takes.
    pub(super) async fn flush(&self) -> Result<(), BoxError> {
        let all = self.shared.pending.lock().taken;
        if self.pending() == 0 {
            return Ok(());
        }
        let _waiting = Flushing::new(&self.shared.flushing);
        let mut landed = self.shared.landed.subscribe();
        self.shared.wake.notify_one();
        landed.wait_for(|first| *first >= all).await.map(drop).map_err(Into::into)
    }

    /// Says goodbye and hears it: afterwards the server has closed the connection. (Since 7.2 closing the socket is
    /// preferred to QUIT; but then nobody knows when the server has seen it.)
    pub(super) async fn close(&self) -> Result<(), BoxError> {
        self.writer.abort();
        if self.is_reachable() {
            let mut connection = self.shared.connection.lock().clone();
            match redis::cmd("QUIT").query_async::<()>(&mut connection).await {
                // The server has closed it before: that is what was wanted.
                Err(error) if error.is_connection_dropped() || error.is_io_error() => {}
                quit => quit?,
            }
        }
        Ok(())
    }
}

impl Drop for RedisStore {
    fn drop(&mut self) {
        self.writer.abort();
    }
}

/// Somebody waits for a flush, until this is dropped.
struct Flushing<'a>(&'a watch::Sender<usize>);

impl<'a> Flushing<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for Flushing<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Shared {
    fn lost(&self, error: &RedisError) {
        *self.trouble.lock() = Some(error.to_string());
        if self.reachable.swap(false, Ordering::Relaxed) {
            let waiting = self.pending.lock().writes.len();
            tracing::warn!(cache = self.place, %error, waiting, "cache cannot be reached: reads miss, writes wait");
        }
    }

    fn found(&self) {
        *self.trouble.lock() = None;
        if !self.reachable.swap(true, Ordering::Relaxed) {
            tracing::info!(cache = self.place, "cache reached again");
        }
    }

    async fn send(&self, batch: &[(u64, String, Write)]) -> RedisResult<()> {
        let mut connection = self.connection.lock().clone();
        if batch.is_empty() {
            return redis::cmd("PING").query_async(&mut connection).await;
        }
        let now = Instant::now();
        let mut pipeline = redis::pipe();
        for (_, key, write) in batch {
            let left = match write {
                Write::Put(_, until) => until.saturating_duration_since(now).as_millis(),
                Write::Remove => 0,
            };
            match write {
                // PX 0 is refused, and it would be gone at once.
                Write::Put(value, _) if left > 0 => {
                    let ms = u64::try_from(left).unwrap_or(u64::MAX);
                    pipeline.cmd("SET").arg(key).arg(&value[..]).arg("PX").arg(ms).ignore()
                }
                Write::Put(..) | Write::Remove => pipeline.del(key).ignore(),
            };
        }
        pipeline.query_async(&mut connection).await
    }

    /// Sends, and once more over a new connection if the old one has been closed meanwhile: an idle one may be.
    async fn send_surely(&self, batch: &[(u64, String, Write)]) -> RedisResult<()> {
        match self.send(batch).await {
            Err(error) if error.is_timeout() => {
                // Nobody may be at its other end any more, and it would never say so.
                *self.connection.lock() = connection(&self.client);
                Err(error)
            }
            Err(error) if error.is_connection_dropped() => self.send(batch).await,
            sent => sent,
        }
    }

    /// Waits for a time, or until somebody waits for a flush.
    async fn pause(&self, time: Duration) {
        let mut flushing = self.flushing.subscribe();
        tokio::select! {
            () = sleep(time) => {}
            _ = flushing.wait_for(|waiting| *waiting > 0) => {}
        }
    }
}

/// Sends what waits; connects again when the connection is lost. Never ends.
async fn write(shared: Arc<Shared>, interval: Duration) {
    let mut pause = PAUSES.0;
    // First nothing but a PING: an unreachable server is known at once.
    let mut batch = Vec::new();
    loop {
        match shared.send_surely(&batch).await {
            Ok(()) => {
                shared.found();
                pause = PAUSES.0;
                let first = {
                    let mut pending = shared.pending.lock();
                    pending.landed(&batch);
                    pending.first()
                };
                shared.landed.send_replace(first);
            }
            Err(error) => {
                shared.lost(&error);
                // However many wait for a flush: some pause.
                sleep(PAUSES.0).await;
                shared.pause(pause.saturating_sub(PAUSES.0)).await;
                pause = (pause * 2).min(PAUSES.1);
                batch = shared.pending.lock().batch();
                continue;
            }
        }
        let idle = shared.pending.lock().writes.is_empty();
        if idle {
            shared.wake.notified().await;
        }
        // A reader that found it unreachable wants to know how it is, not to wait for writes.
        if shared.reachable.load(Ordering::Relaxed) {
            shared.pause(interval).await;
        }
        batch = shared.pending.lock().batch();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(bytes: usize) -> Write {
        Write::Put(vec![0; bytes].into(), Instant::now() + Duration::from_secs(1))
    }

    #[test]
    fn the_newest_write_of_a_key_is_the_one_that_is_sent_and_the_last_to_land() {
        let mut pending = Pending::default();
        assert!(pending.take("a".into(), put(1)) && pending.take("b".into(), put(2)));
        let batch = pending.batch();
        // While the batch is on its way.
        pending.take("a".into(), Write::Remove);
        pending.landed(&batch);
        assert_eq!((pending.first(), pending.writes.len(), pending.bytes), (2, 1, 0));
        let rest = pending.batch();
        assert!(matches!(&rest[..], [(2, key, Write::Remove)] if key == "a"));
        pending.landed(&rest);
        assert_eq!((pending.first(), pending.newest.len()), (3, 0));
    }

    #[test]
    fn what_waits_is_bounded_in_number_and_bytes_and_a_refused_value_leaves_no_older_one() {
        let mut pending = Pending::default();
        assert!(pending.take("heavy".into(), put(MOST_BYTES)));
        assert!(!pending.take("one more".into(), put(1)));
        // Its older value is gone with the refused one: nobody reads what is not true any more.
        assert!(!pending.take("heavy".into(), put(MOST_BYTES + 1)));
        assert_eq!((pending.writes.len(), pending.bytes, pending.first()), (0, 0, pending.taken));
        let taken = (0..2 * MOST_PENDING).filter(|n| pending.take(n.to_string(), put(1))).count();
        assert_eq!(taken, MOST_PENDING);
        assert!(pending.take("removal".into(), Write::Remove));
        let removed = (0..2 * MOST_REMOVALS).filter(|n| pending.take(format!("r{n}"), Write::Remove)).count();
        assert!(removed < MOST_REMOVALS && pending.writes.len() == MOST_REMOVALS);
    }

    #[test]
    fn a_batch_is_bounded_in_bytes_and_never_empty_while_something_waits() {
        let mut pending = Pending::default();
        for n in 0..10 {
            pending.take(n.to_string(), put(BATCH_BYTES * 2 / 3));
        }
        while !pending.writes.is_empty() {
            let batch = pending.batch();
            assert_eq!(batch.len(), 1);
            pending.landed(&batch);
        }
    }
}
