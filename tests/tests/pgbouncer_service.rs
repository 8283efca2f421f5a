//! A service that reaches its database through a PgBouncer has a database of its own there, from its start to its end: few
//! connections at the server, no error at its clients, and nothing that stays behind.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_pgbouncer::{PgBouncer, Removal};
use shutdown_tests::PATIENCE;
use shutdown_tests::backend::{Load, Seen};
use shutdown_tests::client::get;
use shutdown_tests::companions::quoted;
use shutdown_tests::pg_clients::Client;
use shutdown_tests::process::{EdgeProxy, Process, Service};
use shutdown_tests::servers::{
    Installed, Pgbouncer, Pooling, Postgres, as_user, dir_of, missing_pgbouncers, pgbouncers,
};

/// Whose PgBouncer and edge proxy are: it refuses to be root.
const USER: &str = "postgres";
/// The service's name, and what a database is called by it.
const NODE: &str = "node 1/x";
const DATABASE: &str = "node_1_x";
/// More clients than connections.
const CLIENTS: usize = 16;
const FEW: usize = 4;

/// Runs a law on each version, in front of one database. sqlx prepares statements, which pooling by transaction takes from
/// 1.21 on.
fn on_each_version(law: impl Fn(&Postgres, Pgbouncer)) {
    let postgres = Postgres::start();
    for installed in pgbouncers() {
        println!("PgBouncer {installed}:");
        law(&postgres, start(&installed, &postgres));
    }
    for line in missing_pgbouncers().lines() {
        println!("not run on {line}");
    }
}

fn start(installed: &Installed, postgres: &Postgres) -> Pgbouncer {
    let by_transaction = installed.is_at_least((1, 21));
    let pooling = if by_transaction { Pooling::Transaction } else { Pooling::Session };
    installed.start_for_services(postgres, pooling)
}

/// Any of them.
fn one(postgres: &Postgres) -> Pgbouncer {
    let installed = pgbouncers();
    start(installed.last().expect("pgbouncers() has one"), postgres)
}

fn env<'a>(postgres: &Postgres, pgbouncer: &Pgbouncer) -> [(&'a str, String); 3] {
    [
        ("DATABASE_URL", postgres.url()),
        ("PGBOUNCER_CONFIG", pgbouncer.config().display().to_string()),
        ("AXUM_SERVICE_NODE_ID", NODE.to_owned()),
    ]
}

fn serving(postgres: &Postgres, pgbouncer: &Pgbouncer) -> Service {
    Service::start("axum-service", env(postgres, pgbouncer))
}

fn content(pgbouncer: &Pgbouncer) -> String {
    std::fs::read_to_string(pgbouncer.config()).expect("it is there")
}

/// The names of its databases, as it says itself.
fn databases(postgres: &Postgres, pgbouncer: &Pgbouncer) -> Vec<String> {
    let rows = postgres.query_at(&pgbouncer.url("pgbouncer", "pgbouncer"), "SHOW DATABASES");
    rows.lines().filter_map(|row| Some(row.split_once('|')?.0.to_owned())).collect()
}

#[track_caller]
fn is_gone(postgres: &Postgres, pgbouncer: &Pgbouncer, before: &str) {
    assert_eq!(content(pgbouncer), before);
    assert_eq!(databases(postgres, pgbouncer), ["pgbouncer", "postgres"]);
}

#[track_caller]
fn is_there(postgres: &Postgres, pgbouncer: &Pgbouncer) {
    assert!(content(pgbouncer).contains(&format!("\n{DATABASE} = host=")), "{}", content(pgbouncer));
    assert!(databases(postgres, pgbouncer).iter().any(|name| name == DATABASE));
}

/// Connections to the server of anybody but who asks.
fn connections(postgres: &Postgres) -> usize {
    let count = postgres.query(
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> 'judge'",
    );
    count.parse().expect("count gives a number")
}

fn stage<'a>(report: &'a Value, name: &str) -> &'a Value {
    let stages = report["stages"].as_array().expect("a list");
    stages.iter().find(|stage| stage["stage"] == name).unwrap_or_else(|| panic!("no {name} in {report:#}"))
}

/// What clients see of a service under load, of which this is done; its connections at the most.
fn under_load(postgres: &Postgres, service: &mut Service, then: impl FnOnce()) -> (Seen, usize) {
    let load = Load::start(service.listen, CLIENTS, Duration::from_millis(1));
    load.answers(200);
    let most = (0..5).map(|_| connections(postgres)).max().unwrap_or_default();
    then();
    service.process.signal(Signal::TERM);
    service.process.ended(PATIENCE);
    (load.ended(), most)
}

