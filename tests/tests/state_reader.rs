//! What the reader of a state believes: nothing that was not written, and the same as a reader written from the
//! document alone, in another language.

// The fuzzer's check, so that what it finds stays found.
#[path = "../fuzz/checks/state.rs"]
mod check;

use std::fs;
use std::process::Command;

use check::values;
use serde_json::{Value, json};
use shutdown_core::state::Document;
use shutdown_tests::PATIENCE;
use shutdown_tests::corpus::corpus;
use shutdown_tests::process::Process;
use shutdown_tests::saved::Counter;

const HERE: &str = env!("CARGO_MANIFEST_DIR");
const FORMATS: &str = include_str!("../../docs/formats.md");

/// A state with everything a state can have.
fn rich() -> Document {
    let text = r#"{"theirs": {"a" : [1, 2.50, "\u00e4"]}, "peers": [{"addr": "10.0.0.1:8443"}]}"#;
    let crc = crc32fast::hash(text.as_bytes());
    let file = format!(
        r#"{{"schema":1,"node_id":"edge-1","incarnation":1795273877139,"saved_at":1795273890000,"shutdown_at":1795273889000,"clean":true,"later":{{"x" : [1, null]}},"sections_saved_at":{{"theirs":1795270000000}},"crc32":{crc},"sections":{text}}}"#
    );
    Document::parse(file.as_bytes()).expect("written by hand, but well")
}

/// Every truncation of a file, and six changes of every byte.
fn damages(written: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut damages: Vec<_> =
        (0..written.len()).map(|length| (format!("cut to {length}"), written[..length].to_vec())).collect();
    for (at, byte) in written.iter().enumerate() {
        for other in [byte ^ 0x01, byte ^ 0x20, byte ^ 0x80, b'0', b'9', b'"'] {
            if other != *byte {
                let mut bytes = written.to_vec();
                bytes[at] = other;
                damages.push((format!("byte {at} is {other:#x}"), bytes));
            }
        }
    }
    damages
}

#[test]
fn no_truncation_and_no_changed_byte_makes_a_wrong_value_accepted() {
    for (what, document) in [("rich", rich()), ("empty", Document::default())] {
        let written = document.to_bytes();
        let expected = values(&Document::parse(&written).expect("just written"));
        let (mut same, mut renamed) = (0, 0);
        let damages = damages(&written);
        for (how, bytes) in &damages {
            let Ok(read) = Document::parse(bytes) else { continue };
            assert_eq!(values(&read), expected, "{what}, {how}: {}", String::from_utf8_lossy(bytes));
            same += 1;
            // A checksum whose name was hit is a field that nobody knows; what it covered was not hit.
            renamed += usize::from(read.to_bytes() != written);
        }
        let (cases, length) = (damages.len(), written.len());
        println!(
            "{what}: {cases} damages to {length} bytes: {same} harmless, {renamed} by renaming head_crc32"
        );
        assert!(cases > 6 * length && same < cases / 10);
    }
}

#[test]
fn what_the_fuzzer_has_found_worth_keeping_still_holds() {
    let inputs = corpus("state");
    let (mut good, mut sealed) = (0, 0);
    for (input, bytes) in &inputs {
        // A panic names the input by what is printed last.
        println!("{}", input.display());
        match check::check(bytes) {
            Ok(()) => good += 1,
            Err(_) => sealed += usize::from(check::seal(bytes).is_some_and(|sealed| sealed != *bytes)),
        }
    }
    println!("{} inputs: {good} are states, {sealed} would be but for their checksums", inputs.len());
    assert!(good > 10 && sealed > 0 && inputs.len() > good + sealed, "the corpus has all kinds");
}

/// Runs Python; the exit code, what it printed, what it complained of.
fn python(arguments: &[&str]) -> (i32, String, String) {
    let mut process =
        Process::start(Command::new("python3").env("PYTHONDONTWRITEBYTECODE", "1").args(arguments));
    let code = process.exit_code(PATIENCE);
    (code, process.stdout(), process.stderr())
}

fn script() -> String {
    format!("{HERE}/read_state.py")
}

/// What the other reader prints of a state, from ours.
fn fields(document: &Document) -> Value {
    let sections = document.sections.names().map(|name| {
        let json = document.sections.json(name).expect("it has that name");
        (name.to_owned(), serde_json::from_str::<Value>(json).expect("JSON"))
    });
    json!({
        "node_id": document.node_id,
        "incarnation": document.incarnation,
        "saved_at": document.saved_at,
        "shutdown_at": document.shutdown_at,
        "clean": document.clean,
        "sections": sections.collect::<serde_json::Map<_, _>>(),
    })
}

