//! The laws of circuit breakers. Time is an argument, so no test waits.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use proptest::prelude::*;
use shutdown_core::breaker::{
    Breaker, Breakers, Call, Class, Config, Dropped, OwnedPermit, Record, Rejected, Settings, State,
};
use tokio::time::Instant;

const SLEEP: Duration = Duration::from_secs(5);

/// Nothing here takes a value that could not be used.
fn config(text: &str) -> Config {
    text.parse().expect("a breaker that can be")
}

/// A moment, and those after it.
#[derive(Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn at(self, ms: u64) -> Instant {
        self.0 + Duration::from_millis(ms)
    }
}

/// Fails until it is open.
fn open(breaker: &Breaker, now: Instant) {
    for _ in 0..1000 {
        let Ok(permit) = breaker.try_acquire(now) else { break };
        permit.failure(now);
    }
    assert_eq!(breaker.state(now), State::Open);
}

fn half_open(breaker: &Breaker, now: Instant) {
    open(breaker, now - SLEEP);
    assert_eq!(breaker.state(now), State::HalfOpen);
}

/// A count: the whole in a long run, a tenth else.
fn count(long: usize) -> usize {
    if std::env::var_os("SHUTDOWN_TESTS_LONG").is_some() { long } else { long.div_ceil(10) }
}

// Opening.

#[test]
fn twenty_failures_open_it_and_nineteen_do_not() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", Config::default(), clock.0);
    for failure in 0..20 {
        assert_eq!(breaker.state(clock.0), State::Closed, "after {failure}");
        breaker.try_acquire(clock.0).unwrap().failure(clock.0);
    }
    let rejected = breaker.try_acquire(clock.at(1)).unwrap_err();
    assert_eq!(rejected, Rejected { state: State::Open, retry_after: SLEEP - Duration::from_millis(1) });
}

#[test]
fn half_of_the_calls_must_fail() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", Config::default(), clock.0);
    for _ in 0..51 {
        breaker.try_acquire(clock.0).unwrap().success(clock.0);
    }
    for _ in 0..50 {
        breaker.try_acquire(clock.0).unwrap().failure(clock.0);
    }
    assert_eq!(breaker.state(clock.0), State::Closed);
    breaker.try_acquire(clock.0).unwrap().failure(clock.0);
    assert_eq!(breaker.state(clock.0), State::Open);
}

#[test]
fn the_window_slides_a_burst_across_a_boundary_of_ten_seconds_opens_it() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", Config::default(), clock.0);
    // A tumbling window that ends at 10 s would see ten and ten.
    for ms in (9_000..11_000).step_by(100) {
        breaker.try_acquire(clock.at(ms)).unwrap().failure(clock.at(ms));
    }
    assert_eq!(breaker.state(clock.at(11_000)), State::Open);
}

#[test]
fn failures_older_than_the_window_open_nothing() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", Config::default(), clock.0);
    for call in 0..200 {
        let now = clock.at(call * 600);
        breaker.try_acquire(now).unwrap().failure(now);
    }
    assert_eq!(breaker.state(clock.at(200 * 600)), State::Closed);
}

#[test]
fn a_scanner_s_404s_open_nothing_and_503s_do() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", Config::default(), clock.0);
    for _ in 0..1000 {
        breaker.try_acquire(clock.0).unwrap().record(Call::Status(404), clock.0);
    }
    assert_eq!(breaker.state(clock.0), State::Closed);
    let later = clock.at(60_000);
    for _ in 0..20 {
        breaker.try_acquire(later).unwrap().record(Call::Status(503), later);
    }
    assert_eq!(breaker.state(later), State::Open);
}

#[test]
fn what_is_a_failure_can_be_said_otherwise() {
    let clock = Clock::new();
    let classify = |call| if call == Call::Status(429) { Class::Failure } else { Call::class(call) };
    let config = Config::new(Settings { volume: 1, classify, ..Settings::default() }).unwrap();
    let breaker = Breaker::new("a", config, clock.0);
    breaker.try_acquire(clock.0).unwrap().record(Call::Status(404), clock.0);
    assert_eq!(breaker.state(clock.0), State::Closed);
    let breaker = Breaker::new("a", config, clock.0);
    breaker.try_acquire(clock.0).unwrap().record(Call::Status(429), clock.0);
    assert_eq!(breaker.state(clock.0), State::Open);
}

