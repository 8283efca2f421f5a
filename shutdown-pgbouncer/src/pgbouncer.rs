//! One PgBouncer: its files, its console, its process – and every edit as one story, [`Editing::finish`].

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use shutdown_core::companions::{Companion, Ending, Ladder, PidFile, PidFileKind};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::console::{Console, ConsoleAddress};
use crate::pause::Paused;
use crate::reload::{Expected, Reloaded, reload};
use crate::store::{self, Backup, Locked};
use crate::{Connection, DatabaseName, Error, Ini, Secret, UserName, Userlist, Version, references, whole};

/// What a PgBouncer's process is called.
const PROGRAM: &str = "pgbouncer";
/// How long an edit waits for others, unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(30);
/// The newest version that was looked at.
const NEWEST: Version = Version { major: 1, minor: 26 };

/// Whether an edit is followed by a reload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reload {
    /// If the configuration's `pidfile` names a PgBouncer that runs.
    #[default]
    IfRunning,
    /// In any case; one that cannot be reached is an error.
    Always,
    /// Not.
    Never,
}

/// How a database that is removed loses its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Removal {
    /// New ones are refused, open transactions finish, at most so long; one that does not is a refusal, and nothing is changed.
    Drained(Duration),
    /// The same, until then.
    DrainedBy(Instant),
    /// They are cut, transactions as well, and named.
    Forced,
}

/// What an edit has done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Done {
    /// Whether the file was changed; else it was so already.
    pub changed: bool,
    /// The file.
    pub file: PathBuf,
    /// What it was before, if it was changed.
    pub backup: Option<PathBuf>,
    /// What PgBouncer was told, and whether it did it.
    pub reloaded: Reloaded,
    /// What else there is to know: a sentence each.
    pub notes: Vec<String>,
}

/// A PgBouncer, by its configuration file.
#[derive(Clone, Debug)]
pub struct PgBouncer {
    config: PathBuf,
    userlist: Option<PathBuf>,
    console: Option<ConsoleAddress>,
    patience: Duration,
    reload: Reload,
    cancelled: CancellationToken,
}

impl PgBouncer {
    /// The one with this configuration file. Nothing is read yet.
    pub fn new(config: impl Into<PathBuf>) -> Self {
        Self {
            config: config.into(),
            userlist: None,
            console: None,
            patience: PATIENCE,
            reload: Reload::default(),
            cancelled: CancellationToken::new(),
        }
    }

    /// With this user list. Default: the configuration's `auth_file`.
    #[must_use]
    pub fn userlist(self, userlist: impl Into<PathBuf>) -> Self {
        Self { userlist: Some(userlist.into()), ..self }
    }

    /// With its admin console here. Default: [`ConsoleAddress::of`] the configuration.
    #[must_use]
    pub fn console_at(self, console: ConsoleAddress) -> Self {
        Self { console: Some(console), ..self }
    }

