//! `docs/formats.md` says what is written: its example reads back, and it names every field of a real report.

use std::collections::BTreeSet;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_core::ShutdownReport;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{Connection, status_until};
use shutdown_tests::process::EdgeProxy;

const FORMATS: &str = include_str!("../../docs/formats.md");

fn example() -> Value {
    let begin = FORMATS.find("```json\n").expect("a worked example") + "```json\n".len();
    let end = FORMATS[begin..].find("```").expect("its end") + begin;
    serde_json::from_str(&FORMATS[begin..end]).expect("the example is JSON")
}

fn keys(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                into.insert(key.clone());
                keys(value, into);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| keys(value, into)),
        _ => {}
    }
}

#[test]
fn the_worked_example_reads_back_as_a_report_and_means_what_it_says() {
    let report: ShutdownReport = serde_json::from_value(example()).expect("it is a report");
    assert_eq!(report.exit_code(), report.exit_code);
    assert_eq!(report.requests.cut_requests[0].route, "GET /never");
}

#[test]
fn every_field_of_a_real_report_is_documented() {
    let mut proxy =
        EdgeProxy::start([("SHUTDOWN_GRACEFUL_TIMEOUT", "200ms"), ("SHUTDOWN_WEBSOCKET_TIMEOUT", "200ms")]);
    let mut stuck = Connection::open(proxy.listen).expect("it serves");
    stuck.send("GET", "/never", "").expect("it reads");
    let mut socket = Connection::open(proxy.listen).expect("it serves");
    socket.upgrade("/ws").expect("it upgrades");
    status_until(proxy.admin, |status| status["requests"]["active"] == 1 && status["sessions"]["open"] == 1);
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 11);
    let mut fields = BTreeSet::new();
    keys(&proxy.report(), &mut fields);
    assert!(fields.len() > 25, "{fields:?}");
    for field in fields {
        assert!(FORMATS.contains(&format!("`{field}`")), "{field} is not in docs/formats.md");
    }
}
