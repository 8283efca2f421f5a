//! The keys of a cluster: one signs, all verify, so that a key can be replaced without a moment in which nodes are deaf.
//!
//! Every node that has a key can speak for every other: the key says "one of us", and the node's name is what one of us says.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// The MAC at the end of every datagram, in bytes.
pub(crate) const MAC: usize = 32;
/// Before the datagram's bytes, so that no MAC of another protocol under the same key is one of ours.
const DOMAIN: &[u8] = b"sdpn-v1";
/// The shortest key: 128 bits, below which HMAC's strength is the key's (RFC 2104 §3 asks for more, L bytes).
const SHORTEST: usize = 16;
/// The longest key. A longer one than SHA-256's block is hashed first and is no stronger.
const LONGEST: usize = 64;

/// The keys of a cluster.
///
/// To replace a key: add the new one as the last line of every node's file and restart them one after another; then move it
/// to the first line, and restart them; then remove the old one.
#[derive(Clone)]
pub struct Keys {
    /// The first signs.
    all: Vec<Key>,
    insecure: bool,
}

#[derive(Clone)]
struct Key {
    id: u8,
    /// With the key in it already.
    mac: Hmac<Sha256>,
}

impl Key {
    fn new(id: u8, key: &[u8]) -> Self {
        let mac = Hmac::new_from_slice(key).expect("HMAC takes a key of any length");
        Self { id, mac }
    }

    fn over(&self, bytes: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(DOMAIN);
        mac.update(bytes);
        mac
    }
}

impl Keys {
    /// Reads a key file: a line a key, `key_id:hex`, where the id is 0 to 255 and the key has 16 to 64 bytes. The first one
    /// signs, all of them verify. Empty lines and lines that begin with `#` are passed over.
    ///
    /// # Errors
    ///
    /// Which line is wrong, and how to write it; never what stands there.
    pub fn parse(text: &str) -> Result<Self, KeysError> {
        let mut all: Vec<Key> = Vec::new();
        for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |what| KeysError { line: Some(number), what };
            let (id, hex) = line.split_once(':').ok_or_else(|| wrong("has no colon: write key_id:hex"))?;
            // `parse` would take a sign.
            let digits = id.bytes().all(|byte| byte.is_ascii_digit());
            let id = id.parse().ok().filter(|_| digits);
            let id = id.ok_or_else(|| wrong("has no key id from 0 to 255 before the colon"))?;
            let key = from_hex(hex)
                .ok_or_else(|| wrong("is not hexadecimal behind the colon: write two digits a byte"))?;
            if key.len() < SHORTEST {
                return Err(wrong(
                    "has a key of less than 16 bytes: write 32 to 128 hexadecimal digits, as `openssl rand -hex 32` does",
                ));
            }
            if key.len() > LONGEST {
                return Err(wrong("has a key of more than 64 bytes: write 32 to 128 hexadecimal digits"));
            }
            if all.iter().any(|other| other.id == id) {
                return Err(wrong("has a key id that an earlier line has: give each key its own"));
            }
            all.push(Key::new(id, &key));
        }
        if all.is_empty() {
            return Err(KeysError { line: None, what: "holds no key: write a line key_id:hex" });
        }
        Ok(Self { all, insecure: false })
    }

    /// No secret: key 0 is empty, and everybody has it. For tests alone.
    pub fn insecure() -> Self {
        Self { all: vec![Key::new(0, &[])], insecure: true }
    }

    /// Whether everybody has the key.
    pub fn is_insecure(&self) -> bool {
        self.insecure
    }

    /// The id of the key that signs.
    pub(crate) fn signing_id(&self) -> u8 {
        self.signing().id
    }

    fn signing(&self) -> &Key {
        self.all.first().expect("every constructor gives at least one key")
    }

    /// Appends the signing key's MAC of all that is there.
    pub(crate) fn seal(&self, datagram: &mut Vec<u8>) {
        let mac = self.signing().over(datagram).finalize().into_bytes();
        datagram.extend_from_slice(&mac);
    }

    /// Whether this id is known, and if so whether `mac` is its MAC of `bytes`; in constant time.
    pub(crate) fn verifies(&self, id: u8, bytes: &[u8], mac: &[u8]) -> Option<bool> {
        let key = self.all.iter().find(|key| key.id == id)?;
        Some(key.over(bytes).verify_slice(mac).is_ok())
    }
}

/// As the ids, and never a key.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.all.iter().map(|key| key.id)).finish()
    }
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let pairs = hex.as_bytes().chunks(2).map(|pair| match pair {
        [high, low] => u8::try_from(digit(high)? * 16 + digit(low)?).ok(),
        _ => None,
    });
    pairs.collect()
}

/// A key file that cannot be used. The configuration's mistake: a program exits with 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeysError {
    line: Option<usize>,
    what: &'static str,
}

impl fmt::Display for KeysError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line} ")?;
        }
        f.write_str(self.what)
    }
}

impl std::error::Error for KeysError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_key_signs_and_all_verify() {
        let one = "7:000102030405060708090a0b0c0d0e0f";
        let two = "200:ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100";
        let old = Keys::parse(one).unwrap();
        let both = Keys::parse(&format!("# keys\n\n{two}\r\n  {one}\n")).unwrap();
        let mut sealed = b"notice".to_vec();
        both.seal(&mut sealed);
        assert_eq!((both.signing_id(), sealed.len()), (200, 6 + MAC));
        assert_eq!(both.verifies(200, b"notice", &sealed[6..]), Some(true));
        assert_eq!(both.verifies(7, b"notice", &sealed[6..]), Some(false));
        assert_eq!(old.verifies(200, b"notice", &sealed[6..]), None);
        let mut sealed = b"notice".to_vec();
        old.seal(&mut sealed);
        assert_eq!(both.verifies(7, b"notice", &sealed[6..]), Some(true));
    }

    #[test]
    fn a_key_file_that_is_wrong_says_in_which_line_and_shows_no_key() {
        let key = "00112233445566778899aabbccddeeff";
        for (text, said) in [
            (String::new(), "holds no key"),
            ("# nothing\n".to_owned(), "holds no key"),
            (key.to_owned(), "line 1 has no colon"),
            (format!("1:{key}\n\n2{key}"), "line 3 has no colon"),
            (format!("256:{key}"), "line 1 has no key id from 0 to 255"),
            (format!("+1:{key}"), "line 1 has no key id"),
            (format!(":{key}"), "line 1 has no key id"),
            (format!("1:{key}0"), "line 1 is not hexadecimal"),
            (format!("1:{key}zz"), "line 1 is not hexadecimal"),
            ("1:".to_owned(), "less than 16 bytes"),
            (format!("1:{}", &key[2..]), "less than 16 bytes"),
            (format!("1:{}", "00".repeat(65)), "more than 64 bytes"),
            (format!("1:{key}\n1:{key}"), "line 2 has a key id that an earlier line has"),
        ] {
            let error = Keys::parse(&text).unwrap_err().to_string();
            assert!(error.contains(said), "{text:?}: {error}");
            assert!(!error.contains("2233") && error.lines().count() == 1, "{error}");
        }
        assert_eq!(format!("{:?}", Keys::parse(&format!("9:{key}")).unwrap()), "[9]");
    }
}
