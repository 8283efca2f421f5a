//! The processes beside the edge proxy end with it: a PgBouncer, a local proxy, a PostgreSQL and a Redis, as seed 000 asks, and
//! programs that make it hard. Who is not meant is in `companion_strangers.rs`.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_core::companions::PidFile;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{Connection, get, post, status_until};
use shutdown_tests::companions::{
    Lab, Running, gone, is_alive, processes_of, quoted, send, told, until, writes_down_signals,
};
use shutdown_tests::pg_clients::Client;
use shutdown_tests::process::{EdgeProxy, Process, read_report};
use shutdown_tests::servers::{
    Installed, LocalProxy, LogLine, Pgbouncer, Pooling, Postgres, Redis, as_user, dir_of, pgbouncers, unix_ms,
};

/// Who may run all of them: PostgreSQL and PgBouncer refuse to be root.
const USER: &str = "postgres";
/// As the system is to say it.
const NAMES: [&str; 4] = ["pgbouncer", "local_proxy", "postgres", "redis-server"];
const TOLD: &str = "received fast shutdown request";

/// A compute node as seed 000 has it, and a Redis.
struct Compute {
    postgres: Postgres,
    pgbouncer: Pgbouncer,
    local_proxy: LocalProxy,
    redis: Redis,
}

fn installed() -> Installed {
    pgbouncers().swap_remove(0)
}

impl Compute {
    fn start() -> Self {
        let postgres = Postgres::start();
        let pgbouncer = installed().start(&postgres, Pooling::Transaction, 5);
        Self { postgres, pgbouncer, local_proxy: LocalProxy::start(), redis: Redis::start() }
    }

    /// In the same places and on the same ports.
    fn start_again(&mut self) {
        self.postgres.start_again();
        self.pgbouncer.start_again().expect("nothing is in its way");
        self.local_proxy.start_again();
        self.redis.start_again();
    }

    /// The flags of a proxy that ends it.
    fn flags(&self) -> Vec<String> {
        let files = [
            self.pgbouncer.pidfile(),
            self.local_proxy.pidfile(),
            self.postgres.pidfile(),
            self.redis.pidfile(),
        ];
        let specs = NAMES.into_iter().zip(files);
        specs.flat_map(|(name, file)| companion(&format!("name={name},pidfile={}", file.display()))).collect()
    }

    fn numbers(&self) -> [u32; 4] {
        [self.pgbouncer.id(), self.local_proxy.id(), self.postgres.id(), self.redis.id()]
    }

    /// What each says when it has ended well.
    fn ended_well(&mut self) {
        assert_eq!(self.pgbouncer.code(PATIENCE), 0, "{}", self.pgbouncer.log());
        assert_eq!(self.local_proxy.ended(PATIENCE).code(), Some(0));
        assert_eq!(self.postgres.code(PATIENCE), 0, "{:?}", self.postgres.log());
        assert_eq!(self.redis.code(PATIENCE), 0, "{:?}", self.redis.log());
        assert_eq!(self.pgbouncer.signals(), ["SIGINT"], "{}", self.pgbouncer.log());
        assert_eq!(times_told(&self.postgres.log()).len(), 1, "{:?}", self.postgres.log());
    }
}

fn companion(spec: &str) -> [String; 2] {
    ["--companion".to_owned(), spec.to_owned()]
}

/// When PostgreSQL was told to end.
fn times_told(log: &[LogLine]) -> Vec<u64> {
    log.iter().filter(|line| line.text.contains(TOLD)).map(|line| line.at_ms).collect()
}

