//! What the values of a configuration refer to: files and directories, looked for on this machine.
//!
//! What comes of one that is missing was measured on 1.18, 1.24 and 1.26, which agree. Paths that are not absolute are not looked for:
//! they depend on where PgBouncer is started. Nor are users, groups, addresses, and what servers are asked for.

use std::path::Path;

use crate::{Ini, Problem};

/// The consequence of a directory or file that is missing, for who starts.
const NO_START: &str = "PgBouncer does not start with that";

/// What is missing on this machine, but for the user list.
pub(crate) fn problems(ini: &Ini) -> Vec<Problem> {
    let value = |key: &str| ini.parameter(key).unwrap_or_default();
    let mut problems: Vec<_> = logfile(ini).into_iter().collect();
    let mut look = |key: &str, missing: Option<String>, then: &str| {
        problems.extend(missing.map(|what| problem(ini, key, &what, then)));
    };
    look("pidfile", no_place_for_a_file(&value("pidfile")), NO_START);
    // A name that begins with `@` is in no directory, and not absolute.
    look(
        "unix_socket_dir",
        no_directory(Path::new(&value("unix_socket_dir"))),
        "PgBouncer cannot listen there",
    );
    if value("auth_type") == "hba" {
        look("auth_hba_file", no_file(&value("auth_hba_file")), "nobody can log in");
    }
    if !["", "disable"].contains(&value("client_tls_sslmode").as_str()) {
        for key in ["client_tls_key_file", "client_tls_cert_file"] {
            match value(key) {
                file if file.is_empty() => {
                    look("client_tls_sslmode", Some(format!("it needs {key}, which is not set")), NO_START);
                }
                file => look(key, no_file(&file), NO_START),
            }
        }
    }
    problems
}

/// Why a PgBouncer that runs would end when it reads this and has not yet: it opens its log anew at each reload.
pub(crate) fn logfile(ini: &Ini) -> Option<Problem> {
    let missing = no_place_for_a_file(&ini.parameter("logfile")?)?;
    Some(problem(
        ini,
        "logfile",
        &missing,
        "PgBouncer does not start with that, and one that runs ends at its next reload",
    ))
}

fn problem(ini: &Ini, key: &str, what: &str, then: &str) -> Problem {
    let line = ini.parameter_line(key).unwrap_or(1);
    Problem::misread(line, format!("{key}: {what}; {then}"))
}

fn no_place_for_a_file(file: &str) -> Option<String> {
    let file = Path::new(file);
    if file.is_absolute() && file.is_dir() {
        return Some(format!("{} is a directory", file.display()));
    }
    no_directory(file.parent()?)
}

fn no_directory(directory: &Path) -> Option<String> {
    let is_missing = directory.is_absolute() && !directory.is_dir();
    is_missing.then(|| format!("{} is no directory on this machine", directory.display()))
}

fn no_file(file: &str) -> Option<String> {
    let path = Path::new(file);
    let is_missing = path.is_absolute() && !path.is_file();
    is_missing.then(|| format!("{file} is no file on this machine"))
}
