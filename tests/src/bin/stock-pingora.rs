//! A control: Pingora as its documentation says, with its own server, signals and grace.

use std::error::Error;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::routing::get;
use pingora_core::Result;
use pingora_core::server::configuration::ServerConf;
use pingora_core::server::{RunArgs, Server};
use pingora_core::upstreams::peer::HttpPeer;
use pingora_proxy::{ProxyHttp, Session, http_proxy_service};

struct Pass(SocketAddr);

#[async_trait]
impl ProxyHttp for Pass {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _: &mut Session, _: &mut ()) -> Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.0, false, String::new())))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // The upstream: a runtime that lives as long as the process.
    let runtime = tokio::runtime::Runtime::new()?;
    let upstream = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
    let pass = Pass(upstream.local_addr()?);
    runtime
        .spawn(async move { axum::serve(upstream, Router::new().route("/", get(async || "hello\n"))).await });

    let conf = ServerConf {
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        grace_period_seconds: Some(1),
        graceful_shutdown_timeout_seconds: Some(1),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let mut service = http_proxy_service(&server.configuration, pass);
    // Pingora binds by itself and does not say where: a port that was free a moment ago.
    let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    service.add_tcp(&addr.to_string());
    server.add_service(service);
    std::thread::spawn(move || {
        while TcpStream::connect(addr).is_err() {
            std::thread::park_timeout(Duration::from_millis(5));
        }
        println!("listening on {addr}");
    });
    server.run(RunArgs::default());
    Ok(())
}
