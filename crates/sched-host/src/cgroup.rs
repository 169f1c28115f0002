//! One control group per machine, so that its vCPUs share one weight and lend to each other at no
//! other machine's cost.
//!
//! A machine that has a group to itself keeps it. One that shares its group with other processes gets
//! a group below that one, with the default weight, and only its vCPU threads are moved into it: in
//! version 2 it is a *threaded* group, so memory and other limits stay those of the group above, and
//! so does the share of CPU time of the whole.
//!
//! Where the kernel's autogroups are on, a process in the root group shares its weight with its
//! session. A thread that is moved to a group of its own leaves its autogroup, and returns to it when
//! it is moved back. Machines that were started in one session, which shared one weight, then have one
//! each, and count for more beside other processes than before.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::discover::VmId;
use crate::proc::{Thread, read_bounded};

/// What the names of groups made here begin with.
pub const PREFIX: &str = "godwit-vm-";

/// Which of the two interfaces shares out CPU time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum Version {
    /// `cpu.shares`.
    V1,
    /// `cpu.weight`.
    V2,
}

/// Why no groups can be had.
#[derive(Debug, thiserror::Error)]
pub enum NoCgroups {
    /// The mounts can't be read.
    #[error("reading /proc/self/mountinfo")]
    Mounts(#[source] io::Error),
    /// There is no such mount.
    #[error(
        "no hierarchy of control groups with the {controller} controller is mounted (mount -t cgroup2 none \
         /sys/fs/cgroup)"
    )]
    NoHierarchy {
        /// Which controller.
        controller: &'static str,
    },
    /// There is one that may not be written.
    #[error("{at} may not be written; run as root, outside a container")]
    ReadOnly {
        /// The hierarchy.
        at: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The hierarchy that shares out CPU time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    version: Version,
    mount: PathBuf,
    /// What of the hierarchy is mounted there; `/` but in containers.
    root: String,
}

/// In what group a machine's vCPUs stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// In one that holds nothing else.
    Own(PathBuf),
    /// In one that was made here, whose service does not look after it any more.
    Foreign(PathBuf),
    /// In one that they share with other processes.
    Shared(PathBuf),
    /// Each in another, as libvirt does it: there is no weight that they share.
    Split,
}

/// A group that was made.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Made {
    /// The group.
    pub dir: PathBuf,
    /// The group above, when the cpu controller was switched on in it for this.
    pub enabled_in: Option<PathBuf>,
}

/// The path of a thread in the hierarchy that shares out CPU time, from the text of
/// `/proc/<tid>/cgroup`: the `cpu` controller of version 1 where there is one, else version 2.
#[must_use]
pub fn cpu_path(text: &str) -> Option<&str> {
    let mut unified = None;
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        if controllers.split(',').any(|c| c == "cpu") {
            return Some(path);
        }
        if controllers.is_empty() {
            unified = Some(path);
        }
    }
    unified
}

/// The hierarchy that has `controller` among the mounts of `/proc/self/mountinfo`.
fn parse_mounts(text: &str, controller: &str) -> Option<Hierarchy> {
    let mut unified = None;
    for line in text.lines() {
        // id parent dev root mount options optional* - type source super
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let mut before = before.split(' ').skip(3);
        let (Some(root), Some(mount)) = (before.next(), before.next()) else { continue };
        let mut after = after.split(' ');
        let (kind, controllers) = (after.next(), after.nth(1).unwrap_or_default());
        let version = match kind {
            Some("cgroup") if controllers.split(',').any(|c| c == controller) => Version::V1,
            Some("cgroup2") => Version::V2,
            _ => continue,
        };
        let found =
            Hierarchy { version, mount: PathBuf::from(unescaped(mount)), root: unescaped(root) };
        if version == Version::V1 {
            return Some(found);
        }
        unified.get_or_insert(found);
    }
    unified
}

