//! Where clients connect: a table of instances, taken in turn.
//!
//! The rule it keeps: it knows nothing but what it is told. An instance that is leaving stays in the table until it is
//! removed, as it does in a balancer that polls.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, RwLock};
use std::time::Duration;

use tokio::time::Instant;

use crate::PATIENCE;

/// One process that serves, as its clients know it.
#[derive(Debug)]
pub struct Instance {
    /// Where it serves.
    pub addr: SocketAddr,
    told: OnceLock<Instant>,
    sockets: Mutex<Sockets>,
    changed: Condvar,
}

/// Its WebSockets.
#[derive(Debug, Default)]
struct Sockets {
    open: usize,
    cut: usize,
}

impl Instance {
    /// One that serves at `addr`.
    pub fn new(addr: SocketAddr) -> Arc<Self> {
        Arc::new(Self { addr, told: OnceLock::new(), sockets: Mutex::default(), changed: Condvar::new() })
    }

    /// Notes that it is told to stop, now.
    pub fn tell(&self) {
        let _ = self.told.set(Instant::now());
    }

    /// How long ago it was told to stop.
    pub fn told_ago(&self) -> Option<Duration> {
        self.told.get().map(Instant::elapsed)
    }

    /// Counts a WebSocket until the guard is dropped.
    pub fn socket(self: &Arc<Self>) -> Socket {
        self.sockets.lock().expect("nobody panics with it").open += 1;
        Socket(Arc::clone(self))
    }

    /// How many WebSockets it has cut. Waits until every client has noticed.
    ///
    /// # Panics
    ///
    /// If a client has not noticed after a minute.
    pub fn sockets_cut(&self) -> usize {
        let sockets = self.sockets.lock().expect("nobody panics with it");
        let (sockets, late) = self
            .changed
            .wait_timeout_while(sockets, PATIENCE, |sockets| sockets.open > 0)
            .expect("nobody panics with it");
        assert!(!late.timed_out(), "{sockets:?} after the process has ended");
        sockets.cut
    }
}

/// A WebSocket that is open.
#[derive(Debug)]
pub struct Socket(Arc<Instance>);

impl Socket {
    /// It was cut by its server.
    pub fn cut(self) {
        self.0.sockets.lock().expect("nobody panics with it").cut += 1;
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.0.sockets.lock().expect("nobody panics with it").open -= 1;
        self.0.changed.notify_all();
    }
}

/// Round robin.
#[derive(Debug, Default)]
pub struct Balancer {
    table: RwLock<Vec<Arc<Instance>>>,
    turn: AtomicUsize,
}

impl Balancer {
    /// Clients may connect to it from now on.
    pub fn add(&self, instance: Arc<Instance>) {
        self.table.write().expect("nobody panics with it").push(instance);
    }

    /// No client connects to it from now on.
    pub fn remove(&self, instance: &Arc<Instance>) {
        self.table.write().expect("nobody panics with it").retain(|other| !Arc::ptr_eq(other, instance));
    }

    /// The next in turn.
    ///
    /// # Panics
    ///
    /// If the table is empty.
    pub fn pick(&self) -> Arc<Instance> {
        let table = self.table.read().expect("nobody panics with it");
        Arc::clone(&table[self.turn.fetch_add(1, Ordering::Relaxed) % table.len()])
    }
}
