//! Alerts, scrape file and dashboard: promtool judges them, and real exporters have what they name.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use shutdown_tests::servers::{Pooling, Postgres, exporters, missing_exporters, pgbouncers};

use crate::manifests::containers;
use crate::{file, name_what_is_missing, replaced, root, said};

const RULES: &str = "deploy/pgbouncer/prometheus/pgbouncer.rules.yml";

fn rules() -> Vec<Value> {
    let document: Value = serde_saphyr::from_str(&file(RULES)).expect("YAML");
    document["groups"][0]["rules"].as_array().expect("rules").clone()
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

/// What promtool says about the directory of the rules, one file of it replaced.
fn promtool(command: [&str; 2], of: &str, changed: &str, to: &str) -> (bool, String) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for entry in std::fs::read_dir(root().join("deploy/pgbouncer/prometheus")).expect("it is there") {
        let from = entry.expect("an entry").path();
        let name = from.file_name().expect("a file").to_owned();
        std::fs::copy(&from, dir.path().join(name)).expect("a temporary file");
    }
    std::fs::write(dir.path().join(changed), to).expect("a temporary file");
    said(Command::new("promtool").args(command).arg(of).current_dir(dir.path()))
}

#[test]
fn promtool_takes_rules_and_scrape_file_and_every_alert_fires_only_when_it_should() {
    let rules_file = "pgbouncer.rules.yml";
    let (text, scrape) = (file(RULES), file("deploy/pgbouncer/prometheus/scrape.yml"));
    let check = |text: &str| promtool(["check", "rules"], rules_file, rules_file, text);
    let config = |text: &str| promtool(["check", "config"], "scrape.yml", "scrape.yml", text);
    let test = |text: &str| promtool(["test", "rules"], "pgbouncer_test.yml", rules_file, text);
    for (green, words) in [check(&text), config(&scrape), test(&text)] {
        assert!(green, "{words}");
    }

    let (green, words) = check(&replaced(&text, "expr: pgbouncer_up == 0", "expr: pgbouncer_up == "));
    assert!(!green && words.contains("could not parse expression"), "{words}");
    // The key of the guide that we come from.
    let (green, words) = config(&replaced(&scrape, "  scrape_interval: 30s", "  interval: 30s"));
    assert!(!green && words.contains("field interval not found"), "{words}");

    // The unit tests see every metric, by both its names, and every wait.
    let names: BTreeSet<String> =
        rules().iter().flat_map(|rule| metrics_in(&text_of(&rule["expr"]))).collect();
    assert!(names.len() >= 9, "{names:?}");
    for name in &names {
        let (green, words) = test(&renamed(&text, name));
        assert!(!green && words.contains("FAILED"), "{name} was renamed, and no test says so: {words}");
    }
    for rule in rules() {
        let alert = text_of(&rule["alert"]);
        let start = text.find(&format!("alert: {alert}\n")).expect("it is there");
        let wait = format!("for: {}", text_of(&rule["for"]));
        let hurried = format!("{}{}", &text[..start], text[start..].replacen(&wait, "for: 0s", 1));
        let (green, words) = test(&hurried);
        assert!(!green && words.contains(&alert), "{alert} did not wait, and no test says so: {words}");
    }
    println!("red without: {names:?}");
}

/// The text with this metric, and none that only begins so, called otherwise.
fn renamed(text: &str, metric: &str) -> String {
    let mut renamed = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(metric) {
        let (before, found) = rest.split_at(at);
        let after = &found[metric.len()..];
        let is_whole = !before.ends_with(is_of_a_name) && !after.starts_with(is_of_a_name);
        renamed.extend([before, metric, if is_whole { "_not" } else { "" }]);
        rest = after;
    }
    renamed + rest
}

fn is_of_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The words that are called as the exporter's metrics are.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c| !is_of_a_name(c));
    words.filter(|word| word.starts_with("pgbouncer_")).map(ToOwned::to_owned).collect()
}

/// Every value of this key, wherever it stands.
fn values<'a>(document: &'a Value, key: &str, found: &mut Vec<&'a Value>) {
    match document {
        Value::Object(fields) => {
            for (name, value) in fields {
                if name == key {
                    found.push(value);
                }
                values(value, key, found);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| values(item, key, found)),
        _ => {}
    }
}

fn dashboard() -> Value {
    serde_json::from_str(&file("deploy/pgbouncer/grafana/pgbouncer.json")).expect("JSON")
}

#[test]
fn every_question_of_the_dashboard_is_one() {
    let dashboard = dashboard();
    let mut questions = Vec::new();
    values(&dashboard, "expr", &mut questions);
    assert!(questions.len() >= 12, "{questions:?}");
    // What Grafana puts in.
    let filled = |question: &Value| {
        let filled = text_of(question).replace("$__rate_interval", "2m").replace("$instance", ".+");
        filled.replace("$database", "app|other")
    };
    let check = |questions: Vec<String>| {
        let rules: Vec<_> =
            questions.iter().map(|expr| json!({ "record": "answer", "expr": expr })).collect();
        // JSON is YAML, too.
        let rules = json!({ "groups": [{ "name": "dashboard", "rules": rules }] }).to_string();
        promtool(["check", "rules"], "dashboard.yml", "dashboard.yml", &rules)
    };
    let (green, words) = check(questions.iter().map(|question| filled(question)).collect());
    assert!(green, "{words}");
    for question in questions {
        let (green, words) = check(vec![filled(question) + ")"]);
        assert!(!green && words.contains("could not parse expression"), "{words}");
    }
}

