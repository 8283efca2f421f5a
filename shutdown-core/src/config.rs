//! How long each part of a shutdown may take, and how that is read from the environment.
//!
//! Every value has a default; a bad value is an error that names the variable, the value and the fix.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// The longest budget that can be asked for: 7 days. Beyond it a typing error is likelier than a wish.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// What is still served, and who is asked to leave, while the service is a lame duck.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum LameDuckPolicy {
    /// Everything is served, and every answer asks its client to leave.
    #[default]
    All,
    /// Safe methods (RFC 9110 §9.2.1: GET, HEAD, OPTIONS, TRACE) are served; from here on others are refused, so that
    /// nothing new has to be finished. Every gRPC call is a POST: all of them are refused.
    ReadOnly,
    /// Everything is served, and a growing share of the answers asks its client to leave: none at the beginning, all
    /// at the end of the lame duck. Clients move to the neighbours one after another.
    Gradual,
}

impl LameDuckPolicy {
    /// The policy as written in configurations: `all`, `read-only`, `gradual`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::ReadOnly => "read-only",
            Self::Gradual => "gradual",
        }
    }

    /// The policy of this name.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::All, Self::ReadOnly, Self::Gradual].into_iter().find(|policy| policy.as_str() == text)
    }
}

impl fmt::Display for LameDuckPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The budgets of a shutdown. Budgets are caps; what each stage is promised is in [`Plan`](crate::Plan).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ShutdownConfig {
    /// How long everything is still served after readiness went red. `SHUTDOWN_LAME_DUCK`, default 0.
    ///
    /// Choose the time your balancer needs to learn that readiness is red.
    pub lame_duck: Duration,
    /// How long accepted connections are served after the listener closed. `SHUTDOWN_LINGER`, default 2.5 s,
    /// never more than `graceful`, which contains it.
    pub linger: Duration,
    /// How long requests may take to finish. `SHUTDOWN_GRACEFUL_TIMEOUT`, default 30 s.
    pub graceful: Duration,
    /// Stage Departure. `SHUTDOWN_DEPARTURE_TIMEOUT`, default 1 s.
    pub departure: Duration,
    /// Stage Background. `SHUTDOWN_BACKGROUND_TIMEOUT`, default 10 s.
    pub background: Duration,
    /// Stage WebSockets. `SHUTDOWN_WEBSOCKET_TIMEOUT`, default 5 s.
    pub websocket: Duration,
    /// Stage Cache. `SHUTDOWN_CACHE_TIMEOUT`, default: as `database`.
    pub cache: Duration,
    /// Stage Database. `SHUTDOWN_DB_TIMEOUT`, default 5 s.
    pub database: Duration,
    /// Stage Companions. `SHUTDOWN_COMPANION_TIMEOUT`, default: what the ladders of the companions need, at least
    /// [`COMPANION_BUDGET`](crate::COMPANION_BUDGET).
    pub companion: Option<Duration>,
    /// From the reason to the exit, lame duck and report included. `SHUTDOWN_TOTAL_TIMEOUT`, default 28 s:
    /// Kubernetes kills at 30 s and does not tell the process so.
    pub total: Duration,
    /// What is still served, and who is asked to leave, in the lame duck. `SHUTDOWN_LAME_DUCK_POLICY`: `all`
    /// (default), `read-only` or `gradual`.
    pub lame_duck_policy: LameDuckPolicy,
    /// Over how long sessions are told to end, when there are many. `SHUTDOWN_SESSION_WINDOW`, default 3 s, never
    /// more than `lame_duck` and half of `websocket`.
    pub session_window: Duration,
    /// When the platform kills, if it says so. `SHUTDOWN_GRACE_PERIOD`, default unknown. Only compared with
    /// `total` for a warning.
    pub grace_period: Option<Duration>,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        Self {
            lame_duck: Duration::ZERO,
            linger: Duration::from_millis(2500),
            graceful: Duration::from_secs(30),
            departure: Duration::from_secs(1),
            background: Duration::from_secs(10),
            websocket: Duration::from_secs(5),
            cache: Duration::from_secs(5),
            database: Duration::from_secs(5),
            companion: None,
            total: Duration::from_secs(28),
            lame_duck_policy: LameDuckPolicy::All,
            session_window: Duration::from_secs(3),
            grace_period: None,
        }
    }
}

