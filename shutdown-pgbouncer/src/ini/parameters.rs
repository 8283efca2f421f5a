//! The parameters of `[pgbouncer]`: which there are, and what their values must be.
//!
//! The list is what `SHOW CONFIG` of 1.18, 1.24 and 1.26 shows; each value was tried on each of them.

use crate::connection::is_space;
use crate::problem::Known;

/// What a value must be, or the file is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Any text, also none.
    Text,
    /// A whole number as C's `strtol` reads it: decimal, `0x…`, or octal with a 0 in front.
    Whole,
    /// Seconds from 0 on as C's `strtod` reads them: `1.5`, `1e3`, `inf`.
    Seconds,
    /// One of these words, in any case.
    Word(&'static [&'static str]),
}

/// A parameter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parameter {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) known: Known,
    /// Whether it outlives a second `[pgbouncer]`, which sets all others back to their defaults.
    pub(super) kept: bool,
}

/// How a value is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    AsWritten,
    /// It has more bits than are kept.
    Cut,
    Refused,
}

/// The parameter of this name.
pub(super) fn find(name: &[u8]) -> Option<Parameter> {
    PARAMETERS.iter().find(|parameter| parameter.name.as_bytes() == name).copied()
}

/// The whole number that C's `strtol` reads from all of a text, at most 64 bits of it.
pub(super) fn whole(text: &[u8]) -> Option<i64> {
    let text =
        std::str::from_utf8(text).ok()?.trim_start_matches(|c: char| c.is_ascii() && is_space(c as u8));
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hexadecimal) => (hexadecimal, 16),
        None if digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    if digits.is_empty() {
        return None;
    }
    let sign = if negative { -1 } else { 1 };
    digits.chars().try_fold(0_i64, |number, digit| {
        let digit = i64::from(digit.to_digit(radix)?);
        Some(number.saturating_mul(i64::from(radix)).saturating_add(sign * digit))
    })
}

impl Kind {
    /// How PgBouncer takes a value.
    pub(super) fn taken(self, value: &[u8]) -> Taken {
        let good = match self {
            Self::Text => true,
            Self::Whole => match whole(value) {
                Some(number) if i32::try_from(number).is_err() => return Taken::Cut,
                number => number.is_some(),
            },
            Self::Seconds => seconds(value),
            Self::Word(words) => words.iter().any(|word| word.as_bytes().eq_ignore_ascii_case(value)),
        };
        if good { Taken::AsWritten } else { Taken::Refused }
    }

    /// What it is not if it is refused: `a whole number`.
    pub(super) fn wanted(self) -> String {
        match self {
            Self::Text => "text".into(),
            Self::Whole => "a whole number".into(),
            Self::Seconds => "a number of seconds".into(),
            Self::Word(words) => format!("one of {}", words.join(", ")),
        }
    }
}

/// Whether C's `strtod` reads all of a text as a number that is not below zero, and neither too large nor too small for it.
fn seconds(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let text = text.trim_start_matches(|c: char| c.is_ascii() && is_space(c as u8));
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if digits.starts_with(['+', '-']) {
        return false;
    }
    if let Some(digits) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        return !negative && hexadecimal(digits);
    }
    let Ok(number) = digits.parse::<f64>() else { return false };
    let mantissa = digits.split(['e', 'E']).next().unwrap_or_default();
    let is_zero = !mantissa.contains(|c: char| c.is_ascii_digit() && c != '0');
    if digits.starts_with(|c: char| c.is_ascii_alphabetic()) {
        // `inf`, and `nan`, which is not below zero.
        return !negative || number.is_nan();
    }
    (number.is_normal() || (number == 0.0 && is_zero)) && (!negative || is_zero)
}

/// Whether this, behind `0x`, is a number: `1f`, `1.8`, `1p3`. One that is too large is left to PgBouncer.
fn hexadecimal(text: &str) -> bool {
    let (mantissa, exponent) =
        text.split_once(['p', 'P']).map_or((text, None), |(mantissa, exponent)| (mantissa, Some(exponent)));
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let exponent = exponent.is_none_or(|exponent| {
        let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        !exponent.is_empty() && exponent.len() < 3 && exponent.bytes().all(|byte| byte.is_ascii_digit())
    });
    digits(whole) && digits(part) && whole.len() + part.len() > 0 && exponent
}

const fn row(name: &'static str, kind: Kind, known: Known) -> Parameter {
    Parameter { name, kind, known, kept: false }
}

const fn kept(name: &'static str, kind: Kind, known: Known) -> Parameter {
    Parameter { name, kind, known, kept: true }
}

