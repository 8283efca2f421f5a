//! The admin routes as one tower service, and a small server that outlives the traffic.
//!
//! | route | answer |
//! |---|---|
//! | `GET /livez` | 200 to the end |
//! | `GET /readyz` | 200, and 503 from the lame duck on |
//! | `GET /status` | JSON: phase, counts, oldest request in flight, stages, and what the program adds |
//! | `GET /metrics` | the same for Prometheus, and what the program adds |
//! | `GET /last-shutdown` | the report of the previous run, 404 if there is none |
//! | `POST /terminate?mode=graceful\|fast\|immediate&if_idle=true&dry_run=true` | the report, flushed before the exit |
//!
//! It answers only when `Host` is its own address and `Origin` is absent or its own, else 403: a web page that the
//! operator has open must not be able to stop the service, nor to read its state by rebinding a name.
//!
//! Its requests and connections are never counted.
//!
//! # `/terminate`
//!
//! | mode | |
//! |---|---|
//! | `graceful`, the default | the plan |
//! | `fast` | as a second signal: no waits, every stage its reserve |
//! | `immediate` | persist, report, exit |
//!
//! **Every caller gets the one result**, the report as JSON, however many there are and whenever they come: the first
//! begins the shutdown, all others join it, and so do those who come during one that a signal began. The highest mode that anybody asked for counts.
//! A caller that hangs up stops nothing, and one that half-closes is answered. The report is written to every caller before the
//! process leaves, for at most the report's reserve ([`REPORT_RESERVE`](shutdown_core::REPORT_RESERVE)), so one that reads nothing costs no more than that.
//! Whoever is connected when the report becomes final and has sent nothing yet, has that long to ask. Who connects later may find the
//! connection closed without an answer: the process has gone.
//!
//! **`if_idle`** is refused while requests are in flight or sessions open. Nothing is lost between the look and the stop: whatever the
//! mode, the lame duck and the drain are the plan's, so that a request that starts in between is served, and the mode counts from Closing on, if
//! no session has been opened in between. In a shutdown that has begun already, such a caller joins and hurries nobody.
//!
//! **`dry_run`** answers with the plan and changes nothing; with `if_idle`, with what that would say.
//!
//! | status | |
//! |---|---|
//! | 200 | the report; of a dry run, the plan |
//! | 400 | a parameter or value that there is not, one given twice or percent-encoded; a body that did not arrive in full |
//! | 401 | not exactly one `Authorization: Bearer` with the token |
//! | 403 | `Host` or `Origin` is not ours; or there is no token and the listener is not on loopback |
//! | 405 | not a POST |
//! | 409 | `if_idle`, and busy: the counts |
//!
//! Nothing else is ever answered, and nothing but 200 without `dry_run` changes anything.

mod family;
mod metrics;
mod serve;
mod terminate;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, ORIGIN};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use serde_json::Value;
use shutdown_core::ShutdownCoordinator;
use tower::Service;

pub use family::Family;

/// A value that the program adds to `/status`, made when asked for.
type Extra = Box<dyn Fn() -> Value + Send + Sync>;

/// Metrics that the program adds to `/metrics`, made when asked for.
type Families = Box<dyn Fn() -> Vec<Family> + Send + Sync>;

/// How long a request's body is waited for.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);

/// The admin routes of a coordinator. Give them to [`Admin::serve`], or mount [`Admin::at`] somewhere.
pub struct Admin {
    shutdown: ShutdownCoordinator,
    token: Option<String>,
    last_shutdown: Option<PathBuf>,
    extra: BTreeMap<&'static str, Extra>,
    families: Vec<Families>,
    /// The answer of `/terminate`, once it is known.
    report: OnceLock<Bytes>,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the token.
        f.debug_struct("Admin").field("shutdown", &self.shutdown).finish_non_exhaustive()
    }
}

impl Admin {
    /// The routes, without a token and without a last report.
    pub fn new(shutdown: ShutdownCoordinator) -> Self {
        Self {
            shutdown,
            token: None,
            last_shutdown: None,
            extra: BTreeMap::new(),
            families: Vec::new(),
            report: OnceLock::new(),
        }
    }

    /// Requires `Authorization: Bearer <token>` for `/terminate`, which off loopback is refused without one. An empty
    /// token is nobody's.
    #[must_use]
    pub fn token(mut self, token: Option<String>) -> Self {
        self.token = token;
        self
    }

    /// Where the last report is, for `/last-shutdown` and the `last_shutdown_*` metrics.
    #[must_use]
    pub fn last_shutdown(mut self, path: impl Into<PathBuf>) -> Self {
        self.last_shutdown = Some(path.into());
        self
    }

