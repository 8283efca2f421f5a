//! Hosts on networks of their own: network namespaces, bridged, for tests that must not be heard on the machine's.
//!
//! Needs root. All is gone when the [`Net`] is dropped, and what a killed test has left goes with the next.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;

use crate::PATIENCE;
use crate::process::{Process, Stopwatch};

/// Hosts that share one network or several.
pub struct Net {
    hosts: Vec<Host>,
    /// The bridges' namespace.
    switch: String,
}

/// A host: a namespace with `lo` and an interface `eth0`, `eth1`, … on each network.
pub struct Host {
    namespace: String,
    number: usize,
}

impl Net {
    /// Makes these hosts on so many networks; each host has an address of each family, and a link-local one, on each.
    ///
    /// # Panics
    ///
    /// If this is not root or the kernel refuses.
    pub fn of(hosts: usize, networks: usize) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(geteuid().is_root(), "network namespaces with a real avahi in them need root");
        remove_leftovers();
        let prefix = format!("sd-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let net = Self {
            hosts: (0..hosts)
                .map(|number| Host { namespace: format!("{prefix}-{number}"), number })
                .collect(),
            switch: format!("{prefix}-sw"),
        };
        for namespace in net.namespaces() {
            ip(&["netns", "add", namespace]);
            // An address is used at once, not after a second and a half of asking who else has it.
            let no_dad = "for it in all default; do echo 0 > /proc/sys/net/ipv6/conf/$it/accept_dad; done";
            run(Command::new("ip").args(["netns", "exec", namespace, "sh", "-c", no_dad]));
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
        }
        for network in 0..networks {
            let bridge = format!("br{network}");
            ip(&["-n", &net.switch, "link", "add", &bridge, "type", "bridge"]);
            ip(&["-n", &net.switch, "link", "set", &bridge, "up"]);
            for host in &net.hosts {
                let (port, interface) = (format!("v{}n{network}", host.number), format!("eth{network}"));
                ip(&[
                    "link",
                    "add",
                    &port,
                    "netns",
                    &net.switch,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    &interface,
                    "netns",
                    &host.namespace,
                ]);
                ip(&["-n", &net.switch, "link", "set", &port, "master", &bridge, "up"]);
                for address in host.addresses(network) {
                    let length = if address.is_ipv4() { 24 } else { 64 };
                    let address = format!("{address}/{length}");
                    ip(&["-n", &host.namespace, "addr", "add", &address, "dev", &interface]);
                }
                ip(&["-n", &host.namespace, "link", "set", &interface, "up"]);
            }
        }
        for host in &net.hosts {
            for network in 0..networks {
                host.until_ready(&format!("eth{network}"));
            }
        }
        net
    }

    /// A host by its number.
    pub fn host(&self, number: usize) -> &Host {
        &self.hosts[number]
    }

    fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.hosts.iter().map(|host| &host.namespace[..]).chain([&self.switch[..]])
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for namespace in self.namespaces() {
            remove(namespace);
        }
    }
}

impl Host {
    /// Its addresses on a network.
    pub fn addresses(&self, network: usize) -> [IpAddr; 2] {
        let number = u16::try_from(self.number + 1).expect("a few hosts");
        let network = u8::try_from(network).expect("a few networks");
        [
            [10, 70 + network, 0, number as u8].into(),
            [0xfd70 + u16::from(network), 0, 0, 0, 0, 0, 0, number].into(),
        ]
    }

    /// A command that runs `program` on this host.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        self.wrap(&Command::new(program.as_ref()))
    }

    /// The same command on this host. `ip netns exec` becomes the program: its number is the program's.
    pub fn wrap(&self, command: &Command) -> Command {
        let mut wrapped = Command::new("ip");
        wrapped.args(["netns", "exec", &self.namespace]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            wrapped.current_dir(dir);
        }
        wrapped
    }

    /// Runs `ip` on this host, as in `["link", "set", "eth0", "down"]`.
    pub fn ip(&self, arguments: &[&str]) {
        ip(&[&["-n", &self.namespace], arguments].concat());
    }

    /// Looks until an interface is up and none of its addresses waits for anything.
    fn until_ready(&self, interface: &str) {
        let begin = Stopwatch::start();
        loop {
            let shown =
                run(Command::new("ip").args(["-n", &self.namespace, "-j", "addr", "show", "dev", interface]));
            let shown: Value = serde_json::from_str(&shown).expect("ip writes JSON");
            let addresses = shown[0]["addr_info"].as_array().cloned().unwrap_or_default();
            let is_ready = |address: &Value| address["tentative"] != true;
            if shown[0]["operstate"] == "UP" && addresses.len() == 3 && addresses.iter().all(is_ready) {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "never ready: {shown}");
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }

    /// Captures what passes an interface on port 5353 into a file in `dir`.
    pub fn capture(&self, interface: &str, dir: &Path) -> Capture {
        let file = dir.join(format!("{}-{interface}.pcap", self.namespace));
        // Without immediate mode the last packets are lost.
        let mut command = self.command("tcpdump");
        command.args(["-Z", "root", "-U", "--immediate-mode", "-i", interface, "-w"]).arg(&file);
        let process = Process::start(command.args(["udp", "port", "5353"]));
        process.stderr_line(|line| line.contains("listening on"));
        Capture { tcpdump: process, file }
    }
}

