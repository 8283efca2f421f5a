//! A connection that was accepted gets its answer, at the very moment of the stop, too.
//!
//! The system accepts connections before the program does. A stop that closes the listener with some of them in the
//! queue, or closes connections that have not spoken yet, takes what was accepted and gives nothing.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::process::{EdgeProxy, Process, binary};
use shutdown_tests::{PATIENCE, count};

/// Clients that connect, ask once, read, close, and connect again.
const CLIENTS: usize = 16;
/// Each has been answered so often before the signal.
const WARM: usize = 5;

/// What became of the connections of a shutdown.
#[derive(Debug, Default)]
struct Seen {
    answered: usize,
    /// Accepted, and closed or reset without a byte.
    empty: usize,
    /// Anything else but a refusal, which ends a client.
    odd: Vec<String>,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { answered, empty, odd } = self;
        write!(f, "{answered} answered, {empty} accepted and left empty-handed, odd: {odd:?}")
    }
}

/// A server, and the directory that must outlive it.
type Subject = (Process, SocketAddr, Option<tempfile::TempDir>);

fn listening(command: &mut Command) -> Subject {
    let process = Process::start(command);
    let addr = process.address("listening on ");
    (process, addr, None)
}

fn axum_service() -> Subject {
    let mut command = Command::new(binary("axum-lines"));
    for name in shutdown_core::ShutdownConfig::VARIABLES {
        command.env_remove(name);
    }
    listening(command.env("AXUM_SERVICE_LISTEN", "127.0.0.1:0").env("SHUTDOWN_LAME_DUCK", "0"))
}

fn edge_proxy() -> Subject {
    let (process, addr, dir) = EdgeProxy::start([("SHUTDOWN_LAME_DUCK", "0")]).into_parts();
    (process, addr, Some(dir))
}

fn stock_axum() -> Subject {
    listening(Command::new(binary("stock-axum")).env_remove("STOCK_AXUM_DELAY_MS"))
}

fn stock_pingora() -> Subject {
    listening(&mut Command::new(binary("stock-pingora")))
}

/// Until the first refusal.
fn client(addr: SocketAddr, warm: &Sender<()>) -> Seen {
    let mut seen = Seen::default();
    let mut warm = Some(warm);
    // A refusal is the end: nobody listens any more.
    while let Ok(stream) = TcpStream::connect(addr) {
        match ask(stream) {
            Ok(answer) if answer.starts_with(b"HTTP/1.1 200 ") && answer.ends_with(b"\n") => {
                seen.answered += 1;
            }
            Ok(answer) if answer.is_empty() => seen.empty += 1,
            Ok(answer) => seen.odd.push(String::from_utf8_lossy(&answer).into_owned()),
            Err(error) => seen.odd.push(error.to_string()),
        }
        if seen.answered == WARM
            && let Some(warm) = warm.take()
        {
            // Nobody waits any more when another client has failed.
            let _ = warm.send(());
        }
    }
    seen
}

/// One request; all that came, which may be nothing.
fn ask(mut stream: TcpStream) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = Vec::new();
    // A request that could not be sent is one that was not answered.
    let sent = stream.write_all(b"GET / HTTP/1.1\r\nhost: fresh.test\r\nconnection: close\r\n\r\n");
    match sent.and_then(|()| stream.read_to_end(&mut answer)) {
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Err(error)
        }
        _ => Ok(answer),
    }
}

/// One shutdown in the middle of it.
fn shutdown(start: fn() -> Subject) -> Seen {
    let (mut process, addr, _dir) = start();
    let (warm, warmed) = channel();
    let all = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| client(addr, &warm))).collect();
        for _ in 0..CLIENTS {
            warmed.recv_timeout(PATIENCE).expect("it serves everybody");
        }
        process.signal(Signal::TERM);
        let mut all = Seen::default();
        for client in clients {
            let seen = client.join().expect("a client does not panic");
            all.answered += seen.answered;
            all.empty += seen.empty;
            all.odd.extend(seen.odd);
        }
        all
    });
    let code = process.exit_code(Duration::from_secs(30));
    assert_eq!(code, 0, "{}", process.stderr());
    all
}

/// All of `shutdowns`, one at a time: each wants the machine for itself.
fn run(what: &str, shutdowns: usize, start: fn() -> Subject) -> Seen {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut all = Seen::default();
    for _ in 0..shutdowns {
        let seen = shutdown(start);
        all.answered += seen.answered;
        all.empty += seen.empty;
        all.odd.extend(seen.odd);
    }
    println!("{what}: {shutdowns} shutdowns, {all}");
    all
}

fn law(what: &str, start: fn() -> Subject, control: (&str, fn() -> Subject)) {
    let ours = run(what, count(20).max(4), start);
    let stock = run(control.0, count(20).max(4), control.1);
    assert!(stock.empty > 0, "{} must lose, else this proves nothing: {stock}", control.0);
    assert!(ours.empty == 0 && ours.odd.is_empty(), "{what}: {ours}");
}

#[test]
fn axum_service_answers_every_connection_it_accepted_and_stock_axum_does_not() {
    law("axum-lines", axum_service, ("stock axum", stock_axum));
}

#[test]
fn edge_proxy_answers_every_connection_it_accepted_and_stock_pingora_does_not() {
    law("edge-proxy", edge_proxy, ("stock Pingora", stock_pingora));
}
