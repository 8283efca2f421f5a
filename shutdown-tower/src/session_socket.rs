//! A WebSocket that says goodbye by itself.

use std::borrow::Cow;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream;
use futures_sink::Sink;
use shutdown_core::{Session, Told, Wait};
use tokio::time::{Sleep, sleep};

/// What a WebSocket's client is told when the service stops.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Goodbye {
    /// A text message for the application; `None` sends none.
    pub message: Option<Cow<'static, str>>,
    /// From the message to the Close. Cut short when there is no time for it: by a second signal, or when half of stage
    /// WebSockets has passed.
    pub delay: Duration,
    /// The code of the Close: 1001 (going away) or 1012 (service restart); RFC 6455 §7.4.1 and its registry.
    pub code: u16,
    /// The reason in the Close, at most 123 bytes.
    pub reason: Cow<'static, str>,
}

impl Default for Goodbye {
    /// The message `{"type":"server_shutdown","message":"Server is shutting down gracefully"}`, 500 ms, then Close
    /// 1001.
    fn default() -> Self {
        Self {
            message: Some(Cow::Borrowed(
                r#"{"type":"server_shutdown","message":"Server is shutting down gracefully"}"#,
            )),
            delay: Duration::from_millis(500),
            code: 1001,
            reason: Cow::Borrowed("server is shutting down"),
        }
    }
}

impl Goodbye {
    /// Another text message, or none.
    pub fn message(mut self, message: Option<Cow<'static, str>>) -> Self {
        self.message = message;
        self
    }

    /// Another time from the message to the Close.
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Another reason in the Close; what is longer than 123 bytes is cut off.
    pub fn reason(mut self, reason: impl Into<Cow<'static, str>>) -> Self {
        let mut reason = reason.into();
        if reason.len() > LONGEST_REASON {
            let mut text = reason.into_owned();
            let end = (0..=LONGEST_REASON).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
            text.truncate(end);
            reason = text.into();
        }
        self.reason = reason;
        self
    }

    /// Another code in the Close, for example 1012: the service restarts.
    pub fn code(mut self, code: u16) -> Self {
        self.code = code;
        self
    }
}

/// A control frame has 125 bytes, two of them the code; RFC 6455 §5.5.
const LONGEST_REASON: usize = 123;

