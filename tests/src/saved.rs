//! What the crash tests save: a count, and a filler that follows from it.
//!
//! A state that was torn, mixed from two saves or put together from another one does not check.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use shutdown_core::state::{StateSource, StateStore};

/// The section's name.
pub const SECTION: &str = "counter";
/// The filler's length where nothing else is said: the state is a few pages, so that a write can be seen half done.
pub const LENGTH: u64 = 16_000;

/// What is saved for `n`.
pub fn content(n: u64, length: u64) -> Value {
    json!({ "n": n, "length": length, "filler": filler(n, length) })
}

/// The `n` and the length of a content.
///
/// # Errors
///
/// It is none that was ever saved.
pub fn check(content: &Value) -> Result<(u64, u64), String> {
    let number = |name: &str| content[name].as_u64().ok_or_else(|| format!("it has no {name}"));
    let (n, length) = (number("n")?, number("length")?);
    if content["filler"].as_str() != Some(filler(n, length).as_str()) {
        return Err(format!("its filler is not that of {n}"));
    }
    Ok((n, length))
}

/// `length` digits, or a few more: a row that is another for every `n`, again and again. Its length divides no page and
/// no buffer, so that pieces of two fillers do not fit together.
fn filler(n: u64, length: u64) -> String {
    let length = usize::try_from(length + n % 97).unwrap_or(usize::MAX);
    let word = n.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut filler = format!("{word:020}{n:020}{:021}", !word).repeat(length / 61 + 1);
    filler.truncate(length);
    filler
}

/// A count that is kept in a directory.
pub struct Counter {
    /// Where it is kept.
    pub store: StateStore,
    n: Arc<AtomicU64>,
    length: Arc<AtomicU64>,
}

impl Counter {
    /// A count kept in `dir`; touches nothing before the store is opened.
    pub fn in_dir(dir: &Path) -> Self {
        let (n, length) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(LENGTH)));
        let captured = (Arc::clone(&n), Arc::clone(&length));
        let restored = (Arc::clone(&n), Arc::clone(&length));
        let source = StateSource::new(
            SECTION,
            move || Ok(content(captured.0.load(Ordering::Relaxed), captured.1.load(Ordering::Relaxed))),
            move |content: Value, _| {
                let (n, length) = check(&content)?;
                restored.0.store(n, Ordering::Relaxed);
                restored.1.store(length, Ordering::Relaxed);
                Ok(())
            },
        );
        Self { store: StateStore::in_dir(dir).node_id("saver").source(source), n, length }
    }

    /// Where the count stands.
    pub fn n(&self) -> u64 {
        self.n.load(Ordering::Relaxed)
    }

    /// How long its filler is.
    pub fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }

    /// Makes its filler longer or shorter from the next save on.
    pub fn set_length(&self, length: u64) {
        self.length.store(length, Ordering::Relaxed);
    }

    /// Counts on.
    pub fn bump(&self) -> u64 {
        self.n.fetch_add(1, Ordering::Relaxed) + 1
    }
}
