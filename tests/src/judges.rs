//! Three judges of mDNS that share no code with us: python-zeroconf, avahi, and tshark.
//!
//! Each runs on a host of a [`Net`], avahi with a D-Bus of its own.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::Signal;

use crate::PATIENCE;
use crate::mdns_wire::{Seen, check, is_announced};
use crate::netns::{Capture, Host, Net};
use crate::process::Process;

/// The service type of the tests.
pub const SERVICE: &str = "_edge._tcp.local.";

/// Milliseconds of the wall clock, as judges and captures count them.
///
/// # Panics
///
/// If the clock stands before 1970.
pub fn now_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs_f64() * 1e3
}

/// What the judges have seen of a program from its announcement to its end.
pub struct Judged {
    /// The program, which has ended.
    pub process: Process,
    /// Port, addresses and TXT, as python-zeroconf knew them.
    pub known: String,
    /// What passed over IPv4 and over IPv6; the wire checks hold.
    pub seen: [Seen; 2],
    /// When each judge saw the goodbye.
    pub table: String,
}

/// Has a program on host 0 advertise `instance` on its `eth0` – and nowhere else – and be stopped by TERM, once
/// python-zeroconf, avahi and a capture on host 1 have it; and holds what they see of its end, and what tshark reads of that,
/// against RFC 6762. The program must be [wrapped](Host::wrap) and must send its goodbye over both families.
///
/// # Panics
///
/// If a judge sees something else.
pub fn judge(net: &Net, dir: &Path, command: &mut Command, instance: &str) -> Judged {
    let (ours, theirs) = (net.host(0), net.host(1));
    let (named, other) = (theirs.capture("eth0", dir), theirs.capture("eth1", dir));
    let loopback = ours.capture("lo", dir);
    let (zeroconf, avahi) = (Zeroconf::start(theirs, &[0]), Avahi::browser(theirs, dir));
    let mut process = Process::start(command);
    zeroconf.added(instance);
    for family in ["IPv4", "IPv6"] {
        avahi.shows("+", "eth0", family, instance);
    }
    let known = zeroconf.ask(instance);
    named.until(|packets| is_announced(packets, ours, 0, instance));

    let signal = now_ms();
    process.signal(Signal::TERM);
    let (by_zeroconf, by_avahi) = std::thread::scope(|scope| {
        let avahi = ["IPv4", "IPv6"].map(|family| scope.spawn(|| avahi.shows("-", "eth0", family, instance)));
        (zeroconf.removed(instance), avahi.map(|thread| thread.join().expect("no panic")))
    });
    process.ended(PATIENCE);

    let seen = checked(&named, ours, 0, instance);
    let by_tshark = goodbyes_read_by_tshark(&read_by_tshark(&named));
    let mut table = String::new();
    let mut row = |who: &str, v4: f64, v6: f64| {
        let _ = writeln!(table, "{who:<24} {:8.1} {:8.1}", v4 - signal, v6 - signal);
    };
    row("ms after SIGTERM: tshark", by_tshark[0], by_tshark[1]);
    // It does not tell the families apart.
    row("python-zeroconf", by_zeroconf, by_zeroconf);
    row("avahi-browse", by_avahi[0], by_avahi[1]);
    for (family, seen) in ["IPv4", "IPv6"].iter().zip(&seen) {
        let after: Vec<_> = seen.goodbyes.iter().map(|at| (at - signal).round()).collect();
        let _ = writeln!(table, "goodbyes over {family} after {after:?} ms; warnings {:?}", seen.warnings);
    }
    // The judges are on eth0 as well.
    assert!(
        other.packets().is_empty() && loopback.packets().is_empty(),
        "it is heard where it was not named"
    );
    Judged { process, known, seen, table }
}