#[test]
fn a_result_counts_before_record_returns() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", config("volume=1"), clock.0);
    breaker.try_acquire(clock.0).unwrap().failure(clock.0);
    assert!(breaker.try_acquire(clock.0).is_err());
}

// Half-open.

#[test]
fn it_half_opens_at_its_time_and_not_a_millisecond_before() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", Config::default(), clock.0);
    open(&breaker, clock.at(100));
    assert_eq!(breaker.try_acquire(clock.at(5_099)).unwrap_err().retry_after, Duration::from_millis(1));
    assert!(breaker.try_acquire(clock.at(5_100)).is_ok());
}

#[test]
fn the_first_probe_counts_and_a_fourth_is_refused_however_many_ask() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", Config::default(), clock.at(0));
    half_open(&breaker, clock.at(5_000));
    let now = clock.at(5_000);
    let probes: Vec<_> = (0..3).map(|_| breaker.try_acquire(now).unwrap()).collect();
    for _ in 0..100_000 {
        let rejected = breaker.try_acquire(now).unwrap_err();
        assert_eq!(rejected, Rejected { state: State::HalfOpen, retry_after: Duration::ZERO });
    }
    assert_eq!(breaker.snapshot(now).probes, 3);
    drop(probes);
    assert_eq!(breaker.snapshot(now).probes, 0);
}

#[test]
fn probes_close_it_however_slowly_they_come() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", config("window=100ms"), clock.0);
    half_open(&breaker, clock.at(5_000));
    for probe in 0..3 {
        let now = clock.at(5_000 + probe * 3_600_000);
        assert_eq!(breaker.state(now), State::HalfOpen);
        breaker.try_acquire(now).unwrap().success(now);
    }
    let now = clock.at(10_000_000);
    assert_eq!(breaker.state(now), State::Closed);
    assert_eq!(breaker.snapshot(now).closed_total, 1);
}

#[test]
fn a_failing_probe_opens_it_again_for_a_whole_sleep() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", Config::default(), clock.0);
    half_open(&breaker, clock.at(5_000));
    let probe = breaker.try_acquire(clock.at(5_000)).unwrap();
    breaker.try_acquire(clock.at(5_000)).unwrap().success(clock.at(5_001));
    probe.failure(clock.at(6_000));
    assert_eq!(breaker.try_acquire(clock.at(6_000)).unwrap_err().retry_after, SLEEP);
    assert_eq!(breaker.state(clock.at(10_999)), State::Open);
    assert_eq!(breaker.state(clock.at(11_000)), State::HalfOpen);
    // And the success of before counts no more.
    for probe in 0..3 {
        assert_eq!(breaker.state(clock.at(11_000)), State::HalfOpen, "{probe}");
        breaker.try_acquire(clock.at(11_000)).unwrap().success(clock.at(11_000));
    }
    assert_eq!(breaker.state(clock.at(11_000)), State::Closed);
}

#[test]
fn a_probe_that_never_reports_gives_its_place_back() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", Config::default(), clock.0);
    half_open(&breaker, clock.at(5_000));
    for _ in 0..1000 {
        let now = clock.at(5_000);
        let probes: Vec<_> = (0..3).map(|_| breaker.try_acquire(now).unwrap()).collect();
        assert!(breaker.try_acquire(now).is_err());
        // Dropped, abandoned, and by a panic.
        let [one, two, three] = <[_; 3]>::try_from(probes).unwrap();
        drop(one);
        two.record(Call::Abandoned, now);
        three.release();
    }
    assert_eq!(breaker.state(clock.at(5_000)), State::HalfOpen);
}

