//! PgBouncer's admin console: a database called `pgbouncer` that speaks PostgreSQL's simple protocol and nothing else.
//!
//! A connection to it counts as a client: one that stays open holds up a stop that waits for clients. So every use opens
//! its own and closes it. Rows are read by the names of their columns, which have changed over the versions.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::Host;
use tokio_postgres::{Config, NoTls, SimpleQueryMessage};

use crate::{Error, Ini, Version};

/// How long a connection, and an answer that is not waited for on purpose, may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a console is, and who asks.
#[derive(Clone)]
pub struct ConsoleAddress(Config);

impl ConsoleAddress {
    /// Where the console of a PgBouncer with this configuration is: its Unix socket (`unix_socket_dir`, `/tmp` if that is not set),
    /// else its first `listen_addr`; asked as the user `pgbouncer`, whom PgBouncer lets in without a password when it runs as
    /// the same system user, else as the first of `admin_users`.
    pub fn of(ini: &Ini) -> Self {
        let parameter = |key: &str| ini.parameter(key).filter(|value| !value.is_empty());
        let mut config = Config::new();
        config.dbname("pgbouncer").connect_timeout(PATIENCE);
        if let Some(port) = parameter("listen_port").and_then(|port| port.parse().ok()) {
            config.port(port);
        } else {
            config.port(6432);
        }
        let socket_dir = parameter("unix_socket_dir");
        match (socket_dir, parameter("listen_addr")) {
            (Some(dir), _) => _ = config.host_path(dir),
            (None, Some(addresses)) => {
                let first = addresses.split(',').next().unwrap_or_default().trim();
                let reached = match first {
                    "*" | "0.0.0.0" => "127.0.0.1",
                    "::" => "::1",
                    other => other,
                };
                config.host(reached);
            }
            (None, None) => _ = config.host_path("/tmp"),
        }
        // Trusted only when it comes from the same system user over the Unix socket.
        let admin = parameter("admin_users")
            .and_then(|users| users.split(',').next().map(|user| user.trim().to_owned()));
        let same_user = matches!(config.get_hosts(), [Host::Unix(_)]);
        config.user(if same_user {
            "pgbouncer".to_owned()
        } else {
            admin.unwrap_or_else(|| "pgbouncer".to_owned())
        });
        if let Some(password) =
            std::env::var_os("PGPASSWORD").and_then(|password| password.into_string().ok())
        {
            config.password(password);
        }
        Self(config)
    }

    /// Where clients of this PgBouncer connect: host (a directory for a Unix socket) and port.
    pub fn client_side(&self) -> (String, u16) {
        let host = match self.0.get_hosts().first() {
            Some(Host::Tcp(host)) => host.clone(),
            #[cfg(unix)]
            Some(Host::Unix(dir)) => dir.display().to_string(),
            None => "/tmp".to_owned(),
        };
        (host, self.0.get_ports().first().copied().unwrap_or(6432))
    }

    /// Who listens there: a number that the system tells on a Unix socket, and nobody over a network.
    pub(crate) async fn listener(&self) -> Option<u32> {
        let Host::Unix(directory) = self.0.get_hosts().first()? else { return None };
        let port = self.0.get_ports().first().copied().unwrap_or(6432);
        let socket = UnixStream::connect(directory.join(format!(".s.PGSQL.{port}")));
        let socket = timeout(PATIENCE, socket).await.ok()?.ok()?;
        u32::try_from(socket.peer_cred().ok()?.pid()?).ok()
    }

    /// Whether it has a password of its own.
    pub fn has_password(&self) -> bool {
        self.0.get_password().is_some()
    }

    /// With a password; `PGPASSWORD` else.
    #[must_use]
    pub fn password(mut self, password: impl AsRef<[u8]>) -> Self {
        self.0.password(password);
        self
    }
}

impl FromStr for ConsoleAddress {
    type Err = String;

    /// Reads a PostgreSQL URL or `key=value` pairs: `postgres://pgbouncer@/pgbouncer?host=/run/pgbouncer&port=6432`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // What is wrong with it may quote a password.
        let mut config: Config = text
            .parse()
            .map_err(|_| "write the console as postgres://USER@HOST:PORT/pgbouncer".to_owned())?;
        if config.get_dbname().is_none() {
            config.dbname("pgbouncer");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(PATIENCE);
        }
        if config.get_password().is_none()
            && let Ok(password) = std::env::var("PGPASSWORD")
        {
            config.password(password);
        }
        Ok(Self(config))
    }
}

impl fmt::Display for ConsoleAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (host, port) = self.client_side();
        write!(f, "{host}:{port}")
    }
}

