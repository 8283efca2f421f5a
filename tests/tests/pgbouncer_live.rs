//! A PgBouncer that runs hears of every edit, and is seen to run by it; databases are removed, and it is drained and stopped, without a
//! broken transaction – on each version that can be had.

#[path = "pgbouncer_live/said.rs"]
mod said;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use serde_json::Value;
use shutdown_tests::PATIENCE;
use shutdown_tests::pgbctl::{Ran, ended, run};
use shutdown_tests::process::{Process, Stopwatch, binary};
use shutdown_tests::servers::{Installed, Pgbouncer, Postgres, as_user, on_each_version, pgbouncers};

const USER: &str = "postgres";

/// A PgBouncer with one database, `app`, and its files.
struct Lab<'a> {
    postgres: &'a Postgres,
    pgbouncer: Pgbouncer,
    dir: PathBuf,
}

impl<'a> Lab<'a> {
    /// With these settings besides the usual ones, and this user list.
    fn new(postgres: &'a Postgres, installed: &Installed, settings: &str, users: &str) -> Self {
        // Whoever is let in by any name is this one to the server.
        let user = if settings.contains("= any") { " user=postgres" } else { "" };
        let ini = format!(
            "; ours\n[databases]\napp = host={host} port={port} dbname=postgres pool_size=3{user}\n\
             [pgbouncer]\n{settings}\nunix_socket_dir = /run/pgbouncer\nlisten_port = 6432\n\
             pidfile = /run/pgbouncer/pgbouncer.pid\nauth_file = /etc/pgbouncer/userlist.txt\n\
             pool_mode = transaction\nserver_fast_close = 0\n",
            host = postgres.socket_dir().display(),
            port = postgres.port(),
        );
        let laid_out = installed.lay_out(&ini, users);
        let dir = laid_out.dir().to_owned();
        let pgbouncer = laid_out.start().unwrap_or_else(|said| panic!("PgBouncer {installed}:\n{said}"));
        Self { postgres, pgbouncer, dir }
    }

    /// Where everybody is let in.
    fn open(postgres: &'a Postgres, installed: &Installed) -> Self {
        Self::new(postgres, installed, "auth_type = any", "\"nobody\" \"\"\n")
    }

    fn ini(&self) -> PathBuf {
        self.dir.join("pgbouncer.ini")
    }

    /// pgbctl as the user that PgBouncer is.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = as_user(USER, &binary("pgbctl"));
        command.arg("--config").arg(self.ini()).args(words);
        command
    }

    #[track_caller]
    fn pgbctl(&self, words: &[&str]) -> Ran {
        run(&mut self.command(words))
    }

    /// Rows of the admin console, columns by `|`.
    fn console(&self, command: &str) -> String {
        let ran = run(self.psql("pgbouncer", "pgbouncer", "").args(["-c", command]));
        ran.well().to_owned()
    }

    /// Whether the console says so of database `app`, in this column.
    fn app_is(&self, column: &str) -> bool {
        let mut psql = self.psql("pgbouncer", "pgbouncer", "");
        let ran = run(psql.args(["-P", "tuples_only=off", "-P", "footer=off", "-c", "SHOW DATABASES"]));
        let mut rows = ran.well().lines().map(|line| line.split('|').collect::<Vec<_>>());
        let place = rows.next().and_then(|names| names.iter().position(|name| *name == column));
        let place = place.expect("a column of that name");
        rows.any(|row| row[0] == "app" && row[place] == "1")
    }

    fn psql(&self, database: &str, user: &str, password: &str) -> Command {
        let mut command = as_user(USER, &self.postgres.programs().join("psql"));
        command.args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "--no-password", "-h"]).arg(&self.dir);
        command.args(["-p", &self.pgbouncer.port().to_string(), "-U", user, "-d", database]);
        command.env("PGPASSWORD", password);
        command
    }

    /// A client in an open transaction.
    fn in_transaction(&self, database: &str) -> Process {
        let client = Process::start_with_stdin(&mut self.psql(database, USER, ""));
        client.say("BEGIN; SELECT 'begun';");
        client.stdout_line(|line| line == "begun");
        client
    }

    /// Whether a user gets in and a query works: what was said else.
    fn query(&self, user: &str, password: &str) -> Result<(), String> {
        let ran = run(self.psql("app", user, password).args(["-c", "SELECT 1"]));
        if ran.code == Some(0) { Ok(()) } else { Err(ran.stderr) }
    }

    /// Whether a user gets to the admin console by this password.
    fn lets_in(&self, user: &str, password: &str) -> bool {
        run(self.psql("pgbouncer", user, password).args(["-c", "SHOW VERSION"])).code == Some(0)
    }
}

