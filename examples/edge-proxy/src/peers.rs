//! The neighbours: told when this node leaves and when it is back, heard when they do, and sent requests.
//!
//! A thread of its own, `neighbours`, hears them, says at the start that this node is there, and replaces the table of targets
//! when the registry changes: a flood of forged datagrams slows down neither requests nor a stop. It lives as long as the
//! process, so that a peer that leaves at the same time is answered.
//!
//! The stage tasks that tell the peers and say goodbye over mDNS stand in the builder, over slots that are filled after
//! `install`: only then is this run's incarnation known. Both speak with the same one.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum_service::resources::{now_ms, when_open};
use serde_json::{Map, Value, json};
use shutdown_core::peers::notice::{Bound, Identity, NoticeCounts, Receiver, Sender, Why, bind};
use shutdown_core::peers::{Id, Incarnation, PeerRecord, PeerRegistry, PeerState, Sighting};
use shutdown_core::state::{StateSource, StateStore};
use shutdown_core::{Builder, ShutdownCoordinator, Stage, StageContext, sentence};
use shutdown_mdns::{Advertisement, Event, Found, Mdns};
use shutdown_tower::admin::Family;
use tokio::runtime;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::Failure;
use crate::settings::{Neighbours, Notices, Settings};
use crate::targets::{Targets, is_link_local, target_of};

/// The neighbours of this node, as far as notices or mDNS are on. Clones are the same.
#[derive(Clone)]
pub(crate) struct Peers {
    registry: PeerRegistry,
    neighbours: Neighbours,
    /// Each is filled once this run has its incarnation.
    voice: Arc<OnceLock<Voice>>,
    mdns: Arc<OnceLock<Mdns>>,
}

/// This run, as its neighbours know it.
pub(crate) struct Node<'a> {
    pub(crate) id: &'a str,
    pub(crate) cluster: &'a str,
    /// Where it serves.
    pub(crate) at: SocketAddr,
    pub(crate) shutdown: ShutdownCoordinator,
    pub(crate) targets: &'a Arc<Targets>,
}

/// How long a stop that has begun during the start may tell the others.
const TAKE_BACK: Duration = Duration::from_secs(1);

/// What tells the others.
#[derive(Clone)]
struct Voice {
    identity: Identity,
    sender: Sender,
    shutdown: ShutdownCoordinator,
}

impl Peers {
    /// The peers that are configured.
    pub(crate) fn new(settings: &Settings, node_id: &str) -> Self {
        let registry = PeerRegistry::new(Id::of(node_id));
        settings.neighbours.peers.iter().for_each(|addr| registry.configure(*addr));
        let neighbours = settings.neighbours.clone();
        Self { registry, neighbours, voice: Arc::default(), mdns: Arc::default() }
    }

    fn hears_notices(&self) -> bool {
        self.neighbours.notices.is_some()
    }

    /// Whether there may be peers that are not configured.
    fn discovers(&self) -> bool {
        !self.neighbours.mdns.is_empty()
    }

    /// What is known of them, kept over restarts.
    pub(crate) fn source(&self) -> Option<StateSource> {
        let (captured, restored) = (self.registry.clone(), self.registry.clone());
        let discovers = self.discovers();
        (discovers || self.hears_notices()).then(|| {
            StateSource::new(
                "peers",
                move || Ok(captured.export(unix_ms())),
                move |mut records: Vec<PeerRecord>, saved| {
                    if !discovers {
                        only_configured(&mut records, &restored);
                    }
                    let count = restored.import(&records, saved.at, unix_ms());
                    if count > 0 {
                        tracing::info!(count, age = ?saved.age, "peers restored, unverified until they answer");
                    }
                    Ok(())
                },
            )
        })
    }

    /// Adds the stage tasks that tell them.
    pub(crate) fn stage_tasks(&self, mut builder: Builder) -> Builder {
        if self.hears_notices() && (self.discovers() || !self.neighbours.peers.is_empty()) {
            let leave = when_open(&self.voice, Voice::leave);
            builder = builder.stage_task(Stage::Departure, "peer notices", leave);
        }
        if self.discovers() {
            let withdraw =
                when_open(&self.mdns, |mdns: Mdns, stage| async move { mdns.withdraw(stage).await });
            builder = builder.stage_task(Stage::Departure, "mdns", withdraw);
        }
        builder
    }

