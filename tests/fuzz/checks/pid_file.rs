//! What must hold for the bytes of every PID file. The fuzzer and the test that replays its corpus share it.

use shutdown_core::companions::{NoNumber, PidFileKind};

/// Reads the input as each kind of file; a number that is read is one that nothing but a process can have, and the only text in
/// its line.
///
/// # Panics
///
/// If a law is broken.
pub(crate) fn check(input: &[u8]) -> [Result<u32, NoNumber>; 3] {
    [PidFileKind::Plain, PidFileKind::Locked, PidFileKind::Postmaster].map(|kind| {
        let line = match kind {
            PidFileKind::Postmaster => input.split(|byte| *byte == b'\n').next().unwrap_or_default(),
            _ => input,
        };
        let read = kind.number(input).inspect_err(|error| assert!(!error.to_string().is_empty()));
        assert_eq!(read.ok(), naive(line), "{kind}: {}", line.escape_ascii());
        read
    })
}

/// The same, by other means: white space is cut off, and the text is what a number would be written as.
fn naive(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let text = text.trim_matches([' ', '\t', '\n', '\r', '\x0c']);
    let digits = text.trim_start_matches('0');
    let number: u32 = digits.parse().ok()?;
    (digits == number.to_string() && (2..=4_194_304).contains(&number)).then_some(number)
}
