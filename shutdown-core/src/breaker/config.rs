//! When a breaker opens, for how long, and how it finds out that it may close.
//!
//! A value that cannot be used is refused by the constructor, in one sentence that says how to write it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::breaker::call::{Call, Class};
use crate::config::{display_duration, parse_duration};

/// The largest `volume` and the most `probes`. What the window can count exactly is a little more.
const MOST: u32 = 10_000;
/// The longest `sleep` and `window`: beyond it a typing error is likelier than a wish.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// The shortest `window`.
const SHORTEST: Duration = Duration::from_millis(100);

/// What a [`Config`] is made of; every value has a default.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The share of failures, in per cent, that opens. Default 50.
    pub percent: u32,
    /// How many calls the window must hold before that share says anything. Default 20.
    pub volume: u32,
    /// How long it stays open. Default 5 s.
    pub sleep: Duration,
    /// How many calls may be under way at once while half-open, and how many must succeed to close. Default 3.
    pub probes: u32,
    /// How long a call counts. Default 10 s.
    pub window: Duration,
    /// What a permit that is dropped without a result means.
    pub dropped: Dropped,
    /// What a call means. Default [`Call::class`].
    pub classify: fn(Call) -> Class,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            percent: 50,
            volume: 20,
            sleep: Duration::from_secs(5),
            probes: 3,
            window: Duration::from_secs(10),
            dropped: Dropped::Release,
            classify: Call::class,
        }
    }
}

/// What a permit that is dropped without a result means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dropped {
    /// Nothing; a probe's place is free again. Right where clients may leave.
    #[default]
    Release,
    /// A failure. Right where only a bug or a panic drops a permit.
    Failure,
}

/// Settings that can be used.
///
/// Its text form is `percent=50,volume=20,sleep=5s,probes=3,window=10s`, each part optional; durations are whole
/// seconds, `5s` or `500ms`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Config(Settings);

impl Config {
    /// Checks every value.
    ///
    /// # Errors
    ///
    /// The first one that cannot be used.
    pub fn new(settings: Settings) -> Result<Self, ConfigError> {
        let Settings { percent, volume, sleep, probes, window, .. } = settings;
        if !(1..=100).contains(&percent) {
            return Err(ConfigError::Percent(percent));
        }
        for (name, value) in [("volume", volume), ("probes", probes)] {
            if !(1..=MOST).contains(&value) {
                return Err(ConfigError::Count { name, value });
            }
        }
        for (name, value, least) in [("sleep", sleep, Duration::from_millis(1)), ("window", window, SHORTEST)]
        {
            if !(least..=LONGEST).contains(&value) {
                return Err(ConfigError::Length { name, value, least });
            }
        }
        Ok(Self(settings))
    }

    /// What it is made of.
    pub fn settings(&self) -> &Settings {
        &self.0
    }
}

impl From<Config> for Settings {
    fn from(config: Config) -> Self {
        config.0
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settings { percent, volume, sleep, probes, window, .. } = self.0;
        let (sleep, window) = (display_duration(sleep), display_duration(window));
        write!(f, "percent={percent},volume={volume},sleep={sleep},probes={probes},window={window}")
    }
}

impl FromStr for Config {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut settings = Settings::default();
        let mut seen = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let Some((name, value)) = part.split_once('=') else {
                return Err(ConfigError::Unknown(part.to_owned()));
            };
            let (name, value) = (name.trim(), value.trim());
            let number = || {
                value
                    .parse()
                    .map_err(|_| ConfigError::Number { name: name.to_owned(), value: value.to_owned() })
            };
            let duration = || {
                parse_duration(value).map_err(|problem| ConfigError::Duration {
                    name: name.to_owned(),
                    value: value.to_owned(),
                    problem,
                })
            };
            match name {
                "percent" => settings.percent = number()?,
                "volume" => settings.volume = number()?,
                "probes" => settings.probes = number()?,
                "sleep" => settings.sleep = duration()?,
                "window" => settings.window = duration()?,
                _ => return Err(ConfigError::Unknown(part.to_owned())),
            }
            if seen.contains(&name) {
                return Err(ConfigError::Twice(name.to_owned()));
            }
            seen.push(name);
        }
        Self::new(settings)
    }
}

