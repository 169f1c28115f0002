//! Gangs from user space: machines whose vCPUs want more pCPUs than there are run one after the
//! other, each with all of its vCPUs at once.
//!
//! ```text
//!   weight of a group, 3 machines:   2816 | 128 128   128 |2816| 128   128 128 |2816|   ...
//!   whose vCPUs run together:           A                  B              C
//! ```
//!
//! Siblings stand on distinct pCPUs, and each machine has a group. The group whose turn it is gets
//! nearly all of the weight that all of them have together, the others next to nothing; after a
//! turn it is the next one's. Over a round each gets what it would have got all the time, and who
//! takes no part keeps its share, since the sum of the weights never changes. Nobody is shut out: a
//! machine that idles in its turn leaves its pCPUs to the others.
//!
//! This is strict co-scheduling (the thesis' alpha of zero) at turns of milliseconds, and it costs what
//! strict co-scheduling costs: who wakes may wait for a round. So only machines take part that keep
//! every pCPU of the host busy. Narrower ones would not do: a pCPU that only some of them use would
//! know other sums of weights from turn to turn.
//!
//! Only groups that were made here take part. They are removed at the end, so their weights need no
//! journal. After a kill they stay as they were in that moment until the next start; a group that had
//! to wait then still has [`WAITS`] of [`SHARE`] of its weight.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::cgroup::Version;
use crate::sys;

/// Machines that take part at most: with more, a round would take longer than anybody should wait.
pub const MOST: usize = 16;
/// Of [`SHARE`] parts of its weight, those that a group keeps while it waits.
pub const WAITS: u64 = 1;
/// See [`WAITS`].
pub const SHARE: u64 = 8;

/// The weights of the group whose turn it is and of those that wait, of `n` that take part.
#[must_use]
pub const fn weights(version: Version, n: u64) -> (u64, u64) {
    let usual = usual(version);
    let waits = usual * WAITS / SHARE;
    (n * usual - (n - 1) * waits, waits)
}

/// The weight of a group that was made and left alone.
const fn usual(version: Version) -> u64 {
    match version {
        Version::V1 => 1024,
        Version::V2 => 100,
    }
}

fn file(version: Version, dir: &Path) -> PathBuf {
    dir.join(match version {
        Version::V1 => "cpu.shares",
        Version::V2 => "cpu.weight",
    })
}

/// A thread that hands the turn on.
#[derive(Debug)]
pub(crate) struct Gangs {
    members: Arc<Mutex<Vec<PathBuf>>>,
    turns: Arc<AtomicU64>,
    stop: Option<Sender<()>>,
    worker: Option<JoinHandle<()>>,
}

impl Gangs {
    pub(crate) fn start(version: Version, turn: Duration) -> std::io::Result<Self> {
        let members = Arc::new(Mutex::new(Vec::new()));
        let turns = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = channel();
        let mut wheel = Wheel {
            version,
            wanted: Arc::clone(&members),
            turns: Arc::clone(&turns),
            known: Vec::new(),
            groups: Vec::new(),
            at: 0,
        };
        let worker = std::thread::Builder::new().name("sched-gangs".into()).spawn(move || {
            // A turn ends in time only if this thread does not wait for a pCPU itself.
            let me = sys::gettid();
            if let Ok(attr) = sys::get_attr(me) {
                let _ = sys::set_attr(me, sys::Attr { nice: -20, ..attr });
            }
            while stopped.recv_timeout(turn) == Err(RecvTimeoutError::Timeout) {
                wheel.turn();
            }
        })?;
        Ok(Self { members, turns, stop: Some(stop), worker: Some(worker) })
    }

    /// Who takes part from the next turn on; at most [`MOST`] do, and one alone does not.
    pub(crate) fn set(&self, groups: Vec<PathBuf>) {
        *self.members.lock().unwrap_or_else(PoisonError::into_inner) = groups;
    }

    /// How many take part.
    pub(crate) fn members(&self) -> usize {
        self.members.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Turns that were handed on.
    pub(crate) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }
}

impl Drop for Gangs {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(worker) = self.worker.take() {
            // It has given all weights back, even when it ended by a fault.
            let _ = worker.join();
        }
    }
}

struct Wheel {
    version: Version,
    wanted: Arc<Mutex<Vec<PathBuf>>>,
    turns: Arc<AtomicU64>,
    /// What was wanted when the groups were opened.
    known: Vec<PathBuf>,
    /// Their files for the weight.
    groups: Vec<File>,
    /// Whose turn it is.
    at: usize,
}

