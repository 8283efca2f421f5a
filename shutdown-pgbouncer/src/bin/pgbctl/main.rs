//! Edits a PgBouncer's files safely by many hands, and drains, reloads and stops it. Everything it does, the library does.

mod answer;
mod audit;
mod flags;

use std::io::{self, Read};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{CommandFactory, Parser};
use serde_json::{Value, json};
use shutdown_core::companions::Ending;
use shutdown_pgbouncer::{
    Capacity, Connection, Console, Done, Error, Paused, PgBouncer, Reload, Reloaded, Removal, Row, Secret,
    UserName, Userlist, Version, check, diagnose, drain, secret, whole,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::answer::{Answer, fail};
use crate::flags::{Backup, Check, Command, Config, Db, Flags, SecretSource, User};

fn main() -> ExitCode {
    let flags = Flags::parse();
    let json = flags.json;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = runtime.map_err(|source| io_error("a runtime", source)).map(|runtime| {
        let ended = runtime.block_on(until_signalled(run(&flags)));
        // A thread that waits for a lock does not hold up the exit.
        runtime.shutdown_background();
        ended
    });
    ExitCode::from(match ended {
        Ok(Ended::Answered(Ok(answer))) => answer.print(json),
        Ok(Ended::Answered(Err(error))) | Err(error) => fail(&error, json),
        Ok(Ended::Signalled(number)) => {
            let _ = io::Write::write_all(
                &mut io::stderr(),
                b"pgbctl: ended by a signal; what was paused goes on\n",
            );
            128 + number
        }
    })
}

enum Ended {
    Answered(Result<Answer, Error>),
    Signalled(u8),
}

/// Runs it until it is done, or a signal comes: then it is dropped, and what it has paused goes on.
async fn until_signalled(run: impl Future<Output = Result<Answer, Error>>) -> Ended {
    let listen = || Some((signal(SignalKind::interrupt()).ok()?, signal(SignalKind::terminate()).ok()?));
    let Some((mut interrupt, mut terminate)) = listen() else { return Ended::Answered(run.await) };
    tokio::select! {
        answer = run => Ended::Answered(answer),
        _ = interrupt.recv() => Ended::Signalled(2),
        _ = terminate.recv() => Ended::Signalled(15),
    }
}

async fn run(flags: &Flags) -> Result<Answer, Error> {
    let pgbouncer = of(flags);
    match &flags.command {
        Command::Db(db) => databases(&pgbouncer, db).await,
        Command::User(user) => users(&pgbouncer, user).await,
        Command::Config(Config::Set { key, value }) => {
            let done = pgbouncer.set_parameter(key, value).await?;
            audit::tell(&format!("set {key}"), &done);
            Ok(Answer::of_edit(&done, &[format!("Set {key} = {value}")]))
        }
        Command::Config(Config::Get { key }) => {
            let value = whole(pgbouncer.config())?.parameter(key);
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
            Paused::until(&address, database.as_ref(), false, Instant::now() + *deadline).await?.keep();
            Ok(Answer::default()
                .line("Paused: no transaction is open, and none begins before `pgbctl resume`")
                .with("paused", true))
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
            console.close().await;
            enabled?;
            match resumed {
                Err(Error::Unreachable(said)) if said.contains("not paused") => {
                    Ok(Answer::default().line("It was not paused").with("paused", false))
                }
                resumed => resumed.map(|_| Answer::default().line("Resumed").with("paused", false)),
            }
        }
        Command::Drain { deadline } => {
            drain(&pgbouncer.console(&pgbouncer.ini()?), Instant::now() + *deadline).await?;
            Ok(Answer::default()
                .line("Drained: its transactions have ended, and it shuts down")
                .with("drained", true))
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
            Ok(Answer::default().line(String::from_utf8_lossy(&text).trim_end()))
        }
        Command::Man => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Flags::command())
                .render(&mut text)
                .map_err(|source| io_error("the man page", source))?;
            Ok(Answer::default().line(String::from_utf8_lossy(&text).trim_end()))
        }
    }
}

/// The PgBouncer that the flags name.
fn of(flags: &Flags) -> PgBouncer {
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
        pgbouncer = pgbouncer.console_at(admin.clone());
    }
    pgbouncer
}

