//! A Redis of a test's own, from Debian's package.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use super::{STARTS, ask, command_as, dir_of, free_port, signal_family};
use crate::PATIENCE;
use crate::process::Process;

const USER: &str = "redis";
const PROGRAM: &str = "/usr/bin/redis-server";
const READY: &str = "Ready to accept connections";
const TERM: Duration = Duration::from_secs(5);

/// A server in a directory of its own, on a port of the loopback and a Unix socket. Nothing is written to disk.
pub struct Redis {
    process: Process,
    port: u16,
    dir: TempDir,
}

/// A line of the server's log. It is verbose: connections (`Accepted 127.0.0.1:4711`) and their ends (`Client closed
/// connection …`) are in it.
#[derive(Clone, Debug)]
pub struct RedisLine {
    /// When it was written, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What it says.
    pub text: String,
}

impl Redis {
    /// Starts one on a free port and waits until it answers.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn start() -> Self {
        (0..STARTS).find_map(|_| Self::try_start(free_port())).expect("Redis starts on a free port")
    }

    /// Starts one on this port: the one that has just gone comes back, empty.
    ///
    /// # Panics
    ///
    /// If the port is taken.
    pub fn start_on(port: u16) -> Self {
        Self::try_start(port).unwrap_or_else(|| panic!("Redis does not start on port {port}: is it taken?"))
    }

    fn try_start(port: u16) -> Option<Self> {
        let dir = dir_of(USER);
        let process = Self::run(port, dir.path())?;
        Some(Self { process, port, dir })
    }

    fn run(port: u16, dir: &Path) -> Option<Process> {
        let process = Process::start(command_as(USER, Path::new(PROGRAM)).args(arguments(port, dir)));
        process.stdout_line_or_end(|line| line.contains(READY))?;
        Some(process)
    }

    /// Starts it again in the same place and on the same port, once it has ended.
    ///
    /// # Panics
    ///
    /// If it has not ended, or does not start.
    pub fn start_again(&mut self) {
        assert!(self.process.is_over(), "it still runs");
        let port = self.port;
        self.process = Self::run(port, self.dir.path())
            .unwrap_or_else(|| panic!("Redis does not start again on port {port}: is it taken?"));
    }

    /// How another would start one on this port, in a directory of its own: its program and its arguments.
    pub fn words(&self, dir: &Path) -> Vec<String> {
        let mut words = vec![PROGRAM.to_owned()];
        words.extend(arguments(self.port, dir));
        words
    }

    /// Its PID file.
    pub fn pidfile(&self) -> PathBuf {
        pidfile(self.dir.path())
    }

    /// Its exit code, once whoever stops it has done so.
    ///
    /// # Panics
    ///
    /// If it takes longer than `within` or a signal killed it.
    pub fn code(&mut self, within: Duration) -> i32 {
        self.process.exit_code(within)
    }

    /// `redis://127.0.0.1:port/`
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// The same server over its Unix socket.
    pub fn url_over_socket(&self) -> String {
        format!("redis+unix://{}", socket(self.dir.path()).display())
    }

    /// The port of the loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The server's number.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Asks the server's own client, over the Unix socket: in the log it is no `127.0.0.1`.
    ///
    /// # Panics
    ///
    /// If it fails or takes too long.
    pub fn cli(&self, args: &[&str]) -> String {
        let mut command = command_as(USER, Path::new("/usr/bin/redis-cli"));
        // `-e`: an answer that is an error is one.
        ask(command.arg("-s").arg(socket(self.dir.path())).arg("-e").args(args))
    }

    /// Starts to write down every command that it executes, with its time: `1732233600.123456 [0 127.0.0.1:4711] "SET" …`.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn monitor(&self) -> Process {
        let mut command = command_as(USER, Path::new("/usr/bin/redis-cli"));
        let process = Process::start(command.arg("-s").arg(socket(self.dir.path())).arg("monitor"));
        process.stdout_line(|line| line == "OK");
        process
    }

    /// What it has logged by now.
    pub fn log(&self) -> Vec<RedisLine> {
        self.process.stdout_so_far().lines().filter_map(RedisLine::parse).collect()
    }

    /// Waits until it has logged a line for which `wanted` holds.
    ///
    /// # Panics
    ///
    /// If it ends or takes too long without.
    pub fn logged(&self, wanted: impl Fn(&RedisLine) -> bool) -> RedisLine {
        let found =
            self.process.stdout_line_or_end(|line| RedisLine::parse(line).is_some_and(|line| wanted(&line)));
        let line = found.unwrap_or_else(|| panic!("never logged:\n{}", self.process.stdout_so_far()));
        RedisLine::parse(&line).expect("it was found by parsing it")
    }

    /// Stops it where it stands: connections stay open, and nobody answers.
    pub fn freeze(&self) {
        signal_family(&self.process, Signal::STOP);
    }

    /// Lets it run on.
    pub fn thaw(&self) {
        signal_family(&self.process, Signal::CONT);
    }

    /// Stops it as an operator does (SIGTERM).
    ///
    /// # Panics
    ///
    /// If it takes too long or ends with an error.
    pub fn stop(&mut self) {
        self.process.signal(Signal::TERM);
        assert_eq!(self.process.exit_code(PATIENCE), 0, "{}", self.process.stdout());
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if self.process.is_over() {
            return;
        }
        self.thaw();
        self.process.signal(Signal::TERM);
        self.process.over_or_killed(TERM);
    }
}

