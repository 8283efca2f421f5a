//! Every number of a file, and the file with one of them made smaller.
//!
//! A word that begins with a digit is a number, with or without a unit, or an address. What is no time is excused by
//! the word before it, here and nowhere else.

use std::ops::Range;

/// Words after which a number is no time, and what it is.
pub(crate) const EXCUSED: &[(&str, &str)] = &[
    ("replicas:", "a count"),
    ("maxUnavailable:", "a count"),
    ("maxSurge:", "a count"),
    ("runAsUser:", "a user"),
    ("fsGroup:", "a group"),
    ("--uid", "a user"),
    ("containerPort:", "a port"),
    ("port:", "a port"),
    ("port", "a port"),
    ("maxSkew:", "a count"),
    ("-INT", "a process"),
    ("cpu:", "a limit"),
    ("memory:", "a limit"),
    ("StateDirectoryMode", "a file mode"),
    ("-m", "a file mode"),
    ("RestartPreventExitStatus", "an exit code"),
];

/// A number in a file.
pub(crate) struct Number {
    /// The line, from 1.
    pub(crate) line: usize,
    /// The word before it.
    pub(crate) key: String,
    /// Without its unit.
    pub(crate) digits: String,
    place: Range<usize>,
}

impl Number {
    /// The excuse that holds for it.
    pub(crate) fn excuse(&self) -> Option<&'static str> {
        EXCUSED.iter().map(|(key, _)| *key).find(|key| *key == self.key)
    }

    /// The next smaller one.
    pub(crate) fn less(&self) -> Option<u64> {
        self.digits.parse::<u64>().ok()?.checked_sub(1)
    }

    /// The file with another one in its place.
    pub(crate) fn replaced(&self, text: &str, by: u64) -> String {
        format!("{}{by}{}", &text[..self.place.start], &text[self.place.end..])
    }
}

/// The numbers of a file, comments left out, and the files that are in it (`name: |`): they have laws of their own.
///
/// # Panics
///
/// If a word begins as a number and is none that is known here.
pub(crate) fn numbers(path: &str, text: &str) -> Vec<Number> {
    let mut found = Vec::new();
    let mut start = 0;
    let mut file_in_it: Option<usize> = None;
    for (index, whole) in text.split_inclusive('\n').enumerate() {
        let mut key = String::new();
        let depth = whole.len() - whole.trim_start().len();
        if file_in_it.is_some_and(|of| depth > of || whole.trim().is_empty()) {
            start += whole.len();
            continue;
        }
        file_in_it = whole.trim_end().ends_with(": |").then_some(depth);
        for place in words(without_comment(whole)) {
            let word = &whole[place.clone()];
            if word.starts_with(|c: char| c.is_ascii_digit()) && !is_address(word) {
                let digits: String = word.chars().take_while(char::is_ascii_digit).collect();
                let unit = &word[digits.len()..];
                let line = index + 1;
                assert!(unit.chars().all(char::is_alphabetic), "{path}:{line}: what is {word:?}?");
                let place = start + place.start..start + place.start + digits.len();
                found.push(Number { line, key: key.clone(), digits, place });
            }
            key = word.to_owned();
        }
        start += whole.len();
    }
    found
}

/// `0.0.0.0:8080`, `8080:8080`, `65532:65532`
fn is_address(word: &str) -> bool {
    let numbers = word.split(['.', ':']);
    word.contains(':') && numbers.into_iter().all(|part| part.parse::<u32>().is_ok())
}

fn without_comment(line: &str) -> &str {
    let comment = |(at, _): &(usize, &str)| *at == 0 || line[..*at].ends_with(char::is_whitespace);
    line.match_indices('#').find(comment).map_or(line, |(at, _)| &line[..at])
}

fn words(line: &str) -> Vec<Range<usize>> {
    let is_gap = |c: char| c.is_whitespace() || "\"'{}[],=;".contains(c);
    let mut words = Vec::new();
    let mut start = None;
    for (at, c) in line.char_indices().chain([(line.len(), ' ')]) {
        match (is_gap(c), start) {
            (false, None) => start = Some(at),
            (true, Some(begin)) => {
                words.push(begin..at);
                start = None;
            }
            _ => {}
        }
    }
    words
}
