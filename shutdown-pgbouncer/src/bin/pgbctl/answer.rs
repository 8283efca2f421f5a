//! What a command says: lines for people, or one JSON object.

use std::io::{self, Write};

use serde_json::{Map, Value, json};
use shutdown_pgbouncer::{Done, Error, Reloaded};

/// Beside [`Error`]'s: `--verify`, and findings.
pub(crate) const BAD_INPUT: u8 = 2;
const UNVERIFIED: u8 = 5;

/// What a command has found or done.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    lines: Vec<String>,
    /// For people, and not for who reads stdout.
    asides: Vec<String>,
    /// For stderr.
    warnings: Vec<String>,
    object: Map<String, Value>,
    pub(crate) code: u8,
}

impl Answer {
    pub(crate) fn line(mut self, line: impl Into<String>) -> Self {
        self.lines.push(line.into());
        self
    }

    pub(crate) fn warning(mut self, line: impl Into<String>) -> Self {
        self.warnings.push(line.into());
        self
    }

    /// Leaves stdout to what comes next.
    pub(crate) fn aside(mut self) -> Self {
        self.asides.append(&mut self.lines);
        self
    }

    pub(crate) fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.object.insert(key.to_owned(), value.into());
        self
    }

    /// Found something that is bad input.
    pub(crate) fn bad(self) -> Self {
        Self { code: BAD_INPUT, ..self }
    }

    /// Ended a process otherwise than it was meant.
    pub(crate) fn not_well(self) -> Self {
        Self { code: 7, ..self }
    }

    /// Failed, but has something to say.
    pub(crate) fn failed(mut self, error: &Error) -> Self {
        let sentence = shutdown_core::sentence(error);
        self.code = code_of(error);
        self.warnings.push(format!("error: {sentence}"));
        let code = self.code;
        self.with("error", sentence).with("code", code)
    }

    /// Was asked to look, and could not.
    pub(crate) fn unverified(self) -> Self {
        Self { code: UNVERIFIED, ..self }
    }

    /// Whether PgBouncer was told, and nobody has looked.
    pub(crate) fn is_unseen(&self) -> bool {
        self.object.get("reload").is_some_and(|reload| reload == "signalled")
    }

    /// What became of an edit; `what` says what was meant, as `added orders`.
    pub(crate) fn of_edit(done: &Done, what: &[String]) -> Self {
        let mut answer =
            Self::default().with("changed", done.changed).with("file", done.file.display().to_string());
        if let Some(backup) = &done.backup {
            answer = answer
                .line(format!("Backed up to: {}", backup.display()))
                .with("backup", backup.display().to_string());
        }
        if done.changed {
            for line in what {
                answer = answer.line(line);
            }
        }
        answer = answer.with("notes", done.notes.clone());
        for note in &done.notes {
            answer = answer.warning(note);
        }
        let answer = if done.changed { answer } else { answer.line("Nothing to change") };
        match &done.reloaded {
            Reloaded::NotAsked(_) if !done.changed => answer.with("reload", "not asked"),
            reloaded => answer.of_reload(reloaded),
        }
    }

    pub(crate) fn of_reload(self, reloaded: &Reloaded) -> Self {
        match reloaded {
            Reloaded::Verified => {
                self.line("Reloaded PgBouncer, which runs by it").with("reload", "verified")
            }
            Reloaded::Signalled { pid, unseen } => self
                .line(format!("Reloaded PgBouncer by SIGHUP (process {pid})"))
                .warning(format!("nobody has looked whether it took it: {unseen}"))
                .with("reload", "signalled")
                .with("pid", *pid),
            Reloaded::NotAsked(why) => self
                .line(format!("Not reloaded: {why}"))
                .with("reload", "not asked")
                .with("why", why.as_str()),
            _ => self,
        }
    }

    /// Prints it. A closed stdout is no reason to fail: what was to be done is done. But a password that was made here and that nobody
    /// has seen is.
    /// `by_signal`: the exit code, if a signal ended it.
    pub(crate) fn print(mut self, by_signal: Option<u8>, json: bool) -> u8 {
        if let (Some(code), Some(said)) = (by_signal, self.object.get_mut("code")) {
            *said = code.into();
        }
        let mut out = io::stdout().lock();
        let has_password = self.object.contains_key("password");
        let mut text = String::new();
        if json {
            text = format!("{}\n", Value::Object(self.object));
        } else {
            self.lines.iter().for_each(|line| text.extend([line, "\n"]));
        }
        let printed = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        let said =
            self.asides.iter().cloned().chain(self.warnings.iter().map(|line| format!("pgbctl: {line}")));
        // Errors in any case.
        for line in said.filter(|line| !json || line.starts_with("pgbctl: error: ")) {
            let _ = writeln!(io::stderr(), "{line}");
        }
        if has_password && printed.is_err() {
            let _ =
                writeln!(io::stderr(), "pgbctl: error: the new password cannot be printed: set another one");
            return 1;
        }
        self.code
    }
}

/// The documented exit code.
pub(crate) fn code_of(error: &Error) -> u8 {
    match error {
        Error::Input(_) => BAD_INPUT,
        Error::Locked { .. } => 3,
        Error::Unwritten { .. } => 4,
        Error::Unverified(_) => UNVERIFIED,
        Error::Refused(_) => 6,
        _ => 1,
    }
}

/// Says what went wrong. `by_signal`: the exit code, if a signal ended it.
pub(crate) fn fail(error: &Error, by_signal: Option<u8>, json: bool) -> u8 {
    let (code, sentence) = (by_signal.unwrap_or_else(|| code_of(error)), shutdown_core::sentence(error));
    let _ = writeln!(io::stderr(), "pgbctl: error: {sentence}");
    if json {
        print_error(&sentence, code);
    }
    code
}

/// The object that stands for an answer when there is none.
pub(crate) fn print_error(sentence: &str, code: u8) {
    let _ = writeln!(io::stdout(), "{}", json!({ "error": sentence, "code": code }));
}