impl ShutdownConfig {
    /// The variables read by [`from_env`](Self::from_env).
    pub const VARIABLES: &'static [&'static str] = &[
        "SHUTDOWN_LAME_DUCK",
        "SHUTDOWN_LINGER",
        "SHUTDOWN_GRACEFUL_TIMEOUT",
        "SHUTDOWN_DEPARTURE_TIMEOUT",
        "SHUTDOWN_BACKGROUND_TIMEOUT",
        "SHUTDOWN_WEBSOCKET_TIMEOUT",
        "SHUTDOWN_CACHE_TIMEOUT",
        "SHUTDOWN_DB_TIMEOUT",
        "SHUTDOWN_COMPANION_TIMEOUT",
        "SHUTDOWN_TOTAL_TIMEOUT",
        "SHUTDOWN_LAME_DUCK_POLICY",
        "SHUTDOWN_SESSION_WINDOW",
        "SHUTDOWN_GRACE_PERIOD",
    ];

    /// Reads the `SHUTDOWN_*` variables of this process; what is unset keeps its default.
    ///
    /// # Errors
    ///
    /// A value that is no duration, is not Unicode, or contradicts another one.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::from_lookup(|name| match std::env::var(name) {
            Ok(value) => Some(value),
            Err(std::env::VarError::NotPresent) => None,
            Err(std::env::VarError::NotUnicode(raw)) => Some(raw.to_string_lossy().into_owned()),
        })
    }

    /// Reads the same names from any source, for programs that layer flags, files and environment.
    ///
    /// # Errors
    ///
    /// As [`from_env`](Self::from_env).
    pub fn from_lookup(lookup: impl Fn(&'static str) -> Option<String>) -> Result<Self, ConfigError> {
        let read = |name: &'static str| -> Result<Option<Duration>, ConfigError> {
            lookup(name)
                .map(|value| {
                    parse_duration(&value).map_err(|problem| ConfigError::NotADuration {
                        name,
                        value,
                        problem,
                    })
                })
                .transpose()
        };
        let mut config = Self::default();
        let set = |field: &mut Duration, name| -> Result<bool, ConfigError> {
            let value = read(name)?;
            if let Some(value) = value {
                *field = value;
            }
            Ok(value.is_some())
        };
        set(&mut config.lame_duck, "SHUTDOWN_LAME_DUCK")?;
        let linger_given = set(&mut config.linger, "SHUTDOWN_LINGER")?;
        set(&mut config.graceful, "SHUTDOWN_GRACEFUL_TIMEOUT")?;
        set(&mut config.departure, "SHUTDOWN_DEPARTURE_TIMEOUT")?;
        set(&mut config.background, "SHUTDOWN_BACKGROUND_TIMEOUT")?;
        set(&mut config.websocket, "SHUTDOWN_WEBSOCKET_TIMEOUT")?;
        set(&mut config.database, "SHUTDOWN_DB_TIMEOUT")?;
        config.cache = config.database;
        set(&mut config.cache, "SHUTDOWN_CACHE_TIMEOUT")?;
        config.companion = read("SHUTDOWN_COMPANION_TIMEOUT")?;
        set(&mut config.total, "SHUTDOWN_TOTAL_TIMEOUT")?;
        set(&mut config.session_window, "SHUTDOWN_SESSION_WINDOW")?;
        if let Some(value) = lookup("SHUTDOWN_LAME_DUCK_POLICY") {
            config.lame_duck_policy =
                LameDuckPolicy::parse(&value).ok_or(ConfigError::NotAPolicy { value })?;
        }
        config.grace_period = read("SHUTDOWN_GRACE_PERIOD")?;
        if config.linger > config.graceful {
            if linger_given {
                return Err(ConfigError::LingerTooLong { linger: config.linger, graceful: config.graceful });
            }
            config.linger = config.graceful;
        }
        Ok(config)
    }
}

/// Reads a duration as this project writes it: whole seconds (`30`), `30s` or `1500ms`.
///
/// # Errors
///
/// What is wrong with it, as the end of a sentence.
pub fn parse_duration(text: &str) -> Result<Duration, &'static str> {
    const FORM: &str = "write whole seconds (30), 30s or 1500ms";
    let (digits, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(end) => text.split_at(end),
        None => (text, "s"),
    };
    if digits.is_empty() {
        return Err(FORM);
    }
    let number: u64 = digits.parse().map_err(|_| "it is longer than 7 days")?;
    let duration = match unit {
        "s" => Duration::from_secs(number),
        "ms" => Duration::from_millis(number),
        _ => return Err(FORM),
    };
    if duration > LONGEST { Err("it is longer than 7 days") } else { Ok(duration) }
}

/// A duration in the form that [`parse_duration`] reads.
pub fn display_duration(duration: Duration) -> impl fmt::Display {
    struct Shown(Duration);
    impl fmt::Display for Shown {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let text = if self.0.subsec_millis() == 0 {
                format!("{}s", self.0.as_secs())
            } else {
                format!("{}ms", self.0.as_millis())
            };
            f.pad(&text)
        }
    }
    Shown(duration)
}

