//! Every answered request as a row in the database, written by one background task.
//!
//! | table | columns |
//! |---|---|
//! | `requests` | `at_ms` (when it began), `method`, `path` (no query: it may hold secrets), `status` (0: no head was sent), `took_ms`, `upstream` (the last one asked, or empty), `cache` (`hit`, `miss`, `none`); the newest 100,000, and up to a tenth more |
//! | `counters` | `requests_2xx` and its like, `requests_unanswered`, `cache_hit`, `cache_miss`: of all time |
//!
//! A request puts its row into a bounded queue and never waits: when the queue is full the row is dropped and counted. The
//! task takes what has gathered in 250 ms, or 500 rows, and writes that in one transaction with what it adds to the
//! counters.
//!
//! * Told to stop (requests are over by then), it writes all that is queued. What it cannot write then is its failure.
//! * A database that goes away is warned of once and tried again; until then rows wait in the queue. A transaction whose
//!   end was not heard of is written again: a row can be there twice, and is not missing.
//! * A request that the drain cuts has a row, with the status that its client was sent. A tunnel (WebSocket) has its row
//!   when it opens: it may outlive the task.
//! * A request that the shutdown refuses has none: none of the proxy's hooks sees it. The report counts it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use axum_service::resources::{Database, Schema, now_ms};
use http::Method;
use shutdown_core::{BoxError, sentence};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// The tables.
pub(crate) const SCHEMA: Schema = &[
    "CREATE TABLE IF NOT EXISTS requests (id $id, at_ms BIGINT NOT NULL, method TEXT NOT NULL, path TEXT NOT NULL, \
     status BIGINT NOT NULL, took_ms BIGINT NOT NULL, upstream TEXT NOT NULL, cache TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value BIGINT NOT NULL)",
];

/// Rows that wait.
const QUEUE: usize = 10_000;
/// Rows in one transaction.
const BATCH: usize = 500;
/// How long a row waits for others.
const INTERVAL: Duration = Duration::from_millis(250);
/// How long the database has for one transaction.
const ANSWER: Duration = Duration::from_secs(3);
/// Between two tries; doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Rows that the table keeps.
const KEPT: i64 = 100_000;
/// Bytes of a method that are written down.
const LONGEST_METHOD: usize = 32;
/// Bytes of a path that are written down.
const LONGEST_PATH: usize = 512;

/// A request that is under way.
#[derive(Debug)]
pub(crate) struct Entry {
    log: &'static RequestLog,
    began: Instant,
    method: Cow<'static, str>,
    path: Box<str>,
}

impl Entry {
    /// A request that begins now.
    pub(crate) fn new(log: &'static RequestLog, method: &Method, path: &str) -> Self {
        Self { log, began: Instant::now(), method: named(method), path: short(path) }
    }

    /// Puts it into the log, now that it is over.
    pub(crate) fn record(self, status: u16, upstream: Option<Arc<str>>, cache: &'static str) {
        let Self { log, began, method, path } = self;
        let took_ms = i64::try_from(began.elapsed().as_millis()).unwrap_or_default();
        log.record(Row { at_ms: now_ms() - took_ms, method, path, status, took_ms, upstream, cache });
    }
}

/// One request, at its end.
#[derive(Debug)]
struct Row {
    at_ms: i64,
    method: Cow<'static, str>,
    path: Box<str>,
    status: u16,
    took_ms: i64,
    /// The name of the upstream or peer.
    upstream: Option<Arc<str>>,
    cache: &'static str,
}

impl Row {
    /// What it adds one to.
    fn counters(&self) -> impl Iterator<Item = &'static str> {
        let class = match self.status / 100 {
            1 => "requests_1xx",
            2 => "requests_2xx",
            3 => "requests_3xx",
            4 => "requests_4xx",
            5 => "requests_5xx",
            _ => "requests_unanswered",
        };
        let cache = match self.cache {
            "hit" => Some("cache_hit"),
            "miss" => Some("cache_miss"),
            _ => None,
        };
        std::iter::once(class).chain(cache)
    }
}

/// A method as it is written down: any word may be one, of any length.
fn named(method: &Method) -> Cow<'static, str> {
    const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"];
    match KNOWN.into_iter().find(|known| method == known) {
        Some(known) => Cow::Borrowed(known),
        // A token is ASCII (RFC 9110, section 5.6.2).
        None => Cow::Owned(method.as_str().chars().take(LONGEST_METHOD).collect()),
    }
}

