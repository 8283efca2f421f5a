//! What the readers and editors of PgBouncer's files make of any bytes: nothing that PgBouncer would not, and no other line.

// The fuzzer's checks, so that what it finds stays found.
#[path = "../fuzz/checks/ini.rs"]
mod ini;
#[path = "../fuzz/checks/userlist.rs"]
mod userlist;

use shutdown_tests::corpus::corpus;

/// Replays a target's inputs: how many are good, and how many are not.
fn replayed(target: &str, check: impl Fn(&[u8]) -> bool) -> (usize, usize) {
    let (mut good, mut bad) = (0, 0);
    for (path, bytes) in corpus(target) {
        // A panic names the input by what is printed last.
        println!("{}", path.display());
        if check(&bytes) {
            good += 1;
        } else {
            bad += 1;
        }
    }
    println!("{target}: {good} good, {bad} that are not");
    (good, bad)
}

#[test]
fn what_the_fuzzer_has_found_of_an_ini_still_holds() {
    let (good, bad) = replayed("ini", ini::check);
    assert!(good > 7 && bad > 4, "the corpus has both kinds");
}

#[test]
fn what_the_fuzzer_has_found_of_a_userlist_still_holds() {
    let (good, bad) = replayed("userlist", userlist::check);
    assert!(good > 7 && bad > 4, "the corpus has both kinds");
}
