//! Feeds the reader and the editor of `userlist.txt` what libFuzzer finds worth trying.
#![no_main]

#[path = "../checks/userlist.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = check::check(input);
});
