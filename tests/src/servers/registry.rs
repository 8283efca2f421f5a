//! A service registry over HTTP, in the test's own process: it writes down what it is asked.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::unix_ms;
use crate::PATIENCE;

/// What the registry does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Answers with this status.
    Status(u16),
    /// Takes the request and never answers.
    Hang,
    /// Takes no connection, and drops those it has.
    Refuse,
}

/// A request that has arrived whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// `PUT`, `DELETE` …
    pub method: String,
    /// The path, and the query if there was one.
    pub path: String,
    /// The body.
    pub body: String,
    /// When it had arrived, milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// The registry; it answers 200 until it is told otherwise.
pub struct Registry {
    addr: SocketAddr,
    shared: Arc<Shared>,
    // None once it is dropped.
    wanted: watch::Sender<Option<Answer>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Seen>,
    more: Condvar,
}

#[derive(Default)]
struct Seen {
    requests: Vec<Recorded>,
    // What the accept loop does by now.
    answer: Option<Answer>,
}

impl Registry {
    /// Starts one on a free port of the loopback.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        listener.set_nonblocking(true).expect("a socket");
        let addr = listener.local_addr().expect("it is bound");
        let shared = Arc::<Shared>::default();
        let (wanted, told) = watch::channel(Some(Answer::Status(200)));
        let theirs = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
            runtime.block_on(serve(listener, addr, theirs, told));
        });
        Self { addr, shared, wanted, thread: Some(thread) }
    }

    /// `http://127.0.0.1:port`
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// From now on it does this; when the call returns, a connection that comes finds it so.
    ///
    /// # Panics
    ///
    /// If it has come to an end.
    pub fn answer(&self, answer: Answer) {
        self.wanted.send_replace(Some(answer));
        drop(self.wait(|seen| seen.answer == Some(answer)));
    }

    /// What was asked by now.
    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.lock().requests.clone()
    }

    /// Waits for a request for which `wanted` holds.
    ///
    /// # Panics
    ///
    /// If none comes.
    pub fn asked(&self, wanted: impl Fn(&Recorded) -> bool) -> Recorded {
        let seen = self.wait(|seen| seen.requests.iter().any(&wanted));
        seen.requests.iter().find(|request| wanted(request)).cloned().expect("it was waited for")
    }

    fn wait(&self, until: impl Fn(&Seen) -> bool) -> MutexGuard<'_, Seen> {
        let seen = self.shared.lock();
        let (seen, late) = self
            .shared
            .more
            .wait_timeout_while(seen, PATIENCE, |seen| !until(seen))
            .expect("the registry does not panic");
        assert!(!late.timed_out(), "it never came; asked by now: {:?}", seen.requests);
        seen
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.wanted.send_replace(None);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("the registry does not panic")
    }
}

async fn serve(
    listener: std::net::TcpListener,
    addr: SocketAddr,
    shared: Arc<Shared>,
    mut told: watch::Receiver<Option<Answer>>,
) {
    let mut listener = Some(TcpListener::from_std(listener).expect("a listener"));
    let mut connections = JoinSet::new();
    loop {
        let answer = *told.borrow_and_update();
        match answer {
            None => return,
            Some(Answer::Refuse) => {
                listener = None;
                connections.shutdown().await;
            }
            Some(_) if listener.is_none() => {
                listener = Some(TcpListener::bind(addr).await.expect("the port is still ours"));
            }
            Some(_) => {}
        }
        shared.lock().answer = answer;
        shared.more.notify_all();
        let accepting = async {
            let Some(listener) = &listener else { return std::future::pending().await };
            while let Ok((stream, _)) = listener.accept().await {
                let (shared, told) = (Arc::clone(&shared), told.clone());
                let service = service_fn(move |request| handle(request, Arc::clone(&shared), told.clone()));
                connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        };
        let mut told = told.clone();
        tokio::select! {
            changed = told.changed() => if changed.is_err() { return },
            () = accepting => return,
        }
    }
}

async fn handle(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    told: watch::Receiver<Option<Answer>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (parts, body) = request.into_parts();
    let Ok(body) = body.collect().await else { return std::future::pending().await };
    let recorded = Recorded {
        method: parts.method.to_string(),
        path: parts.uri.to_string(),
        body: String::from_utf8_lossy(&body.to_bytes()).into_owned(),
        at_ms: unix_ms(),
    };
    shared.lock().requests.push(recorded);
    shared.more.notify_all();
    let answer = *told.borrow();
    match answer {
        Some(Answer::Status(status)) => {
            let mut response = Response::new(Full::default());
            *response.status_mut() =
                StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            Ok(response)
        }
        _ => std::future::pending().await,
    }
}
