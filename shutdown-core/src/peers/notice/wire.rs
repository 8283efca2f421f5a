//! The datagram, version 1: a fixed layout, big-endian, every byte under a MAC. `docs/formats.md` has it byte by byte.
//!
//! Reading is total: whatever comes is either exactly one notice or acknowledgement, or is refused with its cause. What
//! comes before the MAC in the order of the checks reads lengths and a few constants and nothing else.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::peers::id::Id;
use crate::peers::notice::keys::{Keys, MAC};
use crate::reason::Reason;

/// The first four bytes.
pub const MAGIC: [u8; 4] = *b"SDPN";
/// The layout's version.
pub const VERSION: u8 = 1;
/// The length of an acknowledgement, and the least that any datagram has.
pub const ACK_BYTES: usize = HEAD + 16 + MAC;
/// A notice is filled up with zeros to this many bytes at least, so that no acknowledgement is longer than what it answers:
/// nobody can have us send more to a third party than was sent to us.
pub const NOTICE_BYTES: usize = 128;
/// The most that any datagram has: it passes every path that IPv6 allows (RFC 8200 §5: 1,280 bytes) by far.
pub const MOST_BYTES: usize = 512;
/// The most endpoints that a notice names.
pub const MOST_ENDPOINTS: usize = 8;

/// Up to and with the number of endpoints.
const HEAD: usize = 73;
const LEAVING: u8 = 1;
const ACK: u8 = 2;
const RETURN: u8 = 3;
const ACK_WANTED: u8 = 1 << 0;
const RESTARTING: u8 = 1 << 1;

/// What a node says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It leaves: no new requests, please.
    Leaving,
    /// It is there, or there again: a departure that it has announced is over.
    Return,
}

/// Why a node leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Why {
    /// It does not say.
    #[default]
    Unsaid,
    /// SIGTERM.
    Term,
    /// SIGINT.
    Int,
    /// An administrator.
    Admin,
    /// Another program takes its place.
    Upgrade,
    /// It cannot go on.
    Fault,
    /// A number that this release does not know.
    Other(u8),
}

impl Why {
    const fn number(self) -> u8 {
        match self {
            Self::Unsaid => 0,
            Self::Term => 1,
            Self::Int => 2,
            Self::Admin => 3,
            Self::Upgrade => 4,
            Self::Fault => 5,
            Self::Other(number) => number,
        }
    }

    const fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Unsaid,
            1 => Self::Term,
            2 => Self::Int,
            3 => Self::Admin,
            4 => Self::Upgrade,
            5 => Self::Fault,
            number => Self::Other(number),
        }
    }
}

impl From<&Reason> for Why {
    fn from(reason: &Reason) -> Self {
        match reason {
            Reason::Signal(signal) if signal.signal == "SIGTERM" => Self::Term,
            Reason::Signal(signal) if signal.signal == "SIGINT" => Self::Int,
            Reason::Terminate { .. } => Self::Admin,
            Reason::CriticalTask { .. } => Self::Fault,
            _ => Self::Unsaid,
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsaid => f.pad("unsaid"),
            Self::Term => f.pad("SIGTERM"),
            Self::Int => f.pad("SIGINT"),
            Self::Admin => f.pad("an administrator"),
            Self::Upgrade => f.pad("an upgrade"),
            Self::Fault => f.pad("a fault"),
            Self::Other(number) => write!(f, "reason {number}"),
        }
    }
}

/// What a node says of itself, as one datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What it says.
    pub kind: Kind,
    /// Whether it wants to hear that it was heard.
    pub ack_wanted: bool,
    /// Whether it means to come back at once.
    pub restarting: bool,
    /// Why it leaves.
    pub why: Why,
    /// How often it has been sent before, 255 at most.
    pub attempt: u8,
    /// Which run of the node says so.
    pub incarnation: u64,
    /// Which of that run's notices this is; a later one has a higher number.
    pub seq: u64,
    /// When this datagram was sent, milliseconds since the Unix epoch.
    pub sent_at: u64,
    /// How long the node still answers what it has accepted; 0: not at all.
    pub drain_ms: u32,
    /// Who.
    pub node: Id,
    /// Of which cluster.
    pub cluster: Id,
    /// Addresses at which others know the node: where it serves, and where it hears notices. [`MOST_ENDPOINTS`] at most.
    pub endpoints: Vec<SocketAddr>,
}

