//! What the neighbours see of a service over mDNS, by judges that share no code with us, in network namespaces.
//!
//! Needs root, iproute2, tcpdump, tshark, avahi, D-Bus and python-zeroconf. Nothing of it is heard on the machine's networks.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_mdns::wire::{Data, Goodbye, Message, Name};
use shutdown_tests::PATIENCE;
use shutdown_tests::judges::{Avahi, SERVICE, Zeroconf, checked, judge, now_ms};
use shutdown_tests::mdns_wire::{announcements, check, goodbyes_for, instance as name, is_announced};
use shutdown_tests::netns::{Capture, Host, Net, Packet};
use shutdown_tests::process::{Process, Stopwatch, binary};

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// A node on these interfaces of a host.
fn node(host: &Host, id: &str, interfaces: &[&str], flags: &[&str]) -> Command {
    let mut command = Command::new(binary("mdns-node"));
    command.args(["--node-id", id, "--listen", "127.0.0.1:8080"]);
    command.args(interfaces.iter().flat_map(|interface| ["--mdns", interface])).args(flags);
    host.wrap(&command)
}

/// Waits until a node has seen its own announcement there.
fn until_announced(node: &Process, on: &[&str]) {
    for subject in on {
        let begin = format!("announced {subject} as ");
        node.stdout_line(|line| line.starts_with(&begin));
    }
}

/// Stops a node and gives its report.
fn stop(node: &mut Process) -> Value {
    node.signal(Signal::TERM);
    ended(node)
}

/// The report of a node that has been told to stop.
fn ended(node: &mut Process) -> Value {
    assert_eq!(node.exit_code(PATIENCE), 0, "{}", node.stderr());
    let report = node.stdout_line(|line| line.starts_with("report "));
    serde_json::from_str(&report["report ".len()..]).expect("a report")
}

/// What a report notes of the withdrawal, by interface and family.
fn notes(report: &Value) -> BTreeMap<String, Value> {
    let departure =
        report["stages"].as_array().into_iter().flatten().find(|stage| stage["stage"] == "departure");
    let notes =
        departure.expect("the stage ran")["tasks"][0]["notes"].as_array().cloned().unwrap_or_default();
    notes.into_iter().map(|note| (note["subject"].as_str().unwrap_or_default().to_owned(), note)).collect()
}

/// A control on these interfaces of a host.
fn bare(host: &Host, interfaces: &[&str]) -> Process {
    Process::start_with_stdin(host.command(binary("mdns-bare")).args(interfaces))
}

/// Has a control do something.
fn does(bare: &Process, line: &str) {
    bare.say(line);
    let done = format!("done {line}");
    bare.stdout_line(|line| line == done);
}

#[test]
fn three_judges_see_the_goodbye_on_the_named_interface_over_both_families() {
    let (net, dir) = (Net::of(2, 2), temporary());
    let ours = net.host(0);
    let mut command = node(ours, "Edge-1", &["eth0"], &["--linger", "3000"]);
    let mut judged = judge(&net, dir.path(), &mut command, "edge-1");
    let report = ended(&mut judged.process);
    println!("{}our own ears {}", judged.table, report["stages"][0]["tasks"][0]["notes"]);
    // Whatever it listens on, it is reached by the interface's addresses, and no other's.
    let known = &judged.known;
    let [v4, v6] = ours.addresses(0).map(|address| address.to_string());
    assert!(known.starts_with("8080 ") && known.contains(&v4) && known.contains(&v6), "{known}");
    assert!(!known.contains(&ours.addresses(1)[0].to_string()), "another interface's: {known}");
    for text in ["txtvers=1", "node_id=Edge-1", "cluster=default", "inc=1", "ver=0."] {
        assert!(known.contains(text), "no {text} in {known}");
    }
    for seen in &judged.seen {
        // The first, and two that rode in the drain.
        assert_eq!((seen.goodbyes.len(), &seen.warnings[..]), (3, [].as_slice()));
    }
    for subject in ["eth0 IPv4", "eth0 IPv6"] {
        let note = &notes(&report)[subject];
        assert_eq!(note["outcome"], "observed", "{note}");
    }
    // The repeats never lengthen it.
    let drain = report["duration_ms"].as_f64().expect("a time");
    assert!((3000.0..3500.0).contains(&drain), "{drain}");
}

