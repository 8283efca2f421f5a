//! The proxy itself: passes requests on, around upstreams that do not answer.
//!
//! A request that a peer has sent goes to upstreams alone, and one that has been here before to no peer, be it an upstream
//! (`CDN-Loop`, RFC 8586).
//!
//! A breaker is told at the head of the answer: a stream that goes on for hours holds no probe's place. Until then the
//! permit lives in the request's context and goes with it, so a client that leaves gives it back.
//!
//! Before that the response cache is asked, and at the end the request log is told.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType, Result, RetryType};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{ProxyHttp, Session};
use shutdown_core::breaker::{Call, OwnedPermit};
use shutdown_core::peers::Id;
use tokio::time::Instant;

use crate::request_log::Entry;
use crate::resources::Opened;
use crate::response_cache::Cached;
use crate::targets::{Picked, Route, Scope, Target, Targets};

/// How long an upstream has to accept a connection, and its name to be resolved.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A client that leaves after this long without an answer has not changed its mind: its upstream does not answer.
const NO_ANSWER: Duration = Duration::from_secs(10);

/// Round robin with retries. It knows nothing of shutdowns: `shutdown_pingora` wraps it.
#[derive(Debug)]
pub(crate) struct Edge {
    targets: Arc<Targets>,
    opened: Opened,
    /// In `CDN-Loop`.
    node: String,
}

impl Edge {
    pub(crate) fn new(targets: Arc<Targets>, opened: Opened, node: Id) -> Self {
        let node = node.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        Self { targets, opened, node }
    }

    /// Where this request goes, as far as it has come.
    fn pick(&self, session: &Session, way: &mut Way) -> Picked {
        let route = way
            .route
            .get_or_insert_with(|| self.targets.route(scope(&session.req_header().headers, &self.node)));
        self.targets.pick(route, Instant::now())
    }
}

/// One request's way to an upstream or a peer.
#[derive(Debug)]
pub(crate) struct Way {
    cached: Cached,
    /// Until the request log is told.
    entry: Option<Entry>,
    /// Of the answer whose head has come.
    status: Option<StatusCode>,
    /// From the first choice on.
    route: Option<Route>,
    /// The last one that was chosen.
    chosen: Option<usize>,
    /// It goes there next: that is decided already.
    decided: bool,
    /// Since when that one was asked.
    since: Option<Instant>,
    /// A pooled connection turned out to be closed.
    stale: bool,
    /// Until the breaker is told how it ended.
    permit: Option<OwnedPermit>,
}

impl Way {
    fn new() -> Self {
        Self {
            cached: Cached::default(),
            entry: None,
            status: None,
            route: None,
            chosen: None,
            decided: false,
            since: None,
            stale: false,
            permit: None,
        }
    }

    fn target(&self) -> Option<&Target> {
        Some(self.route.as_ref()?.target(self.chosen?))
    }

    fn choose(&mut self, index: usize, permit: Option<OwnedPermit>) {
        (self.chosen, self.permit) = (Some(index), permit);
    }

    /// Of one that has left nothing is told: that its connections end is no failure.
    fn record(&mut self, call: Call) {
        if let Some(permit) = self.permit.take() {
            let left = self.target().is_some_and(Target::has_left);
            permit.record(if left { Call::Abandoned } else { call }, Instant::now());
        }
    }

    /// Notes that the chosen one cannot be reached; whether there is another one to try.
    fn failed(&mut self) -> bool {
        let chosen = self.chosen;
        self.route.as_mut().zip(chosen).is_some_and(|(route, chosen)| route.failed(chosen))
    }

    fn log(&mut self) {
        if let Some(entry) = self.entry.take() {
            let upstream = self.since.and(self.target()).map(|target| Arc::clone(target.name()));
            entry.record(self.status.map_or(0, |status| status.as_u16()), upstream, self.cached.as_str());
        }
    }
}

/// A request that is cut never comes to `logging`: it is dropped, before its guard.
impl Drop for Way {
    fn drop(&mut self) {
        self.log();
    }
}

#[async_trait]
impl ProxyHttp for Edge {
    type CTX = Way;

    fn new_ctx(&self) -> Way {
        Way::new()
    }

    /// A fresh answer from the cache asks no upstream and tells no breaker.
    async fn request_filter(&self, session: &mut Session, way: &mut Way) -> Result<bool> {
        let request = session.req_header();
        way.entry = self.opened.log.map(|log| Entry::new(log, &request.method, request.uri.path()));
        let Some(cache) = &self.opened.cache else { return Ok(false) };
        let (cached, hit) = cache.find(session).await?;
        way.cached = cached;
        let Some(hit) = hit else { return Ok(false) };
        hit.answer(session).await?;
        Ok(true)
    }

