//! A state can be trusted: whatever kills the process that saves it, and whatever stands where it should be.
//!
//! Needs strace, and setpriv and unshare of util-linux; `tests/run` looks for them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_core::state::Document;
use shutdown_tests::process::{Process, Stopwatch, binary};
use shutdown_tests::saved::{Counter, check};
use shutdown_tests::strace;
use shutdown_tests::{PATIENCE, count};
use tempfile::TempDir;

/// What a process said.
struct Ran {
    code: Option<i32>,
    signal: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    /// The lines that tell of something wrong.
    fn complaints(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| !line.trim_start().starts_with("INFO")).collect()
    }

    /// The one line that tells of something wrong.
    fn complaint(&self) -> &str {
        match self.complaints()[..] {
            [line] => line,
            _ => panic!("not one line: {}", self.stderr),
        }
    }

    /// What `show` has shown.
    fn shown(&self) -> Value {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        let shown = serde_json::from_str(&self.stdout).expect("a line of JSON");
        assert_eq!(Value::Null, shown_field(&shown, "torn"), "{shown}");
        shown
    }
}

fn shown_field(shown: &Value, name: &str) -> Value {
    shown.get(name).unwrap_or_else(|| panic!("no {name} in {shown}")).clone()
}

fn run(command: &mut Command) -> Ran {
    let mut process = Process::start(command);
    let status = process.ended(PATIENCE);
    let (stdout, stderr) = (process.stdout(), process.stderr());
    Ran { code: status.code(), signal: status.signal(), stdout, stderr }
}

fn saver(mode: &str, place: &Path) -> Command {
    let mut command = Command::new(binary("state-saver"));
    command.arg(mode).arg(place);
    command
}

/// What a fresh process loads from `dir`, in which it must leave nothing beside the files that belong there.
fn show(dir: &Path) -> Value {
    let shown = run(&mut saver("show", dir)).shown();
    let strangers: Vec<_> =
        names(dir).into_iter().filter(|name| !EXPECTED.contains(&name.as_str())).collect();
    assert!(strangers.is_empty(), "left behind: {strangers:?}");
    shown
}

const EXPECTED: [&str; 3] = ["state.json", "state.json.1", "state.lock"];

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A directory with a state of `n`, and one of `n - 1` before it.
fn prepared(n: u64) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let counter = Counter::in_dir(dir.path());
    counter.store.open().expect("a new directory");
    for _ in 0..n {
        counter.bump();
        counter.store.save().expect("a new directory");
    }
    dir
}

/// The files of `from` in a directory of their own.
fn copy(from: &Path) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for name in names(from) {
        fs::copy(from.join(&name), dir.path().join(&name)).expect("a small file");
    }
    dir
}

/// A system call of a run of `once`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Call {
    call: strace::Call,
    /// In the opening, in the save, or before and after them.
    phase: Option<&'static str>,
}

impl std::ops::Deref for Call {
    type Target = strace::Call;

    fn deref(&self) -> &strace::Call {
        &self.call
    }
}

/// The calls that strace has written down, with what the process was at.
fn calls(trace: &Path) -> Vec<Call> {
    let mut phase = None;
    let with_phase = strace::calls(trace).into_iter().map(|call| {
        let is = |what| call.text.contains(&format!("write(1, \"{what}"));
        let next = match phase {
            _ if is("opening") => Some("open"),
            _ if is("opened") => Some("save"),
            _ if is("saved") => None,
            phase => phase,
        };
        Call { call, phase: std::mem::replace(&mut phase, next) }
    });
    with_phase.collect()
}

/// Runs `once` in `dir` under strace with this injection; what it said, and its calls.
fn traced(dir: &Path, inject: Option<String>) -> (Ran, Vec<Call>) {
    let traces = tempfile::tempdir().expect("a temporary directory");
    let trace = traces.path().join("trace");
    let ran = run(&mut strace::strace(&saver("once", dir), &trace, inject.as_deref()));
    (ran, calls(&trace))
}

/// How many calls of `calls` belong to the opening and the save.
fn inside(calls: &[Call]) -> usize {
    calls.iter().filter(|call| call.phase.is_some()).count()
}