    /// Waits so long for others who edit. Default: 30 s.
    #[must_use]
    pub fn lock_timeout(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Whether an edit is followed by a reload. Default: [`Reload::IfRunning`].
    #[must_use]
    pub fn reload_after(self, reload: Reload) -> Self {
        Self { reload, ..self }
    }

    /// Gives up waiting, for a lock or for transactions, when this is cancelled: nothing is changed then. What is being written is
    /// finished. Default: never.
    #[must_use]
    pub fn until_cancelled(self, cancelled: CancellationToken) -> Self {
        Self { cancelled, ..self }
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// What is in its configuration file, and in those that it includes.
    ///
    /// # Errors
    ///
    /// [`Error::Unwritten`]: it cannot be read.
    pub fn ini(&self) -> Result<Ini, Error> {
        whole(&self.config)
    }

    /// Where its user list is.
    ///
    /// # Errors
    ///
    /// [`Error::Input`]: it has none, or one that depends on where PgBouncer was started and is not there from here;
    /// [`Error::Unwritten`]: the configuration cannot be read.
    pub fn userlist_path(&self) -> Result<PathBuf, Error> {
        if let Some(userlist) = &self.userlist {
            return Ok(userlist.clone());
        }
        let file = self.ini()?.parameter("auth_file").filter(|file| !file.is_empty());
        let config = self.config.display();
        match file.map(PathBuf::from) {
            Some(file) if file.is_absolute() || file.exists() => Ok(file),
            Some(file) => Err(Error::Input(format!(
                "auth_file = {} in {config} is relative to where PgBouncer was started: name it by its whole path, or the user list \
                 by --userlist",
                file.display()
            ))),
            None => Err(Error::Input(format!("{config} has no auth_file: set it, or name the user list"))),
        }
    }

    /// Where its admin console is.
    pub fn console(&self, ini: &Ini) -> ConsoleAddress {
        self.console.clone().unwrap_or_else(|| ConsoleAddress::of(ini))
    }

    /// Its process, by the configuration's `pidfile`.
    pub fn process(&self, ini: &Ini) -> Option<Companion> {
        let pidfile = ini.parameter("pidfile").filter(|file| !file.is_empty())?;
        Some(Companion::with_pid_file(PROGRAM, PidFile::new(pidfile, PidFileKind::Plain)))
    }

    /// Adds a database. One of that name is left as it is.
    ///
    /// # Errors
    ///
    /// Any [`Error`].
    ///
    /// # Cancel safety
    ///
    /// Dropped, the file is the old one or the new one; PgBouncer may not have been told. This holds for every edit here.
    pub async fn add_database(&self, name: &DatabaseName, connection: &Connection) -> Result<Done, Error> {
        let (name, connection) = (name.clone(), connection.clone());
        let editing = self.edit_ini(Some(name.clone()), |ini, notes| {
            if let Some(there) = find(ini, name.as_str()) {
                if there.as_ref().ok() != Some(&connection) {
                    notes.push(format!("{name} has other settings than these: change them with `db set`"));
                }
                return Ok(());
            }
            ini.set_database(&name, &connection)
        });
        editing.await?.finish(Expected::database(&name)).await
    }

    /// Gives a database exactly these settings, added or changed.
    ///
    /// # Errors
    ///
    /// Any [`Error`].
    ///
    /// # Cancel safety
    ///
    /// As [`add_database`](Self::add_database).
    pub async fn put_database(&self, name: &DatabaseName, connection: &Connection) -> Result<Done, Error> {
        let editing = self.edit_ini(Some(name.clone()), |ini, _| ini.set_database(name, connection)).await?;
        editing.finish(Expected::database(name)).await
    }

    /// Changes settings of a database, or adds them; what is not named stays.
    ///
    /// # Errors
    ///
    /// Any [`Error`].
    ///
    /// # Cancel safety
    ///
    /// As [`add_database`](Self::add_database).
    pub async fn set_database(
        &self,
        name: &DatabaseName,
        settings: &[(String, String)],
    ) -> Result<Done, Error> {
        let editing = self.edit_ini(Some(name.clone()), |ini, _| {
            let Some(there) = find(ini, name.as_str()) else {
                return Err(format!("there is no database {name}: add it first"));
            };
            let mut connection = there?;
            for (key, value) in settings {
                connection = connection.set(key, value)?;
            }
            ini.set_database(name, &connection)
        });
        editing.await?.finish(Expected::database(name)).await
    }

    /// Removes a database. With a PgBouncer that runs its clients are seen out first, or cut, as `removal` says.
    ///
    /// # Errors
    ///
    /// Any [`Error`]; [`Error::Refused`] if a transaction was still open when its time was over.
    ///
    /// # Cancel safety
    ///
    /// As [`add_database`](Self::add_database); a database that was paused goes on.
    pub async fn remove_database(&self, name: &DatabaseName, removal: Removal) -> Result<Done, Error> {
        let editing = self.edit_ini(Some(name.clone()), |ini, notes| {
            if !ini.remove_database(name.as_str()) {
                notes.push(format!("{name} is not in {}", self.config.display()));
            }
            Ok(())
        });
        let mut editing = editing.await?;
        // With `*` whoever asks for it gets it again; and an entry that is included stays.
        let any = editing.before.databases().iter().any(|database| database.name == "*");
        let expected = Expected::without(name, any);
        let until = match removal {
            Removal::Drained(within) => Some(Instant::now() + within),
            Removal::DrainedBy(until) => Some(until),
            Removal::Forced => None,
        };
        let Some(until) = until else {
            let cut = match self.reached(&editing.before).await {
                Ok(Some(address)) => clients_of(&address, name).await,
                Ok(None) => Ok(Vec::new()),
                Err(error) => Err(error),
            };
            editing
                .notes
                .extend(cut.unwrap_or_else(|why| vec![format!("nobody could look whom it cut: {why}")]));
            return editing.finish(expected).await;
        };
        let address = match self.reached(&editing.before).await? {
            Some(address) if has(&address, name).await? => address,
            // Nobody is there to be seen out.
            _ => return editing.finish(expected).await,
        };
        let paused = Paused::until(&address, Some(name), true, until, &self.cancelled).await?;
        let done = editing.finish(expected).await;
        let is_gone = match &done {
            Ok(done) => done.reloaded == Reloaded::Verified && !has(&address, name).await.unwrap_or(true),
            Err(_) => false,
        };
        if is_gone {
            // And with it what it was.
            paused.keep();
            return done;
        }
        // With `*` it is there again, or still, for whoever asks; or nobody has looked.
        match (done, paused.resume().await) {
            (Err(error), Err(still)) => {
                let held = format!("; {name} may still be paused: {still}");
                Err(Error::Unverified(format!("{}{held}", shutdown_core::sentence(&error))))
            }
            (Ok(_), Err(still)) => Err(Error::Unverified(format!(
                "{name} is taken out of the file, but may still be served, and paused: {still}"
            ))),
            (Ok(mut done), Ok(())) if done.reloaded == Reloaded::Verified => {
                done.notes.push(format!("PgBouncer still serves {name}, by the entry `*`"));
                Ok(done)
            }
            (done, _) => done,
        }
    }

    /// Gives a key of `[pgbouncer]` a value.
    ///
    /// # Errors
    ///
    /// Any [`Error`].
    ///
    /// # Cancel safety
    ///
    /// As [`add_database`](Self::add_database).
    pub async fn set_parameter(&self, key: &str, value: &str) -> Result<Done, Error> {
        if key == "conffile" {
            return Err(Error::Input(
                "conffile is which file PgBouncer reads: that is no edit of this one".to_owned(),
            ));
        }
        let editing = self.edit_ini(None, |ini, _| ini.set_parameter(key, value)).await?;
        editing.finish(Expected::parameter(key, value)).await
    }

    /// Gives a user this secret; one of that name has it from then on.
    ///
    /// # Errors
    ///
    /// Any [`Error`].
    ///
    /// # Cancel safety
    ///
    /// As [`add_database`](Self::add_database).
    pub async fn set_user(&self, name: &UserName, secret: &Secret) -> Result<Done, Error> {
        self.edit_userlist(|list, _| list.set(name, secret)).await?.finish(Expected::user(name)).await
    }

    /// The same, and the role on this database server has it first: a URL or `key=value` pairs, its password by `PGPASSWORD`. The
    /// user list is locked and looked at before.
    ///
    /// # Errors
    ///
    /// Any [`Error`]; [`Error::Unverified`] also when the server has the secret and the user list does not.
    ///
    /// # Cancel safety
    ///
    /// Dropped, the server may have it and the user list not.
    pub async fn set_user_on(&self, server: &str, name: &UserName, secret: &Secret) -> Result<Done, Error> {
        let editing = self.edit_userlist(|list, _| list.set(name, secret)).await?;
        let statement = crate::secret::alter_role(name, secret);
        crate::secret::run(server, &statement, &self.cancelled).await?;
        editing.finish(Expected::user(name)).await.map_err(|error| {
            let why = shutdown_core::sentence(&error);
            Error::Unverified(format!(
                "the server has the new secret, and PgBouncer may not; set it again: {why}"
            ))
        })
    }

    /// Removes a user. Clients that have logged in stay.
    ///
    /// # Errors
    ///
    /// Any [`Error`].
    ///
    /// # Cancel safety
    ///
    /// As [`add_database`](Self::add_database).
    pub async fn remove_user(&self, name: &UserName) -> Result<Done, Error> {
        let editing = self.edit_userlist(|list, notes| {
            if !list.remove(name) {
                notes.push(format!("{:?} is not in the user list", name.as_str()));
            }
        });
        editing.await?.finish(Expected::nothing()).await
    }

    /// Reloads PgBouncer and looks whether it runs by its files.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`], [`Error::Unverified`], [`Error::Refused`].
    ///
    /// # Cancel safety
    ///
    /// Dropped, it may have reloaded.
    pub async fn reload(&self) -> Result<Reloaded, Error> {
        let ini = self.ini()?;
        self.tell(
            &[self.console(&ini)],
            self.process(&ini).as_ref(),
            &Expected::everything(),
            &mut Vec::new(),
        )
        .await
    }

    async fn tell(
        &self,
        consoles: &[ConsoleAddress],
        process: Option<&Companion>,
        expected: &Expected,
        notes: &mut Vec<String>,
    ) -> Result<Reloaded, Error> {
        reload(&self.config, self.userlist.as_deref(), consoles, process, expected, notes).await
    }

    /// Keeps a copy of a file.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`], [`Error::Unwritten`]; [`Error::Refused`] if it was cancelled before.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped while it waits for the lock, nothing is made.
    pub async fn back_up(&self, file: &Path) -> Result<PathBuf, Error> {
        self.locked(file, Locked::take).await?.back_up()
    }

    /// The backups of a file, the newest first.
    ///
    /// # Errors
    ///
    /// [`Error::Unwritten`]: their directory cannot be read.
    pub fn backups(&self, file: &Path) -> Result<Vec<Backup>, Error> {
        store::backups(file).map_err(|source| Error::unwritten(file, "looked for", source))
    }

    /// Removes the backups of a file that are older than `max_age`, and those behind the newest `keep`. The newest one stays.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`], [`Error::Unwritten`]; [`Error::Refused`] if it was cancelled before.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped while it waits for the lock, nothing is removed.
    pub async fn prune(
        &self,
        file: &Path,
        max_age: Option<Duration>,
        keep: Option<usize>,
    ) -> Result<Vec<Backup>, Error> {
        let _locked = self.locked(file, Locked::take).await?;
        let now = SystemTime::now();
        let is_old = |backup: &Backup| {
            max_age.is_some_and(|max_age| now.duration_since(backup.made).unwrap_or_default() > max_age)
        };
        let mut removed = Vec::new();
        for (place, backup) in self.backups(file)?.into_iter().enumerate().skip(1) {
            if is_old(&backup) || keep.is_some_and(|keep| place >= keep) {
                std::fs::remove_file(&backup.path)
                    .map_err(|source| Error::unwritten(&backup.path, "removed", source))?;
                removed.push(backup);
            }
        }
        Ok(removed)
    }

    /// Gives the configuration, or the user list, the content of a backup, which is looked at first; what was there is backed up.
    ///
    /// # Errors
    ///
    /// Any [`Error`].
    ///
    /// # Cancel safety
    ///
    /// As [`add_database`](Self::add_database).
    pub async fn restore(&self, backup: &Path) -> Result<Done, Error> {
        let of = |file: &Path| {
            let prefix = format!("{}.backup.", file.file_name().unwrap_or_default().to_string_lossy());
            backup.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
        };
        let bytes = std::fs::read(backup).map_err(|source| Error::unwritten(backup, "read", source))?;
        if of(&self.config) {
            let editing = self.edit_ini(None, |ini, _| {
                *ini = Ini::new(bytes);
                Ok(())
            });
            return editing.await?.finish(Expected::everything()).await;
        }
        if self.userlist_path().is_ok_and(|list| of(&list)) {
            let editing = self.edit_userlist(|list, _| *list = Userlist::new(bytes)).await?;
            return editing.finish(Expected::nothing()).await;
        }
        Err(Error::Input(format!(
            "{} is no backup of {}, nor of its user list: `backup list` shows them",
            backup.display(),
            self.config.display()
        )))
    }

    /// Ends its process by its PID file, and waits for it. INT first: open transactions finish, in every version.
    ///
    /// # Errors
    ///
    /// [`Error::Input`]: the configuration has no `pidfile`. [`Error::Refused`]: it runs without it; or it was cancelled, and is sent
    /// nothing more.
    ///
    /// # Cancel safety
    ///
    /// What was sent stays sent.
    pub async fn stop(&self, ladder: Ladder) -> Result<Ending, Error> {
        let ini = self.ini()?;
        let Some(process) = self.process(&ini) else {
            return Err(Error::Input(format!(
                "{} has no pidfile: set it, or use `drain`, which goes through the admin console",
                self.config.display()
            )));
        };
        let ending = tokio::select! {
            biased;
            () = self.cancelled.cancelled() => {
                let what = "interrupted: PgBouncer is sent nothing more; a signal that it has had stands, and it ends by that";
                return Err(Error::Refused(what.to_owned()));
            }
            ending = process.ladder(ladder).end() => ending,
        };
        if let Ending::NotRunning(why) = &ending {
            let address = self.console(&ini);
            if self.is_at(&address).await {
                return Err(Error::Refused(format!(
                    "{why}, but PgBouncer runs: it answers at {address}; end it by `drain`"
                )));
            }
        }
        Ok(ending)
    }

    /// Whether who listens there was started with this very configuration. Over a network nobody knows.
    async fn is_at(&self, address: &ConsoleAddress) -> bool {
        address.listener().await.is_some_and(|pid| references::is_started_with(pid, &self.config))
    }

    /// Whom an edit is to be seen by: the console, if it is to be followed by a reload; none if nobody is to be told.
    async fn reached(&self, ini: &Ini) -> Result<Option<ConsoleAddress>, Error> {
        let found = match (self.reload, self.process(ini)) {
            (Reload::Never, _) | (Reload::IfRunning, None) => return Ok(None),
            (Reload::IfRunning, Some(process)) => process.find().await,
            (Reload::Always, _) => Ok(0),
        };
        let address = self.console(ini);
        if let Err(Ending::NotRunning(_)) = found {
            return Ok(self.is_at(&address).await.then_some(address));
        }
        match (Console::open(&address).await, found) {
            (Ok(console), _) => {
                console.close().await;
                Ok(Some(address))
            }
            // It may run, and may be another one.
            (Err(unseen), Err(why)) => Err(Error::Refused(format!("{}; and {unseen}", not_found(&why)))),
            (Err(unseen), Ok(_)) => Err(unseen),
        }
    }

    /// Waits for a lock with a thread of its own, and no longer than until it is cancelled.
    async fn locked(
        &self,
        file: &Path,
        take: fn(&Path, Duration) -> Result<Locked, Error>,
    ) -> Result<Locked, Error> {
        let (path, patience) = (file.to_owned(), self.patience);
        let interrupted = || Error::Refused("interrupted; nothing is changed".to_owned());
        if self.cancelled.is_cancelled() {
            return Err(interrupted());
        }
        match take(file, Duration::ZERO) {
            Err(Error::Locked { .. }) if !patience.is_zero() => {}
            taken => return taken,
        }
        tokio::select! {
            biased;
            () = self.cancelled.cancelled() => Err(interrupted()),
            // Whoever does not wait any more lets it go as soon as it is had.
            taken = tokio::task::spawn_blocking(move || take(&path, patience)) => {
                taken.unwrap_or_else(|error| Err(Error::unwritten(file, "locked", std::io::Error::other(error))))
            }
        }
    }

    /// `of`: the database that it is about.
    async fn edit_ini(
        &self,
        of: Option<DatabaseName>,
        change: impl FnOnce(&mut Ini, &mut Vec<String>) -> Result<(), String>,
    ) -> Result<Editing<'_>, Error> {
        let locked = self.locked(&self.config, Locked::take).await?;
        let before = self.ini()?;
        let old = locked.read()?;
        let mut ini = Ini::new(old.clone());
        let name = self.config.display();
        let mut notes = Vec::new();
        if let Some(of) = of {
            let count = |ini: &Ini| ini.databases().iter().filter(|entry| entry.name == of.as_str()).count();
            if count(&before) > count(&ini) {
                let name = self.config.display();
                return Err(Error::Input(format!(
                    "{of} has an entry in a file that {name} includes: change or remove it there"
                )));
            }
        }
        let broken = |ini: &Ini, when: &str| match fatal(ini) {
            Some(problem) => Err(Error::Input(format!("{name}, {problem}; {when}, and nothing is changed"))),
            _ => Ok(()),
        };
        change(&mut ini, &mut notes).map_err(|what| Error::Input(format!("{name}: {what}")))?;
        // A backup that mends a broken file is welcome.
        if fatal(&ini).is_some() {
            broken(&Ini::new(old.clone()), "PgBouncer refuses it as it is")?;
            broken(&ini, "PgBouncer would refuse it")?;
        }
        let new = ini.as_bytes().to_vec();
        Ok(Editing { of: self, file: self.config.clone(), locked, before, old, new, notes })
    }

    async fn edit_userlist(
        &self,
        change: impl FnOnce(&mut Userlist, &mut Vec<String>),
    ) -> Result<Editing<'_>, Error> {
        let file = self.userlist_path()?;
        let locked = self.locked(&file, Locked::take_or_make).await?;
        // A list may be there before a configuration is.
        let before = self.ini().unwrap_or_else(|_| Ini::new(""));
        let old = locked.read()?;
        let mut list = Userlist::new(old.clone());
        let mut notes = Vec::new();
        let fatal = |list: &Userlist| list.problems().into_iter().find(|problem| problem.fatal);
        let was = fatal(&list);
        change(&mut list, &mut notes);
        // A backup that mends a broken list is welcome.
        if let Some(problem) = fatal(&list).map(|after| was.unwrap_or(after)) {
            let name = file.display();
            return Err(Error::Input(format!(
                "{name}, {problem}; PgBouncer takes no user behind that line, and nothing is changed"
            )));
        }
        let new = list.as_bytes().to_vec();
        Ok(Editing { of: self, file, locked, before, old, new, notes })
    }
}

