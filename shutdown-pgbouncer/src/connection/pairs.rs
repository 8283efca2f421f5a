//! Pairs of a connection string, taken apart byte by byte as PgBouncer does.

/// The key whose value is never shown.
pub(crate) const SECRET: &str = "password";

/// What was read.
pub(crate) struct Read {
    /// Keys and values in their order.
    pub(crate) pairs: Vec<(Vec<u8>, Vec<u8>)>,
    /// A byte behind a closing quote was not a blank, and was lost.
    pub(crate) lost: bool,
}

/// What C's `isspace` is true for.
pub(crate) fn is_space(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == b'\x0b'
}

/// The number that C's `atoi` makes of a text: its digits in front, with 64 bits at most, of which 32 are kept.
pub(crate) fn number(text: &[u8]) -> i32 {
    let text = &text[text.iter().take_while(|byte| is_space(**byte)).count()..];
    let (sign, digits) = match text {
        [b'-', digits @ ..] => (-1, digits),
        [b'+', digits @ ..] => (1, digits),
        digits => (1, digits),
    };
    let digits = digits.iter().take_while(|byte| byte.is_ascii_digit());
    let large = digits.fold(0_i64, |number, digit| {
        number.saturating_mul(10).saturating_add(sign * i64::from(digit - b'0'))
    });
    large as i32
}

/// Takes a connection string apart. It is what is left of a line when white space at its ends is gone.
///
/// # Errors
///
/// What PgBouncer calls a syntax error: a sentence that holds nothing of the text.
pub(crate) fn pairs(text: &[u8]) -> Result<Read, String> {
    let mut read = Read { pairs: Vec::new(), lost: false };
    let mut rest = blanks(text);
    while !rest.is_empty() {
        let length = rest.iter().position(|byte| matches!(byte, b'=' | b' ')).unwrap_or(rest.len());
        let (key, behind) = rest.split_at(length);
        let [b'=', behind @ ..] = blanks(behind) else {
            return Err("something stands where key=value should; a comment cannot stand behind a value, and a value with blanks needs '…'".into());
        };
        if key.is_empty() {
            return Err("there is a = without a key".into());
        }
        let behind = blanks(behind);
        let (value, behind) = match behind {
            [b'\'', quoted @ ..] => unquote(quoted).ok_or("a quote ' is not closed")?,
            plain => {
                let length = plain.iter().position(|byte| *byte == b' ').unwrap_or(plain.len());
                (plain[..length].to_vec(), &plain[length..])
            }
        };
        if value.is_empty() {
            return Err("a key has no value: leave it out".into());
        }
        // One byte behind a value is skipped without a look.
        read.lost |= behind.first().is_some_and(|byte| *byte != b' ');
        rest = blanks(behind.get(1..).unwrap_or_default());
        read.pairs.push((key.to_vec(), value));
    }
    Ok(read)
}

/// The value in front of the closing quote, and what is behind it.
fn unquote(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut value = Vec::new();
    let mut rest = text;
    loop {
        match rest {
            [b'\'', b'\'', behind @ ..] => {
                value.push(b'\'');
                rest = behind;
            }
            [b'\'', behind @ ..] => return Some((value, behind)),
            [byte, behind @ ..] => {
                value.push(*byte);
                rest = behind;
            }
            [] => return None,
        }
    }
}

fn blanks(text: &[u8]) -> &[u8] {
    &text[text.iter().take_while(|byte| **byte == b' ').count()..]
}