fn content(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn exists(path: &Path) -> bool {
    path.try_exists().expect("the directory can be searched")
}

/// The outcome of the task and of its note.
#[track_caller]
fn outcome(report: &Value, name: &str, task: &str, note: &str) {
    let told = told(report, name);
    assert_eq!((&told["outcome"], &told["note"]["outcome"]), (&task.into(), &note.into()), "{report:#}");
}

/// Asks for the end, and waits for it: the answer is the report.
fn terminate(proxy: &mut EdgeProxy) -> Value {
    let answer = post(proxy.admin, "/terminate", "").expect("flushed before the exit");
    assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
    assert_eq!((answer.status, answer.json()), (200, proxy.report()));
    answer.json()
}

fn status(admin: SocketAddr, place: usize) -> Value {
    get(admin, "/status").expect("it runs").json()["companions"][place].clone()
}

fn number(status: &Value) -> u32 {
    status["pid"].as_u64().and_then(|pid| pid.try_into().ok()).unwrap_or_else(|| panic!("{status:#}"))
}

#[test]
fn terminate_ends_all_that_stand_beside_it_the_database_last_and_the_last_line_names_them() {
    let mut compute = Compute::start();
    let numbers = compute.numbers().map(|number| number.to_string());
    assert_eq!(content(&compute.pgbouncer.pidfile()).trim(), numbers[0]);
    assert_eq!(content(&compute.local_proxy.pidfile()).trim(), numbers[1]);
    assert_eq!(content(&compute.postgres.pidfile()).lines().next(), Some(&*numbers[2]));
    assert_eq!(content(&compute.redis.pidfile()).trim(), numbers[3]);

    let client = compute.local_proxy.client();
    let mut proxy = EdgeProxy::with_flags(compute.flags());
    let admin = proxy.admin;
    let caller = thread::spawn(move || post(admin, "/terminate", "").expect("flushed before the exit"));
    assert_eq!(compute.pgbouncer.code(PATIENCE), 0, "{}", compute.pgbouncer.log());
    compute.local_proxy.waits();
    // One proxy is left: nobody has told the database, nor the cache.
    assert_eq!(compute.postgres.query("SELECT 1"), "1");
    assert_eq!(compute.redis.cli(&["ping"]), "PONG");
    assert_eq!(times_told(&compute.postgres.log()), [0; 0], "{:?}", compute.postgres.log());
    let freed = unix_ms();
    drop(client);
    compute.ended_well();
    let at = times_told(&compute.postgres.log())[0];
    println!("the database was told {} ms after the last client had gone", at - freed);
    assert!(at >= freed);

    assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
    let answer = caller.join().expect("answered");
    let report = proxy.report();
    assert_eq!((answer.status, answer.json()), (200, report.clone()));
    for (name, number) in NAMES.into_iter().zip(compute.numbers()) {
        outcome(&report, name, "ok", "exited");
        assert_eq!(told(&report, name)["note"]["pid"], number, "{report:#}");
    }
    let stderr = proxy.process.stderr();
    let last = stderr.lines().find(|line| line.contains("Graceful shutdown completed"));
    let ended = format!("ended={:?}", NAMES.join(", "));
    assert!(last.is_some_and(|line| line.contains(&ended)), "{ended} is not in:\n{stderr}");

    // Each has taken its own away, but for the one whose lock says all.
    for gone in [compute.pgbouncer.pidfile(), compute.postgres.pidfile(), compute.redis.pidfile()] {
        assert!(!exists(&gone), "{}", gone.display());
    }
    assert_eq!(content(&compute.local_proxy.pidfile()).trim(), numbers[1]);
    drop(PidFile::claim(compute.local_proxy.pidfile()).expect("nobody holds it"));
}

#[test]
fn a_proxy_that_waits_for_a_client_without_bound_is_killed_when_its_time_is_over() {
    let mut local_proxy = LocalProxy::start();
    let _client = local_proxy.client();
    let file = local_proxy.pidfile();
    let spec = format!("name=local_proxy,pidfile={},stop=TERM:700ms/KILL:1s", file.display());
    let mut proxy = EdgeProxy::with_flags(companion(&spec));
    let report = terminate(&mut proxy);
    assert_eq!(local_proxy.ended(PATIENCE).code(), None, "it was killed");
    local_proxy.waits();
    outcome(&report, "local_proxy", "ok", "escalated");
    let note = &told(&report, "local_proxy")["note"];
    assert_eq!((&note["signal"], &note["signals"]), (&9.into(), &2.into()), "{report:#}");
    assert!(exists(&file), "a locked one is never removed");
    drop(PidFile::claim(&file).expect("nobody holds it"));
}

#[test]
fn what_is_not_there_has_nothing_to_be_ended_and_that_is_no_failure() {
    let postgres = Postgres::start();
    let mut pgbouncer = installed().start(&postgres, Pooling::Transaction, 5);
    let mut local_proxy = LocalProxy::start();
    let flags = |pgbouncer: &Pgbouncer, local_proxy: &LocalProxy| {
        let file = |name, file: &Path| companion(&format!("name={name},pidfile={}", file.display()));
        [file(NAMES[0], &pgbouncer.pidfile()), file(NAMES[1], &local_proxy.pidfile())].concat()
    };
    let not_running = |flags: Vec<String>, why: [&str; 2]| {
        let mut proxy = EdgeProxy::with_flags(flags);
        let report = terminate(&mut proxy);
        let stderr = proxy.process.stderr();
        for (name, why) in NAMES.into_iter().zip(why) {
            outcome(&report, name, "ok", "not running");
            let said = stderr.lines().filter(|line| line.contains("companion not running"));
            let said: Vec<_> = said.filter(|line| line.contains(&format!("companion=\"{name}\""))).collect();
            assert!(said.len() == 1 && said[0].contains(why), "{why} is not in:\n{stderr}");
        }
        assert!(!stderr.contains("ended="), "nobody was: {stderr}");
    };

    // The PID files are missing.
    let no_file = "it has no PID file";
    for file in [pgbouncer.pidfile(), local_proxy.pidfile()] {
        std::fs::rename(&file, file.with_extension("away")).expect("the same directory");
    }
    not_running(flags(&pgbouncer, &local_proxy), [no_file, no_file]);
    assert!(is_alive(pgbouncer.id()) && is_alive(local_proxy.id()), "nobody knows who they are");
    assert!(pgbouncer.signals().is_empty(), "{}", pgbouncer.log());
    for file in [pgbouncer.pidfile(), local_proxy.pidfile()] {
        std::fs::rename(file.with_extension("away"), &file).expect("the same directory");
    }

    // They are stale: both were killed.
    pgbouncer.signal(Signal::KILL);
    send(local_proxy.id(), Signal::KILL);
    pgbouncer.ended(PATIENCE);
    local_proxy.ended(PATIENCE);
    let stale = format!("its PID file is stale: there is no process {}", pgbouncer.id());
    not_running(flags(&pgbouncer, &local_proxy), [&stale, "nobody holds the lock of its PID file"]);
    assert!(exists(&pgbouncer.pidfile()), "it was not ended here: left as it is");

    // They have ended by themselves.
    pgbouncer.start_again().expect("it removes a file whose number is nobody's");
    local_proxy.start_again();
    pgbouncer.signal(Signal::INT);
    send(local_proxy.id(), Signal::TERM);
    pgbouncer.ended(PATIENCE);
    local_proxy.ended(PATIENCE);
    not_running(flags(&pgbouncer, &local_proxy), [no_file, "nobody holds the lock of its PID file"]);
}

#[test]
fn started_terminated_and_started_again_it_leaves_no_process_and_no_port_that_is_taken() {
    let mut compute = Compute::start();
    for cycle in 0..2 {
        if cycle > 0 {
            compute.start_again();
        }
        assert_eq!(compute.postgres.query("SELECT 1"), "1");
        Client::open(&compute.pgbouncer).run("SELECT 1").expect("an answer");
        let mut proxy = EdgeProxy::with_flags(compute.flags());
        let report = terminate(&mut proxy);
        for name in NAMES {
            outcome(&report, name, "ok", "exited");
        }
        compute.ended_well();
        for place in [compute.postgres.socket_dir(), compute.pgbouncer.socket_dir(), proxy.dir()] {
            assert_eq!(processes_of(place), [""; 0]);
        }
    }
}

/// An edge-proxy that this user runs, with what is below `dir`.
fn unprivileged(dir: tempfile::TempDir, flags: &[String]) -> EdgeProxy {
    let ours = EdgeProxy::command(dir.path());
    let mut command = as_user(USER, Path::new(ours.get_program()));
    command.args(ours.get_args()).args(flags).current_dir(dir.path());
    EdgeProxy::run(dir, &mut command)
}

#[test]
fn what_it_has_launched_ends_with_it_and_starts_with_it_again() {
    let mut compute = Compute::start();
    // Only their places and ports from here on.
    compute.pgbouncer.signal(Signal::INT);
    send(compute.local_proxy.id(), Signal::TERM);
    compute.pgbouncer.ended(PATIENCE);
    compute.local_proxy.ended(PATIENCE);
    compute.postgres.stop_server();
    compute.redis.stop();
    let ports = [compute.postgres.port(), compute.redis.port(), compute.local_proxy.listen().port()];

    let mut dir = dir_of(USER);
    for cycle in 0..2 {
        // The directory is made.
        let locked = dir.path().join("run/deep/local_proxy.pid");
        let redis = dir.path().join("redis.pid");
        let files = [compute.pgbouncer.pidfile(), locked.clone(), compute.postgres.pidfile(), redis];
        let words = [
            compute.pgbouncer.words(),
            compute.local_proxy.words(&locked),
            compute.postgres.words(),
            compute.redis.words(dir.path()),
        ];
        let specs = NAMES.into_iter().zip(&files).zip(&words);
        let spec = |((name, file), words): ((&str, &std::path::PathBuf), &Vec<String>)| {
            companion(&format!("name={name},pidfile={},launch={}", file.display(), quoted(words)))
        };
        let flags: Vec<String> = specs.flat_map(spec).collect();
        let mut proxy = unprivileged(dir, &flags);
        proxy.process.stderr_line(|line| line.contains("ready to accept connections"));
        let mut numbers = Vec::new();
        for (place, file) in files.iter().enumerate() {
            let number = number(&status(proxy.admin, place));
            let first =
                || std::fs::read_to_string(file).unwrap_or_default().lines().next().map(str::to_owned);
            until(|| first() == Some(number.to_string()), &|| format!("{} {:?}", file.display(), first()));
            numbers.push(number);
        }
        Client::open(&compute.pgbouncer).run("SELECT 1").expect("an answer");
        for port in ports {
            until(|| TcpStream::connect(("127.0.0.1", port)).is_ok(), &|| format!("nobody on {port}"));
        }

        let report = terminate(&mut proxy);
        for (name, number) in NAMES.into_iter().zip(&numbers) {
            outcome(&report, name, "ok", "exited");
            let note = &told(&report, name)["note"];
            assert_eq!((&note["pid"], &note["code"]), (&(*number).into(), &0.into()), "{report:#}");
        }
        assert!(proxy.process.stderr().contains(&format!("ended={:?}", NAMES.join(", "))));
        assert_eq!(times_told(&LogLine::all(&proxy.process.stderr())).len(), 1);
        assert!(numbers.into_iter().all(|number| !is_alive(number)));
        for port in ports {
            assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "{port} is taken, cycle {cycle}");
        }
        for place in [compute.postgres.socket_dir(), compute.pgbouncer.socket_dir(), proxy.dir()] {
            assert_eq!(processes_of(place), [""; 0]);
        }
        assert_eq!(files.map(|file| exists(&file)), [false, true, false, false]);
        dir = proxy.into_dir();
    }
}

