//! Who else is there: what mdns-sd has resolved, and goodbyes as they are heard.
//!
//! mdns-sd reports a removal a second after the goodbye (RFC 6762 §10.1) and does not say whether there was one. So our own
//! sockets hear goodbyes, at once, and what it removes without one is lost. Pure: time is an argument.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

/// Something about another node of our service type. Of our own nothing is told.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A node is there, or says something new about itself. Whether it may come back after a departure is for the
    /// incarnation to say: a cache may still speak of one that has gone.
    Found(Found),
    /// A node has said goodbye.
    Gone {
        /// The instance's full name.
        fullname: String,
        /// Who it is.
        node_id: String,
        /// Its incarnation as the goodbye has it, or as it was last seen.
        incarnation: Option<u64>,
        /// By what it is known.
        how: How,
    },
    /// A node has not been heard until its records were too old. It said nothing: it may have crashed, or the network.
    Lost {
        /// The instance's full name.
        fullname: String,
        /// Who it is.
        node_id: String,
        /// Its incarnation as it was last seen.
        incarnation: Option<u64>,
    },
}

/// A node that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Found {
    /// The instance's full name, in small letters.
    pub fullname: String,
    /// Who it is.
    pub node_id: String,
    /// Its cluster; may be empty.
    pub cluster: String,
    /// Its incarnation, if it says one.
    pub incarnation: Option<u64>,
    /// Its version; may be empty.
    pub version: String,
    /// Where it is served, over all interfaces; a link-local IPv6 address with its scope.
    pub addresses: Vec<SocketAddr>,
    /// Its port for departure notices.
    pub notice_port: Option<u16>,
}

/// By what it is known that a node has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum How {
    /// A PTR record with a TTL of zero.
    Goodbye,
}

/// How many nodes are remembered. Whoever sends more names is no mesh.
const MOST: usize = 10_000;
/// For how long a goodbye that comes again, or over another interface, is the same.
const SAME_GOODBYE: Duration = Duration::from_secs(10);
/// How many goodbyes are remembered.
const GOODBYES: usize = 1_000;

/// What is known of others.
#[derive(Debug, Default)]
pub(crate) struct Discovery {
    own: String,
    nodes: HashMap<String, Node>,
    goodbyes: VecDeque<(String, Option<u64>, Instant)>,
}

/// What the interfaces say of one instance.
#[derive(Debug)]
struct Node {
    by_station: BTreeMap<usize, Found>,
    told: Option<Found>,
}

impl Discovery {
    /// For a node of this name.
    pub(crate) fn of(own: &str) -> Self {
        Self { own: own.to_owned(), ..Self::default() }
    }

    /// An interface has resolved an instance.
    pub(crate) fn resolved(&mut self, station: usize, found: Found) -> Option<Event> {
        if found.node_id.is_empty() || found.node_id == self.own {
            return None;
        }
        if self.nodes.len() >= MOST && !self.nodes.contains_key(&found.fullname) {
            return None;
        }
        let key = found.fullname.clone();
        let node = self.nodes.entry(key).or_insert_with(|| Node { by_station: BTreeMap::new(), told: None });
        node.by_station.insert(station, found.clone());
        let mut whole = found;
        whole.addresses =
            node.by_station.values().flat_map(|found| found.addresses.iter().copied()).collect();
        whole.addresses.sort_unstable();
        whole.addresses.dedup();
        if node.told.as_ref() == Some(&whole) {
            return None;
        }
        node.told = Some(whole.clone());
        Some(Event::Found(whole))
    }

    /// An interface has removed an instance.
    pub(crate) fn removed(&mut self, station: usize, fullname: &str) -> Option<Event> {
        let node = self.nodes.get_mut(fullname)?;
        node.by_station.remove(&station);
        if !node.by_station.is_empty() {
            return None;
        }
        let told = self.nodes.remove(fullname)?.told?;
        Some(Event::Lost { fullname: told.fullname, node_id: told.node_id, incarnation: told.incarnation })
    }

