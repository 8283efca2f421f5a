//! What systemd is told and what it hands over, against a socket that hears as systemd does and a process that holds
//! sockets as systemd does; and the unit files, against systemd's own reading of time.
//!
//! Needs `systemd-socket-activate` and `systemd-analyze` of Debian's package systemd, strace, python3 and setpriv.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{Connection, get, post, status_until};
use shutdown_tests::manager::{Holder, Notified};
use shutdown_tests::process::{EdgeProxy, Process, Stopwatch, binary, read_report};

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// The lines of a message that begin so.
fn line<'a>(message: &'a str, name: &str) -> Option<&'a str> {
    message.lines().find_map(|line| line.strip_prefix(name))
}

fn status(message: &str) -> &str {
    line(message, "STATUS=").unwrap_or_default()
}

#[test]
fn an_idle_run_is_told_from_ready_to_the_exit_code_at_a_path_and_at_an_abstract_name() {
    let dir = temporary();
    for manager in [Notified::at_path(dir.path()), Notified::at_abstract_name(dir.path())] {
        let mut proxy = EdgeProxy::start([("NOTIFY_SOCKET", &manager.socket)]);
        let (listen, admin) = (proxy.listen, proxy.admin);
        assert_eq!(
            manager.next(),
            format!("READY=1\nSTATUS=serving http://{listen}, admin http://{admin}\n")
        );
        // What it says is true.
        assert_eq!(get(listen, "/").expect("it serves").status, 200);
        assert_eq!(get(admin, "/readyz").expect("it serves").status, 200);
        assert_eq!(manager.rest(), [""; 0], "nothing to say while it runs, without a watchdog");
        proxy.process.signal(Signal::TERM);
        assert_eq!(proxy.process.exit_code(PATIENCE), 0);
        let said = manager.until(Stopwatch::start(), |message| message == "STATUS=stopped, exit code 0\n");
        assert!(said[0].1.starts_with("STOPPING=1\nSTATUS="), "{said:?}");
        assert!(said[1..].iter().all(|(_, message)| !message.contains("STOPPING")), "{said:?}");
        assert_eq!(manager.rest(), [""; 0], "nothing after the last");
    }
}

#[test]
fn time_is_asked_for_while_requests_end_and_not_while_one_hangs() {
    let dir = temporary();
    let manager = Notified::at_path(dir.path());
    let total = Duration::from_secs(8);
    let mut proxy = EdgeProxy::start([
        ("NOTIFY_SOCKET", manager.socket.clone()),
        ("SHUTDOWN_TOTAL_TIMEOUT", total.as_secs().to_string().into()),
    ]);
    assert!(manager.next().starts_with("READY=1\n"));
    let mut requests = Vec::new();
    for path in ["/never", "/slow?ms=3500"] {
        let mut request = Connection::open(proxy.listen).expect("it serves");
        request.send("GET", path, "connection: close\r\n").expect("it reads");
        requests.push(request);
    }
    status_until(proxy.admin, |status| status["requests"]["active"] == 2);
    let clock = Stopwatch::start();
    proxy.process.signal(Signal::TERM);
    let said = manager.until(clock, |message| status(message).starts_with("stopped, "));
    assert_eq!(proxy.process.exit_code(PATIENCE), 11);
    println!("{said:#?}");

    // In the second in which one ended, and in none in which the other hung.
    let draining = |count: &str| -> Vec<_> {
        let begin = format!("draining: {count}, ");
        said.iter().filter(|(_, message)| status(message).starts_with(&begin)).collect()
    };
    let (both, one) = (draining("2 requests"), draining("1 request"));
    assert!(both.len() >= 2 && one.len() >= 3, "a line a second");
    let asks = |(_, message): &&(Duration, String)| message.contains("EXTEND_TIMEOUT_USEC=");
    assert!(asks(&one[0]), "{:?}", one[0]);
    // The connection of the one that ended may have gone a moment after it.
    assert_eq!(one[2..].iter().copied().find(|said| asks(said)), None);
    assert_eq!(both[1..].iter().copied().find(|said| asks(said)), None);
    // Never beyond our own end.
    for (at, message) in said.iter().filter(asks_of) {
        let micros =
            line(message, "EXTEND_TIMEOUT_USEC=").and_then(|text| text.parse().ok()).expect("a number");
        let until = *at + Duration::from_micros(micros);
        assert!(until <= total + Duration::from_millis(200), "{until:?}: {message}");
    }
    // Each line once, with what is left, and the last with the exit code.
    let lines: Vec<_> =
        said.iter().map(|(_, message)| status(message)).filter(|text| !text.is_empty()).collect();
    assert!(lines.windows(2).all(|pair| pair[0] != pair[1]), "{lines:#?}");
    assert!(lines[..lines.len() - 1].iter().all(|text| text.ends_with(" s left")), "{lines:#?}");
    assert_eq!(lines.last(), Some(&"stopped, exit code 11"));
}

