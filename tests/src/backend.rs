//! The staged backend with what it stands on, and clients that use all of it at once.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::StreamExt;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Message;

use crate::client::{Answer, Connection, post};
use crate::process::Service;
use crate::servers::{Postgres, Redis, sqlite};

/// What the backend stands on.
pub enum Standing {
    /// SQLite in its directory, a cache in the process.
    Embedded,
    /// Servers.
    Servers(Box<(Postgres, Redis)>),
}

impl Standing {
    /// Both, the servers started.
    pub fn both() -> [Self; 2] {
        [Self::Embedded, Self::servers()]
    }

    /// PostgreSQL, which logs every statement, and Redis.
    pub fn servers() -> Self {
        Self::Servers(Box::new((Postgres::start_with(&["log_statement=all"]), Redis::start())))
    }
}

/// axum-service under test.
pub struct Backend {
    /// The service.
    pub service: Service,
    /// What it stands on.
    pub standing: Standing,
}

/// A cache that writes nothing by the clock: what was put waits for the stage.
pub const WRITES_WAIT: (&str, &str) = ("CACHE_WRITE_INTERVAL", "3600s");

impl Backend {
    /// Starts one with these settings and waits until it serves.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start(standing: Standing, settings: &[(&str, &str)]) -> Self {
        let urls = match &standing {
            Standing::Embedded => Vec::new(),
            Standing::Servers(servers) => {
                vec![("DATABASE_URL", servers.0.url()), ("CACHE_URL", servers.1.url())]
            }
        };
        let given = settings.iter().map(|(name, value)| (*name, (*value).to_owned()));
        Self { service: Service::start("axum-service", urls.into_iter().chain(given)), standing }
    }

    /// Asks the database, as somebody else.
    ///
    /// # Panics
    ///
    /// If it does not answer.
    pub fn query(&self, sql: &str) -> String {
        match &self.standing {
            Standing::Embedded => sqlite(&self.service.dir().join("axum-service.db"), sql),
            Standing::Servers(servers) => servers.0.query(sql),
        }
    }

    /// The PostgreSQL.
    ///
    /// # Panics
    ///
    /// If it stands on nothing of the kind.
    pub fn postgres(&mut self) -> &mut Postgres {
        match &mut self.standing {
            Standing::Embedded => panic!("it stands on SQLite"),
            Standing::Servers(servers) => &mut servers.0,
        }
    }

    /// The Redis.
    ///
    /// # Panics
    ///
    /// If it stands on nothing of the kind.
    pub fn redis(&mut self) -> &mut Redis {
        match &mut self.standing {
            Standing::Embedded => panic!("it has a cache of its own"),
            Standing::Servers(servers) => &mut servers.1,
        }
    }

    /// How many connections the service has to its PostgreSQL, as that sees it.
    pub fn connections(&mut self) -> usize {
        let count = self
            .postgres()
            .query("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'axum-service-%'");
        count.parse().expect("count gives a number")
    }

    /// Makes payments, each with an entry in the cache; their ids.
    ///
    /// # Panics
    ///
    /// If one is refused.
    pub fn pay(&self, count: usize) -> Vec<i64> {
        let paid = (0..count).map(|_| {
            let answer = post(self.service.listen, "/payments?amount=5", "").expect("it serves");
            assert_eq!(answer.status, 201, "{answer:?}");
            answer.json()["id"].as_i64().expect("a payment has an id")
        });
        paid.collect()
    }

    /// How many of these payments Redis has.
    pub fn cached(&mut self, payments: &[i64]) -> usize {
        if payments.is_empty() {
            return 0;
        }
        let keys: Vec<_> = payments.iter().map(|id| format!("payment:{id}")).collect();
        let arguments: Vec<_> = std::iter::once("EXISTS").chain(keys.iter().map(String::as_str)).collect();
        self.redis().cli(&arguments).parse().expect("EXISTS gives a number")
    }

    /// The stages of the last report: name, outcome, the details of their tasks.
    pub fn stages(&self) -> Vec<(String, String, String)> {
        let report = self.service.report();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let stages = report["stages"].as_array().expect("a report has stages").iter();
        stages
            .map(|stage| {
                let tasks = stage["tasks"].as_array().expect("a stage has tasks").iter();
                let details: Vec<_> = tasks
                    .filter(|task| task["outcome"] != "ok")
                    .map(|task| {
                        format!(
                            "{}: {} {}",
                            text(&task["name"]),
                            text(&task["outcome"]),
                            text(&task["detail"])
                        )
                    })
                    .collect();
                (text(&stage["stage"]), text(&stage["outcome"]), details.join("; "))
            })
            .collect()
    }
}