async fn databases(pgbouncer: &PgBouncer, db: &Db) -> Result<Answer, Error> {
    let pairs = |pairs: &[(&str, Option<String>)], more: &[(String, String)]| -> Vec<(String, String)> {
        let named = pairs.iter().filter_map(|(key, value)| Some(((*key).to_owned(), value.clone()?)));
        named.chain(more.iter().cloned()).collect()
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
            );
            let mut connection = Connection::default();
            for (key, value) in &pairs {
                connection = connection.set(key, value).map_err(Error::Input)?;
            }
            let done = pgbouncer.add_database(name, &connection).await?;
            audit::tell(&format!("added database {name}"), &done);
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
            );
            let done = pgbouncer.set_database(name, &settings).await?;
            audit::tell(&format!("changed database {name}"), &done);
            Ok(Answer::of_edit(&done, &[format!("Changed {name} in PgBouncer config")]))
        }
        Db::Remove { name, drain, force } => {
            let removal = if *force { Removal::Forced } else { Removal::Drained(*drain) };
            let done = pgbouncer.remove_database(name, removal).await?;
            audit::tell(&format!("removed database {name}"), &done);
            Ok(Answer::of_edit(&done, &[format!("Removed {name} from PgBouncer config")]))
        }
        Db::List => {
            let mut answer = Answer::default();
            let mut list = Vec::new();
            for database in whole(pgbouncer.config())?.databases() {
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

async fn users(pgbouncer: &PgBouncer, user: &User) -> Result<Answer, Error> {
    match user {
        User::Add { name, secret: source, md5, run_on } => {
            let (stands, generated) = secret_of(name, source, *md5)?;
            let statement = secret::alter_role(name, &stands);
            if let Some(server) = run_on {
                secret::run(server, &statement).await?;
            }
            let done = pgbouncer.set_user(name, &stands).await?;
            audit::tell(&format!("set the secret of user {:?}", name.as_str()), &done);
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
            let done = pgbouncer.remove_user(name).await?;
            audit::tell(&format!("removed user {:?}", name.as_str()), &done);
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

/// What stands in the user list, and the password if it was made here.
fn secret_of(name: &UserName, source: &SecretSource, md5: bool) -> Result<(Secret, Option<String>), Error> {
    let stdin = || {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map_err(|source| io_error("stdin", source)).map(|_| text)
    };
    let first_line = |text: String| text.lines().next().unwrap_or_default().to_owned();
    let mut generated = None;
    let password = if source.verifier_stdin {
        let text = first_line(stdin()?);
        if !text.starts_with("SCRAM-SHA-256$") && !text.starts_with("md5") {
            return Err(Error::Input(
                "what stdin has is no verifier: it begins with SCRAM-SHA-256$ or md5".to_owned(),
            ));
        }
        return Ok((Secret::new(text).map_err(Error::Input)?, None));
    } else if source.password_stdin {
        first_line(stdin()?)
    } else if let Some(path) = &source.password_file {
        first_line(
            std::fs::read_to_string(path).map_err(|source| io_error(&path.display().to_string(), source))?,
        )
    } else if let Some(variable) = &source.password_env {
        std::env::var(variable).map_err(|_| Error::Input(format!("the environment has no {variable}")))?
    } else {
        let password = secret::generate()?;
        generated = Some(password.clone());
        password
    };
    let secret = if md5 { secret::md5(name, &password) } else { secret::scram(&password) };
    Ok((secret.map_err(Error::Input)?, generated))
}

async fn backups(pgbouncer: &PgBouncer, backup: &Backup) -> Result<Answer, Error> {
    let mut files = vec![pgbouncer.config().to_owned()];
    files.extend(pgbouncer.userlist_path().ok().filter(|list| list.exists()));
    let mut answer = Answer::default();
    let mut list = Vec::new();
    match backup {
        Backup::Create => {
            for file in &files {
                let backup = pgbouncer.back_up(file)?;
                answer = answer.line(format!("Backed up to: {}", backup.display()));
                list.push(json!({ "path": backup.display().to_string() }));
            }
        }
        Backup::List | Backup::Prune { .. } => {
            for file in &files {
                let found = match backup {
                    Backup::Prune { keep, max_age } => {
                        let keep = keep.map(|keep| usize::try_from(keep).unwrap_or(usize::MAX));
                        pgbouncer.prune(file, Some(*max_age), keep)?
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
            let done: Done = pgbouncer.restore(file).await?;
            audit::tell(&format!("restored {}", file.display()), &done);
            return Ok(Answer::of_edit(&done, &[format!("Restored {}", file.display())]));
        }
    }
    Ok(answer.with("backups", list))
}

async fn checked(flags: &Flags, pgbouncer: &PgBouncer, wanted: &Check) -> Result<Answer, Error> {
    let ini = whole(pgbouncer.config())?;
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

fn stopped(ending: &Ending) -> Result<Answer, Error> {
    let answer = Answer::default().with("outcome", ending.as_str());
    match ending {
        Ending::Exited { pid, .. } => {
            Ok(answer.line(format!("PgBouncer (process {pid}) has ended")).with("pid", *pid))
        }
        Ending::Escalated { pid, signal, .. } => {
            let line =
                format!("PgBouncer (process {pid}) has ended, after signal {signal}: what was open is cut");
            Ok(answer.line(line).with("pid", *pid).with("signal", *signal))
        }
        Ending::NotRunning(why) => Ok(answer.line(format!("Nothing to stop: {why}"))),
        Ending::Refused(why) => Err(Error::Refused(format!("nobody was signalled: {why}"))),
        Ending::TimedOut { pid, signal } => {
            Err(Error::Refused(format!("process {pid} still runs after every signal up to {signal}")))
        }
        other => Ok(answer.line(other.as_str())),
    }
}

fn io_error(what: &str, source: io::Error) -> Error {
    Error::Unwritten { path: what.into(), doing: "read", source }
}
