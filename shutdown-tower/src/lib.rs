//! `shutdown-core` for tower, axum, hyper and tonic: requests are counted to their last byte, refused when it is too
//! late, and asked to leave in time; long streams are told to end.
//!
//! ```no_run
//! use std::{convert::Infallible, process::ExitCode};
//!
//! use axum::{Router, routing::get};
//! use shutdown_core::{ShutdownConfig, ShutdownCoordinator, Signals, start_failure};
//! use shutdown_tower::{Server, ShutdownLayer};
//! use tokio::net::TcpListener;
//!
//! #[tokio::main]
//! async fn main() -> ExitCode {
//!     let Err(error) = run().await;
//!     start_failure("hello", &*error) // one sentence, and 2 when the configuration is at fault
//! }
//!
//! async fn run() -> Result<Infallible, Box<dyn std::error::Error>> {
//!     let signals = Signals::claim()?; // first: a signal before the service stands leaves at once
//!     let shutdown = ShutdownCoordinator::builder()
//!         .signals(signals)
//!         .config(ShutdownConfig::from_env()?) // SHUTDOWN_TOTAL_TIMEOUT and its like
//!         .install()?;
//!
//!     let app = Router::new().route("/", get(|| async { "hello\n" })).layer(ShutdownLayer::new(shutdown));
//!     let listener = TcpListener::bind("127.0.0.1:3000").await?;
//!     // Not awaited: it returns when the listener has closed, and the shutdown goes on.
//!     tokio::spawn(Server::new(shutdown).serve(listener, app));
//!
//!     shutdown.finished().await.exit()
//! }
//! ```
//!
//! * [`ShutdownLayer`] for HTTP services, [`GuardLayer`] for any other tower service, [`ShutdownAware`] for what is
//!   no service at all.
//! * [`Server`], an accept loop over hyper: every connection hears every phase at its moment. [`Listener`] for stock
//!   `axum::serve`, [`TonicIncoming`] for stock tonic, where those must stay.
//! * WebSockets and other long streams: [`SessionSocket`] and [`on_upgrade`], [`UntilTold`], [`SessionLayer`]. A stream
//!   that nobody registers is a request, and holds the drain.
//!
//! | feature | what | default |
//! |---|---|---|
//! | `serve` | [`Server`] | yes |
//! | `axum` | [`Listener`], [`Wrapped`] | yes |
//! | `sessions` | [`SessionSocket`], [`UntilTold`], [`SessionLayer`] | yes |
//! | `ws` | [`on_upgrade`], and [`SocketMessage`] for axum's WebSockets | |
//! | `tungstenite` | [`SocketMessage`] for tokio-tungstenite's | |
//! | `tonic` | [`TonicIncoming`] | |
//! | `admin` | [`admin`]: `/livez`, `/readyz`, `/status`, `/metrics`, `/last-shutdown`, `/terminate` | yes |

#[cfg(feature = "admin")]
pub mod admin;
mod aware;
mod body;
mod guard;
mod layer;
#[cfg(feature = "axum")]
mod listener;
mod refusal;
#[cfg(feature = "serve")]
mod server;
#[cfg(feature = "sessions")]
mod session_layer;
#[cfg(feature = "sessions")]
mod session_socket;
#[cfg(feature = "tonic")]
mod tonic_incoming;
mod track;
#[cfg(feature = "sessions")]
mod until_told;

pub use aware::ShutdownAware;
pub use body::ShutdownBody;
pub use guard::{GuardError, GuardFuture, GuardLayer, Guarded};
pub use layer::{ResponseFuture, Shutdown, ShutdownLayer};
#[cfg(feature = "axum")]
pub use listener::{Listener, Wrapped};
pub use refusal::{Refuse, Refuse503, RefuseGrpc};
#[cfg(feature = "serve")]
pub use server::{Handshake, HttpService, Plain, Server};
#[cfg(feature = "sessions")]
pub use session_layer::{SessionBody, SessionFuture, SessionLayer, Sessions};
#[cfg(feature = "ws")]
pub use session_socket::on_upgrade;
#[cfg(feature = "sessions")]
pub use session_socket::{Goodbye, SessionSocket, SocketMessage};
#[cfg(feature = "tonic")]
pub use tonic_incoming::{TonicIncoming, TonicIo};
pub use track::{Anonymous, InFlight, Named, Track};
#[cfg(feature = "sessions")]
pub use until_told::UntilTold;
