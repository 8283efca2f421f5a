//! Clients as plain as can be: what they see is what was on the wire.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

use crate::PATIENCE;

/// An HTTP/1 answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The head, lower-cased, a line a header.
    pub head: String,
    /// The body, its chunks joined.
    pub body: Vec<u8>,
}

impl Answer {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")))
    }

    /// The body as JSON.
    ///
    /// # Panics
    ///
    /// If it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// An HTTP/1 connection that is kept.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    host: String,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn open(addr: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&addr, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::new(), host: addr.to_string() })
    }

    /// Connects with a receive buffer of 64 KiB, so that what is not read waits at the sender.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn open_small(addr: SocketAddr) -> io::Result<Self> {
        let stream: TcpStream = small_socket(addr)?.into();
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream, buffer: Vec::new(), host: addr.to_string() })
    }

    /// Sends a request with these extra header lines, each ending in `\r\n`.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn send(&mut self, method: &str, path: &str, headers: &str) -> io::Result<()> {
        let length = if method == "POST" { "content-length: 0\r\n" } else { "" };
        let host = &self.host;
        self.raw(format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\n{length}{headers}\r\n").as_bytes())
    }

    /// Becomes a WebSocket: shakes hands, and leaves the frames to the caller.
    ///
    /// # Errors
    ///
    /// The connection broke, or the answer was no 101.
    pub fn upgrade(&mut self, path: &str) -> io::Result<()> {
        const KEY: &str = "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\
                           sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        self.send("GET", path, KEY)?;
        while find(&self.buffer, b"\r\n\r\n").is_none() {
            self.fill(1024)?;
        }
        let end = find(&self.buffer, b"\r\n\r\n").expect("found above");
        let head: Vec<u8> = self.buffer.drain(..end + 4).collect();
        if head.starts_with(b"HTTP/1.1 101 ") { Ok(()) } else { Err(bad(&String::from_utf8_lossy(&head))) }
    }

    /// Sends bytes.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Reads one answer, each read no larger than `at_once`.
    ///
    /// # Errors
    ///
    /// The connection ended or broke before the answer was complete; the text says after how many bytes.
    pub fn answer_slowly(
        &mut self,
        at_once: usize,
        mut before_read: impl FnMut(usize),
    ) -> io::Result<Answer> {
        let mut total = 0;
        let end = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break end;
            }
            before_read(total);
            total += self.fill(at_once)?;
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
        self.buffer.drain(..end + 4);
        let status =
            head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(|| bad("no status"))?;
        let mut answer = Answer { status, head, body: Vec::new() };
        let chunked = answer.header("transfer-encoding").is_some_and(|value| value.contains("chunked"));
        let length: Option<usize> = answer.header("content-length").and_then(|value| value.parse().ok());
        if chunked {
            loop {
                let end = loop {
                    if let Some(end) = find(&self.buffer, b"\r\n") {
                        break end;
                    }
                    before_read(total);
                    total += self.fill(at_once)?;
                };
                let line = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
                let size = usize::from_str_radix(line.trim(), 16).map_err(|_| bad("no chunk size"))?;
                while self.buffer.len() < end + 2 + size + 2 {
                    before_read(total);
                    total += self.fill(at_once)?;
                }
                answer.body.extend_from_slice(&self.buffer[end + 2..end + 2 + size]);
                self.buffer.drain(..end + 2 + size + 2);
                if size == 0 {
                    return Ok(answer);
                }
            }
        }
        if let Some(length) = length {
            while self.buffer.len() < length {
                before_read(total);
                total += self.fill(at_once)?;
            }
            answer.body = self.buffer.drain(..length).collect();
            return Ok(answer);
        }
        Err(bad("neither length nor chunks"))
    }

    /// Reads one answer.
    ///
    /// # Errors
    ///
    /// As [`answer_slowly`](Self::answer_slowly).
    pub fn answer(&mut self) -> io::Result<Answer> {
        self.answer_slowly(64 * 1024, |_| {})
    }

    /// Waits until the peer has closed; what it still sent.
    ///
    /// # Errors
    ///
    /// It was reset, or is still open after a minute.
    pub fn closed(&mut self) -> io::Result<Vec<u8>> {
        let mut rest = std::mem::take(&mut self.buffer);
        self.stream.read_to_end(&mut rest)?;
        Ok(rest)
    }

    fn fill(&mut self, at_once: usize) -> io::Result<usize> {
        let mut chunk = vec![0; at_once];
        // With a time limit set, a signal that this process handles interrupts it (socket(7)).
        let read = loop {
            match self.stream.read(&mut chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        if read == 0 {
            let text = format!("closed with {} bytes of an incomplete answer", self.buffer.len());
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        self.buffer.extend_from_slice(&chunk[..read]);
        Ok(read)
    }
}

/// A connected socket with a receive buffer of 64 KiB.
///
/// # Errors
///
/// What the system said.
pub fn small_socket(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_recv_buffer_size(64 * 1024)?;
    socket.connect_timeout(&addr.into(), Duration::from_secs(5))?;
    Ok(socket)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

fn bad(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// One request on a connection of its own.
///
/// # Errors
///
/// The connection was refused or broke.
pub fn get(addr: SocketAddr, path: &str) -> io::Result<Answer> {
    let mut connection = Connection::open(addr)?;
    connection.send("GET", path, "connection: close\r\n")?;
    connection.answer()
}

/// One request on a connection of its own.
///
/// # Errors
///
/// The connection was refused or broke.
pub fn post(addr: SocketAddr, path: &str, headers: &str) -> io::Result<Answer> {
    let mut connection = Connection::open(addr)?;
    connection.send("POST", path, headers)?;
    connection.answer()
}

/// Asks `/status` until `wanted` holds.
///
/// # Panics
///
/// If it does not within a minute.
pub fn status_until(admin: SocketAddr, wanted: impl Fn(&Value) -> bool) -> Value {
    let begin = crate::process::Stopwatch::start();
    loop {
        let status = get(admin, "/status").expect("the admin listener answers to the end").json();
        if wanted(&status) {
            return status;
        }
        assert!(begin.elapsed() < PATIENCE, "never: {status:#}");
        // The admin listener runs beside the driver: asking without a pause would slow what is watched.
        std::thread::park_timeout(Duration::from_millis(2));
    }
}