/// The kernel writes blanks and the like as `\040`.
fn unescaped(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = tail.get(..3).and_then(|d| {
            u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok().filter(|_| *first == b'\\')
        });
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl Hierarchy {
    /// Finds the hierarchy, if groups may be made in it.
    ///
    /// # Errors
    /// When there is none, or it may not be written.
    pub fn find() -> Result<Self, NoCgroups> {
        Self::find_of("cpu")
    }

    /// Finds the hierarchy that has another controller than `cpu`, such as `memory`.
    ///
    /// # Errors
    /// As [`Hierarchy::find`].
    pub fn find_of(controller: &'static str) -> Result<Self, NoCgroups> {
        let none = || NoCgroups::NoHierarchy { controller };
        let text = read_bounded(Path::new("/proc/self/mountinfo")).map_err(NoCgroups::Mounts)?;
        let found = parse_mounts(&String::from_utf8_lossy(&text), controller).ok_or_else(none)?;
        if found.version == Version::V2 {
            let controllers = read_bounded(&found.mount.join("cgroup.controllers"));
            let controllers = controllers.map_err(NoCgroups::Mounts)?;
            if !String::from_utf8_lossy(&controllers).split_whitespace().any(|c| c == controller) {
                return Err(none());
            }
        }
        rustix::fs::access(&found.mount, rustix::fs::Access::WRITE_OK)
            .map_err(|e| NoCgroups::ReadOnly { at: found.mount.clone(), source: e.into() })?;
        Ok(found)
    }

    /// Which interface it is.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// The group of a thread.
    ///
    /// # Errors
    /// When the thread has ended, or its group is not in what is mounted here.
    pub fn dir_of(&self, thread: &Thread) -> io::Result<PathBuf> {
        let text = thread.cgroups()?;
        let outside = || io::Error::other("its control group can't be seen from here");
        let path = Path::new(cpu_path(&text).ok_or_else(outside)?);
        let below = path.strip_prefix(&self.root).map_err(|_| outside())?;
        if below.components().any(|c| c == std::path::Component::ParentDir) {
            return Err(outside());
        }
        Ok(self.mount.join(below))
    }

    /// In what group the vCPUs of a machine stand.
    ///
    /// # Errors
    /// When one of them has ended, or a group can't be read.
    pub fn standing<'a>(
        &self,
        vm: VmId,
        mut vcpus: impl Iterator<Item = &'a Thread>,
    ) -> io::Result<Standing> {
        let gone = || io::Error::other("it has no vCPUs");
        let dir = self.dir_of(vcpus.next().ok_or_else(gone)?)?;
        for vcpu in vcpus {
            if self.dir_of(vcpu)? != dir {
                return Ok(Standing::Split);
            }
        }
        let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with(PREFIX) {
            return Ok(Standing::Foreign(dir));
        }
        if dir != self.mount && self.holds_only(&dir, vm.pid)? {
            return Ok(Standing::Own(dir));
        }
        Ok(Standing::Shared(dir))
    }

    fn holds_only(&self, dir: &Path, pid: i32) -> io::Result<bool> {
        // A threaded group does not tell its processes, but its threads.
        let members = read_bounded(&dir.join("cgroup.procs"))
            .or_else(|_| read_bounded(&dir.join("cgroup.threads")))?;
        let text = String::from_utf8_lossy(&members);
        Ok(text.lines().all(|line| {
            let tid: Option<i32> = line.trim().parse().ok();
            tid.is_some_and(|t| t == pid || Path::new(&format!("/proc/{pid}/task/{t}")).exists())
        }))
    }

    /// The group that is to be made for a machine which stands in `above`; nothing is done yet.
    #[must_use]
    pub fn plan(&self, vm: VmId, above: &Path) -> Made {
        let enabled = || -> Option<bool> {
            let text = read_bounded(&above.join("cgroup.subtree_control")).ok()?;
            Some(String::from_utf8_lossy(&text).split_whitespace().any(|c| c == "cpu"))
        };
        let enable = self.version == Version::V2 && enabled() != Some(true);
        Made {
            dir: above.join(format!("{PREFIX}{}-{}", vm.pid, vm.start)),
            enabled_in: enable.then(|| above.to_owned()),
        }
    }

    /// Makes a group, with the default weight.
    ///
    /// # Errors
    /// As the kernel has it; what was done is undone.
    pub fn make(&self, made: &Made) -> io::Result<()> {
        match fs::create_dir(&made.dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        let prepared = || -> io::Result<()> {
            if self.version == Version::V2 {
                fs::write(made.dir.join("cgroup.type"), "threaded")?;
                if let Some(above) = &made.enabled_in {
                    fs::write(above.join("cgroup.subtree_control"), "+cpu")?;
                }
            }
            Ok(())
        };
        prepared().inspect_err(|_| {
            let _ = fs::remove_dir(&made.dir);
        })
    }

    /// Moves one thread into a group.
    ///
    /// # Errors
    /// As the kernel has it.
    pub fn enter(&self, dir: &Path, tid: i32) -> io::Result<()> {
        let file = match self.version {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.threads",
        };
        fs::write(dir.join(file), tid.to_string())
    }

    /// Removes a group that was made; it must be empty. One that is gone is fine.
    ///
    /// # Errors
    /// When it is not empty, or as the kernel has it.
    pub fn remove(&self, made: &Made) -> io::Result<()> {
        match fs::remove_dir(&made.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        let Some(above) = &made.enabled_in else { return Ok(()) };
        let others = fs::read_dir(above).into_iter().flatten().filter_map(Result::ok);
        // Somebody else may count on the controller by now.
        if others.into_iter().any(|e| e.path().join("cgroup.procs").exists()) {
            return Ok(());
        }
        match fs::write(above.join("cgroup.subtree_control"), "-cpu") {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Where the hierarchy is mounted.
    #[must_use]
    pub fn mount(&self) -> &Path {
        &self.mount
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_cpu_controller_of_version_1_comes_first() {
        assert_eq!(cpu_path("9:name=systemd:/\n1:cpu,cpuacct:/a/b:c\n0::/x\n"), Some("/a/b:c"));
        assert_eq!(cpu_path("2:cpuacct:/no\n0::/user.slice\n"), Some("/user.slice"));
        assert_eq!(cpu_path("2:cpuset:/no\n"), None);
    }

    #[test]
    fn mounts_are_read() {
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = parse_mounts(v2, "cpu").expect("version 2");
        assert_eq!(
            (found.version, found.mount.as_path()),
            (Version::V2, Path::new("/sys/fs/cgroup"))
        );
        let v1 =
            format!("{v2}31 23 0:27 /docker/x /sys/fs/a\\040b rw - cgroup cgroup rw,cpu,cpuacct\n");
        let found = parse_mounts(&v1, "cpu").expect("version 1");
        assert_eq!((found.version, found.root.as_str()), (Version::V1, "/docker/x"));
        assert_eq!(found.mount, Path::new("/sys/fs/a b"));
        assert_eq!(parse_mounts("30 23 0:26 / /sys rw - sysfs sysfs rw\n", "cpu"), None);
    }

    proptest! {
        #[test]
        fn no_text_brings_a_parser_down(text in "(\\PC|\n|:|\\\\)*") {
            let _ = cpu_path(&text);
            let _ = parse_mounts(&text, "cpu");
            let _ = unescaped(&text);
        }
    }
}
