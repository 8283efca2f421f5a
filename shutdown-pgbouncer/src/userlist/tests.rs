use proptest::prelude::*;

use super::*;

fn name(text: &str) -> UserName {
    text.parse().unwrap()
}

fn secret(text: &str) -> Secret {
    Secret::new(text).unwrap()
}

/// The names and their lines.
fn users(text: &str) -> Vec<(String, usize)> {
    Userlist::new(text).users().into_iter().map(|user| (user.name, user.line)).collect()
}

fn user(name: &str, line: usize) -> (String, usize) {
    (name.to_owned(), line)
}

fn set(text: &str, who: &str, what: &str) -> String {
    let mut list = Userlist::new(text);
    list.set(&name(who), &secret(what));
    String::from_utf8(list.as_bytes().to_vec()).unwrap()
}

#[test]
fn entries_are_found_as_pgbouncer_finds_them() {
    assert_eq!(users("\"a\" \"x\"\n; c\n\n  \"b\"\"c\" \"y\" rest \"\n"), [user("a", 1), user("b\"c", 4)]);
    assert_eq!(users("\"a\"\n\"b\" \"x\"\n\"z\" \"z\""), [user("a", 1), user("z", 3)]);
    assert_eq!(users("\"a\" \"x\ny\"\n\"z\" \"z\""), [user("a", 1), user("z", 3)]);
    assert_eq!(
        users("\"q\" \"q\"\n\"a \"x\"\n\"z\" \"z\"\n\"y\" \"y\"\n"),
        [user("q", 1), user("a ", 2), user("y", 4)]
    );
    assert_eq!(users("\"q\" \"q\"\0\n\"z\" \"z\""), [user("q", 1)]);
}

#[test]
fn a_broken_line_ends_the_list() {
    for broken in ["# c", "a \"x\"", "\"a\" x", "\"a", "\"\" \"", &format!("\"{}\" \"x\"", "n".repeat(128))] {
        let text = format!("\"q\" \"q\"\n{broken}\n");
        assert_eq!(users(&text), [user("q", 1)], "{text}");
        let problems = Userlist::new(text.clone()).problems();
        assert_eq!(
            problems.iter().map(|problem| (problem.line, problem.fatal)).collect::<Vec<_>>(),
            [(2, true)],
            "{text}"
        );
    }
}

#[test]
fn what_is_misread_is_told() {
    let misread = [
        ("\"a\" \"x\"\n\"a\" \"y\"\n", 1),
        ("\"a\"\n\"b\" \"x\"\n", 1),
        (";\n\"a\" \"x\ny\"\n", 2),
        ("\"a\" x \"y\"\n", 1),
        ("\"\" \"y\"\n", 1),
        ("\"a\" \"x\"\n\0\n", 2),
    ];
    for (text, line) in misread {
        let problems = Userlist::new(text).problems();
        assert_eq!(
            problems.iter().map(|problem| (problem.line, problem.fatal)).collect::<Vec<_>>(),
            [(line, false)],
            "{text:?}"
        );
    }
    assert_eq!(Userlist::new("\"a\" \"x\" rest\n; c\n\n\"b\" \"\"").problems(), []);
}

#[test]
fn a_secret_is_of_the_kind_that_pgbouncer_takes_it_for() {
    let kinds = |secret: &str| Userlist::new(format!("\"a\" \"{secret}\"")).users()[0].kind;
    assert_eq!(kinds(""), "empty");
    assert_eq!(kinds("md5"), "plain");
    assert_eq!(kinds(&format!("md5{}", "0f".repeat(16))), "md5");
    assert_eq!(kinds(&format!("md5{}", "0F".repeat(16))), "plain");
    assert_eq!(kinds("SCRAM-SHA-256$4096:x"), "scram-sha-256");
}

