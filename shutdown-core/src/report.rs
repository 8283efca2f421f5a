//! What happened, exactly: the report every caller gets, the exit code it means, and its JSON.
//!
//! A report is written *pessimistically*: a stage that has not started says `skipped`, one that has not ended
//! says `timed_out`. So a snapshot taken at any moment, by the watchdog for example, is already true.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize};

use crate::phase::Phase;
use crate::reason::{Reason, SignalReceived, Urgency};

/// The number of this report's form. It rises when a field changes its meaning or goes away.
pub const SCHEMA: u32 = 1;

/// How a stage or a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It finished.
    Ok,
    /// It returned an error.
    Failed,
    /// It panicked.
    Panicked,
    /// It was still running at its deadline, was told, and was aborted or left behind.
    TimedOut,
    /// It was not started.
    Skipped,
    /// The runtime it ran on was dropped under it.
    RuntimeGone,
}

impl Outcome {
    /// The outcome as written in reports, for example `timed_out`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Panicked => "panicked",
            Self::TimedOut => "timed_out",
            Self::Skipped => "skipped",
            Self::RuntimeGone => "runtime_gone",
        }
    }

    /// The worse of two.
    pub(crate) fn worse(self, other: Self) -> Self {
        let rank = |outcome| match outcome {
            Self::Ok => 0,
            Self::Skipped => 1,
            Self::TimedOut => 2,
            Self::RuntimeGone => 3,
            Self::Failed => 4,
            Self::Panicked => 5,
        };
        if rank(other) > rank(self) { other } else { self }
    }
}

/// Milliseconds since the shutdown began, or a length of time, to the microsecond.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

/// One task of a stage, or one background task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TaskReport {
    /// The name it was given.
    pub name: Cow<'static, str>,
    /// How it ended.
    pub outcome: Outcome,
    /// Its error or panic message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// From the stage's start to its end, in milliseconds.
    pub elapsed_ms: f64,
    /// What it has written down with [`StageContext::note`](crate::StageContext::note): the first [`NOTES_LISTED`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<TaskNote>,
}

impl TaskReport {
    /// A task without detail and notes.
    pub(crate) fn new(name: Cow<'static, str>, outcome: Outcome, elapsed_ms: f64) -> Self {
        Self { name, outcome, detail: None, elapsed_ms, notes: Vec::new() }
    }
}

/// How many notes of a task a report lists.
pub const NOTES_LISTED: usize = 100;

/// What became of one of the things a stage task is about: a peer, an interface, a process.
///
/// ```
/// use shutdown_core::TaskNote;
///
/// let note = TaskNote::new("10.0.0.2:7946", "acknowledged").with("sends", 2.0).with("after_ms", 51.3);
/// assert_eq!(note.numbers["sends"], 2.0);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TaskNote {
    /// The thing.
    pub subject: String,
    /// What became of it, in a word or two.
    pub outcome: String,
    /// Numbers with their unit in the name; in JSON they stand beside the two above, whole ones without a fraction.
    #[serde(flatten, serialize_with = "whole_where_whole")]
    pub numbers: BTreeMap<Cow<'static, str>, f64>,
}

impl TaskNote {
    /// What became of this.
    pub fn new(subject: impl Into<String>, outcome: impl Into<String>) -> Self {
        Self { subject: subject.into(), outcome: outcome.into(), numbers: BTreeMap::new() }
    }

    /// With a number more.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: f64) -> Self {
        self.numbers.insert(name.into(), value);
        self
    }
}

/// A process's number is 4711, not 4711.0.
fn whole_where_whole<S: serde::Serializer>(
    numbers: &BTreeMap<Cow<'static, str>, f64>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(numbers.len()))?;
    for (name, value) in numbers {
        // Up to 2^53 every whole number has its own.
        if value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0 {
            map.serialize_entry(name, &(*value as i64))?;
        } else {
            map.serialize_entry(name, value)?;
        }
    }
    map.end()
}

/// One stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StageReport {
    /// The stage's name.
    pub stage: Cow<'static, str>,
    /// The worst outcome of its tasks.
    pub outcome: Outcome,
    /// When it started, in milliseconds from the beginning.
    pub start_ms: f64,
    /// When it ended.
    pub end_ms: f64,
    /// The time it was given when it started.
    pub budget_ms: f64,
    /// Its configured budget, when the time it was given was shorter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shrunk_from_ms: Option<f64>,
    /// Its tasks, in the order they were added; hooks are named `before …` and `after …`.
    pub tasks: Vec<TaskReport>,
}

