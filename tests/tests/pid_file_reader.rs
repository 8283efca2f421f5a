//! What the reader of PID files believes: a number, and nothing that is more than one process.

// The fuzzer's check, so that what it finds stays found.
#[path = "../fuzz/checks/pid_file.rs"]
mod check;

use shutdown_tests::corpus::corpus;

#[test]
fn what_the_fuzzer_has_found_worth_keeping_still_holds() {
    let (mut good, mut bad) = (0, 0);
    for (path, bytes) in corpus("pid_file") {
        // A panic names the input by what is printed last.
        println!("{}", path.display());
        match check::check(&bytes)[0] {
            Ok(_) => good += 1,
            Err(_) => bad += 1,
        }
    }
    println!("{good} numbers, {bad} that are none");
    assert!(good > 4 && bad > 15, "the corpus has both kinds");
}