/// What tshark reads of the goodbyes in a capture, a row a packet.
pub fn read_by_tshark(capture: &Capture) -> Vec<Vec<String>> {
    let fields = [
        "frame.time_epoch",
        "ip.src",
        "ipv6.src",
        "udp.srcport",
        "ip.ttl",
        "ipv6.hlim",
        "dns.resp.type",
        "dns.resp.ttl",
    ];
    capture.tshark("dns.flags.response == 1 && dns.resp.ttl == 0", &fields)
}

/// Holds what tshark has read against RFC 6762: when the first goodbye came over each family.
///
/// # Panics
///
/// If one is not as it must be, or there is none.
pub fn goodbyes_read_by_tshark(rows: &[Vec<String>]) -> [f64; 2] {
    // PTR, SRV, TXT and the host's addresses: one of IPv4; a link-local and another one of IPv6.
    [(1, 4, "12|33|16|1"), (2, 5, "12|33|16|28|28")].map(|(address, ttl, kinds)| {
        let family: Vec<_> = rows.iter().filter(|row| !row[address].is_empty()).collect();
        for row in &family {
            assert_eq!((&row[3][..], &row[ttl][..], &row[6][..]), ("5353", "255", kinds), "{row:?}");
            assert!(row[7].split('|').all(|ttl| ttl == "0"), "{row:?}");
        }
        let first = family.first().unwrap_or_else(|| panic!("tshark sees none: {rows:?}"));
        first[0].parse::<f64>().expect("a time") * 1e3
    })
}

/// The wire checks for both families.
///
/// # Panics
///
/// If one does not hold.
pub fn checked(capture: &Capture, host: &Host, network: usize, instance: &str) -> [Seen; 2] {
    let packets = capture.packets();
    [true, false].map(|v4| {
        check(&packets, &host.addresses(network), v4, instance).unwrap_or_else(|broken| panic!("{broken:#?}"))
    })
}

/// A browser of python-zeroconf.
pub struct Zeroconf {
    process: Process,
}

impl Zeroconf {
    /// Starts one on these networks of the host, and waits until it browses.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start(host: &Host, networks: &[usize]) -> Self {
        // Debian's Python has Debian's zeroconf.
        let mut command = host.command("/usr/bin/python3");
        command.args([concat!(env!("CARGO_MANIFEST_DIR"), "/observe.py"), SERVICE]);
        command.args(
            networks.iter().flat_map(|network| host.addresses(*network)).map(|address| address.to_string()),
        );
        let process = Process::start_with_stdin(command.env("PYTHONDONTWRITEBYTECODE", "1"));
        process.stdout_line(|line| line == "ready");
        Self { process }
    }

    /// Waits for the `before`-th next line about an instance, and gives its time and the line.
    ///
    /// # Panics
    ///
    /// If it never comes.
    pub fn nth(&self, before: usize, sign: &str, instance: &str) -> (f64, String) {
        let wanted = format!(" {sign} {instance}.{SERVICE}");
        let line = self.process.stdout_nth(before, |line| {
            line.split_once(&wanted).is_some_and(|(_, rest)| rest.is_empty() || rest.starts_with(' '))
        });
        let at = line.split(' ').next().and_then(|at| at.parse().ok()).expect("a time");
        (at, line)
    }

    /// When the instance was added.
    pub fn added(&self, instance: &str) -> f64 {
        self.nth(0, "+", instance).0
    }

    /// When it was removed.
    pub fn removed(&self, instance: &str) -> f64 {
        self.nth(0, "-", instance).0
    }

    /// How many lines of this sign there are about an instance now.
    pub fn count(&self, sign: &str, instance: &str) -> usize {
        let wanted = format!(" {sign} {instance}.{SERVICE}");
        self.process.stdout_so_far().lines().filter(|line| line.contains(&wanted)).count()
    }

    /// Port, addresses and TXT of an instance as it knows them or finds out; `none` if it does not.
    ///
    /// # Panics
    ///
    /// If it does not answer.
    pub fn ask(&self, instance: &str) -> String {
        let begin = format!("= {instance}.{SERVICE} ");
        let before = self.process.stdout_so_far().lines().filter(|line| line.starts_with(&begin)).count();
        self.process.say(&format!("{instance}.{SERVICE}"));
        let line = self.process.stdout_nth(before, |line| line.starts_with(&begin));
        line[begin.len()..].to_owned()
    }
}

