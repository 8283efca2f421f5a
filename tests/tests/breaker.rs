//! Circuit breakers of the edge proxy, against upstreams that do as they are told.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use serde_json::Value;
use shutdown_core::state::Document;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{Answer, Connection, get, post, status_until};
use shutdown_tests::process::{EdgeProxy, Stopwatch};

/// What an upstream does with a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    /// Answers it with this status.
    Answer(u16),
    /// Keeps it until told otherwise.
    Hold,
    /// Closes the connection.
    Break,
}

struct Shared {
    told: Told,
    /// Requests that came.
    came: usize,
    /// Requests that are kept.
    kept: usize,
}

/// An upstream under the test's hand, a connection a request.
struct Upstream {
    addr: SocketAddr,
    shared: Arc<(Mutex<Shared>, Condvar)>,
}

impl Upstream {
    fn start(told: Told) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = listener.local_addr().expect("bound");
        let shared = Arc::new((Mutex::new(Shared { told, came: 0, kept: 0 }), Condvar::new()));
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = Arc::clone(&serving);
                // A proxy that leaves first is none of its business.
                std::thread::spawn(move || serve(stream, &shared));
            }
        });
        Self { addr, shared }
    }

    fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    fn tell(&self, told: Told) {
        self.shared.0.lock().expect("nobody panics").told = told;
        self.shared.1.notify_all();
    }

    fn came(&self) -> usize {
        self.shared.0.lock().expect("nobody panics").came
    }

    /// Waits until it keeps so many requests.
    fn keeps(&self, wanted: usize) {
        let shared = self.shared.0.lock().expect("nobody panics");
        let waited = self.shared.1.wait_timeout_while(shared, PATIENCE, |shared| shared.kept != wanted);
        let (shared, _) = waited.expect("nobody panics");
        assert_eq!(shared.kept, wanted, "requests kept");
    }
}

fn serve(mut stream: TcpStream, (shared, changed): &(Mutex<Shared>, Condvar)) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 {
            return Ok(());
        }
        head.push(byte[0]);
    }
    let mut shared = shared.lock().expect("nobody panics");
    shared.came += 1;
    if shared.told == Told::Hold {
        shared.kept += 1;
        changed.notify_all();
        shared = changed.wait_while(shared, |shared| shared.told == Told::Hold).expect("nobody panics");
        shared.kept -= 1;
    }
    let told = shared.told;
    drop(shared);
    match told {
        Told::Answer(status) => {
            write!(stream, "HTTP/1.1 {status} Told\r\ncontent-length: 2\r\nconnection: close\r\n\r\nup")
        }
        Told::Hold | Told::Break => Ok(()),
    }
}

fn proxy(upstreams: &[&Upstream], breaker: &str, when_all_open: &str) -> EdgeProxy {
    let urls: Vec<_> = upstreams.iter().map(|upstream| upstream.url()).collect();
    EdgeProxy::start([
        ("EDGE_PROXY_UPSTREAM", &*urls.join(",")),
        ("EDGE_PROXY_BREAKER", breaker),
        ("EDGE_PROXY_WHEN_ALL_OPEN", when_all_open),
    ])
}

fn ask(proxy: &EdgeProxy) -> Answer {
    get(proxy.listen, "/").expect("an answer")
}

fn statuses(proxy: &EdgeProxy, count: usize) -> Vec<u16> {
    (0..count).map(|_| ask(proxy).status).collect()
}

/// Whether the proxy itself said no.
fn is_refused(answer: &Answer) -> bool {
    answer.status == 503 && answer.header("retry-after").is_some() && answer.body.is_empty()
}

fn breakers(status: &Value) -> Vec<(String, String, u64)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let all = status["breakers"].as_array().expect("an array").iter();
    all.map(|one| (text(&one["peer"]), text(&one["state"]), one["probes"].as_u64().unwrap_or(99))).collect()
}

