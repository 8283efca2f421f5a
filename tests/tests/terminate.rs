//! `POST /terminate` of a real edge-proxy: a hundred callers at once in every mode, callers who may not ask, callers who hang up
//! or read nothing, callers of every phase, and a browser whose pages try all that a page can.
//!
//! Needs Debian's package chromium.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use shutdown_tests::PATIENCE;
use shutdown_tests::browser::{Relay, Relayed, chromium};
use shutdown_tests::client::{Answer, Connection, get, post, status_until};
use shutdown_tests::judges::now_ms;
use shutdown_tests::process::{EdgeProxy, Stopwatch};
use socket2::{Domain, Protocol, Socket, Type};

const CALLERS: usize = 100;

/// As many callers as `requests` (path and header lines), all connected before the first asks, and then all at once.
fn at_once(admin: SocketAddr, requests: &[(&str, &str)]) -> Vec<Answer> {
    let barrier = Barrier::new(requests.len());
    let connections = requests.iter().map(|_| Connection::open(admin).expect("it serves"));
    let connections: Vec<_> = connections.collect();
    thread::scope(|scope| {
        let callers: Vec<_> = connections
            .into_iter()
            .zip(requests)
            .map(|(mut connection, (path, headers))| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    connection.send("POST", path, headers).expect("it reads");
                    connection.answer().unwrap_or_else(|error| panic!("{path}: {error}"))
                })
            })
            .collect();
        callers.into_iter().map(|caller| caller.join().expect("answered")).collect()
    })
}

fn a_hundred(admin: SocketAddr, path: &str, headers: &str) -> Vec<Answer> {
    at_once(admin, &[(path, headers); CALLERS])
}

/// A request in flight until its body's rest is sent.
fn half_a_request(proxy: &EdgeProxy) -> Connection {
    let mut request = Connection::open(proxy.listen).expect("it serves");
    request
        .raw(b"POST /echo HTTP/1.1\r\nhost: edge\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhe")
        .expect("it reads");
    status_until(proxy.admin, |status| status["requests"]["active"] == 1);
    request
}

fn the_rest(mut request: Connection) {
    request.raw(b"llo").expect("it reads");
    let answer = request.answer().expect("the request in flight is answered");
    assert_eq!((answer.status, &*answer.body), (200, &b"hello"[..]));
}

/// A WebSocket that lives: Pingora 0.9.1 closes some right after the handshake.
fn websocket(proxy: &EdgeProxy) -> TcpStream {
    const SHAKE: &[u8] = b"GET /ws HTTP/1.1\r\nhost: edge\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
                           sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let shake = || -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect(proxy.listen)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(SHAKE)?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.extend(byte);
        }
        // Masked with zeros, and echoed.
        stream.write_all(b"\x81\x81\0\0\0\0x")?;
        stream.read_exact(&mut [0; 3])?;
        Ok(stream)
    };
    (0..50).find_map(|_| shake().ok()).expect("one of so many lives")
}

fn is_running(proxy: &EdgeProxy) {
    let status = get(proxy.admin, "/status").expect("it serves").json();
    assert_eq!((&status["phase"], &status["signals"]), (&"running".into(), &0.into()));
    assert_eq!(get(proxy.admin, "/readyz").expect("it serves").status, 200);
    assert_eq!(get(proxy.listen, "/").expect("it serves").status, 200);
}

/// All got the report that is on disk, the process is gone with its exit code, and there was one run. The report.
fn one_run(proxy: &mut EdgeProxy, answers: &[Answer]) -> Value {
    let pid = proxy.process.id();
    let code = proxy.process.exit_code(PATIENCE);
    let report = proxy.report();
    for answer in answers {
        let json = answer.json();
        assert_eq!((answer.status, &json["pid"]), (200, &pid.into()));
        assert_eq!(json["started_unix_ms"], report["started_unix_ms"]);
        assert_eq!(json, report);
    }
    assert_eq!(report["exit_code"], code);
    assert_eq!(proxy.process.stderr().matches("initiating graceful shutdown").count(), 1);
    assert!(TcpStream::connect(proxy.admin).is_err(), "nobody is left there");
    report
}

