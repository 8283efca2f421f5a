//! Counts calls and failures of the last while, in slots that nobody has to clear.
//!
//! Time is cut into slots of a fifteenth of the window; sixteen cells take turns in holding them. A cell is one word,
//! so what it counts and which slot it counts for always agree:
//!
//! ```text
//!  63            32 31          16 15           0
//! ┌────────────────┬──────────────┬──────────────┐
//! │      turn      │   failures   │    calls     │     slot = turn × 16 + place of the cell
//! └────────────────┴──────────────┴──────────────┘
//! ```
//!
//! Whoever finds a cell that holds an earlier slot replaces it; a cell that holds a later one has no room for a call
//! that comes a window late. A new *era*, which begins when the breaker closes, moves all slots 32 places on: what an
//! earlier era counted, even from now on, is out of sight of the new one.
//!
//! A thread counts in its own shard, two cache lines that others do not write. Beyond 65,535 calls in a cell both counts
//! are halved, which keeps their ratio.

use std::time::Duration;

use crate::sync::{AtomicU64, Ordering, default_shards, thread_index};

#[cfg(not(shutdown_loom))]
const CELLS: u64 = 16;
/// A model of sixteen is sixteen times as long and no truer.
#[cfg(shutdown_loom)]
const CELLS: u64 = 2;
/// Slots between two eras: more than a window, and clocks of threads that differ by some slots.
const ERA: u64 = 2 * CELLS;
const SLOTS: u64 = CELLS << 32;

const CALL: u64 = 1;
const FAILURE: u64 = 1 << 16;
const MASK: u64 = (1 << 16) - 1;
const TURN: u64 = 1 << 32;

/// More shards than this would be slow to add up, and few threads call one upstream at the same moment.
const MOST_SHARDS: usize = 16;

/// What the window holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) calls: u64,
    pub(super) failures: u64,
}

#[derive(Debug)]
pub(super) struct Window {
    /// 2⁶⁴ divided by a slot's length in nanoseconds, rounded up: a multiplication is a third of a division. It puts the
    /// end of a slot too early by a part of it that is the age of the breaker divided by 584 years.
    slots: u64,
    shards: Box<[Shard]>,
}

/// Two cache lines: neighbours are prefetched together.
#[derive(Debug)]
#[repr(align(128))]
struct Shard([AtomicU64; CELLS as usize]);

impl Window {
    pub(super) fn new(length: Duration) -> Self {
        // Threads share one in a model: there `thread_index` is 0.
        let shards = if cfg!(shutdown_loom) { 1 } else { default_shards().min(MOST_SHARDS) };
        let shard = |_| Shard(std::array::from_fn(|_| AtomicU64::new(0)));
        let length = u64::try_from(length.as_nanos()).expect("a day at most");
        let slot = (length / (CELLS - 1)).max(2);
        Self { slots: u64::MAX / slot + 1, shards: (0..shards).map(shard).collect() }
    }

    /// Counts one call that ended at `at`, in nanoseconds from the breaker's birth.
    #[inline]
    pub(super) fn count(&self, era: u64, at: u64, failed: bool) {
        let slot = self.slot(era, at);
        let turn = slot / CELLS;
        // The shard count is a power of two.
        let shard = &self.shards[thread_index() & (self.shards.len() - 1)];
        let cell = &shard.0[(slot % CELLS) as usize];
        let one = if failed { CALL + FAILURE } else { CALL };
        let mut seen = cell.load(Ordering::Relaxed);
        loop {
            let ahead = (turn as u32).wrapping_sub((seen / TURN) as u32).cast_signed();
            let counted = match ahead {
                0 if calls_in(seen) == MASK => halved(seen) + one,
                0 => seen + one,
                1.. => turn * TURN + one,
                ..0 => return,
            };
            // SeqCst: of two threads that add a failure each and then add up, one sees the other's.
            match cell.compare_exchange_weak(seen, counted, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return,
                Err(other) => seen = other,
            }
        }
    }

