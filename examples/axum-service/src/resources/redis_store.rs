//! Redis behind a list of writes that have not landed yet.
//!
//! A write is put into the list and is done for its caller; one task sends the list now and then in one pipeline. So a
//! request never waits for a write, and stage Cache knows what is still to be done: the list. The newest write of a key
//! replaces an older one that waits; sending one twice changes nothing, so a batch without an answer is sent again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{AsyncCommands, RedisResult};
use shutdown_core::BoxError;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::sleep;

/// Writes that may wait; more are refused, but removals, which a reader would miss.
const MOST_PENDING: usize = 10_000;
/// Writes sent at once.
const BATCH: usize = 1000;
/// Between two tries to reach the server, while nobody waits for a flush: doubled each time, up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long an answer is waited for.
const ANSWER: Duration = Duration::from_millis(500);
/// And a connection.
const CONNECT: Duration = Duration::from_secs(1);

#[derive(Clone)]
enum Write {
    Put(Arc<[u8]>, Duration),
    Remove,
}

/// Writes in the order they came, by their number.
#[derive(Default)]
struct Pending {
    writes: BTreeMap<u64, (String, Write)>,
    newest: HashMap<String, u64>,
    taken: u64,
}

impl Pending {
    fn take(&mut self, key: String, write: Write) {
        if let Some(older) = self.newest.insert(key.clone(), self.taken) {
            self.writes.remove(&older);
        }
        self.writes.insert(self.taken, (key, write));
        self.taken += 1;
    }

    /// The number of the first one that waits; every one below has landed.
    fn first(&self) -> u64 {
        self.writes.first_key_value().map_or(self.taken, |(number, _)| *number)
    }

    fn batch(&self) -> Vec<(u64, String, Write)> {
        let first = self.writes.iter().take(BATCH);
        first.map(|(number, (key, write))| (*number, key.clone(), write.clone())).collect()
    }

    fn landed(&mut self, batch: &[(u64, String, Write)]) {
        for (number, key, _) in batch {
            if self.writes.remove(number).is_some() {
                self.newest.remove(key);
            }
        }
    }
}

