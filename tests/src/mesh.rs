//! Edge proxies that are each other's peers, a peer under the test's hand, and upstreams that write down what comes when.
//!
//! Every node has an address of its own on loopback (Linux has all of 127.0.0.0/8 there), so that a node that comes back is
//! where it was and nobody else can be there meanwhile.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use shutdown_core::peers::Id;
use shutdown_core::peers::notice::{Ack, Datagram, Keys, Kind, Notice, Why};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::PATIENCE;
use crate::client::{get, status_until};
use crate::process::{EdgeProxy, Process};

/// The cluster's key file.
pub const KEYS: &str = "7:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n";

/// An address that nobody else has.
pub fn place() -> SocketAddr {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let [_, c, b, a] = std::process::id().to_be_bytes();
    let first = u8::try_from(1 + number % 250).expect("below 251");
    let port = 20_000 + u16::from(c) * 16 + u16::try_from(number / 250 % 16).expect("below 16");
    SocketAddr::from((Ipv4Addr::new(127, first, b, a), port))
}

/// The time of day.
pub fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
    u64::try_from(now.as_millis()).expect("a clock before the year 500 million")
}

/// A request as an upstream saw it.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// When its head was complete.
    pub at: Instant,
    /// What it asks for.
    pub path: String,
    /// Its head, lower-cased.
    pub head: String,
}

#[derive(Default)]
struct Came {
    all: Vec<Arrival>,
    held: usize,
    released: bool,
}

/// An upstream that answers at once, but keeps what asks for `/hold` until it is released.
pub struct Upstream {
    /// Where.
    pub at: SocketAddr,
    came: Arc<(Mutex<Came>, Condvar)>,
}

impl Upstream {
    /// Starts one at an address of its own.
    ///
    /// # Panics
    ///
    /// If it cannot listen.
    pub fn start() -> Self {
        Self::start_at(place())
    }

    /// Starts one there.
    ///
    /// # Panics
    ///
    /// If it cannot listen.
    pub fn start_at(at: SocketAddr) -> Self {
        let listener = TcpListener::bind(at).unwrap_or_else(|error| panic!("{at}: {error}"));
        let came = Arc::<(Mutex<Came>, Condvar)>::default();
        let shared = Arc::clone(&came);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let came = Arc::clone(&shared);
                // A proxy that leaves first is none of its business.
                std::thread::spawn(move || serve(stream, &came));
            }
        });
        Self { at, came }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.at)
    }

    /// What has come so far.
    pub fn came(&self) -> Vec<Arrival> {
        self.came.0.lock().expect("no upstream panics").all.clone()
    }

    /// How many have come so far.
    pub fn count(&self) -> usize {
        self.came.0.lock().expect("no upstream panics").all.len()
    }

    /// When the last one for this path came.
    pub fn last(&self, path: &str) -> Option<Instant> {
        let came = self.came.0.lock().expect("no upstream panics");
        came.all.iter().rev().find(|one| one.path == path).map(|one| one.at)
    }

    /// How many it keeps.
    pub fn held(&self) -> usize {
        self.came.0.lock().expect("no upstream panics").held
    }

    /// Keeps what comes from now on, once what it has released is answered.
    ///
    /// # Panics
    ///
    /// If that does not happen.
    pub fn hold(&self) {
        self.until(|came| !came.released || came.held == 0);
        self.came.0.lock().expect("no upstream panics").released = false;
    }

    /// Answers what it keeps, and what comes from now on.
    pub fn release(&self) {
        self.came.0.lock().expect("no upstream panics").released = true;
        self.came.1.notify_all();
    }

    /// Waits until so many have come.
    ///
    /// # Panics
    ///
    /// If they do not.
    pub fn until_count(&self, wanted: usize) {
        self.until(|came| came.all.len() >= wanted);
    }

    /// Waits until it keeps so many.
    ///
    /// # Panics
    ///
    /// If it does not come to that.
    pub fn until_held(&self, wanted: usize) {
        self.until(|came| came.held >= wanted);
    }

    fn until(&self, wanted: impl Fn(&Came) -> bool) {
        let came = self.came.0.lock().expect("no upstream panics");
        let waited = self.came.1.wait_timeout_while(came, PATIENCE, |came| !wanted(came));
        let (came, late) = waited.expect("no upstream panics");
        assert!(!late.timed_out(), "{} came, {} are kept", came.all.len(), came.held);
    }
}

