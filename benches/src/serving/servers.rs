//! The candidates: how each counts a request in and watches a connection.
//!
//! Each is written as its crate's documentation shows it, with nothing in the way: no boxing, no `select!` that
//! rolls dice, one combinator for all that have none of their own.

use std::convert::Infallible;
use std::future::{self, Future};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::server::graceful::{GracefulConnection, GracefulShutdown};
use shutdown_core::{RequestGuard, ShutdownCoordinator};
use shutdown_tower::{Shutdown, ShutdownBody, ShutdownLayer};
use tokio::runtime::Runtime;
use tokio_graceful::ShutdownGuard;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tower::{Layer, Service};

use crate::serving::connection::Hello;
use crate::serving::counting::{Count, CountedBody, Counting};
use crate::serving::watched::Watched;

/// One shutdown, shared by all connections.
pub(crate) trait Server: Send + Sync + 'static {
    type Service: Service<
            Request<Incoming>,
            Response = Response<Self::Body>,
            Error = Infallible,
            Future: Send + 'static,
        > + Clone
        + Send
        + 'static;
    type Body: Body<Data = Bytes, Error = Infallible> + Send + 'static;

    fn new() -> Self;

    /// [`Hello`] behind the request layer.
    fn service(&self) -> Self::Service;

    /// The connection, to be asked to close when the shutdown says so.
    fn watch<C>(&self, connection: C) -> impl Future<Output: Send> + Send + 'static
    where
        C: GracefulConnection<Output: Send, Error: Send> + Send + 'static;
}

/// No shutdown.
pub(crate) struct Bare;

impl Server for Bare {
    type Service = Hello;
    type Body = Full<Bytes>;

    fn new() -> Self {
        Self
    }

    fn service(&self) -> Hello {
        Hello
    }

    fn watch<C>(&self, connection: C) -> impl Future<Output: Send> + Send + 'static
    where
        C: GracefulConnection<Output: Send, Error: Send> + Send + 'static,
    {
        connection
    }
}

/// As `examples/small`'s hyper service has it.
pub(crate) struct Ours(ShutdownCoordinator);

impl Server for Ours {
    type Service = Shutdown<Hello>;
    type Body = ShutdownBody<Full<Bytes>, RequestGuard>;

    fn new() -> Self {
        let (shutdown, driver) = ShutdownCoordinator::builder().build().expect("the default plan holds");
        // Nobody asks for a shutdown, so the driver would only wait.
        drop(driver);
        Self(shutdown)
    }

    fn service(&self) -> Self::Service {
        ShutdownLayer::new(self.0).layer(Hello)
    }

    fn watch<C>(&self, connection: C) -> impl Future<Output: Send> + Send + 'static
    where
        C: GracefulConnection<Output: Send, Error: Send> + Send + 'static,
    {
        let counted = self.0.connection_start().expect("nobody asked for a shutdown");
        Watched::new(connection, self.0.requests_done(), counted)
    }
}

/// Counts by a token; admits after `close`.
impl Count for TaskTracker {
    type Guard = TaskTrackerToken;

    fn start(&self) -> Option<TaskTrackerToken> {
        Some(self.token())
    }
}

/// hyper-util watches the connection, a tracker counts requests.
pub(crate) struct GracefulAndTracker {
    graceful: GracefulShutdown,
    tracker: TaskTracker,
}

impl Server for GracefulAndTracker {
    type Service = Counting<Hello, TaskTracker>;
    type Body = CountedBody<Full<Bytes>, TaskTrackerToken>;

    fn new() -> Self {
        Self { graceful: GracefulShutdown::new(), tracker: TaskTracker::new() }
    }

    fn service(&self) -> Self::Service {
        Counting { inner: Hello, count: self.tracker.clone() }
    }

    fn watch<C>(&self, connection: C) -> impl Future<Output: Send> + Send + 'static
    where
        C: GracefulConnection<Output: Send, Error: Send> + Send + 'static,
    {
        self.graceful.watch(connection)
    }
}

/// The same, without the reference count that hyper-util's clone of the service pays for each request.
pub(crate) struct LeakedTracker {
    graceful: GracefulShutdown,
    tracker: &'static TaskTracker,
}

impl Count for &'static TaskTracker {
    type Guard = TaskTrackerToken;

    fn start(&self) -> Option<TaskTrackerToken> {
        Some(self.token())
    }
}

