//! Stops a service without losing a request, and says exactly what happened.
//!
//! This crate is the coordinator: signals, counts of what is in flight, phases, stages with budgets and reserves,
//! a watchdog, a report. It knows no HTTP: `shutdown-tower` and `shutdown-pingora` bring it to web services.
//!
//! ```
//! use std::time::Duration;
//! use shutdown_core::{Phase, Reason, ShutdownConfig, ShutdownCoordinator, Stage};
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A service calls `.signals(Signals::claim()?)…install()?` instead of `build()` and never sees the driver.
//! let (shutdown, driver) = ShutdownCoordinator::builder()
//!     .config(ShutdownConfig::default())
//!     .stage_task(Stage::Database, "orders", |stage| async move {
//!         println!("closing the pool, until {:?}", stage.deadline);
//!         Ok(())
//!     })
//!     .build()?;
//! let driver = tokio::spawn(driver.run());
//!
//! shutdown.spawn("metrics sync", |token| async move {
//!     // Finish the iteration, then hear the token.
//!     while !token.is_cancelled() {
//!         tokio::select! {
//!             () = token.cancelled() => {}
//!             () = tokio::time::sleep(Duration::from_secs(60)) => println!("synced"),
//!         }
//!     }
//! })?;
//!
//! let request = shutdown.request_start()?;
//! shutdown.initiate_shutdown(Reason::requested("an example"));
//! shutdown.until(Phase::Draining).await;
//! assert_eq!(shutdown.active_request_count(), 1);
//! drop(request); // its answer's last byte is out
//!
//! let report = shutdown.finished().await;
//! assert_eq!((report.requests.drained, report.exit_code()), (1, 0));
//! # driver.await?;
//! # Ok(())
//! # }
//! ```
//!
//! What is what: [`ShutdownCoordinator`] is the handle, [`Driver`] the owner, [`Phase`] where the service stands,
//! [`Stage`] what is closed when, [`Plan`] the arithmetic, [`ShutdownReport`] what happened.
//!
//! Panics must unwind: under `panic = "abort"` guards and reports cannot work.

#[cfg(feature = "breaker")]
pub mod breaker;
mod builder;
#[cfg(all(unix, feature = "companions"))]
pub mod companions;
mod config;
mod connections;
mod coordinator;
mod driver;
mod error;
#[cfg(feature = "files")]
pub mod files;
#[cfg(feature = "files")]
mod history;
mod inflight;
#[cfg(all(unix, feature = "signals"))]
mod install;
mod latch;
mod log;
#[cfg(all(test, shutdown_loom))]
mod loom_tests;
#[cfg(feature = "net")]
pub mod net;
#[cfg(feature = "peers")]
pub mod peers;
mod phase;
mod plan;
mod random;
mod reason;
mod report;
mod sessions;
#[cfg(all(unix, feature = "signals"))]
mod signals;
mod snapshot;
mod stage;
#[cfg(all(unix, feature = "state"))]
pub mod state;
mod sync;
#[cfg(all(unix, feature = "systemd"))]
pub mod systemd;
mod tasks;
mod unwind;

pub use builder::Builder;
pub use config::{ConfigError, LameDuckPolicy, ShutdownConfig, display_duration, parse_duration};
pub use connections::{ConnectionGuard, ConnectionHandle, ConnectionId, Cut};
pub use coordinator::{Join, ListenerGuard, ShutdownCoordinator};
pub use driver::Driver;
pub use error::{
    AddStageTaskError, AlreadyInstalled, BoxError, EXIT_START, EXIT_USAGE, InstallError, ShuttingDown,
    UsageError, sentence, start_failure,
};
#[cfg(feature = "files")]
pub use history::{HISTORY_LINES, ReportFiles};
pub use inflight::{NamedRequest, NamedRequestGuard, RequestGuard};
pub use latch::{Latch, Wait};
pub use phase::Phase;
pub use plan::{
    COMPANION_BUDGET, CUT_SETTLE, PERSIST_BUDGET, PERSIST_RESERVE, Plan, PlanError, PlannedStage,
    REPORT_RESERVE, STAGE_RESERVE, Stage, Step,
};
pub use reason::{Reason, Requested, SignalReceived, Urgency};
pub use report::{
    CUT_LISTED, ConnectionsReport, CutRequest, CutSession, EXIT_CLEAN, EXIT_CUT, EXIT_STAGE, NOTES_LISTED,
    Outcome, PhaseReport, RequestsReport, SCHEMA, SessionsReport, ShutdownReport, SignalReport, StageReport,
    TaskNote, TaskReport,
};
pub use sessions::{Session, Told};
#[cfg(all(unix, feature = "signals"))]
pub use signals::{SAME_SIGNAL, Signals, SignalsError};
pub use snapshot::{Connections, InFlight, Requests, Sessions, Snapshot, StateStatus};
pub use stage::{StageContext, TOKEN_GRACE};
pub use tasks::TaskOutput;
