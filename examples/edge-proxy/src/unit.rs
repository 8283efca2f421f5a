//! `--check --unit FILE`: whether a systemd unit leaves the shutdown the time it takes.
//!
//! The file is read as systemd reads it (`man systemd.syntax`, `systemd.time`, `systemd.service`, `systemd.kill`,
//! `systemd.exec`), with three differences. What systemd would ignore with a line in its log is an error here. Drop-ins
//! are not looked for: `systemctl cat UNIT` prints a unit with its drop-ins, and that can be read. Specifiers (`%i`) are
//! not resolved, and neither `EnvironmentFile=` nor the flags in `ExecStart=` are read.
//!
//! Reading is a function of the text: no file, no clock.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Duration;

use shutdown_core::display_duration;

/// What systemd takes, unless its `system.conf` says otherwise (`DefaultTimeoutStopSec=`).
const DEFAULT_STOP: Duration = Duration::from_secs(90);
/// Between the end of our total and systemd's kill: what starting to stop and leaving may take.
pub(crate) const MARGIN: Duration = Duration::from_secs(2);

/// A time that may be without end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Span {
    Finite(Duration),
    Infinite,
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finite(time) => display_duration(*time).fmt(f),
            Self::Infinite => f.write_str("infinity"),
        }
    }
}

/// What a service unit says about stopping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    /// `None`: not given.
    stop: Option<Span>,
    kind: String,
    watchdog: Option<Duration>,
    kill_mode: String,
    kill_signal: String,
    restart_kill_signal: Option<String>,
    send_sigkill: bool,
    send_sighup: bool,
    environment: BTreeMap<String, String>,
    environment_file: bool,
}

