//! Circuit breakers: whoever fails is left alone for a while, then asked by a few probes whether it is well again.
//!
//! One [`Breaker`] a key – an upstream, a database – from a registry, [`Breakers`]. A call takes a [`Permit`] and gives
//! it back with its result; a permit that is dropped without one, because the client left, counts as nothing.
//!
//! ```
//! use shutdown_core::breaker::{Breakers, Call, Config, State};
//! use tokio::time::Instant;
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config: Config = "percent=50,volume=2,sleep=5s,probes=1".parse()?;
//! let breakers = Breakers::new(config, Instant::now());
//! // Kept beside what it guards: looking it up again costs a lock.
//! let orders = breakers.get("http://orders:8080");
//!
//! for _ in 0..2 {
//!     let permit = orders.try_acquire(Instant::now())?;
//!     permit.record(Call::Status(503), Instant::now());
//! }
//! let rejected = orders.try_acquire(Instant::now()).unwrap_err();
//! assert_eq!((rejected.state, rejected.retry_after.as_secs()), (State::Open, 5));
//!
//! tokio::time::sleep(rejected.retry_after).await;
//! let probe = orders.try_acquire(Instant::now())?;
//! assert!(orders.try_acquire(Instant::now()).is_err(), "one probe at a time");
//! probe.record(Call::Status(200), Instant::now());
//! assert_eq!(orders.state(Instant::now()), State::Closed);
//! # Ok(())
//! # }
//! ```
//!
//! | state | who is admitted | it ends when |
//! |---|---|---|
//! | closed | everybody | of at least `volume` calls in the window `percent` have failed; looked at with each failure |
//! | open | nobody | `sleep` is over |
//! | half-open | `probes` at a time; and when none of them has ended a `sleep` after the last began, as many again | as many have succeeded: closed. One has failed: open again, for a whole `sleep` |
//!
//! * The window slides in fifteenths: a call counts for the window's length, and up to a fifteenth longer.
//! * The end of a sleep needs no timer: whoever looks after it sees half-open.
//! * A permit of an earlier state changes nothing of the present one: an answer that comes after the breaker opened
//!   closes nothing, a probe from before the last opening gives no place back.
//! * Time is an argument. Only the drop of a permit under [`Dropped::Failure`] reads the clock.
//! * While closed, a call costs one load, and with its success one compare-and-swap in a shard of its thread: no lock,
//!   no allocation, no reference count ([`OwnedPermit`] costs that of its `Arc`). A failure adds up all shards.
//!
//! Parts: [`Config`] and its text form; [`Call`] and what it means; [`Breaker`], [`Permit`]; the window; [`Breakers`];
//! [`Record`], which outlives the process.

mod call;
mod circuit;
mod config;
mod record;
mod registry;
mod window;

pub use call::{Call, Class};
#[cfg(all(test, shutdown_loom))]
pub(crate) use circuit::Mutant;
pub use circuit::{Breaker, OwnedPermit, Permit, Rejected, Snapshot, State};
pub use config::{Config, ConfigError, Dropped, Settings};
pub use record::Record;
pub use registry::Breakers;
