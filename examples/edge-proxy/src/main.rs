//! An edge proxy on Pingora that stops well.
//!
//! `edge-proxy --help` lists the flags, `edge-proxy --check` prints the shutdown plan. With no arguments everything
//! is embedded: the proxy, the admin routes, and two demo upstreams.
//!
//! Exit codes: 0 clean; 1 could not start; 2 bad usage or configuration; 10 a stage failed or ran out of time;
//! 11 something was cut at a deadline; 128+n forced by signal n, or signal n before the proxy had started.

mod breakers;
mod demo;
mod edge;
mod flags;
mod peers;
mod reap;
mod request_log;
mod resources;
mod response_cache;
mod settings;
mod targets;
mod unit;
mod upstreams;

use std::fmt;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum_service::stderr::Stderr;
use pingora_core::server::configuration::ServerConf;
use shutdown_core::breaker::Breakers;
use shutdown_core::companions::{ClaimError, ClaimedPidFile, Companions, LaunchError, PidFile};
use shutdown_core::peers::Id;
use shutdown_core::state::{StateError, StateStore};
use shutdown_core::systemd::Systemd;
use shutdown_core::{
    Builder, InstallError, Phase, Plan, Reason, ReportFiles, ShutdownCoordinator, Signals, net, sentence,
};
use shutdown_pingora::Proxy;
use shutdown_tower::admin::Admin;
use tokio::runtime::Runtime;
use tokio::time::Instant;

use crate::edge::Edge;
use crate::flags::{Asked, Flags};
use crate::peers::{Node, Peers};
use crate::resources::{Opened, Resources};
use crate::settings::Settings;
use crate::targets::{MOST_TRIES, Targets};
use crate::unit::Unit;

/// How long launched companions are waited for, before the database is opened, which may be one of them.
const COMPANIONS_READY: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    // First: until the coordinator stands, a stop signal leaves at once with 128+n and has nothing to clean up.
    let started = match Signals::claim() {
        Ok(signals) => run(signals),
        Err(error) => Err(Failure::start("stop signals cannot be handled", error)),
    };
    match started {
        Ok(code) => code,
        Err(failure) => {
            // Nobody to tell when stderr is gone; the code still does.
            let _ = writeln!(std::io::stderr(), "edge-proxy: error: {failure}");
            failure.code()
        }
    }
}

