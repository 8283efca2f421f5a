//! The shutdown of the system we come from was written and never called: eighteen parts that nobody had connected, eight
//! checks for the day on which somebody would, and six intentions. A test for each, by its number, against the real program.
//!
//! Most look at one and the same life of an edge proxy ([`life`]), which has two peers, a registry, a request under way and an
//! upstream that is not there: it is stopped with TERM, started again in its directory, and stopped with INT. Needs root,
//! iproute2, tcpdump and tshark for mDNS, and strace for the order of what is written.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_core::peers::notice::{Kind, Notice, Why};
use shutdown_core::peers::{Id, PeerRecord};
use shutdown_core::state::{Document, Found, INTERVAL, StateStore};
use shutdown_core::{
    InstallError, Reason, ShutdownConfig, ShutdownCoordinator, ShutdownReport, ShuttingDown,
};
use shutdown_mdns::wire::{Data, Message};
use shutdown_tests::client::{Answer, Connection, get, status_until};
use shutdown_tests::judges::{goodbyes_read_by_tshark, now_ms, read_by_tshark};
use shutdown_tests::mdns_wire::{Seen, check, goodbyes_for, is_announced};
use shutdown_tests::mesh::{Node, Stranger, Upstream, name, peer_in, place, unix_ms};
use shutdown_tests::netns::{Net, Packet};
use shutdown_tests::process::{EdgeProxy, Process, Stopwatch, binary, read_report};
use shutdown_tests::servers::{Recorded, Registry};
use shutdown_tests::{PATIENCE, is_long};
use shutdown_tower::ShutdownAware;
use tokio::task::JoinHandle;

/// The width of a deadline.
const TOLERANCE: Duration = Duration::from_millis(200);
/// Longer than any test here: a breaker that is open stays open.
const SLEEP: &str = "percent=50,volume=2,sleep=300s";

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// The state below `dir`, if it has been saved.
fn saved(dir: &Path) -> Option<Document> {
    let bytes = fs::read(dir.join("data/state.json")).ok()?;
    Some(Document::parse(&bytes).expect("a state is whole whenever it is read"))
}

/// Looks until there is what is wanted.
fn until<T>(look: impl Fn() -> Option<T>) -> T {
    let begin = Stopwatch::start();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "never");
        thread::park_timeout(Duration::from_millis(2));
    }
}

/// The stages of a report with their tasks, as `departure: mdns`.
fn tasks(report: &Value) -> Vec<String> {
    let stages = report["stages"].as_array().expect("a list").iter();
    let tasks = stages.flat_map(|stage| {
        stage["tasks"].as_array().expect("a list").iter().map(move |task| (&stage["stage"], &task["name"]))
    });
    tasks.map(|(stage, task)| format!("{stage}: {task}").replace('"', "")).collect()
}

/// A task of a report.
fn task<'a>(report: &'a Value, name: &str) -> &'a Value {
    let stages = report["stages"].as_array().expect("a list").iter();
    let mut tasks = stages.flat_map(|stage| stage["tasks"].as_array().expect("a list"));
    tasks.find(|task| task["name"] == name).unwrap_or_else(|| panic!("no task {name}: {report:#}"))
}

fn phases(report: &Value) -> Vec<&str> {
    let phases = report["phases"].as_array().expect("a list").iter();
    phases.map(|phase| phase["phase"].as_str().expect("a name")).collect()
}

fn breaker(all: &Value, at: SocketAddr) -> &Value {
    let peer = format!("http://{at}");
    let mut all = all.as_array().expect("a list").iter();
    all.find(|breaker| breaker["peer"] == *peer).unwrap_or(&Value::Null)
}

/// Two lives of a node, as they were seen from outside.
struct Life {
    /// Where it was told to listen: on a port that is free.
    told: SocketAddr,
    /// Where it did.
    at: SocketAddr,
    peers: [SocketAddr; 2],
    /// An upstream where nobody listens.
    nobody: SocketAddr,
    /// What it said at its start, to each peer.
    returned: Vec<Notice>,
    /// Its state on disk before anybody told it to stop.
    running: Document,
    /// Its status while it served one request.
    serving: Value,
    /// How many drivers of a shutdown were in it.
    drivers: usize,
    pid: u32,
    signalled: u64,
    /// What it said to each peer when it was stopped.
    left: Vec<Notice>,
    /// Its status once it refused what was new, the request still under way.
    draining: Value,
    /// What became of a request over a connection from before, and over a new one.
    kept: Result<Answer, String>,
    refused: ErrorKind,
    /// The answer to the request that was under way.
    held: Result<Answer, String>,
    code: i32,
    ended: u64,
    report: Value,
    state: Document,
    log: String,
    /// What the registry was asked.
    asked: Vec<Recorded>,
    again: Again,
}

/// The second one.
struct Again {
    /// What it knew when it served, before anybody had said anything.
    status: Value,
    returned: Vec<Notice>,
    code: i32,
    report: Value,
    shown: String,
    log: String,
}

