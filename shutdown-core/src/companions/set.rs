//! All companions of a service: their order, their stage tasks, what is shown of them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{OnceCell, watch};
use tokio::time::{Instant, sleep_until};

use super::companion::{Companion, Ending, NotEnded, NotRunning};
use super::find::{NotFound, find};
use super::process::{Exit, Process};
use super::stop::{Clock, Stopping};
use crate::config::display_duration;
use crate::coordinator::ShutdownCoordinator;
use crate::error::BoxError;
use crate::plan::Need;
use crate::report::TaskNote;
use crate::stage::{StageContext, StageFn, boxed};

/// The companions of a service. Clones are the same ones.
///
/// Give them to [`Builder::companions`](crate::Builder::companions), which ends them in stage Companions; and start those that
/// are to be launched, with [`launch`](Self::launch), once the coordinator stands.
#[derive(Clone, Debug, Default)]
pub struct Companions {
    pub(super) entries: Arc<[Arc<Entry>]>,
    /// Whether they have been launched, or tried to.
    pub(super) launched: Arc<AtomicBool>,
}

impl Companions {
    /// These companions. None is looked for yet.
    pub fn new(companions: impl IntoIterator<Item = Companion>) -> Self {
        let taken = Arc::default();
        let entry = |companion| Arc::new(Entry::new(companion, Arc::clone(&taken)));
        Self { entries: companions.into_iter().map(entry).collect(), launched: Arc::default() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What is wrong with each, as far as it can be seen now, to be said at the start: a PID file that would be refused, a
    /// directory that is missing. One that is not running is not wrong: it may come later.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn warnings(&self) -> Vec<(String, String)> {
        let mut warnings = Vec::new();
        for entry in self.entries.iter().filter(|entry| entry.companion.launch.is_none()) {
            let companion = &entry.companion;
            let file = companion.pid_file.as_ref().filter(|file| file.has_no_directory());
            let problem = match (file, find(companion).await) {
                (Some(file), Err(NotFound::NotRunning(_))) => {
                    format!("there is no directory for its PID file {}", file.path().display())
                }
                (_, Err(NotFound::Refused(why))) => why.to_string(),
                _ => continue,
            };
            warnings.push((companion.name.clone(), problem));
        }
        warnings
    }

    /// What is known of each, in their order.
    pub fn status(&self) -> Vec<CompanionStatus> {
        self.entries.iter().map(|entry| entry.status()).collect()
    }

    /// Whether this is the number of a process that was launched here, and that is waited for here: whoever reaps orphans leaves
    /// it alone.
    pub fn has_launched(&self, pid: u32) -> bool {
        let is_it = |process: &Arc<Process>| process.is_child() && process.id() == pid;
        self.entries.iter().any(|entry| {
            // One that is just being started is known when that is done.
            let _no_start = entry.starting.lock();
            entry.state.lock().process.as_ref().is_some_and(is_it)
        })
    }

    /// What their ladders need of the stage, if there are any: groups one after another, each as long as its longest ladder.
    pub(crate) fn need(&self) -> Option<Need> {
        let groups = self.groups();
        let longest: Vec<&Companion> = groups.values().copied().collect();
        let parts = longest.iter().map(|companion| {
            let total = display_duration(companion.ladder.total());
            format!("{} {} = {total}", companion.name, companion.ladder)
        });
        let arithmetic = parts.collect::<Vec<_>>().join(", then ");
        let needed = longest.iter().map(|companion| companion.ladder.total()).sum();
        (!longest.is_empty()).then_some(Need { needed, arithmetic })
    }

    /// The companion with the longest ladder of each group.
    fn groups(&self) -> BTreeMap<u32, &Companion> {
        let mut groups: BTreeMap<u32, &Companion> = BTreeMap::new();
        for entry in self.entries.iter() {
            let longest = groups.entry(entry.companion.group).or_insert(&entry.companion);
            if entry.companion.ladder.total() > longest.ladder.total() {
                *longest = &entry.companion;
            }
        }
        groups
    }

    /// A stage task for each: it waits for the groups before its own, however they end.
    pub(crate) fn stage_tasks(&self) -> Vec<(Cow<'static, str>, StageFn)> {
        let groups = self.groups();
        let open: BTreeMap<u32, watch::Sender<usize>> =
            groups.keys().map(|group| (*group, watch::Sender::new(0))).collect();
        let tasks = self.entries.iter().map(|entry| {
            let group = entry.companion.group;
            let need = |(_, longest): (&u32, &&Companion)| longest.ladder.total();
            let turn = Turn {
                entry: Entry::unless_ended(entry),
                earlier: open.range(..group).map(|(_, open)| open.subscribe()).collect(),
                before: groups.range(..group).map(need).sum(),
                later: groups.range(group + 1..).map(need).sum(),
                open: Open::in_group(&open[&group]),
            };
            (Cow::Owned(entry.companion.name.clone()), boxed(move |stage| turn.take(stage)))
        });
        tasks.collect()
    }
}

/// A companion's turn in stage Companions.
struct Turn {
    entry: UnlessEnded,
    /// How many of each earlier group are not over yet.
    earlier: Vec<watch::Receiver<usize>>,
    /// What the groups before it may need.
    before: Duration,
    /// What the groups after it may need.
    later: Duration,
    open: Open,
}

impl Turn {
    async fn take(self, stage: StageContext) -> Result<(), BoxError> {
        let Self { entry: unless_ended, earlier, before, later, open } = self;
        let entry = &*unless_ended.0;
        let mut clock = Clock::of(&stage);
        let rest = before + entry.companion.ladder.total() + later;
        let mut until = clock.latest(before, rest);
        let mut earlier = pin!(all_over(earlier));
        loop {
            tokio::select! {
                biased;
                () = &mut earlier => break,
                () = clock.hurry() => until = until.min(clock.latest(before, rest)),
                // Whatever holds them up, a disk for example, must not take the time of this one.
                () = sleep_until(until) => break,
            }
        }
        let began = Instant::now();
        let stopping = Stopping { entry, stage: &stage, clock, later };
        // Whoever comes second gets what became of the first: nobody is signalled twice.
        let ending = entry.ending.get_or_init(|| stopping.run()).await.clone();
        drop(open);
        note(&entry.companion, &ending, began.elapsed(), &stage);
        if ending.is_well() { Ok(()) } else { Err(Box::new(NotEnded(ending))) }
    }
}

/// Waits until nobody of these groups is left.
async fn all_over(groups: Vec<watch::Receiver<usize>>) {
    for mut group in groups {
        // An error: its sender is gone, so nobody of that group is left.
        let _ = group.wait_for(|open| *open == 0).await;
    }
}

/// Kills a launched companion, and what is in its process group, when its turn never comes or is cut off: the stage is skipped,
/// or has run out of time. One that was not launched here is left alone.
struct UnlessEnded(Arc<Entry>);

impl Drop for UnlessEnded {
    fn drop(&mut self) {
        let Self(entry) = self;
        // A plan that is only looked at is dropped before anything is launched.
        let Some(shutdown) = entry.launched_by.get() else { return };
        if entry.ending.get().is_none()
            && let Some(pid) = entry.kill()
        {
            let companion = entry.companion.name.clone();
            shutdown.log(move || {
                tracing::warn!(target: "shutdown", companion, pid, "killed: there was no time to end it");
            });
        }
    }
}

/// One companion that is not over yet, of its group.
struct Open(watch::Sender<usize>);

impl Open {
    fn in_group(group: &watch::Sender<usize>) -> Self {
        group.send_modify(|open| *open += 1);
        Self(group.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

/// Writes down what became of it, in the report and in the log.
fn note(companion: &Companion, ending: &Ending, after: Duration, stage: &StageContext) {
    let after_ms = crate::report::ms(after);
    let mut note = TaskNote::new(&companion.name, ending.as_str()).with("after_ms", after_ms);
    if let Ending::Exited { pid, .. } | Ending::Escalated { pid, .. } | Ending::TimedOut { pid, .. } = ending
    {
        note = note.with("pid", f64::from(*pid));
    }
    if let Ending::Exited { exit, .. }
    | Ending::Escalated { exit, .. }
    | Ending::NotRunning(NotRunning::Ended(exit)) = ending
    {
        note = match exit {
            Some(Exit::Code(code)) => note.with("code", f64::from(*code)),
            Some(Exit::Signal(number)) => note.with("ended_by", f64::from(*number)),
            None => note,
        };
    }
    let rungs = companion.ladder.rungs();
    let last = match ending {
        Ending::Exited { .. } => Some(rungs[0].signal.number()),
        Ending::Escalated { signal, .. } | Ending::TimedOut { signal, .. } => Some(*signal),
        Ending::NotRunning(_) | Ending::Refused(_) => None,
    };
    if let Some(last) = last {
        let sent = rungs.iter().position(|rung| rung.signal.number() == last).map_or(0, |place| place + 1);
        note = note.with("signal", f64::from(last)).with("signals", sent as f64);
    }
    stage.note(note);
    let (name, ending) = (companion.name.clone(), ending.clone());
    stage.log(move || match ending {
        Ending::Exited { pid, exit } | Ending::Escalated { pid, exit, .. } => {
            let exit = exit.map(tracing::field::display);
            tracing::info!(target: "shutdown", companion = name, pid, exit, elapsed_ms = after_ms, "companion ended");
        }
        Ending::NotRunning(why) => {
            tracing::info!(target: "shutdown", companion = name, %why, "companion not running");
        }
        // The stage says so itself, with the reason.
        Ending::Refused(_) | Ending::TimedOut { .. } => {}
    });
}

/// What is known of a companion while the service runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CompanionStatus {
    /// What its process is called.
    pub name: String,
    /// When it is ended.
    pub group: u32,
    /// How.
    pub stop: String,
    /// Whether it is launched here.
    pub launched: bool,
    /// Its number, of a launched one that runs; the others are looked for when they are stopped.
    pub pid: Option<u32>,
    /// How often it has been started again.
    pub restarts: u64,
    /// How it ended last; it may have been started again since.
    pub last_exit: Option<String>,
}

/// A companion, and what became of it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) companion: Companion,
    /// Short, and never held over anything that may block.
    pub(super) state: Mutex<State>,
    /// Held over a start, which forks and executes: nobody reaps, and nobody ends it, in between. Before `state`.
    pub(super) starting: Mutex<()>,
    /// Whose log it is, of a launched one.
    pub(super) launched_by: OnceLock<ShutdownCoordinator>,
    ending: OnceCell<Ending>,
    /// The numbers of all companions that have been signalled.
    taken: Arc<Mutex<Vec<u32>>>,
}

/// Of a launched companion.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The one that runs, or ran last.
    pub(super) process: Option<Arc<Process>>,
    /// It has ended, like this, and is not followed any more.
    pub(super) ended: Option<Option<Exit>>,
    /// How it, or the one before it, ended last.
    pub(super) last_exit: Option<Exit>,
    /// It is being ended: nobody starts it again.
    pub(super) stopping: bool,
    pub(super) restarts: u64,
}

impl Entry {
    pub(super) fn new(companion: Companion, taken: Arc<Mutex<Vec<u32>>>) -> Self {
        let (state, starting) = (Mutex::default(), Mutex::default());
        let (launched_by, ending) = (OnceLock::new(), OnceCell::new());
        Self { companion, state, starting, launched_by, ending, taken }
    }

