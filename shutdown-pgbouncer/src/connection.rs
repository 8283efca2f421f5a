//! Where a database of a PgBouncer is: the `key=value` pairs behind its name.
//!
//! They are read as PgBouncer reads them (measured on 1.18, 1.24 and 1.26): pairs with spaces between, and nothing else
//! between; blanks around `=` do not matter; a value may stand in `'…'`, where `''` is a quote. There are no comments.

mod keys;
mod pairs;

use std::fmt;

pub(crate) use keys::{DATABASE, Keys, PEER, USER, check};
pub(crate) use pairs::{SECRET, is_space, number, pairs};

use keys::Say;

/// The pairs in their order.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Connection {
    pairs: Vec<(String, String)>,
}

impl Connection {
    /// The value of a key, the last one if it is there twice.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The value of a key as the number that PgBouncer takes it for: `54x` is 54, `abc` is 0, and what has more than 32 bits
    /// loses them (C's `atoi`; measured on 1.18, 1.24 and 1.26).
    pub fn number(&self, key: &str) -> Option<i32> {
        self.get(key).map(|value| number(value.as_bytes()))
    }

    /// The pairs in their order.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// This one with the key's value in its place, or behind the others.
    ///
    /// # Errors
    ///
    /// The key is none of PgBouncer's, or the value is one that it would misread: one sentence.
    pub fn set(mut self, key: &str, value: &str) -> Result<Self, String> {
        let Some(known) = DATABASE.find(key.as_bytes()) else {
            return Err(format!("{key:?} is no key of a database's connection"));
        };
        if value.is_empty() {
            return Err(format!("{key} is empty, which PgBouncer refuses: leave it out"));
        }
        if value.chars().any(char::is_control) {
            return Err(format!("{key} has a control character"));
        }
        known.strict(value).map_err(|why| format!("{key} {why}"))?;
        let pair = (key.to_owned(), value.to_owned());
        match self.pairs.iter().rposition(|(name, _)| name == key) {
            Some(at) => {
                self.pairs[at] = pair;
                let mut place = 0..;
                self.pairs.retain(|(name, _)| place.next() == Some(at) || name != key);
            }
            None => self.pairs.push(pair),
        }
        Ok(self)
    }

    /// Reads the text behind `name =`, as the strictest version would. A key is good if any version knows it; which one does,
    /// [`Ini::problems`](crate::Ini::problems) tells.
    ///
    /// # Errors
    ///
    /// What is wrong with it, one sentence. It holds no value.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.contains(['\n', '\0']) {
            return Err("it is more than a line, or has a NUL".into());
        }
        // As the line that it stands in is read.
        let text = text.trim_start_matches([' ', '\t']).as_bytes();
        let text = &text[..text.iter().rposition(|byte| !is_space(*byte)).map_or(0, |last| last + 1)];
        let read = pairs(text)?;
        if let Some(Say { what, .. }) = check(&DATABASE, &read, None).into_iter().find(|say| say.fatal) {
            return Err(what);
        }
        let text = |bytes| String::from_utf8(bytes).map_err(|_| String::from("it is not UTF-8"));
        let pairs = read.pairs.into_iter().map(|(key, value)| Ok((text(key)?, text(value)?)));
        Ok(Self { pairs: pairs.collect::<Result<_, String>>()? })
    }
}

