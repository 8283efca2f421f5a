use proptest::prelude::*;

use super::*;

const NEWEST: Version = Version { major: 1, minor: 26 };

fn name(text: &str) -> DatabaseName {
    text.parse().unwrap()
}

fn at(text: &str) -> Connection {
    Connection::parse(text).unwrap()
}

fn databases(text: &str) -> Vec<(String, usize)> {
    Ini::new(text).databases().into_iter().map(|database| (database.name, database.line)).collect()
}

fn database(name: &str, line: usize) -> (String, usize) {
    (name.to_owned(), line)
}

fn set(text: &str, who: &str, connection: &str) -> String {
    let mut ini = Ini::new(text);
    ini.set_database(&name(who), &at(connection)).unwrap();
    String::from_utf8(ini.bytes).unwrap()
}

fn remove(text: &str, who: &str) -> String {
    let mut ini = Ini::new(text);
    assert!(ini.remove_database(who));
    assert!(!ini.remove_database(who));
    String::from_utf8(ini.bytes).unwrap()
}

fn parameter(text: &str, key: &str, value: &str) -> String {
    let mut ini = Ini::new(text);
    ini.set_parameter(key, value).unwrap();
    String::from_utf8(ini.bytes).unwrap()
}

/// Lines of the fatal problems, and of the others.
fn problems(text: &str, version: Version) -> (Vec<usize>, Vec<usize>) {
    let problems = Ini::new(text).problems(version);
    let (fatal, misread): (Vec<_>, Vec<_>) = problems.into_iter().partition(|problem| problem.fatal);
    let lines = |problems: Vec<Problem>| problems.into_iter().map(|problem| problem.line).collect();
    (lines(fatal), lines(misread))
}

#[test]
fn databases_are_found_as_pgbouncer_finds_them() {
    let text = "; c = d\n[databases] a = host=h\n  b=host=h\r\n\n'c d'=\n= host=h\n* =\n[users]\nu =\n[databases]\na = port=1\n";
    let found = [("a", 2), ("b", 3), ("c d", 5), ("", 6), ("*", 7), ("a", 11)]
        .map(|(name, line)| database(name, line));
    assert_eq!(databases(text), found);
    assert_eq!(databases("[databases]\na=\0\nb=\n"), [database("a", 2)]);
    assert_eq!(databases("[DATABASES]\na=\n"), []);
    assert_eq!(databases("[databases] [users] [databases] a=\n"), [database("a", 1)]);
    assert_eq!(databases("[databases]\n'a\nb' = host=h\nc =\n"), [database("a\nb", 2), database("c", 4)]);
    assert_eq!(databases("[databases]\n # a =\n;b =\na@b =\nc = # d\n"), [database("c", 5)]);
    // What cannot be read ends with its line.
    assert_eq!(databases("[databases]\n'a\nb =\n\"c\" =\nd =\n"), [database("b", 3), database("d", 5)]);
}

#[test]
fn the_last_value_of_a_parameter_counts() {
    let text = "[pgbouncer]\npool_mode = session\nauth_file = x\n[pgbouncer]\nlisten_port = 1\nlisten_port=2 \r\nlisten_addr =\n";
    let ini = Ini::new(text);
    let parameters = ["listen_port", "listen_addr", "auth_file", "pool_mode", "bogus"];
    let values = [Some("2"), Some(""), Some("x"), None, None].map(|value| value.map(str::to_owned));
    assert_eq!(parameters.map(|key| ini.parameter(key)), values);
    // A second section sets back what the first has set.
    assert_eq!(problems(text, NEWEST), (vec![], vec![2, 5]));
}

#[test]
fn included_files_are_named() {
    let text = "%include a b.ini \n[databases]\n%include\t/etc/c\n%includes\n; %include d\n";
    assert_eq!(Ini::new(text).includes(), [(1, "a b.ini".into()), (3, "/etc/c".into())]);
}