#[test]
fn a_service_under_load_has_few_connections_and_takes_its_entry_back_without_an_error() {
    let postgres = Postgres::start();
    let mut direct = Service::start("axum-service", [("DATABASE_URL", postgres.url())]);
    let (_, most) = under_load(&postgres, &mut direct, || ());
    println!("control: {most} connections without a pooler");
    assert!(most > FEW, "control: {most}");

    on_each_version(|postgres, pgbouncer| {
        let before = content(&pgbouncer);
        let mut service = serving(postgres, &pgbouncer);
        is_there(postgres, &pgbouncer);
        let (seen, most) = under_load(postgres, &mut service, || ());
        println!("  {} answers, {} payments, {most} connections", seen.answered(), seen.paid.len());
        assert_eq!(service.process.exit_code(PATIENCE), 0, "{}", service.process.stderr());
        assert!(seen.broken.is_empty(), "{:?}", seen.broken);
        assert!((1..=FEW).contains(&most), "{most}");
        is_gone(postgres, &pgbouncer, &before);
        let report = service.report();
        let order: Vec<_> =
            report["stages"].as_array().into_iter().flatten().map(|stage| &stage["stage"]).collect();
        let place = |name: &str| order.iter().position(|stage| *stage == name);
        assert_eq!(place("database").map(|place| place + 1), place("pgbouncer"), "{order:?}");
        assert_eq!(stage(&report, "pgbouncer")["outcome"], "ok", "{report:#}");
        let ids: Vec<_> = seen.paid.iter().map(ToString::to_string).collect();
        let there = postgres.query(&format!("SELECT count(*) FROM payments WHERE id IN ({})", ids.join(",")));
        assert_eq!(there, ids.len().to_string());

        // Stage Departure is beside the drain: what it would do to requests.
        let mut service = serving(postgres, &pgbouncer);
        let (seen, _) = under_load(postgres, &mut service, || {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            let name = DATABASE.parse().expect("a name");
            let pooler = PgBouncer::new(pgbouncer.config());
            let done = runtime.block_on(pooler.remove_database(&name, Removal::Forced));
            assert!(done.expect("it is removed").changed);
            std::thread::park_timeout(Duration::from_millis(200));
        });
        println!("  control: {} errors in {} answers", seen.broken.len(), seen.answered());
        assert!(!seen.broken.is_empty(), "control: removed before the requests are over, it must break some");
        is_gone(postgres, &pgbouncer, &before);
    });
}

#[test]
fn a_transaction_of_somebody_else_keeps_the_entry_and_it_works() {
    on_each_version(|postgres, pgbouncer| {
        let mut service = serving(postgres, &pgbouncer);
        let mut client = Client::open_to(&pgbouncer, DATABASE);
        client.run("BEGIN").expect("an answer");
        service.process.signal(Signal::TERM);
        assert_eq!(service.process.exit_code(PATIENCE), 10, "{}", service.process.stderr());
        let report = service.report();
        let task = &stage(&report, "pgbouncer")["tasks"][0];
        println!("  {task}");
        assert_eq!((&task["name"], &task["outcome"]), (&"PgBouncer".into(), &"failed".into()), "{report:#}");
        let detail = task["detail"].as_str().expect("why");
        assert!(detail.contains(&format!("database {DATABASE} still had an open transaction")), "{detail}");
        is_there(postgres, &pgbouncer);
        client.run("SELECT 1").expect("it goes on");
        client.run("COMMIT").expect("to its end");
        Client::open_to(&pgbouncer, DATABASE).run("SELECT 1").expect("and new ones are let in");
    });
}

#[test]
fn an_entry_that_a_killed_service_has_left_is_made_anew_and_goes_on() {
    on_each_version(|postgres, pgbouncer| {
        let before = content(&pgbouncer);
        let mut killed = serving(postgres, &pgbouncer);
        killed.process.signal(Signal::KILL);
        killed.process.ended(PATIENCE);
        is_there(postgres, &pgbouncer);
        // As one that was killed in the middle of its end leaves it, and whose database was another one.
        let console = pgbouncer.url("pgbouncer", "pgbouncer");
        for command in ["DISABLE", "PAUSE"] {
            postgres.query_at(&console, &format!("{command} {DATABASE}"));
        }
        let mut service = serving(postgres, &pgbouncer);
        assert_eq!(get(service.listen, "/query?ms=1").expect("it serves").status, 200);
        service.process.signal(Signal::TERM);
        assert_eq!(service.process.exit_code(PATIENCE), 0, "{}", service.process.stderr());
        is_gone(postgres, &pgbouncer, &before);
    });
}

