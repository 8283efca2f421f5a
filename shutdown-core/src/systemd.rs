//! What systemd is told, and what it hands over: readiness, progress, the watchdog, sockets that outlive a restart.
//!
//! The rule: what systemd did not ask for does not happen. Without `NOTIFY_SOCKET` nothing is sent and no task runs;
//! without `LISTEN_FDS` there is no listener to take. A message that cannot be sent is logged once and changes nothing.
//!
//! | message | when | what systemd does with it (`man sd_notify`, `man systemd.service`) |
//! |---|---|---|
//! | `READY=1` | [`Systemd::ready`] | ends the start of a unit with `Type=notify`; starts what waits for it |
//! | `WATCHDOG=1` | every half of `WatchdogSec=` | without one for that long it kills the process and, as `Restart=` says, restarts it |
//! | `STOPPING=1` | at the reason to stop | shows `deactivating`; if it did not ask for the stop, `TimeoutStopSec=` begins now |
//! | `STATUS=…` | at every phase and stage, once a second while stopping | shows it in `systemctl status` |
//! | `EXTEND_TIMEOUT_USEC=…` | once a second while a stop makes progress | does not kill before that time has passed, even past `TimeoutStopSec=` |
//!
//! While the service runs, each `WATCHDOG=1` follows a task that has run on the *service's* runtime: one that is stuck
//! is restarted. (On several threads one of them is enough.) During a shutdown the coordinator's own runtime, which
//! is the one that stops the service, is enough.
//!
//! The time is extended by a few seconds, only when a request, connection, session or task has ended since the last look, or
//! the stop has come to another phase or stage, and never beyond the end of our own total. Who hangs gets the unit's time and no more.
//!
//! After `STOPPING=1` nothing takes it back. Messages of a process that leaves at once may be lost: systemd finds out
//! whose they are by the process, which may be gone by then. So may the last one, that names the exit code, and it is
//! not sent at all by a process that the watchdog or a third signal ends.
//!
//! An inherited listener belongs to systemd as well. To close it refuses nobody: who connects then waits in its queue
//! for the next start. [`net::Listener`](crate::net::Listener) therefore leaves such a socket as it was: the packet
//! filter that it lays on a socket of its own would stay, and keep every client from the next start.

mod listeners;
mod messenger;
mod words;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::TcpListener;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::coordinator::ShutdownCoordinator;
use listeners::Inherited;
use messenger::Messenger;

/// What the service manager gave this process: a place for messages, a watchdog's time, listeners.
///
/// ```no_run
/// use shutdown_core::systemd::Systemd;
/// use shutdown_core::{ShutdownCoordinator, Signals, net};
///
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     let signals = Signals::claim()?;
///     // Before any thread: it changes the environment.
///     let mut systemd = Systemd::from_env()?;
///     let listener = match systemd.next_listener() {
///         Some(inherited) => inherited,
///         None => net::bind(([127, 0, 0, 1], 8080).into())?,
///     };
///     let shutdown = ShutdownCoordinator::builder().signals(signals).install()?;
///     // … serve `listener` under `shutdown`, then:
///     systemd.ready(shutdown, "serving on 127.0.0.1:8080");
///     # drop(listener);
///     shutdown.wait().exit()
/// }
/// ```
#[derive(Debug)]
#[must_use = "systemd waits for READY=1"]
pub struct Systemd {
    listeners: Vec<Inherited>,
    notify_socket: Option<OsString>,
    watchdog: Option<Duration>,
}

