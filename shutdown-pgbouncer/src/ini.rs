//! `pgbouncer.ini`: read as PgBouncer reads it, changed in one line at a time, every other byte as it was.
//!
//! How it reads was measured on 1.18, 1.24 and 1.26:
//!
//! * A comment has a line of its own, that begins with `;` or `#`; behind a value there is none.
//! * A value is the rest of its line without white space at the end. A line is not continued.
//! * The same section may come again. A second `[pgbouncer]` sets back to its default what the first has set.
//! * Behind a section's `]`, an entry may stand in the same line.
//! * A name has letters, digits and `_.-*`, or none of them; from 1.25 on it may be in `'…'`, with anything but a quote. Names in
//!   `"…"`, which PgBouncer's manual has, no version reads.
//! * Of two entries of one name the last counts.
//! * `%include file` reads a file here; the section goes on into it, and out of it.
//! * A NUL byte ends the file.

mod check;
mod parameters;
mod scan;

use std::fmt;
use std::ops::Range;

use crate::{Connection, DatabaseName, Problem, Version};
use parameters::Taken;
use scan::{Part, What, line_end};

/// The text of one file.
#[derive(Clone, PartialEq, Eq)]
pub struct Ini {
    bytes: Vec<u8>,
}

/// An entry of a section `[databases]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    /// Its name, `*` for all others; invalid UTF-8 is replaced.
    pub name: String,
    /// Its line, from 1 on.
    pub line: usize,
    /// Where it is, if that can be read.
    pub connection: Result<Connection, String>,
}

/// Which section an entry is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Section {
    /// None has begun.
    None,
    Databases,
    Users,
    Peers,
    Pgbouncer,
    Unknown,
}

/// An entry with its place.
struct Entry<'a> {
    section: Section,
    /// Which part its section's name is.
    part: usize,
    /// A file is included between both, that may begin a section.
    behind_include: bool,
    line: usize,
    at: Range<usize>,
    key: &'a [u8],
    quoted: bool,
    value: &'a [u8],
    /// Where the value stands.
    value_at: Range<usize>,
}