/// An avahi-daemon with a bus of its own, and perhaps a browser.
pub struct Avahi {
    // Dropped in this order.
    browser: Option<Process>,
    _daemon: Process,
    _bus: Process,
}

impl Avahi {
    /// Starts one that publishes its host, as a desktop's does.
    pub fn publisher(host: &Host, dir: &Path) -> Self {
        Self::start(host, dir, "publish-workstation=no", false)
    }

    /// Starts one that only browses, and waits until it does.
    pub fn browser(host: &Host, dir: &Path) -> Self {
        Self::start(host, dir, "disable-publishing=yes", true)
    }

    fn start(host: &Host, dir: &Path, publish: &str, browse: bool) -> Self {
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            std::fs::write(&path, text).expect("a temporary directory");
            path
        };
        let socket = format!("unix:path={}", dir.join("bus").display());
        let bus = write(
            "bus.conf",
            &format!(
                "<busconfig><type>system</type><listen>{socket}</listen><auth>EXTERNAL</auth><policy context=\"default\">\
                 <allow user=\"*\"/><allow own=\"*\"/><allow send_destination=\"*\"/><allow receive_sender=\"*\"/>\
                 </policy></busconfig>"
            ),
        );
        let mut command = Command::new("dbus-daemon");
        command.arg(format!("--config-file={}", bus.display())).args([
            "--nofork",
            "--nopidfile",
            "--print-address",
        ]);
        let bus = Process::start(&mut command);
        bus.stdout_line(|line| line.starts_with("unix:"));
        let conf = write(
            "avahi.conf",
            &format!(
                "[server]\nuse-ipv4=yes\nuse-ipv6=yes\nallow-interfaces=eth0\nenable-dbus=yes\n\
                 ratelimit-interval-usec=0\n[publish]\n{publish}\n"
            ),
        );
        // The path of its PID file is compiled in: a /run of its own.
        let script = "mount -t tmpfs none /run && mkdir /run/avahi-daemon && exec avahi-daemon -f \"$0\" --no-drop-root \
                      --no-chroot --no-rlimits --no-proc-title";
        let mut command = host.command("unshare");
        command.args(["-m", "sh", "-c", script]).arg(&conf).env("DBUS_SYSTEM_BUS_ADDRESS", &socket);
        let daemon = Process::start(&mut command);
        daemon.stderr_line(|line| line.contains("Server startup complete"));
        let browser = browse.then(|| {
            let mut command = host.command("avahi-browse");
            command.args(["-p", "-k", "_edge._tcp"]).env("DBUS_SYSTEM_BUS_ADDRESS", &socket);
            // Line by line also into a pipe.
            command.env("LC_ALL", "C");
            Process::start(&mut command)
        });
        Self { browser, _daemon: daemon, _bus: bus }
    }

    /// Waits until it shows the instance as there (`+`) or gone (`-`) on an interface over a family, and gives the time.
    ///
    /// # Panics
    ///
    /// If it never does.
    pub fn shows(&self, sign: &str, interface: &str, family: &str, instance: &str) -> f64 {
        let begin = format!("{sign};{interface};{family};{instance};");
        self.process().stdout_line(|line| line.starts_with(&begin));
        now_ms()
    }

    /// How often it has shown that so far.
    pub fn count(&self, sign: &str, interface: &str, family: &str, instance: &str) -> usize {
        let begin = format!("{sign};{interface};{family};{instance};");
        self.process().stdout_so_far().lines().filter(|line| line.starts_with(&begin)).count()
    }

    fn process(&self) -> &Process {
        self.browser.as_ref().expect("started as a browser")
    }
}
