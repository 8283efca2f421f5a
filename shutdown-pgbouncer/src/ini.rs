//! `pgbouncer.ini`: read as PgBouncer reads it, changed in one line at a time, every other byte as it was.

use crate::{Connection, DatabaseName, Problem, Version};

/// The text of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ini {
    bytes: Vec<u8>,
}

/// An entry of a section `[databases]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    /// Its name, `*` for all others.
    pub name: String,
    /// Its line, from 1 on.
    pub line: usize,
    /// Where it is, if that can be read.
    pub connection: Result<Connection, String>,
}

impl Ini {
    /// Takes a file as it is; whatever is wrong with it, [`problems`](Self::problems) tells.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self { bytes: bytes.into() }
    }

    /// The file.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What this version would refuse or misread, in the order of its lines. Files that are included are not looked into.
    pub fn problems(&self, version: Version) -> Vec<Problem> {
        let _ = version;
        todo!()
    }

    /// All entries of its databases, in their order. Of two of one name the last counts.
    pub fn databases(&self) -> Vec<Database> {
        todo!()
    }

    /// The last value of a key in `[pgbouncer]`.
    pub fn parameter(&self, key: &str) -> Option<String> {
        let _ = key;
        todo!()
    }

    /// The files that it includes (`%include`), with their lines.
    pub fn includes(&self) -> Vec<(usize, String)> {
        todo!()
    }

    /// Gives a database this entry: in the place of the last one of that name, whose doubles go; else behind the last
    /// entry of the first section `[databases]`.
    ///
    /// # Errors
    ///
    /// There is no section `[databases]`.
    pub fn set_database(&mut self, name: &DatabaseName, connection: &Connection) -> Result<(), String> {
        let _ = (name, connection);
        todo!()
    }

    /// Removes every entry of this name; whether there was one.
    pub fn remove_database(&mut self, name: &str) -> bool {
        let _ = name;
        todo!()
    }

    /// Gives a key of `[pgbouncer]` this value: in the place of the last one, else at the end of the last such section.
    ///
    /// # Errors
    ///
    /// The key is none that PgBouncer knows, the value has a line's end or blanks around it, or there is no such section.
    pub fn set_parameter(&mut self, key: &str, value: &str) -> Result<(), String> {
        let _ = (key, value);
        todo!()
    }
}
