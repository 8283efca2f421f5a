//! PgBouncer's files edited safely by many hands, and PgBouncer drained and stopped without a broken transaction.

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
