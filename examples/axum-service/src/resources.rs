//! What a service holds on to, and how a shutdown lets go of it: closers, each a stage task.
//!
//! | stage | closer | promises |
//! |---|---|---|
//! | Departure | [`leave`] | one request to the registry, in the stage's time; a failure is a failure |
//! | Cache | [`close_cache`] | every write that was taken is where it belongs, then the connection ends |
//! | Database | [`close_database`] | queries that run finish, new ones are refused; what still runs near the deadline is cancelled on the server |
//! | pgbouncer | [`Entry`] | behind the closed pool: nobody else is cut, or the entry stays and works |
//!
//! The order is the stages' own: no closer looks at another. A closer that cannot keep its promise says which part, in one
//! sentence, and the next stage runs.
//!
//! | at start | unreachable means |
//! |---|---|
//! | database | the service does not start: nothing it serves works without |
//! | cache, registry | one warning; the service runs and connects when it can |

mod cache;
mod database;
mod pooler;
mod redis_store;
mod registry;

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use shutdown_core::{BoxError, StageContext};
use tokio::time::{Instant, sleep, timeout, timeout_at};

pub use cache::{Cache, CacheStage, CacheUrl, Statistics};
pub use database::{Access, Connections, Database, DatabaseUrl, OpenError, Schema, Transaction, now_ms};
pub use pooler::{Entry, EntryError, Pooler};
pub use registry::{Registry, RegistryUrl};

/// From the cancelling of queries to the deadline: time for the server to hear of it, and for connections to end.
const CANCEL: Duration = Duration::from_secs(1);
/// How long a cancelled query has to end before its connection is ended.
const CANCELLED: Duration = Duration::from_millis(200);
/// With less than that there is no time for both: the connection is ended at once.
const SHORT: Duration = Duration::from_millis(500);
/// What a stage has once a second signal hurries: [`shutdown_core::STAGE_RESERVE`], less what that takes to be heard.
const HURRIED: Duration = Duration::from_millis(90);
/// Kept before the deadline, for saying what has not ended.
const LAST_WORDS: Duration = Duration::from_millis(5);

/// What stands before the first colon of a URL, if that can be a scheme. Never anything that may be a secret.
fn scheme(url: &str) -> Option<&str> {
    let (scheme, _) = url.split_once(':')?;
    scheme.chars().all(|c| c.is_ascii_alphanumeric() || c == '+').then_some(scheme)
}

/// The stage task that closes what is in the slot by then: it is registered in the builder, before there is anything to close.
pub fn when_open<T, Fut>(
    slot: &Arc<OnceLock<T>>,
    close: impl FnOnce(T, StageContext) -> Fut + Send + 'static,
) -> impl FnOnce(StageContext) -> Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>> + Send + 'static
where
    T: Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<(), BoxError>> + Send + 'static,
{
    let slot = Arc::clone(slot);
    move |stage| match slot.get() {
        Some(resource) => Box::pin(close(resource.clone(), stage)),
        None => Box::pin(async { Ok(()) }),
    }
}

/// Stage Departure: leaves the registry, so that nobody new is sent here.
///
/// # Errors
///
/// The registry did not take it in the stage's time. It will send clients here until its own check fails.
///
/// # Cancel safety
///
/// Not cancel safe: it is not known whether the registry has heard.
pub async fn leave(registry: Registry, stage: StageContext) -> Result<(), BoxError> {
    tokio::select! {
        left = registry.leave() => left?,
        () = stage.token.cancelled() => return Err(format!("{registry} has not answered in time").into()),
    }
    stage.log(move || tracing::info!(%registry, "deregistered"));
    Ok(())
}

/// Stage Cache: writes what is pending, says how the cache did, and ends its connection.
///
/// # Errors
///
/// Writes that did not land in time, counted, and why; or the cache's own error.
///
/// # Cancel safety
///
/// Cancel safe: a write that was not sent stays pending.
pub async fn close_cache(cache: impl CacheStage, stage: StageContext) -> Result<(), BoxError> {
    let statistics = cache.statistics();
    stage.log(move || tracing::info!("{statistics}"));
    let closed = async {
        cache.flush().await?;
        let connected = cache.is_connected();
        cache.close().await?;
        Ok::<_, BoxError>(connected)
    };
    let connected = tokio::select! {
        biased;
        closed = closed => closed?,
        () = stage.token.cancelled() => {
            let name = cache.name();
            let what = match cache.pending() {
                0 => format!("{name} does not end its connection"),
                1 => format!("1 write has not landed in {name}"),
                pending => format!("{pending} writes have not landed in {name}"),
            };
            return Err(match cache.trouble() {
                Some(why) => format!("{what}: {why}").into(),
                None => what.into(),
            });
        }
    };
    if connected {
        let name = cache.name().to_owned();
        stage.log(move || tracing::info!("{name} connection closed"));
    }
    Ok(())
}

