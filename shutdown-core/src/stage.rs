//! Stage tasks: what plugs into a stage, and where it runs.
//!
//! A stage task that hangs, fails, panics or blocks its thread harms only itself: it is told through its token,
//! aborted at the deadline, named in the report, and the next stage runs.

use std::borrow::Cow;
use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::BoxError;
use crate::latch::Latch;
use crate::log::Log;
use crate::report::{NOTES_LISTED, Outcome, TaskNote};
use crate::unwind::{BoxFuture, catch_panic};

/// What a stage task is given.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StageContext {
    /// When the stage ends. A later signal may bring it nearer.
    pub deadline: Instant,
    /// Cancelled [`TOKEN_GRACE`] before the deadline, or at once when a later signal hurries. At the deadline the
    /// task is dropped.
    pub token: CancellationToken,
    pub(crate) log: Log,
    notes: Notes,
}

/// What one stage task has written down.
type Notes = Arc<Mutex<Vec<TaskNote>>>;

impl StageContext {
    /// What a stage of this deadline gives its tasks: for tests of a stage task by itself. Lines are logged at once.
    pub fn new(deadline: Instant, token: CancellationToken) -> Self {
        Self::with_log(deadline, token, Log::Inline)
    }

    pub(crate) fn with_log(deadline: Instant, token: CancellationToken, log: Log) -> Self {
        Self { deadline, token, log, notes: Notes::default() }
    }

    /// Writes into the report what became of one of the things the task is about; the first [`NOTES_LISTED`] are kept, so
    /// begin with what went wrong. What is noted counts also when the task fails or is aborted.
    pub fn note(&self, note: TaskNote) {
        let mut notes = self.notes.lock();
        if notes.len() < NOTES_LISTED {
            notes.push(note);
        }
    }

    /// What has been noted so far.
    pub fn notes(&self) -> Vec<TaskNote> {
        self.notes.lock().clone()
    }

    /// Writes a log line behind the coordinator's own, so that all are in order. Installed, a thread of its own writes
    /// them: whatever blocks there does not hold up the task.
    pub fn log(&self, line: impl FnOnce() + Send + 'static) {
        self.log.line(line);
    }
}

/// How long a task has between its token and its abort: time to write down where it stopped, taken from the end
/// of its stage (a tenth of it, at most this).
pub const TOKEN_GRACE: std::time::Duration = std::time::Duration::from_millis(50);

/// A stage task before it runs.
pub(crate) type StageFn = Box<dyn FnOnce(StageContext) -> BoxFuture<Result<(), BoxError>> + Send>;

/// Boxes a stage task.
pub(crate) fn boxed<F, Fut>(task: F) -> StageFn
where
    F: FnOnce(StageContext) -> Fut + Send + 'static,
    Fut: Future<Output = Result<(), BoxError>> + Send + 'static,
{
    Box::new(move |context| Box::pin(task(context)))
}

/// When a unit of work runs within its stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// At once, beside everything: for what nobody may hold up.
    #[cfg_attr(not(all(unix, feature = "state")), expect(dead_code, reason = "only the state's last save"))]
    Beside,
    Before,
    During,
    After,
}

/// A stage task or hook with its name.
pub(crate) struct Unit {
    pub(crate) name: Cow<'static, str>,
    pub(crate) when: When,
    pub(crate) task: StageFn,
}

/// Where stage tasks run.
#[derive(Clone, Debug)]
pub(crate) enum Executor {
    /// As tasks of the runtime that polls the driver: deterministic under paused time.
    Tasks,
    /// Each on a thread of its own that blocks on its future inside `runtime`: a task that blocks starves nobody.
    #[cfg_attr(
        not(all(unix, feature = "signals")),
        expect(dead_code, reason = "only an installed coordinator has threads")
    )]
    Threads {
        /// The service's runtime.
        runtime: Handle,
        /// Set when that runtime has been dropped.
        gone: Arc<Latch>,
        /// The coordinator's own runtime, for what still has to run then.
        own: Handle,
    },
}

/// A stage task that runs.
pub(crate) struct Running {
    pub(crate) name: Cow<'static, str>,
    done: oneshot::Receiver<Finish>,
    abort: CancellationToken,
    finish: Option<Finish>,
    notes: Notes,
}

