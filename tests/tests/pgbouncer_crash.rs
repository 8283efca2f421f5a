//! Whatever kills an editor of PgBouncer's files, and whatever the disk says: the file is the old one or the new one, and the next edit
//! goes on.
//!
//! Needs strace, and unshare, mount and setpriv of util-linux, as root or with user namespaces; `tests/run` looks for them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Signal, geteuid};
use shutdown_tests::count;
use shutdown_tests::pgbctl::{Files, INI, Ran, USERLIST, ended, run, scripts};
use shutdown_tests::process::{Process, Stopwatch, binary};
use shutdown_tests::strace::{Call, calls, strace};

const EDIT: [&str; 3] = ["db", "add", "proj_new"];
const ENTRY: &str = "proj_new = host=postgres port=5432 dbname=proj_new pool_size=5 reserve_pool=2\n";

/// The configuration after [`EDIT`].
fn edited() -> String {
    let files = Files::default();
    files.run(&EDIT).well();
    let after = fs::read_to_string(files.ini()).expect("it is there");
    assert!(after.contains(ENTRY), "{after}");
    after
}

/// From the first call that touches the files.
fn inside(calls: Vec<Call>) -> Vec<Call> {
    let first =
        calls.iter().position(|call| call.text.contains("pgbouncer.ini\"") && !call.text.starts_with("exec"));
    calls.into_iter().skip(first.expect("it looks for its file")).collect()
}

#[test]
fn a_kill_at_any_system_call_leaves_the_old_file_or_the_new_one_and_the_next_edit_goes_on() {
    let new = edited();
    let traces = tempfile::tempdir().expect("a temporary directory");
    let trace = traces.path().join("trace");
    let reference = {
        let files = Files::default();
        run(&mut strace(&files.command(&EDIT), &trace, None)).well();
        inside(calls(&trace))
    };
    let mut seen = Vec::new();
    for point in &reference {
        let files = Files::default();
        let ran = run(&mut strace(&files.command(&EDIT), &trace, Some(&point.killing())));
        assert_eq!(ran.signal, Some(9), "{point:?} did not kill it: {ran:?}");
        let after = fs::read_to_string(files.ini()).expect("it is there at every moment");
        assert!(after == INI || after == new, "torn at {point:?}: {after}");
        seen.push(after == new);
        for backup in files.names().iter().filter(|name| name.contains(".backup.")) {
            assert_eq!(fs::read_to_string(files.dir().join(backup)).expect("it is there"), INI, "{point:?}");
        }
        // Whoever comes next finds a file to edit, and sweeps.
        files.run(&EDIT).well();
        assert_eq!(fs::read_to_string(files.ini()).expect("it is there"), new, "{point:?}");
        assert_eq!(files.leftovers(), [""; 0], "{point:?}");
    }
    println!("{} points, {} of them before the rename", seen.len(), seen.iter().filter(|new| !**new).count());
    assert!(seen.len() > 30 && seen.is_sorted() && !seen[0] && seen[seen.len() - 1]);
}

#[test]
fn random_kills_never_leave_a_file_that_is_neither() {
    let rounds = count(150).max(30);
    let new = edited();
    let mut random = u64::from(std::process::id());
    let (mut old_ones, mut new_ones) = (0, 0);
    for _ in 0..rounds {
        let files = Files::default();
        let process = Process::start(&mut files.command(&EDIT));
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let wait = Duration::from_micros((random >> 33) % 12_000);
        let watch = Stopwatch::start();
        while watch.elapsed() < wait {
            std::hint::spin_loop();
        }
        process.signal(Signal::KILL);
        ended(process);
        let after = fs::read_to_string(files.ini()).expect("it is there at every moment");
        assert!(after == INI || after == new, "{after}");
        if after == INI {
            old_ones += 1
        } else {
            new_ones += 1
        }
        files.run(&EDIT).well();
        assert_eq!(
            (fs::read_to_string(files.ini()).expect("it is there"), files.leftovers()),
            (new.clone(), vec![])
        );
    }
    println!("{rounds} kills: {old_ones} old, {new_ones} new");
}

