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
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use axum_service::resources::{self, Cache, CacheStage, Database, Registry};
use shutdown_core::{ShutdownCoordinator, Signals, Stage, UsageError, net, start_failure};
use shutdown_tower::admin::Admin;
use shutdown_tower::{Server, ShutdownLayer};
use tokio::net::TcpListener;
use tokio::sync::broadcast;

use crate::service::Service;
use crate::settings::Settings;

#[tokio::main]
async fn main() -> ExitCode {
    let Err(error) = run().await;
    start_failure("axum-service", &*error)
}

/// From nothing to serving, and from there to the report.
///
/// What is vital comes first: without its database the service does not start. Cache and registry connect by themselves.
/// Every resource is handed to the stage that closes it before anything uses it.
async fn run() -> Result<Infallible, Box<dyn Error>> {
    let signals = Signals::claim()?;
    let settings = Settings::load(Path::new(".env"))?;
    tracing_subscriber::fmt().compact().with_target(false).with_writer(std::io::stderr).init();

    let database = Database::open(settings.database, "axum-service", service::SCHEMA).await?;
    let cache = Cache::open(settings.cache, settings.cache_interval);
    let (live, _) = broadcast::channel(64);

    let (closing_database, closing_cache) = (database.clone(), cache.clone());
    let mut builder = ShutdownCoordinator::builder()
        .program("axum-service")
        .signals(signals)
        .config(settings.budgets)
        .stage_task(Stage::Cache, cache.name().to_owned(), |stage| {
            resources::close_cache(closing_cache, stage)
        })
        .stage_task(Stage::Database, database.url().name(), |stage| {
            resources::close_database(closing_database, stage)
        });
    let listener = TcpListener::bind(settings.listen).await?;
    let address = listener.local_addr()?;
    if let Some(url) = settings.registry {
        let node = settings.node_id.unwrap_or_else(|| format!("axum-service-{}", address.port()));
        let registry = Registry::new(url, &node).map_err(UsageError::new)?;
        registry.announce(address.to_string());
        builder = builder.stage_task(Stage::Departure, "registry", |stage| resources::leave(registry, stage));
    }
    if let Some(dir) = settings.reports {
        builder = builder.report_dir(dir);
    }
    let shutdown = builder.install()?;

    let service = Arc::new(Service { shutdown, database, cache, live, counters: Default::default() });
    if let Some(admin) = settings.admin {
        let listener = net::bind(admin)?;
        println!("admin on {}", listener.local_addr()?);
        Admin::new(shutdown).serve(listener)?;
    }
    // Refused only if a stop signal is here already; then the tasks have nothing to do.
    let _ = work::spawn_all(shutdown, &service, settings.interval, settings.work);
    println!("listening on {address}");

    let name =
        |request: &axum::extract::Request| format!("{} {}", request.method(), request.uri().path()).into();
    let app = routes::router(shutdown).merge(service::router(service));
    let app = app.layer(ShutdownLayer::new(shutdown).named(name));
    tokio::spawn(Server::new(shutdown).serve(listener, app));

    shutdown.finished().await.exit()
}
