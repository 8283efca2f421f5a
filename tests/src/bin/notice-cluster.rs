//! One end or both of peer notices, for tests in a network namespace: what it prints is what they judge.
//!
//! * `notice-cluster peers FIRST COUNT` is that many peers, on addresses from FIRST on, until its stdin ends; then it prints how many
//!   of them have not heard of `once` and of `leaver`.
//! * `notice-cluster tell FIRST COUNT` tells them once, without repetition, as `once`, and then leaves as `leaver`, and prints what
//!   became of that.
//! * `notice-cluster hear ADDR` hears notices at ADDR and prints a line for each that is new, with the time.
//! * `notice-cluster leave ADDR,… [plainly]` tells these peers in this order; `plainly` as one would without knowing what the kernel
//!   does: three datagrams to each, one after another. Prints when it began.
//!
//! Times are milliseconds since the Unix epoch.
#![expect(clippy::unwrap_used, reason = "a test's program fails by panicking")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::json;
use shutdown_core::StageContext;
use shutdown_core::peers::notice::{self, Identity, Keys, Receiver, Sender, Why};
use shutdown_core::peers::{Id, Incarnation, PeerRegistry};
use tokio::net::UdpSocket;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Stage Departure's default.
const STAGE: Duration = Duration::from_secs(1);
const DRAIN: Duration = Duration::from_secs(27);

fn unix_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() * 1e3
}

fn node(name: &str) -> Identity {
    Identity::new(name, "test", Incarnation::new(unix_ms() as u64), Vec::new())
}

fn hear(name: &str, addr: SocketAddr) -> PeerRegistry {
    let identity = node(name);
    let peers = PeerRegistry::new(identity.node());
    let socket = notice::bind(addr).unwrap();
    let receiver = Receiver::new(socket, identity, Keys::insecure(), peers.clone());
    tokio::spawn(async move { receiver.run().await.unwrap() });
    peers
}

/// What a departure came to.
async fn leave(identity: &Identity, peers: Vec<SocketAddr>) -> serde_json::Value {
    let registry = PeerRegistry::new(identity.node());
    peers.iter().for_each(|addr| registry.configure(*addr));
    let sender = Sender::new(identity.clone(), Keys::insecure(), registry);
    let token = CancellationToken::new();
    let (stage, begun) = (StageContext::new(Instant::now() + STAGE, token.clone()), Instant::now());
    tokio::spawn(async move {
        tokio::time::sleep(STAGE).await;
        token.cancel();
    });
    sender.leave(stage.clone(), Why::Term, DRAIN).await.unwrap();
    let counts = identity.counts();
    json!({
        "peers": peers.len(),
        "unacknowledged": peers.len() as u64 - counts.acknowledged,
        "datagrams": counts.sent,
        "took_ms": begun.elapsed().as_secs_f64() * 1e3,
        "notes": stage.notes(),
    })
}

fn addresses(first: &str, count: &str) -> Vec<SocketAddr> {
    let first = u32::from(first.parse::<Ipv4Addr>().unwrap());
    (0..count.parse().unwrap())
        .map(|index: u32| SocketAddr::from((Ipv4Addr::from(first + index), 7946)))
        .collect()
}

/// Hears at each of these addresses until stdin ends; then prints how many have not heard of each of the two.
async fn peers(addrs: Vec<SocketAddr>) {
    // A socket for each.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit }).unwrap();
    let registries: Vec<PeerRegistry> =
        addrs.iter().map(|addr| hear(&addr.ip().to_string(), *addr)).collect();
    println!("hear");
    tokio::task::spawn_blocking(|| std::io::stdin().lines().for_each(drop)).await.unwrap();
    let unheard = |name: &str| {
        let deaf = |peers: &&PeerRegistry| peers.get(Id::of(name), 0).is_none();
        registries.iter().filter(deaf).count()
    };
    println!("{}", json!({ "once": unheard("once"), "leaver": unheard("leaver") }));
}

async fn tell(addrs: Vec<SocketAddr>) {
    // The control: each is told once.
    let once = {
        let mut notice = node("once").leaving(Why::Term, DRAIN);
        (notice.sent_at, notice.ack_wanted) = (unix_ms() as u64, false);
        notice.encode(&Keys::insecure())
    };
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap();
    for addr in &addrs {
        socket.send_to(&once, addr).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut told = leave(&node("leaver"), addrs).await;
    told["notes"].take();
    println!("{told}");
    // What has been sent last is heard: on one host nothing is on its way for long.
    tokio::time::sleep(Duration::from_millis(200)).await;
}

async fn plainly(identity: &Identity, peers: &[SocketAddr]) {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap();
    for peer in peers {
        for attempt in 0..3 {
            let mut notice = identity.leaving(Why::Term, DRAIN);
            (notice.sent_at, notice.attempt) = (unix_ms() as u64, attempt);
            socket.send_to(&notice.encode(&Keys::insecure()), peer).await.unwrap();
        }
    }
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["peers", first, count] => peers(addresses(first, count)).await,
        ["tell", first, count] => tell(addresses(first, count)).await,
        ["hear", addr] => {
            let peers = hear("hearer", addr.parse().unwrap());
            let mut changes = peers.subscribe();
            println!("hears");
            loop {
                changes.changed().await.unwrap();
                println!("heard {}", unix_ms());
            }
        }
        ["leave", peers, ref how @ ..] => {
            let peers: Vec<SocketAddr> = peers.split(',').map(|addr| addr.parse().unwrap()).collect();
            assert!(!peers.iter().any(|addr| matches!(addr.ip(), IpAddr::V4(ip) if ip.is_unspecified())));
            let identity = node("leaver");
            println!("began {}", unix_ms());
            match how {
                [] => println!("{}", leave(&identity, peers).await),
                ["plainly"] => plainly(&identity, &peers).await,
                other => panic!("{other:?}"),
            }
        }
        ref other => panic!("{other:?}"),
    }
}
