//! Sessions: WebSockets and other long streams, which are asked to end rather than waited for.
//!
//! Registering a session takes its request, and its connection while that carries nothing else, out of the drain's
//! count; the session is counted first. Sessions are told to end from the lame duck on, spread over a window so that
//! their clients do not all come to the neighbours at once; stage WebSockets waits for them and cuts the rest.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use crate::connections::{Connection, ConnectionId};
use crate::coordinator::Core;
use crate::error::ShuttingDown;
use crate::inflight::{NamedRequestGuard, Registry, Tracker};
use crate::latch::{Latch, Wait};
use crate::random::fraction;

/// However wide the window, sessions are told at least this often: 200 a second.
const SLOWEST: Duration = Duration::from_millis(5);

/// Every session.
pub(crate) struct Sessions {
    pub(crate) tracker: Tracker,
    pub(crate) names: Registry,
    /// The sessions' stage is over: what is left is cut.
    pub(crate) cut: Latch,
    /// Somebody hurries: all are told at once.
    pub(crate) hurried: Latch,
    pace: OnceLock<Pace>,
    turns: AtomicU64,
    told: AtomicU64,
}

/// Who is told when.
#[derive(Clone, Copy, Debug)]
struct Pace {
    start: Instant,
    window: Duration,
    /// From one session to the next.
    interval: Duration,
    seed: u64,
}

impl Pace {
    fn new(start: Instant, sessions: u64, window: Duration, seed: u64) -> Self {
        let even = window / u32::try_from(sessions.max(1)).unwrap_or(u32::MAX);
        Self { start, window, interval: even.min(SLOWEST), seed }
    }

    /// When the session with this turn is told: in its slot of the window, at a random place in the slot. Those that
    /// came after the window was cut into slots are told at its end at the latest.
    fn at(&self, turn: u64) -> Instant {
        let slot = self.interval.as_secs_f64() * (turn as f64 + fraction(turn ^ self.seed));
        self.start + Duration::try_from_secs_f64(slot).unwrap_or(Duration::MAX).min(self.window)
    }
}

impl Sessions {
    pub(crate) fn new() -> Self {
        Self {
            tracker: Tracker::new(),
            names: Registry::new(),
            cut: Latch::new(),
            hurried: Latch::new(),
            pace: OnceLock::new(),
            turns: AtomicU64::new(0),
            told: AtomicU64::new(0),
        }
    }

    /// Cuts the window into slots, one for each session alive. Before anybody hears that it is time to leave.
    pub(crate) fn pace(&self, now: Instant, window: Duration) {
        let pace = Pace::new(now, self.tracker.alive(), window, u64::from(std::process::id()));
        let _ = self.pace.set(pace);
    }

    fn next_turn(&self) -> Instant {
        let turn = self.turns.fetch_add(1, Ordering::Relaxed);
        self.pace.get().map_or_else(Instant::now, |pace| pace.at(turn))
    }

    /// How many have been told.
    pub(crate) fn told(&self) -> u64 {
        self.told.load(Ordering::Relaxed)
    }
}

/// A WebSocket or another long stream, until its last clone is dropped.
///
/// The drain neither waits for it nor cuts it: it is told to end ([`told`](Self::told)) from the lame duck on, has
/// until the end of stage WebSockets, and is then cut and named in the report.
///
/// ```
/// # async fn example(shutdown: shutdown_core::ShutdownCoordinator) -> Result<(), shutdown_core::ShuttingDown> {
/// let session = shutdown.session_start("feed")?;
/// loop {
///     tokio::select! {
///         () = session.told() => break, // say goodbye
///         () = std::future::pending() => {} // serve
///     }
/// }
/// # Ok(())
/// # }
/// ```
///
/// Adapters do the rest: `shutdown-tower` finds the connection that carries a session, and ends WebSockets and streams.
#[derive(Clone)]
#[must_use = "the session is over when its last clone is dropped"]
pub struct Session(Arc<Registered>);

struct Registered {
    core: &'static Core,
    name: Cow<'static, str>,
    turn: OnceLock<Instant>,
    told: AtomicBool,
    connection: OnceLock<Arc<Connection>>,
    _guard: NamedRequestGuard,
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.get() {
            connection.let_go(&self.core.connections);
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Session").field(&self.0.name).finish()
    }
}