#[test]
fn a_drop_is_a_failure_where_that_was_asked_for() {
    let clock = Clock::new();
    let settings = Settings { volume: 1, dropped: Dropped::Failure, ..Settings::default() };
    let breaker = Breaker::new("a", Config::new(settings).unwrap(), clock.0);
    breaker.try_acquire(clock.0).unwrap().release();
    assert_eq!(breaker.state(clock.0), State::Closed);
    drop(breaker.try_acquire(clock.0));
    assert_eq!(breaker.state(clock.0), State::Open);
}

// Generations.

#[test]
fn a_result_from_before_it_opened_changes_nothing_later() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", config("volume=2,probes=1"), clock.0);
    let late: Vec<_> = (0..8).map(|_| breaker.try_acquire(clock.0).unwrap()).collect();
    let mut late = late.into_iter();
    let mut next = || late.next().unwrap();
    open(&breaker, clock.0);
    let until = |now| breaker.try_acquire(now).unwrap_err().retry_after;
    next().success(clock.at(10));
    next().failure(clock.at(10));
    assert_eq!(until(clock.at(10)), SLEEP - Duration::from_millis(10), "open: the sleep is as it was");
    let probe = breaker.try_acquire(clock.at(5_000)).unwrap();
    next().failure(clock.at(5_000));
    next().success(clock.at(5_000));
    drop(next());
    assert_eq!(breaker.state(clock.at(5_000)), State::HalfOpen);
    assert_eq!(breaker.snapshot(clock.at(5_000)).probes, 1, "half-open: the place is taken as it was");
    probe.success(clock.at(5_000));
    next().failure(clock.at(5_001));
    next().failure(clock.at(5_001));
    let snapshot = breaker.snapshot(clock.at(5_001));
    assert_eq!(
        (snapshot.state, snapshot.error_count, snapshot.total_count),
        (State::Closed, 0, 0),
        "closed again: the window is empty"
    );
}

#[test]
fn a_probe_of_an_earlier_half_open_gives_no_place_back_and_closes_nothing() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", config("volume=1,probes=3"), clock.0);
    half_open(&breaker, clock.at(5_000));
    let [one, two, three] = [0; 3].map(|_| breaker.try_acquire(clock.at(5_000)).unwrap());
    one.failure(clock.at(5_000));
    let again = clock.at(10_000);
    let probes: Vec<_> = (0..3).map(|_| breaker.try_acquire(again).unwrap()).collect();
    drop(two);
    three.success(again);
    assert!(breaker.try_acquire(again).is_err(), "all places are taken");
    assert_eq!(breaker.snapshot(again).probes, 3);
    drop(probes);
}

#[test]
fn a_closed_breaker_has_forgotten_what_opened_it() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", config("volume=4,sleep=100ms,probes=1,window=10s"), clock.0);
    open(&breaker, clock.0);
    breaker.try_acquire(clock.at(100)).unwrap().success(clock.at(100));
    for _ in 0..3 {
        breaker.try_acquire(clock.at(100)).unwrap().failure(clock.at(100));
        assert_eq!(breaker.state(clock.at(100)), State::Closed);
    }
    assert_eq!(breaker.snapshot(clock.at(100)).error_count, 3);
}

// Many threads.

#[test]
fn thirty_two_threads_never_have_more_than_three_probes_under_way_and_do_have_three() {
    let clock = Clock::new();
    let breaker = &Breaker::new("a", Config::default(), clock.0);
    half_open(breaker, clock.at(5_000));
    let now = clock.at(5_000);
    let (outstanding, most, admitted) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicU64::new(0));
    let start = Barrier::new(32);
    std::thread::scope(|scope| {
        for thread in 0..32 {
            let (outstanding, most, admitted, start) = (&outstanding, &most, &admitted, &start);
            scope.spawn(move || {
                start.wait();
                for call in 0..count(100_000) {
                    let Ok(permit) = breaker.try_acquire(now) else { continue };
                    let under_way = outstanding.fetch_add(1, Ordering::SeqCst) + 1;
                    most.fetch_max(under_way, Ordering::SeqCst);
                    admitted.fetch_add(1, Ordering::SeqCst);
                    // Held while others run, sometimes: else one thread's turn is too short to meet anybody.
                    if (call + thread) % 7 == 0 {
                        std::thread::yield_now();
                    }
                    outstanding.fetch_sub(1, Ordering::SeqCst);
                    permit.release();
                }
            });
        }
    });
    let most = most.into_inner();
    println!("{} calls admitted of {}, at most {most} at once", admitted.into_inner(), 32 * count(100_000));
    assert_eq!((most, breaker.state(now), breaker.snapshot(now).probes), (3, State::HalfOpen, 0));
}