fn arguments(port: u16, dir: &Path) -> Vec<String> {
    let path = |path: &Path| path.display().to_string();
    let (port, dir, socket, pidfile) = (port.to_string(), path(dir), path(&socket(dir)), path(&pidfile(dir)));
    let arguments = [
        ("--port", &*port),
        ("--bind", "127.0.0.1"),
        ("--save", ""),
        ("--appendonly", "no"),
        ("--loglevel", "verbose"),
        ("--dir", &dir),
        ("--unixsocket", &socket),
        ("--pidfile", &pidfile),
    ];
    arguments.into_iter().flat_map(|(name, value)| [name.to_owned(), value.to_owned()]).collect()
}

/// The PID file of one in this directory.
fn pidfile(dir: &Path) -> PathBuf {
    dir.join("redis.pid")
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("redis.sock")
}

impl RedisLine {
    /// `4711:M 22 Nov 2026 00:06:14.688 * text`, in UTC.
    fn parse(line: &str) -> Option<Self> {
        const MONTHS: [&str; 12] =
            ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        let mut fields = line.splitn(7, ' ').skip(1);
        let day: u64 = fields.next()?.parse().ok()?;
        let name = fields.next()?;
        let month = u64::try_from(MONTHS.iter().position(|month| *month == name)?).ok()? + 1;
        let year: u64 = fields.next()?.parse().ok()?;
        let (clock, millis) = fields.next()?.split_once('.')?;
        let seconds = clock.split(':').try_fold(0, |sum, part| Some(sum * 60 + part.parse::<u64>().ok()?))?;
        let text = fields.nth(1)?.to_owned();
        let at_ms =
            (days_since_1970(year, month, day) * 86_400 + seconds) * 1000 + millis.parse::<u64>().ok()?;
        Some(Self { at_ms, text })
    }
}

/// Days from 1 January 1970 in the Gregorian calendar; years begin in March, so that the leap day is their last.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let of_year = (153 * month + 2) / 5 + day - 1;
    365 * year + year / 4 - year / 100 + year / 400 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_log_is_read_with_its_time() {
        // date -u -d '2028-02-29 23:59:58.007' +%s%3N
        let line = RedisLine::parse("6326:M 29 Feb 2028 23:59:58.007 - Accepted 127.0.0.1:40734").unwrap();
        assert_eq!((line.at_ms, line.text.as_str()), (1_835_481_598_007, "Accepted 127.0.0.1:40734"));
        // date -u -d '2026-11-22 00:06:14.688' +%s%3N
        let line = RedisLine::parse("1:C 22 Nov 2026 00:06:14.688 # Configuration loaded").unwrap();
        assert_eq!(line.at_ms, 1_795_305_974_688);
        assert!(RedisLine::parse("6326:signal-handler (1795305975) Received SIGTERM").is_none());
    }
}
