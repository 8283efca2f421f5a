//! `userlist.txt`: who may log in, and by which secret.

use std::fmt;

use crate::{Problem, UserName};

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
    /// It has a line's end or a NUL, or is longer than any version takes.
    pub fn new(text: impl Into<String>) -> Result<Self, String> {
        let text = text.into();
        todo!("{}", text.len())
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
        todo!()
    }

    /// All entries in their order. Of two of one name the last counts.
    pub fn users(&self) -> Vec<User> {
        todo!()
    }

    /// Gives a user this secret: in the place of the last entry of that name, whose doubles go; else at the end.
    pub fn set(&mut self, name: &UserName, secret: &Secret) {
        let _ = (name, secret);
        todo!()
    }

    /// Removes every entry of this name; whether there was one.
    pub fn remove(&mut self, name: &UserName) -> bool {
        let _ = name;
        todo!()
    }
}