    /// Adds up what the window holds at `at`; what a thread with a clock a little ahead has counted, too.
    pub(super) fn sum(&self, era: u64, at: u64) -> Count {
        let now = self.slot(era, at);
        let mut count = Count::default();
        for shard in &self.shards {
            for (place, cell) in (0_u64..).zip(&shard.0) {
                // SeqCst: pairs with `count`.
                let cell = cell.load(Ordering::SeqCst);
                let slot = cell / TURN * CELLS + place;
                let behind = now.wrapping_sub(slot) % SLOTS;
                if !(CELLS..=SLOTS - CELLS).contains(&behind) {
                    count.calls += calls_in(cell);
                    count.failures += failures_in(cell);
                }
            }
        }
        count
    }

    /// Whether anything was ever counted.
    pub(super) fn is_untouched(&self) -> bool {
        let mut cells = self.shards.iter().flat_map(|shard| &shard.0);
        cells.all(|cell| cell.load(Ordering::Relaxed) == 0)
    }

    #[inline]
    fn slot(&self, era: u64, at: u64) -> u64 {
        let slot = (u128::from(at) * u128::from(self.slots)) >> 64;
        (slot as u64).wrapping_add(era.wrapping_mul(ERA)) % SLOTS
    }
}

/// Both counts of a full cell halved.
fn halved(cell: u64) -> u64 {
    cell / TURN * TURN + failures_in(cell) / 2 * FAILURE + calls_in(cell) / 2
}

fn calls_in(cell: u64) -> u64 {
    cell & MASK
}

fn failures_in(cell: u64) -> u64 {
    (cell / FAILURE) & MASK
}

#[cfg(all(test, not(shutdown_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Duration::from_nanos(1500);

    #[test]
    fn a_cell_that_is_full_keeps_its_share_of_failures() {
        let window = Window::new(WINDOW);
        for call in 0..400_000 {
            window.count(0, 7, call % 4 == 0);
        }
        let Count { calls, failures } = window.sum(0, 7);
        assert!((32_768..=65_536).contains(&calls), "{calls}");
        let share = failures as f64 / calls as f64;
        assert!((0.249..0.251).contains(&share), "{share}");
    }

    #[test]
    fn a_call_that_comes_a_window_late_is_not_counted_and_harms_nothing() {
        let window = Window::new(WINDOW);
        window.count(0, 3200, true);
        window.count(0, 0, true);
        assert_eq!(window.sum(0, 3200), Count { calls: 1, failures: 1 });
    }

    #[test]
    fn a_thread_whose_clock_is_behind_sees_what_the_others_have_counted() {
        let window = Window::new(WINDOW);
        window.count(0, 250, true);
        assert_eq!(window.sum(0, 190), Count { calls: 1, failures: 1 });
    }

    #[test]
    fn eras_do_not_see_each_other_even_when_an_old_one_goes_on_counting() {
        let window = Window::new(WINDOW);
        for at in (0..10_000).step_by(50) {
            window.count(1, at, true);
            window.count(3, at, false);
            window.count(1, at, true);
            let Count { calls, failures } = window.sum(3, at);
            assert_eq!((calls, failures), ((at / 50 + 1).min(31 + at / 50 % 2), 0), "{at}");
        }
    }

    proptest! {
        /// Calls come in order here; the naive model keeps each with its time.
        #[test]
        fn the_window_holds_what_a_list_of_calls_holds(
            calls in proptest::collection::vec((0_u64..400, any::<bool>()), 1..200), start in 0_u64..1 << 40,
        ) {
            let window = Window::new(WINDOW);
            let mut list = Vec::new();
            let mut at = start;
            for (pause, failed) in calls {
                at += pause;
                window.count(0, at, failed);
                list.push((at, failed));
                let holds = |oldest_slot: u64| {
                    let held = list.iter().filter(|(call, _)| at / 100 - call / 100 <= oldest_slot);
                    let (calls, failures) = held.fold((0, 0), |(calls, failures), (_, failed)| {
                        (calls + 1, failures + u64::from(*failed))
                    });
                    Count { calls, failures }
                };
                prop_assert_eq!(window.sum(0, at), holds(15));
                // The law in words: the whole window, and at most a fifteenth more.
                let within = |length: u64| list.iter().filter(|(call, _)| at - call < length).count() as u64;
                let held = window.sum(0, at).calls;
                prop_assert!(within(1500) <= held && held <= within(1600));
            }
        }
    }
}
