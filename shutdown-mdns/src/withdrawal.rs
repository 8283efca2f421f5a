//! The goodbye: the whole story in one function, and what became of it on each interface over each family.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use shutdown_core::TaskNote;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use crate::engine::{DAEMON, ECHO, Engine, Input, Link, REPEATS};
use crate::interface;
use crate::link::{Family, group};
use crate::wire::Goodbye;

/// What became of the goodbye on one interface over one family.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Departed {
    /// The interface.
    pub interface: String,
    /// The family.
    pub family: Family,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of a goodbye.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// It was seen on the interface, by a socket of our own. Whether others have it nobody can say: mDNS has no answers.
    Observed {
        /// How long after the withdrawal began, in microseconds.
        first_us: f64,
    },
    /// It was sent, and not seen.
    Sent,
    /// It could not be sent.
    NotSent {
        /// What the system says.
        why: String,
    },
    /// There was nothing to take back: we were not announced there, and sent nothing.
    NotAnnounced,
}

impl Departed {
    pub(crate) fn was_said(&self) -> bool {
        self.outcome != Outcome::NotAnnounced
    }

    pub(crate) fn failed(&self) -> bool {
        matches!(self.outcome, Outcome::NotSent { .. })
    }

    /// As the report has it.
    pub fn note(&self) -> TaskNote {
        let subject = format!("{} {}", self.interface, self.family);
        match &self.outcome {
            Outcome::Observed { first_us } => TaskNote::new(subject, "observed").with("first_us", *first_us),
            Outcome::Sent => TaskNote::new(subject, "sent"),
            Outcome::NotSent { why } => TaskNote::new(subject, format!("not sent: {why}")),
            Outcome::NotAnnounced => TaskNote::new(subject, "not announced"),
        }
    }
}

impl fmt::Display for Departed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let note = self.note();
        write!(f, "{}: {}", note.subject, note.outcome)
    }
}

impl Engine {
    /// Says goodbye, once; whoever asks again gets what became of it.
    pub(crate) async fn withdraw(
        &mut self,
        until: Instant,
        mut hurry: oneshot::Receiver<()>,
    ) -> Vec<Departed> {
        if let Some(departed) = &self.departed {
            return departed.clone();
        }
        let began = Instant::now();
        self.is_leaving = true;

        // mdns-sd's goodbye, where we were announced.
        let registered = self.registered();
        for station in &self.stations {
            let told = if station.is_announced { station.leave(&registered) } else { station.silence() };
            if let Err(error) = told {
                let interface = &station.interface.name;
                tracing::warn!(target: "shutdown", interface, %error, "mdns-sd was not told to stop");
            }
        }
        let limit = until.min(began + DAEMON);
        let mut is_hurried = false;
        self.wait(limit, &mut hurry, &mut is_hurried, |engine| {
            engine.stations.iter().all(|station| station.is_stopped)
                && engine.links.iter().all(|link| link.goodbye.is_some() || !engine.is_to_be_said(link))
        })
        .await;

        // Our own, where there is still nothing to be seen.
        let mut failed: Vec<Option<String>> = vec![None; self.links.len()];
        let packets: Vec<_> = self.links.iter().map(|link| self.packet(link)).collect();
        let mut sent = false;
        for (link, (packet, failed)) in self.links.iter().zip(packets.iter().zip(&mut failed)) {
            if let (Some(packet), None) = (packet, link.goodbye) {
                let to = group(link.family, self.stations[link.station].interface.index);
                match link.socket.try_send_to(packet, to) {
                    Ok(_) => sent = true,
                    Err(error) => *failed = Some(error.to_string()),
                }
            }
        }
        if sent {
            let limit = until.min(Instant::now() + ECHO);
            self.wait(limit, &mut hurry, &mut is_hurried, |engine| {
                engine.links.iter().all(|link| link.goodbye.is_some() || !engine.is_to_be_said(link))
            })
            .await;
        }

        let mut departed = Vec::new();
        for (link, (packet, failed)) in self.links.iter().zip(packets.into_iter().zip(failed)) {
            let station = &self.stations[link.station];
            let outcome = match (link.goodbye, failed) {
                (Some(at), _) => {
                    let micros = at.saturating_duration_since(began).as_secs_f64() * 1e6;
                    Outcome::Observed { first_us: micros.round() }
                }
                (None, _) if packet.is_none() => Outcome::NotAnnounced,
                (None, Some(why)) => Outcome::NotSent { why },
                (None, None) => Outcome::Sent,
            };
            departed.push(Departed {
                interface: station.interface.name.clone(),
                family: link.family,
                outcome,
            });
            if let Some(packet) = packet {
                let first = link.goodbye.unwrap_or_else(Instant::now);
                let (socket, to) = (Arc::clone(&link.socket), group(link.family, station.interface.index));
                // Nobody waits for these: they are said if the drain takes that long.
                self.repeats.spawn(async move {
                    for after in REPEATS {
                        sleep_until(first + after).await;
                        if let Err(error) = socket.send_to(&packet, to).await {
                            tracing::debug!(target: "shutdown", %error, "a repeated mDNS goodbye was not sent");
                        }
                    }
                });
            }
        }
        self.departed = Some(departed.clone());
        self.tell();
        departed
    }

