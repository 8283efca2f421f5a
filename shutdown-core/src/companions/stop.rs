//! The story of ending one companion: found, signalled by its ladder, waited for.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::companion::{Companion, Ending, NotRunning, Refusal};
use super::find::{Found, NotFound, by_file, find};
use super::ladder::share;
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

    /// Waits until there is less time: what is left then is the stage's reserve, less a tenth to be gone in time.
    async fn hurry(&mut self) {
        if self.hurried {
            std::future::pending::<()>().await;
        }
        self.token.cancelled().await;
        self.hurried = true;
        self.end = self.end.min(Instant::now() + STAGE_RESERVE * 9 / 10);
    }
}

/// Ends one companion. `later` is what the groups after it may need.
pub(super) async fn stop(entry: &Entry, stage: &StageContext, mut clock: Clock, later: Duration) -> Ending {
    let companion = &entry.companion;
    if companion.launch.is_none() {
        let found = match find(companion).await {
            Ok(found) => found,
            Err(NotFound::NotRunning(why)) => return Ending::NotRunning(why),
            Err(NotFound::Refused(why)) => return Ending::Refused(why),
        };
        if !entry.take(found.process.id()) {
            return Ending::Refused(Refusal::Twice(found.process.id()));
        }
        return end_found(companion, found, stage, &mut clock, later).await;
    }
    // From here on nobody starts it again.
    let launched = entry.last_process();
    let number = launched.as_ref().ok().map(|process| process.id());
    // Who has written the PID file may be a child of what was launched, a script for example: then it goes first.
    let mut ended = match of_pid_file(companion).await.filter(|found| Some(found.process.id()) != number) {
        Some(found) => Some(end_found(companion, found, stage, &mut clock, later).await),
        None => None,
    };
    if ended.as_ref().is_none_or(Ending::is_well) {
        let first = match launched {
            Ok(process) => climb(companion, &process, stage, &mut clock, later).await,
            Err(why) => Ending::NotRunning(why),
        };
        if ended.is_none() || !first.is_well() {
            ended = Some(first);
        }
    }
    // It may have left a daemon behind, a moment ago.
    match (ended, of_pid_file(companion).await) {
        (Some(ended), Some(found)) if ended.is_well() => {
            end_found(companion, found, stage, &mut clock, later).await
        }
        (ended, _) => ended.unwrap_or(Ending::NotRunning(NotRunning::NotLaunched)),
    }
}

async fn of_pid_file(companion: &Companion) -> Option<Found> {
    let file = companion.pid_file.as_ref()?;
    by_file(&companion.name, file).await.ok()
}

async fn end_found(
    companion: &Companion,
    found: Found,
    stage: &StageContext,
    clock: &mut Clock,
    later: Duration,
) -> Ending {
    let ending = climb(companion, &found.process, stage, clock, later).await;
    if let Some((file, reading)) = found.named_by
        && matches!(ending, Ending::Exited { .. } | Ending::Escalated { .. })
    {
        // Killed, it could not remove it, and the next one may refuse to start beside it.
        match file.remove_stale(&reading) {
            Ok(false) => {}
            removed => {
                let (name, path) = (companion.name.clone(), file.path().display().to_string());
                stage.log(move || match removed {
                    Ok(_) => {
                        tracing::info!(target: "shutdown", companion = name, path, "removed the PID file it left behind")
                    }
                    Err(error) => {
                        tracing::warn!(target: "shutdown", companion = name, path, %error, "its PID file cannot be removed")
                    }
                });
            }
        }
    }
    ending
}

/// Sends one signal after another, each only once, until the process has ended or the ladder is at its end.
async fn climb(
    companion: &Companion,
    process: &Process,
    stage: &StageContext,
    clock: &mut Clock,
    later: Duration,
) -> Ending {
    let pid = process.id();
    let rungs = companion.ladder.rungs();
    let mut rest = companion.ladder.total() + later;
    let mut last = None;
    for rung in rungs {
        match process.signal(rung.signal) {
            Ok(true) => {}
            Ok(false) => return ending(pid, last, rungs[0].signal.number(), process.ended().await),
            Err(error) if last.is_none() && error.kind() == std::io::ErrorKind::PermissionDenied => {
                return Ending::Refused(Refusal::NotAllowed { pid });
            }
            Err(error) => {
                let why = error.to_string();
                return Ending::Refused(Refusal::Unknown { pid: Some(pid), why });
            }
        }
        let (name, signal, again) = (companion.name.clone(), rung.signal, last.is_some());
        stage.log(move || {
            if again {
                tracing::warn!(target: "shutdown", companion = name, pid, "it has not ended: sent SIG{signal}");
            } else {
                tracing::info!(target: "shutdown", companion = name, pid, "sent SIG{signal}");
            }
        });
        last = Some(rung.signal.number());
        let sent = Instant::now();
        let mut until = sent + share(rung.wait, rest, clock.left());
        loop {
            tokio::select! {
                biased;
                exit = process.ended() => return ending(pid, last, rungs[0].signal.number(), exit),
                () = clock.hurry() => {
                    let gone = sent.elapsed();
                    let (wait, rest) = (rung.wait.saturating_sub(gone), rest.saturating_sub(gone));
                    until = until.min(Instant::now() + share(wait, rest, clock.left()));
                }
                () = sleep_until(until) => break,
            }
        }
        rest = rest.saturating_sub(rung.wait);
    }
    Ending::TimedOut { pid, signal: last.unwrap_or_default() }
}

fn ending(pid: u32, last: Option<i32>, first: i32, exit: Option<Exit>) -> Ending {
    match last {
        None => Ending::NotRunning(NotRunning::Ended(exit)),
        Some(signal) if signal == first => Ending::Exited { pid, exit },
        Some(signal) => Ending::Escalated { pid, signal, exit },
    }
}