/// A running capture.
pub struct Capture {
    tcpdump: Process,
    file: PathBuf,
}

/// A datagram as it passed.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "their names say it")]
pub struct Packet {
    /// Milliseconds of the wall clock.
    pub at_ms: f64,
    pub mac: [u8; 6],
    pub from: IpAddr,
    pub to: IpAddr,
    pub ttl: u8,
    pub from_port: u16,
    pub to_port: u16,
    /// With the IP header.
    pub length: usize,
    pub payload: Vec<u8>,
}

impl Capture {
    /// What has passed by now: all of it, however busy the machine is.
    ///
    /// # Panics
    ///
    /// If the file is no capture of Ethernet.
    pub fn packets(&self) -> Vec<Packet> {
        // A packet that passes wakes tcpdump, which sleeps again when the packet is in the file.
        self.tcpdump.until_idle();
        let bytes = fs::read(&self.file).expect("tcpdump has made it");
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        assert_eq!(
            (word(0), word(20)),
            (Some(0xa1b2_c3d4), Some(1)),
            "Ethernet, in microseconds, by this machine"
        );
        let mut packets = Vec::new();
        let mut at = 24;
        while let (Some(seconds), Some(micros), Some(length)) = (word(at), word(at + 4), word(at + 8)) {
            at += 16;
            let Some(frame) = bytes.get(at..at + length as usize) else { break };
            packets.extend(datagram(frame, f64::from(seconds) * 1e3 + f64::from(micros) / 1e3));
            at += length as usize;
        }
        packets
    }

    /// Waits until `wanted` holds for what has passed, and gives that.
    ///
    /// # Panics
    ///
    /// If it takes too long.
    pub fn until(&self, wanted: impl Fn(&[Packet]) -> bool) -> Vec<Packet> {
        let begin = Stopwatch::start();
        loop {
            let packets = self.packets();
            if wanted(&packets) {
                return packets;
            }
            assert!(begin.elapsed() < PATIENCE, "never seen in {} packets: {packets:?}", packets.len());
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// What tshark reads in it, with this filter, one line for each packet with these fields.
    ///
    /// # Panics
    ///
    /// If it does not read it.
    pub fn tshark(&self, filter: &str, fields: &[&str]) -> Vec<Vec<String>> {
        let mut command = Command::new("tshark");
        self.tcpdump.until_idle();
        command.args(["-r"]).arg(&self.file).args(["-Y", filter, "-T", "fields", "-E", "aggregator=|"]);
        let lines = run(command.args(fields.iter().flat_map(|field| ["-e", field])));
        lines.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
    }
}

/// Takes an Ethernet frame with UDP apart; nothing if it is something else.
fn datagram(frame: &[u8], at_ms: f64) -> Option<Packet> {
    let (mac, packet) = (frame.get(..6)?.try_into().ok()?, frame.get(14..)?);
    let half = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let (from, to, ttl, length, udp): (IpAddr, IpAddr, _, _, _) = match half(frame, 12)? {
        0x0800 if *packet.get(9)? == 17 => {
            let address = |at: usize| Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into());
            let header = usize::from(packet[0] & 15) * 4;
            let length = usize::from(half(packet, 2)?);
            (address(12)?, address(16)?, packet[8], length, packet.get(header..length)?)
        }
        0x86dd if *packet.get(6)? == 17 => {
            let address = |at: usize| Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into());
            let length = 40 + usize::from(half(packet, 4)?);
            (address(8)?, address(24)?, packet[7], length, packet.get(40..length)?)
        }
        _ => return None,
    };
    let payload = udp.get(8..usize::from(half(udp, 4)?))?.to_vec();
    Some(Packet {
        at_ms,
        mac,
        from,
        to,
        ttl,
        from_port: half(udp, 0)?,
        to_port: half(udp, 2)?,
        length,
        payload,
    })
}

/// Removes a namespace and what runs in it, which nobody but its test has started.
fn remove(namespace: &str) {
    let output = Command::new("ip").args(["netns", "pids", namespace]).output();
    let pids = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    for pid in pids.lines().filter_map(|line| Pid::from_raw(line.trim().parse().ok()?)) {
        let _ = kill_process(pid, Signal::KILL);
    }
    // A panic here would hide the one that the test ends with.
    let _ = Command::new("ip").args(["netns", "del", namespace]).output();
}

/// Removes the namespaces of tests that are no more.
fn remove_leftovers() {
    let listed = run(Command::new("ip").args(["netns", "list"]));
    for namespace in listed.lines().filter_map(|line| line.split(' ').next()) {
        let pid = namespace.strip_prefix("sd-").and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove(namespace);
        }
    }
}

fn ip(arguments: &[&str]) {
    run(Command::new("ip").args(arguments));
}

/// Runs a command to its end and gives what it printed.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
