//! Answers that HTTP allows to keep, kept: the next client gets them without an upstream being asked.
//!
//! What may be stored, for whom, and how long it is fresh is decided by `http-cache-semantics` (RFC 9111, a shared cache).
//! Beyond that this cache is careful:
//!
//! * Only `GET` that was answered with 200 and a whole body of at most 256 KiB whose end is known from its framing. `HEAD` is
//!   answered from what `GET` has left.
//! * Only a lifetime that the upstream gives (`Cache-Control`, `Expires`); none is guessed.
//! * A request with `Authorization`, `Cookie`, a condition, a range, a body or an upgrade passes by, and an answer with
//!   `Set-Cookie` is never stored: whose it is, only the upstream knows.
//! * What is stale is a miss: it is not revalidated. Two misses of one URL both ask an upstream. One variant of a URL is
//!   kept, the newest; `Vary` decides whom it fits.
//! * A change by an unsafe method that went well removes the URL's entry (RFC 9111, section 4.4). An answer that was under way
//!   meanwhile may still be stored, for its lifetime.
//!
//! A hit has `Age` and `Cache-Status: edge-proxy; hit` (RFC 9211). It is a request like others: counted, drained, logged.
//!
//! An entry is one string of bytes, so that nodes of a cluster can share a Redis. What does not parse is a miss: somebody
//! else may write there.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum_service::resources::{Cache, CacheStage, Statistics};
use bytes::Bytes;
use http::header::{
    self, AGE, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, EXPIRES, HOST, HeaderMap, HeaderName, HeaderValue,
    PRAGMA, SET_COOKIE, TRANSFER_ENCODING, VARY,
};
use http::{Method, Request, Response, Uri};
use http_cache_semantics::{BeforeRequest, CacheOptions, CachePolicy};
use pingora_core::Result;
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::Session;
use sha2::{Digest, Sha256};

/// Answers in a cache. Clones share it.
#[derive(Clone)]
pub(crate) struct ResponseCache {
    cache: Cache,
    /// Nodes of one cluster share answers; another cluster has other upstreams.
    cluster: Arc<str>,
    /// Values that were found and did not fit: another variant, stale, or not ours.
    unusable: Arc<AtomicU64>,
}

impl fmt::Debug for ResponseCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.cache, f)
    }
}

/// What the cache has to do with a request.
#[derive(Debug, Default)]
pub(crate) enum Cached {
    /// Nothing: it passes by.
    #[default]
    No,
    /// It has nothing under this key.
    Missed(String),
    /// The answer is being taken down.
    Storing(Box<Storing>),
    /// The answer came out of it.
    Hit,
}

impl Cached {
    /// For the request log.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::No => "none",
            Self::Missed(_) | Self::Storing(_) => "miss",
            Self::Hit => "hit",
        }
    }
}

/// A fresh answer.
#[derive(Debug)]
pub(crate) struct Hit {
    head: Box<ResponseHeader>,
    body: Bytes,
}

impl ResponseCache {
    pub(crate) fn new(cache: Cache, cluster: &str) -> Self {
        Self { cache, cluster: cluster.into(), unusable: Arc::default() }
    }

    /// Looks for an answer to a request that has just come.
    pub(crate) async fn find(&self, session: &mut Session) -> Result<(Cached, Option<Hit>)> {
        if !may_be_answered(session.req_header()) || !session.is_body_empty() {
            return Ok((Cached::No, None));
        }
        let Some(key) = self.key(session.req_header()) else { return Ok((Cached::No, None)) };
        let Some(value) = self.cache.get(&key).await else { return Ok((Cached::Missed(key), None)) };
        let fresh = decode(value.into()).and_then(|(exchange, body)| {
            let age = exchange.age_for(session.req_header(), SystemTime::now())?;
            Some((exchange, age, body))
        });
        match fresh {
            Some((exchange, age, body)) => Ok((Cached::Hit, Some(Hit::new(&exchange, age, body)?))),
            None => {
                self.unusable.fetch_add(1, Ordering::Relaxed);
                Ok((Cached::Missed(key), None))
            }
        }
    }

