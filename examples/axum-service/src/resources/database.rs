//! A database by its URL: SQLite in a file, or PostgreSQL.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use shutdown_core::BoxError;
use sqlx::any::{Any, AnyConnectOptions, AnyPoolOptions};
use sqlx::pool::PoolConnection;
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AnyConnection, AnyPool, ConnectOptions, Connection, PgConnection};
use tokio::time::timeout;

/// How long a request waits for a connection, and a start for the server.
const ACQUIRE: Duration = Duration::from_secs(5);

/// From one look for connections that are still open to the next.
const STILL_OPEN: Duration = Duration::from_millis(5);

/// Milliseconds since the Unix epoch, as the tables here keep time.
pub fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Where a database is: `sqlite:path` or `postgres://user:password@host:port/name`.
#[derive(Clone)]
pub enum DatabaseUrl {
    /// A file, made if it is not there; `sqlite::memory:` is gone with the process.
    Sqlite(String),
    /// A server. Its options are those of libpq's URLs, `sslmode` for example.
    Postgres(Box<PgConnectOptions>, String),
}

impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("sqlite:") {
            let url = match path.trim_start_matches("//") {
                "" => {
                    return Err(
                        "the database URL \"sqlite:\" has no path: write sqlite:service.db".to_owned()
                    );
                }
                // Without a mode sqlx would not make the file.
                path if path.contains('?') || path.contains(":memory:") => text.to_owned(),
                _ => format!("{text}?mode=rwc"),
            };
            return match url.parse::<SqliteConnectOptions>() {
                Ok(_) => Ok(Self::Sqlite(url)),
                Err(error) => Err(format!(
                    "the database URL cannot be read: {error}; write sqlite:PATH, with %3F for a ?"
                )),
            };
        }
        if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
            let Some(scheme) = super::scheme(text) else {
                return Err("that is no database URL: write sqlite:PATH or postgres://HOST/NAME".to_owned());
            };
            return Err(format!(
                "no database is known by {scheme:?}: write sqlite:PATH or postgres://HOST/NAME"
            ));
        }
        let options = text.parse::<PgConnectOptions>().map_err(|error| {
            format!("the database URL cannot be read: {error}; write postgres://user:password@host:5432/name")
        })?;
        Ok(Self::Postgres(Box::new(options), text.to_owned()))
    }
}

impl DatabaseUrl {
    /// The database in a file.
    pub fn file(path: &std::path::Path) -> Self {
        // A URL: these three would mean something else in it.
        let path = path.display().to_string().replace('%', "%25").replace('?', "%3F").replace('#', "%23");
        Self::Sqlite(format!("sqlite:{path}?mode=rwc"))
    }

    /// As an entry of a PgBouncer that keeps so many connections to it.
    ///
    /// # Errors
    ///
    /// It is no server, or PgBouncer would misread it: one sentence.
    pub(super) fn entry(&self, connections: Connections) -> Result<shutdown_pgbouncer::Connection, String> {
        let Self::Postgres(options, _) = self else {
            return Err(format!("{} has no connections to pool", self.name()));
        };
        let socket = options.get_socket().map(|dir| dir.display().to_string());
        shutdown_pgbouncer::Connection::default()
            .set("host", socket.as_deref().unwrap_or(options.get_host()))?
            .set("port", &options.get_port().to_string())?
            // As libpq has it.
            .set("dbname", options.get_database().unwrap_or(options.get_username()))?
            .set("pool_size", &connections.to_string())
    }

    /// The database of this name there, with the same user, password and options; without TLS where there is none.
    ///
    /// # Errors
    ///
    /// It cannot be read any more; one sentence.
    pub(super) fn at(&self, (host, port): (&str, u16), name: &str) -> Result<Self, String> {
        let Self::Postgres(_, text) = self else { return Ok(self.clone()) };
        let rest = text.split_once("://").map_or(text.as_str(), |(_, rest)| rest);
        let rest = rest.split('#').next().unwrap_or_default();
        let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
        let authority = address.split('/').next().unwrap_or_default();
        let user = authority.rsplit_once('@').map_or(String::new(), |(user, _)| format!("{user}@"));
        // Whatever says where it is.
        let place = ["host", "hostaddr", "port", "dbname", "sslmode", "ssl-mode"];
        let kept = query.split('&').filter(|pair| {
            let key = pair.split('=').next().unwrap_or_default();
            !pair.is_empty() && !place.contains(&key)
        });
        let mut pairs: Vec<_> = kept.map(ToOwned::to_owned).collect();
        let host: String = host.bytes().map(|byte| format!("%{byte:02X}")).collect();
        pairs.push(format!("host={host}&port={port}&sslmode=prefer"));
        let url = format!("postgres://{user}localhost/{name}?{}", pairs.join("&"));
        url.parse()
    }