/// A message of a WebSocket library.
pub trait SocketMessage: Sized {
    /// A text message.
    fn text(text: Cow<'static, str>) -> Self;

    /// A Close.
    fn close(code: u16, reason: Cow<'static, str>) -> Self;

    /// Whether it is a Close.
    fn is_close(&self) -> bool;
}

#[cfg(feature = "ws")]
impl SocketMessage for axum::extract::ws::Message {
    fn text(text: Cow<'static, str>) -> Self {
        Self::Text(text.as_ref().into())
    }

    fn close(code: u16, reason: Cow<'static, str>) -> Self {
        Self::Close(Some(axum::extract::ws::CloseFrame { code, reason: reason.as_ref().into() }))
    }

    fn is_close(&self) -> bool {
        matches!(self, Self::Close(_))
    }
}

#[cfg(feature = "tungstenite")]
impl SocketMessage for tungstenite::Message {
    fn text(text: Cow<'static, str>) -> Self {
        Self::Text(text.as_ref().into())
    }

    fn close(code: u16, reason: Cow<'static, str>) -> Self {
        let (code, reason) = (code.into(), reason.as_ref().into());
        Self::Close(Some(tungstenite::protocol::CloseFrame { code, reason }))
    }

    fn is_close(&self) -> bool {
        matches!(self, Self::Close(_))
    }
}

/// A WebSocket that is a session: when it is told to end it sends the [`Goodbye`] by itself, and then only listens,
/// until its client has closed.
///
/// Read it to its end, as one does with any WebSocket: the goodbye is said while it is polled for messages, and the end
/// (`None`) comes when the client has answered the Close. A client that never does is cut at the end of stage
/// WebSockets; reading fails then. What is sent after the Close is dropped.
///
/// It is a [`Stream`] and a [`Sink`] as the socket it wraps: axum's `WebSocket` (feature `ws`), tokio-tungstenite's
/// `WebSocketStream` (feature `tungstenite`), or whatever has a [`SocketMessage`].
#[derive(Debug)]
pub struct SessionSocket<S> {
    socket: S,
    told: Told,
    goodbye: Goodbye,
    state: State,
}

/// How far the goodbye has been said.
#[derive(Debug)]
enum State {
    Serving,
    Message,
    MessageSent,
    Delay(Pin<Box<Sleep>>, Wait<'static>),
    Close,
    CloseSent,
    /// Our Close is out: what the service still sends is dropped.
    Listening,
    /// The client has closed, or the socket is broken: the socket speaks for itself.
    Over,
}

impl<S> SessionSocket<S> {
    /// Puts `socket` under `session`, with the usual goodbye.
    pub fn new(socket: S, session: &Session) -> Self {
        Self { socket, told: session.told(), goodbye: Goodbye::default(), state: State::Serving }
    }

    /// Says this goodbye instead.
    pub fn goodbye(mut self, goodbye: Goodbye) -> Self {
        self.goodbye = goodbye;
        self
    }

    /// The session.
    pub fn session(&self) -> &Session {
        self.told.session()
    }

    /// The wrapped socket.
    pub fn get_ref(&self) -> &S {
        &self.socket
    }

    fn has_closed(&self) -> bool {
        matches!(self.state, State::CloseSent | State::Listening)
    }
}

impl<S, M, E> SessionSocket<S>
where
    S: Stream<Item = Result<M, E>> + Sink<M, Error = E> + Unpin,
    M: SocketMessage,
{
    /// The next message, or `None` when the socket has closed.
    ///
    /// # Errors
    ///
    /// The socket broke, or was cut.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no message is lost.
    pub async fn recv(&mut self) -> Option<Result<M, E>> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// The socket broke, or was cut.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: it is not known whether the message was taken.
    pub async fn send(&mut self, message: M) -> Result<(), E> {
        poll_fn(|cx| Pin::new(&mut *self).poll_ready(cx)).await?;
        Pin::new(&mut *self).start_send(message)?;
        poll_fn(|cx| Pin::new(&mut *self).poll_flush(cx)).await
    }

    /// Says as much of the goodbye as can be said now.
    fn say_goodbye(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), E>> {
        loop {
            let socket = &mut self.socket;
            self.state = match &mut self.state {
                State::Serving => {
                    ready!(Pin::new(&mut self.told).poll(cx));
                    if self.goodbye.message.is_some() { State::Message } else { State::Close }
                }
                State::Message => {
                    ready!(Pin::new(&mut *socket).poll_ready(cx))?;
                    let text = self.goodbye.message.take().expect("looked at above");
                    Pin::new(socket).start_send(M::text(text))?;
                    State::MessageSent
                }
                State::MessageSent => {
                    ready!(Pin::new(socket).poll_flush(cx))?;
                    State::Delay(Box::pin(sleep(self.goodbye.delay)), self.told.session().hurried())
                }
                State::Delay(delay, hurried) => {
                    if Pin::new(hurried).poll(cx).is_pending() {
                        ready!(delay.as_mut().poll(cx));
                    }
                    State::Close
                }
                State::Close => {
                    ready!(Pin::new(&mut *socket).poll_ready(cx))?;
                    let reason = std::mem::take(&mut self.goodbye.reason);
                    Pin::new(socket).start_send(M::close(self.goodbye.code, reason))?;
                    State::CloseSent
                }
                State::CloseSent => {
                    ready!(Pin::new(socket).poll_flush(cx))?;
                    State::Listening
                }
                State::Listening | State::Over => return Poll::Ready(Ok(())),
            };
        }
    }
}

impl<S, M, E> Stream for SessionSocket<S>
where
    S: Stream<Item = Result<M, E>> + Sink<M, Error = E> + Unpin,
    M: SocketMessage,
{
    type Item = Result<M, E>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Poll::Ready(Err(_)) = self.say_goodbye(cx) {
            // Broken, or closed by the client first: reading says which.
            self.state = State::Over;
        }
        let message = ready!(Pin::new(&mut self.socket).poll_next(cx));
        // After the client's Close, which the library answers, a goodbye would be a fault.
        if !matches!(&message, Some(Ok(message)) if !message.is_close()) {
            self.state = State::Over;
        }
        Poll::Ready(message)
    }
}

impl<S, M, E> Sink<M> for SessionSocket<S>
where
    S: Stream<Item = Result<M, E>> + Sink<M, Error = E> + Unpin,
    M: SocketMessage,
{
    type Error = E;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), E>> {
        if self.has_closed() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.socket).poll_ready(cx)
    }

    fn start_send(mut self: Pin<&mut Self>, message: M) -> Result<(), E> {
        if self.has_closed() {
            return Ok(());
        }
        Pin::new(&mut self.socket).start_send(message)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), E>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), E>> {
        Pin::new(&mut self.socket).poll_close(cx)
    }
}

/// Upgrades to a WebSocket that is a session.
///
/// ```no_run
/// # use axum::extract::{State, WebSocketUpgrade};
/// # use axum::response::Response;
/// # use http::StatusCode;
/// # use shutdown_core::ShutdownCoordinator;
/// async fn chat(State(shutdown): State<ShutdownCoordinator>, upgrade: WebSocketUpgrade) -> Result<Response, StatusCode> {
///     let session = shutdown.session_start("chat").map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
///     Ok(shutdown_tower::on_upgrade(upgrade, session, async |mut socket| {
///         while let Some(Ok(message)) = socket.recv().await {
///             let _ = socket.send(message).await;
///         }
///     }))
/// }
/// ```
#[cfg(feature = "ws")]
pub fn on_upgrade<F, Fut>(
    upgrade: axum::extract::ws::WebSocketUpgrade,
    session: Session,
    serve: F,
) -> axum::response::Response
where
    F: FnOnce(SessionSocket<axum::extract::ws::WebSocket>) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let mark = session.clone();
    let mut response = upgrade.on_upgrade(move |socket| serve(SessionSocket::new(socket, &session)));
    response.extensions_mut().insert(mark);
    response
}