/// What each file names: `(where, metric)`.
fn named() -> BTreeSet<(&'static str, String)> {
    let mut named = BTreeSet::new();
    for rule in rules() {
        named.extend(metrics_in(&text_of(&rule["expr"])).into_iter().map(|name| ("the rules", name)));
    }
    let dashboard = dashboard();
    let mut texts = Vec::new();
    values(&dashboard, "expr", &mut texts);
    values(&dashboard, "query", &mut texts);
    assert!(texts.len() >= 15, "the dashboard asks for something: {texts:?}");
    for text in texts {
        named.extend(metrics_in(&text_of(text)).into_iter().map(|name| ("the dashboard", name)));
    }
    // In the guide a metric stands in backquotes, by itself.
    let guide = file("docs/pgbouncer.md");
    let quoted = guide.split('`').skip(1).step_by(2).filter(|word| word.starts_with("pgbouncer_"));
    named.extend(quoted.map(|name| ("the guide", name.to_owned())));
    for place in ["the rules", "the dashboard", "the guide"] {
        let count = named.iter().filter(|(of, _)| *of == place).count();
        assert!(count >= 5, "{place} names {count} metrics");
    }
    named
}

/// The other name of a metric that was renamed between two exporters.
fn twin(name: &str) -> Option<String> {
    match name.strip_prefix("pgbouncer_stats_totals_") {
        Some(rest) => Some(format!("pgbouncer_stats_{rest}")),
        None => name.strip_prefix("pgbouncer_stats_").map(|rest| format!("pgbouncer_stats_totals_{rest}")),
    }
}

/// The names that are not among these, nor their twins.
fn missing(named: &BTreeSet<(&str, String)>, exported: &BTreeSet<String>, or_twin: bool) -> Vec<String> {
    let is_there = |name: &String| {
        exported.contains(name) || or_twin && twin(name).is_some_and(|twin| exported.contains(&twin))
    };
    let missing = named.iter().filter(|(_, name)| !is_there(name));
    missing.map(|(place, name)| format!("{name}, in {place}")).collect()
}

#[test]
fn every_metric_that_is_named_is_exported() {
    name_what_is_missing();
    let manifest = file("deploy/pgbouncer/kubernetes/pgbouncer.yaml");
    let arguments: Vec<String> = containers(&manifest)
        .into_iter()
        .find(|container| container["name"] == "exporter")
        .map(|container| container["args"].as_array().expect("arguments").iter().map(text_of).collect())
        .expect("an exporter");
    let named = named();
    let postgres = Postgres::start();
    let mut all = BTreeSet::new();
    for installed in pgbouncers() {
        let pgbouncer = installed.start(&postgres, Pooling::Transaction, 5);
        for exporter in exporters() {
            let scraped = exporter.scrape(&pgbouncer, &arguments);
            let samples = scraped.lines().filter(|line| !line.starts_with('#'));
            let samples: BTreeSet<String> =
                samples.filter_map(|line| line.split(['{', ' ']).next()).map(ToOwned::to_owned).collect();
            assert!(scraped.contains("\npgbouncer_up 1\n"), "{exporter} of {installed}: {scraped}");
            let absent = missing(&named, &samples, true);
            assert!(absent.is_empty(), "exporter {exporter} of PgBouncer {installed} has not: {absent:?}");
            println!("exporter {exporter} of PgBouncer {installed}: {} metrics", samples.len());
            all.extend(samples);
        }
    }
    if missing_exporters().is_empty() {
        let absent = missing(&named, &all, false);
        assert!(absent.is_empty(), "no exporter has {absent:?}");
    }

    // As the alerts of the guide that we come from.
    let wrong: BTreeSet<_> = ["pgbouncer_pools_clients_waiting", "pgbouncer_pools_query_time_avg"]
        .map(|name| ("its alerts", name.to_owned()))
        .into();
    assert_eq!(missing(&wrong, &all, true).len(), wrong.len(), "{all:?}");
}

#[test]
fn prometheus_looks_where_the_manifest_exports() {
    let scrape: Value =
        serde_saphyr::from_str(&file("deploy/pgbouncer/prometheus/scrape.yml")).expect("YAML");
    let job = &scrape["scrape_configs"][0];
    let name = text_of(&job["job_name"]);
    let host = text_of(&job["dns_sd_configs"][0]["names"][0]);
    let manifest = crate::manifests::documents(&file("deploy/pgbouncer/kubernetes/pgbouncer.yaml"));
    let service = manifest
        .iter()
        .find(|document| {
            let name = document["metadata"]["name"].as_str().expect("a name");
            document["kind"] == "Service" && host == format!("{name}.{}.svc", crate::guide::NAMESPACE)
        })
        .unwrap_or_else(|| panic!("no Service is called {host}"));
    assert_eq!(service["spec"]["clusterIP"], "None", "one address for each pod");
    assert_eq!(service["spec"]["ports"][0]["port"], job["dns_sd_configs"][0]["port"]);
    assert!(file(RULES).contains(&format!("up{{job=\"{name}\"}} == 0")), "the alerts name the job {name}");
    assert!(Path::new(RULES).ends_with(text_of(&scrape["rule_files"][0])));
}
