//! A stream that ends when its session is told to.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use pin_project_lite::pin_project;
use shutdown_core::{Session, Told};

pin_project! {
    /// A long stream – server-sent events, a streaming RPC – that ends when its session is told to: with a last item, if
    /// one is given, and then properly, so that its client sees an end and not a break.
    ///
    /// Put the session into the answer's extensions as well: [`ShutdownLayer`](crate::ShutdownLayer) then takes the
    /// request out of the drain's count.
    ///
    /// ```
    /// # use shutdown_core::{ShutdownCoordinator, ShuttingDown};
    /// # use shutdown_tower::UntilTold;
    /// # fn handler<S: futures_core::Stream<Item = String>>(
    /// #     shutdown: ShutdownCoordinator,
    /// #     events: S,
    /// # ) -> Result<http::Response<UntilTold<S>>, ShuttingDown> {
    /// let session = shutdown.session_start("events")?;
    /// let events = UntilTold::new(&session, events).last("event: server_shutdown\n\n".to_owned());
    /// let mut response = http::Response::new(events);
    /// response.extensions_mut().insert(session);
    /// # Ok(response)
    /// # }
    /// ```
    #[derive(Debug)]
    #[must_use = "streams do nothing unless polled"]
    pub struct UntilTold<S>
    where
        S: Stream,
    {
        #[pin]
        stream: S,
        // `None` once it is over.
        told: Option<Told>,
        last: Option<S::Item>,
    }
}

impl<S: Stream> UntilTold<S> {
    /// Ends `stream` when `session` is told to end; holds the session until then.
    pub fn new(session: &Session, stream: S) -> Self {
        Self { stream, told: Some(session.told()), last: None }
    }

    /// Says this before it ends because it was told to.
    pub fn last(mut self, item: S::Item) -> Self {
        self.last = Some(item);
        self
    }
}

impl<S: Stream> Stream for UntilTold<S> {
    type Item = S::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let this = self.project();
        let Some(told) = this.told else { return Poll::Ready(None) };
        if Pin::new(told).poll(cx).is_ready() {
            *this.told = None;
            return Poll::Ready(this.last.take());
        }
        let item = ready!(this.stream.poll_next(cx));
        if item.is_none() {
            *this.told = None;
        }
        Poll::Ready(item)
    }
}
