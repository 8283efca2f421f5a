//! PgBouncer's files are edited by many at once, `pgbctl` and shell scripts, and nothing is lost, doubled or torn.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use shutdown_tests::PATIENCE;
use shutdown_tests::pgbctl::{Files, INI, USERLIST, ended, lines, scripts};
use shutdown_tests::process::{Process, Stopwatch};

/// Starts them all before it waits for any.
fn at_once(commands: impl IntoIterator<Item = Command>) -> Vec<shutdown_tests::pgbctl::Ran> {
    let processes: Vec<_> = commands.into_iter().map(|mut command| Process::start(&mut command)).collect();
    processes.into_iter().map(ended).collect()
}

fn is_entry(line: &str, name: &str) -> bool {
    line.split_once('=').is_some_and(|(key, _)| key.trim() == name)
}

fn entries(lines: &[String], name: &str) -> usize {
    lines.iter().filter(|line| is_entry(line, name)).count()
}

/// The backups that these runs have named.
fn backups(said: &[shutdown_tests::pgbctl::Ran]) -> Vec<String> {
    said.iter()
        .filter_map(|ran| ran.stdout.lines().find_map(|line| line.strip_prefix("Backed up to: ")))
        .map(ToOwned::to_owned)
        .collect()
}

#[test]
fn many_editors_at_once_leave_every_entry_once_and_every_other_byte_as_it_was() {
    for (ours, theirs) in [(6, 0), (0, 6), (3, 3), (16, 0), (8, 8), (32, 0), (16, 16), (64, 0), (32, 32)] {
        let files = Files::default();
        let names: Vec<_> = (0..ours + theirs).map(|number| format!("proj_{number}")).collect();
        let watch = Stopwatch::start();
        let said = at_once(names.iter().enumerate().map(|(place, name)| {
            if place < ours {
                files.command(&["--lock-timeout", "60s", "db", "add", name])
            } else {
                files.script(scripts::ADD_DATABASE, &files.ini(), name)
            }
        }));
        for ran in &said {
            ran.well();
        }
        let after = files.ini_lines();
        for name in &names {
            assert_eq!(entries(&after, name), 1, "{ours}+{theirs}: {name} in {after:#?}");
        }
        let rest: Vec<_> =
            after.iter().filter(|line| !names.iter().any(|name| is_entry(line, name))).cloned().collect();
        assert_eq!(rest, INI.lines().collect::<Vec<_>>(), "{ours}+{theirs}");
        let kept = backups(&said);
        let distinct: BTreeSet<_> = kept.iter().collect();
        assert_eq!((kept.len(), distinct.len()), (ours, ours), "{kept:?}");
        // Each is the file before one edit: no two have the same entries.
        let contents: BTreeSet<_> = kept.iter().map(|path| fs::read(path).expect("it is there")).collect();
        assert_eq!(contents.len(), ours);
        assert_eq!(files.leftovers(), [""; 0]);
        println!("{ours} of ours and {theirs} scripts: {:?}", watch.elapsed());
    }
}

#[test]
fn many_backups_of_a_script_in_one_second_are_one_and_ours_are_all_there() {
    let files = Files::default();
    let names: Vec<_> = (0..8).map(|number| format!("proj_{number}")).collect();
    for ran in at_once(names.iter().map(|name| files.script(scripts::ADD_DATABASE, &files.ini(), name))) {
        ran.well();
    }
    let theirs = files.names().iter().filter(|name| name.contains(".backup.")).count();
    println!("control: 8 edits by scripts, {theirs} backups");
    assert!(theirs < 8, "a second that harms nobody proves nothing");
}

