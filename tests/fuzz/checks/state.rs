//! What must hold for every input of the state's reader. The fuzzer and the test that replays its corpus share it.

use std::collections::BTreeMap;

use serde_json::value::RawValue;
use shutdown_core::state::{Damage, Document, LARGEST};

/// Reads the input; and if only its checksums are wrong, once more with the right ones: else no fuzzer gets behind
/// them.
///
/// # Panics
///
/// If a law is broken.
pub(crate) fn check(input: &[u8]) -> Result<(), Damage> {
    match Document::parse(input) {
        Ok(document) => round_trip(&document),
        Err(damage) => {
            assert!(!damage.to_string().is_empty());
            if let Damage::Checksum(_) = damage
                && let Some(sealed) = seal(input)
                && let Ok(document) = Document::parse(&sealed)
            {
                round_trip(&document);
            }
            return Err(damage);
        }
    }
    Ok(())
}

/// No time is larger than every reader keeps, and what was read is written so that it reads as the same, to the byte.
fn round_trip(document: &Document) {
    let (_, incarnation, saved_at, shutdown_at, _, sections) = values(document);
    let times = sections.iter().filter_map(|(_, _, at)| *at).chain(shutdown_at);
    assert!(times.chain([incarnation, saved_at]).all(|number| number <= LARGEST), "{document:?}");
    let written = document.to_bytes();
    let again = Document::parse(&written).expect("what we write we can read");
    assert_eq!(values(&again), values(document));
    assert_eq!(again.to_bytes(), written, "a second writing differs");
    // With sections alone the fields of a newer writer are still there: they only add.
    let mut bare = again.clone();
    for (name, ..) in values(document).5 {
        assert!(bare.sections.remove(&name));
    }
    let bare = Document::parse(&bare.to_bytes()).expect("a state without sections");
    assert_eq!(bare.sections.names().count(), 0);
    assert_eq!((bare.node_id, bare.incarnation), (document.node_id.clone(), document.incarnation));
}

type Values = (String, u64, u64, Option<u64>, bool, Vec<(String, String, Option<u64>)>);

/// Everything in a document that has a meaning here.
pub(crate) fn values(document: &Document) -> Values {
    let sections = document.sections.names().map(|name| {
        let json = document.sections.json(name).expect("it has that name").to_owned();
        (name.to_owned(), json, document.sections.saved_at(name))
    });
    (
        document.node_id.clone(),
        document.incarnation,
        document.saved_at,
        document.shutdown_at,
        document.clean,
        sections.collect(),
    )
}

/// The input with checksums that fit; `None` if it has no place for them.
pub(crate) fn seal(input: &[u8]) -> Option<Vec<u8>> {
    let sections = field(input, "sections")?;
    let sealed = put(input, "crc32", crc32fast::hash(&input[sections]))?;
    let Some(head) = field(&sealed, "sections").map(|sections| sections.start) else { return Some(sealed) };
    put(&sealed, "head_crc32", crc32fast::hash(&sealed[..head])).or(Some(sealed))
}

fn put(input: &[u8], name: &str, checksum: u32) -> Option<Vec<u8>> {
    let place = field(input, name)?;
    Some([&input[..place.start], checksum.to_string().as_bytes(), &input[place.end..]].concat())
}

/// Where a field's value stands.
fn field(input: &[u8], name: &str) -> Option<std::ops::Range<usize>> {
    let fields: BTreeMap<String, &RawValue> = serde_json::from_slice(input).ok()?;
    let value = fields.get(name)?.get();
    let start = value.as_ptr() as usize - input.as_ptr() as usize;
    Some(start..start + value.len())
}
