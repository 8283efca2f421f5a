//! Feeds the reader of mDNS datagrams what libFuzzer finds worth trying.
#![no_main]

#[path = "../checks/mdns.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = check::check(input);
});
