//! What a file was before it was edited.

use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::write::Temporary;
use super::{beside, directory};

/// An earlier state of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// Where it is.
    pub path: PathBuf,
    /// When it was made: what its name says, else its time of change.
    pub made: SystemTime,
    /// Its size in bytes.
    pub size: u64,
    /// The number behind the seconds, for the order of those of one second.
    number: u64,
}

/// Keeps these bytes beside `path`, with the mode and owner of the original. Two never have one name, also not with what a shell script
/// makes, whose names end with the seconds.
pub(super) fn make(path: &Path, bytes: &[u8], like: &Metadata) -> io::Result<PathBuf> {
    let temporary = Temporary::create(path)?;
    // Whose owner cannot be kept is this user's then, and nobody else can read it.
    let _ = temporary.be_like(like);
    temporary.fill(bytes)?;
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    for number in 1.. {
        let name = beside(path, "", &format!(".backup.{seconds}.{number}"));
        match renameat_with(CWD, temporary.path(), CWD, &name, RenameFlags::NOREPLACE) {
            Ok(()) => {
                temporary.keep();
                if let Err(error) = super::write::sync_directory(path) {
                    // The edit is given up: nothing is left of it.
                    let _ = fs::remove_file(&name);
                    return Err(error);
                }
                return Ok(name);
            }
            Err(rustix::io::Errno::EXIST) => {}
            // A file system that does not know how; under the lock nobody else makes one of this name.
            Err(rustix::io::Errno::INVAL) if !name.exists() => {
                fs::rename(temporary.path(), &name)?;
                temporary.keep();
                return Ok(name);
            }
            Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    unreachable!("numbers do not end")
}

/// The backups of a file, the newest first: ours, and those of shell scripts (`<file>.backup.<seconds>`).
pub(crate) fn list(path: &Path) -> io::Result<Vec<Backup>> {
    let prefix = beside(path, "", ".backup.");
    let prefix = prefix.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut backups = Vec::new();
    for entry in fs::read_dir(directory(path))? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(&prefix)) else { continue };
        let (seconds, number) = rest.split_once('.').unwrap_or((rest, "0"));
        let (Ok(seconds), Ok(number)) = (seconds.parse(), number.parse()) else { continue };
        let metadata = entry.metadata()?;
        if metadata.is_file() {
            let made = UNIX_EPOCH + Duration::from_secs(seconds);
            backups.push(Backup { path: directory(path).join(&name), made, size: metadata.len(), number });
        }
    }
    backups.sort_by_key(|backup| std::cmp::Reverse((backup.made, backup.number)));
    Ok(backups)
}
