//! What `pgbctl` says to be so is so in PgBouncer; and what it takes back was its own.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use rustix::process::Signal;
use serde_json::Value;
use shutdown_tests::PATIENCE;
use shutdown_tests::pgbctl::{Ran, ended, run};
use shutdown_tests::process::Process;
use shutdown_tests::servers::{Postgres, as_user, on_each_version, pgbouncers};

use super::{Lab, USER, until};

/// As root, who may do more than PgBouncer.
fn as_root(lab: &Lab<'_>, words: &[&str]) -> Ran {
    run(shutdown_tests::pgbctl::pgbctl().arg("--config").arg(lab.ini()).args(words))
}

#[test]
fn a_database_that_is_served_all_the_same_is_not_left_paused() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        let ini = fs::read_to_string(lab.ini()).expect("it is there");
        let server = ini.lines().find_map(|line| line.strip_prefix("app = ")).expect("a database");
        let held = || ["paused", "disabled"].map(|column| lab.app_is(column));

        // By a file that is included: that is not ours to edit.
        let more = lab.dir.join("more.ini");
        fs::write(&more, format!("app = {server}\n")).expect("ours");
        let including = ini.replace("[databases]\n", &format!("[databases]\n%include {}\n", more.display()));
        for twice in [&including, &including.replace(&format!("app = {server}\n"), "")] {
            fs::write(lab.ini(), twice).expect("ours");
            lab.pgbctl(&["reload", "--verify"]).well();
            for words in [&["remove", "app"][..], &["add", "app"], &["set", "app", "--pool-size", "2"]] {
                let ran = lab.pgbctl(&[&["--reload", "db"], words].concat());
                assert!(ran.failed(2).contains("includes: change or remove it there"), "{ran:?}");
            }
            assert_eq!(held(), [false, false]);
        }

        // By `*`, which serves it again to whoever asks.
        let any = server.replace("dbname=postgres ", "");
        fs::write(lab.ini(), ini.replace("[databases]\n", &format!("[databases]\n* = {any}\n")))
            .expect("ours");
        lab.pgbctl(&["reload", "--verify"]).well();
        let asks = || run(lab.psql("postgres", USER, "").args(["-c", "SELECT 1"])).well().to_owned();
        asks();
        let ran = lab.pgbctl(&["--reload", "db", "remove", "postgres"]);
        ran.well();
        assert!(ran.stderr.contains("still serves postgres"), "{ran:?}");
        asks();
        lab.pgbctl(&["db", "remove", "app"]).well();
        let said = run(lab.psql("app", USER, "").args(["-c", "SELECT 1"])).stderr;
        assert!(said.contains("database \"app\" does not exist"), "by `*`, at the server: {said}");
        asks();
    });
}

#[test]
fn a_log_that_cannot_be_opened_ends_no_pgbouncer() {
    on_each_version(|postgres, installed| {
        let mut lab = Lab::open(postgres, installed);
        let ini = fs::read_to_string(lab.ini()).expect("it is there");
        let works = |lab: &Lab<'_>| lab.query(USER, "").expect("what ran goes on");
        let nowhere = lab.dir.join("nope/pgbouncer.log").display().to_string();
        let roots = tempfile::tempdir().expect("a temporary directory");
        fs::set_permissions(roots.path(), fs::Permissions::from_mode(0o755)).expect("ours");
        let roots = roots.path().join("pgbouncer.log").display().to_string();
        for (log, why) in
            [(&nowhere, "nope is no directory"), (&roots, "PgBouncer's user may make no file in")]
        {
            for ran in [
                lab.pgbctl(&["config", "set", "logfile", log]),
                as_root(&lab, &["config", "set", "logfile", log]),
            ] {
                let error = ran.failed(5);
                println!("  {error}");
                assert!(error.contains(why) && error.contains("rolled back"), "{error}");
                assert_eq!(fs::read_to_string(lab.ini()).expect("it is there"), ini);
                works(&lab);
            }
        }

        // One that it has, and whose directory has gone.
        let logs = lab.dir.join("logs");
        fs::create_dir(&logs).expect("ours");
        fs::set_permissions(&logs, fs::Permissions::from_mode(0o777)).expect("ours");
        let log = logs.join("pgbouncer.log");
        lab.pgbctl(&["config", "set", "logfile", &log.display().to_string()]).well();
        until("its log", || log.exists());
        fs::remove_dir_all(&logs).expect("ours");
        let ran = lab.pgbctl(&["db", "set", "app", "--pool-size", "4"]);
        assert!(ran.failed(5).contains("logs is no directory"), "{ran:?}");
        works(&lab);

        // One that was written by hand, behind a file that is included: its own line is named.
        let more = lab.dir.join("more.ini");
        fs::write(&more, "; one\n; two\n; three\n").expect("ours");
        let ini = format!("%include {}\n{ini}logfile = {nowhere}\n", more.display());
        fs::write(lab.ini(), &ini).expect("ours");
        let line = format!("pgbouncer.ini, line {}: logfile: ", ini.lines().count());
        let ran = lab.pgbctl(&["reload", "--verify"]);
        assert!(ran.failed(5).contains(&line), "{ran:?}");
        assert!(lab.pgbctl(&["check"]).well().contains("warning: logfile: "));
        let ran = lab.pgbctl(&["doctor"]);
        assert!(ran.code == Some(2) && ran.stdout.contains("logfile: "), "{ran:?}");
        works(&lab);
        // The control: PgBouncer itself takes it, and ends.
        lab.console("RELOAD");
        assert_eq!(lab.pgbouncer.code(PATIENCE), 1);
    });
}

