//! What deploy/pgbouncer and docs/pgbouncer.md promise, tried with real PgBouncers, exporters, a PostgreSQL, promtool and
//! Kubernetes' schemas.
//!
//! Each check is shown a broken copy, too, and must be red. The times of the manifests are grace.rs's.

#[path = "pgbouncer_deploy/guide.rs"]
mod guide;
#[path = "pgbouncer_deploy/manifests.rs"]
mod manifests;
#[path = "pgbouncer_deploy/metrics.rs"]
mod metrics;
#[path = "pgbouncer_deploy/pre_stop.rs"]
mod pre_stop;
#[path = "pgbouncer_deploy/settings.rs"]
mod settings;

use std::path::Path;
use std::process::Command;

use shutdown_tests::PATIENCE;
use shutdown_tests::process::Process;
use shutdown_tests::servers::{missing_exporters, missing_pgbouncers};

/// The directory above this crate's.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace holds this crate")
}

/// A file of the repository.
fn file(path: &str) -> String {
    let whole = root().join(path);
    std::fs::read_to_string(&whole).unwrap_or_else(|error| panic!("{}: {error}", whole.display()))
}

/// Settings as they are deployed.
fn ini() -> String {
    file("deploy/pgbouncer/pgbouncer.ini")
}

/// Replaces what must be there.
fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from:?} is not in:\n{text}");
    text.replace(from, to)
}

/// Whether a command succeeds, and all it says.
fn said(command: &mut Command) -> (bool, String) {
    let mut process = Process::start(command);
    let status = process.ended(PATIENCE * 4);
    (status.success(), format!("{}\n{}", process.stdout(), process.stderr()))
}

/// Names what could not be had: a law that was tried with less says so.
fn name_what_is_missing() {
    for missing in [missing_pgbouncers(), missing_exporters()].iter().filter(|missing| !missing.is_empty()) {
        println!("not tried: {missing}");
    }
}
