//! Names of databases and users that every version reads back as they were written.

use std::fmt;
use std::str::FromStr;

/// The longest name of a database (`MAX_DBNAME` less one).
const DATABASE_BYTES: usize = 63;
/// The longest name of a user (`MAX_USERNAME` less one).
const USER_BYTES: usize = 127;

/// Why a name is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameError(pub(crate) String);

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NameError {}

/// The name of a database as clients give it: `[A-Za-z0-9_][A-Za-z0-9_.-]*`, at most 63 bytes, and not `pgbouncer`, which is
/// the admin console.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DatabaseName(String);

/// The name of a user: anything but control characters, at most 127 bytes, of which a double quote is two.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserName(String);

impl DatabaseName {
    /// The name that is nearest to a text: what a name may not have is a `_`, and of a text that is too long the end is taken, which
    /// tells nodes apart.
    pub fn near(text: &str) -> Self {
        let kept = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-') { c } else { '_' };
        let mut name: String = text.chars().map(kept).collect();
        // ASCII, so bytes are characters.
        let mut name = name.split_off(name.len().saturating_sub(DATABASE_BYTES));
        if name.is_empty() || name.starts_with(['.', '-']) {
            name.replace_range(..name.len().min(1), "_");
        }
        if name == "pgbouncer" {
            name.push('_');
        }
        Self(name)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl UserName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DatabaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for DatabaseName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let refused = |why: &str| Err(NameError(format!("{name:?} is no name of a database: {why}")));
        let first = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let rest = |byte: u8| first(byte) || byte == b'.' || byte == b'-';
        if name.is_empty() {
            return refused("it is empty");
        }
        if name.len() > DATABASE_BYTES {
            return refused(&format!("it has more than {DATABASE_BYTES} bytes"));
        }
        if !name.bytes().all(rest) || !name.bytes().take(1).all(first) {
            return refused("take letters, digits, _, and behind the first also . and -");
        }
        if name == "pgbouncer" {
            return refused("that is the admin console");
        }
        Ok(Self(name.to_owned()))
    }
}

impl FromStr for UserName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let refused = |why: &str| Err(NameError(format!("{name:?} is no name of a user: {why}")));
        if name.is_empty() {
            return refused("it is empty");
        }
        // A quote is written twice, and counts twice.
        if name.len() + name.matches('"').count() > USER_BYTES {
            return refused(&format!("it has more than {USER_BYTES} bytes, a quote counted twice"));
        }
        if name.chars().any(char::is_control) {
            return refused("it has a control character");
        }
        Ok(Self(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_has_a_name_that_every_version_reads() {
        for good in ["a", "proj_abc123", "_x", "0", "a.b-c", "A", &"n".repeat(63)] {
            assert_eq!(good.parse::<DatabaseName>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "pgbouncer",
            "*",
            "a b",
            "a=b",
            "a\nb",
            "a\0",
            "\"a\"",
            "'a'",
            "a]",
            "-a",
            ".a",
            "ü",
            "a@b",
            "a:b",
            &"n".repeat(64),
        ] {
            let error = bad.parse::<DatabaseName>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{bad:?} is no name of a database: ")), "{error}");
        }
    }

    #[test]
    fn every_text_is_near_a_name() {
        for (text, name) in [
            ("node-1.example_3000", "node-1.example_3000"),
            ("a b/ü", "a_b__"),
            ("", "_"),
            ("-a", "_a"),
            ("pgbouncer", "pgbouncer_"),
            (&format!("{}-3000", "n".repeat(63)), &format!("{}-3000", "n".repeat(58))),
            (&format!(".{}", "-".repeat(63)), &format!("_{}", "-".repeat(62))),
        ] {
            let near = DatabaseName::near(text);
            assert_eq!((near.as_str(), near.as_str().parse()), (name, Ok(near.clone())));
        }
    }

    #[test]
    fn a_user_may_have_any_name_on_one_line() {
        for good in ["a", "a b", "o'neil", "say \"hi\"", "ü", &"n".repeat(127)] {
            assert_eq!(good.parse::<UserName>().unwrap().as_str(), good);
        }
        for bad in ["", "a\nb", "a\0", "\t", &"n".repeat(128), &"\"".repeat(64)] {
            bad.parse::<UserName>().unwrap_err();
        }
    }
}
