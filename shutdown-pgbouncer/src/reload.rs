//! Telling PgBouncer to read its files again, and looking whether it has.
//!
//! `RELOAD` answers well although it failed, before 1.25, and with a broken user list in every version (measured on 1.18 to 1.26).
//! So what PgBouncer says that it has is compared with what the file says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shutdown_core::companions::{Companion, Ending, StopSignal};
use tokio::time::sleep;

use crate::check::{Places, whole_with_places};
use crate::console::{Console, ConsoleAddress, Row};
use crate::pgbouncer::not_found;
use crate::references::{self, Eyes, Missing};
use crate::{Connection, DatabaseName, Error, Ini, UserName, check};

/// What PgBouncer says to who got in and is none of `admin_users`.
const NO_ADMIN: &str = "admin access needed";
/// How long it may take to hear a signal and to write a line.
const LAST_LINE: Duration = Duration::from_millis(100);

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

/// What must be there after a reload.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    /// These databases as the files say; what differs in others is noted. `None`: all.
    databases: Option<Vec<String>>,
    gone: Option<String>,
    parameter: Option<(String, String)>,
    user: Option<String>,
    /// The configuration before the edit.
    before: Option<Ini>,
    /// The file was so already.
    already: bool,
}

impl Expected {
    pub(crate) fn nothing() -> Self {
        Self { databases: Some(Vec::new()), ..Self::default() }
    }

    /// All databases.
    pub(crate) fn everything() -> Self {
        Self::default()
    }

    pub(crate) fn database(name: &DatabaseName) -> Self {
        Self { databases: Some(vec![name.as_str().to_owned()]), ..Self::default() }
    }

    /// The database is gone; unless any name is a database.
    pub(crate) fn without(name: &DatabaseName, any: bool) -> Self {
        Self { gone: (!any).then(|| name.as_str().to_owned()), ..Self::nothing() }
    }

    pub(crate) fn parameter(key: &str, value: &str) -> Self {
        Self { parameter: Some((key.to_owned(), value.to_owned())), ..Self::nothing() }
    }

    pub(crate) fn user(name: &UserName) -> Self {
        Self { user: Some(name.as_str().to_owned()), ..Self::nothing() }
    }

    /// After an edit of this, which has changed something or not.
    pub(crate) fn after(self, before: &Ini, changed: bool) -> Self {
        Self { before: Some(before.clone()), already: !changed, ..self }
    }
}

/// Tells PgBouncer to reload: through its console, and looks; else by SIGHUP.
pub(crate) async fn reload(
    config: &Path,
    userlist: Option<&Path>,
    addresses: &[ConsoleAddress],
    process: Option<&Companion>,
    expected: &Expected,
    notes: &mut Vec<String>,
) -> Result<Reloaded, Error> {
    let pid = match process {
        Some(process) => process.find().await.ok(),
        None => None,
    };
    let eyes = pid.and_then(Eyes::of);
    let files = Files { config, userlist, eyes: eyes.as_ref() };
    let unseen = match open(addresses).await {
        Ok(console) => {
            let verified = reload_and_look(&console, &files, expected, notes).await;
            console.close().await;
            match verified {
                Err(Error::Unreachable(said)) if said.ends_with(NO_ADMIN) => Error::Unreachable(said),
                verified => return verified.map(|()| Reloaded::Verified),
            }
        }
        Err(unseen) => unseen,
    };
    let Some(process) = process else { return Err(unseen) };
    let (ini, places) = whole_with_places(config)?;
    files.objection(&ini, &places, expected, false)?;
    let named = ini.parameter("auth_file").filter(|_| expected.user.is_some());
    named.map_or(Ok(()), |named| files.is_read(&named, &ini))?;
    let pid = process
        .signal(StopSignal::Hup)
        .await
        .map_err(|why| Error::Unreachable(format!("{unseen}; and by its PID file: {}", not_found(&why))))?;
    // The next one is written to its log, which it opens anew; and ends, if it cannot.
    sleep(LAST_LINE).await;
    let _ = process.signal(StopSignal::Hup).await;
    sleep(LAST_LINE).await;
    match process.find().await {
        Err(Ending::NotRunning(_)) => Err(ended()),
        _ => Ok(Reloaded::Signalled { pid, unseen: unseen.to_string() }),
    }
}

