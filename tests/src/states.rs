//! What clients are in the middle of when the stop comes, and what becomes of them.
//!
//! A [`State`] brings a client into its state, says when TERM is to be sent, and tells what the client got. [`measure`]
//! does that with a process of its own and adds when it was gone, its exit code and its report.

pub mod http1;
pub mod http2;
pub mod sessions;
pub mod tls;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier, OnceLock};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::PATIENCE;
use crate::client::{Answer, Connection, status_until};
use crate::process::{EdgeProxy, Process, Stopwatch, binary, read_report};

/// A kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Our own accept loop.
    Serve,
    /// Stock `axum::serve` over our listener.
    Stock,
    /// The proxy, with its demo upstreams.
    EdgeProxy,
    /// Our own accept loop over TLS.
    Tls,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Serve => "serve",
            Self::Stock => "stock",
            Self::EdgeProxy => "edge-proxy",
            Self::Tls => "tls-serve",
        })
    }
}

/// A server of one kind in a process of its own.
pub struct Service {
    /// Which.
    pub kind: Kind,
    /// The process.
    pub process: Process,
    /// Where it serves.
    pub listen: SocketAddr,
    /// Where it is administered.
    pub admin: SocketAddr,
    dir: tempfile::TempDir,
}

impl Service {
    /// Starts one with this environment and waits until it serves.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start<'a>(kind: Kind, env: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut command = match kind {
            Kind::EdgeProxy => EdgeProxy::command(dir.path()),
            Kind::Serve => Command::new(binary("axum-lines")),
            Kind::Stock => Command::new(binary("axum-stock")),
            Kind::Tls => Command::new(binary("tls-serve")),
        };
        for name in shutdown_core::ShutdownConfig::VARIABLES {
            command.env_remove(name);
        }
        command
            .env("AXUM_SERVICE_LISTEN", "127.0.0.1:0")
            .env("AXUM_SERVICE_ADMIN", "127.0.0.1:0")
            .env("AXUM_SERVICE_REPORTS", dir.path().join("data"))
            .envs(env);
        let process = Process::start(&mut command);
        let (listen, admin) = match kind {
            Kind::EdgeProxy => ("  traffic ", "  admin "),
            _ => ("listening on ", "admin on "),
        };
        let (listen, admin) = (process.address(listen), process.address(admin));
        Self { kind, process, listen, admin, dir }
    }

    /// The last report on disk.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn report(&self) -> Value {
        read_report(&self.dir.path().join("data"))
    }
}

/// A client's state.
#[derive(Clone, Copy)]
pub struct State {
    /// In words.
    pub name: &'static str,
    /// What its servers' environment says besides [`BUDGETS`].
    pub env: &'static [(&'static str, &'static str)],
    /// The client: what it got.
    pub client: fn(&Visit) -> io::Result<String>,
}

impl State {
    /// A state with the usual budgets.
    pub const fn new(name: &'static str, client: fn(&Visit) -> io::Result<String>) -> Self {
        Self { name, env: &[], client }
    }

    /// The same state with this besides.
    pub const fn env(mut self, env: &'static [(&'static str, &'static str)]) -> Self {
        self.env = env;
        self
    }
}

/// The budgets of a server under test: short, and far enough apart to be told from each other.
pub const BUDGETS: [(&str, &str); 3] =
    [("SHUTDOWN_LINGER", "300ms"), ("SHUTDOWN_GRACEFUL_TIMEOUT", "2"), ("SHUTDOWN_WEBSOCKET_TIMEOUT", "1")];

/// A client's view of the server that it is in some state with.
pub struct Visit {
    /// Which kind.
    pub kind: Kind,
    /// Where it serves.
    pub listen: SocketAddr,
    /// What [`Kind::Tls`] shows, in DER.
    pub certificate: Vec<u8>,
    admin: SocketAddr,
    term: Sender<()>,
    gone: Arc<OnceLock<()>>,
}

impl Visit {
    /// The client is in its state: sends TERM.
    pub fn term(&self) {
        // It is waited for until this visit is over.
        let _ = self.term.send(());
    }

    /// Waits until the server says this of itself.
    pub fn until(&self, wanted: impl Fn(&Value) -> bool) {
        status_until(self.admin, wanted);
    }

    /// Waits until this many connections are open.
    pub fn connected(&self, connections: u64) {
        self.until(|status| status["connections"]["open"] == connections);
    }

    /// Waits until this many requests are in flight.
    pub fn in_flight(&self, requests: u64) {
        self.until(|status| status["requests"]["active"] == requests);
    }

    /// Waits until the process is gone.
    pub fn gone(&self) {
        self.gone.wait();
    }

    /// The whole answer to `GET path`.
    ///
    /// # Panics
    ///
    /// If that route's answer is not known here.
    pub fn whole(&self, path: &str) -> Vec<u8> {
        let (route, query) = path.split_once('?').unwrap_or((path, ""));
        let value = || query.split_once('=').and_then(|(_, value)| value.parse().ok()).unwrap_or(0);
        match (route, self.kind) {
            ("/bytes", _) => (0..=250).cycle().take(value()).collect(),
            ("/", Kind::EdgeProxy) => b"demo upstream ".to_vec(),
            ("/", _) => b"hello\n".to_vec(),
            ("/slow", Kind::EdgeProxy) => format!("{} ms later\n", value()).into_bytes(),
            ("/slow", _) => b"slow\n".to_vec(),
            _ => panic!("what {path} answers is not known"),
        }
    }