fn asks_of(said: &&(Duration, String)) -> bool {
    said.1.contains("EXTEND_TIMEOUT_USEC=")
}

#[test]
fn without_a_notify_socket_no_socket_is_opened_for_it() {
    let unix_calls = |notify: Option<&Notified>| -> usize {
        let dir = temporary();
        let trace = dir.path().join("trace");
        let proxy = EdgeProxy::command(dir.path());
        let mut command = Command::new("strace");
        command.args(["-f", "-e", "trace=socket,connect,sendto", "-o"]).arg(&trace);
        command.arg(proxy.get_program()).args(proxy.get_args()).current_dir(dir.path());
        command.env_remove("NOTIFY_SOCKET").env("WATCHDOG_USEC", "200000");
        command.envs(notify.map(|manager| ("NOTIFY_SOCKET", &manager.socket)));
        let mut process = Process::start(&mut command);
        let admin = process.address("  admin ");
        assert_eq!(post(admin, "/terminate", "").expect("answers").status, 200);
        assert_eq!(process.exit_code(PATIENCE), 0);
        assert!(!process.stderr().contains("NOTIFY_SOCKET"), "{}", process.stderr());
        let trace = std::fs::read_to_string(trace).expect("strace has written it");
        assert!(trace.contains("AF_INET"), "{trace}");
        trace.lines().filter(|line| line.contains("SOCK_DGRAM") && line.contains("AF_UNIX")).count()
    };
    assert_eq!(unix_calls(None), 0);
    // The control: what would have been seen.
    let dir = temporary();
    assert!(unix_calls(Some(&Notified::at_path(dir.path()))) >= 3);
}

#[test]
fn a_notify_socket_that_leads_nowhere_costs_one_warning() {
    for socket in ["/nowhere/notify", "vsock:2:1234", "relative"] {
        let mut proxy = EdgeProxy::start([("NOTIFY_SOCKET", socket), ("WATCHDOG_USEC", "20000")]);
        // Some pings are tried by then.
        proxy.process.stderr_line(|line| line.contains("NOTIFY_SOCKET"));
        assert_eq!(get(proxy.listen, "/slow?ms=100").expect("it serves").status, 200);
        proxy.process.signal(Signal::TERM);
        assert_eq!(proxy.process.exit_code(PATIENCE), 0);
        let stderr = proxy.process.stderr();
        let warnings: Vec<_> = stderr.lines().filter(|line| line.contains(" WARN ")).collect();
        println!("{warnings:?}");
        assert_eq!(warnings.len(), 1, "{stderr}");
        assert!(warnings[0].contains("NOTIFY_SOCKET") && warnings[0].contains(socket), "{stderr}");
    }
}