#[test]
fn who_is_killed_says_no_goodbye_and_who_is_idle_is_gone_with_its_first() {
    let (net, dir) = (Net::of(2, 1), temporary());
    let (ours, theirs) = (net.host(0), net.host(1));
    let capture = theirs.capture("eth0", dir.path());
    let (zeroconf, avahi) = (Zeroconf::start(theirs, &[0]), Avahi::browser(theirs, dir.path()));
    let mut killed = Process::start(&mut node(ours, "killed", &["eth0"], &[]));
    let mut idle = Process::start(&mut node(ours, "idle", &["eth0"], &[]));
    for (node, instance) in [(&killed, "killed"), (&idle, "idle")] {
        until_announced(node, &["eth0 IPv4", "eth0 IPv6"]);
        zeroconf.added(instance);
        avahi.shows("+", "eth0", "IPv4", instance);
        avahi.shows("+", "eth0", "IPv6", instance);
    }
    killed.signal(Signal::KILL);
    killed.ended(PATIENCE);
    // Whatever the judges would make of the kill they have made once they have seen the other go.
    let report = stop(&mut idle);
    assert!(report["duration_ms"].as_f64().expect("a time") < 900.0, "it waited for its repeats: {report}");
    zeroconf.removed("idle");
    for family in ["IPv4", "IPv6"] {
        avahi.shows("-", "eth0", family, "idle");
        assert_eq!(avahi.count("-", "eth0", family, "killed"), 0);
    }
    assert_eq!(zeroconf.count("-", "killed"), 0);
    let packets = capture.packets();
    for v4 in [true, false] {
        assert_eq!(goodbyes_for(&packets, "killed", v4).len(), 0);
        assert_eq!(goodbyes_for(&packets, "idle", v4).len(), 1);
    }
    assert!(zeroconf.ask("killed").starts_with("8080 "), "the judges keep it");
}

#[test]
fn two_nodes_and_an_avahi_share_a_host_and_only_who_leaves_is_gone() {
    let (net, dir) = (Net::of(2, 1), temporary());
    let (ours, theirs) = (net.host(0), net.host(1));
    let capture = theirs.capture("eth0", dir.path());
    let _avahi = Avahi::publisher(ours, dir.path());
    let zeroconf = Zeroconf::start(theirs, &[0]);
    let stays = Process::start(&mut node(ours, "stays", &["eth0"], &["--browse"]));
    let mut leaves = Process::start(&mut node(ours, "leaves", &["eth0"], &[]));
    for (node, instance) in [(&stays, "stays"), (&leaves, "leaves")] {
        until_announced(node, &["eth0 IPv4", "eth0 IPv6"]);
        zeroconf.added(instance);
    }
    stays.stdout_line(|line| line.contains(" found leaves "));
    capture.until(|packets| ["stays", "leaves"].iter().all(|it| is_announced(packets, ours, 0, it)));
    let report = stop(&mut leaves);
    assert!(notes(&report).values().all(|note| note["outcome"] == "observed"), "{report}");
    zeroconf.removed("leaves");
    stays.stdout_line(|line| line.contains(" gone leaves "));
    // The same addresses as before, which the other's goodbye took back for its own host name only.
    let known = zeroconf.ask("stays");
    assert!(ours.addresses(0).iter().all(|address| known.contains(&address.to_string())), "{known}");
    assert_eq!(zeroconf.count("-", "stays"), 0);
    checked(&capture, ours, 0, "leaves");
    checked(&capture, ours, 0, "stays");
}

/// The addresses in goodbyes over IPv4 for an instance: where they were seen, and what they take back.
fn taken_back(packets: &[Packet], instance: &str) -> Vec<IpAddr> {
    let all = goodbyes_for(packets, instance, true).into_iter().flat_map(|(_, message)| message.answers);
    all.filter_map(|record| match record.data {
        Data::A(address) => Some(address.into()),
        _ => None,
    })
    .collect()
}

