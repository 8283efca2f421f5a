//! Where a state's bytes are kept. The directory is one place; a program can bring another.

use std::borrow::Cow;

use super::error::StateError;

/// Keeps the bytes of a state: at least the last two generations, each whole or not at all.
///
/// Every method may block on the disk or the network; but for `place` none is called by two threads at once. They are
/// called inside a runtime as well as outside, so one that needs a runtime of its own needs a thread for it.
pub trait StateBackend: Send + Sync + 'static {
    /// Takes the place for this process alone, clears what a crash has left there, and reads what is there, the
    /// newest generation first. One that cannot be read, or is larger than `max_bytes`, says so instead of its bytes.
    ///
    /// # Errors
    ///
    /// The place cannot be used at all, or another process has it.
    fn open(&self, max_bytes: u64) -> Result<Vec<Generation>, StateError>;

    /// Puts a new generation in the place of the newest, durably; that one is kept as the previous one. When it fails
    /// at any point, also by a crash, the old generation or the new one is there.
    ///
    /// # Errors
    ///
    /// It is not durable; at the latest a power cut brings the newest generation before it back.
    fn save(&self, document: &[u8]) -> Result<(), StateError>;

    /// Puts the generation that [`open`](Self::open) gave at `index` where it is not read again, but can be looked
    /// at; what it is called then. `None`: it stays where it is.
    ///
    /// # Errors
    ///
    /// It could not be moved and stays where it is.
    fn set_aside(&self, index: usize, now_unix_ms: u64) -> Result<Option<String>, StateError>;

    /// Copies the generation that [`open`](Self::open) gave at `index` to where [`set_aside`](Self::set_aside) would put
    /// it: a part of the program has not understood its section. `None`: this place keeps no copies.
    ///
    /// # Errors
    ///
    /// It was not copied.
    fn copy_aside(&self, index: usize, now_unix_ms: u64) -> Result<Option<String>, StateError> {
        let _ = (index, now_unix_ms);
        Ok(None)
    }

    /// Lets the place go: nothing is saved any more. Called after the last save of a shutdown.
    fn close(&self) {}

    /// What to call the place in a sentence, for example `state file ./data/state.json`.
    fn place(&self) -> Cow<'_, str>;
}

/// One generation of a state as it was found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Generation {
    /// What to call it, for example its path.
    pub name: String,
    /// Its bytes, or in a few words why they were not read.
    pub content: Result<Vec<u8>, String>,
}

impl Generation {
    /// A generation.
    pub fn new(name: impl Into<String>, content: Result<Vec<u8>, String>) -> Self {
        Self { name: name.into(), content }
    }
}
