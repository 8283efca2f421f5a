//! By which signals a process is ended, and how long each is given: pure, no clock.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rustix::process::Signal;

use crate::config::{display_duration, parse_duration};

/// A signal that asks a process to end, in one way or another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StopSignal {
    /// SIGHUP.
    Hup,
    /// SIGINT: PgBouncer's safe stop, PostgreSQL's fast one.
    Int,
    /// SIGQUIT: at once, for PgBouncer from 1.23 on and PostgreSQL, whose next start recovers.
    Quit,
    /// SIGUSR1.
    Usr1,
    /// SIGUSR2.
    Usr2,
    /// SIGTERM.
    Term,
    /// SIGWINCH: the graceful stop of Apache httpd.
    Winch,
    /// SIGKILL, which nothing can refuse, and after which nothing is tidied up.
    Kill,
}

impl StopSignal {
    const ALL: [Self; 8] =
        [Self::Hup, Self::Int, Self::Quit, Self::Usr1, Self::Usr2, Self::Term, Self::Winch, Self::Kill];

    /// The name as a ladder writes it, for example `INT`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hup => "HUP",
            Self::Int => "INT",
            Self::Quit => "QUIT",
            Self::Usr1 => "USR1",
            Self::Usr2 => "USR2",
            Self::Term => "TERM",
            Self::Winch => "WINCH",
            Self::Kill => "KILL",
        }
    }

    /// The signal's number on this system.
    pub fn number(self) -> i32 {
        self.signal().as_raw()
    }

    pub(super) fn of_number(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|signal| signal.number() == number)
    }

    pub(super) const fn signal(self) -> Signal {
        match self {
            Self::Hup => Signal::HUP,
            Self::Int => Signal::INT,
            Self::Quit => Signal::QUIT,
            Self::Usr1 => Signal::USR1,
            Self::Usr2 => Signal::USR2,
            Self::Term => Signal::TERM,
            Self::Winch => Signal::WINCH,
            Self::Kill => Signal::KILL,
        }
    }
}

impl fmt::Display for StopSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One signal and how long it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rung {
    /// What is sent.
    pub signal: StopSignal,
    /// How long the process may then take.
    pub wait: Duration,
}

/// By which signals a process is ended, one after another, each only if the one before has not been enough.
///
/// Written as `INT:20s/TERM:5s/KILL:2s`. No signal stands there twice: PgBouncer takes a second INT or TERM for "at once"
/// (from 1.23 on), and so do others.
///
/// ```
/// use shutdown_core::companions::Ladder;
///
/// let ladder: Ladder = "INT:6s/TERM:1500ms/KILL:1s".parse()?;
/// assert_eq!(ladder.total().as_millis(), 8500);
/// assert_eq!(ladder.to_string(), "INT:6s/TERM:1500ms/KILL:1s");
/// assert!("KILL:1s/TERM:1s".parse::<Ladder>().is_err());
/// # Ok::<(), shutdown_core::companions::LadderError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ladder {
    rungs: Vec<Rung>,
}

impl Ladder {
    /// A ladder of these rungs.
    ///
    /// # Errors
    ///
    /// There is none, one is given no time, a signal stands there twice, or something comes after KILL.
    pub fn new(rungs: impl Into<Vec<Rung>>) -> Result<Self, LadderError> {
        let rungs = rungs.into();
        if rungs.is_empty() {
            return Err(LadderError("has no signal"));
        }
        if rungs.iter().any(|rung| rung.wait.is_zero()) {
            return Err(LadderError("gives a signal no time"));
        }
        for (place, rung) in rungs.iter().enumerate() {
            if rungs[..place].iter().any(|earlier| earlier.signal == rung.signal) {
                return Err(LadderError("has a signal twice, which many programs take for \"at once\""));
            }
            if rung.signal == StopSignal::Kill && place + 1 < rungs.len() {
                return Err(LadderError("goes on after KILL, which nothing survives"));
            }
        }
        Ok(Self { rungs })
    }

    /// The rungs, the first signal first.
    pub fn rungs(&self) -> &[Rung] {
        &self.rungs
    }

    /// How long all of it may take.
    pub fn total(&self) -> Duration {
        self.rungs.iter().map(|rung| rung.wait).sum()
    }
}

