//! The reader of what is heard: total, bounded by the datagram's length, and strict where a lie could pass.
//!
//! A message with a record that cannot be read is no message: half of a goodbye is not acted on.

use std::error::Error;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::{A, AAAA, IN, Name, PTR, SRV, TXT};

/// The largest message (RFC 6762 §17).
pub const LARGEST: usize = 9000;
const HEADER: usize = 12;

/// A message of Multicast DNS.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Message {
    /// Zero in every multicast message (RFC 6762 §18.1).
    pub id: u16,
    /// [`RESPONSE`](super::RESPONSE) in every multicast response.
    pub flags: u16,
    /// Names, types and classes asked for.
    pub questions: Vec<(Name, u16, u16)>,
    /// The answer section.
    pub answers: Vec<Record>,
    /// The authority and additional sections.
    pub others: Vec<Record>,
    /// Whether a name was compressed (RFC 1035 §4.1.4).
    pub compressed: bool,
}

/// A resource record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Record {
    /// What it is about.
    pub name: Name,
    /// Its type.
    pub kind: u16,
    /// Its class, with the cache-flush bit.
    pub class: u16,
    /// For how many seconds it holds; zero takes it back (RFC 6762 §10.1).
    pub ttl: u32,
    /// What it says.
    pub data: Data,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Data {
    /// An address.
    A(Ipv4Addr),
    /// An address.
    Aaaa(Ipv6Addr),
    /// An instance of a service type.
    Ptr(Name),
    /// Where an instance is served.
    Srv {
        /// Smaller goes first.
        priority: u16,
        /// Among those of one priority.
        weight: u16,
        /// Its port.
        port: u16,
        /// Its host.
        target: Name,
    },
    /// Strings of at most 255 bytes.
    Txt(Vec<Vec<u8>>),
    /// Something not used here, as it was written.
    Other(Vec<u8>),
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Malformed {
    /// It is longer than a message may be.
    TooLong,
    /// It ends within something.
    Truncated,
    /// A label has a reserved length, or a name has more than 255 bytes.
    Name,
    /// A compressed name points at or behind itself.
    Pointer,
    /// A record's data are not what its type says.
    Data,
    /// Bytes behind the last record.
    Trailing,
}

impl Message {
    /// Reads a datagram.
    ///
    /// # Errors
    ///
    /// If it is not exactly one message.
    pub fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.len() > LARGEST {
            return Err(Malformed::TooLong);
        }
        let mut reader = Reader { bytes, at: 0, compressed: false };
        let (id, flags) = (reader.u16()?, reader.u16()?);
        let counts = [reader.u16()?, reader.u16()?, reader.u16()?, reader.u16()?];
        // No list is made as long as a count says: each entry must be there, and takes at least five bytes.
        let mut questions = Vec::new();
        for _ in 0..counts[0] {
            questions.push((reader.name()?, reader.u16()?, reader.u16()?));
        }
        let mut answers = Vec::new();
        for _ in 0..counts[1] {
            answers.push(reader.record()?);
        }
        let mut others = Vec::new();
        for _ in 0..u32::from(counts[2]) + u32::from(counts[3]) {
            others.push(reader.record()?);
        }
        if reader.at != bytes.len() {
            return Err(Malformed::Trailing);
        }
        Ok(Self { id, flags, questions, answers, others, compressed: reader.compressed })
    }

    /// Whether it is a response, of whatever kind.
    pub fn is_response(&self) -> bool {
        self.flags & 0x8000 != 0
    }

    /// The instances of `service` that it takes back, each with the strings of the TXT record beside.
    pub fn goodbyes<'a>(&'a self, service: &'a Name) -> impl Iterator<Item = (&'a Name, &'a [Vec<u8>])> {
        // RFC 6762 §18.2, §18.3, §18.11: other kinds and failures MUST be ignored.
        let heard = if self.is_response() && self.flags & 0x780f == 0 { &self.answers[..] } else { &[] };
        heard.iter().filter_map(move |record| match &record.data {
            Data::Ptr(instance) if record.ttl == 0 && record.is_in() && record.name.is(service) => {
                Some((instance, self.strings(instance)))
            }
            _ => None,
        })
    }

    /// The strings of the TXT record of `name`, if there is one here.
    fn strings(&self, name: &Name) -> &[Vec<u8>] {
        let found = self.answers.iter().chain(&self.others).find_map(|record| match &record.data {
            Data::Txt(strings) if record.name.is(name) => Some(&strings[..]),
            _ => None,
        });
        found.unwrap_or_default()
    }
}

impl Record {
    /// Whether its class is IN, whatever its cache-flush bit.
    pub fn is_in(&self) -> bool {
        self.class & !super::CACHE_FLUSH == IN
    }
}

/// A place in a message.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    compressed: bool,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let taken =
            self.bytes.get(self.at..).and_then(|rest| rest.get(..length)).ok_or(Malformed::Truncated)?;
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed::Truncated)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    fn name(&mut self) -> Result<Name, Malformed> {
        let mut name = Name::default();
        let mut at = self.at;
        // A pointer leads before the part of the name that it stands in, so each is followed once: no loop.
        let mut before = self.at;
        let mut end = None;
        loop {
            let length = usize::from(*self.bytes.get(at).ok_or(Malformed::Truncated)?);
            match length {
                0 => break,
                1..=0x3f => {
                    let label = self.bytes.get(at + 1..=at + length).ok_or(Malformed::Truncated)?;
                    if !name.push(label) {
                        return Err(Malformed::Name);
                    }
                    at += 1 + length;
                }
                0xc0.. => {
                    let low = usize::from(*self.bytes.get(at + 1).ok_or(Malformed::Truncated)?);
                    let target = (length & 0x3f) << 8 | low;
                    if target >= before || target < HEADER {
                        return Err(Malformed::Pointer);
                    }
                    self.compressed = true;
                    end.get_or_insert(at + 2);
                    (at, before) = (target, target);
                }
                _ => return Err(Malformed::Name),
            }
        }
        self.at = end.unwrap_or(at + 1);
        Ok(name)
    }

    fn record(&mut self) -> Result<Record, Malformed> {
        let (name, kind, class) = (self.name()?, self.u16()?, self.u16()?);
        let ttl = self.array().map(u32::from_be_bytes)?;
        let length = usize::from(self.u16()?);
        let end = self.at + length;
        if end > self.bytes.len() {
            return Err(Malformed::Truncated);
        }
        let data = match kind {
            A if length == 4 => Data::A(self.array::<4>()?.into()),
            AAAA if length == 16 => Data::Aaaa(self.array::<16>()?.into()),
            A | AAAA => return Err(Malformed::Data),
            PTR => Data::Ptr(self.name()?),
            SRV => Data::Srv {
                priority: self.u16()?,
                weight: self.u16()?,
                port: self.u16()?,
                target: self.name()?,
            },
            TXT => {
                let mut strings = Vec::new();
                while self.at < end {
                    let [length] = self.array()?;
                    strings.push(self.take(length.into())?.to_vec());
                }
                Data::Txt(strings)
            }
            _ => Data::Other(self.take(length)?.to_vec()),
        };
        if self.at != end {
            return Err(Malformed::Data);
        }
        Ok(Record { name, kind, class, ttl, data })
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "longer than 9000 bytes",
            Self::Truncated => "ends too early",
            Self::Name => "a name of an impossible length",
            Self::Pointer => "a compressed name that does not point backward",
            Self::Data => "data that do not fit their type",
            Self::Trailing => "bytes behind the last record",
        })
    }
}

impl Error for Malformed {}
