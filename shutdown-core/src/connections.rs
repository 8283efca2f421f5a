//! Open connections: which of them the drain waits for, and which only carry sessions.
//!
//! A connection is counted by one of two trackers at any time, and changes over by being counted by the other one
//! first, so it is never counted by none:
//!
//! ```text
//!             first session registered
//!   awaited ──────────────────────────▶ kept        awaited: the drain waits for it and cuts it
//!           ◀──────────────────────────             kept: stage WebSockets does
//!             last session over, and the listeners still open
//! ```

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::num::NonZeroU64;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;

use crate::coordinator::Core;
use crate::error::ShuttingDown;
use crate::inflight::{Guard, Tracker};
use crate::latch::Wait;
use crate::sync::{default_shards, thread_index};

/// Every open connection.
pub(crate) struct Connections {
    /// Those the drain waits for.
    pub(crate) awaited: Tracker,
    /// Those that carry sessions.
    pub(crate) kept: Tracker,
    accepted: AtomicU64,
    /// By number; the number modulo the count of shards is the shard.
    open: Box<[Shard]>,
    numbers: AtomicU64,
}

type Shard = Mutex<HashMap<u64, Arc<Connection>>>;

/// One connection, as those see it who do not own it.
#[derive(Debug)]
pub(crate) struct Connection {
    carried: Mutex<Carried>,
    /// Whether it carries sessions, for a look without the lock.
    carries_sessions: AtomicBool,
    /// Whether bytes wait for the socket to take them, or the peer is being heard out.
    unsent: AtomicBool,
    /// Whether it is closed in two steps.
    hear_out: AtomicBool,
}

#[derive(Debug)]
struct Carried {
    sessions: usize,
    /// Which tracker counts it; `None` once it is closed.
    counted: Option<Guard>,
}

impl Connections {
    pub(crate) fn new() -> Self {
        Self {
            awaited: Tracker::new(),
            kept: Tracker::new(),
            accepted: AtomicU64::new(0),
            open: (0..default_shards()).map(|_| Mutex::default()).collect(),
            numbers: AtomicU64::new(0),
        }
    }

    fn start(&self) -> Result<(ConnectionId, Arc<Connection>), ShuttingDown> {
        let counted = self.awaited.start()?;
        self.accepted.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            carried: Mutex::new(Carried { sessions: 0, counted: Some(counted) }),
            carries_sessions: AtomicBool::new(false),
            unsent: AtomicBool::new(false),
            hear_out: AtomicBool::new(false),
        });
        // The shard is the thread's own, the number unique.
        let shards = self.open.len() as u64;
        let number = self.numbers.fetch_add(1, Ordering::Relaxed) * shards + thread_index() as u64 % shards;
        let id = ConnectionId(NonZeroU64::MIN.saturating_add(number));
        self.shard(id).lock().insert(id.0.get(), Arc::clone(&connection));
        Ok((id, connection))
    }

    fn shard(&self, id: ConnectionId) -> &Shard {
        let shards = self.open.len() as u64;
        &self.open[usize::try_from((id.0.get() - 1) % shards).expect("smaller than the count of shards")]
    }

    pub(crate) fn find(&self, id: ConnectionId) -> Option<Arc<Connection>> {
        self.shard(id).lock().get(&id.0.get()).cloned()
    }

    /// Open ones, kept or not; a moment's value.
    pub(crate) fn alive(&self) -> u64 {
        self.awaited.alive() + self.kept.alive()
    }

    /// Those kept for sessions that are over: their clients did not leave.
    pub(crate) fn left_behind(&self) -> u64 {
        let left = |connection: &&Arc<Connection>| {
            let carried = connection.carried.lock();
            connection.carries_sessions() && carried.sessions == 0 && carried.counted.is_some()
        };
        self.open.iter().map(|shard| shard.lock().values().filter(left).count() as u64).sum()
    }

    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Connection {
    /// Counts a session in that this connection carries.
    pub(crate) fn carry(&self, connections: &Connections) {
        let before = {
            let mut carried = self.carried.lock();
            carried.sessions += 1;
            if carried.sessions > 1 || carried.counted.is_none() {
                return;
            }
            // Refused only when the sessions' stage has ended: then it is cut with everything else.
            let Ok(kept) = connections.kept.start() else { return };
            // Release: pairs with the Acquire in `carries_sessions`; the connection is counted as kept by then.
            self.carries_sessions.store(true, Ordering::Release);
            carried.counted.replace(kept)
        };
        drop(before);
    }

    /// Counts a session out.
    pub(crate) fn let_go(&self, connections: &Connections) {
        let before = {
            let mut carried = self.carried.lock();
            carried.sessions -= 1;
            if carried.sessions > 0 || carried.counted.is_none() {
                return;
            }
            // Refused once the listeners are closed: it stays what it is until it closes.
            let Ok(awaited) = connections.awaited.start() else { return };
            // Release: pairs with the Acquire in `carries_sessions`; the connection is counted as awaited by then.
            self.carries_sessions.store(false, Ordering::Release);
            carried.counted.replace(awaited)
        };
        drop(before);
    }

    fn carries_sessions(&self) -> bool {
        // Acquire: pairs with the Releases in `carry` and `let_go`.
        self.carries_sessions.load(Ordering::Acquire)
    }
}

