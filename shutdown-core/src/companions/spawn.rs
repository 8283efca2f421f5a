//! The one place with unsafe code: a child that is killed when we die.
//!
//! The standard library cannot ask for `PR_SET_PDEATHSIG`, and no program can ask for it in a child's place. Without it a
//! companion goes on when this process is killed, and keeps the port from the next one: a test shows so.

#![allow(unsafe_code, reason = "`pre_exec` is unsafe; see the proof below")]

use std::process::Command;

/// Has the kernel kill the child when the thread that starts it ends (`PR_SET_PDEATHSIG`, Linux).
#[cfg(target_os = "linux")]
pub(super) fn dies_with_this_thread(command: &mut Command) {
    use std::os::unix::process::CommandExt;

    use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

    let us = getpid();
    let ask = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // Had we died before it was asked for, it would never come.
        if getppid() == Some(us) { Ok(()) } else { Err(std::io::Error::from_raw_os_error(3)) }
    };
    // SAFETY: `pre_exec` asks that its closure does nothing that may not be done between fork and exec in a process of several
    // threads: take no lock, allocate nothing, touch no memory that another thread was changing. This one makes two system
    // calls, prctl(2) and getppid(2) – directly, or by libc's wrappers, which do nothing else –, and compares two numbers that it
    // has copies of. Its errors hold an error number and no allocation. It cannot panic, and unwinds nowhere.
    unsafe {
        command.pre_exec(ask);
    }
}

/// Does nothing where there is no such thing.
#[cfg(not(target_os = "linux"))]
pub(super) fn dies_with_this_thread(_command: &mut Command) {}