impl Ini {
    /// Takes a file as it is; whatever is wrong with it, [`problems`](Self::problems) tells.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self { bytes: bytes.into() }
    }

    /// The file.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What this version would refuse or misread, in the order of its lines. Files that are included are not looked into.
    ///
    /// A file with a fatal problem is refused: PgBouncer does not start with it, and a reload keeps of it what stands before.
    /// Measured on 1.18, 1.24 and 1.26; where a version between two of them may go either way, the problem is not fatal.
    /// What the values refer to is not looked at here; [`check()`](crate::check()) looks for files and directories.
    pub fn problems(&self, version: Version) -> Vec<Problem> {
        check::problems(self, version)
    }

    /// All entries of its databases, in their order. Of two of one name the last counts.
    ///
    /// Entries behind what PgBouncer cannot read are here, too. What follows an `%include` is taken for the section before it.
    pub fn databases(&self) -> Vec<Database> {
        let entries = self.entries().into_iter().filter(|entry| entry.section == Section::Databases);
        entries
            .map(|entry| Database {
                name: String::from_utf8_lossy(entry.key).into_owned(),
                line: entry.line,
                connection: match std::str::from_utf8(entry.value) {
                    Ok(text) => Connection::parse(text),
                    Err(_) => Err("it is not UTF-8".into()),
                },
            })
            .collect()
    }

    /// The last value of a key in `[pgbouncer]`, invalid UTF-8 replaced. One that a second `[pgbouncer]` sets back is none.
    pub fn parameter(&self, key: &str) -> Option<String> {
        let value = self.parameter_entry(key)?.value;
        Some(String::from_utf8_lossy(value).into_owned())
    }

    /// The line of what [`parameter`](Self::parameter) gives.
    pub(crate) fn parameter_line(&self, key: &str) -> Option<usize> {
        Some(self.parameter_entry(key)?.line)
    }

    /// The files that it includes (`%include`), with their lines.
    pub fn includes(&self) -> Vec<(usize, String)> {
        let name = |file: &Range<usize>| String::from_utf8_lossy(&self.bytes[file.clone()]).into_owned();
        let parts = self.parts().into_iter();
        parts
            .filter_map(|part| match &part.what {
                What::Include(file) => Some((part.line, name(file))),
                _ => None,
            })
            .collect()
    }

    /// Gives a database this entry: in the place of the last one of that name, whose doubles go; else behind the last
    /// entry of the first section `[databases]`.
    ///
    /// Behind an `%include` in that section nothing is added, as the file may begin another section. An entry of the same name
    /// in an included file is not seen.
    ///
    /// # Errors
    ///
    /// There is no section `[databases]`; or the file is broken so that the entry would be read as a part of something else.
    pub fn set_database(&mut self, name: &DatabaseName, connection: &Connection) -> Result<(), String> {
        let entries = self.entries();
        let mut edits = Edits::default();
        let mut named = entries.iter().filter(|entry| entry.is_database(name.as_str())).rev();
        let line = format!("{name} = {connection}");
        match named.next() {
            Some(last) => {
                self.replace(&mut edits, last, name.as_str(), &connection.to_string());
                named.for_each(|double| self.remove(&mut edits, double));
            }
            None => {
                let parts = self.parts();
                let first = parts.iter().position(|part| self.section(part) == Some(Section::Databases));
                let first = first.ok_or("there is no section [databases]")?;
                self.insert(&mut edits, &parts, first, &line);
            }
        }
        let edited = Self { bytes: edits.apply(&self.bytes) };
        let databases = edited.databases();
        let mut read = databases.iter().filter(|database| database.name == name.as_str());
        if read.next().is_none_or(|database| database.connection.as_ref() != Ok(connection))
            || read.next().is_some()
        {
            return Err(broken());
        }
        self.bytes = edited.bytes;
        Ok(())
    }

    /// Removes every entry of this name; whether there was one.
    pub fn remove_database(&mut self, name: &str) -> bool {
        let mut edits = Edits::default();
        self.entries()
            .iter()
            .filter(|entry| entry.is_database(name))
            .for_each(|entry| self.remove(&mut edits, entry));
        let any = !edits.0.is_empty();
        self.bytes = edits.apply(&self.bytes);
        any
    }

    /// Gives a key of `[pgbouncer]` this value: in the place of the last one, else at the end of the last such section.
    ///
    /// # Errors
    ///
    /// The key is none that PgBouncer knows, the value has a line's end or blanks around it, or there is no such section. The
    /// value is one that PgBouncer refuses or cuts; or the file is broken so that it would be read as a part of something else.
    pub fn set_parameter(&mut self, key: &str, value: &str) -> Result<(), String> {
        let Some(parameter) = parameters::find(key.as_bytes()) else {
            return Err(format!("{key:?} is no parameter of PgBouncer"));
        };
        if value.contains(['\n', '\r', '\0']) {
            return Err(format!("{key} has a line's end or a NUL"));
        }
        let space = |byte: Option<&u8>| byte.is_some_and(|byte| crate::connection::is_space(*byte));
        if space(value.as_bytes().first()) || space(value.as_bytes().last()) {
            return Err(format!("{key} has white space around it, which PgBouncer cuts"));
        }
        if parameter.kind.taken(value.as_bytes()) != Taken::AsWritten {
            return Err(format!("{key} is not {}", parameter.kind.wanted()));
        }
        let mut edits = Edits::default();
        let (last, _) = self.last_section(Section::Pgbouncer).ok_or("there is no section [pgbouncer]")?;
        match self.parameter_entry(key) {
            // An entry that a second section would set back, if it were not kept, moves there.
            Some(entry) if entry.part == last => self.replace(&mut edits, &entry, key, value),
            _ => self.insert(&mut edits, &self.parts(), last, format!("{key} = {value}").trim_end()),
        }
        let edited = Self { bytes: edits.apply(&self.bytes) };
        if edited.parameter(key).as_deref() != Some(value) {
            return Err(broken());
        }
        self.bytes = edited.bytes;
        Ok(())
    }

    fn parts(&self) -> Vec<Part> {
        scan::scan(scan::text(&self.bytes))
    }

    fn section(&self, part: &Part) -> Option<Section> {
        match &part.what {
            What::Section(name) => Some(Section::of(&self.bytes[name.clone()])),
            _ => None,
        }
    }

    /// The last section of a kind: which part it is, and its line.
    fn last_section(&self, section: Section) -> Option<(usize, usize)> {
        let parts = self.parts();
        let last = parts.iter().rposition(|part| self.section(part) == Some(section))?;
        Some((last, parts[last].line))
    }

    fn entries(&self) -> Vec<Entry<'_>> {
        let (mut section, mut of, mut behind_include) = (Section::None, 0, false);
        let mut entries = Vec::new();
        for (place, part) in self.parts().into_iter().enumerate() {
            match part.what {
                What::Section(name) => {
                    (section, of, behind_include) = (Section::of(&self.bytes[name]), place, false);
                }
                What::Include(_) => behind_include = true,
                What::Broken(_) => {}
                What::Entry { key, quoted, value } => entries.push(Entry {
                    section,
                    part: of,
                    behind_include,
                    line: part.line,
                    at: part.at,
                    key: &self.bytes[key],
                    quoted,
                    value: &self.bytes[value.clone()],
                    value_at: value,
                }),
            }
        }
        entries
    }

    fn parameter_entry(&self, key: &str) -> Option<Entry<'_>> {
        let (last, _) = self.last_section(Section::Pgbouncer)?;
        let kept = parameters::find(key.as_bytes()).is_none_or(|parameter| parameter.kept);
        self.entries().into_iter().rfind(|entry| {
            entry.section == Section::Pgbouncer && entry.key == key.as_bytes() && (kept || entry.part == last)
        })
    }

    /// Gives an entry another value, and a name without quotes, which every version reads.
    fn replace(&self, edits: &mut Edits, entry: &Entry<'_>, key: &str, value: &str) {
        if entry.quoted {
            edits.0.push((entry.at.clone(), format!("{key} = {value}").into_bytes()));
            return;
        }
        // `key =` is written with blanks around its sign.
        let before = &self.bytes[entry.at.start..entry.value_at.start];
        let blank = if entry.value.is_empty() && before.ends_with(b" =") { " " } else { "" };
        edits.0.push((entry.value_at.clone(), format!("{blank}{value}").into_bytes()));
    }

    /// Removes an entry with its lines, but not what stands before it in its line.
    fn remove(&self, edits: &mut Edits, entry: &Entry<'_>) {
        let text = scan::text(&self.bytes);
        let start =
            text[..entry.at.start].iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        if text[start..entry.at.start].iter().all(|byte| crate::connection::is_space(*byte)) {
            let end = line_end(text, entry.at.end);
            edits.0.push((start..(end + 1).min(text.len()), Vec::new()));
        } else {
            edits.0.push((entry.at.clone(), Vec::new()));
        }
    }

    /// Adds a line to a section: behind its last entry, or behind its name.
    fn insert(&self, edits: &mut Edits, parts: &[Part], section: usize, line: &str) {
        let text = scan::text(&self.bytes);
        let of_section = parts[section + 1..].iter();
        let of_section =
            of_section.take_while(|part| !matches!(part.what, What::Section(_) | What::Include(_)));
        let last = of_section.filter(|part| matches!(part.what, What::Entry { .. })).last();
        let after = last.unwrap_or(&parts[section]).at.end;
        let end = line_end(text, after);
        let rest = text[after..end].trim_ascii_start();
        let newline = self.newline(after);
        let (at, line) = if !rest.is_empty() && !rest.starts_with(b";") && !rest.starts_with(b"#") {
            // `[databases] %include file`: the line becomes two.
            (after, format!("{newline}{line}{newline}"))
        } else if end < text.len() {
            (end + 1, format!("{line}{newline}"))
        } else {
            (end, format!("{newline}{line}"))
        };
        edits.0.push((at..at, line.into_bytes()));
    }

    /// How the line ends in which a byte stands; if it has no end, how the first line does.
    fn newline(&self, from: usize) -> &'static str {
        let text = scan::text(&self.bytes);
        let end = line_end(text, from);
        let end = if end < text.len() { end } else { line_end(text, 0) };
        if end < text.len() && text[..end].ends_with(b"\r") { "\r\n" } else { "\n" }
    }
}