#[test]
fn a_missing_directory_of_a_pid_file_is_one_clear_warning_at_the_start() {
    let lab = Lab::new();
    let file = lab.at("none/pgbouncer.pid");
    let mut proxy = EdgeProxy::with_flags(companion(&format!("name=pgbouncer,pidfile={}", file.display())));
    let report = terminate(&mut proxy);
    outcome(&report, "pgbouncer", "ok", "not running");
    let stderr = proxy.process.stderr();
    let warnings: Vec<_> = stderr.lines().filter(|line| line.contains(" WARN ")).collect();
    let [warning] = warnings[..] else { panic!("{stderr}") };
    let expected = format!("there is no directory for its PID file {}", file.display());
    assert!(warning.contains(&expected) && warning.contains("companion=\"pgbouncer\""), "{warning}");
    assert!(!exists(&lab.at("none")), "it is not ours to make");
}

#[test]
fn a_pid_file_whose_number_is_another_process_now_does_not_keep_a_pgbouncer_from_its_start() {
    let postgres = Postgres::start();
    let mut pgbouncer = installed().start(&postgres, Pooling::Transaction, 5);
    pgbouncer.signal(Signal::KILL);
    pgbouncer.ended(PATIENCE);
    let mut stranger = Running::start(as_user(USER, Path::new("/bin/sleep")).arg("300"));
    let file = pgbouncer.pidfile();
    assert!(exists(&file), "it could not remove it");
    until(|| content(Path::new(&format!("/proc/{}/comm", stranger.id()))).trim() == "sleep", &|| {
        "setpriv becomes the program".to_owned()
    });

    // 1 is what it was in a container.
    for another in [stranger.id(), 1] {
        std::fs::write(&file, format!("{another}\n")).expect("its directory is there");
        let said = pgbouncer.start_again().expect_err("control: by itself it refuses to start beside it");
        println!("control: {}", said.lines().last().unwrap_or_default());
        assert!(said.contains("another instance running"), "{said}");
        assert!(exists(&file));

        let launch = quoted(&pgbouncer.words());
        let spec = format!("name=pgbouncer,pidfile={},launch={launch}", file.display());
        let mut proxy = unprivileged(dir_of(USER), &companion(&spec));
        let first = number(&status(proxy.admin, 0));
        let written = || std::fs::read_to_string(&file).unwrap_or_default();
        until(|| written().trim() == first.to_string(), &|| format!("{:?}", written()));
        Client::open(&pgbouncer).run("SELECT 1").expect("an answer");
        let report = terminate(&mut proxy);
        outcome(&report, "pgbouncer", "ok", "exited");
        assert!(
            proxy.process.stderr().contains("removed a stale PID file"),
            "{another}: {}",
            proxy.process.stderr()
        );
        assert!(stranger.is_alive() && !exists(&file));
    }
}

