//! The state of a node over its restarts: opened once, saved whole, restored into its sources.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::backend::StateBackend;
use super::directory::Directory;
use super::document::{Document, LARGEST, MOST_FIELDS};
use super::error::StateError;
use super::loaded::{Fate, Found, Loaded, SetAside};
use super::sections::Sections;
use super::source::{Saved, StateSource};
use crate::error::sentence;
use crate::snapshot::StateStatus;
use crate::unwind::panic_message;

/// How often the state is saved while the service runs.
pub const INTERVAL: Duration = Duration::from_secs(60);
/// The most a state may have: some two hundred thousand peers.
pub const MAX_BYTES: u64 = 64 * 1024 * 1024;

impl Buffers {
    /// Keeps only what is worth keeping between two saves.
    fn give_back(&mut self) {
        if self.file.capacity() > KEPT_BUFFER {
            self.file = Vec::new();
        }
        for section in self.sections.iter_mut().filter(|section| section.capacity() > KEPT_BUFFER) {
            *section = String::new();
        }
    }
}

/// A buffer beyond this is not used again.
const KEPT_BUFFER: usize = 4 * 1024 * 1024;

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
    /// When the shutdown began.
    shutdown_at: OnceLock<u64>,
    live: Mutex<Live>,
    loaded: OnceLock<Loaded>,
    status: Mutex<StateStatus>,
}

/// What one save hands on to the next.
#[derive(Debug, Default)]
struct Saving {
    /// What the last checkpoint failed with, as the log has said it.
    said: Option<String>,
    /// Used again by every save: fresh memory costs as much as what is written into it.
    buffers: Buffers,
}

#[derive(Debug, Default)]
struct Buffers {
    file: Vec<u8>,
    /// One a source, exchanged with what it captured before.
    sections: Vec<String>,
}

/// What is saved next.
#[derive(Debug, Default)]
struct Live {
    /// `None` until the store is open.
    document: Option<Document>,
    /// The last save has taken what there was: nothing that comes later would be saved.
    closed: bool,
}