/// From nothing to serving, and from there to the report.
///
/// The order is the point. Everything that can be wrong without touching the outside is checked first and exits
/// with 2. Then the sockets, systemd's or our own: an address in use exits with 1. Then the coordinator, and only with it
/// the data directory and the state in it, and then the database, which may be there:
///
/// ```text
///           TERM here: 143, nothing touched │ TERM here: the whole shutdown, and its report
///   check ─ bind ─────────── install: state ─ companions ─ database ─ admin ─ proxy ─ registry, peers ─ ready
/// ```
///
/// Were the state opened before `install`, a signal between the two would leave a directory behind. `install` opens it
/// as its last step, when a signal is already the whole shutdown; its last stage waits for the opening.
fn run(signals: Signals) -> Result<ExitCode, Failure> {
    let flags = match flags::parse(std::env::args_os())? {
        Asked::Flags(flags) => flags,
        Asked::Text(text) => return Ok(print(&text)),
    };
    let check = flags.check;
    let unit = unit(&flags)?;
    let settings = settings(&flags, unit.as_ref())?;
    let resources = Resources::default();
    let port = settings.listen.port();
    let peers = Peers::new(&settings, &settings.node_id(port));
    let planned = coordinator(&settings, port, None, &resources, &peers);
    let plan =
        Resources::planned(planned, &settings).plan().map_err(|error| Failure::Usage(error.to_string()))?;
    if check {
        return Ok(print(&effective(&settings, &plan, unit.as_ref(), &flags)?));
    }
    log_to_stderr()?;

    // Before any thread. What systemd holds for us is taken in place of what the flags would have us bind.
    let mut systemd = Systemd::from_env().map_err(|error| Failure::Usage(sentence(&error)))?;
    let (traffic, admin) = listeners(&mut systemd, &settings)?;
    let (at, admin_at) = (addr(&traffic)?, addr(&admin)?);
    settings.neighbours.check(at).map_err(Failure::Usage)?;
    let notices = settings.neighbours.notices.as_ref();
    let heard = notices.map(|notices| peers::listen(notices, at)).transpose()?;
    let node_id = settings.node_id(at.port());
    let peers = Peers::new(&settings, &node_id);
    peers.check(&node_id, &settings.cluster, at)?;
    let runtime = Runtime::new().map_err(|error| Failure::start("no runtime", error))?;

    resources.enter(&settings, &node_id).map_err(Failure::Usage)?;

    let breakers = settings.breaker.map(|config| Arc::new(Breakers::new(config, Instant::now())));
    let shutdown = coordinator(&settings, at.port(), breakers.as_ref(), &resources, &peers)
        .signals(signals)
        .runtime(runtime.handle().clone())
        .install()
        .map_err(not_installed)?;
    let companions = &settings.companions.all;
    // To the end of the process: never dropped.
    let _own = settings.pid_file.clone().map(own_pid_file).transpose()?;
    if settings.reap {
        reap::start(shutdown, companions)
            .map_err(|error| Failure::start("--reap cannot hear of orphans", error))?;
    }

    // Before the database, which may be one of them.
    launch(&runtime, shutdown, companions)?;

    let stop = |failure| stopped(&runtime, shutdown, companions, &resources, failure);
    let all = match settings.upstreams.clone() {
        given if !given.is_empty() => given,
        _ => runtime.block_on(demo::start()).map_err(|error| stop(Failure::start("no demo", error)))?,
    };
    let targets = Arc::new(Targets::new(all, breakers.clone(), settings.when_all_open));
    let opening = resources.open(&settings, &node_id, shutdown);
    let opened = match runtime.block_on(opening) {
        Ok(Some(opened)) => opened,
        Err(failure) if !shutdown.is_shutting_down() => return Err(stop(failure)),
        // A stop that has begun while it was opened.
        begun => {
            if let Err(failure) = begun {
                tracing::warn!("{failure}");
            }
            let report = shutdown.wait();
            runtime.block_on(resources.let_go());
            report.exit()
        }
    };
    peers.route(&targets);
    let shown = Shown { targets: &targets, breakers: breakers.as_ref(), opened: &opened, peers: &peers };
    serve_admin(admin, &settings, shutdown, &shown, &node_id).map_err(stop)?;
    serve_traffic(&runtime, traffic, shutdown, Edge::new(Arc::clone(&targets), opened, Id::of(&node_id)));
    let entered = runtime.enter();
    resources.announce(at);
    drop(entered);
    let heard_at = heard.as_ref().and_then(|socket| socket.local_addr().ok());
    let node = Node { id: &node_id, cluster: &settings.cluster, at, shutdown, targets: &targets };
    // It serves already: what fails now is a reason to stop, and nothing is lost.
    if let Err(failure) = peers.start(heard, &node) {
        let (task, error) = ("neighbours".to_owned(), failure.to_string());
        shutdown.initiate_shutdown(Reason::CriticalTask { task, error });
    }

    let neighbours = heard_at.map(|heard_at| (heard_at, peers.listed()));
    print(&what_to_try(shutdown, &settings, at, admin_at, &node_id, &targets, neighbours));
    tracing::info!(listen = %at, admin = %admin_at, node_id, cluster = settings.cluster, "ready");
    systemd.ready(shutdown, format_args!("serving http://{at}, admin http://{admin_at}"));

    // Not from here: the runtime lives until the process ends.
    shutdown.wait().exit()
}

/// What is to be checked beside the plan.
fn unit(flags: &Flags) -> Result<Option<Unit>, Failure> {
    let Some(path) = &flags.unit else { return Ok(None) };
    if !flags.check {
        return Err(Failure::Usage("--unit goes with --check: it is looked at, not used".to_owned()));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::Usage(format!("the unit file {path} (--unit) cannot be read: {error}")))?;
    Unit::parse(&text).map(Some).map_err(|error| Failure::Usage(format!("{path}: {error}")))
}

