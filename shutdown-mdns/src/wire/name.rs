//! A domain name: labels of bytes, compared without regard to the case of ASCII letters (RFC 6762 §16).

use std::fmt;

/// The longest name, with its lengths and the last zero (RFC 1035 §2.3.4).
const LONGEST: usize = 255;
/// The longest label (RFC 1035 §2.3.4).
pub const LONGEST_LABEL: usize = 63;

/// A domain name.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// Length, label, length, label; without the last zero.
    wire: Vec<u8>,
}

impl Name {
    /// A name of these labels; nothing if one is empty or longer than 63 bytes, or all are longer than 255.
    pub fn of<L: AsRef<[u8]>>(labels: impl IntoIterator<Item = L>) -> Option<Self> {
        let mut name = Self::default();
        for label in labels {
            if !name.push(label.as_ref()) {
                return None;
            }
        }
        Some(name)
    }

    /// A name written with dots, the last of which may be left out. A dot within a label cannot be said.
    pub fn dotted(text: &str) -> Option<Self> {
        Self::of(text.strip_suffix('.').unwrap_or(text).split('.'))
    }

    /// Adds a label at the end, if it fits.
    pub(super) fn push(&mut self, label: &[u8]) -> bool {
        let fits = (1..=LONGEST_LABEL).contains(&label.len()) && self.wire.len() + label.len() + 2 <= LONGEST;
        if fits {
            // It fits: 63 at most.
            self.wire.push(label.len() as u8);
            self.wire.extend_from_slice(label);
        }
        fits
    }

    /// Its labels.
    pub fn labels(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &self.wire[..];
        std::iter::from_fn(move || {
            let (length, behind) = rest.split_first()?;
            let (label, behind) = behind.split_at_checked(usize::from(*length))?;
            rest = behind;
            Some(label)
        })
    }

    /// Whether both name the same thing.
    pub fn is(&self, other: &Self) -> bool {
        // A length is never a letter: 63 at most.
        self.wire.eq_ignore_ascii_case(&other.wire)
    }

    /// Whether it is one label before `parent`.
    pub fn is_child_of(&self, parent: &Self) -> bool {
        self.wire.first().is_some_and(|length| {
            self.wire
                .get(usize::from(*length) + 1..)
                .is_some_and(|rest| rest.eq_ignore_ascii_case(&parent.wire))
        })
    }

    /// As mdns-sd writes it, in small letters: with dots between the labels and at the end, none of them escaped.
    pub fn key(&self) -> String {
        self.to_string().to_lowercase()
    }

    pub(super) fn wire(&self) -> &[u8] {
        &self.wire
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for label in self.labels() {
            write!(f, "{}.", String::from_utf8_lossy(label))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
