//! Windows of time that count only when nothing disturbed them.
//!
//! A sample is a window of time in which a thread does nothing but the operation. It counts if the thread was on
//! a processor for more than 97 % of it; with two threads, if both windows also overlapped by more than 95 %.
//! Threads are not pinned (that needs unsafe code), so the overlap is what makes a two-thread sample one.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::thread::ClockId;
use rustix::time::clock_gettime;

use crate::candidates::Candidate;

/// How long a window is, and how fine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) window: Duration,
    /// Operations between two looks at the clock; together at most a thirtieth of the window, so that two windows
    /// that begin together also end together.
    pub(crate) batch: u32,
    /// Samples that are enough.
    pub(crate) enough: usize,
    /// When to give up waiting for undisturbed windows.
    pub(crate) patience: Duration,
}

/// Samples below which a median says nothing.
const TOO_FEW: usize = 31;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    One,
    Two,
}

/// The samples of one candidate, in nanoseconds per operation and thread.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples {
    /// One a round; `None`: disturbed.
    rounds: Vec<Option<f64>>,
}

impl Samples {
    /// Windows that count.
    pub(crate) fn kept(&self) -> usize {
        self.rounds.iter().flatten().count()
    }

    pub(crate) fn thrown_away(&self) -> usize {
        self.rounds.len() - self.kept()
    }

    /// The median; `None` if too few windows were undisturbed.
    pub(crate) fn median(&self) -> Option<f64> {
        median(self.rounds.iter().copied().flatten())
    }

    /// The median of what this costs more than `base` in the same round: a machine that changes its speed changes
    /// it for both.
    pub(crate) fn added_to(&self, base: &Self) -> Option<f64> {
        self.beside(base, |it, base| it - base)
    }

    /// The median of this divided by `base` in the same round.
    pub(crate) fn divided_by(&self, base: &Self) -> Option<f64> {
        self.beside(base, |it, base| it / base)
    }

    fn beside(&self, base: &Self, compare: fn(f64, f64) -> f64) -> Option<f64> {
        median(self.rounds.iter().zip(&base.rounds).filter_map(|(it, base)| Some(compare((*it)?, (*base)?))))
    }
}

fn median(samples: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<_> = samples.collect();
    sorted.sort_by(f64::total_cmp);
    (sorted.len() >= TOO_FEW).then(|| sorted[sorted.len() / 2])
}

/// Measures all candidates, one window each a round, in an order shuffled every round.
pub(crate) fn measure(candidates: &[Candidate], threads: Threads, pace: Pace) -> Vec<Samples> {
    let mut samples = vec![Samples::default(); candidates.len()];
    let begin = now(ClockId::Monotonic);
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut round = |sample: &mut dyn FnMut(&Candidate) -> Option<f64>| {
        random.shuffle(&mut order);
        for &index in &order {
            samples[index].rounds.push(sample(&candidates[index]));
        }
        let enough = samples.iter().all(|samples| samples.kept() >= pace.enough);
        !enough && now(ClockId::Monotonic) - begin < pace.patience
    };
    match threads {
        Threads::One => {
            while round(&mut |candidate| {
                let window = window(candidate, pace, &|| {});
                window.is_undisturbed().then(|| window.nanos())
            }) {}
        }
        Threads::Two => {
            let other = Other::new();
            std::thread::scope(|scope| {
                let (to_main, windows) = std::sync::mpsc::channel();
                scope.spawn(|| other.work(candidates, pace, to_main));
                while round(&mut |candidate| {
                    let mine = other.together(candidates, candidate, pace);
                    let theirs = windows.recv().expect("the other thread lives");
                    (mine.is_undisturbed() && theirs.is_undisturbed() && mine.overlap(&theirs) > 0.95)
                        .then(|| f64::midpoint(mine.nanos(), theirs.nanos()))
                }) {}
                other.stop();
            });
        }
    }
    samples
}

/// What one thread did between two moments.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: Duration,
    end: Duration,
    on_cpu: Duration,
    operations: u64,
}

impl Window {
    fn is_undisturbed(&self) -> bool {
        self.on_cpu.as_secs_f64() / (self.end - self.start).as_secs_f64() > 0.97
    }

    /// The part of the longer window in which both ran.
    fn overlap(&self, other: &Self) -> f64 {
        let both = self.end.min(other.end).saturating_sub(self.start.max(other.start));
        let longer = (self.end - self.start).max(other.end - other.start);
        both.as_secs_f64() / longer.as_secs_f64()
    }

    fn nanos(&self) -> f64 {
        (self.end - self.start).as_secs_f64() * 1e9 / self.operations as f64
    }
}

/// Runs one window, after `meet`.
fn window(candidate: &Candidate, pace: Pace, meet: &dyn Fn()) -> Window {
    let mut result = None;
    (candidate.run)(&mut |operate| {
        operate(pace.batch);
        meet();
        let cpu = now(ClockId::ThreadCPUTime);
        let start = now(ClockId::Monotonic);
        let mut operations = 0;
        let end = loop {
            operate(pace.batch);
            operations += u64::from(pace.batch);
            let end = now(ClockId::Monotonic);
            if end - start >= pace.window {
                break end;
            }
        };
        result = Some(Window { start, end, on_cpu: now(ClockId::ThreadCPUTime) - cpu, operations });
    });
    result.expect("a candidate drives its loop once")
}

/// The second thread, which runs each window beside the first.
struct Other {
    turn: Barrier,
    arrived: AtomicUsize,
    index: AtomicUsize,
    stop: AtomicBool,
}

impl Other {
    fn new() -> Self {
        Self {
            turn: Barrier::new(2),
            arrived: AtomicUsize::new(0),
            index: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        }
    }

    fn work(&self, candidates: &[Candidate], pace: Pace, windows: std::sync::mpsc::Sender<Window>) {
        loop {
            self.turn.wait();
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let candidate = &candidates[self.index.load(Ordering::Acquire)];
            let window = window(candidate, pace, &|| self.meet());
            windows.send(window).expect("the first thread receives");
        }
    }

    fn together(&self, candidates: &[Candidate], candidate: &Candidate, pace: Pace) -> Window {
        let index = candidates.iter().position(|other| std::ptr::eq(other, candidate));
        self.index.store(index.expect("one of them"), Ordering::Release);
        self.arrived.store(0, Ordering::Release);
        self.turn.wait();
        window(candidate, pace, &|| self.meet())
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.turn.wait();
    }

    /// Both leave within a few cycles, if both have a processor.
    fn meet(&self) {
        self.arrived.fetch_add(1, Ordering::AcqRel);
        let mut spins = 0_u32;
        while self.arrived.load(Ordering::Acquire) < 2 {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1 << 14) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
}

fn now(clock: ClockId) -> Duration {
    Duration::try_from(clock_gettime(clock)).expect("these clocks are never negative")
}

/// xorshift64: the order only has to differ from round to round.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn shuffle(&mut self, order: &mut [usize]) {
        for last in (1..order.len()).rev() {
            let place = self.next() % (last as u64 + 1);
            order.swap(last, usize::try_from(place).expect("smaller than the slice"));
        }
    }
}
