//! A token in a file: one word, never shown.

use std::fmt;

/// Reads the token in the file at `path`, which mistakes call `named`.
///
/// # Errors
///
/// The file cannot be read, or holds no word or more than one: one sentence, without what it holds.
pub fn token(path: &str, named: &dyn fmt::Display) -> Result<String, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("the admin token file {named} cannot be read: {error}"))?;
    match text.trim() {
        "" => Err(format!("the admin token file {named} is empty")),
        token if token.contains(char::is_whitespace) => {
            Err(format!("the admin token file {named} has more than one word: it holds one token"))
        }
        token => Ok(token.to_owned()),
    }
}
