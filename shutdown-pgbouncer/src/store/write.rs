//! Giving a file new bytes: by a rename, or in place where there is no other way.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, FallocateFlags, FlockOperation, RenameFlags, fallocate, flock, renameat_with};
use rustix::io::Errno;

use super::{Written, beside, directory, journal};

/// Gives the file these bytes; and the lock of the new one, if there is a new one. An error: it is as it was, and nothing is left beside
/// it; else it says so.
pub(super) fn write(target: &Path, bytes: &[u8]) -> io::Result<(Written, Option<File>)> {
    let old = fs::metadata(target)?;
    // Who may not write it may not replace it either, although the directory would let him.
    let opened = OpenOptions::new().write(true).open(target)?;
    let temporary = Temporary::create(target)?;
    if temporary.be_like(Owned::of(&old))? {
        temporary.fill(bytes)?;
        temporary.file.set_modified(later_than(&old)?)?;
        let own = temporary.lock()?;
        match fs::rename(&temporary.path, target) {
            Ok(()) => {
                temporary.keep();
                // Whoever reads it has the new one; an error would say that he has not.
                if let Err(error) = sync_directory(target) {
                    tracing::warn!(file = %target.display(), %error, "it is written, but a power cut may bring the old one back");
                }
                return Ok((Written::Replaced, Some(own)));
            }
            // A mount point, or on another file system than its directory: it was mounted alone.
            Err(error)
                if matches!(
                    error.raw_os_error().map(Errno::from_raw_os_error),
                    Some(Errno::BUSY | Errno::XDEV)
                ) => {}
            Err(error) => return Err(error),
        }
    }
    drop(temporary);
    in_place(target, &opened, bytes, later_than(&old)?)?;
    Ok((Written::InPlace, None))
}

/// Makes a file that is not there, and has its lock. An error: it is not there still, unless somebody else has made it.
pub(super) fn make(target: &Path, bytes: &[u8]) -> io::Result<(Written, Option<File>)> {
    let temporary = Temporary::create(target)?;
    let _ = temporary.be_like(Owned::new_in(directory(target))?);
    temporary.fill(bytes)?;
    let own = temporary.lock()?;
    match renameat_with(CWD, &temporary.path, CWD, target, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        // A file system that does not know how.
        Err(Errno::INVAL) if target.symlink_metadata().is_err() => fs::rename(&temporary.path, target)?,
        Err(Errno::INVAL) => return Err(Errno::EXIST.into()),
        Err(error) => return Err(error.into()),
    }
    temporary.keep();
    if let Err(error) = sync_directory(target) {
        tracing::warn!(file = %target.display(), %error, "it is made, but a power cut may take it away again");
    }
    Ok((Written::Replaced, Some(own)))
}

/// Overwrites the file behind a journal: whoever has the lock next finishes it if this is killed.
fn in_place(target: &Path, file: &File, bytes: &[u8], modified: SystemTime) -> io::Result<()> {
    let old = fs::read(target)?;
    // Before the first byte, or a full disk would leave half of both.
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, length.max(1)) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    let journal = journal::begin(target, &old, bytes)?;
    let Err(error) = overwrite(file, bytes, modified) else {
        if let Err(error) = journal.end() {
            tracing::warn!(file = %target.display(), %error, "it is written, but its journal stays until the next edit");
        }
        return Ok(());
    };
    // Back to what was; if that cannot be either, the journal stays and says what was meant.
    if let Err(again) = overwrite(file, &old, modified) {
        return Err(io::Error::other(format!(
            "{error}, and what was in it could not be put back ({again}): it may be torn, and the next edit finishes it by its journal"
        )));
    }
    match journal.end() {
        Ok(()) => Err(error),
        Err(stays) => Err(io::Error::other(format!(
            "{error}, and its journal could not be removed ({stays}): the next edit may finish it"
        ))),
    }
}

/// Writes these bytes over a file's, durably.
pub(super) fn overwrite(file: &File, bytes: &[u8], modified: SystemTime) -> io::Result<()> {
    file.write_all_at(bytes, 0)?;
    file.set_len(u64::try_from(bytes.len()).unwrap_or(u64::MAX))?;
    file.set_modified(modified)?;
    file.sync_all()
}

/// A time of change of another second than the last: PgBouncer compares seconds (`src/loader.c`, measured on 1.18, 1.24, 1.26).
pub(super) fn later_than(old: &Metadata) -> io::Result<SystemTime> {
    let second = old.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Ok(SystemTime::now().max(UNIX_EPOCH + Duration::from_secs(second + 1)))
}

/// Flushes the directory that holds `path`: without it a rename may be lost in a power cut.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(directory(path))?.sync_all()
}

/// Removes what a killed one has left beside `path`. Under the lock nobody else makes such files.
pub(super) fn sweep(path: &Path) {
    let prefix = beside(path, ".", ".tmp.");
    let Some(prefix) = prefix.file_name().and_then(|name| name.to_str()) else { return };
    let Ok(entries) = fs::read_dir(directory(path)) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(prefix)?.split_once('.'));
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if rest.is_some_and(|(pid, number)| is_number(pid) && is_number(number)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Whose a file is, and who may do what with it.
#[derive(Clone, Copy)]
pub(super) struct Owned {
    user: u32,
    group: u32,
    mode: u32,
}

impl Owned {
    /// As this file.
    pub(super) fn of(file: &Metadata) -> Self {
        Self { user: file.uid(), group: file.gid(), mode: file.mode() & 0o7777 }
    }

    /// As a new file in a directory: its owner's alone.
    pub(super) fn new_in(directory: &Path) -> io::Result<Self> {
        Ok(Self { mode: 0o600, ..Self::of(&fs::metadata(directory)?) })
    }
}

/// A file that goes away unless it becomes another.
pub(super) struct Temporary {
    path: PathBuf,
    file: File,
    keep: bool,
}

impl Temporary {
    /// Makes one beside `path`, for this user alone.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let temporary = beside(path, ".", &format!(".tmp.{}.{number}", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary) {
                Ok(file) => return Ok(Self { path: temporary, file, keep: false }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => {
                    let place = directory(path).display();
                    return Err(io::Error::new(
                        error.kind(),
                        format!("no file can be made in {place}: {error}"),
                    ));
                }
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it this owner and mode, before there is anything to read in it. False: the owner cannot be given.
    pub(super) fn be_like(&self, wanted: Owned) -> io::Result<bool> {
        let ours = self.file.metadata()?;
        if (ours.uid(), ours.gid()) != (wanted.user, wanted.group)
            && let Err(error) = fchown(&self.file, Some(wanted.user), Some(wanted.group))
        {
            return if error.kind() == ErrorKind::PermissionDenied { Ok(false) } else { Err(error) };
        }
        self.file.set_permissions(fs::Permissions::from_mode(wanted.mode))?;
        Ok(true)
    }

    /// Writes its bytes, durably.
    pub(super) fn fill(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.file).write_all(bytes)?;
        self.file.sync_all()
    }

    /// Takes its lock, before anybody else can see it: of whatever it becomes, this is the holder's then.
    fn lock(&self) -> io::Result<File> {
        flock(&self.file, FlockOperation::NonBlockingLockExclusive)?;
        // The same lock, held until both are closed.
        self.file.try_clone()
    }

    /// It is not temporary any more.
    pub(super) fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.keep {
            // The error that led here is the one to report.
            let _ = fs::remove_file(&self.path);
        }
    }
}
