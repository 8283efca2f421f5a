//! The story of ending one companion: found, signalled by its ladder, waited for.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::companion::{Ending, NotRunning, Refusal};
use super::find::{Found, NotFound, by_file, find};
use super::ladder::{StopSignal, share};
use super::pid_file::{PidFile, Reading};
use super::process::{Exit, Process};
use super::set::Entry;
use crate::plan::STAGE_RESERVE;
use crate::stage::{StageContext, TOKEN_GRACE};

/// Until when companions may be waited for. A later signal brings it nearer.
pub(super) struct Clock {
    end: Instant,
    token: CancellationToken,
    hurried: bool,
}

impl Clock {
    /// The stage's: up to the moment at which it would tell its tasks.
    pub(super) fn of(stage: &StageContext) -> Self {
        let given = stage.deadline.saturating_duration_since(Instant::now());
        let end = stage.deadline - TOKEN_GRACE.min(given / 10);
        Self { end, token: stage.token.clone(), hurried: false }
    }

    fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// By when `first` must be over, so that there is time for the `rest` that it is part of.
    pub(super) fn until(&self, first: Duration, rest: Duration) -> Instant {
        Instant::now() + share(first, rest, self.left())
    }

    /// When what comes `before` must have come to an end at the latest, so that there is time for the `rest` that it is part of.
    pub(super) fn latest(&self, before: Duration, rest: Duration) -> Instant {
        let left = self.left();
        Instant::now() + if rest <= left { left - (rest - before) } else { share(before, rest, left) }
    }

    /// Waits until there is less time: what is left then is the stage's reserve, less a tenth to be gone in time.
    pub(super) async fn hurry(&mut self) {
        if self.hurried {
            std::future::pending::<()>().await;
        }
        self.token.cancelled().await;
        self.hurried = true;
        self.end = self.end.min(Instant::now() + STAGE_RESERVE * 9 / 10);
    }
}

/// The ending of one companion under way.
pub(super) struct Stopping<'a> {
    pub(super) entry: &'a Entry,
    pub(super) stage: &'a StageContext,
    pub(super) clock: Clock,
    /// What the groups after it may need.
    pub(super) later: Duration,
}

