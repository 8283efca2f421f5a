//! Who the neighbours are, and which of them may be sent a request.
//!
//! What is known of a peer comes from four places, and they are not believed alike:
//!
//! | from | says | believed |
//! |---|---|---|
//! | the configuration | an address | until a peer says otherwise itself |
//! | a notice, or an acknowledgement | the peer itself, under the cluster's key | always |
//! | discovery (mDNS) | anybody on the link | of those that have said nothing under the key |
//! | the state of an earlier run | what was true then | not before it is heard from again |
//!
//! A peer that has left is remembered (a *tombstone*): a cache, a late announcement or a restored state does not bring it
//! back. Only a higher incarnation does, or its own RETURN.
//!
//! What a notice says is compared with what notices said before, never with what discovery says: else anybody on the link
//! could make a departure look outdated. Nor does discovery say who is at a configured address, or that somebody has gone who
//! is configured or has spoken under the key. What it can do is to add a node, and to say that one is there in a later run.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch;

use crate::peers::id::Id;
use crate::peers::notice::{Kind, Notice};
use crate::peers::record::PeerRecord;

/// How far another node's clock may be from ours, either way.
pub const WINDOW: Duration = Duration::from_secs(30);
/// The longest that a peer counts as draining, whatever it says.
pub const DRAIN_CAP: Duration = Duration::from_secs(300);
/// Within what time departures count as one mass departure.
pub const MASS_WINDOW: Duration = Duration::from_secs(60);
/// How many percent of the peers stay routable in a mass departure; Envoy's panic threshold has the same default.
pub const MASS_PERCENT: u32 = 50;
/// How long a peer that was not heard from is remembered, and how long one that has left.
pub const FORGET: Duration = Duration::from_secs(24 * 3600);
/// The most peers and tombstones; what comes beyond is not remembered.
pub const MOST_PEERS: usize = 65_536;

/// Where a peer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerState {
    /// Not heard from in this run: configured, restored, or lost sight of.
    Unverified,
    /// Heard from.
    Up,
    /// It has said that it leaves and still answers what it has accepted.
    Draining,
    /// It has left.
    Departed,
}

impl PeerState {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Unverified, Self::Up, Self::Draining, Self::Departed];

    /// The state as a label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unverified => "unverified",
            Self::Up => "up",
            Self::Draining => "draining",
            Self::Departed => "departed",
        }
    }
}

impl fmt::Display for PeerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A peer at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// Who it is, once it has said so.
    pub id: Option<Id>,
    /// Its name in full, where discovery tells.
    pub name: Option<Arc<str>>,
    /// Where the configuration says it is.
    pub configured: Option<SocketAddr>,
    /// Every address it is known by, the configured one first, then what discovery found, then what it says itself.
    pub addresses: Vec<SocketAddr>,
    /// Those of them that are not discovery's word alone.
    pub vouched: Vec<SocketAddr>,
    /// Whether it has said under the cluster's key who it is.
    pub authenticated: bool,
    /// Where it hears notices, if it is known to.
    pub notices: Option<SocketAddr>,
    /// Its highest incarnation known; 0: none.
    pub incarnation: u64,
    /// Where it stands.
    pub state: PeerState,
    /// Whether it may be sent new requests.
    pub routable: bool,
    /// When it was heard from, milliseconds since the Unix epoch; 0: never.
    pub last_seen: u64,
}

/// What discovery found.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// The node's name.
    pub name: String,
    /// Its incarnation, if it tells.
    pub incarnation: Option<u64>,
    /// Where it serves, the best first.
    pub addresses: Vec<SocketAddr>,
    /// Where it hears notices, if it does.
    pub notices: Option<SocketAddr>,
}

/// What a notice or a sighting has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The peer has left: no new requests.
    Departed,
    /// The peer is there, or there again.
    Returned,
    /// Nothing that matters to routing: it was known, is no peer of ours, or is remembered for later.
    Noted,
    /// Nothing: this notice, or a later one of the same run, has been heard before.
    Repeated,
    /// Nothing: its run is over.
    Outdated,
    /// Nothing: too many leave at once, so this one is not believed ([`MASS_PERCENT`]).
    Withheld,
}

/// The neighbours of this node. Clones are the same registry.
#[derive(Clone)]
pub struct PeerRegistry {
    shared: Arc<Shared>,
}