    /// The head of an upstream's answer is here: begins to take it down, or forgets what it has changed.
    pub(crate) fn head(&self, request: &RequestHeader, answer: &ResponseHeader, cached: &mut Cached) {
        let status = answer.status;
        if !request.method.is_safe() && (status.is_success() || status.is_redirection()) {
            // Removals wait without a limit of their own while a Redis cannot be reached. Beyond this many it is the
            // entries' lifetimes that end them.
            if let Some(key) = self.key(request)
                && self.cache.pending() < MOST_PENDING
            {
                self.cache.invalidate(key);
            }
        }
        // A retry has another head.
        let key = match std::mem::take(cached) {
            Cached::Missed(key) => key,
            Cached::Storing(storing) => storing.key,
            other => {
                *cached = other;
                return;
            }
        };
        let storable = known_length(answer)
            .and_then(|length| Some((length, Exchange::storable(request, answer, SystemTime::now())?)));
        *cached = match storable {
            Some((length, (exchange, lives))) => {
                Cached::Storing(Box::new(Storing { key, exchange, body: Vec::new(), lives, length }))
            }
            None => Cached::Missed(key),
        };
    }

    /// A part of that answer's body is here; stores it all at its end.
    pub(crate) fn body(&self, part: Option<&Bytes>, end: bool, cached: &mut Cached) {
        let Cached::Storing(storing) = cached else { return };
        let fits = storing.add(part);
        if fits && !end {
            return;
        }
        let Cached::Storing(storing) = std::mem::take(cached) else { return };
        if fits
            && storing.is_whole()
            && let Some(value) = encode(&storing.exchange, &storing.body)
        {
            self.cache.put(storing.key.clone(), value, storing.lives);
        }
        *cached = Cached::Missed(storing.key);
    }

    /// How it did since the start, as clients saw it.
    pub(crate) fn statistics(&self) -> Statistics {
        let Statistics { hits, misses, invalidations, dropped } = self.cache.statistics();
        // Counted after the hit it corrects.
        let unusable = self.unusable.load(Ordering::Relaxed).min(hits);
        Statistics { hits: hits - unusable, misses: misses + unusable, invalidations, dropped }
    }

    /// Writes that have not landed.
    pub(crate) fn pending(&self) -> usize {
        self.cache.pending()
    }

    /// Where it is, without user and password.
    pub(crate) fn url(&self) -> String {
        self.cache.url().to_string()
    }

    fn key(&self, request: &RequestHeader) -> Option<String> {
        // Two paths that are not Unicode could read the same.
        if !request.raw_path_is_utf8() {
            return None;
        }
        let host = host(request)?;
        let path = request.uri.path_and_query()?.as_str();
        // A query may hold secrets, and a cache is asked for everything.
        Some(format!("edge-proxy:{}:{}", self.cluster, fingerprint(&[host.as_bytes(), path.as_bytes()])))
    }
}

impl Hit {
    fn new(exchange: &Exchange, age: Duration, body: Bytes) -> Result<Self> {
        let mut head = ResponseHeader::build(200, Some(exchange.answer.len() + 3))?;
        for (name, value) in &exchange.answer {
            head.append_header(name.clone(), value.clone())?;
        }
        head.insert_header(AGE, age.as_secs())?;
        head.insert_header(CONTENT_LENGTH, body.len())?;
        head.append_header("Cache-Status", "edge-proxy; hit")?;
        Ok(Self { head: Box::new(head), body })
    }

    /// Answers with it. The client's connection stays as it is.
    pub(crate) async fn answer(self, session: &mut Session) -> Result<()> {
        let only_head = session.req_header().method == Method::HEAD;
        session.write_response_header(self.head, only_head).await?;
        if only_head { Ok(()) } else { session.write_response_body(Some(self.body), true).await }
    }
}

/// Whether a request is one that an answer in the cache can be for.
fn may_be_answered(request: &RequestHeader) -> bool {
    (request.method == Method::GET || request.method == Method::HEAD)
        && !PASS_BY.iter().any(|name| request.headers.contains_key(name))
}

