//! A database of a service's own in a PgBouncer: there from the service's start to its end.
//!
//! ```text
//!   register ─ own pool is opened ─ … ─ Drain ─ Background ─ … ─ Database: own pool is closed ─ deregister ─ Companions ─ …
//! ```
//!
//! Deregister in a stage of the program's own right after `Stage::Database`, not in `Stage::Departure`: that one runs beside
//! the drain, and the requests that are drained still use the database. A removal that waits for them would keep new
//! transactions from beginning, and one that does not wait cuts them. Behind the service's own pool nobody of it is left; and a
//! PgBouncer that the service has launched is ended only after that, in `Stage::Companions`. (`Builder::stage(Stage::Database,
//! "pgbouncer", …)` places it.)
//!
//! A service that is killed leaves its entry. It points where it pointed, and the next start under that name makes it anew.

use std::time::Duration;

use shutdown_core::{BoxError, StageContext};
use tokio::time::{Instant, sleep_until};

use crate::console::{Console, ConsoleAddress, quoted};
use crate::{Connection, DatabaseName, Error, PgBouncer, Reload, Removal, Row};

/// What a removal has once a second signal hurries: less than a stage's reserve, so that there is time to let go.
const HURRIED: Duration = Duration::from_millis(60);
/// Kept before the deadline, for letting go of what is paused.
const LAST_WORDS: Duration = Duration::from_millis(20);

/// An entry that was made by [`register`](Self::register), and is to be taken back by [`deregister`](Self::deregister).
/// Dropped, it stays.
#[derive(Debug)]
#[must_use = "dropped, its entry stays in PgBouncer's configuration"]
pub struct Registration {
    pgbouncer: PgBouncer,
    name: DatabaseName,
    client_side: (String, u16),
}

impl Registration {
    /// Gives this PgBouncer a database: exactly these settings, added or changed. When this returns, PgBouncer serves it; one that an
    /// earlier life has left paused or disabled goes on.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`]: it does not run, and nothing was written. Else any [`Error`].
    ///
    /// # Cancel safety
    ///
    /// Dropped, the entry may be there.
    pub async fn register(
        pgbouncer: PgBouncer,
        name: DatabaseName,
        connection: &Connection,
    ) -> Result<Self, Error> {
        let ini = pgbouncer.ini()?;
        let address = pgbouncer.console(&ini);
        // Before anything is written: an entry that nobody serves is of no use.
        Console::open(&address).await?.close().await;
        let pgbouncer = pgbouncer.reload_after(Reload::Always);
        pgbouncer.put_database(&name, connection).await?;
        go_on(&address, &name).await?;
        // Not the console's, which may be another way in.
        let client_side = ConsoleAddress::of(&ini).client_side();
        Ok(Self { pgbouncer, name, client_side })
    }

    /// What clients call it.
    pub fn name(&self) -> &DatabaseName {
        &self.name
    }

    /// Where clients connect, as the configuration says: a host, or the directory of a Unix socket; and the port.
    pub fn client_side(&self) -> (&str, u16) {
        (&self.client_side.0, self.client_side.1)
    }

    /// Takes the entry back, as a stage task: new clients are refused, transactions that are open finish, the file is edited,
    /// PgBouncer reloads and is looked at. If it has ended meanwhile, only the file is edited.
    ///
    /// # Errors
    ///
    /// There was no time for it, because somebody else has the lock or a transaction open; or any [`Error`]. The entry stays then,
    /// and works.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it goes on as before, or is gone.
    pub async fn deregister(self, stage: StageContext) -> Result<(), BoxError> {
        let Self { pgbouncer, name, .. } = self;
        let left = stage.deadline.saturating_duration_since(Instant::now());
        // A quarter is for letting it go on, or for the edit.
        let until = Instant::now() + left * 3 / 4;
        let removed = async {
            let address = pgbouncer.console(&pgbouncer.ini()?);
            let reload = match Console::open(&address).await {
                Ok(console) => {
                    console.close().await;
                    Reload::Always
                }
                // One that runs and does not answer is not passed over.
                Err(_) => Reload::IfRunning,
            };
            let patience = until.saturating_duration_since(Instant::now());
            let pgbouncer = pgbouncer.lock_timeout(patience).reload_after(reload);
            pgbouncer.remove_database(&name, Removal::DrainedBy(until)).await
        };
        let late = async {
            stage.token.cancelled().await;
            sleep_until((stage.deadline - LAST_WORDS).min(Instant::now() + HURRIED)).await;
        };
        let done = tokio::select! {
            biased;
            done = removed => done?,
            () = late => return Err(format!("there was no time to take database {name} out of PgBouncer").into()),
        };
        stage.log(move || {
            tracing::info!(database = %name, file = %done.file.display(), "taken out of PgBouncer");
        });
        Ok(())
    }
}

/// Undoes what somebody who was killed between `PAUSE` and the edit has left.
async fn go_on(address: &ConsoleAddress, name: &DatabaseName) -> Result<(), Error> {
    let console = Console::open(address).await?;
    let told = async {
        let rows = console.tell("SHOW DATABASES").await?;
        let row = rows.iter().find(|row| row.get("name").is_some_and(|named| named == name.as_str()));
        let is = |key: &str| row.and_then(|row: &Row| row.get(key)).is_some_and(|value| value == "1");
        for (key, command) in [("paused", "RESUME"), ("disabled", "ENABLE")] {
            if is(key) {
                console.tell(&format!("{command} {}", quoted(name.as_str()))).await?;
            }
        }
        Ok(())
    };
    let told = told.await;
    console.close().await;
    told
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use shutdown_core::StageContext;

    use super::*;

    const OTHERS: &str = "; kept\n[databases]\nother = host=db\n\n[pgbouncer]\nunix_socket_dir = ";

    fn registered(dir: &Path) -> (Registration, String) {
        let rest = format!("{OTHERS}{}\n", dir.display());
        let file = dir.join("pgbouncer.ini");
        std::fs::write(&file, rest.replace("other =", "mine = host=db port=1\nother =")).unwrap();
        let name = "mine".parse().unwrap();
        (Registration { pgbouncer: PgBouncer::new(file), name, client_side: (String::new(), 0) }, rest)
    }

    fn stage(time: Duration) -> StageContext {
        StageContext::new(Instant::now() + time, Default::default())
    }

    #[tokio::test]
    async fn of_a_pgbouncer_that_has_ended_only_the_file_is_edited() {
        let dir = tempfile::tempdir().unwrap();
        let (registration, rest) = registered(dir.path());
        registration.deregister(stage(Duration::from_secs(3))).await.unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("pgbouncer.ini")).unwrap(), rest);
    }

    #[tokio::test]
    async fn somebody_elses_lock_is_waited_for_within_the_stage() {
        let dir = tempfile::tempdir().unwrap();
        let (registration, _) = registered(dir.path());
        let _held = crate::Locked::take(&dir.path().join("pgbouncer.ini"), Duration::ZERO).unwrap();
        let begin = Instant::now();
        let error = registration.deregister(stage(Duration::from_millis(400))).await.unwrap_err();
        assert!(error.to_string().contains("is locked by process "), "{error}");
        assert!(begin.elapsed() < Duration::from_millis(400), "{:?}", begin.elapsed());
    }
}
