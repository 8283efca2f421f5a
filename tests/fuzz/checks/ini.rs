//! What must hold for the bytes of every `pgbouncer.ini`. The fuzzer and the test that replays its corpus share it.

use shutdown_pgbouncer::{Capacity, Connection, DatabaseName, Ini, Version};

const VERSIONS: [Version; 4] = [version(18), version(24), version(25), NEWEST];
const NEWEST: Version = version(26);
/// The names that edits are tried with: those that inputs have, and one that is the beginning of another.
const NAMES: [&str; 3] = ["a", "proj_a", "proj_ab"];

const fn version(minor: u32) -> Version {
    Version { major: 1, minor }
}

/// Reads the input, and edits it in every way; whether the newest version accepts it.
///
/// # Panics
///
/// If a law is broken.
pub(crate) fn check(input: &[u8]) -> bool {
    let ini = Ini::new(input);
    for version in VERSIONS {
        let problems = ini.problems(version);
        assert!(problems.is_sorted_by_key(|problem| problem.line));
        assert!(problems.iter().all(|problem| problem.line > 0 && !problem.what.contains('\n')));
    }
    let lines = input.iter().filter(|byte| **byte == b'\n').count() + 1;
    let databases = ini.databases();
    assert!(databases.is_sorted_by_key(|database| database.line));
    assert!(databases.iter().all(|database| (1..=lines).contains(&database.line)));
    assert!(ini.includes().iter().all(|(line, _)| (1..=lines).contains(line)));
    let capacity = Capacity::of(&ini, 3, 1, 100).to_string();
    assert!(capacity.starts_with("Total Connections = "), "{capacity}");
    assert_eq!(ini.as_bytes(), input, "reading changes nothing");
    for database in &databases {
        // What is written of an entry reads as the same.
        if let Ok(connection) = &database.connection {
            assert_eq!(Connection::parse(&connection.to_string()).as_ref(), Ok(connection));
        }
        removed(&ini, &database.name);
    }
    for name in NAMES {
        set(&ini, name);
        removed(&ini, name);
    }
    parameter(&ini, "default_pool_size", "7");
    parameter(&ini, "auth_file", "/etc/x y.txt");
    !fatal(&ini, NEWEST)
}

fn set(before: &Ini, name: &str) {
    let connection = Connection::default().set("host", "h").and_then(|it| it.set("password", "= it's x"));
    let connection = connection.expect("PgBouncer's own keys");
    let parsed: DatabaseName = name.parse().expect("a good name");
    let mut after = before.clone();
    if let Err(why) = after.set_database(&parsed, &connection) {
        assert_eq!(&after, before, "a refused edit changes nothing");
        assert!(why.contains("no section") || fatal(before, NEWEST), "{why}");
        return;
    }
    let databases = after.databases();
    let mut read = databases.iter().filter(|database| database.name == name);
    assert_eq!(read.next().map(|database| &database.connection), Some(&Ok(connection.clone())));
    assert!(read.next().is_none(), "its doubles are gone");
    let mut twice = after.clone();
    twice.set_database(&parsed, &connection).expect("it is there already");
    assert_eq!(twice, after, "a second time changes nothing");
    others_stay(before, &after, name);
    no_new_problem(before, &after);
    removed(&after, name);
}

fn removed(before: &Ini, name: &str) {
    // A name that is not UTF-8 is shown as another.
    if name.contains('\u{fffd}') {
        return;
    }
    let was_there = before.databases().iter().any(|database| database.name == name);
    let mut after = before.clone();
    assert_eq!(after.remove_database(name), was_there);
    if !was_there {
        assert_eq!(&after, before);
        return;
    }
    if !fatal(before, NEWEST) {
        assert!(after.databases().iter().all(|database| database.name != name), "it is gone");
    }
    others_stay(before, &after, name);
    no_new_problem(before, &after);
}

fn parameter(before: &Ini, key: &str, value: &str) {
    let mut after = before.clone();
    if let Err(why) = after.set_parameter(key, value) {
        assert_eq!(&after, before, "a refused edit changes nothing");
        assert!(why.contains("no section") || fatal(before, NEWEST), "{why}");
        return;
    }
    assert_eq!(after.parameter(key).as_deref(), Some(value));
    let mut twice = after.clone();
    twice.set_parameter(key, value).expect("it is there already");
    assert_eq!(twice, after, "a second time changes nothing");
    no_new_problem(before, &after);
    // One place is changed: the rest is the beginning and the end of both.
    let (old, new) = (before.as_bytes(), after.as_bytes());
    let same = old.iter().zip(new).take_while(|(old, new)| old == new).count();
    let behind = &old[same..];
    let tail = behind.iter().rev().zip(new[same..].iter().rev()).take_while(|(old, new)| old == new).count();
    let changed = &behind[..behind.len() - tail];
    assert!(!changed.contains(&b'\n'), "only one line is touched: {}", changed.escape_ascii());
}

/// All lines but those of a database are the same bytes, if each of its entries has lines of its own.
fn others_stay(before: &Ini, after: &Ini, name: &str) {
    let simple = |ini: &Ini| {
        let lines: Vec<_> = ini.as_bytes().split(|byte| *byte == b'\n').collect();
        let databases = ini.databases();
        let mut own = databases.iter().filter(|database| database.name == name);
        own.all(|database| {
            !lines[database.line - 1].contains(&b'[') && !lines[database.line - 1].contains(&0)
        })
    };
    let others = |ini: &Ini| {
        let databases = ini.databases();
        let own: Vec<_> =
            databases.iter().filter(|database| database.name == name).map(|database| database.line).collect();
        let lines = ini.as_bytes().split(|byte| *byte == b'\n').zip(1..);
        let others = lines
            .filter(|(_, line)| !own.contains(line))
            .map(|(text, _)| text.strip_suffix(b"\r").unwrap_or(text));
        others.filter(|text| !text.is_empty()).map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    // A line may become two: behind a section's name, and before a NUL.
    if fatal(before, NEWEST) || name.contains('\n') || !simple(before) || !simple(after) {
        return;
    }
    let (old, new) = (others(before), others(after));
    assert!(old == new || old.concat() == new.concat(), "other lines changed");
}

fn no_new_problem(before: &Ini, after: &Ini) {
    for version in VERSIONS {
        assert!(fatal(before, version) || !fatal(after, version), "an edit made a problem for {version}");
    }
}

fn fatal(ini: &Ini, version: Version) -> bool {
    ini.problems(version).iter().any(|problem| problem.fatal)
}
