//! Clients of a PgBouncer: one that a test leads by the hand, and many in hot transactions, whose ends are counted.
//!
//! All speak the simple protocol, as sqlx does for a statement that is only a text: what PgBouncer does with prepared
//! statements differs from version to version.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgSslMode};
use sqlx::{ConnectOptions, Executor};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::PATIENCE;
use crate::servers::{Pgbouncer, Postgres};

/// How long each of two statements of a transaction takes: so long that a signal sent in a hurry comes before its end.
const SLEEP: &str = "SELECT pg_sleep(0.1)";
/// Where a pooler that takes no clients is asked again, or it would be asked without a pause.
const PAUSE: Duration = Duration::from_millis(5);

/// One client, in the test's own thread.
pub struct Client {
    connection: PgConnection,
    runtime: Runtime,
}

impl Client {
    /// Connects.
    ///
    /// # Panics
    ///
    /// If the pooler does not let it in.
    pub fn open(pgbouncer: &Pgbouncer) -> Self {
        Self::open_to(pgbouncer, "postgres")
    }

    /// Connects to this database of it.
    ///
    /// # Panics
    ///
    /// If the pooler does not let it in.
    pub fn open_to(pgbouncer: &Pgbouncer, database: &str) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let options = options(pgbouncer).database(database);
        let connection = runtime.block_on(options.connect()).expect("it takes clients");
        Self { connection, runtime }
    }

    /// Runs a statement to its end.
    ///
    /// # Errors
    ///
    /// What the server or the pooler said, or that it has hung up.
    ///
    /// # Panics
    ///
    /// If it takes too long.
    pub fn run(&mut self, sql: &str) -> Result<(), sqlx::Error> {
        let run = self.connection.execute(sql);
        let done = self.runtime.block_on(async { timeout(PATIENCE, run).await });
        done.expect("an answer or a broken connection").map(drop)
    }
}

/// How the clients' attempts ended by now.
#[derive(Clone, Debug, Default)]
pub struct Ends {
    /// Transactions whose COMMIT was answered.
    pub finished: usize,
    /// Transactions that failed between the answers to BEGIN and to COMMIT, and how.
    pub broken: Vec<String>,
    /// Attempts that failed before a transaction had begun. A pooler that stops may refuse.
    pub refused: usize,
}

/// Clients that begin the next transaction when the last one is over, and come back when they are cut off.
pub struct Load {
    ends: watch::Receiver<Ends>,
    over: CancellationToken,
    clients: JoinSet<()>,
    runtime: Runtime,
    table: String,
}

impl Load {
    /// Starts so many clients; every transaction writes a row.
    ///
    /// # Panics
    ///
    /// If the table for the rows cannot be made.
    pub fn start(postgres: &Postgres, pgbouncer: &Pgbouncer, clients: usize) -> Self {
        let table = format!("load_{}", pgbouncer.id());
        postgres.query(&format!("CREATE TABLE {table} (client int)"));
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let (count, ends) = watch::channel(Ends::default());
        let (count, over) = (Arc::new(count), CancellationToken::new());
        let mut set = JoinSet::new();
        for number in 0..clients {
            let statements = [
                format!("INSERT INTO {table} VALUES ({number})"),
                SLEEP.to_owned(),
                format!("SELECT count(*) FROM {table} WHERE client = {number}"),
                SLEEP.to_owned(),
            ];
            let (options, count, over) = (options(pgbouncer), Arc::clone(&count), over.clone());
            set.spawn_on(client(options, statements, count, over), runtime.handle());
        }
        Self { ends, over, clients: set, runtime, table }
    }

    /// Waits until so many transactions have finished, counted from now on.
    ///
    /// # Panics
    ///
    /// If it takes too long.
    pub fn finish(&mut self, more: usize) {
        let wanted = self.ends.borrow().finished + more;
        let reached = self.ends.wait_for(|ends| ends.finished >= wanted);
        let in_time = self.runtime.block_on(async { timeout(PATIENCE, reached).await.is_ok() });
        assert!(in_time, "{:?}", self.ends.borrow());
    }

    /// Ends it, each client between two transactions, and gives how all ended; the database's rows are the finished
    /// transactions' and, if the answer to COMMIT was lost, of broken ones.
    ///
    /// # Panics
    ///
    /// If a client does not end, or a row is missing or nobody's.
    pub fn stop(mut self, postgres: &Postgres) -> Ends {
        self.over.cancel();
        let all = async {
            while let Some(ended) = self.clients.join_next().await {
                ended.expect("a client does not panic");
            }
        };
        let in_time = self.runtime.block_on(async { timeout(PATIENCE, all).await.is_ok() });
        let ends = self.ends.borrow().clone();
        assert!(in_time, "a client hangs; {ends:?}");
        let rows = postgres.query(&format!("SELECT count(*) FROM {}", self.table));
        let rows: usize = rows.parse().expect("count gives a number");
        assert!((ends.finished..=ends.finished + ends.broken.len()).contains(&rows), "{rows} rows; {ends:?}");
        ends
    }
}

async fn client(
    options: PgConnectOptions,
    statements: [String; 4],
    count: Arc<watch::Sender<Ends>>,
    over: CancellationToken,
) {
    while !over.is_cancelled() {
        let Ok(mut connection) = options.connect().await else {
            count.send_modify(|ends| ends.refused += 1);
            sleep(PAUSE).await;
            continue;
        };
        while !over.is_cancelled() {
            if connection.execute("BEGIN").await.is_err() {
                count.send_modify(|ends| ends.refused += 1);
                break;
            }
            if let Err(error) = rest(&mut connection, &statements).await {
                count.send_modify(|ends| ends.broken.push(error.to_string()));
                break;
            }
            count.send_modify(|ends| ends.finished += 1);
        }
    }
}

/// A transaction from its first statement to the answer to COMMIT.
async fn rest(connection: &mut PgConnection, statements: &[String]) -> Result<(), sqlx::Error> {
    for statement in statements.iter().map(String::as_str).chain(["COMMIT"]) {
        connection.execute(statement).await?;
    }
    Ok(())
}

fn options(pgbouncer: &Pgbouncer) -> PgConnectOptions {
    PgConnectOptions::new_without_pgpass()
        .socket(pgbouncer.socket_dir())
        .port(pgbouncer.port())
        .username("postgres")
        .database("postgres")
        .ssl_mode(PgSslMode::Disable)
        // A pooler that nobody has told to ignore it refuses this one.
        .extra_float_digits(None)
        .disable_statement_logging()
}