/// `ldap` only from 1.25 on; `pam` and `ldap` only where PgBouncer was built with it, as Debian's is.
const AUTH_TYPES: Kind =
    Kind::Word(&["any", "trust", "plain", "md5", "cert", "hba", "pam", "scram-sha-256", LDAP]);
pub(super) const LDAP: &str = "ldap";
const POOL_MODES: Kind = Kind::Word(&["session", "transaction", "statement"]);
const SSL_MODES: Kind = Kind::Word(&["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]);

/// In the order of `SHOW CONFIG`.
pub(super) const PARAMETERS: &[Parameter] = &[
    row("admin_users", Kind::Text, Known::ALWAYS),
    row("application_name_add_host", Kind::Whole, Known::ALWAYS),
    kept("auth_dbname", Kind::Text, Known::BY_24),
    kept("auth_file", Kind::Text, Known::ALWAYS),
    row("auth_hba_file", Kind::Text, Known::ALWAYS),
    kept("auth_ident_file", Kind::Text, Known::BY_24),
    kept("auth_ldap_options", Kind::Text, Known::BY_26),
    row("auth_query", Kind::Text, Known::ALWAYS),
    row("auth_type", AUTH_TYPES, Known::ALWAYS),
    kept("auth_user", Kind::Text, Known::ALWAYS),
    row("autodb_idle_timeout", Kind::Seconds, Known::ALWAYS),
    row("cancel_wait_timeout", Kind::Seconds, Known::BY_24),
    row("client_idle_timeout", Kind::Seconds, Known::ALWAYS),
    row("client_login_timeout", Kind::Seconds, Known::ALWAYS),
    kept("client_tls13_ciphers", Kind::Text, Known::BY_26),
    row("client_tls_ca_file", Kind::Text, Known::ALWAYS),
    row("client_tls_cert_file", Kind::Text, Known::ALWAYS),
    row("client_tls_ciphers", Kind::Text, Known::ALWAYS),
    row("client_tls_dheparams", Kind::Text, Known::ALWAYS),
    row("client_tls_ecdhcurve", Kind::Text, Known::ALWAYS),
    row("client_tls_key_file", Kind::Text, Known::ALWAYS),
    row("client_tls_protocols", Kind::Text, Known::ALWAYS),
    row("client_tls_sslmode", SSL_MODES, Known::ALWAYS),
    kept("conffile", Kind::Text, Known::ALWAYS),
    row("default_pool_size", Kind::Whole, Known::ALWAYS),
    row("disable_pqexec", Kind::Whole, Known::ALWAYS),
    row("dns_max_ttl", Kind::Seconds, Known::ALWAYS),
    row("dns_nxdomain_ttl", Kind::Seconds, Known::ALWAYS),
    row("dns_zone_check_period", Kind::Seconds, Known::ALWAYS),
    row("idle_transaction_timeout", Kind::Seconds, Known::ALWAYS),
    row("ignore_startup_parameters", Kind::Text, Known::ALWAYS),
    row("job_name", Kind::Text, Known::ALWAYS),
    row("listen_addr", Kind::Text, Known::ALWAYS),
    row("listen_backlog", Kind::Whole, Known::ALWAYS),
    row("listen_port", Kind::Whole, Known::ALWAYS),
    row("log_connections", Kind::Whole, Known::ALWAYS),
    row("log_disconnections", Kind::Whole, Known::ALWAYS),
    row("log_pooler_errors", Kind::Whole, Known::ALWAYS),
    row("log_stats", Kind::Whole, Known::ALWAYS),
    row("logfile", Kind::Text, Known::ALWAYS),
    row("login_notify_message", Kind::Text, Known::BY_26),
    row("max_client_conn", Kind::Whole, Known::ALWAYS),
    row("max_db_client_connections", Kind::Whole, Known::BY_24),
    row("max_db_connections", Kind::Whole, Known::ALWAYS),
    row("max_packet_size", Kind::Whole, Known::ALWAYS),
    row("max_prepared_statements", Kind::Whole, Known::BY_24),
    row("max_user_client_connections", Kind::Whole, Known::BY_24),
    row("max_user_connections", Kind::Whole, Known::ALWAYS),
    row("min_pool_size", Kind::Whole, Known::ALWAYS),
    row("peer_id", Kind::Whole, Known::PEERS),
    row("pidfile", Kind::Text, Known::ALWAYS),
    row("pkt_buf", Kind::Whole, Known::ALWAYS),
    row("pool_idle_timeout", Kind::Seconds, Known::BY_26),
    row("pool_mode", POOL_MODES, Known::ALWAYS),
    row("query_timeout", Kind::Seconds, Known::ALWAYS),
    row("query_wait_notify", Kind::Whole, Known::BY_26),
    row("query_wait_timeout", Kind::Seconds, Known::ALWAYS),
    row("reserve_pool_size", Kind::Whole, Known::ALWAYS),
    row("reserve_pool_timeout", Kind::Seconds, Known::ALWAYS),
    row("resolv_conf", Kind::Text, Known::ALWAYS),
    row("sbuf_loopcnt", Kind::Whole, Known::ALWAYS),
    row("scram_iterations", Kind::Whole, Known::BY_26),
    row("server_check_delay", Kind::Seconds, Known::ALWAYS),
    row("server_check_query", Kind::Text, Known::ALWAYS),
    row("server_connect_timeout", Kind::Seconds, Known::ALWAYS),
    row("server_fast_close", Kind::Whole, Known::ALWAYS),
    row("server_idle_timeout", Kind::Seconds, Known::ALWAYS),
    row("server_lifetime", Kind::Seconds, Known::ALWAYS),
    row("server_login_retry", Kind::Seconds, Known::ALWAYS),
    row("server_reset_query", Kind::Text, Known::ALWAYS),
    row("server_reset_query_always", Kind::Whole, Known::ALWAYS),
    row("server_round_robin", Kind::Whole, Known::ALWAYS),
    kept("server_tls13_ciphers", Kind::Text, Known::BY_26),
    row("server_tls_ca_file", Kind::Text, Known::ALWAYS),
    row("server_tls_cert_file", Kind::Text, Known::ALWAYS),
    row("server_tls_ciphers", Kind::Text, Known::ALWAYS),
    row("server_tls_key_file", Kind::Text, Known::ALWAYS),
    row("server_tls_protocols", Kind::Text, Known::ALWAYS),
    row("server_tls_sslmode", SSL_MODES, Known::ALWAYS),
    row("so_reuseport", Kind::Whole, Known::ALWAYS),
    row("stats_period", Kind::Whole, Known::ALWAYS),
    row("stats_users", Kind::Text, Known::ALWAYS),
    row("suspend_timeout", Kind::Seconds, Known::UNTIL_24),
    row("syslog", Kind::Whole, Known::ALWAYS),
    row("syslog_facility", Kind::Text, Known::ALWAYS),
    row("syslog_ident", Kind::Text, Known::ALWAYS),
    row("tcp_defer_accept", Kind::Whole, Known::ALWAYS),
    row("tcp_keepalive", Kind::Whole, Known::ALWAYS),
    row("tcp_keepcnt", Kind::Whole, Known::ALWAYS),
    row("tcp_keepidle", Kind::Whole, Known::ALWAYS),
    row("tcp_keepintvl", Kind::Whole, Known::ALWAYS),
    row("tcp_socket_buffer", Kind::Whole, Known::ALWAYS),
    row("tcp_user_timeout", Kind::Whole, Known::ALWAYS),
    row("track_extra_parameters", Kind::Text, Known::BY_24),
    row("transaction_timeout", Kind::Seconds, Known::BY_26),
    row("unix_socket_dir", Kind::Text, Known::ALWAYS),
    row("unix_socket_group", Kind::Text, Known::ALWAYS),
    row("unix_socket_mode", Kind::Whole, Known::ALWAYS),
    kept("user", Kind::Text, Known::ALWAYS),
    kept("verbose", Kind::Whole, Known::ALWAYS),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_taken_as_c_takes_them() {
        for (text, number) in
            [("0", 0), ("20", 20), ("-1", -1), ("+5", 5), ("0x10", 16), ("0777", 511), ("\x0b7", 7)]
        {
            assert_eq!(whole(text.as_bytes()), Some(number), "{text}");
        }
        for text in ["", "zz", "1x", "1.5", "08", "0x", "-", "--1", "1 "] {
            assert_eq!(whole(text.as_bytes()), None, "{text}");
        }
        assert_eq!(Kind::Whole.taken(b"99999999999999999999999"), Taken::Cut);
        for text in
            ["0", "1.5", ".5", "1.", "1e3", "0x10", "0x1p3", "inf", "nan", "-nan", "-0", "0e999", "+1"]
        {
            assert!(seconds(text.as_bytes()), "{text}");
        }
        for text in ["", "-1", "1x", "zz", "1e400", "1e-400", "-inf", "0x", "+-1", ".", "e5"] {
            assert!(!seconds(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn the_parameters_stand_in_the_order_of_show_config() {
        assert!(PARAMETERS.is_sorted_by_key(|parameter| parameter.name));
        assert_eq!(PARAMETERS.len(), 100);
    }
}