/// Commits what a client has open.
fn commit(client: &Process) {
    client.say("SELECT 'still here';\nCOMMIT;\n\\echo done");
    client.stdout_line(|line| line == "done");
}

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let watch = Stopwatch::start();
    while !is() {
        assert!(watch.elapsed() < PATIENCE, "{what} never came");
    }
}

#[test]
fn every_edit_is_seen_in_the_pgbouncer_that_runs() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        let before = fs::read_to_string(lab.ini()).expect("it is there");
        let (socket, port) = (postgres.socket_dir().display().to_string(), postgres.port().to_string());
        let add = [
            "db",
            "add",
            "proj_a",
            "--host",
            &socket,
            "--port",
            &port,
            "--dbname",
            "postgres",
            "--set",
            "user=postgres",
        ];
        let ran = lab.pgbctl(&add);
        assert!(ran.well().contains("Reloaded PgBouncer, which runs by it"), "{ran:?}");
        assert!(lab.console("SHOW DATABASES").contains("proj_a|"));
        let ran = lab.pgbctl(&["--json", "db", "set", "proj_a", "--pool-size", "9"]);
        let said: Value = serde_json::from_str(ran.well()).expect("one object");
        assert_eq!((&said["changed"], &said["reload"]), (&true.into(), &"verified".into()));
        let row = lab
            .console("SHOW DATABASES")
            .lines()
            .find(|line| line.starts_with("proj_a|"))
            .expect("it")
            .to_owned();
        assert!(row.split('|').any(|cell| cell == "9"), "{row}");
        assert!(lab.pgbctl(&["config", "set", "default_pool_size", "7"]).well().contains("runs by it"));
        assert!(lab.console("SHOW CONFIG").lines().any(|line| line.starts_with("default_pool_size|7|")));
        let ran = lab.pgbctl(&["config", "set", "listen_port", "6433"]);
        assert!(
            ran.well().contains("Set listen_port = 6433") && ran.stderr.contains("needs a restart"),
            "{ran:?}"
        );
        lab.pgbctl(&["config", "set", "listen_port", "6432"]).well();
        assert!(lab.pgbctl(&["db", "remove", "proj_a"]).well().contains("runs by it"));
        assert!(!lab.console("SHOW DATABASES").contains("proj_a|"));
        // Added again it is neither paused nor disabled.
        lab.pgbctl(&add).well();
        run(lab.psql("proj_a", USER, "").args(["-c", "SELECT 1"])).well();
        lab.pgbctl(&["db", "remove", "proj_a"]).well();
        let after = fs::read_to_string(lab.ini()).expect("it is there");
        assert_eq!(after.replace("default_pool_size = 7\n", ""), before);
        let status = lab.pgbctl(&["status"]);
        assert!(
            status
                .well()
                .contains(&format!("PgBouncer {}", installed.to_string().rsplit_once('.').expect("three").0))
        );
    });
}