/// A program of the lab's that is launched, and one that was started by us.
struct Both {
    lab: Lab,
    started: Running,
    flags: Vec<String>,
}

impl Both {
    /// Both write down their signals and do this then; they are ended by `stop`.
    fn new(then: &str, stop: &str) -> Self {
        let lab = Lab::new();
        let script = writes_down_signals(then);
        let (started, launched) = (lab.script("started", &script), lab.script("launched", &script));
        let started = Running::start(Command::new(started).arg(lab.path()));
        lab.lines_when("ready", 1);
        let file = lab.pid_file("started.pid", started.id());
        let flags = [
            companion(&format!("name=started,pidfile={},stop={stop}", file.display())),
            companion(&format!(
                "name=launched,stop={stop},launch={} {}",
                launched.display(),
                lab.path().display()
            )),
        ];
        Self { lab, started, flags: flags.concat() }
    }

    /// The number of the launched one, once it is up.
    fn launched(&self) -> u32 {
        self.lab.lines_when("ready", 2)[1].parse().expect("its number")
    }
}

#[test]
fn when_it_is_killed_what_it_has_launched_is_gone_within_a_second_and_who_was_there_lives() {
    let mut both = Both::new("exit 0", "TERM:5s");
    let mut proxy = EdgeProxy::with_flags(&both.flags);
    let launched = both.launched();
    assert_eq!(number(&status(proxy.admin, 1)), launched);
    proxy.process.signal(Signal::KILL);
    assert_eq!(proxy.process.ended(PATIENCE).code(), None);
    gone(launched, Duration::from_secs(1));
    assert!(both.started.is_alive());
    assert_eq!(both.lab.lines("signals"), [""; 0]);
}