impl Unit {
    /// Reads a unit file's text.
    ///
    /// # Errors
    ///
    /// The first line that systemd would ignore, or a unit without a `[Service]` section; as one sentence.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut unit = Self {
            stop: None,
            kind: "simple".to_owned(),
            watchdog: None,
            kill_mode: "control-group".to_owned(),
            kill_signal: "SIGTERM".to_owned(),
            restart_kill_signal: None,
            send_sigkill: true,
            send_sighup: false,
            environment: BTreeMap::new(),
            environment_file: false,
        };
        let mut section = None;
        let mut is_service = false;
        for (number, line) in logical_lines(text) {
            let at = |problem: String| format!("line {number}: {problem}");
            if let Some(rest) = line.strip_prefix('[') {
                let Some(name) = rest.strip_suffix(']') else {
                    return Err(at(format!("{line:?} begins a section and has no ]")));
                };
                is_service |= name == "Service";
                section = Some(name.to_owned());
                continue;
            }
            let Some((key, value)) = line.split_once('=') else {
                return Err(at(format!("{line:?} is neither a section nor an assignment")));
            };
            match section.as_deref() {
                None => return Err(at(format!("{:?} stands before the first section", key.trim()))),
                Some("Service") => unit.assign(key.trim(), value.trim()).map_err(at)?,
                Some(_) => {}
            }
        }
        if !is_service {
            return Err("there is no [Service] section: it is no service unit".to_owned());
        }
        Ok(unit)
    }

    /// A later assignment wins, an empty one resets.
    fn assign(&mut self, key: &str, value: &str) -> Result<(), String> {
        let or = |default: &str| if value.is_empty() { default.to_owned() } else { value.to_owned() };
        let wrong = |wanted: &str| format!("{key}={value} is not {wanted}");
        match key {
            "TimeoutStopSec" | "TimeoutSec" => {
                self.stop = match value {
                    "" => None,
                    // Traditionally 0 is without end.
                    _ => Some(
                        match span(value).ok_or_else(|| wrong("a time span, as 30, 1min 30s or infinity"))? {
                            Span::Finite(Duration::ZERO) => Span::Infinite,
                            given => given,
                        },
                    ),
                }
            }
            "WatchdogSec" => {
                self.watchdog = match value {
                    "" => None,
                    _ => match span(value).ok_or_else(|| wrong("a time span, as 30 or 1min 30s"))? {
                        Span::Finite(time) if !time.is_zero() => Some(time),
                        _ => None,
                    },
                }
            }
            "Type" => self.kind = or("simple"),
            "KillMode" => self.kill_mode = or("control-group"),
            "KillSignal" => self.kill_signal = or("SIGTERM"),
            "RestartKillSignal" => self.restart_kill_signal = (!value.is_empty()).then(|| value.to_owned()),
            "SendSIGKILL" => {
                self.send_sigkill = value.is_empty() || boolean(value).ok_or_else(|| wrong("yes or no"))?;
            }
            "SendSIGHUP" => {
                self.send_sighup = !value.is_empty() && boolean(value).ok_or_else(|| wrong("yes or no"))?;
            }
            "Environment" if value.is_empty() => self.environment.clear(),
            "Environment" => {
                for item in
                    items(value).ok_or_else(|| wrong("a list of NAME=value, each quoted as a whole"))?
                {
                    let Some((name, value)) = item.split_once('=') else {
                        return Err(format!("Environment={value}: {item:?} is no NAME=value"));
                    };
                    self.environment.insert(name.to_owned(), value.to_owned());
                }
            }
            "EnvironmentFile" => self.environment_file = !value.is_empty(),
            _ => {}
        }
        Ok(())
    }

    /// What the unit sets for the shutdown; it is what runs under systemd.
    pub(crate) fn variable(&self, name: &str) -> Option<&str> {
        self.environment.get(name).filter(|_| name.starts_with("SHUTDOWN_")).map(String::as_str)
    }

    /// Compares the unit with a shutdown that takes `total` at most, and shows the arithmetic.
    ///
    /// # Errors
    ///
    /// Systemd would kill the proxy before its shutdown may end, or with a signal that it does not hear; one sentence.
    pub(crate) fn check(&self, total: Duration) -> Result<String, String> {
        let mut text = String::new();
        let mut line = |name: &str, value: &dyn fmt::Display| {
            let _ = writeln!(text, "{name:<22} {value}");
        };
        line("Type", &self.kind);
        line("KillMode", &self.kill_mode);
        line("KillSignal", &self.kill_signal);
        match self.watchdog {
            None => line("WatchdogSec", &"none"),
            Some(time) => {
                let half = display_duration(time / 2).to_string();
                line("WatchdogSec", &format_args!("{}: a ping each {half}", display_duration(time)));
            }
        }
        let stop = self.stop.unwrap_or(Span::Finite(DEFAULT_STOP));
        let default = if self.stop.is_none() { " (systemd's default)" } else { "" };
        line("TimeoutStopSec", &format_args!("{stop}{default}"));
        for (name, value) in self.environment.iter().filter(|(name, _)| self.variable(name).is_some()) {
            line(name, &format_args!("{value} (the unit's Environment=)"));
        }
        self.is_heard()?;

        let needed = total + MARGIN;
        let (shown_total, shown_margin) = (display_duration(total), display_duration(MARGIN));
        let sum = format!("total {shown_total} + margin {shown_margin} = {}", display_duration(needed));
        match stop {
            Span::Infinite => line("fits", &format_args!("{sum}, and systemd waits without end")),
            Span::Finite(stop) if stop >= needed => {
                let spare = display_duration(stop - needed);
                line(
                    "fits",
                    &format_args!("{sum} of TimeoutStopSec {}, {spare} to spare", display_duration(stop)),
                );
            }
            Span::Finite(time) => {
                let fix = match time.checked_sub(MARGIN).filter(|less| !less.is_zero()) {
                    Some(less) => format!(", or lower SHUTDOWN_TOTAL_TIMEOUT to {}", display_duration(less)),
                    None => String::new(),
                };
                return Err(format!(
                    "systemd kills before the shutdown may end: {sum} is more than TimeoutStopSec={stop}{default}: \
                     raise that to {}{fix}",
                    display_duration(needed)
                ));
            }
        }
        for warning in self.warnings() {
            let _ = writeln!(text, "warning: {warning}");
        }
        Ok(text)
    }

    /// Whether the proxy hears that it is to stop.
    fn is_heard(&self) -> Result<(), String> {
        let signals = [
            ("KillSignal", Some(&self.kill_signal)),
            ("RestartKillSignal", self.restart_kill_signal.as_ref()),
        ];
        for (key, signal) in signals.into_iter().filter_map(|(key, signal)| Some((key, signal?))) {
            // By name, with or without SIG, or by number (`man systemd.kill`).
            if !["SIGTERM", "TERM", "15", "SIGINT", "INT", "2"].contains(&signal.as_str()) {
                return Err(format!(
                    "{key}={signal} would not begin a shutdown but end the proxy, or do nothing: write SIGTERM or SIGINT"
                ));
            }
        }
        if self.kill_mode == "none" {
            return Err("KillMode=none: systemd would never tell the proxy to stop: write mixed".to_owned());
        }
        if self.send_sighup {
            return Err(
                "SendSIGHUP=yes: SIGHUP follows the stop signal at once and ends the proxy: write no"
                    .to_owned(),
            );
        }
        Ok(())
    }

    fn warnings(&self) -> Vec<&'static str> {
        let mut warnings = Vec::new();
        match self.kind.as_str() {
            "notify" => {}
            "notify-reload" => warnings.push(
                "Type=notify-reload: systemctl reload sends SIGHUP, which ends the proxy: write notify",
            ),
            _ => warnings.push(
                "only with Type=notify does systemd wait until the proxy serves, and extend the time of a stop that \
                 makes progress",
            ),
        }
        if !["mixed", "process"].contains(&self.kill_mode.as_str()) {
            warnings
                .push("KillMode=control-group also tells what the proxy works with, at once: write mixed");
        }
        if !self.send_sigkill {
            warnings.push("SendSIGKILL=no: a proxy that hangs would be left running");
        }
        if self.environment_file {
            warnings.push("EnvironmentFile= is not read: a SHUTDOWN_TOTAL_TIMEOUT in it is not compared");
        }
        warnings
    }
}

