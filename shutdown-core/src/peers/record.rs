//! What is known of a peer, in a form that outlives the process. `docs/formats.md`, section `peers`, has it field by field.
//!
//! Reading is tolerant: what cannot be understood of a record is taken for absent, and a record without anything to know a
//! peer by is passed over.

use std::net::SocketAddr;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};

use crate::peers::id::Id;
use crate::peers::registry::{Entry, FORGET, Standing, canonical, ms};

/// Every JSON reader keeps numbers up to this (RFC 8259 §6).
const LARGEST: u64 = (1 << 53) - 1;

/// One peer as it was when it was written down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct PeerRecord {
    /// Where it was configured to be, else where it serves.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Option::is_none")]
    pub addr: Option<String>,
    /// Who it is: 32 hexadecimal digits.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Its name in full.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// More addresses that it serves at.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<String>,
    /// Where it hears notices.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Option::is_none")]
    pub notices: Option<String>,
    /// Whether it has said under the cluster's key who it is.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "std::ops::Not::not")]
    pub authenticated: bool,
    /// Its highest incarnation known.
    #[serde(deserialize_with = "or_default")]
    pub incarnation: u64,
    /// Incarnation and number of the newest notice that was acted on.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Option::is_none")]
    pub heard: Option<(u64, u64)>,
    /// Whether it is a peer, and not only somebody whose departure is remembered.
    #[serde(deserialize_with = "or_default")]
    pub member: Option<bool>,
    /// When it left, milliseconds since the Unix epoch.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Option::is_none")]
    pub left_at: Option<u64>,
    /// When it was heard from, milliseconds since the Unix epoch.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<u64>,
}

impl PeerRecord {
    /// Nothing of a peer that never said anything.
    pub(super) fn of(entry: &Entry, now_ms: u64) -> Option<Self> {
        let left_at = match entry.standing {
            Standing::Left { at, .. } => Some(at),
            _ => None,
        };
        // Who is up is there, though it may have said so long ago.
        let last_seen = if entry.standing == Standing::Up { now_ms } else { entry.last_seen };
        if last_seen.max(left_at.unwrap_or(0)) == 0 {
            return None;
        }
        let mut addrs = entry.configured.iter().chain(&entry.found).map(ToString::to_string);
        Some(Self {
            addr: addrs.next(),
            also: addrs.collect(),
            node: entry.id.map(|id| id.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect()),
            name: entry.name.as_deref().map(str::to_owned),
            notices: entry.notices.map(|addr| addr.to_string()),
            authenticated: entry.authenticated,
            incarnation: entry.incarnation.min(LARGEST),
            // A number that is cut is one that a replay may pass; it is too old by then.
            heard: entry.mark.map(|(incarnation, seq)| (incarnation.min(LARGEST), seq.min(LARGEST))),
            member: Some(entry.member),
            left_at,
            last_seen: Some(last_seen),
        })
    }

    /// `None` if it is too old, or says nothing.
    pub(super) fn entry(&self, saved_at: u64, now_ms: u64) -> Option<Entry> {
        let addr = |text: &String| text.parse::<SocketAddr>().ok().map(canonical);
        let id = self.node.as_deref().and_then(id_from_hex);
        let found: Vec<_> = self.addr.iter().chain(&self.also).filter_map(addr).collect();
        let last_seen = self.last_seen.unwrap_or(saved_at).min(now_ms);
        let told = last_seen.max(self.left_at.unwrap_or(0).min(now_ms));
        if (id.is_none() && found.is_empty()) || told.saturating_add(ms(FORGET)) < now_ms {
            return None;
        }
        let standing = match self.left_at {
            Some(at) => {
                Standing::Left { at: at.min(now_ms), until: 0, run: self.incarnation, restored: true }
            }
            None => Standing::default(),
        };
        Some(Entry {
            id,
            name: self.name.as_deref().map(Into::into),
            configured: None,
            // The legacy state knows one address for all.
            notices: self.notices.as_ref().or(self.addr.as_ref()).and_then(addr),
            found,
            told: Vec::new(),
            member: self.member.unwrap_or(true),
            incarnation: self.incarnation,
            authenticated: id.is_some() && self.authenticated,
            mark: self.heard,
            withheld: None,
            standing,
            last_seen,
        })
    }
}

/// What is not of the field's type is taken for absent.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Read<T> {
        Understood(T),
        Other(IgnoredAny),
    }
    Ok(match Read::deserialize(from)? {
        Read::Understood(value) => value,
        Read::Other(_) => T::default(),
    })
}

fn id_from_hex(hex: &str) -> Option<Id> {
    if hex.len() != 32 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(hex, 16).ok().map(|id| Id::from(id.to_be_bytes()))
}
