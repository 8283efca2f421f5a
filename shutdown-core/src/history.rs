//! Where reports are kept: the last one whole, and one line for each shutdown before it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::files::replace;
use crate::report::ShutdownReport;

/// How many lines `history.jsonl` keeps; when it has twice as many, the oldest are dropped.
pub const HISTORY_LINES: usize = 500;

/// `last-shutdown.json` and `history.jsonl` in one directory.
#[derive(Clone, Debug)]
pub struct ReportFiles {
    dir: PathBuf,
}

impl ReportFiles {
    /// The files in `dir`, which is made with mode 0700 when a report is written and it is not there.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The last report, pretty-printed.
    pub fn last(&self) -> PathBuf {
        self.dir.join("last-shutdown.json")
    }

    /// One report a line, oldest first.
    pub fn history(&self) -> PathBuf {
        self.dir.join("history.jsonl")
    }

    /// Writes the report to both files.
    ///
    /// # Errors
    ///
    /// What the system said. The history is attempted whatever became of the last report.
    pub fn write(&self, report: &ShutdownReport) -> io::Result<()> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&self.dir)?;
        let mut pretty = serde_json::to_vec_pretty(report)?;
        pretty.push(b'\n');
        let last = replace(&self.last(), &pretty);
        let mut line = serde_json::to_vec(report)?;
        line.push(b'\n');
        let history = append(&self.history(), &line, report);
        last.and(history)
    }
}

fn append(path: &Path, line: &[u8], report: &ShutdownReport) -> io::Result<()> {
    let old = match std::fs::read(path) {
        Ok(old) => old,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    let lines: Vec<&[u8]> = old.split_inclusive(|byte| *byte == b'\n').collect();
    // A line without an end was cut off by a crash; it would swallow ours.
    let torn = old.last().is_some_and(|byte| *byte != b'\n');
    // The watchdog corrects the line of a process that hung after its report.
    let same = |line: &&[u8]| {
        serde_json::from_slice::<ShutdownReport>(line)
            .is_ok_and(|last| (last.pid, last.started_unix_ms) == (report.pid, report.started_unix_ms))
    };
    let replaced = torn || lines.last().is_some_and(same);
    if replaced || lines.len() >= 2 * HISTORY_LINES {
        let whole = if replaced { &lines[..lines.len() - 1] } else { &lines[..] };
        let kept = &whole[whole.len().saturating_sub(HISTORY_LINES - 1)..];
        let mut bytes = kept.concat();
        bytes.extend_from_slice(line);
        return replace(path, &bytes);
    }
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file: File = options.open(path)?;
    file.write_all(line)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::reason::Reason;

    fn report(n: u64) -> ShutdownReport {
        ShutdownReport::new("test".into(), Reason::requested("a test"), n, Duration::from_secs(1))
    }

    fn history(files: &ReportFiles) -> Vec<u64> {
        let text = std::fs::read_to_string(files.history()).unwrap();
        text.lines()
            .map(|line| serde_json::from_str::<ShutdownReport>(line).unwrap().started_unix_ms)
            .collect()
    }

    #[test]
    fn every_shutdown_is_a_line_and_the_last_one_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let files = ReportFiles::new(dir.path());
        for n in 0..3 {
            files.write(&report(n)).unwrap();
        }
        assert_eq!(history(&files), [0, 1, 2]);
        let last: ShutdownReport = serde_json::from_slice(&std::fs::read(files.last()).unwrap()).unwrap();
        assert_eq!(last, report(2));
    }

    #[cfg(unix)]
    #[test]
    fn a_directory_that_is_not_there_is_made_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("deep/data");
        ReportFiles::new(&data).write(&report(1)).unwrap();
        assert_eq!(std::fs::metadata(&data).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn the_history_is_capped_and_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let files = ReportFiles::new(dir.path());
        let line = serde_json::to_string(&report(7)).unwrap() + "\n";
        std::fs::write(files.history(), line.repeat(2 * HISTORY_LINES)).unwrap();
        files.write(&report(8)).unwrap();
        let kept = history(&files);
        assert_eq!((kept.len(), kept.last()), (HISTORY_LINES, Some(&8)));
    }

    #[test]
    fn a_shutdown_that_is_written_twice_is_one_line_with_the_later_words() {
        let dir = tempfile::tempdir().unwrap();
        let files = ReportFiles::new(dir.path());
        files.write(&report(1)).unwrap();
        files.write(&report(2)).unwrap();
        files.write(&ShutdownReport { watchdog: true, ..report(2) }).unwrap();
        assert_eq!(history(&files), [1, 2]);
        assert!(
            std::fs::read_to_string(files.history())
                .unwrap()
                .lines()
                .last()
                .unwrap()
                .contains("\"watchdog\":true")
        );
    }

    #[test]
    fn a_line_torn_by_a_crash_is_dropped_and_does_not_swallow_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let files = ReportFiles::new(dir.path());
        files.write(&report(1)).unwrap();
        let mut text = std::fs::read_to_string(files.history()).unwrap();
        text.push_str("{\"schema\":1,\"prog");
        std::fs::write(files.history(), text).unwrap();
        files.write(&report(2)).unwrap();
        assert_eq!(history(&files), [1, 2]);
    }
}
