//! What is set about companions: who they are, where they are found, how they are ended.
//!
//! How a program wants to be ended is known here by its name; the library knows only ladders. The numbers are such that a proxy
//! and then a database fit into the time that Kubernetes gives.
//!
//! | program | PID file | ladder | group | why |
//! |---|---|---|---|---|
//! | `pgbouncer` | plain | `INT:6s/TERM:2s/KILL:1s` | 0 | INT lets transactions finish in every version. TERM first cuts them up to 1.22 and waits for every client from 1.23 on; as the second signal it means "at once" |
//! | `local_proxy` | locked | `TERM:6s/KILL:1s` | 0 | it waits for all connections, without bound |
//! | `postgres` | postmaster | `INT:6s/QUIT:2s/KILL:1s` | 1 | INT ends sessions and writes a checkpoint; after QUIT the next start recovers |
//! | `redis-server`, `valkey-server` | plain | `TERM:6s/KILL:1s` | 1 | TERM saves |
//! | others | plain | `TERM:7s/KILL:1s` | 0 | |

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use shutdown_core::companions::{Companion, Companions, Ladder, Launch, OnExit, PidFile, PidFileKind};

use super::{Sources, Value};

const KEYS: [&str; 8] = ["name", "pidfile", "kind", "stop", "group", "find", "launch", "on-exit"];

/// How a program is ended if nothing else is said.
struct Profile {
    kind: PidFileKind,
    ladder: &'static str,
    group: u32,
}

impl Profile {
    fn of(name: &str) -> Option<Self> {
        let (kind, ladder, group) = match name {
            "pgbouncer" => (PidFileKind::Plain, "INT:6s/TERM:2s/KILL:1s", 0),
            "local_proxy" => (PidFileKind::Locked, "TERM:6s/KILL:1s", 0),
            "postgres" => (PidFileKind::Postmaster, "INT:6s/QUIT:2s/KILL:1s", 1),
            "redis-server" | "valkey-server" => (PidFileKind::Plain, "TERM:6s/KILL:1s", 1),
            _ => return None,
        };
        Some(Self { kind, ladder, group })
    }
}

/// The companions, checked.
#[derive(Clone, Default)]
pub(crate) struct CompanionSettings {
    pub(crate) all: Companions,
    /// A line for each.
    shown: Vec<String>,
}

impl CompanionSettings {
    pub(super) fn lines(&self, line: &mut dyn FnMut(&str, &dyn fmt::Display) -> fmt::Result) -> fmt::Result {
        match self.shown.as_slice() {
            [] => line("companion", &"none"),
            shown => shown.iter().try_for_each(|companion| line("companion", companion)),
        }
    }
}

impl Sources<'_> {
    pub(super) fn companions(&self) -> Result<CompanionSettings, String> {
        let given = self.all("companion")?;
        // Nothing between two separators is no companion: so an empty variable says that there is none.
        let given = given.iter().filter(|value| !value.text.trim().is_empty());
        let specs: Vec<Spec> = given.map(Spec::parse).collect::<Result<_, _>>()?;
        for (place, spec) in specs.iter().enumerate() {
            let same = specs[..place].iter().find(|other| spec.file.is_some() && spec.file == other.file);
            if let (Some(_), Some(file)) = (same, &spec.file) {
                return Err(format!("--companion: the PID file {} is given twice", file.path().display()));
            }
        }
        if let Some(own) = self.one("pid-file")?
            && specs
                .iter()
                .any(|spec| spec.file.as_ref().is_some_and(|file| file.path() == Path::new(&own.text)))
        {
            return Err(format!("{own} is a companion's PID file: give this process's own another path"));
        }
        let shown = specs.iter().map(ToString::to_string).collect();
        Ok(CompanionSettings { all: Companions::new(specs.into_iter().map(Spec::companion)), shown })
    }
}

/// One companion as it is written.
struct Spec {
    name: String,
    file: Option<PidFile>,
    ladder: Ladder,
    group: u32,
    by_name: bool,
    launch: Option<(String, Launch)>,
}

