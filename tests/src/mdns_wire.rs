//! What RFC 6762 demands of the datagrams of a host that announces an instance and takes it back.
//!
//! For one interface and family at a time. The one rule that every implementation breaks with its repeats – no record twice
//! within a second (§6) – is a warning.

use std::collections::BTreeMap;
use std::net::IpAddr;

use shutdown_mdns::wire::{CACHE_FLUSH, Data, IN, Message, Name, RESPONSE, Record};

use crate::judges::SERVICE;
use crate::netns::{Host, Packet};

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// When the instance was announced, in milliseconds of the wall clock.
    pub announced: Vec<f64>,
    /// When it was taken back.
    pub goodbyes: Vec<f64>,
    /// What is not as it should be, and never is.
    pub warnings: Vec<String>,
}

/// The full name of an instance of the tests' service type.
///
/// # Panics
///
/// If it can be none.
pub fn instance(name: &str) -> Name {
    Name::dotted(&format!("{name}.{SERVICE}")).expect("a name")
}

/// The goodbyes for an instance over a family.
pub fn goodbyes_for<'a>(packets: &'a [Packet], name: &str, v4: bool) -> Vec<(&'a Packet, Message)> {
    let (service, target) = (service(), instance(name));
    let of_family = packets.iter().filter(|packet| packet.to.is_ipv4() == v4);
    let read = of_family.filter_map(|packet| Some((packet, Message::read(&packet.payload).ok()?)));
    read.filter(|(_, message)| message.goodbyes(&service).any(|(it, _)| it.is(&target))).collect()
}

/// When an instance was announced over a family by a host.
pub fn announcements(packets: &[Packet], host: &Host, network: usize, name: &str, v4: bool) -> Vec<f64> {
    let (service, target) = (service(), instance(name));
    let says = |message: &Message| {
        message.answers.iter().any(|record| {
            matches!(&record.data, Data::Ptr(it) if it.is(&target) && record.name.is(&service) && record.ttl > 0)
        })
    };
    let is_hosts = |from: IpAddr| from.is_ipv6() || host.addresses(network).contains(&from);
    let sent = packets.iter().filter(|packet| packet.to.is_ipv4() == v4 && is_hosts(packet.from));
    sent.filter(|packet| Message::read(&packet.payload).is_ok_and(|message| says(&message)))
        .map(|packet| packet.at_ms)
        .collect()
}

/// Whether an instance has been announced over both families, and again a second later.
pub fn is_announced(packets: &[Packet], host: &Host, network: usize, name: &str) -> bool {
    [true, false].iter().all(|v4| {
        let at = announcements(packets, host, network, name, *v4);
        at.first().zip(at.last()).is_some_and(|(first, last)| last - first > 1000.0)
    })
}

fn service() -> Name {
    Name::dotted(SERVICE).expect("a name")
}

