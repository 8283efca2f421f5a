//! A local proxy of a test's own: it keeps its PID file locked, and waits for its clients.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use tempfile::TempDir;

use super::free_port;
use crate::process::{Process, binary};

/// One in a directory of its own, on a port of the loopback: this user's.
pub struct LocalProxy {
    process: Process,
    listen: SocketAddr,
    dir: TempDir,
}

impl LocalProxy {
    /// Starts one and waits until it takes clients.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        Self { process: run(dir.path(), listen), listen, dir }
    }

    /// Starts it again in the same place and on the same port, once it has ended.
    ///
    /// # Panics
    ///
    /// If it has not ended, or does not start.
    pub fn start_again(&mut self) {
        assert!(self.process.is_over(), "it still runs");
        self.process = run(self.dir.path(), self.listen);
    }

    /// Its program and its arguments, but that its PID file is this one: how another would start it.
    pub fn words(&self, pid_file: &Path) -> Vec<String> {
        words(pid_file, self.listen)
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Its PID file.
    pub fn pidfile(&self) -> PathBuf {
        pid_file(self.dir.path())
    }

    /// Where it takes clients.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// A client that it has to wait for.
    ///
    /// # Panics
    ///
    /// If it is not taken.
    pub fn client(&self) -> TcpStream {
        let client = TcpStream::connect(self.listen).expect("it takes clients");
        self.process.stdout_line(|line| line == "local_proxy has a client");
        client
    }

    /// Waits until it has been told to end, and waits itself for its clients.
    ///
    /// # Panics
    ///
    /// If it takes too long.
    pub fn waits(&self) {
        self.process.stdout_line(|line| line.starts_with("local_proxy waits for "));
    }

    /// Waits for its end, by itself or by whoever stops it.
    ///
    /// # Panics
    ///
    /// If it takes longer than `within`.
    pub fn ended(&mut self, within: Duration) -> ExitStatus {
        self.process.ended(within)
    }
}

fn run(dir: &Path, listen: SocketAddr) -> Process {
    let words = words(&pid_file(dir), listen);
    let process = Process::start(std::process::Command::new(&words[0]).args(&words[1..]));
    process.stdout_line(|line| line.starts_with("local_proxy on "));
    process
}

fn words(pid_file: &Path, listen: SocketAddr) -> Vec<String> {
    vec![binary("local_proxy").display().to_string(), pid_file.display().to_string(), listen.to_string()]
}

fn pid_file(dir: &Path) -> PathBuf {
    dir.join("local_proxy.pid")
}