#[test]
fn a_manager_that_does_not_listen_holds_nothing_up() {
    let dir = temporary();
    let path = dir.path().join("notify");
    let deaf = UnixDatagram::bind(&path).expect("a temporary directory");
    let filler = UnixDatagram::unbound().expect("a socket");
    filler.set_nonblocking(true).expect("a socket");
    while filler.send_to(b"x", &path).is_ok() {}
    let mut proxy = EdgeProxy::start([("NOTIFY_SOCKET", &path)]);
    proxy.process.stderr_line(|line| line.contains("its queue is full"));
    assert_eq!(get(proxy.listen, "/").expect("it serves").status, 200);
    let clock = Stopwatch::start();
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
    assert!(clock.elapsed() < Duration::from_secs(2), "{:?}", clock.elapsed());
    assert_eq!(proxy.report()["exit_code"], 0);
    drop(deaf);
}

#[test]
fn the_watchdog_hears_a_service_that_runs_and_one_that_stops_but_not_one_that_is_stuck() {
    let dir = temporary();
    let manager = Notified::at_path(dir.path());
    let mut command = Command::new(binary("watched"));
    command
        .env("NOTIFY_SOCKET", &manager.socket)
        .env("WATCHDOG_USEC", "200000")
        .env("SHUTDOWN_LAME_DUCK", "1")
        .current_dir(dir.path());
    let mut process = Process::start_with_stdin(&mut command);
    assert_eq!(manager.next(), "READY=1\nSTATUS=here to be blocked\n");
    for _ in 0..5 {
        assert_eq!(manager.next(), "WATCHDOG=1\n");
    }
    process.say("block");
    process.stdout_line(|line| line == "blocked");
    // One may have been on its way.
    let _ = manager.within(Duration::from_millis(300));
    assert_eq!(manager.within(Duration::from_secs(1)), None, "it is stuck");
    // The driver is not: who stops a service need not be served by it.
    process.signal(Signal::TERM);
    let said = manager.until(Stopwatch::start(), |message| message == "STATUS=stopped, exit code 0\n");
    let pings = said.iter().filter(|(_, message)| message.contains("WATCHDOG=1\n")).count();
    assert!(pings >= 5, "{said:#?}");
    assert_eq!(process.exit_code(PATIENCE), 0);
}

#[test]
fn the_proxy_pings_while_it_serves() {
    let dir = temporary();
    let manager = Notified::at_path(dir.path());
    let proxy = EdgeProxy::start([
        ("NOTIFY_SOCKET", &manager.socket),
        ("WATCHDOG_USEC", &"100000".to_owned().into()),
    ]);
    assert!(manager.next().starts_with("READY=1\n"));
    for _ in 0..5 {
        assert_eq!(manager.next(), "WATCHDOG=1\n");
    }
    drop(proxy);
}

