//! A cache by its URL: in the process, or Redis. Writes are taken at once and land a little later.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use shutdown_core::BoxError;

use super::redis_store::RedisStore;

/// What stage Cache needs of a cache; [`close_cache`](super::close_cache) does the rest.
pub trait CacheStage: Send + Sync {
    /// What people call it.
    fn name(&self) -> &str;

    /// Writes that were taken and have not landed.
    fn pending(&self) -> usize;

    /// Why they have not, if it knows.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// Whether it has a connection that can be closed.
    fn is_connected(&self) -> bool;

    /// How it did since the start.
    fn statistics(&self) -> Statistics;

    /// Waits until every write that was taken has landed.
    ///
    /// # Errors
    ///
    /// The cache's own; what has not landed stays pending.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    fn flush(&self) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Ends its connection.
    ///
    /// # Errors
    ///
    /// The cache's own.
    fn close(&self) -> impl Future<Output = Result<(), BoxError>> + Send;
}

/// How a cache did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Reads that found something.
    pub hits: u64,
    /// Reads that did not.
    pub misses: u64,
    /// Entries that were removed because what they told had changed.
    pub invalidations: u64,
    /// Writes that were refused because too many were pending.
    pub dropped: u64,
}

impl Statistics {
    /// Hits of all reads, in percent; 0 when there were none.
    pub fn hit_rate(&self) -> f64 {
        let reads = self.hits + self.misses;
        if reads == 0 { 0.0 } else { self.hits as f64 * 100.0 / reads as f64 }
    }
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hits, misses, invalidations, dropped } = self;
        let rate = self.hit_rate();
        write!(
            f,
            "Cache statistics - Hits: {hits}, Misses: {misses}, Invalidations: {invalidations}, Hit Rate: {rate:.2}%"
        )?;
        if *dropped > 0 { write!(f, ", Dropped: {dropped}") } else { Ok(()) }
    }
}

/// Where a cache is: `memory:` or `redis://host:port/database`.
#[derive(Clone)]
pub enum CacheUrl {
    /// In the process.
    Memory,
    /// A server.
    Redis(redis::Client),
}

impl FromStr for CacheUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "memory:" {
            return Ok(Self::Memory);
        }
        let scheme = super::scheme(text);
        if !matches!(scheme, Some("redis" | "redis+unix" | "unix")) {
            let scheme = scheme.unwrap_or_default();
            return Err(format!("no cache is known by {scheme:?}: write memory: or redis://host:6379"));
        }
        redis::Client::open(text)
            .map(Self::Redis)
            .map_err(|error| format!("the cache URL cannot be read: {error}; write redis://host:6379"))
    }
}

/// Without user and password.
impl fmt::Display for CacheUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory:"),
            Self::Redis(client) => write!(f, "redis://{}", client.get_connection_info().addr()),
        }
    }
}

impl fmt::Debug for CacheUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A cache. Clones share it.
#[derive(Clone)]
pub struct Cache(Arc<Shared>);

struct Shared {
    url: CacheUrl,
    store: Store,
    hits: AtomicU64,
    misses: AtomicU64,
    invalidations: AtomicU64,
}

enum Store {
    Memory(moka::sync::Cache<String, (Vec<u8>, Duration)>),
    Redis(RedisStore),
}

/// What the in-process cache holds at most, in bytes.
const MEMORY: u64 = 64 * 1024 * 1024;

/// Each entry has a time to live of its own.
struct Lives;

impl moka::Expiry<String, (Vec<u8>, Duration)> for Lives {
    fn expire_after_create(
        &self,
        _: &String,
        (_, lives): &(Vec<u8>, Duration),
        _: std::time::Instant,
    ) -> Option<Duration> {
        Some(*lives)
    }

    fn expire_after_update(
        &self,
        _: &String,
        (_, lives): &(Vec<u8>, Duration),
        _: std::time::Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(*lives)
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cache").field(&self.0.url).finish()
    }
}

impl Cache {
    /// The cache at `url`. Writes wait at most `interval` before they are sent, together with those that came meanwhile.
    ///
    /// A Redis that cannot be reached is no error: it is warned of once, reads miss, writes wait, and a connection is tried
    /// again and again.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime, for a Redis.
    pub fn open(url: CacheUrl, interval: Duration) -> Self {
        let store = match &url {
            CacheUrl::Memory => Store::Memory(
                moka::sync::Cache::builder()
                    .max_capacity(MEMORY)
                    .weigher(|key: &String, (value, _): &(Vec<u8>, Duration)| {
                        u32::try_from(key.len() + value.len() + 64).unwrap_or(u32::MAX)
                    })
                    .expire_after(Lives)
                    .build(),
            ),
            CacheUrl::Redis(client) => Store::Redis(RedisStore::start(client.clone(), interval)),
        };
        let (hits, misses, invalidations) = Default::default();
        Self(Arc::new(Shared { url, store, hits, misses, invalidations }))
    }