/// With what a unit that is checked would set: it goes before the environment of who asks.
fn settings(flags: &Flags, unit: Option<&Unit>) -> Result<Settings, Failure> {
    let environment = |name: &str| match unit.and_then(|unit| unit.variable(name)) {
        Some(set) => Some(set.into()),
        None => std::env::var_os(name),
    };
    Settings::load(flags, &environment, std::path::Path::new(".env")).map_err(Failure::Usage)
}

/// What a shutdown of this program does, before it is installed.
fn coordinator(
    settings: &Settings,
    port: u16,
    breakers: Option<&Arc<Breakers>>,
    resources: &Resources,
    peers: &Peers,
) -> Builder {
    let mut state = StateStore::in_dir(&settings.data_dir)
        .node_id(settings.node_id(port))
        .interval(settings.state_interval);
    if let Some(breakers) = breakers {
        let configured = &settings.neighbours.peers;
        state = state.source(breakers::source(Arc::clone(breakers), &settings.upstreams, configured));
    }
    if let Some(known) = peers.source() {
        state = state.source(known);
    }
    let builder = ShutdownCoordinator::builder()
        .program("edge-proxy")
        .config(settings.budgets.clone())
        .report_dir(settings.data_dir.clone())
        .companions(&settings.companions.all)
        .state(state);
    peers.stage_tasks(resources.stage_tasks(builder, settings))
}

/// This process's PID file, locked as long as it is held.
fn own_pid_file(path: PathBuf) -> Result<ClaimedPidFile, Failure> {
    PidFile::claim(path).map_err(|error| {
        let fix = match error {
            ClaimError::Held { .. } => "end it, or choose another with --pid-file",
            _ => "mend that, or choose another with --pid-file",
        };
        Failure::Start(format!("{}: {fix}", sentence(&error)))
    })
}

/// Starts the companions that are to be launched, waits a while for them, and says what could not be ended as things are.
fn launch(runtime: &Runtime, shutdown: ShutdownCoordinator, companions: &Companions) -> Result<(), Failure> {
    companions.launch(shutdown).map_err(|error| not_launched(&error))?;
    let ready = async {
        tokio::select! {
            late = companions.ready(COMPANIONS_READY) => late,
            () = shutdown.until(Phase::LameDuck) => Vec::new(),
        }
    };
    for companion in runtime.block_on(ready) {
        tracing::warn!(
            companion,
            "a launched companion is not ready: its PID file names no process that is called so; going on without waiting"
        );
    }
    for (companion, problem) in runtime.block_on(companions.warnings()) {
        tracing::warn!(companion, "a companion that could not be ended as things are: {problem}");
    }
    Ok(())
}

/// What has been launched is ended as in every stop, when the start fails after it: a database is not killed because another one
/// cannot be reached.
fn stopped(
    runtime: &Runtime,
    shutdown: ShutdownCoordinator,
    companions: &Companions,
    resources: &Resources,
    failure: Failure,
) -> Failure {
    if companions.status().iter().any(|companion| companion.launched) {
        let (task, error) = ("start".to_owned(), failure.to_string());
        shutdown.initiate_shutdown(Reason::CriticalTask { task, error });
        shutdown.wait();
    }
    runtime.block_on(resources.let_go());
    failure
}

fn not_launched(error: &LaunchError) -> Failure {
    Failure::Start(format!("{} (--companion)", sentence(error)))
}

fn not_installed(error: InstallError) -> Failure {
    match error {
        InstallError::Plan(error) => Failure::Usage(error.to_string()),
        InstallError::State(StateError::Held { place, by }) => {
            Failure::Start(format!("{place} is in use by {by}: end it, or choose another with --data-dir"))
        }
        InstallError::State(error) => {
            Failure::Start(format!("{}: mend that, or choose another with --data-dir", sentence(&error)))
        }
        error => Failure::start("the shutdown coordinator cannot be installed", error),
    }
}

