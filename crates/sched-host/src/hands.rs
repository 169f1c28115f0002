//! The hands of the service: whatever changes a thread or a group goes through here, and is written
//! down first. Dropping them puts everything back.
//!
//! Between the look at a thread's start time and the system call that changes it lie microseconds in
//! which the thread could end and its number go to another, after the kernel has given out all other
//! numbers once. The kernel has no call that closes that gap.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cgroup::{Hierarchy, Made};
use crate::cpus::CpuSet;
use crate::discover::VmId;
use crate::journal::{Changes, Journal, JournalError, Record};
use crate::proc::{Thread, ThreadId, online};
use crate::sys::{self, Attr, Powers};

/// How long a group may take to become empty when its threads end.
const GROUP_EMPTIES_WITHIN: Duration = Duration::from_secs(2);

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// It could not be written down.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The thread has ended.
    #[error("thread {0} has ended")]
    Gone(i32),
    /// Somebody else has changed the same.
    #[error("somebody else has changed thread {0}")]
    Meddled(i32),
    /// The kernel said no.
    #[error("changing the {what} of thread {tid}")]
    Kernel {
        /// What was to be changed.
        what: &'static str,
        /// Of whom.
        tid: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What was put back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Restored {
    /// Threads that have their own again.
    pub threads: u64,
    /// Threads that had ended.
    pub gone: u64,
    /// Attributes that somebody else had changed, which were left.
    pub left: u64,
    /// Groups that were removed.
    pub groups: u64,
    /// What could not be put back.
    pub failed: u64,
    /// Groups among them, which are not empty yet.
    pub groups_kept: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Hands {
    journal: Journal,
    hierarchy: Option<Hierarchy>,
    powers: Powers,
}

impl Hands {
    /// With a journal, and with groups where they can be had.
    #[must_use]
    pub const fn new(journal: Journal, hierarchy: Option<Hierarchy>, powers: Powers) -> Self {
        Self { journal, hierarchy, powers }
    }

    /// The hierarchy of groups.
    #[must_use]
    pub const fn hierarchy(&self) -> Option<&Hierarchy> {
        self.hierarchy.as_ref()
    }

    /// What the kernel allows.
    #[must_use]
    pub const fn powers(&self) -> Powers {
        self.powers
    }

    /// A thread's attributes; the kernel's own slice reads as 0.
    ///
    /// # Errors
    /// When the thread has ended.
    pub fn attr(&self, thread: &Thread) -> io::Result<Attr> {
        let attr = sys::get_attr(thread.id().tid)?;
        let own = self.powers.own_slice_ns.is_none_or(|own| own == attr.slice_ns);
        Ok(Attr { slice_ns: if own { 0 } else { attr.slice_ns }, ..attr })
    }

    /// Binds a thread to pCPUs.
    ///
    /// # Errors
    /// When it was not done.
    pub fn bind(
        &mut self,
        thread: &Thread,
        original: &CpuSet,
        set: &CpuSet,
    ) -> Result<(), ChangeError> {
        let id = alive(thread)?;
        let (original, new) = (original.clone(), set.clone());
        self.journal.write(&Record::Affinity { thread: id, original, set: new })?;
        sys::set_affinity(id.tid, set).map_err(|source| ChangeError::Kernel {
            what: "pCPUs",
            tid: id.tid,
            source,
        })
    }

    /// Sets a thread's nice and slice, if it has what is expected.
    ///
    /// # Errors
    /// When it was not done.
    pub fn set_attr(
        &mut self,
        thread: &Thread,
        original: Attr,
        expected: Attr,
        set: Attr,
    ) -> Result<(), ChangeError> {
        let id = alive(thread)?;
        let failed = |source| ChangeError::Kernel { what: "nice and slice", tid: id.tid, source };
        if self.attr(thread).map_err(failed)? != expected {
            return Err(ChangeError::Meddled(id.tid));
        }
        self.journal.write(&Record::Attr { thread: id, original, set })?;
        sys::set_attr(id.tid, set).map_err(failed)
    }

    /// The group that is to be made for a machine which stands in `above`.
    #[must_use]
    pub fn plan(&self, vm: VmId, above: &Path) -> Option<Made> {
        let mut made = self.hierarchy.as_ref()?.plan(vm, above);
        // Where the controller was switched on for another machine, the last one to go switches it
        // off.
        let by_us = |m: &Made| m.enabled_in.as_deref() == Some(above);
        if self.journal.state().made.values().any(by_us) {
            made.enabled_in = Some(above.to_owned());
        }
        Some(made)
    }

    /// Makes a group.
    ///
    /// # Errors
    /// When it was not done.
    pub fn make(&mut self, made: &Made) -> Result<(), ChangeError> {
        let Some(hierarchy) = self.hierarchy.clone() else { return Ok(()) };
        self.journal.write(&Record::Make(made.clone()))?;
        hierarchy.make(made).map_err(|source| ChangeError::Kernel { what: "group", tid: 0, source })
    }

    /// Moves a thread to a group.
    ///
    /// # Errors
    /// When it was not done.
    pub fn enter(
        &mut self,
        thread: &Thread,
        from: PathBuf,
        to: PathBuf,
    ) -> Result<(), ChangeError> {
        let Some(hierarchy) = self.hierarchy.clone() else { return Ok(()) };
        let id = alive(thread)?;
        self.journal.write(&Record::Move { thread: id, from, to: to.clone() })?;
        hierarchy.enter(&to, id.tid).map_err(|source| ChangeError::Kernel {
            what: "group",
            tid: id.tid,
            source,
        })
    }

    /// Puts back what was changed of one thread.
    pub fn restore(&mut self, id: ThreadId, report: &mut Restored) {
        let Some(changes) = self.journal.state().threads.get(&id).cloned() else { return };
        match Thread::reopen(id).filter(Thread::lives) {
            None => report.gone += 1,
            Some(thread) => match self.put_back(&thread, &changes) {
                Ok(left) => {
                    report.threads += 1;
                    report.left += left;
                }
                Err(_) if !thread.lives() => report.gone += 1,
                Err(e) => {
                    // It stays in the journal, for the next start.
                    tracing::warn!("thread {} keeps what was set: {e}", id.tid);
                    report.failed += 1;
                    return;
                }
            },
        }
        if let Err(e) = self.journal.write(&Record::Done(id)) {
            tracing::warn!("{e}");
        }
    }

    /// How many attributes were left as somebody else had set them.
    fn put_back(&self, thread: &Thread, changes: &Changes) -> io::Result<u64> {
        let tid = thread.id().tid;
        let mut left = 0;
        if let Some(changed) = &changes.attr {
            let now = self.attr(thread)?;
            if changed.is_ours(&now) {
                sys::set_attr(tid, changed.original)?;
            } else if now != changed.original {
                left += 1;
            }
        }
        if let Some(changed) = &changes.affinity {
            let (now, online) = (sys::get_affinity(tid)?, online()?);
            // What the kernel tells leaves pCPUs out that are offline.
            let ours = |set: &CpuSet| set.intersection(&online) == now;
            if ours(&changed.set) || changed.before.as_ref().is_some_and(ours) {
                sys::set_affinity(tid, &whole(&changed.original, &online))?;
            } else if now != changed.original.intersection(&online) {
                left += 1;
            }
        }
        if let Some((from, to)) = &changes.moved {
            let Some(hierarchy) = &self.hierarchy else {
                return Err(io::Error::other("its control group can't be reached now"));
            };
            if hierarchy.dir_of(thread)? == *to {
                let back = if from.is_dir() { from.as_path() } else { hierarchy.mount() };
                hierarchy.enter(back, tid)?;
            }
        }
        Ok(left)
    }

    /// Removes a group once it is empty.
    pub fn remove(&mut self, made: &Made, report: &mut Restored) {
        let Some(hierarchy) = &self.hierarchy else { return };
        match hierarchy.remove(made) {
            Ok(()) => {
                report.groups += 1;
                if let Err(e) = self.journal.write(&Record::Removed(made.dir.clone())) {
                    tracing::warn!("{e}");
                }
            }
            Err(e) => {
                tracing::debug!("the group {} stays for now: {e}", made.dir.display());
                report.failed += 1;
                report.groups_kept += 1;
            }
        }
    }

    /// Puts everything back that was changed, now or by a former service.
    pub fn restore_all(&mut self) -> Restored {
        let mut report = Restored::default();
        let threads: Vec<ThreadId> = self.journal.state().threads.keys().copied().collect();
        for id in threads {
            self.restore(id, &mut report);
        }
        let begin = Instant::now();
        loop {
            let made: Vec<Made> = self.journal.state().made.values().cloned().collect();
            report.failed -= std::mem::take(&mut report.groups_kept);
            for made in &made {
                self.remove(made, &mut report);
            }
            // The threads of a machine that was just killed leave their group when they are done.
            let again = report.groups_kept > 0 && begin.elapsed() < GROUP_EMPTIES_WITHIN;
            if !again {
                return report;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        self.restore_all();
    }
}

/// What a thread is given back: one that was bound to no pCPUs also gets those that come online later.
fn whole(original: &CpuSet, online: &CpuSet) -> CpuSet {
    if online.is_subset(original) { sys::every_cpu() } else { original.clone() }
}

fn alive(thread: &Thread) -> Result<ThreadId, ChangeError> {
    let id = thread.id();
    if thread.lives() { Ok(id) } else { Err(ChangeError::Gone(id.tid)) }
}
