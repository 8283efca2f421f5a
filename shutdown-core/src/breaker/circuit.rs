//! One breaker, and the permits it gives.
//!
//! `word` is what everybody looks at: the state in bits 0 and 1, above them the *generation*, which grows with each
//! change of state. It changes under the lock `half`, which also holds the count of the probes; a permit remembers the
//! word it was given under, so a result of an earlier generation is told from a present one by one comparison.
//!
//! The closed path takes no lock: it reads `word`, and counts in the window under its generation, which the window
//! calls an era. If the breaker has opened and closed meanwhile, that era is out of sight.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use crate::breaker::call::{Call, Class};
use crate::breaker::config::{Config, Dropped, Settings};
use crate::breaker::window::{Count, Window};
use crate::sync::{AtomicU64, Mutex, Ordering};

/// Where a breaker stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Everybody is admitted.
    #[default]
    Closed,
    /// Nobody is.
    Open,
    /// A few are, to find out.
    HalfOpen,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Closed, Self::Open, Self::HalfOpen];

    /// `closed`, `open` or `half_open`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }

    /// 0 closed, 1 open, 2 half-open: the value of a gauge.
    pub const fn gauge(self) -> u8 {
        match self {
            Self::Closed => 0,
            Self::Open => 1,
            Self::HalfOpen => 2,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

const STATE: u64 = 3;
const CLOSED: u64 = 0;
const OPEN: u64 = 1;
const HALF_OPEN: u64 = 2;
/// In a permit: it was given back.
const SETTLED: u64 = 3;
const GENERATION: u64 = 4;

/// One circuit breaker. See [the module](crate::breaker).
///
/// On cache lines of its own, so that the reference count of an `Arc` around it is on another one.
#[derive(Debug)]
#[repr(align(128))]
pub struct Breaker {
    word: AtomicU64,
    /// When it may half-open, in nanoseconds from `born`. Only grows, and means something only while open.
    until: AtomicU64,
    born: Instant,
    settings: Settings,
    key: Arc<str>,
    window: Window,
    half: Mutex<Half>,
    /// Of all breakers of a registry, those that are gone included.
    opened: Arc<AtomicU64>,
    #[cfg(shutdown_loom)]
    pub(crate) mutant: Mutant,
}

/// What only changes of state and probes touch.
#[derive(Debug, Default)]
struct Half {
    outstanding: u32,
    /// Until when the probes under way keep their places, in nanoseconds from `born`: a sleep after the last began.
    term: u64,
    successes: u32,
    /// The generation that was closed last.
    era: u64,
    /// Changes to closed, open, half-open.
    changes: [u64; 3],
}

/// Ways to break the protocol, one at a time; loom must find each.
#[cfg(shutdown_loom)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The protocol as it is.
    None,
    /// Whether a place is free is looked at under one lock, and the place taken under the next.
    LookThenTake,
    /// A probe gives its place back whatever the generation.
    AnyGeneration,
    /// The failures are added up before this one is added.
    SumThenCount,
}

/// Nobody is admitted now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Where the breaker stands: open; or half-open, with all its probes under way.
    pub state: State,
    /// How long until it may half-open; zero if it is half-open.
    pub retry_after: Duration,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state {
            State::Open => write!(f, "the circuit is open for another {} ms", self.retry_after.as_millis()),
            state => write!(f, "the circuit is {state}, and all its probes are under way"),
        }
    }
}

impl std::error::Error for Rejected {}

impl Breaker {
    /// A closed breaker, called `key` in logs, that is not in any registry.
    pub fn new(key: &str, config: Config, now: Instant) -> Self {
        Self::counted(key.into(), config, now, Arc::new(AtomicU64::new(0)))
    }

    pub(super) fn counted(key: Arc<str>, config: Config, born: Instant, opened: Arc<AtomicU64>) -> Self {
        let settings = *config.settings();
        Self {
            word: AtomicU64::new(CLOSED),
            until: AtomicU64::new(0),
            born,
            settings,
            key,
            window: Window::new(settings.window),
            half: Mutex::new(Half::default()),
            opened,
            #[cfg(shutdown_loom)]
            mutant: Mutant::None,
        }
    }

