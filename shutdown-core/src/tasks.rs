//! Background tasks: a token to hear, a tracker to wait, a name for the report.
//!
//! Stage Background tells every task through its token, waits for all of them together, and at its deadline
//! aborts the rest by name. A task spawned after that moment is refused; whether it is too late is decided
//! under the lock that the stage closes, so none slips through between.

use std::borrow::Cow;
use std::future::Future;
use std::time::Duration;

use parking_lot::Mutex;
use slab::Slab;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::error::{BoxError, ShuttingDown};
use crate::report::{Outcome, TaskReport, ms};
use crate::unwind::{BoxFuture, catch_panic};

/// What a background task may return: nothing, or a result whose error is reported.
pub trait TaskOutput: Send + 'static {
    /// The output as a result.
    ///
    /// # Errors
    ///
    /// The task's own error.
    fn into_result(self) -> Result<(), BoxError>;
}

impl TaskOutput for () {
    fn into_result(self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// A task that is an endless loop returns the type without values, which has no name on stable Rust but this one.
type Never = <fn() -> ! as Returns>::Output;

/// Gives the return type of a function pointer. Public because [`Never`] is in a public signature; not exported.
pub trait Returns {
    /// What it returns.
    type Output;
}

impl<T> Returns for fn() -> T {
    type Output = T;
}

/// An endless loop never hears its token: spawn it with
/// [`spawn_cancellable`](crate::ShutdownCoordinator::spawn_cancellable), or it is aborted at the stage's deadline.
impl TaskOutput for Never {
    fn into_result(self) -> Result<(), BoxError> {
        self
    }
}

impl<E: Into<BoxError> + Send + 'static> TaskOutput for Result<(), E> {
    fn into_result(self) -> Result<(), BoxError> {
        self.map_err(Into::into)
    }
}

/// What a task is to the service, and how it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    /// It finishes its iteration and ends by itself when it hears its token.
    FinishIteration,
    /// It is dropped at its next `.await` when it is told.
    Cancel,
    /// As `FinishIteration`; its failure before the shutdown is a reason to stop.
    Critical,
}

/// Called with the name and the error of a critical task that failed.
type OnCritical = Box<dyn Fn(&str, String) + Send + Sync>;

pub(crate) struct Tasks {
    token: CancellationToken,
    tracker: TaskTracker,
    state: Mutex<State>,
    on_critical: OnCritical,
}

#[derive(Default)]
struct State {
    closed: bool,
    /// The shutdown has begun: a task that does not end well is kept for the report.
    stopping: bool,
    spawned: u64,
    alive: Slab<Alive>,
    ended: Vec<Ended>,
}

struct Alive {
    /// Which of all tasks this is: a task that ended at once may have left its key to another one.
    id: u64,
    name: Cow<'static, str>,
    abort: Option<AbortHandle>,
    aborted: bool,
}

struct Ended {
    name: Cow<'static, str>,
    outcome: Outcome,
    detail: Option<String>,
    at: Instant,
}

impl Tasks {
    pub(crate) fn new(on_critical: OnCritical) -> Self {
        Self {
            token: CancellationToken::new(),
            tracker: TaskTracker::new(),
            state: Mutex::new(State::default()),
            on_critical,
        }
    }

