//! The configuration: the environment, then `.env`, then the default.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum_service::resources::{CacheUrl, Connections, DatabaseUrl, Pooler, RegistryUrl};
use axum_service::{dotenv, host, secrets};
use shutdown_core::{ShutdownConfig, UsageError, parse_duration};
use shutdown_pgbouncer::DatabaseName;

/// Everything that can be set, checked.
#[derive(Debug)]
pub(crate) struct Settings {
    /// `AXUM_SERVICE_LISTEN`, 127.0.0.1:3000.
    pub(crate) listen: SocketAddr,
    /// `AXUM_SERVICE_ADMIN`: where the admin routes are, if anywhere.
    pub(crate) admin: Option<SocketAddr>,
    /// `AXUM_SERVICE_ADMIN_TOKEN_FILE`: holds the bearer token for `POST /terminate`; required off loopback.
    pub(crate) admin_token: Option<Token>,
    /// `AXUM_SERVICE_REPORTS`: where reports are written, if anywhere.
    pub(crate) reports: Option<PathBuf>,
    /// `AXUM_SERVICE_NODE_ID`, `<host name>-<port>`: by what name registry and database know this process.
    pub(crate) node_id: Option<String>,
    /// `AXUM_SERVICE_ADVERTISE`, the listen address, `<host name>:<port>` if that is every address: what the registry is
    /// told.
    pub(crate) advertise: Option<String>,
    /// `AXUM_SERVICE_INTERVAL`, 1s: how often each background task works.
    pub(crate) interval: Duration,
    /// `AXUM_SERVICE_WORK`, 20ms: how long one iteration takes beside its queries.
    pub(crate) work: Duration,
    /// `DATABASE_URL`, `sqlite:axum-service.db`.
    pub(crate) database: DatabaseUrl,
    /// `DATABASE_CONNECTIONS`, 16, with a PgBouncer 4: the most connections, shared out between requests and tasks as ten to six.
    /// SQLite has those for requests.
    pub(crate) connections: Connections,
    /// `PGBOUNCER_CONFIG`: the configuration of a PgBouncer to reach the database through, if any: the process has a
    /// database of its own there while it runs. `PGBOUNCER_DATABASE`, the node's id, what is no part of a name replaced by `_`: how it
    /// is called. `DATABASE_URL` stays the server itself.
    pub(crate) pooler: Option<Pooler>,
    /// `CACHE_URL`, `memory:`.
    pub(crate) cache: CacheUrl,
    /// `CACHE_WRITE_INTERVAL`, 100ms: how long a write may wait for others.
    pub(crate) cache_interval: Duration,
    /// `REGISTRY_URL`: where to announce and to leave, if anywhere.
    pub(crate) registry: Option<RegistryUrl>,
    /// `SHUTDOWN_*`.
    pub(crate) budgets: ShutdownConfig,
}

