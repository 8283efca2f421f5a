//! Log lines that never hold the driver up.
//!
//! A subscriber writes where the program says, often to a pipe whose reader may have stopped reading. An installed
//! driver therefore hands its lines to a thread of their own; whatever blocks there, readiness, force and the report
//! go on.

#[cfg(all(unix, feature = "signals"))]
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;

use tokio::sync::oneshot;

/// Writes one line.
type Line = Box<dyn FnOnce() + Send>;

/// Where the driver's lines are written, in order.
#[derive(Clone, Debug)]
pub(crate) enum Log {
    /// At once, by the driver: for tests and programs that poll it themselves.
    Inline,
    /// On a thread of their own.
    #[cfg_attr(
        not(all(unix, feature = "signals")),
        expect(dead_code, reason = "only an installed coordinator has threads")
    )]
    Thread(Sender<Line>),
}

impl Log {
    /// A log with a thread of its own.
    ///
    /// # Errors
    ///
    /// The system refuses the thread.
    #[cfg(all(unix, feature = "signals"))]
    pub(crate) fn thread() -> std::io::Result<Self> {
        let (lines, written) = std::sync::mpsc::channel::<Line>();
        let thread = std::thread::Builder::new().name("shutdown-log".to_owned());
        thread.spawn(move || {
            for line in written {
                // A subscriber may panic when its reader is gone; the next line may find another one.
                drop(catch_unwind(AssertUnwindSafe(line)));
            }
        })?;
        Ok(Self::Thread(lines))
    }

    /// Writes a line, now or soon.
    pub(crate) fn line(&self, line: impl FnOnce() + Send + 'static) {
        match self {
            Self::Inline => line(),
            // The thread ends only with the process.
            Self::Thread(lines) => drop(lines.send(Box::new(line))),
        }
    }

    /// Waits until every line so far has been written.
    pub(crate) async fn written(&self) {
        let (done, written) = oneshot::channel::<()>();
        self.line(move || drop(done));
        // An error either way: the sender is only ever dropped.
        let _ = written.await;
    }
}
