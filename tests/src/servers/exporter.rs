//! Exporters of a PgBouncer's metrics, each version that tests/run has found.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Pgbouncer, as_user, ask};
use crate::client::get;
use crate::process::Process;

/// Who runs the PgBouncers: as it, an exporter needs no password.
const USER: &str = "postgres";
const LISTENS: &str = "Listening on";

/// An exporter that can be started.
#[derive(Clone, Debug)]
pub struct Exporter {
    program: PathBuf,
    version: String,
}

/// Every exporter of `PGBOUNCER_EXPORTERS` (paths with colons between); without it what tests/run has fetched before.
///
/// # Panics
///
/// If there is none, or one that does not run.
pub fn exporters() -> Vec<Exporter> {
    let programs: Vec<PathBuf> = match std::env::var_os("PGBOUNCER_EXPORTERS") {
        Some(paths) => std::env::split_paths(&paths).filter(|path| !path.as_os_str().is_empty()).collect(),
        None => {
            let target = target();
            let suites = ["exporter-trixie", "exporter-sid"].iter();
            let program = |suite| target.join("pgbouncers").join(suite).join("prometheus-pgbouncer-exporter");
            suites.map(program).filter(|program| program.is_file()).collect()
        }
    };
    assert!(!programs.is_empty(), "no exporter of PgBouncer is there: run tests/run, which fetches two");
    programs.into_iter().map(Exporter::at).collect()
}

/// Which exporters tests/run could not have, a line each; empty if none is missing.
pub fn missing_exporters() -> String {
    std::env::var("PGBOUNCER_EXPORTERS_MISSING").unwrap_or_default()
}

/// The target folder that this test was built in.
///
/// # Panics
///
/// If it does not stand in `target/<profile>/deps`.
pub fn target() -> PathBuf {
    let this = std::env::current_exe().expect("a program knows its own path");
    this.ancestors().nth(3).expect("tests live in target/<profile>/deps").to_owned()
}

impl Exporter {
    fn at(program: PathBuf) -> Self {
        // `pgbouncer_exporter, version 0.12.0 (branch: …`, on stdout or stderr.
        let said = ask(Command::new("sh").args(["-c", "\"$0\" --version 2>&1"]).arg(&program));
        let version = said.split_once(" version ").and_then(|(_, rest)| rest.split_whitespace().next());
        let version = version.unwrap_or_else(|| panic!("{}: {said}", program.display())).to_owned();
        Self { program, version }
    }

    /// Starts it with these arguments, asks it once, and stops it. The PgBouncer's directory replaces `/run/pgbouncer`
    /// in them, and a free port of the loopback the address that they name.
    ///
    /// # Panics
    ///
    /// If it does not listen or not answer.
    pub fn scrape(&self, pgbouncer: &Pgbouncer, arguments: &[String]) -> String {
        let dir = pgbouncer.socket_dir().display().to_string();
        let arguments =
            arguments.iter().map(|argument| match argument.strip_prefix("--web.listen-address=") {
                Some(_) => "--web.listen-address=127.0.0.1:0".to_owned(),
                None => argument.replace("/run/pgbouncer", &dir),
            });
        let process = Process::start(as_user(USER, Path::new(&self.program)).args(arguments));
        let line = process.stderr_line(|line| line.contains(LISTENS));
        let (_, address) = line.split_once("address=").expect("it says where");
        let answer = get(address.trim().parse().expect("an address"), "/metrics").expect("it answers");
        assert_eq!(answer.status, 200);
        String::from_utf8(answer.body).expect("a text")
    }
}

impl fmt::Display for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.version)
    }
}
