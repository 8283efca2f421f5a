//! What the values of a configuration refer to: files and directories, looked for as this process sees them, or as a PgBouncer
//! that runs does.
//!
//! What comes of one that is missing was measured on 1.18, 1.24 and 1.26, which agree. Paths that are not absolute are not looked for:
//! they depend on where PgBouncer was started. Nor are users, groups, addresses, and what servers are asked for.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat, fstat, getxattr, openat2, stat};
use rustix::io::Errno;

use crate::{Ini, Problem};

/// The consequence of a directory or file that is missing, for who starts.
const NO_START: &str = "PgBouncer does not start with that";
const NO_START_NOR_RELOAD: &str =
    "PgBouncer does not start with that, and one that runs ends at its next reload";
const NO_LOGIN: &str = "nobody can log in";

const READ: u32 = 4;
const WRITE: u32 = 2;
const SEARCH: u32 = 1;

/// Who looks for files.
#[derive(Debug)]
pub(crate) struct Eyes {
    /// Whose root it is, if it is another's.
    root: Option<File>,
    /// With whose rights: user and groups. None: nobody asks for those.
    rights: Option<(u32, Vec<u32>)>,
}

impl Eyes {
    /// This process's. What it may do says nothing of what PgBouncer may.
    pub(crate) const OURS: Self = Self { root: None, rights: None };

    /// A process's, in whatever container; nothing if this one may not look through them.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let numbers = |key: &str| -> Option<Vec<u32>> {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_ascii_whitespace().map(|number| number.parse().ok()).collect()
        };
        // Real, effective, saved, and the one for files (proc_pid_status(5)).
        let (user, group) = (*numbers("Uid:")?.get(3)?, *numbers("Gid:")?.get(3)?);
        let rights = Some((user, numbers("Groups:")?.into_iter().chain([group]).collect()));
        let root = File::open(format!("/proc/{pid}/root")).ok()?;
        let theirs = fstat(&root).ok()?;
        let eyes = Self { root: Some(root), rights };
        match eyes.look(Path::new("/")) {
            Ok(_) => Some(eyes),
            // Before Linux 5.6, or in a sandbox that does not know it, one root at most can be looked through: ours.
            Err(_) => is_one(&theirs, &stat("/").ok()?).then_some(Self { root: None, ..eyes }),
        }
    }

    /// Whether two names are those of one file; nothing if one is not seen.
    pub(crate) fn is_same(&self, theirs: &Path, ours: &Path) -> Option<bool> {
        Some(is_one(&self.look(theirs).ok()?, &stat(ours).ok()?))
    }

    /// Whether the file may be read: yes, unless it is seen that it may not.
    pub(crate) fn may_read(&self, file: &str) -> bool {
        self.look(Path::new(file)).is_ok_and(|found| self.may(Path::new(file), &found, READ))
    }

    fn look(&self, path: &Path) -> Result<Stat, Errno> {
        if !path.is_absolute() {
            return Err(Errno::INVAL);
        }
        let Some(root) = &self.root else { return stat(path) };
        fstat(self.open(root, path)?)
    }

    fn open(&self, root: &File, path: &Path) -> Result<rustix::fd::OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    }

    /// Whether these rights are there. With an access control list, nobody but the system knows.
    fn may(&self, path: &Path, found: &Stat, wanted: u32) -> bool {
        let Some((user, groups)) = &self.rights else { return true };
        let shift = if *user == found.st_uid {
            6
        } else if groups.contains(&found.st_gid) {
            3
        } else {
            0
        };
        *user == 0 || (found.st_mode >> shift) & wanted == wanted || self.has_list(path)
    }

    fn has_list(&self, path: &Path) -> bool {
        let has = |name: &Path| {
            getxattr(name, "system.posix_acl_access", &mut [] as &mut [u8]).is_ok_and(|length| length > 0)
        };
        match &self.root {
            None => has(path),
            Some(root) => self
                .open(root, path)
                .is_ok_and(|file| has(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))),
        }
    }

    fn no_directory(&self, directory: &Path) -> Option<String> {
        match self.look(directory) {
            Ok(found) if is(&found, FileType::Directory) => None,
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => {
                Some(format!("{} is no directory on this machine", directory.display()))
            }
            Err(_) => None,
        }
    }

    fn no_file(&self, file: &str) -> Option<String> {
        match self.look(Path::new(file)) {
            Ok(found) if !is(&found, FileType::Directory) => None,
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => Some(format!("{file} is no file on this machine")),
            Err(_) => None,
        }
    }

    /// Why a file cannot be opened for writing there, or made. `anew`: one that is there is removed and made anew.
    fn no_place_for_a_file(&self, name: &str, anew: bool) -> Option<String> {
        let file = Path::new(name);
        let directory = file.parent()?;
        let may_not_make = || {
            let found = self.look(directory).ok()?;
            (!self.may(directory, &found, WRITE | SEARCH))
                .then(|| format!("PgBouncer's user may make no file in {}", directory.display()))
        };
        let may_not_write = |found| {
            (!self.may(file, &found, WRITE)).then(|| format!("PgBouncer's user may not write {name}"))
        };
        let unreached = || {
            let closed = directory
                .ancestors()
                .filter(|above| self.look(above).is_ok_and(|found| !self.may(above, &found, SEARCH)));
            Some(format!("PgBouncer's user may not enter {}", closed.last()?.display()))
        };
        let found = match self.look(file) {
            Ok(found) if is(&found, FileType::Directory) => return Some(format!("{name} is a directory")),
            Ok(found) if !anew => may_not_write(found),
            Ok(_) => may_not_make(),
            Err(Errno::NOENT | Errno::NOTDIR) => self.no_directory(directory).or_else(may_not_make),
            // We are who it is.
            Err(Errno::ACCESS) if self.rights.is_some() => {
                Some(format!("PgBouncer's user may not enter {}", directory.display()))
            }
            Err(_) => None,
        };
        unreached().or(found)
    }
}

