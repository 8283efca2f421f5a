//! The laws of the layers, with a driver polled under paused time and no socket.

use std::convert::Infallible;
use std::future::{pending, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use shutdown_core::{Phase, Reason, RequestGuard, ShutdownConfig, ShutdownCoordinator, ShutdownReport};
use shutdown_tower::{GuardError, GuardLayer, ShutdownAware, ShutdownBody, ShutdownLayer};
use tokio::task::JoinHandle;
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Layer, Service, ServiceExt, service_fn};

type Run = JoinHandle<Arc<ShutdownReport>>;

fn coordinator() -> (ShutdownCoordinator, Run) {
    let (shutdown, driver) = ShutdownCoordinator::builder()
        .config(ShutdownConfig::default())
        .build()
        .expect("the default plan holds");
    (shutdown, tokio::spawn(driver.run()))
}

/// A coordinator that refuses requests.
async fn refusing() -> (ShutdownCoordinator, Run, RequestGuard) {
    let (shutdown, run) = coordinator();
    let held = shutdown.request_start().expect("running");
    shutdown.initiate_shutdown(Reason::requested("a test"));
    while !shutdown.refuses_requests() {
        tokio::task::yield_now().await;
    }
    (shutdown, run, held)
}

async fn hello(_: Request<()>) -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(Response::new(Full::new(Bytes::from_static(b"hello"))))
}

fn request(version: Version) -> Request<()> {
    let mut request = Request::new(());
    *request.version_mut() = version;
    request
}

#[tokio::test(start_paused = true)]
async fn a_request_is_counted_from_the_call_to_the_drop_of_its_body() {
    let (shutdown, _run) = coordinator();
    let mut service = ShutdownLayer::new(shutdown).layer(service_fn(hello));
    let future = service.call(request(Version::HTTP_11));
    assert_eq!(shutdown.active_request_count(), 1);
    let response = future.await.expect("infallible");
    assert_eq!(shutdown.active_request_count(), 1);
    let mut body = response.into_body();
    assert!(body.frame().await.is_some());
    assert_eq!(shutdown.active_request_count(), 1, "handed over is not dropped");
    drop(body);
    assert_eq!(shutdown.active_request_count(), 0);
    assert_eq!(shutdown.snapshot().requests.client_gone, 0);
}

#[tokio::test(start_paused = true)]
async fn a_streamed_answer_holds_the_drain_until_its_trailers() {
    let (shutdown, run) = coordinator();
    let frames = vec![
        Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"a"))),
        Ok(Frame::trailers(HeaderMap::from_iter([(http::header::ETAG, "x".parse().expect("a value"))]))),
    ];
    let frames = std::sync::Mutex::new(Some(frames));
    let mut service = ShutdownLayer::new(shutdown).layer(service_fn(move |_: Request<()>| {
        let frames = frames.lock().expect("one thread").take().expect("called once");
        ready(Ok::<_, Infallible>(Response::new(StreamBody::new(Iter(frames.into_iter())))))
    }));
    let mut body = service.call(request(Version::HTTP_2)).await.expect("infallible").into_body();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::Draining).await;
    assert!(body.frame().await.expect("a frame").expect("infallible").is_data());
    assert!(body.frame().await.expect("a frame").expect("infallible").is_trailers());
    assert!(shutdown.phase() == Phase::Draining && !run.is_finished());
    assert!(body.frame().await.is_none());
    drop(body);
    let report = run.await.expect("no panic");
    assert_eq!((report.requests.drained, report.requests.client_gone, report.exit_code()), (1, 0, 0));
}

/// A stream from an iterator.
struct Iter<I>(I);

