//! An HTTP/2 client whose every frame is the test's own decision (RFC 9113).
//!
//! It answers nothing by itself: no SETTINGS, no PING, no window. A request is a HEADERS frame of literals; of an
//! answer's head only the status is read.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

/// What a client sends first (§3.4).
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
/// END_STREAM, and ACK of SETTINGS and PING.
const FLAG_1: u8 = 1;
const END_HEADERS: u8 = 4;

/// What a stream has brought so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Got {
    /// The status, once its head is here.
    pub status: Option<u16>,
    /// The body.
    pub body: Vec<u8>,
    /// Whether it has ended properly.
    pub ended: bool,
    /// The code of its RST_STREAM.
    pub reset: Option<u32>,
}

/// A connection and all it has seen.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    buffer: Vec<u8>,
    host: String,
    /// By number.
    pub streams: BTreeMap<u32, Got>,
    /// Each GOAWAY's last stream and error code.
    pub goaways: Vec<(u32, u32)>,
    /// PINGs that wait for an answer.
    pub pings: Vec<[u8; 8]>,
    /// How the connection ended: an orderly end is `None` inside.
    pub over: Option<Option<io::ErrorKind>>,
}

impl<S: Read + Write> Client<S> {
    /// A client on `stream`, which has said nothing yet. Reads must have a time limit.
    pub fn new(stream: S, host: impl Into<String>) -> Self {
        let (buffer, streams) = (Vec::new(), BTreeMap::new());
        Self {
            stream,
            buffer,
            host: host.into(),
            streams,
            goaways: Vec::new(),
            pings: Vec::new(),
            over: None,
        }
    }

    /// Sends the preface and our SETTINGS: no table of headers, so that what comes is literal.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn hello(&mut self) -> io::Result<()> {
        self.raw(PREFACE)?;
        // SETTINGS_HEADER_TABLE_SIZE (1) is 0.
        self.frame(SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0])
    }

    /// Sends bytes.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(payload.len()).expect("a small frame");
        let mut frame = length.to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.raw(&frame)
    }

    /// Asks for `path` on a stream of this number.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn get(&mut self, stream: u32, path: &str) -> io::Result<()> {
        // RFC 7541 appendix A: 2 is `:method: GET`, 6 is `:scheme: http`; 1 and 4 name authority and path.
        let mut block = vec![0x82, 0x86];
        for (name, value) in [(0x01, self.host.as_str()), (0x04, path)] {
            block.push(name);
            block.push(u8::try_from(value.len()).ok().filter(|length| *length < 127).expect("a short text"));
            block.extend(value.as_bytes());
        }
        self.streams.insert(stream, Got::default());
        self.frame(HEADERS, FLAG_1 | END_HEADERS, stream, &block)
    }

    /// Lets the peer send `more` bytes on a stream; 0 is the connection.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn open_window(&mut self, stream: u32, more: u32) -> io::Result<()> {
        self.frame(WINDOW_UPDATE, 0, stream, &more.to_be_bytes())
    }

    /// Answers every PING that waits.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn answer_pings(&mut self) -> io::Result<()> {
        std::mem::take(&mut self.pings).iter().try_for_each(|ping| self.frame(PING, FLAG_1, 0, ping))
    }

    /// Reads frames until `enough` holds or the connection is over; whether it holds.
    ///
    /// # Panics
    ///
    /// If a frame makes no sense, or none comes in time.
    pub fn read_until(&mut self, enough: impl Fn(&Self) -> bool) -> bool {
        while !enough(self) && self.over.is_none() {
            if let Some(frame) = self.next_frame() {
                self.note(&frame);
                continue;
            }
            let mut chunk = [0; 16 * 1024];
            match self.stream.read(&mut chunk) {
                Ok(0) => self.over = Some(None),
                Ok(read) => self.buffer.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    panic!("nothing came in time: {:?}, {:?}", self.goaways, self.streams.keys())
                }
                Err(error) => self.over = Some(Some(error.kind())),
            }
        }
        enough(self)
    }

    /// What a stream has brought.
    pub fn got(&self, stream: u32) -> Got {
        self.streams.get(&stream).cloned().unwrap_or_default()
    }

    fn next_frame(&mut self) -> Option<Vec<u8>> {
        let length = self.buffer.first_chunk::<3>()?;
        let whole =
            9 + usize::from(length[0]) * 65_536 + usize::from(length[1]) * 256 + usize::from(length[2]);
        (self.buffer.len() >= whole).then(|| self.buffer.drain(..whole).collect())
    }

    fn note(&mut self, frame: &[u8]) {
        let (head, payload) = frame.split_at(9);
        let number = word(&head[5..]);
        let first = head[4] & FLAG_1 != 0;
        match head[3] {
            DATA => {
                let got = self.streams.entry(number).or_default();
                got.body.extend_from_slice(payload);
                got.ended |= first;
            }
            HEADERS => {
                let got = self.streams.entry(number).or_default();
                got.status = got.status.or_else(|| Some(status(payload)));
                got.ended |= first;
            }
            RST_STREAM => self.streams.entry(number).or_default().reset = Some(word(payload)),
            PING if !first => self.pings.push(*payload.first_chunk().expect("a PING has eight bytes")),
            GOAWAY => self.goaways.push((word(payload), word(&payload[4..]))),
            _ => {}
        }
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(*bytes.first_chunk().expect("four bytes")) & 0x7fff_ffff
}

/// The status at the beginning of a header block (RFC 7541), which every server puts first.
fn status(block: &[u8]) -> u16 {
    // A change of the table's size goes before (§6.3).
    let block = &block[block.iter().take_while(|byte| **byte & 0xe0 == 0x20).count()..];
    match block {
        [indexed @ 0x88..=0x8e, ..] => [200, 204, 206, 304, 400, 404, 500][usize::from(indexed - 0x88)],
        // A literal, named by entry 8 of the static table (`:status`), in one of its three forms.
        [0x08 | 0x18 | 0x48, length, value @ ..] => {
            let value = &value[..usize::from(length & 0x7f)];
            if length & 0x80 == 0 { plain(value) } else { huffman(value) }
        }
        other => panic!("a header block that does not begin with a status: {other:?}"),
    }
}

fn plain(digits: &[u8]) -> u16 {
    digits.iter().fold(0, |number, digit| number * 10 + u16::from(digit - b'0'))
}

/// Three digits in Huffman's code (RFC 7541 appendix B): 0, 1, 2 have five bits, 3 to 9 six, 011001 to 011111.
fn huffman(bytes: &[u8]) -> u16 {
    let mut bits = bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| u16::from(byte >> bit & 1)));
    (0..3).fold(0, |number, _| {
        let five = bits.by_ref().take(5).fold(0, |code, bit| code * 2 + bit);
        let digit = if five < 3 { five } else { five * 2 + bits.next().unwrap_or(0) - 0b011001 + 3 };
        number * 10 + digit
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_in_every_form_a_server_may_write_it() {
        assert_eq!(status(&[0x88]), 200);
        assert_eq!(status(&[0x20, 0x8d, 0x5f]), 404);
        assert_eq!(status(&[0x48, 0x03, b'5', b'0', b'3']), 503);
        assert_eq!(status(&[0x08, 0x83, 0x6c, 0x0c, 0xff]), 503);
    }
}
