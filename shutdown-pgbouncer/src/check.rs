//! Whether a PgBouncer would take its files. It has no such test itself: `pgbouncer -q FILE` starts a second one.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::references::{self, Eyes};
use crate::{Error, Ini, Problem, Userlist, Version};

/// How deep files may include each other (`MAX_INCLUDE` in PgBouncer's `cfparser.c`).
const DEPTH: usize = 10;

/// What was found, and in which file. Shown: both, and the sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The file.
    pub file: PathBuf,
    /// What.
    pub problem: Problem,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.file.display(), self.problem)
    }
}

/// A configuration with all that it includes, as one text.
#[derive(Debug, Default)]
struct Whole {
    text: Vec<u8>,
    /// File and line of each line of the text.
    from: Vec<(PathBuf, usize)>,
    findings: Vec<Finding>,
}

impl Whole {
    /// Appends a file, and in the place of each `%include` the file that it names: it begins in the section that the line is in.
    fn append(&mut self, file: &Path, depth: usize) -> Result<(), Error> {
        let bytes = std::fs::read(file).map_err(|source| Error::unwritten(file, "read", source))?;
        let includes = Ini::new(bytes.clone()).includes();
        for (place, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
            let number = place + 1;
            let Some((_, included)) = includes.iter().find(|(line, _)| *line == number) else {
                self.text.extend_from_slice(line);
                if !line.ends_with(b"\n") {
                    self.text.push(b'\n');
                }
                self.from.push((file.to_owned(), number));
                continue;
            };
            let appended = if depth == DEPTH {
                Err(format!("files include each other more than {DEPTH} deep: remove the line"))
            } else {
                self.append(Path::new(included), depth + 1)
                    .map_err(|error| format!("%include: {}", shutdown_core::sentence(&error)))
            };
            if let Err(what) = appended {
                let problem = Problem { line: number, what, fatal: true };
                self.findings.push(Finding { file: file.to_owned(), problem });
            }
        }
        Ok(())
    }
}

/// The configuration with all that it includes, as PgBouncer sees it.
///
/// # Errors
///
/// [`Error::Unwritten`]: the file cannot be read. One that is included and cannot be is a finding of [`check`].
pub fn whole(config: &Path) -> Result<Ini, Error> {
    Ok(whole_with_places(config)?.0)
}

/// The same, and where its lines come from.
pub(crate) fn whole_with_places(config: &Path) -> Result<(Ini, Places), Error> {
    let mut whole = Whole::default();
    whole.append(config, 0)?;
    Ok((Ini::new(whole.text), Places(whole.from)))
}

/// File and line of each line of a whole configuration.
#[derive(Debug)]
pub(crate) struct Places(Vec<(PathBuf, usize)>);

impl Places {
    /// A problem of the whole, where it stands.
    pub(crate) fn finding(&self, problem: Problem, config: &Path) -> Finding {
        let (file, line) = self.0.get(problem.line - 1).cloned().unwrap_or((config.to_owned(), problem.line));
        Finding { file, problem: Problem { line, ..problem } }
    }
}

/// What this version would refuse or misread in a configuration, the files it includes, and its user list; and the files and
/// directories that it names and this machine does not have, which are not fatal: it may be meant for another machine.
///
/// # Errors
///
/// [`Error::Unwritten`]: the configuration, or the user list that was named, cannot be read.
pub fn check(config: &Path, userlist: Option<&Path>, version: Version) -> Result<Vec<Finding>, Error> {
    let mut whole = Whole::default();
    whole.append(config, 0)?;
    let Whole { text, from, mut findings } = whole;
    let (ini, places) = (Ini::new(text), Places(from));
    let mut found = ini.problems(version);
    found.extend(references::missing(&ini, &Eyes::OURS).into_iter().map(|missing| missing.problem));
    let named = ini.parameter("auth_file").filter(|file| !file.is_empty());
    let list = match (userlist, &named) {
        (Some(given), _) => std::fs::read(given)
            .map(|bytes| Some((given.to_owned(), bytes)))
            .map_err(|source| Error::unwritten(given, "read", source))?,
        (None, Some(named)) => match std::fs::read(named) {
            Ok(bytes) => Some((PathBuf::from(named), bytes)),
            Err(error) => {
                let what = format!("auth_file: {named} cannot be read: {error}; nobody in it can log in");
                found.push(Problem::misread(ini.parameter_line("auth_file").unwrap_or(1), what));
                None
            }
        },
        (None, None) => None,
    };
    found.sort_by_key(|problem| problem.line);
    findings.extend(found.into_iter().map(|problem| places.finding(problem, config)));
    if let Some((file, bytes)) = list {
        let problems = Userlist::new(bytes).problems();
        findings.extend(problems.into_iter().map(|problem| Finding { file: file.clone(), problem }));
    }
    Ok(findings)
}