/// Where clients connect, and where the admin routes answer: what systemd holds, else what is bound now.
fn listeners(systemd: &mut Systemd, settings: &Settings) -> Result<(TcpListener, TcpListener), Failure> {
    let admin = systemd.listener_named("admin");
    let traffic = systemd.next_listener();
    let admin = admin.or_else(|| systemd.next_listener());
    if systemd.listeners() > 0 {
        let text = "more than two sockets are handed over (LISTEN_FDS): give one for traffic and one for the admin routes";
        return Err(Failure::Usage(text.to_owned()));
    }
    let traffic = inherit_or_bind("--listen", traffic, settings.listen)?;
    let admin = inherit_or_bind("--admin", admin, settings.admin)?;
    settings.check_admin(addr(&admin)?).map_err(Failure::Usage)?;
    Ok((traffic, admin))
}

fn inherit_or_bind(
    flag: &str,
    inherited: Option<TcpListener>,
    given: SocketAddr,
) -> Result<TcpListener, Failure> {
    let Some(listener) = inherited else { return bind(flag, given) };
    tracing::info!(listen = %addr(&listener)?, "taken over from systemd: {flag} is not used");
    Ok(listener)
}

fn bind(flag: &str, addr: SocketAddr) -> Result<TcpListener, Failure> {
    net::bind(addr).map_err(|error| {
        let fix = match error.kind() {
            std::io::ErrorKind::AddrInUse => format!(": choose another with {flag}"),
            _ => format!(" ({flag})"),
        };
        Failure::Start(format!("cannot listen on {addr}: {error}{fix}"))
    })
}

fn addr(listener: &TcpListener) -> Result<SocketAddr, Failure> {
    listener.local_addr().map_err(|error| Failure::start("a listener without an address", error))
}

/// What the admin routes show.
struct Shown<'a> {
    targets: &'a Arc<Targets>,
    breakers: Option<&'a Arc<Breakers>>,
    opened: &'a Opened,
    peers: &'a Peers,
}

/// On the coordinator's own runtime: it answers until the process ends, and is never counted.
fn serve_admin(
    listener: TcpListener,
    settings: &Settings,
    shutdown: ShutdownCoordinator,
    shown: &Shown<'_>,
    node_id: &str,
) -> Result<(), Failure> {
    let Shown { targets, breakers, opened, peers } = *shown;
    let targets = Arc::clone(targets);
    let (cache, database, resources) = (opened.clone(), opened.clone(), opened.clone());
    let (node_id, cluster) = (node_id.to_owned(), settings.cluster.clone());
    let (seen, measured) = (breakers.cloned(), breakers.cloned());
    let (known, notices, mdns, counted) = (peers.clone(), peers.clone(), peers.clone(), peers.clone());
    let companions = settings.companions.all.clone();
    Admin::new(shutdown)
        .extra("breakers", move || breakers::shown(seen.as_deref()))
        .metrics(move || measured.as_deref().map(breakers::families).unwrap_or_default())
        .extra("cache", move || cache.cache_shown())
        .extra("database", move || database.database_shown())
        .metrics(move || resources.families())
        .token(settings.admin_token.clone())
        .last_shutdown(ReportFiles::new(&settings.data_dir).last())
        .extra("node_id", move || node_id.clone().into())
        .extra("cluster", move || cluster.clone().into())
        .extra("upstreams", move || targets.shown())
        .extra("peers", move || known.peers_shown())
        .extra("notices", move || notices.notices_shown())
        .extra("mdns", move || mdns.mdns_shown())
        .extra("companions", move || serde_json::to_value(companions.status()).unwrap_or_default())
        .metrics(move || counted.families())
        .serve(listener)
        .map(drop)
        .map_err(|error| Failure::start("the admin routes cannot be served", error))
}

fn serve_traffic(runtime: &Runtime, listener: TcpListener, shutdown: ShutdownCoordinator, edge: Edge) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    // One try for each target, beside Pingora's own for pooled connections that turned out to be closed.
    let max_retries = MOST_TRIES + ServerConf::default().max_retries;
    let conf = Arc::new(ServerConf { threads: cores, max_retries, ..ServerConf::default() });
    let serving = Proxy::new(edge, shutdown).conf(conf).serve(listener);
    // It ends by itself when Draining begins. Without it there is no service: its failure is a reason to stop.
    runtime.spawn(async move {
        if let Err(error) = serving.await {
            let (task, error) = ("accept loop".to_owned(), error.to_string());
            shutdown.initiate_shutdown(Reason::CriticalTask { task, error });
        }
    });
}

