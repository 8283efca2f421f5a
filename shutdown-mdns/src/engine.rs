//! The thread that does it all: a daemon for each interface, our own sockets beside it, and one loop over what they say.
//!
//! A daemon each, and not one for all: mdns-sd 0.21.7 sends the second goodbye of all interfaces through the last one used,
//! and announces the link-local addresses of all on each. The thread and its runtime are ours, because a service's may be
//! saturated exactly when it stops.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mdns_sd::{DaemonEvent, IfKind, ResolvedService, ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo};
use shutdown_core::peers::WINDOW;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::advertisement::{Advertisement, Names, txt};
use crate::browse::follow;
use crate::discovery::{Discovery, Event, Found, value};
use crate::error::Error;
use crate::interface::Interface;
use crate::link::{self, Family, PORT};
use crate::wire::{Data, LARGEST, Message, Name};
use crate::withdrawal::Departed;
use crate::{State, Status};

/// How long mdns-sd may take to send its goodbye and stop. It took 0.2 to 4 ms, so this is for a machine that has no time.
pub(crate) const DAEMON: Duration = Duration::from_millis(250);
/// How long a goodbye of our own may take to be heard.
pub(crate) const ECHO: Duration = Duration::from_millis(100);
/// When the goodbye is said again, from the first: more than a second apart (RFC 6762 §6), and none at one second, where
/// systemd-resolved misses it (systemd#43259).
pub(crate) const REPEATS: [Duration; 2] = [Duration::from_millis(1100), Duration::from_millis(2500)];
/// The least time between two rescues.
const RESCUE: Duration = Duration::from_secs(1);
/// For so long mdns-sd leaves out of an announcement what it has said (RFC 6762 §6), and a little more. A goodbye comes after
/// that was said, and leaves a second: so a rescue that waits is still in time.
const UNSAID: Duration = Duration::from_millis(1020);
/// How many inputs wait; beyond, the sockets' buffers hold what comes.
const INPUTS: usize = 256;

/// What the handle asks for.
pub(crate) enum Command {
    Withdraw { until: Instant, hurry: oneshot::Receiver<()>, reply: oneshot::Sender<Vec<Departed>> },
    Browse(Box<dyn FnMut(Event) + Send>),
}

/// What happens.
pub(crate) enum Input {
    /// A response about our service type was heard.
    Heard {
        link: usize,
        message: Message,
        at: Instant,
    },
    Monitor {
        station: usize,
        event: DaemonEvent,
    },
    /// A daemon's thread has ended, and all it said has been read.
    Stopped {
        station: usize,
    },
    /// A browse begins, for the first time or anew.
    Browsing {
        station: usize,
    },
    Browsed {
        station: usize,
        event: ServiceEvent,
    },
    /// All that is known when a browse begins has been told.
    ToldAll {
        station: usize,
    },
}

/// An interface and its daemon.
pub(crate) struct Station {
    pub(crate) interface: Interface,
    pub(crate) daemon: ServiceDaemon,
    /// What we are called there: another name than ours, if that was taken.
    pub(crate) instance: Name,
    pub(crate) host: Name,
    pub(crate) is_announced: bool,
    pub(crate) is_stopped: bool,
}

/// An interface over one family.
pub(crate) struct Link {
    pub(crate) station: usize,
    pub(crate) family: Family,
    pub(crate) socket: Arc<UdpSocket>,
    /// Our own announcement was heard there, with these addresses.
    pub(crate) is_announced: bool,
    pub(crate) addresses: BTreeSet<IpAddr>,
    /// When our own goodbye was heard there.
    pub(crate) goodbye: Option<Instant>,
}

/// All of it.
pub(crate) struct Engine {
    pub(crate) advertisement: Advertisement,
    pub(crate) service: Name,
    names: Names,
    pub(crate) stations: Vec<Station>,
    pub(crate) links: Vec<Link>,
    pub(crate) inputs: mpsc::Receiver<Input>,
    input: mpsc::Sender<Input>,
    status: watch::Sender<Status>,
    discovery: Discovery,
    listeners: Vec<Box<dyn FnMut(Event) + Send>>,
    /// When somebody else's goodbye for us is answered, and the earliest time for the next.
    rescue: Option<Instant>,
    next_rescue: Instant,
    /// The highest incarnation that anybody has said for us and others may believe.
    claimed: Option<u64>,
    /// When our name was last heard from us.
    last_said: Instant,
    /// Set when the withdrawal begins: a goodbye for us is ours then, nobody is rescued, and nothing is passed on.
    pub(crate) is_leaving: bool,
    pub(crate) departed: Option<Vec<Departed>>,
    pub(crate) repeats: JoinSet<()>,
}

