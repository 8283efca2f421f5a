//! One companion: who it is, where it is found, how it is ended. Data only.

use std::fmt;

use crate::companions::ladder::{Ladder, StopSignal};
use crate::companions::pid_file::PidFile;
use crate::companions::process::Exit;

/// A process that ends when the service does.
///
/// It is found by its PID file, by its name, or because it was launched here; and it is ended only if it is called as it is
/// said to be.
#[derive(Clone, Debug)]
pub struct Companion {
    pub(super) name: String,
    pub(super) pid_file: Option<PidFile>,
    pub(super) by_name: bool,
    pub(super) launch: Option<Launch>,
    pub(super) ladder: Ladder,
    pub(super) group: u32,
}

impl Companion {
    /// A companion that has written this PID file. `name` is what its process is called: its own name (`comm`) or its
    /// program's base name.
    pub fn with_pid_file(name: impl Into<String>, file: PidFile) -> Self {
        Self { pid_file: Some(file), ..Self::new(name.into()) }
    }

    /// A companion that is found by its name alone, through `/proc` (Linux): exactly that name, this process's user, and the
    /// only one. Several are refused.
    pub fn named(name: impl Into<String>) -> Self {
        Self { by_name: true, ..Self::new(name.into()) }
    }

    /// A companion that [`Companions::launch`](super::Companions::launch) starts.
    pub fn launched(name: impl Into<String>, launch: Launch) -> Self {
        Self { launch: Some(launch), ..Self::new(name.into()) }
    }

    fn new(name: String) -> Self {
        Self { name, pid_file: None, by_name: false, launch: None, ladder: Ladder::default(), group: 0 }
    }

    /// With the PID file that a launched one writes. One that forks away – its first process ends well and leaves a daemon –
    /// is followed through it.
    #[must_use]
    pub fn pid_file(self, file: PidFile) -> Self {
        Self { pid_file: Some(file), ..self }
    }

    /// Looks for it by its name as well, when its PID file names no process that it could be.
    #[must_use]
    pub fn find_by_name(self) -> Self {
        Self { by_name: true, ..self }
    }

    /// By which signals it is ended. Default: [`Ladder::default`].
    #[must_use]
    pub fn ladder(self, ladder: Ladder) -> Self {
        Self { ladder, ..self }
    }

    /// When it is ended: groups one after another, the lowest first, and those of one group at once. Default: 0.
    ///
    /// Who accepts clients goes before what it needs: proxies before databases.
    #[must_use]
    pub fn group(self, group: u32) -> Self {
        Self { group, ..self }
    }

    /// What its process is called.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// How a companion is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    pub(super) command: Vec<String>,
    pub(super) on_exit: OnExit,
}

impl Launch {
    /// A program and its arguments. It is found in `PATH` if its name has no slash, and is started without a shell.
    ///
    /// # Panics
    ///
    /// If the command is empty.
    pub fn new(command: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let command: Vec<String> = command.into_iter().map(Into::into).collect();
        assert!(!command.is_empty(), "a command has a program");
        Self { command, on_exit: OnExit::default() }
    }

    /// What an end of it means. Default: [`OnExit::Restart`].
    #[must_use]
    pub fn on_exit(self, on_exit: OnExit) -> Self {
        Self { on_exit, ..self }
    }

    /// What an end of it means.
    pub fn when_it_exits(&self) -> OnExit {
        self.on_exit
    }
}

/// What it means that a launched companion ends while the service runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnExit {
    /// It is started again: at once-ish, and later each time ([`Companions::launch`](super::Companions::launch)).
    #[default]
    Restart,
    /// The service cannot go on without it: it shuts down, as for a critical task.
    Fatal,
}

impl OnExit {
    const ALL: [Self; 2] = [Self::Restart, Self::Fatal];

    /// The policy as written in configurations: `restart`, `fatal`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Fatal => "fatal",
        }
    }

    /// The policy of this name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == text)
    }
}

/// What became of a companion.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// It ended after the first signal.
    Exited {
        /// Its number.
        pid: u32,
        /// How, for a child of ours.
        exit: Option<Exit>,
    },
    /// It took more than the first signal.
    Escalated {
        /// Its number.
        pid: u32,
        /// The last signal's number.
        signal: i32,
        /// How, for a child of ours.
        exit: Option<Exit>,
    },
    /// There was nothing to end.
    NotRunning(NotRunning),
    /// It was not signalled, because it may not be who it should be, or may not be signalled.
    Refused(Refusal),
    /// It still runs.
    TimedOut {
        /// Its number.
        pid: u32,
        /// The last signal's number.
        signal: i32,
    },
}