#[test]
fn what_a_version_refuses_is_fatal_for_it() {
    let p = "[pgbouncer]\n";
    let refused = [
        ("[databases]\n", 1),
        ("[Pgbouncer]\n[pgbouncer]\n", 1),
        ("a = b\n[pgbouncer]\n", 1),
        ("[pgbouncer\n[pgbouncer]\n", 1),
        ("[pgbouncer]\nbogus = 1\n", 2),
        ("[pgbouncer]\nlisten_port = 1x\n", 2),
        ("[pgbouncer]\nlisten_port =\n", 2),
        ("[pgbouncer]\npool_mode = x\n", 2),
        ("[pgbouncer]\nquery_timeout = -1\n", 2),
        ("[pgbouncer]\n%include \n", 2),
        ("[pgbouncer]\n[databases]\n\"a\" = host=h\n", 3),
        ("[pgbouncer]\n[databases]\nü = host=h\n", 3),
        ("[pgbouncer]\n[databases]\na = host=h ; c\n", 3),
        ("[pgbouncer]\n[databases]\npgbouncer = host=h\n", 3),
        ("[pgbouncer]\n[peers]\n0 = host=h\n", 3),
        ("[pgbouncer]\n[peers]\n1 = port=1\n", 3),
        ("[pgbouncer]\n[users]\nu = bogus=1\n", 3),
    ];
    for (text, line) in refused {
        let (fatal, _) = problems(text, NEWEST);
        assert_eq!(fatal, [line], "{text}");
    }
    let new = |text: &str| {
        [Version::OLDEST, NEWEST].map(|version| problems(&format!("{p}{text}"), version).0.len())
    };
    assert_eq!(new("peer_id = 1\n"), [1, 0]);
    assert_eq!(new("[peers]\n1 = host=h\n"), [1, 0]);
    assert_eq!(new("[databases]\n'a' = host=h\n"), [1, 0]);
    assert_eq!(new("[databases]\na = reserve_pool_size=1\n"), [1, 0]);
    assert_eq!(new("suspend_timeout = 1\n"), [0, 1]);
    assert_eq!(new("auth_type = ldap\n"), [1, 0]);
}

#[test]
fn what_a_version_misreads_is_told_and_not_fatal() {
    let misread = [
        ("a = port=54x", 1),
        ("a = port=99999", 1),
        ("a = pool_size=abc", 1),
        ("a = host=h\tdbname=x", 1),
        ("a = host='h'xport=1", 1),
        ("a = host=h host=i", 1),
        ("a =\na =", 1),
        ("= host=h", 1),
        ("* = bogus", 1),
        ("a =\n\0", 1),
        ("%include x\na =\nb =", 1),
        ("# c\n ; c", 0),
    ];
    for (text, count) in misread {
        let (fatal, misread) = problems(&format!("[pgbouncer]\n[databases]\n{text}\n"), NEWEST);
        assert_eq!((fatal.len(), misread.len()), (0, count), "{text}");
    }
    assert_eq!(
        problems("[pgbouncer]\n[databases]\na = host=h port=5432 pool_size=10\n", Version::OLDEST),
        (vec![], vec![])
    );
}

#[test]
fn an_entry_is_changed_in_its_place() {
    assert_eq!(
        set("[databases]\n  a   =host=h \r\nb=\r\n", "a", "host=i"),
        "[databases]\n  a   =host=i \r\nb=\r\n"
    );
    assert_eq!(set("[databases]\n'a' = host=h\n", "a", "host=i"), "[databases]\na = host=i\n");
    assert_eq!(set("[databases] a = host=h\n", "a", "host=i"), "[databases] a = host=i\n");
    assert_eq!(set("[databases]\na =\n", "a", "host=i"), "[databases]\na = host=i\n");
    // Its doubles go.
    let doubles = "[databases] a =\n;\na = x=\n[users]\n[databases]\na = host=h\nb =\n";
    assert_eq!(set(doubles, "a", "host=i"), "[databases] \n;\n[users]\n[databases]\na = host=i\nb =\n");
}

#[test]
fn a_new_entry_comes_behind_the_others() {
    let p = "[pgbouncer]\n";
    assert_eq!(
        set(&format!("[databases]\na =\n\n; c\n{p}"), "b", "host=h"),
        format!("[databases]\na =\nb = host=h\n\n; c\n{p}")
    );
    assert_eq!(set(&format!("[databases]\n{p}"), "b", "host=h"), format!("[databases]\nb = host=h\n{p}"));
    assert_eq!(set("[databases] ; c\n", "b", "host=h"), "[databases] ; c\nb = host=h\n");
    assert_eq!(set("[databases]", "b", "host=h"), "[databases]\nb = host=h");
    assert_eq!(set("[databases]\r\na =", "b", "host=h"), "[databases]\r\na =\r\nb = host=h");
    assert_eq!(set("[databases]\r\na =\r\n", "b", "host=h"), "[databases]\r\na =\r\nb = host=h\r\n");
    assert_eq!(set("[databases] a =\n", "b", "host=h"), "[databases] a =\nb = host=h\n");
    assert_eq!(set("[databases] [users] u =\n", "b", "host=h"), "[databases]\nb = host=h\n [users] u =\n");
    assert_eq!(
        set("[databases]\na =\n%include x\nc =\n", "b", "host=h"),
        "[databases]\na =\nb = host=h\n%include x\nc =\n"
    );
    assert_eq!(set("[databases]\na =\0\n", "b", "host=h"), "[databases]\na =\nb = host=h\0\n");
    // The first section.
    assert_eq!(
        set("[databases]\na =\n[databases]\nc =\n", "b", ""),
        "[databases]\na =\nb = \n[databases]\nc =\n"
    );
}

