//! Stop signals, from the first statement of `main` to the third Ctrl-C.
//!
//! | when | a stop signal |
//! |---|---|
//! | from [`Signals::claim`] until `install` returns | leaves at once with 128+n: nothing was accepted yet |
//! | the first after `install` | begins the shutdown, or joins one that runs already |
//! | the second | forces: waits are skipped, reserves kept; the exit code is 128+n |
//! | the third | leaves from inside the handler with 128+n |
//!
//! The same signal within 200 ms counts once: terminals send to a whole group and process managers forward, so
//! one stop often arrives twice.
//!
//! Signals are read on a thread of their own that logs nothing and takes no lock of anybody's, so a saturated
//! runtime or a blocked stderr delays neither admission nor force.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_core::Stream;
use signal_hook::consts::{FORBIDDEN, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::exfiltrator::origin::WithOrigin;
use signal_hook::low_level::siginfo::Origin;
use signal_hook::low_level::signal_name;
use signal_hook_tokio::SignalsInfo;
use tokio::time::{Instant, sleep_until};

use crate::coordinator::{Command, Core};
use crate::reason::SignalReceived;

/// Within this time the same signal counts once.
pub const SAME_SIGNAL: Duration = Duration::from_millis(200);

/// The stop signals of this process, claimed but not yet handed to a coordinator.
///
/// While it is held, a stop signal leaves the process at once with 128+n. Give it to
/// [`Builder::signals`](crate::Builder::signals).
#[derive(Debug)]
#[must_use = "until it is given to a coordinator a stop signal ends the process at once"]
pub struct Signals {
    claimed: Vec<Claimed>,
}

#[derive(Debug)]
struct Claimed {
    number: i32,
    /// Set by the handler, first of all.
    came: Arc<AtomicBool>,
    /// While true the handler itself leaves with 128+n.
    leave: Arc<AtomicBool>,
    /// When it last counted.
    last: Option<Instant>,
}

impl Signals {
    /// Claims TERM and INT. Make it the first statement of `main`.
    ///
    /// A signal that is ignored when the process starts (`nohup`, a shell's background job) is left alone. That is
    /// read from `/proc/self/status`, so on systems without it every signal asked for is claimed.
    ///
    /// # Errors
    ///
    /// The system refuses a handler.
    pub fn claim() -> Result<Self, SignalsError> {
        Self::claim_only(&[SIGTERM, SIGINT])
    }

    /// Claims TERM, INT and these, for example QUIT and HUP.
    ///
    /// # Errors
    ///
    /// As [`claim`](Self::claim); or a number that can never have a handler (KILL, STOP, ILL, FPE, SEGV).
    pub fn claim_with(more: &[i32]) -> Result<Self, SignalsError> {
        let mut numbers = vec![SIGTERM, SIGINT];
        numbers.extend(more.iter().filter(|number| ![SIGTERM, SIGINT].contains(number)));
        Self::claim_only(&numbers)
    }

    /// QUIT and HUP, for [`claim_with`](Self::claim_with).
    pub const QUIT_AND_HUP: [i32; 2] = [SIGQUIT, SIGHUP];

    fn claim_only(numbers: &[i32]) -> Result<Self, SignalsError> {
        // signal-hook would panic inside a destructor, that is abort.
        if let Some(number) = numbers.iter().find(|number| FORBIDDEN.contains(number)) {
            return Err(SignalsError::Forbidden { number: *number });
        }
        let ignored = ignored_at_start();
        let mut claimed = Vec::new();
        for &number in numbers {
            if ignored.is_some_and(|mask| number > 0 && number <= 64 && (mask >> (number - 1)) & 1 == 1) {
                continue;
            }
            let (came, leave) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
            // In this order: a handler's actions run as they were registered, and `disarm` relies on it.
            signal_hook::flag::register(number, Arc::clone(&came))
                .and_then(|_| {
                    let leave = Arc::clone(&leave);
                    signal_hook::flag::register_conditional_shutdown(number, 128 + number, leave)
                })
                .map_err(|source| SignalsError::Register { number, source })?;
            claimed.push(Claimed { number, came, leave, last: None });
        }
        Ok(Self { claimed })
    }

    /// The numbers that were claimed.
    pub fn numbers(&self) -> impl Iterator<Item = i32> + '_ {
        self.claimed.iter().map(|claimed| claimed.number)
    }

    /// Registers the stream of signals and, once it hears, disarms the handlers' own exit. Call inside a runtime.
    pub(crate) fn listen(self) -> Result<Listening, SignalsError> {
        let stream = SignalsInfo::<WithOrigin>::new(self.numbers()).map_err(|source| {
            SignalsError::Register { number: self.numbers().next().unwrap_or_default(), source }
        })?;
        Ok(Listening { stream, claimed: self.claimed, counted: 0 })
    }
}

/// The signals ignored when the process started, as a bit mask; `None` where that cannot be read.
fn ignored_at_start() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

/// Signals on their way to a driver.
pub(crate) struct Listening {
    stream: SignalsInfo<WithOrigin>,
    claimed: Vec<Claimed>,
    counted: u32,
}

/// The handlers' own exit.
pub(crate) struct Handlers(Vec<Handler>);

struct Handler {
    number: i32,
    came: Arc<AtomicBool>,
    leave: Arc<AtomicBool>,
}

