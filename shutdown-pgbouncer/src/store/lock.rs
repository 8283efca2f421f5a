//! The lock of a file: `flock` on `<file>.lock`, as shell scripts take it, and on the file itself.
//!
//! A lock is the file's it is taken on, not its name's. So once it is had it is looked whether that file still stands there: whoever
//! removes the lock file gives the next one another lock, and two would write. The second lock, on the file itself, is the
//! one that is left then; and the only one that both see where the file alone is mounted into a container.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};
use tokio::time::Instant;

use super::beside;
use crate::Error;

/// Takes both locks, in this order.
pub(super) fn take(path: &Path, target: &Path, patience: Duration) -> Result<(File, File), Error> {
    let until = Instant::now() + patience;
    let lock_file = beside(path, "", ".lock");
    let lock = hold(&lock_file, until, patience, || open_lock(&lock_file))?;
    let own = hold(target, until, patience, || File::open(target))?;
    Ok((lock, own))
}

/// Opens the file and locks it, anew until what is locked is what stands there.
fn hold(
    path: &Path,
    until: Instant,
    patience: Duration,
    open: impl Fn() -> io::Result<File>,
) -> Result<File, Error> {
    loop {
        let file = open().map_err(|source| Error::unwritten(path, "locked", source))?;
        let inode = file.metadata().map(|metadata| metadata.ino());
        let file = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Some(file),
            Err(rustix::io::Errno::WOULDBLOCK) => wait(file, until)?,
            Err(error) => return Err(Error::unwritten(path, "locked", error)),
        };
        let Some(file) = file else {
            let holder = inode.ok().and_then(holder);
            return Err(Error::Locked { path: path.to_owned(), waited: patience, holder });
        };
        if is_at(&file, path) {
            return Ok(file);
        }
    }
}

/// Waits for the lock in the queue that the system keeps, which is fair, with a thread of its own, because it has no deadline there.
/// None: the time is over. The thread then stays until the lock is free, and gives it back.
fn wait(file: File, until: Instant) -> Result<Option<File>, Error> {
    let (send, locked) = mpsc::sync_channel(0);
    let waiting = std::thread::Builder::new().name("flock".into()).spawn(move || {
        let result = loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                result => break result.map(|()| file),
            }
        };
        // Nobody waits any more: the file is closed, and with it the lock.
        let _ = send.send(result);
    });
    waiting.map_err(|source| Error::unwritten("a lock", "waited for", source))?;
    match locked.recv_timeout(until.saturating_duration_since(Instant::now())) {
        Ok(Ok(file)) => Ok(Some(file)),
        Ok(Err(error)) => Err(Error::unwritten("a lock", "waited for", error)),
        Err(_) => Ok(None),
    }
}

/// The lock file, made if it is missing. Never truncated or written: it is also others'.
fn open_lock(path: &Path) -> io::Result<File> {
    let flags =
        i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).expect("the flags of open(2) are an int");
    let mut options = OpenOptions::new();
    options.custom_flags(flags).read(true);
    match options.clone().write(true).create(true).truncate(false).mode(0o644).open(path) {
        // Another user's: it can be locked by who may only read it.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => options.open(path).map_err(|_| error),
        opened => opened,
    }
}

/// Whether `file` is what stands at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Who has a `flock` on the file of this inode, as `/proc/locks` says (proc(5)): `1: FLOCK ADVISORY WRITE 1234 fd:01:5678 0 EOF`.
fn holder(inode: u64) -> Option<u32> {
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let end = format!(":{inode}");
    locks.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        // Who only waits has an arrow there.
        (words.next()? == "FLOCK").then_some(())?;
        let (pid, place) = (words.nth(2)?, words.next()?);
        place.ends_with(&end).then(|| pid.parse().ok())?
    })
}
