//! What was changed, on disk before it is changed, so that the next start puts back what a killed
//! service left.
//!
//! A line of JSON per change names the thread (number *and* start time), what it had originally and
//! what it is about to have. At the next start a thread that has ended is left out; one that has what
//! was set gets its original back; one that has something else was changed by somebody meanwhile and
//! keeps it. A torn last line was never followed by its change.
//!
//! The file is of one boot: start times count from there, and what the journal speaks of did not
//! outlive it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::cgroup::Made;
use crate::cpus::CpuSet;
use crate::proc::{ThreadId, read_bounded};
use crate::sys::Attr;

/// The version of the journal's lines.
const VERSION: u32 = 1;
/// The most that is read of a journal, bytes; it is rewritten long before.
const READ_LIMIT: u64 = 64 * 1024 * 1024;
/// From which size on it is rewritten, bytes.
const REWRITE_AT: u64 = 1024 * 1024;

/// What can go wrong with the state directory.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The directory can't be had.
    #[error("making {0}; run as root, or name a directory of yours with --state-dir")]
    Dir(PathBuf, #[source] io::Error),
    /// Another service is at work.
    #[error("{holder} looks after this host's machines already (it holds {lock})")]
    Held {
        /// Who.
        holder: String,
        /// The file.
        lock: PathBuf,
    },
    /// The journal can't be read or written.
    #[error("using the journal {0}")]
    File(PathBuf, #[source] io::Error),
    /// The journal is of another kind.
    #[error(
        "the journal {0} is of a version that this program does not know; remove it by hand \
             after a look at what it lists"
    )]
    Version(PathBuf),
}

/// One line.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// The first line.
    Head {
        /// Of the lines.
        version: u32,
        /// The kernel's number of this boot.
        boot: String,
    },
    /// A group is about to be made.
    Make(Made),
    /// A group was removed.
    Removed(PathBuf),
    /// A thread is about to be moved to another group.
    Move {
        /// Which one.
        thread: ThreadId,
        /// Where it stood.
        from: PathBuf,
        /// Where it goes.
        to: PathBuf,
    },
    /// A thread's pCPUs are about to be changed.
    Affinity {
        /// Which one.
        thread: ThreadId,
        /// What it had.
        original: CpuSet,
        /// What it gets.
        set: CpuSet,
    },
    /// A thread's nice and slice are about to be changed.
    Attr {
        /// Which one.
        thread: ThreadId,
        /// What it had; a slice of 0 is the kernel's own.
        original: Attr,
        /// What it gets.
        set: Attr,
    },
    /// A thread has its own again, or has ended.
    Done(ThreadId),
}

/// An attribute that was changed: the original, and what was set last and before that. The last
/// may not have come to pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed<T> {
    /// What it was.
    pub original: T,
    /// What was set last.
    pub set: T,
    /// What was set before.
    pub before: Option<T>,
}

impl<T: PartialEq + Clone> Changed<T> {
    fn again(old: Option<&Self>, original: T, set: T) -> Self {
        Self { original, before: old.map(|o| o.set.clone()), set }
    }

    /// Whether `now` is something that was set here.
    pub fn is_ours(&self, now: &T) -> bool {
        *now == self.set || self.before.as_ref() == Some(now)
    }
}

/// What was changed of one thread.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Its pCPUs.
    pub affinity: Option<Changed<CpuSet>>,
    /// Its nice and slice.
    pub attr: Option<Changed<Attr>>,
    /// Its group: from where to where.
    pub moved: Option<(PathBuf, PathBuf)>,
}

/// What a journal adds up to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// What was changed of whom.
    pub threads: BTreeMap<ThreadId, Changes>,
    /// Groups that were made, by directory.
    pub made: BTreeMap<PathBuf, Made>,
}

impl State {
    /// Takes one line in.
    pub fn apply(&mut self, record: &Record) {
        match record.clone() {
            Record::Head { .. } => {}
            Record::Make(made) => {
                self.made.insert(made.dir.clone(), made);
            }
            Record::Removed(dir) => {
                self.made.remove(&dir);
            }
            Record::Move { thread, from, to } => {
                let moved = &mut self.threads.entry(thread).or_default().moved;
                let from = moved.take().map_or(from, |(first, _)| first);
                *moved = Some((from, to));
            }
            Record::Affinity { thread, original, set } => {
                let affinity = &mut self.threads.entry(thread).or_default().affinity;
                *affinity = Some(Changed::again(affinity.as_ref(), original, set));
            }
            Record::Attr { thread, original, set } => {
                let attr = &mut self.threads.entry(thread).or_default().attr;
                *attr = Some(Changed::again(attr.as_ref(), original, set));
            }
            Record::Done(thread) => {
                self.threads.remove(&thread);
            }
        }
    }