/// One phase that was passed through.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PhaseReport {
    /// Which phase.
    pub phase: Phase,
    /// When it began, in milliseconds from the beginning.
    pub start_ms: f64,
    /// When it ended.
    pub end_ms: f64,
}

/// A request that was cut, as far as it had a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CutRequest {
    /// Its route.
    pub route: Cow<'static, str>,
    /// Its age when it was cut, in milliseconds.
    pub age_ms: f64,
}

/// What became of the requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RequestsReport {
    /// In flight when the shutdown began.
    pub in_flight_at_start: u64,
    /// Finished since then, those admitted since included.
    pub drained: u64,
    /// Refused because they came too late, or by the lame duck's policy.
    pub refused: u64,
    /// Still in flight when they were cut.
    pub cut: u64,
    /// Whose client left before the answer was complete, since the shutdown began.
    pub client_gone: u64,
    /// The cut requests that had a name, oldest first, at most [`CUT_LISTED`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cut_requests: Vec<CutRequest>,
}

/// How many cut requests, and how many cut sessions, a report lists.
pub const CUT_LISTED: usize = 100;

/// What became of the sessions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SessionsReport {
    /// Open when the shutdown began.
    pub open_at_start: u64,
    /// Told to end, also those that began since.
    pub told: u64,
    /// Still open at the end of stage WebSockets.
    pub cut: u64,
    /// The cut sessions, oldest first, at most [`CUT_LISTED`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cut_sessions: Vec<CutSession>,
}

/// A session that was cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CutSession {
    /// Its name.
    pub name: Cow<'static, str>,
    /// Its age when it was cut, in milliseconds.
    pub age_ms: f64,
}

/// What became of the connections.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ConnectionsReport {
    /// Open when the shutdown began.
    pub open_at_start: u64,
    /// Accepted since then.
    pub accepted: u64,
    /// Still open when they were cut.
    pub cut: u64,
}

/// A stop signal and when it came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SignalReport {
    /// The signal and its sender.
    #[serde(flatten)]
    pub signal: SignalReceived,
    /// When it arrived, in milliseconds from the beginning.
    pub at_ms: f64,
}

/// What happened between the reason and the exit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The program, as [`Builder::program`](crate::Builder::program) named it.
    pub program: Cow<'static, str>,
    /// The process id.
    pub pid: u32,
    /// Why.
    pub reason: Reason,
    /// The stop signals received, the first included.
    pub signals: Vec<SignalReport>,
    /// The highest urgency that was asked for.
    pub urgency: Urgency,
    /// The signal that forced it, when a second one came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forced_by: Option<i32>,
    /// When it began: milliseconds since the Unix epoch.
    pub started_unix_ms: u64,
    /// From the beginning to the report, in milliseconds.
    pub duration_ms: f64,
    /// The configured total, in milliseconds.
    pub total_ms: f64,
    /// The phases passed through.
    pub phases: Vec<PhaseReport>,
    /// The stages that had something to do, in order.
    pub stages: Vec<StageReport>,
    /// The requests.
    pub requests: RequestsReport,
    /// The connections.
    pub connections: ConnectionsReport,
    /// The sessions.
    #[serde(default)]
    pub sessions: SessionsReport,
    /// Whether the watchdog had to end the process.
    pub watchdog: bool,
    /// What the process exits with.
    pub exit_code: u8,
}

/// Exit code when nothing was lost.
pub const EXIT_CLEAN: u8 = 0;
/// Exit code when a stage failed or ran out of time.
pub const EXIT_STAGE: u8 = 10;
/// Exit code when requests, connections or sessions were cut at a deadline.
pub const EXIT_CUT: u8 = 11;

impl ShutdownReport {
    pub(crate) fn new(
        program: Cow<'static, str>,
        reason: Reason,
        started_unix_ms: u64,
        total: Duration,
    ) -> Self {
        Self {
            schema: SCHEMA,
            program,
            pid: std::process::id(),
            reason,
            signals: Vec::new(),
            urgency: Urgency::Graceful,
            forced_by: None,
            started_unix_ms,
            duration_ms: 0.0,
            total_ms: ms(total),
            phases: Vec::new(),
            stages: Vec::new(),
            requests: RequestsReport::default(),
            connections: ConnectionsReport::default(),
            sessions: SessionsReport::default(),
            watchdog: false,
            exit_code: EXIT_CLEAN,
        }
    }

