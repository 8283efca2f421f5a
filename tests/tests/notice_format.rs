//! What a notice is: the same to a reader and a writer that were written from the document alone, in another language.

// The fuzzer's check, so that what it finds stays found.
#[path = "../fuzz/checks/notice.rs"]
mod check;

use std::net::SocketAddr;
use std::process::Command;

use check::{KEY, keys, seal};
use serde_json::{Value, json};
use shutdown_core::peers::Id;
use shutdown_core::peers::notice::{Ack, Datagram, Kind, Notice, Refusal, Why};
use shutdown_tests::corpus::corpus;
use shutdown_tests::process::Process;

const FORMATS: &str = include_str!("../../docs/formats.md");

/// `tests/notice.py`, which answers a line with a line.
struct Judge(Process, std::cell::Cell<usize>);

impl Judge {
    fn start(verb: &str) -> Self {
        let key = format!("1:{}", hex(&KEY));
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/notice.py");
        let process = Process::start_with_stdin(Command::new("python3").args([script, verb, &key]));
        Self(process, std::cell::Cell::new(0))
    }

    fn ask(&self, line: &str) -> String {
        self.0.say(line);
        let answer = self.0.stdout_nth(self.1.get(), |_| true);
        self.1.set(self.1.get() + 1);
        answer
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.bytes().filter_map(|byte| char::from(byte).to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks(2).map(|pair| pair[0] * 16 + pair[1]).collect()
}

/// The datagrams of the document, in their order.
fn golden() -> Vec<Vec<u8>> {
    let section = FORMATS.split("## The peer notice").nth(1).expect("its section");
    let section = section.split("\n## ").next().expect("its end");
    section.split("```text\n").skip(1).filter_map(|block| block.split("```").next()).map(from_hex).collect()
}

/// What the document says that they are.
fn described() -> [Datagram; 3] {
    let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
    let leaving = Notice {
        kind: Kind::Leaving,
        ack_wanted: true,
        restarting: false,
        why: Why::Term,
        attempt: 0,
        incarnation: 1_795_273_877_139,
        seq: 2,
        sent_at: 1_795_273_890_000,
        drain_ms: 26_900,
        node: Id::of("edge-1"),
        cluster: Id::of("default"),
        endpoints: vec![at("10.0.0.1:8443")],
    };
    let ack = Ack {
        node: Id::of("edge-1"),
        incarnation: 1_795_273_877_139,
        seq: 2,
        attempt: 0,
        sent_at: 1_795_273_890_001,
        cluster: Id::of("default"),
        by: Id::of("edge-2"),
    };
    let back = Notice {
        kind: Kind::Return,
        why: Why::Unsaid,
        attempt: 3,
        incarnation: 1_795_273_901_000,
        seq: 1,
        sent_at: 1_795_273_901_352,
        drain_ms: 0,
        node: Id::of("a-host-name-of-some-length-8080"),
        endpoints: vec![at("10.0.0.1:8443"), at("[fd00::1]:7946"), at("192.0.2.7:65535")],
        ..leaving.clone()
    };
    [Datagram::Notice(leaving), Datagram::Ack(ack), Datagram::Notice(back)]
}

fn encode(datagram: &Datagram) -> Vec<u8> {
    match datagram {
        Datagram::Notice(notice) => notice.encode(&keys()),
        Datagram::Ack(ack) => ack.encode(&keys()),
    }
}

/// The fields as the judge names them.
fn fields(datagram: &Datagram) -> Value {
    let name = |id: &Id| {
        let text = id.to_string();
        if text.len() == 32 { format!("hex:{text}") } else { text }
    };
    match datagram {
        Datagram::Notice(notice) => {
            let endpoints: Vec<_> =
                notice.endpoints.iter().map(|at| json!([at.ip().to_string(), at.port()])).collect();
            let reason = match notice.why {
                Why::Unsaid => 0,
                Why::Term => 1,
                Why::Int => 2,
                Why::Admin => 3,
                Why::Upgrade => 4,
                Why::Fault => 5,
                Why::Other(number) => number,
            };
            json!({
                "type": if notice.kind == Kind::Leaving { "leaving" } else { "return" },
                "ack_wanted": notice.ack_wanted, "restarting": notice.restarting, "reason": reason,
                "attempt": notice.attempt, "incarnation": notice.incarnation, "seq": notice.seq,
                "sent_at": notice.sent_at, "drain_ms": notice.drain_ms, "node": name(&notice.node),
                "cluster": name(&notice.cluster), "endpoints": endpoints,
            })
        }
        Datagram::Ack(ack) => json!({
            "type": "ack", "ack_wanted": false, "restarting": false, "reason": 0, "attempt": ack.attempt,
            "incarnation": ack.incarnation, "seq": ack.seq, "sent_at": ack.sent_at, "drain_ms": 0,
            "node": name(&ack.node), "cluster": name(&ack.cluster), "endpoints": [], "by": name(&ack.by),
        }),
    }
}

#[test]
fn the_documents_datagrams_are_what_it_says_byte_by_byte() {
    let golden = golden();
    assert_eq!(golden.len(), 3);
    for (bytes, datagram) in golden.iter().zip(described()) {
        assert_eq!(hex(&encode(&datagram)), hex(bytes));
        assert_eq!(Datagram::decode(bytes, &keys()), Ok(datagram));
    }
}

#[test]
fn another_program_reads_what_is_written_here_and_writes_the_same() {
    let (reader, writer) = (Judge::start("decode"), Judge::start("encode"));
    let mut datagrams = described().to_vec();
    // Each number of endpoints, each reason, each flag.
    for number in 0..=8_u8 {
        let Datagram::Notice(notice) = described()[0].clone() else { unreachable!("a notice") };
        datagrams.push(Datagram::Notice(Notice {
            ack_wanted: number % 2 == 0,
            restarting: number % 3 == 0,
            why: [Why::Unsaid, Why::Term, Why::Int, Why::Admin, Why::Upgrade, Why::Fault, Why::Other(9)]
                [usize::from(number) % 7],
            seq: u64::MAX - u64::from(number),
            endpoints: (0..number)
                .map(|last| match last % 2 {
                    0 => SocketAddr::from(([10, 0, 0, last], 1)),
                    _ => SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)], 65_535)),
                })
                .collect(),
            ..notice
        }));
    }
    for datagram in &datagrams {
        let bytes = encode(datagram);
        let read: Value = serde_json::from_str(&reader.ask(&hex(&bytes))).expect("JSON");
        assert_eq!(read, fields(datagram));
        let written = writer.ask(&read.to_string());
        // A long name is a fingerprint, from which it is written again as that.
        assert_eq!(written.replace("hex:", ""), hex(&bytes));
    }
}

