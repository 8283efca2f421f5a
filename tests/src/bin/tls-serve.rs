//! `Server` over TLS, with the routes of a trivial service: the subject of the TLS laws.
//!
//! It prints its certificate (DER, in hexadecimal), where it is administered and where it serves; reports go into
//! `AXUM_SERVICE_REPORTS`.

use std::convert::Infallible;
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use shutdown_core::{ShutdownConfig, ShutdownCoordinator, Signals, net, start_failure};
use shutdown_tower::admin::Admin;
use shutdown_tower::{Server, ShutdownLayer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

#[tokio::main]
async fn main() -> ExitCode {
    let Err(error) = run().await;
    start_failure("tls-serve", &*error)
}

async fn run() -> Result<Infallible, Box<dyn Error>> {
    let signals = Signals::claim()?;
    let mut builder = ShutdownCoordinator::builder().program("tls-serve").signals(signals);
    if let Some(dir) = std::env::var_os("AXUM_SERVICE_REPORTS") {
        builder = builder.report_dir(dir);
    }
    let shutdown = builder.config(ShutdownConfig::from_env()?).install()?;

    let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
    let certificate = own.cert.der().clone();
    let hex: String = certificate.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("certificate {hex}");
    let key = PrivateKeyDer::try_from(own.signing_key.serialize_der())?;
    let mut tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));

    let admin = net::bind(([127, 0, 0, 1], 0).into())?;
    println!("admin on {}", admin.local_addr()?);
    Admin::new(shutdown).serve(admin)?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on {}", listener.local_addr()?);

    let slow = async || {
        tokio::time::sleep(Duration::from_millis(800)).await;
        "slow\n"
    };
    let app = Router::new().route("/", get(async || "hello\n")).route("/slow", get(slow));
    let server = Server::new(shutdown).tls(move |io| acceptor.accept(io));
    tokio::spawn(server.serve(listener, app.layer(ShutdownLayer::new(shutdown))));

    shutdown.finished().await.exit()
}