    /// What it is called.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Asks to make a call.
    ///
    /// # Errors
    ///
    /// It is open, or half-open with all its probes under way. Do not call, and say when to come back.
    #[inline]
    pub fn try_acquire(&self, now: Instant) -> Result<Permit<&Self>, Rejected> {
        self.admit(now).map(|word| Permit { breaker: self, word })
    }

    /// [`try_acquire`](Self::try_acquire), for where a borrow cannot go. It costs the `Arc`'s count.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn try_acquire_owned(self: &Arc<Self>, now: Instant) -> Result<OwnedPermit, Rejected> {
        self.admit(now).map(|word| Permit { breaker: Arc::clone(self), word })
    }

    #[inline]
    fn admit(&self, now: Instant) -> Result<u64, Rejected> {
        // Acquire: pairs with the Release in `go`, for `until`.
        let word = self.word.load(Ordering::Acquire);
        if word & STATE == CLOSED { Ok(word) } else { self.probe(word, now) }
    }

    /// Not closed a moment ago: takes one of the places, if it is time.
    #[cold]
    fn probe(&self, word: u64, now: Instant) -> Result<u64, Rejected> {
        let at = self.at(now);
        let open = |until: u64| Rejected {
            state: State::Open,
            retry_after: Duration::from_nanos(until.saturating_sub(at)),
        };
        // Without the lock: who hammers an open breaker holds up nobody. It only grows, so a value that is newer than
        // the word refuses no one who would be admitted now. Relaxed: see `admit`.
        let until = self.until.load(Ordering::Relaxed);
        if word & STATE == OPEN && at < until {
            return Err(open(until));
        }
        #[cfg(shutdown_loom)]
        let looked = (self.mutant == Mutant::LookThenTake).then(|| self.half.lock().outstanding);
        let mut half = self.half.lock();
        // Relaxed, here and wherever the lock is held: it is only written under the lock.
        let word = self.word.load(Ordering::Relaxed);
        let until = self.until.load(Ordering::Relaxed);
        let taken = half.outstanding;
        #[cfg(shutdown_loom)]
        let taken = looked.unwrap_or(taken);
        match word & STATE {
            CLOSED => Ok(word),
            OPEN if at < until => Err(open(until)),
            OPEN => {
                let word = self.go(&mut half, State::HalfOpen);
                (half.outstanding, half.term) = (1, self.after_sleep(at));
                drop(half);
                self.say(State::HalfOpen, Count::default());
                Ok(word)
            }
            _ if taken < self.settings.probes => {
                (half.outstanding, half.term) = (half.outstanding + 1, self.after_sleep(at));
                Ok(word)
            }
            // All places are taken by calls that do not end. What they say later is of an earlier generation.
            _ if at >= half.term => {
                let word = word.wrapping_add(GENERATION);
                (half.outstanding, half.successes, half.term) = (1, 0, self.after_sleep(at));
                // Release: as in `go`.
                self.word.store(word, Ordering::Release);
                Ok(word)
            }
            _ => Err(Rejected { state: State::HalfOpen, retry_after: Duration::ZERO }),
        }
    }

    /// Where it stands. An open breaker whose time is over is half-open.
    pub fn state(&self, now: Instant) -> State {
        // Acquire: as in `admit`.
        let word = self.word.load(Ordering::Acquire);
        self.seen(word, self.at(now))
    }

    fn seen(&self, word: u64, at: u64) -> State {
        match word & STATE {
            CLOSED => State::Closed,
            OPEN if at < self.until.load(Ordering::Relaxed) => State::Open,
            _ => State::HalfOpen,
        }
    }

    /// One moment's numbers. It changes nothing.
    pub fn snapshot(&self, now: Instant) -> Snapshot {
        let at = self.at(now);
        let half = self.half.lock();
        let word = self.word.load(Ordering::Relaxed);
        let state = self.seen(word, at);
        let remaining = match state {
            State::Open => self.until.load(Ordering::Relaxed) - at,
            _ => 0,
        };
        let due = u64::from(word & STATE == OPEN && state == State::HalfOpen);
        let [closed, opened, half_opened] = half.changes;
        let Count { calls, failures } = self.window.sum(half.era, at);
        Snapshot {
            peer: self.key.as_ref().into(),
            state,
            remaining_open_ms: remaining.div_ceil(1_000_000),
            error_count: failures,
            total_count: calls,
            probes: half.outstanding,
            opened_total: opened,
            half_opened_total: half_opened + due,
            closed_total: closed,
        }
    }

    /// Brings back what a process before this one knew, unless this one knows better; whether it did. `remaining` is at
    /// most a sleep: see `Record::remaining`.
    pub(super) fn restore(&self, remaining: Duration, now: Instant) -> bool {
        let mut half = self.half.lock();
        if self.word.load(Ordering::Relaxed) != CLOSED || !self.window.is_untouched() {
            return false;
        }
        let changes = half.changes;
        if remaining.is_zero() {
            self.go(&mut half, State::HalfOpen);
        } else {
            self.open(&mut half, self.at(now), remaining);
        }
        // Nothing happened that a counter should count.
        half.changes = changes;
        true
    }

    /// Takes a result, or the lack of one.
    #[inline]
    fn settle(&self, word: u64, class: Class, now: Instant) {
        if word & STATE != CLOSED {
            return self.settle_probe(word, class, now);
        }
        match class {
            Class::Success => self.window.count(word / GENERATION, self.at(now), false),
            Class::Failure => self.failed(word, now),
            Class::Ignored => {}
        }
    }

    #[cold]
    fn failed(&self, word: u64, now: Instant) {
        // Relaxed: a look that spares the stragglers of an outage the sum and the lock; the one under the lock decides.
        if self.word.load(Ordering::Relaxed) != word {
            return;
        }
        let at = self.at(now);
        #[cfg(shutdown_loom)]
        let before = (self.mutant == Mutant::SumThenCount).then(|| self.window.sum(word / GENERATION, at));
        self.window.count(word / GENERATION, at, true);
        let count = self.window.sum(word / GENERATION, at);
        #[cfg(shutdown_loom)]
        let count = before.unwrap_or(count);
        let Settings { percent, volume, sleep, .. } = self.settings;
        if count.calls < volume.into() || count.failures * 100 < count.calls * u64::from(percent) {
            return;
        }
        let mut half = self.half.lock();
        let current = self.word.load(Ordering::Relaxed) == word;
        if current {
            self.open(&mut half, at, sleep);
            self.opened.fetch_add(1, Ordering::Relaxed);
            drop(half);
            self.say(State::Open, count);
        }
    }

    #[cold]
    fn settle_probe(&self, word: u64, class: Class, now: Instant) {
        let mut half = self.half.lock();
        let current = self.word.load(Ordering::Relaxed) == word;
        #[cfg(shutdown_loom)]
        let current = current || (self.mutant == Mutant::AnyGeneration && half.outstanding > 0);
        if !current {
            return;
        }
        half.outstanding -= 1;
        match class {
            Class::Ignored => {}
            Class::Success => {
                half.successes += 1;
                if half.successes == self.settings.probes {
                    let word = self.go(&mut half, State::Closed);
                    half.era = word / GENERATION;
                    drop(half);
                    self.say(State::Closed, Count::default());
                }
            }
            Class::Failure => {
                self.open(&mut half, self.at(now), self.settings.sleep);
                self.opened.fetch_add(1, Ordering::Relaxed);
                drop(half);
                self.say(State::Open, Count::default());
            }
        }
    }

    fn open(&self, half: &mut Half, at: u64, sleep: Duration) {
        // Relaxed: published by `go`. Never back, even if a result's clock was: see `probe`.
        let until = at.saturating_add(nanos(sleep)).max(self.until.load(Ordering::Relaxed));
        self.until.store(until, Ordering::Relaxed);
        self.go(half, State::Open);
    }

    fn after_sleep(&self, at: u64) -> u64 {
        at.saturating_add(nanos(self.settings.sleep))
    }

    /// Changes the state, under the lock; the new word.
    fn go(&self, half: &mut Half, to: State) -> u64 {
        let word =
            (self.word.load(Ordering::Relaxed) & !STATE).wrapping_add(GENERATION + u64::from(to.gauge()));
        (half.outstanding, half.successes) = (0, 0);
        half.changes[usize::from(to.gauge())] += 1;
        // Release: what was written before, to `admit`.
        self.word.store(word, Ordering::Release);
        word
    }

    /// Says a change in the log: after the lock, because a log may block.
    fn say(&self, to: State, count: Count) {
        let peer = &*self.key;
        match to {
            State::Open => tracing::warn!(
                peer,
                error_count = count.failures,
                total_count = count.calls,
                sleep = ?self.settings.sleep,
                "circuit open"
            ),
            State::HalfOpen => tracing::info!(peer, probes = self.settings.probes, "circuit half-open"),
            State::Closed => tracing::info!(peer, "circuit closed"),
        }
    }

    /// Nanoseconds from its birth, 0 before; 584 years are enough.
    #[inline]
    fn at(&self, now: Instant) -> u64 {
        let age = now.saturating_duration_since(self.born);
        age.as_secs().wrapping_mul(1_000_000_000).wrapping_add(u64::from(age.subsec_nanos()))
    }
}

