//! The state file as data: reading what may be anything, writing what can be read. No I/O, no clock.
//!
//! ```json
//! {
//!   "schema": 1,
//!   "node_id": "edge-1",
//!   "incarnation": 1795273877139,
//!   "saved_at": 1795273890000,
//!   "shutdown_at": null,
//!   "clean": false,
//!   "crc32": 2311041017,
//!   "sections": {
//!     "breakers": []
//!   },
//!   "head_crc32": 3057449933
//! }
//! ```
//!
//! `crc32` covers the bytes of the value of `sections` as they stand in the file, `head_crc32` every byte before them.
//! So each byte that carries a value is covered, and whoever reads needs no canonical form.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::legacy;
use super::sections::Sections;

/// The schema this code writes and reads. It rises when a field changes its meaning or goes away.
pub const SCHEMA: u64 = 1;

/// The largest whole number that every JSON reader keeps exactly (RFC 8259 §6): no time and no incarnation is larger.
pub const LARGEST: u64 = (1 << 53) - 1;

/// The most fields that an object has, sections included: a field costs memory beyond its bytes.
pub(super) const MOST_FIELDS: usize = 10_000;

/// The fields of schema 1; others are kept as they are.
const KNOWN: [&str; 10] = [
    "schema",
    "node_id",
    "incarnation",
    "saved_at",
    "shutdown_at",
    "clean",
    "crc32",
    "sections",
    "sections_saved_at",
    "head_crc32",
];

/// One state file's content.
#[derive(Clone, Debug, Default)]
pub struct Document {
    /// Who wrote it.
    pub node_id: String,
    /// The writer's incarnation: strictly rising from start to start; 0 in a legacy file, which has none.
    pub incarnation: u64,
    /// When it was written, milliseconds since the Unix epoch.
    pub saved_at: u64,
    /// When the writer's shutdown had begun, if it had.
    pub shutdown_at: Option<u64>,
    /// Whether the writer's shutdown came as far as its last stage.
    pub clean: bool,
    /// What the sources and the program put into it.
    pub sections: Sections,
    /// Fields of a newer writer.
    pub(crate) unknown: Vec<(String, Box<RawValue>)>,
}

/// What is wrong with a state file's content.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// It has no bytes.
    Empty,
    /// It is no JSON object; with the parser's words.
    NotJson(String),
    /// A field is missing.
    Missing(&'static str),
    /// A field has a value it cannot have.
    Wrong(String),
    /// A field stands there twice.
    Twice(String),
    /// A checksum does not fit its bytes.
    Checksum(&'static str),
    /// A newer program wrote it, in a schema that is not known here.
    Schema(u64),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("it is empty"),
            Self::NotJson(error) => write!(f, "it is no JSON object: {error}"),
            Self::Missing(field) => write!(f, "it has no {field:?}"),
            Self::Wrong(field) => write!(f, "its {field:?} has a value that it cannot have"),
            Self::Twice(field) => write!(f, "its {field:?} stands there twice"),
            Self::Checksum(field) => write!(f, "its {field:?} does not fit its bytes"),
            Self::Schema(schema) => {
                write!(
                    f,
                    "it has schema {schema}, and this program knows schema {SCHEMA}: a newer one wrote it"
                )
            }
        }
    }
}

impl std::error::Error for Damage {}

impl Document {
    /// Reads a state file, or a `sweetmcp_state.json` of the system we come from.
    ///
    /// # Errors
    ///
    /// What is wrong with it. No input makes it panic or take memory beyond a few times its own size.
    pub fn parse(bytes: &[u8]) -> Result<Self, Damage> {
        if bytes.is_empty() {
            return Err(Damage::Empty);
        }
        let object = Object::parse(bytes)?;
        if object.find("schema").is_none()
            && let Some(document) = legacy::read(&object)?
        {
            return Ok(document);
        }
        let schema: u64 = object.required("schema")?;
        if schema != SCHEMA {
            return Err(if schema > SCHEMA {
                Damage::Schema(schema)
            } else {
                Damage::Wrong("schema".into())
            });
        }
        let sections = object.find("sections").ok_or(Damage::Missing("sections"))?;
        if object.required::<u32>("crc32")? != crc32fast::hash(sections.get().as_bytes()) {
            return Err(Damage::Checksum("crc32"));
        }
        if object.find("head_crc32").is_some() {
            // Borrowed from `bytes`, so the distance is within them.
            let head = sections.get().as_ptr() as usize - bytes.as_ptr() as usize;
            if object.required::<u32>("head_crc32")? != crc32fast::hash(&bytes[..head]) {
                return Err(Damage::Checksum("head_crc32"));
            }
        }
        let saved_at = object.number("saved_at")?;
        let older: BTreeMap<String, u64> = object.optional("sections_saved_at")?.unwrap_or_default();
        let parsed = Object::parse(sections.get().as_bytes())?;
        let mut sections = Sections::default();
        for (name, data) in parsed.0 {
            let at = older.get(&name).copied().unwrap_or(saved_at).min(LARGEST);
            sections.put(name, data.get().to_owned(), at);
        }
        Ok(Self {
            node_id: object.required("node_id")?,
            incarnation: object.number("incarnation")?,
            saved_at,
            shutdown_at: match object.optional::<Option<u64>>("shutdown_at")?.flatten() {
                Some(at) if at > LARGEST => return Err(Damage::Wrong("shutdown_at".into())),
                at => at,
            },
            clean: object.required("clean")?,
            sections,
            unknown: object
                .0
                .into_iter()
                .filter(|(name, _)| !KNOWN.contains(&name.as_str()))
                .map(|(name, value)| (name, value.to_owned()))
                .collect(),
        })
    }