impl Engine {
    /// Opens the sockets and starts the daemons.
    ///
    /// # Errors
    ///
    /// If a socket cannot be had or mdns-sd refuses.
    pub(crate) fn start(
        advertisement: Advertisement,
        service: Name,
        names: Names,
        interfaces: Vec<Interface>,
        status: watch::Sender<Status>,
    ) -> Result<Self, Error> {
        let (input, inputs) = mpsc::channel(INPUTS);
        let mut engine = Self {
            discovery: Discovery::of(&advertisement.node_id, &advertisement.cluster),
            advertisement,
            service,
            names,
            stations: Vec::new(),
            links: Vec::new(),
            inputs,
            input,
            status,
            listeners: Vec::new(),
            rescue: None,
            next_rescue: Instant::now(),
            claimed: None,
            last_said: Instant::now(),
            is_leaving: false,
            departed: None,
            repeats: JoinSet::new(),
        };
        match engine.begin(interfaces) {
            Ok(()) => Ok(engine),
            Err(error) => {
                for station in &engine.stations {
                    // A daemon that refuses is not one that goes on: its thread has ended.
                    let _ = station.silence();
                }
                Err(error)
            }
        }
    }

    fn begin(&mut self, interfaces: Vec<Interface>) -> Result<(), Error> {
        for interface in interfaces {
            self.open(interface)?;
        }
        // Our ears first: the first announcement is not to be missed.
        for (station, there) in self.stations.iter().enumerate() {
            self.watch(station, &there.daemon)?;
            there.daemon.register(self.info(true)?).map_err(Error::Daemon)?;
        }
        Ok(())
    }

    fn open(&mut self, interface: Interface) -> Result<(), Error> {
        let station = self.stations.len();
        let is_loopback = interface.addresses.iter().any(IpAddr::is_loopback);
        for family in [Family::V4, Family::V6] {
            let has_address = match family {
                Family::V4 => interface.v4().is_some(),
                Family::V6 => interface.has_v6(),
            };
            // An IPv6 address may come later. On loopback mdns-sd sends none.
            if !has_address && (family == Family::V4 || is_loopback) {
                continue;
            }
            let socket = match link::open(&interface, family) {
                Ok(socket) => Arc::new(socket),
                Err(source) if has_address => {
                    return Err(Error::Socket { interface: interface.name, source });
                }
                Err(_) => continue,
            };
            let link = self.links.len();
            tokio::spawn(listen(link, Arc::clone(&socket), self.service.clone(), self.input.clone()));
            self.links.push(Link {
                station,
                family,
                socket,
                is_announced: false,
                addresses: BTreeSet::new(),
                goodbye: None,
            });
        }
        let daemon = ServiceDaemon::new().map_err(Error::Daemon)?;
        daemon.disable_interface(IfKind::All).map_err(Error::Daemon)?;
        daemon.enable_interface(IfKind::Name(interface.name.clone())).map_err(Error::Daemon)?;
        let instance = self.child(&self.names.instance);
        let host = host(&self.names.host);
        self.stations.push(Station {
            interface,
            daemon,
            instance,
            host,
            is_announced: false,
            is_stopped: false,
        });
        Ok(())
    }

    /// An instance of our service type.
    fn child(&self, label: &str) -> Name {
        let labels = std::iter::once(label.as_bytes()).chain(self.service.labels());
        // A label that mdns-sd has made too long is none of ours.
        Name::of(labels).unwrap_or_default()
    }

    fn watch(&self, station: usize, daemon: &ServiceDaemon) -> Result<(), Error> {
        let monitor = daemon.monitor().map_err(Error::Daemon)?;
        let input = self.input.clone();
        tokio::spawn(async move {
            while let Ok(event) = monitor.recv_async().await {
                if input.send(Input::Monitor { station, event }).await.is_err() {
                    return;
                }
            }
            // The engine may be over, too.
            let _ = input.send(Input::Stopped { station }).await;
        });
        Ok(())
    }