/// The only sentence of a start that fails, and its exit code.
fn failing(env: &[(&str, String)]) -> (String, i32) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut command = Service::command("axum-service", dir.path());
    let mut process = Process::start(command.envs(env.iter().map(|(name, value)| (name, value))));
    let code = process.exit_code(PATIENCE);
    let stderr = process.stderr();
    let mut sentences = stderr.lines().filter(|line| line.contains("error: "));
    let sentence = sentences.next().unwrap_or_else(|| panic!("{stderr}")).to_owned();
    assert_eq!(sentences.next(), None);
    println!("{code}: {sentence}");
    (sentence, code)
}

#[test]
fn a_start_that_fails_is_one_sentence_and_leaves_no_entry() {
    let postgres = Postgres::start();
    let mut pgbouncer = one(&postgres);
    let before = content(&pgbouncer);
    let env = env(&postgres, &pgbouncer);
    let with = |place: usize, value: &str| {
        let mut env = env.clone();
        env[place].1 = value.to_owned();
        env
    };
    let (database, config) = (0, 1);

    // It is registered by then.
    let (sentence, code) =
        failing(&with(database, &format!("postgres://postgres@127.0.0.1:{}/nowhere", postgres.port())));
    assert_eq!(code, 1);
    assert!(sentence.contains("/nowhere cannot be used through PgBouncer: "), "{sentence}");
    is_gone(&postgres, &pgbouncer, &before);

    let (sentence, code) = failing(&with(database, "sqlite:a.db"));
    assert_eq!(code, 2);
    assert!(sentence.contains("PGBOUNCER_CONFIG: PgBouncer pools PostgreSQL's connections"), "{sentence}");

    let (sentence, code) = failing(&with(config, "/nowhere/pgbouncer.ini"));
    assert_eq!(code, 1);
    assert!(sentence.contains("cannot be registered in /nowhere/pgbouncer.ini: "), "{sentence}");

    let refused = "auth_type=never\n";
    std::fs::write(pgbouncer.config(), before.replace("auth_type=trust \n", refused)).expect("it is there");
    let (sentence, code) = failing(&env);
    assert_eq!(code, 1);
    assert!(sentence.contains("auth_type"), "{sentence}");
    assert!(content(&pgbouncer).contains(refused) && !content(&pgbouncer).contains(DATABASE));
    std::fs::write(pgbouncer.config(), &before).expect("it is there");

    pgbouncer.signal(Signal::INT);
    pgbouncer.ended(PATIENCE);
    let (sentence, code) = failing(&env);
    assert_eq!(code, 1);
    assert!(sentence.contains("admin console") && sentence.contains("cannot be reached"), "{sentence}");
    assert_eq!(content(&pgbouncer), before);
}

#[test]
fn a_stop_while_the_database_is_being_opened_takes_the_entry_back() {
    let postgres = Postgres::start();
    let pgbouncer = one(&postgres);
    let before = content(&pgbouncer);
    postgres.freeze();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut command = Service::command("axum-service", dir.path());
    let mut process = Process::start(command.envs(env(&postgres, &pgbouncer)));
    process.stderr_line(|line| line.contains("registered with the PgBouncer"));
    process.signal(Signal::TERM);
    assert_eq!(process.exit_code(PATIENCE), 0, "{}", process.stderr());
    assert_eq!(content(&pgbouncer), before);
    postgres.thaw();
    is_gone(&postgres, &pgbouncer, &before);
}

/// An edge-proxy as PgBouncer's user, with these flags and what is below `dir`.
fn unprivileged(dir: tempfile::TempDir, flags: &[String]) -> EdgeProxy {
    let ours = EdgeProxy::command(dir.path());
    let mut command = as_user(USER, Path::new(ours.get_program()));
    command.args(ours.get_args()).args(flags).current_dir(dir.path());
    EdgeProxy::run(dir, &mut command)
}