impl Spec {
    fn parse(value: &Value) -> Result<Self, String> {
        let wrong = |what: &str| format!("{value}: {what}");
        let mut given: BTreeMap<&str, String> = BTreeMap::new();
        for part in parts(&value.text, ',') {
            let (key, text) = part.split_once('=').unwrap_or((part, ""));
            let Some(key) = KEYS.into_iter().find(|known| *known == key.trim()) else {
                return Err(wrong(&format!(
                    "{part:?} is no part of a companion: the parts are {}; a command with commas goes in quotes",
                    KEYS.map(|key| format!("{key}=")).join(", ")
                )));
            };
            let text = if key == "launch" { Some(text.trim().to_owned()) } else { unquoted(text.trim()) };
            let text = text.ok_or_else(|| wrong(&format!("{key}= has quotes that do not fit")))?;
            if text.is_empty() {
                return Err(wrong(&format!("{key}= is empty")));
            }
            if given.insert(key, text).is_some() {
                return Err(wrong(&format!("{key}= is given twice")));
            }
        }
        let Some(name) = given.remove("name") else {
            return Err(wrong("it has no name: write name=pgbouncer, as the process is called"));
        };
        if name.contains('/') {
            return Err(wrong("name= is what the process is called, without a path"));
        }
        let profile = Profile::of(&name);
        let kind = match given.remove("kind") {
            Some(_) if !given.contains_key("pidfile") => {
                return Err(wrong("kind= is a PID file's: give pidfile=, too"));
            }
            Some(kind) => PidFileKind::parse(&kind)
                .ok_or_else(|| wrong(&format!("kind={kind} is none of plain, locked, postmaster")))?,
            None => profile.as_ref().map_or_else(PidFileKind::default, |profile| profile.kind),
        };
        let ladder = match (given.remove("stop"), &profile) {
            (Some(text), _) => text.parse().map_err(|error| wrong(&format!("stop={text}: {error}")))?,
            (None, Some(profile)) => {
                profile.ladder.parse().expect("a profile's ladder is one: a test parses them all")
            }
            (None, None) => Ladder::default(),
        };
        let group = match given.remove("group") {
            Some(text) => text.parse().map_err(|_| wrong(&format!("group={text} is no number from 0 on")))?,
            None => profile.map_or(0, |profile| profile.group),
        };
        let by_name = match given.remove("find").as_deref() {
            None => false,
            Some("name") => true,
            Some(other) => {
                return Err(wrong(&format!("find={other}: the only other way to find one is find=name")));
            }
        };
        let on_exit = match given.remove("on-exit") {
            Some(_) if !given.contains_key("launch") => {
                return Err(wrong("on-exit= is for those that are launched: give launch=, too"));
            }
            Some(text) => OnExit::parse(&text)
                .ok_or_else(|| wrong(&format!("on-exit={text} is neither restart nor fatal")))?,
            None => OnExit::default(),
        };
        let launch = given.remove("launch").map(|command| {
            let words = shlex::split(&command).filter(|words| !words.is_empty());
            let words = words.ok_or_else(|| wrong("launch= is no command: its quotes do not fit"))?;
            Ok::<_, String>((command, Launch::new(words).on_exit(on_exit)))
        });
        let launch = launch.transpose()?;
        let file = given.remove("pidfile").map(|path| PidFile::new(path, kind));
        if launch.is_some() && by_name {
            return Err(wrong("launch= and find= exclude each other: what is launched is known"));
        }
        if file.is_none() && launch.is_none() && !by_name {
            return Err(wrong(
                "it says nowhere how the process is found: give pidfile=PATH, launch=COMMAND or find=name",
            ));
        }
        Ok(Self { name, file, ladder, group, by_name, launch })
    }

    fn companion(self) -> Companion {
        let found = match (self.launch, self.file) {
            (Some((_, launch)), Some(file)) => Companion::launched(self.name, launch).pid_file(file),
            (Some((_, launch)), None) => Companion::launched(self.name, launch),
            (None, Some(file)) if self.by_name => Companion::with_pid_file(self.name, file).find_by_name(),
            (None, Some(file)) => Companion::with_pid_file(self.name, file),
            (None, None) => Companion::named(self.name),
        };
        found.ladder(self.ladder).group(self.group)
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}, group {}", self.name, self.ladder, self.group)?;
        if let Some(file) = &self.file {
            write!(f, ", {} PID file {}", file.kind(), file.path().display())?;
        }
        if self.by_name {
            f.write_str(", found by name")?;
        }
        match &self.launch {
            Some((command, launch)) => {
                write!(f, ", on exit {}, launched: {command}", launch.when_it_exits().as_str())
            }
            None => Ok(()),
        }
    }
}