    /// Whether this body is the whole answer to `GET path`.
    pub fn is_whole(&self, path: &str, body: &[u8]) -> bool {
        let whole = self.whole(path);
        // The proxy's upstreams say which they are.
        if whole.ends_with(b" ") { body.starts_with(&whole) && body.ends_with(b"\n") } else { body == whole }
    }

    /// An answer to `GET path` in words: its status, `close` if it says so, and what of its body is not there.
    pub fn tell(&self, path: &str, answer: io::Result<Answer>) -> String {
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return "no end".to_owned(),
            Err(error) => return error.kind().to_string(),
        };
        let close = if answer.header("connection") == Some("close") { " close" } else { "" };
        let odd = match answer.status {
            200 if !self.is_whole(path, &answer.body) => " BUT ANOTHER BODY",
            503 if answer.header("retry-after") != Some("1") => " WITHOUT RETRY-AFTER",
            _ => "",
        };
        format!("{}{close}{odd}", answer.status)
    }
}

/// How a connection ended, in words.
pub fn tell_end(connection: &mut Connection) -> String {
    match connection.closed() {
        Ok(rest) if rest.is_empty() => "closed".to_owned(),
        Ok(rest) => format!("closed after {} bytes more", rest.len()),
        Err(error) => error.kind().to_string(),
    }
}

/// What became of a state.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Which.
    pub state: &'static str,
    /// What the client got.
    pub got: String,
    /// When the process was gone, after TERM.
    pub gone: Duration,
    /// Its exit code.
    pub code: i32,
    /// What it reported: every count that is not zero.
    pub counts: String,
    /// Whether it panicked.
    pub panicked: bool,
}

/// Brings a client of a server of its own into each state, side by side, and measures what becomes of them. TERM comes
/// when all servers are up.
///
/// # Panics
///
/// If a client breaks for a reason that is not the server's stop.
pub fn measure(kind: Kind, states: &[State]) -> Vec<Measured> {
    let up = Barrier::new(states.len());
    thread::scope(|scope| {
        let visits: Vec<_> = states
            .iter()
            .map(|state| {
                let up = &up;
                scope.spawn(move || {
                    let service = Service::start(kind, BUDGETS.into_iter().chain(state.env.iter().copied()));
                    up.wait();
                    measure_one(service, state)
                })
            })
            .collect();
        visits.into_iter().map(|visit| visit.join().unwrap_or_else(|_| panic!("{kind}: see above"))).collect()
    })
}

fn measure_one(mut service: Service, state: &State) -> Measured {
    let (term, termed) = channel();
    let gone = Arc::new(OnceLock::new());
    let certificate = if service.kind == Kind::Tls {
        let line = service.process.stdout_line(|line| line.starts_with("certificate "));
        unhex(line.trim_start_matches("certificate "))
    } else {
        Vec::new()
    };
    let visit = Visit {
        kind: service.kind,
        listen: service.listen,
        certificate,
        admin: service.admin,
        term,
        gone: Arc::clone(&gone),
    };
    let client = state.client;
    let client = thread::spawn(move || client(&visit));
    if termed.recv_timeout(PATIENCE).is_err() {
        let broke = client.is_finished().then(|| client.join());
        let stderr = service.process.stderr_so_far();
        panic!("{}, {}: its client never got there: {broke:?}; stderr: {stderr}", service.kind, state.name);
    }
    let clock = Stopwatch::start();
    service.process.signal(Signal::TERM);
    let code = service.process.exit_code(PATIENCE);
    let elapsed = clock.elapsed();
    let _ = gone.set(());
    let got =
        client.join().unwrap_or_else(|_| panic!("{}, {}: its client panicked", service.kind, state.name));
    let got = got.unwrap_or_else(|error| panic!("{}, {}: {error}", service.kind, state.name));
    let panicked = service.process.stderr().contains("panicked");
    Measured { state: state.name, got, gone: elapsed, code, counts: counts(&service.report()), panicked }
}

/// A report's counts that are not zero, and what was cut by name, each name once.
fn counts(report: &Value) -> String {
    let counts = [
        ("requests", "drained", "drained"),
        ("requests", "refused", "refused"),
        ("requests", "client_gone", "gone"),
        ("requests", "cut", "request cut"),
        ("connections", "cut", "connection cut"),
        ("sessions", "told", "told"),
        ("sessions", "cut", "session cut"),
    ];
    let told = counts.iter().filter_map(|(of, count, word)| {
        let count = report[of][count].as_u64().filter(|count| *count > 0)?;
        Some(format!("{count} {word}"))
    });
    let names = [("requests", "cut_requests", "route"), ("sessions", "cut_sessions", "name")];
    let named = names.iter().flat_map(|(of, list, name)| {
        let cut = report[of][list].as_array().into_iter().flatten();
        cut.filter_map(move |cut| cut[name].as_str().map(str::to_owned))
    });
    let mut words: Vec<_> = told.chain(named).collect();
    words.dedup();
    words.join(", ")
}

fn unhex(text: &str) -> Vec<u8> {
    let digit =
        |byte: u8| u8::try_from(char::from(byte).to_digit(16).expect("a hexadecimal digit")).unwrap_or(0);
    text.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) * 16 + digit(pair[1])).collect()
}