/// That a notice was heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The notice's node.
    pub node: Id,
    /// The notice's incarnation.
    pub incarnation: u64,
    /// The notice's number.
    pub seq: u64,
    /// The attempt that was heard.
    pub attempt: u8,
    /// When it was answered, milliseconds since the Unix epoch.
    pub sent_at: u64,
    /// The cluster of both.
    pub cluster: Id,
    /// Who has heard it.
    pub by: Id,
}

/// A datagram that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Datagram {
    /// A node says something of itself.
    Notice(Notice),
    /// Somebody has heard it.
    Ack(Ack),
}

/// Why a datagram was refused, in the order of the checks; the last one is checked behind the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Refusal {
    /// Shorter than [`ACK_BYTES`] or longer than [`MOST_BYTES`].
    Length,
    /// It does not begin with [`MAGIC`].
    Magic,
    /// Another version than [`VERSION`].
    Version,
    /// Its own word about its length is not its length.
    TotalLength,
    /// A key that is not among ours.
    UnknownKey,
    /// The MAC is not the key's.
    Mac,
    /// A type, a flag, endpoints or filling that version 1 does not have.
    Layout,
    /// Another cluster's.
    Cluster,
    /// Sent too long ago, or in the future.
    Window,
    /// Sent before this receiver began: it may be a replay of what an earlier run has heard.
    BeforeStart,
    /// In our own name.
    OwnNode,
    /// Of a run that begins in the future.
    FutureIncarnation,
    /// Of a run of its node that is over.
    OldIncarnation,
    /// An acknowledgement that nobody waits for, or a notice where an acknowledgement is waited for.
    Unexpected,
}

impl Refusal {
    /// All of them, in their order.
    pub const ALL: [Self; 14] = [
        Self::Length,
        Self::Magic,
        Self::Version,
        Self::TotalLength,
        Self::UnknownKey,
        Self::Mac,
        Self::Layout,
        Self::Cluster,
        Self::Window,
        Self::BeforeStart,
        Self::OwnNode,
        Self::FutureIncarnation,
        Self::OldIncarnation,
        Self::Unexpected,
    ];

