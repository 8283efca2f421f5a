//! PID files: what is in them, and whether that can be believed. What they say is checked again against the process.
//!
//! | kind | written by | says that the process runs |
//! |---|---|---|
//! | plain | PgBouncer, Redis, most others | no: it is left behind when the process is killed |
//! | locked | local_proxy, this crate's [`claim`](PidFile::claim) | its lock, of `flock(2)`, is held |
//! | postmaster | PostgreSQL: `postmaster.pid`, the number in its first line | no |

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::files::{self, LockError, flags, is_at};

/// More than any PID file has; `postmaster.pid` has some hundred bytes.
const MOST_BYTES: u64 = 4096;
/// The kernel's own limit of process numbers (`PID_MAX_LIMIT`, proc_sys_kernel(5)).
const MOST_PROCESSES: u64 = 1 << 22;

/// How a PID file is written, and what it proves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum PidFileKind {
    /// A number and a newline.
    #[default]
    Plain,
    /// The same, and who wrote it keeps the file locked with `flock(2)` as long as it runs.
    Locked,
    /// PostgreSQL's `postmaster.pid`: the number is its first line.
    Postmaster,
}

impl PidFileKind {
    const ALL: [Self; 3] = [Self::Plain, Self::Locked, Self::Postmaster];

    /// The kind as written in configurations: `plain`, `locked`, `postmaster`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Locked => "locked",
            Self::Postmaster => "postmaster",
        }
    }

    /// The kind of this name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }

    /// The number that these bytes of a PID file give.
    ///
    /// Strict: decimal digits, with white space around them and nothing else. A number that `kill(2)` takes for a group or for
    /// everybody (0, -1), and that of process 1, is none.
    ///
    /// # Errors
    ///
    /// There is none that could be a companion's.
    pub fn number(self, bytes: &[u8]) -> Result<u32, NoNumber> {
        let line = match self {
            Self::Postmaster => bytes.split(|byte| *byte == b'\n').next().unwrap_or_default(),
            Self::Plain | Self::Locked => bytes,
        };
        let line = line.trim_ascii();
        if line.is_empty() {
            return Err(NoNumber::Empty);
        }
        let (sign, digits) = match line.split_first() {
            Some((b'-', digits)) => (true, digits),
            _ => (false, line),
        };
        if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            return Err(NoNumber::Garbage);
        }
        if sign {
            return Err(NoNumber::Negative);
        }
        let number = digits
            .iter()
            .try_fold(0_u64, |number, digit| number.checked_mul(10)?.checked_add(u64::from(digit - b'0')));
        match number.filter(|number| *number <= MOST_PROCESSES) {
            Some(0) => Err(NoNumber::Zero),
            Some(1) => Err(NoNumber::One),
            // At most 2^22.
            Some(number) => Ok(u32::try_from(number).unwrap_or_default()),
            None => Err(NoNumber::TooLarge),
        }
    }
}

impl fmt::Display for PidFileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why the bytes of a PID file are no process's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoNumber {
    /// Nothing but white space: it is being written, or the disk was full.
    Empty,
    /// Anything but decimal digits.
    Garbage,
    /// 0: a signal to it would go to our own process group.
    Zero,
    /// Below 0: a signal to it would go to a group, or to everybody. PostgreSQL writes one for a single-user server.
    Negative,
    /// 1: the first process of the system, or of the container.
    One,
    /// More than any process's number (2²²).
    TooLarge,
}

impl fmt::Display for NoNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "is empty",
            Self::Garbage => "holds something else than a number",
            Self::Zero => "says 0, which is no process but a group",
            Self::Negative => "holds a negative number, which is no process but a group",
            Self::One => "says 1, the first process of this system",
            Self::TooLarge => "holds a number larger than any process's",
        })
    }
}

impl std::error::Error for NoNumber {}

/// A PID file, which may or may not be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PidFile {
    path: PathBuf,
    kind: PidFileKind,
}

