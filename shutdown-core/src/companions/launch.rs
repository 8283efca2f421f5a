//! Launched companions: started, followed, started again; never two, and never left behind.
//!
//! All are started by one thread that lives as long as the process. Linux tells a child of its parent's death when the *thread*
//! that started it ends, so it must be one that never does.

use std::fmt;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

use super::companion::{Launch, NotRunning, OnExit, Refusal};
use super::find::{NotFound, by_file, confirm};
use super::pid_file::{PidFile, Unread};
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
    /// the service's goes; it has the service's environment, but for what systemd tells the service alone, and its working directory.
    ///
    /// Stage Companions ends them; when it is skipped (urgency Immediate) or cut off, they are killed, with their groups. Should this
    /// process end without it – SIGKILL, a third signal, a crash – Linux kills the first process of each (`PR_SET_PDEATHSIG`), without a
    /// goodbye; on other systems they go on. Whoever has forked away goes on everywhere, and so does a program that has
    /// changed its user (setuid, `setpriv`): the kernel forgets the wish then.
    ///
    /// Blocks until all have been started. Once: they cannot be launched a second time, nor after a failure.
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
        // Relaxed: the flag guards only itself.
        if self.launched.swap(true, Ordering::Relaxed) {
            return Err(LaunchError::Twice);
        }
        for (entry, _) in &launched {
            let _ = entry.launched_by.set(shutdown);
        }
        let (send, started) = mpsc::channel();
        let failed = |source| LaunchError::Thread { source };
        let follow = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(source) => return drop(send.send(Err(LaunchError::Thread { source }))),
            };
            runtime.block_on(async move {
                let result = start_all(&launched, shutdown).await;
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

async fn start_all(
    launched: &[(Arc<Entry>, Launch)],
    shutdown: ShutdownCoordinator,
) -> Result<(), LaunchError> {
    for (place, (entry, launch)) in launched.iter().enumerate() {
        let result = start(entry, launch, shutdown);
        if result.is_err() {
            for (entry, _) in &launched[..place] {
                entry.kill();
                if let Ok(process) = entry.last_process() {
                    process.ended().await;
                }
                if let Some(daemon) = daemon_of(entry).await {
                    daemon.kill();
                }
            }
            return result;
        }
    }
    Ok(())
}

/// Starts one, unless it is being ended.
fn start(entry: &Entry, launch: &Launch, shutdown: ShutdownCoordinator) -> Result<(), LaunchError> {
    let companion = &entry.companion;
    if let Some(file) = &companion.pid_file {
        make_room(&companion.name, file, shutdown)?;
    }
    let _starting = entry.starting.lock();
    if entry.state.lock().stopping {
        return Ok(());
    }
    let failed = |source| {
        let (name, program) = (companion.name.clone(), launch.command[0].clone());
        LaunchError::Program { name, program, source }
    };
    let process = spawn(launch).map_err(failed)?;
    let pid = process.id();
    let mut state = entry.state.lock();
    state.process = Some(Arc::new(process));
    state.ended = None;
    drop(state);
    let companion = companion.name.clone();
    shutdown.log(move || tracing::info!(target: "shutdown", companion, pid, "companion started"));
    Ok(())
}

/// Makes the directory of a PID file, and removes one whose number is nobody's or another program's by now: PgBouncer would refuse
/// to start beside whoever that is. In a container it may say 1, which was the companion's number in the one before.
fn make_room(name: &str, file: &PidFile, shutdown: ShutdownCoordinator) -> Result<(), LaunchError> {
    let failed = |source| LaunchError::Io { name: name.to_owned(), doing: "have its PID file", source };
    file.make_directory().map_err(failed)?;
    let (companion, path) = (name.to_owned(), file.path().display().to_string());
    let reading = match file.read() {
        Ok(reading) | Err(Unread::First(reading)) => reading,
        Err(Unread::Missing | Unread::NotHeld) => return Ok(()),
        Err(unread) => {
            let problem = match unread {
                Unread::Unusable(problem) => problem,
                _ => "is empty".to_owned(),
            };
            shutdown.log(move || {
                tracing::warn!(
                    target: "shutdown", companion, path,
                    "its PID file {problem}: remove it, if the companion does not start"
                );
            });
            return Ok(());
        }
    };
    let pid = reading.pid;
    match confirm(name, file, &reading) {
        Ok(_) => Err(LaunchError::Running { name: name.to_owned(), pid }),
        // Called so, and so it may be it.
        Err(NotFound::Refused(Refusal::YoungerThanFile { .. })) => {
            Err(LaunchError::MaybeRunning { name: name.to_owned(), pid, path })
        }
        Err(
            NotFound::NotRunning(NotRunning::Stale(_) | NotRunning::Zombie(_))
            | NotFound::Refused(Refusal::AnotherProgram { .. } | Refusal::Ourselves(_)),
        ) => {
            if file.remove_stale(&reading).map_err(failed)? {
                shutdown.log(move || {
                    tracing::info!(target: "shutdown", companion, path, pid, "removed a stale PID file");
                });
            }
            Ok(())
        }
        // Its own program knows best.
        Err(_) => Ok(()),
    }
}

fn spawn(launch: &Launch) -> io::Result<Process> {
    let mut command = Command::new(&launch.command[0]);
    command.args(&launch.command[1..]).stdin(Stdio::null()).process_group(0);
    NOT_FOR_CHILDREN.iter().for_each(|name| _ = command.env_remove(name));
    dies_with_this_thread(&mut command);
    let mut child = command.spawn()?;
    // From here on it is waited for by whoever holds the process, not by its handle.
    Process::hold_child(child.id()).inspect_err(|_| {
        // Out of descriptors, for example: a process that nobody knows of must not stay.
        let _ = child.kill();
        let _ = child.wait();
    })
}

/// Waits for the end of one, and starts it again or ends the service.
async fn follow(entry: Arc<Entry>, launch: Launch, shutdown: ShutdownCoordinator) {
    let name = entry.companion.name.clone();
    let mut delay = FIRST;
    loop {
        let Some(process) = entry.state.lock().process.clone() else { return };
        let began = Instant::now();
        process.has_ended().await;
        if process.peek() == Some(Exit::Code(0))
            && let Some(daemon) = forked_away(&entry).await
        {
            // Its group may be the daemon's.
            process.reap(false);
            adopt(&entry, daemon, shutdown);
            continue;
        }
        let exit = process.ended().await;
        entry.note_end(exit);
        if shutdown.is_shutting_down() {
            return;
        }
        let mut how = exit.map_or_else(|| "ended".to_owned(), |exit| exit.to_string());
        if exit == Some(Exit::Code(0)) && entry.companion.pid_file.is_none() {
            how += " (has it put itself into the background? then start it in the foreground, or say where its PID file is)";
        }
        if launch.on_exit == OnExit::Fatal {
            let task = format!("companion {name}");
            shutdown.initiate_shutdown(Reason::CriticalTask { task, error: how });
            return;
        }
        if began.elapsed() >= STEADY {
            delay = FIRST;
        }
        loop {
            let (companion, how, again_in_ms) = (name.clone(), how.clone(), crate::report::ms(delay));
            shutdown.log(move || {
                tracing::warn!(target: "shutdown", companion, again_in_ms, "companion {how}: it is started again");
            });
            tokio::select! {
                biased;
                () = shutdown.until(Phase::LameDuck) => return,
                () = tokio::time::sleep(delay) => {}
            }
            delay = (delay * 2).min(LONGEST);
            match start(&entry, &launch, shutdown) {
                Ok(()) => {
                    entry.state.lock().restarts += 1;
                    break;
                }
                // The daemon was slow to write its PID file.
                Err(LaunchError::Running { .. }) if let Some(daemon) = daemon_of(&entry).await => {
                    adopt(&entry, daemon, shutdown);
                    break;
                }
                Err(error) => {
                    let (companion, error) = (name.clone(), crate::error::sentence(&error));
                    shutdown.log(move || {
                        tracing::warn!(target: "shutdown", companion, error, "a companion did not start");
                    });
                }
            }
        }
        if entry.state.lock().stopping {
            return;
        }
    }
}

/// Follows a daemon in place of the process that has left it behind.
fn adopt(entry: &Entry, daemon: Process, shutdown: ShutdownCoordinator) {
    let (companion, pid) = (entry.companion.name.clone(), daemon.id());
    let mut state = entry.state.lock();
    state.process = Some(Arc::new(daemon));
    state.ended = None;
    drop(state);
    shutdown.log(move || {
        tracing::info!(target: "shutdown", companion, pid, "it has forked away: followed by its PID file");
    });
}

async fn daemon_of(entry: &Entry) -> Option<Process> {
    let file = entry.companion.pid_file.as_ref()?;
    by_file(&entry.companion.name, file).await.ok().map(|found| found.process)
}

/// The daemon that a companion has left behind, once its PID file names it.
async fn forked_away(entry: &Entry) -> Option<Process> {
    entry.companion.pid_file.as_ref()?;
    let until = Instant::now() + FORKS_WITHIN;
    loop {
        match daemon_of(entry).await {
            Some(daemon) => return Some(daemon),
            None if Instant::now() >= until || entry.state.lock().stopping => return None,
            None => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Why a companion could not be launched.
#[derive(Debug)]
#[non_exhaustive]
pub enum LaunchError {
    /// Its program cannot be started: the command is wrong, or the system has no room for it.
    Program {
        /// Its name.
        name: String,
        /// The program.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// The place of its PID file cannot be used.
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
    /// Its PID file names a process that is called so, but was started after the file was written. The operator's to find out.
    MaybeRunning {
        /// Its name.
        name: String,
        /// The process.
        pid: u32,
        /// The file.
        path: String,
    },
    /// They have been launched before. The caller's mistake.
    Twice,
    /// The thread for it could not be made. The platform's fault.
    Thread {
        /// What the system said.
        source: io::Error,
    },
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program { name, program, .. } => {
                write!(f, "the companion {name} cannot be started: the program {program:?}")
            }
            Self::Io { name, doing, .. } => write!(f, "the companion {name} cannot {doing}"),
            Self::Running { name, pid } => {
                write!(f, "the companion {name} runs already, as process {pid}: end that one first")
            }
            Self::MaybeRunning { name, pid, path } => write!(
                f,
                "the companion {name} may run already, as process {pid}, which was started after {path} was written: end it, or \
                 remove the file if it is another one"
            ),
            Self::Twice => f.write_str("the companions have been launched before"),
            Self::Thread { .. } => f.write_str("companions cannot be launched"),
        }
    }
}

impl std::error::Error for LaunchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Running { .. } | Self::MaybeRunning { .. } | Self::Twice => None,
            Self::Program { source, .. } | Self::Io { source, .. } | Self::Thread { source } => Some(source),
        }
    }
}