    /// The last hook that may answer by itself.
    async fn proxy_upstream_filter(&self, session: &mut Session, way: &mut Way) -> Result<bool> {
        match self.pick(session, way) {
            Picked::To(index, permit) => {
                way.choose(index, permit);
                way.decided = true;
            }
            Picked::AllOpen(after) => {
                refuse(session, after).await?;
                return Ok(false);
            }
            // Said by `upstream_peer`, which finds the same.
            Picked::NoneLeft => {}
        }
        Ok(true)
    }

    async fn upstream_peer(&self, session: &mut Session, way: &mut Way) -> Result<Box<HttpPeer>> {
        loop {
            if !std::mem::take(&mut way.decided) {
                match self.pick(session, way) {
                    Picked::To(index, permit) => way.choose(index, permit),
                    Picked::AllOpen(_) | Picked::NoneLeft => break,
                }
            }
            way.since = Some(Instant::now());
            let Some(target) = way.target() else { break };
            let resolved = tokio::time::timeout(CONNECT_TIMEOUT, target.addr()).await;
            match resolved.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
                Ok(addr) => {
                    let mut peer = HttpPeer::new(addr, false, String::new());
                    peer.options.connection_timeout = Some(CONNECT_TIMEOUT);
                    return Ok(Box::new(peer));
                }
                Err(error) => {
                    tracing::warn!(upstream = %target.name(), %error, "upstream cannot be resolved");
                    // The resolver's failure, which says nothing about the upstream.
                    way.record(Call::Abandoned);
                    way.failed();
                }
            }
        }
        // 502: it is the upstreams' fault.
        Err(Error::explain(ErrorType::ConnectError, "no upstream is left to try").into_up())
    }

    /// A peer that is sent a request passes it to no other peer.
    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        request: &mut RequestHeader,
        way: &mut Way,
    ) -> Result<()> {
        if way.target().is_some_and(Target::is_peer) {
            request.append_header(CDN_LOOP, format!("{LOOP_NAME}; node={}", self.node))?;
        }
        Ok(())
    }

    /// Nothing was sent yet, so another upstream may be tried whatever the method.
    fn fail_to_connect(
        &self,
        _: &mut Session,
        _: &HttpPeer,
        way: &mut Way,
        mut error: Box<Error>,
    ) -> Box<Error> {
        way.record(match error.etype() {
            ErrorType::ConnectTimedout => Call::TimedOut,
            // We have no socket, which says nothing about anybody else.
            ErrorType::SocketError | ErrorType::BindError | ErrorType::InternalError => Call::Abandoned,
            _ => Call::ConnectFailed,
        });
        let retry = way.failed();
        let upstream = way.target().map(Target::name);
        tracing::warn!(upstream = upstream.map(tracing::field::display), %error, retry, "upstream cannot be reached");
        error.set_retry(retry);
        error
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        answer: &mut ResponseHeader,
        way: &mut Way,
    ) -> Result<()> {
        // 103 and its like come before the answer; 101 is one.
        if !answer.status.is_informational() || answer.status == 101 {
            way.record(Call::Status(answer.status.as_u16()));
            if let Some(cache) = &self.opened.cache {
                cache.head(session.req_header(), answer, &mut way.cached);
            }
        }
        Ok(())
    }

    fn upstream_response_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        way: &mut Way,
    ) -> Result<Option<Duration>> {
        if let Some(cache) = &self.opened.cache {
            cache.body(body.as_ref(), end_of_stream, &mut way.cached);
        }
        Ok(None)
    }

    /// A tunnel is logged when it opens: its end may come after the log's.
    async fn response_filter(
        &self,
        session: &mut Session,
        answer: &mut ResponseHeader,
        way: &mut Way,
    ) -> Result<()> {
        // 103 and its like come before the answer.
        if !answer.status.is_informational() || answer.status == StatusCode::SWITCHING_PROTOCOLS {
            way.status = Some(answer.status);
        }
        let opened = session.req_header().method == Method::CONNECT && answer.status.is_success();
        if opened || answer.status == StatusCode::SWITCHING_PROTOCOLS {
            way.log();
        }
        Ok(())
    }

    /// The end of every request that was not cut.
    async fn logging(&self, session: &mut Session, _: Option<&Error>, way: &mut Way) {
        way.status = session.response_written().map(|answer| answer.status);
        way.log();
    }

    /// Pingora's own policy of retries, and the breaker is told.
    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        way: &mut Way,
        reused: bool,
    ) -> Box<Error> {
        let mut error = error.more_context(format!("Peer: {peer}"));
        // A pooled connection that its upstream has closed meanwhile, as it may; once in a request.
        let closed = matches!(error.retry, RetryType::ReusedOnly) || *error.etype() == ErrorType::WriteError;
        let stale = reused && closed && !std::mem::replace(&mut way.stale, true);
        let unanswered =
            way.since.is_some_and(|since| since.elapsed() >= NO_ANSWER) && session.is_body_done();
        if !session.req_header().method.is_idempotent() || session.as_ref().retry_buffer_truncated() {
            error.set_retry(false);
        } else {
            error.retry.decide_reuse(reused);
        }
        way.record(match (error.esource(), error.etype()) {
            _ if stale => Call::Abandoned,
            (ErrorSource::Upstream, ErrorType::ReadTimedout | ErrorType::WriteTimedout) => Call::TimedOut,
            (ErrorSource::Upstream, _) => Call::Broken,
            (ErrorSource::Downstream, _) if unanswered => Call::TimedOut,
            _ => Call::Abandoned,
        });
        error
    }

    /// Said by `fail_to_connect` already.
    fn suppress_proxy_warn_log(
        &self,
        _: &Session,
        _: &Way,
        error: &Error,
        _: pingora_proxy::ProxyWarnLogContext,
    ) -> bool {
        error.retry()
    }
}