    /// The file's bytes, ending in a newline.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut file = Vec::new();
        self.write(&mut file);
        file
    }

    /// Writes the file's bytes in place of what is in `file`.
    pub(super) fn write(&self, file: &mut Vec<u8>) {
        file.clear();
        file.extend_from_slice(b"{\n");
        let field = |file: &mut Vec<u8>, name: &str, value: &str| {
            for part in ["  ", &quoted(name), ": ", value, ",\n"] {
                file.extend_from_slice(part.as_bytes());
            }
        };
        field(file, "schema", &SCHEMA.to_string());
        field(file, "node_id", &quoted(&self.node_id));
        field(file, "incarnation", &self.incarnation.to_string());
        field(file, "saved_at", &self.saved_at.to_string());
        field(file, "shutdown_at", &self.shutdown_at.map_or("null".to_owned(), |at| at.to_string()));
        field(file, "clean", if self.clean { "true" } else { "false" });
        for (name, value) in &self.unknown {
            field(file, name, value.get());
        }
        let older = self.sections.older_than(self.saved_at);
        if !older.is_empty() {
            field(
                file,
                "sections_saved_at",
                &serde_json::to_string(&older).expect("names and numbers are JSON"),
            );
        }
        // As wide as any, to be filled in when the sections are known: they are long, and copied once.
        let before = file.len();
        field(file, "crc32", &format!("{:>10}", u32::MAX));
        let crc32 = before + "  \"crc32\": ".len();
        file.extend_from_slice(b"  \"sections\": ");
        let head = file.len();
        self.sections.write(file);
        let sections = format!("{:>10}", crc32fast::hash(&file[head..]));
        file[crc32..crc32 + sections.len()].copy_from_slice(sections.as_bytes());
        let head = crc32fast::hash(&file[..head]);
        file.extend_from_slice(format!(",\n  \"head_crc32\": {head}\n}}\n").as_bytes());
    }
}

/// `text` as a JSON string.
pub(super) fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string is JSON")
}

/// A JSON object in the order it was written, its values as they stand there.
pub(super) struct Object<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Object<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, Damage> {
        let object: Self =
            serde_json::from_slice(bytes).map_err(|error| Damage::NotJson(error.to_string()))?;
        let mut names: Vec<&str> = object.0.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Damage::Twice(pair[0].to_owned())),
            None => Ok(object),
        }
    }

    pub(super) fn find(&self, name: &str) -> Option<&'a RawValue> {
        self.0.iter().find(|(field, _)| field == name).map(|(_, value)| *value)
    }

    pub(super) fn optional<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, Damage> {
        let Some(value) = self.find(name) else { return Ok(None) };
        serde_json::from_str(value.get()).map(Some).map_err(|_| Damage::Wrong(name.into()))
    }

    fn required<T: DeserializeOwned>(&self, name: &'static str) -> Result<T, Damage> {
        self.optional(name)?.ok_or(Damage::Missing(name))
    }

    fn number(&self, name: &'static str) -> Result<u64, Damage> {
        match self.required(name)? {
            number if number <= LARGEST => Ok(number),
            _ => Err(Damage::Wrong(name.into())),
        }
    }
}

impl<'de> Deserialize<'de> for Object<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    if fields.len() == MOST_FIELDS {
                        return Err(A::Error::custom(format_args!("more than {MOST_FIELDS} fields")));
                    }
                    fields.push(field);
                }
                Ok(Object(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}
