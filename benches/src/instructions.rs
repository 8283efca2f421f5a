//! Instructions a request, counted by callgrind: exact where nanoseconds are not.
//!
//! Each candidate runs in processes of its own, with two numbers of requests; the difference holds nothing but
//! requests. The allocator is counted apart: which chunks it happens to merge depends on the size of a task and
//! differs by hundreds of instructions between candidates that all allocate the same number of times.

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::process::Command;

use crate::added::cheapest_peer;
use crate::serving::{CONTENDERS, Contender, Protocol, Role};
use crate::table::{Table, number, page, ratio};

/// Requests of the short run: everything that happens once has happened.
const FEW: u32 = 500;
const MANY: u32 = 3_000;

/// What ours may add, as a part of what the cheapest peer adds.
const AT_MOST: f64 = 0.75;

/// The allocator's doors: callgrind stops counting at each and goes on behind it.
const NOT_THE_ALLOCATOR: [&str; 6] = [
    "--toggle-collect=malloc",
    "--toggle-collect=calloc",
    "--toggle-collect=realloc",
    "--toggle-collect=posix_memalign",
    "--toggle-collect=free",
    "--collect-atstart=yes",
];

/// Instructions of one request.
struct Instructions {
    all: f64,
    /// Without the allocator's.
    outside: f64,
}

/// The page, and whether the gates are met.
///
/// # Errors
///
/// A sentence that says what is missing.
pub(crate) fn compare() -> Result<(String, bool), String> {
    let mut all_met = true;
    let mut tables = Vec::new();
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let counted = CONTENDERS
            .iter()
            .map(|contender| {
                let all = per_request(contender, protocol, &[])?;
                Ok(Instructions { all, outside: per_request(contender, protocol, &NOT_THE_ALLOCATOR)? })
            })
            .collect::<Result<Vec<_>, String>>()?;
        let (table, met) = table(protocol, &counted);
        tables.push(table);
        all_met &= met;
    }
    Ok((page("Instructions a request", &tables), all_met))
}

fn table(protocol: Protocol, counted: &[Instructions]) -> (Table, bool) {
    let place = |role| CONTENDERS.iter().position(|contender| contender.role == role);
    let bare = &counted[place(Role::Bare).expect("bare is among them")];
    let added: Vec<_> = counted.iter().map(|it| Some(it.outside - bare.outside)).collect();
    let ours = added[place(Role::Ours).expect("ours is among them")];
    let mut text = format!("## A request over {}\n\n", protocol.name());
    text += "| what | instructions | the allocator's | added outside it | all / bare | ours / it |\n";
    text += "|---|---:|---:|---:|---:|---:|\n";
    for ((contender, it), added) in CONTENDERS.iter().zip(counted).zip(&added) {
        let more = added.map_or_else(String::new, |added| format!("{added:.1}"));
        let against = match contender.role {
            Role::Bare | Role::Control => String::new(),
            _ => number(ratio(ours, *added)),
        };
        let _ = writeln!(
            text,
            "| {} | {:.0} | {:.0} | {more} | {:.3} | {against} |",
            contender.name,
            it.all,
            it.all - it.outside,
            it.all / bare.all,
        );
    }
    let best = cheapest_peer(&added);
    let measured = ratio(ours, added[best]);
    let met = measured.is_some_and(|measured| measured <= AT_MOST);
    let _ = writeln!(
        text,
        "\n* gate: instructions added, ours / best peer ({}) ≤ {AT_MOST:.2} – {}: {}",
        CONTENDERS[best].name,
        number(measured),
        if met { "met" } else { "missed" }
    );
    (Table(text), met)
}

fn per_request(contender: &Contender, protocol: Protocol, options: &[&str]) -> Result<f64, String> {
    let (few, many) = (count(contender, protocol, FEW, options)?, count(contender, protocol, MANY, options)?);
    Ok((many - few) as f64 / f64::from(MANY - FEW))
}

/// Instructions of a process that serves so many requests.
fn count(contender: &Contender, protocol: Protocol, requests: u32, options: &[&str]) -> Result<u64, String> {
    let this = std::env::current_exe().map_err(|error| format!("where is this program? {error}"))?;
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).args(options).arg("--").arg(this);
    valgrind.args(["count", contender.key, protocol.key(), &requests.to_string()]);
    let output = valgrind.output().map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            "valgrind is not here; install it, on Debian with: apt-get install valgrind".into()
        }
        _ => format!("valgrind: {error}"),
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    match collected {
        Some(instructions) if output.status.success() => Ok(instructions),
        _ => Err(format!("valgrind --tool=callgrind failed on {}: {said}", contender.key)),
    }
}
