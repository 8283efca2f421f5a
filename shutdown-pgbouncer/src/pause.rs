//! Pausing PgBouncer, and letting it go on whatever happens.
//!
//! `PAUSE` waits until no transaction is open, and lets nobody begin one meanwhile. It is not undone when the connection
//! that asked for it is closed, nor by cancelling it: only by `RESUME` (measured on 1.18, 1.24 and 1.26). So whoever gives up
//! waiting, is dropped, or fails, resumes by a connection of its own.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::console::{Console, ConsoleAddress, Failure, Row, quoted};
use crate::{DatabaseName, Error};

/// How long a drop waits for its `RESUME`.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Something that is paused; resumed when this is dropped, unless it is kept.
#[derive(Debug)]
#[must_use = "dropped, it is resumed"]
pub struct Paused {
    address: ConsoleAddress,
    /// What undoes it, one after another.
    undo: Vec<String>,
}

impl Paused {
    /// Pauses one database, or all: waits until their transactions have ended, at most until then, or until it is `cancelled`.
    /// `and_disabled`: new clients are refused as well. What was paused or disabled before stays so.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`]: there still was an open transaction, and everything goes on as before; [`Error::Unreachable`].
    ///
    /// # Cancel safety
    ///
    /// Dropped while it waits, everything goes on as before.
    pub async fn until(
        address: &ConsoleAddress,
        database: Option<&DatabaseName>,
        and_disabled: bool,
        deadline: Instant,
        cancelled: &CancellationToken,
    ) -> Result<Self, Error> {
        let (paused, console) =
            Self::with_console(address, database, and_disabled, deadline, cancelled).await?;
        console.close().await;
        Ok(paused)
    }

    /// The same, and the connection that asked.
    async fn with_console(
        address: &ConsoleAddress,
        database: Option<&DatabaseName>,
        and_disabled: bool,
        deadline: Instant,
        cancelled: &CancellationToken,
    ) -> Result<(Self, Console), Error> {
        let name = database.map(|name| format!(" {}", quoted(name.as_str()))).unwrap_or_default();
        let console = Console::open(address).await?;
        let rows = match database {
            Some(_) => console.tell("SHOW DATABASES").await?,
            None => Vec::new(),
        };
        let was = |column: &str| {
            let named = |row: &&Row| {
                database.is_some_and(|name| row.get("name").is_some_and(|row| row == name.as_str()))
            };
            rows.iter().find(named).and_then(|row| row.get(column)).is_some_and(|value| value == "1")
        };
        // From here on it is undone.
        let mut paused = Self { address: address.clone(), undo: Vec::new() };
        if and_disabled && database.is_some() && !was("disabled") {
            paused.undo.push(format!("ENABLE{name}"));
            if let Err(failure) = console.told(&format!("DISABLE{name}")).await {
                return Err(paused.give_up(failure, true).await);
            }
        }
        if !was("paused") {
            paused.undo.insert(0, format!("RESUME{name}"));
        }
        let command = format!("PAUSE{name}");
        let pausing = console.asked(&command);
        let what = database.map_or("it".to_owned(), |name| format!("database {name}"));
        let why = tokio::select! {
            biased;
            () = cancelled.cancelled() => format!("interrupted while {what} still had an open transaction"),
            answer = timeout_at(deadline, pausing) => match answer {
                Ok(Ok(_)) => return Ok((paused, console)),
                // All is paused already, by somebody else: theirs to undo.
                Ok(Err(Failure::Refused(error))) if database.is_none() && error.to_string().contains("already") => {
                    paused.keep();
                    return Err(Error::Refused(format!("{error}: resume it first")));
                }
                Ok(Err(failure)) => return Err(paused.give_up(failure, database.is_none()).await),
                Err(_) => format!("{what} still had an open transaction at the deadline"),
            },
        };
        drop(console);
        paused.resume().await?;
        Err(Error::Refused(format!("{why}; it goes on as before")))
    }

    /// Undoes what may have been done. `last`: what was refused was the last thing that would be undone, so it need not be.
    async fn give_up(mut self, failure: Failure, last: bool) -> Error {
        if last && matches!(failure, Failure::Refused(_)) {
            self.undo.clear();
        }
        let error = Error::from(failure);
        match self.resume().await {
            Ok(()) => error,
            Err(still) => Error::Unreachable(format!("{error}; and it may still be paused: {still}")),
        }
    }

    /// Lets it go on.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`]: it is still paused, or has ended.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it is tried once more, by a thread that is waited for a second.
    pub async fn resume(mut self) -> Result<(), Error> {
        undo(&self.address, &self.undo).await?;
        self.undo.clear();
        Ok(())
    }

    /// Leaves it paused: it is to be shut down, or its database is gone.
    pub fn keep(mut self) {
        self.undo.clear();
    }
}

async fn undo(address: &ConsoleAddress, commands: &[String]) -> Result<(), Error> {
    if commands.is_empty() {
        return Ok(());
    }
    let console = Console::open(address).await?;
    let mut result = Ok(());
    for command in commands {
        match console.tell(command).await {
            // What is not paused any more has been resumed already.
            Err(Error::Unreachable(said)) if said.contains("not paused") => {}
            Err(error) => result = Err(error),
            Ok(_) => {}
        }
    }
    console.close().await;
    result
}

impl Drop for Paused {
    fn drop(&mut self) {
        if self.undo.is_empty() {
            return;
        }
        let (address, commands) = (self.address.clone(), std::mem::take(&mut self.undo));
        let (send, done) = std::sync::mpsc::channel();
        // The runtime that this is dropped in may be ending, and must not be blocked for its own work.
        let thread = std::thread::Builder::new().name("resume".into()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let result = match runtime {
                Ok(runtime) => runtime.block_on(undo(&address, &commands)).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = &result {
                tracing::error!(%address, error, "PgBouncer may still be paused: RESUME it by hand");
            }
            let _ = send.send(());
        });
        if thread.is_ok() {
            let _ = done.recv_timeout(LAST_WORD);
        }
    }
}

/// Drains a PgBouncer and ends it: no transaction is begun any more, those that are open finish, then it is told to shut down. Right in
/// every version, and over the network; by a PID file, [`stop`](crate::PgBouncer::stop) is simpler. The address must be one
/// PgBouncer's: behind a balancer nobody knows whom one talks to.
///
/// # Errors
///
/// [`Error::Refused`]: a transaction was still open at the deadline, or it was `cancelled` before; it goes on as before.
/// [`Error::Unreachable`].
///
/// # Cancel safety
///
/// Dropped before it is told to shut down, it goes on as before.
pub async fn drain(
    address: &ConsoleAddress,
    deadline: Instant,
    cancelled: &CancellationToken,
) -> Result<(), Error> {
    let (paused, console) = Paused::with_console(address, None, false, deadline, cancelled).await?;
    // On the connection that has paused it. It hangs up instead of answering.
    let told = console.told("SHUTDOWN").await;
    if let Err(Failure::Refused(error)) = told {
        return Err(paused.give_up(Failure::Unknown(error), false).await);
    }
    let is_gone = console.hung_up_within(LAST_WORD).await;
    // A network that is cut looks the same: then somebody still answers.
    match Console::open(address).await {
        Err(_) if is_gone => {
            paused.keep();
            Ok(())
        }
        _ => {
            paused.resume().await?;
            Err(Error::Unreachable(format!(
                "PgBouncer at {address} was told to shut down, and still answers"
            )))
        }
    }
}
