//! A directory as the place of a state: `state.json`, the generation before it, and a lock.
//!
//! | file | what |
//! |---|---|
//! | `state.json` | the newest generation |
//! | `state.json.1` | the one before it |
//! | `state.json.damaged-<ms>` | one that could not be used; the newest three are kept |
//! | `state.lock` | locked with `flock` from the opening until the process ends; holds its number; never removed |
//!
//! The lock is never removed because whoever waits for a removed one would get it beside the next (an old trap of PID
//! files). Symbolic links are not followed and files of strangers not read: who can write into the directory may still
//! not make this process read or write elsewhere.

use std::borrow::Cow;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::backend::{Generation, StateBackend};
use super::error::StateError;
use super::legacy;
use crate::files::{self, LockError, flags, is_at, owner_of_new, replace, replace_keeping, sweep, sync_dir};

const CURRENT: &str = "state.json";
const PREVIOUS: &str = "state.json.1";
const LOCK: &str = "state.lock";
const DAMAGED: &str = "state.json.damaged-";
/// How many generations that could not be used are kept to be looked at.
const DAMAGED_KEPT: usize = 3;
/// Files whose temporaries a crash may have left, the report's, which share the directory, included.
const WRITTEN: [&str; 4] = [CURRENT, PREVIOUS, "last-shutdown.json", "history.jsonl"];

/// A lock that is held.
#[derive(Debug)]
struct Lock {
    file: File,
    /// The directory it is in.
    dir: Option<(u64, u64)>,
}

/// A state in a directory.
#[derive(Debug)]
pub(super) struct Directory {
    dir: PathBuf,
    place: String,
    lock: Mutex<Option<Lock>>,
    found: Mutex<Vec<PathBuf>>,
    /// A damaged newest generation could not be moved away: it must not become the previous one.
    spoiled: AtomicBool,
}

impl Directory {
    pub(super) fn new(dir: PathBuf) -> Self {
        let place = dir.join(CURRENT).display().to_string();
        Self { dir, place, lock: Mutex::new(None), found: Mutex::default(), spoiled: AtomicBool::new(false) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes the directory and locks it. One that was removed is made again; one that was put in its place, with a
    /// state of somebody else, is not touched.
    fn take(&self) -> Result<(), StateError> {
        let mut held = self.lock.lock();
        let path = self.path(LOCK);
        if let Some(lock) = &*held
            && is_at(&lock.file, &path)
        {
            return Ok(());
        }
        let failed = |source| StateError::Io { path: self.dir.clone(), doing: "used", source };
        if let Some(lock) = &*held
            && identity(&self.dir) != lock.dir
            && self.path(CURRENT).symlink_metadata().is_ok()
        {
            return Err(failed(io::Error::other("another directory, with a state, has taken its place")));
        }
        let removed = held.is_some() && !self.dir.is_dir();
        make(&self.dir).map_err(failed)?;
        *held = Some(Lock { file: lock(&path)?, dir: identity(&self.dir) });
        if removed {
            // Under the lock, which a log that blocks would hold up: once in a life, if at all.
            tracing::warn!(target: "shutdown", dir = %self.dir.display(), "the state's directory was removed: made again");
        }
        Ok(())
    }

    /// A name for a generation that is set aside now.
    fn aside(&self, now_unix_ms: u64) -> PathBuf {
        let mut aside = self.path(&format!("{DAMAGED}{now_unix_ms}"));
        let mut again = 0;
        while aside.symlink_metadata().is_ok() {
            again += 1;
            aside = self.path(&format!("{DAMAGED}{now_unix_ms}-{again}"));
        }
        aside
    }
}

impl StateBackend for Directory {
    fn open(&self, max_bytes: u64) -> Result<Vec<Generation>, StateError> {
        self.take()?;
        // Tidying: what cannot be removed harms nobody.
        let _ = sweep(&self.dir, &WRITTEN);
        let mut found = self.found.lock();
        found.clear();
        let mut generations = Vec::new();
        // Once there was a state of ours, one that was set aside included, the legacy one is history.
        let legacy = if has_been_used(&self.dir) { None } else { Some(legacy::FILE) };
        for name in [CURRENT, PREVIOUS].into_iter().chain(legacy) {
            let path = self.path(name);
            if let Some(content) = self.read(&path, max_bytes)? {
                generations.push(Generation::new(path.display().to_string(), content));
                found.push(path);
            }
        }
        Ok(generations)
    }

    fn save(&self, document: &[u8]) -> Result<(), StateError> {
        self.take()?;
        let path = self.path(CURRENT);
        // Relaxed: saves come one after another.
        let replaced = if self.spoiled.load(Ordering::Relaxed) {
            replace(&path, document).map(|()| self.spoiled.store(false, Ordering::Relaxed))
        } else {
            replace_keeping(&path, &self.path(PREVIOUS), document)
        };
        replaced.map_err(|source| StateError::Io { path, doing: "saved", source })
    }

    fn set_aside(&self, index: usize, now_unix_ms: u64) -> Result<Option<String>, StateError> {
        let Some(path) = self.found.lock().get(index).cloned() else { return Ok(None) };
        if path.file_name().is_some_and(|name| name == legacy::FILE) {
            return Ok(None);
        }
        let aside = self.aside(now_unix_ms);
        if let Err(source) = std::fs::rename(&path, &aside) {
            self.spoiled.fetch_or(path == self.path(CURRENT), Ordering::Relaxed);
            return Err(StateError::Io { path, doing: "set aside", source });
        }
        forget_oldest(&self.dir, &aside);
        Ok(Some(aside.display().to_string()))
    }

    fn copy_aside(&self, index: usize, now_unix_ms: u64) -> Result<Option<String>, StateError> {
        let Some(path) = self.found.lock().get(index).cloned() else { return Ok(None) };
        let aside = self.aside(now_unix_ms);
        // A state is never written in place, so a link is as good as a copy.
        std::fs::hard_link(&path, &aside)
            .or_else(|_| std::fs::copy(&path, &aside).map(drop))
            .map_err(|source| StateError::Io { path, doing: "copied", source })?;
        forget_oldest(&self.dir, &aside);
        Ok(Some(aside.display().to_string()))
    }

    fn place(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.place)
    }
}

impl Directory {
    /// Reads a file that may be anything. `None` if there is none; in words why it cannot be used, when that is a
    /// property of the file; an error when it is the machine's.
    fn read(&self, path: &Path, max_bytes: u64) -> Result<Option<Result<Vec<u8>, String>>, StateError> {
        let mut options = OpenOptions::new();
        options.read(true);
        // Without NONBLOCK a FIFO would wait for a writer.
        options.custom_flags(flags(OFlags::NOFOLLOW | OFlags::NONBLOCK));
        let read = options.open(path).and_then(|file| self.read_opened(file, max_bytes));
        match read {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::LOOP) => Ok(Some(Err("it is a symbolic link".to_owned()))),
                Some(Errno::ACCESS | Errno::PERM | Errno::NXIO | Errno::NODEV | Errno::IO) => {
                    Ok(Some(Err(format!("it cannot be read: {error}"))))
                }
                _ => Err(StateError::Io { path: path.to_owned(), doing: "read", source: error }),
            },
        }
    }

    fn read_opened(&self, file: File, max_bytes: u64) -> io::Result<Result<Vec<u8>, String>> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Ok(Err("it is no regular file".to_owned()));
        }
        let (owner, me) = (metadata.uid(), rustix::process::geteuid().as_raw());
        // Some file systems give all files to one user, ours included.
        if owner != me && owner != 0 && Some(owner) != owner_of_new(&self.path(CURRENT)) {
            return Ok(Err(format!("it belongs to user {owner}, and this process is user {me}")));
        }
        let too_large = |bytes| Ok(Err(format!("it has {bytes} bytes, more than the {max_bytes} allowed")));
        if metadata.len() > max_bytes {
            return too_large(metadata.len());
        }
        let mut bytes = Vec::new();
        file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
        let length = bytes.len() as u64;
        if length > max_bytes { too_large(length) } else { Ok(Ok(bytes)) }
    }
}

