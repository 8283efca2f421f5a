//! One companion by itself, without a shutdown: looked for, sent one signal, ended.

use std::io::ErrorKind;
use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::companion::{Companion, Ending, Refusal};
use super::find::{NotFound, find};
use super::ladder::StopSignal;
use super::set::Entry;
use super::stop::{Clock, Stopping};
use crate::stage::{StageContext, TOKEN_GRACE};

impl Companion {
    /// Looks for its process: its number. No signal is sent, and the number may be another's as soon as this returns.
    ///
    /// # Errors
    ///
    /// [`Ending::NotRunning`] or [`Ending::Refused`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn find(&self) -> Result<u32, Ending> {
        find(self).await.map(|found| found.process.id()).map_err(Ending::from)
    }

    /// Sends its process one signal, after all the looks that come before ending it, and does not wait: for what is no end, as a
    /// HUP that means "read your files again". Its number.
    ///
    /// # Errors
    ///
    /// [`Ending::NotRunning`] or [`Ending::Refused`]: nobody was signalled.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the signal is sent or it is not.
    pub async fn signal(&self, signal: StopSignal) -> Result<u32, Ending> {
        let found = find(self).await?;
        let pid = found.process.id();
        match found.process.signal(signal) {
            Ok(true) => Ok(pid),
            Ok(false) => Err(Ending::NotRunning(super::NotRunning::Stale(pid))),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                Err(Ending::Refused(Refusal::NotAllowed { pid }))
            }
            Err(error) => Err(Ending::Refused(Refusal::Unknown { pid: Some(pid), why: error.to_string() })),
        }
    }

    /// Ends it now, by its ladder, as stage Companions would. Takes as long as the ladder at most.
    ///
    /// # Cancel safety
    ///
    /// What was sent stays sent; nobody waits any more.
    pub async fn end(self) -> Ending {
        let given = self.ladder.total() + TOKEN_GRACE;
        let stage = StageContext::new(Instant::now() + given, CancellationToken::new());
        let entry = Entry::new(self, Arc::default());
        Stopping { entry: &entry, clock: Clock::of(&stage), stage: &stage, later: std::time::Duration::ZERO }
            .run()
            .await
    }
}

impl From<NotFound> for Ending {
    fn from(not_found: NotFound) -> Self {
        match not_found {
            NotFound::NotRunning(why) => Self::NotRunning(why),
            NotFound::Refused(why) => Self::Refused(why),
        }
    }
}
