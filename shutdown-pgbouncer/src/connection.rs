//! Where a database of a PgBouncer is: the `key=value` pairs behind its name.

/// The pairs in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    pairs: Vec<(String, String)>,
}

impl Connection {
    /// The value of a key, the last one if it is there twice.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
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
    pub fn set(self, key: &str, value: &str) -> Result<Self, String> {
        let _ = (key, value);
        todo!()
    }

    /// Reads the text behind `name =`, as the strictest version would.
    ///
    /// # Errors
    ///
    /// What is wrong with it, one sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let _ = text;
        todo!()
    }
}

// And `Display`: `host=postgres port=5432 password='it''s'`.
