//! Browsing on one interface, for as long as its daemon lives.
//!
//! mdns-sd closes a subscription whose channel is full, and says nothing. Then it is browsed anew; what was removed in
//! between is missed, so the engine is told when a browse begins and when all that is known has been told.

use std::time::Duration;

use mdns_sd::{Error, Receiver, ServiceEvent};
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::engine::Input;

/// The time between the end of a subscription and the next: a flood costs one each, and a daemon that stops has stopped.
const AGAIN: Duration = Duration::from_secs(1);

/// Passes on what `browse` gives, and asks it again when that ends, until the daemon is over or nobody takes it.
pub(crate) async fn follow(
    station: usize,
    interface: String,
    mut browse: impl FnMut() -> Result<Receiver<ServiceEvent>, Error>,
    input: mpsc::Sender<Input>,
) {
    let mut is_first = true;
    loop {
        match browse() {
            Ok(events) => {
                if !is_first {
                    tracing::warn!(target: "shutdown", interface, "mDNS was heard faster than it is taken: browsing anew");
                }
                is_first = false;
                if pass_on(station, &events, &input).await.is_err() {
                    return;
                }
            }
            Err(Error::DaemonShutdown) => return,
            // Its queue of commands is full.
            Err(Error::Again) => {}
            Err(error) => {
                tracing::warn!(target: "shutdown", interface, %error, "mDNS discovers nothing");
                return;
            }
        }
        sleep(AGAIN).await;
    }
}

/// Passes on one subscription, to its end.
async fn pass_on(
    station: usize,
    events: &Receiver<ServiceEvent>,
    input: &mpsc::Sender<Input>,
) -> Result<(), mpsc::error::SendError<Input>> {
    input.send(Input::Browsing { station }).await?;
    let mut searches = 0;
    while let Ok(event) = events.recv_async().await {
        // It tells when it begins, then what its cache has, then that it asks the link.
        if matches!(event, ServiceEvent::SearchStarted(_)) {
            searches += 1;
            if searches == 2 {
                input.send(Input::ToldAll { station }).await?;
            }
        } else {
            input.send(Input::Browsed { station, event }).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_subscription_that_was_closed_is_browsed_anew_and_one_of_a_stopped_daemon_is_not() {
        let subscriptions: Vec<_> = (0..2).map(|_| flume::bounded(10)).collect();
        for (sender, _) in &subscriptions {
            for event in [
                ServiceEvent::SearchStarted(String::new()),
                ServiceEvent::ServiceFound(String::new(), String::new()),
                ServiceEvent::SearchStarted(String::new()),
                ServiceEvent::SearchStarted(String::new()),
            ] {
                sender.send(event).expect("there is room");
            }
        }
        // Without its sender a subscription ends.
        let mut given: VecDeque<_> = subscriptions.into_iter().map(|(_, events)| Ok(events)).collect();
        given.insert(1, Err(Error::Again));
        let (input, mut inputs) = mpsc::channel(10);
        let began = Instant::now();
        follow(3, "eth0".to_owned(), move || given.pop_front().unwrap_or(Err(Error::DaemonShutdown)), input)
            .await;
        assert_eq!(began.elapsed(), 3 * AGAIN);
        for _ in 0..2 {
            assert!(matches!(inputs.recv().await, Some(Input::Browsing { station: 3 })));
            assert!(matches!(inputs.recv().await, Some(Input::Browsed { station: 3, .. })));
            assert!(matches!(inputs.recv().await, Some(Input::ToldAll { station: 3 })));
        }
        assert!(inputs.recv().await.is_none());
    }
}
