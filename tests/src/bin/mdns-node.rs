//! A service that is advertised over mDNS and nothing else: with the flags that edge-proxy has for it, so that one rig
//! serves for both.
//!
//! Prints "announced eth0 IPv4" for each interface and family, what it discovers with `--browse`, and its report on one
//! line at the end. `--linger` holds a request for so long after the drain has begun. Started inside a network namespace
//! only: who listens for multicast joins groups on every interface.

use std::convert::Infallible;
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use shutdown_core::peers::Incarnation;
use shutdown_core::{Phase, ShutdownConfig, ShutdownCoordinator, Signals, Stage, start_failure};
use shutdown_mdns::{Advertisement, Event, Mdns};
use tokio::runtime::Builder;

/// Milliseconds of the wall clock, as the judges print them.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1000.0
}

fn main() -> ExitCode {
    let Err(error) = run();
    start_failure("mdns-node", &*error)
}

fn run() -> Result<Infallible, Box<dyn Error>> {
    let signals = Signals::claim()?;
    let mut advertisement = Advertisement {
        service_type: "_edge._tcp.local.".to_owned(),
        node_id: String::new(),
        port: 0,
        interfaces: Vec::new(),
        cluster: "default".to_owned(),
        incarnation: Incarnation::new(now() as u64),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        notice_port: None,
    };
    let (mut linger, mut is_browsing) = (Duration::ZERO, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{flag} needs a value"));
        match &flag[..] {
            "--mdns" => advertisement.interfaces.push(value()?),
            "--service-type" => advertisement.service_type = value()?,
            "--node-id" => advertisement.node_id = value()?,
            "--cluster" => advertisement.cluster = value()?,
            "--listen" => advertisement.port = value()?.parse::<std::net::SocketAddr>()?.port(),
            "--notice-port" => advertisement.notice_port = Some(value()?.parse()?),
            "--linger" => linger = Duration::from_millis(value()?.parse()?),
            "--browse" => is_browsing = true,
            _ => return Err(format!("what is {flag}?").into()),
        }
    }
    let service = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mdns = Mdns::start(advertisement)?;
    if is_browsing {
        mdns.browse(|event| match event {
            Event::Found(it) => println!(
                "{:.3} found {} inc={:?} ver={} cluster={} notice={:?} {:?}",
                now(),
                it.node_id,
                it.incarnation.unwrap_or_default(),
                it.version,
                it.cluster,
                it.notice_port,
                it.addresses
            ),
            Event::Gone { node_id, incarnation, .. } => {
                println!("{:.3} gone {node_id} inc={}", now(), incarnation.unwrap_or_default());
            }
            Event::Lost { node_id, .. } => println!("{:.3} lost {node_id}", now()),
            _ => {}
        });
    }
    let (mut watch, withdrawn) = (mdns.watch(), mdns);
    let shutdown = ShutdownCoordinator::builder()
        .signals(signals)
        .config(ShutdownConfig::from_env()?)
        .runtime(service.handle().clone())
        .stage_task(Stage::Departure, "mdns", move |stage| async move { withdrawn.withdraw(stage).await })
        .install()?;
    println!("started");
    let request = shutdown.request_start()?;
    service.spawn(async move {
        shutdown.until(Phase::Draining).await;
        tokio::time::sleep(linger).await;
        drop(request);
    });
    service.spawn(async move {
        let mut seen = Vec::new();
        loop {
            let status = watch.borrow_and_update().clone();
            for subject in &status.announced_on {
                if !seen.contains(subject) {
                    println!("announced {subject} as {}", status.instance);
                    seen.push(subject.clone());
                }
            }
            if watch.changed().await.is_err() {
                return;
            }
        }
    });
    let report = shutdown.wait();
    println!("report {}", serde_json::to_string(&*report)?);
    report.exit()
}
