//! What is restarted: a kind of server, how it is started, and how it must exit.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_core::ShutdownConfig;

use crate::PATIENCE;
use crate::client::get;
use crate::process::{EdgeProxy, Process, Stopwatch, binary};
use crate::rig::affinity;
use crate::rig::balancer::Instance;

/// How long clients have after the listener has closed; more than the long-idle ones think.
const LINGER: &str = "2500ms";
/// How long WebSockets have once the requests are over; those of a proxy are cut at its end.
const WEBSOCKETS: &str = "500ms";

/// A kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// axum-service, on our accept loop.
    Serve,
    /// edge-proxy with its demo upstreams.
    EdgeProxy,
    /// Stock axum with graceful shutdown, this long after the signal. It knows no readiness: the delay stands for a
    /// preStop hook that sleeps.
    StockAxum(Duration),
}

/// How a kind of server ends its WebSockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goodbye {
    /// A message that says so, then Close 1001. Anything else is a loss.
    Told,
    /// Kept while requests drain, then cut: a proxy cannot put a frame into somebody else's stream. A cut earlier than
    /// the lame duck's end, or of a server that was not told to stop, is a loss.
    Cut,
    /// Cut at once. Nothing was promised, and all of it is a loss.
    None,
}

impl Kind {
    /// How it ends WebSockets.
    pub fn goodbye(self) -> Goodbye {
        match self {
            Self::Serve => Goodbye::Told,
            Self::EdgeProxy => Goodbye::Cut,
            Self::StockAxum(_) => Goodbye::None,
        }
    }

    /// Whether this is what `/` answers.
    pub fn is_root(self, body: &[u8]) -> bool {
        match self {
            Self::Serve | Self::StockAxum(_) => body == b"hello\n",
            Self::EdgeProxy => body == b"demo upstream one\n" || body == b"demo upstream two\n",
        }
    }

    /// What `/stream` answers.
    pub fn streamed(self) -> Vec<u8> {
        match self {
            Self::Serve | Self::StockAxum(_) => (0..20).flat_map(|chunk| [b'a' + chunk; 1000]).collect(),
            Self::EdgeProxy => {
                (1..=20).flat_map(|chunk| format!("chunk {chunk} of 20\n").into_bytes()).collect()
            }
        }
    }

    fn start(self, lame_duck: Duration) -> (Process, SocketAddr, Option<tempfile::TempDir>) {
        let lame_duck = format!("{}ms", lame_duck.as_millis());
        let env = [
            ("SHUTDOWN_LAME_DUCK", lame_duck.as_str()),
            ("SHUTDOWN_LINGER", LINGER),
            ("SHUTDOWN_WEBSOCKET_TIMEOUT", WEBSOCKETS),
        ];
        let listening = |command: &mut Command| {
            let process = Process::start(command);
            let addr = process.address("listening on ");
            (process, addr, None)
        };
        match self {
            Self::Serve => {
                let mut command = Command::new(binary("axum-lines"));
                for name in ShutdownConfig::VARIABLES {
                    command.env_remove(name);
                }
                listening(command.env("AXUM_SERVICE_LISTEN", "127.0.0.1:0").envs(env))
            }
            Self::EdgeProxy => {
                let (process, addr, dir) = EdgeProxy::start(env).into_parts();
                (process, addr, Some(dir))
            }
            Self::StockAxum(delay) => {
                let delay = delay.as_millis().to_string();
                listening(Command::new(binary("stock-axum")).env("STOCK_AXUM_DELAY_MS", delay))
            }
        }
    }

    /// The exit codes that `cut` WebSockets cut explain.
    fn exit_code(self, cut: usize) -> i32 {
        if self == Self::EdgeProxy && cut > 0 { 11 } else { 0 }
    }

    /// Whether a line of stderr is one that a good exit explains.
    fn expected(self, line: &str, cut: usize) -> bool {
        let line = line.to_ascii_lowercase();
        let alarming = ["panic", "error", "warn"].iter().any(|word| line.contains(word));
        let has = |parts: &[&str]| parts.iter().any(|part| line.contains(part));
        !alarming || has(&STARVED) || (self == Self::EdgeProxy && (has(&POOL) || (cut > 0 && has(&CUTS))))
    }
}

/// What a server says that got no processor for seconds, as one of several on a single one may: in one restart of a hundred.
/// What it lost by that is counted by its clients.
const STARVED: [&str; 1] = ["a listener did not close in time"];
/// What Pingora calls an error, in lower case, when the watcher of a pooled upstream connection holds it at that
/// moment (`pingora-core` 0.9.1, `connectors/mod.rs`). It opens another one; no shutdown has a part in it.
const POOL: [&str; 1] = ["failed to acquire reusable stream"];
/// Of what edge-proxy warns when it cuts a WebSocket, in lower case. Not of the cut of anything else.
const CUTS: [&str; 4] = [
    "session cut session=\"get /ws\"",
    "stage websockets: cutting what is left",
    "stage=\"websockets\"",
    "not all of it well exit_code=11",
];

/// One that runs.
pub struct Server {
    kind: Kind,
    process: Process,
    instance: Arc<Instance>,
    _dir: Option<tempfile::TempDir>,
}

/// How it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// TERM.
    Told,
    /// KILL.
    Abrupt,
}

impl Server {
    /// Starts one and waits until it answers.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start(kind: Kind, lame_duck: Duration) -> Self {
        let (process, addr, dir) = kind.start(lame_duck);
        assert_eq!(get(addr, "/").expect("it serves").status, 200);
        Self { kind, process, instance: Instance::new(addr), _dir: dir }
    }

    /// As its clients know it.
    pub fn instance(&self) -> &Arc<Instance> {
        &self.instance
    }

    /// The processors on which it may run.
    pub fn processors(&self) -> std::collections::BTreeSet<usize> {
        affinity::of_process(self.process.id())
    }

    /// Sends the signal.
    pub fn signal(&self, stop: Stop) {
        match stop {
            Stop::Told => {
                // First: a client that is cut looks whether the server was told.
                self.instance.tell();
                self.process.signal(Signal::TERM);
            }
            Stop::Abrupt => self.process.signal(Signal::KILL),
        }
    }

    /// Waits for its end after `stop`, and looks at exit code and stderr. How long it took, and what is wrong.
    ///
    /// # Panics
    ///
    /// If it does not end within a minute.
    pub fn ended(mut self, stop: Stop) -> (Duration, Vec<String>) {
        let begin = Stopwatch::start();
        let status = self.process.ended(PATIENCE);
        let took = begin.elapsed();
        if stop == Stop::Abrupt {
            return (took, Vec::new());
        }
        let cut = self.instance.sockets_cut();
        let mut wrong = Vec::new();
        let code = self.kind.exit_code(cut);
        if status.code() != Some(code) {
            wrong.push(format!("{status}, wanted {code} with {cut} WebSockets cut"));
        }
        let stderr = self.process.stderr();
        wrong.extend(stderr.lines().filter(|line| !self.kind.expected(line, cut)).map(ToOwned::to_owned));
        if !wrong.is_empty() {
            wrong.push(format!("all of its stderr:\n{stderr}"));
        }
        (took, wrong)
    }
}