#[test]
fn threads_that_probe_with_all_results_never_exceed_the_places_nor_lose_one() {
    let clock = Clock::new();
    let breaker = &Breaker::new("a", config("volume=1,sleep=1ms,probes=3"), clock.0);
    let time = &AtomicU64::new(0);
    let (most, outstanding) = (&AtomicUsize::new(0), &AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for thread in 0..8_usize {
            scope.spawn(move || {
                for call in 0..count(50_000) {
                    let now = clock.at(time.fetch_add(1, Ordering::Relaxed) / 4);
                    let Ok(permit) = breaker.try_acquire(now) else { continue };
                    if !permit.is_probe() {
                        permit.failure(now);
                        continue;
                    }
                    most.fetch_max(outstanding.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    outstanding.fetch_sub(1, Ordering::SeqCst);
                    match (thread + call) % 5 {
                        0 => permit.failure(now),
                        1 => drop(permit),
                        _ => permit.success(now),
                    }
                }
            });
        }
    });
    let now = clock.at(time.load(Ordering::Relaxed));
    let snapshot = breaker.snapshot(now);
    println!("{snapshot:?}");
    assert!(most.load(Ordering::SeqCst) <= 3 && snapshot.probes == 0);
    assert!(snapshot.opened_total > 10 && snapshot.closed_total > 0);
    let differences = snapshot.opened_total + snapshot.closed_total;
    assert!(snapshot.half_opened_total <= snapshot.opened_total && snapshot.closed_total < differences);
}

#[test]
fn of_the_failures_of_many_threads_the_last_one_needed_opens_it_once() {
    for _ in 0..count(2_000) {
        let clock = Clock::new();
        let breakers = Breakers::new(config("volume=4,percent=100"), clock.0);
        let breaker = &breakers.get("a");
        let start = &Barrier::new(4);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(move || {
                    let permit = breaker.try_acquire(clock.0).unwrap();
                    start.wait();
                    permit.failure(clock.0);
                });
            }
        });
        assert_eq!((breaker.state(clock.0), breakers.opened_total()), (State::Open, 1));
    }
}

#[test]
fn of_two_who_ask_for_a_key_at_once_both_get_the_same_breaker() {
    let clock = Clock::new();
    let breakers = &Breakers::new(Config::default(), clock.0);
    let pairs = count(20_000);
    let arrived = &AtomicUsize::new(0);
    let ask = move || {
        let each = |pair: usize| {
            let key = pair.to_string();
            // Both leave within a few cycles, if both have a processor; woken from a barrier they would not meet.
            arrived.fetch_add(1, Ordering::SeqCst);
            let mut spins = 0_u32;
            while arrived.load(Ordering::SeqCst) < 2 * (pair + 1) {
                spins += 1;
                if spins.is_multiple_of(1 << 12) {
                    std::thread::yield_now();
                }
                std::hint::spin_loop();
            }
            breakers.get(&key)
        };
        (0..pairs).map(each).collect::<Vec<_>>()
    };
    let (one, two) = std::thread::scope(|scope| {
        let other = scope.spawn(ask);
        (ask(), other.join().unwrap())
    });
    let different = one.iter().zip(&two).filter(|(one, two)| !Arc::ptr_eq(one, two)).count();
    assert_eq!((different, breakers.snapshot(clock.0).len()), (0, pairs));
}

// The registry.

#[test]
fn a_removed_key_has_no_series_and_is_new_when_it_comes_back_but_its_openings_stay_counted() {
    let clock = Clock::new();
    let breakers = Breakers::new(config("volume=1"), clock.0);
    open(&breakers.get("a"), clock.0);
    let held = breakers.get("b");
    assert!(breakers.remove("a") && breakers.remove("b") && !breakers.remove("b"));
    assert_eq!((breakers.snapshot(clock.0).len(), breakers.opened_total()), (0, 1));
    open(&held, clock.0);
    assert_eq!(breakers.opened_total(), 2);
    assert_eq!(breakers.get("a").state(clock.0), State::Closed);
    assert_eq!(breakers.snapshot(clock.0)[0].opened_total, 0);
}

