//! How many connections the pools may open, and how many the server takes.

use std::collections::BTreeMap;
use std::fmt;

use crate::{Connection, Ini};

/// PgBouncer's default of `default_pool_size` (measured on 1.18, 1.24 and 1.26: `SHOW CONFIG`).
const DEFAULT_POOL_SIZE: i64 = 20;

/// What the databases of a file may open together, against what their server takes.
///
/// PgBouncer has one pool for each pair of a database and a user, unless the database's entry has `user=`: then it has one. How
/// many users come, its files do not tell. So the sum is a lower bound: it counts as many users of a database as it is told. The
/// entry `*` counts as one database, whichever clients make of it.
///
/// ```
/// # use shutdown_pgbouncer::{Capacity, Ini};
/// let ini = Ini::new("[databases]\na = pool_size=5\nb = pool_size=10 reserve_pool=3\n[pgbouncer]\n");
/// let capacity = Capacity::of(&ini, 1, 25, 100);
/// assert_eq!(
///     capacity.to_string(),
///     "Total Connections = Σ pool_size 15 + other 25 = 40 of 100 (60% headroom); 43 with reserve pools 3 (57% headroom)",
/// );
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Connections of all pools, the sum over the databases.
    pub pools: u64,
    /// Connections that the pools may open beyond when clients wait (`reserve_pool`).
    pub reserve: u64,
    /// Connections that others have to the server.
    pub other: u64,
    /// Connections that the server takes: its `max_connections`.
    pub limit: u64,
}

impl Capacity {
    /// Counts the databases of a file. Each has pools of so many users.
    ///
    /// Of two entries of one name the last counts. One without `pool_size`, or that cannot be read, has `default_pool_size`, else
    /// 20. `max_db_connections` caps what a database may open, reserve included.
    pub fn of(ini: &Ini, users: u64, other: u64, limit: u64) -> Self {
        let databases: BTreeMap<_, _> =
            ini.databases().into_iter().map(|entry| (entry.name, entry.connection)).collect();
        let default =
            |key, value| ini.parameter(key).and_then(|text| crate::ini::number(&text)).unwrap_or(value);
        let default_pool = default("default_pool_size", DEFAULT_POOL_SIZE);
        let default_reserve = default("reserve_pool_size", 0);
        let default_cap = default("max_db_connections", 0);
        let mut sum = Self { pools: 0, reserve: 0, other, limit };
        for connection in databases.into_values() {
            let connection = connection.unwrap_or_default();
            let users = if connection.get("user").is_some() { 1 } else { users };
            let cap = match own(&connection, &["max_db_connections"], default_cap) {
                0 => u64::MAX,
                cap => cap,
            };
            let pools = own(&connection, &["pool_size"], default_pool).saturating_mul(users).min(cap);
            let reserve = own(&connection, &["reserve_pool", "reserve_pool_size"], default_reserve);
            sum.pools = sum.pools.saturating_add(pools);
            sum.reserve = sum.reserve.saturating_add(reserve.saturating_mul(users).min(cap - pools));
        }
        sum
    }

    /// All connections without the reserve.
    pub fn total(&self) -> u64 {
        self.pools.saturating_add(self.other)
    }

    /// All connections when every pool has opened its reserve.
    pub fn total_with_reserve(&self) -> u64 {
        self.total().saturating_add(self.reserve)
    }

    /// Which part of the limit is left, without the reserve: 0.39 of 1; below 0 if there are too many.
    pub fn headroom(&self) -> f64 {
        self.left(self.total())
    }

    /// Which part of the limit is left when every pool has opened its reserve.
    pub fn headroom_with_reserve(&self) -> f64 {
        self.left(self.total_with_reserve())
    }

    fn left(&self, total: u64) -> f64 {
        match (total, self.limit) {
            (0, 0) => 0.0,
            (_, 0) => f64::NEG_INFINITY,
            (total, limit) => 1.0 - total as f64 / limit as f64,
        }
    }

    fn left_of(&self, total: u64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match total.checked_sub(self.limit) {
            // Rounded down, so that none is shown that is not there.
            Some(0) | None => write!(f, "({}% headroom)", (100.0 * self.left(total)).max(0.0) as u64),
            Some(over) => write!(f, "({over} too many)"),
        }
    }
}

/// The arithmetic in one line.
impl fmt::Display for Capacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pools, reserve, other, limit } = self;
        let total = self.total();
        write!(f, "Total Connections = Σ pool_size {pools} + other {other} = {total} of {limit} ")?;
        self.left_of(total, f)?;
        if *reserve > 0 {
            let total = self.total_with_reserve();
            write!(f, "; {total} with reserve pools {reserve} ")?;
            self.left_of(total, f)?;
        }
        Ok(())
    }
}

/// The number that an entry has of its own by the last of these keys, else the default. One below zero is none.
fn own(connection: &Connection, keys: &[&str], default: i64) -> u64 {
    let last = connection.pairs().map(|(key, _)| key).filter(|key| keys.contains(key)).last();
    let own = last.and_then(|key| connection.number(key)).map(i64::from).filter(|number| *number >= 0);
    u64::try_from(own.unwrap_or(default)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_written_as_people_write_it() {
        let projects: String = (0..50).map(|id| format!("proj_{id} = host=h pool_size=5\n")).collect();
        let ini = Ini::new(format!("[databases]\n{projects}platform = pool_size=25\n[pgbouncer]\n"));
        let capacity = Capacity::of(&ini, 1, 30, 500);
        assert_eq!(
            capacity.to_string(),
            "Total Connections = Σ pool_size 275 + other 30 = 305 of 500 (39% headroom)"
        );
        assert!((capacity.headroom() - 0.39).abs() < 1e-9);
        let full = Capacity { limit: 305, ..capacity };
        assert!(full.to_string().ends_with("305 of 305 (0% headroom)"), "{full}");
        let over = Capacity { limit: 300, reserve: 10, ..capacity };
        assert!(
            over.to_string().ends_with("305 of 300 (5 too many); 315 with reserve pools 10 (15 too many)"),
            "{over}"
        );
    }

    #[test]
    fn an_entry_without_a_size_has_the_default() {
        let of = |text: &str| Capacity::of(&Ini::new(text), 1, 0, 0);
        assert_eq!(of("[databases]\na =\n").pools, 20);
        assert_eq!(of("[databases]\na =\nb = broken\n[pgbouncer]\ndefault_pool_size = 0x7\n").pools, 14);
        assert_eq!(of("[databases]\na = pool_size=-1\n").pools, 20);
        assert_eq!(of("[databases]\na = pool_size=3\na = pool_size=4\n* =\n").pools, 24);
        assert_eq!(
            of("[databases]\na = reserve_pool=2\nb =\n[pgbouncer]\nreserve_pool_size = 5\n").reserve,
            7
        );
        assert_eq!(of("[databases]\na = reserve_pool=2 reserve_pool_size=3\n").reserve, 3);
    }

    #[test]
    fn a_pool_is_for_a_user_and_a_cap_for_all() {
        let ini = Ini::new(
            "[databases]\na = pool_size=5\nb = pool_size=5 user=u\nc = pool_size=5 reserve_pool=4 max_db_connections=12\n",
        );
        let capacity = Capacity::of(&ini, 2, 0, 0);
        assert_eq!((capacity.pools, capacity.reserve), (10 + 5 + 10, 2));
        let most = Capacity { pools: u64::MAX, reserve: 1, other: 1, limit: 0 };
        assert_eq!(most.total_with_reserve(), u64::MAX);
        assert!(most.headroom() < 0.0);
    }
}