#[test]
fn both_readers_refuse_the_same_for_the_same_cause() {
    let reader = Judge::start("decode");
    let mut inputs: Vec<Vec<u8>> = corpus("notice").into_iter().map(|(_, bytes)| bytes).collect();
    for golden in golden() {
        inputs.extend((0..golden.len()).map(|length| golden[..length].to_vec()));
        for place in 0..golden.len() {
            for flip in [0x01, 0x80] {
                let mut flipped = golden.clone();
                flipped[place] ^= flip;
                // As it came, and as who has the key would send it.
                inputs.extend(seal(&flipped));
                inputs.push(flipped);
            }
        }
    }
    let (mut same, mut refused) = (0, 0);
    for input in inputs.iter().filter(|input| !input.is_empty()) {
        let theirs = reader.ask(&hex(input));
        match Datagram::decode(input, &keys()) {
            Ok(datagram) => {
                assert_eq!(serde_json::from_str::<Value>(&theirs).ok(), Some(fields(&datagram)));
                same += 1;
            }
            Err(cause) => {
                assert_eq!(theirs, format!("refused: {cause}"), "{}", hex(input));
                refused += 1;
            }
        }
    }
    println!("{same} read the same, {refused} refused for the same cause");
    assert!(same > 100 && refused > 1_000);
}

#[test]
fn every_input_of_the_fuzzers_corpus_keeps_the_laws() {
    for (path, bytes) in corpus("notice") {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let read = check::check(&bytes);
        if name.starts_with("good") {
            assert_eq!(read, Ok(()), "{name}");
        }
    }
}

#[test]
fn each_refusal_up_to_the_layout_can_be_caused() {
    // What the document promises of the counts: each can happen.
    let golden = &golden()[0];
    let with = |place: usize, byte: u8| {
        let mut datagram = golden.clone();
        datagram[place] = byte;
        datagram
    };
    let cases = [
        (golden[..120].to_vec(), Refusal::Length),
        (with(0, 0), Refusal::Magic),
        (with(4, 0), Refusal::Version),
        (with(9, 0), Refusal::TotalLength),
        (with(7, 0), Refusal::UnknownKey),
        (with(127, golden[127] ^ 1), Refusal::Mac),
        (seal(&with(5, 9)).expect("long enough"), Refusal::Layout),
    ];
    for (datagram, cause) in cases {
        assert_eq!(Datagram::decode(&datagram, &keys()), Err(cause));
        assert!(FORMATS.contains(&format!("`{cause}`")));
    }
    for cause in Refusal::ALL {
        assert!(FORMATS.contains(&format!("| `{cause}` |")), "{cause} is not in the document");
    }
}