impl Session {
    pub(crate) fn start(core: &'static Core, name: Cow<'static, str>) -> Result<Self, ShuttingDown> {
        let guard = core.sessions.tracker.start()?;
        let guard = core.sessions.names.enter(guard, name.clone(), Instant::now());
        Ok(Self(Arc::new(Registered {
            core,
            name,
            turn: OnceLock::new(),
            told: AtomicBool::new(false),
            connection: OnceLock::new(),
            _guard: guard,
        })))
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Says which connection carries it; `false` if that has closed. Only the first call does anything; for adapters.
    pub fn carried_by(&self, connection: ConnectionId) -> bool {
        let connections = &self.0.core.connections;
        let Some(found) = connections.find(connection) else { return false };
        let mut first = false;
        let carrier = self.0.connection.get_or_init(|| {
            first = true;
            found
        });
        if first {
            carrier.carry(connections);
        }
        true
    }

    /// Resolves when it is this session's turn to end: in its slot of the window that opens with the lame duck, or
    /// at once when the shutdown hurries. Every call resolves at the same moment; a later one at once.
    pub fn told(&self) -> Told {
        Told { wait: Waiting::Leaving(self.0.core.leaving.wait()), session: self.clone() }
    }

    /// Resolves when there is no time left to be polite in: a second signal has come, or half of stage WebSockets has
    /// passed. Everybody is told by then.
    pub fn hurried(&self) -> Wait<'static> {
        self.0.core.sessions.hurried.wait()
    }

    /// Resolves when the time of stage WebSockets is over: its connection fails now.
    pub fn cut(&self) -> Wait<'static> {
        self.0.core.sessions.cut.wait()
    }
}

/// Resolves when it is a session's turn to end; made by [`Session::told`]. Holds the session.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct Told {
    session: Session,
    wait: Waiting,
}

#[derive(Debug)]
enum Waiting {
    Leaving(Wait<'static>),
    Turn(Pin<Box<Sleep>>, Wait<'static>),
    Over,
}

impl Told {
    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }
}

impl Future for Told {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let Registered { core, turn, told, .. } = &*this.session.0;
        let sessions = &core.sessions;
        loop {
            match &mut this.wait {
                Waiting::Leaving(leaving) => {
                    ready!(Pin::new(leaving).poll(cx));
                    let turn = *turn.get_or_init(|| sessions.next_turn());
                    this.wait = Waiting::Turn(Box::pin(sleep_until(turn)), sessions.hurried.wait());
                }
                Waiting::Turn(sleep, hurried) => {
                    if Pin::new(hurried).poll(cx).is_pending() {
                        ready!(sleep.as_mut().poll(cx));
                    }
                    if !told.swap(true, Ordering::Relaxed) {
                        sessions.told.fetch_add(1, Ordering::Relaxed);
                    }
                    this.wait = Waiting::Over;
                }
                Waiting::Over => return Poll::Ready(()),
            }
        }
    }
}

#[cfg(all(test, not(shutdown_loom)))]
mod tests {
    use super::*;

    #[test]
    fn turns_fill_the_window_evenly_and_never_outlast_it() {
        let start = Instant::now();
        let window = Duration::from_secs(3);
        let pace = Pace::new(start, 10_000, window, 7);
        let mut slots = [0_u32; 30];
        for turn in 0..10_000 {
            let after = pace.at(turn) - start;
            assert!(after <= window);
            slots[usize::try_from(after.as_millis() / 100).unwrap().min(29)] += 1;
        }
        assert!(slots.iter().all(|slot| (320..=346).contains(slot)), "{slots:?}");
        assert!(pace.at(1_000_000) - start <= window);
    }

    #[test]
    fn few_sessions_are_told_at_the_floors_pace_and_not_over_the_whole_window() {
        let start = Instant::now();
        let pace = Pace::new(start, 3, Duration::from_secs(60), 7);
        assert!(pace.at(2) - start <= 3 * SLOWEST);
        // None at all is no division by zero.
        assert!(Pace::new(start, 0, Duration::ZERO, 7).at(0) <= start + SLOWEST);
    }
}
