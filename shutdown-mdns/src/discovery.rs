//! Who else is there: what mdns-sd has resolved, and goodbyes as they are heard.
//!
//! mdns-sd reports a removal a second after the goodbye (RFC 6762 §10.1) and does not say whether there was one. So our own
//! sockets hear goodbyes, at once, and what it removes without one is lost. Only who was told as found can leave: one packet
//! for a name that nobody knows is nobody's word. Pure: no sockets, no clock.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;

/// Something about another node of our service type and cluster. Of our own nothing is told, nor of other clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A node is there, or says something new about itself. Whether it may come back after a departure is for the
    /// incarnation to say: a cache may still speak of one that has gone.
    Found(Found),
    /// A node that was found has said goodbye.
    Gone {
        /// The instance's full name.
        fullname: String,
        /// Who it is.
        node_id: String,
        /// Its incarnation as it was last seen. The goodbye of an earlier one is not told.
        incarnation: Option<u64>,
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
    /// Its cluster, which is ours.
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

/// How many nodes are remembered. Whoever sends more names is no mesh.
const MOST: usize = 10_000;

/// What is known of others.
#[derive(Debug)]
pub(crate) struct Discovery {
    own: String,
    cluster: String,
    nodes: HashMap<String, Node>,
}

/// What the interfaces say of one instance.
#[derive(Debug)]
struct Node {
    by_station: BTreeMap<usize, Found>,
    /// The interfaces that browse anew and have not resolved it again.
    unconfirmed: BTreeSet<usize>,
    told: Found,
}

impl Node {
    /// Where it is served, over all interfaces.
    fn addresses(&self) -> Vec<SocketAddr> {
        let all = self.by_station.values().flat_map(|found| found.addresses.iter().copied());
        all.collect::<BTreeSet<_>>().into_iter().collect()
    }
}

impl Discovery {
    /// For a node of this name in this cluster.
    pub(crate) fn of(own: &str, cluster: &str) -> Self {
        Self { own: own.to_owned(), cluster: cluster.to_owned(), nodes: HashMap::new() }
    }

    /// An interface has resolved an instance.
    pub(crate) fn resolved(&mut self, station: usize, found: Found) -> Option<Event> {
        if found.node_id.is_empty() || found.node_id == self.own || found.cluster != self.cluster {
            // If it was a peer's name, it is one no more.
            return self.removed(station, &found.fullname);
        }
        let is_new = !self.nodes.contains_key(&found.fullname);
        if is_new && self.nodes.len() >= MOST {
            return None;
        }
        let node = self.nodes.entry(found.fullname.clone()).or_insert_with(|| Node {
            by_station: BTreeMap::new(),
            unconfirmed: BTreeSet::new(),
            told: found.clone(),
        });
        node.by_station.insert(station, found.clone());
        node.unconfirmed.remove(&station);
        let whole = Found { addresses: node.addresses(), ..found };
        if !is_new && node.told == whole {
            return None;
        }
        node.told = whole.clone();
        Some(Event::Found(whole))
    }

    /// An interface has removed an instance.
    pub(crate) fn removed(&mut self, station: usize, fullname: &str) -> Option<Event> {
        let node = self.nodes.get_mut(fullname)?;
        node.by_station.remove(&station);
        node.unconfirmed.remove(&station);
        if node.by_station.is_empty() {
            let told = self.nodes.remove(fullname)?.told;
            return Some(Event::Lost {
                fullname: told.fullname,
                node_id: told.node_id,
                incarnation: told.incarnation,
            });
        }
        let rest = node.addresses();
        if node.told.addresses == rest {
            return None;
        }
        node.told.addresses = rest;
        Some(Event::Found(node.told.clone()))
    }

    /// An interface browses anew: it may have missed removals.
    pub(crate) fn browses_again(&mut self, station: usize) {
        for node in self.nodes.values_mut().filter(|node| node.by_station.contains_key(&station)) {
            node.unconfirmed.insert(station);
        }
    }

    /// An interface has said all it knows since it browses anew: what it has not resolved again is not there any more.
    pub(crate) fn has_told_all(&mut self, station: usize) -> Vec<Event> {
        let is_missed =
            |(name, node): (&String, &Node)| node.unconfirmed.contains(&station).then(|| name.clone());
        let missed: Vec<String> = self.nodes.iter().filter_map(is_missed).collect();
        missed.iter().filter_map(|name| self.removed(station, name)).collect()
    }

    /// A goodbye was heard, with the strings of the TXT record beside it.
    pub(crate) fn goodbye(&mut self, fullname: &str, strings: &[Vec<u8>]) -> Option<Event> {
        let told = &self.nodes.get(fullname)?.told;
        let is_anothers = |key, ours: &str| value(strings, key).is_some_and(|text| text != ours);
        if is_anothers("node_id", &told.node_id) || is_anothers("cluster", &told.cluster) {
            return None;
        }
        // An earlier run's, that was late or is said again by somebody.
        let said: Option<u64> = value(strings, "inc").and_then(|text| text.parse().ok());
        if said.zip(told.incarnation).is_some_and(|(said, told)| said < told) {
            return None;
        }
        let told = self.nodes.remove(fullname)?.told;
        Some(Event::Gone { fullname: told.fullname, node_id: told.node_id, incarnation: told.incarnation })
    }
}

/// The value of a key in a TXT record; the first counts, and its case does not (RFC 6763 §6.4).
pub(crate) fn value<'a>(strings: &'a [Vec<u8>], key: &str) -> Option<&'a str> {
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

    fn gone(event: Option<&Event>) -> Option<(&str, Option<u64>)> {
        match event {
            Some(Event::Gone { node_id, incarnation, .. }) => Some((node_id, *incarnation)),
            _ => None,
        }
    }

    #[test]
    fn a_goodbye_is_told_once_however_often_and_over_how_many_interfaces_it_comes() {
        let mut discovery = Discovery::of("A", "default");
        assert!(matches!(discovery.resolved(0, found(7, "10.0.0.2:80")), Some(Event::Found(_))));
        assert_eq!(discovery.resolved(0, found(7, "10.0.0.2:80")), None, "nothing new");
        let Some(Event::Found(both)) = discovery.resolved(1, found(7, "10.1.0.2:80")) else {
            panic!("an address more")
        };
        assert_eq!(both.addresses.len(), 2);
        assert_eq!(gone(discovery.goodbye(NAME, &[]).as_ref()), Some(("B", Some(7))));
        // The second interface's, the repeats, and what mdns-sd says a second later.
        assert_eq!(discovery.goodbye(NAME, &strings(&["node_id=B", "inc=7"])), None);
        assert_eq!(discovery.removed(0, NAME), None);
        assert_eq!(discovery.removed(1, NAME), None);
        // Its next life has a goodbye of its own.
        assert!(discovery.resolved(0, found(8, "10.0.0.2:80")).is_some());
        assert_eq!(gone(discovery.goodbye(NAME, &[]).as_ref()), Some(("B", Some(8))));
    }

    #[test]
    fn a_goodbye_for_whom_nobody_has_found_is_nobodys_word() {
        let mut discovery = Discovery::of("A", "default");
        discovery.resolved(0, found(7, "10.0.0.2:80"));
        let forged = strings(&["node_id=B", "cluster=default", "inc=9"]);
        assert_eq!(discovery.goodbye("forged._edge._tcp.local.", &forged), None);
        assert!(discovery.goodbye(NAME, &forged).is_some(), "it was found, and is still");
    }

    #[test]
    fn the_goodbye_of_an_earlier_run_is_not_told() {
        let mut discovery = Discovery::of("A", "default");
        discovery.resolved(0, found(8, "10.0.0.2:80"));
        assert_eq!(discovery.goodbye(NAME, &strings(&["node_id=B", "inc=7"])), None);
        // A later one than we know is the run that we know, or one that we missed.
        assert_eq!(gone(discovery.goodbye(NAME, &strings(&["inc=9"])).as_ref()), Some(("B", Some(8))));
    }

    #[test]
    fn of_another_cluster_neither_a_node_nor_its_goodbye_is_told() {
        let mut discovery = Discovery::of("A", "default");
        for cluster in ["blue", ""] {
            let foreign = Found { cluster: cluster.to_owned(), ..found(7, "10.0.0.3:80") };
            assert_eq!(discovery.resolved(0, foreign.clone()), None);
            assert_eq!(discovery.goodbye(NAME, &[]), None);
            discovery.resolved(0, found(7, "10.0.0.2:80"));
            let said = format!("cluster={cluster}");
            assert_eq!(discovery.goodbye(NAME, &strings(&["node_id=B", &said, "inc=7"])), None);
            // The name is now the other's: ours was not heard to leave.
            assert!(matches!(discovery.resolved(0, foreign), Some(Event::Lost { .. })));
        }
        let mut without = Discovery::of("A", "");
        let alike = Found { cluster: String::new(), ..found(7, "10.0.0.2:80") };
        assert!(without.resolved(0, alike).is_some());
        assert!(without.goodbye(NAME, &strings(&["node_id=B"])).is_some());
    }

    #[test]
    fn who_is_not_heard_any_more_is_lost_once_no_interface_knows_it() {
        let mut discovery = Discovery::of("A", "default");
        discovery.resolved(0, found(7, "10.0.0.2:80"));
        discovery.resolved(1, found(7, "10.1.0.2:80"));
        assert_eq!(discovery.removed(0, NAME), Some(Event::Found(found(7, "10.1.0.2:80"))), "with the rest");
        assert!(matches!(discovery.removed(1, NAME), Some(Event::Lost { incarnation: Some(7), .. })));
        assert_eq!(discovery.removed(1, NAME), None);
    }

    #[test]
    fn what_an_interface_does_not_find_again_when_it_browses_anew_is_lost() {
        let mut discovery = Discovery::of("A", "default");
        let other = Found { fullname: "c._edge._tcp.local.".to_owned(), ..found(7, "10.0.0.3:80") };
        discovery.resolved(0, found(7, "10.0.0.2:80"));
        discovery.resolved(0, other.clone());
        assert_eq!(discovery.has_told_all(0), [], "it did not begin anew");
        discovery.browses_again(0);
        assert_eq!(discovery.resolved(0, found(7, "10.0.0.2:80")), None, "nothing new");
        assert_eq!(discovery.has_told_all(1), [], "another interface");
        let lost = discovery.has_told_all(0);
        assert!(
            matches!(&lost[..], [Event::Lost { fullname, .. }] if *fullname == other.fullname),
            "{lost:?}"
        );
        assert_eq!(discovery.has_told_all(0), []);
    }

    #[test]
    fn of_ourselves_and_of_nameless_nodes_nothing_is_told() {
        let mut discovery = Discovery::of("B", "default");
        assert_eq!(discovery.resolved(0, found(7, "10.0.0.2:80")), None);
        assert_eq!(discovery.resolved(0, Found { node_id: String::new(), ..found(7, "10.0.0.2:80") }), None);
        assert_eq!(discovery.goodbye(NAME, &strings(&["NODE_ID=B"])), None);
    }
}
