//! PgBouncer's files edited safely by many hands, and PgBouncer drained and stopped without a broken transaction.
//!
//! PgBouncer's settings are edited by scripts that lose entries, tear files and never look whether PgBouncer took them; it has no test
//! of a configuration, and its signals mean other things in each version. Here an edit is one story under one lock that shell
//! scripts share: look at the file, keep a copy, replace it, reload, compare, and go back if PgBouncer refuses. The command `pgbctl` is
//! this crate with flags; everything it does is a method of [`PgBouncer`].
//!
//! ```
//! use shutdown_pgbouncer::{Connection, PgBouncer, Reload};
//!
//! # let dir = tempfile::tempdir()?;
//! # let config = dir.path().join("pgbouncer.ini");
//! # std::fs::write(&config, "[databases]\n; ours\n[pgbouncer]\n")?;
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! let pgbouncer = PgBouncer::new(&config).reload_after(Reload::Never);
//! let orders = Connection::parse("host=postgres port=5432 pool_size=5")?;
//! let done = pgbouncer.add_database(&"orders".parse()?, &orders).await?;
//! assert!(done.changed && done.backup.is_some());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # let after = std::fs::read_to_string(&config)?;
//! assert_eq!(after, "[databases]\norders = host=postgres port=5432 pool_size=5\n; ours\n[pgbouncer]\n");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | to do | take |
//! |---|---|
//! | edit, reload, restore, stop | [`PgBouncer`] |
//! | read or check a file | [`Ini`], [`Userlist`], [`check()`], [`Capacity`] |
//! | make a secret that PostgreSQL and PgBouncer share | [`secret`] |
//! | pause, drain | [`Paused`], [`drain()`] |
//! | have a database there from a service's start to its end | [`Registration`] |
//! | ask the admin console | [`Console`] |
//! | edit another file in the same way | [`Locked`] |
//!
//! Methods that edit wait for their lock with the thread that calls them, at most as long as they are told; in a runtime of one thread
//! nothing else runs meanwhile.

mod capacity;
mod check;
mod connection;
mod console;
mod doctor;
mod error;
mod ini;
mod name;
mod pause;
mod pgbouncer;
mod problem;
mod references;
mod registration;
mod reload;
pub mod secret;
mod store;
mod userlist;

pub use capacity::Capacity;
pub use check::{Finding, check, whole};
pub use connection::Connection;
pub use console::{Console, ConsoleAddress, Row};
pub use doctor::{Diagnosis, diagnose};
pub use error::Error;
pub use ini::{Database, Ini};
pub use name::{DatabaseName, NameError, UserName};
pub use pause::{Paused, drain};
pub use pgbouncer::{Done, PgBouncer, Reload, Removal};
pub use problem::{Problem, Version};
pub use registration::Registration;
pub use reload::Reloaded;
pub use store::{Backup, Locked, Written};
pub use userlist::{Secret, User, Userlist};
