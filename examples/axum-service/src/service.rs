//! The staged backend's own routes: payments in a database, behind a cache.
//!
//! | route | answer |
//! |---|---|
//! | `POST /payments?amount=5&asset=XLM` | 201 (400 for an amount that is none) and the payment; its webhook is queued, the cache has it |
//! | `GET /payments/{id}` | the payment, from the cache or the database |
//! | `DELETE /payments/{id}` | 204; the cache forgets it |
//! | `GET /export?ms=2000` | 20 lines over that time, each from a query of its own |
//! | `GET /query?ms=2000` | after one query that takes about that long |
//! | `GET /live` | a WebSocket that hears of every ledger |

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::extract::ws::Message;
use axum::extract::{Path, Query, Request, State, WebSocketUpgrade};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use axum_service::resources::{Cache, Database, Schema, now_ms};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use shutdown_core::ShutdownCoordinator;
use sqlx::Row;
use tokio::sync::broadcast::error::RecvError;

use crate::routes::Timing;
use crate::work::{Counters, Live};

/// The tables.
pub(crate) const SCHEMA: Schema = &[
    "CREATE TABLE IF NOT EXISTS payments (id $id, asset TEXT NOT NULL, amount BIGINT NOT NULL, made BIGINT NOT NULL, \
     ledger BIGINT)",
    "CREATE TABLE IF NOT EXISTS webhooks (payment BIGINT PRIMARY KEY, delivered BIGINT)",
    "CREATE TABLE IF NOT EXISTS ledgers (sequence BIGINT PRIMARY KEY, closed BIGINT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS assets (asset TEXT PRIMARY KEY, reserve BIGINT, holders BIGINT)",
    "CREATE TABLE IF NOT EXISTS metrics (name TEXT PRIMARY KEY, value BIGINT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS task_runs (task TEXT NOT NULL, node TEXT NOT NULL, runs BIGINT NOT NULL, \
     began BIGINT NOT NULL, ended BIGINT, PRIMARY KEY (task, node))",
];

/// How long a payment stays in the cache. Also how long one may be read that another instance has deleted in the moment in
/// which it was put there.
const CACHED: Duration = Duration::from_secs(60);
/// The largest payment: many of them can be summed up.
const MOST: i64 = 1_000_000_000;

/// What requests and tasks share.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) shutdown: ShutdownCoordinator,
    /// By what name registry and database know this process.
    pub(crate) node: String,
    pub(crate) database: Database,
    pub(crate) cache: Cache,
    pub(crate) live: Live,
    pub(crate) counters: Counters,
}

/// The routes.
pub(crate) fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/payments", post(pay))
        .route("/payments/{id}", get(payment).delete(forget))
        .route("/export", get(export))
        .route("/query", get(query))
        .route("/live", any(live))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&service), count))
        .with_state(service)
}

/// Counts every answer; metrics sync writes the sum.
async fn count(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    let answer = next.run(request).await;
    service.counters.answered.fetch_add(1, Ordering::Relaxed);
    answer
}

/// What the database did not do, as an answer.
struct Failed(sqlx::Error);

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let Self(error) = self;
        // Not to the client: it may quote the query.
        tracing::warn!(%error, "a query failed");
        (StatusCode::INTERNAL_SERVER_ERROR, "the database did not do it\n").into_response()
    }
}

#[derive(Deserialize)]
struct Order {
    #[serde(default = "Order::one")]
    amount: i64,
    #[serde(default = "Order::xlm")]
    asset: String,
}

impl Order {
    fn one() -> i64 {
        1
    }

    fn xlm() -> String {
        "XLM".to_owned()
    }
}

#[derive(Serialize)]
struct Payment {
    id: i64,
    asset: String,
    amount: i64,
}

impl Payment {
    fn key(id: i64) -> String {
        format!("payment:{id}")
    }

    fn into_cache(self, cache: &Cache) -> Json<Self> {
        let value = serde_json::to_vec(&self).expect("numbers and a text");
        cache.put(Self::key(self.id), value, CACHED);
        Json(self)
    }
}