fn state_is(wanted: &str) -> impl Fn(&Value) -> bool {
    move |status| breakers(status).iter().all(|(_, state, _)| state == wanted)
}

fn probes_are(wanted: u64) -> impl Fn(&Value) -> bool {
    move |status| breakers(status).iter().map(|(_, _, probes)| probes).sum::<u64>() == wanted
}

fn metrics(proxy: &EdgeProxy) -> String {
    String::from_utf8(get(proxy.admin, "/metrics").expect("a page").body).expect("text")
}

/// How often it said this, all in all.
fn said(mut proxy: EdgeProxy, what: &str) -> usize {
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
    proxy.process.stderr().matches(what).count()
}

/// Opens the only breaker of this proxy with the twenty failures it takes.
fn open(proxy: &EdgeProxy, upstream: &Upstream) {
    upstream.tell(Told::Answer(500));
    assert_eq!(statuses(proxy, 20), [500; 20]);
    status_until(proxy.admin, state_is("open"));
}

#[test]
fn twenty_failures_open_it_and_a_hundred_404s_do_not() {
    let upstream = Upstream::start(Told::Answer(404));
    let scanned = proxy(&[&upstream], "", "refuse");
    assert_eq!(statuses(&scanned, 100), [404; 100]);
    assert_eq!(breakers(&get(scanned.admin, "/status").expect("status").json())[0].1, "closed");
    assert_eq!(upstream.came(), 100);

    upstream.tell(Told::Answer(503));
    let proxy = proxy(&[&upstream], "sleep=60s", "refuse");
    let answers: Vec<_> = (0..30).map(|_| ask(&proxy)).collect();
    let refused = answers.iter().filter(|answer| is_refused(answer)).count();
    assert_eq!((upstream.came(), refused), (120, 10), "the upstream is left alone from the twentieth on");
    let after: u64 = answers[29].header("retry-after").and_then(|text| text.parse().ok()).expect("seconds");
    assert!((55..=60).contains(&after), "{after}");

    let status = get(proxy.admin, "/status").expect("status").json();
    assert_eq!(breakers(&status), [(upstream.url(), "open".to_owned(), 0)]);
    let breaker = &status["breakers"][0];
    assert_eq!((&breaker["error_count"], &breaker["total_count"]), (&20.into(), &20.into()), "{breaker}");
    assert_eq!(status["upstreams"][0]["url"], upstream.url());
    let (page, peer) = (metrics(&proxy), upstream.url());
    for line in [
        format!("shutdown_circuit_breaker_state{{peer=\"{peer}\"}} 1"),
        "shutdown_circuit_breaker_opened_total 1".to_owned(),
        format!("shutdown_circuit_breaker_state_changes_total{{peer=\"{peer}\",state=\"open\"}} 1"),
        format!("shutdown_circuit_breaker_state_changes_total{{peer=\"{peer}\",state=\"half_open\"}} 0"),
    ] {
        assert!(page.lines().any(|other| other == line), "{line} is not in\n{page}");
    }
}