impl PidFile {
    /// A file of this kind at `path`.
    pub fn new(path: impl Into<PathBuf>, kind: PidFileKind) -> Self {
        Self { path: path.into(), kind }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How it is written.
    pub fn kind(&self) -> PidFileKind {
        self.kind
    }

    /// Whether there is no directory that it could be in.
    pub(super) fn has_no_directory(&self) -> bool {
        directory(&self.path).metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// Takes the file for this process: made if it is missing, its directories with it, locked until the guard is dropped or the
    /// process ends, this process's number in it. A file that another process holds is not changed by a single byte.
    ///
    /// It is never removed: whoever was waiting for a removed one would get it beside the next.
    ///
    /// # Errors
    ///
    /// Another process has it, it holds something else than a number, or the place cannot be used.
    pub fn claim(path: impl Into<PathBuf>) -> Result<ClaimedPidFile, ClaimError> {
        let path = path.into();
        let file = make_directory(&path)
            .map_err(|source| LockError::Io { doing: "made", source })
            .and_then(|()| files::lock(&path, 0o644))
            .and_then(|file| {
                if !is_number_or_empty(&file) {
                    let source =
                        io::Error::other("it holds something else than a number, so it is no PID file");
                    return Err(LockError::Io { doing: "claimed", source });
                }
                // Else it would be locked over another's number.
                files::write_number(&file).map_err(|source| LockError::Io { doing: "written", source })?;
                Ok(file)
            });
        match file {
            Ok(file) => Ok(ClaimedPidFile { path, _locked: file }),
            Err(LockError::Held(by)) => Err(ClaimError::Held { path, by }),
            Err(LockError::Io { doing, source }) => Err(ClaimError::Io { path, doing, source }),
        }
    }

    /// What it says now. Blocks on the disk.
    pub(super) fn read(&self) -> Result<Reading, Unread> {
        let mut options = OpenOptions::new();
        options.read(true);
        // Without NONBLOCK a FIFO would wait for a writer.
        options.custom_flags(flags(OFlags::NOFOLLOW | OFlags::NONBLOCK));
        let file = options.open(&self.path).map_err(|error| {
            match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NOENT) => Unread::Missing,
                Some(Errno::LOOP) => Unread::Unusable("is a symbolic link".to_owned()),
                _ => Unread::Unusable(format!("cannot be read: {error}")),
            }
        })?;
        let unreadable = |error: io::Error| Unread::Unusable(format!("cannot be read: {error}"));
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(Unread::Unusable("is no regular file".to_owned()));
        }
        if metadata.mode() & 0o002 != 0 {
            return Err(Unread::Unusable("can be written by everybody, so anybody may have".to_owned()));
        }
        if self.kind == PidFileKind::Locked && !is_locked(&file).map_err(unreadable)? {
            return Err(Unread::NotHeld);
        }
        let mut bytes = Vec::new();
        (&file).take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        if bytes.len() as u64 > MOST_BYTES {
            return Err(Unread::Unusable("is larger than a PID file can be".to_owned()));
        }
        let number = self.kind.number(&bytes);
        let written = metadata.modified().map_err(unreadable)?;
        let reading = |pid| Reading { pid, owner: metadata.uid(), written, bytes, file };
        match number {
            Ok(pid) => Ok(reading(pid)),
            Err(NoNumber::One) => Err(Unread::First(reading(1))),
            Err(NoNumber::Empty) => Err(Unread::Empty),
            Err(error) => Err(Unread::Unusable(error.to_string())),
        }
    }

    /// Whether its process listens: a PostgreSQL says so in the eighth line (`LOCK_FILE_LINE_PM_STATUS`), others write the file then.
    pub(super) fn says_ready(&self, reading: &Reading) -> bool {
        match self.kind {
            PidFileKind::Plain | PidFileKind::Locked => true,
            PidFileKind::Postmaster => {
                let status = reading.bytes.split(|byte| *byte == b'\n').nth(7);
                status.is_some_and(|status| status.trim_ascii() == b"ready")
            }
        }
    }

    /// Removes the file of a process that is gone, if it is still the one that was read, with the same bytes. Only a plain one:
    /// a locked one is never removed, and PostgreSQL looks into its own. Whether it has been removed. Between the last look and
    /// the removal there are some microseconds, as in every program that does so.
    pub(super) fn remove_stale(&self, reading: &Reading) -> io::Result<bool> {
        if self.kind != PidFileKind::Plain || !is_at(&reading.file, &self.path) {
            return Ok(false);
        }
        let same = match self.read() {
            Ok(now) | Err(Unread::First(now)) => now.bytes == reading.bytes,
            Err(_) => false,
        };
        if same {
            std::fs::remove_file(&self.path)?;
        }
        Ok(same)
    }

    /// Makes the directory it is to be in.
    pub(super) fn make_directory(&self) -> io::Result<()> {
        make_directory(&self.path)
    }
}

/// What a PID file said.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) pid: u32,
    pub(super) owner: u32,
    pub(super) written: SystemTime,
    bytes: Vec<u8>,
    file: File,
}

