//! `--reap`: takes the exit status of orphans that the system hands to this process.
//!
//! A process whose parent has ended is handed to process 1 of its container, which has to wait for it: until somebody does,
//! its entry stays, as a zombie, and a container has a limited number of them (`pids.max`). An init does nothing else; a
//! proxy that is process 1 itself does it when asked to.
//!
//! It looks in `/proc`, which every container has. It is for an image whose only program is the proxy; with an init
//! (`docker run --init`, a shared process namespace in Kubernetes) no orphan comes here.
//!
//! Nothing polls: each SIGCHLD is a look at what has ended. Several may have ended behind one signal, so all are looked at.

use std::io;

use rustix::process::{Pid, WaitId, WaitIdOptions, child_subreaper, waitid};
use shutdown_core::ShutdownCoordinator;
use shutdown_core::companions::Companions;
use tokio::signal::unix::{SignalKind, signal};

/// Reaps from now on, on the coordinator's own runtime, to the end of the process.
///
/// A process that no orphans are handed to says so, and does nothing.
///
/// # Errors
///
/// The system refuses the handler of SIGCHLD.
pub(crate) fn start(shutdown: ShutdownCoordinator, companions: &Companions) -> io::Result<()> {
    let is_given_orphans = std::process::id() == 1 || child_subreaper().is_ok_and(|of| of.is_some());
    let Some(runtime) = shutdown.own_runtime().filter(|_| is_given_orphans) else {
        tracing::warn!(
            "--reap does nothing: this is neither process 1 nor a subreaper, so no orphans come here"
        );
        return Ok(());
    };
    let _inside = runtime.enter();
    let mut children = signal(SignalKind::child())?;
    let companions = companions.clone();
    runtime.spawn(async move {
        loop {
            // First a look: what ended before the handler stood has sent its signal to nobody.
            // It reads files: not on the thread that stops the service.
            let companions = companions.clone();
            let _ = tokio::task::spawn_blocking(move || reap(&companions)).await;
            if children.recv().await.is_none() {
                return;
            }
        }
    });
    Ok(())
}

/// Takes the exit status of each orphan that has ended, by its number: a wait for *any* child would rob whoever started
/// one of its status.
fn reap(companions: &Companions) {
    for pid in ended_children() {
        // A process that the proxy has started is waited for by who started it.
        if companions.has_launched(pid.as_raw_nonzero().get().unsigned_abs()) {
            continue;
        }
        match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(None) => tracing::debug!(pid = pid.as_raw_nonzero().get(), "an orphan has threads that go on"),
            Ok(Some(_)) => tracing::debug!(pid = pid.as_raw_nonzero().get(), "an orphan has ended"),
            // Somebody else has waited for it.
            Err(error) => tracing::debug!(%error, "an orphan that is gone"),
        }
    }
}

/// The children of this process that have ended and that nobody has waited for. From `/proc`, because `waitid` for any
/// child shows only the first of them, again and again.
fn ended_children() -> Vec<Pid> {
    let this = std::process::id().to_string();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let numbers = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let ended = |number: &i32| {
        let stat = std::fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
        // `pid (name) state ppid …`, proc_pid_stat(5). A name may hold anything, so from its end.
        let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        fields.next() == Some("Z") && fields.next() == Some(&this)
    };
    numbers.filter(ended).filter_map(Pid::from_raw).collect()
}
