//! `.env` read into a map. The process environment is only read.

use std::collections::BTreeMap;
use std::path::Path;

/// The variables in the file at `path`; none if there is no such file.
///
/// # Errors
///
/// The file cannot be read, or a line is no `NAME=value`: one sentence that names the line and never repeats it.
pub fn read(path: &Path) -> Result<BTreeMap<String, String>, String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(format!("{} cannot be read: {error}", path.display())),
    };
    let mut variables = BTreeMap::new();
    for pair in dotenvy::from_read_iter(text.as_bytes()) {
        let (name, value) = pair.map_err(|error| match error {
            // Not the line itself: it may hold a secret.
            dotenvy::Error::LineParse(line, _) => {
                // What dotenvy gives is the line, or the end of it from the value on.
                let wrong = line.trim();
                let number =
                    text.lines().position(|other| !wrong.is_empty() && other.trim().ends_with(wrong));
                let place = number.map_or(String::new(), |number| format!(", line {}", number + 1));
                format!("{}{place}: not a NAME=value line; quote values that have spaces", path.display())
            }
            error => format!("{} cannot be read: {error}", path.display()),
        })?;
        // The first of two counts, as dotenv has it.
        variables.entry(name).or_insert(value);
    }
    Ok(variables)
}