#[test]
fn it_half_opens_at_its_time_and_the_upstream_is_not_touched_before() {
    let upstream = Upstream::start(Told::Answer(500));
    let proxy = proxy(&[&upstream], "sleep=2s", "refuse");
    assert_eq!(statuses(&proxy, 20), [500; 20]);
    let opened = Stopwatch::start();
    upstream.tell(Told::Answer(200));
    let mut refused = 0;
    while is_refused(&ask(&proxy)) {
        refused += 1;
        assert!(opened.elapsed() < PATIENCE);
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let after = opened.elapsed();
    println!("{refused} refused, then admitted after {after:?}");
    assert!((1_800..=2_200).contains(&after.as_millis()), "{after:?}");
    assert_eq!(upstream.came(), 21, "twenty failures and the first probe");
}

#[test]
fn of_many_that_come_at_once_exactly_three_probe_and_then_it_closes() {
    let upstream = Upstream::start(Told::Answer(500));
    let proxy = &proxy(&[&upstream], "sleep=1s", "refuse");
    open(proxy, &upstream);
    upstream.tell(Told::Hold);
    status_until(proxy.admin, state_is("half_open"));
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..40).map(|_| scope.spawn(|| ask(proxy))).collect();
        // Not before all that will be refused have been: then three are left.
        let begin = Stopwatch::start();
        while clients.iter().filter(|client| client.is_finished()).count() < 37 {
            assert!(begin.elapsed() < PATIENCE);
            std::thread::park_timeout(Duration::from_millis(5));
        }
        upstream.keeps(3);
        status_until(proxy.admin, probes_are(3));
        upstream.tell(Told::Answer(200));
        clients.into_iter().map(|client| client.join().expect("a client does not panic")).collect()
    });
    let refused = answers.iter().filter(|answer| is_refused(answer)).count();
    let good = answers.iter().filter(|answer| answer.status == 200).count();
    assert_eq!((refused, good, upstream.came()), (37, 3, 23));
    assert!(answers.iter().filter_map(|answer| answer.header("retry-after")).all(|after| after == "1"));
    let status = get(proxy.admin, "/status").expect("status").json();
    assert_eq!(breakers(&status)[0].1, "closed");
    assert_eq!(statuses(proxy, 10), [200; 10]);
    let changes = "shutdown_circuit_breaker_state_changes_total";
    let closed = format!("{changes}{{peer=\"{}\",state=\"closed\"}} 1", upstream.url());
    assert!(metrics(proxy).contains(&closed));
}

#[test]
fn a_failing_probe_opens_it_again() {
    let upstream = Upstream::start(Told::Answer(500));
    let proxy = proxy(&[&upstream], "sleep=1s", "refuse");
    open(&proxy, &upstream);
    status_until(proxy.admin, state_is("half_open"));
    // Any failure: the connection breaks before there is an answer.
    upstream.tell(Told::Break);
    assert_eq!(ask(&proxy).status, 502);
    let status = get(proxy.admin, "/status").expect("status").json();
    let breaker = &status["breakers"][0];
    assert_eq!((&breaker["state"], &breaker["opened_total"]), (&"open".into(), &2.into()), "{breaker}");
    assert!(breaker["remaining_open_ms"].as_u64().expect("a number") > 500, "a whole sleep: {breaker}");
    assert!(is_refused(&ask(&proxy)));
    assert_eq!(upstream.came(), 21);
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_probe_gives_its_place_back() {
    let upstream = Upstream::start(Told::Answer(500));
    let proxy = proxy(&[&upstream], "sleep=1s", "refuse");
    open(&proxy, &upstream);
    upstream.tell(Told::Hold);
    status_until(proxy.admin, state_is("half_open"));
    let probe = || {
        let mut client = Connection::open(proxy.listen).expect("it serves");
        client.send("GET", "/", "").expect("it reads");
        client
    };
    let mut clients: Vec<_> = (0..3).map(|_| probe()).collect();
    upstream.keeps(3);
    assert!(is_refused(&ask(&proxy)));
    drop(clients.pop());
    let status = status_until(proxy.admin, probes_are(2));
    assert_eq!(breakers(&status)[0].1, "half_open", "it says nothing about the upstream");
    clients.push(probe());
    upstream.keeps(4);
    upstream.tell(Told::Answer(200));
    for mut client in clients {
        assert_eq!(client.answer().expect("an answer").status, 200);
    }
    status_until(proxy.admin, state_is("closed"));
}

#[test]
fn a_stream_that_goes_on_holds_no_probe() {
    let proxy = EdgeProxy::start([("EDGE_PROXY_BREAKER", "volume=1,probes=1,sleep=500ms")]);
    for _ in 0..2 {
        assert_eq!(get(proxy.listen, "/status?code=500").expect("an answer").status, 500);
    }
    status_until(proxy.admin, state_is("half_open"));
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = Connection::open(proxy.listen).expect("it serves");
        stream.send("GET", "/sse", "").expect("it reads");
        streams.push(stream);
    }
    let status = status_until(proxy.admin, state_is("closed"));
    assert_eq!(status["requests"]["active"], 2, "both still go on");
}

