//! The handle of a service that is advertised.

use std::fmt;
use std::sync::mpsc as std_mpsc;
use std::time::{SystemTime, UNIX_EPOCH};

use shutdown_core::{BoxError, StageContext};
use tokio::sync::{mpsc, oneshot, watch};

use crate::advertisement::{Advertisement, Names, hash};
use crate::discovery::Event;
use crate::engine::{Command, Engine};
use crate::error::Error;

/// A service that is advertised. Clones are the same service.
///
/// Dropping it withdraws nothing: that is what [`withdraw`](Self::withdraw) is for.
#[derive(Clone, Debug)]
#[must_use = "who is advertised must be withdrawn: give `withdraw` to stage Departure"]
pub struct Mdns {
    commands: mpsc::UnboundedSender<Command>,
    status: watch::Receiver<Status>,
}

/// How far the advertisement is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// Asks whether its names are taken; half a second to a second.
    #[default]
    Registering,
    /// Announced on one interface at least.
    Announced,
    /// Has said goodbye.
    Withdrawn,
    /// Was withdrawn before it was announced: nothing was said.
    NeverAnnounced,
}

/// What is known of the advertisement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// How far it is.
    pub state: State,
    /// The instance's full name; another than was asked for, if that was taken.
    pub instance: String,
    /// On which interfaces and over which families our announcement was seen, as `eth0 IPv4`.
    pub announced_on: Vec<String>,
}

impl State {
    /// Its name in reports and on `/status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Registering => "registering",
            Self::Announced => "announced",
            Self::Withdrawn => "withdrawn",
            Self::NeverAnnounced => "never_announced",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Mdns {
    /// Starts to advertise on the named interfaces, and on no other.
    ///
    /// Starts one thread, and one of mdns-sd for each interface. It returns before anything was announced; see
    /// [`watch`](Self::watch).
    ///
    /// # Errors
    ///
    /// What [`Advertisement::check`] says, or if the system gives no socket or thread. What fails later – mdns-sd opens its sockets in its thread – is logged.
    pub fn start(advertisement: Advertisement) -> Result<Self, Error> {
        let (service, interfaces) = advertisement.resolve()?;
        let names = Names::of(&advertisement.node_id, unique(&advertisement.node_id));
        let (commands, asked) = mpsc::unbounded_channel();
        let (tell, status) = watch::channel(Status::default());
        let (started, outcome) = std_mpsc::channel();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
        let work = move || {
            runtime.block_on(async move {
                match Engine::start(advertisement, service, names, interfaces, tell) {
                    Ok(engine) => {
                        engine.tell();
                        if started.send(Ok(())).is_ok() {
                            engine.run(asked).await;
                        }
                    }
                    // Nobody waits any more only if `start` has panicked.
                    Err(error) => _ = started.send(Err(error)),
                }
            });
        };
        std::thread::Builder::new().name("mdns".to_owned()).spawn(work).map_err(Error::Thread)?;
        let lost = || Err(Error::Thread(std::io::Error::other("it panicked")));
        outcome.recv().unwrap_or_else(|_| lost())?;
        Ok(Self { commands, status })
    }

    /// How far it is.
    pub fn state(&self) -> State {
        self.status.borrow().state
    }

    /// What is known now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// To see what changes. [`state`](Status::state) is announced before our own sockets have seen it
    /// ([`announced_on`](Status::announced_on)).
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Discovers other nodes of the service type and cluster, until the withdrawal.
    ///
    /// `listener` is called on the thread that does everything here: it must not block. The first browse begins to ask;
    /// later listeners hear what is new from then on.
    pub fn browse(&self, listener: impl FnMut(Event) + Send + 'static) {
        // The thread ends after a withdrawal only; there is nothing to discover then.
        let _ = self.commands.send(Command::Browse(Box::new(listener)));
    }

    /// Withdraws the service: the task for [`Stage::Departure`](shutdown_core::Stage::Departure).
    ///
    /// Says goodbye and waits until it was seen on each interface over each family, some 350 ms at most and not beyond the
    /// stage's deadline; writes one note for each into the report; and is over. The goodbye is said twice more while the
    /// process lives. Discovery ends here as well. A second call notes the same again.
    ///
    /// # Errors
    ///
    /// If it could not be sent on an interface on which the service was announced. Not having been announced is no error.
    ///
    /// # Cancel safety
    ///
    /// Once it has been polled the goodbye is said, whether it is waited for or not.
    pub async fn withdraw(&self, stage: StageContext) -> Result<(), BoxError> {
        let (hurry, hurried) = oneshot::channel::<()>();
        let (reply, mut departed) = oneshot::channel();
        let asked = self.commands.send(Command::Withdraw { until: stage.deadline, hurry: hurried, reply });
        asked.map_err(|_| "the mDNS thread has ended early")?;
        let mut hurry = Some(hurry);
        let departed = loop {
            tokio::select! {
                departed = &mut departed => break departed.map_err(|_| "the mDNS thread has panicked")?,
                () = stage.token.cancelled(), if hurry.is_some() => drop(hurry.take()),
            }
        };
        // What went wrong first: a report lists a hundred.
        let (failed, rest): (Vec<_>, Vec<_>) = departed.iter().partition(|departed| departed.failed());
        for departed in failed.iter().chain(&rest) {
            stage.note(departed.note());
        }
        match failed.first() {
            Some(first) => {
                Err(format!("no goodbye on {} of {} links; {first}", failed.len(), departed.len()).into())
            }
            None => Ok(()),
        }
    }
}

/// A number that another start does not have: 32 bits of the time, the process and the name.
fn unique(node_id: &str) -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    hash(format!("{node_id} {} {}", std::process::id(), since.as_nanos()).as_bytes())
}