struct Shared {
    own: Id,
    percent: u32,
    table: Mutex<Table>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Table {
    entries: HashMap<u64, Entry>,
    next: u64,
    by_id: HashMap<Id, u64>,
    by_addr: HashMap<SocketAddr, u64>,
    /// How many entries may be sent requests.
    routable: u64,
    /// Departures of routable peers, the oldest first: when, and whose.
    recent: VecDeque<(u64, u64)>,
    /// Until when the guard has spoken.
    guard_said: u64,
    withheld: u64,
}

/// What is known of one node.
#[derive(Clone, Debug, Default)]
pub(super) struct Entry {
    pub(super) id: Option<Id>,
    pub(super) name: Option<Arc<str>>,
    pub(super) configured: Option<SocketAddr>,
    pub(super) found: Vec<SocketAddr>,
    pub(super) told: Vec<SocketAddr>,
    pub(super) notices: Option<SocketAddr>,
    /// Whether it is a peer, and not only somebody whose departure is remembered.
    pub(super) member: bool,
    /// Whether `id` is its own word.
    pub(super) authenticated: bool,
    /// That it has left, which was not believed.
    pub(super) withheld: Option<Standing>,
    /// The highest from anywhere.
    pub(super) incarnation: u64,
    /// The newest notice acted on: of which run, and which of that run's.
    pub(super) mark: Option<(u64, u64)>,
    pub(super) standing: Standing,
    pub(super) last_seen: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Not heard from in this run.
    Unverified {
        trusted: bool,
    },
    Up,
    /// In this run of ours, or as an earlier one knew; and which of its own that was.
    Left {
        at: u64,
        until: u64,
        run: u64,
        restored: bool,
    },
}

impl Default for Standing {
    fn default() -> Self {
        Self::Unverified { trusted: false }
    }
}

impl Entry {
    fn routable(&self) -> bool {
        self.member && matches!(self.standing, Standing::Up | Standing::Unverified { trusted: true })
    }

    /// Takes what an earlier run knew of this configured peer.
    fn remember(&mut self, earlier: Self) {
        let configured = std::mem::replace(self, earlier);
        self.configured = configured.configured;
        self.notices = configured.notices;
        self.member = true;
        if !self.has_left() {
            self.standing = configured.standing;
        }
    }

    pub(super) fn has_left(&self) -> bool {
        matches!(self.standing, Standing::Left { .. })
    }

    fn state(&self, now_ms: u64) -> PeerState {
        match self.standing {
            Standing::Unverified { .. } => PeerState::Unverified,
            Standing::Up => PeerState::Up,
            Standing::Left { until, .. } if now_ms < until => PeerState::Draining,
            Standing::Left { .. } => PeerState::Departed,
        }
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        let mut all: Vec<SocketAddr> = Vec::new();
        for addr in self.configured.iter().chain(&self.found).chain(&self.told) {
            if !all.contains(addr) {
                all.push(*addr);
            }
        }
        all
    }

    /// Its addresses that are not discovery's word alone.
    fn vouched(&self) -> Vec<SocketAddr> {
        let own = self.told.iter().filter(|addr| Some(**addr) != self.configured);
        self.configured.iter().chain(own).copied().collect()
    }

    fn peer(&self, now_ms: u64) -> Peer {
        Peer {
            vouched: self.vouched(),
            authenticated: self.authenticated,
            id: self.id,
            name: self.name.clone(),
            configured: self.configured,
            addresses: self.addresses(),
            notices: self.notices,
            incarnation: self.incarnation,
            state: self.state(now_ms),
            routable: self.routable(),
            last_seen: self.last_seen,
        }
    }
}

impl fmt::Debug for PeerRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peers = self.shared.table.lock().entries.len();
        f.debug_struct("PeerRegistry").field("own", &self.shared.own).field("entries", &peers).finish()
    }
}

/// Making one, and looking at it.
impl PeerRegistry {
    /// The neighbours of node `own`: none yet.
    pub fn new(own: Id) -> Self {
        Self::with_threshold(own, MASS_PERCENT)
    }

