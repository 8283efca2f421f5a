//! The laws of sessions and of lame-duck policies, on a stopped clock.
#![expect(clippy::unwrap_used, reason = "a test's helpers, like the test, fail by panicking")]

use std::sync::Arc;
use std::time::Duration;

use shutdown_core::{
    ConnectionGuard, ConnectionId, LameDuckPolicy, Outcome, Phase, Reason, Session, ShutdownConfig,
    ShutdownCoordinator, ShutdownReport, ShuttingDown, Urgency,
};
use tokio::time::{Instant, sleep, timeout};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn start(change: impl FnOnce(&mut ShutdownConfig)) -> ShutdownCoordinator {
    let mut config = ShutdownConfig::default();
    change(&mut config);
    let (shutdown, driver) = ShutdownCoordinator::builder().config(config).build().unwrap();
    tokio::spawn(driver.run());
    shutdown
}

async fn finish(shutdown: ShutdownCoordinator) -> (Arc<ShutdownReport>, Duration) {
    let begin = Instant::now();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    let report = timeout(ms(60_000), shutdown.finished()).await.expect("a shutdown ends within its total");
    (report, begin.elapsed())
}

/// A connection that carries a session.
fn carried(shutdown: ShutdownCoordinator, name: &'static str) -> (ConnectionGuard, Session) {
    let connection = shutdown.connection_start().unwrap();
    let session = shutdown.session_start(name).unwrap();
    session.carried_by(connection.id());
    (connection, session)
}

fn websockets(report: &ShutdownReport) -> Option<Outcome> {
    report.stages.iter().find(|stage| stage.stage == "websockets").map(|stage| stage.outcome)
}

#[tokio::test(start_paused = true)]
async fn without_sessions_their_stage_costs_nothing_and_is_not_reported() {
    let shutdown = start(|_| {});
    drop(shutdown.session_start("over").unwrap());
    let (report, took) = finish(shutdown).await;
    assert_eq!((took, websockets(&report), report.exit_code()), (Duration::ZERO, None, 0));
}

