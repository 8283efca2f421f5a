//! A call through a closed breaker costs no memory: the permit is a pointer and a word.

use shutdown_core::breaker::{Breaker, Call, Config, Permit};
use tokio::time::Instant;

#[test]
fn a_call_through_a_closed_breaker_allocates_nothing_and_so_does_a_refusal() {
    let now = Instant::now();
    let config: Config = "volume=2,sleep=1000s".parse().unwrap();
    let breaker = Breaker::new("a", config, now);
    let closed = allocation_counter::measure(|| {
        for _ in 0..10_000 {
            breaker.try_acquire(now).unwrap().success(now);
            breaker.try_acquire(now).unwrap().record(Call::Status(404), now);
            drop(breaker.try_acquire(now));
        }
    });
    assert_eq!((closed.count_total, closed.bytes_total), (0, 0));
    assert_eq!(size_of::<Permit<&Breaker>>(), 16);

    let percent: Config = "volume=2,percent=1,sleep=1000s".parse().unwrap();
    let breaker = Breaker::new("b", percent, now);
    (0..2).for_each(|_| breaker.try_acquire(now).unwrap().failure(now));
    let open = allocation_counter::measure(|| {
        for _ in 0..10_000 {
            assert!(breaker.try_acquire(now).is_err());
        }
    });
    assert_eq!((open.count_total, open.bytes_total), (0, 0));

    // The control: making one may allocate, and the counter sees it.
    assert!(allocation_counter::measure(|| drop(Breaker::new("c", config, now))).count_total > 0);
}
