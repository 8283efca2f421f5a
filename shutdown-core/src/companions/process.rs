//! One process, held so that its number cannot become another's unnoticed.
//!
//! On Linux from 5.3 on it is held by a *pidfd*: a signal through it goes to this process or to nobody, and its end wakes us.
//! The descriptor is opened first and the process looked at then; the other way round the number could be given to another in
//! between.
//!
//! The weaker way, where there is no pidfd (older kernels, a sandbox that refuses the call, other systems): by number. Before each
//! signal it is looked whether the number's process still has the start time that was seen first; a process that takes the number
//! between that look and the signal, some microseconds, would get it. And its end is looked for every [`LOOK`].

use std::fmt;
use std::io;
#[cfg(target_os = "linux")]
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, test_kill_process, waitid,
};
#[cfg(target_os = "linux")]
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};
#[cfg(target_os = "linux")]
use tokio::io::unix::AsyncFd;

use super::identity;
use super::ladder::StopSignal;

/// How often it is looked whether a process without a pidfd has ended.
const LOOK: Duration = Duration::from_millis(10);

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(number) => write!(f, "was ended by signal {number}"),
        }
    }
}

/// A process that is held.
#[derive(Debug)]
pub(super) struct Process {
    pid: Pid,
    hold: Hold,
    /// Set for a child of ours once it has ended and its status is taken; nothing in it if somebody else took it.
    exit: OnceLock<Option<Exit>>,
    child: bool,
}

#[derive(Debug)]
enum Hold {
    #[cfg(target_os = "linux")]
    PidFd(AsyncFd<OwnedFd>),
    /// The start time, where it can be known.
    Number(Option<u64>),
}

impl Process {
    /// Holds the process of this number; nothing if there is none. It belongs to the runtime it is called in.
    pub(super) fn hold(pid: u32) -> io::Result<Option<Self>> {
        Self::hold_as(pid, false)
    }

    /// Holds a child that nobody else waits for.
    pub(super) fn hold_child(pid: u32) -> io::Result<Self> {
        Self::hold_as(pid, true)?.ok_or_else(|| Errno::SRCH.into())
    }

    fn hold_as(pid: u32, child: bool) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let Some(hold) = Hold::of(number)? else { return Ok(None) };
        Ok(Some(Self { pid: number, hold, exit: OnceLock::new(), child }))
    }

    pub(super) fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a signal. `false` if the process has ended.
    pub(super) fn signal(&self, signal: StopSignal) -> io::Result<bool> {
        let sent = match &self.hold {
            #[cfg(target_os = "linux")]
            Hold::PidFd(fd) => pidfd_send_signal(fd.get_ref(), signal.signal()),
            Hold::Number(_) if !self.is_there() => return Ok(false),
            Hold::Number(_) => kill_process(self.pid, signal.signal()),
        };
        match sent {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it has ended, and gives how, for a child.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe, and any number may wait.
    pub(super) async fn ended(&self) -> Option<Exit> {
        self.has_ended().await;
        self.reap()
    }

    /// Waits until it has ended; a child is left as it is.
    pub(super) async fn has_ended(&self) {
        match &self.hold {
            #[cfg(target_os = "linux")]
            // Readable for ever once it has ended, so readiness is never cleared. An error: the runtime has gone.
            Hold::PidFd(fd) => _ = fd.readable().await,
            Hold::Number(_) => {
                while self.is_there() {
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }

    /// Takes the status of a child that has ended. What is left of its process group is killed first: while the child is a zombie
    /// its number is that group's and nobody else's.
    fn reap(&self) -> Option<Exit> {
        if !self.child {
            return None;
        }
        *self.exit.get_or_init(|| {
            // Gone if somebody else has taken it: then the number may be anybody's.
            take_status(self.pid, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
            // It made the group when it was started. Nobody left is ESRCH.
            let _ = kill_process_group(self.pid, Signal::KILL);
            take_status(self.pid, WaitIdOptions::EXITED)
        })
    }

    /// How a child ended that has ended, without taking its status.
    pub(super) fn peek(&self) -> Option<Exit> {
        match self.exit.get() {
            Some(exit) => *exit,
            None => take_status(self.pid, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT),
        }
    }

    /// Takes the status of a child that has ended and whose process group goes on without it.
    pub(super) fn reap_alone(&self) -> Option<Exit> {
        *self.exit.get_or_init(|| take_status(self.pid, WaitIdOptions::EXITED))
    }

    /// Whether a process that is held by its number still is the same and has not ended.
    fn is_there(&self) -> bool {
        if self.child {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
            return self.exit.get().is_none() && matches!(waitid(WaitId::Pid(self.pid), options), Ok(None));
        }
        match &self.hold {
            Hold::Number(Some(started)) => {
                let now = identity::of(self.id()).ok().flatten();
                now.is_some_and(|now| !now.is_zombie && now.started_ticks == *started)
            }
            Hold::Number(None) => test_kill_process(self.pid) != Err(Errno::SRCH),
            #[cfg(target_os = "linux")]
            Hold::PidFd(_) => true,
        }
    }
}

impl Hold {
    fn of(pid: Pid) -> io::Result<Option<Self>> {
        #[cfg(target_os = "linux")]
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => {
                #[expect(
                    deprecated,
                    reason = "its heir is unsafe, for types that close their descriptor meanwhile: an OwnedFd cannot"
                )]
                let fd = AsyncFd::with_interest(fd, tokio::io::Interest::READABLE)?;
                return Ok(Some(Self::PidFd(fd)));
            }
            Err(Errno::SRCH) => return Ok(None),
            // An old kernel, or a sandbox that refuses what it does not know.
            Err(Errno::NOSYS | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        if identity::IS_TOLD {
            let now = identity::of(pid.as_raw_nonzero().get().unsigned_abs())?;
            return Ok(now.map(|now| Self::Number(Some(now.started_ticks))));
        }
        Ok((test_kill_process(pid) != Err(Errno::SRCH)).then_some(Self::Number(None)))
    }
}

/// How a child ended, if it has.
fn take_status(pid: Pid, options: WaitIdOptions) -> Option<Exit> {
    let status = waitid(WaitId::Pid(pid), options | WaitIdOptions::NOHANG).ok().flatten()?;
    let code = status.exit_status().map(Exit::Code);
    code.or_else(|| status.terminating_signal().map(Exit::Signal))
}
