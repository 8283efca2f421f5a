//! The layer allocates nothing for a request: not for its guard, its future or its body.

use std::convert::Infallible;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use shutdown_core::ShutdownCoordinator;
use shutdown_tower::{GuardLayer, ShutdownLayer};
use tower::{Layer, Service, service_fn};

const REQUESTS: u64 = 10_000;

/// Runs a request to the end of its body, without a runtime.
fn serve<S, B>(service: &mut S)
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible>,
    B: Body<Error = Infallible>,
{
    let mut cx = Context::from_waker(Waker::noop());
    let mut future = pin!(service.call(Request::new(())));
    let Poll::Ready(Ok(response)) = future.as_mut().poll(&mut cx) else { panic!("the service is ready") };
    let mut body = pin!(response.into_body());
    while let Poll::Ready(Some(Ok(frame))) = body.as_mut().poll_frame(&mut cx) {
        drop(frame);
    }
}

#[test]
fn a_request_through_the_layer_allocates_nothing() {
    let (shutdown, _driver) = ShutdownCoordinator::builder().build().expect("the default plan holds");
    let hello = service_fn(async |_: Request<()>| {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
    });
    let mut service = ShutdownLayer::new(shutdown).layer(hello);
    // The first request of a thread takes its shard.
    serve(&mut service);
    let measured = allocation_counter::measure(|| {
        for _ in 0..REQUESTS {
            serve(&mut service);
        }
    });
    assert_eq!((measured.count_total, measured.bytes_total), (0, 0));
    assert_eq!(shutdown.snapshot().requests.started, REQUESTS + 1);
}

#[test]
fn a_call_through_the_guard_layer_allocates_nothing() {
    let (shutdown, _driver) = ShutdownCoordinator::builder().build().expect("the default plan holds");
    let mut service = GuardLayer::new(shutdown).layer(service_fn(async |n: u64| Ok::<_, Infallible>(n + 1)));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(pin!(service.call(0)).as_mut().poll(&mut cx).is_ready());
    let measured = allocation_counter::measure(|| {
        for n in 0..REQUESTS {
            assert_eq!(pin!(service.call(n)).as_mut().poll(&mut cx), Poll::Ready(Ok(n + 1)));
        }
    });
    assert_eq!(measured.count_total, 0);
}

#[test]
fn the_counter_counts() {
    let boxed = allocation_counter::measure(|| drop(std::hint::black_box(Box::new(7))));
    assert_eq!(boxed.count_total, 1, "else the laws above prove nothing");
}
