//! A PgBouncer between this process and its PostgreSQL: a database of the process's own in it, from before the pool is opened
//! until after it is closed.
//!
//! The pool is as small as the pooler's, because connections wait there, not at the server. What a stop cancels it cancels at the server
//! itself. The pooler needs `ignore_startup_parameters = extra_float_digits`; pooling by transaction needs prepared statements there
//! (`max_prepared_statements`, from 1.21 on; the default from 1.24 on).

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shutdown_core::{BoxError, Builder, Stage, StageContext, sentence};
use shutdown_pgbouncer::{DatabaseName, Error, PgBouncer, Registration};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Access, Connections, DatabaseUrl};

/// The stage, right after Database: see [`Registration`].
const STAGE: &str = "pgbouncer";
/// What it has: others may have a transaction open.
const BUDGET: Duration = Duration::from_secs(3);
/// How long a start waits for others who edit.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which PgBouncer, and as what.
#[derive(Clone, Debug)]
pub struct Pooler {
    config: PathBuf,
    database: Option<DatabaseName>,
}

impl Pooler {
    /// By way of a server with pooled connections, so many are enough.
    pub const CONNECTIONS: Connections = Connections::of(4);

    /// The one with this configuration, in front of this database, which is called so there; the default is made of the node's id.
    ///
    /// # Errors
    ///
    /// There is nothing to pool; one sentence.
    pub fn new(
        config: impl Into<PathBuf>,
        database: Option<DatabaseName>,
        url: Option<&DatabaseUrl>,
    ) -> Result<Self, String> {
        match url {
            Some(DatabaseUrl::Postgres(..)) => Ok(Self { config: config.into(), database }),
            Some(DatabaseUrl::Sqlite(_)) => {
                Err("PgBouncer pools PostgreSQL's connections, and the database is SQLite: \
                 give a database as postgres://HOST/NAME, or no PgBouncer"
                    .to_owned())
            }
            None => Err("PgBouncer pools a database's connections, and there is none: give a database as \
                 postgres://HOST/NAME, or no PgBouncer"
                .to_owned()),
        }
    }

    /// What the database is called there.
    pub fn database(&self, node: &str) -> DatabaseName {
        self.database.clone().unwrap_or_else(|| DatabaseName::near(node))
    }
}

/// Its configuration.
impl fmt::Display for Pooler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.config.display().fmt(f)
    }
}

/// Why there is no entry.
#[derive(Debug)]
pub struct EntryError {
    database: DatabaseName,
    config: PathBuf,
    source: Error,
}

impl fmt::Display for EntryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the database {} cannot be registered in {}", self.database, self.config.display())
    }
}

impl std::error::Error for EntryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// This process's entry, from when it is made until it is taken back. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Entry(Arc<Mutex<Option<Registration>>>);

impl Entry {
    /// Adds the stage that takes it back.
    pub fn stage(&self, builder: Builder) -> Builder {
        let entry = self.clone();
        builder.stage(Stage::Database, STAGE, BUDGET).stage_task(
            Stage::Custom(STAGE),
            "PgBouncer",
            move |stage| entry.taken_back(stage),
        )
    }

    /// Makes it, if there is a pooler; the way to the database then.
    ///
    /// # Errors
    ///
    /// The pooler does not run, or refuses.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the entry may be there, and nobody takes it back.
    pub async fn make(
        &self,
        pooler: Option<&Pooler>,
        access: Access,
        node: &str,
    ) -> Result<Access, EntryError> {
        let Some(pooler) = pooler else { return Ok(access) };
        let database = pooler.database(node);
        let failed =
            |source| EntryError { database: database.clone(), config: pooler.config.clone(), source };
        let connection = access.url.entry(access.connections).map_err(|what| failed(Error::Input(what)))?;
        let pgbouncer = PgBouncer::new(&pooler.config).lock_timeout(PATIENCE);
        let registration =
            Registration::register(pgbouncer, database.clone(), &connection).await.map_err(failed)?;
        let (host, port) = registration.client_side();
        tracing::info!(%database, "registered with the PgBouncer at {host}:{port}");
        let through = access.url.at((host, port), database.as_str());
        // Whatever comes now, it is taken back.
        *self.0.lock() = Some(registration);
        let through = through.map_err(|what| failed(Error::Input(what)))?;
        Ok(Access { through: Some(through), ..access })
    }

    /// Takes back what no stage has: of a start that has failed, or that a stop came into.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the entry may stay.
    pub async fn let_go(&self) {
        let stage = StageContext::new(Instant::now() + BUDGET, CancellationToken::new());
        if let Err(error) = self.clone().taken_back(stage).await {
            tracing::warn!("{}", sentence(&*error));
        }
    }

    async fn taken_back(self, stage: StageContext) -> Result<(), BoxError> {
        let registration = self.0.lock().take();
        match registration {
            Some(registration) => registration.deregister(stage).await,
            None => Ok(()),
        }
    }
}