#[test]
fn the_same_database_added_by_many_at_once_is_there_once() {
    let files = Files::default();
    let said = at_once((0..32).map(|_| files.command(&["db", "add", "proj_same"])));
    let mut changed = 0;
    for ran in &said {
        changed += usize::from(!ran.well().contains("Nothing to change"));
    }
    assert_eq!((entries(&files.ini_lines(), "proj_same"), changed, backups(&said).len()), (1, 1, 1));

    // The control: who looks before the lock does not see who is just writing.
    let files = Files::default();
    let script = || {
        let mut script = files.script(scripts::ADD_DATABASE, &files.ini(), "proj_same");
        script.env("PAUSE", "0.3");
        script
    };
    at_once((0..8).map(|_| script()));
    let doubles = entries(&files.ini_lines(), "proj_same");
    println!("control: 8 scripts, {doubles} entries");
    assert!(doubles > 1, "a race that nobody loses proves nothing");
}

/// Reads a file again and again while `work` runs: how often, and how often `is_bad` held of what was read.
fn read_meanwhile(file: &Path, is_bad: impl Fn(&str) -> bool + Sync, work: impl FnOnce()) -> (usize, usize) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut reads, mut bad) = (0, 0);
            while !over.load(Ordering::Relaxed) {
                reads += 1;
                bad += usize::from(is_bad(&fs::read_to_string(file).expect("it is always there")));
            }
            (reads, bad)
        });
        work();
        over.store(true, Ordering::Relaxed);
        reader.join().expect("a reader does not panic")
    })
}

#[test]
fn the_same_user_set_by_many_at_once_is_there_once_and_never_absent_to_a_reader() {
    let is_absent = |text: &str| !text.lines().any(|line| line.starts_with("\"app\" "));
    let files = Files::default();
    let password = files.dir().join("password");
    fs::write(&password, "secret\n").expect("a temporary directory");
    let set = || files.command(&["user", "add", "app", "--password-file", &password.display().to_string()]);
    shutdown_tests::pgbctl::run(&mut set()).well();
    let (reads, absent) = read_meanwhile(&files.userlist(), is_absent, || {
        for ran in at_once((0..8).map(|_| set())) {
            ran.well();
        }
    });
    let count = |file: &Path| lines(file).iter().filter(|line| line.starts_with("\"app\" ")).count();
    println!("{reads} reads, {absent} without the user");
    assert_eq!((count(&files.userlist()), absent), (1, 0));
    let rest: Vec<_> =
        lines(&files.userlist()).into_iter().filter(|line| !line.starts_with("\"app\" ")).collect();
    assert_eq!(rest, USERLIST.lines().collect::<Vec<_>>());

    let files = Files::default();
    let script = || {
        let mut script = files.script(scripts::ADD_USER, &files.userlist(), "app");
        script.env("PAUSE", "0.1");
        script
    };
    shutdown_tests::pgbctl::run(&mut script()).well();
    let (reads, absent) = read_meanwhile(&files.userlist(), is_absent, || {
        at_once((0..8).map(|_| script()));
    });
    let doubles = count(&files.userlist());
    println!("control: {reads} reads, {absent} without the user, then {doubles} entries");
    assert!(absent > 0 && doubles > 1, "a race that nobody loses proves nothing");
}

#[test]
fn a_reader_never_sees_an_empty_or_torn_file() {
    const LAST: &str = "; the last line\n";
    let databases: String =
        (0..2000).map(|number| format!("db_{number} = host=postgres dbname=db_{number}\n")).collect();
    let ini = format!("[databases]\n{databases}[pgbouncer]\nlisten_port = 6432\n{LAST}");
    let is_torn = |text: &str| !text.ends_with(LAST) || !text.starts_with("[databases]\n");
    let edits = 60;

    let files = Files::new(&ini, USERLIST);
    let (reads, torn) = read_meanwhile(&files.ini(), is_torn, || {
        for number in 0..edits {
            files.run(&["db", "add", &format!("proj_{number}")]).well();
        }
    });
    println!("{edits} edits, {reads} reads, {torn} empty or torn");
    assert_eq!(torn, 0);

    let files = Files::new(&ini, USERLIST);
    let (reads, torn) = read_meanwhile(&files.ini(), is_torn, || {
        for number in 0..edits {
            let mut script = files.script(scripts::ADD_DATABASE, &files.ini(), &format!("proj_{number}"));
            shutdown_tests::pgbctl::run(&mut script).well();
        }
    });
    println!("control: {edits} edits by a script, {reads} reads, {torn} empty or torn");
    assert!(torn > 0, "a write in place that nobody sees proves nothing");
}

