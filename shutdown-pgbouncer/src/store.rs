//! One of PgBouncer's files, changed by many hands: locked, read, backed up, replaced.
//!
//! Everything happens under the lock, which is also that of shell scripts: `flock` on `<file>.lock`, by the path as it was given.
//! A file is replaced by a rename, so a reader sees the old one or the new one; where that cannot be – a file that is a mount point
//! of its own, or whose owner could not be kept – it is written in place, behind a journal, and a kill in the middle is
//! finished by whoever has the lock next.
//!
//! | name | is |
//! |---|---|
//! | `<file>.lock` | the lock; empty, never removed: who removes it splits it |
//! | `<file>.backup.<seconds>.<n>` | what it was before an edit |
//! | `.<file>.tmp.<pid>.<n>` | what is not yet a file; swept by the next edit |
//! | `.<file>.pending` | the journal of a write in place |
//!
//! Parts: `lock`, `write` (rename, or in place), `journal`, `backup`.

mod backup;
mod journal;
mod lock;
mod write;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use backup::Backup;
pub(crate) use backup::list as backups;

use crate::Error;

/// A file under its lock, until this is dropped.
#[derive(Debug)]
pub struct Locked {
    /// As it was given: the lock and the backups are beside this one.
    path: PathBuf,
    /// Where it really is.
    target: PathBuf,
    _lock: File,
    /// The file's own lock, for those that see it under another name: mounted alone into a container.
    _own: File,
}

/// How a new file came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Written {
    /// By a rename: nobody has seen anything in between.
    Replaced,
    /// In place: a reader may have seen a part of it for a moment.
    InPlace,
}

impl Locked {
    /// Locks a file, waiting for others at most `patience`, and finishes what a killed one has left.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`]; [`Error::Unwritten`] if there is no such file, or it may not be edited here.
    pub fn take(path: &Path, patience: Duration) -> Result<Self, Error> {
        let target = resolve(path)?;
        let (lock, own) = lock::take(path, &target, patience)?;
        let locked = Self { path: path.to_owned(), target, _lock: lock, _own: own };
        locked.recover()?;
        Ok(locked)
    }

    /// As [`take`](Self::take); a file that is not there is made, empty and for this user alone.
    ///
    /// # Errors
    ///
    /// As [`take`](Self::take).
    pub fn take_or_make(path: &Path, patience: Duration) -> Result<Self, Error> {
        let mut options = fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::mode(options.append(true).create(true), 0o600);
        if !path.exists() {
            options.open(path).map_err(|source| Error::unwritten(path, "made", source))?;
        }
        Self::take(path, patience)
    }

    /// What is in it.
    ///
    /// # Errors
    ///
    /// [`Error::Unwritten`]: it cannot be read.
    pub fn read(&self) -> Result<Vec<u8>, Error> {
        fs::read(&self.target).map_err(|source| Error::unwritten(&self.path, "read", source))
    }

    /// Keeps what is in it now, under a name of its own.
    ///
    /// # Errors
    ///
    /// [`Error::Unwritten`].
    pub fn back_up(&self) -> Result<PathBuf, Error> {
        let failed = |source| Error::unwritten(&self.path, "backed up", source);
        let (bytes, metadata) = (self.read()?, fs::metadata(&self.target).map_err(failed)?);
        backup::make(&self.path, &bytes, &metadata).map_err(failed)
    }

    /// Gives it these bytes, durably, with owner and mode as they were, and a time of change that differs from the last by a second
    /// at least: PgBouncer takes a user list of the same second, size and place for the same.
    ///
    /// # Errors
    ///
    /// [`Error::Unwritten`]: it is as it was, and nothing is left beside it. Where it had to be written in place and could neither be
    /// finished nor put back, the cause says so: it may be torn, and whoever has the lock next finishes it.
    pub fn write(&self, bytes: &[u8]) -> Result<Written, Error> {
        write::write(&self.target, bytes).map_err(|source| Error::unwritten(&self.path, "written", source))
    }

    fn recover(&self) -> Result<(), Error> {
        write::sweep(&self.path);
        write::sweep(&self.target);
        journal::finish(&self.target).map_err(|source| Error::unwritten(&self.path, "recovered", source))
    }
}

/// Where a file really is, if it may be edited there.
fn resolve(path: &Path) -> Result<PathBuf, Error> {
    let failed = |source| Error::unwritten(path, "opened", source);
    let target = fs::canonicalize(path).map_err(failed)?;
    let metadata = fs::metadata(&target).map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("it is no regular file")));
    }
    let projected =
        [path, &target].iter().any(|path| directory(path).join("..data").symlink_metadata().is_ok())
            || target.components().any(|part| part.as_os_str() == "..data");
    if projected {
        let why = "it is a mounted ConfigMap or Secret, which Kubernetes writes: change that, not the file";
        return Err(failed(io::Error::other(why)));
    }
    if metadata.nlink() > 1 {
        // A rename would leave the other name with the old content.
        return Err(failed(io::Error::other("it has a second name (a hard link): remove that")));
    }
    Ok(target)
}

/// The directory that a path is in.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// `<dir>/<prefix><name><suffix>` for `<dir>/<name>`.
fn beside(path: &Path, prefix: &str, suffix: &str) -> PathBuf {
    let mut name = std::ffi::OsString::from(prefix);
    name.push(path.file_name().unwrap_or_default());
    name.push(suffix);
    directory(path).join(name)
}
