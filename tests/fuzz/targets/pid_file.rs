//! Feeds the reader of PID files what libFuzzer finds worth trying.
#![no_main]

#[path = "../checks/pid_file.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = check::check(input);
});