    pub(crate) fn spawn<Fut>(
        &'static self,
        runtime: &Handle,
        name: Cow<'static, str>,
        policy: Policy,
        task: impl FnOnce(CancellationToken) -> Fut,
    ) -> Result<(), ShuttingDown>
    where
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        // A slot first, under the lock that the stage closes; the future is made outside it.
        let slot = {
            let mut state = self.state.lock();
            if state.closed {
                return Err(ShuttingDown);
            }
            let id = state.spawned;
            state.spawned += 1;
            let key = state.alive.insert(Alive { id, name, abort: None, aborted: false });
            Slot { tasks: self, id, key, policy, done: false, _tracked: self.tracker.token() }
        };
        let (id, key) = (slot.id, slot.key);
        let token = self.token.child_token();
        let heard = token.clone();
        let future = task(token);
        let work: BoxFuture<Result<(), BoxError>> = match policy {
            Policy::Cancel => Box::pin(async move {
                tokio::select! {
                    biased;
                    output = future => output.into_result(),
                    () = heard.cancelled() => Ok(()),
                }
            }),
            Policy::FinishIteration | Policy::Critical => Box::pin(async move { future.await.into_result() }),
        };
        let abort = runtime.spawn(async move { slot.end(catch_panic(work).await) }).abort_handle();
        let mut too_late = None;
        if let Some(alive) = self.state.lock().alive.get_mut(key).filter(|alive| alive.id == id) {
            // The stage's deadline may have passed between the slot and here.
            too_late = alive.aborted.then(|| abort.clone());
            alive.abort = Some(abort);
        }
        if let Some(abort) = too_late {
            abort.abort();
        }
        Ok(())
    }

    /// The names of the tasks alive.
    pub(crate) fn names(&self) -> Vec<Cow<'static, str>> {
        self.state.lock().alive.iter().map(|(_, alive)| alive.name.clone()).collect()
    }

    /// How many are alive, and how many have ended since the start.
    #[cfg(all(unix, feature = "systemd"))]
    pub(crate) fn alive_and_ended(&self) -> (u64, u64) {
        let state = self.state.lock();
        let alive = state.alive.len() as u64;
        (alive, state.spawned - alive)
    }

    /// From now on a task that does not end well is in the report.
    pub(crate) fn note_failures(&self) {
        self.state.lock().stopping = true;
    }

    /// Refuses new tasks. Returns the names that the report will have: taken before anybody is told, because a task may
    /// end the moment it hears.
    pub(crate) fn close(&self) -> Vec<Cow<'static, str>> {
        let names = {
            let mut state = self.state.lock();
            state.closed = true;
            let ended = state.ended.iter().map(|ended| ended.name.clone());
            ended.chain(state.alive.iter().map(|(_, alive)| alive.name.clone())).collect()
        };
        self.tracker.close();
        names
    }

    /// Tells those alive to end.
    pub(crate) fn tell(&self) {
        self.token.cancel();
    }

    /// Waits until no task is left. Only after [`close`](Self::close).
    pub(crate) async fn ended(&self) {
        self.tracker.wait().await;
    }

    /// Aborts the tasks still alive: each is dropped at its next `.await`.
    pub(crate) fn abort(&self) {
        let handles: Vec<_> = {
            let mut state = self.state.lock();
            state
                .alive
                .iter_mut()
                .filter_map(|(_, alive)| {
                    alive.aborted = true;
                    alive.abort.clone()
                })
                .collect()
        };
        // Outside the lock: aborting may drop the task here and now, and its slot takes the lock.
        handles.iter().for_each(AbortHandle::abort);
    }

    /// How every task has ended that was alive when the stage began or did not end well since the shutdown began,
    /// in the order they ended.
    pub(crate) fn report(&self, start: Instant, now: Instant) -> Vec<TaskReport> {
        let since = |at: Instant| ms(at.saturating_duration_since(start).max(Duration::ZERO));
        let state = self.state.lock();
        let ended = state.ended.iter().map(|ended| TaskReport {
            detail: ended.detail.clone(),
            ..TaskReport::new(ended.name.clone(), ended.outcome, since(ended.at))
        });
        let alive = state.alive.iter().map(|(_, alive)| TaskReport {
            detail: alive.aborted.then(|| "aborted, but it does not reach an await".to_owned()),
            ..TaskReport::new(alive.name.clone(), Outcome::TimedOut, since(now))
        });
        ended.chain(alive).collect()
    }

    fn end(&self, key: usize, policy: Policy, finish: Option<Result<Result<(), BoxError>, String>>) {
        let mut state = self.state.lock();
        let alive = state.alive.remove(key);
        let (outcome, detail) = match finish {
            Some(Ok(Ok(()))) => (Outcome::Ok, None),
            Some(Ok(Err(error))) => (Outcome::Failed, Some(error.to_string())),
            Some(Err(panic)) => (Outcome::Panicked, Some(panic)),
            None if alive.aborted => (Outcome::TimedOut, Some("aborted".to_owned())),
            None => (Outcome::RuntimeGone, None),
        };
        let early = !state.closed;
        // A critical one is kept whenever it failed: its reason may not have been the first.
        if !early || (outcome != Outcome::Ok && (state.stopping || policy == Policy::Critical)) {
            let ended =
                Ended { name: alive.name.clone(), outcome, detail: detail.clone(), at: Instant::now() };
            state.ended.push(ended);
        }
        drop(state);
        let name = &*alive.name;
        match outcome {
            Outcome::Ok => tracing::debug!(target: "shutdown", task = name, "background task ended"),
            _ => {
                let error = detail.unwrap_or_else(|| outcome.as_str().to_owned());
                // The reason first: the log may block.
                if early && policy == Policy::Critical && outcome != Outcome::RuntimeGone {
                    (self.on_critical)(name, error.clone());
                }
                tracing::error!(target: "shutdown", task = name, outcome = outcome.as_str(), error, "background task ended");
            }
        }
    }
}

/// A task's place in the registry. Dropped without an end, the task was aborted or its runtime went away.
struct Slot {
    tasks: &'static Tasks,
    id: u64,
    key: usize,
    policy: Policy,
    done: bool,
    /// Dropped last: who waits for the tracker finds the end written down.
    _tracked: TaskTrackerToken,
}

impl Slot {
    fn end(mut self, finish: Result<Result<(), BoxError>, String>) {
        self.done = true;
        self.tasks.end(self.key, self.policy, Some(finish));
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if !self.done {
            self.tasks.end(self.key, self.policy, None);
        }
    }
}
