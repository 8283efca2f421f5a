//! The command line. Completions and the man page are made of the same definition.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use shutdown_core::companions::Ladder;
use shutdown_core::parse_duration;
use shutdown_pgbouncer::{DatabaseName, UserName, Version};

/// Edits a PgBouncer's files safely by many hands, and drains, reloads and stops it.
#[derive(Debug, Parser)]
#[command(
    name = "pgbctl",
    version,
    after_help = "Exit codes:\n  0  done, or it was so already\n  1  PgBouncer or the database server cannot be reached; nothing was \
                  written\n  2  bad input, or a file that PgBouncer would refuse; nothing was written\n  3  somebody else has the lock; nothing \
                  was written\n  4  a file could not be read or written; it is as it was\n  5  written, but PgBouncer was not seen to run by it (--reload, --verify); \
                  rolled back if it refused, unless somebody else has written meanwhile\n  6  refused: it is not the right process, or a database is still in use; nothing was \
                  changed\n  7  stopped, but not as it should be: transactions were cut, or it still runs\n  128+n  ended by signal n: what was paused goes on, \
                  unless the error says otherwise"
)]
pub(crate) struct Flags {
    /// PgBouncer's configuration file
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "PGBCTL_CONFIG",
        default_value = "/etc/pgbouncer/pgbouncer.ini"
    )]
    pub(crate) config: PathBuf,
    /// The user list; default: the configuration's auth_file
    #[arg(long, global = true, value_name = "FILE", env = "PGBCTL_USERLIST")]
    pub(crate) userlist: Option<PathBuf>,
    /// The admin console; default: unix_socket_dir and listen_port of the configuration. PGPASSWORD is its password
    #[arg(long, global = true, value_name = "URL", env = "PGBCTL_ADMIN", hide_env_values = true)]
    pub(crate) admin: Option<String>,
    /// How long to wait for others who edit
    #[arg(long, global = true, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(crate) lock_timeout: Duration,
    /// Prints one JSON object
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Reloads after an edit in any case; default: if the configuration's pidfile names a PgBouncer that runs
    #[arg(long, global = true, conflicts_with = "no_reload")]
    pub(crate) reload: bool,
    /// Does not reload after an edit
    #[arg(long, global = true)]
    pub(crate) no_reload: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Databases: the entries of the configuration
    #[command(subcommand)]
    Db(Db),
    /// Users: entries of the user list
    #[command(subcommand)]
    User(User),
    /// Settings of PgBouncer itself
    #[command(subcommand)]
    Config(Config),
    /// Copies that each edit keeps
    #[command(subcommand)]
    Backup(Backup),
    /// Whether PgBouncer would take its files, and whether PostgreSQL has room for its pools
    Check(Check),
    /// Tells PgBouncer to read its files again, and compares
    Reload {
        /// Fails (5) when nobody could look whether it has
        #[arg(long)]
        verify: bool,
    },
    /// Lets open transactions finish and no new one begin
    Pause {
        /// One database; default: all
        database: Option<DatabaseName>,
        /// How long open transactions have; then everything goes on as before
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
        deadline: Duration,
    },
    /// Undoes a pause, and what a removal that was killed has left
    Resume {
        /// One database; default: a pause of all
        database: Option<DatabaseName>,
    },
    /// Pauses, then shuts PgBouncer down, through the admin console
    Drain {
        /// How long open transactions have; then everything goes on as before
        #[arg(long, value_name = "TIME", default_value = "20s", value_parser = duration)]
        deadline: Duration,
    },
    /// Ends PgBouncer by its PID file, and waits until it is gone
    Stop {
        /// Waits for its end; always so, because whoever ends it by a second signal cuts transactions
        #[arg(long)]
        wait: bool,
        /// Signals and their times
        #[arg(long, value_name = "SIGNALS", default_value = "INT:20s/TERM:5s/KILL:2s")]
        ladder: Ladder,
    },
    /// The pools
    Status,
    /// Looks for what is known to go wrong
    Doctor,
    /// Prints completions for a shell
    Completions {
        /// Which
        shell: clap_complete::Shell,
    },
    /// Prints the man page
    Man,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Db {
    /// Adds a database; one that is there stays as it is
    Add {
        /// Its name for clients
        name: DatabaseName,
        /// The server
        #[arg(long, default_value = "postgres")]
        host: String,
        /// Its port
        #[arg(long, default_value_t = 5432, value_parser = clap::value_parser!(u16).range(1..))]
        port: u16,
        /// Its name on the server; default: the same
        #[arg(long)]
        dbname: Option<String>,
        /// Connections of its pool
        #[arg(long, default_value_t = 5)]
        pool_size: u32,
        /// Connections more when clients wait
        #[arg(long, default_value_t = 2)]
        reserve_pool: u32,
        /// Any other setting of a database
        #[arg(long = "set", value_name = "KEY=VALUE")]
        settings: Vec<String>,
    },
    /// Changes settings of a database
    Set {
        /// Its name for clients
        name: DatabaseName,
        #[command(flatten)]
        changes: Changes,
    },
    /// Removes a database, once its transactions have finished
    Remove {
        /// Its name for clients
        name: DatabaseName,
        /// How long open transactions have; then nothing is changed
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
        drain: Duration,
        /// Cuts its clients, and says whom
        #[arg(long)]
        force: bool,
    },
    /// Shows the databases of the file
    List,
}