    /// As [`new`](Self::new), with another threshold than [`MASS_PERCENT`]: how many percent of the peers stay routable
    /// however many say that they leave. 0 believes all of them. One may always leave.
    pub fn with_threshold(own: Id, percent: u32) -> Self {
        let shared = Shared {
            own,
            percent: percent.min(100),
            table: Mutex::default(),
            changed: watch::Sender::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Counts the changes: a watcher that wakes asks for the [`peers`](Self::peers).
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Every peer, and no mere tombstones; ordered by address.
    pub fn peers(&self, now_ms: u64) -> Vec<Peer> {
        let table = self.shared.table.lock();
        let members = table.entries.values().filter(|entry| entry.member);
        let mut peers: Vec<_> = members.map(|entry| entry.peer(now_ms)).collect();
        drop(table);
        peers.sort_by_cached_key(|peer| (peer.addresses.first().copied(), peer.id));
        peers
    }

    /// The peer of this id, or the memory of one that has left.
    pub fn get(&self, id: Id, now_ms: u64) -> Option<Peer> {
        let table = self.shared.table.lock();
        table.of_id(id).map(|entry| entry.peer(now_ms))
    }

    /// How many departures were not believed because too many left at once.
    pub fn withheld(&self) -> u64 {
        self.shared.table.lock().withheld
    }

    /// The node this is the registry of.
    pub fn own(&self) -> Id {
        self.shared.own
    }

    pub(super) fn entries<T>(&self, look: impl FnMut(&Entry) -> Option<T>) -> Vec<T> {
        self.shared.table.lock().entries.values().filter_map(look).collect()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Table) -> (T, bool)) -> T {
        let (result, changed) = change(&mut self.shared.table.lock());
        if changed {
            self.shared.changed.send_modify(|version| *version += 1);
        }
        result
    }
}

/// What changes it.
impl PeerRegistry {
    /// Adds a peer by its address, where it serves and hears notices. It may be sent requests until it says otherwise.
    pub fn configure(&self, addr: SocketAddr) {
        let addr = canonical(addr);
        self.change(|table| {
            let key = match table.by_addr.get(&addr) {
                Some(key) => *key,
                None => table.add(Entry::default()),
            };
            table.update(key, |entry| {
                if let Standing::Unverified { trusted } = &mut entry.standing {
                    *trusted = true;
                }
                entry.member = true;
                entry.configured = Some(addr);
                entry.notices = Some(addr);
            });
            ((), true)
        });
    }

    /// Acts on a notice that has passed every check up to here.
    pub fn heard(&self, notice: &Notice, now_ms: u64) -> Effect {
        self.change(|table| {
            let (key, merged) = table.of_notice(notice);
            if let Some(key) = key
                && let Some((incarnation, seq)) = table.entries[&key].mark
            {
                if notice.incarnation < incarnation {
                    return (Effect::Outdated, merged);
                }
                if notice.incarnation == incarnation && notice.seq <= seq {
                    return (Effect::Repeated, merged);
                }
            }
            let Some(key) = key.or_else(|| table.add_if_room(now_ms)) else { return (Effect::Noted, merged) };
            let leaves = notice.kind == Kind::Leaving;
            let routable = table.entries[&key].routable();
            let withheld = leaves && routable && !table.may_leave(self.shared.percent, now_ms);
            table.update(key, |entry| {
                entry.id = Some(notice.node);
                entry.authenticated = true;
                entry.mark = Some((notice.incarnation, notice.seq));
                entry.incarnation = entry.incarnation.max(notice.incarnation);
                entry.last_seen = now_ms;
                entry.told.clone_from(&notice.endpoints);
                let drain = Duration::from_millis(notice.drain_ms.into()).min(DRAIN_CAP);
                let until = now_ms.saturating_add(ms(drain));
                let left = Standing::Left { at: now_ms, until, run: notice.incarnation, restored: false };
                entry.withheld = withheld.then_some(left);
                if !withheld {
                    entry.standing = if leaves { left } else { Standing::Up };
                }
            });
            let effect = match () {
                () if withheld => {
                    table.withhold(notice.node, self.shared.percent, now_ms);
                    Effect::Withheld
                }
                () if !table.entries[&key].member => Effect::Noted,
                () if leaves && routable => {
                    table.note_departure(key, now_ms);
                    Effect::Departed
                }
                () if !leaves && !routable => Effect::Returned,
                () => Effect::Noted,
            };
            (effect, true)
        })
    }

