//! Thousands of WebSockets: told and closed in their turn, kept and cut through a proxy, never sent from one node that
//! leaves to another.

use std::process::Command;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use serde_json::Value;
use shutdown_tests::client::status_until;
use shutdown_tests::process::{EdgeProxy, Process, Service, binary};
use shutdown_tests::{PATIENCE, count};

/// Sees that this process and its children may open so many files.
fn need_descriptors(needed: u64) {
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    assert!(
        hard >= needed,
        "this takes {needed} file descriptors a process and the hard limit is {hard}: raise it (ulimit -Hn)"
    );
    if limit.current.is_some_and(|soft| soft < needed) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum: limit.maximum })
            .expect("the hard limit allows it");
    }
}

fn clients(count: usize, how: &str, nodes: &[String]) -> Process {
    let mut command = Command::new(binary("ws-clients"));
    Process::start_with_stdin(command.args([&count.to_string(), how]).args(nodes))
}

fn result(clients: &mut Process) -> Value {
    let line = clients.stdout_line(|line| line.starts_with('{'));
    assert_eq!(clients.exit_code(PATIENCE), 0, "{}", clients.stderr());
    serde_json::from_str(&line).expect("a line of JSON")
}

#[test]
fn every_websocket_gets_the_message_and_a_close_in_its_turn() {
    let many = count(10_000);
    need_descriptors(many as u64 + 200);
    let mut service = Service::start("axum-lines", [("SHUTDOWN_WEBSOCKET_TIMEOUT", "10")]);
    let mut clients = clients(many, "stay", &[service.listen.to_string()]);
    clients.stdout_line(|line| line == format!("connected {many}"));
    status_until(service.admin, |status| status["sessions"]["open"] == many);
    service.process.signal(Signal::TERM);
    let result = result(&mut clients);
    println!("{many} WebSockets on serve: {result}");
    assert_eq!(service.process.exit_code(PATIENCE), 0, "{}", service.process.stderr());
    let report = service.report();
    assert_eq!(result["closed_after_handshake"], 0);
    assert_eq!(
        (&result["message"], &result["close_1001"], &result["cut"]),
        (&many.into(), &many.into(), &0.into())
    );
    assert_eq!((&report["sessions"]["told"], &report["sessions"]["cut"]), (&many.into(), &0.into()));
    // In their turn: no tenth of a second has more than a fifth of them when there are enough to need the window.
    let spread = result["per_100_ms"].as_array().expect("counts");
    let most = spread.iter().filter_map(Value::as_u64).max().expect("counts");
    assert!(spread.len() >= 10.min(many / 20), "{spread:?}");
    assert!(many < 1000 || most <= many as u64 / 5, "{spread:?}");
}

#[test]
fn a_second_signal_cuts_the_politeness_short_and_no_websocket() {
    let many = 50;
    need_descriptors(1_000);
    let mut service = Service::start("axum-lines", [("SHUTDOWN_LAME_DUCK", "20")]);
    let mut clients = clients(many, "stay", &[service.listen.to_string()]);
    clients.stdout_line(|line| line == format!("connected {many}"));
    status_until(service.admin, |status| status["sessions"]["open"] == many);
    service.process.signal(Signal::TERM);
    status_until(service.admin, |status| status["phase"] == "lame_duck");
    service.process.signal(Signal::INT);
    let result = result(&mut clients);
    assert_eq!((&result["close_1001"], &result["cut"]), (&many.into(), &0.into()), "{result}");
    assert_eq!(service.process.exit_code(PATIENCE), 128 + 2, "{}", service.process.stderr());
    assert_eq!(service.report()["sessions"]["cut"], 0);
}

#[test]
fn websockets_through_the_proxy_are_kept_while_it_drains_and_cut_at_the_end_of_their_stage() {
    let many = count(4_000);
    // The demo upstream lives in the proxy's process: three ends of each.
    need_descriptors(3 * many as u64 + 500);
    let mut proxy = EdgeProxy::start([("SHUTDOWN_WEBSOCKET_TIMEOUT", "2")]);
    let mut clients = clients(many, "stay", &[proxy.listen.to_string()]);
    clients.stdout_line(|line| line == format!("connected {many}"));
    status_until(proxy.admin, |status| status["sessions"]["open"] == many);
    let mut stream = shutdown_tests::client::Connection::open(proxy.listen).expect("it serves");
    stream.send("GET", "/stream?ms=1000", "connection: close\r\n").expect("it reads");
    status_until(proxy.admin, |status| status["requests"]["active"] == 1);
    proxy.process.signal(Signal::TERM);
    assert!(stream.answer().expect("a request drains beside them").body.ends_with(b"chunk 20 of 20\n"));
    let status = status_until(proxy.admin, |status| status["phase"] == "closing");
    assert_eq!(status["sessions"]["open"], many, "kept to the end of the drain");
    let result = result(&mut clients);
    println!("{many} WebSockets through edge-proxy: {result}");
    assert_eq!(result["cut"], many);
    assert_eq!(proxy.process.exit_code(PATIENCE), 11, "{}", proxy.process.stderr());
    let report = proxy.report();
    assert_eq!((&report["sessions"]["cut"], &report["requests"]["cut"]), (&many.into(), &0.into()));
    assert_eq!(report["sessions"]["cut_sessions"][0]["name"], "GET /ws");
}

#[test]
fn when_two_nodes_leave_at_once_no_client_is_sent_from_one_to_the_other() {
    let many = count(1_500);
    need_descriptors(many as u64 + 500);
    // Longer than the clients' view of readiness is old.
    let start =
        || Service::start("axum-lines", [("SHUTDOWN_LAME_DUCK", "1"), ("SHUTDOWN_WEBSOCKET_TIMEOUT", "10")]);
    let (mut one, mut two, mut three) = (start(), start(), start());
    let nodes: Vec<_> = [&one, &two, &three].map(|node| format!("{}/{}", node.listen, node.admin)).into();
    // All on the two that will leave.
    let mut clients = clients(many, "move", &nodes);
    clients.stdout_line(|line| line == format!("connected {many}"));
    let open = |service: &Service| status_until(service.admin, |_| true)["sessions"]["open"].as_u64();
    let leaving = open(&one).zip(open(&two)).map(|(one, two)| one + two).expect("counts");
    one.process.signal(Signal::TERM);
    two.process.signal(Signal::TERM);
    assert_eq!(one.process.exit_code(PATIENCE), 0, "{}", one.process.stderr());
    assert_eq!(two.process.exit_code(PATIENCE), 0, "{}", two.process.stderr());
    status_until(three.admin, |status| status["sessions"]["open"] == many);
    clients.close_stdin();
    let result = result(&mut clients);
    println!("{many} WebSockets on three nodes, {leaving} on the two that left: {result}");
    assert_eq!((result["moves"].as_u64(), &result["moved_again"]), (Some(leaving), &0.into()));
    assert_eq!(result["failed"], serde_json::json!([]));
    three.process.signal(Signal::TERM);
    three.process.ended(PATIENCE);
}
