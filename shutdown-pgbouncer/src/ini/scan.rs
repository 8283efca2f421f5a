//! The parts of a `pgbouncer.ini`, each with its place, as PgBouncer finds them.
//!
//! PgBouncer stops at the first part that it cannot read. This goes on in the next line, so that one look tells of all.

use std::ops::Range;

use crate::connection::is_space;

/// Something in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Its line, from 1 on.
    pub(super) line: usize,
    /// Its bytes, without white space around it.
    pub(super) at: Range<usize>,
    pub(super) what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// `[name]`; where the name stands.
    Section(Range<usize>),
    /// `%include file`; where the file's name stands.
    Include(Range<usize>),
    /// `key = value`.
    Entry {
        /// Without quotes.
        key: Range<usize>,
        quoted: bool,
        value: Range<usize>,
    },
    /// What cannot be read, and why.
    Broken(&'static str),
}

/// What PgBouncer reads of a file: nothing from the first NUL on.
pub(super) fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Finds the parts of a text without NUL.
pub(super) fn scan(text: &[u8]) -> Vec<Part> {
    let mut scan = Scan { text, at: 0, line: 1, counted: 0 };
    std::iter::from_fn(|| scan.next()).collect()
}

/// The end of the line that a byte stands in, without its newline.
pub(super) fn line_end(text: &[u8], from: usize) -> usize {
    text[from..].iter().position(|byte| *byte == b'\n').map_or(text.len(), |length| from + length)
}

struct Scan<'a> {
    text: &'a [u8],
    at: usize,
    line: usize,
    /// Up to where newlines are counted in `line`.
    counted: usize,
}

impl Scan<'_> {
    fn next(&mut self) -> Option<Part> {
        loop {
            self.skip(is_space);
            match self.peek()? {
                b'#' | b';' => self.at = line_end(self.text, self.at),
                _ => break,
            }
        }
        let start = self.at;
        self.line += self.text[self.counted..start].iter().filter(|byte| **byte == b'\n').count();
        self.counted = start;
        let what = self.part().unwrap_or_else(|why| {
            self.at = line_end(self.text, start);
            What::Broken(why)
        });
        Some(Part { line: self.line, at: start..self.at, what })
    }

    fn part(&mut self) -> Result<What, &'static str> {
        let rest = &self.text[self.at..];
        if rest.strip_prefix(b"%include").is_some_and(|rest| rest.first().is_some_and(is_blank)) {
            self.at += "%include".len();
            self.skip(|byte| is_blank(&byte));
            return Ok(What::Include(self.rest_of_line()));
        }
        if rest.starts_with(b"[") {
            let name = self.at + 1;
            let end = line_end(self.text, name);
            let length = self.text[name..end].iter().position(|byte| *byte == b']');
            let length = length.ok_or("a section needs a closing ]")?;
            self.at = name + length + 1;
            return Ok(What::Section(name..name + length));
        }
        let (key, quoted) = self.key()?;
        self.skip(|byte| is_blank(&byte));
        if self.peek() != Some(b'=') {
            return Err(
                "it is no key = value; a name may have letters, digits and _.-*, and comments begin with ; or #",
            );
        }
        self.at += 1;
        self.skip(|byte| is_blank(&byte));
        Ok(What::Entry { key, quoted, value: self.rest_of_line() })
    }

    /// A key, which may be empty, or one in quotes, which may not but may hold all but a quote, newlines too.
    fn key(&mut self) -> Result<(Range<usize>, bool), &'static str> {
        let quoted = self.peek() == Some(b'\'');
        let start = self.at + usize::from(quoted);
        self.at = start;
        if quoted {
            self.skip(|byte| byte != b'\'');
            if self.peek().is_none() || self.at == start {
                return Err("a name in quotes needs a closing ' and something between them");
            }
        } else {
            self.skip(|byte| byte.is_ascii_alphanumeric() || b"_.-*".contains(&byte));
        }
        let key = start..self.at;
        self.at += usize::from(quoted);
        Ok((key, quoted))
    }

    /// From here to the end of the line, without white space there.
    fn rest_of_line(&mut self) -> Range<usize> {
        let start = self.at;
        let rest = &self.text[start..line_end(self.text, start)];
        self.at += rest.iter().rposition(|byte| !is_space(*byte)).map_or(0, |last| last + 1);
        start..self.at
    }

    fn skip(&mut self, which: impl Fn(u8) -> bool) {
        self.at += self.text[self.at..].iter().take_while(|byte| which(**byte)).count();
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }
}

fn is_blank(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t')
}
