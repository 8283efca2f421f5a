//! Edits a PgBouncer's files, and drains and stops it.

fn main() {}
