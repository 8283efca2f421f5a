//! Edits a PgBouncer's files safely by many hands, and drains, reloads and stops it. Everything it does, the library does.

mod answer;
mod audit;
mod flags;

use std::io;
use std::pin::pin;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use serde_json::{Value, json};
use shutdown_core::companions::Ending;
use shutdown_pgbouncer::{
    Capacity, Connection, Console, ConsoleAddress, Done, Error, Paused, PgBouncer, Reload, Reloaded, Removal,
    Row, Secret, Userlist, Version, check, diagnose, drain, secret,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::answer::{Answer, BAD_INPUT, fail};
use crate::flags::{Backup, Check, Command, Config, Db, Flags, SecretSource, User, pair};

/// How long what a signal has interrupted may take to let go.
const LETTING_GO: Duration = Duration::from_secs(12);

fn main() -> ExitCode {
    let flags = match Flags::try_parse() {
        Ok(flags) => flags,
        Err(error) => return said_by_clap(&error),
    };
    let json = flags.json;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = runtime.map_err(|source| io_error("a runtime", source)).map(|runtime| {
        let ended = runtime.block_on(until_signalled(&flags));
        // A thread that waits for a lock or for stdin does not hold up the exit.
        runtime.shutdown_background();
        ended
    });
    let (answered, signalled) = ended.unwrap_or_else(|error| (Err(error), None));
    // Done by then or not: who sent the signal asks for this one.
    let by_signal = signalled.map(|number| 128 + number);
    let code = match answered {
        // Who insists wants to know.
        Ok(answer) if flags.reload && answer.is_unseen() => answer.unverified().print(by_signal, json),
        Ok(answer) => answer.print(by_signal, json),
        Err(error) => fail(&error, by_signal, json),
    };
    ExitCode::from(by_signal.unwrap_or(code))
}

/// Help, the version, or what is wrong with the arguments; that in the object that a program waits for, too.
fn said_by_clap(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if error.use_stderr() && std::env::args_os().any(|argument| argument == "--json") {
        let text = error.to_string();
        // What stands before the usage.
        let lines = text.lines().take_while(|line| !line.is_empty()).map(str::trim);
        let sentence = match error.kind() {
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                "a command is missing: see --help".to_owned()
            }
            _ => lines.collect::<Vec<_>>().join(" ").trim_start_matches("error: ").to_owned(),
        };
        answer::print_error(&sentence, BAD_INPUT);
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(BAD_INPUT))
}

/// Runs it until it is done; a signal has it give up: what it waits for is not done, and what it has paused goes on.
async fn until_signalled(flags: &Flags) -> (Result<Answer, Error>, Option<u8>) {
    let cancelled = CancellationToken::new();
    let mut running = pin!(run(flags, &cancelled));
    let listen = |kind: SignalKind| signal(kind).ok();
    let [Some(mut hangup), Some(mut interrupt), Some(mut quit), Some(mut terminate)] =
        [SignalKind::hangup(), SignalKind::interrupt(), SignalKind::quit(), SignalKind::terminate()]
            .map(listen)
    else {
        return (running.await, None);
    };
    let number = tokio::select! {
        answered = &mut running => return (answered, None),
        _ = hangup.recv() => 1,
        _ = interrupt.recv() => 2,
        _ = quit.recv() => 3,
        _ = terminate.recv() => 15,
    };
    cancelled.cancel();
    let late = "interrupted, and PgBouncer does not answer: it may still be paused";
    let answered = timeout(LETTING_GO, running).await;
    (answered.unwrap_or_else(|_| Err(Error::Unreachable(late.to_owned()))), Some(number))
}