impl Handlers {
    /// From now on signals no longer end the process by themselves. Does not return if one is about to.
    ///
    /// The exit of a handler on another thread takes a moment, in which this thread would go on and write:
    ///
    /// ```text
    /// handler    came = true   leave is true: exit ……………………………… gone
    /// here                                       leave = false   came is true: exit
    /// ```
    ///
    /// SeqCst on all four: the handler sees `leave` false, or this sees `came` true.
    pub(crate) fn disarm(&self) {
        for handler in &self.0 {
            handler.leave.store(false, Ordering::SeqCst);
        }
        if let Some(handler) = self.0.iter().find(|handler| handler.came.load(Ordering::SeqCst)) {
            signal_hook::low_level::exit(128 + handler.number);
        }
    }
}

impl Listening {
    /// The handlers' own exit, to be disarmed once this is heard.
    pub(crate) fn handlers(&self) -> Handlers {
        let handler = |claimed: &Claimed| Handler {
            number: claimed.number,
            came: Arc::clone(&claimed.came),
            leave: Arc::clone(&claimed.leave),
        };
        Handlers(self.claimed.iter().map(handler).collect())
    }

    /// Hands signals to the driver for ever.
    pub(crate) async fn run(mut self, core: &'static Core) {
        loop {
            let arm_at = if self.counted >= 2 { self.next_to_arm() } else { None };
            tokio::select! {
                biased;
                origin = next(&mut self.stream) => {
                    let Some(origin) = origin else { return std::future::pending().await };
                    let now = Instant::now();
                    if !self.counts(origin.signal, now) {
                        continue;
                    }
                    self.counted += 1;
                    let force = self.counted >= 2;
                    if self.counted > 2 {
                        // It came in the moment between being no echo any more and being armed.
                        signal_hook::low_level::exit(128 + origin.signal);
                    }
                    if force {
                        self.arm(now);
                    }
                    // Shown when the next one would have its effect: who sees the count may send it.
                    core.signals.store(self.counted, Ordering::Relaxed);
                    core.command(Command::Signal { signal: received(&origin), force, at: now });
                }
                // The third leaves from inside its handler; each signal from when it can be no echo of itself.
                () = sleep_until(arm_at.unwrap_or_else(Instant::now)), if arm_at.is_some() => self.arm(Instant::now()),
            }
        }
    }

    /// Whether the signal counts: the same one within [`SAME_SIGNAL`] does not.
    fn counts(&mut self, number: i32, now: Instant) -> bool {
        let Some(claimed) = self.claimed.iter_mut().find(|claimed| claimed.number == number) else {
            return false;
        };
        if claimed.last.is_some_and(|last| now.saturating_duration_since(last) < SAME_SIGNAL) {
            return false;
        }
        claimed.last = Some(now);
        true
    }

    /// When the next handler that does not leave by itself may.
    fn next_to_arm(&self) -> Option<Instant> {
        let waiting = self.claimed.iter().filter(|claimed| !claimed.leave.load(Ordering::SeqCst));
        waiting.map(|claimed| claimed.last.map_or_else(Instant::now, |last| last + SAME_SIGNAL)).min()
    }

    fn arm(&self, now: Instant) {
        for claimed in &self.claimed {
            if claimed.last.is_none_or(|last| last + SAME_SIGNAL <= now) {
                claimed.leave.store(true, Ordering::SeqCst);
            }
        }
    }
}

async fn next(stream: &mut SignalsInfo<WithOrigin>) -> Option<Origin> {
    std::future::poll_fn(|cx| Pin::new(&mut *stream).poll_next(cx)).await
}

fn received(origin: &Origin) -> SignalReceived {
    SignalReceived {
        signal: signal_name(origin.signal).map_or_else(|| format!("signal {}", origin.signal), str::to_owned),
        number: origin.signal,
        pid: origin.process.map(|process| process.pid),
        uid: origin.process.map(|process| process.uid),
    }
}

/// Why signals could not be claimed.
#[derive(Debug)]
#[non_exhaustive]
pub enum SignalsError {
    /// This number can never have a handler. The caller's mistake.
    Forbidden {
        /// The number.
        number: i32,
    },
    /// The system refused the handler.
    Register {
        /// The number.
        number: i32,
        /// What the system said.
        source: io::Error,
    },
}

impl fmt::Display for SignalsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |number: i32| signal_name(number).unwrap_or("unknown");
        match self {
            Self::Forbidden { number } => {
                write!(f, "signal {number} ({}) can never be a stop signal: leave it out", name(*number))
            }
            Self::Register { number, .. } => {
                write!(f, "the handler of signal {number} ({}) could not be registered", name(*number))
            }
        }
    }
}

impl std::error::Error for SignalsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Forbidden { .. } => None,
            Self::Register { source, .. } => Some(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_can_have_no_handler_is_refused_with_its_name() {
        for number in FORBIDDEN {
            let error = Signals::claim_with(&[*number]).unwrap_err();
            assert!(matches!(error, SignalsError::Forbidden { .. }));
            assert!(error.to_string().contains("SIG"), "{error}");
        }
    }

    #[test]
    fn a_number_that_is_no_signal_is_an_error_and_not_a_panic() {
        assert!(matches!(Signals::claim_with(&[4711]), Err(SignalsError::Register { number: 4711, .. })));
    }
}
