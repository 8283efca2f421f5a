//! docs/operations.md, as far as its numbers are those of code and manifests.

use std::collections::BTreeSet;
use std::time::Duration;

use shutdown_core::parse_duration;

/// The page.
pub(crate) struct Page {
    text: String,
}

impl Page {
    pub(crate) fn read() -> Self {
        let path = crate::root().join("docs/operations.md");
        Self { text: std::fs::read_to_string(path).expect("docs/operations.md is there") }
    }

    /// The cells of the rows of its tables, without backquotes.
    fn rows(&self) -> impl Iterator<Item = Vec<String>> + '_ {
        self.text
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect())
    }

    /// Something that the law takes for granted: `margin`, `endpoint propagation` …
    pub(crate) fn assumed(&self, name: &str) -> Duration {
        let row = self.rows().find(|row| row[0] == name);
        let row = row.unwrap_or_else(|| panic!("docs/operations.md says nothing about {name}"));
        parse_duration(&row[1]).unwrap_or_else(|problem| panic!("{name} {:?}: {problem}", row[1]))
    }

    /// The variables and their defaults.
    pub(crate) fn defaults(&self) -> Vec<(String, String)> {
        let rows = self.rows().filter(|row| row[0].starts_with("SHUTDOWN_"));
        rows.map(|row| (row[0].clone(), row[1].clone())).collect()
    }

    /// The variables that the page recommends to set, and the least for each.
    pub(crate) fn recommended(&self) -> Vec<(&'static str, Duration)> {
        let rows: Vec<_> = self.rows().filter(|row| row[0].starts_with("SHUTDOWN_")).collect();
        let known = shutdown_core::ShutdownConfig::VARIABLES.iter();
        known
            .filter_map(|name| {
                let row = rows.iter().find(|row| row[0] == **name)?;
                parse_duration(row.get(2)?).ok().map(|time| (*name, time))
            })
            .collect()
    }

    /// Checks every `a + b … = c` and says how many there are.
    pub(crate) fn sums(&self) -> usize {
        let mut checked = 0;
        let text = self.text.replace('\n', " ");
        let words: Vec<_> = text.split(' ').collect();
        let number = |word: &str| word.trim_matches(['(', ')', ',', '.', ';', ':', '*']).parse::<f64>().ok();
        for equals in (1..words.len().saturating_sub(1)).filter(|at| words[*at] == "=") {
            let (Some(mut sum), Some(said)) = (number(words[equals - 1]), number(words[equals + 1])) else {
                continue;
            };
            let mut at = equals - 1;
            while at >= 2 && words[at - 1] == "+" {
                sum += number(words[at - 2]).unwrap_or_else(|| panic!("{:?} is no number", words[at - 2]));
                at -= 2;
            }
            let whole = words[at..=equals + 1].join(" ");
            assert!(at < equals - 1, "{whole} adds nothing");
            assert!((sum - said).abs() < 1e-6, "docs/operations.md: {whole}, but the sum is {sum}");
            checked += 1;
        }
        checked
    }

    /// Whether these words are in it.
    pub(crate) fn says(&self, words: &str) -> bool {
        self.text.replace('\n', " ").contains(words)
    }

    /// The names of metrics: what begins as ours do.
    pub(crate) fn metrics(&self) -> BTreeSet<&str> {
        let words = self.text.split(|c: char| !(c.is_ascii_lowercase() || c == '_'));
        words.filter(|word| word.starts_with("shutdown_") || word.starts_with("last_shutdown_")).collect()
    }
}
