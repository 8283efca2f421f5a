//! What is counted: each client group apart, failures by kind, each kind with its first example.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::io::ErrorKind;
use std::sync::{Condvar, Mutex};

use crate::PATIENCE;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// A connection for each request.
    Fresh,
    /// Keep-alive, a few milliseconds between requests.
    Busy,
    /// Keep-alive, seconds between requests.
    Idle,
    /// Several streams at once on each connection.
    Http2,
    /// Messages that are echoed.
    WebSocket,
    /// A body sent slowly.
    Upload,
    /// A body read slowly.
    Download,
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Fresh, Self::Busy, Self::Idle, Self::Http2, Self::WebSocket, Self::Upload, Self::Download];
}

/// In what way a request is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Loss {
    /// No connection.
    Refused,
    /// The connection was reset.
    Reset,
    /// The connection ended, be it before the request in the client's face or before the end of the answer.
    Eof,
    /// An answer, but not the one.
    BadStatus,
    /// Other bytes than promised.
    WrongBody,
    /// No answer for a long time.
    Timeout,
    /// What none of these says.
    Other,
}

/// A request that was lost.
#[derive(Debug)]
pub struct Failed {
    /// In what way.
    pub loss: Loss,
    /// What the client saw.
    pub example: String,
}

impl Failed {
    /// Lost in this way.
    pub fn new(loss: Loss, example: impl Into<String>) -> Self {
        Self { loss, example: example.into() }
    }

    /// Lost with this error, while doing `what`.
    pub fn by(what: &str, error: &(dyn Error + 'static)) -> Self {
        let mut example = format!("{what}: {error}");
        let mut next = error.source();
        while let Some(error) = next {
            example += &format!(": {error}");
            next = error.source();
        }
        Self { loss: classify(error), example }
    }
}

fn classify(error: &(dyn Error + 'static)) -> Loss {
    let mut next = Some(error);
    let mut loss = Loss::Other;
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            match error.kind() {
                ErrorKind::ConnectionRefused => return Loss::Refused,
                ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => {
                    return Loss::Reset;
                }
                ErrorKind::UnexpectedEof => return Loss::Eof,
                _ => {}
            }
        }
        if let Some(error) = error.downcast_ref::<hyper::Error>()
            && (error.is_incomplete_message() || error.is_canceled() || error.is_closed())
        {
            loss = Loss::Eof;
        }
        next = error.source();
    }
    loss
}

/// What became of a request that was not lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Answered in full.
    Ok,
    /// Not lost and not answered. HTTP/2: the server's GOAWAY came before the request was processed, which the
    /// protocol tells its sender (RFC 9113, section 6.8). WebSocket: the socket ended as this kind of server ends
    /// them, and the client connects anew.
    Moved,
}

/// What a group has seen.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Answered in full.
    pub ok: usize,
    /// See [`Done::Moved`].
    pub moved: usize,
    /// Lost.
    pub failed: BTreeMap<Loss, (usize, String)>,
}

impl Tally {
    /// All that were lost.
    pub fn lost(&self) -> usize {
        self.failed.values().map(|(count, _)| count).sum()
    }

    /// All that were lost in this way.
    pub fn lost_by(&self, loss: Loss) -> usize {
        self.failed.get(&loss).map_or(0, |(count, _)| *count)
    }

    /// All that were asked for and not moved.
    pub fn requests(&self) -> usize {
        self.ok + self.lost()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed of {}", self.lost(), self.requests())?;
        if self.moved > 0 {
            write!(f, ", {} moved", self.moved)?;
        }
        for (loss, (count, example)) in &self.failed {
            write!(f, "; {loss:?} {count}, first: {example}")?;
        }
        Ok(())
    }
}

/// A tally for each group.
#[derive(Debug, Default)]
pub struct Tallies {
    groups: Mutex<BTreeMap<Group, Tally>>,
    grown: Condvar,
}

impl Tallies {
    /// Counts one.
    pub fn count(&self, group: Group, result: Result<Done, Failed>) {
        let mut groups = self.groups.lock().expect("nobody panics with it");
        let tally = groups.entry(group).or_default();
        match result {
            Ok(Done::Ok) => tally.ok += 1,
            Ok(Done::Moved) => tally.moved += 1,
            Err(failed) => tally.failed.entry(failed.loss).or_insert((0, failed.example)).0 += 1,
        }
        self.grown.notify_all();
    }

    /// All requests so far.
    pub fn requests(&self) -> usize {
        self.groups.lock().expect("nobody panics with it").values().map(Tally::requests).sum()
    }

    /// Waits until every group has been answered.
    ///
    /// # Panics
    ///
    /// If one is not within a minute.
    pub fn all_served(&self) {
        let groups = self.groups.lock().expect("nobody panics with it");
        let served = |groups: &BTreeMap<Group, Tally>| {
            Group::ALL.iter().all(|group| groups.get(group).is_some_and(|tally| tally.ok > 0))
        };
        let (groups, late) = self
            .grown
            .wait_timeout_while(groups, PATIENCE, |groups| !served(groups))
            .expect("nobody panics with it");
        assert!(!late.timed_out(), "not every group is served: {groups:?}");
    }

    /// What was counted by now.
    pub fn now(&self) -> BTreeMap<Group, Tally> {
        self.groups.lock().expect("nobody panics with it").clone()
    }
}
