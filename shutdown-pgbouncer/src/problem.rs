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
    pub const OLDEST: Self = Self::one(18);

    /// `1.minor`.
    const fn one(minor: u32) -> Self {
        Self { major: 1, minor }
    }
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

impl Problem {
    pub(crate) fn fatal(line: usize, what: impl Into<String>) -> Self {
        Self { line, what: what.into(), fatal: true }
    }

    pub(crate) fn misread(line: usize, what: impl Into<String>) -> Self {
        Self { line, what: what.into(), fatal: false }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

/// Which versions know something. 1.18, 1.24 and 1.26 were asked; of what came between two of them, a version between
/// may know it or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// The newest that was seen without, before it came.
    not_yet: Option<Version>,
    /// The oldest that was seen with it.
    since: Version,
    /// The newest that was seen with it and the oldest without, if it went again.
    gone: Option<(Version, Version)>,
}

/// Whether one version knows something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Knows {
    Yes,
    /// It lies between one that does and one that does not.
    Perhaps,
    No,
}

impl Known {
    /// Known to all.
    pub(crate) const ALWAYS: Self = Self { not_yet: None, since: Version::OLDEST, gone: None };
    /// Not to 1.18, but to 1.24.
    pub(crate) const BY_24: Self = Self::between(18, 24);
    /// Not to 1.24, but to 1.26.
    pub(crate) const BY_26: Self = Self::between(24, 26);
    /// To 1.24, but no longer to 1.26.
    pub(crate) const UNTIL_24: Self =
        Self { not_yet: None, since: Version::OLDEST, gone: Some((Version::one(24), Version::one(26))) };
    /// The section `[peers]`.
    pub(crate) const PEERS: Self = Self::between(18, 19);
    /// Names in single quotes; 1.25.2 was tried, too.
    pub(crate) const QUOTED_NAMES: Self = Self::between(24, 25);

    const fn between(without: u32, with: u32) -> Self {
        Self { not_yet: Some(Version::one(without)), since: Version::one(with), gone: None }
    }

    pub(crate) fn to(self, version: Version) -> Knows {
        if self.not_yet.is_some_and(|last| version <= last)
            || self.gone.is_some_and(|(_, gone)| version >= gone)
        {
            return Knows::No;
        }
        let came = self.not_yet.is_none() || version >= self.since;
        if came && self.gone.is_none_or(|(last, _)| version <= last) { Knows::Yes } else { Knows::Perhaps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_what_pgbouncer_says() {
        for text in ["1.24", "1.24.1", "PgBouncer 1.24.1", " PgBouncer 1.24.1\n"] {
            assert_eq!(text.parse(), Ok(Version { major: 1, minor: 24 }), "{text:?}");
        }
        for text in ["", "1", "1.", "x.24", "PgBouncer"] {
            text.parse::<Version>().unwrap_err();
        }
        assert!(Version::one(9) < Version::OLDEST);
        assert_eq!(Version::OLDEST.to_string(), "1.18");
    }

    #[test]
    fn of_what_came_between_two_versions_one_between_says_perhaps() {
        let knows = |known: Known| [18, 19, 24, 25, 26, 27].map(|minor| known.to(Version::one(minor)));
        let (yes, perhaps, no) = (Knows::Yes, Knows::Perhaps, Knows::No);
        assert_eq!(knows(Known::ALWAYS), [yes; 6]);
        assert_eq!(knows(Known::BY_24), [no, perhaps, yes, yes, yes, yes]);
        assert_eq!(knows(Known::BY_26), [no, no, no, perhaps, yes, yes]);
        assert_eq!(knows(Known::UNTIL_24), [yes, yes, yes, perhaps, no, no]);
        assert_eq!(knows(Known::PEERS), [no, yes, yes, yes, yes, yes]);
    }
}
