//! What must hold for every datagram that the mDNS reader is given. The fuzzer and the test that replays its corpus share it.

use std::net::IpAddr;

use shutdown_mdns::wire::{Data, Goodbye, Malformed, Message, Name};

/// Reads the input; a goodbye in it, written by us, is read as the same.
///
/// # Panics
///
/// If a law is broken.
pub(crate) fn check(input: &[u8]) -> Result<Message, Malformed> {
    let message = Message::read(input).inspect_err(|error| assert!(!error.to_string().is_empty()))?;
    let service = Name::dotted("_edge._tcp.local.").expect("a name");
    let records = || message.answers.iter().chain(&message.others);
    // No more than there is room for: eleven bytes for the shortest record, five for the shortest question.
    assert!(records().count() * 11 + message.questions.len() * 5 + 12 <= input.len());
    for (instance, strings) in message.goodbyes(&service) {
        again(&service, instance, strings);
    }
    for name in records().map(|record| &record.name).chain(message.questions.iter().map(|(name, ..)| name)) {
        assert!(
            Name::of(name.labels()).as_ref() == Some(name) && name.is(name) && name.key().len() <= 3 * 256
        );
    }
    Ok(message)
}

fn again(service: &Name, instance: &Name, strings: &[Vec<u8>]) {
    let host = Name::dotted("host.local.").expect("a name");
    let addresses: [IpAddr; 2] = [[10, 0, 0, 1].into(), [0xfe80, 0, 0, 0, 0, 0, 0, 1].into()];
    let bytes =
        Goodbye { service, instance, host: &host, port: 80, strings, addresses: &addresses }.to_bytes();
    let message = match Message::read(&bytes) {
        Err(Malformed::TooLong) => return,
        other => other.expect("what we write we can read"),
    };
    let (read, beside) = message.goodbyes(service).next().expect("it is a goodbye");
    // An empty TXT record is one empty string (RFC 6763 §6.1).
    let empty = [Vec::new()];
    assert!(read.is(instance) && beside == if strings.is_empty() { &empty } else { strings });
    assert_eq!(message.answers.len(), 5);
    let is_host = |target: &Name| target.is(&host);
    assert!(matches!(&message.answers[1].data, Data::Srv { port: 80, target, .. } if is_host(target)));
}
