//! A directory as the place of a state: `state.json`, the generation before it, and a lock.
//!
//! | file | what |
//! |---|---|
//! | `state.json` | the newest generation |
//! | `state.json.1` | the one before it |
//! | `state.json.damaged-<ms>` | one that could not be used; the newest three are kept |
//! | `state.lock` | locked with `flock` while a process has the place; holds its number; never removed |
//!
//! The lock is never removed because whoever waits for a removed one would get it beside the next (an old trap of PID
//! files). Symbolic links are not followed and files of strangers not read: who can write into the directory may still
//! not make this process read or write elsewhere.

use std::borrow::Cow;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, OFlags, flock};

use super::backend::{Generation, StateBackend};
use super::error::StateError;
use super::legacy;
use crate::files::{replace_keeping, sweep, sync_dir};

const CURRENT: &str = "state.json";
const PREVIOUS: &str = "state.json.1";
const LOCK: &str = "state.lock";
const DAMAGED: &str = "state.json.damaged-";
/// How many generations that could not be used are kept to be looked at.
const DAMAGED_KEPT: usize = 3;
/// Files whose temporaries a crash may have left, the report's, which share the directory, included.
const WRITTEN: [&str; 4] = [CURRENT, PREVIOUS, "last-shutdown.json", "history.jsonl"];

/// A state in a directory.
#[derive(Debug)]
pub(super) struct Directory {
    dir: PathBuf,
    place: String,
    lock: Mutex<Option<File>>,
    found: Mutex<Vec<PathBuf>>,
}

impl Directory {
    pub(super) fn new(dir: PathBuf) -> Self {
        let place = dir.join(CURRENT).display().to_string();
        Self { dir, place, lock: Mutex::new(None), found: Mutex::new(Vec::new()) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes the directory and locks it. One that was removed, or replaced, is taken again.
    fn take(&self) -> Result<(), StateError> {
        let mut held = self.lock.lock();
        let path = self.path(LOCK);
        if let Some(file) = &*held
            && is_at(file, &path)
        {
            return Ok(());
        }
        if !self.dir.is_dir() {
            let failed = |source| StateError::Io { path: self.dir.clone(), doing: "used", source };
            DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(failed)?;
            // Else a power cut may take the whole directory. Not every file system can.
            let _ = sync_dir(&self.dir);
        }
        *held = Some(lock(&path)?);
        Ok(())
    }
}

impl StateBackend for Directory {
    fn open(&self, max_bytes: u64) -> Result<Vec<Generation>, StateError> {
        self.take()?;
        sweep(&self.dir, &WRITTEN).map_err(|source| StateError::Io {
            path: self.dir.clone(),
            doing: "read",
            source,
        })?;
        let mut found = self.found.lock();
        found.clear();
        let mut generations = Vec::new();
        for name in [CURRENT, PREVIOUS, legacy::FILE] {
            let path = self.path(name);
            if name == legacy::FILE && !found.is_empty() {
                break;
            }
            if let Some(content) = read(&path, max_bytes) {
                generations.push(Generation::new(path.display().to_string(), content));
                found.push(path);
            }
        }
        Ok(generations)
    }

    fn save(&self, document: &[u8]) -> Result<(), StateError> {
        self.take()?;
        let path = self.path(CURRENT);
        replace_keeping(&path, &self.path(PREVIOUS), document).map_err(|source| StateError::Io {
            path,
            doing: "saved",
            source,
        })
    }

    fn set_aside(&self, index: usize, now_unix_ms: u64) -> Result<Option<String>, StateError> {
        let Some(path) = self.found.lock().get(index).cloned() else { return Ok(None) };
        if path.file_name().is_some_and(|name| name == legacy::FILE) {
            return Ok(None);
        }
        let mut aside = self.path(&format!("{DAMAGED}{now_unix_ms}"));
        let mut again = 0;
        while aside.symlink_metadata().is_ok() {
            again += 1;
            aside = self.path(&format!("{DAMAGED}{now_unix_ms}-{again}"));
        }
        std::fs::rename(&path, &aside).map_err(|source| StateError::Io {
            path,
            doing: "set aside",
            source,
        })?;
        forget_oldest(&self.dir);
        Ok(Some(aside.display().to_string()))
    }

    fn place(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.place)
    }
}

/// Locks the file at `path`, made if it is missing, and writes this process's number into it.
fn lock(path: &Path) -> Result<File, StateError> {
    let failed = |doing, source| StateError::Io { path: path.to_owned(), doing, source };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags(flags(OFlags::NOFOLLOW | OFlags::NONBLOCK));
    loop {
        let mut file = options.open(path).map_err(|source| failed("opened", source))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut note = String::new();
                let _ = file.take(32).read_to_string(&mut note);
                let by = match note.trim().parse::<u32>() {
                    Ok(pid) => format!("process {pid}"),
                    Err(_) => "another process".to_owned(),
                };
                let place = path.parent().unwrap_or(path).display();
                return Err(StateError::Held { place: format!("the state directory {place}"), by });
            }
            Err(error) => return Err(failed("locked", error.into())),
        }
        if is_at(&file, path) {
            // Only what others are told: on a full disk the lock still holds.
            let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
            return Ok(file);
        }
        // Somebody removed it between open and lock: that is no lock for who comes next.
    }
}

/// Whether `file` is what stands at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.symlink_metadata()) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Reads a file that may be anything; `None` if there is none.
fn read(path: &Path, max_bytes: u64) -> Option<Result<Vec<u8>, String>> {
    let mut options = OpenOptions::new();
    options.read(true);
    // Without NONBLOCK a FIFO would wait for a writer.
    options.custom_flags(flags(OFlags::NOFOLLOW | OFlags::NONBLOCK));
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return Some(Err("it is a symbolic link".to_owned()));
        }
        Err(error) => return Some(Err(format!("it cannot be opened: {error}"))),
    };
    Some(read_opened(file, max_bytes))
}

fn read_opened(file: File, max_bytes: u64) -> Result<Vec<u8>, String> {
    let unreadable = |error: io::Error| format!("it cannot be read: {error}");
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err("it is no regular file".to_owned());
    }
    let (owner, me) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner != me && owner != 0 {
        return Err(format!("it belongs to user {owner}, and this process is user {me}"));
    }
    let too_large = |bytes| Err(format!("it has {bytes} bytes, more than the {max_bytes} allowed"));
    if metadata.len() > max_bytes {
        return too_large(metadata.len());
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or_default());
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(unreadable)?;
    let length = bytes.len() as u64;
    if length > max_bytes { too_large(length) } else { Ok(bytes) }
}

fn flags(flags: OFlags) -> i32 {
    i32::try_from(flags.bits()).expect("the flags of open(2) are an int")
}

fn forget_oldest(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let name = |entry: io::Result<std::fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
    let mut damaged: Vec<_> = entries.filter_map(name).filter(|name| name.starts_with(DAMAGED)).collect();
    // Their names begin with a time of as many digits.
    damaged.sort();
    for oldest in damaged.iter().rev().skip(DAMAGED_KEPT) {
        let _ = std::fs::remove_file(dir.join(oldest));
    }
}
