//! Rolling restarts under load, a row a mode: what is lost of which group, and how long an exit takes.
//!
//! `cargo build --release --workspace --bins`, then `cargo run --release -p shutdown-benches --bin rolling` prints the
//! table in ten to twenty minutes; `-- --save` also writes `benches/results/rolling-restart.md`, `-- --short` restarts
//! twice instead of twelve times. The rig and its rules: `tests/src/rig.rs`.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use shutdown_tests::rig::affinity::on_one_processor;
use shutdown_tests::rig::{Group, Kind, Mode, Outcome, run};

const RESTARTS: usize = 12;
/// Modes that claim to lose nothing go on until they have made so many.
const REQUESTS: usize = 100_000;

fn main() -> ExitCode {
    let (mut save, mut short) = (false, false);
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--save" => save = true,
            "--short" => short = true,
            other => {
                eprintln!("what is {other:?}? The arguments are --save and --short");
                return ExitCode::from(2);
            }
        }
    }
    if cfg!(debug_assertions) {
        eprintln!("these numbers mean nothing without --release");
        return ExitCode::from(2);
    }
    let (restarts, requests) = if short { (2, 0) } else { (RESTARTS, REQUESTS) };
    let mut rows = Vec::new();
    for (mode, pinned) in modes(restarts, requests) {
        let (cpu, outcome) = if pinned {
            let (cpu, outcome) = on_one_processor(|| run(&mode));
            (Some(cpu), outcome)
        } else {
            (None, run(&mode))
        };
        eprint!("{outcome}");
        if cpu.is_some_and(|cpu| !outcome.processors.iter().eq([&cpu])) {
            eprintln!("{}: not pinned: {:?}", outcome.name, outcome.processors);
            return ExitCode::FAILURE;
        }
        rows.push(outcome);
    }
    let text = page(&rows);
    println!("{text}");
    if save {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/results/rolling-restart.md");
        if let Err(error) = std::fs::write(path, text) {
            eprintln!("benches/results/rolling-restart.md: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// What is run, and whether on one processor.
fn modes(restarts: usize, requests: usize) -> Vec<(Mode, bool)> {
    let stock = |delay| Mode::patient(Kind::StockAxum(Duration::from_millis(delay))).at_least(restarts, 0);
    let control = |mode: Mode| mode.at_least(restarts, 0);
    let ours = |kind| Mode::patient(kind).at_least(restarts, requests);
    vec![
        (control(Mode::abrupt(Kind::Serve)).named("`serve`, killed"), false),
        (stock(0).named("stock axum, graceful shutdown at once"), false),
        (stock(800).named("stock axum, graceful shutdown 800 ms after the signal"), false),
        (control(Mode::impatient(Kind::Serve)).named("`serve`, lame duck 100 ms"), false),
        (control(Mode::abrupt(Kind::EdgeProxy)).named("edge-proxy, killed"), false),
        (control(Mode::impatient(Kind::EdgeProxy)).named("edge-proxy, lame duck 100 ms"), false),
        (ours(Kind::Serve).named("**`serve`, lame duck 800 ms**"), false),
        (ours(Kind::EdgeProxy).named("**edge-proxy, lame duck 800 ms**"), false),
        (ours(Kind::Serve).named("**`serve`, lame duck 800 ms, one CPU**"), true),
        (ours(Kind::EdgeProxy).named("**edge-proxy, lame duck 800 ms, one CPU**"), true),
    ]
}

fn page(rows: &[Outcome]) -> String {
    let mut text = String::from(HEAD);
    for outcome in rows {
        let Outcome { name, restarts, .. } = outcome;
        let _ = write!(text, "| {name} | {restarts} | {} | {} |", outcome.requests(), outcome.lost());
        for group in Group::ALL {
            let _ = match outcome.groups.get(&group) {
                Some(tally) => write!(text, " {}/{} |", tally.lost(), tally.requests()),
                None => write!(text, " – |"),
            };
        }
        let moved = |group| outcome.groups.get(&group).map_or(0, |tally| tally.moved);
        let ms = |exit: Option<&Duration>| exit.map_or(0, Duration::as_millis);
        let (least, most) = (ms(outcome.exits.iter().min()), ms(outcome.exits.iter().max()));
        let (http2, sockets) = (moved(Group::Http2), moved(Group::WebSocket));
        let _ = writeln!(text, " {http2} | {sockets} | {least}..{most} | {} |", outcome.wrong.len());
    }
    text.push_str("\nWhat was lost, and how:\n\n");
    for outcome in rows.iter().filter(|outcome| outcome.lost() > 0 || !outcome.wrong.is_empty()) {
        let _ = writeln!(text, "* {}", outcome.name);
        for (group, tally) in &outcome.groups {
            let by_loss = tally.failed.iter().map(|(loss, (count, _))| format!("{loss:?} {count}"));
            let by_loss: Vec<_> = by_loss.collect();
            if !by_loss.is_empty() {
                let _ = writeln!(text, "  * {group:?}: {}", by_loss.join(", "));
            }
        }
        for line in outcome.wrong.iter().flat_map(|wrong| wrong.lines()).take(5) {
            let _ = writeln!(text, "  * wrong: {line}");
        }
    }
    text
}

const HEAD: &str = "# Rolling restarts under load

Three instances plus surge, real processes, one after the other told to stop (TERM) and replaced; the balancer still
sends clients to an instance for 400 ms after its signal. No client repeats a request: a connection that ends in a
client's face is a loss, though some clients would hide it. `x/y` is x failed of y.

Limits: a simulated lag, one machine, loopback, no TLS. 0 of 100,000 means at most 3 in 100,000 with 95 % confidence, for
this rig. The linger (2.5 s) is longer than the idlest client's pause (2 s); one idle for longer would race. Modes that
take longer to restart make more requests, so compare failures, not requests.

* moved, HTTP/2: requests that a GOAWAY told were not processed; their client sends them again on a new connection.
* moved, WebSocket: sockets that ended as their server ends them (`serve`: a message and Close 1001; edge-proxy: kept
  while requests drain, then cut) and were opened anew.
* wrong: exit codes and lines of stderr that nothing explains, of any server.

| mode | restarts | requests | failed | fresh | busy | idle | HTTP/2 | WebSocket | upload | download | moved, HTTP/2 | moved, WebSocket | exit, ms | wrong |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
";
