//! The command line, and its mistakes in one sentence.

#![allow(rustdoc::invalid_html_tags, reason = "these comments are the help text, printed as they are")]

use std::ffi::OsString;

use clap::Parser;
use clap::error::ErrorKind;

use crate::Failure;

/// An edge proxy that stops well.
///
/// Each flag but --check and --unit is also EDGE_PROXY_<FLAG> in the environment or in .env (several upstreams, peers or interfaces
/// separated by commas, several companions by semicolons) and, but for --config, a key of the configuration file. A flag goes before the environment, that before .env, that before the file.
/// The budgets of the shutdown are SHUTDOWN_* variables, lower-case keys in the file; --check shows them.
#[derive(Debug, Default, Parser)]
#[command(name = "edge-proxy", version)]
pub(crate) struct Flags {
    /// TOML with the same names
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<String>,
    /// Where clients connect; a socket that systemd hands over (LISTEN_FDS) is taken in its place, the first that is not
    /// named admin [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<String>,
    /// Where the admin routes answer; a socket that systemd hands over is taken in its place, the one named admin
    /// (FileDescriptorName=), else the second [default: 127.0.0.1:8081]
    #[arg(long, value_name = "ADDR")]
    pub(crate) admin: Option<String>,
    /// Where requests go, as http://host:port; repeat it for several [default: a built-in demo]
    #[arg(long, value_name = "URL")]
    pub(crate) upstream: Vec<String>,
    /// When an upstream is left alone, as percent=50,volume=20,sleep=5s,probes=3,window=10s, or some of it; or off:
    /// when half of at least 20 requests of the last 10 s have failed, for 5 s; then 3 at a time ask whether it is well
    /// again. A failure is no connection, no answer (a client that has waited for 10 s
    /// leaves), or a 5xx [default: as written here]
    #[arg(long, value_name = "SPEC")]
    pub(crate) breaker: Option<String>,
    /// What becomes of a request when every upstream is left alone: refuse (503 with Retry-After); try (the next one in
    /// turn) [default: refuse]
    #[arg(long, value_name = "POLICY")]
    pub(crate) when_all_open: Option<String>,
    /// Where state and reports are kept; made if missing [default: ./edge-proxy-data]
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<String>,
    /// How often the state is saved; 0: only when it stops [default: 60s]
    #[arg(long, value_name = "TIME")]
    pub(crate) state_interval: Option<String>,
    /// Where every request is written down, as sqlite:PATH or postgres://user:password@host/name; or off. Without it the
    /// proxy does not start [default: SQLite, edge-proxy.db in the data directory]
    #[arg(long, value_name = "URL")]
    pub(crate) database: Option<String>,
    /// How many connections there are to the database at most: for requests' rows and tasks [default: 16; with a PgBouncer 4]
    #[arg(long, value_name = "N")]
    pub(crate) database_connections: Option<String>,
    /// The configuration of a PgBouncer to reach the database through: the proxy has a database of its own there while it
    /// runs; --database stays the server itself. One that is launched (--companion) needs its pidfile=, to be waited for
    /// [default: none]
    #[arg(long, value_name = "FILE")]
    pub(crate) pgbouncer_config: Option<String>,
    /// How that database is called [default: the node's name, what is no part of a name replaced by _]
    #[arg(long, value_name = "NAME")]
    pub(crate) pgbouncer_database: Option<String>,
    /// Where answers are kept that HTTP allows to keep, as memory: or redis://host:6379; or off. A cache that cannot be
    /// reached is done without [default: memory:]
    #[arg(long, value_name = "URL")]
    pub(crate) cache: Option<String>,
    /// How long a write to the cache may wait for others [default: 100ms]
    #[arg(long, value_name = "TIME")]
    pub(crate) cache_interval: Option<String>,
    /// A registry to announce this node to, and to leave, as http://host:port/path [default: none]
    #[arg(long, value_name = "URL")]
    pub(crate) registry: Option<String>,
    /// A neighbour, as IP:port, where it serves and hears notices; repeat it for several. Requests go there as well, until it
    /// says that it leaves; and it is told when this node does [default: none]
    #[arg(long, value_name = "ADDR")]
    pub(crate) peer: Vec<String>,
    /// Where notices of peers are heard, over UDP [default: where clients connect, if there is a --peer; else nowhere]
    #[arg(long, value_name = "ADDR")]
    pub(crate) notice_listen: Option<String>,
    /// The cluster's keys, a line each, as key_id:hex: the first signs notices, all of them verify (openssl rand -hex 32 makes
    /// one)
    #[arg(long, value_name = "FILE")]
    pub(crate) notice_key_file: Option<String>,
    /// Notices without a key, which anybody can forge: for tests. In the environment and in the file: true or false
    #[arg(long)]
    pub(crate) notice_insecure: bool,
    /// A network interface to announce this node on and to find others, by mDNS; repeat it for several [default: none]
    #[arg(long, value_name = "IFACE")]
    pub(crate) mdns: Vec<String>,
    /// As what, there [default: _edge._tcp.local.]
    #[arg(long, value_name = "TYPE")]
    pub(crate) service_type: Option<String>,
    /// This node's name [default: <host name>-<listen port>]
    #[arg(long, value_name = "NAME")]
    pub(crate) node_id: Option<String>,
    /// The cluster's name [default: default]
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: Option<String>,
    /// What is still served once readiness is red: all; read-only (safe methods); gradual (all, and a growing share is
    /// asked to leave) [default: all]
    #[arg(long, value_name = "POLICY")]
    pub(crate) lame_duck_policy: Option<String>,
    /// A process that ends with the proxy, as name=pgbouncer,pidfile=PATH,stop=INT:6s/TERM:2s/KILL:1s; repeat it for several.
    /// name: what the process is called. Found by pidfile=PATH (kind=plain, locked or postmaster), or else by find=name, or
    /// launched: launch=COMMAND (on-exit=restart or fatal). Ended by the signals of stop=, each given its time; group=N: those
    /// of the lowest first. pgbouncer, postgres, redis-server, valkey-server and local_proxy are known: kind, stop and group need not be
    /// given [default: none]
    #[arg(long, value_name = "SPEC")]
    pub(crate) companion: Vec<String>,
    /// Where this process writes its number, and keeps the file locked: for who wants to end it [default: none]
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<String>,
    /// The bearer token for POST /terminate; required if --admin is not loopback
    #[arg(long, value_name = "FILE")]
    pub(crate) admin_token_file: Option<String>,
    /// Take the exit status of orphans, as process 1 of a container has to when there is no init in it; elsewhere it does
    /// nothing. In the environment and in the file: true or false
    #[arg(long)]
    pub(crate) reap: bool,
    /// Print the effective configuration and shutdown plan, and exit
    #[arg(long)]
    pub(crate) check: bool,
    /// With --check: also look whether this systemd unit leaves the shutdown the time it takes. What its Environment=
    /// sets of SHUTDOWN_* is taken; drop-ins, EnvironmentFile= and the flags of ExecStart= are not read (systemctl cat prints a unit
    /// with its drop-ins)
    #[arg(long, value_name = "FILE")]
    pub(crate) unit: Option<String>,
}