#[test]
fn a_second_goodbye_never_carries_another_interfaces_address() {
    let (net, dir) = (Net::of(2, 2), temporary());
    let (ours, theirs) = (net.host(0), net.host(1));
    let captures = [0, 1].map(|network| theirs.capture(&format!("eth{network}"), dir.path()));
    // The control: mdns-sd's own second goodbyes all leave by one interface.
    let control = bare(ours, &["eth0", "eth1"]);
    does(&control, "register bare barehost 8080");
    for capture in &captures {
        capture.until(|packets| !goodbyes_or_announced(packets, "bare").is_empty());
    }
    does(&control, "unregister bare");
    let count = |captures: &[Capture; 2], instance: &str| {
        captures.each_ref().map(|capture| taken_back(&capture.packets(), instance))
    };
    let begin = Stopwatch::start();
    while count(&captures, "bare").concat().len() < 4 {
        assert!(begin.elapsed() < PATIENCE, "{:?}", count(&captures, "bare"));
        std::thread::park_timeout(std::time::Duration::from_millis(20));
    }
    let [first, second] = count(&captures, "bare");
    println!("mdns-sd by itself: {first:?} on eth0, {second:?} on eth1");
    let [[own, _], [others, _]] = [0, 1].map(|network| ours.addresses(network));
    assert!(
        first.contains(&others) || second.contains(&own),
        "the defect is gone: the work-around may go, too"
    );

    // Ours: all three on their own interface, each with its own address.
    let both = ["eth0", "eth1"];
    let mut node = Process::start(&mut node(ours, "edge", &both, &["--linger", "2800"]));
    until_announced(&node, &["eth0 IPv4", "eth0 IPv6", "eth1 IPv4", "eth1 IPv6"]);
    for (network, capture) in captures.iter().enumerate() {
        capture.until(|packets| is_announced(packets, ours, network, "edge"));
    }
    let report = stop(&mut node);
    assert_eq!(notes(&report).len(), 4, "{report}");
    for (network, seen) in count(&captures, "edge").into_iter().enumerate() {
        assert_eq!(seen, [ours.addresses(network)[0]; 3], "eth{network}");
        let [v4, v6] = checked(&captures[network], ours, network, "edge");
        assert_eq!((v4.goodbyes.len(), v6.goodbyes.len()), (3, 3));
        // Nor does it announce another interface's link-local address.
        let local: Vec<_> = link_local(&captures[network].packets(), "edge").into_iter().collect();
        assert_eq!(local.len(), 1, "{local:?}");
    }
}

/// Packets that announce an instance or take it back.
fn goodbyes_or_announced<'a>(packets: &'a [Packet], instance: &str) -> Vec<&'a Packet> {
    let target = name(instance);
    let is_about = |packet: &&Packet| {
        Message::read(&packet.payload).is_ok_and(|message| {
            message.answers.iter().any(|record| matches!(&record.data, Data::Ptr(it) if it.is(&target)))
        })
    };
    packets.iter().filter(is_about).collect()
}

/// The link-local addresses said of an instance's host.
fn link_local(packets: &[Packet], instance: &str) -> std::collections::BTreeSet<IpAddr> {
    let about = goodbyes_or_announced(packets, instance);
    let records =
        about.into_iter().filter_map(|packet| Message::read(&packet.payload).ok()).flat_map(|it| it.answers);
    records
        .filter_map(|record| match record.data {
            Data::Aaaa(address) if address.is_unicast_link_local() => Some(address.into()),
            _ => None,
        })
        .collect()
}

#[test]
fn who_was_never_announced_takes_back_nobody() {
    let (net, dir) = (Net::of(3, 1), temporary());
    let (ours, theirs, owner) = (net.host(0), net.host(1), net.host(2));
    let capture = theirs.capture("eth0", dir.path());
    let zeroconf = Zeroconf::start(theirs, &[0]);
    let owns = Process::start(&mut node(owner, "edge", &["eth0"], &[]));
    until_announced(&owns, &["eth0 IPv4", "eth0 IPv6"]);
    zeroconf.added("edge");
    // Ours: told to stop while it asks whether its name is taken.
    let mut early = Process::start(&mut node(ours, "edge", &["eth0"], &["--linger", "1500"]));
    early.stdout_line(|line| line == "started");
    let report = stop(&mut early);
    let noted = notes(&report);
    assert!(noted.len() == 2 && noted.values().all(|note| note["outcome"] == "not announced"), "{report}");
    let is_ours = |packet: &&Packet| ours.addresses(0).contains(&packet.from);
    assert_eq!(goodbyes_for(&capture.packets(), "edge", true).len(), 0);
    let responses = |packets: &[Packet]| {
        let sent = packets.iter().filter(is_ours).filter_map(|packet| Message::read(&packet.payload).ok());
        sent.filter(Message::is_response).count()
    };
    assert_eq!(responses(&capture.packets()), 0, "nor is it announced in its drain");
    assert_eq!(zeroconf.count("-", "edge"), 0);

    // The control: mdns-sd takes the owner's records back.
    let control = bare(ours, &["eth0"]);
    does(&control, "register edge edge 8080");
    does(&control, "unregister edge");
    zeroconf.removed("edge");
    assert!(goodbyes_for(&capture.packets(), "edge", true).iter().any(|(packet, _)| is_ours(packet)));
}

