//! What opening a state has found and done, to be logged, shown and asserted.

use std::fmt;
use std::time::Duration;

use super::sections::Sections;

/// What the previous run left, and what became of it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Loaded {
    /// Which generation was used.
    pub found: Found,
    /// Who wrote it; empty if nobody did.
    pub node_id: String,
    /// The writer's incarnation.
    pub incarnation: u64,
    /// When it was saved, milliseconds since the Unix epoch.
    pub saved_at: u64,
    /// When the writer's shutdown began; `None`: it crashed, or was killed before it heard a reason.
    pub shutdown_at: Option<u64>,
    /// Whether that shutdown came to stage Persist.
    pub clean: bool,
    /// How long ago it was saved; zero if it is from the future.
    pub age: Duration,
    /// Whether the clock has been set back since.
    pub from_the_future: bool,
    /// All sections, as they were read.
    pub sections: Sections,
    /// What became of each source's section.
    pub sources: Vec<(&'static str, Fate)>,
    /// The generations that could not be used.
    pub set_aside: Vec<SetAside>,
    /// Where the whole generation was copied to, because a source did not take its section; or why that failed.
    pub copy: Option<Result<Option<String>, String>>,
}

/// Which generation of a state was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// None: this is the first start, or none was usable.
    Nothing,
    /// The newest.
    Newest,
    /// An earlier one, because newer ones could not be used.
    Earlier,
}

/// What became of a source's section.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fate {
    /// There was none.
    Absent,
    /// It was restored.
    Restored {
        /// How old it was.
        age: Duration,
    },
    /// It was older than the source allows.
    TooOld {
        /// How old it was.
        age: Duration,
    },
    /// The source did not take it.
    Failed {
        /// What it said.
        reason: String,
    },
}

/// A generation that could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SetAside {
    /// What it was called.
    pub name: String,
    /// Why it could not be used.
    pub reason: String,
    /// What it is called now, `None` if it was left where it is, or why it could not be moved.
    pub now_at: Result<Option<String>, String>,
}

impl fmt::Display for SetAside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, reason, now_at } = self;
        match now_at {
            Ok(Some(now_at)) => write!(f, "{name} was not used and is now {now_at}: {reason}"),
            Ok(None) => write!(f, "{name} was not used: {reason}"),
            Err(error) => write!(f, "{name} was not used: {reason}; it could not be moved away: {error}"),
        }
    }
}

impl fmt::Display for Loaded {
    /// A sentence for people: from when and from whom the state is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.found == Found::Nothing {
            return match self.set_aside.len() {
                0 => f.write_str("none yet"),
                damaged => write!(f, "none that can be used, {damaged} set aside"),
            };
        }
        if self.saved_at == 0 {
            f.write_str("from an unknown time")?;
        } else {
            write!(f, "from {}", Utc(self.saved_at))?;
        }
        if self.from_the_future {
            f.write_str(" (the clock has been set back since)")?;
        } else if self.saved_at != 0 {
            write!(f, ", {:.1} s ago", self.age.as_secs_f64())?;
        }
        match self.shutdown_at {
            Some(at) if self.clean => write!(f, ", after a shutdown that began at {}", Utc(at)),
            Some(at) => write!(f, ", from a shutdown that began at {} and did not come to its end", Utc(at)),
            None => f.write_str(", from a run that ended without a shutdown"),
        }
    }
}

impl Loaded {
    /// Says once each: from when the state is, what was set aside, which sections were not restored.
    pub(super) fn log(&self, place: &str, node_id: &str) {
        for aside in &self.set_aside {
            tracing::warn!(target: "shutdown", "{aside}");
        }
        let Self { saved_at, shutdown_at, clean, incarnation, .. } = self;
        if self.found == Found::Nothing {
            tracing::info!(target: "shutdown", place, "state: {self}");
        } else {
            let restored: Vec<_> = self.names(|fate| matches!(fate, Fate::Restored { .. })).collect();
            let restored = restored.join(",");
            tracing::info!(target: "shutdown", place, restored, saved_at, shutdown_at, clean, incarnation, "state: {self}");
        }
        if !self.node_id.is_empty() && self.node_id != node_id {
            let by = &self.node_id;
            tracing::info!(target: "shutdown", by, node_id, "the state was written under another node id");
        }
        match &self.copy {
            Some(Ok(Some(copy))) => {
                tracing::warn!(target: "shutdown", copy, "the whole state was copied aside")
            }
            Some(Err(error)) => {
                tracing::warn!(target: "shutdown", error, "the whole state could not be copied aside");
            }
            Some(Ok(None)) | None => {}
        }
        for (section, fate) in &self.sources {
            match fate {
                Fate::Absent | Fate::Restored { .. } => {}
                Fate::TooOld { age } => {
                    let age_s = age.as_secs();
                    tracing::info!(target: "shutdown", section, age_s, "the section is too old and was not restored");
                }
                Fate::Failed { reason } => {
                    tracing::warn!(target: "shutdown", section, reason, "the section could not be restored");
                }
            }
        }
    }

    fn names(&self, is: impl Fn(&Fate) -> bool) -> impl Iterator<Item = &'static str> {
        self.sources.iter().filter(move |(_, fate)| is(fate)).map(|(name, _)| *name)
    }
}

/// Milliseconds since the Unix epoch as RFC 3339 in UTC.
struct Utc(u64);

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0 / 1000;
        let (days, of_day) = (seconds / 86_400, seconds % 86_400);
        // Years from March on, so that the leap day is a year's last: 146,097 days are 400 years.
        let from_march = days + 719_468;
        let (era, of_era) = (from_march / 146_097, from_march % 146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_shown_as_its_date_in_utc() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399_000, "2000-02-28T23:59:59Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (951_868_800_999, "2000-03-01T00:00:00Z"),
            (1_795_294_486_000, "2026-11-21T20:54:46Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(Utc(ms).to_string(), text);
        }
    }
}
