//! `/metrics` in Prometheus' text format, rendered from one snapshot.
//!
//! A dying process is rarely scraped, so the previous run's report is exported by the next one as
//! `last_shutdown_*`.

use std::fmt::Write;

use shutdown_core::{Phase, ShutdownReport, Snapshot};

/// The page.
pub(super) fn render(snapshot: &Snapshot, last: Option<&ShutdownReport>) -> String {
    let mut page = Page(String::new());
    page.family("shutdown_state", "gauge", "1 for the phase the service is in, else 0.");
    for phase in Phase::ALL {
        let value = if phase == snapshot.phase { 1.0 } else { 0.0 };
        page.sample("shutdown_state", &[("state", phase.as_str())], value);
    }
    let one = [
        ("shutdown_requests_in_flight", "gauge", "Requests in flight.", snapshot.requests.active),
        ("shutdown_requests_started_total", "counter", "Requests admitted.", snapshot.requests.started),
        (
            "shutdown_requests_refused_total",
            "counter",
            "Requests refused while stopping.",
            snapshot.requests.refused,
        ),
        (
            "shutdown_requests_client_gone_total",
            "counter",
            "Requests whose client left before the answer was complete.",
            snapshot.requests.client_gone,
        ),
        ("shutdown_connections_open", "gauge", "Connections open.", snapshot.connections.open),
        (
            "shutdown_connections_accepted_total",
            "counter",
            "Connections accepted.",
            snapshot.connections.accepted,
        ),
        ("shutdown_sessions_open", "gauge", "Sessions open.", snapshot.sessions.open),
        ("shutdown_sessions_opened_total", "counter", "Sessions opened.", snapshot.sessions.opened),
        ("shutdown_sessions_told_total", "counter", "Sessions told to end.", snapshot.sessions.told),
        ("shutdown_signals_total", "counter", "Stop signals counted.", u64::from(snapshot.signals)),
        (
            "shutdown_background_tasks",
            "gauge",
            "Background tasks alive.",
            snapshot.background_tasks.len() as u64,
        ),
    ];
    for (name, kind, help, value) in one {
        page.family(name, kind, help);
        page.sample(name, &[], value as f64);
    }
    let oldest = snapshot.oldest_in_flight.as_ref().map_or(0.0, |oldest| oldest.age_ms);
    page.family("shutdown_oldest_in_flight_seconds", "gauge", "Age of the oldest named request in flight.");
    page.sample("shutdown_oldest_in_flight_seconds", &[], oldest / 1000.0);
    page.family("shutdown_left_seconds", "gauge", "What is left of the total, while stopping.");
    page.sample("shutdown_left_seconds", &[], snapshot.left_ms.unwrap_or_default() / 1000.0);
    page.family(
        "shutdown_stage_duration_seconds",
        "gauge",
        "How long a stage took, or may take while it runs.",
    );
    for stage in &snapshot.stages {
        let seconds = (stage.end_ms - stage.start_ms) / 1000.0;
        page.sample("shutdown_stage_duration_seconds", &[("stage", &stage.stage)], seconds);
    }
    page.family("shutdown_stage_outcome", "gauge", "1 for the outcome of each stage begun.");
    for stage in &snapshot.stages {
        let labels = [("stage", &*stage.stage), ("outcome", stage.outcome.as_str())];
        page.sample("shutdown_stage_outcome", &labels, 1.0);
    }
    if let Some(state) = &snapshot.state {
        let one = [
            (
                "shutdown_state_saves_total",
                "counter",
                "Saves of the state that went well.",
                state.saves as f64,
            ),
            (
                "shutdown_state_save_failures_total",
                "counter",
                "Saves of the state that failed, at least in part.",
                state.failures as f64,
            ),
            (
                "shutdown_state_saved_timestamp_seconds",
                "gauge",
                "When the state was saved last.",
                state.saved_at as f64 / 1000.0,
            ),
            ("shutdown_state_bytes", "gauge", "The saved state's size.", state.bytes as f64),
        ];
        for (name, kind, help, value) in one {
            page.family(name, kind, help);
            page.sample(name, &[], value);
        }
    }
    if let Some(last) = last {
        let clean = if last.is_clean() { 1.0 } else { 0.0 };
        let one = [
            (
                "last_shutdown_timestamp_seconds",
                "When the previous shutdown began.",
                last.started_unix_ms as f64 / 1000.0,
            ),
            (
                "last_shutdown_duration_seconds",
                "How long the previous shutdown took.",
                last.duration_ms / 1000.0,
            ),
            ("last_shutdown_clean", "1 if the previous shutdown lost nothing.", clean),
            ("last_shutdown_exit_code", "What the previous run exited with.", f64::from(last.exit_code)),
            ("last_shutdown_requests_cut", "Requests the previous shutdown cut.", last.requests.cut as f64),
            ("last_shutdown_sessions_cut", "Sessions the previous shutdown cut.", last.sessions.cut as f64),
        ];
        for (name, help, value) in one {
            page.family(name, "gauge", help);
            page.sample(name, &[], value);
        }
    }
    page.0
}

struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (index, (key, text)) in labels.iter().enumerate() {
            let open = if index == 0 { '{' } else { ',' };
            let text = text.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
            let _ = write!(self.0, "{open}{key}=\"{text}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }
}