impl Systemd {
    /// Takes what the environment says. Where systemd said nothing, everything here does nothing.
    ///
    /// Call it in `main` before any thread is started, once: it removes `LISTEN_FDS` and `LISTEN_PID` from the
    /// environment, so that children do not take the sockets for theirs, and changing the environment while another
    /// thread reads it is undefined. The sockets are not handed on to children either.
    ///
    /// As in `sd_listen_fds` and `sd_watchdog_enabled`, what is meant for another process (`LISTEN_PID`,
    /// `WATCHDOG_PID`) is left alone.
    ///
    /// # Errors
    ///
    /// `LISTEN_FDS` or `WATCHDOG_USEC` is no number that makes sense, or an inherited socket is no TCP listener.
    pub fn from_env() -> Result<Self, SystemdError> {
        Ok(Self {
            watchdog: watchdog()?,
            listeners: listeners::inherited()?,
            notify_socket: std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()),
        })
    }

    /// How many inherited listeners have not been taken.
    pub fn listeners(&self) -> usize {
        self.listeners.len()
    }

    /// Takes the inherited listener of this name: `FileDescriptorName=` of the socket unit, else the unit's own name.
    /// Non-blocking, as [`net::bind`](crate::net::bind) gives it.
    pub fn listener_named(&mut self, name: &str) -> Option<TcpListener> {
        let index = self.listeners.iter().position(|inherited| inherited.name == name)?;
        Some(self.listeners.remove(index).listener)
    }

    /// Takes the first inherited listener that is left. Non-blocking, as [`net::bind`](crate::net::bind) gives it.
    pub fn next_listener(&mut self) -> Option<TcpListener> {
        (!self.listeners.is_empty()).then(|| self.listeners.remove(0).listener)
    }

    /// Says that the service serves, with this one line of status, and from there on everything else by itself: a
    /// task on the coordinator's own runtime (of one that was not installed: on the current runtime) tells systemd
    /// how it goes until the process ends. Call it once everything is bound and served. Returns at once.
    ///
    /// Listeners that nobody took are closed.
    pub fn ready(self, shutdown: ShutdownCoordinator, status: impl fmt::Display) {
        let Some(socket) = self.notify_socket else { return };
        let Some(runtime) = shutdown.own_runtime().or_else(|| Handle::try_current().ok()) else {
            tracing::warn!(target: "shutdown", "systemd is told nothing: there is no runtime to do so");
            return;
        };
        let messenger = Messenger::new(shutdown, socket, self.watchdog);
        runtime.spawn(messenger.run(status.to_string()));
    }
}

/// How often the watchdog wants to hear of this process, at least.
fn watchdog() -> Result<Option<Duration>, SystemdError> {
    let Some(text) = std::env::var_os("WATCHDOG_USEC") else { return Ok(None) };
    let pid = std::env::var("WATCHDOG_PID").ok();
    if pid.is_some_and(|pid| pid.parse() != Ok(std::process::id())) {
        return Ok(None);
    }
    match sd_notify::watchdog_enabled() {
        Some(time) if !time.is_zero() => Ok(Some(time)),
        _ => Err(SystemdError::Variable {
            name: "WATCHDOG_USEC",
            value: text,
            wanted: "microseconds, 1 or more",
        }),
    }
}

/// Why what systemd handed over cannot be used.
#[derive(Debug)]
#[non_exhaustive]
pub enum SystemdError {
    /// A variable of the environment makes no sense. Systemd sets them right; somebody else has set this one.
    Variable {
        /// Its name.
        name: &'static str,
        /// What it is.
        value: OsString,
        /// What it should be.
        wanted: &'static str,
    },
    /// An inherited descriptor is no TCP listener. The socket unit's mistake.
    Listener {
        /// Its number.
        fd: usize,
        /// Its name; empty if it has none.
        name: String,
        /// What is wrong with it.
        source: io::Error,
    },
}

impl fmt::Display for SystemdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable { name, value, wanted } => {
                write!(f, "{name}={value:?} is not what systemd sets, {wanted}: unset it")
            }
            Self::Listener { fd, name, .. } => {
                let name = if name.is_empty() { String::new() } else { format!(" ({name})") };
                write!(
                    f,
                    "the inherited descriptor {fd}{name} is no TCP listener: its socket unit needs a ListenStream= \
                     with a port, and no Accept=yes"
                )
            }
        }
    }
}

impl std::error::Error for SystemdError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Variable { .. } => None,
            Self::Listener { source, .. } => Some(source),
        }
    }
}