    /// What mdns-sd registers.
    fn info(&self, probe: bool) -> Result<ServiceInfo, Error> {
        let strings = self.advertisement.strings();
        let host = format!("{}.local.", self.names.host);
        let info = ServiceInfo::new(
            &self.advertisement.service_type,
            &self.names.instance,
            &host,
            "",
            self.advertisement.port,
            &strings[..],
        );
        let mut info = info.map_err(Error::Daemon)?.enable_addr_auto();
        info.set_requires_probe(probe);
        Ok(info)
    }

    /// The name under which mdns-sd keeps us.
    pub(crate) fn registered(&self) -> String {
        format!("{}.{}", self.names.instance, self.advertisement.service_type)
    }

    /// The strings of our TXT record.
    pub(crate) fn strings(&self) -> Vec<Vec<u8>> {
        txt(&self.advertisement.strings())
    }

    /// Runs until nobody can ask for anything more and all goodbyes are said.
    pub(crate) async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let mut is_open = true;
        while is_open || self.departed.is_none() || !self.repeats.is_empty() {
            let rescue = self.rescue;
            tokio::select! {
                command = commands.recv(), if is_open => match command {
                    Some(Command::Withdraw { until, hurry, reply }) => {
                        let departed = self.withdraw(until, hurry).await;
                        // Who asked may have been aborted.
                        let _ = reply.send(departed);
                    }
                    Some(Command::Browse(listener)) => self.browse(listener),
                    None => is_open = false,
                },
                input = self.inputs.recv() => match input {
                    Some(input) => self.take(input),
                    None => return,
                },
                () = sleep_until(rescue.unwrap_or_else(Instant::now)), if rescue.is_some() && !self.is_leaving => self.rescue(),
                Some(_) = self.repeats.join_next() => {}
            }
        }
    }

    /// Takes what happened.
    pub(crate) fn take(&mut self, input: Input) {
        match input {
            Input::Heard { link, message, at } => self.heard(link, &message, at),
            Input::Monitor { station, event } => self.monitor(station, event),
            Input::Stopped { station } => self.stations[station].is_stopped = true,
            Input::Browsing { station } => self.discovery.browses_again(station),
            Input::Browsed { station, event } => self.browsed(station, event),
            Input::ToldAll { station } => {
                for event in self.discovery.has_told_all(station) {
                    self.pass_on(Some(event));
                }
            }
        }
    }

    fn monitor(&mut self, station: usize, event: DaemonEvent) {
        match event {
            DaemonEvent::Announce(fullname, whence) => {
                // `host:interface` with the names as they are after a conflict; a list of addresses, and the names as they
                // were asked for, when we have announced again.
                let suffix = format!(".{}", self.advertisement.service_type);
                if !whence.starts_with('[')
                    && let Some((target, _)) = whence.split_once(':')
                {
                    let label = fullname.strip_suffix(&suffix).unwrap_or(&self.names.instance);
                    let (instance, host) = (self.child(label), host(target.trim_end_matches(".local.")));
                    let there = &mut self.stations[station];
                    if !there.instance.is(&instance) {
                        let (from, to) = (there.instance.to_string(), instance.to_string());
                        tracing::warn!(target: "shutdown", from, to, "mDNS name was taken; another host has it");
                    }
                    (there.instance, there.host) = (instance, host);
                }
                self.stations[station].is_announced = true;
                self.tell();
            }
            DaemonEvent::Error(error) => {
                let interface = &self.stations[station].interface.name;
                tracing::warn!(target: "shutdown", interface, %error, "mDNS");
            }
            _ => {}
        }
    }

    /// Brings the status up to date.
    pub(crate) fn tell(&self) {
        let state = match &self.departed {
            Some(departed) if departed.iter().any(Departed::was_said) => State::Withdrawn,
            Some(_) => State::NeverAnnounced,
            None if self.stations.iter().any(|station| station.is_announced) => State::Announced,
            None => State::Registering,
        };
        let announced = self.links.iter().filter(|link| link.is_announced && self.departed.is_none());
        let status = Status {
            state,
            instance: self.stations.first().map(|station| station.instance.to_string()).unwrap_or_default(),
            announced_on: announced.map(|link| self.subject(link)).collect(),
        };
        self.status.send_if_modified(|current| {
            let is_new = *current != status;
            *current = status;
            is_new
        });
    }

    /// An interface and family in words.
    pub(crate) fn subject(&self, link: &Link) -> String {
        format!("{} {}", self.stations[link.station].interface.name, link.family)
    }

    fn heard(&mut self, link: usize, message: &Message, at: Instant) {
        let index = self.links[link].station;
        let station = &self.stations[index];
        let (mut announced, mut taken_back) = (false, false);
        for record in message.answers.iter().filter(|record| record.is_in()) {
            let is_ours = match &record.data {
                Data::Ptr(instance) => record.name.is(&self.service) && instance.is(&station.instance),
                Data::Srv { .. } => record.name.is(&station.instance),
                Data::A(_) | Data::Aaaa(_) => record.name.is(&station.host),
                _ => false,
            };
            let link = &mut self.links[link];
            match (&record.data, record.ttl) {
                _ if !is_ours => {}
                (Data::Srv { port, target, .. }, 1..) => {
                    announced |= *port == self.advertisement.port && target.is(&station.host);
                }
                (Data::A(address), 1..) => _ = link.addresses.insert((*address).into()),
                (Data::Aaaa(address), 1..) => _ = link.addresses.insert((*address).into()),
                (Data::Ptr(_) | Data::Srv { .. }, 0) => taken_back = true,
                (Data::Ptr(_), _) => self.last_said = at,
                _ => {}
            }
        }
        let link = &mut self.links[link];
        if announced && !link.is_announced {
            link.is_announced = true;
            // mdns-sd's word for it may be lost: its monitor drops what finds no room. What we said is to be taken back.
            self.stations[index].is_announced = true;
            self.tell();
        } else if taken_back && self.is_leaving {
            link.goodbye.get_or_insert(at);
        } else if taken_back && station.is_announced {
            // Not by us: a node that had our name, or one that wants us gone.
            self.rescue.get_or_insert(self.next_rescue.max(self.last_said + UNSAID).max(at));
        }
        let now_ms = unix_ms();
        self.claimed = self.claimed.max(claimed(message, &self.service, &self.advertisement.node_id, now_ms));
        let is_ours = |instance: &Name| self.stations.iter().any(|station| station.instance.is(instance));
        let mut events = Vec::new();
        for (instance, strings) in message.goodbyes(&self.service).filter(|(instance, _)| !is_ours(instance))
        {
            events.push(self.discovery.goodbye(&instance.key(), strings));
        }
        for event in events {
            self.pass_on(event);
        }
    }

    /// Announces again what somebody else has taken back (mdns-sd does not; RFC 6762 §10.1 leaves a second for it).
    fn rescue(&mut self) {
        self.rescue = None;
        self.next_rescue = Instant::now() + RESCUE;
        let above = self.claimed.map_or(0, |claimed| claimed.saturating_add(1));
        let incarnation = self.advertisement.incarnation.refute(unix_ms().max(above));
        tracing::warn!(target: "shutdown", incarnation, "somebody else said goodbye for us over mDNS: announcing again");
        for station in self.stations.iter().filter(|station| station.is_announced) {
            // The name is ours already.
            let registered =
                self.info(false).and_then(|info| station.daemon.register(info).map_err(Error::Daemon));
            if let Err(error) = registered {
                let interface = &station.interface.name;
                tracing::warn!(target: "shutdown", interface, %error, "mDNS announces nothing");
            }
        }
    }

    fn browse(&mut self, listener: Box<dyn FnMut(Event) + Send>) {
        if self.is_leaving {
            return;
        }
        self.listeners.push(listener);
        if self.listeners.len() > 1 {
            return;
        }
        for (station, there) in self.stations.iter().enumerate() {
            let (daemon, service_type) = (there.daemon.clone(), self.advertisement.service_type.clone());
            let browse = move || daemon.browse(&service_type);
            tokio::spawn(follow(station, there.interface.name.clone(), browse, self.input.clone()));
        }
    }

    fn browsed(&mut self, station: usize, event: ServiceEvent) {
        let event = match event {
            ServiceEvent::ServiceResolved(service) => self.discovery.resolved(station, found(&service)),
            ServiceEvent::ServiceRemoved(_, fullname) => {
                self.discovery.removed(station, &fullname.to_lowercase())
            }
            _ => None,
        };
        self.pass_on(event);
    }

    fn pass_on(&mut self, event: Option<Event>) {
        // After a withdrawal there is no discovery.
        if let Some(event) = event.filter(|_| !self.is_leaving) {
            // A listener that panics hears no more; the goodbye is not to go with it.
            self.listeners.retain_mut(|listener| {
                let heard = catch_unwind(AssertUnwindSafe(|| listener(event.clone())));
                if heard.is_err() {
                    tracing::error!(target: "shutdown", "a listener of mDNS events panicked and is not called again");
                }
                heard.is_ok()
            });
        }
    }
}

