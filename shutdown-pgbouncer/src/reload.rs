//! Telling PgBouncer to read its files again, and looking whether it has.
//!
//! `RELOAD` answers well although it failed, before 1.25, and with a broken user list in every version (measured on 1.18 to 1.26).
//! So what PgBouncer says that it has is compared with what the file says.

use shutdown_core::companions::{Companion, StopSignal};

use crate::console::{Console, ConsoleAddress, Row};
use crate::pgbouncer::not_found;
use crate::{Connection, DatabaseName, Error, Ini, UserName};

/// What PgBouncer says to who got in and is none of `admin_users`.
const NO_ADMIN: &str = "admin access needed";

/// What became of a reload.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reloaded {
    /// It runs by its files: they were compared.
    Verified,
    /// It was sent SIGHUP, and nobody has looked: its console cannot be reached, and why.
    Signalled {
        /// Its number.
        pid: u32,
        /// Why nobody has looked.
        unseen: String,
    },
    /// It was not told, and why.
    NotAsked(String),
}

/// What must be there after a reload, beside the databases of the file.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    databases: bool,
    gone: Option<String>,
    parameter: Option<(String, String)>,
    user: Option<String>,
}

impl Expected {
    pub(crate) fn nothing() -> Self {
        Self::default()
    }

    pub(crate) fn databases() -> Self {
        Self { databases: true, ..Self::default() }
    }

    /// The database is gone; unless any name is a database.
    pub(crate) fn without(name: &DatabaseName, any: bool) -> Self {
        Self { gone: (!any).then(|| name.as_str().to_owned()), ..Self::databases() }
    }

    pub(crate) fn parameter(key: &str, value: &str) -> Self {
        Self { parameter: Some((key.to_owned(), value.to_owned())), ..Self::databases() }
    }

    pub(crate) fn user(name: &UserName) -> Self {
        Self { user: Some(name.as_str().to_owned()), ..Self::default() }
    }
}

/// Tells PgBouncer to reload: through its console, and looks; else by SIGHUP.
pub(crate) async fn reload(
    ini: &Ini,
    addresses: &[ConsoleAddress],
    process: Option<&Companion>,
    expected: &Expected,
    notes: &mut Vec<String>,
) -> Result<Reloaded, Error> {
    let unseen = match open(addresses).await {
        Ok(console) => {
            let verified = reload_and_look(&console, ini, expected, notes).await;
            console.close().await;
            match verified {
                Err(Error::Unreachable(said)) if said.ends_with(NO_ADMIN) => Error::Unreachable(said),
                verified => return verified.map(|()| Reloaded::Verified),
            }
        }
        Err(unseen) => unseen,
    };
    let Some(process) = process else { return Err(unseen) };
    match process.signal(StopSignal::Hup).await {
        Ok(pid) => Ok(Reloaded::Signalled { pid, unseen: unseen.to_string() }),
        Err(why) => Err(Error::Unreachable(format!("{unseen}; and by its PID file: {}", not_found(&why)))),
    }
}