    /// Whether it is in this process: there is no server to ask.
    pub fn is_embedded(&self) -> bool {
        matches!(self, Self::Sqlite(_))
    }

    /// What people call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sqlite(_) => "SQLite",
            Self::Postgres(..) => "PostgreSQL",
        }
    }
}

/// Without user and password.
impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(url) => {
                let path = url.split('?').next().unwrap_or(url);
                f.write_str(&path.replace("%3F", "?").replace("%23", "#").replace("%25", "%"))
            }
            Self::Postgres(options, _) => {
                write!(f, "postgres://{}:{}", options.get_host(), options.get_port())?;
                options.get_database().map_or(Ok(()), |name| write!(f, "/{name}"))
            }
        }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The most connections that there are, for requests and for background tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections {
    requests: u32,
    tasks: u32,
}

impl Connections {
    /// So many in all: six of sixteen for tasks, at least one for each.
    pub const fn of(total: u16) -> Self {
        let total = total as u32;
        let tasks = if total < 3 { 1 } else { total * 6 / 16 };
        Self { requests: if total < 3 { 1 } else { total - tasks }, tasks }
    }

    /// In all.
    pub fn total(self) -> u32 {
        self.requests + self.tasks
    }
}

/// To a server itself.
impl Default for Connections {
    fn default() -> Self {
        Self::of(16)
    }
}

impl FromStr for Connections {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().parse() {
            Ok(total) if total >= 2 => Ok(Self::of(total)),
            _ => Err("write how many connections, from 2 on: some for requests, some for tasks".to_owned()),
        }
    }
}

impl fmt::Display for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.total())
    }
}

/// A database, the way to it, and by how many connections.
#[derive(Clone, Debug)]
pub struct Access {
    pub(super) url: DatabaseUrl,
    /// A pooler's database that is this one.
    pub(super) through: Option<DatabaseUrl>,
    pub(super) connections: Connections,
}

impl Access {
    /// By so many connections to itself.
    pub fn new(url: DatabaseUrl, connections: Connections) -> Self {
        Self { url, through: None, connections }
    }
}

impl From<DatabaseUrl> for Access {
    fn from(url: DatabaseUrl) -> Self {
        Self::new(url, Connections::default())
    }
}

/// Statements that make the tables, each harmless when they are there. `$id` is a key that the database counts itself.
pub type Schema = &'static [&'static str];

/// A pool of connections. Clones share it.
#[derive(Clone)]
pub struct Database {
    pool: AnyPool,
    /// For background tasks: queries that requests have abandoned keep their connections, and all tasks would wait for
    /// one. The same as `pool` for SQLite.
    tasks: AnyPool,
    url: DatabaseUrl,
    /// By which the server knows our connections from everybody else's.
    application: String,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.url, f)
    }
}

/// A database that cannot be used.
#[derive(Debug)]
pub struct OpenError {
    access: Access,
    source: sqlx::Error,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the database {} cannot be used", self.access.url)?;
        self.access.through.as_ref().map_or(Ok(()), |_| f.write_str(" through PgBouncer"))
    }
}

impl std::error::Error for OpenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

