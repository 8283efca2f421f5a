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
    /// While true the handler itself leaves with 128+n.
    leave: Arc<AtomicBool>,
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
            let leave = Arc::new(AtomicBool::new(true));
            signal_hook::flag::register_conditional_shutdown(number, 128 + number, Arc::clone(&leave))
                .map_err(|source| SignalsError::Register { number, source })?;
            claimed.push(Claimed { number, leave });
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
        Ok(Listening { stream, claimed: self.claimed, counted: 0, last: None })
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
    last: Option<(i32, Instant)>,
}

impl Listening {
    /// From now on signals go to the driver and no longer end the process by themselves.
    pub(crate) fn disarm(&self) {
        for claimed in &self.claimed {
            // SeqCst: read inside a signal handler; the strongest order costs nothing here.
            claimed.leave.store(false, Ordering::SeqCst);
        }
    }

    /// Hands signals to the driver for ever.
    pub(crate) async fn run(mut self, core: &'static Core) {
        let mut arm: Option<(i32, Instant)> = None;
        loop {
            let arm_at = arm.map(|(_, at)| at);
            tokio::select! {
                biased;
                origin = next(&mut self.stream) => {
                    let Some(origin) = origin else { return std::future::pending().await };
                    let now = Instant::now();
                    if self.is_repeated(origin.signal, now) {
                        continue;
                    }
                    self.counted += 1;
                    // Shown before the driver hears it, so who sees the count may send the next one.
                    core.signals.store(self.counted, Ordering::Relaxed);
                    let force = self.counted >= 2;
                    core.command(Command::Signal { signal: received(&origin), force, at: now });
                    if force && arm.is_none() {
                        // The third leaves from inside its handler. The same signal again only after the time
                        // in which it may be an echo of the second.
                        self.arm(|number| number != origin.signal);
                        arm = Some((origin.signal, now + SAME_SIGNAL));
                    }
                }
                () = sleep_until(arm_at.unwrap_or_else(Instant::now)), if arm_at.is_some() => {
                    self.arm(|_| true);
                    // Everything is armed; there is nothing left to count.
                    return std::future::pending().await;
                }
            }
        }
    }

    fn is_repeated(&mut self, number: i32, now: Instant) -> bool {
        if let Some((last, at)) = self.last
            && last == number
            && now.saturating_duration_since(at) < SAME_SIGNAL
        {
            return true;
        }
        self.last = Some((number, now));
        false
    }

    fn arm(&self, which: impl Fn(i32) -> bool) {
        for claimed in self.claimed.iter().filter(|claimed| which(claimed.number)) {
            claimed.leave.store(true, Ordering::SeqCst);
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