/// How a stage task ended, and why.
#[derive(Clone, Debug)]
pub(crate) struct Finish {
    pub(crate) outcome: Outcome,
    pub(crate) detail: Option<String>,
    pub(crate) at: Instant,
}

impl Finish {
    fn new(outcome: Outcome, detail: Option<String>) -> Self {
        Self { outcome, detail, at: Instant::now() }
    }

    fn of(result: Result<Result<(), BoxError>, String>) -> Self {
        match result {
            Ok(Ok(())) => Self::new(Outcome::Ok, None),
            Ok(Err(error)) => Self::new(Outcome::Failed, Some(crate::error::sentence(&*error))),
            Err(panic) => Self::new(Outcome::Panicked, Some(panic)),
        }
    }
}

impl Executor {
    /// Starts a stage task. The call to the closure itself is inside the task, too: it may panic or block.
    pub(crate) fn start(&self, name: Cow<'static, str>, task: StageFn, context: StageContext) -> Running {
        let notes = Notes::default();
        let context = StageContext { notes: Arc::clone(&notes), ..context };
        let (send, done) = oneshot::channel();
        let abort = CancellationToken::new();
        let aborted = abort.clone();
        let work = async move {
            let work = catch_panic(Box::pin(async move { task(context).await }));
            tokio::select! {
                biased;
                result = work => Finish::of(result),
                () = aborted.cancelled_owned() => Finish::new(Outcome::TimedOut, Some("aborted".to_owned())),
            }
        };
        match self {
            Self::Tasks => {
                tokio::spawn(async move {
                    // The driver may have stopped waiting.
                    let _ = send.send(work.await);
                });
            }
            Self::Threads { runtime, gone, own } => {
                let was_gone = gone.is_set();
                let handle = if was_gone { own.clone() } else { runtime.clone() };
                let gone = Arc::clone(gone);
                let thread = std::thread::Builder::new().name(format!("stage {name}")).spawn(move || {
                    let finish = handle.block_on(async {
                        tokio::select! {
                            biased;
                            finish = work => finish,
                            () = gone.wait(), if !was_gone => Finish::new(Outcome::RuntimeGone, None),
                        }
                    });
                    let finish = match finish.outcome {
                        // What a task does to a runtime that is going away fails in many ways.
                        Outcome::Failed | Outcome::Panicked if gone.is_set() => {
                            Finish { outcome: Outcome::RuntimeGone, ..finish }
                        }
                        _ => finish,
                    };
                    let _ = send.send(finish);
                });
                if let Err(error) = thread {
                    // `send` went with the closure: the receiver sees it closed and reports a failure.
                    tracing::error!(target: "shutdown", %error, "no thread for a stage task");
                }
            }
        }
        Running { name, done, abort, finish: None, notes }
    }
}

#[cfg(all(unix, feature = "state"))]
impl Executor {
    /// Starts work that blocks and is no stage's.
    pub(crate) fn start_blocking(&self, name: &'static str, work: impl FnOnce() + Send + 'static) -> Running {
        let context = StageContext::new(Instant::now(), CancellationToken::new());
        let task = boxed(move |_| async move {
            work();
            Ok(())
        });
        self.start(name.into(), task, context)
    }
}

impl Running {
    /// Waits for the task's end.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe; the end is kept.
    pub(crate) async fn ended(&mut self) -> &Finish {
        if self.finish.is_none() {
            let finish = (&mut self.done).await;
            self.finish = Some(finish.unwrap_or_else(|_| {
                Finish::new(Outcome::Failed, Some("the task could not be started or was lost".to_owned()))
            }));
        }
        self.finish.as_ref().expect("set above")
    }

    /// How it ended, if it has.
    pub(crate) fn finish(&mut self) -> Option<&Finish> {
        if self.finish.is_none() {
            self.finish = self.done.try_recv().ok();
        }
        self.finish.as_ref()
    }

    /// What it has written down so far.
    pub(crate) fn notes(&self) -> Vec<TaskNote> {
        self.notes.lock().clone()
    }

    /// Drops the task's future at its next `.await`.
    pub(crate) fn abort(&self) {
        self.abort.cancel();
    }
}
