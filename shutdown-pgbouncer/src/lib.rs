//! PgBouncer's files edited safely by many hands, and PgBouncer drained and stopped without a broken transaction.

mod capacity;
mod connection;
mod ini;
mod name;
mod problem;
mod userlist;

pub use capacity::Capacity;
pub use connection::Connection;
pub use ini::{Database, Ini};
pub use name::{DatabaseName, NameError, UserName};
pub use problem::{Problem, Version};
pub use userlist::{Secret, User, Userlist};