fn serve(mut stream: TcpStream, (came, changed): &(Mutex<Came>, Condvar)) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let at = Instant::now();
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut came = came.lock().expect("no upstream panics");
        came.all.push(Arrival { at, path: path.clone(), head: head.to_ascii_lowercase() });
        changed.notify_all();
        if path == "/hold" {
            came.held += 1;
            came = changed.wait_while(came, |came| !came.released).expect("no upstream panics");
            came.held -= 1;
            changed.notify_all();
        }
        drop(came);
        stream.write_all(b"HTTP/1.1 200 OK\r\ncache-control: no-store\r\ncontent-length: 2\r\n\r\nup")?;
    }
}

/// An edge proxy that is a peer of others.
pub struct Node {
    /// The process.
    pub process: Process,
    /// Where it serves and hears notices.
    pub at: SocketAddr,
    /// Where it is administered.
    pub admin: SocketAddr,
    dir: TempDir,
}

impl Node {
    /// A command for one there, with its data below `dir`, these upstreams and these peers; told and heard under [`KEYS`].
    ///
    /// # Panics
    ///
    /// If the key file cannot be written.
    pub fn command(dir: &Path, at: SocketAddr, upstreams: &[&Upstream], peers: &[SocketAddr]) -> Command {
        std::fs::write(dir.join("cluster.keys"), KEYS).expect("a temporary directory can be written");
        let mut command = EdgeProxy::command_at(dir, at);
        command.args(["--database", "off", "--cache", "off", "--notice-key-file", "cluster.keys"]);
        command.args(["--node-id", &name(at)]);
        upstreams.iter().for_each(|upstream| _ = command.args(["--upstream", &upstream.url()]));
        peers.iter().for_each(|peer| _ = command.args(["--peer", &peer.to_string()]));
        command
    }

    /// Starts one and waits until it serves.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start(at: SocketAddr, upstreams: &[&Upstream], peers: &[SocketAddr]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let command = Self::command(dir.path(), at, upstreams, peers);
        Self::run(command, dir)
    }

    /// Starts this command, whose data is below `dir`.
    ///
    /// # Panics
    ///
    /// If it does not serve.
    pub fn run(mut command: Command, dir: TempDir) -> Self {
        let process = Process::start(&mut command);
        let (at, admin) = (process.address("  traffic "), process.address("  admin "));
        Self { process, at, admin, dir }
    }

    /// Its directory, once it has ended.
    ///
    /// # Panics
    ///
    /// If it has not.
    pub fn into_dir(self) -> TempDir {
        assert!(self.process.is_over(), "it still uses its directory");
        self.dir
    }

    /// Its directory; its data is in `data`.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What it knows of the peer at this address; null if nothing.
    pub fn peer(&self, at: SocketAddr) -> Value {
        peer_in(&self.status(), at).clone()
    }

    /// Its status.
    ///
    /// # Panics
    ///
    /// If it does not answer.
    pub fn status(&self) -> Value {
        get(self.admin, "/status").expect("the admin listener answers to the end").json()
    }

    /// Waits until the peer at this address is in this state.
    ///
    /// # Panics
    ///
    /// If it does not come to that.
    pub fn until_peer(&self, at: SocketAddr, state: &str) -> Value {
        status_until(self.admin, |status| peer_in(status, at)["state"] == state)
    }

    /// Its numbers for Prometheus.
    ///
    /// # Panics
    ///
    /// If it does not answer.
    pub fn metrics(&self) -> String {
        String::from_utf8(get(self.admin, "/metrics").expect("a page").body).expect("text")
    }
}

/// The name of the node there.
pub fn name(at: SocketAddr) -> String {
    format!("{:x}-{}", u32::from_be_bytes(octets(at)), at.port())
}

fn octets(at: SocketAddr) -> [u8; 4] {
    match at.ip() {
        std::net::IpAddr::V4(ip) => ip.octets(),
        std::net::IpAddr::V6(_) => [0; 4],
    }
}

/// The peer at this address in a status; null if there is none.
pub fn peer_in(status: &Value, at: SocketAddr) -> &Value {
    let target = format!("http://{at}");
    let mut peers = status["peers"].as_array().expect("a list").iter();
    peers.find(|peer| peer["target"] == *target).unwrap_or(&Value::Null)
}