async fn run(flags: &Flags, cancelled: &CancellationToken) -> Result<Answer, Error> {
    let pgbouncer = of(flags)?.until_cancelled(cancelled.clone());
    match &flags.command {
        Command::Db(db) => databases(&pgbouncer, db).await,
        Command::User(user) => users(&pgbouncer, user, cancelled).await,
        Command::Config(Config::Set { key, value }) => {
            let done = audited(&format!("set {key}"), pgbouncer.set_parameter(key, value)).await?;
            Ok(Answer::of_edit(&done, &[format!("Set {key} = {value}")]))
        }
        Command::Config(Config::Get { key }) => {
            let value = pgbouncer.ini()?.parameter(key);
            let value = value.ok_or_else(|| {
                Error::Input(format!("{key} is not set in {}", pgbouncer.config().display()))
            })?;
            Ok(Answer::default().line(value.clone()).with(key, value))
        }
        Command::Backup(backup) => backups(&pgbouncer, backup).await,
        Command::Check(wanted) => checked(flags, &pgbouncer, wanted).await,
        Command::Reload { verify } => {
            let reloaded = pgbouncer.reload().await?;
            let answer = Answer::default().of_reload(&reloaded);
            Ok(if *verify && reloaded != Reloaded::Verified { answer.unverified() } else { answer })
        }
        Command::Pause { database, deadline } => {
            let address = pgbouncer.console(&pgbouncer.ini()?);
            let until = Instant::now() + *deadline;
            Paused::until(&address, database.as_ref(), false, until, cancelled).await?.keep();
            let line = "Paused: no transaction is open, and none begins before `pgbctl resume`";
            Ok(Answer::default().line(line).with("paused", true))
        }
        Command::Resume { database } => {
            let console = Console::open(&pgbouncer.console(&pgbouncer.ini()?)).await?;
            let name = database.as_ref().map(|name| format!(" \"{name}\"")).unwrap_or_default();
            let resumed = console.tell(&format!("RESUME{name}")).await;
            // A removal that was killed leaves both.
            let enabled = match database {
                Some(_) => console.tell(&format!("ENABLE{name}")).await.map(|_| ()),
                None => Ok(()),
            };
            let held = paused(&console).await;
            console.close().await;
            enabled?;
            match resumed {
                Err(Error::Unreachable(said)) if said.contains("not paused") => {
                    let answer = Answer::default().line("It was not paused").with("paused", false);
                    // A pause of all is another thing than one of a database.
                    let held = held.iter().filter(|_| database.is_none());
                    Ok(held.fold(answer, |answer, name| {
                        answer.warning(format!("database {name} is: `pgbctl resume {name}` lets it go on"))
                    }))
                }
                resumed => resumed.map(|_| Answer::default().line("Resumed").with("paused", false)),
            }
        }
        Command::Drain { deadline } => {
            let address = pgbouncer.console(&pgbouncer.ini()?);
            drain(&address, Instant::now() + *deadline, cancelled).await?;
            let line = "Drained: its transactions have ended, and it has shut down";
            Ok(Answer::default().line(line).with("drained", true))
        }
        Command::Stop { wait: _, ladder } => stopped(&pgbouncer.stop(ladder.clone()).await?),
        Command::Status => status(&pgbouncer).await,
        Command::Doctor => {
            let findings = diagnose(&pgbouncer).await?;
            let answer = Answer::default().with("findings", findings.clone());
            if findings.is_empty() {
                return Ok(answer.line("Nothing is wrong that is known to go wrong"));
            }
            Ok(findings.into_iter().fold(answer, Answer::line).bad())
        }
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Flags::command(), "pgbctl", &mut text);
            Ok(text_of("completions", &text))
        }
        Command::Man => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Flags::command())
                .render(&mut text)
                .map_err(|source| io_error("the man page", source))?;
            Ok(text_of("man", &text))
        }
    }
}

fn text_of(key: &str, text: &[u8]) -> Answer {
    let text = String::from_utf8_lossy(text);
    Answer::default().line(text.trim_end()).with(key, text.as_ref())
}

/// Tells the system's log what became of an edit.
async fn audited(what: &str, edit: impl Future<Output = Result<Done, Error>>) -> Result<Done, Error> {
    let done = edit.await;
    audit::tell(what, &done);
    done
}