impl fmt::Debug for ConsoleAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConsoleAddress({self})")
    }
}

/// A row: column by name. What is NULL is not there.
pub type Row = BTreeMap<String, String>;

/// An open connection, gone when this is dropped; [`close`](Self::close) waits until PgBouncer has heard.
pub struct Console {
    /// There until it is closed.
    client: Option<tokio_postgres::Client>,
    connection: JoinHandle<()>,
    address: ConsoleAddress,
}

/// Why there is no answer to use.
pub(crate) enum Failure {
    /// PgBouncer refused.
    Refused(Error),
    /// It may have done it, or not, or may still.
    Unknown(Error),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(error) | Failure::Unknown(error) => error,
        }
    }
}

impl Console {
    /// Connects.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn open(address: &ConsoleAddress) -> Result<Self, Error> {
        let unreachable = |why: &dyn fmt::Display| {
            Error::Unreachable(format!("PgBouncer's admin console at {address} cannot be reached: {why}"))
        };
        let connecting = timeout(PATIENCE, address.0.connect(NoTls)).await;
        let (client, connection) = match connecting {
            Ok(Ok(connected)) => connected,
            Ok(Err(error)) => return Err(unreachable(&said(&error))),
            Err(_) => return Err(unreachable(&"it does not answer")),
        };
        // An error ends it, and whoever waits for an answer hears of that.
        let connection = tokio::spawn(async move { _ = connection.await });
        Ok(Self { client: Some(client), connection, address: address.clone() })
    }

    /// Whether PgBouncer has hung up.
    pub(crate) fn is_closed(&self) -> bool {
        self.connection.is_finished() || self.client.as_ref().is_none_or(tokio_postgres::Client::is_closed)
    }

    /// Sends one command and waits for its answer, without a limit.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`]: what PgBouncer said.
    ///
    /// # Cancel safety
    ///
    /// What was sent is done: a `PAUSE` whose answer nobody waits for still pauses.
    pub async fn ask(&self, command: &str) -> Result<Vec<Row>, Error> {
        Ok(self.asked(command).await?)
    }

    pub(crate) async fn asked(&self, command: &str) -> Result<Vec<Row>, Failure> {
        let client = self.client.as_ref().expect("it is taken by what consumes this");
        let messages = client.simple_query(command).await.map_err(|error| {
            let what =
                Error::Unreachable(format!("PgBouncer at {}: {command}: {}", self.address, said(&error)));
            if error.as_db_error().is_some() { Failure::Refused(what) } else { Failure::Unknown(what) }
        })?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                let names = row.columns().iter().map(|column| column.name().to_owned()).enumerate();
                Some(names.filter_map(|(at, name)| Some((name, row.get(at)?.to_owned()))).collect())
            }
            _ => None,
        });
        Ok(rows.collect())
    }

    /// As [`ask`](Self::ask), for what is answered at once.
    ///
    /// # Errors
    ///
    /// As [`ask`](Self::ask), and if there is no answer within five seconds.
    ///
    /// # Cancel safety
    ///
    /// As [`ask`](Self::ask).
    pub async fn tell(&self, command: &str) -> Result<Vec<Row>, Error> {
        Ok(self.told(command).await?)
    }

    pub(crate) async fn told(&self, command: &str) -> Result<Vec<Row>, Failure> {
        let late = |_| {
            let what = format!("PgBouncer at {}: {command}: it does not answer", self.address);
            Failure::Unknown(Error::Unreachable(what))
        };
        timeout(PATIENCE, self.asked(command)).await.map_err(late)?
    }

    /// Which PgBouncer it is.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn version(&self) -> Result<Version, Error> {
        let rows = self.tell("SHOW VERSION").await?;
        let said = rows.first().and_then(|row| row.values().next()).map_or("", String::as_str);
        said.parse().map_err(Error::Unreachable)
    }

    /// Closes the connection, and waits until it is.
    ///
    /// # Cancel safety
    ///
    /// It is closed in any case.
    pub async fn close(mut self) {
        self.client = None;
        let _ = timeout(PATIENCE, &mut self.connection).await;
    }

    /// Whether PgBouncer hangs up within this time: how it answers `SHUTDOWN`.
    pub(crate) async fn hung_up_within(mut self, time: Duration) -> bool {
        timeout(time, &mut self.connection).await.is_ok()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // An answer that is still to come would keep it open, and PgBouncer from stopping.
        self.connection.abort();
    }
}

/// A name as a command takes it.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// What went wrong, in PgBouncer's words if there are any.
pub(crate) fn said(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(said) => said.message().to_owned(),
        None => {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(error);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            text
        }
    }
}