#[test]
fn a_start_that_fails_ends_what_it_has_launched_as_every_stop_does() {
    let lab = Lab::new();
    let script = "trap 'echo TERM >> \"$1/signals\"; exit 0' TERM; echo $$ > \"$1/number\"; echo $$ > \"$1/launched.pid\"; while :; do sleep 300 & wait; done";
    let program = lab.script("launched", script);
    let (place, dir) = (lab.path().display(), tempfile::tempdir().expect("a temporary directory"));
    // Waited for by its PID file, and only then the database is asked for, which nobody has.
    let spec = format!("name=launched,pidfile={place}/launched.pid,launch={} {place}", program.display());
    let mut command = EdgeProxy::command(dir.path());
    command.args(companion(&spec)).args(["--database", "postgres://nobody@127.0.0.1:1/none"]);
    let mut process = Process::start(&mut command);
    assert_eq!(process.exit_code(PATIENCE), 1, "{}", process.stderr());
    assert_eq!(lab.lines("signals"), ["TERM"]);
    let launched = lab.lines("number")[0].parse().expect("its number");
    gone(launched, Duration::from_secs(1));
    let report = read_report(&dir.path().join("data"));
    assert_eq!(told(&report, "launched")["note"]["outcome"], "exited", "{report:#}");
}

