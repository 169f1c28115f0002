//! A control group with a memory limit for each QEMU: one that wants more is ended alone, by the
//! kernel, and nobody else pays for it.
//!
//! What counts is what the process touches first: the pages of its memory file, its own memory, and
//! what the kernel caches of its disk, which it gives back.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use godwit_types::Mib;
use serde::{Deserialize, Serialize};

use crate::accel::Accel;
use crate::error::QemuError;
use crate::launch::MemorySource;
use crate::spec::MachineSpec;

/// What QEMU may have for itself under KVM.
const OWN_KVM: u32 = 512;
/// The same under TCG, whose translated code alone may take 1 GiB.
const OWN_TCG: u32 = 1536 + 512;
/// Memory of the display and of firmware.
const VIDEO: u32 = 64;

/// Where a site makes the groups of its QEMUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryGroups {
    /// The group above, which is the site's alone.
    pub parent: PathBuf,
    /// Whether it has the files of version 2.
    pub unified: bool,
}

/// The group of one QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryGroup {
    /// Its directory.
    pub dir: PathBuf,
    /// Whether it has the files of version 2.
    pub unified: bool,
    /// The most that it may take.
    pub limit: Mib,
}

impl MemoryGroups {
    /// Removes the groups of this site in which nobody is any more, and those of sites without any.
    pub fn sweep(&self) {
        let sites = self.parent.parent().map(std::fs::read_dir).into_iter().flatten().flatten();
        let sites = sites.flatten().map(|item| item.path()).filter(|path| path.is_dir());
        let mine = std::fs::read_dir(&self.parent).into_iter().flatten().flatten();
        let mine = mine.map(|item| item.path()).filter(|path| path.is_dir());
        for group in mine.chain(sites) {
            // One in which a process or another group is stays.
            let _ = std::fs::remove_dir(group);
        }
    }

    /// Makes a group, and those above it. Another site may sweep them away in between.
    fn make_dir(&self, dir: &Path) -> std::io::Result<()> {
        const TRIES: usize = 5;
        let make = || {
            std::fs::create_dir_all(&self.parent)?;
            if self.unified {
                for above in [self.parent.parent(), Some(&self.parent)].into_iter().flatten() {
                    std::fs::write(above.join("cgroup.subtree_control"), "+memory")?;
                }
            }
            std::fs::create_dir(dir)
        };
        let mut made = make();
        for _ in 1..TRIES {
            if made.is_ok() {
                break;
            }
            made = make();
        }
        made
    }

    /// Makes the group `name` for a program beside a QEMU; one that is there gets the limit.
    ///
    /// # Errors
    /// When it can't be made or limited.
    pub fn make_named(&self, name: &str, limit: Mib) -> Result<MemoryGroup, QemuError> {
        let group = self.named(name, limit);
        let made = match group.dir.is_dir() {
            true => Ok(()),
            false => self.make_dir(&group.dir),
        };
        made.map_err(QemuError::file("making the control group", &group.dir))?;
        let file = group.dir.join(group.limit_file());
        std::fs::write(&file, limit.bytes().to_string())
            .map_err(QemuError::file("limiting the memory in", &file))?;
        Ok(group)
    }

    /// The group that [`MemoryGroups::make_named`] makes.
    #[must_use]
    pub fn named(&self, name: &str, limit: Mib) -> MemoryGroup {
        MemoryGroup { dir: self.parent.join(name), unified: self.unified, limit }
    }

    /// Makes the group of a QEMU that runs `spec`.
    pub(crate) fn make(
        &self,
        spec: &MachineSpec,
        memory: &MemorySource,
        accel: Accel,
    ) -> Result<MemoryGroup, QemuError> {
        let dir = self.parent.join(uuid::Uuid::new_v4().simple().to_string());
        let limit = most(spec.memory, memory, accel);
        self.make_dir(&dir).map_err(QemuError::file("making the control group", &dir))?;
        let group = MemoryGroup { dir, unified: self.unified, limit };
        let file = group.dir.join(group.limit_file());
        if let Err(e) = std::fs::write(&file, limit.bytes().to_string()) {
            group.remove();
            return Err(QemuError::file("limiting the memory in", &file)(e));
        }
        Ok(group)
    }
}

/// The most that a QEMU may take.
fn most(ram: Mib, memory: &MemorySource, accel: Accel) -> Mib {
    let own = match accel {
        Accel::Kvm => OWN_KVM,
        Accel::Tcg => OWN_TCG,
    };
    let ram = match memory {
        MemorySource::Shared { .. } => ram.0,
        // Its own copy of each page, and each hole of the sealed file that it was first to read.
        MemorySource::PrivateOf { .. } => ram.0.saturating_mul(2),
    };
    Mib(ram.saturating_add(VIDEO + own))
}

impl MemoryGroup {
    /// The file that holds the limit.
    #[must_use]
    pub const fn limit_file(&self) -> &'static str {
        if self.unified { "memory.max" } else { "memory.limit_in_bytes" }
    }

    /// What a process writes a zero to that is to be in the group.
    pub(crate) fn door(&self) -> Result<File, QemuError> {
        let path = self.dir.join("cgroup.procs");
        let file = OpenOptions::new().write(true).open(&path);
        file.map_err(QemuError::file("opening the control group", &path))
    }

    /// Whether the kernel has ended one that was in it.
    #[must_use]
    pub fn was_outgrown(&self) -> bool {
        let file = if self.unified { "memory.events" } else { "memory.oom_control" };
        counts_a_kill(&std::fs::read_to_string(self.dir.join(file)).unwrap_or_default())
    }

    /// Removes it, if nobody is in it.
    pub fn remove(&self) {
        if let Err(error) = remove(&self.dir) {
            tracing::debug!(group = %self.dir.display(), %error, "a control group stays until the site starts next");
        }
    }
}

fn remove(dir: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn counts_a_kill(text: &str) -> bool {
    let count = text.lines().find_map(|l| l.strip_prefix("oom_kill "));
    count.is_some_and(|n| n.trim().parse::<u64>().is_ok_and(|n| n > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_is_read_from_either_version() {
        assert!(counts_a_kill("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"));
        assert!(counts_a_kill("low 0\nhigh 0\nmax 9\noom 1\noom_kill 2\noom_group_kill 0\n"));
        assert!(!counts_a_kill("oom_kill_disable 1\nunder_oom 0\noom_kill 0\n"));
        assert!(!counts_a_kill(""));
    }

    #[test]
    fn a_clone_may_have_its_memory_twice() {
        let shared = MemorySource::Shared { path: "/a".into() };
        let private = MemorySource::PrivateOf { path: "/a".into() };
        let more = most(Mib(100), &private, Accel::Kvm).0 - most(Mib(100), &shared, Accel::Kvm).0;
        assert_eq!(more, 100);
    }
}
