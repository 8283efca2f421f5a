//! Replaces files so that a reader, and a power cut, see the old one or the new one and nothing else.

#[cfg(all(unix, any(feature = "state", feature = "companions")))]
mod lock;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(all(unix, any(feature = "state", feature = "companions")))]
pub(crate) use lock::{LockError, flags, is_at, lock, write_number};

/// Replaces `path` by a file with these bytes, durably.
///
/// The bytes go to a temporary file in the same directory, made exclusively and with mode 0600, are flushed to
/// disk, and the file is renamed over `path`; then the directory is flushed. Concurrent calls do not disturb each
/// other: the last rename wins. A symbolic link at `path` is replaced, not followed.
///
/// # Errors
///
/// What the system said; `path` is then as it was and the temporary file is gone. Only when the directory cannot be
/// flushed is the new file in place already, and a power cut may still bring the old one back.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = Temporary::create(path)?;
    (&temporary.file).write_all(bytes)?;
    temporary.file.sync_all()?;
    std::fs::rename(&temporary.path, path)?;
    temporary.keep();
    sync_dir(path)
}

/// As [`replace`], and the file that was at `path` is at `previous` afterwards, if it can be kept at all. Where the file
/// system has links there is a file at `path` at every moment.
///
/// # Errors
///
/// As [`replace`].
#[cfg(all(unix, feature = "state"))]
pub(crate) fn replace_keeping(path: &Path, previous: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = Temporary::create(path)?;
    (&temporary.file).write_all(bytes)?;
    temporary.file.sync_all()?;
    keep(path, previous);
    std::fs::rename(&temporary.path, path)?;
    temporary.keep();
    sync_dir(path)
}

/// Gives the file at `path` the name `previous` as well. What cannot be kept holds up no new one.
#[cfg(all(unix, feature = "state"))]
fn keep(path: &Path, previous: &Path) {
    if !path.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
        return;
    }
    // A rename replaces, a link does not: so first a link beside it.
    let linked = Temporary::beside(previous, |beside| std::fs::hard_link(path, beside));
    match linked {
        Ok(((), beside)) => {
            let _ = std::fs::rename(&beside, previous);
            // Two names of one file: such a rename does nothing, and the link would stay.
            let _ = std::fs::remove_file(&beside);
        }
        // A file system without links: for a moment there is no file at `path`, and a reader takes `previous`.
        Err(_) => _ = std::fs::rename(path, previous),
    }
}

/// Whom a file belongs to that this process makes beside `path`.
#[cfg(all(unix, feature = "state"))]
pub(crate) fn owner_of_new(path: &Path) -> Option<u32> {
    let probe = Temporary::create(path).ok()?;
    Some(std::os::unix::fs::MetadataExt::uid(&probe.file.metadata().ok()?))
}

/// Removes what [`replace`] of these files has left in `dir` when it was killed. Nobody may be writing them.
#[cfg(all(unix, feature = "state"))]
pub(crate) fn sweep(dir: &Path, files: &[&str]) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let ours = |file: &&str| {
            let rest = name.to_str()?.strip_prefix('.')?.strip_prefix(*file)?;
            let (pid, number) = rest.strip_prefix('.')?.strip_suffix(".tmp")?.split_once('.')?;
            [pid, number].iter().all(|part| part.bytes().all(|byte| byte.is_ascii_digit())).then_some(())
        };
        if files.iter().any(|file| ours(file).is_some()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Flushes the directory that holds `path`: without it a rename may be lost in a power cut.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(directory(path))?.sync_all()
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A temporary file that goes away unless it is renamed.
struct Temporary {
    path: PathBuf,
    file: File,
    keep: bool,
}

impl Temporary {
    fn create(target: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let (file, path) = Self::beside(target, |path| options.open(path))?;
        Ok(Self { path, file, keep: false })
    }

    /// Makes something under a name beside `target` that is free.
    fn beside<T>(target: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(T, PathBuf)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = target.file_name().ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{} names no file", target.display()))
        })?;
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let mut temporary = std::ffi::OsString::from(".");
            temporary.push(name);
            temporary.push(format!(".{}.{number}.tmp", std::process::id()));
            let path = directory(target).join(temporary);
            match make(&path) {
                Ok(made) => return Ok((made, path)),
                // Left by a process of the same number that died: the next number is free.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// It is not temporary any more.
    fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.keep {
            // The error that led here is the one to report.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        replace(&path, b"old").unwrap();
        replace(&path, b"new and longer").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new and longer");
        assert_eq!(names(dir.path()), ["report.json"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_replaced_file_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        replace(&path, b"x").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[cfg(unix)]
    #[test]
    fn a_symbolic_link_is_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, b"precious").unwrap();
        let link = dir.path().join("state");
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        replace(&link, b"ours").unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert_eq!(std::fs::read(&link).unwrap(), b"ours");
    }

    #[test]
    fn a_failed_replacement_leaves_the_old_file_and_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        // A directory cannot be replaced by a file.
        let path = dir.path().join("taken");
        std::fs::create_dir(&path).unwrap();
        assert!(replace(&path, b"x").is_err());
        assert_eq!(names(dir.path()), ["taken"]);
        assert!(replace(&dir.path().join("missing/file"), b"x").is_err());
        assert!(replace(Path::new("/"), b"x").is_err());
    }

    #[test]
    fn concurrent_replacements_never_fail_and_never_mix() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        std::thread::scope(|scope| {
            for writer in 0_u8..8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..50 {
                        replace(path, &[writer; 10_000]).unwrap();
                        let seen = std::fs::read(path).unwrap();
                        assert!(seen.len() == 10_000 && seen.iter().all(|byte| *byte == seen[0]));
                    }
                });
            }
        });
        assert_eq!(names(dir.path()), ["state"]);
    }
}
