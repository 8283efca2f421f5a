//! The neighbours: who they are, which of them may be sent requests, and what nodes tell one another when they leave.
//!
//! A node that stops says so itself, to every peer, by an authenticated datagram that is repeated until it is acknowledged
//! ([`notice`]); peers stop sending it new requests within milliseconds, and what is under way goes on. The
//! [`PeerRegistry`] brings together what notices, discovery, the configuration and the state of an earlier run say.
//!
//! There is no gossip: who is to hear a node must be configured, or found by discovery. There is no failure detector either:
//! a node that dies without a word is a circuit breaker's affair.
//!
//! ```
//! use shutdown_core::peers::notice::{Keys, Kind, Notice};
//! use shutdown_core::peers::{Effect, Id, PeerRegistry, PeerState};
//!
//! let peers = PeerRegistry::new(Id::of("edge-2"));
//! peers.configure("10.0.0.1:8443".parse()?);
//! assert!(peers.peers(1_000)[0].routable);
//!
//! let notice = Notice {
//!     kind: Kind::Leaving,
//!     ack_wanted: true,
//!     restarting: false,
//!     why: Default::default(),
//!     attempt: 0,
//!     incarnation: 500,
//!     seq: 1,
//!     sent_at: 1_000,
//!     drain_ms: 28_000,
//!     node: Id::of("edge-1"),
//!     cluster: Id::of("default"),
//!     endpoints: vec!["10.0.0.1:8443".parse()?],
//! };
//! assert_eq!(peers.heard(&notice, 1_000), Effect::Departed);
//! let peer = &peers.peers(2_000)[0];
//! assert_eq!((peer.state, peer.routable), (PeerState::Draining, false));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod id;
pub mod notice;
mod record;
mod registry;

pub use id::{Id, Incarnation};
pub use record::PeerRecord;
pub use registry::{
    DRAIN_CAP, Effect, FORGET, MASS_PERCENT, MASS_WINDOW, MOST_PEERS, Peer, PeerRegistry, PeerState,
    Sighting, WINDOW,
};
