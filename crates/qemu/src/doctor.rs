//! Whether this host can run machines: each need looked at, with what to do where it fails.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use godwit_types::{Arch, human_bytes};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::accel;
use crate::error::QemuError;
use crate::launch::Binaries;

/// The oldest QEMU that has everything used here.
const QEMU_MIN: (u32, u32) = (10, 0);
/// How long a tool may take to tell its version.
const VERSION_WITHIN: Duration = Duration::from_secs(20);

/// How one need stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Works, with less.
    Limited,
    /// Machines cannot run, or cannot move, until it is put right.
    Missing,
}

/// One need of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it stands.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do, where something is to be done.
    pub advice: Option<String>,
}

impl Check {
    fn new(name: &str, verdict: Verdict, found: impl Into<String>, advice: &str) -> Self {
        let advice = (verdict != Verdict::Good).then(|| advice.to_owned());
        Self { name: name.to_owned(), verdict, found: found.into(), advice }
    }
}

/// What to look at.
#[derive(Debug, Clone)]
pub struct Subject {
    /// QEMU programs.
    pub binaries: Binaries,
    /// Directory for memory files, on tmpfs.
    pub memory_dir: PathBuf,
    /// Directory for images and disks.
    pub data_dir: PathBuf,
    /// Cache file of the accelerator probe.
    pub probe_cache: PathBuf,
}

/// Looks at everything that machines need.
pub async fn check(subject: &Subject) -> Vec<Check> {
    let mut all = Vec::new();
    for (arch, verdict) in [(Arch::X86_64, Verdict::Missing), (Arch::Aarch64, Verdict::Limited)] {
        all.push(check_qemu(&subject.binaries, arch, verdict).await);
    }
    all.push(check_accel(subject).await);
    all.push(check_userfaultfd());
    all.push(check_tmpfs(&subject.memory_dir));
    all.push(check_room("data directory", &subject.data_dir, 4 << 30));
    all.push(check_tun());
    for tool in ["qemu-img", "mkfs.ext4"] {
        all.push(check_tool(tool));
    }
    all
}

/// The version of the QEMU at `program`, `major.minor.micro`.
///
/// # Errors
/// When it cannot be executed or tells no version.
pub async fn qemu_version(program: &Path) -> Result<String, QemuError> {
    let start = |source| QemuError::Start { program: program.to_owned(), source };
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(VERSION_WITHIN, command.output())
        .await
        .map_err(|_| QemuError::TimedOut {
            doing: "asking QEMU for its version",
            within: VERSION_WITHIN,
        })?
        .map_err(start)?;
    let text = String::from_utf8_lossy(&output.stdout);
    version_in(&text).ok_or_else(|| QemuError::Unexpected {
        what: "QEMU's version",
        why: text.chars().take(80).collect(),
    })
}

fn version_in(text: &str) -> Option<String> {
    let word = text.split("version ").nth(1)?.split_whitespace().next()?;
    let version: String =
        word.chars().take_while(|c| c.is_ascii_digit() || *c == '.').take(20).collect();
    (version.split('.').count() == 3).then_some(version)
}

