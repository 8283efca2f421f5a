//! The body that carries its request's guard to the last frame.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Buf;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::track::InFlight;

pin_project! {
    /// A response's body, holding the request's guard until it is dropped.
    ///
    /// Dropped before its end, it notes that the client left. The guard says when the *body* has been handed
    /// over; that its bytes are on the wire is the connection's affair, see [`Listener`](crate::Listener).
    #[derive(Debug)]
    pub struct ShutdownBody<B, G>
    where
        B: Body,
        G: InFlight,
    {
        #[pin]
        kind: Kind<B, G>,
    }
}

pin_project! {
    #[project = KindProj]
    #[derive(Debug)]
    enum Kind<B, G>
    where
        B: Body,
        G: InFlight,
    {
        Admitted {
            #[pin]
            counted: Counted<B, G>,
        },
        Refused {
            #[pin]
            body: Option<B>,
        },
    }
}

pin_project! {
    #[derive(Debug)]
    struct Counted<B, G>
    where
        B: Body,
        G: InFlight,
    {
        #[pin]
        body: B,
        // How many bytes are still to come, or `UNKNOWN`; 0 once the body has ended. A server that has sent them
        // all asks no more.
        left: u64,
        guard: G,
    }

    impl<B, G> PinnedDrop for Counted<B, G>
    where
        B: Body,
        G: InFlight,
    {
        #[inline]
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if *this.left != 0 && !this.body.is_end_stream() {
                this.guard.client_gone();
            }
        }
    }
}

/// More than any body has, so it takes no branch of its own: what is sent never brings it to 0.
const UNKNOWN: u64 = u64::MAX;

impl<B: Body, G: InFlight> ShutdownBody<B, G> {
    /// `length`: how many bytes the server will ask for, where that is known.
    #[inline]
    pub(crate) fn admitted(body: B, guard: G, length: Option<u64>) -> Self {
        let left = length.unwrap_or(UNKNOWN);
        Self { kind: Kind::Admitted { counted: Counted { body, left, guard } } }
    }

    pub(crate) fn refused(body: Option<B>) -> Self {
        Self { kind: Kind::Refused { body } }
    }
}

impl<B: Body, G: InFlight> Body for ShutdownBody<B, G> {
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match self.project().kind.project() {
            KindProj::Admitted { counted } => {
                let counted = counted.project();
                let frame = ready!(counted.body.poll_frame(cx));
                let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
                // Trailers are the last frame.
                *counted.left = data.map_or(0, |data| counted.left.saturating_sub(data.remaining() as u64));
                Poll::Ready(frame)
            }
            KindProj::Refused { body } => match body.as_pin_mut() {
                Some(body) => body.poll_frame(cx),
                None => Poll::Ready(None),
            },
        }
    }

    #[inline]
    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Admitted { counted } => counted.body.is_end_stream(),
            Kind::Refused { body } => body.as_ref().is_none_or(Body::is_end_stream),
        }
    }

    #[inline]
    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Admitted { counted } => counted.body.size_hint(),
            Kind::Refused { body } => body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint),
        }
    }
}
