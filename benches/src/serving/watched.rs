//! A connection that is asked to close when an event has happened; as lean as hyper-util's own.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::server::graceful::GracefulConnection;
use pin_project_lite::pin_project;

pin_project! {
    /// Polls `event` at every wake of the connection, until it has happened.
    pub(crate) struct Watched<C, W, G>
    where
        W: Future,
    {
        #[pin]
        connection: C,
        #[pin]
        event: W,
        // What the event gave; it may hold the drain.
        happened: Option<W::Output>,
        counted: G,
    }
}

impl<C, W: Future, G> Watched<C, W, G> {
    /// `counted` is what counts the connection; dropped with it.
    pub(crate) fn new(connection: C, event: W, counted: G) -> Self {
        Self { connection, event, happened: None, counted }
    }
}

impl<C: GracefulConnection, W: Future, G> Future for Watched<C, W, G> {
    type Output = C::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let mut this = self.project();
        if this.happened.is_none()
            && let Poll::Ready(output) = this.event.poll(cx)
        {
            *this.happened = Some(output);
            this.connection.as_mut().graceful_shutdown();
        }
        this.connection.poll(cx)
    }
}
