//! Feeds the notices' reader what libFuzzer finds worth trying.
#![no_main]

#[path = "../checks/notice.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = check::check(input);
});