    /// Has requests go where the registry says by now.
    pub(crate) fn route(&self, targets: &Targets) {
        targets.update(&self.registry.peers(unix_ms()));
    }

    /// Begins to hear the others, to tell them, to advertise this node and to discover others, as far as each is on, and keeps
    /// the targets as the registry says. `socket` is where notices are heard.
    ///
    /// # Errors
    ///
    /// No thread can be had, or an interface cannot be used.
    pub(crate) fn start(&self, socket: Option<Bound>, node: &Node<'_>) -> Result<(), Failure> {
        let heard_at = socket.as_ref().and_then(|socket| socket.local_addr().ok());
        let notices = self.neighbours.notices.as_ref().zip(socket);
        if notices.is_none() && !self.discovers() {
            return Ok(());
        }
        let (shutdown, targets) = (node.shutdown, Arc::clone(node.targets));
        let saved = node.shutdown.state_store().ok().and_then(StateStore::incarnation);
        let incarnation = Incarnation::new(saved.unwrap_or_else(unix_ms));
        // A stop that has begun is not advertised.
        if self.discovers() && !shutdown.is_shutting_down() {
            self.advertise(node, incarnation.clone(), heard_at.map(|addr| addr.port()))?;
        }
        let hearing = notices.map(|(notices, socket)| self.speak(notices, socket, node, incarnation));

        let failed = |error| Failure::start("no thread for the neighbours", error);
        let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let registry = self.registry.clone();
        let mut changes = registry.subscribe();
        // What has changed before it looks.
        changes.mark_changed();
        let (mdns, voice) = (self.mdns.get().cloned(), self.voice.get().cloned());
        let run = move || {
            // Tasks of their own, so that each has its turn however much there is to hear.
            if let Some((receiver, sender)) = hearing {
                runtime.spawn(async move {
                    let Err(error) = receiver.run().await;
                    tracing::error!("notices of peers are not heard: {}", sentence(&error));
                });
                runtime.spawn(async move {
                    if let Err(error) = sender.announce_return(shutdown.leaving()).await {
                        tracing::warn!("peers are not told that this node is there: {}", sentence(&*error));
                    }
                });
            }
            if shutdown.is_shutting_down() {
                // Its stage may have come before there was anything to take back.
                let stage = || StageContext::new(Instant::now() + TAKE_BACK, CancellationToken::new());
                if let Some(mdns) = mdns {
                    runtime.spawn(async move { mdns.withdraw(stage()).await });
                }
                if let Some(voice) = voice {
                    runtime.spawn(async move { voice.leave(stage()).await });
                }
            }
            runtime.block_on(async {
                while changes.changed().await.is_ok() {
                    targets.update(&registry.peers(unix_ms()));
                }
            });
        };
        std::thread::Builder::new().name("neighbours".to_owned()).spawn(run).map(drop).map_err(failed)
    }

    /// What hears and what tells, for this run.
    fn speak(
        &self,
        notices: &Notices,
        socket: Bound,
        node: &Node<'_>,
        incarnation: Incarnation,
    ) -> (Receiver, Sender) {
        if notices.keys.is_insecure() {
            tracing::warn!("notices are not authenticated (--notice-insecure): anybody can withdraw nodes");
        }
        let known_at = self.known_at([node.at, socket.local_addr().unwrap_or(node.at)]);
        let identity = Identity::new(node.id, node.cluster, incarnation, known_at);
        let sender = Sender::new(identity.clone(), notices.keys.clone(), self.registry.clone());
        let receiver = Receiver::new(socket, identity.clone(), notices.keys.clone(), self.registry.clone());
        // Before the announcement: from then on a stop takes it back.
        let _ = self.voice.set(Voice { identity, sender: sender.clone(), shutdown: node.shutdown });
        (receiver, sender)
    }

    fn advertisement(
        &self,
        node_id: &str,
        cluster: &str,
        at: SocketAddr,
        incarnation: Incarnation,
        notice_port: Option<u16>,
    ) -> Advertisement {
        Advertisement {
            service_type: self.neighbours.service_type.clone(),
            node_id: node_id.to_owned(),
            port: at.port(),
            interfaces: self.neighbours.mdns.clone(),
            cluster: cluster.to_owned(),
            incarnation,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            notice_port,
        }
    }

