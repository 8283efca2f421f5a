//! The fuzzer's inputs, for the tests that replay them.

use std::fs;
use std::path::{Path, PathBuf};

/// The inputs of a target of `tests/fuzz`, with their files.
///
/// # Panics
///
/// If they cannot be read.
pub fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    entries
        .map(|entry| {
            let path = entry.expect("readable").path();
            let bytes = fs::read(&path).expect("an input");
            (path, bytes)
        })
        .collect()
}