/// What a checkpoint has to say in the log.
pub(crate) enum News {
    /// It failed, or fails otherwise than before.
    Failed(String),
    /// It works again.
    Mended,
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
            shutdown_at: OnceLock::new(),
            live: Mutex::default(),
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
    /// call does. Blocks on the disk. The place is held until the process ends.
    ///
    /// Should that save fail – a full disk – the log says so, and the next one is due in an interval.
    ///
    /// # Errors
    ///
    /// The place cannot be used, or another process has it; never what the state contains. A later call tries again.
    pub fn open(&self) -> Result<&Loaded, StateError> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let (loaded, first) = {
            let mut saving = self.saving.lock();
            if let Some(loaded) = self.loaded.get() {
                return Ok(loaded);
            }
            let now = unix_ms();
            let loaded = self.noted(self.read(now))?;
            let first = self.noted(self.write(&mut saving, now, false));
            saving.said = first.as_ref().err().map(|error| sentence(error));
            (self.loaded.get_or_init(|| loaded), first)
        };
        // Not under the lock: a log may block.
        loaded.log(&self.backend.place(), &self.node_id);
        if let Err(error) = first {
            self.log(News::Failed(sentence(&error)));
        }
        Ok(loaded)
    }

    /// The opening up to the first save: what was found becomes what is live.
    fn read(&self, now: u64) -> Result<Loaded, StateError> {
        if self.live.lock().closed {
            return Err(StateError::Closed);
        }
        let generations = self.backend.open(self.max_bytes)?;
        let mut used: Option<(usize, Document)> = None;
        let mut highest = 0;
        let mut set_aside = Vec::new();
        for (index, generation) in generations.into_iter().enumerate() {
            match generation.content.and_then(|bytes| Document::parse(&bytes).map_err(|e| e.to_string())) {
                Ok(document) => {
                    highest = highest.max(document.incarnation);
                    used.get_or_insert((index, document));
                }
                Err(reason) => set_aside.push(SetAside {
                    name: generation.name,
                    reason,
                    now_at: self.backend.set_aside(index, now).map_err(|error| sentence(&error)),
                }),
            }
        }
        let found = match used {
            None => Found::Nothing,
            Some((0, _)) => Found::Newest,
            Some(_) => Found::Earlier,
        };
        let index = used.as_ref().map(|(index, _)| *index);
        let document = used.map(|(_, document)| document).unwrap_or_default();
        let restored = |source: &StateSource| (source.name, restore(source, &document.sections, now));
        let sources: Vec<_> = self.sources.iter().map(restored).collect();
        let failed = sources.iter().any(|(_, fate)| matches!(fate, Fate::Failed { .. }));
        let copy = index.filter(|_| failed).map(|index| {
            // The next capture takes the section's place: who goes back to the release before finds it here.
            self.backend.copy_aside(index, now).map_err(|error| sentence(&error))
        });
        let incarnation = (highest + 1).max(now).min(LARGEST);
        let loaded = Loaded {
            found,
            node_id: document.node_id.clone(),
            incarnation: document.incarnation,
            saved_at: document.saved_at,
            shutdown_at: document.shutdown_at,
            clean: document.clean,
            age: Duration::from_millis(now.saturating_sub(document.saved_at)),
            from_the_future: document.saved_at > now,
            sections: document.sections.clone(),
            sources,
            set_aside,
            copy,
        };
        let document = Document { node_id: self.node_id.clone(), incarnation, ..document };
        self.live.lock().document = Some(document);
        self.status.lock().incarnation = incarnation;
        Ok(loaded)
    }

    /// What the previous run left, once the store is open.
    pub fn loaded(&self) -> Option<&Loaded> {
        self.loaded.get()
    }

    /// This run's incarnation, once the store is open: higher than that of every run whose state is there, and
    /// milliseconds since the Unix epoch when the clock was right.
    pub fn incarnation(&self) -> Option<u64> {
        self.live.lock().document.as_ref().map(|live| live.incarnation)
    }

    /// Changes sections in memory; the next save writes them. Opens the store if it is not, which restores. `change`
    /// must not use the store.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); or [`StateError::Closed`], because the last save of a shutdown has begun.
    pub fn update<T>(&self, change: impl FnOnce(&mut Sections) -> T) -> Result<T, StateError> {
        self.open()?;
        let mut live = self.live.lock();
        if live.closed {
            return Err(StateError::Closed);
        }
        Ok(change(&mut live.document.as_mut().expect("the store is open").sections))
    }

    /// Saves what the sources and the program know now. Blocks on the disk. Opens the store if it is not, which
    /// restores: a state that was not read is never overwritten.
    ///
    /// # Errors
    ///
    /// The newest generation is as it was; but for [`StateError::Sections`], which tells of some parts, and for a directory
    /// that cannot be flushed: then the new one is in place, and a power cut may bring the old one back.
    pub fn save(&self) -> Result<(), StateError> {
        self.open()?;
        let mut saving = self.saving.lock();
        self.noted(self.write(&mut saving, unix_ms(), false))
    }

    /// The last save of a shutdown; then the backend is closed.
    pub(crate) fn finish(&self) -> Result<(), StateError> {
        let opened = self.open().map(drop);
        let mut saving = self.saving.lock();
        self.shutdown_at.get_or_init(unix_ms);
        let saved = opened.and_then(|()| self.noted(self.write(&mut saving, unix_ms(), true)));
        self.live.lock().closed = true;
        self.backend.close();
        saved
    }

    /// Notes when the shutdown began, for every save from now on.
    pub(crate) fn stopping(&self, at_unix_ms: u64) {
        let _ = self.shutdown_at.set(at_unix_ms.min(LARGEST));
    }

    /// A save that nobody waits for: by the clock, or because a shutdown has begun. What there is to say about it.
    pub(crate) fn checkpoint(&self) -> Option<News> {
        // A backend that panics is one that fails.
        let saved = catch_unwind(AssertUnwindSafe(|| self.save()));
        let error = match saved {
            Ok(Ok(())) => None,
            // A shutdown that is over is over.
            Ok(Err(StateError::Closed)) => return None,
            Ok(Err(error @ StateError::TooLarge { .. })) => Some((sentence(&error), "too large".to_owned())),
            Ok(Err(error)) => Some((sentence(&error), sentence(&error))),
            Err(panic) => {
                let panic = format!("the backend panicked: {}", panic_message(&*panic));
                self.status.lock().failed(panic.clone());
                Some((panic.clone(), panic))
            }
        };
        let mut saving = self.saving.lock();
        let kind = error.as_ref().map(|(_, kind)| kind.clone());
        let before = std::mem::replace(&mut saving.said, kind);
        match error {
            Some((error, kind)) if before.as_ref() != Some(&kind) => Some(News::Failed(error)),
            None if before.is_some() => Some(News::Mended),
            _ => None,
        }
    }

    /// Says it, on a thread that may block.
    pub(crate) fn log(&self, news: News) {
        let place = &*self.backend.place();
        match news {
            News::Failed(error) => {
                tracing::warn!(target: "shutdown", place, error, "state could not be saved, or not whole")
            }
            News::Mended => tracing::info!(target: "shutdown", place, "state is saved again"),
        }
    }

    /// Captures and writes. The caller holds `saving`, and the store has been read.
    fn write(&self, saving: &mut Saving, now: u64, last: bool) -> Result<(), StateError> {
        saving.buffers.give_back();
        let Buffers { file, sections } = &mut saving.buffers;
        sections.resize_with(self.sources.len(), String::new);
        let mut captured = Vec::with_capacity(self.sources.len());
        let mut failed = Vec::new();
        for (source, into) in self.sources.iter().zip(sections) {
            match source.capture(into) {
                Ok(()) => captured.push((source.name, into)),
                Err(error) => failed.push((source.name, sentence(&*error))),
            }
        }
        {
            let mut live = self.live.lock();
            if live.closed {
                return Err(StateError::Closed);
            }
            // In one step with taking what there is: no update is lost between.
            live.closed = last;
            let live = live.document.as_mut().expect("the store is open");
            for (name, data) in captured {
                live.sections.exchange(name, data, now);
            }
            let sections = live.sections.len();
            if sections > MOST_FIELDS {
                return Err(StateError::TooMany { sections, most: MOST_FIELDS });
            }
            live.saved_at = now;
            live.shutdown_at = self.shutdown_at.get().copied();
            live.clean = last;
            live.write(file);
        }
        let size = file.len() as u64;
        if size > self.max_bytes {
            return Err(StateError::TooLarge { bytes: size, max_bytes: self.max_bytes });
        }
        self.backend.save(file)?;
        let mut status = self.status.lock();
        (status.saves, status.saved_at, status.bytes) = (status.saves + 1, now, size);
        if failed.is_empty() { Ok(()) } else { Err(StateError::Sections(failed)) }
    }

    /// Writes into the status how it went.
    fn noted<T>(&self, result: Result<T, StateError>) -> Result<T, StateError> {
        let mut status = self.status.lock();
        match &result {
            Ok(_) => status.last_error = None,
            Err(error) => status.failed(sentence(error)),
        }
        drop(status);
        result
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
    // From the future: the clock has been set back, and how old it is nobody knows, but for small steps.
    if source.max_age.is_some_and(|limit| Duration::from_millis(now.abs_diff(at)) > limit) {
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
