//! The named parts of a state: each a JSON value of its owner's shape, kept as it was written.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::document::quoted;

/// Set in this run: as old as the file it is written into.
const LIVE: u64 = u64::MAX;

/// The sections of a state by name.
///
/// A section that nobody here knows stays as it is, byte for byte.
#[derive(Clone, Debug, Default)]
pub struct Sections(BTreeMap<String, Section>);

#[derive(Clone, Debug)]
struct Section {
    /// JSON.
    data: String,
    /// Milliseconds since the Unix epoch; [`LIVE`] while the program is what knows it.
    saved_at: u64,
}

impl Sections {
    /// Reads a section; `None` if there is none of that name.
    ///
    /// # Errors
    ///
    /// It is of another shape.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, serde_json::Error> {
        self.0.get(name).map(|section| serde_json::from_str(&section.data)).transpose()
    }

    /// A section's JSON, as it was written.
    pub fn json(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|section| &*section.data)
    }

    /// When a section was saved, milliseconds since the Unix epoch; `None` if it is not there or was set in this run.
    pub fn saved_at(&self, name: &str) -> Option<u64> {
        self.0.get(name).map(|section| section.saved_at).filter(|at| *at != LIVE)
    }

    /// Writes a section. A section of the same name is replaced.
    ///
    /// What a [`StateSource`](super::StateSource) of this name captures takes its place at the next save.
    ///
    /// # Errors
    ///
    /// The value cannot be written as JSON. The section is then as it was.
    pub fn set<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> Result<(), serde_json::Error> {
        self.put(name.to_owned(), serde_json::to_string(value)?, LIVE);
        Ok(())
    }

    /// Takes a section away; whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }

    /// The sections' names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// A section and when it was saved.
    pub(super) fn entry(&self, name: &str) -> Option<(&str, u64)> {
        self.0.get(name).map(|section| (&*section.data, section.saved_at))
    }

    pub(super) fn put(&mut self, name: String, data: String, saved_at: u64) {
        self.0.insert(name, Section { data, saved_at });
    }

    /// Exchanges a section's JSON for another one.
    pub(super) fn exchange(&mut self, name: &str, data: &mut String, saved_at: u64) {
        match self.0.get_mut(name) {
            Some(section) => {
                std::mem::swap(&mut section.data, data);
                section.saved_at = saved_at;
            }
            None => self.put(name.to_owned(), std::mem::take(data), saved_at),
        }
    }

    /// The sections that were not saved at `at`, with their times.
    pub(super) fn older_than(&self, at: u64) -> BTreeMap<&str, u64> {
        let older = self.0.iter().filter(|(_, section)| section.saved_at != at && section.saved_at != LIVE);
        older.map(|(name, section)| (name.as_str(), section.saved_at)).collect()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Writes the object that stands in the file.
    pub(super) fn write(&self, into: &mut Vec<u8>) {
        into.push(b'{');
        for (place, (name, section)) in self.0.iter().enumerate() {
            into.extend_from_slice(if place == 0 { b"\n    " } else { b",\n    " });
            into.extend_from_slice(quoted(name).as_bytes());
            into.extend_from_slice(b": ");
            into.extend_from_slice(section.data.as_bytes());
        }
        into.extend_from_slice(if self.0.is_empty() { b"}" } else { b"\n  }" });
    }
}
