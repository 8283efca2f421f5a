//! Clients that speak HTTP/1, or have not said yet what they speak.

use std::io;

use super::{State, Visit, tell_end};
use crate::client::Connection;

/// All of them.
pub const STATES: [State; 11] = [
    State::new("connected, silent", silent),
    State::new("half of the first head", half_head),
    State::new("idle", idle),
    State::new("idle, half of the next head", half_next_head),
    State::new("half of the next head, the rest in the linger", rest_in_the_linger)
        .env(&[("SHUTDOWN_LINGER", "1")]),
    State::new("idle, a request after the linger", after_the_linger),
    State::new("800 ms handler", handler),
    State::new("second request pipelined", pipelined),
    State::new("100 requests pipelined", hundred_pipelined),
    State::new("stalled upload", stalled_upload),
    State::new("64 MiB, reads no more", reads_no_more),
];

fn silent(visit: &Visit) -> io::Result<String> {
    let mut connection = Connection::open(visit.listen)?;
    visit.connected(1);
    visit.term();
    Ok(tell_end(&mut connection))
}

fn half_head(visit: &Visit) -> io::Result<String> {
    let mut connection = Connection::open(visit.listen)?;
    connection.raw(b"GET / HT")?;
    visit.connected(1);
    visit.term();
    Ok(tell_end(&mut connection))
}

/// A connection that has had its first answer.
fn kept(visit: &Visit) -> io::Result<Connection> {
    let mut connection = Connection::open(visit.listen)?;
    connection.send("GET", "/", "")?;
    let first = visit.tell("/", connection.answer());
    assert_eq!(first, "200");
    visit.in_flight(0);
    Ok(connection)
}

fn idle(visit: &Visit) -> io::Result<String> {
    let mut connection = kept(visit)?;
    visit.term();
    Ok(tell_end(&mut connection))
}

fn half_next_head(visit: &Visit) -> io::Result<String> {
    let mut connection = kept(visit)?;
    connection.raw(b"GET / HTTP/1.1\r\nho")?;
    visit.term();
    Ok(tell_end(&mut connection))
}

fn rest_in_the_linger(visit: &Visit) -> io::Result<String> {
    let mut connection = kept(visit)?;
    connection.raw(b"GET / HTTP/1.1\r\nho")?;
    visit.term();
    visit.until(|status| status["phase"] == "draining");
    connection.raw(b"st: late\r\n\r\n")?;
    let answer = visit.tell("/", connection.answer());
    Ok(format!("{answer}, {}", tell_end(&mut connection)))
}

/// Another connection's request keeps the process, so the idle one stays and is told.
fn after_the_linger(visit: &Visit) -> io::Result<String> {
    let mut connection = kept(visit)?;
    let mut other = Connection::open(visit.listen)?;
    other.send("GET", "/slow?ms=1000", "")?;
    visit.in_flight(1);
    visit.term();
    visit.until(|status| status["requests"]["refusing"] == true);
    connection.send("GET", "/", "")?;
    let answer = visit.tell("/", connection.answer());
    let other = visit.tell("/slow?ms=1000", other.answer());
    Ok(format!("{answer}, {}; the other {other}", tell_end(&mut connection)))
}

fn handler(visit: &Visit) -> io::Result<String> {
    let mut connection = Connection::open(visit.listen)?;
    connection.send("GET", "/slow?ms=800", "")?;
    visit.in_flight(1);
    visit.term();
    let answer = visit.tell("/slow?ms=800", connection.answer());
    Ok(format!("{answer}, {}", tell_end(&mut connection)))
}

/// `first`, then requests for `/` right behind it.
fn pipeline(visit: &Visit, first: &str, behind: usize) -> io::Result<Connection> {
    let mut connection = Connection::open(visit.listen)?;
    let first = format!("GET {first} HTTP/1.1\r\nhost: first\r\n\r\n");
    connection.raw((first + &"GET / HTTP/1.1\r\nhost: behind\r\n\r\n".repeat(behind)).as_bytes())?;
    visit.in_flight(1);
    visit.term();
    Ok(connection)
}

fn pipelined(visit: &Visit) -> io::Result<String> {
    let mut connection = pipeline(visit, "/slow?ms=150", 1)?;
    let first = visit.tell("/slow?ms=150", connection.answer());
    if first == "200 close" {
        // RFC 9112 §9.6: nothing behind this answer was processed.
        return Ok(format!("{first}, {}", tell_end(&mut connection)));
    }
    let second = visit.tell("/", connection.answer());
    Ok(format!("{first}, {second}, {}", tell_end(&mut connection)))
}

fn hundred_pipelined(visit: &Visit) -> io::Result<String> {
    let mut connection = pipeline(visit, "/slow?ms=150", 99)?;
    let mut answers = vec![visit.tell("/slow?ms=150", connection.answer())];
    while answers.len() < 100 && answers.last().is_some_and(|answer| answer == "200") {
        answers.push(visit.tell("/", connection.answer()));
    }
    let plain = answers.iter().filter(|answer| *answer == "200").count();
    let last = answers.last().map_or("", String::as_str);
    Ok(format!("{plain} x 200, {last}, {}", tell_end(&mut connection)))
}

fn stalled_upload(visit: &Visit) -> io::Result<String> {
    let mut connection = Connection::open(visit.listen)?;
    connection.raw(b"POST /echo HTTP/1.1\r\nhost: stalled\r\ncontent-length: 1000\r\n\r\nten bytes.")?;
    visit.in_flight(1);
    visit.term();
    Ok(tell_end(&mut connection))
}

fn reads_no_more(visit: &Visit) -> io::Result<String> {
    let mut connection = Connection::open_small(visit.listen)?;
    connection.send("GET", "/bytes?n=67108864", "")?;
    let mut stopped = false;
    let answer = connection.answer_slowly(4096, |read| {
        if read > 0 && !stopped {
            stopped = true;
            visit.term();
            visit.gone();
        }
    });
    Ok(match answer {
        Ok(_) => "all of it".to_owned(),
        Err(_) => "a part, no end".to_owned(),
    })
}