/// The parts of a text between separators that stand in no quotes.
pub(super) fn parts(text: &str, separator: char) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut quote, mut escaped) = (0, None, false);
    for (at, c) in text.char_indices() {
        if std::mem::take(&mut escaped) {
            continue;
        }
        match quote {
            // As a shell reads it: not in single quotes.
            None | Some('"') if c == '\\' => escaped = true,
            None if c == separator => {
                parts.push(text[start..at].trim());
                start = at + c.len_utf8();
            }
            None if c == '\'' || c == '"' => quote = Some(c),
            Some(open) if c == open => quote = None,
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts
}

/// A value without its quotes; nothing if they do not fit.
fn unquoted(text: &str) -> Option<String> {
    if !text.contains(['\'', '"']) {
        return Some(text.to_owned());
    }
    let mut words = shlex::split(text)?;
    if words.len() == 1 { words.pop() } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(text: &str) -> Result<Spec, String> {
        Spec::parse(&Value { text: text.to_owned(), from: "--companion".to_owned() })
    }

    #[test]
    fn a_program_that_is_known_is_ended_as_it_wants_to_be() {
        for (text, shown) in [
            (
                "name=pgbouncer,pidfile=/run/p.pid",
                "pgbouncer INT:6s/TERM:2s/KILL:1s, group 0, plain PID file /run/p.pid",
            ),
            (
                "name=local_proxy, pidfile=/run/l.pid",
                "local_proxy TERM:6s/KILL:1s, group 0, locked PID file /run/l.pid",
            ),
            (
                "pidfile=/d/postmaster.pid,name=postgres",
                "postgres INT:6s/QUIT:2s/KILL:1s, group 1, postmaster PID file /d/postmaster.pid",
            ),
            ("name=redis-server,find=name", "redis-server TERM:6s/KILL:1s, group 1, found by name"),
            ("name=valkey-server,find=name", "valkey-server TERM:6s/KILL:1s, group 1, found by name"),
            ("name=other,find=name,group=3", "other TERM:7s/KILL:1s, group 3, found by name"),
            (
                "name=pgbouncer,stop=INT:20s/TERM:5s/KILL:2s,group=2,kind=locked,pidfile='/a,b/p q.pid',find=name",
                "pgbouncer INT:20s/TERM:5s/KILL:2s, group 2, locked PID file /a,b/p q.pid, found by name",
            ),
            (
                r#"name=sh,launch=sh -c "echo \"a, b\"" x\,y"#,
                r#"sh TERM:7s/KILL:1s, group 0, on exit restart, launched: sh -c "echo \"a, b\"" x\,y"#,
            ),
            (
                "name=sh,launch=sh -c 'exec sleep 1, 2; x=\"y\"',stop=TERM:1s,on-exit=fatal",
                "sh TERM:1s, group 0, on exit fatal, launched: sh -c 'exec sleep 1, 2; x=\"y\"'",
            ),
        ] {
            assert_eq!(spec(text).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn a_mistake_is_one_sentence_that_names_the_part_and_the_fix() {
        for (text, expected) in [
            ("name=a,,find=name", "\"\" is no part of a companion: the parts are name=, pidfile="),
            ("pgbouncer", "\"pgbouncer\" is no part"),
            ("name=", "name= is empty"),
            ("name=a", "give pidfile=PATH, launch=COMMAND or find=name"),
            ("pidfile=/a", "write name=pgbouncer"),
            ("name=/usr/sbin/pgbouncer,pidfile=/a", "without a path"),
            ("name=a,pidfile=/a,pidfile=/b", "pidfile= is given twice"),
            ("name=a,pidfile=/a,kind=flocked", "kind=flocked is none of plain, locked, postmaster"),
            ("name=a,kind=plain,find=name", "give pidfile=, too"),
            ("name=a,pidfile=/a,stop=TERM", "stop=TERM: the ladder"),
            ("name=a,pidfile=/a,stop=STOP:1s", "write one as INT:6s/TERM:2s/KILL:1s"),
            ("name=a,pidfile=/a,group=-1", "group=-1 is no number from 0 on"),
            ("name=a,find=pid", "find=pid"),
            ("name=a,pidfile=/a,on-exit=fatal", "give launch=, too"),
            ("name=a,launch=a,on-exit=ignore", "neither restart nor fatal"),
            ("name=a,launch=a,find=name", "exclude each other"),
            ("name=a,launch=sh -c 'x", "quotes do not fit"),
            ("name='a b' c,pidfile=/a", "name= has quotes that do not fit"),
            ("name=a,launch=sh -c a,b", "\"b\" is no part"),
        ] {
            let error = spec(text).map(|spec| spec.to_string()).unwrap_err();
            assert!(
                error.starts_with(&format!("--companion {text:?}")) && error.contains(expected),
                "{error}"
            );
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn every_profile_has_a_ladder_that_is_one() {
        for name in ["pgbouncer", "local_proxy", "postgres", "redis-server", "valkey-server"] {
            Profile::of(name).unwrap().ladder.parse::<Ladder>().unwrap();
        }
        assert!(Profile::of("pgbouncer_exporter").is_none());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,60}") {
            let _ = spec(&text);
        }
    }
}