#[test]
fn a_hundred_callers_of_an_idle_proxy_are_one_run_with_one_report_in_every_mode() {
    let modes = ["graceful", "fast", "immediate"];
    let mixed: Vec<_> = modes.iter().cycle().take(CALLERS).copied().collect();
    for asked in [vec!["graceful"; CALLERS], vec!["fast"; CALLERS], vec!["immediate"; CALLERS], mixed] {
        let mut proxy = EdgeProxy::with_defaults();
        let paths: Vec<_> = asked.iter().map(|mode| format!("/terminate?mode={mode}")).collect();
        let requests: Vec<_> = paths.iter().map(|path| (&**path, "")).collect();
        let answers = at_once(proxy.admin, &requests);
        let report = one_run(&mut proxy, &answers);
        println!("{}: exit code {} after {} ms", asked[1], report["exit_code"], report["duration_ms"]);
        assert_eq!((&report["reason"]["kind"], &report["requests"]["cut"]), (&"terminate".into(), &0.into()));
        // A stage that has begun when an `immediate` comes is cut; hurried, it has its reserve of 100 ms, which may not be
        // enough on a busy machine.
        let late = asked[1] != "graceful" && report["exit_code"] == 10;
        assert!(report["exit_code"] == 0 || late, "{report:#}");
        if asked[0] == asked[1] {
            assert_eq!(report["urgency"], asked[0]);
        }
    }
}

#[test]
fn a_hundred_callers_of_a_busy_proxy_wait_or_cut_as_the_most_urgent_says() {
    // Gracefully: the request is waited for, and so are all who have asked.
    let mut proxy = EdgeProxy::with_defaults();
    let request = half_a_request(&proxy);
    let admin = proxy.admin;
    let callers = thread::spawn(move || a_hundred(admin, "/terminate", ""));
    status_until(admin, |status| status["phase"] == "draining");
    the_rest(request);
    let report = one_run(&mut proxy, &callers.join().expect("answered"));
    assert_eq!((&report["exit_code"], &report["requests"]["drained"]), (&0.into(), &1.into()), "{report:#}");

    for asked in [["fast"; 3], ["immediate"; 3], ["graceful", "immediate", "fast"]] {
        let mut proxy = EdgeProxy::with_defaults();
        let _request = half_a_request(&proxy);
        let clock = Stopwatch::start();
        let early = (asked[0] == "graceful").then(|| {
            let admin = proxy.admin;
            thread::spawn(move || post(admin, "/terminate", "").expect("answered"))
        });
        if early.is_some() {
            // The plan alone would wait for the request; whoever comes now hurries it.
            status_until(proxy.admin, |status| status["phase"] == "draining");
        }
        let paths = asked.map(|mode| format!("/terminate?mode={mode}"));
        let requests: Vec<_> = paths.iter().cycle().take(CALLERS).map(|path| (&**path, "")).collect();
        let mut answers = at_once(proxy.admin, &requests);
        answers.extend(early.map(|caller| caller.join().expect("answered")));
        let report = one_run(&mut proxy, &answers);
        assert!(clock.elapsed() < Duration::from_secs(10), "nobody waited for the request");
        assert_eq!((&report["exit_code"], &report["requests"]["cut"]), (&11.into(), &1.into()), "{report:#}");
        let urgency = report["urgency"].as_str().expect("a word");
        assert!(urgency == asked[1] || (asked[0] == "graceful" && urgency == "fast"), "{urgency}");
    }
}