fn nanos(sleep: Duration) -> u64 {
    u64::try_from(sleep.as_nanos()).expect("a day at most")
}

/// One moment of a [`Breaker`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Snapshot {
    /// Its key.
    pub peer: String,
    /// Where it stands.
    pub state: State,
    /// How long it stays open yet, rounded up; 0 if it is not open.
    pub remaining_open_ms: u64,
    /// Failures in the window. While it is not closed: what the window still holds of the time when it was.
    pub error_count: u64,
    /// Calls in the window, likewise.
    pub total_count: u64,
    /// Probes under way.
    pub probes: u32,
    /// How often it has opened.
    pub opened_total: u64,
    /// How often it has half-opened.
    pub half_opened_total: u64,
    /// How often it has closed again.
    pub closed_total: u64,
}

impl Snapshot {
    /// How often it has changed to `state`.
    pub fn changes(&self, state: State) -> u64 {
        match state {
            State::Closed => self.closed_total,
            State::Open => self.opened_total,
            State::HalfOpen => self.half_opened_total,
        }
    }
}

/// Leave to make one call, to be given back with its result.
///
/// Dropped without one it means what [`Dropped`] says; under [`Dropped::Failure`] that reads the clock.
#[must_use = "a permit that is dropped counts as the policy says, by default as no call"]
#[derive(Debug)]
pub struct Permit<B: Deref<Target = Breaker>> {
    breaker: B,
    word: u64,
}