#[test]
fn an_edge_proxy_registers_with_the_pgbouncer_that_it_launches_and_ends_it_behind_its_own_pool() {
    on_each_version(|postgres, mut pgbouncer| {
        // Only its place from here on.
        pgbouncer.signal(Signal::INT);
        pgbouncer.ended(PATIENCE);
        let before = content(&pgbouncer);
        let launch = quoted(&pgbouncer.words());
        let companion = format!("name=pgbouncer,pidfile={},launch={launch}", pgbouncer.pidfile().display());
        let flags = [
            ("--companion", companion),
            ("--database", postgres.url()),
            ("--database-connections", FEW.to_string()),
            ("--pgbouncer-config", pgbouncer.config().display().to_string()),
            ("--pgbouncer-database", DATABASE.to_owned()),
        ];
        let flags: Vec<_> = flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
        let mut proxy = unprivileged(dir_of(USER), &flags);
        is_there(postgres, &pgbouncer);
        for _ in 0..20 {
            assert_eq!(get(proxy.listen, "/").expect("it serves").status, 200);
        }
        proxy.process.signal(Signal::TERM);
        assert_eq!(proxy.process.exit_code(PATIENCE), 0, "{}", proxy.process.stderr());
        assert_eq!(content(&pgbouncer), before);
        let report = proxy.report();
        let stages = report["stages"].as_array().into_iter().flatten();
        let order: Vec<_> = stages.filter_map(|stage| stage["stage"].as_str()).collect();
        println!("  {order:?}");
        let wanted = ["database", "pgbouncer", "companions"];
        assert!(order.windows(3).any(|three| three == wanted), "{order:?}");
        for name in wanted {
            assert_eq!(stage(&report, name)["outcome"], "ok", "{report:#}");
        }
        let note = &stage(&report, "companions")["tasks"][0]["notes"][0];
        assert_eq!((&note["outcome"], &note["signals"]), (&"exited".into(), &1.into()), "{report:#}");
        assert!(!pgbouncer.pidfile().exists());
        assert!(postgres.query("SELECT count(*) FROM requests").parse::<usize>().expect("a number") >= 20);
    });
}

#[test]
fn an_edge_proxy_without_a_pgbouncer_that_runs_or_a_database_to_pool_says_so() {
    let postgres = Postgres::start();
    let mut pgbouncer = one(&postgres);
    pgbouncer.signal(Signal::INT);
    pgbouncer.ended(PATIENCE);
    let config = pgbouncer.config().display().to_string();
    for (database, code, named) in
        [(postgres.url(), 1, "--pgbouncer-config"), ("off".to_owned(), 2, "there is none")]
    {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let flags = ["--database", &database, "--pgbouncer-config", &config];
        let mut process = Process::start(EdgeProxy::command(dir.path()).args(flags));
        assert_eq!(process.exit_code(PATIENCE), code, "{}", process.stderr());
        let stderr = process.stderr();
        let sentence = stderr.lines().find(|line| line.contains("error: ")).expect("a sentence");
        println!("{code}: {sentence}");
        assert!(sentence.contains(named), "{sentence}");
    }
}

/// Transactions a second, of which none has failed.
fn tps(postgres: &Postgres, url: &str) -> f64 {
    let said = postgres.pgbench(&["--no-vacuum", "--client=8", "--time=2", url]);
    let after = |what: &str| said.split_once(what).map(|(_, rest)| rest.split_whitespace().next());
    assert_eq!(after("number of failed transactions: "), Some(Some("0")), "{said}");
    after("tps = ").flatten().and_then(|tps| tps.parse().ok()).unwrap_or_else(|| panic!("{said}"))
}

#[test]
fn pgbench_runs_through_each_pgbouncer_and_no_transaction_fails() {
    let postgres = Postgres::start();
    postgres.pgbench(&["--initialize", "--quiet", &postgres.url_over_socket()]);
    for installed in pgbouncers() {
        let pgbouncer = installed.start(&postgres, Pooling::Transaction, FEW);
        for round in 1..=3 {
            let direct = tps(&postgres, &postgres.url_over_socket());
            let pooled = tps(&postgres, &pgbouncer.url("postgres", USER));
            assert!(direct > 0.0 && pooled > 0.0);
            let ratio = pooled / direct;
            println!(
                "PgBouncer {installed}, round {round}: {direct:.0} direct, {pooled:.0} pooled tps: {ratio:.2}"
            );
        }
    }
}