#[test]
fn if_idle_of_a_hundred_refuses_them_all_while_a_request_is_in_flight() {
    let mut proxy = EdgeProxy::with_defaults();
    let request = half_a_request(&proxy);
    for path in ["/terminate?if_idle=true", "/terminate?mode=immediate&if_idle=true"] {
        for answer in a_hundred(proxy.admin, path, "") {
            let counts = answer.json();
            assert_eq!((answer.status, &counts["busy"]), (409, &true.into()));
            assert_eq!((&counts["requests"]["active"], &counts["sessions"]["open"]), (&1.into(), &0.into()));
            assert!(counts["connections"]["open"].is_u64(), "{counts}");
        }
    }
    is_running(&proxy);
    the_rest(request);
    // A session counts as well, and is no request.
    let session = websocket(&proxy);
    status_until(proxy.admin, |status| status["sessions"]["open"] == 1 && status["requests"]["active"] == 0);
    let busy = post(proxy.admin, "/terminate?if_idle=true", "").expect("answers");
    assert_eq!((busy.status, &busy.json()["sessions"]["open"]), (409, &1.into()));
    is_running(&proxy);
    drop(session);
    status_until(proxy.admin, |status| status["sessions"]["open"] == 0);
    // The control: idle, the very same request stops it.
    let answers = a_hundred(proxy.admin, "/terminate?if_idle=true", "");
    assert_eq!(one_run(&mut proxy, &answers)["exit_code"], 0);
}

#[test]
fn a_hundred_dry_runs_show_the_plan_and_change_nothing() {
    let mut proxy = EdgeProxy::with_defaults();
    for mode in ["graceful", "fast", "immediate"] {
        for answer in a_hundred(proxy.admin, &format!("/terminate?dry_run=true&mode={mode}"), "") {
            let plan = answer.json();
            assert_eq!((answer.status, &plan["dry_run"], &plan["mode"]), (200, &true.into(), &mode.into()));
            assert_eq!(plan["plan"]["total_ms"], 28_000);
        }
    }
    is_running(&proxy);
    proxy.process.signal(Signal::TERM);
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
    assert_eq!(proxy.report()["reason"]["signal"], "SIGTERM");
}

#[test]
fn without_the_token_a_hundred_get_401_whatever_they_ask_for() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("token");
    std::fs::write(&file, "s3cret-of-this-test\n").expect("writable");
    let mut proxy = EdgeProxy::start([("EDGE_PROXY_ADMIN_TOKEN_FILE", &file)]);
    let right = "authorization: Bearer s3cret-of-this-test\r\n";
    let bad = [
        String::new(),
        "authorization: Bearer s3cret-of-this-tesT\r\n".to_owned(),
        "authorization: Bearer s3cret-of-this-tes\r\n".to_owned(),
        "authorization: Bearer s3cret-of-this-test-\r\n".to_owned(),
        "authorization: Bearer \r\n".to_owned(),
        "authorization: Basic s3cret-of-this-test\r\n".to_owned(),
        right.repeat(2),
        format!("{right}authorization: Bearer wrong\r\n"),
    ];
    let paths =
        ["/terminate", "/terminate?mode=immediate", "/terminate?dry_run=true", "/terminate?if_idle=true"];
    let requests: Vec<_> = (0..CALLERS).map(|n| (paths[n % 4], &*bad[n / 4 % bad.len()])).collect();
    for answer in at_once(proxy.admin, &requests) {
        assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("bearer")), "{answer:?}");
    }
    is_running(&proxy);
    let answers = a_hundred(proxy.admin, "/terminate", right);
    assert_eq!(one_run(&mut proxy, &answers)["exit_code"], 0);
    assert!(!proxy.process.stderr().contains("s3cret"), "the token is never logged");
}

