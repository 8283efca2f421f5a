//! The laws of the accept loop that a test can cause from inside.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use http::header::CONNECTION;
use http::{HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use shutdown_core::{Phase, Reason, ShutdownConfig, ShutdownCoordinator};
use shutdown_tower::{Server, ShutdownLayer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tower::{Layer, service_fn};

async fn answer(connection: &mut TcpStream) -> String {
    connection.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("it is open");
    let mut answer = [0; 1024];
    let read = connection.read(&mut answer).await.expect("it is open");
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

/// Serves; a GET of `/stop` asks for the shutdown before it is answered.
async fn serve() -> SocketAddr {
    let mut config = ShutdownConfig::default();
    config.lame_duck = Duration::from_secs(60);
    config.total = Duration::from_secs(120);
    let (shutdown, driver) =
        ShutdownCoordinator::builder().config(config).build().expect("the default plan holds");
    tokio::spawn(driver.run());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("bound");
    let service = service_fn(move |request: Request<Incoming>| async move {
        if request.uri().path() == "/stop" {
            shutdown.initiate_shutdown(Reason::requested("a test"));
            shutdown.until(Phase::LameDuck).await;
        }
        let own = request.uri().path() == "/own";
        let body = request.into_body().collect().await.expect("a whole body").to_bytes();
        let mut response = Response::new(Full::new(body));
        if own {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok::<_, Infallible>(response)
    });
    tokio::spawn(Server::new(shutdown).serve(listener, ShutdownLayer::new(shutdown).layer(service)));
    addr
}

/// Everything the server says to this until it closes.
async fn all(addr: SocketAddr, bytes: &str) -> String {
    let mut connection = TcpStream::connect(addr).await.expect("it serves");
    connection.write_all(bytes.as_bytes()).await.expect("it is open");
    let mut all = String::new();
    timeout(Duration::from_secs(30), connection.read_to_string(&mut all))
        .await
        .expect("it closes")
        .expect("it is not reset");
    all
}

#[tokio::test]
async fn what_was_pipelined_is_answered_before_the_client_is_asked_to_leave_also_behind_bodies() {
    let post = "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello";
    let get = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";
    let requests = format!("GET /stop HTTP/1.1\r\nhost: x\r\n\r\n{post}{post}{get}{post}");
    let answers = all(serve().await, &requests).await;
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 5, "{answers}");
    assert_eq!(answers.matches("connection: close").count(), 1, "{answers}");
    assert!(answers.ends_with("hello"), "{answers}");
}

#[tokio::test]
async fn the_services_own_connection_header_stays_whatever_is_pipelined() {
    let get = |path| format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    let answers = all(serve().await, &(get("/own") + &get("/"))).await;
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 1, "{answers}");
    assert!(answers.contains("connection: close"), "{answers}");
}

#[tokio::test]
async fn a_client_of_http_1_0_is_not_told_to_stay_and_to_leave() {
    let get = "GET /stop HTTP/1.0\r\nconnection: keep-alive\r\n\r\n";
    let answer = all(serve().await, get).await;
    assert!(answer.contains("connection: close") && !answer.contains("keep-alive"), "{answer}");
}

#[tokio::test]
async fn a_connection_that_was_idle_for_minutes_is_served_as_ever() {
    let addr = serve().await;
    let mut connection = TcpStream::connect(addr).await.expect("it serves");
    assert!(answer(&mut connection).await.starts_with("HTTP/1.1 200"));
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(600)).await;
    // Whatever timer there is has had its turn.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    tokio::time::resume();
    assert!(answer(&mut connection).await.starts_with("HTTP/1.1 200"));
}