    /// Where it is.
    pub fn url(&self) -> &CacheUrl {
        &self.0.url
    }

    /// The value under `key`; `None` also when the cache cannot be reached.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn get(&self, key: &str) -> Option<Vec<u8>> {
        let found = match &self.0.store {
            Store::Memory(entries) => entries.get(key).map(|(value, _)| value),
            Store::Redis(redis) => redis.get(key).await,
        };
        let count = if found.is_some() { &self.0.hits } else { &self.0.misses };
        count.fetch_add(1, Ordering::Relaxed);
        found
    }

    /// Takes a value, for `lives` long. A reader here sees it at once, others when it has landed.
    pub fn put(&self, key: String, value: Vec<u8>, lives: Duration) {
        match &self.0.store {
            Store::Memory(entries) => entries.insert(key, (value, lives)),
            Store::Redis(redis) => redis.put(key, value, lives),
        }
    }

    /// Removes what is under `key`, because it is not true any more.
    pub fn invalidate(&self, key: String) {
        self.0.invalidations.fetch_add(1, Ordering::Relaxed);
        match &self.0.store {
            Store::Memory(entries) => entries.invalidate(&key),
            Store::Redis(redis) => redis.remove(key),
        }
    }
}

impl CacheStage for Cache {
    fn name(&self) -> &str {
        match &self.0.store {
            Store::Memory(_) => "in-process",
            Store::Redis(_) => "Redis",
        }
    }

    fn pending(&self) -> usize {
        match &self.0.store {
            Store::Memory(_) => 0,
            Store::Redis(redis) => redis.pending(),
        }
    }

    fn trouble(&self) -> Option<String> {
        match &self.0.store {
            Store::Memory(_) => None,
            Store::Redis(redis) => redis.trouble(),
        }
    }

    fn is_connected(&self) -> bool {
        match &self.0.store {
            Store::Memory(_) => false,
            Store::Redis(redis) => redis.is_reachable(),
        }
    }

    fn statistics(&self) -> Statistics {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Statistics {
            hits: count(&self.0.hits),
            misses: count(&self.0.misses),
            invalidations: count(&self.0.invalidations),
            dropped: match &self.0.store {
                Store::Memory(_) => 0,
                Store::Redis(redis) => redis.dropped(),
            },
        }
    }

    async fn flush(&self) -> Result<(), BoxError> {
        match &self.0.store {
            Store::Memory(_) => Ok(()),
            Store::Redis(redis) => redis.flush().await,
        }
    }

    async fn close(&self) -> Result<(), BoxError> {
        match &self.0.store {
            Store::Memory(_) => Ok(()),
            Store::Redis(redis) => redis.close().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_put_is_there_until_it_is_invalidated_and_every_read_is_counted() {
        let cache = Cache::open(CacheUrl::Memory, Duration::ZERO);
        assert_eq!(cache.get("a").await, None);
        cache.put("a".into(), b"1".to_vec(), Duration::from_secs(60));
        assert_eq!(cache.get("a").await.as_deref(), Some(&b"1"[..]));
        cache.invalidate("a".into());
        assert_eq!(cache.get("a").await, None);
        let statistics = cache.statistics();
        assert_eq!(statistics, Statistics { hits: 1, misses: 2, invalidations: 1, dropped: 0 });
        assert_eq!(
            statistics.to_string(),
            "Cache statistics - Hits: 1, Misses: 2, Invalidations: 1, Hit Rate: 33.33%"
        );
    }

    #[test]
    fn no_reads_are_no_division_by_zero() {
        assert_eq!(Statistics::default().hit_rate(), 0.0);
    }

    #[test]
    fn a_wrong_url_is_one_sentence_with_the_way_to_write_it() {
        for text in ["", "memcached://me:secret@a", "secret@a", "memory", "redis://", "redis://a:b"] {
            let error = text.parse::<CacheUrl>().map(|url| url.to_string()).unwrap_err();
            assert!(error.contains("write ") && error.lines().count() == 1, "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