fn life() -> &'static Life {
    static LIFE: LazyLock<Life> = LazyLock::new(live);
    &LIFE
}

fn acknowledged(peers: &[Stranger; 2], kind: Kind) -> Vec<Notice> {
    peers.iter().map(|peer| peer.acknowledge(kind)).collect()
}

fn live() -> Life {
    let (registry, upstream, nobody) = (Registry::start(), Upstream::start(), place());
    let peers = [Stranger::start_at(place()), Stranger::start_at(place())];
    let told = SocketAddr::new(place().ip(), 0);
    let start = |dir: tempfile::TempDir| {
        let mut command =
            Node::command(dir.path(), told, &[&upstream], &peers.each_ref().map(|peer| peer.at));
        command.args(["--upstream", &format!("http://{nobody}"), "--breaker", SLEEP]);
        command.args(["--registry", &registry.url(), "--state-interval", "200ms"]);
        command.env("SHUTDOWN_LINGER", "300ms");
        Node::run(command, dir)
    };

    let mut node = start(temporary());
    let (at, pid) = (node.at, node.process.id());
    let returned = acknowledged(&peers, Kind::Return);
    peers.iter().for_each(|peer| drop(node.until_peer(peer.at, "up")));
    registry.asked(|request| request.method == "PUT");
    let opened = |status: &Value| breaker(&status["breakers"], nobody)["state"] == "open";
    until(|| {
        assert_eq!(get(at, "/").expect("it serves").status, 200);
        opened(&node.status()).then_some(())
    });
    let known = |state: &Document| state.sections.get::<Vec<PeerRecord>>("peers").expect("of its shape");
    let running =
        until(|| saved(node.dir()).filter(|state| known(state).is_some_and(|peers| peers.len() == 2)));

    let mut kept = Connection::open(at).expect("it serves");
    kept.send("GET", "/", "").expect("it reads");
    assert_eq!(kept.answer().expect("an answer").status, 200);
    let mut held = Connection::open(at).expect("it serves");
    held.send("GET", "/hold", "").expect("it reads");
    upstream.until_held(1);
    // It is at the upstream: it must be counted by now.
    let serving = node.status();
    let drivers = threads(pid).iter().filter(|name| *name == "shutdown-driver").count();

    let signalled = unix_ms();
    node.process.signal(Signal::TERM);
    let left = acknowledged(&peers, Kind::Leaving);
    let draining = status_until(node.admin, |status| status["requests"]["refusing"] == true);
    let refused = TcpStream::connect(at).expect_err("its listener is closed").kind();
    let kept = kept.send("GET", "/", "").and_then(|()| kept.answer()).map_err(|error| error.to_string());
    upstream.release();
    let held = held.answer().map_err(|error| error.to_string());
    let code = node.process.exit_code(PATIENCE);
    let ended = unix_ms();
    let (report, log) = (read_report(&node.dir().join("data")), node.process.stderr());
    let state = saved(node.dir()).expect("it was saved");

    let mut node = start(node.into_dir());
    let status = node.status();
    let returned_again = acknowledged(&peers, Kind::Return);
    let registered = || registry.requests().iter().filter(|request| request.method == "PUT").count();
    until(|| (registered() == 2).then_some(()));
    node.process.signal(Signal::INT);
    acknowledged(&peers, Kind::Leaving);
    let again = Again {
        status,
        returned: returned_again,
        code: node.process.exit_code(PATIENCE),
        report: read_report(&node.dir().join("data")),
        shown: node.process.stdout(),
        log: node.process.stderr(),
    };
    let peers = peers.map(|peer| peer.at);
    let asked = registry.requests();
    Life {
        told,
        at,
        peers,
        nobody,
        returned,
        running,
        serving,
        drivers,
        pid,
        signalled,
        left,
        draining,
        kept,
        refused,
        held,
        code,
        ended,
        report,
        state,
        log,
        asked,
        again,
    }
}

/// The names of a process's threads.
fn threads(pid: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let names = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.map(|name| name.trim().to_owned()).collect()
}

/// A node on a network of its own from its announcement to its end, as a neighbour there saw it.
struct Air {
    /// Where it served.
    at: SocketAddr,
    packets: Vec<Packet>,
    /// By our own checks of what passed, over IPv4 and over IPv6.
    seen: [Result<Seen, Vec<String>>; 2],
    /// What tshark read of the goodbyes.
    tshark: Vec<Vec<String>>,
    signalled_ms: f64,
    code: i32,
    report: Value,
}

const ON_AIR: &str = "edge-air";