#[test]
fn a_goodbye_leaves_the_addresses_of_the_others_on_its_host() {
    let (net, dir) = (Net::of(2, 1), temporary());
    let (ours, theirs) = (net.host(0), net.host(1));
    let capture = theirs.capture("eth0", dir.path());
    // The control: one host name for two services, and the first to leave takes its addresses back.
    let control = bare(ours, &["eth0"]);
    does(&control, "register one shared 8080");
    does(&control, "register two shared 8081");
    capture.until(|packets| ["one", "two"].iter().all(|it| is_announced(packets, ours, 0, it)));
    does(&control, "unregister one");
    let seen = capture.until(|packets| !taken_back(packets, "one").is_empty());
    let hosts = |packets: &[Packet], instance: &str| -> Vec<String> {
        let about = goodbyes_or_announced(packets, instance);
        let read =
            about.iter().filter_map(|packet| Message::read(&packet.payload).ok()).flat_map(|it| it.answers);
        read.filter_map(|record| match record.data {
            Data::Srv { target, .. } if record.name.is(&name(instance)) => Some(target.key()),
            _ => None,
        })
        .collect()
    };
    assert_eq!(hosts(&seen, "one")[0], hosts(&seen, "two")[0], "the defect needs one host for both");

    // Ours: each start is a host of its own.
    let nodes = ["three", "four"].map(|id| Process::start(&mut node(ours, id, &["eth0"], &[])));
    for node in &nodes {
        until_announced(node, &["eth0 IPv4", "eth0 IPv6"]);
    }
    let seen = capture.packets();
    let (three, four) = (&hosts(&seen, "three")[0], &hosts(&seen, "four")[0]);
    assert_ne!(three, four);
    assert!(three.starts_with("three-") && four.starts_with("four-"), "{three} {four}");
}

/// Sends a datagram from a port of a host to the group on its first network.
fn say(host: &Host, bytes: &[u8], port: u16) {
    const SCRIPT: &str = "import socket, sys\n\
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT): s.setsockopt(socket.SOL_SOCKET, option, 1)\n\
        s.bind(('', int(sys.argv[3])))\n\
        s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)\n\
        s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))\n\
        s.sendto(bytes.fromhex(sys.argv[2]), ('224.0.0.251', 5353))";
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let address = host.addresses(0)[0].to_string();
    let mut command = host.command("/usr/bin/python3");
    let mut process = Process::start(command.args(["-c", SCRIPT, &address, &hex, &port.to_string()]));
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
}

/// A goodbye for an instance that says these strings and else no more than it must.
fn forged(instance: &str, strings: &[Vec<u8>]) -> Vec<u8> {
    let (service, host) = (Name::dotted(SERVICE), Name::dotted("forged.local."));
    let (service, host) = (service.expect("a name"), host.expect("a name"));
    let forged = Goodbye {
        service: &service,
        instance: &name(instance),
        host: &host,
        port: 1,
        strings,
        addresses: &[],
    };
    forged.to_bytes()
}

