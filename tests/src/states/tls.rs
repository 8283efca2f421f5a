//! Clients that speak TLS.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::http2::{finish, tell_over, tell_stream};
use super::{State, Visit, tell_end};
use crate::PATIENCE;
use crate::client::Connection;
use crate::h2raw::Client;

/// All of them.
pub const STATES: [State; 4] = [
    State::new("TLS: silent", silent),
    State::new("TLS: handshake stalled", stalled),
    State::new("TLS: 800 ms handler", handler),
    State::new("TLS, h2: 800 ms handler", handler_h2),
];

fn silent(visit: &Visit) -> io::Result<String> {
    let mut connection = Connection::open(visit.listen)?;
    visit.connected(1);
    visit.term();
    Ok(tell_end(&mut connection))
}

fn stalled(visit: &Visit) -> io::Result<String> {
    let mut connection = Connection::open(visit.listen)?;
    // A handshake record of 512 bytes (RFC 8446 §5.1), of which a ClientHello's first bytes are here.
    connection.raw(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3])?;
    visit.connected(1);
    visit.term();
    Ok(tell_end(&mut connection))
}

/// A connection that has agreed to speak `protocol`.
fn connect(visit: &Visit, protocol: &str) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(visit.certificate.clone())).map_err(io::Error::other)?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    let mut stream = TcpStream::connect(visit.listen)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    assert_eq!(connection.alpn_protocol(), Some(protocol.as_bytes()));
    Ok(StreamOwned::new(connection, stream))
}

fn handler(visit: &Visit) -> io::Result<String> {
    let mut stream = connect(visit, "http/1.1")?;
    stream.write_all(b"GET /slow HTTP/1.1\r\nhost: tls\r\n\r\n")?;
    visit.in_flight(1);
    visit.term();
    let mut answer = Vec::new();
    // Without a close_notify this is an error: who cannot tell an end from a cut has not got a whole answer.
    let end = match stream.read_to_end(&mut answer) {
        Ok(_) => "closed".to_owned(),
        Err(error) => error.kind().to_string(),
    };
    let answer = String::from_utf8_lossy(&answer);
    let whole = answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nslow\n");
    let close = if answer.contains("\r\nconnection: close\r\n") { " close" } else { "" };
    Ok(format!("{}{close}, {end}", if whole { "200" } else { "NOT WHOLE" }))
}

fn handler_h2(visit: &Visit) -> io::Result<String> {
    let mut client = Client::new(connect(visit, "h2")?, "tls");
    client.hello()?;
    client.get(1, "/slow")?;
    visit.in_flight(1);
    visit.term();
    finish(&mut client);
    Ok(format!("{}, {}", tell_stream(visit, &client, 1, "/slow"), tell_over(&client)))
}
