//! The errors of this crate: one small type for each thing that can go wrong alone.

use std::fmt;

use crate::plan::PlanError;

/// The error a stage task may return: anything that can be shown.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The service no longer takes this: new requests, tasks or stage tasks come too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShuttingDown;

impl fmt::Display for ShuttingDown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the service is shutting down")
    }
}

impl std::error::Error for ShuttingDown {}

/// [`Builder::install`](crate::Builder) ran before in this process: signal handlers and the watchdog are
/// process-wide, so there is one coordinator a process. Keep the first one; it is `Copy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlreadyInstalled;

impl fmt::Display for AlreadyInstalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a shutdown coordinator is already installed in this process")
    }
}

impl std::error::Error for AlreadyInstalled {}

/// Why a coordinator could not be installed.
#[derive(Debug)]
#[non_exhaustive]
pub enum InstallError {
    /// There is one already. The caller's mistake.
    AlreadyInstalled(AlreadyInstalled),
    /// The plan cannot hold. The configuration's mistake: a program exits with 2.
    Plan(PlanError),
    /// Signal handlers could not be claimed. The platform's fault.
    #[cfg(all(unix, feature = "signals"))]
    Signals(crate::signals::SignalsError),
    /// A thread or its runtime could not be made. The platform's fault.
    Thread {
        /// Which thread.
        name: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlreadyInstalled(error) => error.fmt(f),
            Self::Plan(error) => error.fmt(f),
            #[cfg(all(unix, feature = "signals"))]
            Self::Signals(error) => error.fmt(f),
            Self::Thread { name, .. } => write!(f, "the thread {name:?} could not be started"),
        }
    }
}

impl std::error::Error for InstallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::AlreadyInstalled(_) | Self::Plan(_) => None,
            #[cfg(all(unix, feature = "signals"))]
            Self::Signals(error) => error.source(),
            Self::Thread { source, .. } => Some(source),
        }
    }
}

impl From<PlanError> for InstallError {
    fn from(error: PlanError) -> Self {
        Self::Plan(error)
    }
}

/// Why a stage task could not be added to a running coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddStageTaskError {
    /// Draining has begun; the plan is fixed.
    ShuttingDown(ShuttingDown),
    /// With this task's stage the reserves no longer fit the total.
    Plan(PlanError),
}

impl fmt::Display for AddStageTaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ShuttingDown(error) => error.fmt(f),
            Self::Plan(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for AddStageTaskError {}
