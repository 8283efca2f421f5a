//! What the admin routes show of the circuit breakers.

use serde_json::{Value, json};
use shutdown_core::breaker::{Breakers, State};
use shutdown_tower::admin::Family;
use tokio::time::Instant;

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
