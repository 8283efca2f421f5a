//! What a write in place means to do, on the disk before it begins.
//!
//! `pgbctl journal 1 <bytes before> <bytes after> <crc32 of both>`, a line's end, the bytes before, the bytes after. A write that was
//! killed, or cut off by a power failure, leaves each byte as it was or as it should become; then the journal is played to its
//! end. If any byte is neither, somebody else has written since, and the journal is dropped.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::beside;
use super::write::{Temporary, later_than, overwrite, sync_directory};

const HEAD: &str = "pgbctl journal 1";

/// A write under way.
pub(super) struct Journal {
    path: PathBuf,
}

/// Writes down what `target` is and shall be.
pub(super) fn begin(target: &Path, old: &[u8], new: &[u8]) -> io::Result<Journal> {
    let path = path_of(target);
    let temporary = Temporary::create(target)?;
    temporary.fill(&encode(old, new))?;
    fs::rename(temporary.path(), &path)?;
    temporary.keep();
    let journal = Journal { path };
    if let Err(error) = sync_directory(target) {
        journal.end()?;
        return Err(error);
    }
    Ok(journal)
}

impl Journal {
    /// It is done, or not to be done. One that cannot be removed is emptied: it is dropped then.
    pub(super) fn end(self) -> io::Result<()> {
        if let Err(error) = fs::remove_file(&self.path) {
            let file = OpenOptions::new().write(true).open(&self.path).map_err(|_| error)?;
            file.set_len(0)?;
            return file.sync_all();
        }
        sync_directory(&self.path)
    }
}

/// Finishes what a killed write has left.
pub(super) fn finish(target: &Path) -> io::Result<()> {
    let path = path_of(target);
    let journal = match fs::read(&path) {
        Ok(journal) => journal,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let now = match fs::read(target) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        read => Some(read?),
    };
    match decode(&journal) {
        Some((old, new)) if now.is_some_and(|now| is_between(&now, old, new)) => {
            let file = OpenOptions::new().write(true).open(target)?;
            let modified = later_than(&file.metadata()?)?;
            overwrite(&file, new, modified)?;
            tracing::info!(file = %target.display(), "finished a write that was killed");
        }
        _ => {
            tracing::warn!(file = %target.display(), "dropped the journal of a killed write: the file was changed since")
        }
    }
    Journal { path }.end()
}

/// Whether there is a journal.
fn path_of(target: &Path) -> PathBuf {
    beside(target, ".", ".pending")
}

fn encode(old: &[u8], new: &[u8]) -> Vec<u8> {
    let sum = sum(old, new);
    let head = format!("{HEAD} {} {} {sum:08x}\n", old.len(), new.len());
    [head.as_bytes(), old, new].concat()
}

fn decode(journal: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = journal.iter().position(|byte| *byte == b'\n')?;
    let head = std::str::from_utf8(&journal[..end]).ok()?.strip_prefix(HEAD)?;
    let mut words = head.split_ascii_whitespace();
    let (old, new): (usize, usize) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let body = &journal[end + 1..];
    (body.len() == old.checked_add(new)?).then_some(())?;
    let (old, new) = body.split_at(old);
    (words.next()? == format!("{:08x}", sum(old, new))).then_some((old, new))
}

fn sum(old: &[u8], new: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(old);
    hasher.update(new);
    hasher.finalize()
}

/// Whether a write from `old` to `new` can have left this.
fn is_between(now: &[u8], old: &[u8], new: &[u8]) -> bool {
    let longest = old.len().max(new.len());
    let shortest = old.len().min(new.len());
    (shortest..=longest).contains(&now.len())
        && now.iter().enumerate().all(|(place, byte)| {
            // A hole that was not filled reads as zero.
            old.get(place) == Some(byte) || new.get(place) == Some(byte) || (*byte == 0 && place >= shortest)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_is_read_as_it_was_written_and_a_torn_one_is_none() {
        let whole = encode(b"old", b"new and longer");
        assert_eq!(decode(&whole), Some((&b"old"[..], &b"new and longer"[..])));
        for length in 0..whole.len() {
            assert_eq!(decode(&whole[..length]), None);
        }
        for place in 0..whole.len() {
            let mut changed = whole.clone();
            changed[place] ^= 1;
            assert_ne!(decode(&changed), Some((&b"old"[..], &b"new and longer"[..])), "{place}");
        }
    }

    #[test]
    fn what_a_killed_write_leaves_is_finished_at_every_byte_and_what_another_wrote_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("file");
        for (old, new) in [
            ("short", "much longer than that"),
            ("much longer than that", "short"),
            ("same size", "SAME SIZE"),
        ] {
            for reached in 0..=new.len() {
                let mut torn = old.as_bytes().to_vec();
                torn.resize(old.len().max(reached), 0);
                torn[..reached].copy_from_slice(&new.as_bytes()[..reached]);
                fs::write(&target, &torn).unwrap();
                fs::write(path_of(&target), encode(old.as_bytes(), new.as_bytes())).unwrap();
                finish(&target).unwrap();
                assert_eq!(fs::read_to_string(&target).unwrap(), new, "{reached}");
                assert!(!path_of(&target).exists());
            }
            fs::write(&target, "another's words").unwrap();
            fs::write(path_of(&target), encode(old.as_bytes(), new.as_bytes())).unwrap();
            finish(&target).unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), "another's words");
        }
    }
}
