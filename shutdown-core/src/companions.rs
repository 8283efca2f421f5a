//! Processes next to the service that end when it ends: in order, in the right way, and nobody else.
//!
//! ```
//! use shutdown_core::companions::{Companion, Companions, PidFile, PidFileKind};
//!
//! let pgbouncer = PidFile::new("/run/pgbouncer/pgbouncer.pid", PidFileKind::Plain);
//! let postgres = PidFile::new("/var/lib/postgresql/data/postmaster.pid", PidFileKind::Postmaster);
//! let companions = Companions::new([
//!     Companion::with_pid_file("pgbouncer", pgbouncer).ladder("INT:6s/TERM:2s/KILL:1s".parse()?),
//!     Companion::with_pid_file("postgres", postgres).ladder("INT:6s/QUIT:2s/KILL:1s".parse()?).group(1),
//! ]);
//! let plan = shutdown_core::ShutdownCoordinator::builder().companions(&companions).plan()?;
//! // As long as the longest ladder of each group, one after another.
//! let stage = plan.stages.iter().find(|planned| planned.stage == shutdown_core::Stage::Companions);
//! assert_eq!(stage.map(|planned| planned.budget.as_secs()), Some(18));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A companion is ended by a [`Ladder`] of signals, each sent once and only if the one before was not enough. If the stage has
//! less time than the ladder takes, all its rungs are shortened alike, so that the last signal is still sent.
//!
//! Before any signal the process is held (by a pidfd), and then looked at. It is refused, and no signal is sent:
//!
//! | when | because |
//! |---|---|
//! | the PID file says 0, 1, a negative number, our own or our parent's number, or no number | that is a group, everybody, or ourselves |
//! | its process is called otherwise | the number was given to another since |
//! | its process was started more than 2 s after the file was written | so was this one |
//! | the file is a link, can be written by everybody, or belongs to a stranger | then anybody chooses the process |
//! | the process is another user's, and we are not root | we could not |
//! | by name: there are several | one of them is somebody else's |
//!
//! What becomes of each is an [`Ending`]: refused and timed out are failures of the stage, and exit code 10.
//!
//! This says nothing about children that a companion has: PostgreSQL's end with their parent.
//!
//! Without pidfds (Linux before 5.3, other systems) there is a weaker way, by number: between a last look at the process and
//! the signal, some microseconds, the number could be given to another. Without `/proc` (other systems) only locked PID files and
//! launched companions are ended; the others are refused.
//!
//! Parts: `pid_file` (what is in a file), `identity` (who a process is), `process` (holding one), `find`, `ladder`, `stop` (the story
//! of ending one), `one` (without a shutdown), `set` (order, stage tasks), `launch` and `spawn` (starting).

mod companion;
mod find;
mod identity;
mod ladder;
mod launch;
mod one;
mod pid_file;
mod process;
mod set;
mod spawn;
mod stop;

pub use companion::{Companion, Ending, Launch, NotRunning, OnExit, Refusal};
pub use ladder::{Ladder, LadderError, Rung, StopSignal};
pub use launch::LaunchError;
pub use pid_file::{ClaimError, ClaimedPidFile, NoNumber, PidFile, PidFileKind};
pub use process::Exit;
pub use set::{CompanionStatus, Companions};