impl Server for LeakedTracker {
    type Service = Counting<Hello, &'static TaskTracker>;
    type Body = CountedBody<Full<Bytes>, TaskTrackerToken>;

    fn new() -> Self {
        Self { graceful: GracefulShutdown::new(), tracker: Box::leak(Box::new(TaskTracker::new())) }
    }

    fn service(&self) -> Self::Service {
        Counting { inner: Hello, count: self.tracker }
    }

    fn watch<C>(&self, connection: C) -> impl Future<Output: Send> + Send + 'static
    where
        C: GracefulConnection<Output: Send, Error: Send> + Send + 'static,
    {
        self.graceful.watch(connection)
    }
}

/// The usual recipe: the token refuses and is watched, the tracker counts.
#[derive(Clone)]
pub(crate) struct TokenAndTracker {
    token: CancellationToken,
    tracker: TaskTracker,
}

impl Count for TokenAndTracker {
    type Guard = TaskTrackerToken;

    fn start(&self) -> Option<TaskTrackerToken> {
        (!self.token.is_cancelled()).then(|| self.tracker.token())
    }
}

impl Server for TokenAndTracker {
    type Service = Counting<Hello, Self>;
    type Body = CountedBody<Full<Bytes>, TaskTrackerToken>;

    fn new() -> Self {
        Self { token: CancellationToken::new(), tracker: TaskTracker::new() }
    }

    fn service(&self) -> Self::Service {
        Counting { inner: Hello, count: self.clone() }
    }

    fn watch<C>(&self, connection: C) -> impl Future<Output: Send> + Send + 'static
    where
        C: GracefulConnection<Output: Send, Error: Send> + Send + 'static,
    {
        Watched::new(connection, self.token.clone().cancelled_owned(), self.tracker.token())
    }
}

/// Its guard is both the count and the event.
pub(crate) struct TokioGraceful {
    shutdown: tokio_graceful::Shutdown,
    /// Keeps the task alive that waits for the signal; dropped after it.
    _signals: Runtime,
}

impl Count for ShutdownGuard {
    type Guard = Self;

    fn start(&self) -> Option<Self> {
        Some(self.clone())
    }
}

impl Server for TokioGraceful {
    type Service = Counting<Hello, ShutdownGuard>;
    type Body = CountedBody<Full<Bytes>, ShutdownGuard>;

    fn new() -> Self {
        let signals = super::runtime();
        let shutdown = signals.block_on(async { tokio_graceful::Shutdown::new(future::pending::<()>()) });
        Self { shutdown, _signals: signals }
    }

    fn service(&self) -> Self::Service {
        Counting { inner: Hello, count: self.shutdown.guard() }
    }

    fn watch<C>(&self, connection: C) -> impl Future<Output: Send> + Send + 'static
    where
        C: GracefulConnection<Output: Send, Error: Send> + Send + 'static,
    {
        let guard = self.shutdown.guard();
        let cancelled = async move {
            guard.cancelled().await;
            guard
        };
        Watched::new(connection, cancelled, ())
    }
}

/// A request holds what its own `Retain` layer holds, but to the end of the body and without that layer's box.
pub(crate) struct Drain {
    watch: drain::Watch,
    _signal: drain::Signal,
}

/// Half of a `Watch`: keeps the drain from ending and hears nothing.
#[derive(Clone)]
pub(crate) struct Release(drain::ReleaseShutdown);

impl Count for Release {
    type Guard = drain::ReleaseShutdown;

    fn start(&self) -> Option<drain::ReleaseShutdown> {
        Some(self.0.clone())
    }
}

impl Server for Drain {
    type Service = Counting<Hello, Release>;
    type Body = CountedBody<Full<Bytes>, drain::ReleaseShutdown>;

    fn new() -> Self {
        let (signal, watch) = drain::channel();
        Self { watch, _signal: signal }
    }

    fn service(&self) -> Self::Service {
        Counting { inner: Hello, count: Release(self.watch.clone().ignore_signaled()) }
    }

    fn watch<C>(&self, connection: C) -> impl Future<Output: Send> + Send + 'static
    where
        C: GracefulConnection<Output: Send, Error: Send> + Send + 'static,
    {
        Watched::new(connection, self.watch.clone().signaled(), ())
    }
}