#[test]
fn a_secret_that_is_rotated_twice_within_a_second_is_the_new_one() {
    on_each_version(|postgres, installed| {
        let settings = "auth_type = scram-sha-256\nstats_users = app, other";
        let lab = Lab::new(postgres, installed, settings, "\"nobody\" \"\"\n");
        let set = |user: &str, password: &str, reload: &str| {
            let mut command = lab.command(&[reload, "user", "add", user, "--password-env", "SECRET"]);
            run(command.env("SECRET", password)).well();
        };
        set("app", "the first", "--reload");
        assert!(lab.lets_in("app", "the first"));
        let second = || {
            SystemTime::now().duration_since(UNIX_EPOCH).map(|since| (since.as_secs(), since.subsec_millis()))
        };
        // Only in one second of the clock it proves anything.
        let tries = 5;
        let mut old = vec!["the first".to_owned()];
        let rotated = (0..tries).find_map(|round| {
            let (one, other) = (format!("the second, {round}"), format!("the third, {round}"));
            until("the beginning of a second", || second().is_ok_and(|(_, millis)| millis < 50));
            let (before, _) = second().expect("after 1970");
            set("app", &one, "--reload");
            set("app", &other, "--reload");
            let (after, millis) = second().expect("after 1970");
            old.push(one);
            assert!(lab.lets_in("app", &other));
            assert!(old.iter().all(|old| !lab.lets_in("app", old)), "{old:?}");
            old.push(other.clone());
            println!("  twice within {} s {millis} ms", after - before);
            (before == after).then_some(other)
        });
        let third = rotated.unwrap_or_else(|| panic!("never twice within a second, {tries} times"));
        // And when both are between two reloads.
        set("app", "the fourth", "--no-reload");
        set("app", "the fifth", "--no-reload");
        lab.pgbctl(&["reload", "--verify"]).well();
        assert!(lab.lets_in("app", "the fifth") && !lab.lets_in("app", &third));

        // The control: in place, of the same size and second.
        let list = lab.dir.join("userlist.txt");
        let write = |password: &str| {
            let time = fs::metadata(&list).and_then(|metadata| metadata.modified()).expect("it is there");
            fs::write(&list, format!("\"app\" \"{password}\"\n")).expect("ours");
            fs::File::options()
                .append(true)
                .open(&list)
                .and_then(|file| file.set_modified(time))
                .expect("ours");
            lab.console("RELOAD");
        };
        lab.pgbctl(&["user", "remove", "nobody"]).well();
        fs::write(&list, "\"app\" \"sixth\"\n").expect("ours");
        lab.console("RELOAD");
        write("sevnt");
        let (new, old) = (lab.lets_in("app", "sevnt"), lab.lets_in("app", "sixth"));
        println!("  control: the new password works: {new}, the old one: {old}");
        assert!(!new && old, "a reload that is not skipped proves nothing");
    });
}

#[test]
fn a_reload_that_fails_is_found_out_and_rolled_back() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        // What it includes is broken behind our back: our own look at the file before the edit sees nothing.
        let more = lab.dir.join("more.ini");
        fs::write(&more, "other = host=elsewhere\n").expect("ours");
        let ini = fs::read_to_string(lab.ini()).expect("it is there");
        let ini = ini.replace("[databases]\n", &format!("[databases]\n%include {}\n", more.display()));
        fs::write(lab.ini(), &ini).expect("ours");
        lab.pgbctl(&["reload", "--verify"]).well();
        assert_eq!(lab.pgbctl(&["check"]).code, Some(0));
        fs::write(&more, "no entry\n").expect("ours");
        let ran = lab.pgbctl(&["check"]);
        assert!(ran.code == Some(2) && ran.stdout.contains("more.ini:1: error: "), "{ran:?}");
        let ran = lab.pgbctl(&["db", "set", "app", "--pool-size", "4"]);
        let error = ran.failed(5);
        println!("  {error}");
        assert!(error.contains("rolled back"), "{error}");
        assert_eq!(fs::read_to_string(lab.ini()).expect("it is there"), ini);
        lab.query(USER, "").expect("what ran goes on");
        // Before the edit, when the file itself is broken.
        fs::write(lab.ini(), ini.replace("pool_mode", "pool mode")).expect("ours");
        lab.pgbctl(&["db", "add", "proj_a"]).failed(2);
        let ran = lab.pgbctl(&["reload", "--verify"]);
        assert_eq!(ran.code, Some(5), "{ran:?}");
    });
}