/// The lines that say something, each with the number of its first line: continued ones joined by a space, comments left
/// out, also between continued ones.
fn logical_lines(text: &str) -> Vec<(usize, String)> {
    let mut lines: Vec<(usize, String)> = Vec::new();
    let mut continued = false;
    for (index, raw) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let line = raw.trim_start();
        if line.starts_with(['#', ';']) {
            continue;
        }
        // A backslash that is escaped itself continues nothing.
        let more = line.bytes().rev().take_while(|byte| *byte == b'\\').count() % 2 == 1;
        let part = if more { &line[..line.len() - 1] } else { line };
        match lines.last_mut().filter(|_| continued) {
            Some((_, whole)) => {
                whole.push(' ');
                whole.push_str(part);
            }
            None => lines.push((index + 1, part.to_owned())),
        }
        continued = more;
    }
    for (_, line) in &mut lines {
        *line = line.trim().to_owned();
    }
    lines.retain(|(_, line)| !line.is_empty());
    lines
}

/// The units of `man systemd.time`, in microseconds. Of those with a common beginning the longer one first.
const UNITS: [(&str, u64); 30] = [
    ("seconds", SECOND),
    ("second", SECOND),
    ("sec", SECOND),
    ("s", SECOND),
    ("minutes", 60 * SECOND),
    ("minute", 60 * SECOND),
    ("min", 60 * SECOND),
    ("months", 2_629_800 * SECOND),
    ("month", 2_629_800 * SECOND),
    ("M", 2_629_800 * SECOND),
    ("msec", 1000),
    ("ms", 1000),
    ("m", 60 * SECOND),
    ("hours", 3600 * SECOND),
    ("hour", 3600 * SECOND),
    ("hr", 3600 * SECOND),
    ("h", 3600 * SECOND),
    ("days", 86_400 * SECOND),
    ("day", 86_400 * SECOND),
    ("d", 86_400 * SECOND),
    ("weeks", 604_800 * SECOND),
    ("week", 604_800 * SECOND),
    ("w", 604_800 * SECOND),
    ("years", 31_557_600 * SECOND),
    ("year", 31_557_600 * SECOND),
    ("y", 31_557_600 * SECOND),
    ("usec", 1),
    ("us", 1),
    // The Greek letter and the sign of the same look.
    ("\u{3bc}s", 1),
    ("\u{b5}s", 1),
];
const SECOND: u64 = 1_000_000;

/// A time span: parts that are added up, each a number and a unit, seconds without one. `None`: it is none, or longer
/// than systemd's clock counts. (humantime reads nearly the same, but no number without a unit, takes
/// spaces inside numbers, and knows nanoseconds.)
fn span(text: &str) -> Option<Span> {
    let mut rest = text.trim_start();
    if let Some(after) = rest.strip_prefix("infinity") {
        return after.trim().is_empty().then_some(Span::Infinite);
    }
    let mut micros = 0u64;
    let mut any = false;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            // A point wants digits behind it.
            Some(after) => Some(digits(after)).filter(|(fraction, _)| !fraction.is_empty())?,
            None if whole.is_empty() => return None,
            None => ("", after),
        };
        let after = after.trim_start();
        let unit = UNITS.iter().find_map(|(name, factor)| Some((*factor, after.strip_prefix(*name)?)));
        let (factor, after) = unit.unwrap_or((SECOND, after));
        let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()? };
        micros = micros.checked_add(whole.checked_mul(factor)?)?;
        let mut tenth = factor / 10;
        for digit in fraction.bytes() {
            micros = micros.checked_add(tenth * u64::from(digit - b'0'))?;
            tenth /= 10;
        }
        rest = after.trim_start();
        any = true;
    }
    any.then(|| Span::Finite(Duration::from_micros(micros)))
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.bytes().take_while(u8::is_ascii_digit).count())
}

