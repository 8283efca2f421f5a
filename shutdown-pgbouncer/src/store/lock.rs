//! The lock of a file: `flock` on `<file>.lock`, as shell scripts take it, and on the file itself.
//!
//! A lock is the file's it is taken on, not its name's. So once it is had it is looked whether that file still stands there: whoever
//! removes the lock file gives the next one another lock, and two would write. The second lock, on the file itself, is the
//! one that is left then; and the only one that both see where the file alone is mounted into a container.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};
use tokio::time::Instant;

use super::beside;
use crate::Error;

/// Until when, and how long that is.
#[derive(Clone, Copy)]
pub(super) struct Patience {
    until: Instant,
    whole: Duration,
}

impl Patience {
    pub(super) fn new(whole: Duration) -> Self {
        Self { until: Instant::now() + whole, whole }
    }
}

/// Takes `<path>.lock`: the first.
pub(super) fn beside_of(path: &Path, patience: Patience) -> Result<File, Error> {
    let lock_file = beside(path, "", ".lock");
    hold(&lock_file, patience, || open_lock(&lock_file))
}

/// Takes the file's own: the second.
pub(super) fn own(target: &Path, patience: Patience) -> Result<File, Error> {
    hold(target, patience, || File::open(target))
}

/// Opens the file and locks it, anew until what is locked is what stands there, or the time is over.
fn hold(path: &Path, patience: Patience, open: impl Fn() -> io::Result<File>) -> Result<File, Error> {
    loop {
        let file = open().map_err(|source| Error::unwritten(path, "locked", source))?;
        let metadata = file.metadata();
        let file = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Some(file),
            // Who only looks needs no thread.
            Err(rustix::io::Errno::WOULDBLOCK) if patience.whole.is_zero() => None,
            Err(rustix::io::Errno::WOULDBLOCK) => wait(file, patience.until)?,
            Err(error) => return Err(Error::unwritten(path, "locked", error)),
        };
        let holder = match file {
            Some(file) if is_at(&file, path) => return Ok(file),
            Some(_) if Instant::now() < patience.until => continue,
            // It never was what stands there; nobody has it.
            Some(_) => None,
            None => metadata.ok().and_then(|metadata| holder(&metadata)),
        };
        return Err(Error::Locked { path: path.to_owned(), waited: patience.whole, holder });
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
        Ok(file) => {
            // Whatever the umask: who may edit the file must be able to wait. Another's stays as it is.
            if file.metadata()?.mode() & 0o777 == 0o600 {
                let _ = file.set_permissions(Permissions::from_mode(0o644));
            }
            Ok(file)
        }
        Err(error) => Err(error),
    }
}

/// Whether `file` is what stands at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Who has a `flock` on this file, as `/proc/locks` says (proc(5)): `1: FLOCK ADVISORY WRITE 1234 fd:01:5678 0 EOF`. None where the
/// system has another device there than stat(2), as btrfs and overlays do.
fn holder(file: &Metadata) -> Option<u32> {
    holder_in(&std::fs::read_to_string("/proc/locks").ok()?, file.dev(), file.ino())
}

fn holder_in(locks: &str, device: u64, inode: u64) -> Option<u32> {
    let wanted = format!("{:02x}:{:02x}:{inode}", rustix::fs::major(device), rustix::fs::minor(device));
    locks.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        // Who only waits has an arrow there.
        (words.next()? == "FLOCK").then_some(())?;
        let (pid, place) = (words.nth(2)?, words.next()?);
        (place == wanted).then(|| pid.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_that_of_the_same_device() {
        let locks = "1: FLOCK  ADVISORY  WRITE 11 fd:01:5678 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 12 fd:00:5678 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 13 fd:00:5678 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 14 fd:00:5678 0 EOF\n";
        let device = |minor| rustix::fs::makedev(0xfd, minor);
        assert_eq!(holder_in(locks, device(0), 5678), Some(14));
        assert_eq!(holder_in(locks, device(1), 5678), Some(11));
        assert_eq!(holder_in(locks, device(2), 5678), None);
        assert_eq!(holder_in(locks, device(0), 678), None);
    }

    #[test]
    fn what_is_never_what_stands_there_is_given_up_at_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        std::fs::write(&one, "").unwrap();
        std::fs::write(&other, "").unwrap();
        let held = hold(&one, Patience::new(Duration::from_millis(20)), || File::open(&other));
        assert!(matches!(held, Err(Error::Locked { holder: None, .. })), "{held:?}");
    }
}