    /// The cause as a label, for example `unknown_key`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Magic => "magic",
            Self::Version => "version",
            Self::TotalLength => "total_length",
            Self::UnknownKey => "unknown_key",
            Self::Mac => "mac",
            Self::Layout => "layout",
            Self::Cluster => "cluster",
            Self::Window => "window",
            Self::BeforeStart => "before_start",
            Self::OwnNode => "own_node",
            Self::OldIncarnation => "old_incarnation",
            Self::FutureIncarnation => "future_incarnation",
            Self::Unexpected => "unexpected",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::error::Error for Refusal {}

impl Notice {
    /// The datagram.
    ///
    /// Endpoints beyond [`MOST_ENDPOINTS`] are left out, and so is an IPv6 scope, which means nothing to others.
    pub fn encode(&self, keys: &Keys) -> Vec<u8> {
        let endpoints = &self.endpoints[..self.endpoints.len().min(MOST_ENDPOINTS)];
        let kind = match self.kind {
            Kind::Leaving => LEAVING,
            Kind::Return => RETURN,
        };
        let flags =
            if self.ack_wanted { ACK_WANTED } else { 0 } | if self.restarting { RESTARTING } else { 0 };
        let bytes = endpoints.iter().map(|endpoint| if is_v4(endpoint) { 7 } else { 19 }).sum::<usize>();
        let total = (HEAD + bytes + MAC).max(NOTICE_BYTES);
        let mut datagram = head(Head {
            kind,
            flags,
            key: keys.signing_id(),
            total,
            why: self.why.number(),
            attempt: self.attempt,
            incarnation: self.incarnation,
            seq: self.seq,
            sent_at: self.sent_at,
            drain_ms: self.drain_ms,
            node: self.node,
            cluster: self.cluster,
            endpoints: endpoints.len(),
        });
        for endpoint in endpoints {
            match endpoint.ip().to_canonical() {
                IpAddr::V4(ip) => {
                    datagram.push(4);
                    datagram.extend_from_slice(&ip.octets());
                }
                IpAddr::V6(ip) => {
                    datagram.push(6);
                    datagram.extend_from_slice(&ip.octets());
                }
            }
            datagram.extend_from_slice(&endpoint.port().to_be_bytes());
        }
        datagram.resize(total - MAC, 0);
        keys.seal(&mut datagram);
        datagram
    }
}

impl Ack {
    /// The datagram: [`ACK_BYTES`].
    pub fn encode(&self, keys: &Keys) -> Vec<u8> {
        let mut datagram = head(Head {
            kind: ACK,
            flags: 0,
            key: keys.signing_id(),
            total: ACK_BYTES,
            why: 0,
            attempt: self.attempt,
            incarnation: self.incarnation,
            seq: self.seq,
            sent_at: self.sent_at,
            drain_ms: 0,
            node: self.node,
            cluster: self.cluster,
            endpoints: 0,
        });
        datagram.extend_from_slice(&self.by.to_bytes());
        keys.seal(&mut datagram);
        datagram
    }
}

impl Datagram {
    /// Reads one.
    ///
    /// # Errors
    ///
    /// The first check it does not pass, up to [`Refusal::Layout`].
    pub fn decode(bytes: &[u8], keys: &Keys) -> Result<Self, Refusal> {
        if bytes.len() < ACK_BYTES || bytes.len() > MOST_BYTES {
            return Err(Refusal::Length);
        }
        let mut fields = Fields(bytes);
        if fields.take::<4>() != Some(MAGIC) {
            return Err(Refusal::Magic);
        }
        if fields.u8() != Some(VERSION) {
            return Err(Refusal::Version);
        }
        let (kind, flags, key) = fields.three().ok_or(Refusal::Length)?;
        let total = fields.u16().ok_or(Refusal::Length)?;
        if usize::from(total) != bytes.len() {
            return Err(Refusal::TotalLength);
        }
        let (content, mac) = bytes.split_at(bytes.len() - MAC);
        match keys.verifies(key, content, mac) {
            None => return Err(Refusal::UnknownKey),
            Some(false) => return Err(Refusal::Mac),
            Some(true) => {}
        }
        fields.0 = fields.0.strip_suffix(mac).ok_or(Refusal::Length)?;
        body(kind, flags, fields).ok_or(Refusal::Layout)
    }
}

/// What stands behind the length, if it is as version 1 has it.
fn body(kind: u8, flags: u8, mut fields: Fields<'_>) -> Option<Datagram> {
    let (why, attempt) = (fields.u8()?, fields.u8()?);
    let (incarnation, seq, sent_at) = (fields.u64()?, fields.u64()?, fields.u64()?);
    let drain_ms = u32::from_be_bytes(fields.take()?);
    let (node, cluster) = (Id::from(fields.take()?), Id::from(fields.take()?));
    let count = usize::from(fields.u8()?);
    let kind = match kind {
        ACK => {
            let by = Id::from(fields.take()?);
            let bare = flags == 0 && why == 0 && drain_ms == 0 && count == 0 && fields.0.is_empty();
            let ack = Ack { node, incarnation, seq, attempt, sent_at, cluster, by };
            return bare.then_some(Datagram::Ack(ack));
        }
        LEAVING => Kind::Leaving,
        RETURN => Kind::Return,
        _ => return None,
    };
    if flags & !(ACK_WANTED | RESTARTING) != 0 || count > MOST_ENDPOINTS {
        return None;
    }
    let endpoints = (0..count).map(|_| fields.endpoint()).collect::<Option<Vec<_>>>()?;
    let filled = fields.0.iter().all(|byte| *byte == 0);
    filled.then_some(Datagram::Notice(Notice {
        kind,
        ack_wanted: flags & ACK_WANTED != 0,
        restarting: flags & RESTARTING != 0,
        why: Why::from_number(why),
        attempt,
        incarnation,
        seq,
        sent_at,
        drain_ms,
        node,
        cluster,
        endpoints,
    }))
}

/// The first 73 bytes.
struct Head {
    kind: u8,
    flags: u8,
    key: u8,
    total: usize,
    why: u8,
    attempt: u8,
    incarnation: u64,
    seq: u64,
    sent_at: u64,
    drain_ms: u32,
    node: Id,
    cluster: Id,
    endpoints: usize,
}

fn head(head: Head) -> Vec<u8> {
    let total = u16::try_from(head.total).expect("at most 257 bytes");
    let mut bytes = Vec::with_capacity(head.total);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&[VERSION, head.kind, head.flags, head.key]);
    bytes.extend_from_slice(&total.to_be_bytes());
    bytes.extend_from_slice(&[head.why, head.attempt]);
    for number in [head.incarnation, head.seq, head.sent_at] {
        bytes.extend_from_slice(&number.to_be_bytes());
    }
    bytes.extend_from_slice(&head.drain_ms.to_be_bytes());
    bytes.extend_from_slice(&head.node.to_bytes());
    bytes.extend_from_slice(&head.cluster.to_bytes());
    bytes.push(u8::try_from(head.endpoints).expect("at most 8"));
    bytes
}

