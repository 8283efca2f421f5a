//! `userlist.txt`: who may log in, and by which secret.
//!
//! How it is read was measured on 1.18, 1.24 and 1.26. An entry is `"user" "secret"`, and the rest of its line is ignored; in
//! both, `""` is a quote and everything else is what it is, a backslash and a newline too. A comment has a line of its own and
//! begins with `;`, not with `#`. Of two entries of one name the last counts. A NUL ends the file. What PgBouncer cannot read
//! ends it, too, and it says so in its log only: a reload answers as if all were well.

mod scan;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use crate::{Problem, UserName};
use scan::{Entry, Scanned, scan};

/// The longest secret that 1.18 and 1.24 take, in bytes, with a quote counted twice.
const SECRET_BYTES: usize = 2047;
/// The longest name, counted likewise.
const NAME_BYTES: usize = 127;

/// What stands for a user's password. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// Takes what is to stand in the file: a verifier, an md5 hash, or a password.
    ///
    /// # Errors
    ///
    /// It has a line's end or a NUL, or is longer than any version takes: 2047 bytes, a double quote counted twice (measured on
    /// 1.18 and 1.24; 1.26 takes more).
    pub fn new(text: impl Into<String>) -> Result<Self, String> {
        let text = text.into();
        if text.contains(['\n', '\r', '\0']) {
            return Err("a secret may not have a line's end or a NUL".into());
        }
        if text.len() + text.matches('"').count() > SECRET_BYTES {
            return Err(format!(
                "a secret may not have more than {SECRET_BYTES} bytes, a double quote counted twice"
            ));
        }
        Ok(Self(text))
    }

    /// The text.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// An entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The name; invalid UTF-8 is replaced.
    pub name: String,
    /// Its line, from 1 on.
    pub line: usize,
    /// `scram-sha-256`, `md5`, `plain` or `empty`.
    pub kind: &'static str,
}

/// The text of one file.
#[derive(Clone, PartialEq, Eq)]
pub struct Userlist {
    bytes: Vec<u8>,
}

impl Userlist {
    /// Takes a file as it is; whatever is wrong with it, [`problems`](Self::problems) tells.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self { bytes: bytes.into() }
    }

    /// The file.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What is refused or misread, in the order of the lines. Behind the first broken line nobody can log in.
    pub fn problems(&self) -> Vec<Problem> {
        let Scanned { entries, broken } = scan(&self.bytes);
        let mut problems = Vec::new();
        let last: HashMap<_, _> = entries.iter().map(|entry| (&entry.name, entry.line)).collect();
        for entry in &entries {
            let name = format!("{:?}", String::from_utf8_lossy(&entry.name));
            let mut misread = |what: String| problems.push(Problem::misread(entry.line, what));
            if entry.name.is_empty() {
                misread("a user has no name".into());
            }
            let between = &self.bytes[entry.name_end..entry.secret.start - 1];
            if between.contains(&b'\n') {
                misread(format!("the secret of {name} was looked for, and found, in a later line"));
            } else if entry.name.contains(&b'\n') || self.bytes[entry.secret.clone()].contains(&b'\n') {
                misread(format!("{name} has quotes that are open over more than one line"));
            } else if between.iter().any(|byte| !scan::is_space(*byte)) {
                misread(format!("between {name} and its secret stands something that is ignored"));
            }
            let counts = last[&entry.name];
            if counts > entry.line {
                misread(format!("user {name} is given again in line {counts}, which counts"));
            }
        }
        let text = scan::text(&self.bytes);
        if let Some(broken) = broken {
            problems.push(Problem::fatal(broken.line, broken.why));
        } else if text.len() < self.bytes.len() {
            let line = 1 + text.iter().filter(|byte| **byte == b'\n').count();
            problems.push(Problem::misread(line, "a NUL byte ends the file: nothing behind it is read"));
        }
        problems
    }

    /// All entries in their order, up to the first broken line. Of two of one name the last counts.
    pub fn users(&self) -> Vec<User> {
        let entries = scan(&self.bytes).entries.into_iter();
        entries
            .map(|entry| User {
                name: String::from_utf8_lossy(&entry.name).into_owned(),
                line: entry.line,
                kind: kind(&self.bytes[entry.secret]),
            })
            .collect()
    }

    /// Gives a user this secret: in the place of the last entry of that name, whose doubles go; else at the end, or in front of
    /// the first broken line, behind which nothing is read.
    pub fn set(&mut self, name: &UserName, secret: &Secret) {
        let Scanned { entries, broken } = scan(&self.bytes);
        let mut named = entries.iter().filter(|entry| entry.name == name.as_str().as_bytes()).rev();
        let Some(last) = named.next() else {
            let at = broken.map(|broken| self.line_start(broken.at));
            let line = format!("{} {}", quoted(name.as_str()), quoted(secret.reveal()));
            return self.insert(at, &line);
        };
        // From behind, so that the places before stay.
        self.bytes.splice(last.secret.clone(), doubled(secret.reveal()).into_bytes());
        let doubles: Vec<_> = named.map(|double| self.lines(double)).collect();
        doubles.into_iter().for_each(|lines| drop(self.bytes.drain(lines)));
    }

    /// Removes every entry of this name; whether there was one.
    pub fn remove(&mut self, name: &UserName) -> bool {
        let entries = scan(&self.bytes).entries;
        let named = entries.iter().filter(|entry| entry.name == name.as_str().as_bytes()).rev();
        let lines: Vec<_> = named.map(|entry| self.lines(entry)).collect();
        let any = !lines.is_empty();
        lines.into_iter().for_each(|lines| drop(self.bytes.drain(lines)));
        any
    }

    /// Adds a line before a line, or at the end.
    fn insert(&mut self, before: Option<usize>, line: &str) {
        let text = scan::text(&self.bytes);
        let first = text.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
        let newline = if first.ends_with(b"\r\n") { "\r\n" } else { "\n" };
        let at = before.unwrap_or(text.len());
        let line = if at == 0 || text[..at].ends_with(b"\n") {
            format!("{line}{newline}")
        } else {
            format!("{newline}{line}")
        };
        self.bytes.splice(at..at, line.into_bytes());
    }

    fn line_start(&self, at: usize) -> usize {
        self.bytes[..at].iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1)
    }

    /// The lines of an entry, and nothing of another.
    fn lines(&self, entry: &Entry) -> Range<usize> {
        let text = scan::text(&self.bytes);
        let rest = text[entry.end..].iter().position(|byte| *byte == b'\n');
        self.line_start(entry.at)..rest.map_or(text.len(), |newline| entry.end + newline + 1)
    }
}

/// Without the text, which holds secrets.
impl fmt::Debug for Userlist {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Userlist").field("bytes", &self.bytes.len()).finish()
    }
}

/// What PgBouncer takes a secret for.
fn kind(secret: &[u8]) -> &'static str {
    let hash = secret.strip_prefix(b"md5");
    if secret.is_empty() {
        "empty"
    } else if secret.starts_with(b"SCRAM-SHA-256$") {
        "scram-sha-256"
    } else if hash
        .is_some_and(|hash| hash.len() == 32 && hash.iter().all(|byte| b"0123456789abcdef".contains(byte)))
    {
        "md5"
    } else {
        "plain"
    }
}

fn doubled(text: &str) -> String {
    text.replace('"', "\"\"")
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", doubled(text))
}

#[cfg(test)]
mod tests;
