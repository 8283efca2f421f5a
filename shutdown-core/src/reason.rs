//! Why a service stops. The first reason wins; all of them travel one channel.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why the shutdown began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reason {
    /// A stop signal arrived.
    Signal(SignalReceived),
    /// The program asked for it through its handle.
    Requested(Requested),
    /// `POST /terminate` asked for it.
    Terminate {
        /// How urgently.
        urgency: Urgency,
    },
    /// A task that the service cannot live without failed or panicked.
    CriticalTask {
        /// The task's name.
        task: String,
        /// Its error or panic message.
        error: String,
    },
}

impl Reason {
    /// A reason given by the program itself: short for [`Reason::Requested`].
    pub fn requested(by: impl Into<String>) -> Self {
        Self::Requested(Requested { by: by.into() })
    }
}

/// A program's own words on why it stops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requested {
    /// Who asked, or why.
    pub by: String,
}

impl From<String> for Requested {
    fn from(by: String) -> Self {
        Self { by }
    }
}

impl From<&str> for Requested {
    fn from(by: &str) -> Self {
        Self { by: by.to_owned() }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(signal) => signal.fmt(f),
            Self::Requested(Requested { by }) => write!(f, "requested: {by}"),
            Self::Terminate { urgency } => write!(f, "/terminate ({urgency})"),
            Self::CriticalTask { task, error } => write!(f, "critical task {task:?}: {error}"),
        }
    }
}

/// A stop signal and who sent it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalReceived {
    /// The signal's name, for example `SIGTERM`.
    pub signal: String,
    /// The signal's number.
    pub number: i32,
    /// The sender's process id, where the kernel tells it.
    pub pid: Option<i32>,
    /// The sender's user id, where the kernel tells it.
    pub uid: Option<u32>,
}

impl fmt::Display for SignalReceived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.signal)?;
        if let (Some(pid), Some(uid)) = (self.pid, self.uid) {
            write!(f, " from pid {pid} (uid {uid})")?;
        }
        Ok(())
    }
}

/// How much of the plan is still waited for. It only rises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Urgency {
    /// The whole plan.
    #[default]
    Graceful,
    /// Waits are skipped, every stage keeps its reserve: what a second signal asks for.
    Fast,
    /// Only the persist stage and the report.
    Immediate,
}

impl Urgency {
    /// The urgency as `/terminate?mode=` writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Graceful => "graceful",
            Self::Fast => "fast",
            Self::Immediate => "immediate",
        }
    }
}

impl fmt::Display for Urgency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
