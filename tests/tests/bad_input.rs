//! Bad input gets one clear sentence that names the thing and the fix, the documented exit code, and writes nothing.

use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::Command;

use shutdown_core::companions::PidFile;
use shutdown_tests::PATIENCE;
use shutdown_tests::process::{Process, binary};

/// Runs edge-proxy with these in an empty directory; the code and the one sentence. Nothing may be left behind.
fn refused(args: &[&str], env: &[(&str, &str)], prepare: impl FnOnce(&Path)) -> (i32, String) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    prepare(dir.path());
    let before = listing(dir.path());
    let mut command = Command::new(binary("edge-proxy"));
    for flag in ["--listen", "--admin"].iter().filter(|flag| !args.contains(flag)) {
        command.args([*flag, "127.0.0.1:0"]);
    }
    command.args(args).current_dir(dir.path());
    let mut process = Process::start(command.envs(env.iter().copied()));
    let code = process.exit_code(PATIENCE);
    assert_eq!(process.stdout(), "", "nothing on stdout");
    assert_eq!(listing(dir.path()), before, "it wrote something: {args:?}");
    let stderr = process.stderr();
    assert_eq!(stderr.lines().count(), 1, "one sentence: {stderr}");
    (code, stderr)
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .expect("the directory is there")
        .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_configuration_that_cannot_be_used_is_exit_2_and_names_the_thing_and_the_fix() {
    /// Arguments, environment, and what the sentence must name.
    type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a [&'a str]);
    let none: &[(&str, &str)] = &[];
    let cases: &[Case<'_>] = &[
        (&[], &[("SHUTDOWN_DB_TIMEOUT", "5 minutes")], &["SHUTDOWN_DB_TIMEOUT", "5 minutes", "30s"]),
        (&[], &[("SHUTDOWN_TOTAL_TIMEOUT", "-1")], &["SHUTDOWN_TOTAL_TIMEOUT", "-1"]),
        (&[], &[("SHUTDOWN_TOTAL_TIMEOUT", "")], &["SHUTDOWN_TOTAL_TIMEOUT"]),
        (
            &[],
            &[("SHUTDOWN_LINGER", "9"), ("SHUTDOWN_GRACEFUL_TIMEOUT", "4")],
            &["SHUTDOWN_LINGER", "SHUTDOWN_GRACEFUL_TIMEOUT", "lower"],
        ),
        (
            &[],
            &[("SHUTDOWN_TOTAL_TIMEOUT", "200ms")],
            &["SHUTDOWN_TOTAL_TIMEOUT", "impossible", "raise", "="],
        ),
        (
            &[],
            &[("SHUTDOWN_LAME_DUCK", "28"), ("SHUTDOWN_TOTAL_TIMEOUT", "28")],
            &["SHUTDOWN_LAME_DUCK", "SHUTDOWN_TOTAL_TIMEOUT", "raise"],
        ),
        (&["--frobnicate"], none, &["--frobnicate", "--help"]),
        (&["--upstream", "localhost:3000"], none, &["localhost:3000", "http://"]),
        (&["--upstream", "https://localhost:3000"], none, &["https", "http://"]),
        (&["--config", "missing.toml"], none, &["missing.toml"]),
        (&["--admin", "0.0.0.0:0"], none, &["--admin", "--admin-token-file"]),
        (&["--listen", "nowhere"], none, &["nowhere"]),
        (&["--breaker", "percent=0"], none, &["--breaker", "percent=0", "1 to 100"]),
        (&["--breaker", "volume=many"], none, &["--breaker", "\"many\"", "volume=20"]),
        (&[], &[("EDGE_PROXY_BREAKER", "sleep=1h")], &["EDGE_PROXY_BREAKER", "\"1h\"", "30s"]),
        (&["--when-all-open", "open"], none, &["--when-all-open", "refuse or try"]),
        (&["--admin-token-file", "missing.token"], none, &["missing.token"]),
        (&["--database", "mysql://me:pass@db/x"], none, &["--database", "\"mysql\"", "postgres://"]),
        (&[], &[("EDGE_PROXY_CACHE", "memcached://a")], &["EDGE_PROXY_CACHE", "\"memcached\"", "redis://"]),
        (&["--registry", "registry:80"], none, &["--registry", "http://host:port/path"]),
        (&["--peer", "edge-2:80", "--notice-insecure"], none, &["--peer", "\"edge-2:80\"", "10.0.0.2:8080"]),
        (&["--peer", "10.0.0.2:0", "--notice-insecure"], none, &["--peer", "between 1 and 65535"]),
        (
            &[],
            &[("EDGE_PROXY_PEER", "10.0.0.2:1, 0.0.0.0:1")],
            &["EDGE_PROXY_PEER", "\"0.0.0.0:1\"", "reach"],
        ),
        (&["--peer", "10.0.0.2:80"], none, &["--peer", "--notice-key-file", "--notice-insecure"]),
        (
            &["--notice-listen", "127.0.0.1:0"],
            none,
            &["--notice-listen", "--notice-key-file", "--notice-insecure"],
        ),
        (&["--notice-listen", "8080", "--notice-insecure"], none, &["--notice-listen", "\"8080\"", "port"]),
        (&[], &[("EDGE_PROXY_NOTICE_INSECURE", "yes")], &["EDGE_PROXY_NOTICE_INSECURE", "true nor false"]),
        (
            &["--notice-key-file", "missing.keys"],
            none,
            &["--notice-key-file", "missing.keys", "cannot be read"],
        ),
        (
            &["--listen", "127.0.0.1:7", "--peer", "127.0.0.1:7", "--notice-insecure"],
            none,
            &["--peer 127.0.0.1:7", "itself", "others"],
        ),
        (&["--mdns", "eth0/1"], none, &["--mdns", "\"eth0/1\"", "ip link"]),
        (&["--mdns", "sixteen-bytes-is"], none, &["--mdns", "sixteen-bytes-is", "ip link"]),
        (&["--companion", "pgbouncer"], none, &["--companion", "\"pgbouncer\"", "name=", "pidfile="]),
        (
            &["--companion", "name=pgbouncer"],
            none,
            &["--companion", "pidfile=PATH", "launch=COMMAND", "find=name"],
        ),
        (
            &["--companion", "pidfile=p.pid"],
            none,
            &["--companion", "name=pgbouncer", "as the process is called"],
        ),
        (
            &["--companion", "name=pgbouncer,pidfile=p.pid,stop=TERM:5m"],
            none,
            &["--companion", "stop=TERM:5m", "INT:6s/TERM:2s/KILL:1s"],
        ),
        (
            &["--companion", "name=pgbouncer,pidfile=p.pid,stop=INT:5s/INT:5s"],
            none,
            &["--companion", "a signal twice", "INT:6s/TERM:2s/KILL:1s"],
        ),
        (
            &[],
            &[("EDGE_PROXY_COMPANION", "name=a,pidfile=a.pid; name=b,launch=b 'c; d")],
            &["EDGE_PROXY_COMPANION", "name=b", "quotes do not fit"],
        ),
        (
            &["--companion", "name=a,pidfile=p.pid", "--companion", "name=b,pidfile=p.pid"],
            none,
            &["--companion", "p.pid", "twice"],
        ),
        (
            &["--companion", "name=pgbouncer,pidfile=p.pid,stop=INT:20s/TERM:5s/KILL:2s"],
            &[("SHUTDOWN_COMPANION_TIMEOUT", "10")],
            &[
                "pgbouncer INT:20s/TERM:5s/KILL:2s = 27s",
                "more than SHUTDOWN_COMPANION_TIMEOUT=10s",
                "raise",
                "shorten",
            ],
        ),
        (
            &["--companion", "name=pgbouncer,pidfile=p.pid", "--companion", "name=postgres,pidfile=q.pid"],
            &[("SHUTDOWN_TOTAL_TIMEOUT", "15")],
            &[
                "pgbouncer INT:6s/TERM:2s/KILL:1s = 9s, then postgres INT:6s/QUIT:2s/KILL:1s = 9s; together 18s",
                "SHUTDOWN_TOTAL_TIMEOUT=15s leaves",
            ],
        ),
        (&["--service-type", "_edge._sctp.local."], none, &["--service-type", "_sctp", "_name._tcp.local."]),
    ];
    for (args, env, wanted) in cases {
        let (code, sentence) = refused(args, env, |_| {});
        println!("{code} {sentence}");
        assert_eq!(code, 2, "{args:?} {env:?}: {sentence}");
        for part in *wanted {
            assert!(sentence.contains(part), "{part:?} is not in {sentence:?}");
        }
    }
}

#[test]
fn a_file_that_cannot_be_understood_is_exit_2_and_named() {
    let write = |name: &'static str, text: &'static str| {
        move |dir: &Path| std::fs::write(dir.join(name), text).expect("a temporary directory can be written")
    };
    for (args, prepare, wanted) in [
        (["--config", "edge.toml"].as_slice(), write("edge.toml", "listen = \n"), ["edge.toml", "line 1"]),
        (&["--config", "edge.toml"], write("edge.toml", "lisen = \"127.0.0.1:1\"\n"), ["edge.toml", "lisen"]),
        (
            &["--config", "edge.toml"],
            write("edge.toml", "shutdown_total_timeout = \"soon\"\n"),
            ["total", "soon"],
        ),
        (&[], write(".env", "this is no assignment\n"), [".env", "line 1"]),
        (&["--admin-token-file", "empty"], write("empty", "\n"), ["empty", "token"]),
        (&["--notice-key-file", "keys"], write("keys", "# none yet\n"), ["\"keys\"", "no key"]),
        (&["--notice-key-file", "keys"], write("keys", "1:0011\n"), ["\"keys\"", "line 1"]),
        (
            &["--notice-key-file", "keys", "--notice-insecure"],
            write("keys", "1:000102030405060708090a0b0c0d0e0f\n"),
            ["--notice-insecure", "leave"],
        ),
    ] {
        let (code, sentence) = refused(args, &[], prepare);
        println!("{code} {sentence}");
        assert_eq!(code, 2, "{sentence}");
        for part in wanted {
            assert!(sentence.to_ascii_lowercase().contains(part), "{part:?} is not in {sentence:?}");
        }
    }
}

#[test]
fn an_address_in_use_is_exit_1_and_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = taken.local_addr().expect("bound").to_string();
    for flag in ["--listen", "--admin"] {
        let (code, sentence) = refused(&[flag, &addr], &[], |_| {});
        println!("{code} {sentence}");
        assert_eq!(code, 1, "{sentence}");
        assert!(sentence.contains(&addr) && sentence.contains(flag), "{sentence}");
    }
}