    /// Notes that the peer of this id, at this address, has acknowledged one of our notices: it is there. One that has left
    /// in this run stays so: the acknowledgement may be older than its notice. One of which only the state says so is back
    /// when it acknowledges our RETURN, which nobody does who leaves.
    pub fn acknowledged(&self, id: Id, addr: SocketAddr, kind: Kind, now_ms: u64) {
        self.change(|table| {
            let addr = canonical(addr);
            let key = table.by_id.get(&id).or_else(|| table.by_addr.get(&addr)).copied();
            let Some(key) = key else { return ((), false) };
            let mut merged = false;
            if let Some(other) = table.by_addr.get(&addr).copied().filter(|other| *other != key) {
                let (one, two) = (&table.entries[&key], &table.entries[&other]);
                // Two configured addresses are two places, whoever answers.
                if !two.authenticated && (one.configured.is_none() || two.configured.is_none()) {
                    merged = true;
                    table.merge(key, other);
                }
            }
            let entry = &table.entries[&key];
            let stays_away = match entry.standing {
                Standing::Left { restored, .. } => !restored || kind == Kind::Leaving,
                _ => false,
            };
            if stays_away || (entry.authenticated && entry.id != Some(id)) {
                return ((), merged);
            }
            table.update(key, |entry| {
                entry.id = Some(id);
                entry.authenticated = true;
                entry.last_seen = now_ms;
                entry.standing = Standing::Up;
            });
            ((), true)
        });
    }

    /// Takes what discovery found. It is not told to whom it belongs: anybody on the link may have said it.
    pub fn sighted(&self, sighting: Sighting, now_ms: u64) -> Effect {
        let id = Id::of(&sighting.name);
        let incarnation = sighting.incarnation.unwrap_or(0);
        if id == self.shared.own || incarnation > now_ms.saturating_add(ms(WINDOW)) {
            return Effect::Outdated;
        }
        self.change(|table| {
            let known = table.by_id.get(&id).copied();
            let key = known.or_else(|| {
                let at = |addr: &SocketAddr| table.by_addr.get(&canonical(*addr)).copied();
                sighting.addresses.iter().find_map(at).filter(|key| table.entries[key].id.is_none())
            });
            if let Some(key) = key {
                let entry = &table.entries[&key];
                let over = match entry.withheld.unwrap_or(entry.standing) {
                    Standing::Left { run, .. } => incarnation <= run,
                    _ => incarnation < entry.incarnation,
                };
                if over {
                    return (Effect::Outdated, false);
                }
            }
            let Some(key) = key.or_else(|| table.add_if_room(now_ms)) else { return (Effect::Noted, false) };
            let routable = table.entries[&key].routable();
            table.update(key, |entry| {
                entry.id = Some(id);
                entry.name = Some(sighting.name.into());
                entry.member = true;
                entry.incarnation = entry.incarnation.max(incarnation);
                entry.found = sighting.addresses.into_iter().map(canonical).collect();
                entry.notices = entry.configured.or(sighting.notices.map(canonical)).or(entry.notices);
                entry.last_seen = now_ms;
                (entry.standing, entry.withheld) = (Standing::Up, None);
            });
            (if routable { Effect::Noted } else { Effect::Returned }, true)
        })
    }

    /// Takes a goodbye that discovery heard, of this run of the node if that is known. It counts for nodes that discovery has
    /// found: who is configured, or has said under the key who it is, says itself that it leaves.
    pub fn goodbye(&self, name: &str, incarnation: Option<u64>, now_ms: u64) -> Effect {
        let id = Id::of(name);
        self.change(|table| {
            let Some(key) = table.by_id.get(&id).copied() else { return (Effect::Noted, false) };
            let entry = &table.entries[&key];
            let run = incarnation.unwrap_or(entry.incarnation);
            if entry.has_left() {
                return (Effect::Repeated, false);
            }
            if run < entry.incarnation {
                return (Effect::Outdated, false);
            }
            if entry.configured.is_some() || entry.authenticated {
                return (Effect::Noted, false);
            }
            let routable = entry.routable();
            if routable && !table.may_leave(self.shared.percent, now_ms) {
                table.withhold(id, self.shared.percent, now_ms);
                return (Effect::Withheld, true);
            }
            table.update(key, |entry| {
                entry.standing = Standing::Left { at: now_ms, until: now_ms, run, restored: false };
            });
            if routable {
                table.note_departure(key, now_ms);
            }
            (Effect::Departed, true)
        })
    }

