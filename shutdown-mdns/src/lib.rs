//! Advertises a service over Multicast DNS, withdraws it with a goodbye that was seen to leave, and discovers others.
//!
//! A service that stops tells its neighbours first: with the goodbye of RFC 6762 §10.1 they drop it within a second or at
//! once, instead of sending it requests until its records are too old – 75 minutes for the pointer to it. On
//! [mdns-sd](mdns_sd), whose daemon registers, probes, announces, answers and browses.
//!
//! ```no_run
//! use shutdown_core::peers::Incarnation;
//! use shutdown_core::{ShutdownCoordinator, Signals, Stage};
//! use shutdown_mdns::{Advertisement, Event, Mdns};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let signals = Signals::claim()?;
//!     let mdns = Mdns::start(Advertisement {
//!         service_type: "_edge._tcp.local.".to_owned(),
//!         node_id: "edge-1".to_owned(),
//!         port: 8080,
//!         interfaces: vec!["eth0".to_owned()],
//!         cluster: "default".to_owned(),
//!         incarnation: Incarnation::new(1_795_273_877_139),
//!         version: env!("CARGO_PKG_VERSION").to_owned(),
//!         notice_port: None,
//!     })?;
//!     mdns.browse(|event| match event {
//!         Event::Found(peer) => println!("{} is at {:?}", peer.node_id, peer.addresses),
//!         Event::Gone { node_id, .. } => println!("{node_id} has left"),
//!         other => println!("{other:?}"),
//!     });
//!     let shutdown = ShutdownCoordinator::builder()
//!         .signals(signals)
//!         .stage_task(Stage::Departure, "mdns", move |stage| async move { mdns.withdraw(stage).await })
//!         .install()?;
//!     shutdown.wait().exit()
//! }
//! ```
//!
//! # What it promises
//!
//! * Nothing is sent on an interface that was not named. (mdns-sd joins the multicast group on every interface when it
//!   starts, so membership reports do leave; mDNS messages do not.)
//! * The addresses are the interface's own, whatever address the service listens on; they follow the interface.
//! * The host's name is unique to the start, so a goodbye for its addresses takes nobody else's.
//! * The goodbye goes out at the start of the shutdown, on each interface over each family on which the announcement was
//!   seen, and nowhere else. The report says for each whether it was observed, by a socket of our own, and after how long.
//!   It is said again 1.1 and 2.5 seconds later if the process still lives: the shutdown never waits for that.
//! * Who was never announced says no goodbye: it would take back another's records.
//! * Only nodes of our cluster are discovered. The goodbye of one that was found is passed on when it is heard, not a second
//!   later; one for anybody else, or of an earlier run, is not.
//! * When somebody else says goodbye for us, we announce ourselves again, with a higher incarnation: higher, too, than what
//!   was said in our name, if others may believe that ([`WINDOW`](shutdown_core::peers::WINDOW)).
//!
//! # What it does not
//!
//! * It does not know whether anybody heard: mDNS has no acknowledgement. Peers that must know get a notice.
//! * A process that is killed says nothing, and [`Mdns`] that is dropped neither.
//! * It does not authenticate: whoever is on the link can say anything for anybody, and a goodbye for a node that was found is
//!   believed. Neither does mDNS. A false announcement in our name is contradicted with the next rescue only.
//! * It does not cross routers, nor most container networks.
//! * Two interfaces on one link see each other as two hosts, one of which is renamed: name one of them.

mod advertisement;
mod browse;
mod discovery;
mod engine;
mod error;
mod interface;
mod link;
mod mdns;
pub mod wire;
mod withdrawal;

pub use advertisement::Advertisement;
pub use discovery::{Event, Found};
pub use error::Error;
pub use link::Family;
pub use mdns::{Mdns, State, Status};
pub use withdrawal::{Departed, Outcome};
