//! Finding a companion's process, and making sure that it is the companion.
//!
//! The order leaves no race: the number is read, the process is held, it is looked at, and only then a signal goes to what is
//! held. Whatever does not fit is refused, and nobody is signalled.

use std::io;

use rustix::io::Errno;
use rustix::process::{Pid, geteuid, getppid, test_kill_process};
use tokio::time::Instant;

use super::companion::{Companion, NotRunning, Refusal};
use super::identity::{self, Identity};
use super::pid_file::{EMPTY_FOR, NoNumber, PidFile, PidFileKind, Reading, Unread};
use super::process::Process;

/// How often an empty PID file is looked at again, for [`EMPTY_FOR`].
const AGAIN: std::time::Duration = std::time::Duration::from_millis(20);

/// A companion's process, and the PID file that named it.
pub(super) struct Found {
    pub(super) process: Process,
    pub(super) named_by: Option<(PidFile, Reading)>,
}

/// Why there is no process to signal.
#[derive(Debug)]
pub(super) enum NotFound {
    NotRunning(NotRunning),
    Refused(Refusal),
}

impl From<NotRunning> for NotFound {
    fn from(why: NotRunning) -> Self {
        Self::NotRunning(why)
    }
}

impl From<Refusal> for NotFound {
    fn from(why: Refusal) -> Self {
        Self::Refused(why)
    }
}

/// Finds a companion by its PID file, and, if it is to be looked for like that, by its name.
pub(super) async fn find(companion: &Companion) -> Result<Found, NotFound> {
    let by_file = match &companion.pid_file {
        Some(file) => by_file(&companion.name, file).await,
        None => Err(NotRunning::NoPidFile.into()),
    };
    match by_file {
        // What the file says is nobody's word about this companion. But a process that is, and may not be signalled, is it.
        Err(NotFound::Refused(Refusal::AnotherUser { .. } | Refusal::Ourselves(_))) => by_file,
        Err(_) if companion.by_name => by_name(&companion.name),
        _ => by_file,
    }
}

/// Finds the process that this PID file names, if it is called `name`.
pub(super) async fn by_file(name: &str, file: &PidFile) -> Result<Found, NotFound> {
    let path = || file.path().display().to_string();
    let until = Instant::now() + EMPTY_FOR;
    let reading = loop {
        match file.read() {
            Ok(reading) => break reading,
            Err(Unread::Missing) => return Err(NotRunning::NoPidFile.into()),
            Err(Unread::NotHeld) => return Err(NotRunning::NotHeld.into()),
            Err(Unread::Empty) if Instant::now() < until => tokio::time::sleep(AGAIN).await,
            Err(Unread::Empty) => {
                return Err(Refusal::PidFile { path: path(), problem: "is empty".to_owned() }.into());
            }
            Err(Unread::First(_)) => {
                return Err(Refusal::PidFile { path: path(), problem: NoNumber::One.to_string() }.into());
            }
            Err(Unread::Unusable(problem)) => return Err(Refusal::PidFile { path: path(), problem }.into()),
        }
    };
    let process = confirm(name, file, &reading)?;
    Ok(Found { process, named_by: Some((file.clone(), reading)) })
}

/// The process that this reading names, if it is called `name`.
pub(super) fn confirm(name: &str, file: &PidFile, reading: &Reading) -> Result<Process, NotFound> {
    let pid = reading.pid;
    refuse_ourselves(pid)?;
    let process = hold(pid)?.ok_or(NotRunning::Stale(pid))?;
    if let Some(identity) = look(file.kind(), &process)? {
        check(name, file, reading, &identity)?;
    }
    Ok(process)
}

fn hold(pid: u32) -> Result<Option<Process>, Refusal> {
    Process::hold(pid).map_err(|error| Refusal::Unknown { pid: Some(pid), why: error.to_string() })
}

fn refuse_ourselves(pid: u32) -> Result<(), Refusal> {
    let parent = getppid().map(|parent| parent.as_raw_nonzero().get().unsigned_abs());
    if pid == std::process::id() || Some(pid) == parent { Err(Refusal::Ourselves(pid)) } else { Ok(()) }
}

/// Who the process is that is held. Where nobody tells, only a lock that is held says that it is who the file was written for.
fn look(kind: PidFileKind, process: &Process) -> Result<Option<Identity>, NotFound> {
    let pid = process.id();
    let unknown = |why: String| Refusal::Unknown { pid: Some(pid), why };
    match identity::distrust() {
        Some(_) if kind == PidFileKind::Locked => return Ok(None),
        Some(why) => return Err(unknown(format!("{why}, so only a locked PID file is believed")).into()),
        None => {}
    }
    match identity::of(pid) {
        Ok(Some(identity)) if identity.is_zombie => Err(NotRunning::Zombie(pid).into()),
        Ok(Some(identity)) => Ok(Some(identity)),
        Ok(None) if process.is_over() => Err(NotRunning::Stale(pid).into()),
        Ok(None) => Err(unknown("/proc does not show it (ProtectProc=, hidepid=)".to_owned()).into()),
        Err(error) => Err(unknown(error.to_string()).into()),
    }
}

/// Whether the process is the one that the file was written for.
fn check(name: &str, file: &PidFile, reading: &Reading, identity: &Identity) -> Result<(), Refusal> {
    let pid = reading.pid;
    if !identity.is(name) {
        return Err(Refusal::AnotherProgram { pid, called: identity.name() });
    }
    let me = geteuid();
    // Asked by the signal that is none: whoever has CAP_KILL may, and need not be root.
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if identity.user != me.as_raw() && number.is_some_and(|pid| test_kill_process(pid) == Err(Errno::PERM)) {
        return Err(Refusal::AnotherUser { pid, user: identity.user });
    }
    // Whoever may write the file chooses the process. Where only root may, that is root's choice.
    if ![0, me.as_raw(), identity.user].contains(&reading.owner) {
        return Err(Refusal::ForeignFile { path: file.path().display().to_string(), owner: reading.owner });
    }
    // The lock of a locked one is held now, by whoever wrote it.
    if file.kind() != PidFileKind::Locked {
        let why = || "its start is not told".to_owned();
        let started = identity::started_at(identity);
        let started = started.ok_or_else(|| Refusal::Unknown { pid: Some(pid), why: why() })?;
        let later = started.duration_since(reading.written).unwrap_or_default();
        if later > identity::CLOCKS_DIFFER {
            return Err(Refusal::YoungerThanFile { pid, seconds: later.as_secs() });
        }
    }
    Ok(())
}

/// Finds the only process of this user that is called `name`.
fn by_name(name: &str) -> Result<Found, NotFound> {
    let unseen = |error: io::Error| Refusal::Unknown { pid: None, why: error.to_string() };
    if let Some(why) = identity::distrust() {
        return Err(Refusal::Unknown { pid: None, why: why.to_owned() }.into());
    }
    let user = geteuid().as_raw();
    let pid = match identity::called(name, user).map_err(unseen)?.as_slice() {
        [] => return Err(NotRunning::NobodyOfThatName.into()),
        [pid] => *pid,
        several => return Err(Refusal::Several(several.to_vec()).into()),
    };
    refuse_ourselves(pid)?;
    let process = hold(pid)?.ok_or(NotRunning::NobodyOfThatName)?;
    // Looked at again, now that the number cannot be given to another any more.
    match identity::of(pid).map_err(unseen)? {
        Some(identity) if identity.is(name) && identity.user == user && !identity.is_zombie => {
            Ok(Found { process, named_by: None })
        }
        _ => Err(NotRunning::NobodyOfThatName.into()),
    }
}
