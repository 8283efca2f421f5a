//! The writer of goodbyes: every record of an instance, with a TTL of zero (RFC 6762 §10.1).

use std::net::IpAddr;

use super::{A, AAAA, CACHE_FLUSH, IN, Name, PTR, RESPONSE, SRV, TXT};

/// What is taken back on one interface over one family.
#[derive(Clone, Debug)]
pub struct Goodbye<'a> {
    /// The service type.
    pub service: &'a Name,
    /// The instance.
    pub instance: &'a Name,
    /// Its host.
    pub host: &'a Name,
    /// Its port; priority and weight are zero.
    pub port: u16,
    /// The strings of its TXT record.
    pub strings: &'a [Vec<u8>],
    /// The host's addresses that were announced there.
    pub addresses: &'a [IpAddr],
}

impl Goodbye<'_> {
    /// Writes the message.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Writer::default();
        // PTR, SRV and TXT; an address is a number of 16 bits at most by the largest message.
        let answers = 3 + self.addresses.len() as u16;
        for word in [0, RESPONSE, 0, answers, 0, 0] {
            out.u16(word);
        }
        // A PTR is shared: it has no cache-flush bit (RFC 6762 §10.2).
        out.record(self.service, PTR, IN, |out| out.name(self.instance));
        out.record(self.instance, SRV, IN | CACHE_FLUSH, |out| {
            for word in [0, 0, self.port] {
                out.u16(word);
            }
            out.name(self.host);
        });
        out.record(self.instance, TXT, IN | CACHE_FLUSH, |out| {
            for string in self.strings {
                let string = &string[..string.len().min(255)];
                out.bytes.push(string.len() as u8);
                out.bytes.extend_from_slice(string);
            }
            if self.strings.is_empty() {
                // RFC 6763 §6.1: an empty TXT record is one empty string.
                out.bytes.push(0);
            }
        });
        for address in self.addresses {
            let kind = if address.is_ipv4() { A } else { AAAA };
            out.record(self.host, kind, IN | CACHE_FLUSH, |out| match address {
                IpAddr::V4(address) => out.bytes.extend_from_slice(&address.octets()),
                IpAddr::V6(address) => out.bytes.extend_from_slice(&address.octets()),
            });
        }
        out.bytes
    }
}

/// A message as it grows, and where its names stand.
#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
    written: Vec<(Vec<u8>, u16)>,
}

impl Writer {
    fn u16(&mut self, word: u16) {
        self.bytes.extend_from_slice(&word.to_be_bytes());
    }

    /// Writes a name: as many labels as are new, then a pointer to where the rest stands.
    fn name(&mut self, name: &Name) {
        let mut rest = name.wire();
        while let Some((&length, behind)) = rest.split_first() {
            if let Some(&(_, at)) = self.written.iter().find(|(suffix, _)| suffix == rest) {
                return self.u16(0xc000 | at);
            }
            if self.bytes.len() < 0x4000 {
                self.written.push((rest.to_vec(), self.bytes.len() as u16));
            }
            let (label, behind) = behind.split_at(usize::from(length));
            self.bytes.push(length);
            self.bytes.extend_from_slice(label);
            rest = behind;
        }
        self.bytes.push(0);
    }

    fn record(&mut self, name: &Name, kind: u16, class: u16, data: impl FnOnce(&mut Self)) {
        self.name(name);
        self.u16(kind);
        self.u16(class);
        self.bytes.extend_from_slice(&0_u32.to_be_bytes());
        let length = self.bytes.len();
        self.u16(0);
        data(self);
        let written = (self.bytes.len() - length - 2) as u16;
        self.bytes[length..length + 2].copy_from_slice(&written.to_be_bytes());
    }
}
