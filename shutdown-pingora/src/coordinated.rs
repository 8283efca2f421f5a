//! Any `ProxyHttp` with a guard for every exchange.
//!
//! The guard lives in `CTX`. Pingora makes it when a request's head has been read and drops it after `logging` and
//! after the last write of the answer, with no `.await` between its making and our first hook. A guard in
//! `request_filter` would be gone before the answer begins.

use std::any::Any;
use std::borrow::Cow;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HeaderMap, RETRY_AFTER};
use http::{Method, StatusCode};
use pingora_cache::key::HashBinary;
use pingora_cache::{CacheKey, CacheMeta, ForcedFreshness, HitHandler, PurgeAction, RespCacheable};
use pingora_core::modules::http::HttpModules;
use pingora_core::protocols::Digest;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, PurgeStatus, RangeType, Session};
use shutdown_core::{ConnectionId, NamedRequestGuard, ShutdownCoordinator};
use tokio::sync::mpsc;

/// A `ProxyHttp` whose requests are counted, named, and refused when it is too late.
///
/// * Every hook of `inner` is called as Pingora would call it, with `inner`'s own context.
/// * A request is named by its method and path, without the query, which may hold secrets; at most 256 bytes.
/// * A refused request is answered 503 with `Retry-After: 1` and `Connection: close`. None of `inner`'s hooks see
///   it but `new_ctx` and `on_connection_reuse`.
/// * From LameDuck on HTTP/1 answers say `Connection: close`, as
///   [`LameDuckPolicy`](shutdown_core::LameDuckPolicy) says. An answer whose head was sent before stays reusable.
/// * An upgrade (101: WebSocket) and a CONNECT tunnel become sessions: the drain neither waits for them nor cuts them,
///   stage WebSockets does. Nothing can be said through a tunnel, so they are kept, and then cut.
///   Pingora 0.9.1 closes a tunnel right after its 101 when the upstream answered faster than Pingora noted the end of
///   the request's empty body (cloudflare/pingora#946, open): on one machine that is every twelfth, over a network few.
/// * A client that left before its answer was complete is noted for the report.
/// * Subrequests are part of the request that spawned them: counted while that is possible, never refused.
#[derive(Debug)]
pub struct Coordinated<P> {
    inner: P,
    shutdown: ShutdownCoordinator,
}

impl<P> Coordinated<P> {
    /// Puts `inner` under `shutdown`.
    pub fn new(inner: P, shutdown: ShutdownCoordinator) -> Self {
        Self { inner, shutdown }
    }

    /// The wrapped proxy.
    pub fn get_ref(&self) -> &P {
        &self.inner
    }

    /// Tells an HTTP/1 client not to come back on this connection, when it is time. Each exchange is asked about once:
    /// when it begins, or, if the shutdown began since, at the last moment, before the head of its answer.
    fn close_when_leaving(&self, session: &mut Session, leave: &mut Option<bool>) {
        if leave.is_none() && self.shutdown.is_shutting_down() {
            *leave = Some(self.shutdown.asks_to_leave());
            if *leave == Some(true) {
                session.set_keepalive(None);
            }
        }
    }

    /// Makes an exchange whose answer opens a tunnel a session, counted before it stops being a request.
    fn keep_tunnel(&self, session: &Session, answer: &ResponseHeader, ctx: &mut InFlight<P::CTX>)
    where
        P: ProxyHttp,
    {
        let request = session.req_header();
        let tunnel = answer.status == StatusCode::SWITCHING_PROTOCOLS
            || (request.method == Method::CONNECT && answer.status.is_success());
        // Through an HTTP/2 stream, whose connection is not known, it stays a request.
        if tunnel
            && matches!(ctx.admission, Admission::Admitted(_))
            && let Some(connection) = ctx.connection
            && let Ok(tunnel) = self.shutdown.session_start(name(request))
            && tunnel.carried_by(connection)
        {
            ctx.admission = Admission::Tunnel(tunnel);
        }
    }
}

/// The context of one exchange: the wrapped proxy's, and the guard that counts it.
#[derive(Debug)]
pub struct InFlight<C> {
    inner: C,
    admission: Admission,
    /// Whether the client was asked to leave; `None` while there was no reason to.
    leave: Option<bool>,
    /// Which connection it came over, where that is known.
    connection: Option<ConnectionId>,
}

impl<C> InFlight<C> {
    /// The wrapped proxy's context.
    pub fn get_ref(&self) -> &C {
        &self.inner
    }

    /// The wrapped proxy's context.
    pub fn get_mut(&mut self) -> &mut C {
        &mut self.inner
    }

    fn is_refused(&self) -> bool {
        matches!(self.admission, Admission::Refused)
    }
}