impl Database {
    /// Connects, and makes the tables that are missing.
    ///
    /// # Errors
    ///
    /// The database cannot be reached within five seconds, or refuses.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn open(access: impl Into<Access>, program: &str, schema: Schema) -> Result<Self, OpenError> {
        let access = access.into();
        let failed = |source| OpenError { access: access.clone(), source };
        sqlx::any::install_default_drivers();
        // In a container every process is number 1: the time tells them apart.
        let application = format!("{program}-{}-{:x}", std::process::id(), now_ms());
        let Access { url, through, connections } = &access;
        let way = through.as_ref().unwrap_or(url);
        reach(way, &options(way, "start").map_err(failed)?).await.map_err(failed)?;
        let options = options(way, &application).map_err(failed)?;
        let pool = pool(way, options, connections.requests).await.map_err(failed)?;
        let tasks = match url {
            DatabaseUrl::Sqlite(_) => pool.clone(),
            DatabaseUrl::Postgres(..) => {
                let same = pool.options().clone().max_connections(connections.tasks);
                same.connect_lazy_with(pool.connect_options().as_ref().clone())
            }
        };
        let database = Self { pool, tasks, application, url: url.clone() };
        database.make_tables(schema).await.map_err(failed)?;
        Ok(database)
    }

    async fn make_tables(&self, schema: Schema) -> Result<(), sqlx::Error> {
        let (key, before) = match self.url {
            DatabaseUrl::Sqlite(_) => ("INTEGER PRIMARY KEY", &[][..]),
            DatabaseUrl::Postgres(..) => (
                "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY",
                &[
                    // Two instances that start at once would both find no table.
                    "SELECT 1 FROM pg_advisory_xact_lock(4853205147)",
                    // That a table is there is no news.
                    "SET LOCAL client_min_messages = warning",
                ][..],
            ),
        };
        let mut transaction = self.begin(&self.pool).await?;
        for statement in before {
            sqlx::query(statement).execute(&mut *transaction).await?;
        }
        for statement in schema {
            sqlx::query(&statement.replace("$id", key)).execute(&mut *transaction).await?;
        }
        transaction.commit().await
    }

    /// Begins a transaction on a connection of `pool`: one of ours.
    ///
    /// # Errors
    ///
    /// There is no connection to be had, or the database is locked.
    pub async fn begin(&self, pool: &AnyPool) -> Result<Transaction, sqlx::Error> {
        let mut transaction = Transaction { connection: pool.acquire().await?, ended: false };
        // SQLite: the lock now, when it can be waited for, and not in the middle.
        let begin = if self.url.is_embedded() { "BEGIN IMMEDIATE" } else { "BEGIN" };
        sqlx::query(begin).execute(&mut *transaction).await?;
        Ok(transaction)
    }

    /// The pool for requests. Parameters are `$1`, `$2`, …, whatever the database.
    pub fn pool(&self) -> &AnyPool {
        &self.pool
    }

    /// The pool for background tasks.
    pub fn tasks(&self) -> &AnyPool {
        &self.tasks
    }

    /// Where it is, without user and password.
    pub fn url(&self) -> &DatabaseUrl {
        &self.url
    }

    /// How many connections there are.
    pub fn connections(&self) -> u32 {
        let tasks = if self.url.is_embedded() { 0 } else { self.tasks.size() };
        self.pool.size() + tasks
    }

    /// Refuses new queries at once, then waits for those that run, and for their connections to end. It has no limit.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe; new queries stay refused.
    pub async fn close(&self) {
        // sqlx's `close` may be over while a query still runs: each idle connection that it closes counts as one that has
        // come back, and one that comes back at that moment stays open (launchbadge/sqlx#3217). Asking again is the only
        // way to know.
        loop {
            tokio::join!(self.pool.close(), self.tasks.close());
            if self.connections() == 0 {
                return;
            }
            tokio::time::sleep(STILL_OPEN).await;
        }
    }

    /// Has the server cancel the queries that run on our connections, and says which.
    ///
    /// SQLite has no server: its queries end with the process, and what they had not committed is undone.
    ///
    /// # Errors
    ///
    /// The server does not take another connection.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe; what was cancelled stays so.
    pub async fn cancel_queries(&self) -> Result<Vec<String>, BoxError> {
        self.ask("pg_cancel_backend", "AND state <> 'idle'").await
    }

    /// Has the server end our connections, whatever they do.
    ///
    /// # Errors
    ///
    /// As [`cancel_queries`](Self::cancel_queries).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn end_connections(&self) -> Result<Vec<String>, BoxError> {
        self.ask("pg_terminate_backend", "").await
    }

    /// Over a connection of its own: those of the pool may all be taken, and new ones are refused.
    async fn ask(&self, function: &str, which: &str) -> Result<Vec<String>, BoxError> {
        let DatabaseUrl::Postgres(options, _) = &self.url else { return Ok(Vec::new()) };
        let mut connection: PgConnection = options.clone().application_name("shutdown").connect().await?;
        // The beginning of a query is enough to know it by.
        let queries = sqlx::query_scalar(&format!(
            "SELECT left(regexp_replace(query, '\\s+', ' ', 'g'), 80) FROM \
             (SELECT query, {function}(pid) AS done FROM pg_stat_activity WHERE application_name = $1 {which}) AS asked \
             WHERE done"
        ))
        .bind(&self.application)
        .fetch_all(&mut connection)
        .await?;
        connection.close().await?;
        Ok(queries)
    }
}