#[test]
fn a_goodbye_that_is_not_ours_is_answered_with_a_higher_incarnation() {
    let (net, dir) = (Net::of(2, 1), temporary());
    let (ours, theirs) = (net.host(0), net.host(1));
    let capture = theirs.capture("eth0", dir.path());
    let control = bare(ours, &["eth0"]);
    does(&control, "register bare barehost 8080");
    let mut edge = Process::start(&mut node(ours, "edge", &["eth0"], &[]));
    until_announced(&edge, &["eth0 IPv4", "eth0 IPv6"]);
    for instance in ["bare", "edge"] {
        capture.until(|packets| is_announced(packets, ours, 0, instance));
    }
    // Nobody browses here, so what is announced from now on was not asked for. What comes from another port is nobody's
    // word (RFC 6762 section 6).
    let before = incarnations(&capture.packets(), "edge");
    assert_eq!(before.len(), 1, "{before:?}");
    say(theirs, &forged("edge", &[]), 5354);
    does(&control, "register later barehost 8081");
    let seen = capture.until(|packets| is_announced(packets, ours, 0, "later"));
    assert_eq!(incarnations(&seen, "edge"), before);
    let forged_at = now_ms();
    // It says that it speaks for a later run than ours, which others believe if it is not too far ahead.
    let claimed = forged_at as u64 + 20_000;
    for instance in ["bare", "edge"] {
        let strings = [format!("node_id={instance}"), format!("inc={claimed}")].map(String::into_bytes);
        say(theirs, &forged(instance, &strings), 5353);
    }
    let again = |packets: &[Packet], instance: &str| {
        let at = announcements(packets, ours, 0, instance, true);
        at.into_iter().filter(|at| *at > forged_at).collect::<Vec<f64>>()
    };
    let seen = capture.until(|packets| again(packets, "edge").len() >= 2);
    let said = goodbyes_for(&seen, "edge", true).last().map(|(packet, _)| packet.at_ms).expect("it was said");
    let after = again(&seen, "edge");
    println!("announced again {:.1} ms after the goodbye", after[0] - said);
    assert!(after[0] - said < 1000.0, "RFC 6762 10.1 leaves a second");
    assert!(again(&seen, "bare").is_empty(), "mdns-sd rescues: the work-around may go");
    let mut incarnations = incarnations(&seen, "edge");
    // The forger's own word.
    incarnations.retain(|incarnation| *incarnation != claimed);
    assert!(incarnations.len() == 2 && incarnations[1] > claimed, "{incarnations:?}");
    // A judge hears what is said now, and that the goodbye of a rescued node is a goodbye.
    let zeroconf = Zeroconf::start(theirs, &[0]);
    zeroconf.added("edge");
    let known = zeroconf.ask("edge");
    assert!(known.contains(&format!("inc={}", incarnations[1])), "{known}");
    let report = stop(&mut edge);
    assert!(notes(&report).values().all(|note| note["outcome"] == "observed"), "{report}");
    zeroconf.removed("edge");
}

/// The incarnations that an instance has announced, each once.
fn incarnations(packets: &[Packet], instance: &str) -> Vec<u64> {
    let read = packets.iter().filter_map(|packet| Message::read(&packet.payload).ok());
    let records = read.flat_map(|message| message.answers).filter(|record| record.name.is(&name(instance)));
    let strings = records.filter_map(|record| match record.data {
        Data::Txt(strings) => Some(strings),
        _ => None,
    });
    let texts = strings.flatten().filter_map(|string| String::from_utf8(string).ok());
    let mut all: Vec<u64> = texts.filter_map(|text| text.strip_prefix("inc=")?.parse().ok()).collect();
    all.dedup();
    all
}

#[test]
fn a_goodbye_carries_the_name_that_was_announced_after_a_conflict() {
    let (net, dir) = (Net::of(3, 1), temporary());
    let (ours, theirs, owner) = (net.host(0), net.host(1), net.host(2));
    let capture = theirs.capture("eth0", dir.path());
    let owns = Process::start(&mut node(owner, "edge", &["eth0"], &[]));
    until_announced(&owns, &["eth0 IPv4", "eth0 IPv6"]);
    let zeroconf = Zeroconf::start(theirs, &[0]);
    zeroconf.added("edge");
    let mut renamed = Process::start(&mut node(ours, "edge", &["eth0"], &["--linger", "1200"]));
    until_announced(&renamed, &["eth0 IPv4", "eth0 IPv6"]);
    renamed.stdout_line(|line| line.ends_with(" as edge (2)._edge._tcp.local."));
    zeroconf.added("edge (2)");
    capture.until(|packets| is_announced(packets, ours, 0, "edge (2)"));
    stop(&mut renamed);
    zeroconf.removed("edge (2)");
    let [v4, v6] = checked(&capture, ours, 0, "edge (2)");
    assert_eq!((v4.goodbyes.len(), v6.goodbyes.len()), (2, 2));
    assert_eq!(zeroconf.count("-", "edge"), 0, "the owner stays");
}

