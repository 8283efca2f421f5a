//! A save of the state, beside the same bytes put on the same disk and nothing else.
//!
//! The disk is most of a save, and another one every second: so all are measured in turn, in one run, and compared
//! round by round.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use shutdown_core::files;
use shutdown_core::state::{Generation, StateBackend, StateError, StateSource, StateStore};
use tokio::time::Instant;

use crate::table::{Table, page, rows};

const ROUNDS: usize = 501;
const RECORDS: u32 = 1000;
const GOAL: f64 = 1.6;

#[derive(Clone, Serialize)]
struct Peer {
    addr: String,
    name: String,
    last_seen: u64,
    healthy: bool,
    weight: u32,
    build: String,
}

#[derive(Clone, Serialize)]
struct Breaker {
    peer: String,
    state: &'static str,
    error_count: u32,
    total_count: u32,
    reopens_at: Option<u64>,
}

/// Measures; an error is the disk's.
pub(crate) fn compare() -> io::Result<String> {
    // Beside the program, and not in /tmp, which may be no disk.
    let beside = std::env::current_exe()?.parent().map(Path::to_owned).unwrap_or_default();
    let dir = tempfile::tempdir_in(beside)?;
    let store = full(StateStore::in_dir(dir.path().join("state")));
    store.save().map_err(io::Error::other)?;
    let nowhere = full(StateStore::new(Nowhere));
    let bytes = std::fs::read(dir.path().join("state/state.json"))?;
    let at = |name: &str| -> io::Result<PathBuf> {
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir)?;
        Ok(dir.join("state.json"))
    };
    let (durable, hasty, plain) = (at("durable")?, at("hasty")?, at("plain")?);
    let save = || store.save().map_err(io::Error::other);
    let make = || nowhere.save().map_err(io::Error::other);
    let replace = || files::replace(&durable, &bytes);
    let rename = || replace_without_directory(&hasty, &bytes);
    let write = || std::fs::write(&plain, &bytes);
    let ways: [(&str, &dyn Fn() -> io::Result<()>); 5] = [
        ("ours: `StateStore::save`", &save),
        ("`files::replace`: write, fsync, rename, fsync of the directory", &replace),
        ("the same without the directory's fsync: a power cut may bring the old one back", &rename),
        ("`fs::write` into place: a kill leaves half of it", &write),
        ("ours without a disk: captured, serialised, summed up", &make),
    ];
    let mut took: [Vec<Duration>; 5] = Default::default();
    for round in 0..ROUNDS {
        for turn in 0..ways.len() {
            // Each comes first equally often, and runs after its neighbour on either side.
            let count = ways.len();
            let way = if round % 2 == 0 { round / 2 + turn } else { round / 2 + count - turn } % count;
            let begin = Instant::now();
            ways[way].1()?;
            took[way].push(begin.elapsed());
        }
    }
    let mut text = format!(
        "## {RECORDS} peers and {RECORDS} breakers: {} bytes, {} a record\n\n| | median µs | ours / it |\n|---|---|---|\n",
        bytes.len(),
        bytes.len() / (2 * RECORDS as usize),
    );
    let (rows, ratios) = rows(ways.map(|(name, _)| name), &took, Duration::from_micros(1));
    text += &rows;
    let ratio = ratios[1];
    let met = if ratio <= GOAL { "met" } else { "missed" };
    text += &format!(
        "\n{ROUNDS} rounds, all five in each, in turn; \"ours / it\" is the median of the rounds' ratios. Ours also captures, \
         serialises and sums up, and keeps the generation before it: a link and one rename more.\n\n\
         Goal: at most {GOAL:.2} of `files::replace`: {ratio:.2}, {met}.\n"
    );
    let drain = crate::stopping::compare(dir.path())?;
    Ok(page("A save of the state against its bytes, and beside a drain", &[Table(text), Table(drain)]))
}

/// A store with everything a node of this size knows.
pub(crate) fn full(store: StateStore) -> StateStore {
    store
        .node_id("edge-1")
        .source(source("peers", (0..RECORDS).map(peer).collect()))
        .source(source("breakers", (0..RECORDS).map(breaker).collect()))
}

/// A source as a program has it: written down under its lock, without a copy.
fn source<T: Serialize + Send + 'static>(name: &'static str, records: Vec<T>) -> StateSource {
    let records = Arc::new(Mutex::new(records));
    StateSource::new(name, move || Ok(Shared(Arc::clone(&records))), |_: serde_json::Value, _| Ok(()))
}

struct Shared<T>(Arc<Mutex<Vec<T>>>);

impl<T: Serialize> Serialize for Shared<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.lock().serialize(serializer)
    }
}

fn addr(n: u32) -> String {
    format!("10.{}.{}.{}:8443", n / 65_536, n / 256 % 256, n % 256)
}

fn peer(n: u32) -> Peer {
    Peer {
        addr: addr(n),
        name: format!("edge-{n:05}"),
        last_seen: 1_795_273_877_139 + u64::from(n),
        healthy: !n.is_multiple_of(7),
        weight: 100,
        build: format!("{:08x}", n.wrapping_mul(0x9E37_79B9)),
    }
}

fn breaker(n: u32) -> Breaker {
    let open = n.is_multiple_of(10);
    Breaker {
        peer: addr(n),
        state: if open { "open" } else { "closed" },
        error_count: n % 50,
        total_count: 1000 + n,
        reopens_at: open.then_some(1_795_273_907_139 + u64::from(n)),
    }
}

/// A place without a disk.
struct Nowhere;

impl StateBackend for Nowhere {
    fn open(&self, _: u64) -> Result<Vec<Generation>, StateError> {
        Ok(Vec::new())
    }

    fn save(&self, document: &[u8]) -> Result<(), StateError> {
        std::hint::black_box(document);
        Ok(())
    }

    fn set_aside(&self, _: usize, _: u64) -> Result<Option<String>, StateError> {
        Ok(None)
    }

    fn place(&self) -> Cow<'_, str> {
        Cow::Borrowed("nowhere")
    }
}

fn replace_without_directory(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("tmp");
    let mut file = File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)
}