/// The length that an answer's head tells, none if it comes in chunks; nothing if its end is the connection's (nobody knows
/// whether that was meant) or it is too long.
fn known_length(answer: &ResponseHeader) -> Option<Option<usize>> {
    match answer.headers.get(CONTENT_LENGTH) {
        Some(length) => length.to_str().ok()?.parse().ok().filter(|length| *length <= MOST_BODY).map(Some),
        None => answer.headers.contains_key(TRANSFER_ENCODING).then_some(None),
    }
}

/// The host that is asked for, in lower case; HTTP/2 has it in the URI.
fn host(request: &RequestHeader) -> Option<String> {
    let host = match request.uri.authority() {
        Some(authority) => authority.as_str(),
        None => request.headers.get(HOST)?.to_str().ok()?,
    };
    Some(host.to_ascii_lowercase())
}

/// A request as the policy is to see it: by path, its method `GET`, its headers [`plain`].
fn asked(request: &RequestHeader) -> Option<Request<()>> {
    let mut asked = Request::new(());
    *asked.uri_mut() = Uri::from(request.uri.path_and_query()?.clone());
    *asked.headers_mut() = plain(&request.headers);
    asked.headers_mut().insert(HOST, HeaderValue::from_str(&host(request)?).ok()?);
    Some(asked)
}

/// Headers of which the policy looks at the first line only, joined; and directives in lower case, as it compares them
/// (they have no case: RFC 9111, section 5.2).
fn plain(headers: &HeaderMap) -> HeaderMap {
    let mut all = HeaderMap::with_capacity(headers.keys_len());
    for name in headers.keys() {
        let values: Vec<_> = headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
        let mut joined = values.join(&b", "[..]);
        if *name == CACHE_CONTROL || *name == PRAGMA {
            joined.make_ascii_lowercase();
        }
        if let Ok(value) = HeaderValue::from_bytes(&joined) {
            all.insert(name, value);
        }
    }
    all
}

/// The policy for an answer that came at `at`; none if the crate would panic over its `Age`, or would not see a header that
/// decides: it passes over values that are not ASCII, a `private` in them included.
fn policy(asked: &Request<()>, answer: &HeaderMap, at: SystemTime) -> Option<CachePolicy> {
    let deciding = [CACHE_CONTROL, PRAGMA, VARY, EXPIRES, AGE];
    if deciding.iter().any(|name| answer.get_all(name).iter().any(|value| value.to_str().is_err())) {
        return None;
    }
    let mut response = Response::new(());
    *response.headers_mut() = plain(answer);
    if let Some(age) = response.headers().get(AGE) {
        // It adds without looking.
        let seconds: u64 = age.to_str().ok()?.trim().parse().ok()?;
        if seconds > MOST_AGE {
            return None;
        }
    }
    // No lifetime of its own: neither for want of one, nor for `immutable`.
    let options = CacheOptions {
        cache_heuristic: 0.0,
        immutable_min_time_to_live: Duration::ZERO,
        ..CacheOptions::default()
    };
    Some(CachePolicy::new_options(asked, &response, at, options))
}

/// An answer that is being taken down.
#[derive(Debug)]
pub(crate) struct Storing {
    key: String,
    exchange: Exchange,
    body: Vec<u8>,
    lives: Duration,
    /// What its head says; nothing if it comes in chunks.
    length: Option<usize>,
}

impl Storing {
    /// Adds a part, unless it would be too much.
    fn add(&mut self, part: Option<&Bytes>) -> bool {
        let part = part.map_or(&[][..], |part| part);
        let fits = self.body.len() + part.len() <= MOST_BODY;
        if fits {
            self.body.extend_from_slice(part);
        }
        fits
    }

    fn is_whole(&self) -> bool {
        self.length.is_none_or(|length| length == self.body.len())
    }
}

/// A request and its answer, without the body: what the policy decides from.
#[derive(Clone, Debug, PartialEq)]
struct Exchange {
    /// When the answer came, in milliseconds since the Unix epoch.
    at_ms: u64,
    /// What of the request the policy may ask for.
    asked: HeaderMap,
    /// The answer's headers, but those of its connection and its framing.
    answer: HeaderMap,
}