#[test]
fn logins_through_pgbouncer_to_a_scram_server_are_as_the_table_says() {
    on_each_version(|postgres, installed| {
        let hba = postgres.pidfile().with_file_name("pg_hba.conf");
        let trusted = fs::read_to_string(&hba).expect("it is there");
        if !trusted.starts_with("local all app") {
            fs::write(&hba, format!("local all app scram-sha-256\n{trusted}")).expect("ours");
        }
        postgres.query("DROP ROLE IF EXISTS app");
        postgres.query("CREATE ROLE app LOGIN PASSWORD 'open sesame'");
        postgres.query("SELECT pg_reload_conf()");
        let server = format!("host={} port={} user={USER}", postgres.socket_dir().display(), postgres.port());
        let row = |auth: &str, users: &str, words: &[&str]| {
            let lab = Lab::new(postgres, installed, &format!("auth_type = {auth}"), users);
            if !words.is_empty() {
                run(lab.command(words).env("SECRET", "open sesame")).well();
            }
            lab.query("app", "open sesame")
        };
        let add = ["user", "add", "app", "--password-env", "SECRET"];
        let nobody = "\"nobody\" \"\"\n";
        for auth in ["md5", "scram-sha-256"] {
            row(auth, "\"app\" \"open sesame\"\n", &[]).expect("the password itself works");
            // A verifier of its own salt: the login is right, the server's is another.
            let error = row(auth, nobody, &add).expect_err("PgBouncer cannot log in to the server");
            println!("  {auth}, a verifier that only PgBouncer has: {}", error.lines().next().unwrap_or(""));
            let error = row(auth, nobody, &[&add[..], &["--md5"]].concat()).expect_err("nor by md5");
            println!("  {auth}, md5: {}", error.lines().next().unwrap_or(""));
            row(auth, nobody, &[&add[..], &["--run-on", &server]].concat()).expect("one verifier for both");
        }
        let stands = postgres.query("SELECT rolpassword FROM pg_authid WHERE rolname = 'app'");
        // The statement that is printed says the same, and what the server has can be copied.
        let lab = Lab::new(postgres, installed, "auth_type = scram-sha-256", nobody);
        let mut copying =
            Process::start_with_stdin(&mut lab.command(&["user", "add", "app", "--verifier-stdin"]));
        copying.say(&stands);
        copying.close_stdin();
        ended(copying).well();
        lab.query("app", "open sesame").expect("a copied verifier");
        let printed = run(lab.command(&add).env("SECRET", "open sesame"));
        let statement = printed
            .well()
            .lines()
            .find(|line| line.starts_with("ALTER ROLE"))
            .expect("a statement")
            .to_owned();
        postgres.query(&statement);
        lab.query("app", "open sesame").expect("a printed verifier");
    });
}

#[test]
fn a_database_is_removed_when_its_transaction_has_finished() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        let client = lab.in_transaction("app");
        let removing = Process::start(&mut lab.command(&["db", "remove", "app", "--drain", "30s"]));
        until("the pause", || lab.app_is("disabled") && lab.app_is("paused"));
        let refused = lab.query(USER, "").expect_err("no new client");
        assert!(refused.contains("disabled"), "{refused}");
        assert!(!removing.is_over(), "{}", removing.stderr_so_far());
        commit(&client);
        assert!(ended(removing).well().contains("Removed app"));
        assert!(!lab.console("SHOW DATABASES").contains("app|"));
        assert!(!fs::read_to_string(lab.ini()).expect("it is there").contains("app ="));

        // Without that it is cut: the control, and what it says.
        let lab = Lab::open(postgres, installed);
        let client = lab.in_transaction("app");
        let ran = lab.pgbctl(&["db", "remove", "app", "--force"]);
        println!("  {}", ran.stderr);
        assert!(ran.well().contains("Removed app"), "{ran:?}");
        assert!(
            ran.stderr.contains("cut 1 clients of app: postgres from ")
                && ran.stderr.contains("in a transaction"),
            "{ran:?}"
        );
        client.say("SELECT 'still here';");
        client.stderr_line(|line| {
            line.contains("server closed the connection") || line.contains("database removed")
        });
    });
}

#[test]
fn a_removal_that_takes_too_long_or_is_interrupted_leaves_everything_as_it_was() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        let before = fs::read_to_string(lab.ini()).expect("it is there");
        let client = lab.in_transaction("app");
        let watch = Stopwatch::start();
        let ran = lab.pgbctl(&["db", "remove", "app", "--drain", "500ms"]);
        assert!(ran.failed(6).contains("open transaction"), "{ran:?}");
        assert!(watch.elapsed() < Duration::from_secs(5));
        let works = |when: &str| {
            assert_eq!(fs::read_to_string(lab.ini()).expect("it is there"), before, "{when}");
            lab.query(USER, "").unwrap_or_else(|said| panic!("{when}: {said}"));
        };
        works("after the deadline");
        for (signal, code) in [(Signal::HUP, 129), (Signal::INT, 130), (Signal::TERM, 143)] {
            let removing = Process::start(&mut lab.command(&["db", "remove", "app", "--drain", "30s"]));
            until("the pause", || lab.app_is("disabled") && lab.app_is("paused"));
            removing.signal(signal);
            assert_eq!(ended(removing).code, Some(code));
            works("after a signal");
        }
        commit(&client);
    });
}