#[test]
fn names_that_begin_alike_do_not_disturb_each_other() {
    let files = Files::default();
    files.run(&["db", "add", "proj_a"]).well();
    files.run(&["db", "add", "proj_a.b"]).well();
    files.run(&["db", "set", "proj_a", "--pool-size", "9"]).well();
    let after = files.ini_lines();
    assert!(after.iter().any(|line| is_entry(line, "proj_a") && line.contains("pool_size=9")), "{after:#?}");
    assert!(after.iter().any(|line| line == "proj_ab = host=postgres port=5432 dbname=proj_ab pool_size=5 reserve_pool=2"));
    files.run(&["db", "remove", "proj_a"]).well();
    let after = files.ini_lines();
    assert_eq!(
        [entries(&after, "proj_a"), entries(&after, "proj_ab"), entries(&after, "proj_a.b")],
        [0, 1, 1]
    );
    files.run(&["db", "remove", "proj_a.b"]).well();
    assert_eq!(fs::read_to_string(files.ini()).expect("it is there"), INI);
}

#[test]
fn a_database_is_added_with_the_usual_settings_and_found_so_the_second_time() {
    let files = Files::default();
    let said = files.run(&["db", "add", "proj_abc123"]);
    let said = said.well();
    for line in ["Added proj_abc123 to PgBouncer config", "  pool_size: 5", "  reserve_pool: 2"] {
        assert!(said.lines().any(|said| said == line), "{said}");
    }
    assert!(said.contains("Not reloaded: "), "{said}");
    let entry = "proj_abc123 = host=postgres port=5432 dbname=proj_abc123 pool_size=5 reserve_pool=2";
    assert!(files.ini_lines().iter().any(|line| line == entry), "{:#?}", files.ini_lines());
    assert!(files.run(&["db", "add", "proj_abc123"]).well().contains("Nothing to change"));
    let gone = files.run(&["db", "remove", "never_there"]);
    assert!(
        gone.well().contains("Nothing to change") && gone.stderr.contains("never_there is not in "),
        "{gone:?}"
    );
}

/// A script that has this lock for ever.
fn held(lock: &Path) -> Process {
    let mut holder = Command::new("flock");
    let holder = Process::start(holder.arg(lock).args(["sh", "-c", "echo locked; exec sleep 300"]));
    holder.stdout_line(|line| line == "locked");
    holder
}

#[test]
fn a_lock_that_another_holds_for_ever_is_exit_3_with_its_number_and_nothing_is_changed() {
    let files = Files::default();
    let lock = files.dir().join("pgbouncer.ini.lock");
    let holder = held(&lock);
    let watch = Stopwatch::start();
    let ran = files.run(&["--lock-timeout", "300ms", "db", "add", "proj_a"]);
    let error = ran.failed(3);
    assert!(watch.elapsed() >= Duration::from_millis(300) && watch.elapsed() < Duration::from_secs(5));
    assert!(
        error.contains(&lock.display().to_string()) && error.contains(&holder.id().to_string()),
        "{error}"
    );
    assert_eq!(fs::read_to_string(files.ini()).expect("it is there"), INI);
    assert_eq!(files.names(), ["pgbouncer.ini", "pgbouncer.ini.lock", "userlist.txt"]);
}

#[test]
fn whoever_waits_for_a_lock_can_be_interrupted() {
    let files = Files::default();
    let lock = files.dir().join("pgbouncer.ini.lock");
    let _holder = held(&lock);
    for words in [&["db", "add", "proj_a"][..], &["backup", "create"], &["backup", "prune"]] {
        let waiting = Process::start(&mut files.command(&[&["--json"], words].concat()));
        // It has the lock file open and waits with a thread of its own.
        let threads = format!("/proc/{}/task", waiting.id());
        let begin = Stopwatch::start();
        let waits = || {
            fs::read_dir(&threads).is_ok_and(|mut threads| {
                threads.any(|thread| {
                    let comm = thread.map(|thread| thread.path().join("comm"));
                    comm.is_ok_and(|comm| fs::read_to_string(comm).is_ok_and(|comm| comm.trim() == "flock"))
                })
            })
        };
        while !waits() {
            assert!(begin.elapsed() < PATIENCE, "{words:?} never waits");
        }
        waiting.signal(rustix::process::Signal::INT);
        let ran = ended(waiting);
        assert_eq!(ran.code, Some(130), "{ran:?}");
        let object: serde_json::Value = serde_json::from_str(&ran.stdout).expect("one object");
        assert_eq!(object["code"], 130, "{object}");
    }
    assert_eq!(files.names(), ["pgbouncer.ini", "pgbouncer.ini.lock", "userlist.txt"]);
}