#[test]
fn a_snapshot_after_the_sleep_shows_half_open_and_changes_nothing() {
    let clock = Clock::new();
    let breakers = Breakers::new(config("volume=2"), clock.0);
    open(&breakers.get("a"), clock.0);
    let at = |ms| breakers.snapshot(clock.at(ms)).remove(0);
    let open = at(1_000);
    assert_eq!((open.state, open.state.gauge(), open.remaining_open_ms), (State::Open, 1, 4_000));
    assert_eq!((open.error_count, open.total_count, open.half_opened_total), (2, 2, 0));
    let due = at(5_000);
    assert_eq!((due.state, due.state.gauge(), due.remaining_open_ms), (State::HalfOpen, 2, 0));
    assert_eq!((due.half_opened_total, due.opened_total), (1, 1));
    assert_eq!(at(1_000), open);
    let _probe = breakers.get("a").try_acquire_owned(clock.at(5_000)).unwrap();
    assert_eq!((at(5_000).half_opened_total, at(5_000).probes), (1, 1), "counted once");
}

// Outliving the process.

fn restored(text: &str, age_ms: u64) -> (Breakers, Clock) {
    let clock = Clock::new();
    let breakers = Breakers::new(Config::default(), clock.0);
    let records: Vec<Record> = serde_json::from_str(text).expect("records");
    breakers.import(&records, Duration::from_millis(age_ms), clock.0);
    (breakers, clock)
}

/// Until when the only breaker stays open, in milliseconds; `None`: closed.
fn opens_for(text: &str, age_ms: u64) -> Option<u64> {
    let (breakers, clock) = restored(text, age_ms);
    let snapshot = breakers.snapshot(clock.0).remove(0);
    (snapshot.state != State::Closed).then_some(snapshot.remaining_open_ms)
}

