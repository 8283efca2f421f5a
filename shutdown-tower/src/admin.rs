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

mod family;
mod metrics;
mod serve;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HOST, ORIGIN, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body::Body;
use http_body_util::{BodyExt, Full, Limited};
use serde_json::{Value, json};
use shutdown_core::{ShutdownCoordinator, Urgency};
use subtle::ConstantTimeEq;
use tower::Service;

pub use family::Family;

/// A value that the program adds to `/status`, made when asked for.
type Extra = Box<dyn Fn() -> Value + Send + Sync>;

/// Metrics that the program adds to `/metrics`, made when asked for.
type Families = Box<dyn Fn() -> Vec<Family> + Send + Sync>;

/// How much of a request's body is read, to be able to answer whoever sends one.
const BODY_LIMIT: usize = 64 * 1024;
/// And how long it is waited for.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);

/// The admin routes of a coordinator. Give them to [`Admin::serve`], or mount [`Admin::at`] somewhere.
pub struct Admin {
    shutdown: ShutdownCoordinator,
    token: Option<String>,
    last_shutdown: Option<PathBuf>,
    extra: BTreeMap<&'static str, Extra>,
    families: Vec<Families>,
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
        Self { shutdown, token: None, last_shutdown: None, extra: BTreeMap::new(), families: Vec::new() }
    }

    /// Requires `Authorization: Bearer <token>` for `/terminate`. Required by good sense off loopback.
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
    pub fn at(self, addr: SocketAddr) -> AdminService {
        AdminService { admin: Arc::new(self), addr }
    }

    async fn answer(&self, addr: SocketAddr, head: Head) -> Response<Full<Bytes>> {
        if let Err(problem) = is_own(addr, &head.uri, &head.headers) {
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
            _ => self.terminate(&head).await,
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

    async fn terminate(&self, head: &Head) -> Response<Full<Bytes>> {
        if !self.is_authorized(&head.headers) {
            let mut response = text(StatusCode::UNAUTHORIZED, "a bearer token is required");
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            return response;
        }
        let asked = match Terminate::parse(head.uri.query().unwrap_or_default()) {
            Ok(asked) => asked,
            Err(problem) => return text(StatusCode::BAD_REQUEST, problem),
        };
        if asked.if_idle && !self.shutdown.is_shutting_down() {
            let snapshot = self.shutdown.snapshot();
            if snapshot.requests.active + snapshot.sessions.open > 0 {
                let counts = json!({
                    "busy": true,
                    "requests": snapshot.requests,
                    "connections": snapshot.connections,
                    "sessions": snapshot.sessions,
                });
                return json_answer(StatusCode::CONFLICT, &counts);
            }
        }
        if asked.dry_run {
            let plan = json!({ "dry_run": true, "mode": asked.urgency, "plan": self.shutdown.plan() });
            return json_answer(StatusCode::OK, &plan);
        }
        // Joined before it is asked for, so the process cannot leave in between.
        let join = self.shutdown.join();
        self.shutdown.terminate(asked.urgency);
        let report = join.report().await;
        let mut response = json_answer(StatusCode::OK, &serde_json::to_value(&*report).unwrap_or_default());
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        // Whoever serves this holds it until the answer's last byte is out.
        response.extensions_mut().insert(join);
        response
    }

    fn is_authorized(&self, headers: &HeaderMap) -> bool {
        let Some(token) = &self.token else { return true };
        let given = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        match given.split_at_checked("Bearer ".len()) {
            Some((scheme, given)) if scheme.eq_ignore_ascii_case(b"Bearer ") => {
                given.ct_eq(token.as_bytes()).into()
            }
            _ => false,
        }
    }
}

/// A request without its body.
struct Head {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

/// What `/terminate` was asked for.
struct Terminate {
    urgency: Urgency,
    if_idle: bool,
    dry_run: bool,
}

impl Terminate {
    fn parse(query: &str) -> Result<Self, &'static str> {
        let mut asked = Self { urgency: Urgency::Graceful, if_idle: false, dry_run: false };
        let flag = |value: &str, problem| match value {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(problem),
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=').unwrap_or((pair, "")) {
                ("mode", "graceful") => asked.urgency = Urgency::Graceful,
                ("mode", "fast") => asked.urgency = Urgency::Fast,
                ("mode", "immediate") => asked.urgency = Urgency::Immediate,
                ("mode", _) => return Err("mode is graceful, fast or immediate"),
                ("if_idle", value) => asked.if_idle = flag(value, "if_idle is true or false")?,
                ("dry_run", value) => asked.dry_run = flag(value, "dry_run is true or false")?,
                _ => return Err("the parameters are mode, if_idle and dry_run"),
            }
        }
        Ok(asked)
    }
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
    addr: SocketAddr,
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
        let (admin, addr) = (Arc::clone(&self.admin), self.addr);
        let (parts, body) = request.into_parts();
        let head = Head { method: parts.method, uri: parts.uri, headers: parts.headers };
        Box::pin(async move {
            // A body left unread would make the kernel reset the connection over our answer. What it says, or that
            // it is too long, changes nothing.
            let _ = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, BODY_LIMIT).collect()).await;
            Ok(admin.answer(addr, head).await)
        })
    }
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

    #[test]
    fn an_unknown_parameter_or_value_of_terminate_is_refused() {
        assert!(Terminate::parse("").is_ok_and(|asked| asked.urgency == Urgency::Graceful));
        assert!(
            Terminate::parse("mode=fast&if_idle=true").is_ok_and(|asked| asked.if_idle && !asked.dry_run)
        );
        for bad in [
            "mode=gracefull",
            "mode",
            "if_idle",
            "if_idle=1",
            "dry_run=yes",
            "force=true",
            "=",
            "mode=fast&&x",
        ] {
            assert!(Terminate::parse(bad).is_err(), "{bad}");
        }
    }
}
