//! What a node knew before it stopped is there after the restart, whatever happened in between.
//!
//! A [`StateStore`] holds one state: named [`Sections`], captured from [`StateSource`]s or set by the program, saved as
//! one [`Document`] through a [`StateBackend`]. What is written is described byte by byte in `docs/formats.md`.
//!
//! * A save replaces the state as a whole: written beside it, flushed, renamed over it, the directory flushed. The
//!   generation before it is kept.
//! * Opening believes nothing: checksums, sizes, owners and times are looked at; what cannot be used is set aside with
//!   the reason, and the generation before it is taken.
//! * The incarnation rises strictly from start to start, so that neighbours can tell this run from an earlier one.
//! * Sections and fields that this program does not know are kept as they are.
//!
//! Nothing here reads a clock but [`StateStore`].

mod backend;
mod directory;
mod document;
mod error;
mod legacy;
mod loaded;
mod sections;
mod source;
mod store;

pub use backend::{Generation, StateBackend};
pub use document::{Damage, Document, LARGEST, SCHEMA};
pub use error::StateError;
pub use loaded::{Fate, Found, Loaded, SetAside};
pub use sections::Sections;
pub use source::{Saved, StateSource};
pub use store::{INTERVAL, MAX_BYTES, StateStore};