/// An edit that is decided and not yet written; the file is locked.
struct Editing<'a> {
    of: &'a PgBouncer,
    file: PathBuf,
    locked: Locked,
    /// The configuration as it is, with what it includes: by this PgBouncer runs.
    before: Ini,
    old: Vec<u8>,
    new: Vec<u8>,
    notes: Vec<String>,
}

impl Editing<'_> {
    /// The rest of the story: backup, write, reload, verify; and back, if PgBouncer does not run by it.
    async fn finish(self, expected: Expected) -> Result<Done, Error> {
        let Self { of, file, mut locked, before, old, new, mut notes } = self;
        let changed = old != new;
        let mut backup = None;
        if changed {
            let kept = locked.back_up()?;
            if let Err(error) = locked.write(&new) {
                if locked.read().is_ok_and(|bytes| bytes == old) {
                    let _ = std::fs::remove_file(&kept);
                    return Err(error);
                }
                let (error, kept) = (shutdown_core::sentence(&error), kept.display());
                return Err(Error::Unverified(format!("{error}; what it was is {kept}")));
            }
            tracing::info!(file = %file.display(), "edited");
            backup = Some(kept);
        }
        // A place that the edit has changed is not yet where PgBouncer is; after a restart it is.
        let after = of.ini().unwrap_or_else(|_| before.clone());
        let consoles = [of.console(&before), of.console(&after)];
        let process = of.process(&before).or_else(|| of.process(&after));
        let told = match (of.reload, &process) {
            (Reload::Never, _) => Err("--no-reload".to_owned()),
            (Reload::Always, _) => Ok(()),
            (Reload::IfRunning, None) => Err(format!("{} has no pidfile", of.config.display())),
            (Reload::IfRunning, Some(process)) => match process.find().await {
                Ok(_) => Ok(()),
                // Without its PID file it may run all the same.
                Err(Ending::NotRunning(_)) if of.is_at(&consoles[0]).await => Ok(()),
                Err(why @ Ending::NotRunning(_)) => Err(not_found(&why)),
                // So it may as process 1 of a container.
                Err(why) => match Console::open(&consoles[0]).await {
                    Ok(console) => {
                        console.close().await;
                        Ok(())
                    }
                    Err(_) => Err(not_found(&why)),
                },
            },
        };
        let expected = expected.after(&before, changed);
        if !changed {
            // It was in the file, which says nothing of PgBouncer.
            let reloaded = match told {
                Ok(()) => of.tell(&consoles, process.as_ref(), &expected, &mut notes).await?,
                Err(_) => Reloaded::NotAsked("nothing was changed".to_owned()),
            };
            return Ok(Done { changed, file, backup, reloaded, notes });
        }
        let reloaded = match told {
            Err(why) => Ok(Reloaded::NotAsked(why)),
            Ok(()) => of.tell(&consoles, process.as_ref(), &expected, &mut notes).await,
        };
        let name = file.display();
        match reloaded {
            Ok(reloaded) => Ok(Done { changed, file, backup, reloaded, notes }),
            Err(Error::Unverified(why)) => {
                // A script that knows no lock, or another one because the lock file was removed.
                if locked.read().ok().as_ref() != Some(&new) {
                    return Err(Error::Unverified(format!(
                        "{why}; and {name} is not rolled back: somebody else has changed it meanwhile"
                    )));
                }
                if let Err(error) = locked.write(&old) {
                    let error = shutdown_core::sentence(&error);
                    let kept = backup.map(|backup| backup.display().to_string()).unwrap_or_default();
                    return Err(Error::Unverified(format!(
                        "{why}; and {name} is not rolled back: {error}; what it was is {kept}"
                    )));
                }
                let again = of.tell(&consoles, process.as_ref(), &Expected::nothing(), &mut Vec::new()).await;
                Err(Error::Unverified(match again {
                    Ok(_) => format!("{why}; {name} is rolled back, and PgBouncer has reloaded it"),
                    Err(error) => {
                        format!("{why}; {name} is rolled back, but PgBouncer was not told: {error}")
                    }
                }))
            }
            // It is written, and nobody has refused it.
            Err(error) => Err(Error::Unverified(format!("{name} is written, but not reloaded: {error}"))),
        }
    }
}

