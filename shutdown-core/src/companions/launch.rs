//! Launched companions: started, followed, started again; never two, and never left behind.
//!
//! All are started by one thread that lives as long as the process. Linux tells a child of its parent's death when the *thread*
//! that started it ends, so it must be one that never does.

use std::fmt;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

use super::companion::{Launch, NotRunning, OnExit, Refusal};
use super::find::{NotFound, by_file, confirm};
use super::ladder::StopSignal;
use super::process::{Exit, Process};
use super::set::{Companions, Entry};
use super::spawn::dies_with_this_thread;
use crate::coordinator::ShutdownCoordinator;
use crate::phase::Phase;
use crate::reason::Reason;

/// How long is waited before a companion is started again, the first time; each time twice as long, up to [`LONGEST`].
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(10);
/// One that has run for so long is started again as if for the first time.
const STEADY: Duration = Duration::from_secs(60);
/// How long the daemon that a companion has left behind may take to write its PID file.
const FORKS_WITHIN: Duration = Duration::from_secs(2);
/// How often that is looked for.
const LOOK: Duration = Duration::from_millis(50);
/// What systemd tells one process alone.
const NOT_FOR_CHILDREN: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

impl Companions {
    /// Starts the companions that are to be launched, and follows them from now on: one that ends is started again, after 100 ms
    /// and each time twice as long up to 10 s (from the beginning once it has run for a minute), or ends the service, as it is
    /// said. None is started again once a shutdown has begun.
    ///
    /// Each has a process group of its own: Ctrl-C in a terminal reaches the service alone, which then ends them in order; and
    /// what is left of the group when its first process has ended is killed. Its standard input is empty, its output goes where
    /// the service's goes.
    ///
    /// Should this process end without ending them – SIGKILL, a third signal, a crash – Linux kills the first process of each
    /// (`PR_SET_PDEATHSIG`), without a goodbye; on other systems they go on. A daemon that has forked away goes on everywhere, and so
    /// does a program that has changed its user (setuid, `setpriv`): the kernel forgets the wish then.
    ///
    /// Blocks until all have been started.
    ///
    /// # Errors
    ///
    /// One cannot be started, or runs already; those that were started before it are killed.
    pub fn launch(&self, shutdown: ShutdownCoordinator) -> Result<(), LaunchError> {
        let launched: Vec<(Arc<Entry>, Launch)> = self
            .entries
            .iter()
            .filter_map(|entry| Some((Arc::clone(entry), entry.companion.launch.clone()?)))
            .collect();
        if launched.is_empty() {
            return Ok(());
        }
        let (send, started) = mpsc::channel();
        let failed = |source| LaunchError::Thread { source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let follow = move || {
            runtime.block_on(async move {
                let result = start_all(&launched).await;
                let is_well = result.is_ok();
                let _ = send.send(result);
                if is_well {
                    for (entry, launch) in launched {
                        tokio::spawn(follow(entry, launch, shutdown));
                    }
                    std::future::pending::<()>().await;
                }
            });
        };
        thread::Builder::new().name("companions".to_owned()).spawn(follow).map_err(failed)?;
        started.recv().unwrap_or_else(|_| Err(failed(io::Error::other("the thread has panicked"))))
    }
}

impl Companions {
    /// Waits until every launched companion that has a PID file is ready, but no longer than `within`, and names those that are
    /// not. Ready is one whose PID file names it – PgBouncer, Redis and most others write it once they listen –, and
    /// PostgreSQL when its file says so.
    ///
    /// Nobody tells that a file has been written: it is looked at every 50 ms.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn ready(&self, within: Duration) -> Vec<String> {
        let until = Instant::now() + within;
        loop {
            let late: Vec<String> = self
                .entries
                .iter()
                .filter(|entry| entry.companion.launch.is_some() && !is_ready(entry))
                .map(|entry| entry.companion.name.clone())
                .collect();
            if late.is_empty() || Instant::now() >= until {
                return late;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn is_ready(entry: &Entry) -> bool {
    let companion = &entry.companion;
    let Some(file) = &companion.pid_file else { return true };
    file.read()
        .is_ok_and(|reading| file.says_ready(&reading) && confirm(&companion.name, file, &reading).is_ok())
}

async fn start_all(launched: &[(Arc<Entry>, Launch)]) -> Result<(), LaunchError> {
    for (entry, launch) in launched {
        let result = start(entry, launch).await;
        if result.is_err() {
            for (entry, _) in launched {
                let Ok(process) = entry.last_process() else { continue };
                // It is a child that nobody has waited for: the number is its own.
                let _ = process.signal(StopSignal::Kill);
                process.ended().await;
            }
            return result;
        }
    }
    Ok(())
}

/// Starts one, unless it is being ended.
async fn start(entry: &Arc<Entry>, launch: &Launch) -> Result<(), LaunchError> {
    let companion = &entry.companion;
    if let Some(file) = &companion.pid_file {
        let io = |source| LaunchError::Io {
            name: companion.name.clone(),
            doing: "have its PID file made",
            source,
        };
        file.make_directory().map_err(io)?;
        if let Ok(reading) = file.read() {
            match confirm(&companion.name, file, &reading) {
                Ok(process) => {
                    let (name, pid) = (companion.name.clone(), process.id());
                    return Err(LaunchError::Running { name, pid });
                }
                // The number is nobody's, or another's by now: PgBouncer would refuse to start beside whoever that is.
                Err(
                    NotFound::NotRunning(NotRunning::Stale(_) | NotRunning::Zombie(_))
                    | NotFound::Refused(
                        Refusal::AnotherProgram { .. }
                        | Refusal::YoungerThanFile { .. }
                        | Refusal::Ourselves(_),
                    ),
                ) => {
                    if file.remove_stale(&reading).map_err(io)? {
                        let path = file.path().display();
                        tracing::info!(target: "shutdown", companion = companion.name, %path, "removed a stale PID file");
                    }
                }
                // Its own program knows best.
                Err(_) => {}
            }
        }
    }
    // Held over the start, so that whoever reaps orphans sees a child of ours only when it is known here.
    let mut state = entry.state.lock();
    if state.stopping {
        return Ok(());
    }
    let process = spawn(launch).map_err(|source| LaunchError::Io {
        name: companion.name.clone(),
        doing: "be started",
        source,
    })?;
    let pid = process.id();
    state.process = Some(Arc::new(process));
    state.ended = None;
    drop(state);
    tracing::info!(target: "shutdown", companion = companion.name, pid, "companion started");
    Ok(())
}

fn spawn(launch: &Launch) -> io::Result<Process> {
    let mut command = Command::new(&launch.command[0]);
    command.args(&launch.command[1..]).stdin(Stdio::null()).process_group(0);
    NOT_FOR_CHILDREN.iter().for_each(|name| _ = command.env_remove(name));
    dies_with_this_thread(&mut command);
    // Not waited for by its handle: by whoever holds the process.
    let child = command.spawn()?;
    Process::hold_child(child.id())
}

/// Waits for the end of one, and starts it again or ends the service.
async fn follow(entry: Arc<Entry>, launch: Launch, shutdown: ShutdownCoordinator) {
    let mut delay = FIRST;
    loop {
        let Some(process) = entry.state.lock().process.clone() else { return };
        let began = Instant::now();
        process.has_ended().await;
        if process.peek() == Some(Exit::Code(0))
            && let Some(daemon) = forked_away(&entry).await
        {
            process.reap_alone();
            let pid = daemon.id();
            tracing::info!(target: "shutdown", companion = entry.companion.name, pid, "it has forked away: followed by its PID file");
            entry.state.lock().process = Some(Arc::new(daemon));
            continue;
        }
        let exit = process.ended().await;
        entry.note_end(exit);
        if shutdown.is_shutting_down() {
            return;
        }
        let how = exit.map_or_else(|| "ended".to_owned(), |exit| exit.to_string());
        if launch.on_exit == OnExit::Fatal {
            let task = format!("companion {}", entry.companion.name);
            shutdown.initiate_shutdown(Reason::CriticalTask { task, error: how });
            return;
        }
        if began.elapsed() >= STEADY {
            delay = FIRST;
        }
        loop {
            let again_in_ms = crate::report::ms(delay);
            tracing::warn!(target: "shutdown", companion = entry.companion.name, again_in_ms, "companion {how}: it is started again");
            tokio::select! {
                biased;
                () = shutdown.until(Phase::LameDuck) => return,
                () = tokio::time::sleep(delay) => {}
            }
            delay = (delay * 2).min(LONGEST);
            entry.state.lock().restarts += 1;
            match start(&entry, &launch).await {
                Ok(()) => break,
                Err(error) => {
                    let error = crate::error::sentence(&error);
                    tracing::warn!(target: "shutdown", companion = entry.companion.name, error, "a companion did not start");
                }
            }
        }
        if entry.state.lock().stopping {
            return;
        }
    }
}

/// The daemon that a companion has left behind, once its PID file names it.
async fn forked_away(entry: &Entry) -> Option<Process> {
    let file = entry.companion.pid_file.as_ref()?;
    let until = Instant::now() + FORKS_WITHIN;
    loop {
        match by_file(&entry.companion.name, file).await {
            Ok(found) => return Some(found.process),
            Err(_) if Instant::now() >= until || entry.state.lock().stopping => return None,
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Why a companion could not be launched.
#[derive(Debug)]
#[non_exhaustive]
pub enum LaunchError {
    /// It cannot be started: its command is wrong, or its place cannot be used.
    Io {
        /// Its name.
        name: String,
        /// What it cannot.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Its PID file names one that runs. The operator's to end.
    Running {
        /// Its name.
        name: String,
        /// Its number.
        pid: u32,
    },
    /// The thread for it could not be made. The platform's fault.
    Thread {
        /// What the system said.
        source: io::Error,
    },
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { name, doing, .. } => write!(f, "the companion {name} cannot {doing}"),
            Self::Running { name, pid } => {
                write!(f, "the companion {name} runs already, as process {pid}: end that one first")
            }
            Self::Thread { .. } => f.write_str("companions cannot be launched"),
        }
    }
}

impl std::error::Error for LaunchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Running { .. } => None,
            Self::Io { source, .. } | Self::Thread { source } => Some(source),
        }
    }
}