#[test]
fn an_immediate_end_leaves_who_was_there_alone_and_nothing_that_it_has_launched() {
    let mut both = Both::new("exit 0", "TERM:5s");
    let mut proxy = EdgeProxy::with_flags(&both.flags);
    let launched = both.launched();
    let answer = post(proxy.admin, "/terminate?mode=immediate", "").expect("answers");
    assert_eq!(answer.status, 200);
    proxy.process.ended(PATIENCE);
    gone(launched, Duration::from_secs(1));
    let report = proxy.report();
    for name in ["started", "launched"] {
        assert_eq!(told(&report, name)["outcome"], "skipped", "{report:#}");
    }
    assert!(both.started.is_alive());
    assert_eq!(both.lab.lines("signals"), [""; 0]);
}

#[test]
fn a_third_signal_leaves_nothing_that_it_has_launched_though_that_does_not_hear() {
    let mut both = Both::new(":", "TERM:5s");
    let dir = tempfile::tempdir().expect("a temporary directory");
    // The second one's report waits a moment for the log; that moment is the third one's.
    let mut process = Process::start_unread(EdgeProxy::command(dir.path()).args(&both.flags));
    let admin = process.address("  admin ");
    let launched = both.launched();
    process.block_stderr();
    process.signal(Signal::TERM);
    both.lab.lines_when("signals", 2);
    let echo = (shutdown_core::SAME_SIGNAL + Duration::from_millis(50)).as_secs_f64() * 1000.0;
    status_until(admin, |status| status["shutting_down_for_ms"].as_f64().is_some_and(|ms| ms > echo));
    process.signal(Signal::TERM);
    status_until(admin, |status| status["signals"] == 2);
    process.signal(Signal::INT);
    assert_eq!(process.exit_code(PATIENCE), 130, "TERM alone would have left with 143");
    gone(launched, Duration::from_secs(1));
    assert!(both.started.is_alive());
    assert_eq!(both.lab.lines("signals").len(), 2, "one each");
}

#[test]
fn the_end_of_a_launched_one_is_the_end_of_the_service_or_a_new_start_as_it_is_said() {
    let lab = Lab::new();
    let sleeper = lab.sleeper("worker").display().to_string();
    let fatal = |on_exit: &str| companion(&format!("name=worker,on-exit={on_exit},launch={sleeper} 300"));

    let mut proxy = EdgeProxy::with_flags(fatal("fatal"));
    send(number(&status(proxy.admin, 0)), Signal::KILL);
    assert_eq!(proxy.process.exit_code(PATIENCE), 10, "{}", proxy.process.stderr());
    let report = proxy.report();
    let reason = &report["reason"];
    assert_eq!(
        (&reason["task"], &reason["error"]),
        (&"companion worker".into(), &"was ended by signal 9".into()),
        "{report:#}"
    );
    outcome(&report, "worker", "ok", "not running");

    let mut proxy = EdgeProxy::with_flags(fatal("restart"));
    let first = number(&status(proxy.admin, 0));
    send(first, Signal::KILL);
    let shown = status_until(proxy.admin, |status| {
        status["companions"][0]["restarts"] == 1 && !status["companions"][0]["pid"].is_null()
    });
    let shown = &shown["companions"][0];
    let second = number(shown);
    assert!(second != first && is_alive(second) && !is_alive(first), "{shown:#}");
    assert_eq!(shown["last_exit"], "was ended by signal 9", "{shown:#}");
    let report = terminate(&mut proxy);
    outcome(&report, "worker", "ok", "exited");
    assert_eq!(told(&report, "worker")["note"]["pid"], second, "{report:#}");
    assert!(!is_alive(second));
}