/// The settings of a database, the last of that name.
fn find(ini: &Ini, name: &str) -> Option<Result<Connection, String>> {
    ini.databases().into_iter().rfind(|database| database.name == name).map(|database| database.connection)
}

/// What every version refuses.
fn fatal(ini: &Ini) -> Option<crate::Problem> {
    let newest = ini.problems(NEWEST);
    ini.problems(Version::OLDEST)
        .into_iter()
        .find(|problem| problem.fatal && newest.iter().any(|other| other.fatal && other.line == problem.line))
}

/// Why there is nobody to tell.
pub(crate) fn not_found(why: &Ending) -> String {
    match why {
        Ending::NotRunning(why) => why.to_string(),
        Ending::Refused(why) => why.to_string(),
        other => other.as_str().to_owned(),
    }
}

/// Whether PgBouncer has this database: one that was added and never reloaded is only in the file.
async fn has(address: &ConsoleAddress, name: &DatabaseName) -> Result<bool, Error> {
    let console = Console::open(address).await?;
    let rows = console.tell("SHOW DATABASES").await;
    console.close().await;
    Ok(rows?.iter().any(|row| row.get("name").is_some_and(|served| served == name.as_str())))
}

/// Who is about to be cut.
async fn clients_of(address: &ConsoleAddress, name: &DatabaseName) -> Result<Vec<String>, Error> {
    let console = Console::open(address).await?;
    let rows = console.tell("SHOW CLIENTS").await;
    console.close().await;
    let value = |row: &crate::Row, key: &str| row.get(key).cloned().unwrap_or_default();
    let of = rows?.into_iter().filter(|row| value(row, "database") == name.as_str());
    let clients: Vec<_> = of
        .map(|row| {
            // Linked to a server: in a transaction, or in a query.
            let busy = if value(&row, "link").is_empty() { "" } else { ", in a transaction" };
            format!("{} from {}:{}{busy}", value(&row, "user"), value(&row, "addr"), value(&row, "port"))
        })
        .collect();
    Ok(match clients.len() {
        0 => Vec::new(),
        count => vec![format!("cut {count} clients of {name}: {}", clients.join("; "))],
    })
}
