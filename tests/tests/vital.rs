//! Which parts a service cannot start without: the database. Cache and registry are warned of, and found later.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{get, post};
use shutdown_tests::process::{Process, Service, Stopwatch};
use shutdown_tests::servers::{Answer, Redis, Registry};

fn command(dir: &tempfile::TempDir, settings: &[(&str, &str)]) -> Command {
    let mut command = Service::command("axum-service", dir.path());
    command.envs(settings.iter().copied());
    command
}

/// The exit code and the last line of stderr of one that does not start.
fn refused(settings: &[(&str, &str)], dotenv: &str) -> (i32, String) {
    refused_with(&[], settings, dotenv)
}

fn refused_with(arguments: &[&str], settings: &[(&str, &str)], dotenv: &str) -> (i32, String) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(dir.path().join(".env"), dotenv).expect("our directory");
    let mut process = Process::start(command(&dir, settings).args(arguments));
    let code = process.exit_code(PATIENCE);
    let stderr = process.stderr();
    assert!(!stderr.contains("secret"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    (code, stderr)
}

#[test]
fn a_database_that_cannot_be_used_is_exit_code_1_and_a_wrong_url_is_2_each_with_one_line() {
    // A port that nobody listens on.
    let gone =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound").port();
    let unreachable = format!("postgres://me:secret@127.0.0.1:{gone}/orders");
    for (url, code, said) in [
        (&*unreachable, 1, format!("the database postgres://127.0.0.1:{gone}/orders cannot be used: ")),
        (
            "sqlite:/nowhere/at/all.db",
            1,
            "the database sqlite:/nowhere/at/all.db cannot be used: ".to_owned(),
        ),
        ("mysql://me:secret@db/orders", 2, "DATABASE_URL: no database is known by \"mysql\"".to_owned()),
        (
            "postgres://me:secret@db:port/orders",
            2,
            "DATABASE_URL: the database URL cannot be read".to_owned(),
        ),
    ] {
        let (exited, line) = refused(&[("DATABASE_URL", url)], "");
        assert!(exited == code && line.contains(&said), "{url}: {exited} {line}");
    }
}

#[test]
fn an_argument_is_exit_code_2_and_says_where_the_settings_are() {
    let (exited, line) = refused_with(&["--help"], &[], "");
    assert!(
        exited == 2 && line.contains("--help: there are no arguments: set environment"),
        "{exited} {line}"
    );
}

#[test]
fn a_database_that_refuses_is_said_at_once_and_why() {
    let gone =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound").port();
    let begin = Stopwatch::start();
    let (code, line) = refused(&[("DATABASE_URL", &format!("postgres://127.0.0.1:{gone}/orders"))], "");
    assert!(code == 1 && line.contains("Connection refused"), "{line}");
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
}

#[test]
fn a_broken_dotenv_is_exit_code_2_and_names_the_line() {
    let (code, line) = refused(&[], "A=1\n\nPASSWORD=very secret\n");
    assert!(code == 2 && line.contains(".env, line 3: not a NAME=value line"), "{code} {line}");
}

#[test]
fn dotenv_is_read_and_the_environment_goes_before_it() {
    let (code, line) = refused(&[], "DATABASE_URL=sqlite:/nowhere/a.db\n");
    assert!(code == 1 && line.contains("/nowhere/a.db"), "{code} {line}");
    let (code, line) =
        refused(&[("DATABASE_URL", "sqlite:/nowhere/b.db")], "DATABASE_URL=sqlite:/nowhere/a.db\n");
    assert!(code == 1 && line.contains("/nowhere/b.db"), "{code} {line}");
}

#[test]
fn a_redis_that_is_refused_at_the_start_is_one_warning_and_found_when_it_comes() {
    let port = Redis::start().port();
    let url = format!("redis://127.0.0.1:{port}/");
    let mut service = Service::start("axum-service", [("CACHE_URL", &*url)]);
    service.process.stderr_line(|line| line.contains("cache cannot be reached"));
    // It serves: reads miss, the write waits, a reader here sees it.
    assert_eq!(post(service.listen, "/payments", "").expect("it serves").status, 201);
    assert_eq!(get(service.listen, "/payments/1").expect("it serves").status, 200);
    let redis = Redis::start_on(port);
    service.process.stderr_line(|line| line.contains("cache reached again"));
    let begin = Stopwatch::start();
    while redis.cli(&["EXISTS", "payment:1"]) != "1" {
        assert!(begin.elapsed() < PATIENCE, "the write never lands");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    service.process.signal(Signal::TERM);
    assert_eq!(service.process.exit_code(PATIENCE), 0, "{}", service.process.stderr());
    let stderr = service.process.stderr();
    assert_eq!(stderr.matches("cache cannot be reached").count(), 1, "{stderr}");
    assert!(stderr.contains("Redis connection closed"), "{stderr}");
}

#[test]
fn a_registry_hears_of_a_start_and_of_the_end_before_the_listener_closes() {
    let registry = Registry::start();
    let settings = [
        ("REGISTRY_URL", registry.url()),
        ("AXUM_SERVICE_NODE_ID", "orders-1".into()),
        ("SHUTDOWN_LAME_DUCK", "500ms".into()),
    ];
    let mut service = Service::start("axum-service", settings);
    let came = registry.asked(|request| request.method == "PUT");
    assert_eq!(
        (came.path.as_str(), came.body.contains(&service.listen.to_string())),
        ("/orders-1", true),
        "{came:?}"
    );
    service.process.signal(Signal::TERM);
    let left = registry.asked(|request| request.method == "DELETE");
    assert_eq!(left.path, "/orders-1");
    // It has heard, and the lame duck still serves.
    assert_eq!(get(service.listen, "/").expect("it serves").status, 200);
    assert_eq!(service.process.exit_code(PATIENCE), 0, "{}", service.process.stderr());
    let last = registry.requests().last().cloned().expect("requests");
    assert_eq!(last.method, "DELETE", "nothing after the leaving");
    assert_eq!(registry.requests().iter().filter(|request| request.method == "DELETE").count(), 1);
}

#[test]
fn a_registry_that_is_unreachable_is_a_warning_and_a_departure_that_failed() {
    let registry = Registry::start();
    registry.answer(Answer::Refuse);
    let service = Service::start("axum-service", [("REGISTRY_URL", registry.url())]);
    service.process.stderr_line(|line| line.contains("cannot be registered yet"));
    assert_eq!(get(service.listen, "/").expect("it serves").status, 200);
    // And it is tried again.
    registry.answer(Answer::Status(200));
    service.process.stderr_line(|line| line.contains("registered after all"));

    for (answer, said) in [
        (Answer::Status(500), "it answered 500"),
        (Answer::Hang, "has not answered in time"),
        (Answer::Refuse, "not deregistered from"),
    ] {
        registry.answer(Answer::Status(200));
        let mut service = Service::start("axum-service", [("REGISTRY_URL", registry.url())]);
        let address = service.listen.to_string();
        registry.asked(|request| request.method == "PUT" && request.body.contains(&address));
        registry.answer(answer);
        let begin = Stopwatch::start();
        service.process.signal(Signal::TERM);
        assert_eq!(service.process.exit_code(PATIENCE), 10, "{answer:?}: {}", service.process.stderr());
        assert!(begin.elapsed() < Duration::from_secs(5), "{answer:?}: {:?}", begin.elapsed());
        let report = service.report();
        let departure = &report["stages"][0];
        assert_eq!((&departure["stage"], &departure["outcome"]), (&"departure".into(), &"failed".into()));
        let detail = departure["tasks"][0]["detail"].as_str().unwrap_or_default();
        assert!(detail.contains(said), "{answer:?}: {detail}");
    }
}
