//! `/metrics` in Prometheus' text format, rendered from one snapshot.
//!
//! A dying process is rarely scraped, so the previous run's report is exported by the next one as
//! `last_shutdown_*`.

use std::collections::BTreeSet;
use std::fmt::Write;

use shutdown_core::{Phase, ShutdownReport, Snapshot};

use super::family::Family;

/// The page: what the coordinator knows, then what the program has added.
pub(super) fn render(snapshot: &Snapshot, last: Option<&ShutdownReport>, added: Vec<Family>) -> String {
    let mut page = Page::default();
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
    add(&mut page, added);
    page.text
}

/// Each family in one piece and each series once: Prometheus refuses a page that has one twice.
fn add(page: &mut Page, added: Vec<Family>) {
    let mut families: Vec<Family> = Vec::new();
    for family in added {
        match families.iter_mut().find(|known| known.name == family.name) {
            Some(known) => known.samples.extend(family.samples),
            None if page.families.contains(family.name) || !is_name(family.name) => {}
            None => families.push(family),
        }
    }
    for Family { name, kind, help, samples } in families {
        page.family(name, kind, help);
        let mut seen = BTreeSet::new();
        for sample in &samples {
            let keys: BTreeSet<_> = sample.labels.iter().map(|(key, _)| *key).collect();
            let readable = keys.len() == sample.labels.len() && keys.iter().all(|key| is_label(key));
            if readable && seen.insert(&sample.labels) {
                let labels: Vec<_> = sample.labels.iter().map(|(key, text)| (*key, &**text)).collect();
                page.sample(name, &labels, sample.value);
            }
        }
    }
}

/// Whether Prometheus can read it as the name of a metric.
fn is_name(name: &str) -> bool {
    let in_names = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
    !name.is_empty() && name.chars().all(in_names) && !name.starts_with(|c: char| c.is_ascii_digit())
}

/// Whether Prometheus can read it as the name of a label.
fn is_label(key: &str) -> bool {
    is_name(key) && !key.contains(':')
}

#[derive(Default)]
struct Page {
    text: String,
    families: BTreeSet<String>,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.families.insert(name.to_owned());
        let help = help.replace('\\', r"\\").replace('\n', r"\n");
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.text.push_str(name);
        for (index, (key, text)) in labels.iter().enumerate() {
            let open = if index == 0 { '{' } else { ',' };
            let text = text.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
            let _ = write!(self.text, "{open}{key}=\"{text}\"");
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added(families: Vec<Family>) -> String {
        let mut page = Page::default();
        page.family("shutdown_state", "gauge", "Ours.");
        page.text.clear();
        add(&mut page, families);
        page.text
    }

    #[test]
    fn families_of_one_name_are_one_and_a_series_is_there_once() {
        let page = added(vec![
            Family::counter("jobs_total", "Jobs.").sample(&[("b", "2"), ("a", "1")], 1.0),
            Family::gauge("depth", "Two\nlines.").sample(&[], 0.5),
            Family::counter("jobs_total", "Jobs again.")
                .sample(&[("a", "1"), ("b", "2")], 7.0)
                .sample(&[("a", "say \"\\\"\n")], 2.0),
        ]);
        let expected = "# HELP jobs_total Jobs.\n# TYPE jobs_total counter\njobs_total{a=\"1\",b=\"2\"} 1\n\
                        jobs_total{a=\"say \\\"\\\\\\\"\\n\"} 2\n\
                        # HELP depth Two\\nlines.\n# TYPE depth gauge\ndepth 0.5\n";
        assert_eq!(page, expected);
    }

    #[test]
    fn a_name_that_is_taken_or_unreadable_is_not_shown() {
        for name in ["shutdown_state", "", "9lives", "with space", "läuft", "a-b"] {
            assert_eq!(added(vec![Family::gauge(name, "").sample(&[], 1.0)]), "", "{name:?}");
        }
    }

    #[test]
    fn a_series_with_a_label_that_is_unreadable_or_there_twice_is_not_shown() {
        for labels in [[("a-b", "1"), ("c", "2")], [("a:b", "1"), ("c", "2")], [("a", "1"), ("a", "2")]] {
            let page = added(vec![Family::gauge("depth", "").sample(&labels, 1.0).sample(&[], 2.0)]);
            assert_eq!(page, "# HELP depth \n# TYPE depth gauge\ndepth 2\n", "{labels:?}");
        }
    }
}