fn new_enough(version: &str) -> bool {
    let mut parts = version.split('.').map(|p| p.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= QEMU_MIN
}

async fn check_qemu(binaries: &Binaries, arch: Arch, otherwise: Verdict) -> Check {
    let name = format!("QEMU for {arch}");
    let advice = "install qemu-system-x86 and qemu-system-arm, version 10 or later \
                  (on Debian 12 from bookworm-backports)";
    match qemu_version(binaries.of(arch)).await {
        Ok(v) if new_enough(&v) => Check::new(&name, Verdict::Good, v, advice),
        Ok(v) => Check::new(&name, otherwise, format!("{v} is too old"), advice),
        Err(_) => Check::new(&name, otherwise, "not found", advice),
    }
}

async fn check_accel(subject: &Subject) -> Check {
    let program = subject.binaries.of(Arch::X86_64);
    let advice = "guests run under TCG, slower; give this host a /dev/kvm that boots guests";
    match accel::probe(program, Arch::X86_64, &subject.probe_cache).await {
        Ok(p) if p.accel == accel::Accel::Kvm => {
            Check::new("accelerator", Verdict::Good, "kvm", advice)
        }
        Ok(p) => {
            let found = format!("{} ({})", p.accel.name(), p.why);
            Check::new("accelerator", Verdict::Limited, found, advice)
        }
        Err(_) => Check::new("accelerator", Verdict::Missing, "QEMU does not start", advice),
    }
}

/// Post-copy needs a userfaultfd that also sees faults from the kernel's side.
fn check_userfaultfd() -> Check {
    let advice = "run as root, or set vm.unprivileged_userfaultfd=1, or allow /dev/userfaultfd";
    // SAFETY: the system call takes only flags; the descriptor it gives is closed below.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if let Some(fd) = i32::try_from(fd).ok().filter(|fd| *fd >= 0) {
        // SAFETY: the descriptor is ours and is used nowhere else.
        unsafe { libc::close(fd) };
        return Check::new("userfaultfd", Verdict::Good, "usable", advice);
    }
    let why = std::io::Error::last_os_error().to_string();
    Check::new("userfaultfd", Verdict::Missing, why, advice)
}

fn existing(dir: &Path) -> &Path {
    dir.ancestors().find(|d| d.exists()).unwrap_or(Path::new("/"))
}

fn check_tmpfs(dir: &Path) -> Check {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let advice = "memory files belong on tmpfs: mount one there or choose a directory in /dev/shm";
    match rustix::fs::statfs(existing(dir)) {
        Ok(fs) if fs.f_type == TMPFS_MAGIC => check_room("memory directory", dir, 1 << 30),
        Ok(_) => {
            let found = format!("{} is not on tmpfs", dir.display());
            Check::new("memory directory", Verdict::Missing, found, advice)
        }
        Err(e) => Check::new("memory directory", Verdict::Missing, e.to_string(), advice),
    }
}

fn check_room(name: &str, dir: &Path, wanted: u64) -> Check {
    let advice = format!("make room: {} or more are wanted", human_bytes(wanted));
    match rustix::fs::statvfs(existing(dir)) {
        Ok(fs) => {
            let free = fs.f_bavail.saturating_mul(fs.f_frsize);
            let verdict = if free >= wanted { Verdict::Good } else { Verdict::Limited };
            let made = if dir.exists() { "" } else { ", which is yet to be made" };
            let found = format!("{} free in {}{made}", human_bytes(free), dir.display());
            Check::new(name, verdict, found, &advice)
        }
        Err(e) => Check::new(name, Verdict::Missing, e.to_string(), &advice),
    }
}

fn check_tun() -> Check {
    let advice = "load the tun module (only the link emulator and TAP NICs need it)";
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Check::new("/dev/net/tun", Verdict::Good, "usable", advice),
        Err(e) => Check::new("/dev/net/tun", Verdict::Limited, e.to_string(), advice),
    }
}

fn check_tool(tool: &str) -> Check {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|dir| dir.join(tool))
        .find(|p| p.is_file());
    match found {
        Some(p) => Check::new(tool, Verdict::Good, p.display().to_string(), ""),
        None => Check::new(tool, Verdict::Missing, "not found", "install qemu-utils and e2fsprogs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found_in_what_qemu_says() {
        let text = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright";
        assert_eq!(version_in(text).as_deref(), Some("10.0.2"));
        assert_eq!(version_in("QEMU emulator version x"), None);
        assert!(new_enough("10.0.2") && new_enough("11.0.0"));
        assert!(!new_enough("9.2.4") && !new_enough("7.2.17"));
    }

    #[test]
    fn a_directory_off_tmpfs_is_refused_for_memory() {
        let check = check_tmpfs(Path::new("/proc"));
        assert_eq!(check.verdict, Verdict::Missing);
        assert!(check.advice.is_some());
    }
}