/// A breaker that cannot be. The configuration's mistake: a program exits with 2.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigError {
    /// `percent` is no share that can open anything.
    Percent(u32),
    /// `volume` or `probes` is 0, or too many.
    Count {
        /// Which.
        name: &'static str,
        /// Its value.
        value: u32,
    },
    /// `sleep` or `window` is too short or too long.
    Length {
        /// Which.
        name: &'static str,
        /// Its value.
        value: Duration,
        /// The least it may be.
        least: Duration,
    },
    /// A part of the text form has no such name.
    Unknown(String),
    /// A part of the text form is given twice.
    Twice(String),
    /// A part of the text form is no whole number.
    Number {
        /// Which.
        name: String,
        /// Its value.
        value: String,
    },
    /// A part of the text form is no duration.
    Duration {
        /// Which.
        name: String,
        /// Its value.
        value: String,
        /// What is wrong, as the end of a sentence.
        problem: &'static str,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(percent) => write!(f, "percent={percent} is no share of failures: write 1 to 100"),
            Self::Count { name, value } => write!(f, "{name}={value} cannot be: write 1 to {MOST}"),
            Self::Length { name, value, least } => write!(
                f,
                "{name}={} cannot be: write {} to {}",
                display_duration(*value),
                display_duration(*least),
                display_duration(LONGEST)
            ),
            Self::Unknown(part) => write!(
                f,
                "{part:?} is no part of a breaker: write percent=50,volume=20,sleep=5s,probes=3,window=10s, or some \
                 of it"
            ),
            Self::Twice(name) => write!(f, "{name} is given twice: write it once"),
            Self::Number { name, value } => write!(f, "{name}={value:?} is no whole number: write {name}=20"),
            Self::Duration { name, value, problem } => {
                write!(f, "{name}={value:?} is not a duration that can be used: {problem}")
            }
        }
    }
}

impl std::error::Error for ConfigError {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn said(settings: Settings) -> String {
        Config::new(settings).unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_can_be_used_and_an_empty_text_means_them() {
        let defaults = Config::new(Settings::default()).unwrap().to_string();
        assert_eq!(defaults, "percent=50,volume=20,sleep=5s,probes=3,window=10s");
        assert_eq!("".parse::<Config>().unwrap().to_string(), defaults);
        let one = "volume=5".parse::<Config>().unwrap().to_string();
        assert_eq!(one, "percent=50,volume=5,sleep=5s,probes=3,window=10s");
    }

    #[test]
    fn every_mistake_is_one_sentence_that_names_the_value_and_the_fix() {
        let default = Settings::default;
        let zero = Duration::ZERO;
        for (said, wanted) in [
            (said(Settings { percent: 0, ..default() }), "percent=0"),
            (said(Settings { percent: 101, ..default() }), "percent=101"),
            (said(Settings { volume: 0, ..default() }), "volume=0"),
            (said(Settings { volume: 10_001, ..default() }), "volume=10001"),
            (said(Settings { probes: 0, ..default() }), "probes=0"),
            (said(Settings { sleep: zero, ..default() }), "sleep=0s"),
            (said(Settings { window: zero, ..default() }), "window=0s"),
            (said(Settings { window: LONGEST + SHORTEST, ..default() }), "window=86400100ms"),
        ] {
            assert!(said.contains(wanted) && said.contains("write "), "{said}");
            assert_eq!(said.lines().count(), 1);
        }
        for (text, wanted) in [
            ("fifty", "\"fifty\" is no part"),
            ("percents=5", "\"percents=5\" is no part"),
            ("percent=half", "percent=\"half\" is no whole number"),
            ("volume=-1", "volume=\"-1\""),
            ("volume=99999999999", "volume=\"99999999999\""),
            ("sleep=soon", "sleep=\"soon\""),
            ("probes=1,probes=2", "probes is given twice"),
            ("window=0", "window=0s"),
        ] {
            let said = text.parse::<Config>().unwrap_err().to_string();
            assert!(said.contains(wanted) && said.contains("write "), "{said}");
            assert_eq!(said.lines().count(), 1);
        }
    }

    proptest! {
        #[test]
        fn what_is_displayed_reads_back_the_same(
            percent in 1_u32..=100, volume in 1..=MOST, probes in 1..=MOST, sleep in 1_u64..86_400_000, window in 100_u64..86_400_000,
        ) {
            let (sleep, window) = (Duration::from_millis(sleep), Duration::from_millis(window));
            let config = Config::new(Settings { percent, volume, sleep, probes, window, ..Settings::default() });
            let text = config.unwrap().to_string();
            prop_assert_eq!(text.parse::<Config>().unwrap().to_string(), text);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[a-z=,0-9 ]{0,40}") {
            let _ = text.parse::<Config>();
        }
    }
}