/// Of what the other reader printed, what [`fields`] names.
fn named(printed: &str) -> Value {
    let mut printed: Value = serde_json::from_str(printed).expect("JSON");
    let known = ["node_id", "incarnation", "saved_at", "shutdown_at", "clean", "sections"];
    printed.as_object_mut().expect("an object").retain(|name, _| known.contains(&name.as_str()));
    printed
}

#[test]
fn a_reader_written_from_the_document_reads_the_files_that_are_written() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let counter = Counter::in_dir(dir.path());
    for _ in 0..2 {
        counter.bump();
        counter.store.save().expect("a new directory");
    }
    for name in ["state.json", "state.json.1"] {
        let path = dir.path().join(name);
        let bytes = fs::read(&path).expect("a state");
        let text = path.display().to_string();
        let (code, printed, complaint) = python(&[&script(), &text]);
        assert_eq!((code, complaint.as_str()), (0, ""), "{name}");
        assert_eq!(named(&printed), fields(&Document::parse(&bytes).expect("whole")), "{name}");
        // And says in one sentence when it cannot.
        fs::write(&path, &bytes[..bytes.len() - 20]).expect("ours");
        let (code, printed, complaint) = python(&[&script(), &text]);
        assert_eq!((code, printed.as_str(), complaint.lines().count()), (1, "", 1), "{complaint}");
        assert!(complaint.contains(&text), "{complaint}");
    }
}

#[test]
fn the_two_readers_agree_on_every_damage() {
    const LOOP: &str = "
import json, sys
sys.path.insert(0, sys.argv[1])
import read_state
for line in open(sys.argv[2]):
    try:
        print(json.dumps(read_state.read(bytes.fromhex(line))))
    except (ValueError, RecursionError):
        print('damaged')
";
    let written = rich().to_bytes();
    let mut cases = damages(&written);
    cases.push(("whole".into(), written));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let list = dir.path().join("cases");
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n";
    fs::write(&list, cases.iter().map(|(_, bytes)| hex(bytes)).collect::<String>()).expect("ours");
    let (code, printed, complaint) = python(&["-c", LOOP, HERE, &list.display().to_string()]);
    assert_eq!(code, 0, "{complaint}");
    let verdicts: Vec<&str> = printed.lines().collect();
    assert_eq!(verdicts.len(), cases.len());
    let mut accepted = 0;
    for ((how, bytes), verdict) in cases.iter().zip(verdicts) {
        match Document::parse(bytes) {
            Ok(document) => {
                assert_ne!(verdict, "damaged", "{how}: {}", String::from_utf8_lossy(bytes));
                assert_eq!(named(verdict), fields(&document), "{how}");
                accepted += 1;
            }
            Err(damage) => assert_eq!(verdict, "damaged", "{how}: {damage}"),
        }
    }
    println!("{} cases, {accepted} accepted by both, the others by neither", cases.len());
    assert!(accepted > 0);
}

#[test]
fn the_worked_example_of_the_state_reads_back_with_both_readers() {
    let chapter = &FORMATS[FORMATS.find("\n## The state: `state.json`").expect("its chapter")..];
    let begin = chapter.find("```json\n").expect("a worked example") + "```json\n".len();
    let example = &chapter[begin..begin + chapter[begin..].find("```").expect("its end")];
    let document = Document::parse(example.as_bytes()).expect("checksums that are right");
    assert_eq!((document.node_id.as_str(), document.incarnation), ("edge-1", 1_795_273_877_139));
    assert_eq!(document.sections.saved_at("breakers"), Some(1_795_273_830_000));
    assert_eq!(document.to_bytes(), example.as_bytes(), "it is as we would write it");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("state.json");
    fs::write(&path, example).expect("ours");
    let (code, printed, complaint) = python(&[&script(), &path.display().to_string()]);
    assert_eq!((code, named(&printed)), (0, fields(&document)), "{complaint}");
    let fields: Value = serde_json::from_str(example).expect("JSON");
    for field in fields.as_object().expect("an object").keys() {
        assert!(chapter.contains(&format!("| `{field}` |")), "{field} is not explained");
    }
}