#[test]
fn a_secret_is_set_in_its_place_or_at_the_end() {
    assert_eq!(set("\"a\" \"x\" ; c\n\"b\" \"y\"\n", "a", "q\"q"), "\"a\" \"q\"\"q\" ; c\n\"b\" \"y\"\n");
    assert_eq!(set("\"a\" \"1\"\n;\n\"a\" \"2\"\n", "a", "3"), ";\n\"a\" \"3\"\n");
    assert_eq!(set("\"a\" \"x\"\r\n", "b", "y"), "\"a\" \"x\"\r\n\"b\" \"y\"\r\n");
    assert_eq!(set("\"a\" \"x\"", "b", "y"), "\"a\" \"x\"\n\"b\" \"y\"");
    assert_eq!(set("", "b", "y"), "\"b\" \"y\"\n");
    assert_eq!(
        set("\"a\" \"x\"\n# c\n\"c\" \"z\"\n", "b", "y"),
        "\"a\" \"x\"\n\"b\" \"y\"\n# c\n\"c\" \"z\"\n"
    );
    assert_eq!(set("\"a\" \"x\"\0junk", "b", "y"), "\"a\" \"x\"\n\"b\" \"y\"\0junk");
    assert_eq!(set("\"a\" \"x\n\"", "a", "y"), "\"a\" \"y\"");
}

#[test]
fn a_name_that_begins_as_another_is_another() {
    let mut list = Userlist::new("\"proj_a\" \"1\"\n\"proj_ab\" \"2\"\n\"PROJ_A\" \"3\"\n");
    assert!(list.remove(&name("proj_a")));
    assert_eq!(list.as_bytes(), b"\"proj_ab\" \"2\"\n\"PROJ_A\" \"3\"\n");
    assert!(!list.remove(&name("proj_a")));
    // With its doubles.
    let mut list = Userlist::new("\"a\" \"1\"\n; c\n\"a\" \"2\"");
    assert!(list.remove(&name("a")));
    assert_eq!(list.as_bytes(), b"; c\n");
}

#[test]
fn no_secret_is_shown() {
    let list = Userlist::new("\"a\" \"hunter2\"\n\"a\" \"hunter2\"\n\"b\" \"hunter2\n\"\nhunter2");
    let shown = format!("{list:?} {:?} {:?} {:?}", list.problems(), list.users(), secret("hunter2"));
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(!Secret::new("hunter2\n").unwrap_err().contains("hunter2"));
    assert_eq!(secret("hunter2").reveal(), "hunter2");
}

#[test]
fn a_secret_has_one_line_and_fits() {
    for good in ["", " ", "\t", "\\", &"p".repeat(2047)] {
        Secret::new(good).unwrap();
    }
    for bad in ["\n", "\r", "\0", &"p".repeat(2048), &"\"".repeat(1024)] {
        Secret::new(bad).unwrap_err();
    }
}

proptest! {
    #[test]
    fn what_is_set_is_read_back_and_removed(
        text in "(\"[ab\n]{0,2}\" {0,2}\"[xy\"]{0,3}\"?[ ;#]{0,2}(\r?\n|\0)?|;[^\0]{0,3}\n|[a#\"\n ]{1,2}){0,6}",
        who in "[ab\"ü]{1,3}",
        what in "[xy\"\\\\ü ]{0,5}",
    ) {
        let (who, what) = (name(&who), secret(&what));
        let before = Userlist::new(text);
        let mut after = before.clone();
        after.set(&who, &what);
        let entries = scan(after.as_bytes()).entries;
        let named: Vec<_> = entries.iter().filter(|entry| entry.name == who.as_str().as_bytes()).collect();
        prop_assert_eq!(named.len(), 1);
        let read = &after.as_bytes()[named[0].secret.clone()];
        let wanted = doubled(what.reveal());
        prop_assert_eq!(read, wanted.as_bytes());
        let mut twice = after.clone();
        twice.set(&who, &what);
        prop_assert_eq!(&twice, &after);
        let others = |list: &Userlist| -> Vec<_> {
            let users = list.users().into_iter().filter(|user| user.name != who.as_str());
            users.map(|user| (user.name, user.kind)).collect()
        };
        prop_assert_eq!(others(&after), others(&before));
        prop_assert!(after.remove(&who));
        prop_assert!(after.users().iter().all(|user| user.name != who.as_str()));
        prop_assert_eq!(others(&after), others(&before));
        let fatal = |list: &Userlist| list.problems().iter().filter(|problem| problem.fatal).count();
        prop_assert_eq!(fatal(&after), fatal(&before));
    }
}
