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
use lock::Patience;
use write::Owned;

/// A file under its lock, until this is dropped.
#[derive(Debug)]
pub struct Locked {
    /// As it was given: the lock and the backups are beside this one.
    path: PathBuf,
    /// Where it really is.
    target: PathBuf,
    _lock: File,
    /// The file's own lock, for those that see it under another name: mounted alone into a container. None: it was not there.
    own: Option<File>,
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
        let patience = Patience::new(patience);
        let lock = lock::beside_of(path, patience)?;
        let own = lock::own(&target, patience)?;
        Self { path: path.to_owned(), target, _lock: lock, own: Some(own) }.recovered()
    }

    /// As [`take`](Self::take); a file that is not there is taken for empty, and made by the first [`write`](Self::write), for its
    /// owner alone. That is the owner of its directory, if this user may give it away.
    ///
    /// # Errors
    ///
    /// As [`take`](Self::take).
    pub fn take_or_make(path: &Path, patience: Duration) -> Result<Self, Error> {
        let is_missing =
            || path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        if !is_missing() {
            return Self::take(path, patience);
        }
        let mut target = place(path)?;
        let patience = Patience::new(patience);
        let lock = lock::beside_of(path, patience)?;
        let mut own = None;
        // Whoever had the lock before may have made it.
        if !is_missing() {
            target = resolve(path)?;
            own = Some(lock::own(&target, patience)?);
        }
        Self { path: path.to_owned(), target, _lock: lock, own }.recovered()
    }

    /// What is in it.
    ///
    /// # Errors
    ///
    /// [`Error::Unwritten`]: it cannot be read.
    pub fn read(&self) -> Result<Vec<u8>, Error> {
        match fs::read(&self.target) {
            Err(error) if self.is_missing(&error) => Ok(Vec::new()),
            read => read.map_err(|source| Error::unwritten(&self.path, "read", source)),
        }
    }

    /// Keeps what is in it now, under a name of its own; of a file that is not there yet, an empty one.
    ///
    /// # Errors
    ///
    /// [`Error::Unwritten`].
    pub fn back_up(&self) -> Result<PathBuf, Error> {
        let failed = |source| Error::unwritten(&self.path, "backed up", source);
        let like = match fs::metadata(&self.target) {
            Err(error) if self.is_missing(&error) => Owned::new_in(directory(&self.target)),
            metadata => metadata.map(|metadata| Owned::of(&metadata)),
        };
        backup::make(&self.path, &self.read()?, like.map_err(failed)?).map_err(failed)
    }

    /// Gives it these bytes, durably, with owner and mode as they were, and a time of change that differs from the last by a second
    /// at least: PgBouncer takes a user list of the same second, size and place for the same.
    ///
    /// # Errors
    ///
    /// [`Error::Unwritten`]: it is as it was, and nothing is left beside it. Where it had to be written in place and could neither be
    /// finished nor put back, the cause says so: it may be torn, and whoever has the lock next finishes it.
    pub fn write(&mut self, bytes: &[u8]) -> Result<Written, Error> {
        let written = match fs::metadata(&self.target) {
            Err(error) if self.is_missing(&error) => write::make(&self.target, bytes),
            _ => write::write(&self.target, bytes),
        };
        let (written, own) = written.map_err(|source| Error::unwritten(&self.path, "written", source))?;
        // Whoever waits for the old one's sees that it stands there no more, and waits for this one's.
        self.own = own.or(self.own.take());
        Ok(written)
    }

    /// Whether this is said of a file that was not there, and need not be.
    fn is_missing(&self, error: &io::Error) -> bool {
        self.own.is_none() && error.kind() == io::ErrorKind::NotFound
    }

    fn recovered(self) -> Result<Self, Error> {
        write::sweep(&self.path);
        write::sweep(&self.target);
        journal::finish(&self.target).map_err(|source| Error::unwritten(&self.path, "recovered", source))?;
        Ok(self)
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
    is_ours(path, &target)?;
    if metadata.nlink() > 1 {
        // A rename would leave the other name with the old content.
        return Err(failed(io::Error::other("it has a second name (a hard link): remove that")));
    }
    Ok(target)
}

/// Where a file that is not there will really be.
fn place(path: &Path) -> Result<PathBuf, Error> {
    let failed = |source| Error::unwritten(path, "made", source);
    let name = path.file_name().ok_or_else(|| failed(io::Error::other("that is no name of a file")))?;
    let target = fs::canonicalize(directory(path)).map_err(failed)?.join(name);
    is_ours(path, &target)?;
    Ok(target)
}

/// Whether nobody else writes there: Kubernetes does.
fn is_ours(path: &Path, target: &Path) -> Result<(), Error> {
    let projected =
        [path, target].iter().any(|path| directory(path).join("..data").symlink_metadata().is_ok())
            || target.components().any(|part| part.as_os_str() == "..data");
    if projected {
        let why = "it is a mounted ConfigMap or Secret, which Kubernetes writes: change that, not the file";
        return Err(Error::unwritten(path, "opened", io::Error::other(why)));
    }
    Ok(())
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
