//! Whole requests through a real hyper server: what a shutdown adds to each of them, ours and its peers'.
//!
//! Client and server share one current-thread runtime and speak over an in-memory pipe, one request after another
//! on a connection that is kept. So nothing but processor time is measured, and the same work is done every time.
//!
//! * `connection`: its two ends, HTTP/1 and HTTP/2;
//! * `servers`: the candidates, a request layer and a connection watch each;
//! * `counting`, `watched`: the peers' layer, and the watch where a peer has none of its own.

mod connection;
mod counting;
mod servers;
mod watched;

use std::sync::Arc;

use tokio::runtime::{Builder, Runtime};

use crate::candidates::{Candidate, Loop};
pub(crate) use crate::serving::connection::Protocol;
use crate::serving::connection::connect;
use crate::serving::servers::{
    Bare, Drain, GracefulAndTracker, LeakedTracker, Ours, Server, TokenAndTracker, TokioGraceful,
};

/// What a candidate is to the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// No shutdown at all: what the others add is counted from here.
    Bare,
    Ours,
    Peer,
    /// Shown, but nobody's recipe.
    Reference,
    /// Bare once more: what it seems to add is the noise.
    Control,
}

/// One candidate under both protocols and in every mode.
pub(crate) struct Contender {
    /// The word for it on the command line.
    pub(crate) key: &'static str,
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    /// The loops that the harness drives.
    pub(crate) looped: fn(Protocol) -> Loop,
    /// Serves exactly so many requests.
    pub(crate) serve: fn(Protocol, u32),
}

impl Contender {
    const fn new<S: Server>(key: &'static str, name: &'static str, role: Role) -> Self {
        Self { key, name, role, looped: looped::<S>, serve: serve::<S> }
    }

    pub(crate) fn candidate(&self, protocol: Protocol) -> Candidate {
        Candidate { name: self.name, ours: self.role == Role::Ours, run: (self.looped)(protocol) }
    }
}

/// All of them; bare first, then ours.
pub(crate) const CONTENDERS: [Contender; 8] = [
    Contender::new::<Bare>("bare", "no shutdown (bare)", Role::Bare),
    Contender::new::<Ours>("ours", "ShutdownLayer + requests_done (ours)", Role::Ours),
    Contender::new::<GracefulAndTracker>(
        "hyper-util",
        "hyper-util GracefulShutdown + TaskTracker",
        Role::Peer,
    ),
    Contender::new::<TokenAndTracker>("token", "CancellationToken + TaskTracker", Role::Peer),
    Contender::new::<TokioGraceful>("tokio-graceful", "tokio-graceful", Role::Peer),
    Contender::new::<Drain>("drain", "drain", Role::Peer),
    Contender::new::<LeakedTracker>(
        "leaked",
        "hyper-util GracefulShutdown + a TaskTracker leaked by hand (for reference)",
        Role::Reference,
    ),
    Contender::new::<Bare>("again", "bare once more (the noise)", Role::Control),
];

/// Each call of the loop is a connection of its own, on the calling thread; all share one `S`.
fn looped<S: Server>(protocol: Protocol) -> Loop {
    let server = Arc::new(S::new());
    Box::new(move |drive| {
        let runtime = runtime();
        let mut client = runtime.block_on(connect(&*server, protocol));
        drive(&mut |batch| runtime.block_on(client.requests(batch)));
    })
}

fn serve<S: Server>(protocol: Protocol, requests: u32) {
    let server = S::new();
    let runtime = runtime();
    let mut client = runtime.block_on(connect(&server, protocol));
    runtime.block_on(client.requests(requests));
}

/// Without drivers: nothing here waits for a socket or a clock.
fn runtime() -> Runtime {
    Builder::new_current_thread().build().expect("a runtime without drivers needs nothing from the system")
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUESTS: u32 = 2_000;

    /// What so many requests allocate, without what happens once.
    fn allocations(role: Role, protocol: Protocol) -> u64 {
        let contender = CONTENDERS.iter().find(|contender| contender.role == role).expect("one of them");
        let count =
            |requests| allocation_counter::measure(|| (contender.serve)(protocol, requests)).count_total;
        // A thread's first request takes its shard.
        count(1);
        count(2 * REQUESTS) - count(REQUESTS)
    }

    #[test]
    fn the_layer_and_the_watch_add_no_allocation_to_a_request() {
        for protocol in [Protocol::Http1, Protocol::Http2] {
            let (bare, ours) = (allocations(Role::Bare, protocol), allocations(Role::Ours, protocol));
            println!("{}: {ours} allocations in {REQUESTS} requests, {bare} without us", protocol.name());
            // A run of the bare server itself differs from the next by one or two: buffers that last for many
            // requests. One allocation a request would be all of `REQUESTS`.
            assert!(ours.abs_diff(bare) < u64::from(REQUESTS) / 100, "{}", protocol.name());
            assert!(bare >= u64::from(REQUESTS), "hyper allocates; else this run counts nothing");
        }
    }
}