async fn pay(State(service): State<Arc<Service>>, Query(order): Query<Order>) -> Result<Response, Failed> {
    if !(1..=MOST).contains(&order.amount) {
        return Ok((StatusCode::BAD_REQUEST, format!("amount is 1 to {MOST}\n")).into_response());
    }
    let mut transaction = service.database.begin(service.database.pool()).await?;
    let id = sqlx::query_scalar::<_, i64>(
        "INSERT INTO payments (asset, amount, made) VALUES ($1, $2, $3) RETURNING id",
    )
    .bind(&order.asset)
    .bind(order.amount)
    .bind(now_ms())
    .fetch_one(&mut *transaction)
    .await?;
    sqlx::query("INSERT INTO webhooks (payment) VALUES ($1)").bind(id).execute(&mut *transaction).await?;
    transaction.commit().await?;
    service.counters.payments.fetch_add(1, Ordering::Relaxed);
    let payment = Payment { id, asset: order.asset, amount: order.amount };
    Ok((StatusCode::CREATED, payment.into_cache(&service.cache)).into_response())
}

async fn payment(State(service): State<Arc<Service>>, Path(id): Path<i64>) -> Result<Response, Failed> {
    if let Some(cached) = service.cache.get(&Payment::key(id)).await {
        return Ok(([(header::CONTENT_TYPE, "application/json")], cached).into_response());
    }
    let found = sqlx::query("SELECT asset, amount FROM payments WHERE id = $1")
        .bind(id)
        .fetch_optional(service.database.pool())
        .await?;
    let Some(row) = found else { return Ok(StatusCode::NOT_FOUND.into_response()) };
    let payment = Payment { id, asset: row.try_get("asset")?, amount: row.try_get("amount")? };
    Ok(payment.into_cache(&service.cache).into_response())
}

async fn forget(State(service): State<Arc<Service>>, Path(id): Path<i64>) -> Result<StatusCode, Failed> {
    let deleted =
        sqlx::query("DELETE FROM payments WHERE id = $1").bind(id).execute(service.database.pool()).await?;
    service.cache.invalidate(Payment::key(id));
    Ok(if deleted.rows_affected() > 0 { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND })
}

/// Uses the database to its last line.
async fn export(State(service): State<Arc<Service>>, Query(timing): Query<Timing>) -> Body {
    const LINES: u64 = 20;
    let pause = Duration::from_millis(timing.ms / LINES);
    Body::from_stream(stream::unfold(1, move |line| {
        let service = Arc::clone(&service);
        async move {
            if line > LINES {
                return None;
            }
            tokio::time::sleep(pause).await;
            let payments = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM payments")
                .fetch_one(service.database.pool())
                .await;
            Some((payments.map(|payments| format!("line {line} of {LINES}: {payments}\n")), line + 1))
        }
    }))
}

/// One query that takes its time.
async fn query(State(service): State<Arc<Service>>, Query(timing): Query<Timing>) -> Result<String, Failed> {
    let query = match service.database.url().name() {
        // A server can sleep; SQLite has to count. About a million a second.
        "PostgreSQL" => "SELECT 1 FROM pg_sleep($1 / 1000.0)",
        _ => {
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT $1 * 1000) SELECT max(i) FROM n"
        }
    };
    let ms = i64::try_from(timing.ms).unwrap_or(i64::MAX);
    sqlx::query(query).bind(ms).execute(service.database.pool()).await?;
    Ok(format!("{ms} ms later\n"))
}

/// A WebSocket that hears of every ledger, and of the end.
async fn live(
    State(service): State<Arc<Service>>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, StatusCode> {
    let session = service.shutdown.session_start("GET /live").map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let mut news = service.live.subscribe();
    Ok(shutdown_tower::on_upgrade(upgrade, session, async move |mut socket| {
        let mut listening = true;
        loop {
            tokio::select! {
                heard = socket.recv() => match heard {
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return,
                },
                told = news.recv(), if listening => match told {
                    Ok(text) => if socket.send(Message::Text(text)).await.is_err() { return },
                    // A client that reads too slowly misses some.
                    Err(RecvError::Lagged(_)) => {}
                    // The broadcaster has ended; the socket says goodbye by itself.
                    Err(RecvError::Closed) => listening = false,
                },
            }
        }
    }))
}