/// As it stands in the file: `host=postgres port=5432 password='it''s'`. The password is shown; [`Debug`](fmt::Debug) hides it.
impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (key, value)) in self.pairs().enumerate() {
            let blank = if place == 0 { "" } else { " " };
            if value.bytes().any(|byte| is_space(byte) || byte == b'\'') {
                write!(f, "{blank}{key}='{}'", value.replace('\'', "''"))?;
            } else {
                write!(f, "{blank}{key}={value}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.pairs().map(|(key, value)| (key, if key == SECRET { "…" } else { value }));
        f.debug_map().entries(shown).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Vec<(String, String)> {
        Connection::parse(text).unwrap_or_else(|error| panic!("{text}: {error}")).pairs
    }

    fn pair(key: &str, value: &str) -> (String, String) {
        (key.to_owned(), value.to_owned())
    }

    #[test]
    fn pairs_are_read_as_pgbouncer_reads_them() {
        assert_eq!(read(""), []);
        assert_eq!(read("host=h port = 1"), [pair("host", "h"), pair("port", "1")]);
        assert_eq!(
            read("  dbname='it''s'  user=it's \r\n".trim_end()),
            [pair("dbname", "it's"), pair("user", "it's")]
        );
        assert_eq!(read("host=h\tdbname=x"), [pair("host", "h\tdbname=x")]);
        assert_eq!(read("host==h"), [pair("host", "=h")]);
        // The byte behind the quote is lost.
        assert_eq!(read("host='h'xport=1"), [pair("host", "h"), pair("port", "1")]);
        assert_eq!(read("host=a host=b"), [pair("host", "a"), pair("host", "b")]);
    }

    #[test]
    fn what_pgbouncer_refuses_is_refused() {
        let long = format!("host={} ;", "h".repeat(3));
        for bad in [
            "x",
            "=x",
            "host",
            "host=",
            "host=''",
            "host='h",
            "host= ",
            "bogus=1",
            "HOST=h",
            "host=h ; c",
            &long,
            "port=abc",
            "port=0",
            "port=4294967296",
            "pool_mode=x",
            "load_balance_hosts=x",
            "host=h\ndbname=x",
            "host=h\0",
            "host='h'port=1",
        ] {
            Connection::parse(bad).unwrap_err();
        }
    }

    #[test]
    fn numbers_are_those_that_pgbouncer_takes() {
        let connection =
            Connection::parse("port=54x pool_size=abc min_pool_size=-3 reserve_pool=4294967297").unwrap();
        let numbers = ["port", "pool_size", "min_pool_size", "reserve_pool", "max_db_connections"];
        assert_eq!(numbers.map(|key| connection.number(key)), [Some(54), Some(0), Some(-3), Some(1), None]);
    }

    #[test]
    fn only_what_every_reader_takes_for_the_same_can_be_set() {
        let good = [
            ("host", "/run/postgresql"),
            ("port", "5432"),
            ("pool_size", "0"),
            ("password", " it's 'q' "),
            ("dbname", "ü"),
            ("pool_mode", "transaction"),
            ("reserve_pool_size", "5"),
        ];
        for (key, value) in good {
            assert_eq!(Connection::default().set(key, value).unwrap().get(key), Some(value));
        }
        let bad = [
            ("bogus", "x"),
            ("host", ""),
            ("host", "a\tb"),
            ("host", "a\nb"),
            ("host", "a\0"),
            ("host", "a\u{85}"),
            ("port", "54x"),
            ("port", "0"),
            ("port", "65536"),
            ("port", "-1"),
            ("port", "+1"),
            ("pool_size", "abc"),
            ("pool_size", "-1"),
            ("pool_size", "2147483648"),
            ("pool_mode", "x"),
            ("user", &"n".repeat(128)),
            ("password", &"p".repeat(2048)),
        ];
        for (key, value) in bad {
            Connection::default().set(key, value).unwrap_err();
        }
    }

    #[test]
    fn a_key_is_set_in_its_place_and_once() {
        let connection = Connection::parse("host=a port=1 host=b user=u").unwrap();
        let set = connection.clone().set("host", "c").unwrap();
        assert_eq!(set.to_string(), "port=1 host=c user=u");
        assert_eq!(
            connection.set("dbname", "d").unwrap().to_string(),
            "host=a port=1 host=b user=u dbname=d"
        );
    }

    #[test]
    fn no_error_and_no_debug_holds_the_password() {
        let connection = Connection::parse("host=h password=hunter2").unwrap();
        assert!(!format!("{connection:?}").contains("hunter2"));
        for text in [
            "password=hunter2 x",
            "password='hunter2",
            "password=a hunter2=x",
            "password=hunter2 port=x",
            "password='a'hunter2=x",
            "x password=hunter2",
            "password=a hunter2",
            "password=a pool_mode=hunter2",
        ] {
            let error = Connection::parse(text).unwrap_err();
            assert!(!error.contains("unter2"), "{error}");
        }
        let error = Connection::default().set("password", "hunter2\n").unwrap_err();
        assert!(!error.contains("hunter2"), "{error}");
    }

    proptest! {
        #[test]
        fn what_is_set_is_read_back(values in proptest::collection::vec(("(host|dbname|user|password|connect_query)", ".{1,40}"), 0..6)) {
            let mut connection = Connection::default();
            for (key, value) in values {
                match connection.clone().set(&key, &value) {
                    Ok(set) => connection = set,
                    Err(_) => prop_assert!(value.chars().any(char::is_control) || value.len() > 127),
                }
            }
            prop_assert_eq!(Connection::parse(&connection.to_string()), Ok(connection));
        }

        #[test]
        fn what_is_read_is_written_and_read_the_same(text in "([a-z_]{0,3}(host|port|user|password|pool_size)[ =']{0,3}['a-z0-9\t ]{0,6}[' ]{0,2}){0,4}") {
            if let Ok(connection) = Connection::parse(&text) {
                prop_assert_eq!(Connection::parse(&connection.to_string()), Ok(connection));
            }
        }
    }
}