    fn unless_ended(this: &Arc<Self>) -> UnlessEnded {
        UnlessEnded(Arc::clone(this))
    }

    /// Kills it, if it was launched and runs, and sees to it that it is not started again. Its number.
    pub(super) fn kill(&self) -> Option<u32> {
        self.companion.launch.as_ref()?;
        let process = self.last_process().ok()?;
        process.kill();
        Some(process.id())
    }

    /// Whether nobody else among the companions is this process.
    pub(super) fn take(&self, pid: u32) -> bool {
        let mut taken = self.taken.lock();
        let is_new = !taken.contains(&pid);
        taken.push(pid);
        is_new
    }

    /// The launched process, for the last time: from now on it is not started again.
    pub(super) fn last_process(&self) -> Result<Arc<Process>, NotRunning> {
        self.state.lock().stopping = true;
        let _no_start = self.starting.lock();
        let state = self.state.lock();
        match (&state.process, state.ended) {
            (_, Some(exit)) => Err(NotRunning::Ended(exit)),
            (Some(process), None) => Ok(Arc::clone(process)),
            (None, None) => Err(NotRunning::NotLaunched),
        }
    }

    /// The launched process has ended.
    pub(super) fn note_end(&self, exit: Option<Exit>) {
        let mut state = self.state.lock();
        state.ended = Some(exit);
        state.last_exit = exit;
    }

    fn status(&self) -> CompanionStatus {
        let Companion { name, group, ladder, launch, .. } = &self.companion;
        let state = self.state.lock();
        let running = state.process.as_ref().filter(|_| state.ended.is_none());
        CompanionStatus {
            name: name.clone(),
            group: *group,
            stop: ladder.to_string(),
            launched: launch.is_some(),
            pid: running.map(|process| process.id()),
            restarts: state.restarts,
            last_exit: state.last_exit.map(|exit| exit.to_string()),
        }
    }
}