/// Makes the directory and those above it, each durably: else a power cut may take the whole state.
fn make(dir: &Path) -> io::Result<()> {
    let missing: Vec<_> =
        dir.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !dir.is_dir()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    for made in missing {
        // Not every file system can.
        let _ = sync_dir(made);
    }
    Ok(())
}

/// Locks the file at `path`, made if it is missing, and writes this process's number into it.
fn lock(path: &Path) -> Result<File, StateError> {
    let file = files::lock(path, 0o600).map_err(|error| match error {
        LockError::Io { doing, source } => StateError::Io { path: path.to_owned(), doing, source },
        LockError::Held(by) => held(path, by),
    })?;
    // Only what others are told: on a full disk the lock still holds.
    let _ = files::write_number(&file);
    Ok(file)
}

fn held(path: &Path, by: Option<u32>) -> StateError {
    let by = match by {
        Some(pid) if pid == std::process::id() => {
            format!(
                "process {pid}, which is this one's number, too: another store in it, or another container"
            )
        }
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    };
    let place = path.parent().unwrap_or(path).display();
    StateError::Held { place: format!("the state directory {place}"), by }
}

fn identity(dir: &Path) -> Option<(u64, u64)> {
    let metadata = dir.metadata().ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Whether there is any state of ours in `dir`, one that was set aside included.
fn has_been_used(dir: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    let ours = |name: &str| name == CURRENT || name == PREVIOUS || name.starts_with(DAMAGED);
    entries.flatten().any(|entry| entry.file_name().to_str().is_some_and(ours))
}

/// Removes the oldest generations that were set aside, but never `newest`, and nothing that is no file.
fn forget_oldest(dir: &Path, newest: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut others: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(DAMAGED)))
        .filter(|entry| entry.path() != newest)
        .filter_map(|entry| {
            let metadata = entry.metadata().ok().filter(std::fs::Metadata::is_file)?;
            // When it was set aside, whatever the clock said.
            Some(((metadata.ctime(), metadata.ctime_nsec()), entry.path()))
        })
        .collect();
    others.sort();
    for (_, oldest) in others.iter().rev().skip(DAMAGED_KEPT - 1) {
        let _ = std::fs::remove_file(oldest);
    }
}
