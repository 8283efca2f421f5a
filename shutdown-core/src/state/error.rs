//! What can go wrong around a state; never its content, which is set aside instead.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::error::BoxError;

/// Why a state could not be opened or saved.
#[derive(Debug)]
#[non_exhaustive]
pub enum StateError {
    /// The coordinator was built without a store. The program's mistake: give one to
    /// [`Builder::state`](crate::Builder::state).
    NotConfigured,
    /// The shutdown puts the state away, or has; nothing that comes now would be saved. The program's: what belongs into
    /// the state must be there before stage Persist.
    Closed,
    /// Another process has the place. The operator's: one process a directory.
    Held {
        /// The place.
        place: String,
        /// Who has it, as far as it has written that down.
        by: String,
    },
    /// A file or directory cannot be used. The operator's or the machine's: a full disk, a missing permission.
    Io {
        /// Which.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The state has grown beyond its cap and was not written. The program's: keep less, or raise the cap.
    TooLarge {
        /// The state's size in bytes.
        bytes: u64,
        /// The cap.
        max_bytes: u64,
    },
    /// The state has more sections than a reader takes and was not written. The program's: one section for many things.
    TooMany {
        /// Its sections.
        sections: usize,
        /// The cap.
        most: usize,
    },
    /// Sources could not be captured, each with what it said; everything else was saved, with these sections as they were
    /// before.
    Sections(Vec<(&'static str, String)>),
    /// A backend of the program's own failed.
    Backend {
        /// The place.
        place: String,
        /// What it said.
        source: BoxError,
    },
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConfigured => f.write_str("no state is kept: give a store to Builder::state"),
            Self::Closed => {
                f.write_str("the shutdown has put the state away: nothing that comes now would be saved")
            }
            Self::Held { place, by } => {
                write!(f, "{place} is in use by {by}: end that process, or choose another place")
            }
            Self::Io { path, doing, .. } => write!(f, "{} cannot be {doing}", path.display()),
            Self::TooLarge { bytes, max_bytes } => {
                write!(f, "the state has {bytes} bytes, more than the {max_bytes} allowed, and was not saved")
            }
            Self::TooMany { sections, most } => {
                write!(
                    f,
                    "the state has {sections} sections, more than the {most} allowed, and was not saved"
                )
            }
            Self::Sections(failed) => {
                f.write_str("saved with a section as it was before")?;
                failed
                    .iter()
                    .try_for_each(|(name, error)| write!(f, "; {name:?} could not be captured: {error}"))
            }
            Self::Backend { place, .. } => write!(f, "{place} failed"),
        }
    }
}

impl Error for StateError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::Backend { source, .. } => Some(&**source),
            Self::NotConfigured
            | Self::Closed
            | Self::Held { .. }
            | Self::TooLarge { .. }
            | Self::TooMany { .. }
            | Self::Sections(_) => None,
        }
    }
}
