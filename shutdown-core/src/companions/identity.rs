//! Who a process is, as `/proc` tells it (Linux): its name, its program, its user, when it was started.
//!
//! Elsewhere nobody tells without code that this crate does not have: there only children of our own and the holders of
//! locked PID files are known.

use std::io;
use std::time::{Duration, SystemTime};

/// How much later than its PID file a process may seem to have been started: the clock may have been adjusted since.
pub(super) const CLOCKS_DIFFER: Duration = Duration::from_secs(2);

/// What is known about a process.
#[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "nobody makes one there"))]
#[derive(Clone, Debug)]
pub(super) struct Identity {
    /// The name it has given itself, cut to 15 bytes.
    pub(super) comm: Vec<u8>,
    /// The base name of its program, where we may know it.
    pub(super) program: Option<Vec<u8>>,
    /// Its effective user.
    pub(super) user: u32,
    pub(super) parent: u32,
    /// Whether it has ended, and its parent has not yet taken notice.
    pub(super) is_zombie: bool,
    /// Since the system's start, in ticks. With the number it names one process for ever.
    pub(super) started_ticks: u64,
}

impl Identity {
    /// Whether it is a process of the program of this name: the name is the process's own, or its program's base name. Exactly: not
    /// `pgbouncer_exporter` for `pgbouncer`, though the system cuts its name to `pgbouncer_expor`.
    pub(super) fn is(&self, name: &str) -> bool {
        self.comm == name.as_bytes() || self.program.as_deref() == Some(name.as_bytes())
    }

    /// What it is called, to be shown.
    pub(super) fn name(&self) -> String {
        String::from_utf8_lossy(self.program.as_deref().unwrap_or(&self.comm)).escape_debug().collect()
    }
}

/// The fields of `/proc/PID/stat` that are used here (proc_pid_stat(5)): name, state, parent, start.
#[cfg(any(target_os = "linux", test))]
fn parse_stat(stat: &[u8]) -> Option<(Vec<u8>, u8, u32, u64)> {
    // `pid (name) state ppid …`. A name may hold anything, so from its end.
    let open = stat.iter().position(|byte| *byte == b'(')?;
    let close = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // The state is field 3, the parent field 4, the start field 22.
    let state = *fields.first()?.as_bytes().first()?;
    Some((
        stat.get(open + 1..close)?.to_vec(),
        state,
        fields.get(1)?.parse().ok()?,
        fields.get(19)?.parse().ok()?,
    ))
}

