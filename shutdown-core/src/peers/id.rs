//! Who a node is: its name, and which of its runs.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

/// The name of a node or of a cluster in the 16 bytes that a notice has for it.
///
/// A name of up to 16 bytes stands there as it is, filled up with zeros, so that whoever looks at a packet can read it. Of a
/// longer one it is the first 16 bytes of its SHA-256: two of them would be taken for one another once in 2<sup>64</sup>
/// names (the birthday bound of 128 bits).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id([u8; 16]);

impl Id {
    /// The id of this name.
    pub fn of(name: &str) -> Self {
        let mut id = [0; 16];
        match id.get_mut(..name.len()) {
            Some(place) => place.copy_from_slice(name.as_bytes()),
            None => id.copy_from_slice(&Sha256::digest(name)[..16]),
        }
        Self(id)
    }

    /// The bytes, as they stand in a notice.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl From<[u8; 16]> for Id {
    fn from(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Id {
    /// The name, if it is one that can be shown; else 32 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.0.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        match std::str::from_utf8(&self.0[..end]) {
            Ok(name) if end > 0 && !name.chars().any(char::is_control) => f.pad(name),
            _ => self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
        }
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({self})")
    }
}

/// Which run of a node this is: milliseconds since the Unix epoch at its start, strictly higher than every earlier run's.
///
/// [`StateStore::incarnation`](crate::state::StateStore::incarnation) keeps it rising. Clones share one number, because a
/// node that has to contradict somebody while it runs ([`refute`](Self::refute)) does so for all that speak for it.
#[derive(Clone, Debug)]
pub struct Incarnation(Arc<AtomicU64>);

impl Incarnation {
    /// The incarnation of this run.
    pub fn new(incarnation: u64) -> Self {
        Self(Arc::new(AtomicU64::new(incarnation)))
    }

    /// The incarnation by now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Raises it, because somebody has said that this run was over: to `now_ms`, or by one where that is not higher.
    /// Returns the new one.
    pub fn refute(&self, now_ms: u64) -> u64 {
        let raised = |old: u64| Some(now_ms.max(old.saturating_add(1)));
        // Relaxed: the number says nothing about other memory.
        let old = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, raised);
        raised(old.unwrap_or_else(|old| old)).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_name_can_be_read_in_the_packet_and_a_long_one_is_a_fingerprint() {
        assert_eq!(Id::of("edge-1").to_bytes(), *b"edge-1\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(Id::of("sixteen-bytes-is").to_string(), "sixteen-bytes-is");
        // SHA-256 of the name, from another program.
        assert_eq!(Id::of("a-host-name-of-some-length-8080").to_string(), "6cd11205660832fe85adf9e99bd511bb");
        assert_eq!(Id::from([0; 16]).to_string(), "0".repeat(32));
        assert_eq!(Id::from(*b"with\nline\0\0\0\0\0\0\0").to_string(), "776974680a6c696e6500000000000000");
    }

    #[test]
    fn a_refuted_incarnation_is_higher_for_everybody_who_shares_it() {
        let run = Incarnation::new(10);
        let shared = run.clone();
        assert_eq!(run.refute(1_000), 1_000);
        assert_eq!(run.refute(1_000), 1_001);
        assert_eq!(run.refute(5), 1_002);
        assert_eq!(shared.get(), 1_002);
    }
}