/// An open connection. While one that carries more than sessions is open, the drain is not over.
#[must_use = "the connection counts as closed when its guard is dropped"]
pub struct ConnectionGuard {
    handle: ConnectionHandle,
}

impl ConnectionGuard {
    pub(crate) fn start(core: &'static Core) -> Result<Self, ShuttingDown> {
        let (id, connection) = core.connections.start()?;
        Ok(Self { handle: ConnectionHandle { core, id, connection } })
    }

    /// Its number.
    pub fn id(&self) -> ConnectionId {
        self.handle.id
    }

    /// Looks at this connection from elsewhere.
    pub fn handle(&self) -> &ConnectionHandle {
        &self.handle
    }
}

impl fmt::Debug for ConnectionGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConnectionGuard").field(&self.id()).finish()
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let ConnectionHandle { core, id, connection } = &self.handle;
        core.connections.shard(*id).lock().remove(&id.0.get());
        let counted = connection.carried.lock().counted.take();
        drop(counted);
    }
}

/// A look at a connection whose [`ConnectionGuard`] is elsewhere, for example in an IO object that a server owns.
#[derive(Clone)]
pub struct ConnectionHandle {
    core: &'static Core,
    id: ConnectionId,
    connection: Arc<Connection>,
}

impl fmt::Debug for ConnectionHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConnectionHandle").field(&self.id).finish()
    }
}

impl ConnectionHandle {
    /// Its number.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// Resolves when this connection is to be cut: at the drain's deadline, or, while it carries sessions, at the end
    /// of stage WebSockets.
    pub fn cut(&self) -> Cut {
        Cut { handle: self.clone(), wait: self.core.cut.wait(), last: false }
    }

    /// Whether it carries sessions.
    pub fn carries_sessions(&self) -> bool {
        self.connection.carries_sessions()
    }

    /// Whether closing it now would lose something: bytes wait for the socket to take them, or our half has ended and
    /// the peer is being heard out.
    pub fn has_unsent(&self) -> bool {
        self.connection.unsent.load(Ordering::Relaxed)
    }

    /// Has the IO object close in two steps from now on, or not: see [`Io`](crate::net::Io). For protocols that read
    /// nothing after they have ended their half; not for a tunnel.
    pub fn hear_out(&self, hear_out: bool) {
        self.connection.hear_out.store(hear_out, Ordering::Relaxed);
    }

    #[cfg(feature = "net")]
    pub(crate) fn hears_out(&self) -> bool {
        self.connection.hear_out.load(Ordering::Relaxed)
    }

    #[cfg(feature = "net")]
    pub(crate) fn set_unsent(&self, unsent: bool) {
        self.connection.unsent.store(unsent, Ordering::Relaxed);
    }
}

/// Resolves when a connection is to be cut; made by [`ConnectionHandle::cut`].
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct Cut {
    handle: ConnectionHandle,
    wait: Wait<'static>,
    /// The wait is for the end of the sessions' stage, after which nothing is kept.
    last: bool,
}

impl Future for Cut {
    type Output = ();

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        loop {
            ready!(Pin::new(&mut this.wait).poll(cx));
            if this.last || !this.handle.carries_sessions() {
                return Poll::Ready(());
            }
            this.wait = this.handle.core.sessions.cut.wait();
            this.last = true;
        }
    }
}

/// The number of a connection; no other connection of the process ever has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionId(NonZeroU64);

thread_local! {
    /// The task and the connection that were polled last on this thread.
    static POLLED: Cell<Option<(tokio::task::Id, ConnectionId)>> = const { Cell::new(None) };
}

impl ConnectionId {
    /// The connection that the current task polled last.
    ///
    /// In the `call` of a service this is the connection that the request came over: servers poll a connection and
    /// call the service in one task. `None` where a request has been handed to another task first, as the stock
    /// servers of HTTP/2 do.
    #[inline]
    pub fn of_this_task() -> Option<Self> {
        let (task, id) = POLLED.with(Cell::get)?;
        (tokio::task::try_id() == Some(task)).then_some(id)
    }

    /// Notes that the current task works for this connection, until it or another task of this thread says otherwise.
    ///
    /// For servers that answer the requests of one connection in tasks of their own, as HTTP/2 does: call it before
    /// each poll of an answer. IO objects of [`net`](crate::net) do so by themselves.
    #[inline]
    pub fn polled(self) {
        POLLED.with(|polled| polled.set(tokio::task::try_id().map(|task| (task, self))));
    }
}