    /// The shortest journal that adds up to this.
    fn records(&self) -> Vec<Record> {
        let mut out: Vec<Record> = self.made.values().cloned().map(Record::Make).collect();
        for (thread, changes) in &self.threads {
            let thread = *thread;
            if let Some((from, to)) = changes.moved.clone() {
                out.push(Record::Move { thread, from, to });
            }
            if let Some(c) = changes.affinity.clone() {
                for set in c.before.into_iter().chain([c.set]) {
                    out.push(Record::Affinity { thread, original: c.original.clone(), set });
                }
            }
            if let Some(c) = changes.attr.clone() {
                for set in c.before.into_iter().chain([c.set]) {
                    out.push(Record::Attr { thread, original: c.original, set });
                }
            }
        }
        out
    }
}

/// The state directory of a running service: its lock and its journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    len: u64,
    state: State,
    boot: String,
    /// Held as long as the service lives.
    _lock: File,
}

impl Journal {
    /// Takes the directory; what a former service left is in [`Journal::state`].
    ///
    /// # Errors
    /// When another service holds it, or it can't be used.
    pub fn open(dir: &Path) -> Result<Self, JournalError> {
        fs::create_dir_all(dir).map_err(|e| JournalError::Dir(dir.to_owned(), e))?;
        let lock = lock(dir)?;
        let path = dir.join("journal");
        let failed = |e| JournalError::File(path.clone(), e);
        let boot = read_bounded(Path::new("/proc/sys/kernel/random/boot_id")).map_err(failed)?;
        let boot = String::from_utf8_lossy(&boot).trim().to_owned();
        let state = match File::open(&path) {
            Ok(file) => {
                let mut text = Vec::new();
                file.take(READ_LIMIT).read_to_end(&mut text).map_err(failed)?;
                read(&text, &boot).ok_or_else(|| JournalError::Version(path.clone()))?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => State::default(),
            Err(e) => return Err(failed(e)),
        };
        let (file, len) = rewrite(&path, &boot, &state).map_err(failed)?;
        Ok(Self { path, file, len, state, boot, _lock: lock })
    }

    /// What is changed now.
    #[must_use]
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// Writes a change down, before it is made.
    ///
    /// # Errors
    /// When it can't be written; the change must not be made then.
    pub fn write(&mut self, record: &Record) -> Result<(), JournalError> {
        let failed = |e| JournalError::File(self.path.clone(), e);
        let line = line_of(record).map_err(failed)?;
        // One write: a kill leaves all of the line or, on a full disk, a part that is then cut.
        if let Err(e) = self.file.write_all(&line) {
            let _ = self.file.set_len(self.len);
            return Err(failed(e));
        }
        self.len += line.len() as u64;
        self.state.apply(record);
        if self.len > REWRITE_AT {
            let (file, len) = rewrite(&self.path, &self.boot, &self.state)
                .map_err(|e| JournalError::File(self.path.clone(), e))?;
            // A state that is large by itself must not be rewritten at every line.
            (self.file, self.len) = (file, len.min(REWRITE_AT / 2));
        }
        Ok(())
    }
}

fn line_of(record: &Record) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record).map_err(io::Error::other)?;
    line.push(b'\n');
    Ok(line)
}

/// What a journal's text adds up to; `None` when its version is unknown.
fn read(text: &[u8], boot: &str) -> Option<State> {
    let mut state = State::default();
    // What follows the last line end is torn.
    let whole = text.iter().rposition(|b| *b == b'\n').map_or(&[][..], |end| &text[..end]);
    for line in whole.split(|b| *b == b'\n') {
        match serde_json::from_slice::<Record>(line) {
            Ok(Record::Head { version, .. }) if version != VERSION => return None,
            // Of a boot that is over: nothing of it is left.
            Ok(Record::Head { boot: of, .. }) if of != boot => return Some(State::default()),
            Ok(record) => state.apply(&record),
            Err(_) if line.is_empty() => {}
            Err(e) => tracing::warn!("a line of the journal can't be read: {e}"),
        }
    }
    Some(state)
}

/// Writes the journal anew, in one step.
fn rewrite(path: &Path, boot: &str, state: &State) -> io::Result<(File, u64)> {
    let fresh = path.with_extension("new");
    let _ = fs::remove_file(&fresh);
    let mut file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&fresh)?;
    let mut text = line_of(&Record::Head { version: VERSION, boot: boot.to_owned() })?;
    for record in state.records() {
        text.extend(line_of(&record)?);
    }
    file.write_all(&text)?;
    fs::rename(&fresh, path)?;
    Ok((file, text.len() as u64))
}