impl<I: Iterator + Unpin> futures_core::Stream for Iter<I> {
    type Item = I::Item;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<I::Item>> {
        Poll::Ready(self.0.next())
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_request_gets_503_and_never_reaches_the_service() {
    let (shutdown, _run, held) = refusing().await;
    let mut service = ShutdownLayer::new(shutdown).layer(NeverReady);
    let mut ready =
        task::spawn(std::future::poll_fn(|cx| Service::<Request<()>>::poll_ready(&mut service, cx)));
    assert!(assert_ready!(ready.poll()).is_ok(), "a refusal does not wait for the service");
    drop(ready);
    let response = service.call(request(Version::HTTP_11)).await.expect("infallible");
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(response.headers()["connection"], "close");
    assert!(response.body().is_end_stream() && response.body().size_hint().exact() == Some(0));
    assert_eq!(shutdown.active_request_count(), 1, "only the held one");
    let response = service.call(request(Version::HTTP_2)).await.expect("infallible");
    assert!(!response.headers().contains_key("connection"), "HTTP/2 forbids it (RFC 9113 §8.2.2)");
    assert_eq!(shutdown.snapshot().requests.refused, 2);
    drop(held);
}

/// Panics when called.
#[derive(Clone)]
struct NeverReady;

impl Service<Request<()>> for NeverReady {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Pending
    }

    fn call(&mut self, _: Request<()>) -> Self::Future {
        panic!("a refused request reached the service")
    }
}

#[tokio::test(start_paused = true)]
async fn a_running_service_is_waited_for_until_it_is_ready() {
    let (shutdown, _run) = coordinator();
    let mut service = ShutdownLayer::new(shutdown).layer(NeverReady);
    let mut ready =
        task::spawn(std::future::poll_fn(|cx| Service::<Request<()>>::poll_ready(&mut service, cx)));
    assert_pending!(ready.poll());
}

#[tokio::test(start_paused = true)]
async fn the_refusal_can_be_replaced_and_still_closes_the_connection() {
    let (shutdown, _run, held) = refusing().await;
    let gone = || {
        let mut response = Response::new(Full::new(Bytes::from_static(b"gone fishing")));
        *response.status_mut() = StatusCode::IM_A_TEAPOT;
        response
    };
    let mut service = ShutdownLayer::new(shutdown).refuse_with(gone).layer(service_fn(hello));
    let response = service.call(request(Version::HTTP_11)).await.expect("infallible");
    assert_eq!(
        (response.status(), &response.headers()["connection"]),
        (StatusCode::IM_A_TEAPOT, &"close".parse().expect("a value"))
    );
    let body = response.into_body().collect().await.expect("infallible").to_bytes();
    assert_eq!(body, "gone fishing");
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn answers_ask_http_1_clients_to_leave_from_the_lame_duck_on_and_not_before() {
    let (shutdown, driver) = {
        let mut config = ShutdownConfig::default();
        config.lame_duck = std::time::Duration::from_secs(5);
        ShutdownCoordinator::builder().config(config).build().expect("the plan holds")
    };
    let _run = tokio::spawn(driver.run());
    let mut service = ShutdownLayer::new(shutdown).layer(service_fn(hello));
    let response = service.call(request(Version::HTTP_11)).await.expect("infallible");
    assert!(!response.headers().contains_key("connection"));
    let under_way = service.call(request(Version::HTTP_11));
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::LameDuck).await;
    assert_eq!(under_way.await.expect("infallible").headers()["connection"], "close");
    let response = service.call(request(Version::HTTP_11)).await.expect("infallible");
    assert_eq!(
        (response.status(), &response.headers()["connection"]),
        (StatusCode::OK, &"close".parse().expect("a value"))
    );
    let response = service.call(request(Version::HTTP_2)).await.expect("infallible");
    assert!(!response.headers().contains_key("connection"));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_before_the_end_is_counted_as_gone_and_others_are_not() {
    let (shutdown, _run) = coordinator();
    let gone = || shutdown.snapshot().requests.client_gone;

    let mut never = ShutdownLayer::new(shutdown)
        .layer(service_fn(|_: Request<()>| pending::<Result<Response<Full<Bytes>>, Infallible>>()));
    let mut future = task::spawn(never.call(request(Version::HTTP_11)));
    assert_pending!(future.poll());
    drop(future);
    assert_eq!(gone(), 1, "left before the answer");

    let mut service = ShutdownLayer::new(shutdown).layer(service_fn(hello));
    drop(service.call(request(Version::HTTP_11)).await.expect("infallible"));
    assert_eq!(gone(), 2, "left before the body");

    let mut head = request(Version::HTTP_11);
    *head.method_mut() = Method::HEAD;
    drop(service.call(head).await.expect("infallible"));
    assert_eq!(gone(), 2, "nobody reads the body of an answer to HEAD");

    let body = service.call(request(Version::HTTP_11)).await.expect("infallible").into_body();
    body.collect().await.expect("infallible");
    assert_eq!((gone(), shutdown.active_request_count()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_panics_or_fails_gives_its_guard_back() {
    let (shutdown, _run) = coordinator();
    let mut panics = ShutdownLayer::new(shutdown).layer(service_fn(
        async |_: Request<()>| -> Result<Response<Full<Bytes>>, Infallible> { panic!("on purpose") },
    ));
    assert!(tokio::spawn(panics.call(request(Version::HTTP_11))).await.is_err_and(|error| error.is_panic()));
    let mut fails = ShutdownLayer::new(shutdown)
        .layer(service_fn(async |_: Request<()>| Err::<Response<Full<Bytes>>, _>("no")));
    assert_eq!(fails.call(request(Version::HTTP_11)).await.err(), Some("no"));
    assert_eq!((shutdown.active_request_count(), shutdown.snapshot().requests.client_gone), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_named_request_is_listed_while_it_is_in_flight() {
    let (shutdown, _run) = coordinator();
    let layer = ShutdownLayer::new(shutdown)
        .named(|request: &Request<()>| format!("{} {}", request.method(), request.uri().path()).into());
    let mut service = layer.layer(service_fn(hello));
    let response = service
        .call(Request::get("/orders?token=secret").body(()).expect("a request"))
        .await
        .expect("infallible");
    let oldest = shutdown.snapshot().oldest_in_flight.expect("in flight");
    assert_eq!(oldest.route, "GET /orders");
    drop(response);
    assert!(shutdown.snapshot().oldest_in_flight.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_service_without_http_refuses_with_an_error_and_counts_until_its_future_ends() {
    let (shutdown, run) = coordinator();
    let mut service = GuardLayer::new(shutdown)
        .layer(service_fn(|n: u32| async move { if n == 0 { Err("zero") } else { Ok(n + 1) } }));
    let future = service.ready().await.expect("ready").call(1);
    assert_eq!(shutdown.active_request_count(), 1);
    assert_eq!(future.await, Ok(2));
    assert_eq!(service.call(0).await, Err(GuardError::Service("zero")));
    assert_eq!(shutdown.active_request_count(), 0);

    let aware = ShutdownAware::new(service, shutdown);
    let held = aware.track_request().expect("running");
    assert!(!aware.is_shutting_down());
    shutdown.initiate_shutdown(Reason::requested("a test"));
    while !shutdown.refuses_requests() {
        tokio::task::yield_now().await;
    }
    assert!(aware.is_shutting_down() && aware.track_request().is_err());
    let refused = aware.into_inner().call(1).await;
    assert!(matches!(refused, Err(GuardError::ShuttingDown(_))), "{refused:?}");
    drop(held);
    assert_eq!(run.await.expect("no panic").requests.refused, 2);
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_in_the_lame_duck_keeps_its_connection_header() {
    let mut config = ShutdownConfig::default();
    config.lame_duck = std::time::Duration::from_secs(5);
    let (shutdown, driver) = ShutdownCoordinator::builder().config(config).build().expect("the plan holds");
    let _run = tokio::spawn(driver.run());
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::LameDuck).await;
    let mut service = ShutdownLayer::new(shutdown).layer(service_fn(async |_: Request<()>| {
        let upgrade =
            Response::builder().status(StatusCode::SWITCHING_PROTOCOLS).header("connection", "upgrade");
        Ok::<_, Infallible>(upgrade.body(Empty::<Bytes>::new()).expect("a response"))
    }));
    let response = service.call(request(Version::HTTP_11)).await.expect("infallible");
    assert_eq!(response.headers()["connection"], "upgrade");
    drop(response);
    assert_eq!(shutdown.snapshot().requests.client_gone, 0);
}

/// A body that never says that it has ended, as streams do.
struct Endless(Vec<Frame<Bytes>>);

impl Body for Endless {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.0.is_empty() { Poll::Pending } else { Poll::Ready(Some(Ok(self.0.remove(0)))) }
    }
}

/// Reads as many frames as the body has and drops it, as a server does that knows the length.
async fn read_and_drop(
    shutdown: ShutdownCoordinator,
    length: Option<&str>,
    frames: Vec<Frame<Bytes>>,
) -> u64 {
    let count = frames.len();
    let frames = std::sync::Mutex::new(Some(frames));
    let length = length.map(str::to_owned);
    let mut service = ShutdownLayer::new(shutdown).layer(service_fn(move |_: Request<()>| {
        let mut response =
            Response::new(Endless(frames.lock().expect("one thread").take().expect("called once")));
        if let Some(length) = &length {
            response.headers_mut().insert("content-length", length.parse().expect("a value"));
        }
        ready(Ok::<_, Infallible>(response))
    }));
    let mut body = service.call(request(Version::HTTP_11)).await.expect("infallible").into_body();
    for _ in 0..count {
        assert!(body.frame().await.is_some());
    }
    drop(body);
    shutdown.snapshot().requests.client_gone
}

#[tokio::test(start_paused = true)]
async fn an_answer_whose_length_is_sent_is_complete_though_nobody_asks_for_its_end() {
    let data = |text: &'static str| Frame::data(Bytes::from_static(text.as_bytes()));
    let (shutdown, _run) = coordinator();
    assert_eq!(read_and_drop(shutdown, Some("6"), vec![data("abc"), data("def")]).await, 0);
    assert_eq!(read_and_drop(shutdown, None, vec![data("abc"), Frame::trailers(HeaderMap::new())]).await, 0);
    assert_eq!(read_and_drop(shutdown, Some("6"), vec![data("abc")]).await, 1, "half of it is not all");
    assert_eq!(
        read_and_drop(shutdown, None, vec![data("abc")]).await,
        2,
        "nobody knows how much was to come"
    );
}

#[test]
fn the_layer_is_one_pointer_and_a_body_grows_by_no_more_than_five_words() {
    assert_eq!(size_of::<ShutdownLayer>(), 8);
    assert!(size_of::<ShutdownBody<Full<Bytes>, RequestGuard>>() <= size_of::<Full<Bytes>>() + 40);
}
