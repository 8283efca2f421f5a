//! What a service holds on to, and how a shutdown lets go of it: three closers, each a stage task.
//!
//! | stage | closer | promises |
//! |---|---|---|
//! | Departure | [`leave`] | one request to the registry, in the stage's time; a failure is a failure |
//! | Cache | [`close_cache`] | every write that was taken is where it belongs, then the connection ends |
//! | Database | [`close_database`] | queries that run finish, new ones are refused; what still runs near the deadline is cancelled on the server |
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
mod redis_store;
mod registry;

use std::pin::pin;
use std::time::Duration;

use shutdown_core::{BoxError, StageContext};
use tokio::time::{Instant, sleep, timeout_at};

pub use cache::{Cache, CacheStage, CacheUrl, Statistics};
pub use database::{Database, DatabaseUrl, OpenError, Schema, now_ms};
pub use registry::{Registry, RegistryUrl};

/// From the cancelling of queries to the deadline: time for the server to hear of it, and for connections to end.
const CANCEL: Duration = Duration::from_secs(1);
/// How long a cancelled query has to end before its connection is ended.
const CANCELLED: Duration = Duration::from_millis(200);

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
/// Writes that did not land in time, counted; or the cache's own error.
///
/// # Cancel safety
///
/// Cancel safe: a write that was not sent stays pending.
pub async fn close_cache(cache: impl CacheStage, stage: StageContext) -> Result<(), BoxError> {
    let statistics = cache.statistics();
    stage.log(move || tracing::info!("{statistics}"));
    let closed = async {
        cache.flush().await?;
        cache.close().await
    };
    tokio::select! {
        closed = closed => closed?,
        () = stage.token.cancelled() => {
            let (name, pending) = (cache.name(), cache.pending());
            return Err(match pending {
                0 => format!("{name} does not end its connection"),
                1 => format!("1 write has not landed in {name}"),
                _ => format!("{pending} writes have not landed in {name}"),
            }.into());
        }
    }
    let name = cache.name().to_owned();
    stage.log(move || tracing::info!("{name} connection closed"));
    Ok(())
}

/// Stage Database: closes the pool.
///
/// From the first moment on new queries are refused. Those that run have until a second before the deadline (half of the
/// stage, if that is less; no time at all when a second signal hurries), and are then cancelled on the server: a server
/// does not notice that its client has gone before it has something to say to it, and works on until then.
///
/// # Errors
///
/// The queries that were cancelled; or that connections are still out, because the server does not answer.
///
/// # Cancel safety
///
/// Cancel safe: the pool stays closed.
pub async fn close_database(database: Database, stage: StageContext) -> Result<(), BoxError> {
    let left = stage.deadline.saturating_duration_since(Instant::now());
    let patience = left - CANCEL.min(left / 2);
    let hurry = stage.token.clone();
    let mut closing = pin!(database.close());
    tokio::select! {
        biased;
        () = &mut closing => {
            stage.log(|| tracing::info!("Database connections closed successfully"));
            return Ok(());
        }
        () = hurry.cancelled() => {}
        () = sleep(patience) => {}
    }
    let ending = async {
        let cancelled = database.cancel_queries().await?;
        if timeout_at(Instant::now() + CANCELLED.min(left / 10), &mut closing).await.is_err() {
            database.end_connections().await?;
            closing.await;
        }
        Ok::<_, BoxError>(cancelled)
    };
    // The token may be what has brought us here: the deadline itself is the limit, less a moment for saying so.
    let Ok(cancelled) = timeout_at(stage.deadline - Duration::from_millis(5), ending).await else {
        return Err(format!(
            "{} of {database}'s connections are still out: it does not answer",
            database.busy()
        )
        .into());
    };
    let cancelled = cancelled?;
    if cancelled.is_empty() {
        stage.log(|| tracing::info!("Database connections closed successfully"));
        return Ok(());
    }
    Err(format!("cancelled what still ran: {}", cancelled.join("; ")).into())
}