impl Ending {
    /// The outcome as written in reports: `exited`, `escalated`, `not running`, `refused`, `timed out`.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Exited { .. } => "exited",
            Self::Escalated { .. } => "escalated",
            Self::NotRunning(_) => "not running",
            Self::Refused(_) => "refused",
            Self::TimedOut { .. } => "timed out",
        }
    }

    /// Whether it is gone.
    pub const fn is_well(&self) -> bool {
        matches!(self, Self::Exited { .. } | Self::Escalated { .. } | Self::NotRunning(_))
    }
}

/// Why there was nothing to end.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotRunning {
    /// Its PID file is not there.
    NoPidFile,
    /// Nobody holds its PID file's lock.
    NotHeld,
    /// There is no process of the number in its PID file: the file is stale.
    Stale(u32),
    /// The process has ended, and its parent has not yet taken notice.
    Zombie(u32),
    /// Nobody is called like that.
    NobodyOfThatName,
    /// It was launched, and has ended since.
    Ended(Option<Exit>),
    /// It was to be launched, and was not.
    NotLaunched,
}

impl fmt::Display for NotRunning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPidFile => f.write_str("it has no PID file"),
            Self::NotHeld => f.write_str("nobody holds the lock of its PID file"),
            Self::Stale(pid) => write!(f, "its PID file is stale: there is no process {pid}"),
            Self::Zombie(pid) => write!(f, "process {pid} has ended, and its parent has not taken notice"),
            Self::NobodyOfThatName => f.write_str("no process of this user is called like that"),
            Self::Ended(Some(exit)) => write!(f, "it {exit} before"),
            Self::Ended(None) => f.write_str("it has ended before"),
            Self::NotLaunched => f.write_str("it was not launched"),
        }
    }
}

/// Why a companion was not signalled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Its PID file says nothing that could be a companion's number.
    PidFile {
        /// Where it is.
        path: String,
        /// What is wrong with it: the end of a sentence.
        problem: String,
    },
    /// The PID file has another owner than root, this process's user, or the process's.
    ForeignFile {
        /// Where it is.
        path: String,
        /// Whose it is.
        owner: u32,
    },
    /// The number is this process's own, or its parent's.
    Ourselves(u32),
    /// The process is called otherwise: the number is another's by now.
    AnotherProgram {
        /// Its number.
        pid: u32,
        /// What it is called.
        called: String,
    },
    /// The process was started after the PID file was written: the number is another's by now.
    YoungerThanFile {
        /// Its number.
        pid: u32,
        /// By how many seconds.
        seconds: u64,
    },
    /// It belongs to another user, and this process may not signal it.
    AnotherUser {
        /// Its number.
        pid: u32,
        /// Whose it is.
        user: u32,
    },
    /// The system does not let this process signal it.
    NotAllowed {
        /// Its number.
        pid: u32,
    },
    /// It is another companion's process, which is being ended as that.
    Twice(u32),
    /// More than one is called like that.
    Several(Vec<u32>),
    /// What the process is cannot be seen.
    Unknown {
        /// Its number, if it has one.
        pid: Option<u32>,
        /// Why.
        why: String,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PidFile { path, problem } => write!(f, "the PID file {path} {problem}"),
            Self::ForeignFile { path, owner } => write!(
                f,
                "the PID file {path} belongs to user {owner}, who is neither root, nor this process's user, nor the \
                 companion's"
            ),
            Self::Ourselves(pid) => write!(f, "process {pid} is this service itself, or its parent"),
            Self::AnotherProgram { pid, called } => write!(f, "process {pid} is called {called}"),
            Self::YoungerThanFile { pid, seconds } => write!(
                f,
                "process {pid} was started {seconds} s after its PID file was written, so it is another one (or the clock \
                 was set: touch the file then)"
            ),
            Self::AnotherUser { pid, user } => {
                write!(f, "process {pid} belongs to user {user}, and this process may not signal it")
            }
            Self::NotAllowed { pid } => write!(f, "this process may not signal process {pid}"),
            Self::Twice(pid) => write!(f, "process {pid} is another companion's already"),
            Self::Several(pids) => {
                let pids: Vec<_> = pids.iter().map(ToString::to_string).collect();
                write!(f, "several processes are called like that: {}", pids.join(", "))
            }
            Self::Unknown { pid: Some(pid), why } => write!(f, "what process {pid} is cannot be seen: {why}"),
            Self::Unknown { pid: None, why } => write!(f, "the processes cannot be seen: {why}"),
        }
    }
}

/// What became of a companion that was not ended well: the stage task's error.
#[derive(Clone, Debug)]
pub(super) struct NotEnded(pub(super) Ending);

impl fmt::Display for NotEnded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Ending::Refused(why) => write!(f, "refused, no signal was sent: {why}"),
            Ending::TimedOut { pid, signal } => {
                let name = StopSignal::of_number(*signal)
                    .map_or_else(|| signal.to_string(), |name| format!("SIG{name}"));
                write!(f, "process {pid} still runs, after every signal up to {name}")
            }
            well => f.write_str(well.as_str()),
        }
    }
}

impl std::error::Error for NotEnded {}