#[test]
fn a_peer_is_found_with_all_it_says_and_its_goodbye_is_told_within_milliseconds() {
    let net = Net::of(2, 2);
    let (ours, theirs) = (net.host(0), net.host(1));
    let both = ["eth0", "eth1"];
    let mut watcher = Process::start(&mut node(theirs, "watcher", &both, &["--cluster", "blue", "--browse"]));
    let flags = ["--notice-port", "7946", "--cluster", "blue", "--browse"];
    let mut peer = Process::start(&mut node(ours, "Peer.1", &both, &flags));
    until_announced(&peer, &["eth0 IPv4", "eth0 IPv6", "eth1 IPv4", "eth1 IPv6"]);
    let found = watcher.stdout_line(|line| {
        let has = |text: &str| line.contains(text);
        let addresses = [0, 1].into_iter().flat_map(|network| ours.addresses(network));
        has(" found Peer.1 ")
            && addresses.into_iter().all(|address| has(&address.to_string()))
            && line.matches("[fe80::").count() == 2
    });
    for text in [" cluster=blue ", " notice=Some(7946) ", " ver=0.", "%2]:8080"] {
        assert!(found.contains(text), "no {text} in {found}");
    }
    let signal = now_ms();
    stop(&mut peer);
    let gone = watcher.stdout_line(|line| line.contains(" gone Peer.1 "));
    let at: f64 = gone.split(' ').next().and_then(|at| at.parse().ok()).expect("a time");
    println!("told {:.1} ms after SIGTERM", at - signal);
    // mdns-sd says it a second later; a machine without time is no second late.
    assert!(at - signal < 900.0, "{gone}");
    stop(&mut watcher);
    // Once, and not as lost; and nobody is told of itself.
    let (said, heard) = (watcher.stdout(), peer.stdout());
    assert_eq!(said.matches(" gone Peer.1 ").count(), 1, "{said}");
    assert!(
        !said.contains(" lost ") && !said.contains(" found watcher ") && !heard.contains(" found Peer.1 ")
    );
}

#[test]
fn a_peer_that_is_heard_no_more_is_lost_and_has_not_said_goodbye() {
    const SCRIPT: &str = "import os, socket, sys\n\
        from zeroconf import IPVersion, ServiceInfo, Zeroconf\n\
        kind = '_edge._tcp.local.'\n\
        z = Zeroconf(interfaces=[sys.argv[1]], ip_version=IPVersion.V4Only)\n\
        z.register_service(ServiceInfo(kind, 'brief.' + kind, 80,\n\
            properties={'node_id': 'Brief', 'cluster': 'default', 'inc': '7'},\n\
            server='brief.local.', addresses=[socket.inet_aton(sys.argv[1])], host_ttl=2, other_ttl=2))\n\
        print('registered', flush=True)\n\
        sys.stdin.read()\n\
        os._exit(0)";
    let net = Net::of(2, 1);
    let (ours, theirs) = (net.host(0), net.host(1));
    let watcher = Process::start(&mut node(ours, "watcher", &["eth0"], &["--browse"]));
    let address = theirs.addresses(0)[0].to_string();
    let mut command = theirs.command("/usr/bin/python3");
    let mut brief = Process::start_with_stdin(command.args(["-c", SCRIPT, &address]));
    watcher.stdout_line(|line| line.contains(" found Brief inc=7 "));
    brief.signal(Signal::KILL);
    brief.ended(PATIENCE);
    watcher.stdout_line(|line| line.contains(" lost Brief"));
    assert!(!watcher.stdout_so_far().contains(" gone "));
}

#[test]
fn an_interface_that_is_not_there_or_has_no_address_is_one_sentence() {
    let net = Net::of(1, 1);
    let host = net.host(0);
    host.ip(&["link", "add", "empty0", "type", "veth", "peer", "name", "empty1"]);
    let error = |interface: &str| {
        let mut process = Process::start(&mut node(host, "edge", &[interface], &[]));
        assert_eq!(process.exit_code(PATIENCE), 1);
        process.stderr()
    };
    let missing = error("eth9");
    assert!(missing.contains("there is no interface eth9: name one of eth0, lo"), "{missing}");
    let empty = error("empty0");
    assert!(empty.contains("interface empty0 has no address to advertise"), "{empty}");
}

#[test]
fn a_goodbye_that_cannot_be_sent_is_said_to_be_so() {
    let net = Net::of(1, 1);
    let host = net.host(0);
    let mut node = Process::start(&mut node(host, "edge", &["eth0"], &[]));
    until_announced(&node, &["eth0 IPv4", "eth0 IPv6"]);
    host.ip(&["link", "set", "eth0", "down"]);
    node.signal(Signal::TERM);
    assert_eq!(node.exit_code(PATIENCE), 10, "{}", node.stderr());
    let report = node.stdout_line(|line| line.starts_with("report "));
    let report: Value = serde_json::from_str(&report["report ".len()..]).expect("a report");
    println!("{}", report["stages"]);
    for note in notes(&report).values() {
        assert!(note["outcome"].as_str().is_some_and(|outcome| outcome.starts_with("not sent: ")), "{note}");
    }
}

