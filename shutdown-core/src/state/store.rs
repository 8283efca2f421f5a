//! The state of a node over its restarts: opened once, saved whole, restored into its sources.

use std::fmt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::backend::StateBackend;
use super::directory::Directory;
use super::document::{Document, LARGEST};
use super::error::StateError;
use super::loaded::{Fate, Found, Loaded, SetAside};
use super::sections::Sections;
use super::source::{Saved, StateSource};
use crate::error::sentence;
use crate::snapshot::StateStatus;

/// How often the state is saved while the service runs.
pub const INTERVAL: Duration = Duration::from_secs(60);
/// The most a state may have: some two hundred thousand peers.
pub const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// Keeps what a node knows over restarts and crashes.
///
/// Given to [`Builder::state`](crate::Builder::state), it is opened and restored by `install`, saved every
/// [`interval`](Self::interval), at the moment a shutdown begins, and in stage Persist. It also works by itself.
///
/// A save replaces the state as a whole and durably, from the sources themselves: a crash at any moment leaves the old
/// state or the new one. Opening never fails because of what is in the state: a generation that cannot be used is set
/// aside, the previous one is taken, and [`Loaded`] says so.
///
/// ```
/// # use shutdown_core::state::{StateSource, StateStore};
/// # let dir = tempfile::tempdir()?;
/// let store = || {
///     let started = StateSource::new("served", || Ok(7_u64), |served: u64, saved| {
///         println!("{served} requests served until {:?} ago", saved.age);
///         Ok(())
///     });
///     StateStore::in_dir(dir.path()).node_id("edge-1").source(started)
/// };
/// let first = store();
/// first.save()?;
/// let incarnation = first.incarnation();
/// drop(first); // the directory is one process's, one store's
///
/// let second = store();
/// let loaded = second.open()?;
/// assert_eq!(loaded.sections.get::<u64>("served")?, Some(7));
/// assert!(second.incarnation() > incarnation);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct StateStore {
    backend: Box<dyn StateBackend>,
    node_id: String,
    interval: Duration,
    max_bytes: u64,
    sources: Vec<StateSource>,
    /// One save, or the opening, at a time. Taken before `live`.
    saving: Mutex<Saving>,
    /// What is saved next; `None` until the store is open.
    live: Mutex<Option<Document>>,
    loaded: OnceLock<Loaded>,
    status: Mutex<StateStatus>,
}

/// Where the shutdown stands, as far as it concerns the state.
#[derive(Debug, Default)]
struct Saving {
    shutdown_at: Option<u64>,
    clean: bool,
    closed: bool,
}

impl fmt::Debug for StateStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateStore").field("place", &self.backend.place()).finish_non_exhaustive()
    }
}

impl StateStore {
    /// A state in `state.json` in this directory, which is made with mode 0700 if it is missing. Touches nothing before
    /// it is opened.
    pub fn in_dir(dir: impl Into<PathBuf>) -> Self {
        Self::new(Directory::new(dir.into()))
    }

    /// A state in a place of the program's own.
    pub fn new(backend: impl StateBackend) -> Self {
        Self {
            backend: Box::new(backend),
            node_id: String::new(),
            interval: INTERVAL,
            max_bytes: MAX_BYTES,
            sources: Vec::new(),
            saving: Mutex::default(),
            live: Mutex::new(None),
            loaded: OnceLock::new(),
            status: Mutex::default(),
        }
    }

    /// Who this node is; written into the state. A state that another node wrote is restored all the same, and the log
    /// says whose it was.
    #[must_use]
    pub fn node_id(mut self, node_id: impl Into<String>) -> Self {
        self.node_id = node_id.into();
        self
    }

    /// How often a coordinator saves. Default: [`INTERVAL`]. Zero: only when a shutdown begins and ends.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// The most bytes a state may have, to be read or written. Default: [`MAX_BYTES`].
    #[must_use]
    pub fn max_bytes(mut self, max_bytes: u64) -> Self {
        self.max_bytes = max_bytes;
        self
    }