    /// Whether this node can be advertised, before anything is served.
    ///
    /// # Errors
    ///
    /// An interface is not there or has no address, or a name cannot be said over mDNS.
    pub(crate) fn check(&self, node_id: &str, cluster: &str, at: SocketAddr) -> Result<(), Failure> {
        if !self.discovers() {
            return Ok(());
        }
        let advertisement = self.advertisement(node_id, cluster, at, Incarnation::new(0), None);
        advertisement.check().map_err(|error| Failure::start("--mdns", error))
    }

    /// Says over mDNS that this node is there, and takes the nodes of its cluster for peers.
    fn advertise(
        &self,
        node: &Node<'_>,
        incarnation: Incarnation,
        notice_port: Option<u16>,
    ) -> Result<(), Failure> {
        if node.at.ip().is_loopback() && self.neighbours.mdns.iter().any(|interface| interface != "lo") {
            tracing::warn!(
                listen = %node.at,
                "other machines are told of this one's addresses (--mdns), where nobody listens: give --listen 0.0.0.0:{}",
                node.at.port()
            );
        }
        let advertisement = self.advertisement(node.id, node.cluster, node.at, incarnation, notice_port);
        let mdns = Mdns::start(advertisement).map_err(|error| Failure::start("--mdns", error))?;
        let registry = self.registry.clone();
        mdns.browse(move |event| match event {
            Event::Found(found) => {
                registry.sighted(sighting(found), unix_ms());
            }
            Event::Gone { node_id, incarnation, .. } => {
                registry.goodbye(&node_id, incarnation, unix_ms());
            }
            Event::Lost { node_id, .. } => registry.lost(&node_id),
            _ => {}
        });
        let _ = self.mdns.set(mdns);
        Ok(())
    }

    /// What others may know this node by: these addresses, and for one that means all of this machine's, those from which
    /// the peers are reached.
    fn known_at(&self, own: [SocketAddr; 2]) -> Vec<SocketAddr> {
        let peers = self.registry.peers(unix_ms());
        let mut known = Vec::new();
        for addr in own {
            let at_all = addr.ip().is_unspecified();
            let towards = peers.iter().filter(|_| at_all).filter_map(target_of).filter_map(towards);
            let addresses = towards.map(|ip| SocketAddr::new(ip, addr.port()));
            for addr in addresses.chain((!at_all).then_some(addr)) {
                if !known.contains(&addr) {
                    known.push(addr);
                }
            }
        }
        known
    }

    /// For `/status`.
    pub(crate) fn peers_shown(&self) -> Value {
        let text = |value: Option<String>| value.map_or(Value::Null, Value::String);
        let peers = self.registry.peers(unix_ms()).into_iter().map(|peer| {
            json!({
                "node": text(peer.id.map(|id| id.to_string())),
                "name": text(peer.name.as_deref().map(str::to_owned)),
                "addresses": peer.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "target": text(target_of(&peer).map(|addr| format!("http://{addr}"))),
                "state": peer.state,
                "routable": peer.routable,
                "authenticated": peer.authenticated,
                "incarnation": peer.incarnation,
                "last_seen": peer.last_seen,
            })
        });
        peers.collect()
    }

    /// For `/status`; null if they are off.
    pub(crate) fn notices_shown(&self) -> Value {
        let Some(Voice { identity, .. }) = self.voice.get() else { return Value::Null };
        let NoticeCounts { sent, acknowledged, received, answered, refused, .. } = identity.counts();
        let by_cause: Map<_, _> =
            identity.refused().map(|(cause, count)| (cause.as_str().to_owned(), count.into())).collect();
        json!({
            "sent": sent,
            "acknowledged": acknowledged,
            "received": received,
            "answered": answered,
            "refused": refused,
            "refused_by_cause": by_cause,
            "withheld": self.registry.withheld(),
        })
    }

    /// For `/status`; null if it is off.
    pub(crate) fn mdns_shown(&self) -> Value {
        let Some(mdns) = self.mdns.get() else { return Value::Null };
        let status = mdns.status();
        let state = status.state.as_str();
        json!({ "state": state, "instance": status.instance, "announced_on": status.announced_on })
    }