/// Why a PID file said nothing.
#[derive(Debug)]
pub(super) enum Unread {
    /// It is not there.
    Missing,
    /// Nobody holds its lock.
    NotHeld,
    /// It is empty, for a moment or for good.
    Empty,
    /// It says 1. That is nobody's to end; but left by a container before, it is stale.
    First(Reading),
    /// The end of a sentence.
    Unusable(String),
}

/// How long an empty file is given to be written: PgBouncer makes it first and writes it then.
pub(super) const EMPTY_FOR: Duration = Duration::from_millis(200);

/// Whether somebody holds the file's lock. It is asked for by a shared lock that is dropped at once: a program that claims its file in
/// these microseconds, and asks once only, would fail. Ours asks again.
fn is_locked(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {
            flock(file, FlockOperation::Unlock)?;
            Ok(false)
        }
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Whether it could be a PID file: whatever else somebody has written down must not be lost.
fn is_number_or_empty(file: &File) -> bool {
    let mut bytes = Vec::new();
    let read = file.take(MOST_BYTES).read_to_end(&mut bytes);
    let is_number = |byte: &u8| byte.is_ascii_digit() || byte.is_ascii_whitespace();
    read.is_ok() && bytes.iter().all(is_number)
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn make_directory(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory(path))
}

/// A PID file of this process's own: locked as long as this lives.
#[derive(Debug)]
#[must_use = "the file is locked only as long as this lives"]
pub struct ClaimedPidFile {
    path: PathBuf,
    _locked: File,
}

impl ClaimedPidFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Why a PID file could not be taken.
#[derive(Debug)]
#[non_exhaustive]
pub enum ClaimError {
    /// Another process has it, and runs: the operator's to end, or to give another path.
    Held {
        /// The file.
        path: PathBuf,
        /// The process, as far as it has written its number down.
        by: Option<u32>,
    },
    /// The place cannot be used.
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl fmt::Display for ClaimError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held { path, by: Some(pid) } => {
                write!(f, "the PID file {} is held by process {pid}, which runs", path.display())
            }
            Self::Held { path, by: None } => {
                write!(f, "the PID file {} is held by another process, which runs", path.display())
            }
            Self::Io { path, doing, .. } => {
                write!(f, "the PID file {} cannot be {doing}", path.display())
            }
        }
    }
}

