//! What every client gets that is in the middle of something when the stop comes, and when the process is gone.
//!
//! The tables are the laws: state, what the client got, when the process was gone after TERM, its exit code, what its
//! report counts. Budgets: linger 300 ms, drain 2 s, stage WebSockets 1 s; a settling connection has 100 ms more.

use std::fmt::Write;
use std::sync::Mutex;
use std::time::Duration;

use shutdown_tests::states::{Kind, Measured, State, http1, http2, measure, sessions, tls};

/// The width of a deadline.
const TOLERANCE: Duration = Duration::from_millis(200);
/// How often a state is looked at alone whose process was late in the crowd: the machine may have been.
const AGAIN: usize = 3;

/// A row: the state, what its client gets, when the process is gone (ms), its exit code, what its report counts. What
/// may be one of two things has an `or` between them.
type Law = (&'static str, &'static str, u64, i32, &'static str);

/// Our own accept loop.
const SERVE: [Law; 23] = [
    ("connected, silent", "closed", 300, 0, ""),
    ("half of the first head", "closed", 400, 0, ""),
    ("idle", "closed", 300, 0, ""),
    ("idle, half of the next head", "closed", 300, 0, ""),
    ("half of the next head, the rest in the linger", "200 close, closed", 0, 0, "1 drained"),
    (
        "idle, a request after the linger",
        "503 close, closed; the other 200 close",
        1000,
        0,
        "1 drained, 1 refused",
    ),
    ("800 ms handler", "200 close, closed", 800, 0, "1 drained"),
    ("second request pipelined", "200, 200 close, closed", 150, 0, "2 drained"),
    ("100 requests pipelined", "99 x 200, 200 close, closed", 150, 0, "100 drained"),
    ("stalled upload", "closed", 2000, 11, "1 request cut, 1 connection cut, POST /echo"),
    ("64 MiB, reads no more", "a part, no end", 2000, 11, "1 connection cut"),
    ("h2: half of the preface", "closed", 300, 0, ""),
    ("h2: preface without SETTINGS", "GOAWAY max, closed", 400, 0, ""),
    ("h2: PING never acknowledged", "200, GOAWAY max, closed", 1000, 0, ""),
    ("h2: PING never acknowledged, 500 ms handler", "200, GOAWAY max, closed", 1500, 0, "1 drained"),
    (
        "h2: PING never acknowledged, 100 kB wait for its window",
        "no end, GOAWAY max, closed",
        2000,
        11,
        "1 connection cut",
    ),
    (
        "h2: 50 streams of 16 KiB in flight",
        "50 x 200, GOAWAY max, GOAWAY 99, closed",
        300,
        0,
        "46 drained or 47 drained",
    ),
    ("h2: HEADERS between the two GOAWAYs", "200, GOAWAY max, GOAWAY 3, closed", 0, 0, "1 drained"),
    (
        "h2: stream above the last id",
        "200, above: no answer, GOAWAY max, GOAWAY 1, closed",
        800,
        0,
        "1 drained",
    ),
    ("SSE", "the last event, a proper end", 0, 0, "1 told"),
    ("WebSocket, answers the Close", "message, Close 1001, closed", 500, 0, "1 told"),
    ("WebSocket, never answers", "message, Close 1001, closed", 1000, 11, "1 told, 1 session cut, GET /ws"),
    (
        "20 WebSockets, none answers",
        "message, Close 1001, closed",
        1000,
        11,
        "20 told, 20 session cut, GET /ws",
    ),
];

/// Stock `axum::serve`: where it differs from ours. It has one trigger for everything, so half a head and an HTTP/2
/// client that does not speak hold it to the deadline, GOAWAY comes when requests are over, and what is pipelined behind
/// the first answer is not answered; its `Connection: close` says so (RFC 9112 §9.6).
const STOCK: [Law; 7] = [
    ("half of the first head", "closed", 2000, 11, "1 connection cut"),
    ("second request pipelined", "200 close, closed", 150, 0, "1 drained"),
    ("100 requests pipelined", "0 x 200, 200 close, closed", 150, 0, "1 drained"),
    ("h2: preface without SETTINGS", "GOAWAY max, closed", 2000, 11, "1 connection cut"),
    ("h2: PING never acknowledged", "200, GOAWAY max, closed", 2000, 11, "1 connection cut"),
    (
        "h2: PING never acknowledged, 500 ms handler",
        "200, GOAWAY max, closed",
        2000,
        11,
        "1 drained, 1 connection cut",
    ),
    ("h2: HEADERS between the two GOAWAYs", "503, GOAWAY max, GOAWAY 3, closed", 300, 0, "1 refused"),
];

/// The proxy: where it differs from our accept loop. It closes what is half said with the linger, answers one request of
/// a pipeline (and says so), gives an unanswered PING a second, and has nothing to say through a tunnel. Events that it
/// passes on are an answer like any other.
const EDGE_PROXY: [Law; 10] = [
    ("half of the first head", "closed", 300, 0, ""),
    ("second request pipelined", "200 close, closed", 150, 0, "1 drained"),
    ("100 requests pipelined", "0 x 200, 200 close, closed", 150, 0, "1 drained"),
    ("64 MiB, reads no more", "a part, no end", 2000, 11, "1 request cut, 1 connection cut, GET /bytes"),
    ("h2: preface without SETTINGS", "GOAWAY max, closed", 1000, 0, ""),
    (
        "h2: PING never acknowledged, 100 kB wait for its window",
        "no end, GOAWAY max, closed",
        2000,
        11,
        "1 request cut, 1 connection cut, GET /bytes",
    ),
    ("SSE", "no end", 2000, 11, "1 request cut, 1 connection cut, GET /sse"),
    ("WebSocket, answers the Close", "closed", 1000, 11, "1 session cut, GET /ws"),
    ("WebSocket, never answers", "closed", 1000, 11, "1 session cut, GET /ws"),
    ("20 WebSockets, none answers", "closed", 1000, 11, "20 session cut, GET /ws"),
];

const TLS: [Law; 4] = [
    ("TLS: silent", "closed", 300, 0, ""),
    ("TLS: handshake stalled", "closed", 300, 0, ""),
    ("TLS: 800 ms handler", "200 close, closed", 800, 0, "1 drained"),
    ("TLS, h2: 800 ms handler", "200, GOAWAY max, GOAWAY 1, closed", 800, 0, "1 drained"),
];

#[test]
fn on_our_accept_loop_every_state_ends_as_the_table_says() {
    hold(Kind::Serve, &[&http1::STATES[..], &http2::STATES, &sessions::STATES].concat(), &SERVE);
}

#[test]
fn on_stock_axum_serve_every_state_ends_as_the_table_says() {
    let laws = SERVE.map(|law| own(&STOCK, law));
    hold(Kind::Stock, &[&http1::STATES[..], &http2::STATES, &sessions::STATES].concat(), &laws);
}

#[test]
fn through_the_edge_proxy_every_state_ends_as_the_table_says() {
    let laws = SERVE.map(|law| own(&EDGE_PROXY, law));
    hold(Kind::EdgeProxy, &[&http1::STATES[..], &http2::STATES, &sessions::STATES].concat(), &laws);
}

#[test]
fn over_tls_a_stalled_handshake_ends_with_the_linger_and_what_is_in_flight_is_answered() {
    hold(Kind::Tls, &tls::STATES, &TLS);
}

/// The law of a kind, where it has one of its own.
fn own(differs: &[Law], law: Law) -> Law {
    differs.iter().find(|own| own.0 == law.0).copied().unwrap_or(law)
}

/// Measures every state, prints the table, and compares it with the laws.
fn hold(kind: Kind, states: &[State], laws: &[Law]) {
    // Side by side within one kind; two kinds at once would make each other late.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut rows = measure(kind, states);
    let mut table = format!("| {kind}: state | what the client got | gone after | exit | counts |\n");
    let mut broken = String::new();
    assert_eq!(rows.len(), laws.len());
    for ((row, state), law) in rows.iter_mut().zip(states).zip(laws) {
        for _ in 0..AGAIN {
            // What was late is looked at again, with all that it did: a machine that is late lets others time out.
            if is_in_time(row, law) {
                break;
            }
            println!("{kind}, {}: gone after {:?} in the crowd", row.state, row.gone);
            *row = measure(kind, &[*state]).remove(0);
        }
        let Measured { state, got, gone, code, counts, .. } = &*row;
        let _ = writeln!(table, "| {state} | {got} | {} ms | {code} | {counts} |", gone.as_millis());
        if !(holds(row, law) && is_in_time(row, law)) {
            let _ = writeln!(broken, "{law:?}, but: {row:?}");
        }
    }
    println!("{table}");
    assert!(broken.is_empty(), "{kind}:\n{broken}");
}

fn is_in_time(row: &Measured, (_, _, gone, ..): &Law) -> bool {
    row.gone.abs_diff(Duration::from_millis(*gone)) <= TOLERANCE
}

/// All but the time.
fn holds(row: &Measured, law: &Law) -> bool {
    let (state, got, _, code, counts) = *law;
    row.state == state
        && row.got == got
        && row.code == code
        && counts.split(" or ").any(|counts| row.counts == counts)
        && !row.panicked
}