fn air() -> &'static Air {
    static AIR: LazyLock<Air> = LazyLock::new(|| {
        let (net, dir) = (Net::of(2, 1), temporary());
        let (ours, theirs) = (net.host(0), net.host(1));
        let capture = theirs.capture("eth0", dir.path());
        let mut command = EdgeProxy::command_at(dir.path(), SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
        command.args(["--database", "off", "--cache", "off", "--mdns", "eth0", "--node-id", ON_AIR]);
        let mut process = Process::start(&mut ours.wrap(&command));
        let at = process.address("  traffic ");
        capture.until(|packets| is_announced(packets, ours, 0, ON_AIR));
        let signalled_ms = now_ms();
        process.signal(Signal::TERM);
        let code = process.exit_code(PATIENCE);
        // Whoever says goodbye over both families has said it by now; the capture is behind by moments.
        let begin = Stopwatch::start();
        let said = |packets: &[Packet]| {
            [true, false].iter().all(|v4| !goodbyes_for(packets, ON_AIR, *v4).is_empty())
        };
        while !said(&capture.packets()) && begin.elapsed() < Duration::from_secs(2) {
            thread::park_timeout(Duration::from_millis(10));
        }
        let packets = capture.packets();
        let seen = [true, false].map(|v4| check(&packets, &ours.addresses(0), v4, ON_AIR));
        let report = read_report(&dir.path().join("data"));
        Air { at, packets, seen, tshark: read_by_tshark(&capture), signalled_ms, code, report }
    });
    &AIR
}

/// A life under strace: its calls that open, bind, rename, end and set a signal's action, in their order.
struct Traced {
    calls: Vec<String>,
    state: Document,
}

impl Traced {
    /// Where the first call is that has these words.
    fn first(&self, words: &[&str]) -> usize {
        let is_it = |call: &String| words.iter().all(|word| call.contains(word));
        self.calls.iter().position(is_it).unwrap_or_else(|| panic!("no {words:?} in {:#?}", self.calls))
    }

    /// Where the last one is.
    fn last(&self, words: &[&str]) -> usize {
        let is_it = |call: &String| words.iter().all(|word| call.contains(word));
        self.calls.iter().rposition(is_it).unwrap_or_else(|| panic!("no {words:?} in {:#?}", self.calls))
    }
}

fn traced() -> &'static Traced {
    static TRACED: LazyLock<Traced> = LazyLock::new(|| {
        let dir = temporary();
        let command = EdgeProxy::command(dir.path());
        let trace = dir.path().join("trace");
        // -D: it is the program that is our child, and strace that is somewhere else.
        let mut strace = Command::new("strace");
        strace.args([
            "-D",
            "-f",
            "-qq",
            "-s",
            "300",
            "-e",
            "trace=rt_sigaction,mkdir,mkdirat,bind,execve,/^rename,exit_group",
        ]);
        strace.arg("-o").arg(&trace).arg(command.get_program()).args(command.get_args());
        for (name, _) in command.get_envs() {
            strace.env_remove(name);
        }
        let mut process = Process::start(strace.current_dir(dir.path()));
        process.address("  admin ");
        process.signal(Signal::TERM);
        assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
        // strace holds stderr as well: it has ended, and its file is whole.
        process.stderr();
        let trace = fs::read_to_string(&trace).expect("strace has written it");
        let calls = trace.lines().map(str::to_owned).collect();
        Traced { calls, state: saved(dir.path()).expect("it was saved") }
    });
    &TRACED
}

// The eighteen parts.

/// `listen_for_shutdown`, in the system we come from a task that ran some time later.
#[test]
fn item_01_stop_signals_are_listened_for_before_the_program_touches_anything() {
    let traced = traced();
    let handled =
        ["SIGTERM", "SIGINT"].map(|name| traced.first(&[&format!("rt_sigaction({name}, {{sa_handler=0x")]));
    let touched = traced
        .calls
        .iter()
        .position(|call| [" mkdir", " bind(", " rename"].iter().any(|it| call.contains(it)));
    let touched = touched.expect("it has listeners and a directory");
    assert!(handled.iter().all(|at| *at < touched), "{:#?}", traced.calls);
}

#[test]
fn item_02_a_sigterm_is_the_reason_of_a_shutdown_with_who_sent_it() {
    let reason = &life().report["reason"];
    assert_eq!((&reason["kind"], &reason["signal"]), (&"signal".into(), &"SIGTERM".into()), "{reason}");
    assert_eq!(reason["pid"], std::process::id());
    assert!(life().log.contains("SIGTERM"), "{}", life().log);
}

#[test]
fn item_03_a_sigint_is_the_reason_of_a_shutdown_with_who_sent_it() {
    let reason = &life().again.report["reason"];
    assert_eq!((&reason["kind"], &reason["signal"]), (&"signal".into(), &"SIGINT".into()), "{reason}");
    assert_eq!(reason["pid"], std::process::id());
    assert!(life().again.log.contains("SIGINT"), "{}", life().again.log);
}