    /// For `/metrics`; none if there are no neighbours.
    pub(crate) fn families(&self) -> Vec<Family> {
        if !self.hears_notices() && !self.discovers() {
            return Vec::new();
        }
        let count = |name, help, value: u64| Family::counter(name, help).sample(&[], value as f64);
        let peers = self.registry.peers(unix_ms());
        let mut by_state = Family::gauge("edge_proxy_peers", "Peers in each state.");
        for state in PeerState::ALL {
            let count = peers.iter().filter(|peer| peer.state == state).count();
            by_state = by_state.sample(&[("state", state.as_str())], count as f64);
        }
        let withheld = count(
            "edge_proxy_departures_withheld_total",
            "Departures of peers that were not believed because too many left at once.",
            self.registry.withheld(),
        );
        let mut families = vec![withheld, by_state];
        let Some(Voice { identity, .. }) = self.voice.get() else { return families };
        let counts = identity.counts();
        let mut refused = Family::counter(
            "edge_proxy_notices_refused_total",
            "Datagrams that came where notices are heard and were refused, by cause.",
        );
        for (cause, count) in identity.refused() {
            refused = refused.sample(&[("cause", cause.as_str())], count as f64);
        }
        families.extend([
            count("edge_proxy_notices_sent_total", "Notices sent, repetitions included.", counts.sent),
            count(
                "edge_proxy_notices_acknowledged_total",
                "Peers that have acknowledged a notice, once for each notice.",
                counts.acknowledged,
            ),
            count(
                "edge_proxy_notices_received_total",
                "Notices that came and were in order, repetitions included.",
                counts.received,
            ),
            refused,
        ]);
        families
    }

    /// The peers as they are configured and restored, for people.
    pub(crate) fn listed(&self) -> String {
        let mut text = String::new();
        for peer in self.registry.peers(unix_ms()) {
            let before = if text.is_empty() { "" } else { ", " };
            let at = target_of(&peer).map_or_else(|| "nowhere".to_owned(), |addr| addr.to_string());
            // Writing to a String cannot fail.
            let _ = write!(text, "{before}{at} ({})", peer.state);
        }
        text
    }
}

impl Voice {
    async fn leave(self, stage: StageContext) -> Result<(), shutdown_core::BoxError> {
        let now = self.shutdown.snapshot();
        let why = now.reason.as_ref().map_or(Why::Unsaid, Why::from);
        let drain = Duration::try_from_secs_f64(now.left_ms.unwrap_or_default() / 1000.0).unwrap_or_default();
        self.sender.leave(stage, why, drain).await
    }
}

/// What discovery found, the addresses first that need no interface to be told.
fn sighting(found: Found) -> Sighting {
    let mut addresses = found.addresses;
    addresses.sort_by_key(is_link_local);
    let notices = addresses.first().zip(found.notice_port).map(|(addr, port)| {
        let mut addr = *addr;
        addr.set_port(port);
        addr
    });
    Sighting { name: found.node_id, incarnation: found.incarnation, addresses, notices }
}

/// Takes from the peers of an earlier run those that are not configured any more: a departure of theirs is remembered, but no
/// acknowledgement makes them peers again.
fn only_configured(records: &mut [PeerRecord], peers: &PeerRegistry) {
    let configured: BTreeSet<_> = peers.peers(unix_ms()).iter().filter_map(|peer| peer.configured).collect();
    for record in records {
        let at = record.addr.as_deref().and_then(|addr| addr.parse().ok());
        if !at.is_some_and(|at| configured.contains(&at)) {
            record.member = Some(false);
        }
    }
}

/// Opens the socket to hear notices on.
///
/// # Errors
///
/// What the system said, and how to choose another address.
pub(crate) fn listen(notices: &Notices, at: SocketAddr) -> Result<Bound, Failure> {
    let addr = notices.listen.unwrap_or(at);
    bind(addr).map_err(|error| {
        let fix = match error.kind() {
            std::io::ErrorKind::AddrInUse => ": choose another with --notice-listen",
            _ => " (--notice-listen)",
        };
        Failure::Start(format!("cannot hear notices on {addr} (UDP): {error}{fix}"))
    })
}

/// The address of this machine that `peer` sees; no packet is sent to find out.
fn towards(peer: SocketAddr) -> Option<IpAddr> {
    let any = match peer {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(peer).ok()?;
    socket.local_addr().ok().map(|addr| addr.ip())
}

fn unix_ms() -> u64 {
    u64::try_from(now_ms()).unwrap_or_default()
}