#[test]
fn a_kill_at_any_system_call_leaves_the_old_state_or_the_new_one_whole() {
    const OLD: u64 = 3;
    let dir = prepared(OLD);
    let before = Document::parse(&fs::read(dir.path().join("state.json")).expect("a state")).expect("whole");
    let (ran, reference) = traced(copy(dir.path()).path(), None);
    assert_eq!((ran.code, ran.stdout.lines().last()), (Some(0), Some("saved 4")), "{}", ran.stderr);

    let points: Vec<_> = reference.iter().filter(|call| call.phase.is_some()).collect();
    let mut loaded = Vec::new();
    for (index, point) in points.iter().enumerate() {
        let dir = copy(dir.path());
        let (ran, calls) = traced(dir.path(), Some(point.killing()));
        assert_eq!(ran.signal, Some(9), "{point:?} did not kill it: {}", ran.stdout);
        assert_eq!(inside(&calls), index + 1, "it was killed elsewhere than at {point:?}");
        let shown = show(dir.path());
        let n = shown["n"].as_u64().unwrap_or_else(|| panic!("nothing after {point:?}: {shown}"));
        assert!((OLD..=OLD + 1).contains(&n), "{n} after {point:?}");
        assert_eq!(shown["set_aside"], Value::Array(Vec::new()), "{shown}");
        assert_eq!(shown["restored"], n);
        assert!(shown["was"].as_u64() >= Some(before.incarnation), "{shown}");
        assert!(shown["incarnation"].as_u64() > shown["was"].as_u64(), "{shown}");
        let which = if n == OLD { "old" } else { "new" };
        let text: String = point.text.chars().take(60).collect();
        println!("{:4} {:>10} #{:<3} {which}  {text}", point.phase.unwrap_or(""), point.name, point.nth);
        loaded.push((point, n));
    }
    let save: Vec<_> = loaded.iter().filter(|(point, _)| point.phase == Some("save")).collect();
    println!("{} points, {} of them in the save", loaded.len(), save.len());
    assert!(save.len() > 8);
    // Before one call it is the old one, from then on the new one: there is no way back.
    assert!(loaded.is_sorted_by_key(|(_, n)| *n), "{loaded:?}");
    assert!(save.first().is_some_and(|(_, n)| *n == OLD) && save.last().is_some_and(|(_, n)| *n == OLD + 1));
}

#[test]
fn a_save_that_the_system_refuses_says_so_in_one_line_and_the_old_state_is_there() {
    const OLD: u64 = 3;
    let dir = prepared(OLD);
    let (_, reference) = traced(copy(dir.path()).path(), None);
    let save: Vec<_> = reference
        .iter()
        .filter(|call| call.phase == Some("save") && !call.text.starts_with("write(1,"))
        .collect();
    let replaced = save.iter().rposition(|call| call.name.starts_with("rename")).expect("a rename");
    let mut failed = BTreeSet::new();
    for (index, call) in save.iter().enumerate() {
        let refusable = ["openat", "write", "fsync", "fdatasync", "link", "rename", "unlink"];
        if !refusable.iter().any(|name| call.name.starts_with(name)) {
            continue;
        }
        for (error, words) in [("ENOSPC", "No space left on device"), ("EIO", "Input/output error")] {
            let dir = copy(dir.path());
            let (ran, _) = traced(dir.path(), Some(call.failing(error)));
            let n = show(dir.path())["n"].as_u64();
            println!("{error:6} {:>8} #{:<2} exit {:?}, then {n:?}", call.name, call.nth, ran.code);
            if ran.code == Some(0) {
                // What may fail: keeping the generation before, which holds up no new one.
                let keeping = ["link", "unlink"].iter().any(|name| call.name.starts_with(name));
                assert!(keeping || call.text.contains("state.json.1\""), "{call:?}");
                assert_eq!((n, ran.complaints()), (Some(OLD + 1), vec![]), "{call:?}");
                continue;
            }
            assert_eq!(ran.code, Some(1), "{call:?}");
            let line = ran.complaint();
            let path = dir.path().join("state.json").display().to_string();
            assert!(line.contains(&path) && line.contains(words), "{call:?}: {line}");
            assert!(!ran.stdout.contains("saved"), "{}", ran.stdout);
            if index <= replaced {
                assert_eq!(n, Some(OLD), "{call:?}");
                failed.insert(call.name.as_str());
            } else {
                // Replaced, but the directory was not flushed: it cannot be taken back, and may not be called saved.
                assert_eq!(n, Some(OLD + 1), "{call:?}");
            }
        }
    }
    for name in ["openat", "write", "fsync", "rename"] {
        assert!(failed.contains(name), "{name} never made a save fail: {failed:?}");
    }
}

