//! The clients: seven groups that ask until they are told to stop, and never repeat a request.
//!
//! The rule they keep: a connection that ends in the client's face is a loss, even if the request had not been sent.
//! A real client's pool may hide that one; another's may not.

mod http1;
mod http2;
mod websocket;

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::rig::balancer::{Balancer, Instance};
use crate::rig::servers::Kind;
use crate::rig::tally::{Failed, Loss, Tallies};

/// How many of each.
const FRESH: u64 = 8;
const BUSY: u64 = 24;
const IDLE: u64 = 16;
/// Connections, each with [`http2::STREAMS`].
const HTTP2: u64 = 3;
const WEBSOCKETS: u64 = 6;
const UPLOADS: u64 = 4;
const DOWNLOADS: u64 = 2;

/// No answer for so long is none.
const PATIENCE: Duration = Duration::from_secs(15);

/// What all clients share.
pub struct World {
    /// Where to connect.
    pub balancer: Balancer,
    /// What was seen.
    pub tallies: Tallies,
    kind: Kind,
    lame_duck: Duration,
    stop: watch::Sender<bool>,
}

impl World {
    /// Clients of servers of this kind, which serve this long after they are told.
    pub fn new(kind: Kind, lame_duck: Duration) -> Arc<Self> {
        Arc::new(Self {
            balancer: Balancer::default(),
            tallies: Tallies::default(),
            kind,
            lame_duck,
            stop: watch::Sender::new(false),
        })
    }

    /// Starts all of them in the current runtime.
    pub fn spawn(self: &Arc<Self>) -> Vec<JoinHandle<()>> {
        fn all<F: Future<Output = ()> + Send + 'static>(
            clients: &mut Vec<JoinHandle<()>>,
            count: u64,
            client: impl Fn(Dice) -> F,
        ) {
            for _ in 0..count {
                let seed = clients.len() as u64 + 1;
                clients.push(tokio::spawn(client(Dice::new(seed))));
            }
        }
        let world = || Arc::clone(self);
        let mut clients = Vec::new();
        all(&mut clients, FRESH, |dice| http1::fresh(world(), dice));
        all(&mut clients, BUSY, |dice| http1::busy(world(), dice));
        all(&mut clients, IDLE, |dice| http1::idle(world(), dice));
        all(&mut clients, UPLOADS, |dice| http1::upload(world(), dice));
        all(&mut clients, DOWNLOADS, |dice| http1::download(world(), dice));
        all(&mut clients, HTTP2, |dice| http2::connection(world(), dice));
        all(&mut clients, WEBSOCKETS, |dice| websocket::socket(world(), dice));
        clients
    }

    /// Tells them that what they have begun is their last.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until they are told so.
    async fn stopped(&self) {
        // The sender lives in `self`.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// A client's pause. Whether it goes on.
    async fn think(&self, time: Duration) -> bool {
        if time.is_zero() {
            return !*self.stop.borrow();
        }
        tokio::select! {
            () = self.stopped() => false,
            () = tokio::time::sleep(time) => true,
        }
    }

    /// A connection to the next instance in turn.
    async fn connect(&self, receive_buffer: Option<u32>) -> Result<(TcpStream, Arc<Instance>), Failed> {
        let instance = self.balancer.pick();
        let connect = async {
            let socket = TcpSocket::new_v4()?;
            if let Some(size) = receive_buffer {
                socket.set_recv_buffer_size(size)?;
            }
            let stream = socket.connect(instance.addr).await?;
            stream.set_nodelay(true)?;
            Ok::<_, std::io::Error>(stream)
        };
        let stream = in_time("connect", connect).await?.map_err(|error| Failed::by("connect", &error))?;
        Ok((stream, instance))
    }
}

/// What `work` gives, unless it takes too long.
async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> Result<T, Failed> {
    tokio::time::timeout(PATIENCE, work)
        .await
        .map_err(|_| Failed::new(Loss::Timeout, format!("{what}: nothing for {PATIENCE:?}")))
}

/// A client's own source of chance: the same numbers in every run.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// Marsaglia's xorshift.
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Milliseconds in this range.
    fn ms(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(range.start + self.roll() % (range.end - range.start))
    }
}
