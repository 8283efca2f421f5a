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
use std::time::Duration;

use parking_lot::Mutex;
#[cfg(target_os = "linux")]
use rustix::event::{PollFd, PollFlags, Timespec, poll};
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

/// A process that is held. It belongs to no runtime.
#[derive(Debug)]
pub(super) struct Process {
    pid: Pid,
    hold: Hold,
    /// Whether it is a child of ours that nobody else waits for, and the first of a process group.
    is_child: bool,
    /// Set for a child once it has ended and its status is taken; nothing in it if somebody else took it.
    exit: Mutex<Option<Option<Exit>>>,
}

#[derive(Debug)]
enum Hold {
    #[cfg(target_os = "linux")]
    PidFd(OwnedFd),
    /// The start time, where it can be known.
    Number(Option<u64>),
}

impl Process {
    /// Holds the process of this number; nothing if there is none.
    pub(super) fn hold(pid: u32) -> io::Result<Option<Self>> {
        Self::hold_as(pid, false)
    }

    /// Holds a child that nobody else waits for, the first of its process group.
    pub(super) fn hold_child(pid: u32) -> io::Result<Self> {
        Self::hold_as(pid, true)?.ok_or_else(|| Errno::SRCH.into())
    }

    fn hold_as(pid: u32, is_child: bool) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let Some(hold) = Hold::of(number)? else { return Ok(None) };
        Ok(Some(Self { pid: number, hold, is_child, exit: Mutex::new(None) }))
    }

    pub(super) fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    pub(super) fn is_child(&self) -> bool {
        self.is_child
    }

    /// Sends a signal. `false` if the process has ended.
    pub(super) fn signal(&self, signal: StopSignal) -> io::Result<bool> {
        let sent = match &self.hold {
            #[cfg(target_os = "linux")]
            Hold::PidFd(fd) => pidfd_send_signal(fd, signal.signal()),
            Hold::Number(_) if self.is_over() => return Ok(false),
            Hold::Number(_) => kill_process(self.pid, signal.signal()),
        };
        match sent {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Kills it, and what else is in the process group of a child. Nothing is waited for.
    pub(super) fn kill(&self) {
        // Whoever has ended, or is another's, has nothing to lose.
        let _ = self.signal(StopSignal::Kill);
        let exit = self.exit.lock();
        if self.is_child && exit.is_none() {
            // Its number is the group's as long as its status is not taken.
            let _ = kill_process_group(self.pid, Signal::KILL);
        }
    }

    /// Whether it has ended.
    pub(super) fn is_over(&self) -> bool {
        match &self.hold {
            #[cfg(target_os = "linux")]
            Hold::PidFd(fd) => {
                let mut asked = [PollFd::new(fd, PollFlags::IN)];
                matches!(poll(&mut asked, Some(&Timespec::default())), Ok(1..))
            }
            Hold::Number(_) if self.is_child => {
                let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
                self.exit.lock().is_some() || !matches!(waitid(WaitId::Pid(self.pid), options), Ok(None))
            }
            Hold::Number(Some(started)) => {
                let now = identity::of(self.id()).ok().flatten();
                now.is_none_or(|now| now.is_zombie || now.started_ticks != *started)
            }
            Hold::Number(None) => test_kill_process(self.pid) == Err(Errno::SRCH),
        }
    }

    /// Waits until it has ended, and gives how, for a child, whose status it takes.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe, and any number may wait.
    pub(super) async fn ended(&self) -> Option<Exit> {
        self.has_ended().await;
        self.reap(true)
    }

    /// Waits until it has ended; a child is left as it is.
    pub(super) async fn has_ended(&self) {
        #[cfg(target_os = "linux")]
        if let Hold::PidFd(fd) = &self.hold
            && let Ok(watched) = watch(fd)
        {
            while !self.is_over() {
                match watched.readable().await {
                    Ok(mut ready) => ready.clear_ready(),
                    // The runtime is going away; the process is not.
                    Err(_) => std::future::pending().await,
                }
            }
            return;
        }
        while !self.is_over() {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// How a child ended that has ended, without taking its status.
    pub(super) fn peek(&self) -> Option<Exit> {
        let exit = self.exit.lock();
        match *exit {
            Some(exit) => exit,
            None if self.is_child => take_status(self.pid, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT),
            None => None,
        }
    }

    /// Takes the status of a child that has ended. `with_group`: what is left of its process group is killed first; while the child
    /// is a zombie its number is that group's and nobody else's.
    pub(super) fn reap(&self, with_group: bool) -> Option<Exit> {
        if !self.is_child {
            return None;
        }
        let mut exit = self.exit.lock();
        *exit.get_or_insert_with(|| {
            // Gone if somebody else has taken it: then the number may be anybody's.
            take_status(self.pid, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
            if with_group {
                // Nobody left is ESRCH.
                let _ = kill_process_group(self.pid, Signal::KILL);
            }
            take_status(self.pid, WaitIdOptions::EXITED)
        })
    }
}

/// Has the runtime that waits watch the descriptor, a copy of it: so a process can be waited for from any of them, and does not
/// depend on one.
#[cfg(target_os = "linux")]
fn watch(fd: &OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(
        deprecated,
        reason = "its heir is unsafe, for types that close their descriptor meanwhile: an OwnedFd cannot"
    )]
    AsyncFd::with_interest(fd.try_clone()?, tokio::io::Interest::READABLE)
}

impl Hold {
    fn of(pid: Pid) -> io::Result<Option<Self>> {
        #[cfg(target_os = "linux")]
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => return Ok(Some(Self::PidFd(fd))),
            // Nobody's, or that of a thread that is no process (INVAL, from Linux 6.9 on NOENT).
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(None),
            // An old kernel, or a sandbox that refuses what it does not know.
            Err(Errno::NOSYS | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        if identity::distrust().is_none() {
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
