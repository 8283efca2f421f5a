//! Reads `sweetmcp_state.json`, the state file of the system we come from.
//!
//! `{"peers": ["ip:port"], "shutdown_at": null | seconds, "build_id": "…", "circuit_breakers": [{"peer", "state",
//! "error_count", "total_count"}]}`. It has no schema, no checksum and no time but the shutdown's. That program
//! dropped it when its build id was another, that is at every deployment; here the build id is not looked at.

use super::document::{Damage, Document, LARGEST, Object};
use super::sections::Sections;

/// The name it has.
pub(super) const FILE: &str = "sweetmcp_state.json";

/// The object as a document with the sections `peers` and `breakers`; `None` if it is no legacy state.
pub(super) fn read(object: &Object<'_>) -> Result<Option<Document>, Damage> {
    let (peers, breakers) = (object.find("peers"), object.find("circuit_breakers"));
    if peers.is_none() && breakers.is_none() {
        return Ok(None);
    }
    let seconds = object.optional::<Option<u64>>("shutdown_at")?.flatten();
    let shutdown_at = match seconds.map(|seconds| seconds.checked_mul(1000)) {
        Some(Some(at)) if at <= LARGEST => Some(at),
        Some(_) => return Err(Damage::Wrong("shutdown_at".into())),
        None => None,
    };
    let saved_at = shutdown_at.unwrap_or(0);
    let mut sections = Sections::default();
    if let Some(addresses) = object.optional::<Vec<String>>("peers")? {
        let peers: Vec<_> = addresses.iter().map(|addr| serde_json::json!({ "addr": addr })).collect();
        let peers = serde_json::to_string(&peers).expect("strings are JSON");
        sections.put("peers".into(), peers, saved_at);
    }
    if let Some(breakers) = breakers {
        sections.put("breakers".into(), breakers.get().to_owned(), saved_at);
    }
    Ok(Some(Document {
        saved_at,
        shutdown_at,
        clean: shutdown_at.is_some(),
        sections,
        ..Document::default()
    }))
}
