//! Feeds the reader and the editor of `pgbouncer.ini` what libFuzzer finds worth trying.
#![no_main]

#[path = "../checks/ini.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = check::check(input);
});