/// Stage Database: closes the pool.
///
/// From the first moment on new queries are refused. Those that run have until a second before the deadline (half of the
/// stage, if that is less), or until a second signal hurries, and are then cancelled on the server: one that does not
/// look for its client works on for nobody until it has something to say.
///
/// # Errors
///
/// The queries that were cancelled; or that connections are still out, and why.
///
/// # Cancel safety
///
/// Cancel safe: the pool stays closed.
pub async fn close_database(database: Database, stage: StageContext) -> Result<(), BoxError> {
    let left = stage.deadline.saturating_duration_since(Instant::now());
    let patience = left - CANCEL.min(left / 2);
    let mut closing = pin!(database.close());
    let well = || stage.log(|| tracing::info!("Database connections closed successfully"));
    // Hurried, the stage has its reserve from now on, and no more.
    let (left, deadline) = tokio::select! {
        biased;
        () = &mut closing => {
            well();
            return Ok(());
        }
        () = stage.token.cancelled() => (HURRIED, stage.deadline.min(Instant::now() + HURRIED)),
        () = sleep(patience) => (left, stage.deadline),
    };
    // Beside the waiting, because a query may still end by itself; and heard out, because it says which were cancelled.
    let mut ending = Ending::default();
    let in_time = timeout_at(deadline - LAST_WORDS, async {
        let short = left <= SHORT;
        let asking =
            async { if short { database.end_connections().await } else { database.cancel_queries().await } };
        tokio::pin!(asking);
        while ending.asked.is_none() {
            tokio::select! {
                () = &mut closing, if !ending.closed => ending.closed = true,
                asked = &mut asking => ending.asked = Some(asked),
            }
        }
        if !ending.closed && !short && timeout(CANCELLED, &mut closing).await.is_ok() {
            ending.closed = true;
        }
        if !ending.closed && !short {
            ending.asked = Some(database.end_connections().await);
        }
        if !ending.closed {
            closing.await;
            ending.closed = true;
        }
    });
    // Late or not, what has been found out is written down.
    let _ = in_time.await;
    ending.verdict(&database, well)
}

/// What came of ending what still ran.
#[derive(Default)]
struct Ending {
    closed: bool,
    /// The queries that the server has cancelled, or why it could not be asked.
    asked: Option<Result<Vec<String>, BoxError>>,
}

impl Ending {
    fn verdict(self, database: &Database, well: impl FnOnce()) -> Result<(), BoxError> {
        let open = database.connections();
        match (self.closed, self.asked) {
            (true, Some(Ok(cancelled))) if !cancelled.is_empty() => {
                Err(format!("cancelled what still ran: {}", cancelled.join("; ")).into())
            }
            (true, _) => {
                well();
                Ok(())
            }
            (false, Some(Err(error))) => {
                Err(format!("{open} of {database}'s connections are still out: {error}").into())
            }
            (false, _) if database.url().is_embedded() => {
                Err(format!("{open} connections to {database} still run a query").into())
            }
            (false, _) => {
                Err(format!("{open} of {database}'s connections are still out: it does not answer").into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio_util::sync::CancellationToken;

    use super::*;

    /// A cache whose writes land one each 10 ms.
    #[derive(Clone)]
    struct Fake(Arc<AtomicUsize>);

    impl CacheStage for Fake {
        fn name(&self) -> &str {
            "fake"
        }

        fn pending(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }

        fn trouble(&self) -> Option<String> {
            Some("slow".into())
        }

        fn is_connected(&self) -> bool {
            true
        }

        fn statistics(&self) -> Statistics {
            Statistics::default()
        }

        async fn flush(&self) -> Result<(), BoxError> {
            while self.pending() > 0 {
                sleep(Duration::from_millis(10)).await;
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
            Ok(())
        }

        async fn close(&self) -> Result<(), BoxError> {
            Ok(())
        }
    }

    fn within(time: Duration) -> StageContext {
        let token = CancellationToken::new();
        let told = token.clone();
        tokio::spawn(async move {
            sleep(time - Duration::from_millis(50)).await;
            told.cancel();
        });
        StageContext::new(Instant::now() + time, token)
    }

    #[tokio::test(start_paused = true)]
    async fn a_hundred_pending_writes_land_or_those_that_do_not_are_counted_with_the_reason() {
        let cache = Fake(Arc::new(AtomicUsize::new(100)));
        close_cache(cache.clone(), within(Duration::from_secs(2))).await.unwrap();
        assert_eq!(cache.pending(), 0);

        let cache = Fake(Arc::new(AtomicUsize::new(100)));
        let error = close_cache(cache.clone(), within(Duration::from_millis(555))).await.unwrap_err();
        assert_eq!(error.to_string(), "50 writes have not landed in fake: slow");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_embedded_query_that_outlasts_its_stage_is_named_as_one_that_runs() {
        let dir = tempfile::tempdir().unwrap();
        let url = DatabaseUrl::file(&dir.path().join("a.db"));
        let database = Database::open(url, "test", &[]).await.unwrap();
        let mut connection = database.pool().acquire().await.unwrap();
        let error =
            close_database(database, within(Duration::from_millis(100))).await.unwrap_err().to_string();
        assert!(
            error.starts_with("1 connections to sqlite:") && error.ends_with("still run a query"),
            "{error}"
        );
        sqlx::query("SELECT 1").execute(&mut *connection).await.unwrap();
    }
}