    /// Adds a part of the program.
    ///
    /// # Panics
    ///
    /// If there is one of that name.
    #[must_use]
    pub fn source(mut self, source: StateSource) -> Self {
        let taken = self.sources.iter().any(|other| other.name == source.name);
        assert!(!taken, "there is a state source {} already", source.name);
        self.sources.push(source);
        self
    }

    /// Takes the place, reads what is there, restores it into the sources and saves the new incarnation; only the first
    /// call does. Blocks on the disk.
    ///
    /// Should that save fail – a full disk – the log says so, and the next one is due in an interval.
    ///
    /// # Errors
    ///
    /// The place cannot be used, or another process has it; never what the state contains. A later call tries again.
    pub fn open(&self) -> Result<&Loaded, StateError> {
        let saving = self.saving.lock();
        self.open_at(&saving, unix_ms())
    }

    fn open_at(&self, saving: &Saving, now: u64) -> Result<&Loaded, StateError> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let generations = self.backend.open(self.max_bytes)?;
        let mut found = Found::Nothing;
        let mut document = None;
        let mut set_aside = Vec::new();
        for (index, generation) in generations.into_iter().enumerate() {
            let read =
                generation.content.and_then(|bytes| Document::parse(&bytes).map_err(|e| e.to_string()));
            match read {
                Ok(read) => {
                    found = if index == 0 { Found::Newest } else { Found::Earlier };
                    document = Some(read);
                    break;
                }
                Err(reason) => set_aside.push(SetAside {
                    name: generation.name,
                    reason,
                    now_at: self.backend.set_aside(index, now).map_err(|error| sentence(&error)),
                }),
            }
        }
        let document = document.unwrap_or_default();
        let age = Duration::from_millis(now.saturating_sub(document.saved_at));
        let fates = self.sources.iter().map(|source| (source.name, restore(source, &document.sections, now)));
        let loaded = Loaded {
            found,
            node_id: document.node_id.clone(),
            incarnation: document.incarnation,
            saved_at: document.saved_at,
            shutdown_at: document.shutdown_at,
            clean: document.clean,
            age,
            from_the_future: document.saved_at > now,
            sections: document.sections.clone(),
            sources: fates.collect(),
            set_aside,
        };
        let incarnation = (document.incarnation + 1).max(now).min(LARGEST);
        *self.live.lock() = Some(Document { node_id: self.node_id.clone(), incarnation, ..document });
        self.status.lock().incarnation = incarnation;
        loaded.log(&self.backend.place(), &self.node_id);
        let loaded = self.loaded.get_or_init(|| loaded);
        if let Err(error) = self.write(saving, now) {
            self.log_failure(&error);
        }
        Ok(loaded)
    }

    /// What the previous run left, once the store is open.
    pub fn loaded(&self) -> Option<&Loaded> {
        self.loaded.get()
    }

    /// This run's incarnation, once the store is open: higher than that of every run before it, milliseconds since the
    /// Unix epoch when the clock was right.
    pub fn incarnation(&self) -> Option<u64> {
        self.live.lock().as_ref().map(|live| live.incarnation)
    }

    /// Changes sections in memory; the next save writes them. Opens the store if it is not.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn update<T>(&self, change: impl FnOnce(&mut Sections) -> T) -> Result<T, StateError> {
        if self.loaded.get().is_none() {
            self.open()?;
        }
        Ok(change(&mut self.live.lock().as_mut().expect("the store is open").sections))
    }

    /// Saves what the sources and the program know now. Blocks on the disk. Opens the store if it is not: a state that
    /// was not read is never overwritten.
    ///
    /// # Errors
    ///
    /// What was there is still there, except for [`StateError::Section`], which tells of one part.
    pub fn save(&self) -> Result<(), StateError> {
        self.save_with(|_| {})
    }

    /// The save at the moment a shutdown begins.
    pub(crate) fn save_stopping(&self) -> Result<(), StateError> {
        self.save_with(|saving| _ = saving.shutdown_at.get_or_insert_with(unix_ms))
    }

    /// The last save of a shutdown; then the backend is closed.
    pub(crate) fn finish(&self) -> Result<(), StateError> {
        let mut saving = self.saving.lock();
        _ = saving.shutdown_at.get_or_insert_with(unix_ms);
        saving.clean = true;
        let saved = self.save_in(&saving);
        saving.closed = true;
        self.backend.close();
        saved
    }

    fn save_with(&self, change: impl FnOnce(&mut Saving)) -> Result<(), StateError> {
        let mut saving = self.saving.lock();
        change(&mut saving);
        self.save_in(&saving)
    }

    fn save_in(&self, saving: &Saving) -> Result<(), StateError> {
        if saving.closed {
            return Err(StateError::Closed);
        }
        let now = unix_ms();
        if self.loaded.get().is_none() {
            self.open_at(saving, now)?;
        }
        self.write(saving, now)
    }

    /// Captures and writes. The caller holds `saving`.
    fn write(&self, saving: &Saving, now: u64) -> Result<(), StateError> {
        let captured: Vec<_> = self.sources.iter().map(|source| (source.name, source.capture())).collect();
        let mut failed = None;
        let bytes = {
            let mut live = self.live.lock();
            let live = live.as_mut().expect("the store is open");
            for (name, captured) in captured {
                match captured {
                    Ok(data) => live.sections.put(name.to_owned(), data, now),
                    Err(source) => {
                        failed = failed.or(Some(StateError::Section { name: name.into(), source }))
                    }
                }
            }
            live.saved_at = now;
            live.shutdown_at = saving.shutdown_at;
            live.clean = saving.clean;
            live.to_bytes()
        };
        let size = bytes.len() as u64;
        let written = if size > self.max_bytes {
            Err(StateError::TooLarge { bytes: size, max_bytes: self.max_bytes })
        } else {
            self.backend.save(&bytes)
        };
        let mut status = self.status.lock();
        if written.is_ok() {
            status.saves += 1;
            status.saved_at = now;
            status.bytes = size;
        }
        let result = written.and(failed.map_or(Ok(()), Err));
        if result.is_err() {
            status.failures += 1;
        }
        status.last_error = result.as_ref().err().map(|error| sentence(error));
        result
    }

    /// Saves, and says in the log when that fails, begins to fail otherwise, or works again.
    pub(crate) fn checkpoint(&self, stopping: bool) {
        let before = self.status.lock().last_error.clone();
        match if stopping { self.save_stopping() } else { self.save() } {
            // A shutdown that is over is over.
            Ok(()) if before.is_none() => {}
            Err(StateError::Closed) => {}
            Ok(()) => {
                tracing::info!(target: "shutdown", place = &*self.backend.place(), "state is saved again")
            }
            Err(error) if before.as_ref() != Some(&sentence(&error)) => self.log_failure(&error),
            Err(_) => {}
        }
    }

    fn log_failure(&self, error: &StateError) {
        let place = &*self.backend.place();
        tracing::warn!(target: "shutdown", place, error = sentence(error), "state could not be saved");
    }

    /// How often a coordinator saves; `None`: not by the clock.
    pub(crate) fn every(&self) -> Option<Duration> {
        Some(self.interval).filter(|interval| !interval.is_zero())
    }

    /// For `/status` and `/metrics`.
    pub fn status(&self) -> StateStatus {
        self.status.lock().clone()
    }
}

/// Restores one section into its source.
fn restore(source: &StateSource, sections: &Sections, now: u64) -> Fate {
    let Some((data, at)) = sections.entry(source.name) else { return Fate::Absent };
    let age = Duration::from_millis(now.saturating_sub(at));
    if source.max_age.is_some_and(|limit| age > limit) {
        return Fate::TooOld { age };
    }
    match source.restore(data, Saved { at, age }) {
        Ok(()) => Fate::Restored { age },
        Err(error) => Fate::Failed { reason: sentence(&*error) },
    }
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(LARGEST).min(LARGEST)
}