    /// Adds a field to `/status`.
    ///
    /// `value` runs on the coordinator's own thread, beside the driver: it must not block.
    #[must_use]
    pub fn extra(mut self, name: &'static str, value: impl Fn() -> Value + Send + Sync + 'static) -> Self {
        self.extra.insert(name, Box::new(value));
        self
    }

    /// Adds metric families to `/metrics`.
    ///
    /// Families of one name are shown as one, and a series once: the first counts. A name that is taken by the routes'
    /// own metrics, or that Prometheus could not read, is not shown.
    ///
    /// `families` runs on the coordinator's own thread, beside the driver: it must not block.
    #[must_use]
    pub fn metrics(mut self, families: impl Fn() -> Vec<Family> + Send + Sync + 'static) -> Self {
        self.families.push(Box::new(families));
        self
    }

    /// The routes as a tower service that answers at `addr`.
    ///
    /// Not under the layers that count: a `/terminate` that is itself in flight would wait for itself, and find the
    /// service busy.
    pub fn at(self, addr: SocketAddr) -> AdminService {
        let is_loopback = addr.ip().to_canonical().is_loopback();
        AdminService { admin: Arc::new(self), at: At { addr, is_loopback } }
    }

    async fn answer(&self, at: At, head: Head) -> Response<Full<Bytes>> {
        if let Err(problem) = is_own(at.addr, &head.uri, &head.headers) {
            return text(StatusCode::FORBIDDEN, problem);
        }
        let path = head.uri.path();
        let allowed =
            if path == "/terminate" { [Method::POST].as_slice() } else { &[Method::GET, Method::HEAD] };
        let known =
            matches!(path, "/livez" | "/readyz" | "/status" | "/metrics" | "/last-shutdown" | "/terminate");
        if !known {
            return text(StatusCode::NOT_FOUND, "no such route");
        }
        if !allowed.contains(&head.method) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed");
            let allow = if path == "/terminate" { "POST" } else { "GET, HEAD" };
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
            return response;
        }
        match path {
            "/livez" => text(StatusCode::OK, "ok"),
            "/readyz" if self.shutdown.is_shutting_down() => {
                text(StatusCode::SERVICE_UNAVAILABLE, self.shutdown.phase().as_str())
            }
            "/readyz" => text(StatusCode::OK, "ok"),
            "/status" => json_answer(StatusCode::OK, &self.status()),
            "/metrics" => self.page().await,
            "/last-shutdown" => match self.last_report().await {
                Some(report) => with_type(StatusCode::OK, "application/json", report),
                None => text(StatusCode::NOT_FOUND, "no earlier shutdown is known"),
            },
            _ => self.terminate(at, &head).await,
        }
    }

    fn status(&self) -> Value {
        let mut status = serde_json::to_value(self.shutdown.snapshot()).unwrap_or_default();
        for (name, value) in &self.extra {
            status[*name] = value();
        }
        status
    }

    async fn last_report(&self) -> Option<Vec<u8>> {
        let path = self.last_shutdown.clone()?;
        // A small local file; still, the admin runtime must answer probes while a disk hangs.
        tokio::task::spawn_blocking(move || std::fs::read(path).ok()).await.ok()?
    }

    async fn page(&self) -> Response<Full<Bytes>> {
        let last = self.last_report().await.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let added = self.families.iter().flat_map(|families| families()).collect();
        let page = metrics::render(&self.shutdown.snapshot(), last.as_ref(), added);
        with_type(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", page)
    }
}

/// Where requests arrive.
#[derive(Clone, Copy, Debug)]
struct At {
    /// The address that a connection came to.
    addr: SocketAddr,
    /// Whether the listener is on loopback; a wildcard is not, whatever address a connection came to.
    is_loopback: bool,
}

/// A request without its body.
struct Head {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    /// Whether the body has arrived in full.
    is_whole: bool,
}

/// Whether `Host` is this address and `Origin`, if there is one, too.
///
/// An absolute-form target takes the place of `Host` (RFC 9112 §3.2.2), so it must be ours, too. Every value of a
/// header counts: whoever sends two means to be read twice.
fn is_own(addr: SocketAddr, target: &Uri, headers: &HeaderMap) -> Result<(), &'static str> {
    const HOST_PROBLEM: &str = "Host is not the address of this admin listener";
    const ORIGIN_PROBLEM: &str = "Origin is not this admin listener";
    let is_host = |host: &str| names(addr, host);
    let is_origin = |origin: &str| origin.strip_prefix("http://").is_some_and(is_host);
    let all = |name, is: &dyn Fn(&str) -> bool| {
        headers.get_all(name).iter().all(|value| value.to_str().is_ok_and(is))
    };
    let targeted = target.authority().is_none_or(|authority| is_host(authority.as_str()));
    if !headers.contains_key(HOST) || !targeted || !all(HOST, &is_host) {
        return Err(HOST_PROBLEM);
    }
    if all(ORIGIN, &is_origin) { Ok(()) } else { Err(ORIGIN_PROBLEM) }
}