#[test]
fn a_log_that_nobody_can_look_for_is_missed_when_it_has_ended_it() {
    on_each_version(|postgres, installed| {
        // Nothing is logged of logins.
        for admin in [&[][..], &["--admin", "postgres://pgbouncer@127.0.0.1:1/pgbouncer"]] {
            let mut lab =
                Lab::new(postgres, installed, "auth_type = any\nlog_connections = 0", "\"nobody\" \"\"\n");
            let ini = fs::read_to_string(lab.ini()).expect("it is there");
            // A link into nowhere: whoever follows it sees a file that is missing in a directory that is there.
            let link = lab.dir.join("pgbouncer.log");
            symlink("/nope/pgbouncer.log", &link).expect("ours");
            let ran =
                lab.pgbctl(&[admin, &["config", "set", "logfile", &link.display().to_string()]].concat());
            let error = ran.failed(5);
            assert!(error.contains("PgBouncer has ended by it"), "{error}");
            assert_eq!(fs::read_to_string(lab.ini()).expect("it is there"), ini);
            assert_eq!(lab.pgbouncer.code(PATIENCE), 1);
        }
    });
}

#[test]
fn a_setting_with_which_it_would_not_start_again_is_rolled_back() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        let ini = fs::read_to_string(lab.ini()).expect("it is there");
        for (key, value) in
            [("client_tls_sslmode", "Require"), ("pidfile", "/nope/pid"), ("unix_socket_dir", "/nope")]
        {
            let ran = lab.pgbctl(&["config", "set", key, value]);
            assert!(ran.failed(5).contains("rolled back, and PgBouncer has reloaded it"), "{ran:?}");
            assert_eq!(fs::read_to_string(lab.ini()).expect("it is there"), ini);
        }
        lab.query(USER, "").expect("what ran goes on");
        // A PID file that it may not write it makes anew.
        let stale = lab.dir.join("stale.pid");
        fs::write(&stale, "4194304\n").expect("ours");
        lab.pgbctl(&["config", "set", "pidfile", &stale.display().to_string()]).well();
        // What was wrong before the edit is mended step by step; from 1.25 on PgBouncer itself refuses a half.
        if !installed.is_at_least((1, 25)) {
            let half = ini.replace("[pgbouncer]\n", "[pgbouncer]\nclient_tls_sslmode = require\n");
            fs::write(lab.ini(), half).expect("ours");
            let key = lab.dir.join("userlist.txt").display().to_string();
            lab.pgbctl(&["config", "set", "client_tls_key_file", &key]).well();
            lab.pgbctl(&["config", "set", "client_tls_cert_file", &key]).well();
        }
    });
}

#[test]
fn what_is_in_the_file_already_is_compared_as_well() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        let size = || {
            let rows = lab.console("SHOW CONFIG");
            let row = rows.lines().find_map(|row| row.strip_prefix("default_pool_size|"));
            row.and_then(|row| row.split('|').next()).map(str::to_owned)
        };
        lab.pgbctl(&["--no-reload", "config", "set", "default_pool_size", "33"]).well();
        assert_eq!(size().as_deref(), Some("20"));
        let ran = lab.pgbctl(&["config", "set", "default_pool_size", "33"]);
        assert!(
            ran.well().contains("Nothing to change") && ran.stdout.contains("which runs by it"),
            "{ran:?}"
        );
        assert_eq!(size().as_deref(), Some("33"));
        // A number may be written in many ways.
        for _ in 0..2 {
            lab.pgbctl(&["config", "set", "tcp_keepidle", "010"]).well();
            lab.pgbctl(&["config", "set", "query_timeout", "1.23456789"]).well();
        }
    });
}