/// A [`Permit`] that keeps its breaker alive.
pub type OwnedPermit = Permit<Arc<Breaker>>;

impl<B: Deref<Target = Breaker>> Permit<B> {
    /// The breaker that gave it.
    pub fn breaker(&self) -> &Breaker {
        &self.breaker
    }

    /// Whether this is one of the probes of a half-open breaker.
    pub fn is_probe(&self) -> bool {
        self.word & STATE == HALF_OPEN
    }

    /// The call ended at `now`, and well.
    #[inline]
    pub fn success(self, now: Instant) {
        self.settle(Class::Success, now);
    }

    /// The call ended at `now`, and not well.
    #[inline]
    pub fn failure(self, now: Instant) {
        self.settle(Class::Failure, now);
    }

    /// The call ended at `now`; what that means says the classifier.
    #[inline]
    pub fn record(self, call: Call, now: Instant) {
        let class = (self.breaker.settings.classify)(call);
        self.settle(class, now);
    }

    /// As if it had not been asked for, whatever the policy for drops.
    #[inline]
    pub fn release(mut self) {
        let word = std::mem::replace(&mut self.word, SETTLED);
        if word & STATE != CLOSED {
            // An ignored result has no time.
            self.breaker.settle_probe(word, Class::Ignored, self.breaker.born);
        }
    }

    #[inline]
    fn settle(mut self, class: Class, now: Instant) {
        let word = std::mem::replace(&mut self.word, SETTLED);
        self.breaker.settle(word, class, now);
    }
}

impl<B: Deref<Target = Breaker>> Drop for Permit<B> {
    #[inline]
    fn drop(&mut self) {
        if self.word == SETTLED {
            return;
        }
        match self.breaker.settings.dropped {
            Dropped::Release if self.word & STATE == CLOSED => {}
            Dropped::Release => self.breaker.settle_probe(self.word, Class::Ignored, self.breaker.born),
            Dropped::Failure => self.breaker.settle(self.word, Class::Failure, Instant::now()),
        }
    }
}
