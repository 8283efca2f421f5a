//! Stderr that never fails: what reads it may be gone, and a log line is no reason to panic.

use std::io::{self, Write};

/// For `tracing_subscriber`'s `with_writer(|| Stderr)`.
#[derive(Clone, Copy, Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
