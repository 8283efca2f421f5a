//! The data directory: made when the proxy starts, and private.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Makes the directory with mode 0700, unless it is there, and sees that files can be written in it. Nothing is left
/// over when they cannot.
///
/// # Errors
///
/// What the system said.
pub(crate) fn ensure(path: &Path) -> io::Result<()> {
    let was_there = path.exists();
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    let usable = made.and_then(|()| probe(path));
    if usable.is_err() && !was_there {
        // Only if it is empty, and only ours. The error to report is the one that led here.
        let _ = fs::remove_dir(path);
    }
    usable
}

fn probe(path: &Path) -> io::Result<()> {
    // Made exclusively: whatever stands there already is not ours, and is not followed.
    let file = path.join(format!(".probe.{}.tmp", std::process::id()));
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file) {
        Ok(_) => fs::remove_file(&file),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_directory_is_private_and_empty_however_often_it_is_made() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/b");
        for _ in 0..2 {
            ensure(&dir).unwrap();
            assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
            assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_file_in_its_place_is_an_error_and_stays_as_it_is() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("taken");
        fs::write(&path, "precious").unwrap();
        assert!(ensure(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
