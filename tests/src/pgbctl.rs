//! PgBouncer's files in a directory of a test's own, and those who edit them: `pgbctl`, and shell scripts as they are in use.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::PATIENCE;
use crate::process::{Process, binary};

/// What stands in the configuration, with comments and an order that no edit may touch.
pub const INI: &str = "; who edits this by hand?\n\
    \n\
    [databases]\n\
    # the control plane\n\
    platform   =  host=postgres port=5432 dbname=platform pool_size=25\n\
    proj_ab = host=postgres port=5432 dbname=proj_ab pool_size=5 reserve_pool=2\n\
    \n\
    [pgbouncer]\n\
    listen_port = 6432\n\
    ;listen_addr = *\n\
    auth_type = scram-sha-256\n\
    server_reset_query = DISCARD ALL\n";

/// What stands in the user list.
pub const USERLIST: &str =
    ";two of us\n\"postgres\" \"md5aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"\n\"o\"\"neil\" \"plain\"\n";

/// The scripts that are in use elsewhere, without their containers: `$1` is the file, `$2` the name. What they do before the lock they
/// do here before a pause, so that it is seen when several run at once. Their backups of one second hinder each other; that is no
/// law of ours.
pub mod scripts {
    /// Adds a database.
    pub const ADD_DATABASE: &str = r#"set -e
        cp "$1" "$1.backup.$(date +%s)" 2>/dev/null || true
        if grep -q "^$2 =" "$1"; then exit 0; fi
        sleep "${PAUSE:-0}"
        (
          flock -x 200
          TMPFILE=$(mktemp)
          awk '/^\[databases\]/{print; print "'"$2"' = host=postgres port=5432 dbname='"$2"' pool_size=5 reserve_pool=2"; next}1' "$1" > "$TMPFILE"
          cat "$TMPFILE" > "$1"
          rm "$TMPFILE"
        ) 200>"$1.lock""#;
    /// Gives a user a secret, in two steps.
    pub const ADD_USER: &str = r#"set -e
        (
          flock -x 200
          TMPFILE=$(mktemp)
          (grep -v "^\"$2\"" "$1" > "$TMPFILE" || true)
          cat "$TMPFILE" > "$1"
          rm "$TMPFILE"
        ) 200>"$1.lock"
        sleep "${PAUSE:-0}"
        (
          flock -x 200
          echo "\"$2\" \"md5bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\"" >> "$1"
        ) 200>"$1.lock""#;
}

/// What a process said.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// And to stderr.
    pub stderr: String,
}

impl Ran {
    /// What it printed, if it went well.
    ///
    /// # Panics
    ///
    /// If it did not.
    #[track_caller]
    pub fn well(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:?}");
        &self.stdout
    }

    /// The one line of its error, if it ended with this code.
    ///
    /// # Panics
    ///
    /// If it did not, or said more or less.
    #[track_caller]
    pub fn failed(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{self:?}");
        let lines: Vec<_> = self.stderr.lines().collect();
        let [line] = lines[..] else { panic!("not one line: {self:?}") };
        line.strip_prefix("pgbctl: error: ").unwrap_or_else(|| panic!("no error: {self:?}"))
    }
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Ran {
    ended(Process::start(command))
}

/// Waits for the end of one that was started.
pub fn ended(mut process: Process) -> Ran {
    let status = process.ended(PATIENCE);
    let (stdout, stderr) = (process.stdout(), process.stderr());
    Ran { code: status.code(), signal: status.signal(), stdout, stderr }
}

/// `pgbctl` without the environment's settings.
pub fn pgbctl() -> Command {
    let mut command = Command::new(binary("pgbctl"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PGBCTL_") {
            command.env_remove(name);
        }
    }
    command
}

/// A directory with both files.
pub struct Files {
    dir: TempDir,
}

impl Default for Files {
    fn default() -> Self {
        Self::new(INI, USERLIST)
    }
}

impl Files {
    /// With these contents.
    ///
    /// # Panics
    ///
    /// If they cannot be written.
    pub fn new(ini: &str, userlist: &str) -> Self {
        let files = Self { dir: tempfile::tempdir().expect("a temporary directory") };
        fs::write(files.ini(), ini).expect("a temporary directory");
        fs::write(files.userlist(), userlist).expect("a temporary directory");
        files
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `pgbouncer.ini`.
    pub fn ini(&self) -> PathBuf {
        self.dir.path().join("pgbouncer.ini")
    }

    /// `userlist.txt`.
    pub fn userlist(&self) -> PathBuf {
        self.dir.path().join("userlist.txt")
    }

    /// `pgbctl` for these files.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = pgbctl();
        command.arg("--config").arg(self.ini()).arg("--userlist").arg(self.userlist()).args(words);
        command
    }

    /// Runs `pgbctl` for these files.
    pub fn run(&self, words: &[&str]) -> Ran {
        run(&mut self.command(words))
    }

    /// A shell script over one of these files.
    pub fn script(&self, script: &str, file: &Path, name: &str) -> Command {
        let mut command = Command::new("bash");
        command.args(["-c", script, "script"]).arg(file).arg(name);
        command
    }

    /// What is in the directory.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).expect("a directory");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// The same without the files, their locks and their backups: what nobody should leave.
    pub fn leftovers(&self) -> Vec<String> {
        let belongs = ["pgbouncer.ini", "pgbouncer.ini.lock", "userlist.txt", "userlist.txt.lock"];
        let mut names = self.names();
        names.retain(|name| !belongs.contains(&name.as_str()) && !name.contains(".backup."));
        names
    }

    /// The lines of the configuration.
    ///
    /// # Panics
    ///
    /// If it is not there.
    pub fn ini_lines(&self) -> Vec<String> {
        lines(&self.ini())
    }
}

/// The lines of a file.
///
/// # Panics
///
/// If it is not there.
pub fn lines(file: &Path) -> Vec<String> {
    fs::read_to_string(file).expect("it is there").lines().map(ToOwned::to_owned).collect()
}