fn ended() -> Error {
    Error::Unverified("PgBouncer has ended by it: its log says why".to_owned())
}

/// What a reload reads, and how PgBouncer sees it, if that is known.
struct Files<'a> {
    config: &'a Path,
    userlist: Option<&'a Path>,
    eyes: Option<&'a Eyes>,
}

impl Files<'_> {
    /// What PgBouncer would take, and end by, at once or – what the edit has brought in – at its next start. Who does not know how
    /// PgBouncer sees files only cares for its log. `has_log`: it has the same one open already, where it sees it.
    fn objection(&self, ini: &Ini, places: &Places, expected: &Expected, has_log: bool) -> Result<(), Error> {
        let log = references::logfile(ini, self.eyes.unwrap_or(&Eyes::OURS));
        let missing = match self.eyes {
            Some(eyes) => log.or_else(|| {
                let (key, _) = expected.parameter.as_ref()?;
                let before = expected.before.as_ref().map(|before| references::missing(before, eyes));
                let is_new = |missing: &Missing| {
                    before.iter().flatten().all(|before| before.problem.what != missing.problem.what)
                };
                let mut missing = references::missing(ini, eyes).into_iter();
                missing.find(|missing| missing.is_of(key) && is_new(missing))
            }),
            None => log.filter(|_| !has_log),
        };
        match missing {
            Some(missing) => Err(Error::Unverified(places.finding(missing.problem, self.config).to_string())),
            None => Ok(()),
        }
    }

    /// Whether PgBouncer reads the user list that was edited, if its auth_file is `theirs`: yes, unless it is seen that it does not.
    fn is_read(&self, theirs: &str, ini: &Ini) -> Result<(), Error> {
        let named = ini.parameter("auth_file").map(PathBuf::from);
        let (Some(eyes), Some(edited)) = (self.eyes, self.userlist.map(Path::to_owned).or(named)) else {
            return Ok(());
        };
        let why = match eyes.is_same(Path::new(theirs), &edited) {
            Some(false) => format!("PgBouncer's auth_file is {theirs}, not {}", edited.display()),
            Some(true) if !eyes.may_read(theirs) => {
                format!("PgBouncer's user may not read {theirs}: give it the file")
            }
            _ => return Ok(()),
        };
        Err(Error::Unverified(why))
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
    files: &Files<'_>,
    expected: &Expected,
    notes: &mut Vec<String>,
) -> Result<(), Error> {
    let refused = |error: Error| Error::Unverified(format!("PgBouncer refused the reload: {error}"));
    let version = console.version().await?;
    // Before it is told: what it refuses it has applied by half. Before 1.25 it would not even say so.
    let config = files.config;
    let findings = check(config, files.userlist, version)?;
    if let Some(fatal) = findings.into_iter().find(|finding| finding.problem.fatal) {
        return Err(Error::Unverified(format!("PgBouncer {version} refuses {fatal}")));
    }
    let (ini, places) = whole_with_places(config)?;
    let before = console.tell("SHOW CONFIG").await?;
    let has_log = value_of(&before, "logfile") == ini.parameter("logfile").as_deref();
    files.objection(&ini, &places, expected, has_log)?;
    match console.tell("RELOAD").await {
        Err(Error::Unreachable(said)) if said.ends_with(NO_ADMIN) => return Err(Error::Unreachable(said)),
        told => told.map_err(refused)?,
    };
    // The next one is written to its log, which it opens anew; and ends, if it cannot. Who is only late has not.
    let why = |error| if console.is_closed() { ended() } else { error };
    console.tell("RELOAD").await.map_err(why)?;
    let rows = console.tell("SHOW DATABASES").await.map_err(why)?;
    databases(&ini, &rows, expected, notes).map_err(Error::Unverified)?;
    let after = console.tell("SHOW CONFIG").await?;
    if let Some((key, value)) = &expected.parameter {
        let is = value_of(&after, key);
        if column_of(&after, key, "changeable") == Some("no") {
            notes.push(format!("{key} needs a restart of PgBouncer"));
        } else if is != Some(value.as_str()) && is == value_of(&before, key) && !is_same(value, is) {
            let is = is.unwrap_or("nothing");
            if !expected.already {
                return Err(Error::Unverified(format!("PgBouncer has {key} = {is} still")));
            }
            notes.push(format!("PgBouncer shows {key} as {is}"));
        }
    }
    if let Some(user) = &expected.user {
        files.is_read(value_of(&after, "auth_file").unwrap_or_default(), &ini)?;
        let rows = console.tell("SHOW USERS").await?;
        if !rows.iter().any(|row| row.get("name") == Some(user)) {
            return Err(Error::Unverified(format!("PgBouncer does not have user {user:?}")));
        }
    }
    Ok(())
}

