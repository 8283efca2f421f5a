//! Any Pingora proxy under `shutdown-core`: drained, refused and cut by the plan, not by sleeps.
//!
//! Pingora's `Server` wants to own the process: its grace is an unconditional sleep, its second timeout cuts
//! requests, later signals are swallowed. Here the coordinator owns it, and Pingora is what it is best at: the
//! engine. [`Proxy`] runs that engine on our socket, accept loop and IO object.
//!
//! ```no_run
//! use async_trait::async_trait;
//! use pingora_core::Result;
//! use pingora_core::upstreams::peer::HttpPeer;
//! use pingora_proxy::{ProxyHttp, Session};
//! use shutdown_core::{ShutdownCoordinator, Signals};
//! use shutdown_pingora::Proxy;
//!
//! struct Edge;
//!
//! #[async_trait]
//! impl ProxyHttp for Edge {
//!     type CTX = ();
//!     fn new_ctx(&self) {}
//!     async fn upstream_peer(&self, _: &mut Session, _: &mut ()) -> Result<Box<HttpPeer>> {
//!         Ok(Box::new(HttpPeer::new("127.0.0.1:9000", false, String::new())))
//!     }
//! }
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let signals = Signals::claim()?;
//!     let listener = shutdown_core::net::bind("127.0.0.1:8080".parse()?)?;
//!     let runtime = tokio::runtime::Runtime::new()?;
//!     let shutdown =
//!         ShutdownCoordinator::builder().signals(signals).runtime(runtime.handle().clone()).install()?;
//!     runtime.spawn(Proxy::new(Edge, shutdown).serve(listener));
//!     shutdown.wait().exit()
//! }
//! ```
//!
//! # What it promises
//!
//! * A request is in flight from its head to the end of its answer: the guard lives in `CTX`, which Pingora drops
//!   after `logging` and after the last write ([`Coordinated`]).
//! * A connection is counted from `accept` to its last byte ([`Connection`]); whatever state its protocol is in,
//!   it ends at the drain's deadline.
//! * From LameDuck on HTTP/1 answers carry `Connection: close`, and HTTP/2 connections get a GOAWAY. An idle
//!   connection that sends a request is answered until the end of the linger, after it with 503; then it is closed.
//!   So is an HTTP/2 connection whose client leaves our PING unanswered for a second.
//!
//! # What it does not
//!
//! * It says nothing into a tunnel. An upgraded HTTP/1 connection (WebSocket) or a CONNECT is a session: the drain
//!   neither waits for it nor cuts it, stage WebSockets cuts it. A polite 1001 must come from the upstream.
//! * A long stream that is no tunnel – server-sent events, a streaming RPC – is a request: only its upstream knows how to
//!   end it.
//! * It does not answer pipelined requests: Pingora closes after the first.
//! * A request that is cut at the deadline never reaches `logging`: its future is dropped. The report names it.
//! * It does not terminate TLS. HTTP/3 is not covered.
//!
//! Programs that must keep Pingora's `Server` take [`WhenDrained`]; its limits are on its page. Pingora's
//! background services run under the coordinator with [`run_background`].

mod background;
mod connection;
mod coordinated;
mod proxy;
#[cfg(test)]
mod tests;
mod when_drained;

pub use background::run_background;
pub use connection::Connection;
pub use coordinated::{Coordinated, InFlight};
pub use proxy::Proxy;
pub use when_drained::WhenDrained;