#[test]
fn one_that_refuses_connections_is_opened_while_every_request_is_answered_by_the_other() {
    let good = Upstream::start(Told::Answer(200));
    let gone = Upstream { addr: free_port(), shared: Arc::clone(&good.shared) };
    let proxy = proxy(&[&gone, &good], "sleep=60s", "refuse");
    assert_eq!(statuses(&proxy, 60), [200; 60]);
    assert_eq!(good.came(), 60);
    let status = get(proxy.admin, "/status").expect("status").json();
    let states: Vec<_> = breakers(&status).into_iter().map(|(peer, state, _)| (peer, state)).collect();
    assert!(states.contains(&(gone.url(), "open".to_owned())), "{states:?}");
    assert!(states.contains(&(good.url(), "closed".to_owned())), "{states:?}");
    assert_eq!(said(proxy, "upstream cannot be reached"), 20, "then nobody asks it any more");
}

/// A port where nobody listens.
fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

#[test]
fn when_all_are_open_refuse_says_when_to_come_back_and_says_once_that_it_does() {
    let (one, two) = (Upstream::start(Told::Answer(500)), Upstream::start(Told::Answer(500)));
    let proxy = proxy(&[&one, &two], "sleep=60s", "refuse");
    assert_eq!(statuses(&proxy, 40), [500; 40]);
    let mut client = Connection::open(proxy.listen).expect("it serves");
    for _ in 0..20 {
        client.send("GET", "/", "").expect("it reads");
        let answer = client.answer().expect("on the same connection, which is kept");
        assert!(is_refused(&answer), "{answer:?}");
    }
    let body = post(proxy.listen, "/", "connection: close\r\n").expect("an answer");
    assert!(is_refused(&body));
    assert_eq!((one.came(), two.came()), (20, 20));
    assert_eq!(said(proxy, "no upstream's circuit breaker admits"), 1);
}

#[test]
fn when_all_are_open_try_passes_on_tells_no_breaker_and_says_once_that_it_does() {
    let (one, two) = (Upstream::start(Told::Answer(500)), Upstream::start(Told::Answer(500)));
    let proxy = proxy(&[&one, &two], "sleep=60s", "try");
    assert_eq!(statuses(&proxy, 40), [500; 40]);
    one.tell(Told::Answer(200));
    two.tell(Told::Answer(200));
    assert_eq!(statuses(&proxy, 40), [200; 40]);
    assert_eq!((one.came(), two.came()), (40, 40), "in turn");
    let status = get(proxy.admin, "/status").expect("status").json();
    for breaker in status["breakers"].as_array().expect("an array") {
        assert_eq!((&breaker["state"], &breaker["total_count"]), (&"open".into(), &20.into()), "{breaker}");
    }
    assert_eq!(said(proxy, "no upstream's circuit breaker admits"), 1);
}

#[test]
fn off_is_off() {
    let upstream = Upstream::start(Told::Answer(500));
    let proxy = proxy(&[&upstream], "off", "refuse");
    assert_eq!(statuses(&proxy, 60), [500; 60]);
    assert_eq!(upstream.came(), 60);
    let status = get(proxy.admin, "/status").expect("status").json();
    assert_eq!(status["breakers"], Value::Array(Vec::new()));
    assert!(!metrics(&proxy).contains("circuit_breaker"));
}

/// Stops the proxy and starts another one on what it has left.
fn restarted(mut proxy: EdgeProxy, upstream: &Upstream, meanwhile: impl FnOnce(&Path)) -> EdgeProxy {
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
    let dir = proxy.into_dir();
    meanwhile(&dir.path().join("data"));
    EdgeProxy::start_in(dir, [("EDGE_PROXY_UPSTREAM", upstream.url())])
}