/// A coordinator that keeps its state in `dir`, and its shutdown as a task.
fn coordinator(dir: &Path) -> (ShutdownCoordinator, JoinHandle<Arc<ShutdownReport>>) {
    let builder = ShutdownCoordinator::builder().state(StateStore::in_dir(dir.join("data")).node_id("seed"));
    let (shutdown, driver) = builder.build().expect("the plan holds");
    (shutdown, tokio::spawn(driver.run()))
}

/// `update_state`: nobody has to call it for what the program's own parts know; what else is to be kept goes in by it.
#[tokio::test]
async fn item_04_what_is_learned_goes_into_the_state_and_so_does_what_the_program_puts_there() {
    let known: Vec<PeerRecord> =
        life().running.sections.get("peers").expect("of its shape").expect("a section");
    let known: BTreeSet<_> = known.into_iter().filter_map(|peer| peer.addr).collect();
    assert_eq!(known, life().peers.iter().map(ToString::to_string).collect());
    assert_eq!(life().running.shutdown_at, None, "that was before any stop");

    let dir = temporary();
    let (shutdown, run) = coordinator(dir.path());
    shutdown.update_state(|sections| sections.set("jobs", &7)).expect("it is open").expect("JSON");
    shutdown.initiate_shutdown(Reason::requested("a test"));
    run.await.expect("no panic");
    assert_eq!(saved(dir.path()).expect("saved").sections.get::<u64>("jobs").expect("a number"), Some(7));
    shutdown.update_state(|_| ()).expect_err("what comes after the last save would be lost");
}

/// `load_state`: the real program is asked for what it did with it, and the coordinator for what there was.
#[tokio::test]
async fn item_05_a_start_loads_what_the_run_before_has_left() {
    let line = life().again.log.lines().find(|line| line.contains("state: from ")).expect("it says so");
    assert!(
        line.contains("restored=\"breakers,peers\"") || line.contains("restored=breakers,peers"),
        "{line}"
    );
    let incarnation = |notices: &[Notice]| notices.iter().map(|notice| notice.incarnation).max();
    assert_eq!(incarnation(&life().returned), Some(life().state.incarnation));
    assert!(
        incarnation(&life().again.returned) > incarnation(&life().returned),
        "it knows that it is a later run"
    );

    let dir = temporary();
    // A directory is one store's: this one is dropped.
    let before = StateStore::in_dir(dir.path().join("data"));
    assert_eq!(before.open().expect("a place").found, Found::Nothing);
    before.update(|sections| sections.set("jobs", &7)).expect("it is open").expect("JSON");
    before.save().expect("a place");
    drop(before);
    let (shutdown, _run) = coordinator(dir.path());
    let loaded = shutdown.load_state().expect("a place").expect("it was saved");
    assert_eq!(loaded.sections.get::<u64>("jobs").expect("a number"), Some(7));
}

/// `save_state`.
#[tokio::test]
async fn item_06_the_state_is_saved_by_a_stop_and_whenever_it_is_asked_for() {
    let Life { state, signalled, ended, report, .. } = life();
    assert!((*signalled..=*ended).contains(&state.saved_at) && state.clean, "{state:?}");
    assert_eq!(task(report, "state")["outcome"], "ok");

    let dir = temporary();
    let (shutdown, _run) = coordinator(dir.path());
    for jobs in [1, 2] {
        shutdown.update_state(|sections| sections.set("jobs", &jobs)).expect("it is open").expect("JSON");
        shutdown.save_state().expect("a place");
        assert_eq!(saved(dir.path()).expect("saved").sections.get("jobs").expect("a number"), Some(jobs));
    }
}

#[test]
fn item_07_the_peers_are_in_the_state_after_a_stop() {
    let peers: Vec<PeerRecord> =
        life().state.sections.get("peers").expect("of its shape").expect("a section");
    for at in life().peers {
        let peer = peers.iter().find(|peer| peer.addr == Some(at.to_string()));
        let peer = peer.unwrap_or_else(|| panic!("{at} is not in {peers:?}"));
        let id: String = Id::of(&name(at)).to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(peer.node.as_ref(), Some(&id), "and who it is");
        assert!(peer.last_seen.is_some(), "{peer:?}");
    }
    assert_eq!(peers.len(), 2, "{peers:?}");
}

#[test]
fn item_08_the_state_says_when_the_shutdown_began() {
    let Life { state, signalled, ended, .. } = life();
    let at = state.shutdown_at.expect("it was shut down");
    assert!((*signalled..=*ended).contains(&at), "{signalled} {at} {ended}");
}

#[test]
fn item_09_the_circuit_breakers_are_in_the_state_after_a_stop() {
    let breakers: Value = life().state.sections.get("breakers").expect("of its shape").expect("a section");
    let open = breaker(&breakers, life().nobody);
    assert_eq!(open["state"], "open", "{breakers:#}");
    // It does not begin anew: what was left of its sleep is in it.
    assert!(open["remaining_open_ms"].as_u64().is_some_and(|left| (1..300_000).contains(&left)), "{open}");
}