#[test]
fn what_systemd_would_not_set_is_exit_2_and_named() {
    let run = |script: &str| {
        let dir = temporary();
        let proxy = EdgeProxy::command(dir.path());
        let mut command = Command::new("sh");
        command.args(["-c", &format!(r#"{script} exec "$0" "$@""#)]).arg(proxy.get_program());
        for name in ["NOTIFY_SOCKET", "LISTEN_FDNAMES"] {
            command.env_remove(name);
        }
        let mut process = Process::start(command.args(proxy.get_args()).current_dir(dir.path()));
        let code = process.exit_code(PATIENCE);
        assert!(!dir.path().join("data").exists(), "it wrote something");
        (code, process.stderr())
    };
    for (script, parts) in [
        ("LISTEN_PID=$$ LISTEN_FDS=some", ["LISTEN_FDS=\"some\"", "unset it"]),
        ("LISTEN_PID=$$ LISTEN_FDS=4000000000", ["LISTEN_FDS=\"4000000000\"", "unset it"]),
        ("LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDS_FIRST_FD=0", ["LISTEN_FDS_FIRST_FD=\"0\"", "unset it"]),
        (
            "exec 3</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=web",
            ["descriptor 3 (web)", "ListenStream="],
        ),
        ("LISTEN_PID=$$ LISTEN_FDS=1", ["descriptor 3", "ListenStream="]),
        ("WATCHDOG_USEC=soon", ["WATCHDOG_USEC=\"soon\"", "unset it"]),
        ("WATCHDOG_USEC=0", ["WATCHDOG_USEC=\"0\"", "unset it"]),
    ] {
        let (code, stderr) = run(script);
        println!("{code} {stderr}");
        let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("edge-proxy: error: ")).collect();
        assert_eq!((code, errors.len()), (2, 1), "{script}: {stderr}");
        assert!(parts.iter().all(|part| errors[0].contains(part)), "{script}: {stderr}");
    }
    // What is meant for another process is none of ours.
    let mut proxy = EdgeProxy::start([("LISTEN_PID", "1"), ("LISTEN_FDS", "x"), ("WATCHDOG_PID", "1")]);
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
}

#[test]
fn two_sockets_are_traffic_and_admin_by_their_names_or_by_their_order() {
    for (names, traffic, admin) in [("one,two", 0, 1), ("admin,web", 1, 0)] {
        let dir = temporary();
        // Ports that cannot be bound: they are not tried.
        let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let taken = taken.local_addr().expect("bound").to_string();
        let mut command = Command::new(binary("edge-proxy"));
        command.args(["--listen", &taken, "--admin", "127.0.0.1:1", "--data-dir", "data"]);
        let mut holder = Holder::new(names, command.current_dir(dir.path()));
        let pid = holder.start();
        assert_eq!(holder.process.address("  traffic "), holder.sockets[traffic]);
        assert_eq!(holder.process.address("  admin "), holder.sockets[admin]);
        assert_eq!(get(holder.sockets[traffic], "/").expect("it serves").status, 200);
        assert_eq!(get(holder.sockets[admin], "/readyz").expect("it serves").status, 200);
        holder.signal(pid, Signal::TERM);
        assert_eq!(holder.ended(), 0);
        let stderr = holder.process.stderr_so_far();
        for flag in ["--listen", "--admin"] {
            let lines = stderr.lines().filter(|line| line.contains(&format!("systemd: {flag} is not used")));
            assert_eq!(lines.count(), 1, "{stderr}");
        }
    }
}

#[test]
fn sockets_that_are_too_many_or_too_open_are_exit_2_and_named() {
    for (names, part) in [("a,b,c", "more than two sockets"), ("web,admin@0.0.0.0", "--admin-token-file")] {
        let dir = temporary();
        let mut holder = Holder::new(names, &EdgeProxy::command(dir.path()));
        holder.start();
        assert_eq!(holder.ended(), 2);
        // Its reader may be behind; the holder itself stays.
        holder.process.stderr_line(|line| line.starts_with("edge-proxy: error: "));
        let stderr = holder.process.stderr_so_far();
        let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("edge-proxy: error: ")).collect();
        assert!(errors.len() == 1 && errors[0].contains(part), "{stderr}");
    }
}

/// Connects, and asks for `/` without waiting for the answer.
fn ask(addr: SocketAddr) -> Connection {
    let mut connection = Connection::open(addr).expect("the socket is held: it takes connections");
    connection.send("GET", "/", "connection: close\r\n").expect("the system takes it");
    connection
}

#[test]
fn who_connects_to_a_held_socket_between_two_starts_is_served_by_the_next() {
    let dir = temporary();
    let mut holder = Holder::new("web", &EdgeProxy::command(dir.path()));
    let web = holder.sockets[0];
    let first = holder.start();
    let admin = holder.process.address("  admin ");
    let mut slow = Connection::open(web).expect("it serves");
    slow.send("GET", "/slow?ms=1500", "connection: close\r\n").expect("it reads");
    status_until(admin, |status| status["requests"]["active"] == 1);
    holder.signal(first, Signal::TERM);
    holder.process.stderr_line(|line| line.contains("listeners closed"));
    // While the first one still works: neither refused nor dropped, and not its any more.
    let mut between: Vec<_> = (0..10).map(|_| ask(web)).collect();
    assert_eq!(status_until(admin, |_| true)["requests"]["active"], 1);
    assert_eq!(slow.answer().expect("finishes").status, 200);
    assert_eq!(holder.ended(), 0);
    // And when nobody works: the queue is systemd's.
    between.extend((0..10).map(|_| ask(web)));

    let second = holder.start();
    for connection in &mut between {
        assert_eq!(connection.answer().expect("served by the second").status, 200);
    }
    assert_eq!(get(web, "/").expect("it serves").status, 200);
    holder.signal(second, Signal::TERM);
    assert_eq!(holder.ended(), 0);
    let report = read_report(&dir.path().join("data"));
    assert_eq!(report["reason"]["signal"], "SIGTERM");
}

#[test]
fn systemd_socket_activate_starts_it_with_its_first_client() {
    // An address of this test's own; its port is free.
    let ip = format!("127.{}.{}.1", std::process::id() / 256 % 256, std::process::id() % 256);
    let free = TcpListener::bind(format!("{ip}:0")).expect("loopback");
    let addr = free.local_addr().expect("bound");
    drop(free);
    let dir = temporary();
    let proxy = EdgeProxy::command(dir.path());
    let mut command = Command::new("systemd-socket-activate");
    command.arg("-l").arg(addr.to_string()).arg(proxy.get_program()).args(proxy.get_args());
    let mut process = Process::start(command.current_dir(dir.path()));
    process.stderr_line(|line| line.contains("Listening on"));
    assert!(!dir.path().join("data").exists(), "it does not run yet");
    assert_eq!(get(addr, "/").expect("it is started and serves").status, 200);
    assert_eq!(process.address("  traffic "), addr);
    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 0);
    assert!(process.stderr().contains("--listen is not used"), "{}", process.stderr());
    assert_eq!(read_report(&dir.path().join("data"))["exit_code"], 0);
    TcpStream::connect(addr).expect_err("nobody holds the socket any more");
}