/// Shown as nothing.
pub(crate) struct Token(pub(crate) String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

impl Settings {
    /// Reads `.env` at `path` and the environment, and checks every value. Writes nothing.
    ///
    /// # Errors
    ///
    /// The first mistake.
    pub(crate) fn load(path: &Path) -> Result<Self, UsageError> {
        Source { dotenv: dotenv::read(path).map_err(UsageError::new)? }.settings().map_err(UsageError::new)
    }
}

struct Source {
    dotenv: BTreeMap<String, String>,
}

impl Settings {
    /// This process's name, once its port is known.
    pub(crate) fn node(&self, port: u16) -> String {
        self.node_id.clone().unwrap_or_else(|| format!("{}-{port}", host::name()))
    }

    /// What the registry is told, once the address is known.
    pub(crate) fn advertised(&self, address: SocketAddr) -> String {
        self.advertise.clone().unwrap_or_else(|| host::reached_at(address))
    }
}

impl Source {
    fn settings(&self) -> Result<Settings, String> {
        let duration = |text: &str| parse_duration(text).map_err(|error| error.to_string());
        let address = |text: &str| {
            text.parse::<SocketAddr>()
                .map_err(|_| "write an IP address and a port, as 127.0.0.1:3000".to_owned())
        };
        let admin = self.value("AXUM_SERVICE_ADMIN", address)?;
        let token_file = "AXUM_SERVICE_ADMIN_TOKEN_FILE";
        let admin_token =
            self.value(token_file, |path| secrets::token(path, &format_args!("{path:?}")).map(Token))?;
        if let Some(admin) = admin
            && !admin.ip().is_loopback()
            && admin_token.is_none()
        {
            return Err(format!(
                "AXUM_SERVICE_ADMIN={admin} is not loopback, so anybody who reaches it could stop the service: set \
                 {token_file}, or listen on 127.0.0.1"
            ));
        }
        let often = |text: &str| match duration(text)? {
            Duration::ZERO => Err("write at least 1ms".to_owned()),
            time => Ok(time),
        };
        // It cannot pass on what is wrong with a source.
        let budgets = ShutdownConfig::from_lookup(|name| self.text(name).ok().flatten());
        for name in ShutdownConfig::VARIABLES {
            self.text(name)?;
        }
        let database = self
            .value("DATABASE_URL", str::parse)?
            .unwrap_or_else(|| DatabaseUrl::file(Path::new("axum-service.db")));
        let pooler = self.pooler(&database)?;
        let most = || if pooler.is_some() { Pooler::CONNECTIONS } else { Connections::default() };
        Ok(Settings {
            connections: self.value("DATABASE_CONNECTIONS", str::parse)?.unwrap_or_else(most),
            pooler,
            listen: self
                .value("AXUM_SERVICE_LISTEN", address)?
                .unwrap_or(SocketAddr::from(([127, 0, 0, 1], 3000))),
            admin,
            admin_token,
            reports: self.value("AXUM_SERVICE_REPORTS", |text| Ok(PathBuf::from(text)))?,
            node_id: self.value("AXUM_SERVICE_NODE_ID", |text| Ok(text.to_owned()))?,
            advertise: self.value("AXUM_SERVICE_ADVERTISE", |text| Ok(text.to_owned()))?,
            interval: self.value("AXUM_SERVICE_INTERVAL", often)?.unwrap_or(Duration::from_secs(1)),
            work: self.value("AXUM_SERVICE_WORK", duration)?.unwrap_or(Duration::from_millis(20)),
            database,
            cache: self.value("CACHE_URL", str::parse)?.unwrap_or(CacheUrl::Memory),
            cache_interval: self
                .value("CACHE_WRITE_INTERVAL", duration)?
                .unwrap_or(Duration::from_millis(100)),
            registry: self.value("REGISTRY_URL", str::parse)?,
            budgets: budgets.map_err(|error| error.to_string())?,
        })
    }

    fn pooler(&self, database: &DatabaseUrl) -> Result<Option<Pooler>, String> {
        let config = "PGBOUNCER_CONFIG";
        let name = self.value("PGBOUNCER_DATABASE", |text| {
            text.parse::<DatabaseName>().map_err(|error| error.to_string())
        })?;
        if name.is_some() && self.value(config, |_| Ok(()))?.is_none() {
            return Err(format!("PGBOUNCER_DATABASE is a database in a PgBouncer: set {config}, too"));
        }
        self.value(config, |path| Pooler::new(path, name.clone(), Some(database)))
    }

    /// A variable that is set and not empty.
    fn value<T>(&self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, String> {
        let Some(text) = self.text(name)?.filter(|text| !text.is_empty()) else { return Ok(None) };
        // The value itself is the parser's to repeat: a URL may hold a password.
        parse(&text).map(Some).map_err(|error| format!("{name}: {error}"))
    }

    fn text(&self, name: &str) -> Result<Option<String>, String> {
        match std::env::var_os(name) {
            Some(raw) => raw.into_string().map(Some).map_err(|_| format!("{name} is not Unicode")),
            None => Ok(self.dotenv.get(name).cloned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(dotenv: &str) -> Result<Settings, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".env");
        std::fs::write(&path, dotenv).unwrap();
        Settings::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn everything_has_a_default_and_dotenv_is_read() {
        let settings = load("").unwrap();
        assert_eq!(settings.database.name(), "SQLite");
        let settings = load("DATABASE_URL=postgres://db/orders\nSHUTDOWN_TOTAL_TIMEOUT=9s\n").unwrap();
        assert_eq!(settings.database.to_string(), "postgres://db:5432/orders");
        assert_eq!(settings.budgets.total, Duration::from_secs(9));
        assert_eq!((settings.pooler.is_none(), settings.connections.total()), (true, 16));
        let pooled = "DATABASE_URL=postgres://db/orders\nPGBOUNCER_CONFIG=/etc/pgbouncer/pgbouncer.ini\n";
        let settings = load(pooled).unwrap();
        assert_eq!(settings.pooler.unwrap().database("a b").as_str(), "a_b");
        assert_eq!(settings.connections.total(), 4);
        assert_eq!(load(&format!("{pooled}DATABASE_CONNECTIONS=9")).unwrap().connections.total(), 9);
    }

    #[test]
    fn every_mistake_is_one_sentence_that_names_the_variable_and_keeps_its_secrets() {
        for (dotenv, named) in [
            ("DATABASE_URL=mysql://me:secret@db/x", "DATABASE_URL: no database"),
            ("CACHE_URL=memcached://secret@a", "CACHE_URL: no cache"),
            ("REGISTRY_URL=http://me:secret@consul/", "REGISTRY_URL: the registry"),
            ("DATABASE_CONNECTIONS=1", "DATABASE_CONNECTIONS: write how many"),
            ("PGBOUNCER_CONFIG=/etc/pgbouncer/pgbouncer.ini", "PGBOUNCER_CONFIG: PgBouncer pools"),
            ("PGBOUNCER_DATABASE=a", "set PGBOUNCER_CONFIG, too"),
            ("PGBOUNCER_CONFIG=/a\nPGBOUNCER_DATABASE=a/b", "PGBOUNCER_DATABASE: \"a/b\" is no name"),
            ("AXUM_SERVICE_LISTEN=3000", "AXUM_SERVICE_LISTEN: write an IP"),
            ("AXUM_SERVICE_ADMIN=0.0.0.0:1", "AXUM_SERVICE_ADMIN=0.0.0.0:1 is not loopback"),
            ("AXUM_SERVICE_INTERVAL=soon", "AXUM_SERVICE_INTERVAL: "),
            ("AXUM_SERVICE_INTERVAL=0", "AXUM_SERVICE_INTERVAL: write at least 1ms"),
            (
                "AXUM_SERVICE_ADMIN_TOKEN_FILE=/none",
                "AXUM_SERVICE_ADMIN_TOKEN_FILE: the admin token file \"/none\"",
            ),
            ("SHUTDOWN_LINGER=soon", "SHUTDOWN_LINGER"),
            ("A=1\nPASSWORD=very secret", ".env, line 2"),
        ] {
            let error = load(dotenv).unwrap_err();
            assert!(error.contains(named), "{named} is not in: {error}");
            assert!(!error.contains("secret") && error.lines().count() == 1, "{error}");
        }
    }
}
