//! What a file was before it was edited.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::write::{Owned, Temporary};
use super::{beside, directory};

/// An earlier state of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// Where it is.
    pub path: PathBuf,
    /// When it was made: the seconds of its name, if it is one of ours (`<seconds>.<n>`) and they have passed, or they are within 36 hours of
    /// its time of change; else that. Not all that scripts put there are seconds.
    pub made: SystemTime,
    /// Its size in bytes.
    pub size: u64,
    /// The number behind the seconds, for the order of those of one second.
    number: u64,
}

/// Keeps these bytes beside `path`, with the mode and owner of the original. Two never have one name, also not with what a shell script
/// makes, whose names end with the seconds.
pub(super) fn make(path: &Path, bytes: &[u8], like: Owned) -> io::Result<PathBuf> {
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

/// How far the seconds of another's backup may be from its time of change: `date` may have been of any time zone.
const BELIEVED: Duration = Duration::from_secs(36 * 60 * 60);

/// The backups of a file, the newest first: ours, and those of shell scripts (`<file>.backup.<number>`).
pub(crate) fn list(path: &Path) -> io::Result<Vec<Backup>> {
    let prefix = beside(path, "", ".backup.");
    let prefix = prefix.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let now = SystemTime::now();
    let mut backups = Vec::new();
    for entry in fs::read_dir(directory(path))? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(&prefix)) else { continue };
        let ours = rest.split_once('.');
        let (seconds, number) = ours.unwrap_or((rest, "0"));
        let (Ok(seconds), Ok(number)) = (seconds.parse(), number.parse()) else { continue };
        let metadata = entry.metadata()?;
        if metadata.is_file() {
            let changed = metadata.modified()?;
            let made = UNIX_EPOCH
                .checked_add(Duration::from_secs(seconds))
                .filter(|named| ours.is_some() || apart(*named, changed) < BELIEVED)
                // A clock that ran ahead.
                .filter(|named| *named <= now || *named <= changed)
                .unwrap_or(changed);
            backups.push(Backup { path: directory(path).join(&name), made, size: metadata.len(), number });
        }
    }
    backups.sort_by_key(|backup| std::cmp::Reverse((backup.made, backup.number)));
    Ok(backups)
}

fn apart(one: SystemTime, other: SystemTime) -> Duration {
    one.duration_since(other).unwrap_or_else(|negative| negative.duration())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_names_are_of_their_time_of_change_and_others_are_no_backups() {
        let dir = tempfile::tempdir().unwrap();
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        for (rest, changed) in [
            ("18446744073709551615", 1_000_000_050),
            ("18446744073709551615.1", 1_000_000_040),
            ("20261129120000", 1_000_000_030),
            ("20261129", 1_000_000_020),
            ("1000000010", 1_000_000_099),
            ("1000000000.2", 1_500_000_000),
            ("1000000000.1", 1_600_000_000),
            ("old", 1),
            ("18446744073709551616", 1),
            ("1.old", 1),
            ("", 1),
        ] {
            let file = fs::File::create(dir.path().join(format!("f.backup.{rest}"))).unwrap();
            file.set_modified(at(changed)).unwrap();
        }
        let listed = list(&dir.path().join("f")).unwrap();
        let names: Vec<_> = listed
            .iter()
            .map(|backup| backup.path.file_name().unwrap().to_str().unwrap()["f.backup.".len()..].to_owned())
            .collect();
        let wanted = [
            "18446744073709551615",
            "18446744073709551615.1",
            "20261129120000",
            "20261129",
            "1000000010",
            "1000000000.2",
            "1000000000.1",
        ];
        assert_eq!(names, wanted);
        assert_eq!((listed[0].made, listed[4].made), (at(1_000_000_050), at(1_000_000_010)));
        assert_eq!(listed[6].made, at(1_000_000_000));
    }
}
