//! The service `example.Clock`: an answer after a while, and a stream without end.
//!
//! ```text
//! service Clock {
//!   rpc After (Wait) returns (Tick);          // one answer, after so many milliseconds
//!   rpc Every (Wait) returns (stream Tick);   // a tick every so many milliseconds, for ever
//! }
//! ```

use std::pin::Pin;
use std::time::Duration;

use shutdown_core::ShutdownCoordinator;
use shutdown_tower::UntilTold;
use tokio_stream::wrappers::IntervalStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

#[allow(missing_docs, unused_qualifications, clippy::all, reason = "generated")]
pub mod rpc {
    include!(concat!(env!("OUT_DIR"), "/example.Clock.rs"));
}

/// How long.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Wait {
    /// Milliseconds.
    #[prost(uint32, tag = "1")]
    pub millis: u32,
}

/// It is time.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Tick {
    /// Which one, from 1.
    #[prost(uint64, tag = "1")]
    pub number: u64,
}

/// The clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    shutdown: ShutdownCoordinator,
}

impl Clock {
    /// A clock whose streams end when `shutdown` asks them to.
    pub fn new(shutdown: ShutdownCoordinator) -> Self {
        Self { shutdown }
    }
}

#[tonic::async_trait]
impl rpc::clock_server::Clock for Clock {
    type EveryStream = Pin<Box<dyn Stream<Item = Result<Tick, Status>> + Send>>;

    async fn after(&self, wait: Request<Wait>) -> Result<Response<Tick>, Status> {
        tokio::time::sleep(Duration::from_millis(wait.get_ref().millis.into())).await;
        Ok(Response::new(Tick { number: 1 }))
    }

    /// A session: told to end when the service does, it says UNAVAILABLE, and its client asks another instance.
    async fn every(&self, wait: Request<Wait>) -> Result<Response<Self::EveryStream>, Status> {
        let session = self
            .shutdown
            .session_start("example.Clock/Every")
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let period = Duration::from_millis(wait.get_ref().millis.max(1).into());
        let ticks = IntervalStream::new(tokio::time::interval(period));
        let goodbye = Err(Status::unavailable("the service is shutting down"));
        let mut response: Response<Self::EveryStream> =
            Response::new(Box::pin(UntilTold::new(&session, numbered(ticks)).last(goodbye)));
        response.extensions_mut().insert(session);
        Ok(response)
    }
}

fn numbered(ticks: IntervalStream) -> impl Stream<Item = Result<Tick, Status>> {
    let mut number = 0;
    ticks.map(move |_| {
        number += 1;
        Ok(Tick { number })
    })
}
