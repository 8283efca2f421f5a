//! The database, the cache and the registry: closed by their stages, opened after `install`.
//!
//! Their stage tasks are registered in the builder, before there is anything to close: the plan shows them, and nothing that
//! is opened can be forgotten. Each has a slot that is filled when its resource is open; a slot that never was closes at
//! once. Opened before `install`, a database would leave a file behind when a signal came then.
//!
//! | resource | stage | unreachable at start |
//! |---|---|---|
//! | database, for the request log | Database; its task: Background | the proxy does not start |
//! | PgBouncer, before the database | pgbouncer | the proxy does not start |
//! | cache, for answers | Cache | one warning: every read misses |
//! | registry | Departure | one warning: it is tried again |

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use axum_service::host;
use axum_service::resources::{
    Access, Cache, CacheUrl, Database, Entry, Registry, close_cache, close_database, leave, when_open,
};
use serde_json::{Value, json};
use shutdown_core::{Builder, Phase, ShutdownCoordinator, Stage, sentence};
use shutdown_tower::admin::Family;

use crate::Failure;
use crate::request_log::{self, RequestLog};
use crate::response_cache::ResponseCache;
use crate::settings::Settings;

/// Each is filled once, when its resource is open.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resources {
    /// The database's, in a PgBouncer.
    entry: Entry,
    database: Arc<OnceLock<Database>>,
    cache: Arc<OnceLock<Cache>>,
    registry: Arc<OnceLock<Registry>>,
}

/// What requests use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Opened {
    pub(crate) cache: Option<ResponseCache>,
    pub(crate) log: Option<&'static RequestLog>,
    /// The database, without user and password.
    database: String,
}

impl Resources {
    /// Adds the stage tasks of all that is configured.
    pub(crate) fn stage_tasks(&self, mut builder: Builder, settings: &Settings) -> Builder {
        if settings.registry.is_some() {
            builder = builder.stage_task(Stage::Departure, "registry", when_open(&self.registry, leave));
        }
        if let Some(url) = &settings.cache {
            let name = match url {
                CacheUrl::Memory => "in-process cache",
                CacheUrl::Redis(_) => "Redis",
            };
            builder = builder.stage_task(Stage::Cache, name, when_open(&self.cache, close_cache));
        }
        if let Some(url) = &settings.database {
            builder =
                builder.stage_task(Stage::Database, url.name(), when_open(&self.database, close_database));
        }
        if settings.pooler.is_some() {
            builder = self.entry.stage(builder);
        }
        builder
    }

    /// Adds the background task as well, for a plan that is only shown: it is spawned once the database is open.
    pub(crate) fn planned(builder: Builder, settings: &Settings) -> Builder {
        match settings.database {
            Some(_) => builder.stage_task(Stage::Background, REQUEST_LOG, async |_| Ok(())),
            None => builder,
        }
    }