/// A setting that cannot be used. The configuration's mistake: a program exits with 2.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigError {
    /// The value of a variable is no duration.
    NotADuration {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is wrong, as the end of a sentence.
        problem: &'static str,
    },
    /// The lame duck's policy is none of those there are.
    NotAPolicy {
        /// What was asked for.
        value: String,
    },
    /// The linger is longer than the graceful budget that contains it.
    LingerTooLong {
        /// `SHUTDOWN_LINGER`.
        linger: Duration,
        /// `SHUTDOWN_GRACEFUL_TIMEOUT`.
        graceful: Duration,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotADuration { name, value, problem } => {
                write!(f, "{name}={value:?} is not a duration that can be used: {problem}")
            }
            Self::NotAPolicy { value } => {
                write!(f, "SHUTDOWN_LAME_DUCK_POLICY={value:?} is no policy: write all, read-only or gradual")
            }
            Self::LingerTooLong { linger, graceful } => write!(
                f,
                "SHUTDOWN_LINGER={} is longer than SHUTDOWN_GRACEFUL_TIMEOUT={}, which contains it: lower the first or \
                 raise the second",
                display_duration(*linger),
                display_duration(*graceful)
            ),
        }
    }
}

impl std::error::Error for ConfigError {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(pairs: &[(&'static str, &str)]) -> Result<ShutdownConfig, ConfigError> {
        ShutdownConfig::from_lookup(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn an_empty_environment_gives_the_documented_defaults() {
        let config = config(&[]).unwrap();
        assert_eq!(config, ShutdownConfig::default());
        assert_eq!(config.total, Duration::from_secs(28));
        assert_eq!(config.graceful, Duration::from_secs(30));
    }

    #[test]
    fn the_cache_budget_follows_the_database_budget_unless_it_is_given() {
        assert_eq!(config(&[("SHUTDOWN_DB_TIMEOUT", "9")]).unwrap().cache, Duration::from_secs(9));
        let both = config(&[("SHUTDOWN_DB_TIMEOUT", "9"), ("SHUTDOWN_CACHE_TIMEOUT", "1500ms")]).unwrap();
        assert_eq!(both.cache, Duration::from_millis(1500));
    }

    #[test]
    fn a_bad_value_is_an_error_that_names_the_variable_the_value_and_the_fix() {
        for bad in ["", "-1", "30m", "1.5s", "abc", " 30", "30 s", "ms", "99999999999999999999", "604801"] {
            let error = config(&[("SHUTDOWN_DB_TIMEOUT", bad)]).unwrap_err().to_string();
            assert!(error.contains("SHUTDOWN_DB_TIMEOUT") && error.contains(&format!("{bad:?}")), "{error}");
            assert!(error.contains("1500ms") || error.contains("7 days"), "{error}");
            assert_eq!(error.lines().count(), 1);
        }
    }

    #[test]
    fn a_policy_reads_back_and_what_is_none_is_named_with_the_fix() {
        for policy in [LameDuckPolicy::All, LameDuckPolicy::ReadOnly, LameDuckPolicy::Gradual] {
            let read = config(&[("SHUTDOWN_LAME_DUCK_POLICY", policy.as_str())]).unwrap();
            assert_eq!(read.lame_duck_policy, policy);
        }
        let error = config(&[("SHUTDOWN_LAME_DUCK_POLICY", "readonly")]).unwrap_err().to_string();
        assert!(
            error.contains("SHUTDOWN_LAME_DUCK_POLICY=\"readonly\"") && error.contains("read-only"),
            "{error}"
        );
    }

    #[test]
    fn a_linger_longer_than_its_budget_is_refused_when_given_and_shortened_when_not() {
        let error = config(&[("SHUTDOWN_LINGER", "5"), ("SHUTDOWN_GRACEFUL_TIMEOUT", "2")]).unwrap_err();
        assert!(matches!(error, ConfigError::LingerTooLong { .. }));
        let config = config(&[("SHUTDOWN_GRACEFUL_TIMEOUT", "1")]).unwrap();
        assert_eq!(config.linger, Duration::from_secs(1));
    }

    #[test]
    fn every_variable_that_is_read_is_listed_and_every_listed_one_is_read() {
        let read = std::cell::RefCell::new(std::collections::BTreeSet::new());
        ShutdownConfig::from_lookup(|name| {
            read.borrow_mut().insert(name);
            None
        })
        .unwrap();
        assert_eq!(read.into_inner(), ShutdownConfig::VARIABLES.iter().copied().collect());
    }

    proptest! {
        #[test]
        fn what_is_displayed_reads_back_as_the_same_duration(millis in 0_u64..604_800_000) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&display_duration(duration).to_string()), Ok(duration));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,30}") {
            let _ = parse_duration(&text);
        }
    }
}