/// `--check --unit` of a unit with these lines in `[Service]`.
fn check_unit(lines: &str, environment: &[(&str, &str)]) -> (i32, String, String) {
    let dir = temporary();
    std::fs::write(dir.path().join("edge.service"), format!("[Unit]\nDescription=x\n\n[Service]\n{lines}\n"))
        .expect("a temporary directory");
    check(dir.path(), &["--check", "--unit", "edge.service"], environment)
}

fn check(dir: &Path, flags: &[&str], environment: &[(&str, &str)]) -> (i32, String, String) {
    let names = |dir: &Path| -> BTreeSet<_> {
        dir.read_dir().expect("a directory").map(|entry| entry.expect("readable").file_name()).collect()
    };
    let before = names(dir);
    let mut command = EdgeProxy::command(dir);
    let mut process = Process::start(command.args(flags).envs(environment.iter().copied()));
    let code = process.exit_code(PATIENCE);
    assert_eq!(names(dir), before, "it wrote something");
    (code, process.stdout(), process.stderr())
}

const NOTIFY: &str = "Type=notify\nKillMode=mixed\n";

#[test]
fn a_unit_that_leaves_the_time_is_exit_0_with_the_arithmetic() {
    for (lines, part) in [
        ("", "fits                   total 28s + margin 2s = 30s of TimeoutStopSec 90s, 60s to spare"),
        ("TimeoutStopSec=", "TimeoutStopSec         90s (systemd's default)"),
        ("TimeoutSec=10\nTimeoutStopSec=30", "of TimeoutStopSec 30s, 0s to spare"),
        ("TimeoutStopSec=1min \\\n  # not this\n  30s", "of TimeoutStopSec 90s, 60s to spare"),
        ("TimeoutStopSec=infinity", "30s, and systemd waits without end"),
        ("WatchdogSec=30", "WatchdogSec            30s: a ping each 15s"),
        ("Environment=SHUTDOWN_TOTAL_TIMEOUT=20\nTimeoutStopSec=22", "total 20s + margin 2s = 22s of"),
    ] {
        let (code, stdout, stderr) = check_unit(&format!("{NOTIFY}{lines}"), &[]);
        assert_eq!(code, 0, "{lines}: {stderr}");
        assert!(stdout.contains(part), "{part:?} is not in:\n{stdout}");
        assert!(!stdout.contains("warning:"), "{stdout}");
    }
    // The unit's total is what runs under systemd, whatever it is here; it is shown, and the plan with it.
    let lines = format!("{NOTIFY}Environment=SHUTDOWN_TOTAL_TIMEOUT=20");
    let (_, stdout, _) = check_unit(&lines, &[("SHUTDOWN_TOTAL_TIMEOUT", "25")]);
    for part in ["total 20s", "SHUTDOWN_TOTAL_TIMEOUT 20 (the unit's Environment=)"] {
        assert!(stdout.contains(part), "{part:?} is not in:\n{stdout}");
    }
    let (code, stdout, _) = check_unit("", &[]);
    assert_eq!((code, stdout.matches("warning: ").count()), (0, 2), "{stdout}");
}

