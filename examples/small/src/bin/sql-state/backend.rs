//! A state in a SQL database: one table, one row a generation, one connection of its own.
//!
//! The connection is not the service's pool: that one is closed in stage Database, the state is saved after that, in
//! stage Persist, which closes this connection last. A save is one transaction, so a crash leaves the old rows or the
//! new ones. The database is locked while the connection is open: it is this state's alone.

use std::borrow::Cow;
use std::error::Error;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use shutdown_core::state::{Generation, StateBackend, StateError};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteLockingMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, Row};
use tokio::runtime::Runtime;

/// How long a database that another process has is waited for: one that was killed has let go already.
const BUSY: Duration = Duration::from_millis(200);

const TABLE: &str = "CREATE TABLE IF NOT EXISTS service_state (
    generation INTEGER PRIMARY KEY,          -- rises with every save
    document   BLOB NOT NULL,
    aside      INTEGER                       -- when it was found to be unusable, unix ms
)";

/// In the list of generations: what is none.
const NOT_A_ROW: i64 = -1;
/// <https://www.sqlite.org/rescode.html>, without the extension in the higher bits.
const BUSY_CODE: u32 = 5;
const DAMAGE_CODES: [u32; 2] = [11, 26]; // SQLITE_CORRUPT, SQLITE_NOTADB

fn code(error: &sqlx::Error) -> Option<u32> {
    error.as_database_error()?.code()?.parse::<u32>().ok().map(|code| code % 256)
}

fn is_damage(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    error.downcast_ref().and_then(code).is_some_and(|code| DAMAGE_CODES.contains(&code))
}

/// Keeps a state in the table `service_state` of a SQLite database.
pub(crate) struct SqlState {
    options: SqliteConnectOptions,
    place: String,
    runtime: Runtime,
    connection: Mutex<Option<SqliteConnection>>,
    /// The generations that `open` gave.
    found: Mutex<Vec<i64>>,
}

impl SqlState {
    /// The state in the database at `url`, `sqlite:path?mode=rwc`. Touches nothing yet.
    pub(crate) fn new(url: &str) -> Result<Self, Box<dyn Error>> {
        let options = SqliteConnectOptions::from_str(url)?
            .locking_mode(SqliteLockingMode::Exclusive)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY);
        Ok(Self {
            options,
            place: format!("the state database {url}"),
            // A connection belongs to the runtime it was made on; the service's may be gone in stage Persist.
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build()?,
            connection: Mutex::new(None),
            found: Mutex::default(),
        })
    }

    /// Runs `work` on the connection, on a thread of its own: the caller's may be inside another runtime.
    fn run<T: Send>(
        &self,
        work: impl AsyncFnOnce(&mut SqliteConnection) -> sqlx::Result<T> + Send,
    ) -> Result<T, StateError> {
        let done = thread::scope(|scope| {
            let working = scope.spawn(|| {
                let mut connection = self.connection.lock();
                self.runtime.block_on(async {
                    if connection.is_none() {
                        *connection = Some(self.options.connect().await?);
                    }
                    work(connection.as_mut().expect("connected above")).await
                })
            });
            working.join().expect("sqlx does not panic")
        });
        done.map_err(|source| self.failed(source))
    }

    fn read(&self, max_bytes: u64) -> Result<Vec<Generation>, StateError> {
        let limit = i64::try_from(max_bytes).unwrap_or(i64::MAX);
        let rows = self.run(async move |connection| {
            // The lock is taken by the first transaction that writes, and kept.
            let mut transaction = connection.begin_with("BEGIN EXCLUSIVE").await?;
            sqlx::query(TABLE).execute(&mut *transaction).await?;
            let rows = sqlx::query(
                "SELECT generation, coalesce(length(document), 0), CASE WHEN length(document) <= ?1 AND typeof(document) = 'blob' THEN document END
                 FROM service_state WHERE aside IS NULL ORDER BY generation DESC",
            )
            .bind(limit)
            .fetch_all(&mut *transaction)
            .await?;
            transaction.commit().await?;
            rows.into_iter()
                .map(|row| Ok((row.try_get::<i64, _>(0)?, row.try_get::<i64, _>(1)?, row.try_get(2)?)))
                .collect::<sqlx::Result<Vec<(i64, i64, Option<Vec<u8>>)>>>()
        })?;
        *self.found.lock() = rows.iter().map(|(generation, ..)| *generation).collect();
        let generation = |(generation, bytes, document): (i64, i64, Option<Vec<u8>>)| {
            let too_large = || format!("it has {bytes} bytes of the {max_bytes} allowed, or is no BLOB");
            let name = format!("generation {generation} of {}", self.place);
            Generation::new(name, document.ok_or_else(too_large))
        };
        Ok(rows.into_iter().map(generation).collect())
    }

    fn failed(&self, source: sqlx::Error) -> StateError {
        if code(&source) == Some(BUSY_CODE) {
            return StateError::Held { place: self.place.clone(), by: "another process".to_owned() };
        }
        StateError::Backend { place: self.place.clone(), source: source.into() }
    }
}