#[test]
fn an_open_breaker_stays_open_for_what_remains_and_never_longer_than_its_sleep() {
    let open =
        |remaining: &str| format!(r#"[{{"peer":"a","state":"open","remaining_open_ms":{remaining}}}]"#);
    assert_eq!(opens_for(&open("4000"), 0), Some(4_000));
    assert_eq!(opens_for(&open("4000"), 1_500), Some(2_500));
    assert_eq!(opens_for(&open("4000"), 4_000), Some(0));
    assert_eq!(opens_for(&open("4000"), u64::MAX), Some(0));
    for garbage in ["18446744073709551615", "1e300", "99999999999999999999999", "5001"] {
        assert_eq!(opens_for(&open(garbage), 0), Some(5_000), "{garbage}");
        assert_eq!(opens_for(&open(garbage), 5_000), Some(0), "{garbage}");
    }
    for garbage in ["-1", "-1e300", "0.5"] {
        assert_eq!(opens_for(&open(garbage), 0), Some(0), "{garbage}");
    }
}

#[test]
fn a_record_of_a_system_that_knew_no_remaining_time_half_opens_after_the_rest_of_a_sleep() {
    let legacy = r#"[{"peer":"10.0.0.7:8443","state":"Open","error_count":12,"total_count":20}]"#;
    assert_eq!(opens_for(legacy, 0), Some(5_000));
    assert_eq!(opens_for(legacy, 3_000), Some(2_000));
    assert_eq!(opens_for(legacy, 60_000), Some(0));
    for absent in ["null", "\"soon\"", "[]", "{}", "true"] {
        let text = format!(r#"[{{"peer":"a","state":"OPEN","remaining_open_ms":{absent}}}]"#);
        assert_eq!(opens_for(&text, 1_000), Some(4_000), "{absent}");
    }
    for half in ["HalfOpen", "half_open", "HALF-OPEN", "Half Open"] {
        let text = format!(r#"[{{"peer":"a","state":"{half}","remaining_open_ms":9000}}]"#);
        assert_eq!(opens_for(&text, 0), Some(0), "{half}");
    }
}

#[test]
fn what_was_closed_comes_back_closed_and_empty_and_what_is_not_understood_too() {
    for state in [r#""closed""#, r#""Closed""#, r#""melted""#, "7", "null"] {
        let text =
            format!(r#"[{{"peer":"a","state":{state},"error_count":19,"total_count":19,"more":[1]}}]"#);
        let (breakers, clock) = restored(&text, 0);
        assert!(breakers.snapshot(clock.0).is_empty(), "made when it is asked for: {state}");
        let snapshot = breakers.get("a").snapshot(clock.0);
        assert_eq!((snapshot.state, snapshot.total_count), (State::Closed, 0), "{state}");
    }
    let (breakers, clock) = restored(r#"[{}, {"state":"open"}, {"peer":7,"state":"open"}]"#, 0);
    assert!(breakers.snapshot(clock.0).is_empty(), "no key, no breaker");
}

#[test]
fn probes_that_do_not_end_lose_their_places_a_sleep_after_the_last_began_and_say_nothing_any_more() {
    let clock = Clock::new();
    let breaker = Breaker::new("a", Config::default(), clock.0);
    half_open(&breaker, clock.at(5_000));
    let hanging: Vec<_> = [5_000, 5_500, 6_000].map(|ms| breaker.try_acquire(clock.at(ms)).unwrap()).into();
    assert_eq!(breaker.try_acquire(clock.at(10_999)).unwrap_err().state, State::HalfOpen);
    let fresh: Vec<_> = (0..3).map(|_| breaker.try_acquire(clock.at(11_000)).unwrap()).collect();
    assert!(breaker.try_acquire(clock.at(11_000)).is_err(), "no more than three at a time");
    // Neither their failures nor their successes, nor their places.
    for (late, failed) in hanging.into_iter().zip([true, false, true]) {
        if failed { late.failure(clock.at(11_001)) } else { late.success(clock.at(11_001)) }
    }
    assert_eq!(breaker.snapshot(clock.at(11_001)).probes, 3);
    fresh.into_iter().for_each(|probe| probe.success(clock.at(11_002)));
    let snapshot = breaker.snapshot(clock.at(11_002));
    assert_eq!((snapshot.state, snapshot.half_opened_total, snapshot.closed_total), (State::Closed, 1, 1));
}

#[test]
fn restored_breakers_half_open_probe_and_close_like_any_other_and_are_not_counted_as_opened() {
    let (breakers, clock) = restored(
        r#"[{"peer":"a","state":"open","remaining_open_ms":1000},{"peer":"b","state":"half_open"}]"#,
        0,
    );
    assert_eq!(breakers.opened_total(), 0);
    assert!(breakers.get("a").try_acquire(clock.at(999)).is_err());
    for (key, now) in [("a", clock.at(1_000)), ("b", clock.0)] {
        let breaker = breakers.get(key);
        assert_eq!(breaker.snapshot(clock.0).opened_total, 0);
        let probes: Vec<_> = (0..3).map(|_| breaker.try_acquire(now).unwrap()).collect();
        assert!(breaker.try_acquire(now).is_err());
        probes.into_iter().for_each(|probe| probe.success(now));
        assert_eq!(breaker.state(now), State::Closed);
    }
}

#[test]
fn an_import_keeps_keys_apart_and_leaves_a_breaker_that_knows_better_alone() {
    let clock = Clock::new();
    let breakers = Breakers::new(config("volume=1"), clock.0);
    let busy = breakers.get("busy");
    busy.try_acquire(clock.0).unwrap().success(clock.0);
    let opened = breakers.get("opened");
    open(&opened, clock.0);
    let text = r#"[{"peer":"busy","state":"open"},{"peer":"opened","state":"half_open"},{"peer":"A","state":"open"},
                   {"peer":"a","state":"half_open"},{"peer":"a ","state":"closed"},{"peer":"a ","state":"open"}]"#;
    let records: Vec<Record> = serde_json::from_str(text).unwrap();
    assert_eq!(breakers.import(&records, Duration::ZERO, clock.0), 2);
    let states: Vec<_> =
        breakers.snapshot(clock.0).iter().map(|one| (one.peer.to_string(), one.state)).collect();
    let expected =
        [("A", State::Open), ("a", State::HalfOpen), ("busy", State::Closed), ("opened", State::Open)];
    assert_eq!(states, expected.map(|(key, state)| (key.to_owned(), state)));
}

#[test]
fn what_is_exported_has_the_documented_fields_and_imports_as_it_was() {
    let clock = Clock::new();
    let breakers = Breakers::new(config("volume=2"), clock.0);
    breakers.get("closed");
    open(&breakers.get("open"), clock.0);
    let exported = breakers.export(clock.at(1_000));
    let text = serde_json::to_string(&exported).unwrap();
    assert_eq!(
        text,
        r#"[{"peer":"closed","state":"closed","remaining_open_ms":0,"error_count":0,"total_count":0},{"peer":"open","state":"open","remaining_open_ms":4000,"error_count":2,"total_count":2}]"#
    );
    assert_eq!(
        opens_for(&format!("[{}]", &text[text.find("},{").unwrap() + 2..text.len() - 1]), 500),
        Some(3_500)
    );
}

// Against a model so simple that it can be believed.

const VOLUME: usize = 4;
const PROBES: usize = 2;
const NAP: u64 = 2_000;

/// What a breaker must do, as a list of calls and a few variables. Times are in milliseconds.
struct Model {
    state: Mode,
    generation: u64,
    opened: u64,
}

enum Mode {
    Closed { calls: Vec<(u64, bool)> },
    Open { until: u64 },
    HalfOpen { outstanding: usize, successes: usize, last: u64 },
}

impl Model {
    fn go(&mut self, state: Mode) {
        self.state = state;
        self.generation += 1;
    }

    fn open(&mut self, now: u64) {
        self.go(Mode::Open { until: now + NAP });
        self.opened += 1;
    }

    fn acquire(&mut self, now: u64) -> Result<u64, Rejected> {
        let rejected = |state, ms| Err(Rejected { state, retry_after: Duration::from_millis(ms) });
        match &mut self.state {
            Mode::Closed { .. } => {}
            Mode::Open { until } if now < *until => return rejected(State::Open, *until - now),
            Mode::HalfOpen { outstanding, last, .. } if *outstanding < PROBES => {
                (*outstanding, *last) = (*outstanding + 1, now);
            }
            Mode::HalfOpen { last, .. } if now < *last + NAP => return rejected(State::HalfOpen, 0),
            Mode::Open { .. } | Mode::HalfOpen { .. } => {
                self.go(Mode::HalfOpen { outstanding: 1, successes: 0, last: now });
            }
        }
        Ok(self.generation)
    }

    fn settle(&mut self, generation: u64, class: Class, now: u64) {
        if generation != self.generation {
            return;
        }
        match (&mut self.state, class) {
            (Mode::Closed { .. }, Class::Ignored) | (Mode::Open { .. }, _) => {}
            (Mode::Closed { calls }, class) => {
                calls.push((now, class == Class::Failure));
                let held: Vec<_> = calls.iter().filter(|(at, _)| now / 1000 - at / 1000 <= 15).collect();
                let failures = held.iter().filter(|(_, failed)| *failed).count();
                if class == Class::Failure && held.len() >= VOLUME && failures * 2 >= held.len() {
                    self.open(now);
                }
            }
            (Mode::HalfOpen { .. }, Class::Failure) => self.open(now),
            (Mode::HalfOpen { outstanding, successes, .. }, class) => {
                *outstanding -= 1;
                *successes += usize::from(class == Class::Success);
                if *successes == PROBES {
                    self.go(Mode::Closed { calls: Vec::new() });
                }
            }
        }
    }

    fn state(&self, now: u64) -> State {
        match self.state {
            Mode::Closed { .. } => State::Closed,
            Mode::Open { until } if now < until => State::Open,
            Mode::Open { .. } | Mode::HalfOpen { .. } => State::HalfOpen,
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Wait(u64),
    Acquire,
    Settle(usize, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        1 => (0_u64..1_500).prop_map(Step::Wait),
        1 => (0_u64..20_000).prop_map(Step::Wait),
        8 => Just(Step::Acquire),
        8 => (any::<usize>(), 0_u8..4).prop_map(|(which, result)| Step::Settle(which, result)),
    ];
    proptest::collection::vec(step, 0..300)
}

proptest! {
    #[test]
    fn it_does_what_the_model_does(steps in steps()) {
        let clock = Clock::new();
        // A window of 15 s has slots of one second.
        let text = format!("percent=50,volume={VOLUME},sleep={NAP}ms,probes={PROBES},window=15s");
        let breakers = Breakers::new(config(&text), clock.0);
        let breaker = breakers.get("a");
        let mut model = Model { state: Mode::Closed { calls: Vec::new() }, generation: 0, opened: 0 };
        let mut now = 0;
        let mut permits: Vec<(OwnedPermit, u64)> = Vec::new();
        for step in steps {
            let at = clock.at(now);
            match step {
                Step::Wait(ms) => now += ms,
                Step::Acquire => match (breaker.try_acquire_owned(at), model.acquire(now)) {
                    (Ok(permit), Ok(generation)) => permits.push((permit, generation)),
                    (Err(rejected), Err(expected)) => prop_assert_eq!(rejected, expected),
                    (real, expected) => prop_assert!(false, "{:?} where {:?} was expected", real, expected),
                },
                Step::Settle(which, result) if !permits.is_empty() => {
                    let (permit, generation) = permits.swap_remove(which % permits.len());
                    let class = match result {
                        0 | 1 => { permit.failure(at); Class::Failure }
                        2 => { permit.success(at); Class::Success }
                        _ => { drop(permit); Class::Ignored }
                    };
                    model.settle(generation, class, now);
                }
                Step::Settle(..) => {}
            }
            let snapshot = breaker.snapshot(clock.at(now));
            prop_assert_eq!((snapshot.state, snapshot.opened_total), (model.state(now), model.opened));
            prop_assert_eq!(breakers.opened_total(), model.opened);
            if let Mode::HalfOpen { outstanding, .. } = model.state {
                prop_assert_eq!(snapshot.probes as usize, outstanding);
            }
        }
    }

    #[test]
    fn a_restored_breaker_is_never_open_longer_than_it_would_have_been(
        remaining in any::<Option<u64>>(), age in any::<u64>(), half in any::<bool>(), waited in 0_u64..6_000,
    ) {
        let clock = Clock::new();
        let breakers = Breakers::new(Config::default(), clock.0);
        let state = if half { State::HalfOpen } else { State::Open };
        let record = Record { peer: "a".into(), state, remaining_open_ms: remaining, ..Record::default() };
        breakers.import(&[record], Duration::from_millis(age), clock.0);
        let whole = if half { 0 } else { remaining.unwrap_or(5_000).min(5_000) };
        let left = whole.saturating_sub(age);
        let expected = if waited < left { State::Open } else { State::HalfOpen };
        prop_assert_eq!(breakers.get("a").state(clock.at(waited)), expected);
    }

    #[test]
    fn no_file_makes_the_reader_panic_and_keys_stay_distinct(
        records in proptest::collection::vec((".{0,3}", ".{0,6}", any::<f64>()), 0..20),
    ) {
        let json: Vec<_> = records
            .iter()
            .map(|(peer, state, number)| serde_json::json!({ "peer": peer, "state": state, "total_count": number }))
            .collect();
        let records: Vec<Record> = serde_json::from_value(json.into()).unwrap();
        let breakers = Breakers::new(Config::default(), Instant::now());
        breakers.import(&records, Duration::ZERO, Instant::now());
        let mut keys = BTreeSet::new();
        let first = records.iter().filter(|record| !record.peer.is_empty() && keys.insert(&*record.peer));
        let not_closed = first.filter(|record| record.state != State::Closed).count();
        prop_assert_eq!(breakers.snapshot(Instant::now()).len(), not_closed);
    }
}