impl Flags {
    /// What was given for the flag of this name; empty if nothing was.
    pub(crate) fn given(&self, flag: &str) -> Vec<String> {
        let one = match flag {
            "upstream" => return self.upstream.clone(),
            "peer" => return self.peer.clone(),
            "mdns" => return self.mdns.clone(),
            "companion" => return self.companion.clone(),
            "notice-insecure" => {
                return self.notice_insecure.then(|| "true".to_owned()).into_iter().collect();
            }
            "reap" => return self.reap.then(|| "true".to_owned()).into_iter().collect(),
            "config" => &self.config,
            "listen" => &self.listen,
            "admin" => &self.admin,
            "breaker" => &self.breaker,
            "when-all-open" => &self.when_all_open,
            "data-dir" => &self.data_dir,
            "state-interval" => &self.state_interval,
            "database" => &self.database,
            "database-connections" => &self.database_connections,
            "pgbouncer-config" => &self.pgbouncer_config,
            "pgbouncer-database" => &self.pgbouncer_database,
            "cache" => &self.cache,
            "cache-interval" => &self.cache_interval,
            "registry" => &self.registry,
            "notice-listen" => &self.notice_listen,
            "notice-key-file" => &self.notice_key_file,
            "service-type" => &self.service_type,
            "node-id" => &self.node_id,
            "cluster" => &self.cluster,
            "lame-duck-policy" => &self.lame_duck_policy,
            "pid-file" => &self.pid_file,
            "admin-token-file" => &self.admin_token_file,
            _ => return Vec::new(),
        };
        one.clone().into_iter().collect()
    }
}

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Asked {
    /// To run, or to check.
    Flags(Box<Flags>),
    /// To print this and exit.
    Text(String),
}

/// Reads the command line.
///
/// # Errors
///
/// A flag that is unknown, given twice or without its value; in one sentence.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Asked, Failure> {
    let error = match Flags::try_parse_from(args) {
        Ok(flags) => return Ok(Asked::Flags(Box::new(flags))),
        Err(error) => error,
    };
    let text = error.render().to_string();
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return Ok(Asked::Text(text));
    }
    // clap explains over several lines; the first says what is wrong.
    let first = text.lines().next().unwrap_or_default();
    Err(Failure::Usage(format!("{}; see --help", first.trim_start_matches("error: "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(args: &[&str]) -> Result<Asked, Failure> {
        parse(std::iter::once("edge-proxy").chain(args.iter().copied()).map(OsString::from))
    }

    #[test]
    fn a_wrong_flag_is_one_sentence_that_names_it() {
        for args in
            [&["--frobnicate", "lo"][..], &["--listen"], &["--listen", "a", "--listen", "b"], &["stray"]]
        {
            let text = asked(args).unwrap_err().to_string();
            assert_eq!(text.lines().count(), 1, "{text}");
            assert!(text.contains(args[0]) && text.ends_with("see --help"), "{text}");
        }
    }

    #[test]
    fn help_and_version_are_no_mistakes() {
        assert!(matches!(asked(&["--help"]), Ok(Asked::Text(text)) if text.contains("--data-dir")));
        assert!(matches!(asked(&["--version"]), Ok(Asked::Text(text)) if text.starts_with("edge-proxy ")));
    }

    #[test]
    fn every_flag_can_be_looked_up_by_its_name() {
        for flag in crate::settings::FLAGS {
            let Ok(Asked::Flags(flags)) = asked(&[&format!("--{flag}"), "value"]) else { panic!("{flag}") };
            assert_eq!(flags.given(flag), ["value"]);
        }
        for switch in crate::settings::SWITCHES {
            let Ok(Asked::Flags(flags)) = asked(&[&format!("--{switch}")]) else { panic!("{switch}") };
            assert_eq!(flags.given(switch), ["true"]);
            assert_eq!(Flags::default().given(switch), [""; 0]);
        }
    }
}