fn log_to_stderr() -> Result<(), Failure> {
    use tracing_subscriber::EnvFilter;
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => EnvFilter::try_new(&text)
            .map_err(|error| Failure::Usage(format!("RUST_LOG={text:?} is no log filter: {error}")))?,
        _ => EnvFilter::new("info"),
    };
    tracing_subscriber::fmt()
        .compact()
        .with_env_filter(filter)
        .with_writer(|| Stderr)
        .try_init()
        .map_err(|error| Failure::Start(format!("logging cannot be set up: {error}")))
}

/// `--check`: the configuration and the plan as they would be.
fn effective(
    settings: &Settings,
    plan: &Plan,
    unit: Option<&Unit>,
    flags: &Flags,
) -> Result<String, Failure> {
    let late = settings.budgets.grace_period.filter(|grace| *grace < plan.total).map_or("", |_| {
        "warning: SHUTDOWN_GRACE_PERIOD is below the total: the platform kills before the shutdown may end\n"
    });
    let mut text = format!("{settings}\n{plan}\n{late}");
    if let (Some(unit), Some(path)) = (unit, &flags.unit) {
        let checked = unit.check(plan.total).map_err(|error| Failure::Usage(format!("{path}: {error}")))?;
        text += &format!("unit {path}\n{checked}");
    }
    Ok(text)
}

fn what_to_try(
    shutdown: ShutdownCoordinator,
    settings: &Settings,
    at: SocketAddr,
    admin: SocketAddr,
    node_id: &str,
    targets: &Targets,
    neighbours: Option<(SocketAddr, String)>,
) -> String {
    let pid = std::process::id();
    let kind = if settings.upstreams.is_empty() { "built-in demo" } else { "given" };
    let report = ReportFiles::new(&settings.data_dir).last();
    let state = shutdown.state_store().ok().and_then(StateStore::loaded);
    let state = state.map_or_else(String::new, ToString::to_string);
    let neighbours = neighbours.map_or_else(String::new, |(heard_at, peers)| {
        let peers = if peers.is_empty() { String::new() } else { format!("  peers      {peers}\n") };
        format!("{peers}  notices    heard on {heard_at} (UDP)\n")
    });
    let mut text = format!(
        "edge-proxy {} as {node_id}, pid {pid}\n\
         \x20 traffic    http://{at}\n\
         \x20 admin      http://{admin}\n\
         \x20 upstreams  {targets} ({kind})\n\
         {neighbours}\
         \x20 state      {state}\n\
         \x20 database   {}\n\
         \x20 cache      {}\n\
         \nTry:\n",
        env!("CARGO_PKG_VERSION"),
        settings::shown(&settings.database),
        settings::shown(&settings.cache),
    );
    if settings.upstreams.is_empty() {
        text += &format!("  curl -N 'http://{at}/stream?ms=5000&chunks=10'\n");
        text += &format!(
            "  curl -i 'http://{at}/cached?seconds=60'   # twice: the second comes out of the cache\n"
        );
    }
    text += &format!(
        "  curl http://{at}/\n\
         \x20 curl http://{admin}/status\n\
         \x20 kill -TERM {pid}      # stops well; what happened is in {}\n\n",
        report.display()
    );
    text
}

fn print(text: &str) -> ExitCode {
    // A closed stdout is no reason not to serve.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// Why the proxy did not start, as one sentence.
#[derive(Debug)]
enum Failure {
    /// The caller's mistake: exit code 2.
    Usage(String),
    /// The machine's: exit code 1.
    Start(String),
}

impl Failure {
    fn start(what: impl fmt::Display, error: impl std::error::Error + 'static) -> Self {
        Self::Start(format!("{what}: {}", sentence(&error)))
    }

    fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Usage(_) => 2,
            Self::Start(_) => 1,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(text) | Self::Start(text) => f.write_str(text),
        }
    }
}