#[test]
fn it_is_drained_by_its_console_or_goes_on_as_before() {
    on_each_version(|postgres, installed| {
        let mut lab = Lab::open(postgres, installed);
        let client = lab.in_transaction("app");
        let ran = lab.pgbctl(&["drain", "--deadline", "500ms"]);
        assert!(ran.failed(6).contains("goes on as before"), "{ran:?}");
        lab.query(USER, "").expect("it goes on");
        let draining = Process::start(&mut lab.command(&["drain", "--deadline", "30s"]));
        // Who comes before the pause is answered; who comes behind it waits.
        let mut waiting: Option<Child> = None;
        until("a client that waits", || {
            let client = waiting.get_or_insert_with(|| {
                let mut client = lab.psql("app", USER, "");
                client.args(["-c", "SELECT 1"]).stdout(Stdio::null()).stderr(Stdio::null());
                client.spawn().expect("psql starts")
            });
            if client.try_wait().expect("it is ours").is_some() {
                waiting = None;
                return false;
            }
            lab.pgbouncer.console("SHOW POOLS").iter().any(|pool| {
                pool["database"] == "app" && pool["cl_waiting"].parse().is_ok_and(|count: u32| count > 0)
            })
        });
        assert!(!draining.is_over(), "{}", draining.stderr_so_far());
        commit(&client);
        ended(draining).well();
        waiting.expect("one waits").wait().expect("it is ours");
        // SHUTDOWN is an exit of its own will.
        assert_eq!(lab.pgbouncer.code(PATIENCE), 0, "{}", lab.pgbouncer.log());
        let ran = lab.pgbctl(&["drain"]);
        assert!(ran.failed(1).contains("cannot be reached"), "{ran:?}");
    });
}

#[test]
fn it_is_paused_until_it_is_resumed() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        for one in [&["app"][..], &[]] {
            lab.pgbctl(&[&["pause"], one].concat()).well();
            let waiting = Process::start(lab.psql("app", USER, "").args(["-c", "SELECT 'answered'"]));
            until("a client that waits", || {
                lab.console("SHOW POOLS")
                    .lines()
                    .any(|line| line.starts_with("app|") && line.split('|').nth(3) == Some("1"))
            });
            assert!(!waiting.is_over());
            let doctor = lab.pgbctl(&["doctor"]);
            let wanted = if one.is_empty() { "it is paused" } else { "database app is paused" };
            // 1.18 does not tell that all is paused.
            if !one.is_empty() || installed.is_at_least((1, 19)) {
                assert!(doctor.code == Some(2) && doctor.stdout.contains(wanted), "{doctor:?}");
            }
            lab.pgbctl(&[&["resume"], one].concat()).well();
            assert_eq!(ended(waiting).well(), "answered");
        }
        assert!(lab.pgbctl(&["resume"]).well().contains("not paused"));
        // One database is another thing than all; and what is paused by somebody is not drained over his head.
        lab.pgbctl(&["pause", "app"]).well();
        let ran = lab.pgbctl(&["resume"]);
        assert!(ran.well().contains("not paused") && ran.stderr.contains("pgbctl resume app"), "{ran:?}");
        lab.pgbctl(&["resume", "app"]).well();
        lab.pgbctl(&["pause"]).well();
        assert!(lab.pgbctl(&["drain"]).failed(6).contains("resume it first"));
        lab.pgbctl(&["resume"]).well();
        lab.query(USER, "").expect("it goes on");
    });
}

#[test]
fn it_is_stopped_by_its_pid_file_with_one_signal_and_nobody_else_is() {
    on_each_version(|postgres, installed| {
        let mut lab = Lab::open(postgres, installed);
        let client = lab.in_transaction("app");
        let stopping = Process::start(&mut lab.command(&["stop", "--wait"]));
        lab.pgbouncer.got("SIGINT");
        assert!(!stopping.is_over());
        commit(&client);
        assert!(ended(stopping).well().contains("has ended"));
        lab.pgbouncer.ended(PATIENCE);
        assert_eq!(lab.pgbouncer.signals(), ["SIGINT"]);
        assert!(lab.pgbctl(&["stop"]).well().contains("Nothing to stop"));
        // A number that is another's by now.
        let mut stranger = Command::new("sleep");
        let stranger = Process::start(stranger.arg("300"));
        fs::write(lab.pgbouncer.pidfile(), format!("{}\n", stranger.id())).expect("ours");
        let ran = lab.pgbctl(&["stop"]);
        assert!(ran.failed(6).contains("nobody was signalled"), "{ran:?}");
        assert!(!stranger.is_over());
        // And an edit says that there is nobody to tell.
        let ran = lab.pgbctl(&["db", "add", "proj_a"]);
        assert!(ran.well().contains("Not reloaded: "), "{ran:?}");
    });
}

