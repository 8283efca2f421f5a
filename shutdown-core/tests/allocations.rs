//! A request costs no memory: the guard is one pointer, and counting it in and out allocates nothing.

use shutdown_core::{RequestGuard, ShutdownCoordinator};

#[test]
fn a_request_allocates_nothing_and_its_guard_is_eight_bytes() {
    let (shutdown, _driver) = ShutdownCoordinator::builder().build().unwrap();
    let counted = allocation_counter::measure(|| {
        for _ in 0..10_000 {
            drop(shutdown.request_start());
        }
    });
    assert_eq!((counted.count_total, counted.bytes_total), (0, 0));
    assert_eq!(size_of::<RequestGuard>(), 8);

    // The control: a named request may allocate, and the counter sees it.
    let named = allocation_counter::measure(|| drop(shutdown.request_start_named(String::from("GET /"))));
    assert!(named.count_total > 0);
}

#[test]
fn a_refused_request_and_a_look_at_the_phase_allocate_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (shutdown, driver) = ShutdownCoordinator::builder().build().unwrap();
    shutdown.initiate_shutdown(shutdown_core::Reason::requested("a test"));
    runtime.block_on(driver.run());
    let counted = allocation_counter::measure(|| {
        for _ in 0..10_000 {
            assert!(shutdown.request_start().is_err());
            assert!(shutdown.is_shutting_down());
        }
    });
    assert_eq!((counted.count_total, counted.bytes_total), (0, 0));
}
