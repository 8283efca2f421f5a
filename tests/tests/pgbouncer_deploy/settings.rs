//! The settings, with every PgBouncer.

use std::time::Duration;

use shutdown_tests::servers::{Installed, Pgbouncer, Postgres, pgbouncers};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{ConnectOptions, Connection, Executor};

use crate::{ini, name_what_is_missing, replaced};

/// A user whose password stands in the list as it is: what pgbctl makes of one is the guide's test.
const USERS: &str = "\"app\" \"a password\"\n";

/// The settings with this server.
pub(crate) fn with_server(postgres: &Postgres) -> String {
    let server = format!("host={} port={}", postgres.socket_dir().display(), postgres.port());
    replaced(&ini(), "host=postgres port=5432", &server)
}

/// As a service does: sqlx with its own options, and no prepared statement.
fn ask(pgbouncer: &Pgbouncer, password: &str) -> Result<(), sqlx::Error> {
    let options = PgConnectOptions::new_without_pgpass()
        .socket(pgbouncer.socket_dir())
        .port(pgbouncer.port())
        .username("app")
        .password(password)
        .database("app")
        .ssl_mode(PgSslMode::Disable);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let asked = async {
            let mut connection = options.connect().await?;
            connection.execute("SELECT 1").await?;
            connection.close().await
        };
        tokio::time::timeout(Duration::from_secs(30), asked).await.expect("an answer in time")
    })
}

fn served(installed: &Installed, settings: &str, password: &str) -> Result<(), String> {
    let mut pgbouncer = installed.lay_out(settings, USERS).start()?;
    let asked = ask(&pgbouncer, password).map_err(|error| error.to_string());
    pgbouncer.signal(rustix::process::Signal::INT);
    pgbouncer.ended(shutdown_tests::PATIENCE);
    // What it read and did not understand it says once more.
    let log = pgbouncer.log();
    let complaints = log.lines().filter(|line| line.contains(" ERROR ") && !line.contains(" C-0x"));
    let complaints: Vec<_> = complaints.collect();
    if complaints.is_empty() { asked } else { Err(complaints.join("\n")) }
}

#[test]
fn every_pgbouncer_takes_the_settings_and_serves_with_them() {
    name_what_is_missing();
    let postgres = Postgres::start();
    postgres.query("CREATE ROLE app LOGIN");
    postgres.query("CREATE DATABASE app OWNER app");
    let settings = with_server(&postgres);
    for installed in pgbouncers() {
        assert_eq!(served(&installed, &settings, "a password"), Ok(()), "PgBouncer {installed}");

        // What is wrong is red: another password; what the guide that we come from had; and without what sqlx wants.
        let refused = |settings: &str, password| {
            served(&installed, settings, password).expect_err("what is wrong must be red")
        };
        let refusals = [
            refused(&settings, "another"),
            refused(&replaced(&settings, "[pgbouncer]\n", "pgbouncer = host=x\n[pgbouncer]\n"), "a password"),
            refused(&format!("{settings}connection_lifetime = 600\n"), "a password"),
            refused(
                &replaced(&settings, "stats_period = 60\n", "stats_period = 60 ; a minute\n"),
                "a password",
            ),
            refused(
                &replaced(&settings, "ignore_startup_parameters = extra_float_digits\n", ""),
                "a password",
            ),
        ];
        let words = [
            "authentication failed",
            "reserved",
            "connection_lifetime",
            "stats_period",
            "extra_float_digits",
        ];
        for (refusal, word) in refusals.iter().zip(words) {
            assert!(refusal.contains(word), "PgBouncer {installed}: {refusal:?} does not say {word}");
        }
        println!("PgBouncer {installed}: served; refused: {refusals:#?}");
    }
}
