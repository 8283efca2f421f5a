//! The laws of sessions: what a WebSocket and a stream say when they are told to end, and in which order.

#![cfg(feature = "sessions")]

use std::borrow::Cow;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_core::Stream;
use futures_sink::Sink;
use shutdown_core::{Phase, Reason, Session, ShutdownConfig, ShutdownCoordinator, ShutdownReport};
use shutdown_tower::{Goodbye, SessionSocket, SocketMessage, UntilTold};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// A message of a library of our own.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Message {
    Text(String),
    Close(u16),
}

impl SocketMessage for Message {
    fn text(text: Cow<'static, str>) -> Self {
        Self::Text(text.into_owned())
    }

    fn close(code: u16, _: Cow<'static, str>) -> Self {
        Self::Close(code)
    }

    fn is_close(&self) -> bool {
        matches!(self, Self::Close(_))
    }
}

fn text(text: &str) -> Message {
    Message::Text(text.to_owned())
}

/// What was sent, and when.
type Sent = Arc<Mutex<Vec<(Duration, Message)>>>;

/// A socket whose client is the test.
struct Socket {
    from_client: UnboundedReceiver<Message>,
    sent: Sent,
    begin: Instant,
}

impl Socket {
    fn new() -> (Self, UnboundedSender<Message>, Sent) {
        let (client, from_client) = unbounded_channel();
        let sent = Sent::default();
        (Self { from_client, sent: Arc::clone(&sent), begin: Instant::now() }, client, sent)
    }
}

impl Stream for Socket {
    type Item = Result<Message, ()>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.from_client.poll_recv(cx).map(|message| message.map(Ok))
    }
}

impl Sink<Message> for Socket {
    type Error = ();

    fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), ()>> {
        Poll::Ready(Ok(()))
    }

    fn start_send(self: Pin<&mut Self>, message: Message) -> Result<(), ()> {
        self.sent.lock().expect("nobody panics with it").push((self.begin.elapsed(), message));
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), ()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), ()>> {
        Poll::Ready(Ok(()))
    }
}

fn coordinator() -> (ShutdownCoordinator, JoinHandle<Arc<ShutdownReport>>) {
    let (shutdown, driver) = ShutdownCoordinator::builder()
        .config(ShutdownConfig::default())
        .build()
        .expect("the default plan holds");
    (shutdown, tokio::spawn(driver.run()))
}

fn socket(shutdown: ShutdownCoordinator) -> (SessionSocket<Socket>, UnboundedSender<Message>, Sent) {
    let (socket, client, sent) = Socket::new();
    let session: Session = shutdown.session_start("chat").expect("nobody is stopping");
    (SessionSocket::new(socket, &session), client, sent)
}

/// Echoes until the socket ends; what the handler was given.
fn echo(mut socket: SessionSocket<Socket>) -> JoinHandle<Vec<Message>> {
    tokio::spawn(async move {
        let mut heard = Vec::new();
        while let Some(Ok(message)) = socket.recv().await {
            heard.push(message.clone());
            if message.is_close() {
                break;
            }
            socket.send(message).await.expect("this socket takes everything");
        }
        heard
    })
}

fn stop(shutdown: ShutdownCoordinator) {
    shutdown.initiate_shutdown(Reason::requested("a test"));
}

/// Lets everything run that can; time moves by a millisecond.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

