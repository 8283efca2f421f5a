//! The keys of connection strings, and what their values must be. Measured on 1.18, 1.24 and 1.26.

use super::pairs::{Read, SECRET, number};
use crate::Version;
use crate::problem::{Known, Knows};

/// The longest name of a user; what is longer is cut.
const USER_BYTES: usize = 127;
/// The longest password; what is longer is cut, or the user is not.
const PASSWORD_BYTES: usize = 2047;

/// What a value is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// Any text.
    Text,
    /// Text of so many bytes at most.
    Short(usize),
    /// A number by C's `atoi`, that may not be 0.
    Port,
    /// A number by C's `atoi`.
    Number,
    /// One of these words, in any case.
    Word(&'static [&'static str]),
}

/// A key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    name: &'static str,
    value: Value,
    known: Known,
}

/// The keys of one section's entries.
pub(crate) struct Keys(&'static [Key]);

/// Something about a connection string; never a value.
pub(crate) struct Say {
    pub(crate) fatal: bool,
    pub(crate) what: String,
}

impl Keys {
    pub(super) fn find(&self, name: &[u8]) -> Option<Key> {
        self.0.iter().find(|key| key.name.as_bytes() == name).copied()
    }
}

impl Key {
    /// What is wrong with a value that is to be written: only what everybody takes for the same is good.
    pub(super) fn strict(self, value: &str) -> Result<(), String> {
        let most = match self.value {
            Value::Port => u32::from(u16::MAX),
            Value::Number => i32::MAX.unsigned_abs(),
            _ => return self.problem(value.as_bytes()).map_or(Ok(()), |say| Err(say.what)),
        };
        let least = u32::from(self.value == Value::Port);
        match value.parse::<u32>() {
            Ok(number)
                if (least..=most).contains(&number) && value.bytes().all(|byte| byte.is_ascii_digit()) =>
            {
                Ok(())
            }
            _ => Err(format!("is no number from {least} to {most}")),
        }
    }

    /// What PgBouncer does with a value: refuses it, or takes it for another.
    fn problem(self, value: &[u8]) -> Option<Say> {
        let say = |fatal, what: String| Some(Say { fatal, what });
        match self.value {
            Value::Word(words) => {
                let good = words.iter().any(|word| word.as_bytes().eq_ignore_ascii_case(value));
                if good { None } else { say(true, format!("is none of {}", words.join(", "))) }
            }
            Value::Port if number(value) == 0 => say(true, "is no port".into()),
            Value::Port | Value::Number => {
                let taken = number(value);
                let digits = value.strip_prefix(b"-").unwrap_or(value);
                let plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
                let same = plain && std::str::from_utf8(value).is_ok_and(|text| text.parse() == Ok(taken));
                if !same {
                    say(false, format!("is no number; PgBouncer takes it for {taken}"))
                } else if self.value == Value::Port && !(1..=i32::from(u16::MAX)).contains(&taken) {
                    say(false, "is no port, though PgBouncer takes it for one".into())
                } else {
                    None
                }
            }
            Value::Short(most) if value.len() > most => {
                say(false, format!("has more than {most} bytes; the rest may be cut"))
            }
            Value::Text | Value::Short(_) if value.contains(&b'\t') => {
                say(false, "has a tab, which does not end a value: pairs have spaces between them".into())
            }
            Value::Text | Value::Short(_) => None,
        }
    }
}

/// What a version refuses or misreads; without a version, what every one does.
pub(crate) fn check(keys: &Keys, read: &Read, version: Option<Version>) -> Vec<Say> {
    let mut says = Vec::new();
    let mut add = |fatal, what: String| says.push(Say { fatal, what });
    if read.lost {
        add(false, "a blank is missing behind a quote ', and the byte there is lost".into());
    }
    // What follows a password with blanks but no quotes may be a piece of it.
    let mut behind_password = false;
    for (place, (name, value)) in read.pairs.iter().enumerate() {
        let Some(key) = keys.find(name) else {
            let looks = |byte: &u8| byte.is_ascii_lowercase() || *byte == b'_';
            let shown = !behind_password && !read.lost && name.len() <= 32 && name.iter().all(looks);
            let shown = shown.then(|| String::from_utf8_lossy(name).into_owned());
            add(
                true,
                shown.map_or("has a key that no version knows".into(), |name| {
                    format!("has a key that no version knows: {name}")
                }),
            );
            continue;
        };
        behind_password |= key.name == SECRET;
        match version.map(|version| (version, key.known.to(version))) {
            Some((version, Knows::No)) => add(true, format!("{version} does not know the key {}", key.name)),
            Some((version, Knows::Perhaps)) => {
                add(false, format!("{version} may not know the key {}", key.name))
            }
            _ => {}
        }
        if let Some(Say { fatal, what }) = key.problem(value) {
            add(fatal, format!("{} {what}", key.name));
        }
        if read.pairs[..place].iter().any(|(earlier, _)| earlier == name) {
            add(false, format!("{} is there twice, and the last one counts", key.name));
        }
    }
    says
}

const fn key(name: &'static str, value: Value, known: Known) -> Key {
    Key { name, value, known }
}

const POOL_MODES: Value = Value::Word(&["session", "transaction", "statement"]);

/// Of an entry of `[databases]`.
pub(crate) const DATABASE: Keys = Keys(&[
    key("dbname", Value::Text, Known::ALWAYS),
    key("host", Value::Text, Known::ALWAYS),
    key("port", Value::Port, Known::ALWAYS),
    key("user", Value::Short(USER_BYTES), Known::ALWAYS),
    key(SECRET, Value::Short(PASSWORD_BYTES), Known::ALWAYS),
    key("auth_user", Value::Short(USER_BYTES), Known::ALWAYS),
    key("auth_dbname", Value::Text, Known::BY_24),
    key("auth_query", Value::Text, Known::BY_24),
    key("client_encoding", Value::Text, Known::ALWAYS),
    key("datestyle", Value::Text, Known::ALWAYS),
    key("timezone", Value::Text, Known::ALWAYS),
    key("application_name", Value::Text, Known::ALWAYS),
    key("connect_query", Value::Text, Known::ALWAYS),
    key("pool_mode", POOL_MODES, Known::ALWAYS),
    key("pool_size", Value::Number, Known::ALWAYS),
    key("min_pool_size", Value::Number, Known::ALWAYS),
    key("reserve_pool", Value::Number, Known::ALWAYS),
    key("reserve_pool_size", Value::Number, Known::BY_24),
    key("max_db_connections", Value::Number, Known::ALWAYS),
    key("max_db_client_connections", Value::Number, Known::BY_24),
    key("server_lifetime", Value::Number, Known::BY_24),
    key("query_wait_timeout", Value::Number, Known::BY_26),
    key("load_balance_hosts", Value::Word(&["disable", "round-robin"]), Known::BY_24),
]);

/// Of an entry of `[users]`.
pub(crate) const USER: Keys = Keys(&[
    key("pool_mode", POOL_MODES, Known::ALWAYS),
    key("max_user_connections", Value::Number, Known::ALWAYS),
    key("max_user_client_connections", Value::Number, Known::BY_24),
    key("pool_size", Value::Number, Known::BY_24),
    key("reserve_pool_size", Value::Number, Known::BY_24),
    key("query_timeout", Value::Number, Known::BY_24),
    key("idle_transaction_timeout", Value::Number, Known::BY_24),
    key("client_idle_timeout", Value::Number, Known::BY_24),
    key("transaction_timeout", Value::Number, Known::BY_26),
]);

/// Of an entry of `[peers]`.
pub(crate) const PEER: Keys = Keys(&[
    key("host", Value::Text, Known::ALWAYS),
    key("port", Value::Port, Known::ALWAYS),
    key("pool_size", Value::Number, Known::ALWAYS),
]);