#[test]
fn a_user_list_that_depends_on_where_pgbouncer_was_started_is_not_made_elsewhere() {
    let files = Files::new("[databases]\n[pgbouncer]\nauth_file = users.txt\n", USERLIST);
    let add = |dir: &Path| {
        let mut command = shutdown_tests::pgbctl::pgbctl();
        command.current_dir(dir).arg("--config").arg(files.ini()).args(["user", "add", "app", "--generate"]);
        shutdown_tests::pgbctl::run(&mut command)
    };
    let elsewhere = tempfile::tempdir().expect("a temporary directory");
    let ran = add(elsewhere.path());
    assert!(ran.failed(2).contains("relative to where PgBouncer was started"), "{ran:?}");
    assert!(fs::read_dir(elsewhere.path()).expect("a directory").next().is_none());
    fs::write(files.dir().join("users.txt"), "").expect("a temporary directory");
    add(files.dir()).well();
    assert!(lines(&files.dir().join("users.txt"))[0].starts_with("\"app\" "));
}

#[test]
fn who_waits_for_a_lock_file_that_is_removed_waits_for_the_next_one() {
    let files = Files::default();
    let lock = files.dir().join("pgbouncer.ini.lock");
    let hold = |gate: &Path| {
        let mut holder = Command::new("flock");
        let script = "echo locked; while [ ! -e \"$0\" ]; do sleep 0.01; done";
        let holder = Process::start(holder.arg(&lock).args(["sh", "-c", script]).arg(gate));
        holder.stdout_line(|line| line == "locked");
        holder
    };
    let (first_gate, second_gate) = (files.dir().join("first"), files.dir().join("second"));
    let mut first = hold(&first_gate);
    let waiting = Process::start(&mut files.command(&["db", "add", "proj_a"]));
    // Until it waits for the first one's lock: an arrow marks those that do.
    let watch = Stopwatch::start();
    while !fs::read_to_string("/proc/locks")
        .expect("/proc")
        .lines()
        .any(|line| line.contains("->") && line.contains(&format!(" {} ", waiting.id())))
    {
        assert!(watch.elapsed() < PATIENCE, "it never waits");
        thread::yield_now();
    }
    fs::remove_file(&lock).expect("it is there");
    let mut second = hold(&second_gate);
    fs::write(&first_gate, "").expect("a temporary directory");
    first.ended(PATIENCE);
    // It has the removed one's lock now, and must not be content with that.
    let watch = Stopwatch::start();
    while !fs::read_to_string("/proc/locks")
        .expect("/proc")
        .lines()
        .any(|line| line.contains("->") && line.contains(&format!(" {} ", waiting.id())))
    {
        assert!(!waiting.is_over(), "it did not wait for the second lock");
        assert!(watch.elapsed() < PATIENCE, "it never waits");
        thread::yield_now();
    }
    assert_eq!(fs::read_to_string(files.ini()).expect("it is there"), INI);
    fs::write(&second_gate, "").expect("a temporary directory");
    second.ended(PATIENCE);
    ended(waiting).well();
    assert_eq!(entries(&files.ini_lines(), "proj_a"), 1);
}