/// Opens the first console that can be: an edit may have changed where it will be.
async fn open(addresses: &[ConsoleAddress]) -> Result<Console, Error> {
    let mut first = None;
    for address in addresses {
        match Console::open(address).await {
            Ok(console) => return Ok(console),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or_else(|| Error::Unreachable("there is no admin console".to_owned())))
}

async fn reload_and_look(
    console: &Console,
    ini: &Ini,
    expected: &Expected,
    notes: &mut Vec<String>,
) -> Result<(), Error> {
    let refused = |error: Error| Error::Unverified(format!("PgBouncer refused the reload: {error}"));
    let version = console.version().await?;
    let before = match &expected.parameter {
        Some((key, _)) => parameter(console, key).await?,
        None => None,
    };
    match console.tell("RELOAD").await {
        Err(Error::Unreachable(said)) if said.ends_with(NO_ADMIN) => return Err(Error::Unreachable(said)),
        told => told.map_err(refused)?,
    };
    // Before 1.25 it does not say so.
    if let Some(problem) = ini.problems(version).into_iter().find(|problem| problem.fatal) {
        return Err(Error::Unverified(format!("PgBouncer {version} refuses the file: {problem}")));
    }
    if expected.databases {
        let rows = console.tell("SHOW DATABASES").await?;
        compare(ini, &rows).map_err(Error::Unverified)?;
        if let Some(gone) = &expected.gone
            && rows.iter().any(|row| row.get("name") == Some(gone))
        {
            return Err(Error::Unverified(format!("PgBouncer still has database {gone}")));
        }
    }
    if let Some((key, value)) = &expected.parameter {
        let after = parameter(console, key).await?;
        if after
            .as_ref()
            .is_some_and(|row| row.get("changeable").is_some_and(|changeable| changeable == "no"))
        {
            notes.push(format!("{key} needs a restart of PgBouncer"));
        } else if value_of(&after) != Some(value.as_str())
            && value_of(&after) == value_of(&before)
            && !is_same(value, value_of(&before))
        {
            let is = value_of(&after).unwrap_or("nothing");
            return Err(Error::Unverified(format!("PgBouncer has {key} = {is} still")));
        }
    }
    if let Some(user) = &expected.user {
        let rows = console.tell("SHOW USERS").await?;
        if !rows.iter().any(|row| row.get("name") == Some(user)) {
            return Err(Error::Unverified(format!(
                "PgBouncer does not have user {user:?}: its auth_file may be another one"
            )));
        }
    }
    Ok(())
}

async fn parameter(console: &Console, key: &str) -> Result<Option<Row>, Error> {
    let rows = console.tell("SHOW CONFIG").await?;
    Ok(rows.into_iter().find(|row| row.get("key").is_some_and(|name| name == key)))
}

fn value_of(row: &Option<Row>) -> Option<&str> {
    row.as_ref()?.get("value").map(String::as_str)
}

/// Whether two texts are one value: `1` and `yes`, `30` and `30.0`.
fn is_same(ours: &str, theirs: Option<&str>) -> bool {
    let Some(theirs) = theirs else { return ours.is_empty() };
    let number = |text: &str| match text.to_ascii_lowercase().as_str() {
        "yes" | "true" | "on" | "t" | "y" => Some(1.0),
        "no" | "false" | "off" | "f" | "n" => Some(0.0),
        text => text.parse::<f64>().ok(),
    };
    ours == theirs || number(ours).is_some_and(|ours| number(theirs) == Some(ours))
}

/// Whether what PgBouncer has is what the file says.
fn compare(ini: &Ini, rows: &[Row]) -> Result<(), String> {
    let databases = ini.databases();
    for (place, database) in databases.iter().enumerate() {
        let name = &database.name;
        // Of two the last counts.
        if name == "*" || databases[place + 1..].iter().any(|later| later.name == *name) {
            continue;
        }
        let Ok(connection) = &database.connection else { continue };
        let Some(row) = rows.iter().find(|row| row.get("name") == Some(name)) else {
            return Err(format!("PgBouncer does not have database {name}"));
        };
        for (what, wanted) in wanted(name, connection) {
            let has = what.iter().find_map(|column| row.get(*column)).map_or("", String::as_str);
            if has != wanted {
                return Err(format!("PgBouncer has {} {has:?} for database {name}, not {wanted:?}", what[0]));
            }
        }
    }
    Ok(())
}

/// What the columns of `SHOW DATABASES` must say. Only what is written as PgBouncer writes it.
fn wanted(name: &str, connection: &Connection) -> Vec<(&'static [&'static str], String)> {
    let mut wanted: Vec<(&'static [&'static str], String)> =
        vec![(&["database"], connection.get("dbname").unwrap_or(name).to_owned())];
    if let Some(host) = connection.get("host").filter(|host| !host.contains(',')) {
        wanted.push((&["host"], host.to_owned()));
    }
    let mut number = |key: &str, columns: &'static [&'static str]| {
        if let Some(value) =
            connection.get(key).filter(|value| value.parse::<u32>().is_ok_and(|n| n.to_string() == *value))
        {
            wanted.push((columns, value.to_owned()));
        }
    };
    number("port", &["port"]);
    number("pool_size", &["pool_size"]);
    number("reserve_pool", &["reserve_pool", "reserve_pool_size"]);
    number("reserve_pool_size", &["reserve_pool_size", "reserve_pool"]);
    wanted
}