#[test]
fn an_address_in_use_by_another_that_hears_notices_is_exit_1_and_named() {
    let taken = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let addr = taken.local_addr().expect("bound").to_string();
    let (code, sentence) = refused(&["--notice-listen", &addr, "--notice-insecure"], &[], |_| {});
    println!("{code} {sentence}");
    assert_eq!(code, 1, "{sentence}");
    assert!(sentence.contains(&addr) && sentence.contains("another with --notice-listen"), "{sentence}");
}

#[test]
fn a_data_directory_that_cannot_be_written_is_exit_1_and_named() {
    // A file stands where a directory should be made: refused to root as well.
    let (code, sentence) = refused(&["--data-dir", "taken/data"], &[], |dir| {
        std::fs::write(dir.join("taken"), "").expect("a temporary directory can be written");
    });
    println!("{code} {sentence}");
    assert_eq!(code, 1, "{sentence}");
    assert!(sentence.contains("taken/data") && sentence.contains("--data-dir"), "{sentence}");
}

#[test]
fn a_pid_file_that_another_holds_is_exit_1_and_not_a_byte_of_it_is_changed() {
    let held = tempfile::tempdir().expect("a temporary directory");
    let path = held.path().join("edge-proxy.pid");
    let _claimed = PidFile::claim(&path).expect("nobody holds it");
    // Not as it is written here, so that one who writes it anew is found out, too.
    let text = format!(" {} \n\n", std::process::id());
    std::fs::write(&path, &text).expect("it is there");
    let data = held.path().join("data").display().to_string();
    let file = path.display().to_string();
    let mut command = Command::new(binary("edge-proxy"));
    command.args([
        "--listen",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
        "--data-dir",
        &data,
        "--pid-file",
        &file,
    ]);
    let mut process = Process::start(command.current_dir(held.path()));
    assert_eq!(process.exit_code(PATIENCE), 1, "{}", process.stderr());
    assert_eq!(process.stdout(), "", "nothing on stdout");
    let stderr = process.stderr();
    let sentence = stderr.lines().last().unwrap_or_default();
    println!("{sentence}");
    let by = format!("is held by process {}, which runs", std::process::id());
    for part in [&*file, &*by, "--pid-file"] {
        assert!(sentence.contains(part), "{part:?} is not in {sentence:?}");
    }
    assert_eq!(std::fs::read_to_string(&path).expect("it is there"), text);
}

