//! A rolling restart under load: three instances plus surge behind a balancer that learns of a departure late.
//!
//! The rule it keeps: nobody repeats a request, every client group is counted apart, and every server's exit code and
//! stderr are looked at. A mode that loses nothing proves something only beside a mode that must lose
//! ([`Mode::abrupt`], [`Mode::impatient`]).
//!
//! ```text
//!   7 groups of clients ──▶ balancer (round robin) ──▶ instance, instance, instance ─┐
//!                             ▲        ▲                                             │
//!                             │ add    └ drop: LAG after the signal                  │
//!                          surge starts ── then TERM to the oldest, wait, look ◀─────┘
//! ```
//!
//! * [`servers`]: what is restarted, and how it must exit
//! * [`balancer`]: where clients connect
//! * [`tally`]: what is counted
//! * [`clients`]: the groups
//! * [`restart`]: the run
//! * [`affinity`]: the same on one processor

pub mod affinity;
pub mod balancer;
pub mod clients;
pub mod restart;
pub mod servers;
pub mod tally;

pub use restart::{Mode, Outcome, run};
pub use servers::Kind;
pub use tally::{Group, Loss, Tally};

use std::time::Duration;

/// How long after the signal the balancer still sends clients to an instance.
pub const LAG: Duration = Duration::from_millis(400);