/// `set_peer_registry`: who makes the stage's task gives it the registry, and that holds whom the operator has named.
#[test]
fn item_10_whoever_is_configured_as_a_peer_is_told_and_nobody_else() {
    let notes = task(&life().report, "peer notices")["notes"].as_array().expect("a list");
    let told: BTreeSet<_> =
        notes.iter().filter_map(|note| note["subject"].as_str()?.split(' ').next()).collect();
    let peers = life().peers.map(|at| at.to_string());
    assert_eq!(told, peers.iter().map(String::as_str).collect());

    let dir = temporary();
    let planned = |peers: &[SocketAddr]| {
        let mut process = Process::start(Node::command(dir.path(), place(), &[], peers).arg("--check"));
        assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
        process.stdout().contains("peer notices")
    };
    assert!(planned(&[place()]) && !planned(&[]), "without peers there is nobody to tell");
}

/// `set_local_port`: told to listen on any port, it tells the others the one it got.
#[test]
fn item_11_everybody_is_told_the_port_that_it_really_listens_on() {
    let Life { told, at, returned, left, asked, .. } = life();
    assert!(told.port() == 0 && at.port() != 0);
    assert_eq!(returned.len() + left.len(), 4);
    assert!(returned.iter().chain(left).all(|notice| notice.endpoints == [*at]), "{returned:?} {left:?}");
    let put = asked.iter().find(|asked| asked.method == "PUT").expect("it registers");
    assert!(put.body.contains(&at.to_string()), "{put:?}");
    let read = air().packets.iter().filter_map(|packet| Message::read(&packet.payload).ok());
    let ports: BTreeSet<_> = read
        .flat_map(|message| message.answers)
        .filter_map(|record| if let Data::Srv { port, .. } = record.data { Some(port) } else { None })
        .collect();
    assert_eq!(ports, BTreeSet::from([air().at.port()]), "announced and taken back");
    assert_ne!(air().at.port(), 0);
}

#[test]
fn item_12_a_stop_takes_back_over_mdns_what_was_announced_by_the_book() {
    let Air { seen, signalled_ms, code, report, .. } = air();
    for seen in seen {
        let seen = seen.as_ref().unwrap_or_else(|broken| panic!("{broken:#?}"));
        assert!(!seen.announced.is_empty() && !seen.goodbyes.is_empty(), "{seen:?}");
        assert!(seen.goodbyes.iter().all(|at| at >= signalled_ms), "{seen:?}");
    }
    let notes = task(report, "mdns")["notes"].as_array().expect("a list");
    let noted: BTreeSet<_> =
        notes.iter().map(|note| (note["subject"].as_str(), note["outcome"].as_str())).collect();
    let observed = ["eth0 IPv4", "eth0 IPv6"].map(|subject| (Some(subject), Some("observed")));
    assert_eq!((noted, *code), (observed.into(), 0), "{report:#}");
}

#[test]
fn item_13_a_stop_tells_every_peer_by_udp_and_each_acknowledges() {
    let Life { peers, told, left, returned, report, .. } = life();
    assert_eq!(left.len(), peers.len());
    for (left, returned) in left.iter().zip(returned) {
        assert_eq!((left.kind, left.why, left.node), (Kind::Leaving, Why::Term, Id::of(&name(*told))));
        assert_eq!(left.incarnation, returned.incarnation, "it is this run that ends");
    }
    let notices = task(report, "peer notices");
    let notes = notices["notes"].as_array().expect("a list");
    assert!(notes.iter().all(|note| note["outcome"] == "acknowledged"), "{notices:#}");
    assert_eq!((notes.len(), &notices["outcome"]), (2, &"ok".into()));
}

/// `deregister_from_shuttle`, which removed a file: a registry is asked over HTTP.
#[test]
fn item_14_a_stop_takes_the_node_out_of_its_registry() {
    let Life { told, asked, signalled, ended, report, .. } = life();
    let path = format!("/{}", name(*told));
    assert!(asked.iter().all(|asked| asked.path == path), "{asked:?}");
    let methods: Vec<_> = asked.iter().map(|asked| asked.method.as_str()).collect();
    assert_eq!(methods, ["PUT", "DELETE", "PUT", "DELETE"], "in, out, and the second life");
    assert!((*signalled..=*ended).contains(&asked[1].at_ms), "{asked:?}");
    assert_eq!(task(report, "registry")["outcome"], "ok");
}

/// `request_start`.
#[test]
fn item_15_a_request_is_counted_while_it_is_served() {
    let serving = &life().serving;
    assert_eq!(serving["requests"]["active"], 1, "{serving:#}");
    assert_eq!(serving["oldest_in_flight"]["route"], "GET /hold");
    assert_eq!(life().again.status["requests"]["active"], 0, "control: nobody has asked for anything");
}

