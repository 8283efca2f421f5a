//! What a version refuses of a `pgbouncer.ini`, or takes for something else than it says.

use super::parameters::{self, LDAP, Taken};
use super::scan::{self, What};
use super::{Entry, Ini, Section};
use crate::connection::{DATABASE, Keys, PEER, USER, check, pairs};
use crate::problem::{Known, Knows};
use crate::{Problem, Version};

/// The longest name of a database.
const DATABASE_BYTES: usize = 63;
/// The longest name of a user.
const USER_BYTES: usize = 127;

pub(super) fn problems(ini: &Ini, version: Version) -> Vec<Problem> {
    let mut problems = Vec::new();
    let text = scan::text(&ini.bytes);
    if text.len() < ini.bytes.len() {
        let line = 1 + text.iter().filter(|byte| **byte == b'\n').count();
        problems.push(Problem::misread(line, "a NUL byte ends the file: nothing behind it is read"));
    }
    let parts = scan::scan(text);
    let includes = parts.iter().any(|part| matches!(part.what, What::Include(_)));
    for part in &parts {
        match &part.what {
            What::Broken(why) => problems.push(Problem::fatal(part.line, *why)),
            What::Include(file) if file.is_empty() => {
                problems.push(Problem::fatal(part.line, "%include needs the name of a file"));
            }
            What::Section(name) => problems.extend(section(part.line, &text[name.clone()], version)),
            What::Include(_) | What::Entry { .. } => {}
        }
    }
    let entries = ini.entries();
    if !includes
        && !parts
            .iter()
            .any(|part| matches!(&part.what, What::Section(name) if text[name.clone()] == *b"pgbouncer"))
    {
        problems.push(Problem::fatal(1, "there is no section [pgbouncer]"));
    }
    for (place, entry) in entries.iter().enumerate() {
        let mut found = Vec::new();
        let first_behind_include = entry.behind_include
            && !place
                .checked_sub(1)
                .is_some_and(|before| entries[before].behind_include && entries[before].part == entry.part);
        if first_behind_include {
            found.push((false, String::from("the section of this line depends on the file that is included above it; begin it with its own [section]")));
        }
        if entry.quoted {
            let name = shown(entry.key);
            match Known::QUOTED_NAMES.to(version) {
                Knows::Yes => {}
                Knows::Perhaps => {
                    found.push((false, format!("{version} may not know names in quotes such as {name}")))
                }
                Knows::No => {
                    found.push((true, format!("{version} does not know names in quotes such as {name}")))
                }
            }
        }
        found.extend(match entry.section {
            Section::None if entry.behind_include => Vec::new(),
            Section::None => vec![(true, format!("{} stands before the first [section]", shown(entry.key)))],
            // Said of the section.
            Section::Unknown => Vec::new(),
            Section::Databases => database(entry, version),
            Section::Users => user(entry, version),
            Section::Peers => peer(entry, version),
            Section::Pgbouncer => parameter(entry, version),
        });
        found.extend(overruled(ini, &entries, place));
        problems.extend(found.into_iter().map(|(fatal, what)| Problem { line: entry.line, what, fatal }));
    }
    problems.sort_by_key(|problem| problem.line);
    problems
}

type Found = Vec<(bool, String)>;

fn section(line: usize, name: &[u8], version: Version) -> Option<Problem> {
    let known = match Section::of(name) {
        Section::Peers => Known::PEERS.to(version),
        Section::Unknown | Section::None => {
            let sections = "[databases], [pgbouncer], [users] and [peers], in small letters";
            return Some(Problem::fatal(
                line,
                format!("there is no section {}, only {sections}", shown(name)),
            ));
        }
        _ => Knows::Yes,
    };
    match known {
        Knows::No => Some(Problem::fatal(line, format!("{version} does not know the section [peers]"))),
        _ => None,
    }
}

fn database(entry: &Entry<'_>, version: Version) -> Found {
    let name = shown(entry.key);
    match entry.key {
        b"pgbouncer" => return vec![(true, "the name pgbouncer is reserved for the admin console".into())],
        key if key.len() > DATABASE_BYTES => {
            return vec![(true, format!("the name {name} has more than {DATABASE_BYTES} bytes"))];
        }
        _ => {}
    }
    let mut found = connection(&DATABASE, entry, "database", version);
    if entry.key == b"*" {
        // Looked at only when a client asks for a database that has no entry.
        for (fatal, what) in found.iter_mut().filter(|(fatal, _)| *fatal) {
            *fatal = false;
            what.push_str("; no client gets a database by *");
        }
    }
    if entry.key.is_empty() {
        found.push((
            false,
            "this makes a database without a name: something is missing in front of the =".into(),
        ));
    }
    found
}

