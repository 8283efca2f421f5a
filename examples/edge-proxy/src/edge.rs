//! The proxy itself: passes requests on, around upstreams that do not answer.
//!
//! A breaker is told at the head of the answer: a stream that goes on for hours holds no probe's place. Until then the
//! permit lives in the request's context and goes with it, so a client that leaves gives it back.
//!
//! Before that the response cache is asked, and at the end the request log is told.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, StatusCode};
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType, Result, RetryType};
use pingora_http::ResponseHeader;
use pingora_proxy::{ProxyHttp, Session};
use shutdown_core::breaker::{Call, OwnedPermit};
use tokio::time::Instant;

use crate::request_log::Entry;
use crate::resources::Opened;
use crate::response_cache::Cached;
use crate::upstreams::{Picked, Tried, Upstreams};

/// How long an upstream has to accept a connection, and its name to be resolved.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A client that leaves after this long without an answer has not changed its mind: its upstream does not answer.
const NO_ANSWER: Duration = Duration::from_secs(10);

/// Round robin with retries. It knows nothing of shutdowns: `shutdown_pingora` wraps it.
#[derive(Debug)]
pub(crate) struct Edge {
    upstreams: Arc<Upstreams>,
    opened: Opened,
}

impl Edge {
    pub(crate) fn new(upstreams: Arc<Upstreams>, opened: Opened) -> Self {
        Self { upstreams, opened }
    }

    pub(crate) fn upstreams(&self) -> &Upstreams {
        &self.upstreams
    }
}

/// One request's way to an upstream.
#[derive(Debug)]
pub(crate) struct Way {
    cached: Cached,
    /// Until the request log is told.
    entry: Option<Entry>,
    /// Of the answer whose head has come.
    status: Option<StatusCode>,
    tried: Tried,
    /// Where it goes next, if that is decided already.
    next: Option<usize>,
    chosen: usize,
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
            tried: Tried::default(),
            next: None,
            chosen: 0,
            since: None,
            stale: false,
            permit: None,
        }
    }

    fn record(&mut self, call: Call) {
        if let Some(permit) = self.permit.take() {
            permit.record(call, Instant::now());
        }
    }

    fn log(&mut self) {
        if let Some(entry) = self.entry.take() {
            let upstream = self.since.is_some().then_some(self.chosen);
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
        match self.upstreams.pick(way.tried, Instant::now()) {
            Picked::To(index, permit) => (way.next, way.permit) = (Some(index), permit),
            Picked::AllOpen(after) => {
                refuse(session, after).await?;
                return Ok(false);
            }
            // Said by `upstream_peer`, which finds the same.
            Picked::NoneLeft => {}
        }
        Ok(true)
    }

    async fn upstream_peer(&self, _: &mut Session, way: &mut Way) -> Result<Box<HttpPeer>> {
        let upstreams = &self.upstreams;
        way.since = Some(Instant::now());
        loop {
            way.chosen = match way.next.take() {
                Some(chosen) => chosen,
                None => match upstreams.pick(way.tried, Instant::now()) {
                    Picked::To(index, permit) => {
                        way.permit = permit;
                        index
                    }
                    Picked::AllOpen(_) | Picked::NoneLeft => break,
                },
            };
            let resolved = tokio::time::timeout(CONNECT_TIMEOUT, upstreams.get(way.chosen).addr()).await;
            match resolved.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
                Ok(addr) => {
                    let mut peer = HttpPeer::new(addr, false, String::new());
                    peer.options.connection_timeout = Some(CONNECT_TIMEOUT);
                    return Ok(Box::new(peer));
                }
                Err(error) => {
                    tracing::warn!(upstream = %upstreams.get(way.chosen), %error, "upstream cannot be resolved");
                    // The resolver's failure, which says nothing about the upstream.
                    way.record(Call::Abandoned);
                    upstreams.failed(way.chosen, &mut way.tried);
                }
            }
        }
        // 502: it is the upstreams' fault.
        Err(Error::explain(ErrorType::ConnectError, "no upstream is left to try").into_up())
    }

    /// Nothing was sent yet, so another upstream may be tried whatever the method.
    fn fail_to_connect(
        &self,
        _: &mut Session,
        _: &HttpPeer,
        way: &mut Way,
        mut error: Box<Error>,
    ) -> Box<Error> {
        let upstreams = &self.upstreams;
        way.record(match error.etype() {
            ErrorType::ConnectTimedout => Call::TimedOut,
            // We have no socket, which says nothing about anybody else.
            ErrorType::SocketError | ErrorType::BindError | ErrorType::InternalError => Call::Abandoned,
            _ => Call::ConnectFailed,
        });
        let retry = upstreams.failed(way.chosen, &mut way.tried);
        tracing::warn!(upstream = %upstreams.get(way.chosen), %error, retry, "upstream cannot be reached");
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
    fn retry_after_is_whole_seconds_rounded_up_and_never_at_once() {
        for (ms, seconds) in [(0, 1), (1, 1), (1_000, 1), (1_001, 2), (4_999, 5), (5_000, 5)] {
            assert_eq!(retry_after(Duration::from_millis(ms)), seconds, "{ms}");
        }
    }
}