/// The PgBouncer that the flags name.
fn of(flags: &Flags) -> Result<PgBouncer, Error> {
    let reload = match (flags.reload, flags.no_reload) {
        (true, _) => Reload::Always,
        (_, true) => Reload::Never,
        _ => Reload::IfRunning,
    };
    let mut pgbouncer = PgBouncer::new(&flags.config).lock_timeout(flags.lock_timeout).reload_after(reload);
    if let Some(userlist) = &flags.userlist {
        pgbouncer = pgbouncer.userlist(userlist);
    }
    if let Some(admin) = &flags.admin {
        // Not by clap, which repeats what it does not understand.
        let address: ConsoleAddress = admin.parse().map_err(Error::Input)?;
        let is_typed = std::env::args().any(|word| word.contains(admin.as_str()));
        if is_typed && address.has_password() && std::env::var_os("PGPASSWORD").is_none() {
            return Err(Error::Input(
                "a password does not go on the command line: set PGPASSWORD, or PGBCTL_ADMIN".to_owned(),
            ));
        }
        pgbouncer = pgbouncer.console_at(address);
    }
    Ok(pgbouncer)
}

async fn databases(pgbouncer: &PgBouncer, db: &Db) -> Result<Answer, Error> {
    let pairs = |pairs: &[(&str, Option<String>)], more: &[String]| -> Result<Vec<_>, Error> {
        let named = pairs.iter().filter_map(|(key, value)| Some(((*key).to_owned(), value.clone()?)));
        named
            .map(Ok)
            .chain(more.iter().map(|text| pair(text)))
            .collect::<Result<_, _>>()
            .map_err(Error::Input)
    };
    match db {
        Db::Add { name, host, port, dbname, pool_size, reserve_pool, settings } => {
            let dbname = dbname.clone().unwrap_or_else(|| name.to_string());
            let pairs = pairs(
                &[
                    ("host", Some(host.clone())),
                    ("port", Some(port.to_string())),
                    ("dbname", Some(dbname)),
                    ("pool_size", Some(pool_size.to_string())),
                    ("reserve_pool", Some(reserve_pool.to_string())),
                ],
                settings,
            )?;
            let mut connection = Connection::default();
            for (key, value) in &pairs {
                connection = connection.set(key, value).map_err(Error::Input)?;
            }
            let done =
                audited(&format!("added database {name}"), pgbouncer.add_database(name, &connection)).await?;
            Ok(Answer::of_edit(
                &done,
                &[
                    format!("Added {name} to PgBouncer config"),
                    format!("  pool_size: {pool_size}"),
                    format!("  reserve_pool: {reserve_pool}"),
                ],
            ))
        }
        Db::Set { name, changes } => {
            let settings = pairs(
                &[
                    ("host", changes.host.clone()),
                    ("port", changes.port.map(|port| port.to_string())),
                    ("dbname", changes.dbname.clone()),
                    ("pool_size", changes.pool_size.map(|size| size.to_string())),
                    ("reserve_pool", changes.reserve_pool.map(|size| size.to_string())),
                ],
                &changes.settings,
            )?;
            let done =
                audited(&format!("changed database {name}"), pgbouncer.set_database(name, &settings)).await?;
            Ok(Answer::of_edit(&done, &[format!("Changed {name} in PgBouncer config")]))
        }
        Db::Remove { name, drain, force } => {
            let removal = if *force { Removal::Forced } else { Removal::Drained(*drain) };
            let done = audited(&format!("removed database {name}"), pgbouncer.remove_database(name, removal))
                .await?;
            Ok(Answer::of_edit(&done, &[format!("Removed {name} from PgBouncer config")]))
        }
        Db::List => {
            let mut answer = Answer::default();
            let mut list = Vec::new();
            for database in pgbouncer.ini()?.databases() {
                let settings: Vec<_> = match &database.connection {
                    Ok(connection) => connection.pairs().filter(|(key, _)| *key != "password").collect(),
                    Err(_) => Vec::new(),
                };
                let shown: Vec<_> = settings.iter().map(|(key, value)| format!("{key}={value}")).collect();
                answer = answer.line(format!("{} {}", database.name, shown.join(" ")));
                let settings: serde_json::Map<_, _> =
                    settings.into_iter().map(|(key, value)| (key.to_owned(), Value::from(value))).collect();
                list.push(json!({ "name": database.name, "settings": settings }));
            }
            Ok(answer.with("databases", list))
        }
    }
}