/// Without the text, which may hold passwords.
impl fmt::Debug for Ini {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ini").field("bytes", &self.bytes.len()).finish()
    }
}

impl Section {
    fn of(name: &[u8]) -> Self {
        match name {
            b"databases" => Self::Databases,
            b"users" => Self::Users,
            b"peers" => Self::Peers,
            b"pgbouncer" => Self::Pgbouncer,
            _ => Self::Unknown,
        }
    }
}

impl Entry<'_> {
    fn is_database(&self, name: &str) -> bool {
        self.section == Section::Databases && self.key == name.as_bytes()
    }
}

/// Changes to one text; none overlaps another.
#[derive(Default)]
struct Edits(Vec<(Range<usize>, Vec<u8>)>);

impl Edits {
    fn apply(mut self, bytes: &[u8]) -> Vec<u8> {
        self.0.sort_by_key(|(at, _)| at.start);
        let mut edited = bytes.to_vec();
        for (at, text) in self.0.into_iter().rev() {
            edited.splice(at, text);
        }
        edited
    }
}

/// The number that PgBouncer reads from a parameter: 32 bits of it, if all of it is one.
pub(crate) fn number(text: &str) -> Option<i64> {
    parameters::whole(text.as_bytes()).map(|number| i64::from(number as i32))
}

/// The only reason for which what was written is not read back.
fn broken() -> String {
    "the file is broken before this place, so that this would be read as a part of something else: repair it first".into()
}

#[cfg(test)]
mod tests;
