//! What a request is answered that comes too late.

use http::header::{CONNECTION, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Response, StatusCode, Version};

/// Answers a request that is refused. The body is empty (`None`) or the service's own type.
///
/// Implemented by [`Refuse503`], [`RefuseGrpc`] and by any `Fn() -> Response<B>`.
pub trait Refuse<B>: Clone {
    /// The answer to a request of this HTTP version.
    fn refuse(&self, version: Version) -> Response<Option<B>>;
}

/// 503 with `Retry-After: 1` and, on HTTP/1, `Connection: close`; no body.
///
/// RFC 9110 §15.6.4 and §10.2.3: come back in a second, to another instance by then.
#[derive(Clone, Copy, Debug, Default)]
pub struct Refuse503;

impl<B> Refuse<B> for Refuse503 {
    fn refuse(&self, version: Version) -> Response<Option<B>> {
        let mut response = Response::new(None);
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        // `ShutdownCoordinator::RETRY_AFTER`, as text.
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        close(response.headers_mut(), version);
        response
    }
}

/// `UNAVAILABLE` (14) for gRPC, as an answer of trailers only: clients try again, elsewhere.
///
/// The status is 200, as gRPC over HTTP/2 has it. For routers whose every route is gRPC.
#[derive(Clone, Copy, Debug, Default)]
pub struct RefuseGrpc;

impl<B> Refuse<B> for RefuseGrpc {
    fn refuse(&self, version: Version) -> Response<Option<B>> {
        let mut response = Response::new(None);
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        grpc_unavailable(response.headers_mut());
        close(response.headers_mut(), version);
        response
    }
}

impl<B, F> Refuse<B> for F
where
    F: Fn() -> Response<B> + Clone,
{
    fn refuse(&self, version: Version) -> Response<Option<B>> {
        let mut response = self().map(Some);
        close(response.headers_mut(), version);
        response
    }
}

/// Writes the status `UNAVAILABLE` into the trailers of a gRPC answer.
pub(crate) fn grpc_unavailable(trailers: &mut HeaderMap) {
    trailers.insert("grpc-status", HeaderValue::from_static("14"));
    trailers.insert("grpc-message", HeaderValue::from_static("the service is shutting down"));
}

/// Asks an HTTP/1 client to close the connection after this answer (RFC 9112 §9.6). HTTP/2 forbids the header and
/// has GOAWAY.
pub(crate) fn close(headers: &mut HeaderMap, version: Version) {
    if version <= Version::HTTP_11 {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}