impl Wheel {
    fn turn(&mut self) {
        self.update();
        let n = self.groups.len();
        if n < 2 {
            return;
        }
        let (runs, waits) = weights(self.version, n as u64);
        let next = (self.at + 1) % n;
        // The next one first: for a moment two run, which is better than none.
        self.write(next, runs);
        self.write(self.at, waits);
        self.at = next;
        self.turns.fetch_add(1, Ordering::Relaxed);
    }

    /// Brings the list up to date. When it changes, everybody begins with the usual weight; those
    /// that stay get the one for waiting.
    fn update(&mut self) {
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Not beside what could be opened: one that has ended stays wanted until the next scan.
        if wanted == self.known {
            return;
        }
        self.give_back();
        self.known.clone_from(&wanted);
        // What can't be opened has ended, or may not be written: it does without.
        let open =
            |dir: &PathBuf| OpenOptions::new().write(true).open(file(self.version, dir)).ok();
        self.groups = wanted.iter().filter_map(open).take(MOST).collect();
        self.at = 0;
        if self.groups.len() > 1 {
            let (_, waits) = weights(self.version, self.groups.len() as u64);
            for i in 0..self.groups.len() {
                self.write(i, waits);
            }
        }
    }

    fn write(&mut self, which: usize, weight: u64) {
        // A machine that has just ended has no group any more.
        let _ = self.groups[which].write_all(weight.to_string().as_bytes());
    }

    fn give_back(&mut self) {
        for i in 0..self.groups.len() {
            self.write(i, usual(self.version));
        }
        self.groups.clear();
    }
}

impl Drop for Wheel {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_the_weights_does_not_change_and_the_kernel_takes_them() {
        for (version, least, most) in [(Version::V1, 2, 262_144), (Version::V2, 1, 10_000)] {
            for n in 2..=MOST as u64 {
                let (runs, waits) = weights(version, n);
                assert_eq!(runs + (n - 1) * waits, n * usual(version), "{version:?} {n}");
                assert!(waits >= least && runs <= most, "{version:?} {n}: {runs} {waits}");
            }
        }
    }

    fn wheel(dirs: &[PathBuf]) -> Wheel {
        Wheel {
            version: Version::V1,
            wanted: Arc::new(Mutex::new(dirs.to_vec())),
            turns: Arc::default(),
            known: Vec::new(),
            groups: Vec::new(),
            at: 0,
        }
    }

    /// Files in the place of groups: each write is appended there, so a file tells what was set.
    #[test]
    fn everybody_has_a_turn_and_gets_its_weight_back() {
        let root = tempfile::tempdir().expect("a directory");
        let dirs: Vec<PathBuf> = ["a", "b", "c"].map(|n| root.path().join(n)).into();
        for dir in &dirs {
            std::fs::create_dir(dir).expect("made");
            std::fs::write(dir.join("cpu.shares"), "").expect("written");
        }
        let said = |i: usize| std::fs::read_to_string(dirs[i].join("cpu.shares")).expect("read");
        let mut wheel = wheel(&dirs);
        for _ in 0..3 {
            wheel.turn();
        }
        assert_eq!(wheel.turns.load(Ordering::Relaxed), 3);
        drop(wheel);
        // To wait, its turn, to wait again, and the usual weight.
        assert_eq!(
            [said(0), said(1), said(2)],
            ["12812828161024", "12828161281024", "12828161281024"]
        );
    }

    #[test]
    fn one_that_is_gone_takes_nobodys_turn() {
        let root = tempfile::tempdir().expect("a directory");
        let dirs: Vec<PathBuf> = ["a", "b", "gone"].map(|n| root.path().join(n)).into();
        for dir in &dirs[..2] {
            std::fs::create_dir(dir).expect("made");
            std::fs::write(dir.join("cpu.shares"), "").expect("written");
        }
        let mut wheel = wheel(&dirs);
        for _ in 0..2 {
            wheel.turn();
        }
        let said = |i: usize| std::fs::read_to_string(dirs[i].join("cpu.shares")).expect("read");
        assert_eq!([said(0), said(1)], ["1281281920", "1281920128"]);
    }

    #[test]
    fn one_alone_and_one_that_is_gone_are_left_alone() {
        let root = tempfile::tempdir().expect("a directory");
        let (one, gone) = (root.path().join("one"), root.path().join("gone"));
        std::fs::create_dir(&one).expect("made");
        std::fs::write(one.join("cpu.shares"), "").expect("written");
        let mut wheel = wheel(&[one.clone(), gone]);
        wheel.turn();
        assert_eq!(wheel.turns.load(Ordering::Relaxed), 0);
        drop(wheel);
        assert_eq!(std::fs::read_to_string(one.join("cpu.shares")).expect("read"), "1024");
    }
}
