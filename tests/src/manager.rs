//! A service manager, as far as a service can tell: it hears messages, and holds sockets.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::PATIENCE;
use crate::process::{Process, Stopwatch};

/// The other end of `NOTIFY_SOCKET`.
pub struct Notified {
    /// What the variable is to be.
    pub socket: OsString,
    heard: Receiver<String>,
}

impl Notified {
    /// At a path in `dir`.
    ///
    /// # Panics
    ///
    /// If it cannot be made.
    pub fn at_path(dir: &Path) -> Self {
        let path = dir.join("notify");
        Self::of(UnixDatagram::bind(&path).expect("a temporary directory"), path.into())
    }

    /// At an abstract name that contains `dir`.
    ///
    /// # Panics
    ///
    /// If it cannot be made.
    pub fn at_abstract_name(dir: &Path) -> Self {
        let name = format!("{}/notify", dir.display());
        let address = UnixAddr::from_abstract_name(&name).expect("short enough");
        Self::of(UnixDatagram::bind_addr(&address).expect("nobody else's name"), format!("@{name}").into())
    }

    fn of(socket: UnixDatagram, variable: OsString) -> Self {
        let (hear, heard) = channel();
        // Reads at once, so that the queue is never full; ends when nobody listens, at the latest with the test.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = socket.recv(&mut buffer) {
                if hear.send(String::from_utf8_lossy(&buffer[..length]).into_owned()).is_err() {
                    return;
                }
            }
        });
        Self { socket: variable, heard }
    }

    /// The next message, if one comes within this time.
    pub fn within(&self, time: Duration) -> Option<String> {
        self.heard.recv_timeout(time).ok()
    }

    /// The next message.
    ///
    /// # Panics
    ///
    /// If none comes.
    pub fn next(&self) -> String {
        self.within(PATIENCE).expect("a message")
    }

    /// What has come until `last`, inclusive, each with when it came by `clock`.
    ///
    /// # Panics
    ///
    /// If it does not come.
    pub fn until(&self, clock: Stopwatch, last: impl Fn(&str) -> bool) -> Vec<(Duration, String)> {
        let mut all = Vec::new();
        loop {
            let message = self.next();
            let is_last = last(&message);
            all.push((clock.elapsed(), message));
            if is_last {
                return all;
            }
        }
    }

    /// What has come and was not asked for yet.
    pub fn rest(&self) -> Vec<String> {
        self.heard.try_iter().collect()
    }
}

/// A process that holds listening sockets and starts a program with them (tests/activate.py).
pub struct Holder {
    /// It, and what the program prints.
    pub process: Process,
    /// Where the sockets listen, in their order.
    pub sockets: Vec<SocketAddr>,
}

impl Holder {
    /// Makes sockets of these names, for this program.
    ///
    /// # Panics
    ///
    /// If that does not work.
    pub fn new(names: &str, program: &Command) -> Self {
        let mut command = Command::new("python3");
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/activate.py")).arg(names);
        command.arg(program.get_program()).args(program.get_args());
        command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.current_dir(program.get_current_dir().expect("a directory of its own"));
        let process = Process::start_with_stdin(&mut command);
        let line = process.stdout_line(|line| line.starts_with("sockets "));
        let sockets = line.split(' ').skip(1).map(|addr| addr.parse().expect("an address")).collect();
        Self { process, sockets }
    }

    /// Starts the program.
    ///
    /// # Panics
    ///
    /// If that does not work.
    pub fn start(&mut self) -> Pid {
        let line = self.order("start", "started ");
        Pid::from_raw(line.parse().expect("a number")).expect("not zero")
    }

    /// Sends it a signal; before [`ended`](Self::ended).
    ///
    /// # Panics
    ///
    /// If it has ended and was waited for.
    pub fn signal(&self, pid: Pid, signal: Signal) {
        kill_process(pid, signal).expect("not waited for");
    }

    /// Waits for its end and gives the exit code.
    ///
    /// # Panics
    ///
    /// If it does not end.
    pub fn ended(&mut self) -> i32 {
        self.order("wait", "ended ").parse().expect("a number")
    }

    /// Gives an order and takes the answer to it.
    fn order(&mut self, order: &str, answer: &str) -> String {
        let before = self.process.stdout_so_far().lines().filter(|line| line.starts_with(answer)).count();
        self.process.say(order);
        let line = self.process.stdout_nth(before, |line| line.starts_with(answer));
        line[answer.len()..].to_owned()
    }
}
