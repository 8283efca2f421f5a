//! Notices: a datagram by which a node says that it leaves, or is back, and its acknowledgement.
//!
//! The format `SDPN` version 1 is described byte by byte in `docs/formats.md`. Every datagram ends in an HMAC-SHA256 under a
//! key of the cluster; a receiver acts on nothing else and is silent otherwise. A node is heard once for each thing it says,
//! however often it is repeated or replayed: by its incarnation, the number of the notice, and the time it was sent at.
//!
//! | to | take |
//! |---|---|
//! | tell peers | [`Sender::leave`] as a task of stage Departure, [`Sender::announce_return`] at the start |
//! | hear them | [`bind`], [`Receiver`] |
//! | do either without a socket and a clock | [`Outbox`], [`Inbox`] |
//!
//! Both take an [`Identity`], which takes the incarnation: what a notice needs cannot be forgotten.
//!
//! Clocks of nodes may differ by [`WINDOW`](super::WINDOW) at most. Whoever has a key of the cluster can speak for any node
//! of it.

mod identity;
mod inbox;
mod keys;
#[cfg(feature = "peers-legacy")]
pub mod legacy;
mod outbox;
mod receiver;
mod sender;
mod wire;

pub use identity::{Identity, NoticeCounts};
pub use inbox::{Heard, Inbox};
pub use keys::{Keys, KeysError};
pub use outbox::{Letter, Outbox, ROUNDS, Recipient};
pub use receiver::{Bound, Receiver, bind};
pub use sender::{Sender, Told};
pub use wire::{
    ACK_BYTES, Ack, Datagram, Kind, MAGIC, MOST_BYTES, MOST_ENDPOINTS, NOTICE_BYTES, Notice, Refusal,
    VERSION, Why,
};