impl std::error::Error for ClaimError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Held { .. } => None,
            Self::Io { source, .. } => Some(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(path: &Path) -> PidFile {
        PidFile::new(path, PidFileKind::Plain)
    }

    #[test]
    fn only_a_number_above_one_is_a_process() {
        for kind in PidFileKind::ALL {
            for (bytes, number) in [
                (&b"123\n"[..], 123),
                (b"123", 123),
                (b" 123 \r\n", 123),
                (b"2", 2),
                (b"0123\n", 123),
                (b"4194304", 4_194_304),
            ] {
                assert_eq!(kind.number(bytes), Ok(number), "{bytes:?}");
            }
            for (bytes, problem) in [
                (&b""[..], NoNumber::Empty),
                (b" \n", NoNumber::Empty),
                (b"0\n", NoNumber::Zero),
                (b"000\n", NoNumber::Zero),
                (b"-0", NoNumber::Negative),
                (b"-1\n", NoNumber::Negative),
                (b"-4711\n", NoNumber::Negative),
                (b"1\n", NoNumber::One),
                (b"4194305", NoNumber::TooLarge),
                (b"4294967298", NoNumber::TooLarge),
                (b"18446744073709551618", NoNumber::TooLarge),
                (b"+5", NoNumber::Garbage),
                (b"5.0", NoNumber::Garbage),
                (b"0x10", NoNumber::Garbage),
                (b"12 13", NoNumber::Garbage),
                (b"12\0", NoNumber::Garbage),
                (b"-", NoNumber::Garbage),
                (b"pid", NoNumber::Garbage),
                ("１２".as_bytes(), NoNumber::Garbage),
            ] {
                assert_eq!(kind.number(bytes), Err(problem), "{bytes:?}");
            }
        }
    }

    #[test]
    fn only_postgresqls_file_has_more_lines() {
        let bytes = b"4711\n/var/lib/data\n1795914908\n5432\n";
        assert_eq!(PidFileKind::Postmaster.number(bytes), Ok(4711));
        assert_eq!(PidFileKind::Plain.number(bytes), Err(NoNumber::Garbage));
        assert_eq!(PidFileKind::Locked.number(bytes), Err(NoNumber::Garbage));
        assert_eq!(PidFileKind::Postmaster.number(b"\n4711\n"), Err(NoNumber::Empty));
    }

    #[test]
    fn a_claimed_file_is_held_and_holds_our_number_and_its_directories_are_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/deep/own.pid");
        let claimed = PidFile::claim(&path).unwrap();
        assert_eq!(std::fs::read_to_string(claimed.path()).unwrap(), format!("{}\n", std::process::id()));
        let locked = PidFile::new(&path, PidFileKind::Locked);
        assert_eq!(locked.read().unwrap().pid, std::process::id());
        drop(claimed);
        assert!(matches!(locked.read(), Err(Unread::NotHeld)));
        assert!(path.exists(), "it is never removed");
    }

    #[test]
    fn a_claim_that_fails_leaves_the_holders_file_byte_identical() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("own.pid");
        let held = PidFile::claim(&path).unwrap();
        std::fs::write(&path, b"4711\n 12").unwrap();
        let before = (std::fs::read(&path).unwrap(), path.metadata().unwrap().modified().unwrap());
        let error = PidFile::claim(&path).unwrap_err();
        assert!(matches!(error, ClaimError::Held { .. }), "{error}");
        assert_eq!((std::fs::read(&path).unwrap(), path.metadata().unwrap().modified().unwrap()), before);
        drop(held);
        drop(PidFile::claim(&path).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
    }

    #[test]
    fn what_is_no_pid_file_is_not_overwritten_by_a_claim() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        std::fs::write(&path, "keep me").unwrap();
        let error = PidFile::claim(&path).unwrap_err();
        assert!(crate::error::sentence(&error).contains("no PID file"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "keep me");
    }

    #[test]
    fn reading_a_locked_file_keeps_nobody_from_claiming_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("own.pid");
        std::fs::write(&path, "4711\n").unwrap();
        let locked = PidFile::new(&path, PidFileKind::Locked);
        assert!(matches!(locked.read(), Err(Unread::NotHeld)));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| (0..20_000).for_each(|_| _ = locked.read()));
            while !reader.is_finished() {
                drop(PidFile::claim(&path).unwrap());
            }
        });
    }

    #[test]
    fn what_is_no_file_of_its_own_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("target"), "4711\n").unwrap();
        std::os::unix::fs::symlink(at("target"), at("link")).unwrap();
        std::fs::write(at("large"), [b' '; 5000]).unwrap();
        std::fs::write(at("open"), "4711\n").unwrap();
        std::fs::set_permissions(at("open"), std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        for (name, problem) in [
            ("link", "is a symbolic link"),
            (".", "is no regular file"),
            ("large", "is larger"),
            ("open", "can be written by everybody"),
        ] {
            let Err(Unread::Unusable(said)) = plain(&at(name)).read() else { panic!("{name}") };
            assert!(said.contains(problem), "{name}: {said}");
        }
        assert!(matches!(plain(&at("none")).read(), Err(Unread::Missing)));
        assert!(matches!(plain(&at("none/pid")).read(), Err(Unread::Missing)));
    }

    #[test]
    fn only_the_plain_file_that_was_read_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let file = plain(&path);
        std::fs::write(&path, "4711\n").unwrap();
        let reading = file.read().unwrap();
        std::fs::write(&path, "4712\n").unwrap();
        assert!(!file.remove_stale(&reading).unwrap(), "other bytes");
        let reading = file.read().unwrap();
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        std::fs::write(&path, "4712\n").unwrap();
        assert!(!file.remove_stale(&reading).unwrap(), "another file");
        let postmaster = PidFile::new(&path, PidFileKind::Postmaster);
        assert!(!postmaster.remove_stale(&postmaster.read().unwrap()).unwrap(), "another kind");
        assert!(file.remove_stale(&file.read().unwrap()).unwrap());
        assert!(!path.exists());
        std::fs::write(&path, "1\n").unwrap();
        let Err(Unread::First(reading)) = file.read() else { panic!("it is read") };
        std::fs::write(&path, "2\n").unwrap();
        assert!(!file.remove_stale(&reading).unwrap(), "other bytes");
        std::fs::write(&path, "1\n").unwrap();
        assert!(file.remove_stale(&reading).unwrap());
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_by_its_digits_alone(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            for kind in PidFileKind::ALL {
                if let Ok(number) = kind.number(&bytes) {
                    let line = String::from_utf8_lossy(&bytes);
                    let line = if kind == PidFileKind::Postmaster { line.lines().next().unwrap() } else { &line };
                    prop_assert_eq!(line.trim().trim_start_matches('0'), number.to_string());
                    prop_assert!(number > 1);
                }
            }
        }
    }
}
