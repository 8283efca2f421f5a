//! The edge proxy on the link: what judges see of its goodbye, and what proxies that find one another make of it.
//!
//! Hosts are network namespaces; nothing is heard on the machine's networks.

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_tests::PATIENCE;
use shutdown_tests::judges::{Avahi, Zeroconf, checked, judge, now_ms};
use shutdown_tests::mdns_wire::{goodbyes_for, is_announced};
use shutdown_tests::netns::{Host, Net};
use shutdown_tests::process::{EdgeProxy, Process, Stopwatch, read_report};

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// An edge proxy that is advertised on `eth0` of a host and serves there on all addresses.
fn command_at(host: &Host, port: u16, dir: &Path, id: &str, flags: &[&str]) -> Command {
    let mut command = EdgeProxy::command_at(dir, ([0, 0, 0, 0], port).into());
    host.wrap(command.args(["--node-id", id, "--mdns", "eth0"]).args(flags))
}

fn command(host: &Host, dir: &Path, id: &str, flags: &[&str]) -> Command {
    command_at(host, 8080, dir, id, flags)
}

/// One that runs.
struct Edge<'a> {
    process: Process,
    host: &'a Host,
    dir: tempfile::TempDir,
    admin: String,
}

impl<'a> Edge<'a> {
    fn start(host: &'a Host, id: &str, flags: &[&str]) -> Self {
        Self::start_at(host, 8080, id, flags)
    }

    fn start_at(host: &'a Host, port: u16, id: &str, flags: &[&str]) -> Self {
        let dir = temporary();
        let process = Process::start(&mut command_at(host, port, dir.path(), id, flags));
        let admin = process.address("  admin ").to_string();
        Self { process, host, dir, admin }
    }

    fn status(&self) -> Value {
        serde_json::from_str(&get(self.host, &format!("http://{}/status", self.admin), 1)).expect("JSON")
    }

    /// Waits until its status is so.
    fn until(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let begin = Stopwatch::start();
        loop {
            let status = self.status();
            if wanted(&status) {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "never so: {status:#}");
        }
    }

    /// Waits until it is announced and has found so many peers that may be sent requests.
    fn until_found(&self, peers: usize) -> Value {
        self.until(|status| {
            let routable =
                status["peers"].as_array().into_iter().flatten().filter(|peer| peer["routable"] == true);
            status["mdns"]["state"] == "announced" && routable.count() == peers
        })
    }

    fn report(&self) -> Value {
        read_report(&self.dir.path().join("data"))
    }
}

/// What comes back from this URL, asked so often on a host.
fn get(host: &Host, url: &str, times: usize) -> String {
    const ASK: &str = "import sys, urllib.request\nfor _ in range(int(sys.argv[2])): \
                       print(urllib.request.urlopen(sys.argv[1], timeout=30).read().decode())";
    let mut python = host.command("/usr/bin/python3");
    let output = python.args(["-c", ASK, url, &times.to_string()]).output().expect("python runs");
    assert!(output.status.success(), "{url}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The notes of a task of stage Departure.
fn notes<'a>(report: &'a Value, task: &str) -> &'a Vec<Value> {
    let stages = report["stages"].as_array().expect("stages");
    let departure = stages.iter().find(|stage| stage["stage"] == "departure").expect("it ran");
    let tasks = departure["tasks"].as_array().expect("tasks");
    let task = tasks.iter().find(|one| one["name"] == task).expect("its task");
    assert_eq!(task["outcome"], "ok", "{task}");
    task["notes"].as_array().expect("notes")
}

#[test]
fn three_judges_see_the_proxys_goodbye_on_the_named_interface_over_both_families() {
    let (net, dir) = (Net::of(2, 2), temporary());
    let mut command = command(net.host(0), dir.path(), "edge-1", &[]);
    let mut judged = judge(&net, dir.path(), &mut command, "edge-1");
    assert_eq!(judged.process.exit_code(PATIENCE), 0, "{}", judged.process.stderr());
    let report = read_report(&dir.path().join("data"));
    let notes = notes(&report, "mdns");
    println!("{}our own ears {notes:?}", judged.table);
    for text in ["8080 ", "node_id=edge-1", "cluster=default", "inc=1", "ver=0."] {
        assert!(judged.known.contains(text), "no {text} in {}", judged.known);
    }
    assert_eq!(notes.len(), 2);
    assert!(notes.iter().all(|note| note["outcome"] == "observed"), "{notes:?}");
    let warnings: Vec<_> = judged.seen.iter().flat_map(|seen| &seen.warnings).collect();
    assert!(warnings.is_empty(), "{warnings:?}");
}

#[test]
fn a_proxy_that_is_killed_says_no_goodbye_and_the_judges_keep_it() {
    let (net, dir) = (Net::of(2, 1), temporary());
    let theirs = net.host(1);
    let capture = theirs.capture("eth0", dir.path());
    let (zeroconf, avahi) = (Zeroconf::start(theirs, &[0]), Avahi::browser(theirs, dir.path()));
    let mut killed = Process::start(&mut command(net.host(0), dir.path(), "killed", &[]));
    zeroconf.added("killed");
    avahi.shows("+", "eth0", "IPv4", "killed");
    killed.signal(Signal::KILL);
    killed.ended(PATIENCE);
    // Another one, on the same port, goes as it should: what the judges make of a kill they have made by then.
    let dir_of_the_next = temporary();
    let mut next = Process::start(&mut command(net.host(0), dir_of_the_next.path(), "next", &[]));
    zeroconf.added("next");
    avahi.shows("+", "eth0", "IPv4", "next");
    next.signal(Signal::TERM);
    zeroconf.removed("next");
    avahi.shows("-", "eth0", "IPv4", "next");
    assert_eq!(next.exit_code(PATIENCE), 0);
    assert_eq!((zeroconf.count("-", "killed"), avahi.count("-", "eth0", "IPv4", "killed")), (0, 0));
    let packets = capture.packets();
    assert_eq!(goodbyes_for(&packets, "killed", true).len(), 0);
    assert_eq!(goodbyes_for(&packets, "next", true).len(), 1);
    assert!(zeroconf.ask("killed").starts_with("8080 "), "the judges keep it");
}

