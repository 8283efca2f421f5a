//! The run: start, serve, replace one after the other, count.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime;

use crate::PATIENCE;
use crate::rig::clients::World;
use crate::rig::servers::{Kind, Server, Stop};
use crate::rig::tally::{Group, Loss, Tally};
use crate::rig::{LAG, affinity};

/// How many instances serve beside the surge.
const INSTANCES: usize = 3;

/// What is restarted, how, and how often.
#[derive(Clone, Debug)]
pub struct Mode {
    /// What it is called in tables.
    pub name: String,
    kind: Kind,
    lame_duck: Duration,
    stop: Stop,
    restarts: usize,
    requests: usize,
    until: Option<(Group, Loss)>,
}

impl Mode {
    /// The good way: a lame duck longer than the balancer's lag.
    pub fn patient(kind: Kind) -> Self {
        Self::with(kind, Duration::from_millis(800))
    }

    /// A control: a lame duck shorter than the balancer's lag. It must refuse fresh connections.
    pub fn impatient(kind: Kind) -> Self {
        Self::with(kind, Duration::from_millis(100))
    }

    /// A control: killed. It must lose whatever is in flight.
    pub fn abrupt(kind: Kind) -> Self {
        Self { name: format!("{kind:?}, killed"), stop: Stop::Abrupt, ..Self::patient(kind) }
    }

    fn with(kind: Kind, lame_duck: Duration) -> Self {
        let name = format!("{kind:?}, lame duck {lame_duck:?}");
        Self { name, kind, lame_duck, stop: Stop::Told, restarts: 1, requests: 0, until: None }
    }

    /// Calls it so in tables.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Restarts so many instances, and more until so many requests were made.
    #[must_use]
    pub fn at_least(mut self, restarts: usize, requests: usize) -> Self {
        (self.restarts, self.requests) = (restarts, requests);
        self
    }

    /// Restarts at most so many instances, and none after the first such loss: on a busy machine a control may need
    /// more than one.
    #[must_use]
    pub fn until(mut self, group: Group, loss: Loss, restarts: usize) -> Self {
        (self.until, self.restarts) = (Some((group, loss)), restarts);
        self
    }

    fn is_over(&self, restarts: usize, world: &World) -> bool {
        let lost =
            |(group, loss)| world.tallies.now().get(&group).is_some_and(|tally| tally.lost_by(loss) > 0);
        self.until.is_some_and(lost)
            || (restarts >= self.restarts && world.tallies.requests() >= self.requests)
    }
}

/// What a run has seen.
#[derive(Debug)]
pub struct Outcome {
    /// What was run.
    pub name: String,
    /// How many instances were replaced.
    pub restarts: usize,
    /// What each group has seen.
    pub groups: BTreeMap<Group, Tally>,
    /// How long each replaced instance took from the signal to its exit.
    pub exits: Vec<Duration>,
    /// Exit codes and lines of stderr that nothing explains, of every server.
    pub wrong: Vec<String>,
    /// The processors on which clients and servers could run.
    pub processors: BTreeSet<usize>,
}

impl Outcome {
    /// All requests of all groups.
    pub fn requests(&self) -> usize {
        self.groups.values().map(Tally::requests).sum()
    }

    /// All that were lost.
    pub fn lost(&self) -> usize {
        self.groups.values().map(Tally::lost).sum()
    }

    /// All that this group has lost in this way.
    pub fn lost_by(&self, group: Group, loss: Loss) -> usize {
        self.groups.get(&group).map_or(0, |tally| tally.lost_by(loss))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, restarts, .. } = self;
        let (requests, lost) = (self.requests(), self.lost());
        writeln!(
            f,
            "{name}: {restarts} restarts, {requests} requests, {lost} failed; exits {:?}",
            self.exits
        )?;
        for (group, tally) in &self.groups {
            writeln!(f, "  {group:?}: {tally}")?;
        }
        for wrong in &self.wrong {
            writeln!(f, "  wrong: {wrong}")?;
        }
        Ok(())
    }
}

/// Runs `mode` on threads and processes that inherit this thread's processors.
///
/// # Panics
///
/// If a server does not start or end, or a group is never served.
pub fn run(mode: &Mode) -> Outcome {
    let runtime =
        runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let _inside = runtime.enter();
    let world = World::new(mode.kind, mode.lame_duck);
    let mut processors = BTreeSet::new();
    let mut start = || {
        let server = Server::start(mode.kind, mode.lame_duck);
        processors.extend(server.processors());
        world.balancer.add(Arc::clone(server.instance()));
        server
    };

    let mut live: VecDeque<Server> = (0..INSTANCES).map(|_| start()).collect();
    let clients = world.spawn();
    world.tallies.all_served();

    let (mut exits, mut wrong) = (Vec::new(), Vec::new());
    while !mode.is_over(exits.len(), &world) {
        live.push_back(start());
        let old = live.pop_front().expect("more than one lives");
        let instance = Arc::clone(old.instance());
        old.signal(mode.stop);
        let learns = {
            let world = Arc::clone(&world);
            runtime.spawn(async move {
                tokio::time::sleep(LAG).await;
                world.balancer.remove(&instance);
            })
        };
        let (took, complaints) = old.ended(mode.stop);
        exits.push(took);
        wrong.extend(complaints);
        runtime.block_on(learns).expect("it does not panic");
    }

    processors
        .extend(runtime.block_on(runtime.spawn(async { affinity::of_this_thread() })).expect("no panic"));
    world.stop();
    for client in clients {
        let ended = runtime.block_on(async { tokio::time::timeout(PATIENCE, client).await });
        ended.expect("clients stop when told").expect("a client does not panic");
    }
    for server in &live {
        server.signal(Stop::Told);
    }
    for server in live {
        wrong.extend(server.ended(Stop::Told).1);
    }
    let restarts = exits.len();
    Outcome { name: mode.name.clone(), restarts, groups: world.tallies.now(), exits, wrong, processors }
}