impl Station {
    /// Stops the daemon without a word: its goodbye would take back what is perhaps another's, so its interface is taken
    /// away first.
    pub(crate) fn silence(&self) -> Result<(), mdns_sd::Error> {
        self.daemon.disable_interface(IfKind::All)?;
        self.daemon.shutdown().map(drop)
    }

    /// Has the daemon say goodbye and stop. Right behind each other: its own repeat, 120 ms later, would leave by the
    /// interface used last, and while it lives it answers queries, after which others have us again.
    pub(crate) fn leave(&self, registered: &str) -> Result<(), mdns_sd::Error> {
        self.daemon.unregister(registered)?;
        self.daemon.shutdown().map(drop)
    }
}

/// The name of a host.
fn host(label: &str) -> Name {
    Name::of([label, "local"]).unwrap_or_default()
}

/// The highest incarnation that a message has for our node, whoever says it, of those that others may believe: not more than
/// [`WINDOW`] ahead of the clock.
fn claimed(message: &Message, service: &Name, node_id: &str, now_ms: u64) -> Option<u64> {
    let limit = now_ms.saturating_add(WINDOW.as_millis().try_into().unwrap_or(u64::MAX));
    let records = message.answers.iter().chain(&message.others);
    let strings = records.filter_map(|record| match &record.data {
        Data::Txt(strings) if record.is_in() && record.name.is_child_of(service) => Some(strings),
        _ => None,
    });
    let ours = strings.filter(|strings| value(strings, "node_id") == Some(node_id));
    let said = ours.filter_map(|strings| value(strings, "inc")?.parse().ok());
    // One more than that is said in reply, and must be believed as well.
    said.filter(|incarnation| *incarnation < limit).max()
}