/// A column of a key's row in `SHOW CONFIG`.
fn column_of<'a>(rows: &'a [Row], key: &str, column: &str) -> Option<&'a str> {
    let row = rows.iter().find(|row| row.get("key").is_some_and(|name| name == key))?;
    row.get(column).map(String::as_str)
}

fn value_of<'a>(rows: &'a [Row], key: &str) -> Option<&'a str> {
    column_of(rows, key, "value")
}

/// Whether two texts are one value: `1` and `yes`, `30` and `30.0`.
fn is_same(ours: &str, theirs: Option<&str>) -> bool {
    let Some(theirs) = theirs else { return ours.is_empty() };
    let number = |text: &str| match text.to_ascii_lowercase().as_str() {
        "yes" | "true" | "on" | "t" | "y" => Some(1.0),
        "no" | "false" | "off" | "f" | "n" => Some(0.0),
        text => text.parse::<f64>().ok(),
    };
    ours.eq_ignore_ascii_case(theirs) || number(ours).is_some_and(|ours| number(theirs) == Some(ours))
}

/// Whether the databases that PgBouncer has are what its files say.
fn databases(ini: &Ini, rows: &[Row], expected: &Expected, notes: &mut Vec<String>) -> Result<(), String> {
    // Of two of one name the last counts.
    let all: BTreeMap<_, _> =
        ini.databases().into_iter().map(|entry| (entry.name, entry.connection)).collect();
    for (name, connection) in &all {
        let Ok(connection) = connection else { continue };
        let Err(what) = compare(name, connection, rows) else { continue };
        match &expected.databases {
            Some(these) if !these.contains(name) => notes.push(what),
            _ => return Err(what),
        }
    }
    match &expected.gone {
        Some(gone) if rows.iter().any(|row| row.get("name") == Some(gone)) && !all.contains_key(gone) => {
            Err(format!("PgBouncer still has database {gone}"))
        }
        _ => Ok(()),
    }
}

fn compare(name: &str, connection: &Connection, rows: &[Row]) -> Result<(), String> {
    if name == "*" {
        return Ok(());
    }
    let Some(row) = rows.iter().find(|row| row.get("name").is_some_and(|served| served == name)) else {
        return Err(format!("PgBouncer does not have database {name}"));
    };
    for (columns, wanted) in wanted(name, connection) {
        let has = columns.iter().find_map(|column| row.get(*column)).map_or("", String::as_str);
        if has != wanted {
            return Err(format!("PgBouncer has {} {has:?} for database {name}, not {wanted:?}", columns[0]));
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
    let mut number = |keys: &[&str], columns: &'static [&'static str]| {
        let value = connection.pairs().filter(|(key, _)| keys.contains(key)).last();
        // Only what PgBouncer writes back as it was.
        if let Some((_, value)) =
            value.filter(|(_, value)| value.parse::<u16>().is_ok_and(|n| n.to_string() == *value))
        {
            wanted.push((columns, value.to_owned()));
        }
    };
    number(&["port"], &["port"]);
    number(&["pool_size"], &["pool_size"]);
    number(&["reserve_pool", "reserve_pool_size"], &["reserve_pool", "reserve_pool_size"]);
    wanted
}