/// A transaction that is undone unless it is committed, and with it its connection: a COMMIT that fails for want of room leaves
/// SQLite's transaction open, and whoever had the connection next would write into it for nothing.
pub struct Transaction {
    connection: PoolConnection<Any>,
    ended: bool,
}

impl Transaction {
    /// Makes it last.
    ///
    /// # Errors
    ///
    /// The database's own: then nothing of it does.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: it is not known whether it lasts.
    pub async fn commit(mut self) -> Result<(), sqlx::Error> {
        sqlx::query("COMMIT").execute(&mut *self.connection).await?;
        self.ended = true;
        Ok(())
    }
}

impl fmt::Debug for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transaction").field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Deref for Transaction {
    type Target = AnyConnection;

    fn deref(&self) -> &AnyConnection {
        &self.connection
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut AnyConnection {
        &mut self.connection
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if !self.ended {
            self.connection.close_on_drop();
        }
    }
}

/// How to connect; without sqlx's own log of statements, which repeats them whole.
fn options(url: &DatabaseUrl, application: &str) -> Result<AnyConnectOptions, sqlx::Error> {
    let url = match url {
        DatabaseUrl::Sqlite(url) => url.clone(),
        // The last of two names counts.
        DatabaseUrl::Postgres(_, text) => {
            format!("{text}{}application_name={application}", if text.contains('?') { '&' } else { '?' })
        }
    };
    Ok(AnyConnectOptions::from_str(&url)?.disable_statement_logging())
}

/// Connects once, outside the pool, which tries again and again and says only that its time is over.
async fn reach(url: &DatabaseUrl, options: &AnyConnectOptions) -> Result<(), sqlx::Error> {
    let reached = async {
        let mut connection = AnyConnection::connect_with(options).await?;
        prepare(url, &mut connection).await?;
        connection.close().await
    };
    let late = || {
        let text = format!("no answer within {} s", ACQUIRE.as_secs());
        sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, text))
    };
    timeout(ACQUIRE, reached).await.unwrap_or_else(|_| Err(late()))
}

/// What each connection is told first.
async fn prepare(url: &DatabaseUrl, connection: &mut AnyConnection) -> Result<(), sqlx::Error> {
    match url {
        DatabaseUrl::Sqlite(url) if url.contains(":memory:") => {}
        DatabaseUrl::Sqlite(_) => {
            // Readers beside a writer; a crash of the process loses nothing that was committed.
            sqlx::query("PRAGMA journal_mode = WAL").execute(&mut *connection).await?;
            sqlx::query("PRAGMA synchronous = NORMAL").execute(&mut *connection).await?;
        }
        DatabaseUrl::Postgres(..) => {
            // A server looks for its client while it works, and not only when it has something to say: so a query does not go
            // on for a process that was killed. From 14 on, and not on every system: else as ever.
            let _ = sqlx::query("SET client_connection_check_interval = '2s'").execute(connection).await;
        }
    }
    Ok(())
}

