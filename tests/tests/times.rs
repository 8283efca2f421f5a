//! How long the staged backend takes to stop: the seed's table, beaten; and k6's rule, that a load sees 200 or 503 and no
//! connection error.

use std::sync::Barrier;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::backend::{Backend, Standing, listen_live};
use shutdown_tests::client::Connection;
use shutdown_tests::process::Stopwatch;

/// A load at a steady pace over kept connections, that ends as clients behind a balancer end: told `Connection: close` they
/// connect anew, and come here again until the balancer has learned that readiness is red.
struct Pace {
    clients: usize,
    /// From one request of a client to its next.
    every: Duration,
}

/// How long the load goes on before the signal.
const BEFORE: Duration = Duration::from_secs(2);

impl Pace {
    const NONE: Self = Self { clients: 0, every: Duration::ZERO };

    const fn per_second(requests: u32) -> Self {
        // Each asks twice a second.
        Self { clients: requests as usize / 2, every: Duration::from_millis(500) }
    }

    /// Long enough for a client to hear that it should leave, and for a balancer to learn.
    fn lame_duck(&self) -> Duration {
        if self.clients == 0 { Duration::ZERO } else { (self.every * 3).max(Duration::from_secs(1)) }
    }
}

/// Waits for a time. (`park_timeout` may return early.)
fn wait(time: Duration) {
    let begin = Stopwatch::start();
    while begin.elapsed() < time {
        std::thread::park_timeout(time.saturating_sub(begin.elapsed()));
    }
}

/// What the clients saw: answers of 200 and 201, answers of 503, whatever else.
#[derive(Debug, Default)]
struct Rule {
    served: usize,
    refused: usize,
    errors: Vec<String>,
}

fn client(addr: std::net::SocketAddr, pace: &Pace, begin: &Barrier) -> Rule {
    let every = pace.every;
    let mut told: Option<Stopwatch> = None;
    let mut rule = Rule::default();
    let connection = Connection::open(addr);
    begin.wait();
    let mut connection = connection.expect("it serves");
    loop {
        let asked = Stopwatch::start();
        // A third of a pace long: at any moment some are in flight.
        let path = format!("/slow?ms={}", every.as_millis() / 3);
        let (method, path) = if rule.served % 2 == 0 { ("POST", "/payments") } else { ("GET", &*path) };
        match connection.send(method, path, "").and_then(|()| connection.answer()) {
            Ok(answer) => {
                match answer.status {
                    200 | 201 => rule.served += 1,
                    503 => rule.refused += 1,
                    status => rule.errors.push(format!("status {status}")),
                }
                if answer.header("connection") == Some("close") {
                    // The balancer has learned when half of the lame duck has passed.
                    if told.get_or_insert_with(Stopwatch::start).elapsed() + every > pace.lame_duck() / 2 {
                        return rule;
                    }
                    match Connection::open(addr) {
                        Ok(new) => connection = new,
                        Err(error) => {
                            rule.errors.push(error.to_string());
                            return rule;
                        }
                    }
                }
            }
            Err(error) => {
                rule.errors.push(error.to_string());
                return rule;
            }
        }
        wait(every.saturating_sub(asked.elapsed()));
    }
}

/// Stops a backend under this load, once every client has been answered; how long that took, and what the clients saw.
fn stop(pace: &Pace, websockets: usize, signal: Signal) -> (Duration, i32, Rule) {
    let lame_duck = format!("{}ms", pace.lame_duck().as_millis());
    let mut backend = Backend::start(Standing::Embedded, &[("SHUTDOWN_LAME_DUCK", &lame_duck)]);
    let addr = backend.service.listen;
    let live = (websockets > 0).then(|| listen_live(addr, websockets));
    let begin = Barrier::new(pace.clients + 1);
    let (took, code, rules) = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..pace.clients).map(|_| scope.spawn(|| client(addr, pace, &begin))).collect();
        begin.wait();
        if pace.clients > 0 {
            wait(BEFORE);
        }
        let watch = Stopwatch::start();
        backend.service.process.signal(signal);
        let code = backend.service.process.ended(PATIENCE).code().unwrap_or(-1);
        (
            watch.elapsed(),
            code,
            clients.into_iter().map(|client| client.join().expect("a client")).collect::<Vec<_>>(),
        )
    });
    let mut all = Rule::default();
    for rule in rules {
        all.served += rule.served;
        all.refused += rule.refused;
        all.errors.extend(rule.errors);
    }
    if let Some(live) = live {
        let heard = live.join().expect("the clients");
        if signal == Signal::TERM {
            assert_eq!(heard, (websockets, websockets));
        }
    }
    (took, code, all)
}

#[test]
fn the_seeds_times_are_beaten_and_a_load_sees_only_200_or_503() {
    println!(
        "| load | the seed expects | took | answers before and in the lame duck | 503 | connection errors |\n|---|---|---|---|---|---|"
    );
    for (name, pace, websockets, limit) in [
        ("idle", Pace::NONE, 0, 2),
        ("10 requests a second", Pace::per_second(10), 0, 5),
        ("100 requests a second", Pace::per_second(100), 0, 15),
        ("50 WebSockets", Pace::NONE, 50, 10),
    ] {
        let (took, code, rule) = stop(&pace, websockets, Signal::TERM);
        let Rule { served, refused, errors } = &rule;
        println!("| {name} | < {limit} s | {took:?} | {served} | {refused} | {} |", errors.len());
        assert_eq!((code, errors.len()), (0, 0), "{name}: {rule:?}");
        assert!(took < Duration::from_secs(limit), "{name}: {took:?}");
        assert!(*served >= pace.clients, "{name}: {rule:?}");
    }
    // The control: killed in the middle, it breaks connections.
    let (_, _, rule) = stop(&Pace::per_second(100), 0, Signal::KILL);
    assert!(!rule.errors.is_empty(), "{rule:?}");
}