struct Shared {
    connection: ConnectionManager,
    place: String,
    pending: Mutex<Pending>,
    dropped: AtomicU64,
    reachable: AtomicBool,
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

impl RedisStore {
    /// Starts the writer, which connects by itself.
    pub(super) fn start(client: redis::Client, interval: Duration) -> Self {
        let place = format!("redis://{}", client.get_connection_info().addr());
        // Tries are the writer's affair.
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(0)
            .set_connection_timeout(Some(CONNECT))
            .set_response_timeout(Some(ANSWER));
        let connection = ConnectionManager::new_lazy_with_config(client, config)
            .expect("it only refuses subscriptions without a receiver, and there are none");
        let shared = Arc::new(Shared {
            connection,
            place,
            pending: Mutex::default(),
            dropped: AtomicU64::new(0),
            reachable: AtomicBool::new(true),
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

    pub(super) async fn get(&self, key: &str) -> Option<Vec<u8>> {
        let shared = &self.shared;
        {
            let pending = shared.pending.lock();
            if let Some(number) = pending.newest.get(key) {
                return match &pending.writes[number].1 {
                    Write::Put(value, _) => Some(value.to_vec()),
                    Write::Remove => None,
                };
            }
        }
        if !shared.reachable.load(Ordering::Relaxed) {
            return None;
        }
        match shared.connection.clone().get(key).await {
            Ok(found) => found,
            Err(error) => {
                shared.lost(&error);
                shared.wake.notify_one();
                None
            }
        }
    }

    pub(super) fn put(&self, key: String, value: Vec<u8>, lives: Duration) {
        let mut pending = self.shared.pending.lock();
        if pending.writes.len() >= MOST_PENDING {
            // An older value of the key would now be wrong.
            pending.take(key, Write::Remove);
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        } else {
            pending.take(key, Write::Put(value.into(), lives));
        }
        drop(pending);
        self.shared.wake.notify_one();
    }

    pub(super) fn remove(&self, key: String) {
        self.shared.pending.lock().take(key, Write::Remove);
        self.shared.wake.notify_one();
    }

    /// Waits until what was taken by now has landed; as long as that takes.
    pub(super) async fn flush(&self) -> Result<(), BoxError> {
        let all = self.shared.pending.lock().taken;
        let _waiting = Flushing::new(&self.shared.flushing);
        let mut landed = self.shared.landed.subscribe();
        self.shared.wake.notify_one();
        // An error only when the writer is gone: somebody has closed the store.
        landed.wait_for(|first| *first >= all).await?;
        Ok(())
    }

    /// Says goodbye and hears it: afterwards the server has closed the connection. (Since 7.2 closing the socket is
    /// preferred to QUIT; but then nobody knows when the server has seen it.)
    pub(super) async fn close(&self) -> Result<(), BoxError> {
        self.writer.abort();
        if self.shared.reachable.load(Ordering::Relaxed) {
            let mut connection = self.shared.connection.clone();
            redis::cmd("QUIT").query_async::<()>(&mut connection).await?;
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
    fn lost(&self, error: &redis::RedisError) {
        if self.reachable.swap(false, Ordering::Relaxed) {
            let waiting = self.pending.lock().writes.len();
            tracing::warn!(cache = self.place, %error, waiting, "cache cannot be reached: reads miss, writes wait");
        }
    }

    fn found(&self) {
        if !self.reachable.swap(true, Ordering::Relaxed) {
            tracing::info!(cache = self.place, "cache reached again");
        }
    }

    async fn send(&self, batch: &[(u64, String, Write)]) -> RedisResult<()> {
        let mut connection = self.connection.clone();
        if batch.is_empty() {
            return redis::cmd("PING").query_async(&mut connection).await;
        }
        let mut pipeline = redis::pipe();
        for (_, key, write) in batch {
            match write {
                Write::Put(value, lives) => {
                    // PX 0 is refused.
                    let ms = u64::try_from(lives.as_millis()).unwrap_or(u64::MAX).max(1);
                    pipeline.cmd("SET").arg(key).arg(&value[..]).arg("PX").arg(ms).ignore()
                }
                Write::Remove => pipeline.del(key).ignore(),
            };
        }
        pipeline.query_async(&mut connection).await
    }

    /// Waits for a time, or until somebody begins to wait for a flush.
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
    // The first time whether or not there is something to send: so that an unreachable server is known at once.
    loop {
        let batch = shared.pending.lock().batch();
        match shared.send(&batch).await {
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
                // Whoever waits for a flush wakes this once; then there is a pause, however short.
                sleep(PAUSES.0).await;
                shared.pause(pause.saturating_sub(PAUSES.0)).await;
                pause = (pause * 2).min(PAUSES.1);
                continue;
            }
        }
        if shared.pending.lock().writes.is_empty() {
            shared.wake.notified().await;
            shared.pause(interval).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(value: &str) -> Write {
        Write::Put(value.as_bytes().into(), Duration::from_secs(1))
    }

    #[test]
    fn the_newest_write_of_a_key_is_the_one_that_is_sent_and_the_last_to_land() {
        let mut pending = Pending::default();
        pending.take("a".into(), put("1"));
        pending.take("b".into(), put("2"));
        let batch = pending.batch();
        // While the batch is on its way.
        pending.take("a".into(), Write::Remove);
        pending.landed(&batch);
        assert_eq!((pending.first(), pending.writes.len()), (2, 1));
        let rest = pending.batch();
        assert!(matches!(&rest[..], [(2, key, Write::Remove)] if key == "a"));
        pending.landed(&rest);
        assert_eq!((pending.first(), pending.newest.len()), (3, 0));
    }
}