/// A path as it is written down: not too long, and nothing in it that a database would refuse.
fn short(path: &str) -> Box<str> {
    let cut = (0..=LONGEST_PATH.min(path.len())).rev().find(|at| path.is_char_boundary(*at)).unwrap_or(0);
    let path = &path[..cut];
    if path.contains('\0') { path.replace('\0', "?").into() } else { path.into() }
}

/// Where requests put their rows.
#[derive(Debug)]
pub(crate) struct RequestLog {
    queue: mpsc::Sender<Row>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    written: AtomicU64,
    dropped: AtomicU64,
    /// Taken out of the queue and not written yet.
    in_hand: AtomicUsize,
    /// Whether it was said that rows are dropped.
    dropping: AtomicBool,
    /// There is a batch.
    full: Notify,
}

/// The log, and the task that writes it into `database`. It is there until the process ends: a
/// request costs no count of who has it.
pub(crate) fn open(database: Database) -> (&'static RequestLog, Writer) {
    let tables = Tables { database, kept: KEPT, since_trim: KEPT };
    let (log, writer) = with_queue(QUEUE, tables);
    (Box::leak(Box::new(log)), writer)
}

fn with_queue(length: usize, tables: Tables) -> (RequestLog, Writer) {
    let (sender, queue) = mpsc::channel(length);
    let shared = Arc::new(Shared::default());
    let writer = Writer { queue, shared: Arc::clone(&shared), tables, batch: Vec::new(), failing: false };
    (RequestLog { queue: sender, shared }, writer)
}

impl RequestLog {
    /// Takes a row, or drops it.
    fn record(&self, row: Row) {
        let why = match self.queue.try_send(row) {
            Ok(()) => {
                if self.queue.capacity() + BATCH <= self.queue.max_capacity() {
                    self.shared.full.notify_one();
                }
                return;
            }
            Err(TrySendError::Full(_)) => "its queue is full",
            Err(TrySendError::Closed(_)) => "its task has ended",
        };
        self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        if !self.shared.dropping.swap(true, Ordering::Relaxed) {
            tracing::warn!("the request log drops rows: {why}");
        }
    }

    /// Rows that are in the database.
    pub(crate) fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Rows that are not and will not be.
    pub(crate) fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Rows that wait.
    pub(crate) fn queued(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity() + self.shared.in_hand.load(Ordering::Relaxed)
    }
}

/// The task.
pub(crate) struct Writer {
    queue: mpsc::Receiver<Row>,
    shared: Arc<Shared>,
    tables: Tables,
    batch: Vec<Row>,
    /// Whether it was said that the database cannot be written to.
    failing: bool,
}

impl Writer {
    /// Writes until it is told, and then what is left.
    pub(crate) async fn run(mut self, told: CancellationToken) -> Result<(), BoxError> {
        while self.gather(&told).await {
            self.write_until_told(&told).await;
        }
        // From here on a row that still comes is dropped and counted.
        self.queue.close();
        loop {
            self.take();
            if self.batch.is_empty() {
                return Ok(());
            }
            if let Err(error) = self.write().await {
                let lost = self.batch.len() + self.queue.len();
                self.shared.dropped.fetch_add(lost as u64, Ordering::Relaxed);
                let rows = if lost == 1 { "row" } else { "rows" };
                return Err(format!("{lost} {rows} not written to {}: {error}", self.tables.database).into());
            }
        }
    }

    /// Waits for a batch; false when it is told.
    async fn gather(&mut self, told: &CancellationToken) -> bool {
        tokio::select! {
            biased;
            () = told.cancelled() => return false,
            row = self.queue.recv() => match row {
                Some(row) => self.batch.push(row),
                None => return false,
            }
        }
        self.hold();
        // Nobody listens to the queue meanwhile: a row wakes nobody.
        tokio::select! {
            biased;
            () = told.cancelled() => return false,
            () = self.shared.full.notified() => {}
            () = sleep(INTERVAL) => {}
        }
        self.take();
        true
    }

    /// Fills the batch from the queue, without waiting.
    fn take(&mut self) {
        while self.batch.len() < BATCH
            && let Ok(row) = self.queue.try_recv()
        {
            self.batch.push(row);
        }
        self.hold();
    }

    fn hold(&self) {
        self.shared.in_hand.store(self.batch.len(), Ordering::Relaxed);
    }