async fn users(pgbouncer: &PgBouncer, user: &User, cancelled: &CancellationToken) -> Result<Answer, Error> {
    match user {
        User::Add { name, secret: source, md5, run_on } => {
            let given = tokio::select! {
                biased;
                () = cancelled.cancelled() => Err(Error::Refused("interrupted; nothing is changed".to_owned())),
                given = given(source) => given,
            };
            let given = given?;
            let stands = match &given {
                Given::Verifier(verifier) => Secret::new(verifier.clone()),
                Given::Password(password) | Given::New(password) if *md5 => secret::md5(name, password),
                Given::Password(password) | Given::New(password) => secret::scram(password),
            };
            let stands = stands.map_err(Error::Input)?;
            let generated = if let Given::New(password) = given { Some(password) } else { None };
            let statement = secret::alter_role(name, &stands);
            let what = format!("set the secret of user {:?}", name.as_str());
            let done = match run_on {
                Some(server) => audited(&what, pgbouncer.set_user_on(server, name, &stands)).await,
                None => audited(&what, pgbouncer.set_user(name, &stands)).await,
            };
            let done = match (done, &generated) {
                // The server, or the file, may have it.
                (Err(error @ Error::Unverified(_)), Some(password)) => {
                    return Ok(Answer::default()
                        .line(format!("-- Password: {password}"))
                        .with("password", password.as_str())
                        .failed(&error));
                }
                (done, _) => done?,
            };
            // What is left on stdout is SQL, for psql.
            let mut answer =
                Answer::of_edit(&done, &[format!("Added user '{name}' to PgBouncer userlist")]).aside();
            if let Some(password) = generated {
                answer = answer.line(format!("-- Password: {password}")).with("password", password);
            }
            Ok(match run_on {
                Some(_) => answer.with("run", true),
                // It stands there already.
                None if source.verifier_stdin => answer,
                None => answer.line(format!("{statement};")).with("statement", statement),
            })
        }
        User::Remove { name } => {
            let done =
                audited(&format!("removed user {:?}", name.as_str()), pgbouncer.remove_user(name)).await?;
            Ok(Answer::of_edit(&done, &[format!("Removed user '{name}' from PgBouncer userlist")]))
        }
        User::List => {
            let path = pgbouncer.userlist_path()?;
            let bytes =
                std::fs::read(&path).map_err(|source| io_error(&path.display().to_string(), source))?;
            let users = Userlist::new(bytes).users();
            let list: Vec<_> =
                users.iter().map(|user| json!({ "name": user.name, "secret": user.kind })).collect();
            let answer = Answer::default().with("users", list);
            Ok(users.iter().fold(answer, |answer, user| answer.line(format!("{} {}", user.name, user.kind))))
        }
    }
}

/// What was given for a user.
enum Given {
    Password(String),
    /// A password that was made here.
    New(String),
    /// What stands in pg_authid.
    Verifier(String),
}

async fn given(source: &SecretSource) -> Result<Given, Error> {
    if source.verifier_stdin {
        let text = line_of_stdin().await?;
        if !is_verifier(&text) {
            return Err(Error::Input(
                "what stdin has is no verifier: it begins with SCRAM-SHA-256$ or md5".to_owned(),
            ));
        }
        return Ok(Given::Verifier(text));
    }
    if source.password_stdin {
        return Ok(Given::Password(line_of_stdin().await?));
    }
    if let Some(path) = &source.password_file {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| io_error(&path.display().to_string(), source))?;
        return Ok(Given::Password(text.lines().next().unwrap_or_default().to_owned()));
    }
    if let Some(variable) = &source.password_env {
        let password = std::env::var(variable);
        let missing = |_| Error::Input(format!("the environment has no {variable}, or it is not UTF-8"));
        return Ok(Given::Password(password.map_err(missing)?));
    }
    Ok(Given::New(secret::generate()?))
}