#[test]
fn what_the_system_refuses_is_exit_4_with_one_line_and_the_old_file_is_there() {
    let new = edited();
    let traces = tempfile::tempdir().expect("a temporary directory");
    let trace = traces.path().join("trace");
    let files = Files::default();
    run(&mut strace(&files.command(&EDIT), &trace, None)).well();
    let reference = inside(calls(&trace));
    let replaced = reference.iter().rposition(|call| call.name == "rename").expect("a rename");
    let mut failed = 0;
    for (place, call) in reference.iter().enumerate() {
        let refusable =
            ["openat", "write", "fsync", "rename", "renameat2", "fchown", "fchmod", "flock", "utimensat"];
        if !refusable.contains(&call.name.as_str())
            || call.text.starts_with("write(1")
            || call.text.contains("/proc/")
        {
            continue;
        }
        for error in ["ENOSPC", "EIO"] {
            let files = Files::default();
            let ran = run(&mut strace(&files.command(&EDIT), &trace, Some(&call.failing(error))));
            let after = fs::read_to_string(files.ini()).expect("it is there");
            if ran.code == Some(0) {
                // A directory that cannot be looked through for leftovers; a log that does not listen; and behind the rename it is written.
                let harmless = !["write", "fsync", "rename"].contains(&call.name.as_str());
                assert!(after == new && (harmless || place > replaced), "{call:?}: {ran:?}");
                continue;
            }
            ran.failed(4);
            failed += 1;
            assert_eq!(after, INI, "{call:?}");
            assert_eq!(files.leftovers(), [""; 0], "{call:?}");
        }
    }
    println!("{failed} refusals");
    assert!(failed > 10);
}

/// Runs a script in a mount namespace of its own, in which this process is root; `$1` is the directory of the files, `$0` pgbctl.
fn with_mounts(files: &Files, script: &str) -> Ran {
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "--mount", "sh", "-euc", script])
        .arg(binary("pgbctl"))
        .arg(files.dir());
    command.env("PGBCTL_CONFIG", files.ini()).env("PGBCTL_USERLIST", files.userlist());
    run(&mut command)
}

#[test]
fn a_full_disk_is_exit_4_and_the_old_file_is_whole() {
    let files = Files::default();
    let ran = with_mounts(
        &files,
        r#"
        mount -t tmpfs -o size=32k tmpfs "$1"
        printf '[databases]\n[pgbouncer]\nlisten_port = 6432\n' > "$1/pgbouncer.ini"
        cp "$1/pgbouncer.ini" "$1/before"
        touch "$1/pgbouncer.ini.lock"
        head -c 100000 /dev/zero > "$1/ballast" 2>/dev/null || true
        code=0; "$0" db add proj_new || code=$?
        echo "exit $code"
        cmp "$1/before" "$1/pgbouncer.ini" && echo same
        ls -A "$1"
        rm "$1/ballast"
        "$0" db add proj_new
        ls -A "$1"
        "#,
    );
    let said = ran.well();
    assert!(
        said.starts_with("exit 4\nsame\nballast\nbefore\npgbouncer.ini\npgbouncer.ini.lock\nBacked up to: "),
        "{said}"
    );
    assert!(ran.stderr.contains("No space left on device") && ran.stderr.lines().count() == 1, "{ran:?}");
    assert!(!said.contains(".ini.tmp.") && !said.contains(".pending"), "{said}");
}

/// What a file that is mounted alone is: `$1/alone/pgbouncer.ini`, by its own inode.
const ALONE: &str = r#"
    mkdir "$1/alone"
    printf 'stale' > "$1/alone/pgbouncer.ini"
    mount --bind "$1/pgbouncer.ini" "$1/alone/pgbouncer.ini"
    export PGBCTL_CONFIG="$1/alone/pgbouncer.ini"
"#;

#[test]
fn a_file_that_is_mounted_alone_is_written_in_place_and_keeps_its_inode() {
    let files = Files::default();
    let inode = fs::metadata(files.ini()).expect("it is there").ino();
    let script = format!(
        "{ALONE}\n\"$0\" db add proj_new; \"$0\" db set proj_new --pool-size 7; \"$0\" db remove platform; ls -A \"$1/alone\""
    );
    let ran = with_mounts(&files, &script);
    let after = fs::read_to_string(files.ini()).expect("it is there");
    assert!(
        ran.well().contains("Removed platform") && after.contains("dbname=proj_new pool_size=7"),
        "{ran:?}\n{after}"
    );
    assert!(!after.contains("platform ") && after.ends_with("server_reset_query = DISCARD ALL\n"), "{after}");
    assert_eq!(fs::metadata(files.ini()).expect("it is there").ino(), inode);
    assert!(!ran.stdout.contains(".pending") && !ran.stdout.contains(".ini.tmp."), "{ran:?}");
}