#[test]
fn item_16_the_drain_waits_for_the_request_under_way() {
    let Life { draining, report, .. } = life();
    assert_eq!((&draining["phase"], &draining["requests"]["active"]), (&"draining".into(), &1.into()));
    // By then nothing else was waited for.
    assert_eq!(
        (&report["requests"]["drained"], &report["requests"]["cut"]),
        (&1.into(), &0.into()),
        "{report:#}"
    );
    let waited = draining["shutting_down_for_ms"].as_f64().expect("a time");
    assert!(report["duration_ms"].as_f64().is_some_and(|took| took >= waited), "{waited} {report:#}");
}

/// `ShutdownAware`, constructed by a real program, which asks it when to say goodbye.
#[test]
fn item_17_a_service_that_is_wrapped_knows_when_it_is_shutting_down() {
    let mut command = Command::new(binary("tower-lines"));
    // Longer than the test: it is still in it when the client speaks again.
    command.env("TOWER_LINES_LISTEN", "127.0.0.1:0").env("SHUTDOWN_LAME_DUCK", "10s");
    let mut process = Process::start(&mut command);
    let mut stream = TcpStream::connect(process.address("listening on ")).expect("it serves");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut lines = BufReader::new(stream.try_clone().expect("a socket")).lines().map_while(Result::ok);
    stream.write_all(b"one\ntwo\n").expect("it reads");
    assert_eq!(
        (lines.next().as_deref(), lines.next().as_deref()),
        (Some("ONE"), Some("TWO")),
        "no goodbye yet"
    );
    process.signal(Signal::TERM);
    process.stderr_line(|line| line.contains("clients are asked to leave"));
    stream.write_all(b"three\n").expect("it reads");
    let rest: Vec<_> = lines.collect();
    assert_eq!(rest, ["THREE", "bye"]);
    process.signal(Signal::KILL);
    process.ended(PATIENCE);
}

#[tokio::test]
async fn item_18_a_request_is_tracked_until_it_ends_and_refused_once_the_service_stops() {
    let (shutdown, driver) = ShutdownCoordinator::builder().build().expect("the plan holds");
    let run = tokio::spawn(driver.run());
    let aware = ShutdownAware::new("a service", shutdown);
    let tracked = aware.track_request().expect("it runs");
    assert_eq!(shutdown.active_request_count(), 1);
    shutdown.initiate_shutdown(Reason::requested("a test"));
    while !shutdown.refuses_requests() {
        tokio::task::yield_now().await;
    }
    assert_eq!(aware.track_request().expect_err("too late"), ShuttingDown);
    assert!(!run.is_finished(), "it waits for the one that is tracked");
    drop(tracked);
    let report = run.await.expect("no panic");
    assert_eq!((report.requests.drained, report.requests.refused), (1, 1));
}

// The eight checks.

#[test]
fn t1_a_sigterm_is_a_whole_graceful_shutdown() {
    let Life { report, code, log, .. } = life();
    assert_eq!(
        (*code, &report["exit_code"], &report["urgency"]),
        (0, &0.into(), &"graceful".into()),
        "{report:#}"
    );
    assert!(phases(report).ends_with(&["draining", "closing"]), "{report:#}");
    let stages = report["stages"].as_array().expect("a list");
    assert!(!stages.is_empty() && stages.iter().all(|stage| stage["outcome"] == "ok"), "{report:#}");
    assert!(
        log.contains("initiating graceful shutdown") && log.contains("Graceful shutdown completed"),
        "{log}"
    );
}

#[test]
fn t2_a_request_under_way_is_answered_in_full() {
    let held = life().held.as_ref().expect("an answer");
    assert_eq!((held.status, &held.body[..]), (200, &b"up"[..]), "{held:?}");
    assert_eq!(held.header("connection"), Some("close"), "and its client is asked to leave");
}

#[test]
fn t3_the_goodbye_is_read_by_tshark_over_both_families() {
    let at = goodbyes_read_by_tshark(&air().tshark);
    println!("ms after SIGTERM, IPv4 and IPv6: {:.1?}", at.map(|at| at - air().signalled_ms));
    assert!(at.iter().all(|at| *at >= air().signalled_ms), "{at:?}");
}

#[test]
fn t4_a_second_process_hears_the_notice_and_acts_on_it() {
    let [own, theirs] = [Upstream::start(), Upstream::start()];
    [&own, &theirs].into_iter().for_each(Upstream::release);
    let [stays, goes] = [place(), place()];
    let second = Node::start(stays, &[&own], &[goes]);
    let dir = temporary();
    let mut command = Node::command(dir.path(), goes, &[&theirs], &[stays]);
    // It leaves, and takes what comes for longer than the test.
    command.env("SHUTDOWN_LAME_DUCK", "20s").env("SHUTDOWN_TOTAL_TIMEOUT", "40s");
    let first = Node::run(command, dir);
    second.until_peer(goes, "up");
    let ask =
        |count: usize| (0..count).map(|_| get(stays, "/").expect("an answer").status).collect::<Vec<_>>();
    assert_eq!(ask(20), [200; 20]);
    assert_eq!((own.count(), theirs.count()), (10, 10), "control: half of them went there");
    first.process.signal(Signal::TERM);
    second.until_peer(goes, "draining");
    assert_eq!(ask(20), [200; 20]);
    assert_eq!((own.count(), theirs.count()), (30, 10), "it is sent nothing more");
    // Not because it could not be reached.
    assert_eq!(first.status()["phase"], "lame_duck");
    assert_eq!(get(goes, "/").expect("it serves").status, 200);
}

