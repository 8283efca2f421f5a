//! What the reader of mDNS datagrams believes: only what is exactly a message.

// The fuzzer's check, so that what it finds stays found.
#[path = "../fuzz/checks/mdns.rs"]
mod check;

use shutdown_mdns::wire::{Malformed, Message, Name};
use shutdown_tests::corpus::corpus;

fn input(name: &str) -> Vec<u8> {
    let found = corpus("mdns").into_iter().find(|(path, _)| path.ends_with(name));
    found.unwrap_or_else(|| panic!("no {name}")).1
}

#[test]
fn what_the_fuzzer_has_found_worth_keeping_still_holds() {
    let (mut good, mut bad) = (0, 0);
    for (path, bytes) in corpus("mdns") {
        // A panic names the input by what is printed last.
        println!("{}", path.display());
        match check::check(&bytes) {
            Ok(_) => good += 1,
            Err(_) => bad += 1,
        }
    }
    println!("{good} messages, {bad} that are none");
    assert!(good > 5 && bad > 10, "the corpus has both kinds");
}

#[test]
fn only_a_whole_message_that_takes_an_instance_back_is_a_goodbye() {
    let service = Name::dotted("_EDGE._tcp.local.").expect("a name");
    let heard = |name: &str| -> Result<usize, Malformed> {
        Message::read(&input(name)).map(|message| message.goodbyes(&service).count())
    };
    assert_eq!((heard("goodbye"), heard("pointer-alone"), heard("additional-txt")), (Ok(1), Ok(1), Ok(1)));
    // RFC 6762 section 18.11: a response with an RCODE is ignored.
    for no in ["announcement", "query", "failed-reply", "header-alone", "nsec"] {
        assert_eq!(heard(no), Ok(0), "{no}");
    }
    for (no, why) in [
        ("empty", Malformed::Truncated),
        ("header-lies", Malformed::Truncated),
        ("pointer-to-itself", Malformed::Pointer),
        ("pointer-forward", Malformed::Pointer),
        ("pointer-into-header", Malformed::Pointer),
        ("reserved-label", Malformed::Name),
        ("name-too-long", Malformed::Name),
        ("trailing", Malformed::Trailing),
        ("address-of-three-bytes", Malformed::Data),
        ("string-beyond-its-record", Malformed::Truncated),
        ("record-beyond-the-message", Malformed::Truncated),
        ("too-long", Malformed::TooLong),
    ] {
        assert_eq!(heard(no), Err(why), "{no}");
    }
    assert!(heard("name-beyond-its-record").is_err());
}

#[test]
fn no_part_of_a_goodbye_is_one_and_no_damage_panics() {
    let whole = input("goodbye");
    for length in 0..whole.len() {
        assert!(Message::read(&whole[..length]).is_err(), "{length} bytes");
    }
    for (at, bit) in (0..whole.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << bit;
        let _ = check::check(&damaged);
    }
    let message = Message::read(&whole).expect("it is whole");
    let service = Name::dotted("_edge._tcp.local.").expect("a name");
    let (instance, strings) = message.goodbyes(&service).next().expect("a goodbye");
    assert_eq!((instance.to_string(), strings.len()), ("edge._edge._tcp.local.".to_owned(), 2));
}
