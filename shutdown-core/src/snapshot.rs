//! What `/status` and `/metrics` show: one moment's numbers, from atomics and short locks.

use std::borrow::Cow;

use serde::Serialize;

use crate::phase::Phase;
use crate::plan::Plan;
use crate::reason::{Reason, Urgency};
use crate::report::StageReport;

/// One moment of a coordinator.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Snapshot {
    /// The program's name.
    pub program: Cow<'static, str>,
    /// The process id.
    pub pid: u32,
    /// Where it stands.
    pub phase: Phase,
    /// Why it stops, once it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// How urgently.
    pub urgency: Urgency,
    /// Stop signals counted so far; the same one within 200 ms counts once.
    pub signals: u32,
    /// Milliseconds since the shutdown began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutting_down_for_ms: Option<f64>,
    /// Milliseconds left of the total.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_ms: Option<f64>,
    /// The requests.
    pub requests: Requests,
    /// The connections.
    pub connections: Connections,
    /// The sessions.
    pub sessions: Sessions,
    /// The oldest named request in flight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_in_flight: Option<InFlight>,
    /// The background tasks alive.
    pub background_tasks: Vec<Cow<'static, str>>,
    /// The stage that runs, if one does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_stage: Option<Cow<'static, str>>,
    /// The stages begun so far; one that runs says `timed_out` until it ends otherwise.
    pub stages: Vec<StageReport>,
    /// The state that is kept, if one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<StateStatus>,
    /// The plan.
    pub plan: Plan,
}

/// How keeping the state goes.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct StateStatus {
    /// This run's incarnation; 0 until the state has been opened.
    pub incarnation: u64,
    /// When it was saved last, milliseconds since the Unix epoch; 0 if it has not been.
    pub saved_at: u64,
    /// How large it was then.
    pub bytes: u64,
    /// Saves that went well.
    pub saves: u64,
    /// Saves that did not, at least in part.
    pub failures: u64,
    /// What the last save failed with; gone when one goes well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

#[cfg(all(unix, feature = "state"))]
impl StateStatus {
    pub(crate) fn failed(&mut self, error: String) {
        self.failures += 1;
        self.last_error = Some(error);
    }
}

/// Request counts.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct Requests {
    /// In flight now.
    pub active: u64,
    /// Admitted since the start.
    pub started: u64,
    /// Refused because they came too late, or by the lame duck's policy.
    pub refused: u64,
    /// Whether new requests are refused.
    pub refusing: bool,
    /// Whose client left before the answer was complete.
    pub client_gone: u64,
}

/// Connection counts.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct Connections {
    /// Open now, those that carry sessions included.
    pub open: u64,
    /// Accepted since the start.
    pub accepted: u64,
}

/// Session counts.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct Sessions {
    /// Open now.
    pub open: u64,
    /// Opened since the start.
    pub opened: u64,
    /// Told to end.
    pub told: u64,
}

/// A named request in flight.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct InFlight {
    /// Its route.
    pub route: Cow<'static, str>,
    /// Its age in milliseconds.
    pub age_ms: f64,
}