/// Whether PgBouncer would take it for one, and not for a password.
fn is_verifier(text: &str) -> bool {
    let (Ok(secret), Ok(name)) = (Secret::new(text), "user".parse()) else { return false };
    let mut list = Userlist::new("");
    list.set(&name, &secret);
    list.users().first().is_some_and(|user| ["scram-sha-256", "md5"].contains(&user.kind))
}

/// The first line of stdin, read by a thread of its own: nobody can be made to type.
async fn line_of_stdin() -> Result<String, Error> {
    let read = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().read_line(&mut line).map(|_| line)
    });
    let line = read.await.unwrap_or_else(|error| Err(io::Error::other(error)));
    let line = line.map_err(|source| io_error("stdin", source))?;
    Ok(line.lines().next().unwrap_or_default().to_owned())
}

async fn backups(pgbouncer: &PgBouncer, backup: &Backup) -> Result<Answer, Error> {
    let mut files = vec![pgbouncer.config().to_owned()];
    files.extend(pgbouncer.userlist_path().ok().filter(|list| list.exists()));
    let mut answer = Answer::default();
    let mut list = Vec::new();
    match backup {
        Backup::Create => {
            for file in &files {
                let backup = pgbouncer.back_up(file).await?;
                answer = answer.line(format!("Backed up to: {}", backup.display()));
                list.push(json!({ "path": backup.display().to_string() }));
            }
        }
        Backup::List | Backup::Prune { .. } => {
            for file in &files {
                let found = match backup {
                    Backup::Prune { keep, max_age } => {
                        let keep = keep.map(|keep| usize::try_from(keep).unwrap_or(usize::MAX));
                        pgbouncer.prune(file, Some(*max_age), keep).await?
                    }
                    _ => pgbouncer.backups(file)?,
                };
                for backup in found {
                    let made = backup.made.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                    let age = SystemTime::now().duration_since(backup.made).unwrap_or_default().as_secs();
                    let path = backup.path.display().to_string();
                    answer = answer.line(format!("{path} {} bytes, {age} s old", backup.size));
                    list.push(json!({ "path": path, "bytes": backup.size, "made": made }));
                }
            }
            if let Backup::Prune { .. } = backup {
                answer = answer.line(format!("Removed {}", list.len()));
            }
        }
        Backup::Restore { file } => {
            let done = audited(&format!("restored {}", file.display()), pgbouncer.restore(file)).await?;
            return Ok(Answer::of_edit(&done, &[format!("Restored {}", file.display())]));
        }
    }
    Ok(answer.with("backups", list))
}

async fn checked(flags: &Flags, pgbouncer: &PgBouncer, wanted: &Check) -> Result<Answer, Error> {
    let ini = pgbouncer.ini()?;
    let version = match wanted.target_version {
        Some(version) => version,
        None => running(pgbouncer).await.unwrap_or(Version::OLDEST),
    };
    let findings = check(pgbouncer.config(), flags.userlist.as_deref(), version)?;
    let mut answer = Answer::default().with("version", version.to_string());
    let mut list = Vec::new();
    let mut is_bad = false;
    for finding in &findings {
        let (file, problem) = (finding.file.display(), &finding.problem);
        let weight = if problem.fatal { "error" } else { "warning" };
        is_bad |= problem.fatal;
        answer = answer.line(format!("{file}:{}: {weight}: {}", problem.line, problem.what));
        list.push(json!({ "file": file.to_string(), "line": problem.line, "fatal": problem.fatal, "what": problem.what }));
    }
    answer = answer.with("findings", list);
    let mut is_full = false;
    if let Some(limit) = wanted.max_connections {
        let capacity = Capacity::of(&ini, wanted.users, wanted.other, limit);
        is_full = capacity.total_with_reserve() > limit;
        answer = answer.line(capacity.to_string()).with(
            "capacity",
            json!({ "pools": capacity.pools, "reserve": capacity.reserve, "other": capacity.other, "limit": limit }),
        );
    }
    let answer = match is_bad {
        true => answer.line(format!("PgBouncer {version} would refuse this")),
        false => answer.line(format!("PgBouncer {version} takes this")),
    };
    Ok(if is_bad || is_full { answer.bad() } else { answer })
}