#[test]
fn no_entry_is_added_where_it_would_not_be_read() {
    let mut ini = Ini::new("[pgbouncer]\n");
    let error = ini.set_database(&name("a"), &at("host=h")).unwrap_err();
    assert_eq!(error, "there is no section [databases]");
    let broken = "'x\n[databases]\nb =\n";
    let mut ini = Ini::new(broken);
    ini.set_database(&name("a"), &at("password='= x'")).unwrap_err();
    assert_eq!(ini.as_bytes(), broken.as_bytes());
}

#[test]
fn an_entry_goes_with_its_lines() {
    assert_eq!(remove("[databases]\na = host=h\nb =\n", "a"), "[databases]\nb =\n");
    assert_eq!(remove("[databases]\nb =\n a = host=h", "a"), "[databases]\nb =\n");
    assert_eq!(remove("[databases] a = host=h\r\nb =\n", "a"), "[databases] \r\nb =\n");
    assert_eq!(remove("[databases]\n'a\nb' = host=h\nb =\n", "a\nb"), "[databases]\nb =\n");
    assert_eq!(remove("[databases]\n* = host=h\n= x\n", "*"), "[databases]\n= x\n");
    assert_eq!(remove("[databases]\na = host=h\0\nb =\n", "a"), "[databases]\n\0\nb =\n");
    assert_eq!(
        remove("[databases]\na =\n[users]\na =\n[databases]\na =\n", "a"),
        "[databases]\n[users]\na =\n[databases]\n"
    );
}

#[test]
fn a_name_that_begins_as_another_is_another() {
    let text = "[databases]\nproj_a = host=1\nproj_ab = host=2\nPROJ_A = host=3\nmy_proj_a = host=4\n";
    assert_eq!(remove(text, "proj_a"), text.replace("proj_a = host=1\n", ""));
    assert_eq!(set(text, "proj_a", "host=5"), text.replace("host=1", "host=5"));
    assert_eq!(set(text, "proj", "host=5"), format!("{text}proj = host=5\n"));
}

#[test]
fn a_parameter_is_changed_in_its_place_or_added() {
    assert_eq!(
        parameter("[pgbouncer]\npool_mode=session\n", "pool_mode", "transaction"),
        "[pgbouncer]\npool_mode=transaction\n"
    );
    let text = "[pgbouncer]\nlisten_port = 1\n; c\n[databases]\n";
    assert_eq!(parameter(text, "listen_port", "2"), text.replace('1', "2"));
    assert_eq!(parameter(text, "default_pool_size", "5"), text.replace("1\n", "1\ndefault_pool_size = 5\n"));
    // In the last section: the first would be set back.
    let text = "[pgbouncer]\npool_mode = session\n[pgbouncer]\n";
    assert_eq!(parameter(text, "pool_mode", "statement"), format!("{text}pool_mode = statement\n"));
    assert_eq!(
        parameter("[pgbouncer]\nlisten_addr = *\n", "listen_addr", ""),
        "[pgbouncer]\nlisten_addr = \n"
    );
    let mut ini = Ini::new("[pgbouncer]\n");
    let bad = [
        ("bogus", "1"),
        ("Pool_mode", "session"),
        ("pool_mode", "x"),
        ("listen_port", "1x"),
        ("listen_port", ""),
        ("query_timeout", "-1"),
        ("listen_addr", "a\nb"),
        ("listen_addr", " a"),
        ("listen_addr", "a\t"),
        ("listen_addr", "a\rb"),
        ("listen_addr", "\0"),
        ("listen_port", "99999999999"),
    ];
    for (key, value) in bad {
        ini.set_parameter(key, value).unwrap_err();
    }
    assert_eq!(ini.as_bytes(), b"[pgbouncer]\n");
    Ini::new("[databases]\n").set_parameter("pool_mode", "session").unwrap_err();
}