    /// What the facts in this report mean as an exit code: 128+n when signal n forced it, else 11 when something
    /// was cut, else 10 when a stage or a critical task failed or the watchdog ended the process, else 0.
    pub fn exit_code(&self) -> u8 {
        if let Some(signal) = self.forced_by {
            return u8::try_from(128 + signal).unwrap_or(u8::MAX);
        }
        if self.requests.cut > 0 || self.connections.cut > 0 || self.sessions.cut > 0 {
            return EXIT_CUT;
        }
        let stage_failed =
            self.stages.iter().any(|stage| !matches!(stage.outcome, Outcome::Ok | Outcome::Skipped));
        if stage_failed || self.watchdog || matches!(self.reason, Reason::CriticalTask { .. }) {
            return EXIT_STAGE;
        }
        EXIT_CLEAN
    }

    /// Whether nothing was lost, failed or forced.
    pub fn is_clean(&self) -> bool {
        self.exit_code() == EXIT_CLEAN
    }

    /// The companions that were running and have been ended, in their order.
    pub fn companions_ended(&self) -> Vec<&str> {
        let stages = self.stages.iter().filter(|stage| stage.stage == crate::plan::Stage::Companions.name());
        let notes = stages.flat_map(|stage| &stage.tasks).flat_map(|task| &task.notes);
        let ended = notes.filter(|note| matches!(&*note.outcome, "exited" | "escalated"));
        ended.map(|note| &*note.subject).collect()
    }

    /// Leaves the process with [`exit_code`](Self::exit_code).
    ///
    /// Runs the handlers registered with `atexit`; one that hangs is ended by the watchdog at the total.
    pub fn exit(&self) -> ! {
        #[expect(clippy::disallowed_methods, reason = "this is the one way out that a program calls")]
        std::process::exit(i32::from(self.exit_code()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> ShutdownReport {
        ShutdownReport::new("test".into(), Reason::requested("a test"), 0, Duration::from_secs(28))
    }

    fn stage(outcome: Outcome) -> StageReport {
        StageReport {
            stage: "cache".into(),
            outcome,
            start_ms: 0.0,
            end_ms: 1.0,
            budget_ms: 1.0,
            shrunk_from_ms: None,
            tasks: Vec::new(),
        }
    }

    #[test]
    fn a_forcing_signal_beats_a_cut_request_beats_a_failed_stage_beats_clean() {
        let mut report = report();
        report.stages.push(stage(Outcome::Skipped));
        assert_eq!(report.exit_code(), 0);
        for outcome in [Outcome::Failed, Outcome::Panicked, Outcome::TimedOut, Outcome::RuntimeGone] {
            report.stages[0] = stage(outcome);
            assert_eq!(report.exit_code(), 10);
        }
        report.requests.cut = 1;
        assert_eq!(report.exit_code(), 11);
        report.forced_by = Some(15);
        assert_eq!(report.exit_code(), 143);
    }

    #[test]
    fn a_critical_tasks_failure_is_never_a_clean_exit() {
        let mut report = report();
        report.reason = Reason::CriticalTask { task: "ledger".into(), error: "gone".into() };
        assert_eq!(report.exit_code(), 10);
    }

    #[cfg(feature = "files")]
    #[test]
    fn a_report_reads_back_from_its_json_as_it_was() {
        let mut report = report();
        report.reason = Reason::Signal(SignalReceived {
            signal: "SIGTERM".into(),
            number: 15,
            pid: Some(7),
            uid: Some(0),
        });
        report.stages.push(stage(Outcome::TimedOut));
        let mut task = TaskReport::new("notices".into(), Outcome::Ok, 3.5);
        task.notes.push(TaskNote::new("10.0.0.2:7946", "acknowledged").with("sends", 2.0));
        report.stages[0].tasks.push(task);
        report.requests.cut_requests.push(CutRequest { route: "GET /never".into(), age_ms: 2.5 });
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<ShutdownReport>(&json).unwrap(), report);
        assert!(json.contains(r#"{"subject":"10.0.0.2:7946","outcome":"acknowledged","sends":2}"#), "{json}");
        assert!(json.contains(r#""outcome":"timed_out""#) && json.contains(r#""kind":"signal""#), "{json}");
    }
}