#[derive(Args, Debug)]
#[group(required = true, multiple = true)]
pub(crate) struct Changes {
    /// The server
    #[arg(long)]
    pub(crate) host: Option<String>,
    /// Its port
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: Option<u16>,
    /// Its name on the server
    #[arg(long)]
    pub(crate) dbname: Option<String>,
    /// Connections of its pool
    #[arg(long)]
    pub(crate) pool_size: Option<u32>,
    /// Connections more when clients wait
    #[arg(long)]
    pub(crate) reserve_pool: Option<u32>,
    /// Any other setting of a database
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) settings: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum User {
    /// Adds a user, or gives one another password
    Add {
        /// Its name
        name: UserName,
        #[command(flatten)]
        secret: SecretSource,
        /// Writes an md5 hash, for servers that still have those
        #[arg(long)]
        md5: bool,
        /// Gives the role on this server the same verifier, before the user list has it; default: prints the statement. PGPASSWORD is
        /// its password
        #[arg(long, value_name = "URL")]
        run_on: Option<String>,
    },
    /// Removes a user
    Remove {
        /// Its name
        name: UserName,
    },
    /// Shows the users of the list, without their secrets
    List,
}

/// Never the command line: every user of the machine reads it.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct SecretSource {
    /// Reads the password from stdin, up to the first line's end
    #[arg(long)]
    pub(crate) password_stdin: bool,
    /// Reads the password from a file's first line
    #[arg(long, value_name = "FILE")]
    pub(crate) password_file: Option<PathBuf>,
    /// Takes the password from an environment variable
    #[arg(long, value_name = "NAME")]
    pub(crate) password_env: Option<String>,
    /// Makes a password, and prints it once
    #[arg(long)]
    pub(crate) generate: bool,
    /// Reads what stands in pg_authid (SCRAM-SHA-256$…, md5…) from stdin, and writes it as it is
    #[arg(long, conflicts_with_all = ["md5", "run_on"])]
    pub(crate) verifier_stdin: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Config {
    /// Gives a setting a value
    Set {
        /// Its name
        key: String,
        /// Its value
        value: String,
    },
    /// Shows a setting of the file
    Get {
        /// Its name
        key: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Backup {
    /// Copies both files now
    Create,
    /// Shows the copies, the newest first
    List,
    /// Brings a copy back, once it has been looked at; what was there is kept as another
    Restore {
        /// The copy
        file: PathBuf,
    },
    /// Removes copies; the newest of each file stays
    Prune {
        /// Keeps at most so many of each file
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        keep: Option<u32>,
        /// Removes those that are older (7d, 12h)
        #[arg(long, value_name = "AGE", default_value = "7d", value_parser = age)]
        max_age: Duration,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Check {
    /// The PgBouncer that shall take them; default: the one that runs, else the oldest known (1.18)
    #[arg(long, value_name = "VERSION")]
    pub(crate) target_version: Option<Version>,
    /// PostgreSQL's max_connections: fails when the pools may need more
    #[arg(long, value_name = "N")]
    pub(crate) max_connections: Option<u64>,
    /// Connections that others need
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) other: u64,
    /// Users of each database: each has a pool of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) users: u64,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}

/// As [`duration`], with days and hours.
fn age(text: &str) -> Result<Duration, String> {
    for (unit, seconds) in [("d", 86_400), ("h", 3_600)] {
        if let Some(number) = text.strip_suffix(unit) {
            let number: u32 =
                number.parse().map_err(|_| format!("{text:?} is no age: write it as 7d or 12h"))?;
            return Ok(Duration::from_secs(u64::from(number) * seconds));
        }
    }
    duration(text)
}

/// What `--set` was given. Not read by clap, which repeats what it does not take.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some(("password", _)) => Err(
            "a password does not go on the command line: put the user into the user list (pgbctl user add)"
                .to_owned(),
        ),
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("--set: write it as KEY=VALUE".to_owned()),
    }
}
