//! The entries of a `userlist.txt` with their places, as PgBouncer finds them.

use std::ops::Range;

use super::{NAME_BYTES, SECRET_BYTES};

pub(super) use crate::connection::is_space;

/// What was found up to the first place that cannot be read.
pub(super) struct Scanned {
    pub(super) entries: Vec<Entry>,
    pub(super) broken: Option<Broken>,
}

/// An entry.
pub(super) struct Entry {
    /// The line in which it begins, from 1 on.
    pub(super) line: usize,
    /// Its first quote.
    pub(super) at: usize,
    /// Without the doubles of its quotes.
    pub(super) name: Vec<u8>,
    /// Behind the quote that closes the name.
    pub(super) name_end: usize,
    /// Where the secret stands, between its quotes.
    pub(super) secret: Range<usize>,
    /// Behind its last quote.
    pub(super) end: usize,
}

/// Where PgBouncer stops.
pub(super) struct Broken {
    pub(super) line: usize,
    pub(super) at: usize,
    pub(super) why: &'static str,
}

/// What PgBouncer reads of a file: nothing from the first NUL on.
pub(super) fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

pub(super) fn scan(bytes: &[u8]) -> Scanned {
    let text = text(bytes);
    let mut entries = Vec::new();
    let (mut at, mut line, mut counted) = (0, 1, 0);
    loop {
        at += text[at..].iter().take_while(|byte| is_space(**byte)).count();
        line += text[counted..at].iter().filter(|byte| **byte == b'\n').count();
        counted = at;
        match text.get(at) {
            None => return Scanned { entries, broken: None },
            Some(b';') => {}
            Some(_) => match entry(text, at, line) {
                Ok(entry) => {
                    at = entry.end;
                    entries.push(entry);
                }
                Err(why) => return Scanned { entries, broken: Some(Broken { line, at, why }) },
            },
        }
        at += text[at..].iter().take_while(|byte| **byte != b'\n').count();
    }
}

fn entry(text: &[u8], at: usize, line: usize) -> Result<Entry, &'static str> {
    if text[at] != b'"' {
        return Err(
            "a line begins with neither a quote \" nor a ; and ends the list: nobody below can log in",
        );
    }
    let name =
        closed(text, at).ok_or("a quote \" is not closed, which ends the list: nobody below can log in")?;
    if name.len() > NAME_BYTES {
        return Err("a user's name is too long, which ends the list: nobody below can log in");
    }
    // The first quote from here on, be it in another line.
    let quote =
        text[name.end + 1..].iter().position(|byte| *byte == b'"').map(|length| name.end + 1 + length);
    let secret = quote.and_then(|quote| closed(text, quote));
    let secret =
        secret.ok_or("a user has no secret in quotes \", which ends the list: nobody below can log in")?;
    if secret.len() > SECRET_BYTES {
        return Err("a secret is too long for 1.24 and before, which ends the list: nobody below can log in");
    }
    let end = secret.end + 1;
    let name_end = name.end + 1;
    Ok(Entry { line, at, name: undoubled(&text[name]), name_end, secret, end })
}

/// What stands between a quote and the one that closes it.
fn closed(text: &[u8], quote: usize) -> Option<Range<usize>> {
    let mut at = quote + 1;
    loop {
        at += text[at..].iter().position(|byte| *byte == b'"')?;
        if text.get(at + 1) != Some(&b'"') {
            return Some(quote + 1..at);
        }
        at += 2;
    }
}

/// Every two quotes are one.
fn undoubled(text: &[u8]) -> Vec<u8> {
    let mut bytes = text.iter();
    let mut name = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        name.push(*byte);
        if *byte == b'"' {
            bytes.next();
        }
    }
    name
}
