//! Where a section comes from and where it goes: capture when saving, restore when starting.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::BoxError;
use crate::unwind::panic_message;

/// Writes JSON.
type Capture = dyn Fn(&mut Vec<u8>) -> Result<(), BoxError> + Send + Sync;
type Restore = dyn Fn(&str, Saved) -> Result<(), BoxError> + Send + Sync;

/// What is known about a section that is being restored.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Saved {
    /// When it was saved, milliseconds since the Unix epoch; 0 if nobody wrote that down.
    pub at: u64,
    /// How long ago that was; zero if the clock has been set back since.
    pub age: Duration,
}

/// A part of the program whose state is kept: a name, a capture, a restore.
///
/// ```
/// # use shutdown_core::state::StateSource;
/// # use std::sync::{Arc, atomic::{AtomicU64, Ordering}};
/// let served = Arc::new(AtomicU64::new(0));
/// let counter = Arc::clone(&served);
/// let source = StateSource::new(
///     "served",
///     move || Ok(served.load(Ordering::Relaxed)),
///     move |count: u64, _saved| {
///         counter.store(count, Ordering::Relaxed);
///         Ok(())
///     },
/// );
/// ```
pub struct StateSource {
    pub(super) name: &'static str,
    pub(super) max_age: Option<Duration>,
    capture: Box<Capture>,
    restore: Box<Restore>,
}

impl fmt::Debug for StateSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateSource").field("name", &self.name).finish_non_exhaustive()
    }
}

impl StateSource {
    /// `capture` is called for every save, on the thread that saves; `restore` once, when the store is opened, if
    /// there is a section of this name. An error or a panic of either concerns this section alone.
    ///
    /// Neither may use the store they belong to.
    pub fn new<T, U>(
        name: &'static str,
        capture: impl Fn() -> Result<T, BoxError> + Send + Sync + 'static,
        restore: impl Fn(U, Saved) -> Result<(), BoxError> + Send + Sync + 'static,
    ) -> Self
    where
        T: Serialize,
        U: DeserializeOwned,
    {
        Self {
            name,
            max_age: None,
            capture: Box::new(move |into| Ok(serde_json::to_writer(into, &capture()?)?)),
            restore: Box::new(move |data, saved| restore(serde_json::from_str(data)?, saved)),
        }
    }

    /// Does not restore a section that was saved longer ago. Default: however old it is.
    #[must_use]
    pub fn max_age(mut self, limit: Duration) -> Self {
        self.max_age = Some(limit);
        self
    }

    /// Writes the section's JSON into `into`, in place of what was there.
    pub(super) fn capture(&self, into: &mut String) -> Result<(), BoxError> {
        let mut bytes = std::mem::take(into).into_bytes();
        bytes.clear();
        calm(|| (self.capture)(&mut bytes))?;
        *into = String::from_utf8(bytes)?;
        Ok(())
    }

    pub(super) fn restore(&self, data: &str, saved: Saved) -> Result<(), BoxError> {
        calm(|| (self.restore)(data, saved))
    }
}

/// A panic as an error. What the closure touches is the source's own affair.
fn calm<T>(work: impl FnOnce() -> Result<T, BoxError>) -> Result<T, BoxError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(format!("it panicked: {}", panic_message(&*panic)).into()))
}