impl Stopping<'_> {
    pub(super) async fn run(mut self) -> Ending {
        let companion = &self.entry.companion;
        if companion.launch.is_some() {
            return self.end_launched().await;
        }
        match find(companion).await {
            Ok(found) => self.end(&found.process, found.named_by).await,
            Err(why) => why.into(),
        }
    }

    /// Ends what was launched: who has written the PID file first, which may be a child of what was launched, or a daemon that it has
    /// left behind; then what was launched; and who has taken its place in the PID file meanwhile.
    async fn end_launched(&mut self) -> Ending {
        // From here on nobody starts it again.
        let launched = self.entry.last_process();
        let number = launched.as_ref().ok().map(|process| process.id());
        let mut named_by = None;
        let behind = match self.of_pid_file(launched.is_err()).await {
            Ok(Some(found)) if Some(found.process.id()) != number => {
                Some(self.end(&found.process, found.named_by).await)
            }
            Ok(found) => {
                named_by = found.and_then(|found| found.named_by);
                None
            }
            // It may be the process that was launched: that is known to be ours.
            Err(_) if number.is_some() => None,
            Err(why) => return Ending::Refused(why),
        };
        let first = match launched {
            Ok(process) => self.end(&process, named_by).await,
            Err(why) => Ending::NotRunning(why),
        };
        let ended = match behind {
            Some(behind) if !behind.is_well() || first.is_well() => behind,
            _ => first,
        };
        if !ended.is_well() {
            return ended;
        }
        match self.of_pid_file(false).await {
            Ok(None) => ended,
            Ok(Some(found)) => self.end(&found.process, found.named_by).await,
            Err(why) => Ending::Refused(why),
        }
    }

    /// Whom the PID file names, if it is the companion. `alone`: nothing else is known of it, so a file that says nothing may hide one.
    async fn of_pid_file(&self, alone: bool) -> Result<Option<Found>, Refusal> {
        let companion = &self.entry.companion;
        let Some(file) = &companion.pid_file else { return Ok(None) };
        match by_file(&companion.name, file).await {
            Ok(found) => Ok(Some(found)),
            Err(NotFound::NotRunning(_)) => Ok(None),
            // The number is another's by now.
            Err(NotFound::Refused(Refusal::AnotherProgram { .. } | Refusal::Ourselves(_))) => Ok(None),
            Err(NotFound::Refused(Refusal::PidFile { .. })) if !alone => Ok(None),
            Err(NotFound::Refused(why)) => Err(why),
        }
    }

    /// Ends a process, and removes the PID file by which it was named.
    async fn end(&mut self, process: &Process, named_by: Option<(PidFile, Reading)>) -> Ending {
        let ending = self.climb(process).await;
        // Killed, it could not remove it, and the next one may refuse to start beside it.
        if let Some((file, reading)) = named_by
            && matches!(ending, Ending::Exited { .. } | Ending::Escalated { .. })
            && process.is_over()
        {
            let removed = file.remove_stale(&reading);
            let (companion, path) = (self.entry.companion.name.clone(), file.path().display().to_string());
            self.stage.log(move || match removed {
                Ok(false) => {}
                Ok(true) => {
                    tracing::info!(target: "shutdown", companion, path, "removed the PID file it left behind");
                }
                Err(error) => {
                    tracing::warn!(target: "shutdown", companion, path, %error, "its PID file cannot be removed");
                }
            });
        }
        ending
    }

    /// Sends one signal after another, each only once, until the process has ended or the ladder is at its end.
    async fn climb(&mut self, process: &Process) -> Ending {
        let pid = process.id();
        if !self.entry.take(pid) {
            return Ending::Refused(Refusal::Twice(pid));
        }
        let ladder = &self.entry.companion.ladder;
        let first = ladder.rungs()[0].signal;
        let mut rest = ladder.total() + self.later;
        let mut last = None;
        for rung in ladder.rungs() {
            match (process.signal(rung.signal), last) {
                (Ok(true), _) => {}
                (Ok(false), _) => return ending(pid, first, last, process.ended().await),
                (Err(error), None) if error.kind() == ErrorKind::PermissionDenied => {
                    return Ending::Refused(Refusal::NotAllowed { pid });
                }
                (Err(error), None) => {
                    return Ending::Refused(Refusal::Unknown { pid: Some(pid), why: error.to_string() });
                }
                // It has changed its user, or a sandbox minds: what has been sent is all there is.
                (Err(_), Some(last)) => return Ending::TimedOut { pid, signal: last.number() },
            }
            let (companion, signal, again) = (self.entry.companion.name.clone(), rung.signal, last.is_some());
            self.stage.log(move || {
                if again {
                    tracing::warn!(target: "shutdown", companion, pid, "it has not ended: sent SIG{signal}");
                } else {
                    tracing::info!(target: "shutdown", companion, pid, "sent SIG{signal}");
                }
            });
            last = Some(rung.signal);
            let sent = Instant::now();
            let mut until = self.clock.until(rung.wait, rest);
            loop {
                tokio::select! {
                    biased;
                    exit = process.ended() => return ending(pid, first, last, exit),
                    () = self.clock.hurry() => {
                        let gone = sent.elapsed();
                        let (wait, rest) = (rung.wait.saturating_sub(gone), rest.saturating_sub(gone));
                        until = until.min(self.clock.until(wait, rest));
                    }
                    () = sleep_until(until) => break,
                }
            }
            rest = rest.saturating_sub(rung.wait);
        }
        Ending::TimedOut { pid, signal: last.unwrap_or(first).number() }
    }
}

fn ending(pid: u32, first: StopSignal, last: Option<StopSignal>, exit: Option<Exit>) -> Ending {
    match last {
        None => Ending::NotRunning(NotRunning::Ended(exit)),
        Some(signal) if signal == first => Ending::Exited { pid, exit },
        Some(signal) => Ending::Escalated { pid, signal: signal.number(), exit },
    }
}
