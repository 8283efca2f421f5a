//! Where a service stands between its start and its end.
//!
//! A phase only moves forward, and only the [`Driver`](crate::Driver) moves it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where the service stands. Ordered: a later phase is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Phase {
    /// No reason to stop has arrived; everything is served.
    Running = 0,
    /// Readiness is red and departures are announced, but everything is still accepted and served; answers ask
    /// the client to leave (`Connection: close`, GOAWAY).
    LameDuck = 1,
    /// The accept queue is emptied and the listener closed; accepted connections are served for the linger, then
    /// new requests are refused and the last ones waited for.
    Draining = 2,
    /// No request is left; the stages put away what the service stood on.
    Closing = 3,
    /// Every stage has ended; the report is written and the exit code known.
    Stopped = 4,
}

impl Phase {
    /// Every phase in order.
    pub const ALL: [Self; 5] = [Self::Running, Self::LameDuck, Self::Draining, Self::Closing, Self::Stopped];

    /// The phase as written in reports and routes: `running`, `lame_duck`, `draining`, `closing`, `stopped`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::LameDuck => "lame_duck",
            Self::Draining => "draining",
            Self::Closing => "closing",
            Self::Stopped => "stopped",
        }
    }

    /// What entering it means, as the log says it.
    pub(crate) const fn doing(self) -> &'static str {
        match self {
            Self::Running => "Serving",
            Self::LameDuck => "Readiness is red, clients are asked to leave",
            Self::Draining => "Server received shutdown signal, stopping to accept new connections",
            Self::Closing => "Server stopped accepting new connections, starting cleanup",
            Self::Stopped => "Graceful shutdown complete",
        }
    }

    pub(crate) const fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::Running,
            1 => Self::LameDuck,
            2 => Self::Draining,
            3 => Self::Closing,
            _ => Self::Stopped,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_survives_its_byte_and_its_order_is_the_order_of_all() {
        for (index, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(Phase::from_u8(phase as u8), phase);
            assert_eq!(phase as usize, index);
        }
        assert!(Phase::ALL.is_sorted());
    }
}
