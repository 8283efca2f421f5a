//! The errors of this crate: one small type for each thing that can go wrong alone.

use std::error::Error;
use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use crate::config::ConfigError;
use crate::plan::PlanError;

/// The error a stage task may return: anything that can be shown.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// The service no longer takes this: new requests, tasks or stage tasks come too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShuttingDown;

impl fmt::Display for ShuttingDown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the service is shutting down")
    }
}

impl Error for ShuttingDown {}

/// [`Builder::install`](crate::Builder) ran before in this process: signal handlers and the watchdog are
/// process-wide, so there is one coordinator a process. Keep the first one; it is `Copy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlreadyInstalled;

impl fmt::Display for AlreadyInstalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a shutdown coordinator is already installed in this process")
    }
}

impl Error for AlreadyInstalled {}

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
    /// The state's place cannot be used, or another process has it. The operator's mistake or the platform's fault. The
    /// coordinator runs already and hears signals; the program is expected to leave.
    #[cfg(all(unix, feature = "state"))]
    State(crate::state::StateError),
    /// A thread or its runtime could not be made. The platform's fault.
    Thread {
        /// Which thread.
        name: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

impl InstallError {
    /// Whether the coordinator runs all the same.
    #[cfg(all(unix, feature = "signals"))]
    pub(crate) fn is_late(&self) -> bool {
        #[cfg(feature = "state")]
        if matches!(self, Self::State(_)) {
            return true;
        }
        false
    }
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlreadyInstalled(error) => error.fmt(f),
            Self::Plan(error) => error.fmt(f),
            #[cfg(all(unix, feature = "signals"))]
            Self::Signals(error) => error.fmt(f),
            #[cfg(all(unix, feature = "state"))]
            Self::State(error) => error.fmt(f),
            Self::Thread { name, .. } => write!(f, "the thread {name:?} could not be started"),
        }
    }
}

impl Error for InstallError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::AlreadyInstalled(_) | Self::Plan(_) => None,
            #[cfg(all(unix, feature = "signals"))]
            Self::Signals(error) => error.source(),
            #[cfg(all(unix, feature = "state"))]
            Self::State(error) => error.source(),
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

impl Error for AddStageTaskError {}

/// Exit code when a program could not start.
pub const EXIT_START: u8 = 1;
/// Exit code for bad usage, a bad configuration or an impossible plan.
pub const EXIT_USAGE: u8 = 2;

/// A setting of the program's own that is wrong, as one sentence that names it: [`start_failure`] makes [`EXIT_USAGE`] of
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageError(String);

impl UsageError {
    /// With this sentence.
    pub fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for UsageError {}

/// Says on stderr in one sentence why a program could not start, and gives its exit code: [`EXIT_USAGE`] when the
/// configuration is at fault, else [`EXIT_START`].
///
/// `main` returning a `Result` would print the error's `Debug` form and always exit with 1.
///
/// ```
/// use std::convert::Infallible;
/// use std::error::Error;
/// use std::process::ExitCode;
///
/// use shutdown_core::{ShutdownConfig, start_failure};
///
/// fn main() -> ExitCode {
///     # if true { return ExitCode::SUCCESS; }
///     let Err(error) = run();
///     start_failure("my-service", &*error)
/// }
///
/// fn run() -> Result<Infallible, Box<dyn Error>> {
///     let _config = ShutdownConfig::from_env()?;
///     // … install, serve, and leave through `ShutdownReport::exit`.
///     # unreachable!()
/// }
/// ```
pub fn start_failure(program: &str, error: &(dyn Error + 'static)) -> ExitCode {
    let mut code = EXIT_START;
    let mut next = Some(error);
    while let Some(cause) = next {
        let of_the_configuration = cause.is::<ConfigError>()
            || cause.is::<PlanError>()
            || cause.is::<UsageError>()
            || matches!(cause.downcast_ref(), Some(InstallError::Plan(_)));
        if of_the_configuration {
            code = EXIT_USAGE;
        }
        next = cause.source();
    }
    // Nobody to tell when stderr is gone; the code still does.
    let _ = writeln!(std::io::stderr(), "{program}: error: {}", sentence(error));
    ExitCode::from(code)
}

/// An error and what led to it, as one sentence.
pub fn sentence(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Some say their cause themselves.
        let why = error.to_string();
        if !text.ends_with(&why) {
            text += ": ";
            text += &why;
        }
        cause = error.source();
    }
    text
}