fn user(entry: &Entry<'_>, version: Version) -> Found {
    let mut found = connection(&USER, entry, "user", version);
    if entry.key.len() > USER_BYTES {
        found.push((false, format!("the name {} is cut after {USER_BYTES} bytes", shown(entry.key))));
    }
    found
}

fn peer(entry: &Entry<'_>, version: Version) -> Found {
    let mut found = connection(&PEER, entry, "peer", version);
    let text = std::str::from_utf8(entry.key).unwrap_or_default();
    let id = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']).parse::<i64>();
    if !id.is_ok_and(|id| (1..=0xffff).contains(&id)) {
        found.push((true, format!("{} is no number of a peer: take one from 1 to 65535", shown(entry.key))));
    }
    let has_host = pairs(entry.value).is_ok_and(|read| read.pairs.iter().any(|(key, _)| key == b"host"));
    if !has_host {
        found.push((true, format!("peer {} has no host", shown(entry.key))));
    }
    found
}

fn connection(keys: &Keys, entry: &Entry<'_>, kind: &str, version: Version) -> Found {
    let name = shown(entry.key);
    match pairs(entry.value) {
        Err(why) => vec![(true, format!("{kind} {name}: {why}"))],
        Ok(read) => {
            let says = check(keys, &read, Some(version)).into_iter();
            says.map(|say| (say.fatal, format!("{kind} {name}: {}", say.what))).collect()
        }
    }
}

fn parameter(entry: &Entry<'_>, version: Version) -> Found {
    let name = shown(entry.key);
    let Some(parameter) = parameters::find(entry.key) else {
        return vec![(true, format!("no version knows the parameter {name}"))];
    };
    let mut found = Vec::new();
    let mut know = |what: &str, knows| match knows {
        Knows::Yes => {}
        Knows::Perhaps => found.push((false, format!("{version} may not know {what}"))),
        Knows::No => found.push((true, format!("{version} does not know {what}"))),
    };
    know(&format!("the parameter {name}"), parameter.known.to(version));
    if parameter.name == "auth_type" && entry.value.eq_ignore_ascii_case(LDAP.as_bytes()) {
        know("auth_type = ldap", Known::BY_26.to(version));
    }
    match parameter.kind.taken(entry.value) {
        Taken::AsWritten => {}
        Taken::Cut => {
            found.push((false, format!("{name} is cut to 32 bits, which makes another number of it")))
        }
        Taken::Refused => found.push((true, format!("{name} is not {}", parameter.kind.wanted()))),
    }
    found
}

/// What a later line makes of an entry.
fn overruled(ini: &Ini, entries: &[Entry<'_>], place: usize) -> Option<(bool, String)> {
    let entry = &entries[place];
    let name = shown(entry.key);
    let kind = match entry.section {
        Section::Databases => "database",
        Section::Users => "user",
        Section::Peers => "peer",
        Section::Pgbouncer => "parameter",
        Section::None | Section::Unknown => return None,
    };
    let later =
        entries[place + 1..].iter().rfind(|later| later.section == entry.section && later.key == entry.key);
    if let Some(later) = later {
        let stays = pairs(entry.value).is_ok_and(|read| read.pairs.iter().any(|(key, _)| key == b"user"));
        let stays = if kind == "database" && stays { ", but for its user, which stays" } else { "" };
        return Some((
            false,
            format!("{kind} {name} is given again in line {}, which counts{stays}", later.line),
        ));
    }
    let kept = parameters::find(entry.key).is_none_or(|parameter| parameter.kept);
    let last = ini.last_section(Section::Pgbouncer)?;
    (entry.section == Section::Pgbouncer && entry.part != last.0 && !kept).then(|| {
        (false, format!("{name} is set back to its default by the second [pgbouncer] in line {}", last.1))
    })
}

/// A name with quotes around it, so that it can be on one line.
fn shown(name: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(name))
}