    /// Opens database and cache. Nothing if a shutdown has begun meanwhile: then it is all there is left to do.
    ///
    /// # Errors
    ///
    /// The database cannot be used, or the PgBouncer in front of it.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub(crate) async fn open(
        &self,
        settings: &Settings,
        node_id: &str,
        shutdown: ShutdownCoordinator,
    ) -> Result<Option<Opened>, Failure> {
        let mut opened = Opened::default();
        if let Some(url) = settings.cache.clone() {
            let cache = Cache::open(url, settings.cache_interval);
            opened.cache = Some(ResponseCache::new(cache.clone(), &settings.cluster));
            fill(&self.cache, cache);
        }
        if let Some(url) = settings.database.clone() {
            opened.database = url.to_string();
            let access = Access::new(url, settings.connections);
            let made = Box::pin(self.entry.make(settings.pooler.as_ref(), access, node_id)).await;
            let access = made.map_err(|error| not_opened(&error, "--pgbouncer-config"))?;
            let database = tokio::select! {
                biased;
                () = shutdown.until(Phase::LameDuck) => return Ok(None),
                database = Box::pin(Database::open(access, "edge-proxy", request_log::SCHEMA)) => database,
            };
            let database = database.map_err(|error| not_opened(&error, "--database"))?;
            fill(&self.database, database.clone());
            let (log, writer) = request_log::open(database);
            // Refused only if the stop has come as far as its stage: then there will be no rows.
            let _ = shutdown.spawn(REQUEST_LOG, |told| writer.run(told));
            opened.log = Some(log);
        }
        Ok(Some(opened))
    }

    /// Takes back what no stage has: of a start that has failed, or that a stop came into.
    pub(crate) async fn let_go(&self) {
        self.entry.let_go().await;
    }

    /// Makes this node's entry for the registry, if there is one, before there is anything to stop: a stop that comes before
    /// the announcement forbids it.
    ///
    /// # Errors
    ///
    /// The node's name cannot stand in a path.
    pub(crate) fn enter(&self, settings: &Settings, node_id: &str) -> Result<(), String> {
        if let Some(url) = settings.registry.clone() {
            fill(&self.registry, Registry::new(url, node_id)?);
        }
        Ok(())
    }

    /// Announces this node to the registry, if there is one.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub(crate) fn announce(&self, at: SocketAddr) {
        if let Some(registry) = self.registry.get() {
            registry.announce(host::reached_at(at));
        }
    }
}

/// In the report and the plan.
const REQUEST_LOG: &str = "request log";

fn not_opened(error: &(dyn std::error::Error + 'static), flag: &str) -> Failure {
    Failure::Start(format!("{}: mend that, or choose another with {flag}", sentence(error)))
}

/// Resources are opened by one caller, once.
fn fill<T>(slot: &OnceLock<T>, value: T) {
    let _ = slot.set(value);
}

impl Opened {
    /// For `/status`.
    pub(crate) fn cache_shown(&self) -> Value {
        let Some(cache) = &self.cache else { return Value::Null };
        let statistics = cache.statistics();
        json!({
            "url": cache.url(),
            "hits": statistics.hits,
            "misses": statistics.misses,
            "hit_rate_percent": statistics.hit_rate(),
            "invalidations": statistics.invalidations,
            "pending": cache.pending(),
            "dropped": statistics.dropped,
        })
    }

    /// For `/status`.
    pub(crate) fn database_shown(&self) -> Value {
        let Some(log) = self.log else { return Value::Null };
        json!({
            "url": self.database,
            "rows_written": log.written(),
            "rows_queued": log.queued(),
            "rows_dropped": log.dropped(),
        })
    }

    /// For `/metrics`.
    pub(crate) fn families(&self) -> Vec<Family> {
        let count = |name, help, value: u64| Family::counter(name, help).sample(&[], value as f64);
        let level = |name, help, value: usize| Family::gauge(name, help).sample(&[], value as f64);
        let mut families = Vec::new();
        if let Some(cache) = &self.cache {
            let statistics = cache.statistics();
            families.extend([
                count("edge_proxy_cache_hits_total", "Requests answered from the cache.", statistics.hits),
                count(
                    "edge_proxy_cache_misses_total",
                    "Requests that the cache had no fresh answer for.",
                    statistics.misses,
                ),
                count(
                    "edge_proxy_cache_invalidations_total",
                    "Entries removed because a request has changed what they told.",
                    statistics.invalidations,
                ),
                count(
                    "edge_proxy_cache_dropped_total",
                    "Writes refused because too many were pending.",
                    statistics.dropped,
                ),
                level(
                    "edge_proxy_cache_pending",
                    "Writes that have not landed in the cache.",
                    cache.pending(),
                ),
            ]);
        }
        if let Some(log) = self.log {
            families.extend([
                count(
                    "edge_proxy_request_log_rows_total",
                    "Rows of the request log written to the database.",
                    log.written(),
                ),
                count(
                    "edge_proxy_request_log_dropped_total",
                    "Rows of the request log that were dropped.",
                    log.dropped(),
                ),
                level(
                    "edge_proxy_request_log_queued",
                    "Rows of the request log that wait to be written.",
                    log.queued(),
                ),
            ]);
        }
        families
    }
}