impl Exchange {
    /// The exchange and how long its answer may be given again; nothing if it may not.
    fn storable(
        request: &RequestHeader,
        answer: &ResponseHeader,
        now: SystemTime,
    ) -> Option<(Self, Duration)> {
        let headers = &answer.headers;
        // The policy has the last word; this spares it what it could only say no to.
        let has_lifetime = headers.contains_key(CACHE_CONTROL) || headers.contains_key(EXPIRES);
        if request.method != Method::GET
            || answer.status != 200
            || !has_lifetime
            || headers.contains_key(SET_COOKIE)
        {
            return None;
        }
        let mut asked = asked(request)?;
        *asked.headers_mut() = selecting(asked.headers(), headers);
        let policy = policy(&asked, headers, now)?;
        let lives = policy.time_to_live(now).min(LONGEST_LIFE);
        if !policy.is_storable() || lives.is_zero() {
            return None;
        }
        let at_ms = u64::try_from(now.duration_since(UNIX_EPOCH).ok()?.as_millis()).ok()?;
        let exchange = Self { at_ms, asked: asked.into_parts().0.headers, answer: end_to_end(headers) };
        Some((exchange, lives))
    }

    /// How old the answer is, if it may be given to `request`.
    fn age_for(&self, request: &RequestHeader, now: SystemTime) -> Option<Duration> {
        let mut presented = asked(request)?;
        *presented.headers_mut() = selecting(presented.headers(), &self.answer);
        let mut original = Request::new(());
        // The key is the same, and so is the path.
        *original.uri_mut() = presented.uri().clone();
        *original.headers_mut() = self.asked.clone();
        let at = UNIX_EPOCH.checked_add(Duration::from_millis(self.at_ms))?;
        let policy = policy(&original, &self.answer, at)?;
        let fresh = matches!(policy.before_request(&presented, now), BeforeRequest::Fresh(_));
        fresh.then(|| policy.age(now))
    }
}

/// What of a request decides whether its answer is another's, too. Of what `Vary` names only a fingerprint is kept, and of the
/// rest nothing: it may be secret.
fn selecting(asked: &HeaderMap, answer: &HeaderMap) -> HeaderMap {
    let vary = answer.get_all(VARY).iter().filter_map(|value| value.to_str().ok());
    let varying =
        vary.flat_map(|names| names.split(',')).filter_map(|name| name.trim().parse::<HeaderName>().ok());
    let mut kept = HeaderMap::new();
    for name in varying {
        if let Some(value) = asked.get(&name) {
            let value = fingerprint(&[value.as_bytes()]);
            kept.insert(name, HeaderValue::from_str(&value).expect("hexadecimal digits"));
        }
    }
    for name in [HOST, CACHE_CONTROL, PRAGMA] {
        if let Some(value) = asked.get(&name) {
            kept.insert(name, value.clone());
        }
    }
    kept
}

/// By which a text is known again and not read: SHA-256 of its parts, each with its length before it.
fn fingerprint(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An answer's headers without those that belong to its connection (RFC 9110, section 7.6.1) and to its framing.
fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let mut kept = headers.clone();
    let named = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    for name in named.flat_map(|names| names.split(',')) {
        kept.remove(name.trim());
    }
    for name in HOP_BY_HOP {
        kept.remove(name);
    }
    kept
}

/// An exchange with its body, as bytes: the version, the time, the two lists of headers, the body; each with its length
/// before it.
fn encode(exchange: &Exchange, body: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = vec![VERSION];
    bytes.extend(exchange.at_ms.to_be_bytes());
    for headers in [&exchange.asked, &exchange.answer] {
        bytes.extend(u16::try_from(headers.len()).ok()?.to_be_bytes());
        for (name, value) in headers {
            for text in [name.as_str().as_bytes(), value.as_bytes()] {
                bytes.extend(u32::try_from(text.len()).ok()?.to_be_bytes());
                bytes.extend(text);
            }
        }
    }
    bytes.extend(u32::try_from(body.len()).ok()?.to_be_bytes());
    bytes.extend(body);
    Some(bytes)
}