#[tokio::test(start_paused = true)]
async fn the_drain_waits_neither_for_a_session_nor_for_the_connection_that_only_carries_it() {
    let shutdown = start(|_| {});
    let (connection, session) = carried(shutdown, "chat");
    shutdown.initiate_shutdown(Reason::requested("a test"));
    let begin = Instant::now();
    shutdown.until(Phase::Closing).await;
    assert_eq!(begin.elapsed(), Duration::ZERO);
    assert_eq!((shutdown.active_session_count(), shutdown.open_connection_count()), (1, 1));
    drop((session, connection));
    let (report, _) = finish(shutdown).await;
    assert_eq!((websockets(&report), report.exit_code()), (Some(Outcome::Ok), 0));
    assert_eq!((report.sessions.open_at_start, report.sessions.cut), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_session_is_told_in_the_lame_duck_and_its_stage_ends_with_the_last_one() {
    let shutdown = start(|config| config.lame_duck = ms(1000));
    let (connection, session) = carried(shutdown, "chat");
    let begin = Instant::now();
    tokio::spawn(async move {
        session.told().await;
        assert!(begin.elapsed() <= ms(10), "{:?}", begin.elapsed());
        sleep(ms(1300)).await;
        drop((session, connection));
    });
    let (report, took) = finish(shutdown).await;
    assert!(took >= ms(1300) && took <= ms(1315), "{took:?}");
    assert_eq!((report.sessions.told, report.sessions.cut, report.exit_code()), (1, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_session_that_does_not_end_is_cut_when_its_stage_is_over_and_named() {
    let shutdown = start(|config| {
        config.graceful = ms(700);
        config.websocket = ms(2000);
    });
    let (connection, session) = carried(shutdown, "chat");
    // Holds the drain to its deadline, where everything is cut but sessions.
    let stuck = shutdown.connection_start().unwrap();
    let begin = Instant::now();
    let stuck = tokio::spawn(async move {
        stuck.handle().cut().await;
        begin.elapsed()
    });
    let kept = tokio::spawn(async move {
        connection.handle().cut().await;
        drop((session, connection));
        begin.elapsed()
    });
    let (report, _) = finish(shutdown).await;
    let (stuck, kept) = (stuck.await.unwrap(), kept.await.unwrap());
    assert!(stuck >= ms(700) && stuck <= ms(705), "{stuck:?}");
    assert!(kept >= ms(2700) && kept <= ms(2705), "{kept:?}");
    assert_eq!((websockets(&report), report.exit_code()), (Some(Outcome::TimedOut), 11));
    assert_eq!((report.connections.cut, report.sessions.cut), (1, 1));
    let cut = &report.sessions.cut_sessions[0];
    assert!(cut.name == "chat" && cut.age_ms >= 2700.0, "{cut:?}");
}

#[tokio::test(start_paused = true)]
async fn a_cut_session_alone_makes_the_exit_code_11() {
    let shutdown = start(|_| {});
    let _session = shutdown.session_start("chat").unwrap();
    let (report, took) = finish(shutdown).await;
    assert!(took >= ms(5000) && took <= ms(5025), "{took:?}");
    assert_eq!((report.connections.cut, report.sessions.cut, report.exit_code()), (0, 1, 11));
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_last_session_is_over_is_waited_for_again() {
    let shutdown = start(|config| config.graceful = ms(500));
    let (connection, first) = carried(shutdown, "first");
    let second = shutdown.session_start("second").unwrap();
    second.carried_by(connection.id());
    drop(first);
    assert!(connection.handle().carries_sessions());
    drop(second);
    assert!(!connection.handle().carries_sessions());
    let (report, _) = finish(shutdown).await;
    assert_eq!((report.connections.cut, report.sessions.cut), (1, 0));
    assert_eq!(websockets(&report), None);
    drop(connection);
}

#[tokio::test(start_paused = true)]
async fn a_session_is_counted_before_its_request_stops_being_one() {
    let shutdown = start(|_| {});
    let request = shutdown.request_start().unwrap();
    let session = shutdown.session_start("chat").unwrap();
    assert_eq!((shutdown.active_request_count(), shutdown.active_session_count()), (1, 1));
    drop(request);
    assert_eq!((shutdown.active_request_count(), shutdown.active_session_count()), (0, 1));
    drop(session);
    assert_eq!(shutdown.active_session_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_session_is_refused_once_its_stage_has_begun_and_not_before() {
    let shutdown = start(|config| config.lame_duck = ms(1000));
    let session = shutdown.session_start("early").unwrap();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::LameDuck).await;
    drop(shutdown.session_start("in the lame duck").unwrap());
    shutdown.until(Phase::Closing).await;
    sleep(ms(1)).await;
    assert_eq!(shutdown.session_start("late").unwrap_err(), ShuttingDown);
    drop(session);
}

#[tokio::test(start_paused = true)]
async fn many_sessions_are_told_over_the_window_and_not_at_once() {
    let shutdown = start(|config| config.session_window = ms(2000));
    let begin = Instant::now();
    let told: Vec<_> = (0..1000)
        .map(|_| {
            let session = shutdown.session_start("chat").unwrap();
            tokio::spawn(async move {
                session.told().await;
                // Told again: at once.
                session.told().await;
                begin.elapsed()
            })
        })
        .collect();
    let (report, _) = finish(shutdown).await;
    let mut slots = [0; 21];
    for told in told {
        slots[usize::try_from(told.await.unwrap().as_millis() / 100).unwrap()] += 1;
    }
    assert!(slots[..20].iter().all(|slot| (40..=60).contains(slot)), "{slots:?}");
    assert_eq!((report.sessions.told, report.sessions.cut), (1000, 0));
}

#[tokio::test(start_paused = true)]
async fn when_it_is_urgent_all_sessions_are_told_at_once() {
    let shutdown = start(|config| config.session_window = ms(2000));
    let begin = Instant::now();
    let told: Vec<_> = (0..1000)
        .map(|_| {
            let session = shutdown.session_start("chat").unwrap();
            tokio::spawn(async move {
                session.told().await;
                begin.elapsed()
            })
        })
        .collect();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    sleep(ms(50)).await;
    shutdown.terminate(Urgency::Fast);
    for told in told {
        assert!(told.await.unwrap() <= ms(52));
    }
}

#[tokio::test(start_paused = true)]
async fn an_immediate_end_cuts_sessions_and_says_so() {
    let shutdown = start(|_| {});
    let (_connection, session) = carried(shutdown, "chat");
    let begin = Instant::now();
    shutdown.terminate(Urgency::Immediate);
    session.cut().await;
    let report = shutdown.finished().await;
    assert!(begin.elapsed() <= ms(100), "{:?}", begin.elapsed());
    assert_eq!((report.sessions.cut, report.exit_code()), (1, 11));
}

#[tokio::test]
async fn the_connection_of_a_task_is_the_one_it_polled_last_and_none_elsewhere() {
    assert_eq!(ConnectionId::of_this_task(), None);
    let shutdown = start(|_| {});
    let io = |connection| shutdown_core::net::Io::new(tokio::io::empty(), shutdown, connection);
    let (one, two) = (shutdown.connection_start().unwrap(), shutdown.connection_start().unwrap());
    let (first, second) = (one.id(), two.id());
    assert_ne!(first, second);
    let (mut one, mut two) = (io(one), io(two));
    let here = tokio::spawn(async move {
        use tokio::io::AsyncReadExt;
        let mut buf = [0];
        let _ = one.read(&mut buf).await;
        assert_eq!(ConnectionId::of_this_task(), Some(first));
        let _ = two.read(&mut buf).await;
        assert_eq!(ConnectionId::of_this_task(), Some(second));
        // Another task on the same thread has polled none.
        tokio::spawn(async { ConnectionId::of_this_task() }).await.unwrap()
    });
    assert_eq!(here.await.unwrap(), None);
}

// Lame-duck policies.

#[tokio::test(start_paused = true)]
async fn a_read_only_lame_duck_turns_away_what_is_not_safe_and_only_then() {
    let shutdown = start(|config| {
        config.lame_duck = ms(1000);
        config.lame_duck_policy = LameDuckPolicy::ReadOnly;
    });
    assert!(!shutdown.turns_away(false) && !shutdown.turns_away(true));
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::LameDuck).await;
    assert!(shutdown.turns_away(false) && !shutdown.turns_away(true));
    let (report, _) = finish(shutdown).await;
    assert_eq!(report.requests.refused, 1);
}

#[tokio::test(start_paused = true)]
async fn without_a_policy_nothing_is_turned_away_and_every_answer_asks_to_leave() {
    let shutdown = start(|config| config.lame_duck = ms(1000));
    assert!(!shutdown.asks_to_leave());
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::LameDuck).await;
    assert!(shutdown.asks_to_leave() && !shutdown.turns_away(false));
}

#[tokio::test(start_paused = true)]
async fn a_gradual_lame_duck_asks_a_share_that_follows_the_straight_line() {
    let shutdown = start(|config| {
        config.lame_duck = ms(10_000);
        config.lame_duck_policy = LameDuckPolicy::Gradual;
    });
    assert!(!shutdown.asks_to_leave());
    shutdown.initiate_shutdown(Reason::requested("a test"));
    shutdown.until(Phase::LameDuck).await;
    for tenth in 0..10_u32 {
        sleep(ms(500)).await;
        let asked = (0..1000).filter(|_| shutdown.asks_to_leave()).count() as f64 / 1000.0;
        let line = (f64::from(tenth) + 0.5) / 10.0;
        assert!((asked - line).abs() < 0.02, "{tenth}: {asked}");
        sleep(ms(500)).await;
    }
    shutdown.until(Phase::Draining).await;
    assert!((0..100).all(|_| shutdown.asks_to_leave()));
}

#[tokio::test(start_paused = true)]
async fn gradually_connections_are_asked_to_leave_one_after_another() {
    let shutdown = start(|config| {
        config.lame_duck = ms(10_000);
        config.lame_duck_policy = LameDuckPolicy::Gradual;
    });
    let begin = Instant::now();
    let asked: Vec<_> = (0..100)
        .map(|_| {
            tokio::spawn(async move {
                shutdown.asked_to_leave().await;
                begin.elapsed()
            })
        })
        .collect();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    let mut first_half = 0;
    for asked in asked {
        let asked = asked.await.unwrap();
        assert!(asked <= ms(10_002), "{asked:?}");
        first_half += usize::from(asked <= ms(5_000));
    }
    assert!((48..=52).contains(&first_half), "{first_half}");
}

#[tokio::test(start_paused = true)]
async fn with_no_linger_a_connection_from_the_queue_still_has_time_for_its_first_request() {
    let shutdown = start(|config| config.linger = Duration::ZERO);
    let connection = shutdown.connection_start().unwrap();
    shutdown.initiate_shutdown(Reason::requested("a test"));
    sleep(ms(95)).await;
    drop(shutdown.request_start().expect("the first request"));
    sleep(ms(10)).await;
    assert_eq!(shutdown.request_start().unwrap_err(), ShuttingDown);
    drop(connection);
}