#[test]
fn a_foreign_origin_or_host_another_method_and_what_has_two_readings_are_refused() {
    let mut proxy = EdgeProxy::with_defaults();
    let (admin, port) = (proxy.admin, proxy.admin.port());
    let ask = |method: &str, path: &str, headers: &str| {
        let mut stream = TcpStream::connect(admin).expect("it serves");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream
            .write_all(format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n{headers}\r\n").as_bytes())
            .expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("closed, not reset");
        answer.to_ascii_lowercase()
    };
    let own = format!("host: {admin}\r\n");
    let foreign = [
        format!("{own}origin: http://evil.example\r\n"),
        format!("{own}origin: null\r\n"),
        format!("{own}origin: https://{admin}\r\n"),
        format!("{own}origin: http://127.0.0.1:{}\r\n", proxy.listen.port()),
        format!("{own}origin: http://{admin}\r\norigin: http://evil.example\r\n"),
        format!("host: evil.example:{port}\r\n"),
        format!("host: evil.example:{port}\r\norigin: http://evil.example:{port}\r\n"),
        "host: 127.0.0.1\r\n".to_owned(),
    ];
    for headers in &foreign {
        for path in ["/terminate?mode=immediate", "/terminate?dry_run=true", "/status"] {
            let method = if path == "/status" { "GET" } else { "POST" };
            let answer = ask(method, path, headers);
            assert!(answer.starts_with("http/1.1 403 "), "{headers}{answer}");
            assert!(!answer.contains("access-control-allow"), "{answer}");
        }
    }
    for method in ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        let answer = ask(method, "/terminate?mode=immediate", &own);
        assert!(answer.starts_with("http/1.1 405 ") && answer.contains("\r\nallow: post\r\n"), "{answer}");
    }
    for query in [
        "mode=now",
        "mode=fast&mode=graceful",
        "if_idle=true&if_idle=false",
        "if%5fidle=true",
        "mode=%66ast",
        "mode=fast;if_idle=true",
        "force=true",
    ] {
        let answer = ask("POST", &format!("/terminate?{query}"), &own);
        assert!(answer.starts_with("http/1.1 400 "), "{query}: {answer}");
    }
    let unfinished = ask("POST", "/terminate", &format!("{own}content-length: 10\r\n"));
    assert!(unfinished.starts_with("http/1.1 400 "), "{unfinished}");
    is_running(&proxy);
    // The controls: its own origin may, and a body is read.
    let headers = format!("{own}origin: http://{admin}\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n");
    let answer = ask("POST", "/terminate", &headers);
    assert!(answer.starts_with("http/1.1 200 "), "{answer}");
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
}

#[test]
fn callers_that_hang_up_stop_nothing_and_one_that_half_closes_is_answered() {
    let mut proxy = EdgeProxy::with_defaults();
    let request = half_a_request(&proxy);
    let ask = || {
        let mut stream = TcpStream::connect(proxy.admin).expect("it serves");
        let request =
            format!("POST /terminate HTTP/1.1\r\nhost: {}\r\ncontent-length: 0\r\n\r\n", proxy.admin);
        stream.write_all(request.as_bytes()).expect("it reads");
        stream
    };
    // The first does not even wait to be read.
    for _ in 0..CALLERS / 2 {
        drop(ask());
    }
    status_until(proxy.admin, |status| status["phase"] == "draining");
    let leaving: Vec<_> = (0..CALLERS / 2).map(|_| ask()).collect();
    let mut half = ask();
    half.shutdown(Shutdown::Write).expect("a socket");
    let mut whole = Connection::open(proxy.admin).expect("it serves");
    whole.send("POST", "/terminate", "").expect("it reads");
    status_until(proxy.admin, |status| status["phase"] == "draining");
    drop(leaving);
    the_rest(request);
    let mut answer = String::new();
    half.set_read_timeout(Some(PATIENCE)).expect("a socket");
    half.read_to_string(&mut answer).expect("closed, not reset");
    let report = one_run(&mut proxy, &[whole.answer().expect("answered")]);
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer to who half-closed");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_eq!(serde_json::from_str::<Value>(body).expect("JSON"), report);
    assert_eq!(report["exit_code"], 0, "{report:#}");
}

/// A connection for which the system buffers little: with small segments the sender's buffer is small, too.
fn tiny(addr: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP)).expect("a socket");
    socket.set_recv_buffer_size(1).expect("a socket");
    socket.set_tcp_mss(536).expect("a socket");
    socket.connect(&addr.into()).expect("it serves");
    socket.into()
}

