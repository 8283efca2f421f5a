//! What must hold for the bytes of every `userlist.txt`. The fuzzer and the test that replays its corpus share it.

use shutdown_pgbouncer::{Secret, User, UserName, Userlist};

/// Reads the input, and edits it in every way; whether all of it can be read.
///
/// # Panics
///
/// If a law is broken.
pub(crate) fn check(input: &[u8]) -> bool {
    let list = Userlist::new(input);
    let lines = input.iter().filter(|byte| **byte == b'\n').count() + 1;
    let users = list.users();
    assert!(users.is_sorted_by_key(|user| user.line));
    assert!(users.iter().all(|user| (1..=lines).contains(&user.line)));
    let problems = list.problems();
    assert!(problems.is_sorted_by_key(|problem| problem.line), "{problems:?}");
    assert!(problems.iter().all(|problem| !problem.what.contains('\n')));
    assert_eq!(list.as_bytes(), input, "reading changes nothing");
    for name in users.iter().map(|user| user.name.as_str()).chain(["a", "proj_a", "proj_ab", "say \"hi\""]) {
        // A name that is not UTF-8 is shown as another.
        if !name.contains('\u{fffd}')
            && let Ok(name) = name.parse()
        {
            edited(&list, &name);
        }
    }
    !fatal(&list)
}

fn edited(before: &Userlist, name: &UserName) {
    let others = |list: &Userlist| -> Vec<_> {
        let others = list.users().into_iter().filter(|user| user.name != name.as_str());
        others.map(|User { name, kind, .. }| (name, kind)).collect()
    };
    let secret = Secret::new("SCRAM-SHA-256$ \"q\" \\").expect("it is short");
    let mut after = before.clone();
    after.set(name, &secret);
    let users = after.users();
    let mut read = users.iter().filter(|user| user.name == name.as_str());
    assert_eq!(read.next().map(|user| user.kind), Some("scram-sha-256"), "it is read back");
    assert!(read.next().is_none(), "its doubles are gone");
    assert_eq!(others(&after), others(before), "nobody else changes");
    assert_eq!(fatal(&after), fatal(before));
    let mut twice = after.clone();
    twice.set(name, &secret);
    assert_eq!(twice, after, "a second time changes nothing");
    let was_there = before.users().iter().any(|user| user.name == name.as_str());
    if !was_there {
        // One place is changed: what was there is the beginning and the end.
        let (old, new) = (before.as_bytes(), after.as_bytes());
        let same = old.iter().zip(new).take_while(|(old, new)| old == new).count();
        assert!(new.ends_with(&old[same..]), "only a line is added");
    }
    let mut gone = after;
    assert!(gone.remove(name));
    assert!(gone.users().iter().all(|user| user.name != name.as_str()), "it is gone");
    assert_eq!(others(&gone), others(before), "nobody else changes");
    assert!(!gone.remove(name));
    let mut removed = before.clone();
    assert_eq!(removed.remove(name), was_there);
    assert_eq!(others(&removed), others(before));
    assert!(removed.users().iter().all(|user| user.name != name.as_str()), "it is gone, with its doubles");
    if !was_there {
        assert_eq!(&removed, before);
    }
}

fn fatal(list: &Userlist) -> bool {
    list.problems().iter().any(|problem| problem.fatal)
}