#[test]
fn a_user_list_that_pgbouncer_does_not_read_is_not_said_to_be_read() {
    on_each_version(|postgres, installed| {
        let lab = Lab::new(postgres, installed, "auth_type = scram-sha-256", "\"nobody\" \"\"\n");
        let other = lab.dir.join("other.txt");
        fs::write(&other, "").expect("ours");
        let ran =
            as_root(&lab, &["--userlist", &other.display().to_string(), "user", "add", "app", "--generate"]);
        assert!(ran.code == Some(5) && ran.stderr.contains("PgBouncer's auth_file is"), "{ran:?}");
        let list = lab.dir.join("userlist.txt");
        std::os::unix::fs::chown(&list, Some(0), Some(0)).expect("we are root");
        let ran = as_root(&lab, &["user", "add", "app", "--generate"]);
        assert!(ran.code == Some(5) && ran.stderr.contains("PgBouncer's user may not read"), "{ran:?}");
    });
}

/// A session that has the roles locked: nobody gets another secret meanwhile.
#[test]
fn a_secret_that_the_server_may_have_is_printed() {
    let postgres = Postgres::start();
    let lab = Lab::new(&postgres, &pgbouncers().remove(0), "auth_type = scram-sha-256", "\"nobody\" \"\"\n");
    postgres.query("CREATE ROLE app LOGIN");
    let mut psql = as_user(USER, &postgres.programs().join("psql"));
    psql.args(["-X", "-A", "-t", "-q", "-h"]).arg(postgres.socket_dir());
    let locking = Process::start_with_stdin(psql.args(["-p", &postgres.port().to_string(), USER]));
    locking.say("BEGIN; LOCK TABLE pg_authid IN SHARE ROW EXCLUSIVE MODE; SELECT 'locked';");
    locking.stdout_line(|line| line == "locked");
    let server = format!("host={} port={} user={USER}", postgres.socket_dir().display(), postgres.port());
    let adding = ["--json", "user", "add", "app", "--generate", "--run-on", &server];
    let ran = lab.pgbctl(&adding);
    let object: Value = serde_json::from_str(&ran.stdout).expect("one object");
    assert!(ran.code == Some(5) && object["code"] == 5, "{ran:?}");
    assert_eq!(object["password"].as_str().map(str::len), Some(32), "{object}");
    assert!(ran.stderr.contains("may have the new secret"), "{ran:?}");
    locking.say("COMMIT; SELECT 'done';");
    locking.stdout_line(|line| line == "done");
    lab.pgbctl(&adding).well();
}

#[test]
fn what_somebody_else_has_written_is_not_rolled_back() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        // The same file by another name, with another lock beside it: only the file's own lock is seen by both.
        let link = lab.dir.join("link");
        fs::create_dir(&link).expect("ours");
        fs::set_permissions(&link, fs::Permissions::from_mode(0o777)).expect("ours");
        let link = link.join("pgbouncer.ini");
        symlink("../pgbouncer.ini", &link).expect("ours");
        let refused = || {
            lab.pgbouncer.signal(Signal::STOP);
            let mut command = shutdown_tests::pgbctl::pgbctl();
            let editing = command.arg("--config").arg(&link).args(["config", "set", "pidfile", "/nope/pid"]);
            let editing = Process::start(editing);
            until("the edit", || fs::read_to_string(lab.ini()).is_ok_and(|ini| ini.contains("/nope/pid")));
            editing
        };
        let editing = refused();
        let add = ["--no-reload", "--lock-timeout", "300ms", "db", "add", "kept"];
        lab.pgbctl(&add).failed(3);
        lab.pgbouncer.signal(Signal::CONT);
        assert!(ended(editing).failed(5).contains("rolled back, and"));
        lab.pgbctl(&add).well();
        // A script that knows no lock.
        let editing = refused();
        let ini = fs::read_to_string(lab.ini()).expect("it is there");
        fs::write(lab.ini(), format!("{ini}; by a script\n")).expect("ours");
        lab.pgbouncer.signal(Signal::CONT);
        assert!(ended(editing).failed(5).contains("not rolled back: somebody else has changed it"));
        let ini = fs::read_to_string(lab.ini()).expect("it is there");
        assert!(ini.contains("; by a script") && ini.contains("kept ="), "{ini}");
    });
}