/// The effective user in `/proc/PID/status`: `Uid:` has the real, the effective, and two more.
#[cfg(any(target_os = "linux", test))]
fn parse_user(status: &[u8]) -> Option<u32> {
    let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Uid:"))?;
    std::str::from_utf8(line).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Why `/proc` is not to be believed, if it is not: it may be missing, or be that of another process namespace, whose numbers are
/// other processes.
#[cfg(target_os = "linux")]
pub(super) fn distrust() -> Option<&'static str> {
    match std::fs::read_link("/proc/self") {
        Ok(us) if us.as_os_str() == std::process::id().to_string().as_str() => None,
        Ok(_) => Some("/proc is that of another PID namespace"),
        Err(_) => Some("/proc is not mounted"),
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn distrust() -> Option<&'static str> {
    Some("this system has no /proc")
}

/// Who has this number now; nothing if nobody has, or if we may not see who.
#[cfg(target_os = "linux")]
pub(super) fn of(pid: u32) -> io::Result<Option<Identity>> {
    use std::os::unix::ffi::OsStrExt;

    let read = |file: &str| match std::fs::read(format!("/proc/{pid}/{file}")) {
        Ok(bytes) => Ok(Some(bytes)),
        // ESRCH: it ended between the open and the read.
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(3) => Ok(None),
        Err(error) => Err(error),
    };
    let (Some(stat), Some(status)) = (read("stat")?, read("status")?) else { return Ok(None) };
    let unknown =
        || io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid} is not as proc(5) says"));
    let (comm, state, parent, started_ticks) = parse_stat(&stat).ok_or_else(unknown)?;
    let user = parse_user(&status).ok_or_else(unknown)?;
    // Not for a process of another user, nor for a zombie.
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok().and_then(|path| {
        let name = path.file_name()?.as_bytes();
        // Its file was replaced or removed: the kernel says so behind the name.
        Some(name.strip_suffix(b" (deleted)").unwrap_or(name).to_vec())
    });
    let is_zombie = matches!(state, b'Z' | b'X');
    Ok(Some(Identity { comm, program, user, parent, is_zombie, started_ticks }))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn of(_pid: u32) -> io::Result<Option<Identity>> {
    Err(io::ErrorKind::Unsupported.into())
}

/// When it was started, by today's clock. One that has been set since moves it.
#[cfg(target_os = "linux")]
pub(super) fn started_at(identity: &Identity) -> Option<SystemTime> {
    use rustix::param::clock_ticks_per_second;
    use rustix::time::{ClockId, clock_gettime};

    // As the kernel counts it: the time that the machine slept included.
    let now = clock_gettime(ClockId::Boottime);
    let now = Duration::new(u64::try_from(now.tv_sec).ok()?, u32::try_from(now.tv_nsec).ok()?);
    let second = clock_ticks_per_second().max(1);
    let (whole, rest) = (identity.started_ticks / second, identity.started_ticks % second);
    let after_boot = Duration::from_secs(whole) + Duration::from_nanos(rest * (1_000_000_000 / second));
    SystemTime::now().checked_sub(now.saturating_sub(after_boot))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn started_at(_identity: &Identity) -> Option<SystemTime> {
    None
}

/// The processes of this user and of this process namespace that are called `name`, and are no children of others that are:
/// the first process of each program that runs several.
#[cfg(target_os = "linux")]
pub(super) fn called(name: &str, user: u32) -> io::Result<Vec<u32>> {
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let ours = namespace("self");
    let this = std::process::id();
    let mut hits: Vec<(u32, u32)> = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry.ok().and_then(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) else {
            continue;
        };
        // Whoever ends while we look, or hides, is nobody's.
        let Ok(Some(found)) = of(pid) else { continue };
        let is_it = pid > 1 && pid != this && found.is(name) && found.user == user && !found.is_zombie;
        if is_it && ours.is_some() && namespace(&pid.to_string()) == ours {
            hits.push((pid, found.parent));
        }
    }
    let is_hit = |parent: &u32| hits.iter().any(|(pid, _)| pid == parent);
    Ok(hits.iter().filter(|(_, parent)| !is_hit(parent)).map(|(pid, _)| *pid).collect())
}

#[cfg(not(target_os = "linux"))]
pub(super) fn called(_name: &str, _user: u32) -> io::Result<Vec<u32>> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_holds_anything_does_not_mislead_the_fields_behind_it() {
        let stat = b"4711 (a) Z 1 (b\n) S 12 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 987654 19\n";
        assert_eq!(parse_stat(stat), Some((b"a) Z 1 (b\n".to_vec(), b'S', 12, 987_654)));
        for bad in [&b""[..], b"1", b"1 (a", b"1 (a) S", b"1 (a) S 1 2 3", b")(", b"1 (a) S x 1 2 3"] {
            assert_eq!(parse_stat(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_user_is_the_effective_one() {
        assert_eq!(parse_user(b"Name:\tx\nUid:\t1000\t1001\t1002\t1003\nGid:\t5\t6\t7\t8\n"), Some(1001));
        assert_eq!(parse_user(b"Name:\tUid:\n"), None);
        assert_eq!(parse_user(b"Uid:\t1\n"), None);
    }

    #[test]
    fn a_name_is_matched_whole() {
        let identity = Identity {
            comm: b"pgbouncer_expor".to_vec(),
            program: Some(b"pgbouncer_exporter".to_vec()),
            user: 0,
            parent: 1,
            is_zombie: false,
            started_ticks: 0,
        };
        assert!(identity.is("pgbouncer_exporter") && identity.is("pgbouncer_expor"));
        for other in ["pgbouncer", "pgbouncer_export", "bouncer_exporter", "", "PGBOUNCER_EXPORTER"] {
            assert!(!identity.is(other), "{other}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_start_after_years_of_uptime_is_still_told() {
        let mut this = of(std::process::id()).unwrap().unwrap();
        // A hundred ticks a second: three years, which no machine here has been up.
        this.started_ticks = 3 * 365 * 24 * 3600 * 100;
        let later = started_at(&this).unwrap();
        assert!(later >= SystemTime::now() - Duration::from_secs(1), "not yet, and so now: {later:?}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_is_known_and_was_started_a_moment_ago() {
        let this = of(std::process::id()).unwrap().unwrap();
        let program = std::env::current_exe().unwrap();
        assert!(this.is(program.file_name().unwrap().to_str().unwrap()));
        assert_eq!(this.user, rustix::process::geteuid().as_raw());
        let age = SystemTime::now().duration_since(started_at(&this).unwrap()).unwrap();
        assert!(age < Duration::from_secs(3600), "{age:?}");
        assert!(of(u32::MAX).unwrap().is_none());
    }
}
