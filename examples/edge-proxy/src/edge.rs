//! The proxy itself: passes requests on, and around upstreams that cannot be reached.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::protocols::Digest;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::{ProxyHttp, Session};

use crate::upstreams::{Tried, Upstreams};

/// How long an upstream has to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Round robin with retries. It knows nothing of shutdowns: `shutdown_pingora` wraps it.
#[derive(Debug)]
pub(crate) struct Edge {
    upstreams: Arc<Upstreams>,
}

impl Edge {
    pub(crate) fn new(upstreams: Arc<Upstreams>) -> Self {
        Self { upstreams }
    }
}

/// One request's way to an upstream.
#[derive(Debug, Default)]
pub(crate) struct Way {
    tried: Tried,
    chosen: usize,
}

#[async_trait]
impl ProxyHttp for Edge {
    type CTX = Way;

    fn new_ctx(&self) -> Way {
        Way::default()
    }

    async fn upstream_peer(&self, _: &mut Session, way: &mut Way) -> Result<Box<HttpPeer>> {
        let upstreams = &self.upstreams;
        while let Some(chosen) = upstreams.pick(way.tried, upstreams.now()) {
            way.chosen = chosen;
            match upstreams.get(chosen).addr().await {
                Ok(addr) => {
                    let mut peer = HttpPeer::new(addr, false, String::new());
                    peer.options.connection_timeout = Some(CONNECT_TIMEOUT);
                    return Ok(Box::new(peer));
                }
                Err(error) => {
                    tracing::warn!(upstream = %upstreams.get(chosen), %error, "upstream cannot be resolved");
                    upstreams.failed(chosen, &mut way.tried, upstreams.now());
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
        let retry = upstreams.failed(way.chosen, &mut way.tried, upstreams.now());
        tracing::warn!(upstream = %upstreams.get(way.chosen), %error, retry, "upstream cannot be reached");
        error.set_retry(retry);
        error
    }

    async fn connected_to_upstream(
        &self,
        _: &mut Session,
        reused: bool,
        _: &HttpPeer,
        _: std::os::fd::RawFd,
        _: Option<&Digest>,
        way: &mut Way,
    ) -> Result<()> {
        // A pooled connection says nothing about whether new ones are accepted.
        if !reused {
            self.upstreams.reached(way.chosen);
        }
        Ok(())
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