/// What of a datagram has not been read yet.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take().map(|[byte]| byte)
    }

    fn three(&mut self) -> Option<(u8, u8, u8)> {
        self.take().map(|[one, two, three]| (one, two, three))
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    /// A family, an address, a port. An IPv4 address in IPv6's clothes is an IPv4 address: one place has one name.
    fn endpoint(&mut self) -> Option<SocketAddr> {
        let ip = match self.u8()? {
            4 => IpAddr::V4(Ipv4Addr::from(self.take::<4>()?)),
            6 => IpAddr::V6(Ipv6Addr::from(self.take::<16>()?)).to_canonical(),
            _ => return None,
        };
        Some(SocketAddr::new(ip, self.u16()?))
    }
}

fn is_v4(endpoint: &SocketAddr) -> bool {
    endpoint.ip().to_canonical().is_ipv4()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reason::Urgency;

    fn keys() -> Keys {
        Keys::parse("3:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f").unwrap()
    }

    fn notice() -> Notice {
        Notice {
            kind: Kind::Leaving,
            ack_wanted: true,
            restarting: false,
            why: Why::Term,
            attempt: 0,
            incarnation: 1_795_273_877_139,
            seq: 2,
            sent_at: 1_795_273_890_000,
            drain_ms: 26_900,
            node: Id::of("edge-1"),
            cluster: Id::of("default"),
            endpoints: vec!["10.0.0.1:8443".parse().unwrap()],
        }
    }

    fn ack() -> Ack {
        Ack {
            node: Id::of("edge-1"),
            incarnation: 1_795_273_877_139,
            seq: 2,
            attempt: 0,
            sent_at: 1_795_273_890_001,
            cluster: Id::of("default"),
            by: Id::of("edge-2"),
        }
    }

    /// Changes the content and seals it again: a fault of somebody who has the key.
    fn resealed(datagram: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut content = datagram[..datagram.len() - MAC].to_vec();
        change(&mut content);
        let total = u16::try_from(content.len() + MAC).unwrap();
        content[8..10].copy_from_slice(&total.to_be_bytes());
        keys().seal(&mut content);
        content
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        for datagram in [notice().encode(&keys()), ack().encode(&keys())] {
            for bit in 0..datagram.len() * 8 {
                let mut flipped = datagram.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(Datagram::decode(&flipped, &keys()).is_err(), "bit {bit}");
            }
        }
    }

    #[test]
    fn every_truncation_and_every_byte_more_is_refused() {
        let datagram = notice().encode(&keys());
        for length in 0..datagram.len() {
            assert!(Datagram::decode(&datagram[..length], &keys()).is_err(), "{length}");
        }
        for more in [1, 2, MOST_BYTES - datagram.len(), 1_500 - datagram.len(), 65_507 - datagram.len()] {
            let longer = [&datagram[..], &vec![0; more]].concat();
            assert!(Datagram::decode(&longer, &keys()).is_err(), "{more} more");
        }
    }

    #[test]
    fn an_acknowledgement_is_never_longer_than_a_notice() {
        let mut notice = notice();
        assert_eq!(ack().encode(&keys()).len(), ACK_BYTES);
        for count in 0..=MOST_ENDPOINTS {
            notice.endpoints = vec!["10.0.0.1:8443".parse().unwrap(); count];
            assert!(notice.encode(&keys()).len() >= NOTICE_BYTES);
        }
        const { assert!(ACK_BYTES <= NOTICE_BYTES) };
        notice.endpoints = vec!["[fd00::1]:8443".parse().unwrap(); MOST_ENDPOINTS + 1];
        let datagram = notice.encode(&keys());
        assert_eq!(datagram.len(), HEAD + 8 * 19 + MAC);
        notice.endpoints.pop();
        assert_eq!(Datagram::decode(&datagram, &keys()), Ok(Datagram::Notice(notice)));
    }

    #[test]
    fn each_check_refuses_what_it_is_for() {
        let good = notice().encode(&keys());
        let with = |place: usize, byte: u8| {
            let mut datagram = good.clone();
            datagram[place] = byte;
            Datagram::decode(&datagram, &keys())
        };
        assert_eq!(Datagram::decode(&[0; 120], &keys()), Err(Refusal::Length));
        assert_eq!(Datagram::decode(&[0; 513], &keys()), Err(Refusal::Length));
        assert_eq!(with(0, b's'), Err(Refusal::Magic));
        assert_eq!(with(4, 2), Err(Refusal::Version));
        assert_eq!(with(9, 129), Err(Refusal::TotalLength));
        assert_eq!(with(7, 4), Err(Refusal::UnknownKey));
        let other = Keys::parse("3:ff0102030405060708090a0b0c0d0e0f").unwrap();
        assert_eq!(Datagram::decode(&good, &other), Err(Refusal::Mac));
    }

    #[test]
    fn who_has_the_key_is_held_to_the_layout_as_well() {
        let good = notice().encode(&keys());
        let acknowledged = ack().encode(&keys());
        for (of, place, byte) in [
            (&good, 5, 0), // a type
            (&good, 5, 4),
            (&good, 6, 4),  // a flag
            (&good, 72, 9), // more endpoints than there may be
            (&good, 72, 255),
            (&good, 72, 2),         // more than there are: the filling is none
            (&good, 72, 0),         // fewer: the filling is not zero
            (&good, 73, 5),         // a family
            (&good, 95, 1),         // the filling's last byte
            (&acknowledged, 6, 1),  // an acknowledgement that wants one
            (&acknowledged, 10, 1), // or has a reason
            (&acknowledged, 36, 1), // or a drain
            (&acknowledged, 72, 1), // or an endpoint
        ] {
            let wrong = resealed(of, |content| content[place] = byte);
            assert_eq!(Datagram::decode(&wrong, &keys()), Err(Refusal::Layout), "byte {place}: {byte}");
        }
        let longer = resealed(&acknowledged, |content| content.push(0));
        assert_eq!(Datagram::decode(&longer, &keys()), Err(Refusal::Layout));
        // A reason may be new without a new version.
        let newer = resealed(&good, |content| content[10] = 77);
        let Ok(Datagram::Notice(newer)) = Datagram::decode(&newer, &keys()) else { panic!() };
        assert_eq!(newer.why, Why::Other(77));
    }

    #[test]
    fn a_v4_address_in_v6_clothes_is_a_v4_address() {
        let mut notice = notice();
        let plain = notice.encode(&keys());
        notice.endpoints = vec!["[::ffff:10.0.0.1]:8443".parse().unwrap()];
        assert_eq!(notice.encode(&keys()), plain);
        let clothed = resealed(&plain, |content| {
            content.truncate(73);
            content
                .extend_from_slice(&[6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1, 0x20, 0xfb]);
        });
        let Ok(Datagram::Notice(read)) = Datagram::decode(&clothed, &keys()) else { panic!() };
        assert_eq!(read.endpoints, ["10.0.0.1:8443".parse::<SocketAddr>().unwrap()]);
    }

    #[test]
    fn the_reason_to_leave_is_the_shutdowns() {
        let signal = |name: &str, number| {
            let (pid, uid) = (None, None);
            Reason::Signal(crate::SignalReceived { signal: name.to_owned(), number, pid, uid })
        };
        assert_eq!(Why::from(&signal("SIGTERM", 15)), Why::Term);
        assert_eq!(Why::from(&signal("SIGINT", 2)), Why::Int);
        assert_eq!(Why::from(&signal("SIGQUIT", 3)), Why::Unsaid);
        assert_eq!(Why::from(&Reason::Terminate { urgency: Urgency::Fast }), Why::Admin);
        assert_eq!(Why::from(&Reason::CriticalTask { task: "a".into(), error: "b".into() }), Why::Fault);
    }

    fn any_endpoint() -> impl Strategy<Value = SocketAddr> {
        let v4 = any::<([u8; 4], u16)>().prop_map(|(ip, port)| SocketAddr::from((ip, port)));
        let v6 = any::<([u8; 16], u16)>().prop_map(|(ip, port)| SocketAddr::from((ip, port)));
        prop_oneof![v4, v6.prop_map(|addr| SocketAddr::new(addr.ip().to_canonical(), addr.port()))]
    }

    prop_compose! {
        fn any_notice()(
            (leaving, ack_wanted, restarting, why, attempt) in any::<(bool, bool, bool, u8, u8)>(),
            (incarnation, seq, sent_at, drain_ms) in any::<(u64, u64, u64, u32)>(),
            (node, cluster) in any::<([u8; 16], [u8; 16])>(),
            endpoints in proptest::collection::vec(any_endpoint(), 0..=MOST_ENDPOINTS),
        ) -> Notice {
            let kind = if leaving { Kind::Leaving } else { Kind::Return };
            let (why, node, cluster) = (Why::from_number(why), node.into(), cluster.into());
            Notice { kind, ack_wanted, restarting, why, attempt, incarnation, seq, sent_at, drain_ms, node, cluster, endpoints }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(notice in any_notice()) {
            let datagram = notice.encode(&keys());
            prop_assert_eq!(Datagram::decode(&datagram, &keys()), Ok(Datagram::Notice(notice)));
        }

        #[test]
        fn what_reads_is_written_as_it_was(mut content in proptest::collection::vec(any::<u8>(), 89..=480), kind in 0_u8..4) {
            // Sealed by somebody who has the key, and otherwise chance.
            content[..5].copy_from_slice(b"SDPN\x01");
            (content[5], content[6], content[7]) = (kind, content[6] & 3, 3);
            content[72] &= 1;
            content[73..].fill(0);
            let datagram = resealed(&[&content[..], &[0; MAC]].concat(), |_| ());
            match Datagram::decode(&datagram, &keys()) {
                // Only the filling's length may be another.
                Ok(Datagram::Notice(notice)) => prop_assert!(datagram.starts_with(&notice.encode(&keys())[..8])),
                Ok(Datagram::Ack(ack)) => prop_assert_eq!(ack.encode(&keys()), datagram),
                Err(refusal) => prop_assert_eq!(refusal, Refusal::Layout),
            }
        }

        #[test]
        fn any_bytes_are_refused_and_none_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(Datagram::decode(&bytes, &keys()).is_err());
        }
    }
}