/// Numbers without a pattern; the moments of the kills are random enough without a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Starts a loop that goes on from `base`, kills it somewhere, and gives the last count it called saved.
fn killed(command: &mut Command, base: u64, random: &mut Random) -> u64 {
    let mut process = Process::start(command);
    let saves = random.below(5);
    let wait = match saves {
        // Anywhere in its first milliseconds.
        0 => Duration::from_micros(random.below(10_000)),
        _ => {
            let line = match saves {
                1 => format!("opened {base}"),
                more => format!("saved {}", base + more - 1),
            };
            process.stdout_line(|printed| printed == line);
            Duration::from_micros(random.below(2000))
        }
    };
    let watch = Stopwatch::start();
    while watch.elapsed() < wait {
        std::hint::spin_loop();
    }
    process.signal(Signal::KILL);
    assert_eq!(process.ended(PATIENCE).signal(), Some(9), "{}", process.stderr());
    let stdout = process.stdout();
    let saved = stdout.lines().rev().find_map(|line| line.strip_prefix("saved "));
    saved.map_or(base, |n| n.parse().expect("a count"))
}

#[test]
fn what_was_called_saved_before_a_kill_is_there_after_it_and_written_in_place_it_is_not() {
    let rounds = count(300);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut random = Random(u64::from(std::process::id()));
    let (mut n, mut incarnation, mut ahead) = (0, 0, 0);
    for round in 0..rounds {
        let saved = killed(&mut saver("loop", dir.path()), n, &mut random);
        let shown = show(dir.path());
        n = shown["n"].as_u64().unwrap_or(0);
        assert!((saved..=saved + 1).contains(&n), "round {round}: {n} after {saved} was saved: {shown}");
        assert_eq!(shown["set_aside"], Value::Array(Vec::new()), "{shown}");
        let now = shown["incarnation"].as_u64().expect("it is open");
        assert!(now > incarnation, "round {round}: incarnation {now} after {incarnation}");
        incarnation = now;
        ahead += usize::from(n > saved);
    }

    // The control: the same content under the same kills, written into place. Not the seed's way, which writes a
    // temporary file of a fixed name and renames it: one process alone loses nothing by that under a kill, only in a
    // power cut, and when two save at a time. In place it is the file itself that is short while it is written.
    let place = tempfile::tempdir().expect("a temporary directory");
    let file = place.path().join("state.json");
    let (mut base, mut lost) = (0, 0);
    for _ in 0..rounds {
        let saved = killed(&mut saver("naive", &file), base, &mut random);
        let read = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        match read.and_then(|content| check(&content).ok()) {
            Some((n, _)) if n >= saved => base = n,
            None if saved == 0 => base = 0,
            _ => {
                lost += 1;
                base = 0;
                let _ = fs::remove_file(&file);
            }
        }
    }
    println!("{rounds} kills: 0 lost, {ahead} saved but not yet called so; in place: {lost} lost");
    assert!(lost > 0, "a kill that harms nobody proves nothing");
}

#[test]
fn a_full_disk_is_one_clear_line_and_costs_nothing_that_was_saved() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let script = r#"
        set -eu
        mount -t tmpfs -o size=64k,mode=700 tmpfs "$1"
        head -c 16384 /dev/zero > "$1/ballast"
        for mode in grow show show; do
            echo "== $mode"; echo "== $mode" >&2
            code=0; "$0" "$mode" "$1" || code=$?
            echo "exit $code"
            ls -A "$1"
        done
        rm "$1/ballast"
        for mode in once show; do
            echo "== $mode"; echo "== $mode" >&2
            "$0" "$mode" "$1"
        done
    "#;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]);
    let ran = run(command.arg(binary("state-saver")).arg(dir.path()));
    let refused = "a tmpfs needs user namespaces (sysctl kernel.unprivileged_userns_clone=1), or root";
    assert_eq!(ran.code, Some(0), "{refused}: {}\n{}", ran.stdout, ran.stderr);
    println!("{}", ran.stdout);
    println!("{}", ran.complaints().join("\n"));

    let parts: Vec<&str> = ran.stdout.split("== ").skip(1).collect();
    let [grow, shown, again, once, freed] = parts[..] else { panic!("{}", ran.stdout) };
    let last = |part: &str| {
        let line = part.lines().rev().find_map(|line| line.strip_prefix("saved ")).expect("it saved");
        line.parse::<u64>().expect("a count")
    };
    let json = |part: &str| {
        let line = part.lines().find(|line| line.starts_with('{')).expect("it showed");
        let shown: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!((&shown["torn"], &shown["set_aside"]), (&Value::Null, &Value::Array(vec![])), "{shown}");
        shown["n"].as_u64().expect("a state")
    };
    let saved = last(grow);
    assert!(saved > 2 && grow.contains("exit 1\n"), "{grow}");
    for part in [grow, shown, again] {
        assert!(!part.contains(".tmp"), "{part}");
    }
    assert_eq!((json(shown), json(again)), (saved, saved));
    assert_eq!((last(once), json(freed)), (saved + 1, saved + 1));

    let path = dir.path().join("state.json").display().to_string();
    let complaints: Vec<&str> = ran.stderr.split("== ").skip(1).collect();
    for (part, most) in complaints.iter().zip([1, 1, 1, 0, 0]) {
        let lines: Vec<_> =
            part.lines().skip(1).filter(|line| !line.trim_start().starts_with("INFO")).collect();
        // With the disk full, opening cannot save the new incarnation, and says so.
        assert!(lines.len() <= most, "{part}");
        for line in &lines {
            assert!(line.contains(&path) && line.contains("No space left on device"), "{line}");
        }
        assert!(!part.starts_with("grow") || lines.len() == 1, "{part}");
    }
}

