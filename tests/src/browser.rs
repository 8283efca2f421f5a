//! A real browser, and the relay that is all of its network.
//!
//! The rule it keeps: Chromium reaches nothing but the relay, on loopback. The relay serves the test's own pages, hands on
//! what is meant for one address, under whatever name it was asked for – so a page can have any origin there, as after a name was
//! rebound –, writes down what it handed on, and refuses everything else.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use crate::PATIENCE;
use crate::process::Process;

/// A request that was handed on, and what came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relayed {
    /// Its method.
    pub method: String,
    /// Its path and query.
    pub path: String,
    /// Its `Host`.
    pub host: String,
    /// Its `Origin`.
    pub origin: Option<String>,
    /// The status of the answer; 0 if there was none.
    pub status: u16,
}

/// What the relay has seen.
#[derive(Default)]
struct Seen {
    relayed: Vec<Relayed>,
    said: Vec<(String, String)>,
    refused: Vec<String>,
}

/// A page of the test: the authority and the path it is at, and its text.
pub type Page = (String, &'static str, String);

/// The browser's proxy, which serves pages and relays the rest.
pub struct Relay {
    /// Where it is, as a proxy and as a server of pages.
    pub addr: SocketAddr,
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

impl Relay {
    /// Starts one that hands on what is for the port of `target`, whatever the host's name, and serves what `pages` makes
    /// of its own address.
    ///
    /// # Panics
    ///
    /// If there is no port left.
    pub fn start(target: SocketAddr, pages: impl FnOnce(SocketAddr) -> Vec<Page>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = listener.local_addr().expect("bound");
        let seen: Arc<(Mutex<Seen>, Condvar)> = Arc::default();
        let serving = Arc::new(Serving { addr, target, pages: pages(addr), seen: Arc::clone(&seen) });
        // It ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let serving = Arc::clone(&serving);
                thread::spawn(move || {
                    let _ = serving.connection(&stream);
                });
            }
        });
        Self { addr, seen }
    }

    /// Waits until a page has POSTed to `path` on the relay's own address, and gives what.
    ///
    /// # Panics
    ///
    /// If none does.
    pub fn said(&self, path: &str) -> String {
        let (seen, more) = &*self.seen;
        let find = |seen: &Seen| seen.said.iter().find(|(at, _)| at == path).map(|(_, text)| text.clone());
        let seen = seen.lock().expect("no relay panics");
        let (seen, _) =
            more.wait_timeout_while(seen, PATIENCE, |seen| find(seen).is_none()).expect("no relay panics");
        find(&seen).unwrap_or_else(|| panic!("no page said {path}; relayed: {:#?}", seen.relayed))
    }

    /// What was handed on by now.
    pub fn relayed(&self) -> Vec<Relayed> {
        self.seen.0.lock().expect("no relay panics").relayed.clone()
    }

    /// What else was asked for, and refused.
    pub fn refused(&self) -> Vec<String> {
        self.seen.0.lock().expect("no relay panics").refused.clone()
    }
}

struct Serving {
    addr: SocketAddr,
    target: SocketAddr,
    pages: Vec<Page>,
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

impl Serving {
    fn note(&self, note: impl FnOnce(&mut Seen)) {
        note(&mut self.seen.0.lock().expect("no relay panics"));
        self.seen.1.notify_all();
    }