#[test]
fn t5_the_state_of_the_shutdown_is_on_disk_before_the_process_exits() {
    let traced = traced();
    let signalled = traced.first(&["--- SIGTERM "]);
    let replaced = traced.last(&[" rename", "/state.json\""]);
    let exit = traced.first(&[" exit_group("]);
    assert!(signalled < replaced && replaced < exit, "{:#?}", traced.calls);
    assert!(traced.state.clean && traced.state.shutdown_at.is_some(), "{:?}", traced.state);
}

#[test]
fn t6_peers_and_breakers_are_restored_at_the_next_start() {
    let Life { nobody, peers, again, .. } = life();
    let open = breaker(&again.status["breakers"], *nobody);
    assert_eq!(open["state"], "open", "{:#}", again.status);
    for at in peers {
        let peer = peer_in(&again.status, *at);
        // Who was there is known by name, and is believed again once it answers.
        assert_eq!((&peer["node"], &peer["state"]), (&name(*at).into(), &"unverified".into()), "{peer}");
        assert!(peer["last_seen"].as_u64() > Some(0), "{peer}");
    }
    assert!(
        again.log.contains("peers restored") && again.log.contains("circuit breakers restored"),
        "{}",
        again.log
    );
}

#[test]
fn t7_a_new_request_in_the_drain_is_refused_with_503_on_a_kept_connection_and_no_new_one_is_taken() {
    let Life { kept, refused, report, .. } = life();
    let kept = kept.as_ref().expect("an answer, be it a refusal");
    assert_eq!(
        (kept.status, kept.header("retry-after"), kept.header("connection")),
        (503, Some("1"), Some("close"))
    );
    assert_eq!(*refused, ErrorKind::ConnectionRefused);
    assert_eq!(report["requests"]["refused"], 1, "{report:#}");
}

/// In every run with 300 ms; in a long one also with what is set where nobody sets anything: 30 s for the drain, in 28 s for
/// all of it.
#[test]
fn t8_the_drains_limit_is_held_and_what_is_cut_is_named() {
    let defaults = ShutdownConfig::default();
    assert_eq!((defaults.graceful, defaults.total), (Duration::from_secs(30), Duration::from_secs(28)));
    let short: &[(&str, &str)] = &[("SHUTDOWN_GRACEFUL_TIMEOUT", "300ms")];
    // The default total keeps 1.1 s for what comes after the drain.
    let runs = [(short, Duration::from_millis(300)), (&[], Duration::from_millis(26_900))];
    for (env, limit) in &runs[..if is_long() { 2 } else { 1 }] {
        let mut proxy = EdgeProxy::start(env.iter().copied());
        let mut stuck = Connection::open(proxy.listen).expect("it serves");
        stuck.send("GET", "/never", "").expect("it reads");
        status_until(proxy.admin, |status| status["requests"]["active"] == 1);
        let begin = Stopwatch::start();
        proxy.process.signal(Signal::TERM);
        assert_eq!(proxy.process.exit_code(PATIENCE), 11, "{}", proxy.process.stderr());
        let took = begin.elapsed();
        println!("a limit of {limit:?}: gone after {took:?}");
        assert!(took.abs_diff(*limit) <= TOLERANCE, "{took:?}");
        let requests = &proxy.report()["requests"];
        assert_eq!(
            (&requests["cut"], &requests["cut_requests"][0]["route"]),
            (&1.into(), &"GET /never".into())
        );
    }
}

// The six intentions.

#[test]
fn extra_a_the_state_is_saved_at_its_interval_without_anybody_asking() {
    let dir = temporary();
    let process = Process::start(EdgeProxy::command(dir.path()).args(["--state-interval", "1s"]));
    let admin = process.address("  admin ");
    // The first is at the start.
    let saved_at = |saves: u64| {
        let status = status_until(admin, |status| status["state"]["saves"].as_u64() >= Some(saves));
        let state = saved(dir.path()).expect("it was saved");
        assert!(Some(state.saved_at) >= status["state"]["saved_at"].as_u64(), "{state:?}");
        assert_eq!(state.shutdown_at, None);
        state.saved_at
    };
    let (second, third) = (saved_at(2), saved_at(3));
    assert!(third - second >= 800, "{second} {third}");

    let mut process = Process::start(EdgeProxy::command(dir.path()).arg("--check"));
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
    let shown = process.stdout();
    let interval = shown.lines().find(|line| line.contains("state-interval")).expect("it is shown");
    assert!(INTERVAL == Duration::from_secs(60) && interval.contains("60s"), "{interval}");
}

