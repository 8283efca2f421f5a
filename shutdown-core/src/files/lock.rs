//! A file that says who has it: locked with `flock` until the process ends, with the process's number in it.
//!
//! It is never removed. Whoever waits for a lock file that is removed gets it beside the next one: the old trap of PID files.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use tokio::time::Instant;

/// How often a file that is removed under our hands is taken anew.
const TRIES: usize = 5;
/// How long a lock that is held is asked for again: whoever only asks whether somebody has it holds a shared one for
/// microseconds, and longer where it has lost its processor.
const GLANCE: Duration = Duration::from_millis(50);

/// Why a file could not be locked.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Another has it: this process's number, as far as it has written that down.
    Held(Option<u32>),
    /// What the system said while it was `doing`.
    Io { doing: &'static str, source: io::Error },
}

/// Locks the file at `path`, made with `mode` if it is missing. It is locked until the file is dropped.
///
/// A file that another process has locked is not changed by a single byte. A symbolic link is not followed.
pub(crate) fn lock(path: &Path, mode: u32) -> Result<File, LockError> {
    let failed = |doing, source| LockError::Io { doing, source };
    let mut options = OpenOptions::new();
    // Not truncated: until it is locked it is somebody else's.
    options.read(true).write(true).create(true).truncate(false).mode(mode);
    // Without NONBLOCK a FIFO would wait for a reader.
    options.custom_flags(flags(OFlags::NOFOLLOW | OFlags::NONBLOCK));
    for _ in 0..TRIES {
        let file = options.open(path).map_err(|source| failed("opened", source))?;
        let metadata = file.metadata().map_err(|source| failed("opened", source))?;
        if !metadata.is_file() || metadata.nlink() > 1 {
            // A second name: writing here would write there.
            return Err(failed("locked", io::Error::other("it is no regular file of its own: remove it")));
        }
        match exclusively(&file) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(LockError::Held(holder(&file))),
            Err(error) => return Err(failed("locked", error.into())),
        }
        if is_at(&file, path) {
            return Ok(file);
        }
        // Somebody removed it between open and lock: that is no lock for who comes next.
    }
    Err(failed("locked", io::Error::other("it changes under the lock")))
}

fn exclusively(file: &File) -> rustix::io::Result<()> {
    let until = Instant::now() + GLANCE;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::yield_now(),
            result => return result,
        }
    }
}

/// Writes this process's number into a file that it has locked.
pub(crate) fn write_number(file: &File) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all_at(format!("{}\n", std::process::id()).as_bytes(), 0)
}

/// Who has the lock, as far as it has written that down.
fn holder(file: &File) -> Option<u32> {
    let mut note = String::new();
    let _ = file.take(32).read_to_string(&mut note);
    note.trim().parse().ok()
}

/// Whether `file` is what stands at `path`.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.symlink_metadata()) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// The flags of `open(2)` as the standard library takes them.
pub(crate) fn flags(flags: OFlags) -> i32 {
    i32::try_from(flags.bits()).expect("the flags of open(2) are an int")
}