fn boolean(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "yes" | "y" | "true" | "t" | "on" => Some(true),
        "0" | "no" | "n" | "false" | "f" | "off" => Some(false),
        _ => None,
    }
}

/// The items of a list with quoting (`man systemd.syntax`); `None` if a quote has no end. Escapes stand for the
/// character behind the backslash: those for control characters have no place in what is read here.
fn items(text: &str) -> Option<Vec<String>> {
    let mut items = Vec::new();
    let mut item: Option<String> = None;
    let mut quote = None;
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        match (c, quote) {
            ('\\', _) => item.get_or_insert_default().push(characters.next()?),
            (c, Some(open)) if c == open => quote = None,
            ('"' | '\'', None) => {
                quote = Some(c);
                item.get_or_insert_default();
            }
            (c, None) if c.is_whitespace() => items.extend(item.take()),
            (c, _) => item.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return None;
    }
    items.extend(item);
    Some(items)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOTAL: Duration = Duration::from_secs(28);

    fn unit(service: &str) -> Unit {
        Unit::parse(&format!("[Unit]\nDescription=x\n[Service]\nType=notify\nKillMode=mixed\n{service}"))
            .unwrap()
    }

    fn stop(value: &str) -> Option<Span> {
        unit(&format!("TimeoutStopSec={value}")).stop
    }

    fn secs(n: u64) -> Option<Span> {
        Some(Span::Finite(Duration::from_secs(n)))
    }

    #[test]
    fn a_time_span_is_read_as_systemd_does() {
        // Each as `systemd-analyze timespan` says; tests/tests/systemd.rs asks it.
        for (text, micros) in [
            ("90", 90_000_000),
            ("1min 30s", 90_000_000),
            ("5min20s", 320_000_000),
            ("500ms", 500_000),
            ("2 h 30", 7_230_000_000),
            ("1.5h", 5_400_000_000),
            (".5s", 500_000),
            ("1M", 2_629_800_000_000),
            ("300ms20s 5day", 432_020_300_000),
        ] {
            assert_eq!(span(text), Some(Span::Finite(Duration::from_micros(micros))), "{text}");
        }
        assert_eq!(span("infinity"), Some(Span::Infinite));
        for text in ["", "soon", "5 parsecs", "-1", "1.", "5 m s", "infinity s", "1,5s", "99999999999999999y"]
        {
            assert_eq!(span(text), None, "{text}");
        }
    }

    #[test]
    fn a_later_assignment_wins_an_empty_one_resets_and_zero_is_without_end() {
        assert_eq!(unit("").stop, None);
        assert_eq!(unit("TimeoutSec=20").stop, secs(20));
        assert_eq!(unit("TimeoutSec=20\nTimeoutStopSec=30").stop, secs(30));
        assert_eq!(unit("TimeoutStopSec=30\nTimeoutSec=20").stop, secs(20));
        assert_eq!(unit("TimeoutStopSec=30\nTimeoutStopSec=").stop, None);
        assert_eq!(stop("0"), Some(Span::Infinite));
        assert_eq!(stop("infinity"), Some(Span::Infinite));
        let environment =
            unit("Environment=SHUTDOWN_LINGER=1\nEnvironment=\nEnvironment=SHUTDOWN_TOTAL_TIMEOUT=9");
        assert_eq!(environment.variable("SHUTDOWN_TOTAL_TIMEOUT"), Some("9"));
        assert_eq!(environment.variable("SHUTDOWN_LINGER"), None);
    }

    #[test]
    fn comments_continued_lines_and_other_sections_are_read_as_systemd_does() {
        let text = "# TimeoutStopSec=1\n[Service]\n; TimeoutStopSec=2\n  TimeoutStopSec = 1min \\\n# between\n  30s \n\
                    [Install]\nTimeoutStopSec=3\n";
        assert_eq!(Unit::parse(text).unwrap().stop, secs(90));
    }

    #[test]
    fn the_environment_is_unquoted() {
        let unit =
            unit(r#"Environment="SHUTDOWN_LINGER=1 s" 'SHUTDOWN_LAME_DUCK=2' OTHER=3 SHUTDOWN_DB_TIMEOUT=4"#);
        assert_eq!(unit.variable("SHUTDOWN_LINGER"), Some("1 s"));
        assert_eq!(unit.variable("SHUTDOWN_LAME_DUCK"), Some("2"));
        assert_eq!(unit.variable("SHUTDOWN_DB_TIMEOUT"), Some("4"));
        assert_eq!(unit.variable("OTHER"), None);
    }

    #[test]
    fn what_does_not_fit_is_one_sentence_with_the_arithmetic() {
        assert!(unit("TimeoutStopSec=30").check(TOTAL).unwrap().contains("total 28s + margin 2s = 30s of"));
        let error = unit("TimeoutStopSec=29").check(TOTAL).unwrap_err();
        assert_eq!(
            error,
            "systemd kills before the shutdown may end: total 28s + margin 2s = 30s is more than TimeoutStopSec=29s: \
             raise that to 30s, or lower SHUTDOWN_TOTAL_TIMEOUT to 27s"
        );
        let error = unit("").check(Duration::from_secs(100)).unwrap_err();
        assert!(error.contains("TimeoutStopSec=90s (systemd's default)"), "{error}");
        assert!(unit("TimeoutStopSec=infinity").check(TOTAL).unwrap().contains("without end"));
    }

    #[test]
    fn a_stop_that_the_proxy_would_not_hear_is_refused() {
        for heard in ["SIGTERM", "SIGINT", "TERM", "2", ""] {
            unit(&format!("KillSignal={heard}")).check(TOTAL).unwrap();
        }
        for (line, part) in [
            ("KillSignal=SIGQUIT", "KillSignal=SIGQUIT"),
            ("RestartKillSignal=SIGKILL", "RestartKillSignal=SIGKILL"),
            ("KillMode=none", "KillMode=none"),
            ("SendSIGHUP=yes", "SendSIGHUP=yes"),
        ] {
            let error = unit(line).check(TOTAL).unwrap_err();
            assert!(error.contains(part) && error.lines().count() == 1, "{error}");
        }
    }

    #[test]
    fn what_works_less_well_than_it_could_is_a_warning() {
        let warnings = |unit: Unit| unit.check(TOTAL).unwrap().matches("warning: ").count();
        assert_eq!(warnings(unit("")), 0);
        for line in ["Type=simple", "Type=notify-reload", "KillMode=", "SendSIGKILL=no", "EnvironmentFile=/x"]
        {
            assert_eq!(warnings(unit(line)), 1, "{line}");
        }
    }

    #[test]
    fn what_systemd_would_ignore_is_a_mistake_with_its_line() {
        for (text, part) in [
            ("", "no [Service] section"),
            ("[Socket]\nListenStream=1", "no [Service] section"),
            ("Type=notify\n[Service]", "line 1: \"Type\" stands before"),
            ("[Service]\n\nTimeoutStopSec=soon", "line 3: TimeoutStopSec=soon is not a time span"),
            ("[Service]\nnotify", "line 2: \"notify\" is neither"),
            ("[Service", "line 1: \"[Service\" begins"),
            ("[Service]\nSendSIGKILL=maybe", "line 2: SendSIGKILL=maybe is not yes or no"),
            ("[Service]\nEnvironment=\"A=b", "line 2: Environment=\"A=b is not a list"),
            ("[Service]\nEnvironment=A", "line 2: Environment=A: \"A\" is no NAME=value"),
        ] {
            let error = Unit::parse(text).unwrap_err();
            assert!(error.contains(part) && error.lines().count() == 1, "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(?s).{0,200}", total in 0u64..=u64::from(u32::MAX)) {
            if let Ok(unit) = Unit::parse(&text) {
                let _ = unit.check(Duration::from_secs(total));
            }
        }

        #[test]
        fn no_value_makes_it_panic(
            key in "TimeoutStopSec|TimeoutSec|WatchdogSec|Type|Kill(Mode|Signal)|Send(SIGKILL|SIGHUP)|Environment",
            value in "([0-9]{0,21}|[.\\\\ \"'=%]|s|ms|min|M|\u{b5}s|y|infinity|[a-z]{0,4}){0,8}",
        ) {
            if let Ok(unit) = Unit::parse(&format!("[Service]\n{key}={value}\n")) {
                let _ = unit.check(TOTAL);
            }
        }
    }
}
