//! What the cross-crate tests share: real processes with deadlines, and plain clients.
//!
//! Every process started here is ended by its own number when its handle is dropped. Nothing that runs already is
//! used or touched.

pub mod backend;
pub mod browser;
pub mod client;
pub mod companions;
pub mod corpus;
pub mod h2raw;
pub mod judges;
pub mod manager;
pub mod mdns_wire;
pub mod mesh;
pub mod netns;
pub mod pg_clients;
pub mod pgbctl;
pub mod process;
pub mod rig;
pub mod saved;
pub mod servers;
pub mod states;
pub mod strace;

use std::time::Duration;

/// Whether the full counts are wanted (`tests/run --long`).
pub fn is_long() -> bool {
    std::env::var_os("SHUTDOWN_TESTS_LONG").is_some()
}

/// A count: the whole in a long run, a tenth else.
pub fn count(long: usize) -> usize {
    if is_long() { long } else { long.div_ceil(10) }
}

/// How long anything may take that has no deadline of its own.
pub const PATIENCE: Duration = Duration::from_secs(60);