impl StateBackend for SqlState {
    fn open(&self, max_bytes: u64) -> Result<Vec<Generation>, StateError> {
        match self.read(max_bytes) {
            Err(StateError::Backend { place, source }) if is_damage(&*source) => {
                // What is in a state never keeps a service from starting: the whole file is moved away.
                *self.connection.lock() = None;
                let file = self.options.get_filename();
                let mut aside = file.as_os_str().to_owned();
                aside.push(".damaged");
                std::fs::rename(file, &aside)
                    .map_err(|source| StateError::Backend { place: place.clone(), source: source.into() })?;
                let reason = format!("{source}; it is now {}", aside.display());
                let mut generations = self.read(max_bytes)?;
                self.found.lock().push(NOT_A_ROW);
                generations.push(Generation::new(place, Err(reason)));
                Ok(generations)
            }
            read => read,
        }
    }

    fn save(&self, document: &[u8]) -> Result<(), StateError> {
        self.run(async move |connection| {
            let mut transaction = connection.begin().await?;
            sqlx::query(
                "INSERT INTO service_state (generation, document)
                 SELECT coalesce(max(generation), 0) + 1, ?1 FROM service_state",
            )
            .bind(document)
            .execute(&mut *transaction)
            .await?;
            // The newest two of those that can be used, and of those that cannot.
            sqlx::query(
                "DELETE FROM service_state WHERE generation NOT IN
                 (SELECT generation FROM service_state WHERE aside IS NULL ORDER BY generation DESC LIMIT 2)
                 AND generation NOT IN
                 (SELECT generation FROM service_state WHERE aside IS NOT NULL ORDER BY aside DESC LIMIT 2)",
            )
            .execute(&mut *transaction)
            .await?;
            transaction.commit().await
        })
    }

    fn set_aside(&self, index: usize, now_unix_ms: u64) -> Result<Option<String>, StateError> {
        let Some(generation) = self.found.lock().get(index).copied() else { return Ok(None) };
        if generation == NOT_A_ROW {
            return Ok(None);
        }
        let now = i64::try_from(now_unix_ms).unwrap_or(i64::MAX);
        self.run(async move |connection| {
            sqlx::query("UPDATE service_state SET aside = ?1 WHERE generation = ?2")
                .bind(now)
                .bind(generation)
                .execute(connection)
                .await
        })?;
        Ok(Some(format!("marked in its column \"aside\": {now}")))
    }

    fn close(&self) {
        let connection = self.connection.lock().take();
        thread::scope(|scope| {
            // What a close says after the last commit changes nothing.
            scope.spawn(|| self.runtime.block_on(async { connection?.close().await.ok() }));
        });
    }

    fn place(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.place)
    }
}