#[test]
fn an_open_breaker_is_open_after_a_restart_for_what_remained_and_then_exactly_three_probe() {
    const SLEEP: Duration = Duration::from_secs(5);
    let upstream = Upstream::start(Told::Answer(500));
    // The defaults of the system we come from.
    let proxy = EdgeProxy::start([("EDGE_PROXY_UPSTREAM", upstream.url())]);
    assert_eq!(statuses(&proxy, 20), [500; 20]);
    let opened = Stopwatch::start();
    upstream.tell(Told::Hold);

    let proxy = &restarted(proxy, &upstream, |_| {});
    let status = get(proxy.admin, "/status").expect("status").json();
    let remaining = Duration::from_millis(status["breakers"][0]["remaining_open_ms"].as_u64().unwrap_or(0));
    println!("after the restart: open for another {remaining:?}, {:?} after it opened", opened.elapsed());
    assert_eq!(breakers(&status), [(upstream.url(), "open".to_owned(), 0)]);
    assert!((remaining + opened.elapsed()).abs_diff(SLEEP) <= Duration::from_millis(200), "{status:#}");
    assert!(is_refused(&ask(proxy)));
    let said = proxy.process.stderr_so_far();
    let line = said.lines().find(|line| line.contains("state: from ")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("restored=\"breakers\"") && line.contains("shutdown_at="), "{line}");

    status_until(proxy.admin, state_is("half_open"));
    let half_open = opened.elapsed();
    println!("half-open {half_open:?} after it opened");
    assert!(half_open.abs_diff(SLEEP) <= Duration::from_millis(200), "{half_open:?}");
    assert_eq!(upstream.came(), 20, "the upstream was left alone until now");

    let answers = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..20).map(|_| scope.spawn(|| ask(proxy))).collect();
        upstream.keeps(3);
        // The others are refused while the three are under way.
        status_until(proxy.admin, |status| status["requests"]["active"] == 3);
        assert_eq!(breakers(&get(proxy.admin, "/status").expect("status").json())[0].2, 3);
        assert_eq!(upstream.came(), 23);
        upstream.tell(Told::Answer(200));
        clients.into_iter().map(|client| client.join().expect("no client panics")).collect::<Vec<_>>()
    });
    let served = answers.iter().filter(|answer| answer.status == 200).count();
    let refused = answers.iter().filter(|answer| is_refused(answer)).count();
    assert_eq!((served, refused), (3, 17));
    status_until(proxy.admin, state_is("closed"));
}

#[test]
fn without_its_state_a_restarted_proxy_asks_the_broken_upstream_at_once() {
    let upstream = Upstream::start(Told::Answer(500));
    let proxy = EdgeProxy::start([("EDGE_PROXY_UPSTREAM", upstream.url())]);
    assert_eq!(statuses(&proxy, 20), [500; 20]);
    status_until(proxy.admin, state_is("open"));
    let proxy = restarted(proxy, &upstream, |data| {
        for generation in ["state.json", "state.json.1"] {
            std::fs::remove_file(data.join(generation)).expect("it was saved");
        }
    });
    assert_eq!(ask(&proxy).status, 500, "control: nobody knows that it is broken");
    assert_eq!(upstream.came(), 21);
}

#[test]
fn the_breakers_of_a_legacy_state_half_open() {
    let upstream = Upstream::start(Told::Answer(200));
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::create_dir(dir.path().join("data")).expect("a directory");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs();
    let legacy = format!(
        r#"{{"peers":["{0}"],"shutdown_at":{1},"build_id":"0badcafe-x86_64",
            "circuit_breakers":[{{"peer":"{0}","state":"Open","error_count":9,"total_count":10}}]}}"#,
        upstream.addr,
        now - 60
    );
    std::fs::write(dir.path().join("data/sweetmcp_state.json"), legacy).expect("a file");
    let proxy = EdgeProxy::start_in(dir, [("EDGE_PROXY_UPSTREAM", upstream.url())]);
    status_until(proxy.admin, state_is("half_open"));
    assert_eq!(statuses(&proxy, 3), [200; 3]);
    status_until(proxy.admin, state_is("closed"));
}