/// A node whose every notice is the test's.
pub struct Stranger {
    /// Where it hears.
    pub at: SocketAddr,
    /// Its keys.
    pub keys: Keys,
    /// Its cluster.
    pub cluster: Id,
    socket: UdpSocket,
    incarnation: u64,
    seq: AtomicU64,
    heard: Mutex<Vec<Datagram>>,
}

impl Stranger {
    /// One there, with the cluster's keys.
    ///
    /// # Panics
    ///
    /// If it cannot listen.
    pub fn start_at(at: SocketAddr) -> Self {
        let socket = UdpSocket::bind(at).unwrap_or_else(|error| panic!("{at}: {error}"));
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        Self {
            at,
            keys: Keys::parse(KEYS).expect("a key file"),
            cluster: Id::of("default"),
            socket,
            incarnation: unix_ms(),
            seq: AtomicU64::new(0),
            heard: Mutex::default(),
        }
    }

    /// A new notice of its own.
    pub fn notice(&self, kind: Kind) -> Notice {
        Notice {
            kind,
            ack_wanted: true,
            restarting: false,
            why: Why::Term,
            attempt: 0,
            incarnation: self.incarnation,
            seq: self.seq.fetch_add(1, Ordering::Relaxed) + 1,
            sent_at: unix_ms(),
            drain_ms: 28_000,
            node: Id::of(&name(self.at)),
            cluster: self.cluster,
            endpoints: vec![self.at],
        }
    }

    /// Sends bytes.
    ///
    /// # Panics
    ///
    /// If they are not sent.
    pub fn send(&self, bytes: &[u8], to: SocketAddr) {
        self.socket.send_to(bytes, to).expect("loopback");
    }

    /// Sends a notice and waits for its acknowledgement.
    ///
    /// # Panics
    ///
    /// If none comes.
    pub fn say(&self, kind: Kind, to: SocketAddr) {
        self.repeat(&self.notice(kind), to);
    }

    /// Sends this notice, once more if it was sent before, and waits for its acknowledgement.
    ///
    /// # Panics
    ///
    /// If none comes.
    pub fn repeat(&self, notice: &Notice, to: SocketAddr) {
        self.send(&notice.encode(&self.keys), to);
        while !matches!(self.hear().0, Datagram::Ack(ack) if ack.seq == notice.seq) {}
    }

    /// The next datagram that comes, which must be in order, and from where.
    ///
    /// # Panics
    ///
    /// If none comes.
    pub fn hear(&self) -> (Datagram, SocketAddr) {
        let mut buffer = [0; 2048];
        let (length, from) = self.socket.recv_from(&mut buffer).expect("a datagram comes");
        let datagram = Datagram::decode(&buffer[..length], &self.keys).expect("a datagram in order");
        self.heard.lock().expect("nobody panics").push(datagram.clone());
        (datagram, from)
    }

    /// Waits for a notice of this kind and acknowledges it; the notice.
    ///
    /// # Panics
    ///
    /// If none comes.
    pub fn acknowledge(&self, kind: Kind) -> Notice {
        let (notice, from) = self.hear_notice(kind);
        let ack = Ack {
            node: notice.node,
            incarnation: notice.incarnation,
            seq: notice.seq,
            attempt: notice.attempt,
            sent_at: unix_ms(),
            cluster: notice.cluster,
            by: Id::of(&name(self.at)),
        };
        self.send(&ack.encode(&self.keys), from);
        notice
    }

    /// Waits for a notice of this kind and leaves it unanswered.
    ///
    /// # Panics
    ///
    /// If none comes.
    pub fn hear_notice(&self, kind: Kind) -> (Notice, SocketAddr) {
        loop {
            if let (Datagram::Notice(notice), from) = self.hear()
                && notice.kind == kind
            {
                return (notice, from);
            }
        }
    }

    /// How many notices and how many acknowledgements it has heard.
    ///
    /// # Panics
    ///
    /// If a test has.
    pub fn heard(&self) -> (usize, usize) {
        let heard = self.heard.lock().expect("nobody panics");
        let notices = heard.iter().filter(|datagram| matches!(datagram, Datagram::Notice(_))).count();
        (notices, heard.len() - notices)
    }
}