/// Milliseconds since the Unix epoch.
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis().try_into().unwrap_or(u64::MAX)
}

/// Hears one link, for as long as the engine takes what it hears.
async fn listen(link: usize, socket: Arc<UdpSocket>, service: Name, input: mpsc::Sender<Input>) {
    let mut buffer = vec![0; LARGEST + 1];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An interface that went down and comes back.
            Err(error) if is_passing(&error) => continue,
            Err(error) => {
                tracing::warn!(target: "shutdown", %error, "an mDNS socket hears nothing any more");
                return;
            }
        };
        let at = Instant::now();
        // RFC 6762 §6: a response from another port MUST be ignored.
        if from.port() != PORT {
            continue;
        }
        let Ok(message) = Message::read(&buffer[..length]) else { continue };
        let is_about_us = |name: &Name| name.is(&service) || name.is_child_of(&service);
        let is_wanted =
            message.is_response() && message.answers.iter().any(|record| is_about_us(&record.name));
        if is_wanted && input.send(Input::Heard { link, message, at }).await.is_err() {
            return;
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NetworkDown
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::Interrupted
    )
}

/// What a resolved service says of itself.
fn found(service: &ResolvedService) -> Found {
    let text = |key| service.get_property_val_str(key).unwrap_or_default().to_owned();
    let number = |key| service.get_property_val_str(key).and_then(|text| text.parse::<u64>().ok());
    let mut addresses: Vec<_> = service
        .get_addresses()
        .iter()
        .filter_map(|address| match address {
            ScopedIp::V4(address) => Some(SocketAddr::from((*address.addr(), service.get_port()))),
            ScopedIp::V6(address) => {
                let is_scoped = address.addr().is_unicast_link_local();
                let scope = if is_scoped { address.scope_id().index } else { 0 };
                Some(SocketAddrV6::new(*address.addr(), service.get_port(), 0, scope).into())
            }
            _ => None,
        })
        .collect();
    addresses.sort_unstable();
    Found {
        fullname: service.get_fullname().to_lowercase(),
        node_id: text("node_id"),
        cluster: text("cluster"),
        incarnation: number("inc"),
        version: text("ver"),
        addresses,
        notice_port: number("notice").and_then(|port| port.try_into().ok()),
    }
}