#[test]
fn callers_that_read_nothing_cost_the_reports_reserve_and_no_more() {
    // A large report: requests with long names, which nobody answers.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let upstream = format!("http://{}", silent.local_addr().expect("bound"));
    let mut proxy = EdgeProxy::start([("EDGE_PROXY_UPSTREAM", &upstream)]);
    let requests: Vec<_> = (0..CALLERS)
        .map(|n| {
            let mut request = Connection::open(proxy.listen).expect("it serves");
            request.send("GET", &format!("/{n}/{}", "x".repeat(1000)), "").expect("it reads");
            request
        })
        .collect();
    status_until(proxy.admin, |status| status["requests"]["active"] == CALLERS);
    // Callers who have left so much unread that the report does not fit: for some of them it is the first that does not.
    let host = proxy.admin;
    let stuck: Vec<_> = (0..40)
        .map(|unread| {
            let mut stream = tiny(host);
            let mut all = format!("GET /metrics HTTP/1.1\r\nhost: {host}\r\n\r\n").repeat(unread);
            all.push_str(&format!("POST /terminate HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n"));
            stream.write_all(all.as_bytes()).expect("it reads");
            stream
        })
        .collect();
    status_until(proxy.admin, |status| status["phase"] == "draining");
    let answers = a_hundred(proxy.admin, "/terminate?mode=immediate", "");
    let code = proxy.process.exit_code(PATIENCE);
    let gone = now_ms();
    let report = one_run(&mut proxy, &answers);
    let number = |name: &str| report[name].as_f64().expect("a number");
    let after = gone - number("started_unix_ms") - number("duration_ms");
    println!("{} bytes of report; exit code {code} {after:.0} ms after it was final", answers[0].body.len());
    // The control: somebody was waited for.
    assert!(after > 248.0, "{after}");
    assert!(after < 1500.0, "{after}");
    drop((stuck, requests));
}

#[test]
fn callers_of_every_phase_and_one_at_the_last_moment_get_the_report_of_a_stop_that_a_signal_began() {
    let mut proxy =
        EdgeProxy::start([("SHUTDOWN_LAME_DUCK", "500ms"), ("SHUTDOWN_WEBSOCKET_TIMEOUT", "1500ms")]);
    let request = half_a_request(&proxy);
    let session = websocket(&proxy);
    // They are connected and have said nothing, one of them until all is over.
    let mut last = Connection::open(proxy.admin).expect("it serves");
    let mut early = Connection::open(proxy.admin).expect("it serves");
    status_until(proxy.admin, |status| status["sessions"]["open"] == 1);
    proxy.process.signal(Signal::TERM);
    let admin = proxy.admin;
    let mut request = Some(request);
    let mut callers = Vec::new();
    for phase in ["lame_duck", "draining", "closing"] {
        status_until(admin, |status| status["phase"] == phase);
        if let Some(request) = request.take_if(|_| phase == "draining") {
            the_rest(request);
        }
        // Idle or not: it is stopping already.
        let path = if phase == "closing" { "/terminate" } else { "/terminate?mode=immediate&if_idle=true" };
        callers.push(thread::spawn(move || post(admin, path, "").expect("answered")));
    }
    early.send("POST", "/terminate", "").expect("it reads");
    let first = early.answer().expect("answered");
    last.send("POST", "/terminate?mode=immediate", "").expect("it still reads");
    let last = last.answer().expect("who was connected is answered");
    let mut answers: Vec<_> = callers.into_iter().map(|caller| caller.join().expect("answered")).collect();
    answers.extend([first, last]);
    let report = one_run(&mut proxy, &answers);
    assert_eq!((&report["reason"]["signal"], &report["urgency"]), (&"SIGTERM".into(), &"graceful".into()));
    assert_eq!((&report["requests"]["drained"], &report["exit_code"]), (&1.into(), &11.into()), "{report:#}");
    drop(session);
}