/// Reads what [`encode`] has written; nothing if it was somebody else, or another version.
fn decode(bytes: Bytes) -> Option<(Exchange, Bytes)> {
    let mut rest = Reader(bytes);
    if rest.take(1)?[0] != VERSION {
        return None;
    }
    let at_ms = u64::from_be_bytes(rest.take(8)?[..].try_into().ok()?);
    let (asked, answer) = (rest.headers()?, rest.headers()?);
    let body = rest.text()?;
    // Whoever wrote it: framing and connection are ours.
    rest.0.is_empty().then(|| (Exchange { at_ms, asked, answer: end_to_end(&answer) }, body))
}

struct Reader(Bytes);

impl Reader {
    fn take(&mut self, length: usize) -> Option<Bytes> {
        (length <= self.0.len()).then(|| self.0.split_to(length))
    }

    fn text(&mut self) -> Option<Bytes> {
        let length = u32::from_be_bytes(self.take(4)?[..].try_into().ok()?);
        self.take(usize::try_from(length).ok()?)
    }

    fn headers(&mut self) -> Option<HeaderMap> {
        let count = u16::from_be_bytes(self.take(2)?[..].try_into().ok()?);
        let mut headers = HeaderMap::new();
        for _ in 0..count {
            let name = HeaderName::from_bytes(&self.text()?).ok()?;
            let value = HeaderValue::from_bytes(&self.text()?).ok()?;
            headers.try_append(name, value).ok()?;
        }
        Some(headers)
    }
}

/// The form of an entry.
const VERSION: u8 = 1;
/// The largest body that is kept.
const MOST_BODY: usize = 256 * 1024;
/// However long an answer says that it may be kept.
const LONGEST_LIFE: Duration = Duration::from_secs(24 * 3600);
/// An older answer is not stored, in seconds.
const MOST_AGE: u64 = 365 * 24 * 3600;
/// Removals that may wait.
const MOST_PENDING: usize = 50_000;

/// A request with one of these passes by.
const PASS_BY: [HeaderName; 9] = [
    header::AUTHORIZATION,
    header::COOKIE,
    header::IF_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_NONE_MATCH,
    header::IF_RANGE,
    header::IF_UNMODIFIED_SINCE,
    header::RANGE,
    header::UPGRADE,
];

const HOP_BY_HOP: [HeaderName; 10] = [
    CONNECTION,
    CONTENT_LENGTH,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    TRANSFER_ENCODING,
    header::UPGRADE,
];

#[cfg(test)]
mod tests {
    use axum_service::resources::CacheUrl;
    use proptest::prelude::*;

    use super::*;