    /// Whether there is something to take back.
    fn is_to_be_said(&self, link: &Link) -> bool {
        // Our ears know best; where they have heard nothing at all on an interface, mdns-sd's word counts.
        let is_heard = |other: &Link| other.station == link.station && other.is_announced;
        self.stations[link.station].is_announced && (link.is_announced || !self.links.iter().any(is_heard))
    }

    /// The goodbye of a link, if there is something to take back.
    fn packet(&self, link: &Link) -> Option<Vec<u8>> {
        let station = &self.stations[link.station];
        if !self.is_to_be_said(link) && link.goodbye.is_none() {
            return None;
        }
        // What was announced, as it was heard; else what there is.
        let mut addresses: Vec<IpAddr> = link.addresses.iter().copied().collect();
        if addresses.is_empty() {
            addresses = interface::addresses(&station.interface.name);
        }
        addresses.retain(|address| address.is_ipv4() == (link.family == Family::V4));
        let goodbye = Goodbye {
            service: &self.service,
            instance: &station.instance,
            host: &station.host,
            port: self.advertisement.port,
            strings: &self.strings(),
            addresses: &addresses,
        };
        Some(goodbye.to_bytes())
    }

    /// Takes what happens until `is_done`, `limit` or a hurry.
    async fn wait(
        &mut self,
        limit: Instant,
        hurry: &mut oneshot::Receiver<()>,
        is_hurried: &mut bool,
        is_done: impl Fn(&Self) -> bool,
    ) {
        while !*is_hurried && !is_done(self) {
            match next(&mut self.inputs, hurry, limit).await {
                Next::Input(input) => self.take(*input),
                Next::Hurry => *is_hurried = true,
                Next::Limit => break,
            }
        }
        // What had come by then counts: a thread that had no time has not read it. No more than was waiting, though.
        for _ in 0..self.inputs.len() {
            if is_done(self) {
                return;
            }
            if let Ok(input) = self.inputs.try_recv() {
                self.take(input);
            }
        }
    }
}

/// What ends a wait, or goes on with it.
enum Next {
    Input(Box<Input>),
    Hurry,
    Limit,
}

/// The limit and the hurry come first: in a flood there is always another input.
async fn next(inputs: &mut mpsc::Receiver<Input>, hurry: &mut oneshot::Receiver<()>, limit: Instant) -> Next {
    // A timer is told of the time when the thread is idle, which it may not be.
    if Instant::now() >= limit {
        return Next::Limit;
    }
    tokio::select! {
        biased;
        // Also when whoever asked is gone.
        _ = hurry => Next::Hurry,
        () = sleep_until(limit) => Next::Limit,
        input = inputs.recv() => input.map_or(Next::Limit, |input| Next::Input(Box::new(input))),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn in_a_flood_the_limit_and_the_hurry_are_still_heard() {
        let (input, mut inputs) = mpsc::channel(10);
        for station in 0..10 {
            input.try_send(Input::Stopped { station }).expect("there is room");
        }
        let (hurry, mut hurried) = oneshot::channel();
        let limit = Instant::now() + Duration::from_millis(250);
        assert!(matches!(next(&mut inputs, &mut hurried, limit).await, Next::Input(_)));
        assert!(matches!(next(&mut inputs, &mut hurried, Instant::now()).await, Next::Limit));
        drop::<oneshot::Sender<()>>(hurry);
        assert!(matches!(next(&mut inputs, &mut hurried, limit).await, Next::Hurry));
        assert_eq!(inputs.len(), 9);
    }
}