#[test]
fn a_kill_at_any_call_of_a_write_in_place_is_finished_or_undone_by_the_next_edit() {
    let new = edited();
    let files = Files::default();
    let trace = files.dir().join("trace");
    // The trace is of the last pgbctl only.
    let script = format!(
        "{ALONE}\nT=\"$1/trace\"; if [ -n \"${{KILL-}}\" ]; then strace -f -s 200 -o \"$T\" --inject=\"$KILL\" \"$0\" db add proj_new || echo killed; \
         cp \"$1/alone/pgbouncer.ini\" \"$1/found\"; \"$0\" db add proj_new; ls -A \"$1/alone\"; \
         else strace -f -s 200 -o \"$T\" \"$0\" db add proj_new; fi"
    );
    with_mounts(&files, &script).well();
    let reference = inside(calls(&trace));
    let pending = reference.iter().position(|call| call.text.contains(".pending")).expect("a journal");
    let points = &reference[pending.saturating_sub(12)..];
    let mut torn = 0;
    for point in points {
        let files = Files::default();
        let script = format!("KILL={}\n{script}", point.killing());
        let ran = with_mounts(&files, &script);
        assert!(ran.well().contains("killed"), "{point:?} did not kill it: {ran:?}");
        let found = fs::read_to_string(files.dir().join("found")).expect("it is there");
        torn += usize::from(found != INI && found != new);
        assert_eq!(fs::read_to_string(files.ini()).expect("it is there"), new, "{point:?}");
        assert!(!ran.stdout.contains(".pending") && !ran.stdout.contains(".ini.tmp."), "{point:?}: {ran:?}");
    }
    println!("{} points, {torn} with a file that was neither before the next edit", points.len());
    assert!(points.len() > 15);
}

#[test]
fn a_mount_that_is_read_only_is_exit_4_and_nothing_is_left_on_it() {
    let files = Files::default();
    let script = r#"
        mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"
        code=0; "$0" db add proj_new || code=$?; echo "exit $code"; ls -A "$1"
    "#;
    let ran = with_mounts(&files, script);
    assert_eq!(ran.well(), "exit 4\npgbouncer.ini\nuserlist.txt");
    assert!(ran.stderr.contains("Read-only file system"), "{ran:?}");

    let script = format!(
        "{ALONE}\nmount -o remount,bind,ro \"$1/alone/pgbouncer.ini\"\ncode=0; \"$0\" db add proj_new || code=$?; echo \"exit $code\"; ls -A \"$1/alone\""
    );
    let files = Files::default();
    let ran = with_mounts(&files, &script);
    assert_eq!(ran.well(), "exit 4\npgbouncer.ini\npgbouncer.ini.lock");
    assert_eq!(fs::read_to_string(files.ini()).expect("it is there"), INI);
}

#[test]
fn a_mounted_config_map_is_refused_with_what_to_do_instead() {
    let files = Files::default();
    let tree = files.dir().join("etc");
    fs::create_dir_all(tree.join("..2026_11_29")).expect("a temporary directory");
    fs::write(tree.join("..2026_11_29/pgbouncer.ini"), INI).expect("a temporary directory");
    symlink("..2026_11_29", tree.join("..data")).expect("a temporary directory");
    symlink("..data/pgbouncer.ini", tree.join("pgbouncer.ini")).expect("a temporary directory");
    let mut command = shutdown_tests::pgbctl::pgbctl();
    let ran = run(command.arg("--config").arg(tree.join("pgbouncer.ini")).args(EDIT));
    assert!(ran.failed(4).contains("ConfigMap or Secret"), "{ran:?}");
    assert_eq!(fs::read_to_string(tree.join("pgbouncer.ini")).expect("it is there"), INI);
}

#[test]
fn a_link_stays_a_link_and_what_it_names_is_edited() {
    let files = Files::default();
    let link = files.dir().join("link.ini");
    symlink("pgbouncer.ini", &link).expect("a temporary directory");
    let mut command = shutdown_tests::pgbctl::pgbctl();
    run(command.arg("--config").arg(&link).args(EDIT)).well();
    assert!(fs::symlink_metadata(&link).expect("it is there").is_symlink());
    assert_eq!(fs::read_to_string(files.ini()).expect("it is there"), edited());
}

#[test]
fn owner_and_mode_stay_and_who_may_not_write_changes_nothing() {
    let files = Files::default();
    fs::set_permissions(files.ini(), fs::Permissions::from_mode(0o640)).expect("ours");
    if geteuid().is_root() {
        chown(files.ini(), Some(65534), Some(65534)).expect("root may");
    }
    let before = fs::metadata(files.ini()).expect("it is there");
    files.run(&EDIT).well();
    let after = fs::metadata(files.ini()).expect("it is there");
    assert_eq!((before.uid(), before.gid(), before.mode()), (after.uid(), after.gid(), after.mode()));
    assert!(after.mtime() > before.mtime(), "PgBouncer compares seconds");

    if geteuid().is_root() {
        // Another user, in a directory and for a file that are not its own.
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65533", "--regid=65533", "--clear-groups", "--"]);
        let place =
            tempfile::Builder::new().prefix("shutdown-").tempdir_in("/tmp").expect("a temporary directory");
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).expect("ours");
        let program = place.path().join("pgbctl");
        run(Command::new("install").args(["-m", "755"]).arg(binary("pgbctl")).arg(&program)).well();
        let ini = place.path().join("pgbouncer.ini");
        fs::write(&ini, INI).expect("ours");
        fs::set_permissions(&ini, fs::Permissions::from_mode(0o644)).expect("ours");
        let ran = run(command.arg(&program).arg("--config").arg(&ini).args(EDIT));
        let error = ran.failed(4);
        assert!(
            error.contains(&place.path().display().to_string()) && error.contains("Permission denied"),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&ini).expect("it is there"), INI);
    }
}