    fn request(method: &str, path: &str, headers: &[(&'static str, &str)]) -> RequestHeader {
        let mut request = RequestHeader::build(method, path.as_bytes(), None).unwrap();
        request.insert_header("Host", "Edge.Example").unwrap();
        for (name, value) in headers {
            request.append_header(*name, *value).unwrap();
        }
        request
    }

    fn answer(headers: &[(&'static str, &str)]) -> ResponseHeader {
        let mut answer = ResponseHeader::build(200, None).unwrap();
        for (name, value) in headers {
            answer.append_header(*name, *value).unwrap();
        }
        answer
    }

    const GET: (&str, &str) = ("GET", "/a?b=1");
    const MINUTE: (&str, &str) = ("Cache-Control", "max-age=60");

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_700_000_000)
    }

    /// Stores an answer with these headers to a request with those, if it may be; through bytes and back.
    fn stored(asked: &[(&'static str, &str)], answered: &[(&'static str, &str)]) -> Option<Exchange> {
        let request = request(GET.0, GET.1, asked);
        let (exchange, _) = Exchange::storable(&request, &answer(answered), now())?;
        let (read, body) = decode(encode(&exchange, b"body").unwrap().into()).unwrap();
        assert_eq!((&read, &body[..]), (&exchange, &b"body"[..]));
        Some(read)
    }

    /// How old it is for a request with these headers, after so many seconds.
    fn age(exchange: &Exchange, asked: &[(&'static str, &str)], after: u64) -> Option<u64> {
        let request = request(GET.0, GET.1, asked);
        exchange.age_for(&request, now() + Duration::from_secs(after)).map(|age| age.as_secs())
    }

    #[test]
    fn what_may_be_kept_is_fresh_for_its_lifetime_and_has_an_age() {
        let exchange = stored(&[], &[MINUTE, ("Age", "10")]).unwrap();
        assert_eq!((age(&exchange, &[], 0), age(&exchange, &[], 49)), (Some(10), Some(59)));
        assert_eq!(age(&exchange, &[], 50), None);
        assert_eq!(age(&exchange, &[("Cache-Control", "no-cache")], 0), None);
        assert_eq!(age(&exchange, &[("Cache-Control", "max-age=20")], 11), None);
    }

    #[test]
    fn what_may_not_be_kept_is_not() {
        /// A request's headers, and its answer's.
        type Case<'a> = (&'a [(&'static str, &'a str)], &'a [(&'static str, &'a str)]);
        let cases: &[Case<'_>] = &[
            (&[], &[]),
            (&[], &[("Cache-Control", "no-store, max-age=60")]),
            // Directives have no case.
            (&[], &[("Cache-Control", "Max-Age=60, No-Store")]),
            (&[], &[("Cache-Control", "max-age=60"), ("Cache-Control", "Private")]),
            (&[], &[("Cache-Control", "max-age=0")]),
            (&[], &[MINUTE, ("Set-Cookie", "a=1")]),
            (&[], &[("Cache-Control", "public, max-age=60"), ("Set-Cookie", "a=1")]),
            (&[], &[MINUTE, ("Vary", "*")]),
            (&[], &[("Last-Modified", "Mon, 01 Jan 2001 00:00:00 GMT")]),
            (&[], &[("Cache-Control", "immutable")]),
            // The crate would add this to a time.
            (&[], &[MINUTE, ("Age", "18446744073709551615")]),
            (&[("Cache-Control", "no-store")], &[MINUTE]),
        ];
        for (asked, answered) in cases {
            assert_eq!(stored(asked, answered), None, "{asked:?} {answered:?}");
        }
        let mut other = answer(&[MINUTE]);
        other.set_status(404).unwrap();
        assert!(Exchange::storable(&request(GET.0, GET.1, &[]), &other, now()).is_none());
        assert!(Exchange::storable(&request("HEAD", GET.1, &[]), &answer(&[MINUTE]), now()).is_none());
    }

    #[test]
    fn a_header_that_decides_and_cannot_be_read_decides_against() {
        for name in [CACHE_CONTROL, PRAGMA, VARY, EXPIRES, AGE] {
            let mut answer = answer(&[MINUTE, ("Expires", "Wed, 01 Jan 2070 00:00:00 GMT")]);
            // The crate passes over such a line, and with it over what else stands there.
            answer.append_header(name.clone(), HeaderValue::from_bytes(b"private, \xe4").unwrap()).unwrap();
            assert!(Exchange::storable(&request(GET.0, GET.1, &[]), &answer, now()).is_none(), "{name}");
        }
    }

    #[test]
    fn no_secret_of_a_request_can_be_read_in_an_entry_or_its_key() {
        let asked = [("X-Api-Key", "hunter2")];
        let exchange = stored(&asked, &[MINUTE, ("Vary", "X-Api-Key")]).unwrap();
        assert_eq!(
            (age(&exchange, &asked, 1), age(&exchange, &[("X-Api-Key", "other")], 1)),
            (Some(1), None)
        );
        let bytes = encode(&exchange, b"").unwrap();
        assert!(!bytes.windows(7).any(|seven| seven == b"hunter2"));
        let cache = ResponseCache::new(Cache::open(CacheUrl::Memory, Duration::ZERO), "default");
        let key = cache.key(&request("GET", "/a?token=hunter2", &[])).unwrap();
        assert!(key.starts_with("edge-proxy:default:") && !key.contains("hunter2"), "{key}");
    }

    #[test]
    fn a_variant_is_for_those_who_ask_alike_in_every_line() {
        let french = [("Accept-Language", "fr"), ("Accept-Language", "en")];
        let exchange = stored(&french, &[MINUTE, ("Vary", "accept-language")]).unwrap();
        assert_eq!(age(&exchange, &french, 1), Some(1));
        assert_eq!(age(&exchange, &[("Accept-Language", "fr"), ("Accept-Language", "de")], 1), None);
        assert_eq!(age(&exchange, &french[..1], 1), None);
        assert_eq!(age(&exchange, &[], 1), None);
    }

    #[test]
    fn head_may_have_what_get_has_left() {
        let exchange = stored(&[], &[MINUTE]).unwrap();
        assert!(exchange.age_for(&request("HEAD", GET.1, &[]), now()).is_some());
    }

    #[test]
    fn a_request_that_is_somebodys_own_or_has_a_condition_passes_by() {
        for name in PASS_BY {
            let mut request = request(GET.0, GET.1, &[]);
            request.insert_header(name.clone(), "x").unwrap();
            assert!(!may_be_answered(&request), "{name}");
        }
        assert!(may_be_answered(&request("HEAD", "/", &[])) && !may_be_answered(&request("POST", "/", &[])));
    }

    #[test]
    fn of_a_request_only_what_decides_is_kept_and_of_an_answer_what_goes_to_the_end() {
        let asked = [("X-Api-Key", "secret"), ("Accept", "text/html")];
        let answered = [
            MINUTE,
            ("Vary", "Accept"),
            ("Link", "<1>"),
            ("Link", "<2>"),
            ("Connection", "close, x-mine"),
            ("X-Mine", "1"),
            ("Transfer-Encoding", "chunked"),
        ];
        let exchange = stored(&asked, &answered).unwrap();
        let names: Vec<_> = exchange.asked.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["accept", "host"]);
        let kept: Vec<_> = exchange.answer.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(kept, ["cache-control", "vary", "link", "link"]);
    }

    #[test]
    fn a_body_that_is_too_long_or_too_short_is_not_whole() {
        let exchange = stored(&[], &[MINUTE]).unwrap();
        let storing = |length| Storing {
            key: "key".into(),
            exchange: exchange.clone(),
            body: Vec::new(),
            lives: Duration::from_secs(60),
            length,
        };
        let part = Bytes::from(vec![0; MOST_BODY / 2]);
        let mut chunked = storing(None);
        assert!(chunked.add(Some(&part)) && chunked.add(None) && chunked.add(Some(&part)));
        assert!(chunked.is_whole() && !chunked.add(Some(&Bytes::from_static(b"x"))));
        let mut measured = storing(Some(3));
        assert!(measured.add(Some(&Bytes::from_static(b"ab"))) && !measured.is_whole());
        assert!(measured.add(Some(&Bytes::from_static(b"c"))) && measured.is_whole());
    }

    proptest! {
        #[test]
        fn bytes_of_somebody_else_are_a_miss_and_never_a_panic(mut bytes: Vec<u8>, ours: bool) {
            if ours && !bytes.is_empty() {
                bytes[0] = VERSION;
            }
            if let Some((exchange, _)) = decode(bytes.into()) {
                exchange.age_for(&request(GET.0, GET.1, &[]), now());
            }
        }

        #[test]
        fn an_entry_that_was_cut_or_changed_is_never_a_panic(at: usize, to: u8, cut: bool) {
            let headers = [MINUTE, ("Age", "10"), ("Vary", "Accept"), ("Warning", "199 - \"x\"")];
            let exchange = stored(&[("Accept", "text/html")], &headers).unwrap();
            let mut bytes = encode(&exchange, b"body").unwrap();
            let at = at % bytes.len();
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] = to;
            }
            let read = decode(bytes.into());
            prop_assert!(!cut || read.is_none());
            if let Some((exchange, _)) = read {
                exchange.age_for(&request(GET.0, GET.1, &[("Accept", "text/html")]), now());
            }
        }
    }
}