/// Whether the exchange is in flight.
#[derive(Debug)]
enum Admission {
    /// The first hook has not run yet; or a subrequest that came too late to be counted.
    Uncounted,
    /// In flight until it is dropped.
    Admitted(NamedRequestGuard),
    /// A tunnel: a session until it is dropped.
    Tunnel(#[expect(dead_code, reason = "held for its Drop")] shutdown_core::Session),
    /// Answered with 503, never counted.
    Refused,
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl<P> ProxyHttp for Coordinated<P>
where
    P: ProxyHttp + Send + Sync,
    P::CTX: Send + Sync,
{
    type CTX = InFlight<P::CTX>;

    fn new_ctx(&self) -> Self::CTX {
        InFlight {
            inner: self.inner.new_ctx(),
            admission: Admission::Uncounted,
            leave: None,
            connection: None,
        }
    }

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut Self::CTX) -> Result<()> {
        // Now, while the head has just been read: by the time of the answer this task may be on another thread, and
        // woken by the upstream's connection, not by this one.
        ctx.connection = ConnectionId::of_this_task();
        self.close_when_leaving(session, &mut ctx.leave);
        if session.subrequest_ctx.is_none() && self.shutdown.turns_away(session.req_header().method.is_safe())
        {
            ctx.admission = Admission::Refused;
            return Ok(());
        }
        ctx.admission = match self.shutdown.request_start_named(name(session.req_header())) {
            Ok(guard) => Admission::Admitted(guard),
            Err(_) if session.subrequest_ctx.is_some() => Admission::Uncounted,
            // Answered in `request_filter`, the first hook that can end an exchange well.
            Err(_) => {
                ctx.admission = Admission::Refused;
                return Ok(());
            }
        };
        self.inner.early_request_filter(session, &mut ctx.inner).await
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Self::CTX) -> Result<bool> {
        if ctx.is_refused() {
            refuse(session).await;
            return Ok(true);
        }
        self.inner.request_filter(session, &mut ctx.inner).await
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        upstream_response: &mut ResponseHeader,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        self.close_when_leaving(session, &mut ctx.leave);
        self.inner.response_filter(session, upstream_response, &mut ctx.inner).await?;
        self.keep_tunnel(session, upstream_response, ctx);
        Ok(())
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Self::CTX) {
        match &ctx.admission {
            Admission::Refused => return,
            Admission::Admitted(guard) if error.is_some_and(is_client_gone) => {
                // After the cut it is we who ended the connection.
                if !self.shutdown.cut().latch().is_set() {
                    guard.client_gone();
                }
            }
            Admission::Admitted(_) | Admission::Tunnel(_) | Admission::Uncounted => {}
        }
        self.inner.logging(session, error, &mut ctx.inner).await;
    }

    fn allow_spawning_subrequest(&self, session: &Session, ctx: &Self::CTX) -> bool {
        !ctx.is_refused() && self.inner.allow_spawning_subrequest(session, &ctx.inner)
    }

    fn persist_connection_context(
        &self,
        session: &Session,
        ctx: &Self::CTX,
    ) -> Option<Box<dyn Any + Send + Sync>> {
        if ctx.is_refused() {
            return None;
        }
        self.inner.persist_connection_context(session, &ctx.inner)
    }

    // From here on nothing but delegation: a refused exchange has ended before any of these.

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Self::CTX) -> Result<Box<HttpPeer>> {
        self.inner.upstream_peer(session, &mut ctx.inner).await
    }

    fn init_downstream_modules(&self, modules: &mut HttpModules) {
        self.inner.init_downstream_modules(modules);
    }

    #[cfg(feature = "upstream-modules")]
    fn init_upstream_modules(&self, modules: &mut HttpModules) {
        self.inner.init_upstream_modules(modules);
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        self.inner.request_body_filter(session, body, end_of_stream, &mut ctx.inner).await
    }

    fn request_cache_filter(&self, session: &mut Session, ctx: &mut Self::CTX) -> Result<()> {
        self.inner.request_cache_filter(session, &mut ctx.inner)
    }

    fn cache_key_callback(&self, session: &Session, ctx: &mut Self::CTX) -> Result<CacheKey> {
        self.inner.cache_key_callback(session, &mut ctx.inner)
    }

    fn cache_miss(&self, session: &mut Session, ctx: &mut Self::CTX) {
        self.inner.cache_miss(session, &mut ctx.inner);
    }

    async fn cache_hit_filter(
        &self,
        session: &mut Session,
        meta: &CacheMeta,
        hit_handler: &mut HitHandler,
        is_fresh: bool,
        ctx: &mut Self::CTX,
    ) -> Result<Option<ForcedFreshness>> {
        self.inner.cache_hit_filter(session, meta, hit_handler, is_fresh, &mut ctx.inner).await
    }

