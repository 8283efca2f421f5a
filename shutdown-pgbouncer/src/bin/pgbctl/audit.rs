//! One line an edit in the system's log: who did what to which file. Never a secret, nor anything made of one.

use std::path::{Path, PathBuf};

use shutdown_pgbouncer::Done;
use syslog::{Facility, Formatter3164};

/// Where the system's log listens, if not in its usual place.
const SOCKET: &str = "PGBCTL_SYSLOG";

/// Tells the system's log. Where there is none, as in most containers, nobody is told: the edit is done, and the backup says when.
pub(crate) fn tell(what: &str, done: &Done) {
    if !done.changed {
        return;
    }
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
    let backup =
        done.backup.as_deref().map_or_else(String::new, |backup| format!(" backup={}", shown(backup)));
    // Behind sudo the one who typed it.
    let user = ["SUDO_USER", "USER"].iter().find_map(|name| std::env::var(name).ok());
    let user = user.unwrap_or_else(|| rustix::process::getuid().as_raw().to_string());
    let line = format!("{what} file={}{backup} user={}", shown(&done.file), plain(&user));
    if let Ok(mut logger) = logger {
        let _ = logger.info(line);
    }
}

fn shown(path: &Path) -> String {
    plain(&path.display().to_string())
}

/// Without what could begin a line of its own.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