    /// Tries until the batch is written, or it is told; then the batch is left.
    async fn write_until_told(&mut self, told: &CancellationToken) {
        let mut pause = PAUSES.0;
        while let Err(error) = self.write().await {
            if !std::mem::replace(&mut self.failing, true) {
                let database = &self.tables.database;
                tracing::warn!(%database, error, "the request log cannot be written: rows wait, then they are dropped");
            }
            if timeout(pause, told.cancelled()).await.is_ok() {
                return;
            }
            pause = (pause * 2).min(PAUSES.1);
        }
        if std::mem::replace(&mut self.failing, false) {
            tracing::info!(database = %self.tables.database, "the request log is written again");
        }
        if self.shared.dropping.swap(false, Ordering::Relaxed) {
            tracing::info!(
                dropped = self.shared.dropped.load(Ordering::Relaxed),
                "the request log takes rows again"
            );
        }
    }

    /// Writes the batch; what it says of an error is one sentence.
    async fn write(&mut self) -> Result<(), String> {
        let written = timeout(ANSWER, Box::pin(self.tables.write(&self.batch))).await;
        let written = written.map_err(|_| format!("no answer within {ANSWER:?}"));
        written.and_then(|written| written.map_err(|error| sentence(&error)))?;
        self.shared.written.fetch_add(self.batch.len() as u64, Ordering::Relaxed);
        self.batch.clear();
        self.hold();
        Ok(())
    }
}

/// The two tables.
struct Tables {
    database: Database,
    kept: i64,
    /// Rows written since the last trimming.
    since_trim: i64,
}

impl Tables {
    /// Writes the rows and what they add to the counters, in one transaction. Of no rows, nothing.
    async fn write(&mut self, rows: &[Row]) -> Result<(), sqlx::Error> {
        let mut counts = BTreeMap::new();
        rows.iter().flat_map(Row::counters).for_each(|name| *counts.entry(name).or_insert(0_i64) += 1);
        let added = self.since_trim + i64::try_from(rows.len()).unwrap_or(i64::MAX);
        let trims = added >= self.kept / 10;

        // Not kept prepared: there would be one of each length.
        let mut transaction = self.database.begin(self.database.tasks()).await?;
        let text = insert(
            "INSERT INTO requests (at_ms, method, path, status, took_ms, upstream, cache)",
            rows.len(),
            7,
        );
        let mut query = sqlx::query(&text).persistent(false);
        for row in rows {
            query = query
                .bind(row.at_ms)
                .bind(&*row.method)
                .bind(&*row.path)
                .bind(i64::from(row.status))
                .bind(row.took_ms)
                .bind(row.upstream.as_deref().unwrap_or_default())
                .bind(row.cache);
        }
        query.execute(&mut *transaction).await?;

        // In the order of their names, so that two nodes never wait for each other.
        let mut text = insert("INSERT INTO counters (name, value)", counts.len(), 2);
        text += " ON CONFLICT (name) DO UPDATE SET value = counters.value + excluded.value";
        let mut query = sqlx::query(&text).persistent(false);
        for (name, count) in &counts {
            query = query.bind(*name).bind(*count);
        }
        query.execute(&mut *transaction).await?;

        if trims {
            sqlx::query("DELETE FROM requests WHERE id <= (SELECT max(id) FROM requests) - $1")
                .bind(self.kept)
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        self.since_trim = if trims { 0 } else { added };
        Ok(())
    }
}

/// `INSERT … VALUES ($1, $2), ($3, $4)`
fn insert(into: &str, rows: usize, columns: usize) -> String {
    let mut text = format!("{into} VALUES ");
    for row in 0..rows {
        for column in 0..columns {
            let before = match (row, column) {
                (0, 0) => "(",
                (_, 0) => "), (",
                _ => ", ",
            };
            let _ = write!(text, "{before}${}", row * columns + column + 1);
        }
    }
    text.push(')');
    text
}

#[cfg(test)]
mod tests {
    use axum_service::resources::DatabaseUrl;

    use super::*;

    async fn database() -> Database {
        Database::open(DatabaseUrl::Sqlite("sqlite::memory:".to_owned()), "test", SCHEMA).await.unwrap()
    }

    fn tables(database: &Database, kept: i64) -> Tables {
        Tables { database: database.clone(), kept, since_trim: 0 }
    }

    fn row(number: i64) -> Row {
        let status = if number % 2 == 0 { 200 } else { 404 };
        let (method, path) = (named(&Method::GET), "/a".into());
        Row {
            at_ms: number,
            method,
            path,
            status,
            took_ms: 1,
            upstream: Some("http://a:1".into()),
            cache: "miss",
        }
    }