#[test]
fn check_shows_the_companions_and_the_time_of_their_stage_follows_the_ladders() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let plan = |specs: &[&str]| {
        let mut command = Command::new(binary("edge-proxy"));
        command.arg("--check").args(specs.iter().flat_map(|spec| ["--companion", *spec]));
        command.args(["--pid-file", "own.pid"]).current_dir(dir.path());
        let mut process = Process::start(command.env("SHUTDOWN_TOTAL_TIMEOUT", "60"));
        assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
        process.stdout()
    };
    let stage = |plan: &str| {
        let line = plan.lines().find(|line| line.trim_start().starts_with("companions "));
        line.unwrap_or_else(|| panic!("no stage in:\n{plan}")).to_owned()
    };
    let short = ["name=pgbouncer,pidfile=p.pid", "name=redis-server,launch=redis-server --port 0"];
    let shown = plan(&short);
    println!("{shown}");
    for part in [
        "pgbouncer INT:6s/TERM:2s/KILL:1s, group 0, plain PID file p.pid",
        "redis-server TERM:6s/KILL:1s, group 1, on exit restart, launched: redis-server --port 0",
        "own.pid",
    ] {
        assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
    }
    assert!(stage(&shown).contains("16s"), "9s, then 7s: {}", stage(&shown));
    let longer = plan(&[short[0], short[1], "name=local_proxy,pidfile=l.pid,stop=TERM:30s/KILL:1s"]);
    assert!(stage(&longer).contains("38s"), "31s, then 7s: {}", stage(&longer));
    assert!(listing(dir.path()).is_empty(), "it wrote something");
}