/// Whether the command line of a process names this file, as it sees it.
pub(crate) fn is_started_with(pid: u32, file: &Path) -> bool {
    let proc = Path::new("/proc").join(pid.to_string());
    let (Some(eyes), Ok(words), Ok(directory)) =
        (Eyes::of(pid), std::fs::read(proc.join("cmdline")), std::fs::read_link(proc.join("cwd")))
    else {
        return false;
    };
    let mut arguments = words.split(|byte| *byte == 0).skip(1).filter(|word| !word.is_empty());
    arguments.any(|word| eyes.is_same(&directory.join(OsStr::from_bytes(word)), file) == Some(true))
}

/// Something that is named and is not there.
pub(crate) struct Missing {
    key: &'static str,
    pub(crate) problem: Problem,
}

impl Missing {
    /// Whether it comes of a setting that is given this key.
    pub(crate) fn is_of(&self, key: &str) -> bool {
        let family = |key: &str| match key {
            "auth_type" => "auth_hba_file".to_owned(),
            key if key.starts_with("client_tls_") => "client_tls_".to_owned(),
            key => key.to_owned(),
        };
        family(self.key) == family(key)
    }
}

/// All that is missing, but for the user list.
pub(crate) fn missing(ini: &Ini, eyes: &Eyes) -> Vec<Missing> {
    let value = |key: &str| ini.parameter(key).unwrap_or_default();
    let word = |key: &str| value(key).to_ascii_lowercase();
    let mut missing: Vec<_> = logfile(ini, eyes).into_iter().collect();
    let mut look = |key: &'static str, found: Option<String>, then: &str| {
        missing.extend(found.map(|what| of(ini, key, &what, then)));
    };
    look("pidfile", eyes.no_place_for_a_file(&value("pidfile"), true), NO_START);
    // A name that begins with `@` is in no directory, and not absolute.
    let socket_dir = value("unix_socket_dir");
    look("unix_socket_dir", eyes.no_directory(Path::new(&socket_dir)), "PgBouncer cannot listen there");
    if word("auth_type") == "hba" {
        look("auth_hba_file", eyes.no_file(&value("auth_hba_file")), NO_LOGIN);
    }
    let mode = word("client_tls_sslmode");
    if !["", "disable"].contains(&mode.as_str()) {
        let verifies = mode.starts_with("verify-");
        for (key, needed) in
            [("client_tls_key_file", true), ("client_tls_cert_file", true), ("client_tls_ca_file", verifies)]
        {
            match value(key) {
                file if !file.is_empty() => look(key, eyes.no_file(&file), NO_START),
                _ if needed => {
                    look(
                        "client_tls_sslmode",
                        Some(format!("{mode} needs {key}, which is not set")),
                        NO_START,
                    );
                }
                _ => {}
            }
        }
    }
    missing
}

/// Why a PgBouncer that runs would end when it reads this: it opens its log anew at each reload.
pub(crate) fn logfile(ini: &Ini, eyes: &Eyes) -> Option<Missing> {
    let found = eyes.no_place_for_a_file(&ini.parameter("logfile")?, false)?;
    Some(of(ini, "logfile", &found, NO_START_NOR_RELOAD))
}

fn of(ini: &Ini, key: &'static str, what: &str, then: &str) -> Missing {
    let line = ini.parameter_line(key).unwrap_or(1);
    Missing { key, problem: Problem::misread(line, format!("{key}: {what}; {then}")) }
}

fn is_one(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

fn is(found: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(found.st_mode) == kind
}