#[test]
fn what_cannot_be_a_name_or_a_value_is_exit_2_and_nothing_is_written() {
    let files = Files::default();
    let before = files.names();
    let names =
        ["a\nb", "a=b", "a b", "\"", "'", "]", "*", "", &"n".repeat(64), "pgbouncer", "[databases]", "-x"];
    for name in names {
        let ran = files.run(&["db", "add", "--", name]);
        assert_eq!(ran.code, Some(2), "{name:?}: {ran:?}");
    }
    for host in ["a\nb = host=evil", "a\tb", "", "a\0b"] {
        if host.contains('\0') {
            continue; // No command line can hold one.
        }
        let ran = files.run(&["db", "add", "proj_a", "--host", host]);
        assert_eq!(ran.code, Some(2), "{host:?}: {ran:?}");
    }
    let spoken = files.run(&["db", "add", "proj_a", "--host", "it's there"]);
    spoken.well();
    assert!(
        files.ini_lines().iter().any(|line| line.contains("host='it''s there'")),
        "{:#?}",
        files.ini_lines()
    );
    files.run(&["db", "remove", "proj_a"]).well();
    for (key, value) in
        [("listen_port", "1\n[databases]\nx = host=evil"), ("no_such_key", "1"), ("listen_port\nx", "1")]
    {
        let ran = files.run(&["config", "set", key, value]);
        assert_eq!(ran.code, Some(2), "{key:?}: {ran:?}");
    }
    for user in ["a\nb", "", &"n".repeat(128)] {
        let ran = files.run(&["user", "add", "--generate", "--", user]);
        assert_eq!(ran.code, Some(2), "{user:?}: {ran:?}");
    }
    let password = files.dir().join("password");
    for secret in ["\n", "a\0b\n"] {
        fs::write(&password, secret).expect("a temporary directory");
        let ran = files.run(&["user", "add", "app", "--password-file", &password.display().to_string()]);
        assert_eq!(ran.code, Some(2), "{secret:?}: {ran:?}");
    }
    fs::remove_file(&password).expect("it is there");
    assert_eq!(fs::read_to_string(files.ini()).expect("it is there"), INI);
    assert_eq!(fs::read_to_string(files.userlist()).expect("it is there"), USERLIST);
    let mut after = files.names();
    after.retain(|name| !name.contains(".backup.") && !name.ends_with(".lock"));
    assert_eq!(after, before);
}

#[test]
fn whoever_asks_for_json_gets_one_object_whatever_goes_wrong() {
    let files = Files::default();
    let cases: [(&[&str], i32); 7] = [
        (&["--json", "db", "add", "a b"], 2),
        (&["--json", "db", "add"], 2),
        (&["db", "add", "x", "--pool-size", "many", "--json"], 2),
        (&["--json", "db", "frobnicate"], 2),
        (&["--json", "db"], 2),
        (&["--json", "db", "set", "proj_ab", "--set", "password=hunter2"], 2),
        (&["--json", "db", "set", "nobody", "--pool-size", "1"], 2),
    ];
    for (words, code) in cases {
        let ran = files.run(words);
        assert_eq!(ran.code, Some(code), "{ran:?}");
        let object: serde_json::Value = serde_json::from_str(&ran.stdout)
            .unwrap_or_else(|error| panic!("{words:?} is no object: {error}: {ran:?}"));
        assert_eq!(object["code"], code, "{object}");
        let error = object["error"].as_str().unwrap_or_default();
        assert!(!error.is_empty() && !error.ends_with(':'), "{object}");
        let stderr: Vec<_> = ran.stderr.split_whitespace().collect();
        let is_said = stderr.join(" ").contains(error) || error == "a command is missing: see --help";
        assert!(is_said, "{object} and {}", ran.stderr);
        assert!(!ran.stdout.contains("hunter2") && !ran.stderr.contains("hunter2"), "{ran:?}");
    }
    let missing = files.run(&["--json", "db", "add"]).stdout;
    assert!(missing.contains("not provided: <NAME>"), "{missing}");
    // Without, there is nothing on stdout; and help is no error.
    assert_eq!(files.run(&["db", "add"]).stdout, "");
    let help = files.run(&["--json", "db", "add", "--help"]);
    assert!(help.well().contains("Usage:"), "{help:?}");
}

