//! Carries out what [`words`] decides: looks, waits, sends.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram as StdDatagram};
use std::time::Duration;

use tokio::net::UnixDatagram;
use tokio::time::{Instant, sleep_until, timeout};

use super::words::{self, Ended, Look, Words};
use crate::coordinator::{Join, ShutdownCoordinator};
use crate::phase::Phase;

/// How long a message may wait for room in systemd's queue.
const ROOM: Duration = Duration::from_secs(1);

/// Who tells systemd how it goes.
pub(super) struct Messenger {
    shutdown: ShutdownCoordinator,
    /// Keeps the process for the last message, for the report's reserve at most.
    join: Join,
    socket: OsString,
    /// How often the watchdog is to hear of it.
    every: Option<Duration>,
    failed: bool,
}

impl Messenger {
    pub(super) fn new(shutdown: ShutdownCoordinator, socket: OsString, watchdog: Option<Duration>) -> Self {
        // Half of it, as `man sd_watchdog_enabled` recommends.
        let every = watchdog.map(|time| time / 2);
        Self { shutdown, join: shutdown.join(), socket, every, failed: false }
    }

    /// From `READY=1` to the exit code.
    pub(super) async fn run(mut self, status: String) {
        let mut ping = self.every.map(|every| (every, Instant::now() + every));
        if !self.shutdown.is_shutting_down() {
            self.send(words::ready(&status)).await;
        }
        let shutdown = self.shutdown;
        tokio::select! {
            biased;
            () = shutdown.until(Phase::LameDuck) => (),
            () = self.ping_while_well(&mut ping) => unreachable!("it has no end of its own"),
        }
        self.tell_of_the_stop(ping).await;
    }

    /// Says at each half of the watchdog's time that the service is well, if it is. Never ends.
    async fn ping_while_well(&mut self, ping: &mut Option<(Duration, Instant)>) {
        while let (Some((every, next)), Some(service)) = (ping.as_mut(), self.shutdown.core.runtime.get()) {
            sleep_until(*next).await;
            // A runtime that is stuck does not run it, one that is gone never will.
            if service.spawn(async {}).await.is_err() {
                break;
            }
            *next = Instant::now() + *every;
            self.send(words::ping()).await;
        }
        std::future::pending().await
    }

    async fn tell_of_the_stop(&mut self, ping: Option<(Duration, Instant)>) {
        let shutdown = self.shutdown;
        let mut phases = shutdown.subscribe();
        let mut stages = shutdown.core.stage_changed.subscribe();
        let join = self.join.clone();
        let mut report = std::pin::pin!(join.report());

        let now = Instant::now();
        let (mut words, first) = Words::stopping(&look(shutdown, now), ping, now);
        self.send(first).await;
        let exit_code = loop {
            tokio::select! {
                biased;
                report = &mut report => break report.exit_code(),
                _ = phases.changed() => (),
                _ = stages.changed() => (),
                () = sleep_until(words.next()) => (),
            }
            let now = Instant::now();
            if let Some(message) = words.at(&look(shutdown, now), now) {
                self.send(message).await;
            }
        };
        self.send(words::stopped(exit_code)).await;
    }

    /// Sends a message. That it cannot be sent is said once.
    async fn send(&mut self, message: String) {
        let Err(error) = send(&self.socket, &message).await else { return };
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        let socket = self.socket.clone();
        // Not here: what reads the log may block, and this is the driver's thread.
        drop(tokio::task::spawn_blocking(move || {
            tracing::warn!(target: "shutdown", ?socket, %error, "systemd cannot be told how it goes (NOTIFY_SOCKET)");
        }));
    }
}

/// One message is one datagram. sd-notify would wait for room in the queue without end, and on the driver's thread;
/// nor does it know abstract names. A socket for each, as in libsystemd: the one at the other end may be a new one.
async fn send(socket: &OsStr, message: &str) -> io::Result<()> {
    let address = address(socket)?;
    let socket = StdDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    let socket = UnixDatagram::from_std(socket)?;
    match timeout(ROOM, socket.send(message.as_bytes())).await {
        Ok(sent) => sent.map(drop),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "its queue is full")),
    }
}

/// A path, or `@` and an abstract name (`man sd_notify`). The other kinds, for virtual machines, are not for services.
fn address(socket: &OsStr) -> io::Result<SocketAddr> {
    match socket.as_bytes() {
        #[cfg(target_os = "linux")]
        [b'@', name @ ..] => {
            use std::os::linux::net::SocketAddrExt;
            SocketAddr::from_abstract_name(name)
        }
        [b'/', ..] => SocketAddr::from_pathname(socket),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither an absolute path nor an @name")),
    }
}

/// What can be seen at `now`.
fn look(shutdown: ShutdownCoordinator, now: Instant) -> Look {
    let core = shutdown.core;
    let (stage, elapsed) = match &*core.draft.lock() {
        Some(draft) => (draft.current_stage, now.saturating_duration_since(draft.began)),
        None => (None, Duration::ZERO),
    };
    let (started, requests) = (core.requests.started(), core.requests.alive());
    let (opened, sessions) = (core.sessions.tracker.started(), core.sessions.tracker.alive());
    let (accepted, connections) = (core.connections.accepted(), core.connections.alive());
    let (tasks, tasks_ended) = core.tasks.alive_and_ended();
    Look {
        phase: core.phase(),
        stage,
        requests,
        connections,
        sessions,
        tasks,
        ended: Ended {
            requests: started.saturating_sub(requests),
            connections: accepted.saturating_sub(connections),
            sessions: opened.saturating_sub(sessions),
            tasks: tasks_ended,
        },
        left: core.config.total.saturating_sub(elapsed),
    }
}
