//! One line an edit in the system's log: who did what to which file. Never a secret, nor anything made of one.

use std::path::{Path, PathBuf};

use shutdown_pgbouncer::{Done, Error};
use syslog::{Facility, Formatter3164};

/// Where the system's log listens, if not in its usual place.
const SOCKET: &str = "PGBCTL_SYSLOG";

/// Tells the system's log what became of an edit that may have been written. Where there is none, as in most containers, nobody is
/// told: the edit is done, and the backup says when.
pub(crate) fn tell(what: &str, edit: &Result<Done, Error>) {
    match edit {
        Ok(done) if done.changed => {
            let backup = done.backup.as_deref();
            let backup = backup.map_or_else(String::new, |backup| format!(" backup={}", shown(backup)));
            log(format!("{what} file={}{backup} {}", shown(&done.file), who()));
        }
        Err(Error::Unverified(_)) => log(format!("{what}: exit code 5 {}", who())),
        _ => {}
    }
}

fn log(line: String) {
    let formatter = Formatter3164 {
        facility: Facility::LOG_USER,
        hostname: None,
        process: "pgbctl".to_owned(),
        pid: std::process::id(),
    };
    let logger = match std::env::var_os(SOCKET) {
        Some(path) => syslog::unix_custom(formatter, PathBuf::from(path)),
        None => syslog::unix(formatter),
    };
    if let Ok(mut logger) = logger {
        let _ = logger.info(line);
    }
}

fn who() -> String {
    let uid = rustix::process::getuid().as_raw();
    // Behind sudo the one who typed it, as the environment says.
    match std::env::var("SUDO_USER") {
        Ok(user) => format!("uid={uid} sudo_user={}", plain(&user)),
        Err(_) => format!("uid={uid}"),
    }
}

fn shown(path: &Path) -> String {
    plain(&path.display().to_string())
}

/// Without what could begin a line of its own.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