#[test]
fn a_unit_that_kills_too_early_or_unheard_is_exit_2_with_one_sentence() {
    for (lines, parts) in [
        ("TimeoutStopSec=20", ["28s + margin 2s = 30s is more than TimeoutStopSec=20s", "to 30s, or lower"]),
        ("Environment=SHUTDOWN_TOTAL_TIMEOUT=100", ["102s", "90s (systemd's default)"]),
        ("KillSignal=SIGQUIT", ["KillSignal=SIGQUIT", "write SIGTERM"]),
        ("KillMode=none", ["KillMode=none", "write mixed"]),
        ("SendSIGHUP=yes", ["SendSIGHUP=yes", "write no"]),
        ("TimeoutStopSec=soon", ["line 7: TimeoutStopSec=soon", "1min 30s"]),
        ("Environment=SHUTDOWN_TOTAL_TIMEOUT=1ms", ["SHUTDOWN_TOTAL_TIMEOUT", "raise"]),
    ] {
        let (code, stdout, stderr) = check_unit(&format!("{NOTIFY}{lines}"), &[]);
        println!("{code} {stderr}");
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (2, "", 1), "{lines}: {stderr}");
        assert!(parts.iter().all(|part| stderr.contains(part)), "{lines}: {stderr}");
    }
    let dir = temporary();
    for (flags, part) in [
        (["--unit", "x"].as_slice(), "--unit goes with --check"),
        (&["--check", "--unit", "missing.service"], "missing.service (--unit) cannot be read"),
    ] {
        let (code, stdout, stderr) = check(dir.path(), flags, &[]);
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (2, "", 1), "{stderr}");
        assert!(stderr.contains(part), "{stderr}");
    }
}

#[test]
fn a_time_span_means_what_systemd_says_it_means() {
    let spans = [
        "90",
        "1min 30s",
        "5min20s",
        "500ms",
        "2 h 30",
        "1.5h",
        ".5s",
        "1M",
        "1month 1y",
        "300ms20s 5day",
        "3w2d1hr",
        "1 s 5",
        "soon",
        "5 parsecs",
        "1.",
        "5 m s",
        "1,5s",
        "2minutes 3seconds",
        "7usec 8msec",
        "12us",
    ];
    let mut read = 0;
    for span in spans {
        let mut judge = Process::start(Command::new("systemd-analyze").args(["timespan", span]));
        let accepted = judge.exit_code(PATIENCE) == 0;
        let stdout = judge.stdout();
        let micros = stdout.lines().find_map(|line| line.trim().strip_prefix("μs: "));
        let (code, stdout, stderr) = check_unit(&format!("{NOTIFY}TimeoutStopSec=1h {span}"), &[]);
        if !accepted {
            assert!(code == 2 && stderr.contains(span), "{span}: {stdout}{stderr}");
            continue;
        }
        read += 1;
        // An hour more, so that each leaves enough.
        let micros: u64 = micros.and_then(|text| text.parse().ok()).expect("microseconds");
        let wanted = Duration::from_micros(micros) + Duration::from_secs(3600);
        let shown =
            stdout.lines().find_map(|line| line.strip_prefix("TimeoutStopSec ")).expect("shown").trim();
        assert_eq!(shown, shutdown_core::display_duration(wanted).to_string(), "{span}");
    }
    assert!(read > 10 && read < spans.len());
}
