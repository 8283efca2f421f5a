//! The lame duck's policies, on our accept loop and through the proxy.

use std::net::SocketAddr;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::client::{Connection, get, post, status_until};
use shutdown_tests::process::Stopwatch;
use shutdown_tests::states::{Kind, Service};

fn in_phase(admin: SocketAddr, phase: &str) {
    status_until(admin, |status| status["phase"] == phase);
}

/// In the lame duck a GET is served and a POST refused; before, both are served.
fn read_only(kind: Kind) {
    let env = [("SHUTDOWN_LAME_DUCK", "1"), ("SHUTDOWN_LAME_DUCK_POLICY", "read-only")];
    let mut service = Service::start(kind, env);
    let (listen, admin) = (service.listen, service.admin);
    let mut kept = Connection::open(listen).expect("it serves");
    kept.send("POST", "/echo", "").expect("it reads");
    let answer = kept.answer().expect("answers");
    assert_eq!((answer.status, answer.header("retry-after")), (200, None), "{answer:?}");
    assert_ne!(answer.header("connection"), Some("close"), "{answer:?}");

    status_until(admin, |status| status["requests"]["active"] == 0);
    service.process.signal(Signal::TERM);
    in_phase(admin, "lame_duck");
    let read = get(listen, "/").expect("served in the lame duck");
    assert_eq!((read.status, read.header("connection")), (200, Some("close")), "{read:?}");
    kept.send("POST", "/echo", "").expect("kept");
    for write in [kept.answer().expect("answered"), post(listen, "/echo", "").expect("answered")] {
        assert_eq!(write.status, 503, "{write:?}");
        assert_eq!((write.header("retry-after"), write.header("connection")), (Some("1"), Some("close")));
    }
    assert_eq!(kept.closed().expect("closed, not reset"), b"");
    assert_eq!(service.process.exit_code(PATIENCE), 0);
    let report = service.report();
    assert_eq!((&report["requests"]["refused"], &report["requests"]["drained"]), (&2.into(), &1.into()));
}

#[test]
fn read_only_refuses_what_may_change_something_from_the_signal_on() {
    read_only(Kind::Serve);
}

#[test]
fn read_only_refuses_what_may_change_something_through_the_proxy_too() {
    read_only(Kind::EdgeProxy);
}

/// The share of answers that ask their client to leave grows with the lame duck, in a straight line.
fn gradual(kind: Kind) {
    const WINDOW: Duration = Duration::from_secs(3);
    const FIFTHS: usize = 5;
    let env = [("SHUTDOWN_LAME_DUCK", "3"), ("SHUTDOWN_LAME_DUCK_POLICY", "gradual")];
    let mut service = Service::start(kind, env);
    let mut connection = Connection::open(service.listen).expect("it serves");
    let ask = |connection: &mut Connection| {
        connection.send("GET", "/", "").expect("it reads");
        let answer = connection.answer().expect("answers");
        assert_eq!(answer.status, 200, "{answer:?}");
        let close = answer.header("connection") == Some("close");
        if close {
            *connection = Connection::open(service.listen).expect("accepted in the lame duck");
        }
        close
    };
    assert!((0..20).all(|_| !ask(&mut connection)), "nobody is asked before the signal");

    let begin = Stopwatch::start();
    service.process.signal(Signal::TERM);
    in_phase(service.admin, "lame_duck");
    let mut fifths = [(0_u32, 0_u32); FIFTHS];
    // The last moments are left out: a connection opened then may be met by Draining.
    while begin.elapsed() < WINDOW - Duration::from_millis(100) {
        let asked = begin.elapsed();
        let close = ask(&mut connection);
        let (closed, all) = &mut fifths[asked.as_millis() as usize * FIFTHS / WINDOW.as_millis() as usize];
        *all += 1;
        *closed += u32::from(close);
    }
    drop(connection);
    assert_eq!(service.process.exit_code(PATIENCE), 0);
    for (fifth, (closed, all)) in fifths.into_iter().enumerate() {
        let share = f64::from(closed) / f64::from(all);
        // The middle of the fifth.
        let wanted = (fifth as f64 + 0.5) / FIFTHS as f64;
        println!(
            "{kind}, fifth {}: {share:.3} of {all} answers asked to leave, {wanted:.1} wanted",
            fifth + 1
        );
        assert!((share - wanted).abs() <= 0.1 && all >= 50, "{fifths:?}");
    }
}

#[test]
fn gradual_asks_a_share_of_clients_that_grows_in_a_straight_line() {
    gradual(Kind::Serve);
}

#[test]
fn gradual_asks_a_growing_share_through_the_proxy_too() {
    gradual(Kind::EdgeProxy);
}