/// Everything a page can do to another address without being it; `TARGET` is where, `HERE` its own server.
const FOREIGN_PAGE: &str = r#"<!doctype html><body><script>
const target = 'http://TARGET/terminate?mode=immediate', tally = {};
const within = (promise) => Promise.race([promise, new Promise(end => setTimeout(end, 3000, 'nothing'))]);
const tried = async (name, attempt) => {
  try { tally[name] = String(await within(attempt())); } catch (error) { tally[name] = 'error ' + error.name; }
};
const kind = (answer) => answer.type + ' ' + answer.status;
const element = (tag, set) => new Promise((end) => {
  const made = document.createElement(tag);
  made.onload = () => end('loaded'); made.onerror = () => end('failed');
  Object.assign(made, set); document.body.append(made);
});
const form = (name, set, sandbox) => new Promise((end) => {
  const frame = document.createElement('iframe');
  frame.name = name; if (sandbox) frame.sandbox = 'allow-forms allow-scripts';
  document.body.append(frame);
  frame.onload = () => end('loaded');
  const made = document.createElement('form');
  Object.assign(made, { action: target, method: 'post', target: name, ...set });
  document.body.append(made); made.submit();
});
(async () => {
  await tried('no-cors', () => fetch(target, { method: 'POST', mode: 'no-cors' }).then(kind));
  await tried('no-referrer', () => fetch(target, { method: 'POST', mode: 'no-cors', referrerPolicy: 'no-referrer' }).then(kind));
  await tried('keepalive', () => fetch(target, { method: 'POST', mode: 'no-cors', keepalive: true, body: 'x' }).then(kind));
  await tried('cors', () => fetch(target, { method: 'POST', body: 'x' }).then(kind));
  await tried('preflight', () => fetch(target, { method: 'POST', headers: { Authorization: 'Bearer x' } }).then(kind));
  await tried('put', () => fetch(target, { method: 'PUT' }).then(kind));
  await tried('credentials', () => fetch(target, { method: 'POST', credentials: 'include' }).then(kind));
  await tried('xhr', () => new Promise((end) => {
    const ask = new XMLHttpRequest(); ask.open('POST', target); ask.onloadend = () => end(ask.status); ask.send();
  }));
  await tried('beacon', async () => navigator.sendBeacon(target, 'x'));
  await tried('image', () => element('img', { src: target }));
  await tried('script', () => element('script', { src: target + '&script' }));
  await tried('style', () => element('link', { rel: 'stylesheet', href: target + '&style' }));
  await tried('frame', () => element('iframe', { src: target + '&frame' }));
  await tried('form', () => form('plain', {}));
  await tried('multipart', () => form('multipart', { enctype: 'multipart/form-data' }));
  await tried('sandbox', () => element('iframe', { sandbox: 'allow-scripts allow-forms',
    srcdoc: `<form method=post action="${target}"></form><script>document.forms[0].submit()<\/script>` }));
  await tried('sandboxed fetch', () => new Promise((end) => {
    onmessage = (said) => end(said.data);
    element('iframe', { sandbox: 'allow-scripts', srcdoc: `<script>
      fetch('${target}', { method: 'POST', mode: 'no-cors' }).then(a => a.type, e => e.name).then(t => parent.postMessage(t, '*'))<\/script>` });
  }));
  await tried('rebound name', () => fetch(target.replace('127.0.0.1', 'evil.example'), { method: 'POST', mode: 'no-cors' }).then(kind));
  await fetch('http://HERE/foreign', { method: 'POST', body: JSON.stringify(tally) });
  // A navigation of the whole page, POST; then on to the name that has been rebound.
  const made = document.createElement('form');
  Object.assign(made, { action: target, method: 'post', target: '_blank' });
  document.body.append(made); made.submit();
  location = 'http://REBOUND/page';
})();
</script>"#;

/// A page of a name that now leads to the admin listener: to the browser they are one origin, and the answers are its to read.
/// `NEXT` is where it goes when the test has looked.
const SAME_ORIGIN_PAGE: &str = r#"<!doctype html><script>
(async () => {
  const tally = {};
  for (const [method, path] of [['GET', '/status'], ['GET', '/metrics'], ['POST', '/terminate?dry_run=true'], ['POST', '/terminate?mode=immediate']]) {
    const answer = await fetch(path, { method });
    tally[method + ' ' + path] = answer.status + ' ' + (await answer.text()).slice(0, 60);
  }
  await fetch('http://HERE/SAID', { method: 'POST', mode: 'no-cors', body: JSON.stringify(tally) });
})();
</script>"#;

