//! The system calls of a process, as strace shows them, and one of them that fails or kills.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// A system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// Which call of that name in the process it is.
    pub nth: usize,
    /// As strace shows it.
    pub text: String,
}

/// Memory changes no file: to be killed there is to be killed at the next call.
const MEMORY: [&str; 6] = ["brk", "mmap", "munmap", "mprotect", "mremap", "madvise"];

impl Call {
    /// What kills the process as it enters this call.
    pub fn killing(&self) -> String {
        format!("{}:signal=KILL:when={}", self.name, self.nth)
    }

    /// What has this call fail: `ENOSPC`.
    pub fn failing(&self, error: &str) -> String {
        format!("{}:error={error}:when={}", self.name, self.nth)
    }
}

/// `command` under strace, whose output goes to `trace`, with this injection.
pub fn strace(command: &Command, trace: &Path, inject: Option<&str>) -> Command {
    let mut traced = Command::new("strace");
    traced.args(["-f", "-s", "200", "-o"]).arg(trace);
    traced.args(inject.map(|inject| format!("--inject={inject}")));
    traced.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => traced.env(name, value),
            None => traced.env_remove(name),
        };
    }
    traced
}

/// The calls that strace has written down, but for those that only move memory.
///
/// # Panics
///
/// If there is more than one thread: then they come in no order.
pub fn calls(trace: &Path) -> Vec<Call> {
    let trace = fs::read_to_string(trace).expect("strace has written it");
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut calls = Vec::new();
    let mut threads = std::collections::BTreeSet::new();
    for line in trace.lines() {
        let (pid, text) = line.split_once(' ').expect("a process and its call");
        threads.insert(pid);
        let Some((name, _)) = text.trim_start().split_once('(') else { continue };
        if !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_') {
            continue;
        }
        let nth = *seen.entry(name).and_modify(|nth| *nth += 1).or_insert(1);
        if !MEMORY.contains(&name) {
            calls.push(Call { name: name.to_owned(), nth, text: text.trim().to_owned() });
        }
    }
    assert_eq!(threads.len(), 1, "one thread, so that the calls come in one order");
    calls
}