    /// Notes that discovery does not see it any more, though it has not said goodbye. A configured peer is not concerned.
    pub fn lost(&self, name: &str) {
        self.change(|table| {
            let key = table.by_id.get(&Id::of(name)).copied();
            let concerned = |key: &u64| {
                let entry = &table.entries[key];
                entry.configured.is_none() && !entry.has_left()
            };
            let Some(key) = key.filter(concerned) else { return ((), false) };
            table.update(key, |entry| entry.standing = Standing::default());
            ((), true)
        });
    }

    /// Takes what an earlier run knew, before anything is heard: a peer as unverified, one that had left as departed. What was
    /// not heard from within [`FORGET`] is dropped. `saved_at` stands in where a record does not say when. How many were taken.
    pub fn import(&self, records: &[PeerRecord], saved_at: u64, now_ms: u64) -> usize {
        self.change(|table| {
            let mut taken = 0;
            for record in records.iter().take(MOST_PEERS) {
                let Some(entry) = record.entry(saved_at, now_ms) else { continue };
                if entry.id == Some(self.shared.own) {
                    continue;
                }
                let at = entry.addresses().into_iter().find_map(|addr| table.by_addr.get(&addr).copied());
                match entry.id.and_then(|id| table.by_id.get(&id).copied()).or(at) {
                    None => {
                        taken += usize::from(entry.member);
                        let key = table.add(entry);
                        // Where it is found.
                        table.update(key, |_| ());
                    }
                    Some(key) if table.entries[&key].last_seen == 0 && table.entries[&key].id.is_none() => {
                        taken += 1;
                        table.update(key, |configured| configured.remember(entry));
                    }
                    // Twice in the state: the first counts.
                    Some(_) => {}
                }
            }
            (taken, taken > 0)
        })
    }

    /// What a later run is to know. On the way who was not heard from within [`FORGET`] is forgotten, but for those that are
    /// configured or up; and departures that were not believed are judged once more.
    pub fn export(&self, now_ms: u64) -> Vec<PeerRecord> {
        self.change(|table| {
            let forgotten = table.forget(now_ms);
            let departed = table.judge_again(self.shared.percent, now_ms);
            ((), forgotten | departed)
        });
        let mut records = self.entries(|entry| PeerRecord::of(entry, now_ms));
        records.sort_by(|one, other| (&one.addr, &one.node).cmp(&(&other.addr, &other.node)));
        records
    }
}

impl Table {
    fn of_id(&self, id: Id) -> Option<&Entry> {
        self.entries.get(self.by_id.get(&id)?)
    }

    fn add(&mut self, entry: Entry) -> u64 {
        let key = self.next;
        self.next += 1;
        self.routable += u64::from(entry.routable());
        self.entries.insert(key, entry);
        key
    }

    fn add_if_room(&mut self, now_ms: u64) -> Option<u64> {
        if self.entries.len() >= MOST_PEERS {
            self.forget(now_ms);
        }
        (self.entries.len() < MOST_PEERS).then(|| self.add(Entry::default()))
    }

    /// Forgets who was not heard from for long; whether there was anybody.
    fn forget(&mut self, now_ms: u64) -> bool {
        let kept = |entry: &Entry| {
            let told = match entry.standing {
                Standing::Up => now_ms,
                Standing::Unverified { .. } => entry.last_seen,
                Standing::Left { at, .. } => entry.last_seen.max(at),
            };
            entry.configured.is_some() || told.saturating_add(ms(FORGET)) >= now_ms
        };
        let before = self.entries.len();
        self.entries.retain(|_, entry| kept(entry));
        let entries = &self.entries;
        if entries.len() == before {
            return false;
        }
        self.by_id.retain(|_, key| entries.contains_key(key));
        self.by_addr.retain(|_, key| entries.contains_key(key));
        self.routable = entries.values().filter(|entry| entry.routable()).count() as u64;
        true
    }