async fn pool(url: &DatabaseUrl, options: AnyConnectOptions, most: u32) -> Result<AnyPool, sqlx::Error> {
    let mut pool = AnyPoolOptions::new().max_connections(most).acquire_timeout(ACQUIRE);
    if matches!(url, DatabaseUrl::Sqlite(url) if url.contains(":memory:")) {
        // Each connection has a memory of its own, which goes with it.
        pool = pool.max_connections(1).min_connections(1).idle_timeout(None).max_lifetime(None);
    }
    let of = url.clone();
    let pool = pool.after_connect(move |connection, _| {
        let url = of.clone();
        Box::pin(async move { prepare(&url, connection).await })
    });
    pool.connect_with(options).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_shown_without_user_and_password() {
        for (text, shown) in [
            ("sqlite:a.db", "sqlite:a.db"),
            ("sqlite://a.db?mode=ro", "sqlite://a.db"),
            ("postgres://me:secret@db:5433/orders", "postgres://db:5433/orders"),
        ] {
            let url: DatabaseUrl = text.parse().unwrap();
            assert_eq!((url.to_string(), format!("{url:?}")), (shown.to_owned(), shown.to_owned()));
        }
    }

    #[test]
    fn connections_are_shared_out_as_ten_to_six_and_at_least_one_each() {
        for (total, requests, tasks) in [(16, 10, 6), (4, 3, 1), (2, 1, 1), (3, 2, 1), (32, 20, 12)] {
            assert_eq!(total.to_string().parse(), Ok(Connections { requests, tasks }));
        }
        for wrong in ["", "0", "1", "-4", "many", "70000"] {
            wrong.parse::<Connections>().unwrap_err();
        }
    }

    #[test]
    fn by_way_of_a_pooler_only_the_place_and_the_name_are_other_ones() {
        for text in [
            "postgres://me:p%40ss@db:5433/orders?statement-cache-capacity=7&sslmode=require",
            "postgresql:///orders?host=/run/postgresql&port=5433&user=me&password=p%40ss&statement-cache-capacity=7",
            "postgres://me:p%40ss@%2Frun%2Fpostgresql:5433/orders?statement-cache-capacity=7#x",
        ] {
            let url: DatabaseUrl = text.parse().unwrap();
            for (host, socket) in [("/run/a b", true), ("::1", false), ("127.0.0.1", false)] {
                let DatabaseUrl::Postgres(options, text) = url.at((host, 6432), "node_1").unwrap() else {
                    panic!("{text}")
                };
                assert_eq!((options.get_port(), options.get_database()), (6432, Some("node_1")), "{text}");
                let at = options.get_socket().map(|dir| dir.display().to_string());
                assert_eq!(at.as_deref().unwrap_or(options.get_host()), host, "{text}");
                assert_eq!(at.is_some(), socket, "{text}");
                let shown = format!("{options:?}");
                for kept in ["username: \"me\"", "password: Some(\"p@ss\")", "statement_cache_capacity: 7"] {
                    assert!(shown.contains(kept), "{kept} is not in {shown}");
                }
            }
        }
    }

    /// A pool with idle connections, and a query under way in another one.
    async fn busy_among_idle(dir: &std::path::Path) -> (Database, tokio::task::JoinHandle<()>) {
        let url = DatabaseUrl::file(&dir.join("a.db"));
        let database = Database::open(url, "test", &[]).await.unwrap();
        let mut all = Vec::new();
        for _ in 0..Connections::default().requests {
            all.push(database.pool().acquire().await.unwrap());
        }
        let mut busy = all.pop().unwrap();
        drop(all);
        while database.pool().num_idle() < 9 {
            tokio::task::yield_now().await;
        }
        let querying = tokio::spawn(async move {
            const COUNT: &str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 500000) SELECT max(i) FROM n";
            sqlx::query(COUNT).execute(&mut *busy).await.unwrap();
        });
        (database, querying)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn closing_waits_for_a_query_among_idle_connections_which_the_pools_own_close_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let (database, querying) = busy_among_idle(dir.path()).await;
        database.close().await;
        assert_eq!((database.pool().size(), querying.is_finished()), (0, true));

        // The defect that is worked around.
        let (database, querying) = busy_among_idle(dir.path()).await;
        database.pool().close().await;
        assert!(database.pool().size() > 0 && !querying.is_finished());
        querying.await.unwrap();
    }

    #[test]
    fn a_wrong_url_is_one_sentence_that_never_repeats_the_password() {
        for text in [
            "mysql://me:secret@db/x",
            "sqlite:",
            "postgres://me:secret@db:port/x",
            "",
            "secret@db",
            "sqlite:a?b.db",
        ] {
            let error = text.parse::<DatabaseUrl>().unwrap_err();
            assert!(error.contains("write "), "{error}");
            assert!(!error.contains("secret") && error.lines().count() == 1, "{error}");
        }
    }
}