/// What stands where the state should be.
struct Place {
    what: &'static str,
    /// Puts it at the path; the reason that the log must give.
    put: fn(&Path) -> &'static str,
}

const PLACES: [Place; 13] = [
    Place { what: "no byte", put: |path| put(fs::write(path, ""), "it is empty") },
    Place {
        what: "half a file",
        put: |path| {
            let bytes = fs::read(path).unwrap_or_default();
            put(fs::write(path, &bytes[..bytes.len() / 2]), "it is no JSON object: EOF")
        },
    },
    Place {
        what: "a flipped bit",
        put: |path| {
            let mut bytes = fs::read(path).unwrap_or_default();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            put(fs::write(path, bytes), "its \"crc32\" does not fit its bytes")
        },
    },
    Place {
        what: "a newer schema",
        put: |path| {
            put(fs::write(path, r#"{"schema":2}"#), "it has schema 2, and this program knows schema 1")
        },
    },
    Place {
        what: "a million brackets",
        put: |path| put(fs::write(path, "[".repeat(1 << 20)), "it is no JSON object"),
    },
    Place {
        what: "1 GiB of nothing",
        put: |path| {
            put(
                fs::File::create(path).and_then(|file| file.set_len(1 << 30)),
                "it has 1073741824 bytes, more than",
            )
        },
    },
    Place { what: "a link to nowhere", put: |path| relink(path, Path::new("nowhere")) },
    Place {
        what: "a link to a state",
        put: |path| {
            let other = path.with_file_name("other");
            fs::rename(path, &other).expect("a state is there");
            put(symlink(&other, path), "it is a symbolic link")
        },
    },
    Place { what: "a link to /dev/zero", put: |path| relink(path, Path::new("/dev/zero")) },
    Place {
        what: "a FIFO",
        put: |path| {
            put(fs::remove_file(path), "");
            let made = Command::new("mkfifo").arg(path).status().is_ok_and(|status| status.success());
            assert!(made, "mkfifo");
            "it is no regular file"
        },
    },
    Place {
        what: "a socket",
        put: |path| {
            put(fs::remove_file(path), "");
            put(
                std::os::unix::net::UnixListener::bind(path).map(drop),
                "it cannot be read: No such device or address",
            )
        },
    },
    Place {
        what: "a directory",
        put: |path| {
            put(fs::remove_file(path), "");
            put(fs::create_dir(path), "it is no regular file")
        },
    },
    Place {
        what: "an old state of the system we come from, damaged",
        put: |path| {
            put(
                fs::write(path, r#"{"peers":[1],"shutdown_at":null}"#),
                "its \"peers\" has a value that it cannot have",
            )
        },
    },
];

fn put(done: std::io::Result<()>, reason: &'static str) -> &'static str {
    done.expect("it can be put there");
    reason
}

fn relink(path: &Path, to: &Path) -> &'static str {
    put(fs::remove_file(path), "");
    put(symlink(to, path), "it is a symbolic link")
}

/// Puts it where the state is; with a state before it that is found, and without.
fn stands_there(what: &str, put: impl Fn(&Path) -> &'static str) {
    for previous in [true, false] {
        let dir = prepared(3);
        let path = dir.path().join("state.json");
        if !previous {
            fs::remove_file(dir.path().join("state.json.1")).expect("a generation before it");
        }
        let reason = put(&path);
        let ran = run(&mut saver("show", dir.path()));
        let line = ran.complaint();
        println!("{what}: {line}");
        assert!(line.contains(&path.display().to_string()) && line.contains(reason), "{what}: {line}");
        let shown = ran.shown();
        let (n, found) = if previous { (Value::from(2), "Earlier") } else { (Value::Null, "Nothing") };
        assert_eq!((&shown["n"], &shown["found"]), (&n, &Value::from(found)), "{what}: {shown}");
        // What stood there is still to be looked at, and the place is in use again.
        assert!(names(dir.path()).iter().any(|name| name.starts_with("state.json.damaged-")), "{what}");
        let again = run(&mut saver("show", dir.path()));
        let n = if previous { 2 } else { 0 };
        assert_eq!((again.complaints(), &again.shown()["n"]), (vec![], &Value::from(n)), "{what}");
    }
}

#[test]
fn whatever_stands_where_the_state_should_be_is_set_aside_with_one_line_that_says_why() {
    for Place { what, put } in PLACES {
        stands_there(what, put);
    }
    if rustix::process::geteuid().is_root() {
        stands_there("a stranger's file", |path| {
            put(chown(path, Some(65534), None), "it belongs to user 65534, and this process is user 0")
        });
    } else {
        println!("a stranger's file: not covered, only root can give files away");
    }
}

#[test]
fn a_link_is_neither_read_nor_written_through() {
    let (dir, victim) = (prepared(3), prepared(7));
    let there = victim.path().join("state.json");
    let before = fs::read(&there).expect("a state");
    for name in ["state.json", "state.json.1"] {
        let path = dir.path().join(name);
        fs::remove_file(&path).expect("a state");
        symlink(&there, &path).expect("a link");
    }
    let ran = run(&mut saver("once", dir.path()));
    assert_eq!((ran.code, ran.stdout.lines().last()), (Some(0), Some("saved 1")), "{}", ran.stderr);
    assert_eq!(ran.complaints().len(), 2, "one line each: {}", ran.stderr);
    assert_eq!(fs::read(&there).expect("a state"), before);
}

/// Programs and directories for a process that is not root, whoever runs the test.
struct Unprivileged {
    _bin: TempDir,
    saver: PathBuf,
    root: bool,
}

impl Unprivileged {
    const USER: u32 = 65534;

    fn new() -> Self {
        let bin = tempfile::tempdir().expect("a temporary directory");
        let mode = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("ours");
        // Where the build is others may have no way to.
        let saver = bin.path().join("state-saver");
        fs::copy(binary("state-saver"), &saver).expect("a copy");
        mode(&saver);
        mode(bin.path());
        Self { _bin: bin, saver, root: rustix::process::geteuid().is_root() }
    }

    fn own(&self, path: &Path) {
        if self.root {
            chown(path, Some(Self::USER), Some(Self::USER)).expect("root gives files away");
        }
    }

    fn run(&self, mode: &str, dir: &Path) -> Ran {
        let mut command = if self.root {
            let mut command = Command::new("setpriv");
            let (user, group) = (format!("--reuid={}", Self::USER), format!("--regid={}", Self::USER));
            command.args([&user, &group, "--clear-groups"]).arg(&self.saver);
            command
        } else {
            Command::new(&self.saver)
        };
        run(command.arg(mode).arg(dir))
    }
}

#[test]
fn what_may_not_be_read_or_written_is_one_clear_line_and_never_a_lost_state() {
    let unprivileged = Unprivileged::new();
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("ours");
    let theirs = || {
        let dir = prepared(3);
        for name in names(dir.path()) {
            unprivileged.own(&dir.path().join(name));
        }
        unprivileged.own(dir.path());
        dir
    };

    // A state that may not be read is set aside, and the one before it taken.
    let dir = theirs();
    let path = dir.path().join("state.json");
    mode(&path, 0);
    let ran = unprivileged.run("show", dir.path());
    let line = ran.complaint();
    println!("unreadable: {line}");
    assert!(
        line.contains(&path.display().to_string()) && line.contains("it cannot be read: Permission denied")
    );
    assert_eq!(ran.shown()["n"], 2);

    // A directory that may not be written: what is there is used, and that nothing can be saved is said.
    let dir = theirs();
    let path = dir.path().join("state.json");
    let before = fs::read(&path).expect("a state");
    mode(dir.path(), 0o500);
    let ran = unprivileged.run("show", dir.path());
    let line = ran.complaint();
    println!("read-only: {line}");
    assert!(line.contains(&path.display().to_string()) && line.contains("Permission denied"), "{line}");
    assert_eq!(ran.shown()["n"], 3);
    assert_eq!(fs::read(&path).expect("a state"), before);

    // One in which not even the lock can be made is not used at all.
    let empty = tempfile::tempdir().expect("a temporary directory");
    unprivileged.own(empty.path());
    mode(empty.path(), 0o500);
    let ran = unprivileged.run("show", empty.path());
    let line = ran.complaint();
    println!("empty and read-only: {line}");
    assert_eq!(ran.code, Some(1));
    let lock = empty.path().join("state.lock").display().to_string();
    assert!(line.contains(&lock) && line.contains("Permission denied"), "{line}");
    assert_eq!(names(empty.path()), [""; 0]);
}

#[test]
fn a_clock_that_was_set_back_a_year_costs_nothing_and_is_said() {
    const YEAR: u64 = 31_536_000_000;
    let dir = prepared(3);
    let path = dir.path().join("state.json");
    let mut future = Document::parse(&fs::read(&path).expect("a state")).expect("whole");
    future.incarnation += YEAR;
    future.saved_at += YEAR;
    fs::write(&path, future.to_bytes()).expect("ours");
    let ran = run(&mut saver("show", dir.path()));
    let shown = ran.shown();
    assert_eq!((&shown["n"], &shown["from_the_future"]), (&Value::from(3), &Value::from(true)));
    assert_eq!(shown["incarnation"], future.incarnation + 1);
    println!("{}", ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("the clock has been set back since")
            && ran.stderr.contains(&path.display().to_string())
    );
    // The state that was saved since is not from the future, and its incarnation has risen all the same.
    let again = show(dir.path());
    assert_eq!((&again["n"], &again["from_the_future"]), (&Value::from(3), &Value::from(false)));
    assert_eq!(again["incarnation"], future.incarnation + 2);
}

#[test]
fn a_directory_that_is_removed_while_it_is_used_is_made_again_with_what_the_process_knows() {
    let parent = tempfile::tempdir().expect("a temporary directory");
    let dir = parent.path().join("data");
    let mut process = Process::start_with_stdin(&mut saver("step", &dir));
    process.stdout_line(|line| line == "opened 0");
    for n in 1..=3 {
        fs::remove_dir_all(&dir).expect("it is there again");
        process.say("");
        process.stdout_line(|line| line == format!("saved {n}"));
    }
    // And it is locked again.
    let second = run(&mut saver("once", &dir));
    assert_eq!(second.code, Some(1), "{}", second.stdout);
    assert!(second.complaint().contains(&format!("process {}", process.id())), "{}", second.stderr);
    process.close_stdin();
    assert_eq!(process.exit_code(PATIENCE), 0);
    assert_eq!(show(&dir)["n"], 3);
}

#[test]
fn a_second_process_is_told_the_first_and_touches_nothing_and_after_a_kill_it_gets_in_at_once() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut first = Process::start_with_stdin(&mut saver("step", dir.path()));
    first.say("");
    first.stdout_line(|line| line == "saved 1");
    let look = || -> Vec<_> {
        let look = |name: String| {
            let path = dir.path().join(&name);
            let changed = path.metadata().and_then(|metadata| metadata.modified()).expect("a file");
            (name, fs::read(path).expect("a file"), changed)
        };
        names(dir.path()).into_iter().map(look).collect()
    };
    let before = look();
    for mode in ["once", "show", "loop"] {
        let second = run(&mut saver(mode, dir.path()));
        assert_eq!(second.code, Some(1), "{}", second.stdout);
        let line = second.complaint();
        println!("{line}");
        assert!(line.contains(&format!("process {}", first.id())), "{line}");
        assert!(line.contains(&dir.path().display().to_string()), "{line}");
    }
    assert_eq!(look(), before, "it was touched");
    first.signal(Signal::KILL);
    first.ended(PATIENCE);
    let next = run(&mut saver("once", dir.path()));
    assert_eq!((next.code, next.stdout.lines().last()), (Some(0), Some("saved 2")), "{}", next.stderr);
}