fn is_message(message: &Message) -> bool {
    matches!(message, Message::Text(text) if text.starts_with(r#"{"type":"server_shutdown""#))
}

#[tokio::test(start_paused = true)]
async fn a_goodbye_is_a_message_then_half_a_second_then_close_1001() {
    let (shutdown, driver) = coordinator();
    let (socket, client, sent) = socket(shutdown);
    let handler = echo(socket);
    settle().await;
    assert_eq!(*sent.lock().unwrap(), []);
    stop(shutdown);
    tokio::time::sleep(Duration::from_millis(600)).await;
    client.send(Message::Close(1001)).unwrap();
    assert_eq!(handler.await.unwrap(), [Message::Close(1001)]);

    let sent = sent.lock().unwrap().clone();
    let [(first, message), (second, Message::Close(1001))] = &sent[..] else { panic!("{sent:?}") };
    assert!(is_message(message), "{message:?}");
    let between = *second - *first;
    assert!((Duration::from_millis(500)..Duration::from_millis(510)).contains(&between), "{between:?}");
    let report = driver.await.unwrap();
    assert_eq!((report.sessions.told, report.sessions.cut, report.exit_code()), (1, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_speaks_between_the_message_and_the_close_is_still_heard_and_answered() {
    let (shutdown, driver) = coordinator();
    let (socket, client, sent) = socket(shutdown);
    let handler = echo(socket);
    stop(shutdown);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(matches!(&sent.lock().unwrap()[..], [(_, message)] if is_message(message)));
    client.send(text("one more thing")).unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    client.send(Message::Close(1001)).unwrap();
    assert_eq!(handler.await.unwrap(), [text("one more thing"), Message::Close(1001)]);
    let sent: Vec<_> = sent.lock().unwrap().iter().map(|(_, message)| message.clone()).collect();
    assert_eq!(sent[1..], [text("one more thing"), Message::Close(1001)]);
    assert_eq!(driver.await.unwrap().exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_after_the_close_is_dropped_without_a_fault() {
    let (shutdown, driver) = coordinator();
    let (mut socket, client, sent) = socket(shutdown);
    stop(shutdown);
    let told = tokio::time::timeout(Duration::from_secs(1), socket.recv()).await;
    assert!(told.is_err(), "the client says nothing: {told:?}");
    socket.send(text("too late")).await.unwrap();
    let kinds: Vec<_> = sent.lock().unwrap().iter().map(|(_, message)| message.is_close()).collect();
    assert_eq!(kinds, [false, true], "the message and the Close, and nothing behind");
    // What the client says is still heard.
    client.send(text("heard")).unwrap();
    assert_eq!(socket.recv().await, Some(Ok(text("heard"))));
    drop((socket, client));
    assert_eq!(driver.await.unwrap().exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_closes_first_gets_no_goodbye() {
    let (shutdown, driver) = coordinator();
    let (mut socket, client, sent) = socket(shutdown);
    client.send(Message::Close(1000)).unwrap();
    assert_eq!(socket.recv().await, Some(Ok(Message::Close(1000))));
    stop(shutdown);
    // The library answers the Close meanwhile; ours stays silent.
    let rest = tokio::time::timeout(Duration::from_secs(2), socket.recv()).await;
    assert!(rest.is_err(), "{rest:?}");
    assert_eq!(*sent.lock().unwrap(), []);
    drop(socket);
    assert_eq!(driver.await.unwrap().exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_closes_after_the_message_gets_no_close_of_ours() {
    let (shutdown, driver) = coordinator();
    let (socket, client, sent) = socket(shutdown);
    let handler = echo(socket);
    stop(shutdown);
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.send(Message::Close(1000)).unwrap();
    assert_eq!(handler.await.unwrap(), [Message::Close(1000)]);
    assert!(matches!(&sent.lock().unwrap()[..], [(_, message)] if is_message(message)));
    assert_eq!(driver.await.unwrap().exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_goodbye_of_the_programs_own_is_said_as_it_is() {
    let (shutdown, driver) = coordinator();
    let (socket, client, sent) = socket(shutdown);
    let goodbye = Goodbye::default().message(None).delay(Duration::from_secs(60)).code(1012);
    let handler = echo(socket.goodbye(goodbye));
    stop(shutdown);
    settle().await;
    settle().await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    // Without a message there is nothing to wait after.
    assert!(matches!(&sent.lock().unwrap()[..], [(_, Message::Close(1012))]), "{:?}", sent.lock().unwrap());
    drop(client);
    handler.await.unwrap();
    assert_eq!(driver.await.unwrap().exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_closes_is_cut_with_its_stage_and_named() {
    let (shutdown, driver) = coordinator();
    let (mut socket, _client, _) = socket(shutdown);
    let cut = socket.session().cut();
    let handler = tokio::spawn(async move {
        // The connection fails then; here the handler is told.
        tokio::select! { () = cut => {} _ = socket.recv() => {} }
    });
    stop(shutdown);
    let report = driver.await.unwrap();
    handler.await.unwrap();
    assert_eq!((report.sessions.told, report.sessions.cut, report.exit_code()), (1, 1, 11));
    assert_eq!(report.sessions.cut_sessions[0].name, "chat");
    let stage = report.stages.iter().find(|stage| stage.stage == "websockets").expect("it has run");
    // `ShutdownConfig::websocket`.
    assert!((stage.end_ms - stage.start_ms - 5000.0).abs() < 50.0, "{stage:?}");
}

/// A stream that says `tick` for ever.
struct Ticks;

impl Stream for Ticks {
    type Item = &'static str;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<&'static str>> {
        Poll::Ready(Some("tick"))
    }
}

async fn next<S: Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    std::future::poll_fn(|cx| Pin::new(&mut *stream).poll_next(cx)).await
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_told_ends_with_its_last_item_and_lets_its_session_go() {
    let (shutdown, driver) = coordinator();
    let session = shutdown.session_start("events").expect("nobody is stopping");
    let mut events = UntilTold::new(&session, Ticks).last("goodbye");
    drop(session);
    for _ in 0..100 {
        assert_eq!(next(&mut events).await, Some("tick"));
    }
    stop(shutdown);
    shutdown.until(Phase::Draining).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(next(&mut events).await, Some("goodbye"));
    assert_eq!(next(&mut events).await, None);
    assert_eq!(next(&mut events).await, None);
    // The stream is still here; its session is not.
    let report = driver.await.unwrap();
    assert_eq!((report.sessions.told, report.sessions.cut, report.exit_code()), (1, 0, 0));
    drop(events);
}

#[tokio::test(start_paused = true)]
async fn no_session_costs_no_time_and_no_stage() {
    let (shutdown, driver) = coordinator();
    stop(shutdown);
    let report = driver.await.unwrap();
    assert!(report.stages.is_empty(), "{:?}", report.stages);
    assert!(report.duration_ms < 1.0, "{}", report.duration_ms);

    // One that has ended before is none.
    let (shutdown, driver) = coordinator();
    drop(shutdown.session_start("over").expect("nobody is stopping"));
    stop(shutdown);
    let report = driver.await.unwrap();
    assert!(report.stages.is_empty() && report.sessions.open_at_start == 0, "{report:?}");
}