#[test]
fn extra_b_a_start_says_when_the_shutdown_was_whose_state_it_restores() {
    let Life { state, again, .. } = life();
    let shutdown_at = state.shutdown_at.expect("it was shut down");
    let line = again.log.lines().find(|line| line.contains("state: from ")).expect("it says so");
    assert!(line.contains(&format!("shutdown_at={shutdown_at}")), "{line}");
    let shown = again.shown.lines().find(|line| line.contains("  state ")).expect("and shows it");
    assert!(shown.contains("after a shutdown that began at 20"), "{shown}");
}

#[test]
fn extra_c_a_sigint_takes_the_way_of_a_sigterm() {
    let Life { report, again, .. } = life();
    assert_eq!(tasks(report), tasks(&again.report));
    assert_eq!(
        tasks(report),
        ["departure: registry", "departure: peer notices", "persist: state"],
        "control: there is something to compare"
    );
    assert_eq!(phases(report), phases(&again.report));
    assert_eq!(
        (again.code, &again.report["exit_code"], &again.report["urgency"]),
        (0, &0.into(), &"graceful".into())
    );
}

/// All is set up in `main`, before the first service: a database that does not answer keeps the services from starting, and
/// a stop is already the whole shutdown.
#[test]
fn extra_d_a_stop_before_anything_is_served_is_a_quick_exit_or_a_whole_shutdown() {
    // As soon as a handler stands.
    let dir = temporary();
    let mut process = Process::start(&mut EdgeProxy::command(dir.path()));
    until(|| handles_term(process.id()).then_some(()));
    process.signal(Signal::TERM);
    let code = process.exit_code(PATIENCE);
    let data = dir.path().join("data");
    match code {
        143 => assert!(!data.exists(), "it left at once, yet it wrote"),
        _ => assert_eq!((code, &read_report(&data)["exit_code"]), (0, &0.into()), "{}", process.stderr()),
    }
    println!("at the first handler: exit {code}");

    // Once the coordinator stands, while the database is waited for.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("postgres://nobody@{}/nothing", silent.local_addr().expect("bound"));
    let dir = temporary();
    let mut process = Process::start(EdgeProxy::command(dir.path()).args(["--database", &url]));
    process.stderr_line(|line| line.contains("state: none yet"));
    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
    assert!(!process.stdout().contains("  traffic "), "{}", process.stdout());
    let report = read_report(&dir.path().join("data"));
    assert_eq!(report["reason"]["signal"], "SIGTERM");
    assert!(saved(dir.path()).expect("it was saved").clean);
}

/// Whether a process has a handler for TERM (proc(5): the mask of what is caught).
fn handles_term(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("a mask");
    u64::from_str_radix(mask.trim(), 16).expect("hexadecimal") >> 14 & 1 == 1
}

/// The coordinator is given to the services and not made by them: there is one, and no second can be installed.
#[test]
fn extra_e_there_is_one_coordinator_a_process() {
    const INSIDE: &str = "SEED_003_INSTALLS_TWICE";
    if std::env::var_os(INSIDE).is_some() {
        let first = ShutdownCoordinator::builder().install().expect("the first");
        let second = ShutdownCoordinator::builder().install().expect_err("the second");
        assert!(matches!(second, InstallError::AlreadyInstalled(_)), "{second:?}");
        println!("refused: {second}");
        first.initiate_shutdown(Reason::requested("a test"));
        first.wait().exit();
    }
    assert_eq!(life().drivers, 1, "in process {}, with a proxy, admin routes and stage tasks", life().pid);
    let this = std::env::current_exe().expect("a program knows its own path");
    let mut command = Command::new(this);
    command.args(["--exact", "extra_e_there_is_one_coordinator_a_process", "--nocapture"]).env(INSIDE, "1");
    let mut process = Process::start(&mut command);
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
    let said = process.stdout();
    assert!(said.contains("refused: a shutdown coordinator is already installed in this process"), "{said}");
}

/// `ServiceShuttingDown`.
#[tokio::test]
async fn extra_f_a_refusal_is_a_type_of_its_own_with_a_sentence() {
    let (shutdown, driver) = ShutdownCoordinator::builder().build().expect("the plan holds");
    let run = tokio::spawn(driver.run());
    shutdown.initiate_shutdown(Reason::requested("a test"));
    run.await.expect("no panic");
    let refused: ShuttingDown = shutdown.request_start().map(drop).expect_err("too late");
    let refused: Box<dyn Error> = refused.into();
    assert!(refused.is::<ShuttingDown>());
    assert_eq!(refused.to_string(), "the service is shutting down");
}
