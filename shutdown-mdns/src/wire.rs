//! DNS messages as Multicast DNS has them (RFC 1035 §4, RFC 6762 §18): what is heard is read, and a goodbye is written.
//!
//! Written here because mdns-sd's own reader is private, and because a DNS library that knows no multicast would bring
//! seventy crates for these five record types. Pure: bytes in, values out.

mod goodbye;
mod name;
mod read;

pub use goodbye::Goodbye;
pub use name::{LONGEST_LABEL, Name};
pub use read::{Data, LARGEST, Malformed, Message, Record};

/// The flags of every response: an authoritative answer and nothing else (RFC 6762 §18.2–18.11).
pub const RESPONSE: u16 = 0x8400;
/// Class IN.
pub const IN: u16 = 1;
/// The bit of a record's class that says "this is all there is" (RFC 6762 §10.2).
pub const CACHE_FLUSH: u16 = 0x8000;

const A: u16 = 1;
const PTR: u16 = 12;
const TXT: u16 = 16;
const AAAA: u16 = 28;
const SRV: u16 = 33;
