//! A service registry over HTTP: here I am, and here I am no more.
//!
//! `PUT {url}/{node}` with `{"node_id":…,"address":…}` announces, again every fifteen seconds; `DELETE {url}/{node}` leaves.
//! A registry that speaks otherwise (Consul, Eureka) needs other paths and the same two calls.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{Method, Request, StatusCode, Uri, header};
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use shutdown_core::BoxError;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long one announcement may take.
const ANSWER: Duration = Duration::from_secs(2);
/// How long an announcement under way is heard out when it is time to leave; the leaving needs some of the stage, too.
const HEARD_OUT: Duration = Duration::from_millis(400);
/// From one announcement to the next: a registry that has lost its memory hears of us again.
const AGAIN: Duration = Duration::from_secs(15);
/// After one that failed, doubled up to [`AGAIN`].
const FIRST_RETRY: Duration = Duration::from_millis(500);

/// Where a registry is: `http://host:port/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryUrl(String);

impl FromStr for RegistryUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url = text.trim_end_matches('/');
        let uri: Option<Uri> = url.parse().ok();
        let host = uri.as_ref().and_then(Uri::host).filter(|host| !host.is_empty());
        if uri.as_ref().and_then(Uri::scheme_str) != Some("http")
            || host.is_none()
            || url.contains(['?', '@'])
        {
            // Not the text: there may be a password in it.
            return Err("the registry URL cannot be read: write http://host:port/path".to_owned());
        }
        Ok(Self(url.to_owned()))
    }
}

impl fmt::Display for RegistryUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// This service's entry in a registry. Clones share it.
#[derive(Clone, Debug)]
pub struct Registry(Arc<Entry>);

#[derive(Debug)]
struct Entry {
    url: RegistryUrl,
    uri: Uri,
    node: String,
    client: Client<HttpConnector, Full<axum::body::Bytes>>,
    leaving: CancellationToken,
    announcing: TaskTracker,
}

impl fmt::Display for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "registry {}", self.0.url)
    }
}

impl Registry {
    /// The entry of `node` in the registry at `url`. Sends nothing yet.
    ///
    /// # Errors
    ///
    /// `node` cannot stand in a path.
    pub fn new(url: RegistryUrl, node: &str) -> Result<Self, String> {
        let fits = !node.is_empty()
            && node.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '~'));
        let uri = fits.then(|| format!("{url}/{node}").parse().ok()).flatten();
        let uri = uri.ok_or_else(|| {
            format!("{node:?} cannot be registered: a node's name has letters, digits, '-', '_', '.' and '~'")
        })?;
        let client = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
        let (leaving, announcing) = (CancellationToken::new(), TaskTracker::new());
        Ok(Self(Arc::new(Entry { url, uri, node: node.to_owned(), client, leaving, announcing })))
    }

    /// Announces `address` now and then, until [`leave`](Self::leave). A registry that cannot be reached is warned of
    /// once, and tried again.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn announce(&self, address: String) {
        let registry = self.clone();
        self.0.announcing.spawn(async move { registry.keep_announcing(&address).await });
    }

    async fn keep_announcing(&self, address: &str) {
        let mut heard = true;
        let mut pause = FIRST_RETRY;
        let body = serde_json::json!({ "node_id": self.0.node, "address": address }).to_string();
        // One that is under way is heard out: dropped, it could still be taken up after the leaving.
        while !self.0.leaving.is_cancelled() {
            let announced = timeout(ANSWER, self.ask(Method::PUT, body.clone())).await;
            match announced.unwrap_or_else(|_| Err("no answer within 2 s".into())) {
                Ok(()) => {
                    if !std::mem::replace(&mut heard, true) {
                        tracing::info!(registry = %self.0.url, "registered after all");
                    }
                    pause = FIRST_RETRY;
                    self.wait(AGAIN).await;
                }
                Err(error) => {
                    if std::mem::replace(&mut heard, false) {
                        tracing::warn!(registry = %self.0.url, %error, "cannot be registered yet: trying again");
                    }
                    self.wait(pause).await;
                    pause = (pause * 2).min(AGAIN);
                }
            }
        }
    }

    /// Waits for a time, or until it is time to leave.
    async fn wait(&self, time: Duration) {
        let _ = timeout(time, self.0.leaving.cancelled()).await;
    }

    /// Stops announcing, then deregisters with one request. It has no limit of its own.
    ///
    /// # Errors
    ///
    /// The registry was not reached, or did not take it.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: it is not known whether the registry has heard.
    pub async fn leave(&self) -> Result<(), BoxError> {
        // First: an announcement that comes after the leaving would undo it.
        self.0.leaving.cancel();
        self.0.announcing.close();
        let _ = timeout(HEARD_OUT, self.0.announcing.wait()).await;
        let left = self.ask(Method::DELETE, String::new()).await;
        left.map_err(|error| format!("not deregistered from {}: {error}", self.0.url).into())
    }

    async fn ask(&self, method: Method, body: String) -> Result<(), BoxError> {
        let deleting = method == Method::DELETE;
        let request = Request::builder()
            .method(method)
            .uri(self.0.uri.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::from(body))?;
        let answer = self.0.client.request(request).await.map_err(|error| shutdown_core::sentence(&error))?;
        match answer.status() {
            status if status.is_success() => Ok(()),
            // It does not know us: that is what was wanted.
            StatusCode::NOT_FOUND if deleting => Ok(()),
            status => Err(format!("it answered {status}").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_url_or_node_is_one_sentence() {
        for text in ["", "registry:80", "https://a/b", "http://", "http://a/?b", "http://me@a/"] {
            let error = text.parse::<RegistryUrl>().unwrap_err();
            assert_eq!(error, "the registry URL cannot be read: write http://host:port/path");
        }
        let url: RegistryUrl = "http://a:1/v1/".parse().unwrap();
        assert_eq!(url.to_string(), "http://a:1/v1");
        assert!(Registry::new(url.clone(), "edge-1.example").is_ok());
        for node in ["", "a/b", "a b", "ä"] {
            assert!(Registry::new(url.clone(), node).is_err(), "{node}");
        }
    }
}
