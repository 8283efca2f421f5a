//! What is said when, as functions of the time and of what can be seen: no clock, no I/O.

use std::fmt::Write;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::Instant;

use crate::phase::Phase;
use crate::plan::Stage;

/// How often a look is taken while stopping.
const LOOK: Duration = Duration::from_secs(1);
/// By how much the time is extended after progress: a few looks, so that one that comes late costs nothing.
const EXTENSION: Duration = Duration::from_secs(5);

/// One moment of a shutdown, as far as systemd is told of it.
#[derive(Clone, Debug)]
pub(super) struct Look {
    pub(super) phase: Phase,
    pub(super) stage: Option<Stage>,
    /// In flight, open, open, and alive.
    pub(super) requests: u64,
    pub(super) connections: u64,
    pub(super) sessions: u64,
    pub(super) tasks: u64,
    /// What has ended so far.
    pub(super) ended: Ended,
    /// Until the end of the total.
    pub(super) left: Duration,
}

/// How much has ended. A change is progress; that something new has come is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) requests: u64,
    pub(super) connections: u64,
    pub(super) sessions: u64,
    /// Background tasks.
    pub(super) tasks: u64,
}

/// What a service that runs says first.
pub(super) fn ready(status: &str) -> String {
    message(&[NotifyState::Ready, NotifyState::Status(&one_line(status))])
}

/// What is said last.
pub(super) fn stopped(exit_code: u8) -> String {
    message(&[NotifyState::Status(&format!("stopped, exit code {exit_code}"))])
}

/// What a service that runs and is well says again and again.
pub(super) fn ping() -> String {
    message(&[NotifyState::Watchdog])
}

/// What has been said of a shutdown, and so what is still to be said.
#[derive(Debug)]
pub(super) struct Words {
    /// How often the watchdog hears of it, and when next.
    ping: Option<(Duration, Instant)>,
    next_look: Instant,
    status: String,
    seen: (Phase, Option<Stage>, Ended),
}

impl Words {
    /// The first words of a shutdown, and those that follow. The next ping of a watchdog is due as `ping` says.
    pub(super) fn stopping(look: &Look, ping: Option<(Duration, Instant)>, now: Instant) -> (Self, String) {
        let status = status(look);
        let first = message(&[NotifyState::Stopping, NotifyState::Status(&status)]);
        (Self { ping, next_look: now + LOOK, status, seen: seen(look) }, first)
    }

    /// When there may be something to say although nothing was heard of.
    pub(super) fn next(&self) -> Instant {
        self.ping.map_or(self.next_look, |(_, next)| next.min(self.next_look))
    }

    /// What is to be said at `now`, if anything.
    pub(super) fn at(&mut self, look: &Look, now: Instant) -> Option<String> {
        let mut states = Vec::new();
        if let Some((every, next)) = &mut self.ping
            && *next <= now
        {
            *next = now + *every;
            states.push(NotifyState::Watchdog);
        }
        let due = self.next_look <= now;
        let (phase, stage, _) = self.seen;
        let elsewhere = (phase, stage) != (look.phase, look.stage);
        if due {
            self.next_look = now + LOOK;
            let extension = EXTENSION.min(look.left);
            if self.seen != seen(look) && !extension.is_zero() {
                let micros = u32::try_from(extension.as_micros()).unwrap_or(u32::MAX);
                states.push(NotifyState::ExtendTimeoutUsec(micros));
            }
            self.seen = seen(look);
        }
        let text = status(look);
        if (due || elsewhere) && text != self.status {
            self.status = text;
            states.push(NotifyState::Status(&self.status));
        }
        (!states.is_empty()).then(|| message(&states))
    }
}

fn seen(look: &Look) -> (Phase, Option<Stage>, Ended) {
    (look.phase, look.stage, look.ended)
}

/// `draining: 12 requests, 34 connections, 5 sessions; 26.4 s left`, `stage cache; 3.1 s left`.
fn status(look: &Look) -> String {
    let mut text = String::new();
    let traffic = match look.phase {
        Phase::Running | Phase::LameDuck => Some("lame duck"),
        Phase::Draining => Some("draining"),
        Phase::Closing | Phase::Stopped => None,
    };
    if let Some(phase) = traffic {
        let (requests, connections) =
            (count(look.requests, "request"), count(look.connections, "connection"));
        text += &format!("{phase}: {requests}, {connections}, {}", count(look.sessions, "session"));
        if let Some(stage) = look.stage {
            text += &format!(", stage {}", stage.name());
        }
    } else {
        match look.stage {
            None => text += "closing",
            Some(Stage::Background) => text += &format!("stage background: {}", count(look.tasks, "task")),
            Some(Stage::WebSockets) => {
                text += &format!("stage websockets: {}", count(look.sessions, "session"))
            }
            Some(stage) => text += &format!("stage {}", stage.name()),
        }
    }
    text + &format!("; {:.1} s left", look.left.as_secs_f64())
}

fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A status is one line; a second one would be a message of its own.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A line for each, as `man sd_notify` has it.
fn message(states: &[NotifyState<'_>]) -> String {
    let mut text = String::new();
    for state in states {
        let _ = writeln!(text, "{state}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTAL: Duration = Duration::from_secs(28);

    /// A drain with this many requests that have ended, `at` that long after its begin.
    fn drain(ended: u64, at: Duration) -> Look {
        Look {
            phase: Phase::Draining,
            stage: None,
            requests: 12 - ended,
            connections: 34,
            sessions: 1,
            tasks: 2,
            ended: Ended { requests: ended, ..Ended::default() },
            left: TOTAL.saturating_sub(at),
        }
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// The extension that a message asks for, in seconds.
    fn extension(message: &str) -> Option<f64> {
        let text = message.lines().find_map(|line| line.strip_prefix("EXTEND_TIMEOUT_USEC="))?;
        Some(text.parse::<u32>().unwrap() as f64 / 1e6)
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_words_of_a_stop_say_so_with_numbers() {
        let now = Instant::now();
        let (words, first) = Words::stopping(&drain(0, Duration::ZERO), None, now);
        let status = "STATUS=draining: 12 requests, 34 connections, 1 session; 28.0 s left";
        assert_eq!(first, format!("STOPPING=1\n{status}\n"));
        assert_eq!(words.next(), now + secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn time_is_extended_after_each_second_in_which_something_ended_and_no_other() {
        let now = Instant::now();
        let (mut words, _) = Words::stopping(&drain(0, Duration::ZERO), None, now);
        // Ended by the end of each second.
        let ended = [1, 1, 2, 2, 2, 5];
        let said: Vec<_> = (1..)
            .zip(ended)
            .map(|(at, ended)| extension(&words.at(&drain(ended, secs(at)), now + secs(at)).unwrap()))
            .collect();
        assert_eq!(said, [Some(5.0), None, Some(5.0), None, None, Some(5.0)]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_anew_is_no_progress() {
        let now = Instant::now();
        let (mut words, _) = Words::stopping(&drain(0, Duration::ZERO), None, now);
        let more = Look { requests: 100, connections: 100, ..drain(0, secs(1)) };
        let said = words.at(&more, now + secs(1)).unwrap();
        assert_eq!(said, "STATUS=draining: 100 requests, 100 connections, 1 session; 27.0 s left\n");
    }

    #[tokio::test(start_paused = true)]
    async fn time_is_never_extended_beyond_the_total() {
        let now = Instant::now();
        let (mut words, _) = Words::stopping(&drain(0, Duration::ZERO), None, now);
        for at in 1..40 {
            let said = words.at(&drain(at % 2, secs(at)), now + secs(at));
            let beyond = said.as_deref().and_then(extension).map(|by| secs(at) + Duration::from_secs_f64(by));
            let left = TOTAL.saturating_sub(secs(at));
            assert_eq!(beyond, (!left.is_zero()).then(|| (secs(at) + secs(5)).min(TOTAL)), "at {at}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn phases_and_stages_are_said_at_once_and_nothing_twice() {
        let now = Instant::now();
        let (mut words, _) = Words::stopping(&drain(0, Duration::ZERO), None, now);
        let closing = |stage| Look { phase: Phase::Closing, stage, ..drain(12, secs(0)) };
        let mut said = |look: &Look| words.at(look, now).unwrap_or_default();
        assert_eq!(said(&drain(3, secs(0))), "", "a request is no phase");
        assert_eq!(said(&closing(None)), "STATUS=closing; 28.0 s left\n");
        let stages = [
            (Stage::Background, "background: 2 tasks"),
            (Stage::WebSockets, "websockets: 1 session"),
            (Stage::Cache, "cache"),
        ];
        for (stage, words) in stages {
            assert_eq!(said(&closing(Some(stage))), format!("STATUS=stage {words}; 28.0 s left\n"));
            assert_eq!(said(&closing(Some(stage))), "", "twice");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stage_beside_the_drain_is_named_with_it() {
        let look = Look { stage: Some(Stage::Departure), ..drain(12, secs(2)) };
        assert_eq!(
            status(&look),
            "draining: 0 requests, 34 connections, 1 session, stage departure; 26.0 s left"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn pings_go_on_at_their_own_pace_and_one_that_is_late_comes_at_once() {
        let now = Instant::now();
        let every = Duration::from_millis(400);
        let (mut words, _) = Words::stopping(&drain(0, Duration::ZERO), Some((every, now)), now);
        assert_eq!(words.next(), now);
        let mut pings = Vec::new();
        let mut at = now;
        while at < now + secs(2) {
            at = words.next();
            let said = words.at(&drain(0, at - now), at).unwrap();
            if said.contains("WATCHDOG=1\n") {
                pings.push((at - now).as_millis());
            }
        }
        assert_eq!(pings, [0, 400, 800, 1200, 1600, 2000]);
    }

    #[test]
    fn a_status_is_one_line_whatever_it_holds() {
        assert_eq!(ready("serving\nSTOPPING=1"), "READY=1\nSTATUS=serving STOPPING=1\n");
        assert_eq!(stopped(11), "STATUS=stopped, exit code 11\n");
        assert_eq!(ping(), "WATCHDOG=1\n");
    }
}
