//! What a PgBouncer would refuse, and which PgBouncer.

use std::fmt;
use std::str::FromStr;

/// A version of PgBouncer: major and minor, which decide what it accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// `1` of `1.24.1`.
    pub major: u32,
    /// `24` of `1.24.1`.
    pub minor: u32,
}

impl Version {
    /// The oldest that was looked at: what it accepts, newer ones accept.
    pub const OLDEST: Self = Self { major: 1, minor: 18 };
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Version {
    type Err = String;

    /// Reads `1.24`, `1.24.1`, or what `pgbouncer --version` and `SHOW VERSION` say: `PgBouncer 1.24.1`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.trim().trim_start_matches("PgBouncer ");
        let mut parts = number.split('.').map(|part| part.parse().ok());
        match (parts.next().flatten(), parts.next().flatten()) {
            (Some(major), Some(minor)) => Ok(Self { major, minor }),
            _ => Err(format!("{text:?} is no version of PgBouncer: write it as 1.24")),
        }
    }
}

/// Something that a PgBouncer refuses, or takes for something else than it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line in its file, from 1 on.
    pub line: usize,
    /// One sentence without the line, that names the thing and the fix. Never a secret.
    pub what: String,
    /// Whether the file is refused because of it (else it is accepted and means something unexpected).
    pub fatal: bool,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}