    /// A goodbye was heard, with the strings of the TXT record beside it.
    pub(crate) fn goodbye(&mut self, fullname: String, strings: &[Vec<u8>], now: Instant) -> Option<Event> {
        let told = self.nodes.remove(&fullname).and_then(|node| node.told);
        let text = |key: &str| value(strings, key).filter(|text| !text.is_empty());
        let node_id = text("node_id").map(str::to_owned).or_else(|| Some(told.as_ref()?.node_id.clone()))?;
        if node_id == self.own {
            return None;
        }
        let said = text("inc").and_then(|text| text.parse().ok());
        let incarnation = said.or_else(|| told.as_ref()?.incarnation);
        self.goodbyes.retain(|(.., at)| now.duration_since(*at) < SAME_GOODBYE);
        let is_same = |(name, inc, _): &(String, Option<u64>, Instant)| {
            *name == fullname && (*inc == incarnation || incarnation.is_none())
        };
        if told.is_none() && self.goodbyes.iter().any(is_same) {
            return None;
        }
        if self.goodbyes.len() >= GOODBYES {
            self.goodbyes.pop_front();
        }
        self.goodbyes.push_back((fullname.clone(), incarnation, now));
        Some(Event::Gone { fullname, node_id, incarnation, how: How::Goodbye })
    }
}

/// The value of a key in a TXT record; the first counts, and its case does not (RFC 6763 §6.4).
fn value<'a>(strings: &'a [Vec<u8>], key: &str) -> Option<&'a str> {
    strings.iter().find_map(|string| {
        let (name, value) = string.split_at_checked(key.len())?;
        let value = value.strip_prefix(b"=")?;
        name.eq_ignore_ascii_case(key.as_bytes()).then(|| std::str::from_utf8(value).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "b._edge._tcp.local.";

    fn found(incarnation: u64, address: &str) -> Found {
        Found {
            fullname: NAME.to_owned(),
            node_id: "B".to_owned(),
            cluster: "default".to_owned(),
            incarnation: Some(incarnation),
            version: "1".to_owned(),
            addresses: vec![address.parse().expect("an address")],
            notice_port: None,
        }
    }

    fn strings(text: &[&str]) -> Vec<Vec<u8>> {
        text.iter().map(|text| text.as_bytes().to_vec()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_goodbye_is_told_once_however_often_and_over_how_many_interfaces_it_comes() {
        let mut discovery = Discovery::of("A");
        assert!(matches!(discovery.resolved(0, found(7, "10.0.0.2:80")), Some(Event::Found(_))));
        assert_eq!(discovery.resolved(0, found(7, "10.0.0.2:80")), None, "nothing new");
        let Some(Event::Found(both)) = discovery.resolved(1, found(7, "10.1.0.2:80")) else {
            panic!("an address more")
        };
        assert_eq!(both.addresses.len(), 2);
        let now = Instant::now();
        let gone = discovery.goodbye(NAME.to_owned(), &[], now);
        assert!(
            matches!(gone, Some(Event::Gone { ref node_id, incarnation: Some(7), .. }) if node_id == "B"),
            "{gone:?}"
        );
        // The second interface's, the repeats, and what mdns-sd says a second later.
        assert_eq!(discovery.goodbye(NAME.to_owned(), &strings(&["node_id=B", "inc=7"]), now), None);
        assert_eq!(discovery.removed(0, NAME), None);
        assert_eq!(discovery.removed(1, NAME), None);
        // Its next life has a goodbye of its own.
        assert!(discovery.resolved(0, found(8, "10.0.0.2:80")).is_some());
        assert!(discovery.goodbye(NAME.to_owned(), &[], now).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_not_heard_any_more_is_lost_once_no_interface_knows_it() {
        let mut discovery = Discovery::of("A");
        discovery.resolved(0, found(7, "10.0.0.2:80"));
        discovery.resolved(1, found(7, "10.1.0.2:80"));
        assert_eq!(discovery.removed(0, NAME), None);
        assert!(matches!(discovery.removed(1, NAME), Some(Event::Lost { incarnation: Some(7), .. })));
        assert_eq!(discovery.removed(1, NAME), None);
    }

    #[tokio::test(start_paused = true)]
    async fn of_ourselves_and_of_nameless_nodes_nothing_is_told() {
        let mut discovery = Discovery::of("B");
        assert_eq!(discovery.resolved(0, found(7, "10.0.0.2:80")), None);
        assert_eq!(discovery.goodbye(NAME.to_owned(), &strings(&["NODE_ID=B"]), Instant::now()), None);
        assert_eq!(discovery.goodbye("printer._edge._tcp.local.".to_owned(), &[], Instant::now()), None);
    }
}