    async fn proxy_upstream_filter(&self, session: &mut Session, ctx: &mut Self::CTX) -> Result<bool> {
        self.inner.proxy_upstream_filter(session, &mut ctx.inner).await
    }

    fn response_cache_filter(
        &self,
        session: &Session,
        response: &ResponseHeader,
        ctx: &mut Self::CTX,
    ) -> Result<RespCacheable> {
        self.inner.response_cache_filter(session, response, &mut ctx.inner)
    }

    fn cache_vary_filter(
        &self,
        meta: &CacheMeta,
        ctx: &mut Self::CTX,
        request: &RequestHeader,
    ) -> Option<HashBinary> {
        self.inner.cache_vary_filter(meta, &mut ctx.inner, request)
    }

    fn cache_not_modified_filter(
        &self,
        session: &Session,
        response: &ResponseHeader,
        ctx: &mut Self::CTX,
    ) -> Result<bool> {
        self.inner.cache_not_modified_filter(session, response, &mut ctx.inner)
    }

    fn range_header_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Self::CTX,
    ) -> RangeType {
        self.inner.range_header_filter(session, response, &mut ctx.inner)
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        upstream_request: &mut RequestHeader,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        self.inner.upstream_request_filter(session, upstream_request, &mut ctx.inner).await
    }

    #[cfg(feature = "upstream-modules")]
    async fn adjust_upstream_modules(
        &self,
        session: &mut Session,
        upstream_response: &ResponseHeader,
        end_of_stream: bool,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        self.inner.adjust_upstream_modules(session, upstream_response, end_of_stream, &mut ctx.inner).await
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        upstream_response: &mut ResponseHeader,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        self.inner.upstream_response_filter(session, upstream_response, &mut ctx.inner).await
    }

    async fn custom_forwarding(
        &self,
        session: &mut Session,
        ctx: &mut Self::CTX,
        to_upstream: Option<mpsc::Sender<Bytes>>,
        to_downstream: mpsc::Sender<Bytes>,
    ) -> Result<()> {
        self.inner.custom_forwarding(session, &mut ctx.inner, to_upstream, to_downstream).await
    }

    async fn downstream_custom_message_proxy_filter(
        &self,
        session: &mut Session,
        message: Bytes,
        ctx: &mut Self::CTX,
        final_hop: bool,
    ) -> Result<Option<Bytes>> {
        self.inner.downstream_custom_message_proxy_filter(session, message, &mut ctx.inner, final_hop).await
    }

    async fn upstream_custom_message_proxy_filter(
        &self,
        session: &mut Session,
        message: Bytes,
        ctx: &mut Self::CTX,
        final_hop: bool,
    ) -> Result<Option<Bytes>> {
        self.inner.upstream_custom_message_proxy_filter(session, message, &mut ctx.inner, final_hop).await
    }

    fn upstream_response_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Self::CTX,
    ) -> Result<Option<Duration>> {
        self.inner.upstream_response_body_filter(session, body, end_of_stream, &mut ctx.inner)
    }

    fn upstream_response_trailer_filter(
        &self,
        session: &mut Session,
        trailers: &mut HeaderMap,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        self.inner.upstream_response_trailer_filter(session, trailers, &mut ctx.inner)
    }

    fn response_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Self::CTX,
    ) -> Result<Option<Duration>> {
        self.inner.response_body_filter(session, body, end_of_stream, &mut ctx.inner)
    }

    async fn response_trailer_filter(
        &self,
        session: &mut Session,
        trailers: &mut HeaderMap,
        ctx: &mut Self::CTX,
    ) -> Result<Option<Bytes>> {
        self.inner.response_trailer_filter(session, trailers, &mut ctx.inner).await
    }

    fn on_connection_reuse(
        &self,
        session: &mut Session,
        ctx: &mut Self::CTX,
        previous: Box<dyn Any + Send + Sync>,
    ) {
        self.inner.on_connection_reuse(session, &mut ctx.inner, previous);
    }

    fn suppress_error_log(&self, session: &Session, ctx: &Self::CTX, error: &Error) -> bool {
        self.inner.suppress_error_log(session, &ctx.inner, error)
    }

    fn suppress_proxy_warn_log(
        &self,
        session: &Session,
        ctx: &Self::CTX,
        error: &Error,
        context: ProxyWarnLogContext,
    ) -> bool {
        self.inner.suppress_proxy_warn_log(session, &ctx.inner, error, context)
    }

    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        ctx: &mut Self::CTX,
        client_reused: bool,
    ) -> Box<Error> {
        self.inner.error_while_proxy(peer, session, error, &mut ctx.inner, client_reused)
    }

    fn fail_to_connect(
        &self,
        session: &mut Session,
        peer: &HttpPeer,
        ctx: &mut Self::CTX,
        error: Box<Error>,
    ) -> Box<Error> {
        self.inner.fail_to_connect(session, peer, &mut ctx.inner, error)
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, ctx: &mut Self::CTX) -> FailToProxy {
        self.inner.fail_to_proxy(session, error, &mut ctx.inner).await
    }

    fn should_serve_stale(&self, session: &mut Session, ctx: &mut Self::CTX, error: Option<&Error>) -> bool {
        self.inner.should_serve_stale(session, &mut ctx.inner, error)
    }

    async fn connected_to_upstream(
        &self,
        session: &mut Session,
        reused: bool,
        peer: &HttpPeer,
        #[cfg(unix)] socket: std::os::fd::RawFd,
        #[cfg(windows)] socket: std::os::windows::io::RawSocket,
        digest: Option<&Digest>,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        self.inner.connected_to_upstream(session, reused, peer, socket, digest, &mut ctx.inner).await
    }

    fn request_summary(&self, session: &Session, ctx: &Self::CTX) -> String {
        self.inner.request_summary(session, &ctx.inner)
    }

    fn is_purge(&self, session: &Session, ctx: &Self::CTX) -> bool {
        self.inner.is_purge(session, &ctx.inner)
    }

    fn purge_action(&self, session: &Session, ctx: &Self::CTX) -> PurgeAction {
        self.inner.purge_action(session, &ctx.inner)
    }

    fn purge_response_filter(
        &self,
        session: &Session,
        ctx: &mut Self::CTX,
        status: PurgeStatus,
        response: &mut Cow<'static, ResponseHeader>,
    ) -> Result<()> {
        self.inner.purge_response_filter(session, &mut ctx.inner, status, response)
    }
}