/// The lock goes with the process that holds it, however it ends.
fn lock(dir: &Path) -> Result<File, JournalError> {
    let path = dir.join("lock");
    let failed = |e: io::Error| JournalError::File(path.clone(), e);
    let options = || {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).clone()
    };
    let mut file = options().open(&path).map_err(failed)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            let _ = (&mut file).take(256).read_to_string(&mut holder);
            let holder = match holder.trim() {
                "" => "another service".to_owned(),
                pid => format!("the service with process number {pid}"),
            };
            return Err(JournalError::Held { holder, lock: path });
        }
        Err(e) => return Err(failed(e.into())),
    }
    file.set_len(0).and_then(|()| write!(file, "{}", std::process::id())).map_err(failed)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn thread(tid: i32) -> ThreadId {
        ThreadId { pid: 1, tid, start: 77 }
    }

    fn attr(nice: i32) -> Attr {
        Attr { policy: 0, reset_on_fork: false, nice, slice_ns: 0 }
    }

    fn record() -> impl Strategy<Value = Record> {
        let cpus = || proptest::collection::vec(0usize..8, 1..4).prop_map(CpuSet::from_iter);
        prop_oneof![
            (0i32..4).prop_map(|t| Record::Done(thread(t))),
            (0i32..4, cpus(), cpus()).prop_map(|(t, original, set)| Record::Affinity {
                thread: thread(t),
                original,
                set
            }),
            (0i32..4, -20i32..20, -20i32..20).prop_map(|(t, a, b)| Record::Attr {
                thread: thread(t),
                original: attr(a),
                set: attr(b)
            }),
            (0i32..4, "[a-c]", "[a-c]").prop_map(|(t, from, to)| Record::Move {
                thread: thread(t),
                from: from.into(),
                to: to.into()
            }),
            "[a-c]".prop_map(|d| Record::Make(Made { dir: d.into(), enabled_in: None })),
            "[a-c]".prop_map(|d| Record::Removed(d.into())),
        ]
    }

    proptest! {
        #[test]
        fn wherever_it_is_cut_the_whole_lines_count(
            records in proptest::collection::vec(record(), 0..20),
            cut in 0usize..4000,
        ) {
            let mut text = line_of(&Record::Head { version: VERSION, boot: "b".into() })?;
            let mut ends = vec![(text.len(), State::default())];
            let mut state = State::default();
            for record in &records {
                text.extend(line_of(record)?);
                state.apply(record);
                ends.push((text.len(), state.clone()));
            }
            let cut = cut.min(text.len());
            let expected = ends.iter().rev().find(|(end, _)| *end <= cut).map(|(_, s)| s.clone());
            prop_assert_eq!(read(&text[..cut], "b"), Some(expected.unwrap_or_default()));
            prop_assert_eq!(read(&text, "another boot"), Some(State::default()));
            // What is written anew adds up to the same.
            let mut again = State::default();
            state.records().iter().for_each(|r| again.apply(r));
            prop_assert_eq!(again, state);
        }

        #[test]
        fn no_text_brings_it_down(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&text, "b");
        }
    }

    #[test]
    fn what_was_written_is_there_after_a_crash_and_a_second_service_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut journal = Journal::open(dir.path()).expect("a journal");
        let change = Record::Attr { thread: thread(5), original: attr(0), set: attr(-2) };
        journal.write(&change).expect("to write");
        let refused = Journal::open(dir.path()).expect_err("it is held");
        let pid = std::process::id().to_string();
        assert!(refused.to_string().contains(&pid), "{refused}");
        drop(journal);
        let journal = Journal::open(dir.path()).expect("it is free again");
        let changed = journal.state().threads[&thread(5)].attr.clone().expect("a change");
        assert_eq!((changed.original.nice, changed.set.nice), (0, -2));
        assert!(changed.is_ours(&attr(-2)) && !changed.is_ours(&attr(3)));
    }

    #[test]
    fn a_journal_does_not_grow_without_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut journal = Journal::open(dir.path()).expect("a journal");
        for i in 0..12_000 {
            let set = attr(i % 3);
            journal
                .write(&Record::Attr { thread: thread(i % 4), original: attr(0), set })
                .expect("to write");
        }
        let size = fs::metadata(dir.path().join("journal")).expect("its size").len();
        assert!(size <= REWRITE_AT + 4096, "{size}");
        assert_eq!(journal.state().threads.len(), 4);
    }

    #[test]
    fn an_unknown_version_is_refused() {
        assert_eq!(read(b"{\"head\":{\"version\":9,\"boot\":\"b\"}}\n", "b"), None);
    }
}