    /// Believes departures that were too many at once, as far as they are not any more; whether there was one.
    fn judge_again(&mut self, percent: u32, now_ms: u64) -> bool {
        let withheld = |(key, entry): (&u64, &Entry)| Some((*key, entry.withheld?));
        let withheld: Vec<_> = self.entries.iter().filter_map(withheld).collect();
        let mut believed = false;
        for (key, left) in withheld {
            if self.may_leave(percent, now_ms) {
                self.update(key, |entry| (entry.standing, entry.withheld) = (left, None));
                self.note_departure(key, now_ms);
                believed = true;
            }
        }
        believed
    }

    /// Changes an entry, and where it is found.
    fn update(&mut self, key: u64, change: impl FnOnce(&mut Entry)) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        self.routable -= u64::from(entry.routable());
        let before = entry.id;
        change(entry);
        self.routable += u64::from(entry.routable());
        if before != entry.id
            && let Some(before) = before
        {
            self.by_id.remove(&before);
        }
        match entry.id {
            // Its own word goes before what discovery calls somebody else.
            Some(id) if entry.authenticated => _ = self.by_id.insert(id, key),
            Some(id) => _ = self.by_id.entry(id).or_insert(key),
            None => {}
        }
        // Who is configured at an address, or was there first, keeps it: a word of somebody else does not move it.
        let own = entry.configured.iter().chain(&entry.found).chain(entry.notices.iter());
        for addr in own {
            self.by_addr.entry(*addr).or_insert(key);
        }
    }

    /// The entry that a notice speaks of: its node's, and one that is known by one of its addresses only becomes that.
    /// Whether two have become one on the way.
    fn of_notice(&mut self, notice: &Notice) -> (Option<u64>, bool) {
        let mut key = self.by_id.get(&notice.node).copied();
        let mut merged = false;
        for endpoint in &notice.endpoints {
            let Some(at) = self.by_addr.get(&canonical(*endpoint)).copied() else { continue };
            if Some(at) == key || self.entries[&at].authenticated {
                continue;
            }
            match key {
                Some(key) => {
                    merged = true;
                    self.merge(key, at);
                }
                None => key = Some(at),
            }
        }
        (key, merged)
    }

    /// Makes one entry of two: `other`, of which only addresses are known, goes into `key`.
    fn merge(&mut self, key: u64, other: u64) {
        let Some(gone) = self.entries.remove(&other) else { return };
        self.routable -= u64::from(gone.routable());
        self.by_addr.retain(|_, at| *at != other);
        self.by_id.retain(|_, at| *at != other);
        self.update(key, |entry| {
            entry.found.extend(entry.configured.and(gone.configured));
            entry.configured = entry.configured.or(gone.configured);
            entry.notices = gone.notices.or(entry.notices);
            if gone.member && !entry.member && !entry.has_left() {
                entry.standing = gone.standing;
            }
            entry.member |= gone.member;
            entry.found.extend(gone.found);
        });
    }

    fn note_departure(&mut self, key: u64, now_ms: u64) {
        self.recent.retain(|(_, other)| *other != key);
        self.recent.push_back((now_ms, key));
    }

    /// Whether one more routable peer may leave now, and the rest is still enough.
    fn may_leave(&mut self, percent: u32, now_ms: u64) -> bool {
        let since = now_ms.saturating_sub(ms(MASS_WINDOW));
        while self.recent.front().is_some_and(|(at, _)| *at < since) {
            self.recent.pop_front();
        }
        let entries = &self.entries;
        // Those that are back do not count any more.
        self.recent.retain(|(_, key)| entries.get(key).is_some_and(Entry::has_left));
        let left = self.recent.len() as u64;
        let most = (self.routable + left) * u64::from(100 - percent) / 100;
        left < most.max(1)
    }

    /// Says once in a while that departures are not believed.
    fn withhold(&mut self, id: Id, percent: u32, now_ms: u64) {
        self.withheld += 1;
        if self.guard_said <= now_ms {
            self.guard_said = now_ms.saturating_add(ms(MASS_WINDOW));
            tracing::warn!(
                target: "shutdown", peer = %id, left = self.recent.len(), stay_percent = percent,
                "too many peers leave at once: those that are left are still sent requests"
            );
        }
    }
}

/// One place has one name: an IPv4 address in IPv6's clothes is an IPv4 address.
pub(super) fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr.ip().to_canonical() {
        ip if ip == addr.ip() => addr,
        ip => SocketAddr::new(ip, addr.port()),
    }
}

pub(super) fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
