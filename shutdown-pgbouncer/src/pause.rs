//! Pausing PgBouncer, and letting it go on whatever happens.
//!
//! `PAUSE` waits until no transaction is open, and lets nobody begin one meanwhile. It is not undone when the connection
//! that asked for it is closed, nor by cancelling it: only by `RESUME` (measured on 1.18, 1.24 and 1.26). So whoever gives up
//! waiting, is dropped, or fails, resumes by a connection of its own.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::console::{Console, ConsoleAddress, quoted};
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
    /// Pauses one database, or all: waits until their transactions have ended, at most until then. `and_disabled`: new clients are
    /// refused as well.
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
    ) -> Result<Self, Error> {
        let name = database.map(|name| format!(" {}", quoted(name.as_str()))).unwrap_or_default();
        let console = Console::open(address).await?;
        // From here on it is undone.
        let mut paused = Self { address: address.clone(), undo: Vec::new() };
        if and_disabled && database.is_some() {
            paused.undo.push(format!("ENABLE{name}"));
            if let Err(error) = console.tell(&format!("DISABLE{name}")).await {
                // It did not, or its answer was lost; to enable what is enabled does no harm.
                paused.resume().await?;
                return Err(error);
            }
        }
        paused.undo.insert(0, format!("RESUME{name}"));
        let pausing = timeout_at(deadline, console.ask(&format!("PAUSE{name}"))).await;
        match pausing {
            Ok(Ok(_)) => {
                console.close().await;
                Ok(paused)
            }
            Ok(Err(error)) => {
                if database.is_none() {
                    // Somebody else has paused all: that is theirs to undo.
                    paused.undo.clear();
                }
                console.close().await;
                paused.resume().await?;
                Err(error)
            }
            Err(_) => {
                drop(console);
                paused.resume().await?;
                let what = database.map_or("it".to_owned(), |name| format!("database {name}"));
                Err(Error::Refused(format!(
                    "{what} still had an open transaction at the deadline; it goes on as before"
                )))
            }
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
/// every version, and over the network; by a PID file, [`stop`](crate::PgBouncer::stop) is simpler.
///
/// # Errors
///
/// [`Error::Refused`]: a transaction was still open at the deadline, and it goes on as before. [`Error::Unreachable`].
///
/// # Cancel safety
///
/// Dropped before it is told to shut down, it goes on as before.
pub async fn drain(address: &ConsoleAddress, deadline: Instant) -> Result<(), Error> {
    let paused = Paused::until(address, None, false, deadline).await?;
    let console = Console::open(address).await?;
    let told = console.tell("SHUTDOWN").await;
    // It hangs up instead of answering.
    let is_gone = console.hung_up_within(LAST_WORD).await;
    if let Err(error) = told
        && !is_gone
    {
        paused.resume().await?;
        return Err(error);
    }
    paused.keep();
    Ok(())
}
