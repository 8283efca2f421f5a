//! The circuit breakers over restarts, and what the admin routes show of them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use shutdown_core::breaker::{Breakers, Record, State};
use shutdown_core::state::StateSource;
use shutdown_tower::admin::Family;
use tokio::time::Instant;

use crate::upstreams::Upstream;

/// What is older says nothing about an upstream any more.
const MAX_AGE: Duration = Duration::from_secs(600);

/// Keeps them over restarts. What is known of upstreams and peers that are not configured any more is forgotten, and so is
/// what was known of the demo's, whose ports are new with every start.
pub(crate) fn source(breakers: Arc<Breakers>, upstreams: &[Upstream], peers: &[SocketAddr]) -> StateSource {
    let peers = peers.iter().map(|addr| Upstream::from(*addr).to_string());
    let configured: BTreeSet<String> = upstreams.iter().map(ToString::to_string).chain(peers).collect();
    let restored = Arc::clone(&breakers);
    StateSource::new(
        "breakers",
        move || Ok(breakers.export(Instant::now())),
        move |mut records: Vec<Record>, saved| {
            // After a clock that was set back the age is nothing: then what remained, a sleep at most, is kept.
            if saved.age > MAX_AGE {
                tracing::info!(age = ?saved.age, "circuit breakers begin closed: what was saved is too old");
                return Ok(());
            }
            for record in &mut records {
                // As the legacy state names it: without a scheme.
                let url = format!("http://{}", record.peer);
                if configured.contains(&url) {
                    record.peer = url;
                }
            }
            records.retain(|record| configured.contains(&record.peer));
            let count = restored.import(&records, saved.age, Instant::now());
            if count > 0 {
                tracing::info!(count, age = ?saved.age, "circuit breakers restored");
            }
            Ok(())
        },
    )
}

/// For `/status`; nothing if they are off.
pub(crate) fn shown(breakers: Option<&Breakers>) -> Value {
    let now = Instant::now();
    breakers.into_iter().flat_map(|breakers| breakers.snapshot(now)).map(|breaker| json!(breaker)).collect()
}

/// For `/metrics`. One that is removed is gone from all but the total.
pub(crate) fn families(breakers: &Breakers) -> Vec<Family> {
    let mut state = Family::gauge(
        "shutdown_circuit_breaker_state",
        "Where an upstream's circuit breaker stands: 0 closed, 1 open, 2 half-open.",
    );
    let mut changes = Family::counter(
        "shutdown_circuit_breaker_state_changes_total",
        "How often an upstream's circuit breaker has changed to a state.",
    );
    for breaker in breakers.snapshot(Instant::now()) {
        let peer = &*breaker.peer;
        state = state.sample(&[("peer", peer)], breaker.state.gauge().into());
        for to in State::ALL {
            let labels = [("peer", peer), ("state", to.as_str())];
            changes = changes.sample(&labels, breaker.changes(to) as f64);
        }
    }
    let opened =
        Family::counter("shutdown_circuit_breaker_opened_total", "How often any circuit breaker has opened.")
            .sample(&[], breakers.opened_total() as f64);
    vec![state, opened, changes]
}