#[test]
fn one_that_ends_during_the_drain_is_not_running_and_not_started_again() {
    let lab = Lab::new();
    let sleeper = lab.sleeper("worker");
    let mut started = Running::start(Command::new(&sleeper).arg("300"));
    let file = lab.pid_file("pid", started.id());
    let mut proxy = EdgeProxy::with_flags(
        [
            companion(&format!("name=worker,pidfile={}", file.display())),
            companion(&format!("name=launched,launch={} 300", lab.sleeper("launched").display())),
            companion(&format!("name=vital,on-exit=fatal,launch={} 300", lab.sleeper("vital").display())),
        ]
        .concat(),
    );
    let mut slow = Connection::open(proxy.listen).expect("it serves");
    slow.send("GET", "/slow?ms=1000", "connection: close\r\n").expect("it reads");
    status_until(proxy.admin, |status| status["requests"]["active"] == 1);
    proxy.process.signal(Signal::TERM);
    status_until(proxy.admin, |status| status["phase"] == "draining");
    started.kill();
    for place in [1, 2] {
        send(number(&status(proxy.admin, place)), Signal::KILL);
    }
    assert_eq!(slow.answer().expect("finishes").status, 200);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
    let report = proxy.report();
    for name in ["worker", "launched", "vital"] {
        outcome(&report, name, "ok", "not running");
    }
    for name in ["launched", "vital"] {
        assert_eq!(told(&report, name)["note"]["ended_by"], 9, "{report:#}");
    }
    assert_eq!(processes_of(lab.path()), [""; 0]);
}

#[test]
fn fifty_are_ended_at_once_each_by_one_signal() {
    const COUNT: usize = 50;
    let lab = Lab::new();
    let worker = lab.script("worker", &writes_down_signals("read -r -t 0.3 -u 9; exit 0"));
    let mut running: Vec<_> =
        (0..COUNT).map(|_| Running::start(Command::new(&worker).arg(lab.path()))).collect();
    lab.lines_when("ready", COUNT);
    let files = running.iter().map(|one| lab.pid_file(&format!("{}.pid", one.id()), one.id()));
    let flags = files.flat_map(|file| companion(&format!("name=worker,pidfile={}", file.display())));
    let mut proxy = EdgeProxy::with_flags(flags.collect::<Vec<_>>());
    let report = terminate(&mut proxy);
    assert!(running.iter_mut().all(|one| !one.is_alive()));
    let mut expected: Vec<_> = running.iter().map(|one| format!("{} TERM", one.id())).collect();
    let mut signals = lab.lines("signals");
    expected.sort();
    signals.sort();
    assert_eq!(signals, expected);
    let stages = report["stages"].as_array().expect("a list");
    let stage = stages.iter().find(|stage| stage["stage"] == "companions").expect("there are companions");
    let tasks = stage["tasks"].as_array().expect("a list");
    assert_eq!(tasks.iter().filter(|task| task["notes"][0]["outcome"] == "exited").count(), COUNT);
    // One after another they take 15 s, which the stage has not got.
    println!("{COUNT} ended within {} ms", stage["duration_ms"]);
}

#[test]
fn its_own_pid_file_is_held_as_long_as_it_runs_and_stays() {
    let lab = Lab::new();
    let file = lab.at("run/edge-proxy.pid");
    let mut proxy = EdgeProxy::with_flags(["--pid-file".to_owned(), file.display().to_string()]);
    assert_eq!(content(&file), format!("{}\n", proxy.process.id()));
    PidFile::claim(&file).expect_err("it is held");
    // Whoever wants to end it finds it by that.
    let spec = format!("name=edge-proxy,kind=locked,pidfile={}", file.display());
    let mut other = EdgeProxy::with_flags(companion(&spec));
    let report = terminate(&mut other);
    outcome(&report, "edge-proxy", "ok", "exited");
    assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
    assert_eq!(read_report(&proxy.dir().join("data"))["reason"]["signal"], "SIGTERM");
    drop(PidFile::claim(&file).expect("nobody holds it"));
}
