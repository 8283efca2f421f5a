//! The body that carries its request's guard to the last frame.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Buf;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use shutdown_core::Session;

use crate::track::InFlight;

pin_project! {
    /// A response's body, holding the request's guard, or its session, until it is dropped.
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
        Session {
            #[pin]
            body: B,
            session: Session,
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
        // What is still to come, where that is known: a server that has sent it all asks no more.
        left: Option<u64>,
        ended: bool,
        guard: G,
    }

    impl<B, G> PinnedDrop for Counted<B, G>
    where
        B: Body,
        G: InFlight,
    {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if !*this.ended && !this.body.is_end_stream() {
                this.guard.client_gone();
            }
        }
    }
}

impl<B: Body, G: InFlight> ShutdownBody<B, G> {
    /// `length`: how many bytes the server will ask for, where that is known.
    pub(crate) fn admitted(body: B, guard: G, length: Option<u64>) -> Self {
        let left = length.or_else(|| body.size_hint().exact());
        Self { kind: Kind::Admitted { counted: Counted { body, left, ended: left == Some(0), guard } } }
    }

    pub(crate) fn session(body: B, session: Session) -> Self {
        Self { kind: Kind::Session { body, session } }
    }

    pub(crate) fn refused(body: Option<B>) -> Self {
        Self { kind: Kind::Refused { body } }
    }
}

impl<B: Body, G: InFlight> Body for ShutdownBody<B, G> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match self.project().kind.project() {
            KindProj::Admitted { counted } => {
                let counted = counted.project();
                let frame = ready!(counted.body.poll_frame(cx));
                match &frame {
                    Some(Ok(frame)) if frame.is_data() => {
                        let sent = frame.data_ref().map_or(0, |data| data.remaining() as u64);
                        *counted.left = counted.left.map(|left| left.saturating_sub(sent));
                        *counted.ended = *counted.left == Some(0);
                    }
                    // Trailers are the last frame.
                    _ => *counted.ended = true,
                }
                Poll::Ready(frame)
            }
            KindProj::Session { body, .. } => body.poll_frame(cx),
            KindProj::Refused { body } => match body.as_pin_mut() {
                Some(body) => body.poll_frame(cx),
                None => Poll::Ready(None),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Admitted { counted } => counted.body.is_end_stream(),
            Kind::Session { body, .. } => body.is_end_stream(),
            Kind::Refused { body } => body.as_ref().is_none_or(Body::is_end_stream),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Admitted { counted } => counted.body.size_hint(),
            Kind::Session { body, .. } => body.size_hint(),
            Kind::Refused { body } => body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint),
        }
    }
}