#[test]
fn no_password_is_shown() {
    let text = "[databases]\na = password=hunter2\na = password=hunter2 x\nb = password='hunter2\nc = password=a hunter2=b\n\
                d = hunter2\n* = password=hunter2 x\n[pgbouncer]\nauth_ldap_options = hunter2\nlisten_port = hunter2\nhunter2\n[users]\nu = hunter2\n";
    let ini = Ini::new(text);
    let shown = format!("{ini:?} {:?} {:?}", ini.problems(NEWEST), ini.databases());
    assert!(!shown.contains("hunter2"), "{shown}");
}

/// Files of parts that matter to the reader.
fn files() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        Just("[databases]\n".to_owned()),
        Just("[databases] ".to_owned()),
        Just("[pgbouncer]\r\n".to_owned()),
        Just("[users]\n".to_owned()),
        Just("; comment\n".to_owned()),
        Just("%include x\n".to_owned()),
        Just("\n".to_owned()),
        "(proj_a|proj_ab|a|'a'|\\*|) ?= ?(host=h|password='it''s'|)[ \t]{0,2}(\r?\n|\0)?",
        "[\\['=a;\0\n ]{1,4}",
    ];
    proptest::collection::vec(part, 0..9).prop_map(|parts| parts.concat())
}

/// Its lines without those of a database, if none of these shares its line with a section.
fn others<'a>(ini: &'a Ini, name: &str) -> Option<Vec<&'a [u8]>> {
    let databases = ini.databases();
    let named: Vec<_> =
        databases.iter().filter(|database| database.name == name).map(|database| database.line).collect();
    let lines: Vec<_> = ini.as_bytes().split(|byte| *byte == b'\n').collect();
    let own =
        |line: &usize| lines[line - 1].starts_with(name.as_bytes()) || lines[line - 1].starts_with(b"'");
    let others = lines
        .iter()
        .zip(1..)
        .filter(|(_, line)| !named.contains(line))
        .map(|(text, _)| text.strip_suffix(b"\r").unwrap_or(text));
    named.iter().all(own).then(|| others.collect())
}

proptest! {
    #[test]
    fn reading_changes_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let ini = Ini::new(bytes.clone());
        ini.problems(NEWEST);
        ini.databases();
        ini.includes();
        prop_assert_eq!(ini.as_bytes(), &bytes);
    }

    #[test]
    fn what_is_set_is_read_back_and_no_other_line_changes(text in files(), who in "(proj_a|proj_ab|a|b)", port in 1..9_u8) {
        let before = Ini::new(text.clone());
        let connection = at(&format!("host=h{port} port={port} password='it''s'"));
        let mut after = before.clone();
        if let Err(error) = after.set_database(&name(&who), &connection) {
            prop_assert_eq!(&after, &before);
            let fatal = before.problems(NEWEST).iter().any(|problem| problem.fatal);
            prop_assert!(fatal || error == "there is no section [databases]");
            return Ok(());
        }
        let databases = after.databases();
        let read: Vec<_> = databases.iter().filter(|database| database.name == who).collect();
        prop_assert_eq!(read.len(), 1);
        prop_assert_eq!(read[0].connection.as_ref(), Ok(&connection));
        let mut twice = after.clone();
        prop_assert_eq!(twice.set_database(&name(&who), &connection), Ok(()));
        prop_assert_eq!(&twice, &after);
        if let (Some(before), Some(after)) = (others(&before, &who), others(&after, &who))
            && !text.contains("[databases] ")
            && !text.contains('\0')
        {
            prop_assert_eq!(before, after);
        }
        prop_assert!(after.remove_database(&who));
        prop_assert!(after.databases().iter().all(|database| database.name != who));
    }

    #[test]
    fn an_edit_makes_no_problem(text in files(), who in "(proj_a|a|b)") {
        let mut ini = Ini::new(format!("[pgbouncer]\n[databases]\n{text}"));
        for version in [Version::OLDEST, NEWEST] {
            let fatal = |ini: &Ini| ini.problems(version).iter().any(|problem| problem.fatal);
            if fatal(&ini) {
                continue;
            }
            prop_assert_eq!(ini.set_database(&name(&who), &at("host=h")), Ok(()));
            prop_assert!(!fatal(&ini));
            prop_assert_eq!(ini.set_parameter("default_pool_size", "7"), Ok(()));
            prop_assert!(!fatal(&ini));
            prop_assert!(ini.remove_database(&who));
            prop_assert!(!fatal(&ini));
        }
    }
}