#[test]
fn two_proxies_and_an_avahi_share_a_host() {
    let (net, dir) = (Net::of(2, 1), temporary());
    let (ours, theirs) = (net.host(0), net.host(1));
    let capture = theirs.capture("eth0", dir.path());
    let _avahi = Avahi::publisher(ours, dir.path());
    let zeroconf = Zeroconf::start(theirs, &[0]);
    let mut leaves = Edge::start(ours, "leaves", &[]);
    let mut stays = Edge::start_at(ours, 8090, "stays", &[]);
    zeroconf.added("leaves");
    zeroconf.added("stays");
    capture.until(|packets| is_announced(packets, ours, 0, "leaves"));
    leaves.process.signal(Signal::TERM);
    zeroconf.removed("leaves");
    assert_eq!(leaves.process.exit_code(PATIENCE), 0);
    assert!(zeroconf.ask("stays").contains("node_id=stays"));
    assert_eq!(zeroconf.count("-", "stays"), 0);
    checked(&capture, ours, 0, "leaves");
    stays.process.signal(Signal::TERM);
    zeroconf.removed("stays");
    assert_eq!(stays.process.exit_code(PATIENCE), 0);
}

#[test]
fn proxies_that_find_one_another_share_requests_until_one_says_goodbye() {
    let net = Net::of(2, 1);
    let mut one = Edge::start(net.host(0), "one", &[]);
    let two = Edge::start(net.host(1), "two", &[]);
    one.until_found(1);
    let found = two.until_found(1);
    assert_eq!(found["peers"][0]["name"], "one", "{found:#}");
    assert_eq!(found["notices"], Value::Null);
    let at_two = format!("http://{}:8080/", net.host(1).addresses(0)[0]);
    // Two upstreams of its own, and the peer: every third.
    get(net.host(1), &at_two, 30);
    let started = |edge: &Edge<'_>| edge.status()["requests"]["started"].as_u64().expect("a count");
    assert_eq!(started(&one), 10);
    let signal = now_ms();
    one.process.signal(Signal::TERM);
    two.until(|status| status["peers"][0]["routable"] == false);
    let (seen, gone) = (now_ms() - signal, two.status());
    println!(
        "the other proxy's status has it gone {seen:.0} ms after SIGTERM, asked by a new process each time"
    );
    assert_eq!(gone["peers"][0]["state"], "departed", "{gone:#}");
    assert_eq!(one.process.exit_code(PATIENCE), 0, "{}", one.process.stderr());
    get(net.host(1), &at_two, 30);
    assert!(notes(&one.report(), "mdns").iter().all(|note| note["outcome"] == "observed"));
    // Its next run has a higher incarnation, and is found again.
    let again = Process::start(&mut command(net.host(0), one.dir.path(), "one", &[]));
    two.until_found(1);
    drop(again);
}

#[test]
fn peers_that_mdns_has_found_are_told_by_notices_as_well() {
    let net = Net::of(2, 1);
    let keys = temporary();
    let file = keys.path().join("keys");
    std::fs::write(&file, "1:000102030405060708090a0b0c0d0e0f\n").expect("a temporary directory");
    let file = file.display().to_string();
    let flags = ["--notice-key-file", &file, "--notice-listen", "0.0.0.0:7946"];
    let mut one = Edge::start(net.host(0), "one", &flags);
    let two = Edge::start(net.host(1), "two", &flags);
    one.until_found(1);
    two.until_found(1);
    one.process.signal(Signal::TERM);
    assert_eq!(one.process.exit_code(PATIENCE), 0, "{}", one.process.stderr());
    let report = one.report();
    let told = notes(&report, "peer notices");
    assert_eq!(told.len(), 1);
    let subject = format!("{}:7946 (two)", net.host(1).addresses(0)[0]);
    assert_eq!((&told[0]["subject"], &told[0]["outcome"]), (&subject.into(), &"acknowledged".into()));
    let status = two.status();
    assert_eq!((&status["notices"]["received"], &status["peers"][0]["routable"]), (&1.into(), &false.into()));
    // Told again by its goodbye, it stays gone; and the next run comes back by its announcement.
    let again = Process::start(&mut command(net.host(0), one.dir.path(), "one", &flags));
    two.until_found(1);
    drop(again);
}

#[test]
fn an_interface_that_is_not_there_is_one_sentence_and_exit_code_1() {
    let net = Net::of(1, 1);
    let dir = temporary();
    let mut command = EdgeProxy::command(dir.path());
    let mut process = Process::start(&mut net.host(0).wrap(command.args(["--mdns", "eth7"])));
    assert_eq!(process.exit_code(PATIENCE), 1);
    let stderr = process.stderr();
    let sentence: Vec<_> = stderr.lines().filter(|line| line.starts_with("edge-proxy: error")).collect();
    assert_eq!(sentence.len(), 1, "{stderr}");
    assert!(sentence[0].contains("--mdns") && sentence[0].contains("eth7"), "{}", sentence[0]);
}