    /// One request, or one in the tunnel that it asked for.
    fn connection(&self, stream: &TcpStream) -> io::Result<()> {
        let mut reader = BufReader::new(stream);
        let mut head = Head::read(&mut reader)?;
        if head.method == "CONNECT" {
            let target = head.target.clone();
            let answer = if self.is_for_target(&target) { "200 tunnel" } else { "403 refused" };
            (&mut &*stream).write_all(format!("HTTP/1.1 {answer}\r\n\r\n").as_bytes())?;
            if !self.is_for_target(&target) {
                self.note(|seen| seen.refused.push(target));
                return Ok(());
            }
            head = Head::read(&mut reader)?;
            head.target = format!("http://{target}{}", head.target);
        }
        let mut body = vec![0; head.header("content-length").and_then(|n| n.parse().ok()).unwrap_or(0)];
        reader.read_exact(&mut body)?;
        let rest = head.target.strip_prefix("http://").unwrap_or(&head.target);
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (authority, path) = (authority.to_owned(), path.to_owned());
        let page = self.pages.iter().find(|(at, name, _)| *at == authority && *name == path);
        let answer = if let Some((_, _, text)) = page {
            answer("200 OK", text)
        } else if authority == self.addr.to_string() || authority.is_empty() {
            self.note(|seen| seen.said.push((path, String::from_utf8_lossy(&body).into_owned())));
            answer("204 heard", "")
        } else if self.is_for_target(&authority) {
            self.hand_on(&head, &authority, &path, &body)
        } else {
            self.note(|seen| seen.refused.push(authority));
            answer("403 refused", "")
        };
        (&mut &*stream).write_all(&answer)
    }

    fn is_for_target(&self, authority: &str) -> bool {
        authority.rsplit_once(':').is_some_and(|(_, port)| port == self.target.port().to_string())
    }

    /// Sends the request on as it came, in origin form and for one answer.
    fn hand_on(&self, head: &Head, authority: &str, path: &str, body: &[u8]) -> Vec<u8> {
        let mut request = format!("{} {path} HTTP/1.1\r\nconnection: close\r\n", head.method);
        for (name, value) in &head.headers {
            if !name.contains("connection") {
                request.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        request.push_str("\r\n");
        let answer = || -> io::Result<Vec<u8>> {
            let mut stream = TcpStream::connect(self.target)?;
            stream.write_all(request.as_bytes())?;
            stream.write_all(body)?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        };
        let answer = answer().unwrap_or_default();
        let status = answer.get(9..12).and_then(|code| std::str::from_utf8(code).ok()?.parse().ok());
        let relayed = Relayed {
            method: head.method.clone(),
            path: path.to_owned(),
            host: head.header("host").unwrap_or(authority).to_owned(),
            origin: head.header("origin").map(ToOwned::to_owned),
            status: status.unwrap_or(0),
        };
        self.note(|seen| seen.relayed.push(relayed));
        answer
    }
}

fn answer(status: &str, text: &str) -> Vec<u8> {
    let length = text.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/html\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    (head + text).into_bytes()
}

struct Head {
    method: String,
    target: String,
    headers: Vec<(String, String)>,
}

impl Head {
    fn read(reader: &mut impl BufRead) -> io::Result<Self> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.take(64 * 1024).read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            match line.trim_end() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let mut words = lines.first().map(|line| line.split(' ')).into_iter().flatten();
        let mut word = || words.next().unwrap_or_default().to_owned();
        let (method, target) = (word(), word());
        let header = |line: &String| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        };
        Ok(Self { method, target, headers: lines.iter().skip(1).filter_map(header).collect() })
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(given, _)| given == name).map(|(_, value)| &**value)
    }
}

/// Debian's Chromium without a window, with a profile of its own in `dir`, that opens `page` through `relay`.
///
/// # Panics
///
/// If it cannot be started.
pub fn chromium(dir: &Path, relay: &Relay, page: &str) -> Process {
    let profile = dir.join("profile");
    std::fs::create_dir(&profile).expect("a new directory");
    let mut command = Command::new("/usr/bin/chromium");
    command
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args([
            "--disable-extensions",
            "--disable-breakpad",
            "--disable-dev-shm-usage",
            "--disable-popup-blocking",
        ])
        // A browser that would ask before a page reaches into the local network must not hide what the listener does, nor
        // one that tries TLS first.
        .arg("--disable-features=LocalNetworkAccessChecks,HttpsUpgrades,HttpsFirstBalancedModeAutoEnable")
        .arg(format!("--user-data-dir={}", profile.display()))
        // Loopback, too; and no name is looked up.
        .arg(format!("--proxy-server=http://{}", relay.addr))
        .args(["--proxy-bypass-list=<-loopback>", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])
        .arg(page)
        .env("HOME", dir)
        .current_dir(dir);
    Process::start(&mut command)
}