#[test]
fn a_missing_file_is_one_line_and_the_user_list_is_made() {
    let files = Files::default();
    fs::remove_file(files.ini()).expect("it is there");
    fs::remove_file(files.userlist()).expect("it is there");
    let error = files.run(&EDIT);
    assert!(error.failed(4).contains("pgbouncer.ini cannot be opened"), "{error:?}");
    fs::write(files.ini(), INI).expect("ours");
    files.run(&["user", "add", "app", "--generate"]).well();
    assert_eq!(fs::metadata(files.userlist()).expect("it was made").mode() & 0o777, 0o600);
    assert!(files.run(&["user", "list"]).well().contains("app scram-sha-256"));
}

#[test]
fn a_user_list_that_is_missing_is_not_made_by_an_edit_that_is_refused_or_killed() {
    let files = Files::default();
    fs::remove_file(files.userlist()).expect("it is there");
    let add = ["user", "add", "app", "--password-env", "SECRET"];
    let nothing = |why: &str| {
        let mut names = files.names();
        names.retain(|name| name.starts_with("userlist.txt") && name != "userlist.txt.lock");
        assert_eq!(names, [""; 0], "{why}");
    };
    run(files.command(&add).env("SECRET", "")).failed(2);
    nothing("a bad password");
    // PgBouncer takes no user behind a line that it cannot read.
    let broken = files.dir().join("userlist.txt.backup.1.1");
    fs::write(&broken, "no user\n").expect("ours");
    files.run(&["backup", "restore", &broken.display().to_string()]).failed(2);
    fs::remove_file(&broken).expect("it is there");
    nothing("a broken list");
    let mut holder = Command::new("flock");
    holder.arg("--no-fork").arg(files.dir().join("userlist.txt.lock")).args([
        "sh",
        "-c",
        "echo locked; exec sleep 300",
    ]);
    let holder = Process::start(&mut holder);
    holder.stdout_line(|line| line == "locked");
    run(files.command(&[&["--lock-timeout", "100ms"], &add[..]].concat()).env("SECRET", "sesame")).failed(3);
    nothing("a lock");
    drop(holder);
    // Removing from what is not there changes nothing.
    files.run(&["user", "remove", "app"]).well();
    nothing("nothing to remove");

    // And a kill leaves none or the whole one.
    let traces = tempfile::tempdir().expect("a temporary directory");
    let trace = traces.path().join("trace");
    let missing = || {
        let files = Files::default();
        fs::remove_file(files.userlist()).expect("it is there");
        files
    };
    let reference = {
        let files = missing();
        run(strace(&files.command(&add), &trace, None).env("SECRET", "sesame")).well();
        calls(&trace)
    };
    let named = |call: &Call| call.text.contains("userlist.txt\"") && !call.text.starts_with("exec");
    let first = reference.iter().position(named).expect("its file");
    for point in &reference[first..] {
        let files = missing();
        let ran = run(strace(&files.command(&add), &trace, Some(&point.killing())).env("SECRET", "sesame"));
        assert_eq!(ran.signal, Some(9), "{point:?} did not kill it: {ran:?}");
        if let Ok(list) = fs::read_to_string(files.userlist()) {
            assert!(
                list.starts_with("\"app\" \"SCRAM-SHA-256$") && list.ends_with("\"\n"),
                "{point:?}: {list}"
            );
        }
        run(files.command(&add).env("SECRET", "sesame")).well();
        assert_eq!(files.leftovers(), [""; 0], "{point:?}");
    }
}

#[test]
fn the_scripts_in_use_leave_nothing_of_a_file_when_their_disk_is_full() {
    // The control of the full disk: `cat` of a copy that was never written.
    let files = Files::new(INI, USERLIST);
    let script = format!(
        "mount -t tmpfs -o size=4k tmpfs /mnt; head -c 10000 /dev/zero > /mnt/ballast 2>/dev/null || true; export TMPDIR=/mnt\n\
         code=0; bash -c '{}' script \"$1/pgbouncer.ini\" proj_new || code=$?; echo \"exit $code\"",
        // As they run in their containers: without -e.
        scripts::ADD_DATABASE.replace("set -e\n", "").replace('\'', "'\\''")
    );
    let ran = with_mounts(&files, &script);
    let left = fs::read_to_string(files.ini()).expect("it is there");
    println!(
        "control: a script on a full disk: {} bytes of {} left, {}",
        left.len(),
        INI.len(),
        ran.stdout.trim()
    );
    assert!(left.len() < INI.len(), "{ran:?}");
}