/// A request that is left unanswered, until it is dropped.
fn unanswered(proxy: &EdgeProxy) -> Connection {
    let mut connection = Connection::open(proxy.listen).expect("it serves");
    connection.send("GET", "/", "").expect("it reads");
    connection
}

#[test]
fn an_upstream_that_does_not_answer_before_its_clients_lose_patience_is_opened() {
    let upstream = Upstream::start(Told::Hold);
    let proxy = proxy(&[&upstream], "", "refuse");
    let hasty: Vec<_> = (0..20).map(|_| unanswered(&proxy)).collect();
    upstream.keeps(20);
    drop(hasty);
    let status = status_until(proxy.admin, |status| status["requests"]["active"] == 0);
    assert_eq!(status["breakers"][0]["total_count"], 0, "control: who leaves at once says nothing of it");
    let patient: Vec<_> = (0..20).map(|_| unanswered(&proxy)).collect();
    upstream.keeps(40);
    status_until(proxy.admin, |status| {
        status["requests"]["active"] == 20
            && status["oldest_in_flight"]["age_ms"].as_f64().is_some_and(|age| age > 10_300.0)
    });
    drop(patient);
    status_until(proxy.admin, state_is("open"));
}

#[test]
fn three_probes_that_hang_do_not_keep_it_half_open_for_ever() {
    let upstream = Upstream::start(Told::Answer(500));
    let proxy = proxy(&[&upstream], "sleep=1s", "refuse");
    open(&proxy, &upstream);
    upstream.tell(Told::Hold);
    status_until(proxy.admin, state_is("half_open"));
    let mut hanging: Vec<_> = (0..3).map(|_| unanswered(&proxy)).collect();
    upstream.keeps(3);
    assert!(is_refused(&ask(&proxy)));
    // A sleep later three others may try.
    let begin = Stopwatch::start();
    while upstream.came() < 26 {
        assert!(begin.elapsed() < PATIENCE);
        hanging.push(unanswered(&proxy));
        std::thread::park_timeout(Duration::from_millis(20));
    }
    assert!(begin.elapsed() > Duration::from_millis(700), "{:?}", begin.elapsed());
    upstream.tell(Told::Answer(200));
    status_until(proxy.admin, state_is("closed"));
}

/// Rewrites the state as if it had been saved by a clock that is so far ahead, or behind.
fn shifted(data: &Path, ms: i64) {
    let path = data.join("state.json");
    let mut state = Document::parse(&std::fs::read(&path).expect("a state")).expect("a whole one");
    let breakers: Value = state.sections.get("breakers").expect("JSON").expect("a section");
    state.saved_at = state.saved_at.saturating_add_signed(ms);
    state.sections.set("breakers", &breakers).expect("JSON");
    std::fs::write(path, state.to_bytes()).expect("a file");
}

#[test]
fn after_a_clock_that_was_set_back_it_stays_open_for_what_remained_and_after_ten_minutes_it_is_forgotten() {
    const YEAR: i64 = 365 * 24 * 3_600_000;
    for (shift, state) in [(YEAR, "open"), (-601_000, "closed")] {
        let upstream = Upstream::start(Told::Answer(500));
        let proxy = EdgeProxy::start([("EDGE_PROXY_UPSTREAM", upstream.url())]);
        assert_eq!(statuses(&proxy, 20), [500; 20]);
        let proxy = restarted(proxy, &upstream, |data| shifted(data, shift));
        let status = get(proxy.admin, "/status").expect("status").json();
        assert_eq!(breakers(&status)[0].1, state, "{shift} ms");
        let remaining = status["breakers"][0]["remaining_open_ms"].as_u64();
        assert!(remaining <= Some(5_000), "{status:#}");
    }
}