/// Whether `authority` is this very address, or `localhost` with its port where it is a loopback address.
fn names(addr: SocketAddr, authority: &str) -> bool {
    let Ok(authority) = authority.parse::<http::uri::Authority>() else { return false };
    if authority.as_str().contains('@') || authority.port_u16().unwrap_or(80) != addr.port() {
        return false;
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    match host.parse::<std::net::IpAddr>() {
        Ok(ip) => ip == addr.ip().to_canonical(),
        Err(_) => host.eq_ignore_ascii_case("localhost") && addr.ip().to_canonical().is_loopback(),
    }
}

fn text(status: StatusCode, line: &str) -> Response<Full<Bytes>> {
    with_type(status, "text/plain; charset=utf-8", format!("{line}\n"))
}

fn json_answer(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    with_type(status, "application/json", format!("{value:#}\n"))
}

fn with_type(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The admin routes at one address; clones share everything.
///
/// An answer of `/terminate` carries a [`Join`](shutdown_core::Join) in its extensions: keep it until the answer
/// is on the wire, and the process waits for it.
#[derive(Clone, Debug)]
pub struct AdminService {
    admin: Arc<Admin>,
    at: At,
}

impl<B> Service<Request<B>> for AdminService
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Full<Bytes>>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (admin, at) = (Arc::clone(&self.admin), self.at);
        let (parts, body) = request.into_parts();
        Box::pin(async move {
            let is_whole = tokio::time::timeout(BODY_TIMEOUT, drained(body)).await.unwrap_or_default();
            let head = Head { method: parts.method, uri: parts.uri, headers: parts.headers, is_whole };
            Ok(admin.answer(at, head).await)
        })
    }
}

/// Reads a body to its end, whatever it says, and whether there was one: left unread it would make the kernel reset the
/// connection over our answer.
async fn drained<B: Body>(body: B) -> bool {
    let mut body = pin!(body);
    while let Some(frame) = body.frame().await {
        if frame.is_err() {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr() -> SocketAddr {
        "127.0.0.1:8081".parse().unwrap()
    }

    fn headers(pairs: &[(http::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn only_its_own_host_and_origin_are_answered() {
        for good in ["127.0.0.1:8081", "localhost:8081", "LOCALHOST:8081"] {
            assert!(
                is_own(addr(), &Uri::from_static("/status"), &headers(&[(HOST, good)])).is_ok(),
                "{good}"
            );
        }
        for bad in [
            "",
            "127.0.0.1",
            "127.0.0.1:80",
            "evil.example:8081",
            "user@127.0.0.1:8081",
            "127.0.0.2:8081",
            "a b",
        ] {
            assert!(is_own(addr(), &Uri::from_static("/status"), &headers(&[(HOST, bad)])).is_err(), "{bad}");
        }
        assert!(is_own(addr(), &Uri::from_static("/status"), &HeaderMap::new()).is_err());
        let own = "127.0.0.1:8081";
        let absolute = Uri::from_static("http://evil.example/terminate");
        assert!(is_own(addr(), &absolute, &headers(&[(HOST, own)])).is_err());
        let mut twice = headers(&[(HOST, own)]);
        twice.append(HOST, HeaderValue::from_static("evil.example"));
        assert!(is_own(addr(), &Uri::from_static("/status"), &twice).is_err());
        assert!(
            is_own(
                addr(),
                &Uri::from_static("/status"),
                &headers(&[(HOST, own), (ORIGIN, "http://localhost:8081")])
            )
            .is_ok()
        );
        for foreign in ["http://evil.example", "https://127.0.0.1:8081", "null", "http://127.0.0.1:9999"] {
            assert!(
                is_own(addr(), &Uri::from_static("/status"), &headers(&[(HOST, own), (ORIGIN, foreign)]))
                    .is_err(),
                "{foreign}"
            );
        }
    }

    #[test]
    fn localhost_names_only_loopback_addresses_and_ipv6_hosts_are_bracketed() {
        assert!(!names("10.0.0.7:8081".parse().unwrap(), "localhost:8081"));
        assert!(names("[::1]:8081".parse().unwrap(), "[::1]:8081"));
        assert!(names("[::ffff:10.0.0.7]:8081".parse().unwrap(), "10.0.0.7:8081"));
        assert!(names("10.0.0.7:80".parse().unwrap(), "10.0.0.7"));
    }
}
