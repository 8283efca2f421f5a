//! The table of whole requests: what each candidate adds to the bare one, and ours against the cheapest peer.

use std::fmt::Write as _;

use crate::harness::Samples;
use crate::serving::{CONTENDERS, Role};
use crate::table::{Table, number, ratio, windows};

/// With two threads, what the peers add must grow at least by this; otherwise the threads did not meet and the
/// comparison says nothing. Smaller than for an operation alone, because the layer's own work does not grow.
const CONTENTION: f64 = 1.5;

/// What ours may add, as a part of what the cheapest peer adds.
const AT_MOST: [(&str, f64); 2] = [("1 thread", 0.60), ("2 threads", 0.50)];

/// One number of threads.
struct Column {
    whole: Vec<Option<f64>>,
    added: Vec<Option<f64>>,
    of_bare: Vec<Option<f64>>,
}

impl Column {
    fn new(samples: &[Samples]) -> Self {
        let bare = &samples[place(Role::Bare)];
        Self {
            whole: samples.iter().map(Samples::median).collect(),
            added: samples.iter().map(|samples| samples.added_to(bare)).collect(),
            of_bare: samples.iter().map(|samples| samples.divided_by(bare)).collect(),
        }
    }

    fn ours(&self) -> Option<f64> {
        self.added[place(Role::Ours)]
    }

    /// The peer that adds least, by its place.
    fn best_peer(&self) -> usize {
        cheapest_peer(&self.added)
    }
}

fn place(role: Role) -> usize {
    CONTENDERS.iter().position(|contender| contender.role == role).expect("there is one of this role")
}

/// The peer with the smallest number; one without a number is not it, unless none has one.
pub(crate) fn cheapest_peer(added: &[Option<f64>]) -> usize {
    let number = |place: &usize| added[*place].unwrap_or(f64::INFINITY);
    let peers = (0..CONTENDERS.len()).filter(|place| CONTENDERS[*place].role == Role::Peer);
    peers.min_by(|one, other| number(one).total_cmp(&number(other))).expect("there are peers")
}

/// The samples are in the order of [`CONTENDERS`].
pub(crate) fn table(title: &str, one: &[Samples], two: &[Samples]) -> Table {
    let (alone, beside) = (Column::new(one), Column::new(two));
    let growth = ratio(beside.added[beside.best_peer()], alone.added[alone.best_peer()]);
    let met = growth.is_some_and(|growth| growth >= CONTENTION);
    let mut text = format!("## {title}\n\n");
    text += "| what | 1 thread, ns | added | / bare | ours / it | 2 threads, ns each | added | / bare | ours / it |\n";
    text += "|---|---:|---:|---:|---:|---:|---:|---:|---:|\n";
    for (place, contender) in CONTENDERS.iter().enumerate() {
        let _ = write!(text, "| {} ", contender.name);
        for (column, met) in [(&alone, true), (&beside, met)] {
            let (added, against) = match contender.role {
                Role::Bare => (String::new(), String::new()),
                Role::Control => (nanos(column.added[place]), String::new()),
                _ if !met => (nanos(column.added[place]), "no contention seen".to_owned()),
                _ => (nanos(column.added[place]), number(ratio(column.ours(), column.added[place]))),
            };
            let (whole, of_bare) = (nanos(column.whole[place]), part(column.of_bare[place]));
            let _ = write!(text, "| {whole} | {added} | {of_bare} | {against} ");
        }
        text += "|\n";
    }
    text += "\n";
    for ((threads, at_most), (column, met)) in AT_MOST.iter().zip([(&alone, true), (&beside, met)]) {
        let best = column.best_peer();
        let verdict = match ratio(column.ours(), column.added[best]) {
            None => "too few undisturbed windows".to_owned(),
            Some(_) if !met => "no contention seen: not judged".to_owned(),
            Some(ratio) if ratio <= *at_most => format!("{ratio:.2}: met"),
            Some(ratio) => format!("{ratio:.2}: missed"),
        };
        let best = CONTENDERS[best].name;
        let _ = writeln!(
            text,
            "* goal, {threads}: ns added, ours / best peer ({best}) ≤ {at_most:.2} – {verdict}"
        );
    }
    let _ = writeln!(text, "* the best peer adds {} times as much with 2 threads as with 1", number(growth));
    text += &windows(one, two);
    Table(text)
}

fn nanos(value: Option<f64>) -> String {
    value.map_or_else(|| number(None), |value| format!("{value:.0}"))
}

fn part(value: Option<f64>) -> String {
    value.map_or_else(|| number(None), |value| format!("{value:.3}"))
}
