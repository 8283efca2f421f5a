//! A backend that stops well: requests, six background tasks, WebSockets, a cache, a database.
//!
//! ```text
//! cargo run -p axum-service          # SQLite in ./axum-service.db, a cache in the process
//! curl -X POST '127.0.0.1:3000/payments?amount=5'; curl -N '127.0.0.1:3000/export?ms=5000' & kill -TERM <pid>
//! ```
//!
//! `settings.rs` lists the variables; `.env` is read. Exit codes: those of every program here; 1 if the database cannot be
//! reached at the start, 2 if a setting is wrong.

mod routes;
mod service;
mod settings;
mod work;

use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use axum_service::resources::{self, Access, Cache, CacheStage, Database, Entry, Registry};
use axum_service::stderr::Stderr;
use shutdown_core::systemd::Systemd;
use shutdown_core::{
    Phase, ReportFiles, ShutdownCoordinator, ShutdownReport, Signals, Stage, UsageError, net, sentence,
    start_failure,
};
use shutdown_tower::admin::Admin;
use shutdown_tower::{Server, ShutdownLayer};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::broadcast;

use crate::service::Service;
use crate::settings::Settings;

fn main() -> ExitCode {
    let Err(error) = start();
    start_failure("axum-service", &*error)
}

/// What comes before the first thread: the signals, what systemd has given, the settings.
fn start() -> Result<Infallible, Box<dyn Error>> {
    if let Some(argument) = std::env::args_os().nth(1) {
        let why = "there are no arguments: set environment variables, or .env; src/settings.rs lists them";
        return Err(UsageError::new(format!("{}: {why}", argument.display())).into());
    }
    let signals = Signals::claim()?;
    let systemd = Systemd::from_env().map_err(|error| UsageError::new(sentence(&error)))?;
    let settings = Settings::load(Path::new(".env"))?;
    tracing_subscriber::fmt().compact().with_target(false).with_writer(|| Stderr).init();
    Runtime::new()?.block_on(run(signals, systemd, settings))
}

/// Serves; a start that fails, or that a stop comes into, leaves no entry in a pooler.
async fn run(signals: Signals, systemd: Systemd, settings: Settings) -> Result<Infallible, Box<dyn Error>> {
    let entry = Entry::default();
    let report = serve(signals, systemd, settings, &entry).await;
    entry.let_go().await;
    report?.exit()
}

/// From nothing to serving, and from there to the report.
///
/// What is vital comes first: without its database the service does not start. Cache and registry connect by themselves.
/// Every resource is handed to the stage that closes it before anything uses it; the registry hears last that we serve.
async fn serve(
    signals: Signals,
    mut systemd: Systemd,
    settings: Settings,
    entry: &Entry,
) -> Result<Arc<ShutdownReport>, Box<dyn Error>> {
    let listener = match systemd.next_listener() {
        Some(inherited) => inherited,
        None => net::bind(settings.listen)?,
    };
    let listener = TcpListener::from_std(listener)?;
    let address = listener.local_addr()?;
    let (node, advertised) = (settings.node(address.port()), settings.advertised(address));

    let cache = Cache::open(settings.cache, settings.cache_interval);
    let registry =
        settings.registry.map(|url| Registry::new(url, &node)).transpose().map_err(UsageError::new)?;

    let (opened, closing_cache) = (Arc::<OnceLock<Database>>::default(), cache.clone());
    let mut builder = ShutdownCoordinator::builder()
        .program("axum-service")
        .signals(signals)
        .config(settings.budgets)
        .stage_task(Stage::Cache, cache.name().to_owned(), |stage| {
            resources::close_cache(closing_cache, stage)
        })
        .stage_task(
            Stage::Database,
            settings.database.name(),
            resources::when_open(&opened, resources::close_database),
        );
    if settings.pooler.is_some() {
        builder = entry.stage(builder);
    }
    if let Some(registry) = registry.clone() {
        builder = builder.stage_task(Stage::Departure, "registry", |stage| resources::leave(registry, stage));
    }
    let mut last = None;
    if let Some(dir) = settings.reports {
        last = ReportFiles::new(&dir).last().into();
        builder = builder.report_dir(dir);
    }
    let shutdown = builder.install()?;

    // A stop from here on is a whole shutdown: its stages let go of what there is by then.
    let access = Access::new(settings.database, settings.connections);
    let opening = async {
        let access = entry.make(settings.pooler.as_ref(), access, &node).await?;
        Ok::<_, Box<dyn Error>>(tokio::select! {
            biased;
            () = shutdown.until(Phase::LameDuck) => None,
            database = Database::open(access, "axum-service", service::SCHEMA) => Some(database?),
        })
    };
    let database = match opening.await {
        Ok(Some(database)) => database,
        Err(error) if !shutdown.is_shutting_down() => return Err(error),
        // A stop that has begun meanwhile.
        Ok(None) => return Ok(shutdown.finished().await),
        Err(error) => {
            tracing::warn!("{}", sentence(&*error));
            return Ok(shutdown.finished().await);
        }
    };
    let _ = opened.set(database.clone());

    if let Some(admin) = settings.admin {
        let listener = net::bind(admin)?;
        say(format_args!("admin on {}", listener.local_addr()?));
        let mut admin = Admin::new(shutdown).token(settings.admin_token.map(|token| token.0));
        if let Some(last) = last {
            admin = admin.last_shutdown(last);
        }
        admin.serve(listener)?;
    }
    let (live, _) = broadcast::channel(64);
    let counters = Default::default();
    let service = Arc::new(Service { shutdown, node, database, cache, live, counters });
    // Refused only if a stop signal is here already; then the tasks have nothing to do.
    let _ = work::spawn_all(shutdown, &service, settings.interval, settings.work);

    let name =
        |request: &axum::extract::Request| format!("{} {}", request.method(), request.uri().path()).into();
    let app = routes::router(shutdown).merge(service::router(service));
    let app = app.layer(ShutdownLayer::new(shutdown).named(name));
    tokio::spawn(Server::new(shutdown).serve(listener, app));
    say(format_args!("listening on {address} (pid {})", std::process::id()));
    if let Some(registry) = registry {
        registry.announce(advertised);
    }
    systemd.ready(shutdown, format_args!("serving on {address}"));

    Ok(shutdown.finished().await)
}

/// A closed stdout is no reason not to serve.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stdout(), "{line}");
}