#[test]
fn a_file_that_pgbouncer_would_refuse_is_not_edited_and_its_line_is_named() {
    let broken = INI.replace("auth_type", "auth type");
    let files = Files::new(&broken, USERLIST);
    let ran = files.run(&["db", "add", "proj_a"]);
    let error = ran.failed(2);
    assert!(error.contains("line 11") && error.contains("nothing is changed"), "{error}");
    assert_eq!(fs::read_to_string(files.ini()).expect("it is there"), broken);
    let files = Files::new(INI, "\"a\" \"b\"\n# no comment here\n");
    let ran = files.run(&["user", "add", "app", "--generate"]);
    assert!(ran.failed(2).contains("line 2"), "{ran:?}");
    assert_eq!(
        fs::read_to_string(files.userlist()).expect("it is there"),
        "\"a\" \"b\"\n# no comment here\n"
    );
}

#[test]
fn backups_are_listed_pruned_and_brought_back() {
    let files = Files::default();
    for number in 0..5 {
        files.run(&["db", "add", &format!("proj_{number}")]).well();
    }
    let old = files.dir().join("pgbouncer.ini.backup.1733404800");
    fs::write(&old, "[databases]\n[pgbouncer]\n").expect("a temporary directory");
    // Seconds that are not of its time would not be believed.
    let made = UNIX_EPOCH + Duration::from_secs(1_733_404_800);
    fs::File::options().append(true).open(&old).and_then(|file| file.set_modified(made)).expect("ours");
    assert_eq!(files.run(&["backup", "list"]).well().lines().count(), 6);
    let pruned = files.run(&["backup", "prune"]);
    assert!(pruned.well().contains("Removed 1") && !old.exists(), "{pruned:?}");
    let pruned = files.run(&["backup", "prune", "--keep", "2"]);
    assert!(pruned.well().contains("Removed 3"), "{pruned:?}");
    let listed = files.run(&["backup", "list"]);
    let newest =
        listed.well().lines().next().and_then(|line| line.split(' ').next()).expect("one").to_owned();
    let before = fs::read(&newest).expect("it is there");
    files.run(&["backup", "restore", &newest]).well();
    assert_eq!(fs::read(files.ini()).expect("it is there"), before);
    assert_eq!(entries(&files.ini_lines(), "proj_4"), 0);
    // What was there is kept, too.
    assert_eq!(files.run(&["backup", "list"]).well().lines().count(), 3);
    // One that PgBouncer would refuse is looked at first.
    let broken = files.dir().join("pgbouncer.ini.backup.1733404801.1");
    fs::write(&broken, "[nonsense]\n").expect("a temporary directory");
    files.run(&["backup", "restore", &broken.display().to_string()]).failed(2);
    assert_eq!(fs::read(files.ini()).expect("it is there"), before);
}

#[test]
fn an_edit_is_one_line_in_the_systems_log_and_never_a_secret() {
    let files = Files::default();
    let socket = files.dir().join("log");
    let log = std::os::unix::net::UnixDatagram::bind(&socket).expect("a socket");
    log.set_nonblocking(true).expect("a socket");
    let mut buffer = [0; 4096];
    let mut told = |words: &[&str]| {
        let mut command = files.command(words);
        let ran =
            shutdown_tests::pgbctl::run(command.env("PGBCTL_SYSLOG", &socket).env("SECRET", "open sesame"));
        ran.well();
        let mut lines = Vec::new();
        while let Ok(length) = log.recv(&mut buffer) {
            lines.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        lines
    };
    let lines = told(&["db", "add", "proj_a"]);
    assert!(lines.len() == 1 && lines[0].contains("added database proj_a file="), "{lines:?}");
    assert_eq!(told(&["db", "add", "proj_a"]), [""; 0]);
    let lines = told(&["user", "add", "app", "--password-env", "SECRET"]);
    assert!(lines.len() == 1 && lines[0].contains("set the secret of user \"app\""), "{lines:?}");
    for word in ["sesame", "SCRAM", "$4096"] {
        assert!(!lines[0].contains(word), "{lines:?}");
    }
}
