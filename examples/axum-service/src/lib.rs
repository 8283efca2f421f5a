//! What the staged backend is made of that other programs can take over.
//!
//! | module | what |
//! |---|---|
//! | [`resources`] | a database, a cache, a registry, and how a shutdown closes each |
//! | [`dotenv`] | `.env` read into a map |
//! | [`host`] | what this machine calls itself |
//! | [`secrets`] | a token in a file |
//! | [`stderr`] | stderr that never fails |

pub mod dotenv;
pub mod host;
pub mod resources;
pub mod secrets;
pub mod stderr;