impl Default for Ladder {
    /// `TERM:7s/KILL:1s`.
    fn default() -> Self {
        Self {
            rungs: vec![
                Rung { signal: StopSignal::Term, wait: Duration::from_secs(7) },
                Rung { signal: StopSignal::Kill, wait: Duration::from_secs(1) },
            ],
        }
    }
}

impl fmt::Display for Ladder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, rung) in self.rungs.iter().enumerate() {
            let slash = if place == 0 { "" } else { "/" };
            write!(f, "{slash}{}:{}", rung.signal, display_duration(rung.wait))?;
        }
        Ok(())
    }
}

impl FromStr for Ladder {
    type Err = LadderError;

    fn from_str(text: &str) -> Result<Self, LadderError> {
        let rung = |text: &str| {
            let (name, wait) =
                text.split_once(':').ok_or(LadderError("has a part that is not SIGNAL:TIME"))?;
            let signal = StopSignal::ALL.into_iter().find(|signal| signal.as_str() == name);
            let signal = signal.ok_or(LadderError(
                "names a signal that is none of HUP, INT, QUIT, USR1, USR2, TERM, WINCH, KILL",
            ))?;
            let wait = parse_duration(wait).map_err(|_| LadderError("has a time that is none"))?;
            Ok(Rung { signal, wait })
        };
        Self::new(text.split('/').map(rung).collect::<Result<Vec<_>, _>>()?)
    }
}

/// What is wrong with a ladder, as the end of a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LadderError(&'static str);

impl fmt::Display for LadderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the ladder {}: write one as INT:6s/TERM:2s/KILL:1s", self.0)
    }
}

impl std::error::Error for LadderError {}

/// How long a rung may take of what is left, when `rest` – it, and all that comes after it – may need more than there is:
/// everything is shortened alike, so that the last signal is still sent in time.
pub(super) fn share(wait: Duration, rest: Duration, left: Duration) -> Duration {
    if rest <= left {
        return wait;
    }
    wait.mul_f64(left.as_secs_f64() / rest.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_ladder_is_refused_with_an_example_of_one() {
        for bad in [
            "",
            "TERM",
            "TERM:",
            ":5s",
            "TERM:5s/",
            "TERM:0",
            "TERM:-1",
            "TERM:5m",
            "STOP:5s",
            "SIGTERM:5s",
            "15:5s",
            "term:5s",
            "TERM:1s/TERM:1s",
            "KILL:1s/TERM:1s",
            "TERM:1s KILL:1s",
        ] {
            let error = bad.parse::<Ladder>().unwrap_err().to_string();
            assert!(error.contains("INT:6s/TERM:2s/KILL:1s"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_ladder_reads_back_as_it_is_shown() {
        for text in ["INT:20s/TERM:5s/KILL:2s", "TERM:1500ms", "KILL:1s", "WINCH:3s/QUIT:1s"] {
            assert_eq!(text.parse::<Ladder>().unwrap().to_string(), text);
        }
        assert_eq!(Ladder::default().to_string().parse(), Ok(Ladder::default()));
    }

    #[test]
    fn every_signal_can_be_written() {
        for signal in StopSignal::ALL {
            let ladder: Ladder = format!("{signal}:1s").parse().unwrap();
            assert_eq!(ladder.rungs()[0].signal, signal);
        }
    }

    proptest! {
        #[test]
        fn rungs_that_are_shortened_still_fit_and_keep_their_proportions(
            waits in prop::collection::vec(1_u64..60_000, 1..6), left in 0_u64..60_000,
        ) {
            let (all, left): (Vec<_>, _) =
                (waits.iter().map(|ms| Duration::from_millis(*ms)).collect(), Duration::from_millis(left));
            let mut rest: Duration = all.iter().sum();
            let mut still = left;
            for wait in all {
                let given = share(wait, rest, still);
                prop_assert!(given <= wait && given <= still.max(wait.min(still)));
                still = still.saturating_sub(given);
                rest -= wait;
            }
        }

        #[test]
        fn no_text_makes_the_ladder_panic(text in ".{0,30}") {
            let _ = text.parse::<Ladder>();
        }
    }
}
