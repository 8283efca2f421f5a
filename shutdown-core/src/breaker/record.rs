//! What is known of a breaker, in a form that outlives the process.
//!
//! Reading is tolerant: the state in any case and with or without its underscore, unknown fields, missing fields,
//! numbers of any size and sign. What cannot be understood is taken for nothing: closed, 0, absent.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::breaker::circuit::{Snapshot, State};

/// One breaker as it was when it was written down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Its key.
    #[serde(deserialize_with = "text")]
    pub peer: String,
    /// Where it stood.
    #[serde(deserialize_with = "state")]
    pub state: State,
    /// How long it would have stayed open. Absent in files of systems that did not know it.
    #[serde(deserialize_with = "number", skip_serializing_if = "Option::is_none")]
    pub remaining_open_ms: Option<u64>,
    /// Failures in the window, for whoever reads the file.
    #[serde(deserialize_with = "count")]
    pub error_count: u64,
    /// Calls in the window, likewise.
    #[serde(deserialize_with = "count")]
    pub total_count: u64,
}

impl Record {
    /// How long to stay open, `age` after this was written down; `None` if it was closed.
    pub(super) fn remaining(&self, age: Duration, sleep: Duration) -> Option<Duration> {
        let whole = match self.state {
            State::Closed => return None,
            State::HalfOpen => Duration::ZERO,
            State::Open => self.remaining_open_ms.map_or(sleep, Duration::from_millis).min(sleep),
        };
        Some(whole.saturating_sub(age))
    }
}

impl From<Snapshot> for Record {
    fn from(snapshot: Snapshot) -> Self {
        Self {
            peer: snapshot.peer,
            state: snapshot.state,
            remaining_open_ms: Some(snapshot.remaining_open_ms),
            error_count: snapshot.error_count,
            total_count: snapshot.total_count,
        }
    }
}

fn text<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    Ok(match from.deserialize_any(Anything)? {
        Value::Text(text) => text.into_owned(),
        Value::Number(_) | Value::Nothing => String::new(),
    })
}

fn number<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    Ok(match from.deserialize_any(Anything)? {
        Value::Number(number) => Some(number),
        Value::Text(_) | Value::Nothing => None,
    })
}

fn count<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    number(from).map(Option::unwrap_or_default)
}

fn state<'de, D: Deserializer<'de>>(from: D) -> Result<State, D::Error> {
    let text = text(from)?.to_ascii_lowercase().replace(['_', '-', ' '], "");
    let named = |state: &State| state.as_str().replace('_', "") == text;
    Ok(State::ALL.into_iter().find(named).unwrap_or_default())
}

enum Value<'de> {
    Text(Cow<'de, str>),
    Number(u64),
    Nothing,
}

/// Takes whatever there is.
struct Anything;

impl<'de> Visitor<'de> for Anything {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value<'de>, E> {
        Ok(Value::Number(number))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value<'de>, E> {
        Ok(Value::Number(number.max(0).unsigned_abs()))
    }

    fn visit_u128<E>(self, number: u128) -> Result<Value<'de>, E> {
        Ok(Value::Number(number.try_into().unwrap_or(u64::MAX)))
    }

    fn visit_i128<E>(self, number: i128) -> Result<Value<'de>, E> {
        Ok(Value::Number(number.max(0).try_into().unwrap_or(u64::MAX)))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value<'de>, E> {
        // Saturates; what is no number is 0.
        Ok(Value::Number(number as u64))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value<'de>, E> {
        Ok(Value::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Value<'de>, E> {
        Ok(Value::Text(Cow::Borrowed(text)))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Value<'de>, E> {
        Ok(Value::Nothing)
    }

    fn visit_bytes<E>(self, _: &[u8]) -> Result<Value<'de>, E> {
        Ok(Value::Nothing)
    }

    fn visit_unit<E>(self) -> Result<Value<'de>, E> {
        Ok(Value::Nothing)
    }

    fn visit_none<E>(self) -> Result<Value<'de>, E> {
        Ok(Value::Nothing)
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Value<'de>, D::Error> {
        from.deserialize_any(Self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value<'de>, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Nothing)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value<'de>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Nothing)
    }
}
