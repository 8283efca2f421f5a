//! Clients with a stream that has no end of its own: WebSockets and server-sent events.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread;

use super::{Kind, State, Visit};
use crate::PATIENCE;
use crate::client::Connection;

/// All of them.
pub const STATES: [State; 4] = [
    State::new("SSE", sse),
    State::new("WebSocket, answers the Close", polite),
    State::new("WebSocket, never answers", silent),
    State::new("20 WebSockets, none answers", twenty_silent),
];

fn sse(visit: &Visit) -> io::Result<String> {
    let mut connection = Connection::open(visit.listen)?;
    connection.send("GET", "/sse", "")?;
    let mut termed = false;
    let answer = connection.answer_slowly(4096, |read| {
        if read > 0 && !termed {
            termed = true;
            visit.term();
        }
    });
    Ok(match answer {
        Ok(answer) if answer.body.windows(22).any(|part| part == b"event: server_shutdown") => {
            "the last event, a proper end".to_owned()
        }
        Ok(_) => "a proper end, no last event".to_owned(),
        Err(_) => "no end".to_owned(),
    })
}

fn polite(visit: &Visit) -> io::Result<String> {
    Ok(open(visit, 1)?.remove(0).tell(true))
}

fn silent(visit: &Visit) -> io::Result<String> {
    Ok(open(visit, 1)?.remove(0).tell(false))
}

fn twenty_silent(visit: &Visit) -> io::Result<String> {
    let mut told: Vec<_> = open(visit, 20)?.into_iter().map(|socket| socket.tell(false)).collect();
    told.sort();
    told.dedup();
    Ok(told.join("; "))
}

/// Opens as many at once, and sends TERM.
fn open(visit: &Visit, sockets: usize) -> io::Result<Vec<WebSocket>> {
    let opened = thread::scope(|scope| {
        let opening: Vec<_> = (0..sockets).map(|_| scope.spawn(|| WebSocket::open(visit))).collect();
        opening.into_iter().map(|socket| socket.join().expect("it does not panic")).collect::<io::Result<_>>()
    })?;
    visit.until(|status| status["sessions"]["open"] == sockets && status["connections"]["open"] == sockets);
    visit.term();
    Ok(opened)
}

/// A WebSocket's client: short frames only.
struct WebSocket {
    stream: TcpStream,
}

impl WebSocket {
    /// Opens one and sees that it echoes.
    fn open(visit: &Visit) -> io::Result<Self> {
        // Pingora 0.9.1 closes a tunnel at once whose 101 it has read before it noted the end of the request's empty
        // body: cloudflare/pingora#946, open. A client that is closed this way comes back.
        let mut tries = if visit.kind == Kind::EdgeProxy { 20 } else { 1 };
        loop {
            tries -= 1;
            match Self::try_open(visit) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof && tries > 0 => {}
                done => return done,
            }
        }
    }

    fn try_open(visit: &Visit) -> io::Result<Self> {
        let mut stream = TcpStream::connect(visit.listen)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(
            b"GET /ws HTTP/1.1\r\nhost: ws\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
              sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.extend(byte);
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        let mut socket = Self { stream };
        socket.send(TEXT, b"echo")?;
        assert_eq!(socket.next()?, (TEXT, b"echo".to_vec()));
        Ok(socket)
    }

    /// Sends a frame, masked with zeros (RFC 6455 §5.3).
    fn send(&mut self, opcode: u8, payload: &[u8]) -> io::Result<()> {
        let length = u8::try_from(payload.len()).ok().filter(|length| *length < 126).expect("a short frame");
        let mut frame = vec![0x80 | opcode, 0x80 | length, 0, 0, 0, 0];
        frame.extend(payload);
        self.stream.write_all(&frame)
    }

    fn next(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head)?;
        assert!(head[1] < 126, "a long frame");
        let mut payload = vec![0; usize::from(head[1])];
        self.stream.read_exact(&mut payload)?;
        Ok((head[0] & 0x0f, payload))
    }

    /// All that comes, in words.
    fn tell(mut self, answers: bool) -> String {
        let mut told = Vec::new();
        loop {
            match self.next() {
                Ok((CLOSE, payload)) => {
                    let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                    told.push(format!("Close {code}"));
                    if answers {
                        self.send(CLOSE, &payload).expect("it waits for our answer");
                    }
                }
                Ok((_, payload)) if payload.starts_with(br#"{"type":"server_shutdown""#) => {
                    told.push("message".to_owned());
                }
                Ok((opcode, _)) => told.push(format!("frame {opcode}")),
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    told.push("closed".to_owned());
                    return told.join(", ");
                }
                Err(error) => {
                    told.push(error.kind().to_string());
                    return told.join(", ");
                }
            }
        }
    }
}

const TEXT: u8 = 1;
const CLOSE: u8 = 8;
