//! What can go wrong, and whose affair it is.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why something was not done. Each says what is as it was.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// What was asked for, or what stands in a file, cannot be: nothing was written. One sentence that says the fix.
    Input(String),
    /// PgBouncer, or the database server, cannot be reached or does not do as it is told: nothing was written.
    Unreachable(String),
    /// Somebody else has the lock of a file: nothing was written.
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
        /// Who has it, if the system tells.
        holder: Option<u32>,
    },
    /// A file could not be read or written: it is as it was.
    Unwritten {
        /// Which.
        path: PathBuf,
        /// What was done to it.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The file is written, but PgBouncer has not been seen to run by it. When it refused, the file is as it was again, and the
    /// sentence says so.
    Unverified(String),
    /// It would have hit somebody else, or cut clients: nothing was written, nobody was signalled, no client was cut.
    Refused(String),
}

impl Error {
    pub(crate) fn unwritten(
        path: impl Into<PathBuf>,
        doing: &'static str,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Unwritten { path: path.into(), doing, source: source.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input(what) | Self::Unreachable(what) | Self::Unverified(what) | Self::Refused(what) => {
                f.write_str(what)
            }
            Self::Locked { path, waited, holder } => {
                write!(f, "{} is locked ", path.display())?;
                match holder {
                    Some(pid) => write!(f, "by process {pid}")?,
                    None => f.write_str("by another process")?,
                }
                write!(
                    f,
                    ", and still was after {} ms: end that, or wait longer; do not remove the file",
                    waited.as_millis()
                )
            }
            Self::Unwritten { path, doing, .. } => {
                write!(f, "{} cannot be {doing}", path.display())
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unwritten { source, .. } => Some(source),
            _ => None,
        }
    }
}