#[test]
fn check_shows_the_neighbours_and_never_a_key() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let key = "000102030405060708090a0b0c0d0e0f";
    std::fs::write(dir.path().join("keys"), format!("7:{key}\n9:ff{key}\n")).expect("a file");
    let mut command = Command::new(binary("edge-proxy"));
    command.args(["--check", "--peer", "10.0.0.2:80", "--notice-key-file", "keys", "--mdns", "eth0"]);
    command.args(["--service-type", "_edge._udp.local"]).current_dir(dir.path());
    let mut process = Process::start(command.env("EDGE_PROXY_NOTICE_LISTEN", "127.0.0.1:9"));
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
    let plan = process.stdout();
    for part in ["10.0.0.2:80", "127.0.0.1:9", "[7, 9] in keys", "eth0", "_edge._udp.local.", "peer notices"]
    {
        assert!(plan.contains(part), "{part:?} is not in:\n{plan}");
    }
    assert!(!plan.contains(key), "{plan}");
}

#[test]
fn check_prints_the_plan_and_its_arithmetic_and_writes_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut command = Command::new(binary("edge-proxy"));
    command.args(["--check"]).current_dir(dir.path()).env("SHUTDOWN_TOTAL_TIMEOUT", "20");
    let mut process = Process::start(&mut command);
    assert_eq!(process.exit_code(PATIENCE), 0);
    let plan = process.stdout();
    for part in [
        "drain",
        "18900ms",
        "total 20s",
        "sum of budgets",
        "percent=50,volume=20,sleep=5s,probes=3,window=10s",
        "refuse",
    ] {
        assert!(plan.contains(part), "{part:?} is not in:\n{plan}");
    }
    assert!(listing(dir.path()).is_empty());
    let (code, sentence) = refused(&["--check"], &[("SHUTDOWN_TOTAL_TIMEOUT", "1ms")], |_| {});
    assert_eq!(code, 2, "{sentence}");
}
