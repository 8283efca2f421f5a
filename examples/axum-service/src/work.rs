//! The six background tasks. Each works now and then, on the database, and finishes what it has begun.
//!
//! | task | an iteration |
//! |---|---|
//! | metrics sync | adds what was counted since the last one to table `metrics` |
//! | ledger ingestion | closes a ledger over the payments that are in none |
//! | pool sync | sums up the payments of each asset |
//! | trustline stats | counts the payments of each asset |
//! | broadcaster | tells the WebSockets of a new ledger |
//! | webhook dispatcher | hands out what payments have queued |
//!
//! When a task is told to stop it finishes its iteration and does one more: requests are over by then, so that one sees
//! all they did. Table `task_runs` has a row for each task of each node; one whose `ended` is null was cut in the middle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum_service::resources::{Database, now_ms};
use shutdown_core::{ShutdownCoordinator, ShuttingDown};
use tokio::sync::broadcast;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::service::Service;

/// Which iteration.
#[derive(Clone, Copy)]
enum Task {
    Metrics,
    Ledger,
    Pools,
    Trustlines,
    Broadcaster,
    Webhooks,
}

/// Each with its name in the report and what the log calls it.
const TASKS: [(Task, &str, &str); 6] = [
    (Task::Metrics, "metrics sync", "Metrics synchronization"),
    (Task::Ledger, "ledger ingestion", "Ledger ingestion"),
    (Task::Pools, "pool sync", "Liquidity pool sync"),
    (Task::Trustlines, "trustline stats", "Trustline stats sync"),
    (Task::Broadcaster, "broadcaster", "RealtimeBroadcaster"),
    (Task::Webhooks, "webhook dispatcher", "Webhook dispatcher"),
];

/// What was counted since the start, and what of it has been written.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) answered: AtomicU64,
    pub(crate) payments: AtomicU64,
}

/// Starts all six.
///
/// # Errors
///
/// The service is stopping already.
pub(crate) fn spawn_all(
    shutdown: ShutdownCoordinator,
    service: &Arc<Service>,
    interval: Duration,
    work: Duration,
) -> Result<(), ShuttingDown> {
    for (task, name, title) in TASKS {
        let service = Arc::clone(service);
        let iterations = Iterations { task, name, work, service, written: [0; 2], ledger: 0 };
        shutdown.spawn(name, async move |token| {
            let told = async {
                token.cancelled().await;
                // Behind the stage's own line.
                shutdown.log(move || tracing::info!("{title} task shutting down"));
            };
            tokio::join!(iterations.until(&token, interval), told).0
        })?;
    }
    Ok(())
}

struct Iterations {
    task: Task,
    name: &'static str,
    work: Duration,
    service: Arc<Service>,
    /// What metrics sync has written of the counters.
    written: [u64; 2],
    /// What broadcaster has told of.
    ledger: i64,
}

impl Iterations {
    /// Iterates until `token` is cancelled, finishes what it has begun, and does one more.
    async fn until(mut self, token: &CancellationToken, interval: Duration) -> Result<(), sqlx::Error> {
        while timeout(interval, token.cancelled()).await.is_err() {
            if let Err(error) = self.next().await {
                tracing::warn!(task = self.name, %error, "an iteration failed: trying again");
            }
        }
        self.next().await
    }

    async fn next(&mut self) -> Result<(), sqlx::Error> {
        let database = self.service.database.clone();
        sqlx::query(
            "INSERT INTO task_runs (task, node, runs, began, ended) VALUES ($1, $2, 1, $3, NULL) \
             ON CONFLICT (task, node) DO UPDATE SET runs = task_runs.runs + 1, began = $3, ended = NULL",
        )
        .bind(self.name)
        .bind(&self.service.node)
        .bind(now_ms())
        .execute(database.tasks())
        .await?;
        sleep(self.work).await;
        match self.task {
            Task::Metrics => self.metrics(&database).await?,
            Task::Ledger => ledger(&database).await?,
            Task::Pools => sums(&database, "reserve", "sum(amount)").await?,
            Task::Trustlines => sums(&database, "holders", "count(*)").await?,
            Task::Broadcaster => self.broadcast(&database).await?,
            Task::Webhooks => webhooks(&database).await?,
        }
        sqlx::query("UPDATE task_runs SET ended = $3 WHERE task = $1 AND node = $2")
            .bind(self.name)
            .bind(&self.service.node)
            .bind(now_ms())
            .execute(database.tasks())
            .await?;
        Ok(())
    }

    async fn metrics(&mut self, database: &Database) -> Result<(), sqlx::Error> {
        let counters = &self.service.counters;
        let now = [&counters.answered, &counters.payments].map(|count| count.load(Ordering::Relaxed));
        for ((name, now), written) in ["answered", "payments"].into_iter().zip(now).zip(&mut self.written) {
            sqlx::query(
                "INSERT INTO metrics (name, value) VALUES ($1, $2) \
                 ON CONFLICT (name) DO UPDATE SET value = metrics.value + $2",
            )
            .bind(name)
            .bind(i64::try_from(now - *written).unwrap_or(i64::MAX))
            .execute(database.tasks())
            .await?;
            *written = now;
        }
        Ok(())
    }

    async fn broadcast(&mut self, database: &Database) -> Result<(), sqlx::Error> {
        let ledger: i64 = sqlx::query_scalar("SELECT coalesce(max(sequence), 0) FROM ledgers")
            .fetch_one(database.tasks())
            .await?;
        if ledger > self.ledger {
            self.ledger = ledger;
            // Nobody may be listening.
            let _ = self.service.live.send(format!(r#"{{"type":"ledger","sequence":{ledger}}}"#).into());
        }
        Ok(())
    }
}

/// The payments that are in no ledger make the next one. (`WHERE true`: else SQLite takes ON CONFLICT for a join's.)
async fn ledger(database: &Database) -> Result<(), sqlx::Error> {
    let mut transaction = database.begin(database.tasks()).await?;
    // Two instances may close one at the same moment: the key decides, and the other one waits for its next turn.
    let closed = sqlx::query_scalar::<_, i64>(
        "INSERT INTO ledgers (sequence, closed) SELECT coalesce(max(sequence), 0) + 1, $1 FROM ledgers WHERE true \
         ON CONFLICT (sequence) DO NOTHING RETURNING sequence",
    )
    .bind(now_ms())
    .fetch_optional(&mut *transaction)
    .await?;
    if let Some(sequence) = closed {
        sqlx::query("UPDATE payments SET ledger = $1 WHERE ledger IS NULL")
            .bind(sequence)
            .execute(&mut *transaction)
            .await?;
    }
    transaction.commit().await
}

/// Writes a sum over the payments of each asset into a column of table `assets`. In order: two that write the same rows
/// would else wait for each other.
async fn sums(database: &Database, column: &str, sum: &str) -> Result<(), sqlx::Error> {
    sqlx::query(&format!(
        "INSERT INTO assets (asset, {column}) SELECT asset, {sum} FROM payments WHERE true GROUP BY asset ORDER BY asset \
         ON CONFLICT (asset) DO UPDATE SET {column} = excluded.{column}"
    ))
    .execute(database.tasks())
    .await?;
    Ok(())
}

/// Hands out the webhooks that are due. The call itself would stand here.
async fn webhooks(database: &Database) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE webhooks SET delivered = $1 WHERE delivered IS NULL")
        .bind(now_ms())
        .execute(database.tasks())
        .await?;
    Ok(())
}

/// What the broadcaster tells, to everybody who listens.
pub(crate) type Live = broadcast::Sender<axum::extract::ws::Utf8Bytes>;
