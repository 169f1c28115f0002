//! Whether this machine can have the scheduler, and whether that would be safe.

use std::fs;
use std::path::Path;

/// The first kernel whose sched_ext has all that is used.
const OLDEST: (u32, u32) = (6, 16);

/// Why the scheduler is not loaded, and what can be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The kernel is from before sched_ext as it is used here.
    #[error(
        "kernel {0} is too old: sched_ext is used as of 6.16; boot a newer kernel (Debian: trixie-backports), or use `sched run`"
    )]
    TooOld(String),
    /// The kernel has no sched_ext.
    #[error(
        "kernel {0} was built without sched_ext (CONFIG_SCHED_CLASS_EXT); boot one that has it, or use `sched run`"
    )]
    NoSchedExt(String),
    /// The kernel does not describe its types.
    #[error(
        "the kernel does not describe its types: /sys/kernel/btf/vmlinux is missing (CONFIG_DEBUG_INFO_BTF)"
    )]
    NoBtf,
    /// Only root may replace the scheduler.
    #[error("only root may replace the machine's scheduler: run this as root, or use `sched run`")]
    NotRoot,
    /// There can be one.
    #[error("sched_ext scheduler '{name}' is {state} already: end that one first")]
    Occupied {
        /// The other's name.
        name: String,
        /// What the kernel says of it.
        state: String,
    },
    /// Core scheduling and sched_ext together hang machines with SMT.
    #[error(
        "process {pid} has a core-scheduling cookie and this machine has SMT: together with sched_ext that can hang the machine; run it without core scheduling (cloud-hypervisor: --core-scheduling=off), or switch SMT off"
    )]
    CoreScheduling {
        /// The first process found.
        pid: u32,
    },
}

/// What is looked at.
#[derive(Debug, Clone)]
struct Facts {
    root: bool,
    release: String,
    /// What the kernel says of sched_ext; `None`: it has none.
    state: Option<String>,
    ops: String,
    btf: bool,
    cookie: Option<u32>,
}

/// Whether the scheduler can be loaded here and now.
///
/// # Errors
///
/// The first [`Refusal`] in the order of what takes longest to change.
pub fn check() -> Result<(), Refusal> {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    judge(&Facts {
        root: rustix::process::geteuid().is_root(),
        release: rustix::system::uname().release().to_string_lossy().into_owned(),
        state: read("/sys/kernel/sched_ext/state").ok(),
        ops: read("/sys/kernel/sched_ext/root/ops").unwrap_or_default(),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        cookie: core_cookie(),
    })
}

fn judge(facts: &Facts) -> Result<(), Refusal> {
    if version(&facts.release).is_some_and(|v| v < OLDEST) {
        return Err(Refusal::TooOld(facts.release.clone()));
    }
    let Some(state) = &facts.state else {
        return Err(Refusal::NoSchedExt(facts.release.clone()));
    };
    if !facts.btf {
        return Err(Refusal::NoBtf);
    }
    if !facts.root {
        return Err(Refusal::NotRoot);
    }
    if let Some(pid) = facts.cookie {
        return Err(Refusal::CoreScheduling { pid });
    }
    if state != "disabled" {
        let name = if facts.ops.is_empty() { "?" } else { &facts.ops };
        return Err(Refusal::Occupied { name: name.to_owned(), state: state.clone() });
    }
    Ok(())
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// A process with a core-scheduling cookie, where that matters: with SMT on.
pub(crate) fn core_cookie() -> Option<u32> {
    let smt = fs::read_to_string("/sys/devices/system/cpu/smt/active").unwrap_or_default();
    if smt.trim() != "1" {
        return None;
    }
    let pids = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let mut tids = tasks.filter_map(|t| t.file_name().to_str()?.parse::<u32>().ok());
        tids.any(has_cookie)
    })
}

fn has_cookie(tid: u32) -> bool {
    const PR_SCHED_CORE: libc::c_int = 62;
    const PR_SCHED_CORE_GET: libc::c_ulong = 0;
    const ONE_THREAD: libc::c_ulong = 0;
    let mut cookie: u64 = 0;
    // SAFETY: the kernel writes one u64 where the last argument points, which lives until then.
    let got = unsafe {
        libc::prctl(
            PR_SCHED_CORE,
            PR_SCHED_CORE_GET,
            libc::c_ulong::from(tid),
            ONE_THREAD,
            &raw mut cookie,
        )
    };
    got == 0 && cookie != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            root: true,
            release: "6.16.3+deb13-cloud-amd64".to_owned(),
            state: Some("disabled".to_owned()),
            ops: String::new(),
            btf: true,
            cookie: None,
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(judge(&good()), Ok(()));
        let refused = |change: fn(&mut Facts)| {
            let mut facts = good();
            change(&mut facts);
            judge(&facts).expect_err("refused")
        };
        let old = refused(|f| f.release = "6.12.9".to_owned());
        assert!(matches!(old, Refusal::TooOld(_)) && old.to_string().contains("newer kernel"));
        assert!(matches!(refused(|f| f.state = None), Refusal::NoSchedExt(_)));
        assert_eq!(refused(|f| f.btf = false), Refusal::NoBtf);
        assert_eq!(refused(|f| f.root = false), Refusal::NotRoot);
        assert_eq!(refused(|f| f.cookie = Some(7)), Refusal::CoreScheduling { pid: 7 });
        let other = refused(|f| {
            f.state = Some("enabled".to_owned());
            f.ops = "lavd".to_owned();
        });
        assert!(other.to_string().contains("'lavd' is enabled already"), "{other}");
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(version("7.3.4+deb13-cloud-amd64"), Some((7, 3)));
        assert_eq!(version("6.16-rc1"), Some((6, 16)));
        assert_eq!(version("odd"), None);
        // An odd name is no ground to refuse: the state file decides.
        let facts = Facts { release: "odd".to_owned(), ..good() };
        assert_eq!(judge(&facts), Ok(()));
    }
}
