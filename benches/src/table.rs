//! The pages that are printed and saved, and the table of operations measured alone.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::candidates::Candidate;
use crate::harness::{Samples, Threads};

/// With two threads on one word, an operation must cost at least this times its one-thread cost; otherwise the
/// threads did not meet and the comparison says nothing.
const CONTENTION: f64 = 2.0;

/// Ours divided by a peer, and what it should be at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Goal {
    pub(crate) threads: Threads,
    pub(crate) peer: &'static str,
    pub(crate) at_most: f64,
}

/// The results of one comparison as Markdown.
pub(crate) struct Table(pub(crate) String);

struct Row {
    name: &'static str,
    one: Option<f64>,
    two: Option<f64>,
}

impl Table {
    pub(crate) fn new(
        title: &str,
        candidates: &[Candidate],
        one: &[Samples],
        two: &[Samples],
        goals: &[Goal],
    ) -> Self {
        let rows: Vec<_> = candidates
            .iter()
            .zip(one.iter().zip(two))
            .map(|(candidate, (one, two))| Row { name: candidate.name, one: one.median(), two: two.median() })
            .collect();
        let ours = candidates.iter().position(|candidate| candidate.ours).expect("ours is among them");
        let met = goals.iter().all(|goal| row(&rows, goal.peer).is_contended());
        let mut text = format!("## {title}\n\n");
        text += "| what | 1 thread, ns | ours / it | 2 threads, ns each | ours / it |\n|---|---:|---:|---:|---:|\n";
        for Row { name, one, two } in &rows {
            let (alone, beside) = (ratio(rows[ours].one, *one), ratio(rows[ours].two, *two));
            let beside = if met { number(beside) } else { "no contention seen".to_owned() };
            let _ = writeln!(
                text,
                "| {name} | {} | {} | {} | {beside} |",
                number(*one),
                number(alone),
                number(*two)
            );
        }
        text += "\n";
        for goal in goals {
            let peer = row(&rows, goal.peer);
            let (count, ours, theirs) = match goal.threads {
                Threads::One => ("1 thread", rows[ours].one, peer.one),
                Threads::Two => ("2 threads", rows[ours].two, peer.two),
            };
            let verdict = match ratio(ours, theirs) {
                None => "too few undisturbed windows".to_owned(),
                Some(_) if goal.threads == Threads::Two && !peer.is_contended() => {
                    "no contention seen: not judged".to_owned()
                }
                Some(ratio) if ratio <= goal.at_most => format!("{ratio:.3}: met"),
                Some(ratio) => format!("{ratio:.3}: missed"),
            };
            let _ = writeln!(text, "* goal, {count}: ours / {} ≤ {:.2} – {verdict}", goal.peer, goal.at_most);
        }
        text += &windows(one, two);
        Self(text)
    }
}

fn row<'a>(rows: &'a [Row], name: &str) -> &'a Row {
    rows.iter().find(|row| row.name == name).expect("a goal names a candidate")
}

impl Row {
    fn is_contended(&self) -> bool {
        ratio(self.two, self.one).is_some_and(|ratio| ratio >= CONTENTION)
    }
}

/// How many windows a table rests on.
pub(crate) fn windows(one: &[Samples], two: &[Samples]) -> String {
    let counts = |samples: &[Samples]| {
        let kept = samples.iter().map(Samples::kept).min().unwrap_or(0);
        let thrown: usize = samples.iter().map(Samples::thrown_away).sum();
        format!("at least {kept} windows each, {thrown} disturbed ones thrown away")
    };
    format!("* 1 thread: {}; 2 threads: {}\n", counts(one), counts(two))
}

pub(crate) fn ratio(one: Option<f64>, other: Option<f64>) -> Option<f64> {
    Some(one? / other?)
}

pub(crate) fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "too few windows".to_owned(), |value| format!("{value:.2}"))
}

/// A row for each way: its median in this unit, and the first way's time against its own, as the median of the rounds'
/// ratios; which are given, too.
pub(crate) fn rows<const N: usize>(
    names: [&str; N],
    took: &[Vec<Duration>; N],
    unit: Duration,
) -> (String, [f64; N]) {
    let ratios = std::array::from_fn(|way| {
        median(took[0].iter().zip(&took[way]).map(|(first, it)| first.as_secs_f64() / it.as_secs_f64()))
    });
    let mut text = String::new();
    for (way, name) in names.iter().enumerate() {
        let time = median(took[way].iter().map(|took| took.div_duration_f64(unit)));
        let decimals = usize::from(time < 100.0);
        let ratio = if way == 0 { String::new() } else { format!("{:.2}", ratios[way]) };
        text += &format!("| {name} | {time:.decimals$} | {ratio} |\n");
    }
    (text, ratios)
}

pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A whole page: where and when, then the tables.
pub(crate) fn page(title: &str, tables: &[Table]) -> String {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = kernel.split('-').next().unwrap_or_default().trim();
    let rustc = std::process::Command::new("rustc").arg("--version").output().ok();
    let rustc = rustc.map_or_else(String::new, |output| String::from_utf8_lossy(&output.stdout).into_owned());
    let days = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 86_400;
    let (year, month, day) = civil(days);
    let mut text = format!(
        "# {title}\n\n{year}-{month:02}-{day:02}, {} {}, {cores} hardware threads of a \
         virtual machine, Linux {kernel}, {}, `--release`.\nSee `benches/README.md` for the method.\n",
        std::env::consts::ARCH,
        std::env::consts::OS,
        rustc.trim(),
    );
    for Table(table) in tables {
        text += "\n";
        text += table;
    }
    text
}

/// Days since the Unix epoch as year, month, day (H. Hinnant, "chrono-compatible low-level date algorithms",
/// `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}