/// Answers 503 and sees that the client can read it. Failing that, the client has left: nothing more to do.
async fn refuse(session: &mut Session) {
    session.set_keepalive(None);
    let Ok(mut answer) = ResponseHeader::build(503, Some(5)) else { return };
    let told = answer
        .insert_header(RETRY_AFTER, ShutdownCoordinator::RETRY_AFTER.as_secs())
        .and_then(|()| answer.insert_header(CONTENT_LENGTH, 0));
    if told.is_err() {
        return;
    }
    if session.as_downstream_mut().write_error_response(answer, Bytes::new()).await.is_err() {
        return;
    }
    if !session.is_body_done() {
        // Closing a socket with unread bytes resets it, and a reset can overtake the answer: RFC 9112, section 9.6.
        let _ = tokio::time::timeout(UNREAD_BODY, session.drain_request_body()).await;
    }
}

/// Whether the client's end of the connection is gone, and not merely slow or wrong.
fn is_client_gone(error: &Error) -> bool {
    *error.esource() == ErrorSource::Downstream
        && matches!(
            error.etype(),
            ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::WriteError | ErrorType::H2Error
        )
}

/// `METHOD /path` without the query, at most [`LONGEST_NAME`] bytes.
fn name(request: &RequestHeader) -> String {
    let (method, path) = (request.method.as_str(), request.uri.path());
    let mut name = String::with_capacity((method.len() + 1 + path.len()).min(LONGEST_NAME + 4));
    name.extend([method, " "]);
    name.push_str(path);
    if name.len() > LONGEST_NAME {
        let cut = (0..=LONGEST_NAME).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
        name.truncate(cut);
    }
    name
}

/// The longest name of a request.
const LONGEST_NAME: usize = 256;
/// How long a refused client may take to send the body that nobody wants.
const UNREAD_BODY: Duration = Duration::from_millis(500);

#[cfg(test)]
mod unit {
    use super::*;

    fn named(method: &str, path: &[u8]) -> String {
        name(&RequestHeader::build(method, path, None).unwrap())
    }

    #[test]
    fn a_request_is_named_without_its_query() {
        assert_eq!(named("GET", b"/reset?token=secret"), "GET /reset");
        assert_eq!(named("GET", b"/"), "GET /");
    }

    #[test]
    fn a_long_name_is_cut_at_a_character() {
        let path = format!("/{}", "é".repeat(300));
        let name = named("POST", path.as_bytes());
        assert!(name.len() <= LONGEST_NAME && name.len() > LONGEST_NAME - 4, "{}", name.len());
        assert!(name.starts_with("POST /é"));
    }

    #[test]
    fn only_a_downstream_that_closed_counts_as_gone() {
        let gone = Error::new_down(ErrorType::ConnectionClosed);
        let slow = Error::new_down(ErrorType::WriteTimedout);
        let upstream = Error::new_up(ErrorType::ConnectionClosed);
        assert!(is_client_gone(&gone));
        assert!(!is_client_gone(&slow) && !is_client_gone(&upstream));
    }
}