#[test]
fn no_page_in_a_browser_stops_it_but_one_of_its_own_address() {
    let mut proxy = EdgeProxy::with_defaults();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let admin = proxy.admin;
    let rebound = format!("evil.example:{}", admin.port());
    let relay = Relay::start(admin, |here| {
        let fill = |page: &str, said: &str| {
            page.replace("TARGET", &admin.to_string())
                .replace("HERE", &here.to_string())
                .replace("REBOUND", &rebound)
                .replace("SAID", said)
        };
        vec![
            (here.to_string(), "/page", fill(FOREIGN_PAGE, "")),
            (rebound.clone(), "/page", fill(SAME_ORIGIN_PAGE, "rebound")),
            (admin.to_string(), "/page", fill(SAME_ORIGIN_PAGE, "own")),
        ]
    });
    let browser = chromium(dir.path(), &relay, &format!("http://{}/page", relay.addr));
    let foreign: Value = serde_json::from_str(&relay.said("/foreign")).expect("JSON");
    let tally: Value = serde_json::from_str(&relay.said("/rebound")).expect("JSON");
    drop(browser);
    println!("the foreign page's tally: {foreign:#}\nthe rebound page's: {tally:#}");
    is_running(&proxy);

    // What was really sent, and what it got.
    let relayed = relay.relayed();
    println!("{relayed:#?}");
    let terminate = |seen: &&Relayed| seen.path.starts_with("/terminate");
    assert!(relayed.iter().filter(terminate).all(|seen| matches!(seen.status, 403 | 405)), "{relayed:#?}");
    let here = format!("http://{}", relay.addr);
    let sent = |method: &str, origin: Option<&str>, host: &str| {
        let is = |seen: &&Relayed| {
            terminate(seen) && seen.method == method && seen.origin.as_deref() == origin && seen.host == host
        };
        relayed.iter().filter(is).count()
    };
    let own = admin.to_string();
    // fetch four times, XHR, beacon, forms twice, the navigation; preflights are of two; the sandbox and no-referrer have none.
    assert!(sent("POST", Some(&here), &own) >= 8, "{relayed:#?}");
    assert!(sent("POST", Some("null"), &own) >= 2, "{relayed:#?}");
    assert!(sent("OPTIONS", Some(&here), &own) >= 2, "{relayed:#?}");
    assert!(sent("GET", None, &own) >= 4, "{relayed:#?}");
    assert_eq!(sent("POST", Some(&here), &rebound), 1, "{relayed:#?}");
    assert_eq!(sent("POST", Some(&format!("http://{rebound}")), &rebound), 2, "{relayed:#?}");
    // No page could read an answer, but the one that was of the same origin: it read that it may not.
    for name in ["cors", "preflight", "put", "credentials"] {
        assert_eq!(foreign[name], "error TypeError", "{foreign:#}");
    }
    assert_eq!(foreign["no-cors"], "opaque 0");
    assert!(
        tally
            .as_object()
            .expect("a tally")
            .values()
            .all(|told| told.as_str().is_some_and(|t| t.starts_with("403 ")))
    );

    // The control: the same page at the admin listener's own address.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let browser = chromium(dir.path(), &relay, &format!("http://{admin}/page"));
    let own: Value = serde_json::from_str(&relay.said("/own")).expect("JSON");
    drop(browser);
    assert!(
        own["POST /terminate?mode=immediate"].as_str().is_some_and(|told| told.starts_with("200 ")),
        "{own:#}"
    );
    assert_eq!(proxy.process.exit_code(PATIENCE), 0);
    assert_eq!(proxy.report()["reason"]["kind"], "terminate");
    println!("also asked for, and refused: {:?}", relay.refused());
}