/// The version of the one that runs, if its console can be reached.
async fn running(pgbouncer: &PgBouncer) -> Option<Version> {
    let console = Console::open(&pgbouncer.console(&pgbouncer.ini().ok()?)).await.ok()?;
    let version = console.version().await.ok();
    console.close().await;
    version
}

async fn status(pgbouncer: &PgBouncer) -> Result<Answer, Error> {
    let console = Console::open(&pgbouncer.console(&pgbouncer.ini()?)).await?;
    let (version, pools) = (console.version().await, console.tell("SHOW POOLS").await);
    let databases = console.tell("SHOW DATABASES").await;
    // From 1.19 on.
    let state = console.tell("SHOW STATE").await.unwrap_or_default();
    console.close().await;
    let (version, pools, databases) = (version?, pools?, databases?);
    const COLUMNS: [&str; 7] =
        ["database", "user", "cl_active", "cl_waiting", "sv_active", "sv_idle", "maxwait"];
    let mut rows = vec![COLUMNS.map(ToOwned::to_owned)];
    rows.extend(pools.iter().map(|row| COLUMNS.map(|column| row.get(column).cloned().unwrap_or_default())));
    let widths: Vec<_> = (0..COLUMNS.len())
        .map(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0))
        .collect();
    let answer = Answer::default().line(format!("PgBouncer {version}")).with("version", version.to_string());
    let mut held = Vec::new();
    let all = |row: &Row| {
        row.get("key").is_some_and(|key| key == "paused") && row.get("value").is_some_and(|is| is == "yes")
    };
    held.extend(state.iter().any(all).then(|| "all is paused".to_owned()));
    for state in ["paused", "disabled"] {
        let is = |row: &&Row| row.get(state).is_some_and(|value| value == "1");
        let names = databases.iter().filter(is).filter_map(|row| row.get("name"));
        held.extend(names.map(|name| format!("{name} is {state}")));
    }
    let answer = answer.with("held", held.clone());
    let answer = answer.with("pools", pools.iter().map(|row| json!(row)).collect::<Vec<_>>());
    let answer = rows.iter().fold(answer, |answer, row| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        answer.line(cells.join("  ").trim_end())
    });
    Ok(held.into_iter().fold(answer, Answer::line))
}

/// The databases that are paused by themselves.
async fn paused(console: &Console) -> Vec<String> {
    let rows = console.tell("SHOW DATABASES").await.unwrap_or_default();
    let is_paused = |row: &Row| row.get("paused").is_some_and(|value| value == "1");
    rows.into_iter().filter(is_paused).filter_map(|mut row| row.remove("name")).collect()
}

fn stopped(ending: &Ending) -> Result<Answer, Error> {
    let answer = Answer::default().with("outcome", ending.as_str());
    match ending {
        Ending::Exited { pid, .. } => {
            Ok(answer.line(format!("PgBouncer (process {pid}) has ended")).with("pid", *pid))
        }
        Ending::Escalated { pid, signal, .. } => {
            let line =
                format!("PgBouncer (process {pid}) has ended, after signal {signal}: what was open is cut");
            Ok(answer.line(line).with("pid", *pid).with("signal", *signal).not_well())
        }
        Ending::NotRunning(why) => Ok(answer.line(format!("Nothing to stop: {why}"))),
        Ending::Refused(why) => Err(Error::Refused(format!("nobody was signalled: {why}"))),
        Ending::TimedOut { pid, signal } => {
            let line = format!("PgBouncer (process {pid}) still runs after every signal up to {signal}");
            Ok(answer.line(line).with("pid", *pid).with("signal", *signal).not_well())
        }
        other => Ok(answer.line(other.as_str())),
    }
}

fn io_error(what: &str, source: io::Error) -> Error {
    Error::Unwritten { path: what.into(), doing: "read", source }
}