/// Checks what `host` sent over the family of `v4` about an instance.
///
/// # Errors
///
/// Every rule that is broken, with its section.
pub fn check(packets: &[Packet], host: &[IpAddr], v4: bool, name: &str) -> Result<Seen, Vec<String>> {
    let (service, instance) = (service(), instance(name));
    let is_from_host = |packet: &&Packet| {
        packet.from.is_ipv4() == v4 && (host.contains(&packet.from) || is_link_local(&packet.from))
    };
    let mut check = Check::default();
    for packet in packets.iter().filter(is_from_host) {
        let message = match Message::read(&packet.payload) {
            Ok(message) => message,
            Err(error) => {
                check.broken(packet, format!("18: {error}"));
                continue;
            }
        };
        let is_about = |record: &&Record| {
            record.name.is(&instance) || matches!(&record.data, Data::Ptr(target) if target.is(&instance))
        };
        if message.is_response()
            && message.answers.iter().chain(&message.others).any(|record| is_about(&record))
        {
            check.packet(packet, &message, &service, &instance);
        }
    }
    check.finish()
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

#[derive(Default)]
struct Check {
    seen: Seen,
    broken: Vec<String>,
    /// What was announced, by what is compared, with the number of times it was taken back.
    announced: BTreeMap<(String, u16, Data), usize>,
    last: BTreeMap<(String, u16, Data), f64>,
}

impl Check {
    fn broken(&mut self, packet: &Packet, what: impl Into<String>) {
        self.broken.push(format!("{:.3} from {}: RFC 6762 {}", packet.at_ms, packet.from, what.into()));
    }

    fn packet(&mut self, packet: &Packet, message: &Message, service: &Name, instance: &Name) {
        let (group, mac): (IpAddr, _) = if packet.to.is_ipv4() {
            ([224, 0, 0, 251].into(), [0x01, 0x00, 0x5e, 0x00, 0x00, 0xfb])
        } else {
            ([0xff02, 0, 0, 0, 0, 0, 0, 0xfb].into(), [0x33, 0x33, 0x00, 0x00, 0x00, 0xfb])
        };
        let rules = [
            (packet.from_port == 5353, "6: the source port is 5353"),
            (packet.to_port == 5353, "6: the destination port is 5353"),
            (packet.to == group && packet.mac == mac, "6, 18: it goes to the group, and to no one alone"),
            (packet.ttl == 255, "11: the IP TTL is 255"),
            (message.id == 0, "18.1: the ID is zero"),
            (message.flags == RESPONSE, "18.2 to 18.11: the flags are 8400"),
            (message.questions.is_empty(), "6: a response asks nothing"),
            (packet.length <= 1500, "17: it fits into a packet"),
            (message.compressed, "18.14: names are compressed"),
        ];
        for (holds, rule) in rules {
            if !holds {
                self.broken(packet, rule);
            }
        }
        let (mut announces, mut takes_back) = (false, false);
        for (record, is_answer) in message
            .answers
            .iter()
            .map(|record| (record, true))
            .chain(message.others.iter().map(|record| (record, false)))
        {
            let is_ours = match &record.data {
                Data::Ptr(target) => record.name.is(service) && target.is(instance),
                Data::Srv { .. } | Data::Txt(_) => record.name.is(instance),
                Data::A(_) | Data::Aaaa(_) => true,
                _ => false,
            };
            if !is_ours {
                continue;
            }
            let is_shared = matches!(record.data, Data::Ptr(_));
            let class = if is_shared { IN } else { IN | CACHE_FLUSH };
            if record.class != class {
                self.broken(packet, format!("10.2: {} has class {:04x}", record.name, record.class));
            }
            let key = (record.name.key(), record.kind, lower(&record.data));
            if record.ttl == 0 {
                takes_back |= is_shared;
                if !is_answer {
                    self.broken(packet, "6: a goodbye stands in the answers");
                }
                match self.announced.get_mut(&key) {
                    Some(times) => *times += 1,
                    None => self.broken(packet, format!("6: never announced, but taken back: {record:?}")),
                }
                if let Some(before) = self.last.insert(key, packet.at_ms)
                    && packet.at_ms - before < 1000.0
                {
                    let after = packet.at_ms - before;
                    self.seen.warnings.push(format!("6: {} again after {after:.0} ms", record.name));
                }
            } else {
                announces |= is_shared && is_answer;
                if !self.seen.goodbyes.is_empty() {
                    self.broken(packet, format!("10.1: said again after the goodbye: {record:?}"));
                }
                self.announced.entry(key).or_default();
            }
        }
        if announces {
            self.seen.announced.push(packet.at_ms);
        }
        if takes_back {
            self.seen.goodbyes.push(packet.at_ms);
        }
    }

    fn finish(mut self) -> Result<Seen, Vec<String>> {
        let kept = self.announced.iter().filter(|(_, times)| **times == 0);
        if !self.seen.goodbyes.is_empty() {
            self.broken
                .extend(kept.map(|(record, _)| format!("RFC 6762 10.1: never taken back: {record:?}")));
        }
        let (first, last) = (self.seen.announced.first(), self.seen.announced.last());
        if let (Some(first), Some(last)) = (first, last)
            && last - first < 1000.0
        {
            self.broken.push("RFC 6762 8.3: announced twice at least, a second apart".to_owned());
        }
        if self.broken.is_empty() { Ok(self.seen) } else { Err(self.broken) }
    }
}

/// The same data with names in small letters.
fn lower(data: &Data) -> Data {
    let small =
        |name: &Name| Name::of(name.labels().map(<[u8]>::to_ascii_lowercase)).expect("as long as it was");
    match data {
        Data::Ptr(target) => Data::Ptr(small(target)),
        Data::Srv { priority, weight, port, target } => {
            Data::Srv { priority: *priority, weight: *weight, port: *port, target: small(target) }
        }
        other => other.clone(),
    }
}