#[test]
fn a_stop_that_is_interrupted_sends_nothing_more() {
    on_each_version(|postgres, installed| {
        let mut lab = Lab::open(postgres, installed);
        let client = lab.in_transaction("app");
        let ladder = ["stop", "--ladder", "INT:2s/TERM:2s/KILL:2s"];
        let stopping = Process::start(&mut lab.command(&ladder));
        lab.pgbouncer.got("SIGINT");
        stopping.signal(Signal::INT);
        let ran = ended(stopping);
        assert!(ran.code == Some(130) && ran.stderr.contains("is sent nothing more"), "{ran:?}");
        // Who would have sent more has ended.
        commit(&client);
        lab.pgbouncer.ended(PATIENCE);
        assert_eq!(lab.pgbouncer.signals(), ["SIGINT"]);
    });
}

#[test]
fn one_that_has_lost_its_pid_file_is_neither_passed_over_nor_taken_for_gone() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        fs::remove_file(lab.pgbouncer.pidfile()).expect("it is there");
        assert!(lab.pgbctl(&["stop"]).failed(6).contains("PgBouncer runs"));
        let client = lab.in_transaction("app");
        let ran = lab.pgbctl(&["db", "remove", "app", "--drain", "300ms"]);
        assert!(ran.failed(6).contains("open transaction"), "{ran:?}");
        commit(&client);
        let ran = lab.pgbctl(&["db", "set", "app", "--pool-size", "4"]);
        assert!(ran.well().contains("which runs by it"), "{ran:?}");
        // But the console of another one is none of ours.
        let other = Lab::open(postgres, installed);
        let ini = fs::read_to_string(other.ini()).expect("it is there");
        let (ours, theirs) = (lab.dir.display().to_string(), other.dir.display().to_string());
        let socket = format!("unix_socket_dir = {theirs}");
        fs::write(
            lab.ini(),
            ini.replace(&theirs, &ours).replace(&format!("unix_socket_dir = {ours}"), &socket),
        )
        .expect("ours");
        assert!(lab.pgbctl(&["stop"]).well().contains("Nothing to stop"));
        assert!(lab.pgbctl(&["db", "set", "app", "--pool-size", "5"]).well().contains("Not reloaded"));
    });
}

#[test]
fn without_its_console_it_is_reloaded_by_a_signal_and_that_is_said() {
    on_each_version(|postgres, installed| {
        let lab = Lab::open(postgres, installed);
        let nowhere = ["--admin", "postgres://pgbouncer@127.0.0.1:1/pgbouncer"];
        let ran = lab.pgbctl(&[&nowhere[..], &["db", "set", "app", "--pool-size", "4"]].concat());
        assert!(ran.well().contains("by SIGHUP") && ran.stderr.contains("nobody has looked"), "{ran:?}");
        lab.pgbouncer.got("SIGHUP");
        let ran = lab.pgbctl(&[&nowhere[..], &["reload", "--verify"]].concat());
        assert_eq!(ran.code, Some(5), "{ran:?}");
        // Nobody can be seen out: nothing is removed.
        lab.pgbctl(&[&nowhere[..], &["db", "remove", "app"]].concat()).failed(1);
        assert!(fs::read_to_string(lab.ini()).expect("it is there").contains("app ="));
        // Nor does a signal end it.
        let log = lab.dir.join("nope/pgbouncer.log").display().to_string();
        let ran = lab.pgbctl(&[&nowhere[..], &["config", "set", "logfile", &log]].concat());
        assert!(ran.failed(5).contains("rolled back, and PgBouncer has reloaded it"), "{ran:?}");
        lab.query(USER, "").expect("what ran goes on");
    });
}

/// The files of a PgBouncer belong to its user.
#[test]
fn an_edit_as_root_leaves_the_files_to_their_owner() {
    let postgres = Postgres::start();
    let installed = pgbouncers().remove(0);
    let lab = Lab::open(&postgres, &installed);
    let owner = |path: &Path| std::os::unix::fs::MetadataExt::uid(&fs::metadata(path).expect("it is there"));
    let before = owner(&lab.ini());
    let mut command = shutdown_tests::pgbctl::pgbctl();
    run(command.arg("--config").arg(lab.ini()).args(["db", "add", "proj_a"])).well();
    assert_eq!(owner(&lab.ini()), before);
}
