//! gRPC on stock tonic: health goes red first, streams end with a status, what is in flight is answered, and what
//! comes too late is UNAVAILABLE.
#![expect(clippy::unwrap_used, reason = "a test's helpers, like the test, fail by panicking")]

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use shutdown_tests::PATIENCE;
use shutdown_tests::process::{Process, binary};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_service::Wait;
use tonic_service::rpc::clock_client::ClockClient;

struct Service {
    process: Process,
    reports: TempDir,
    channel: Channel,
}

impl Service {
    async fn start(env: &[(&str, &str)]) -> Self {
        let reports = tempfile::tempdir().unwrap();
        let mut command = Command::new(binary("tonic-service"));
        command.env("TONIC_SERVICE_LISTEN", "127.0.0.1:0").env("TONIC_SERVICE_REPORTS", reports.path());
        let process = Process::start(command.envs(env.iter().copied()));
        let addr = process.address("listening on ");
        let channel = Channel::from_shared(format!("http://{addr}")).unwrap().connect().await.unwrap();
        Self { process, reports, channel }
    }

    fn report(&self) -> serde_json::Value {
        let text = std::fs::read_to_string(self.reports.path().join("last-shutdown.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }
}

fn whole_server() -> HealthCheckRequest {
    HealthCheckRequest { service: String::new() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_goes_red_in_the_lame_duck_watches_and_streams_end_and_calls_in_flight_are_answered() {
    let mut service = Service::start(&[("SHUTDOWN_LAME_DUCK", "1")]).await;
    let mut clock = ClockClient::new(service.channel.clone());
    let mut health = HealthClient::new(service.channel.clone());
    let mut watch = health.watch(whole_server()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let mut ticks = clock.every(Wait { millis: 20 }).await.unwrap().into_inner();
    assert_eq!(ticks.message().await.unwrap().unwrap().number, 1);
    let mut other = clock.clone();
    let call = tokio::spawn(async move { other.after(Wait { millis: 1500 }).await });
    // The call is on its way when an answer to a later one on the same connection is here.
    clock.after(Wait { millis: 1 }).await.unwrap();

    service.process.signal(Signal::TERM);
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    let checked = health.check(whole_server()).await.unwrap().into_inner();
    assert_eq!(checked.status(), ServingStatus::NotServing);
    // Served on in the lame duck.
    clock.after(Wait { millis: 1 }).await.unwrap();

    let ended = async {
        loop {
            match ticks.message().await {
                Ok(Some(_)) => {}
                end => return end,
            }
        }
    };
    assert_eq!(timeout(PATIENCE, ended).await.unwrap().unwrap_err().code(), Code::Unavailable);
    let watched = timeout(PATIENCE, watch.message()).await.unwrap();
    assert_eq!(watched.unwrap_err().code(), Code::Unavailable);
    assert_eq!(call.await.unwrap().unwrap().into_inner().number, 1);
    assert_eq!(service.process.exit_code(PATIENCE), 0, "{}", service.process.stderr());
    let report = service.report();
    assert_eq!(report["sessions"]["told"], 2, "{report:#}");
    assert_eq!((&report["requests"]["cut"], &report["sessions"]["cut"]), (&0.into(), &0.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_comes_too_late_is_unavailable() {
    let mut service = Service::start(&[("SHUTDOWN_LINGER", "200ms")]).await;
    let mut clock = ClockClient::new(service.channel.clone());
    let mut other = clock.clone();
    let call = tokio::spawn(async move { other.after(Wait { millis: 3000 }).await });
    clock.after(Wait { millis: 1 }).await.unwrap();
    service.process.signal(Signal::TERM);
    let refused = async {
        loop {
            if let Err(status) = clock.after(Wait { millis: 1 }).await {
                return status;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    let status = timeout(PATIENCE, refused).await.unwrap();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "the service is shutting down"));
    assert_eq!(call.await.unwrap().unwrap().into_inner().number, 1);
    assert_eq!(service.process.exit_code(PATIENCE), 0, "{}", service.process.stderr());
    assert_eq!(service.report()["requests"]["refused"], 1);
}