/// Says in a request whom it came by (RFC 8586).
const CDN_LOOP: &str = "CDN-Loop";
/// What an edge-proxy calls itself there.
const LOOP_NAME: &str = "edge-proxy";

/// A request that comes from a peer goes to upstreams alone, and one that has passed this node to none of them that is a peer:
/// else two would pass it to and fro.
fn scope(headers: &HeaderMap, own: &str) -> Scope {
    let mut scope = Scope::All;
    for value in headers.get_all(CDN_LOOP) {
        let text = String::from_utf8_lossy(value.as_bytes());
        // A comma within a parameter's quotes would at worst keep a request from the peers.
        for info in text.split(',') {
            let mut parts = info.split(';').map(str::trim);
            if parts.next() != Some(LOOP_NAME) {
                continue;
            }
            if parts.any(|part| part.strip_prefix("node=") == Some(own)) {
                return Scope::NoPeers;
            }
            scope = Scope::Upstreams;
        }
    }
    scope
}

/// 503 and when to come back. The client's connection stays as it is, unless its body does not come.
async fn refuse(session: &mut Session, after: Duration) -> Result<()> {
    let mut answer = ResponseHeader::build(503, Some(2))?;
    answer.insert_header("Retry-After", retry_after(after))?;
    answer.insert_header("Content-Length", 0)?;
    session.write_response_header(Box::new(answer), true).await?;
    if !session.is_body_done() {
        // Closing a socket with unread bytes resets it, and a reset can overtake the answer: RFC 9112, section 9.6.
        if tokio::time::timeout(UNREAD_BODY, session.drain_request_body()).await.is_err() {
            // Else it would be waited for once more, without a limit.
            session.set_keepalive(None);
        }
    }
    Ok(())
}

/// How long a refused client may take to send the body that nobody wants.
const UNREAD_BODY: Duration = Duration::from_millis(500);

/// Whole seconds, rounded up; 0 would mean at once.
fn retry_after(after: Duration) -> u64 {
    (after.as_secs() + u64::from(after.subsec_nanos() > 0)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_comes_from_a_peer_if_one_of_its_loop_names_is_ours() {
        for (values, scope_of) in [
            (&[][..], Scope::All),
            (&["edge-proxy"], Scope::Upstreams),
            (&["cdn.example; x=1 , edge-proxy ;v=\"2\""], Scope::Upstreams),
            (&["cdn.example", "edge-proxy"], Scope::Upstreams),
            (&["edge-proxy.example", "my edge-proxy", "a;b=edge-proxy", "a; node=0a"], Scope::All),
            (&["edge-proxy; node=0b"], Scope::Upstreams),
            (&["edge-proxy; node=0b, edge-proxy;node=0a"], Scope::NoPeers),
        ] {
            let mut headers = HeaderMap::new();
            values.iter().for_each(|value| _ = headers.append(CDN_LOOP, value.parse().unwrap()));
            assert_eq!(scope(&headers, "0a"), scope_of, "{values:?}");
        }
    }

    #[test]
    fn retry_after_is_whole_seconds_rounded_up_and_never_at_once() {
        for (ms, seconds) in [(0, 1), (1, 1), (1_000, 1), (1_001, 2), (4_999, 5), (5_000, 5)] {
            assert_eq!(retry_after(Duration::from_millis(ms)), seconds, "{ms}");
        }
    }
}
