//! A notice to many peers, beside a loop that sends the same bytes to the same addresses and does nothing else.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use shutdown_core::peers::notice::{Identity, Keys, Sender};
use shutdown_core::peers::{Incarnation, PeerRegistry};
use tokio::time::Instant;

use crate::table::{Table, page, rows};

const ROUNDS: usize = 101;
const PEERS: u32 = 10_000;
const GOAL: f64 = 1.5;

/// Measures; an error is the network's.
pub(crate) fn compare() -> io::Result<String> {
    // All of 127.0.0.0/8 is this host, so one socket is where all of them are. Nobody reads it: what does not fit is lost
    // without a word, for each way alike.
    let sink = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = sink.local_addr()?.port();
    let first = u32::from(Ipv4Addr::new(127, 1, 0, 1));
    let addrs: Vec<SocketAddr> =
        (0..PEERS).map(|index| SocketAddr::from((Ipv4Addr::from(first + index), port))).collect();

    let identity = Identity::new("edge-1", "default", Incarnation::new(1), addrs[..1].to_vec());
    let peers = PeerRegistry::new(identity.node());
    addrs.iter().for_each(|addr| peers.configure(*addr));
    let keys = Keys::insecure();
    let sender = Sender::new(identity.clone(), keys.clone(), peers);
    let datagram = identity.returning().expect("it does not leave").encode(&keys);

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ours = || -> io::Result<()> {
        let told = runtime.block_on(async {
            // Over before the first round is: it ends when that does.
            let until = tokio::time::sleep(Duration::from_millis(1));
            sender.announce_return(until).await.map_err(io::Error::other)
        })?;
        assert_eq!(told.sends(), u64::from(PEERS), "every peer, once");
        Ok(())
    };
    let bare = || -> io::Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        addrs.iter().try_for_each(|addr| socket.send_to(&datagram, addr).map(drop))
    };
    let awaited = || -> io::Result<()> {
        runtime.block_on(async {
            let socket = tokio::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
            for addr in &addrs {
                socket.send_to(&datagram, addr).await?;
            }
            Ok(())
        })
    };
    let ways: [(&str, &dyn Fn() -> io::Result<()>); 3] = [
        ("ours: `Sender`, the first round, from the registry to the last datagram", &ours),
        ("`std::net::UdpSocket::send_to` in a loop", &bare),
        ("`tokio::net::UdpSocket::send_to().await` in a loop", &awaited),
    ];
    let mut took: [Vec<Duration>; 3] = Default::default();
    for round in 0..ROUNDS {
        for turn in 0..ways.len() {
            let way = (round + turn) % ways.len();
            let begin = Instant::now();
            ways[way].1()?;
            took[way].push(begin.elapsed());
        }
    }
    let mut text = format!(
        "## {PEERS} peers on loopback, {} bytes each\n\n| | median ms | ours / it |\n|---|---|---|\n",
        datagram.len()
    );
    let (rows, ratios) = rows(ways.map(|(name, _)| name), &took, Duration::from_millis(1));
    text += &rows;
    let against = ratios[1];
    let met = if against <= GOAL { "met" } else { "missed" };
    text += &format!(
        "\n{ROUNDS} rounds, all three in each, in turn; \"ours / it\" is the median of the rounds' ratios. Ours also puts the peers in \
         order, keeps a letter for each, makes the MAC and looks for acknowledgements after every 64 datagrams.\n\n\
         Goal: at most {GOAL:.2} of the bare loop: {against:.2}, {met}.\n"
    );
    Ok(page("A notice to many peers", &[Table(text)]))
}
