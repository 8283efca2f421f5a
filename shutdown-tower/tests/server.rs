//! The laws of the accept loop that need a clock of their own.

use std::convert::Infallible;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use shutdown_core::ShutdownCoordinator;
use shutdown_tower::{Server, ShutdownLayer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::{Layer, service_fn};

async fn answer(connection: &mut TcpStream) -> String {
    connection.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("it is open");
    let mut answer = [0; 1024];
    let read = connection.read(&mut answer).await.expect("it is open");
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

#[tokio::test]
async fn a_connection_that_was_idle_for_minutes_is_served_as_ever() {
    let (shutdown, driver) = ShutdownCoordinator::builder().build().expect("the default plan holds");
    tokio::spawn(driver.run());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("bound");
    let service = service_fn(async |_: Request<Incoming>| {
        Ok::<_, Infallible>(Response::new(Full::new(bytes::Bytes::from_static(b"hello"))))
    });
    tokio::spawn(Server::new(shutdown).serve(listener, ShutdownLayer::new(shutdown).layer(service)));

    let mut connection = TcpStream::connect(addr).await.expect("it serves");
    assert!(answer(&mut connection).await.ends_with("hello"));
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(600)).await;
    // Whatever timer there is has had its turn.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    tokio::time::resume();
    assert!(answer(&mut connection).await.ends_with("hello"));
}