    async fn number(database: &Database, query: &str) -> i64 {
        sqlx::query_scalar(query).fetch_one(database.pool()).await.unwrap()
    }

    #[test]
    fn a_method_of_any_length_costs_a_row_no_more_than_its_place() {
        let long = Method::from_bytes(&[b'A'; 100_000]).unwrap();
        assert_eq!(named(&long).len(), LONGEST_METHOD);
        assert_eq!(named(&Method::PATCH), "PATCH");
        assert_eq!(named(&Method::from_bytes(b"PURGE").unwrap()), "PURGE");
    }

    #[tokio::test]
    async fn told_it_writes_all_that_is_queued_and_the_counters_are_the_rows() {
        let database = database().await;
        let (log, writer) = with_queue(QUEUE, tables(&database, KEPT));
        // More than one batch.
        (0..1201).for_each(|number| log.record(row(number)));
        assert_eq!((log.queued(), log.written()), (1201, 0));
        let told = CancellationToken::new();
        told.cancel();
        writer.run(told).await.unwrap();
        assert_eq!((log.queued(), log.written(), log.dropped()), (0, 1201, 0));
        assert_eq!(
            number(&database, "SELECT count(*) FROM requests WHERE upstream = 'http://a:1'").await,
            1201
        );
        for (name, count) in [("requests_2xx", 601), ("requests_4xx", 600), ("cache_miss", 1201)] {
            let query = format!("SELECT value FROM counters WHERE name = '{name}'");
            assert_eq!(number(&database, &query).await, count, "{name}");
        }
        log.record(row(0));
        assert_eq!(log.dropped(), 1, "it has ended");
    }

    #[tokio::test]
    async fn a_row_waits_for_others_for_250_ms_and_a_batch_does_not() {
        let database = database().await;
        // Not before: SQLite works on a thread of its own, which a stopped clock does not wait for.
        tokio::time::pause();
        let (log, mut writer) = with_queue(QUEUE, tables(&database, KEPT));
        let told = CancellationToken::new();
        let gathered = async |writer: &mut Writer, log: &RequestLog, rows: i64| {
            (0..rows).for_each(|number| log.record(row(number)));
            let begin = Instant::now();
            assert!(writer.gather(&told).await);
            // A timer counts whole milliseconds.
            let waited = begin.elapsed() + Duration::from_millis(2) > INTERVAL;
            (std::mem::take(&mut writer.batch).len(), waited)
        };
        assert_eq!(gathered(&mut writer, &log, 3).await, (3, true));
        assert_eq!(gathered(&mut writer, &log, 501).await, (500, false));
        assert_eq!(gathered(&mut writer, &log, 0).await, (1, true));
    }

    #[tokio::test]
    async fn a_full_queue_drops_and_counts() {
        let (log, _writer) = with_queue(2, tables(&database().await, KEPT));
        (0..5).for_each(|number| log.record(row(number)));
        assert_eq!((log.queued(), log.dropped()), (2, 3));
    }

    #[tokio::test]
    async fn what_cannot_be_written_at_the_end_is_its_failure_and_counted() {
        let database = database().await;
        let (log, writer) = with_queue(QUEUE, tables(&database, KEPT));
        (0..3).for_each(|number| log.record(row(number)));
        database.close().await;
        let told = CancellationToken::new();
        told.cancel();
        let error = writer.run(told).await.unwrap_err().to_string();
        assert!(error.starts_with("3 rows not written to sqlite::memory:: "), "{error}");
        assert_eq!((log.written(), log.dropped()), (0, 3));
    }

    #[tokio::test]
    async fn the_table_keeps_the_newest_and_up_to_a_tenth_more() {
        let database = database().await;
        let mut tables = tables(&database, 100);
        for batch in 0..50 {
            let rows: Vec<_> = (0..7).map(|number| row(batch * 7 + number)).collect();
            tables.write(&rows).await.unwrap();
            let count = number(&database, "SELECT count(*) FROM requests").await;
            assert!((batch + 1) * 7 == count || (100..110).contains(&count), "{count} after {batch}");
        }
        assert_eq!(number(&database, "SELECT max(at_ms) FROM requests").await, 349);
    }

    #[test]
    fn a_path_is_cut_between_characters_and_has_no_nul() {
        assert_eq!(&*short("/a\0b"), "/a?b");
        let long = format!("/{}", "ä".repeat(LONGEST_PATH));
        assert_eq!(short(&long).len(), LONGEST_PATH - 1);
    }
}
