//! Clients that speak HTTP/2.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use super::{State, Visit, tell_end};
use crate::PATIENCE;
use crate::client::Connection;
use crate::h2raw::{Client, PREFACE};

/// All of them.
pub const STATES: [State; 8] = [
    State::new("h2: half of the preface", half_preface),
    State::new("h2: preface without SETTINGS", no_settings),
    State::new("h2: PING never acknowledged", no_ack),
    State::new("h2: PING never acknowledged, 500 ms handler", no_ack_in_flight),
    State::new("h2: PING never acknowledged, 100 kB wait for its window", no_ack_no_window),
    State::new("h2: 50 streams of 16 KiB in flight", fifty_streams),
    State::new("h2: HEADERS between the two GOAWAYs", between_goaways),
    State::new("h2: stream above the last id", above_the_last),
];

/// The highest stream number there is, which the first GOAWAY names (RFC 9113 §6.8).
const MAX: u32 = 0x7fff_ffff;

fn half_preface(visit: &Visit) -> io::Result<String> {
    let mut connection = Connection::open(visit.listen)?;
    connection.raw(&PREFACE[..16])?;
    visit.connected(1);
    visit.term();
    Ok(tell_end(&mut connection))
}

fn connect(visit: &Visit) -> io::Result<Client<TcpStream>> {
    let stream = TcpStream::connect(visit.listen)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(Client::new(stream, "h2"))
}

fn no_settings(visit: &Visit) -> io::Result<String> {
    let mut client = connect(visit)?;
    client.raw(PREFACE)?;
    visit.connected(1);
    visit.term();
    client.read_until(|_| false);
    Ok(tell_over(&client))
}

fn no_ack(visit: &Visit) -> io::Result<String> {
    let mut client = connect(visit)?;
    client.hello()?;
    client.get(1, "/")?;
    client.read_until(|client| client.got(1).ended);
    visit.in_flight(0);
    visit.term();
    client.read_until(|_| false);
    Ok(format!("{}, {}", tell_stream(visit, &client, 1, "/"), tell_over(&client)))
}

fn no_ack_in_flight(visit: &Visit) -> io::Result<String> {
    let mut client = connect(visit)?;
    client.hello()?;
    client.get(1, "/slow?ms=500")?;
    visit.in_flight(1);
    visit.term();
    client.read_until(|_| false);
    Ok(format!("{}, {}", tell_stream(visit, &client, 1, "/slow?ms=500"), tell_over(&client)))
}

fn no_ack_no_window(visit: &Visit) -> io::Result<String> {
    const PATH: &str = "/bytes?n=100000";
    let mut client = connect(visit)?;
    client.hello()?;
    client.get(1, PATH)?;
    client.read_until(|client| client.got(1).body.len() == 65_535);
    visit.term();
    client.read_until(|_| false);
    Ok(format!("{}, {}", tell_stream(visit, &client, 1, PATH), tell_over(&client)))
}

fn fifty_streams(visit: &Visit) -> io::Result<String> {
    const PATH: &str = "/bytes?n=16384";
    let mut client = connect(visit)?;
    client.hello()?;
    let numbers = || (1..100).step_by(2);
    numbers().try_for_each(|number| client.get(number, PATH))?;
    // As much as the connection's window lets through (§6.9.2); the rest waits for us.
    let all = |client: &Client<_>| client.streams.values().map(|got| got.body.len()).sum::<usize>();
    assert!(client.read_until(|client| all(client) == 65_535), "{}", tell_over(&client));
    visit.term();
    visit.until(|status| status["requests"]["refusing"] == true);
    client.open_window(0, 1 << 20)?;
    finish(&mut client);
    let whole = numbers().filter(|number| tell_stream(visit, &client, *number, PATH) == "200").count();
    Ok(format!("{whole} x 200, {}", tell_over(&client)))
}

fn between_goaways(visit: &Visit) -> io::Result<String> {
    let mut client = connect(visit)?;
    client.hello()?;
    client.get(1, "/")?;
    client.read_until(|client| client.got(1).ended);
    visit.in_flight(0);
    visit.term();
    client.read_until(|client| !client.goaways.is_empty());
    client.get(3, "/")?;
    client.read_until(|client| client.got(3).ended);
    finish(&mut client);
    Ok(format!("{}, {}", tell_stream(visit, &client, 3, "/"), tell_over(&client)))
}

fn above_the_last(visit: &Visit) -> io::Result<String> {
    let mut client = connect(visit)?;
    client.hello()?;
    client.get(1, "/slow?ms=800")?;
    visit.in_flight(1);
    visit.term();
    client.read_until(|client| !client.pings.is_empty());
    let _ = client.answer_pings();
    client.read_until(|client| client.goaways.len() == 2);
    // A server that closes right after its last answer may be gone by now.
    let _ = client.get(3, "/");
    finish(&mut client);
    let (first, late) = (tell_stream(visit, &client, 1, "/slow?ms=800"), client.got(3));
    let late = match late.status {
        None => "above: no answer".to_owned(),
        Some(status) => format!("ABOVE: {status}"),
    };
    Ok(format!("{first}, {late}, {}", tell_over(&client)))
}

/// Reads to the end, answering PINGs.
pub(super) fn finish<S: Read + Write>(client: &mut Client<S>) {
    while client.read_until(|client| !client.pings.is_empty()) {
        // The end may have come in between.
        let _ = client.answer_pings();
    }
}

/// The answer to a request for `path`.
pub(super) fn tell_stream<S>(visit: &Visit, client: &Client<S>, number: u32, path: &str) -> String {
    let Some(got) = client.streams.get(&number) else { return "no stream".to_owned() };
    match (got.status, got.ended, got.reset) {
        (None, _, None) => "no answer".to_owned(),
        (_, _, Some(code)) => format!("reset with {code}"),
        (Some(_), false, _) => "no end".to_owned(),
        (Some(200), true, _) if !visit.is_whole(path, &got.body) => "200 BUT ANOTHER BODY".to_owned(),
        (Some(status), true, _) => status.to_string(),
    }
}

/// GOAWAYs and how the connection ended.
pub(super) fn tell_over<S>(client: &Client<S>) -> String {
    let goaways = client.goaways.iter().map(|(last, code)| {
        let last = if *last == MAX { "max".to_owned() } else { last.to_string() };
        if *code == 0 { format!("GOAWAY {last}") } else { format!("GOAWAY {last} (error {code})") }
    });
    let end = match client.over {
        None => "open".to_owned(),
        Some(None) => "closed".to_owned(),
        Some(Some(error)) => error.to_string(),
    };
    goaways.chain([end]).collect::<Vec<_>>().join(", ")
}