/// A packet as our node sends it, for the checker's own test.
fn packet(at_ms: f64, payload: Vec<u8>) -> Packet {
    Packet {
        at_ms,
        mac: [0x01, 0x00, 0x5e, 0x00, 0x00, 0xfb],
        from: [10, 70, 0, 1].into(),
        to: [224, 0, 0, 251].into(),
        ttl: 255,
        from_port: 5353,
        to_port: 5353,
        length: payload.len() + 28,
        payload,
    }
}

/// Spoils what was right.
type Break<'a> = &'a dyn Fn(&mut Vec<Packet>);

#[test]
fn the_wire_checks_refuse_what_is_wrong() {
    let (service, instance) = (Name::dotted(SERVICE).expect("a name"), name("edge"));
    let host = Name::dotted("edge-1.local.").expect("a name");
    let goodbye = Goodbye {
        service: &service,
        instance: &instance,
        host: &host,
        port: 80,
        strings: &[b"txtvers=1".to_vec()],
        addresses: &[[10, 70, 0, 1].into()],
    };
    let bytes = goodbye.to_bytes();
    // The same records with a TTL: the announcement.
    let mut announcement = bytes.clone();
    let message = Message::read(&bytes).expect("we read what we write");
    assert_eq!(message.answers.len(), 4);
    for at in ttls(&bytes) {
        announcement[at + 3] = 120;
    }
    let whole = || {
        vec![
            packet(0.0, announcement.clone()),
            packet(1100.0, announcement.clone()),
            packet(5000.0, bytes.clone()),
        ]
    };
    let verdict = |packets: &[Packet]| check(packets, &[[10, 70, 0, 1].into()], true, "edge");
    let seen = verdict(&whole()).expect("it is as it should be");
    assert_eq!((seen.announced.len(), seen.goodbyes.len(), seen.warnings.len()), (2, 1, 0));

    let breaks: [(&str, Break<'_>); 15] = [
        ("source port", &|all| all[2].from_port = 40000),
        ("destination port", &|all| all[2].to_port = 5454),
        ("no one alone", &|all| all[2].to = [10, 70, 0, 2].into()),
        ("no one alone", &|all| all[2].mac[0] = 2),
        ("IP TTL", &|all| all[2].ttl = 1),
        ("ID is zero", &|all| all[2].payload[1] = 1),
        ("flags", &|all| all[2].payload[2] = 0x80),
        ("18: ", &|all| all[2].payload.push(0)),
        ("fits into a packet", &|all| all[2].length = 1501),
        // The cache-flush bit of SRV, and none on the PTR.
        ("10.2", &|all| all[2].payload[ttls(&bytes)[1] - 2] = 0),
        ("10.2", &|all| all[2].payload[ttls(&bytes)[0] - 2] = 0x80),
        ("never announced", &|all| *all[2].payload.last_mut().expect("an address") = 2),
        ("never taken back", &|all| all[2].payload[ttls(&bytes)[3] + 3] = 120),
        ("after the goodbye", &|all| all.push(packet(6000.0, announcement.clone()))),
        ("8.3", &|all| drop(all.remove(1))),
    ];
    for (wanted, change) in breaks {
        let mut packets = whole();
        change(&mut packets);
        let broken = verdict(&packets).expect_err(wanted);
        assert!(broken.iter().any(|line| line.contains(wanted)), "{wanted}: {broken:#?}");
    }
    // The rule that everybody breaks is a warning.
    let mut packets = whole();
    packets.push(packet(5120.0, bytes.clone()));
    assert_eq!(verdict(&packets).expect("no more than a warning").warnings.len(), 4);
}

/// Where the TTLs of a message stand.
fn ttls(bytes: &[u8]) -> Vec<usize> {
    let word = |at: usize| usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
    let (mut at, mut found) = (12, Vec::new());
    for _ in 0..word(6) {
        while bytes[at] != 0 && bytes[at] < 0xc0 {
            at += 1 + usize::from(bytes[at]);
        }
        at += if bytes[at] == 0 { 1 } else { 2 };
        found.push(at + 4);
        at += 10 + word(at + 8);
    }
    found
}