/// What one client of the load has seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Answers by status.
    pub statuses: BTreeMap<u16, usize>,
    /// Answers of 500 and worse but 503, and everything that broke.
    pub broken: Vec<String>,
    /// Payments that were answered with 201.
    pub paid: Vec<i64>,
}

impl Seen {
    /// Answers that the service itself gave.
    pub fn answered(&self) -> usize {
        self.statuses.iter().filter(|(status, _)| **status != 503).map(|(_, count)| count).sum()
    }

    fn note(&mut self, answer: &Answer) {
        *self.statuses.entry(answer.status).or_default() += 1;
        if answer.status >= 500 && answer.status != 503 {
            self.broken.push(format!("{}: {}", answer.status, String::from_utf8_lossy(&answer.body)));
        }
    }
}

/// Clients that go on until the service tells them to leave.
pub struct Load {
    clients: Vec<JoinHandle<()>>,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
}

impl Load {
    /// Starts `clients` that make a payment and read it in turn, each with a pause between two requests.
    ///
    /// A client keeps its connection. Told to close it, it goes on over a new one while one is to be had; it ends when
    /// the service takes no more.
    pub fn start(addr: SocketAddr, clients: usize, pause: Duration) -> Self {
        let seen = Arc::<Mutex<Seen>>::default();
        let stop = Arc::<AtomicBool>::default();
        let clients = (0..clients)
            .map(|_| {
                let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
                std::thread::spawn(move || {
                    if let Err(error) = client(addr, &seen, &stop, pause) {
                        seen.lock().expect("no client panics").broken.push(error.to_string());
                    }
                })
            })
            .collect();
        Self { clients, seen, stop }
    }

    /// Waits until that many answers have been seen.
    pub fn answers(&self, count: usize) {
        let begin = crate::process::Stopwatch::start();
        while self.seen.lock().expect("no client panics").statuses.values().sum::<usize>() < count {
            assert!(begin.elapsed() < crate::PATIENCE, "no load");
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    /// Waits until every client has ended; what they have seen.
    ///
    /// # Panics
    ///
    /// If a client has.
    pub fn ended(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().expect("no client panics");
        }
        std::mem::take(&mut *self.seen.lock().expect("no client panics"))
    }
}

/// Until nobody accepts; an error that is none of the service's ends is one.
fn client(addr: SocketAddr, seen: &Mutex<Seen>, stop: &AtomicBool, pause: Duration) -> io::Result<()> {
    let mut last = None;
    while !stop.load(Ordering::Relaxed) {
        // Refused: the listener has closed, and a balancer has long known.
        let Ok(mut connection) = Connection::open(addr) else { return Ok(()) };
        let mut fresh = true;
        loop {
            let (method, path) = match last.take() {
                Some(id) => ("GET", format!("/payments/{id}")),
                None => ("POST", "/payments?amount=3".to_owned()),
            };
            connection.send(method, &path, "")?;
            let answer = match connection.answer() {
                Ok(answer) => answer,
                // Reset before its first request was read: it came in the moment in which the listener closed.
                Err(error) if fresh && error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error),
            };
            fresh = false;
            let mut seen = seen.lock().expect("no client panics");
            seen.note(&answer);
            if answer.status == 201 {
                last = answer.json()["id"].as_i64();
                seen.paid.extend(last);
            }
            drop(seen);
            if answer.header("connection") == Some("close") {
                connection.closed()?;
                break;
            }
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            std::thread::park_timeout(pause);
        }
    }
    Ok(())
}

/// Opens WebSockets on `/live`; when they have all ended, how many heard the message, and how many a Close 1001.
///
/// # Panics
///
/// If one cannot be opened.
pub fn listen_live(addr: SocketAddr, count: usize) -> JoinHandle<(usize, usize)> {
    let (opened, open) = std::sync::mpsc::channel();
    let listening = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async move {
            let sockets = (0..count).map(|_| async {
                let stream = TcpStream::connect(addr).await.expect("it serves");
                client_async(format!("ws://{addr}/live"), stream).await.expect("an upgrade").0
            });
            let sockets = futures_util::future::join_all(sockets).await;
            opened.send(()).expect("somebody waits");
            let heard = futures_util::future::join_all(sockets.into_iter().map(goodbye)).await;
            let count = |which: fn(&(bool, bool)) -> bool| heard.iter().filter(|heard| which(heard)).count();
            (count(|(told, _)| *told), count(|(_, closed)| *closed))
        })
    });
    open.recv().expect("the WebSockets open");
    listening
}

/// Whether the message came, and a Close 1001.
async fn goodbye(mut socket: tokio_tungstenite::WebSocketStream<TcpStream>) -> (bool, bool) {
    let mut told = false;
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Text(text) => told |= text.contains("server_shutdown"),
            Message::Close(Some(frame)) => return (told, u16::from(frame.code) == 1001),
            _ => {}
        }
    }
    (told, false)
}
