//! The three system calls by which a thread's scheduling is read and changed.

use std::io;

use rustix::thread::Pid;

use crate::cpus::{CpuSet, MAX_CPUS};

/// `struct sched_attr` of the kernel (`sched_setattr(2)`), its first published size and the
/// utilisation clamps.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

/// `SCHED_NORMAL` and `SCHED_BATCH`: the policies under which nice means a share.
const FAIR: [u32; 2] = [0, 3];
/// `SCHED_FLAG_RESET_ON_FORK`, the only flag of a fair thread that a change must repeat.
const RESET_ON_FORK: u64 = 1;

/// What of a thread's scheduling is changed by a loan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Attr {
    /// The scheduling policy's number.
    pub policy: u32,
    /// Whether children start with the default policy.
    pub reset_on_fork: bool,
    /// Nice, -20 to 19.
    pub nice: i32,
    /// The slice, nanoseconds; 0 where the kernel tells none, and to have the kernel's own.
    pub slice_ns: u64,
}

impl Attr {
    /// Whether nice and slice mean a share of this thread's group.
    #[must_use]
    pub fn fair(&self) -> bool {
        FAIR.contains(&self.policy)
    }
}

/// Reads a thread's attributes.
///
/// # Errors
/// As `sched_getattr(2)`.
pub fn get_attr(tid: i32) -> io::Result<Attr> {
    let mut raw = RawAttr::default();
    let size = size_of::<RawAttr>() as u32;
    // SAFETY: the kernel writes at most `size` bytes, which is the size of `raw`.
    let rc = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut raw, size, 0) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Attr {
        policy: raw.policy,
        reset_on_fork: raw.flags & RESET_ON_FORK != 0,
        nice: raw.nice,
        slice_ns: raw.runtime,
    })
}

/// Sets a fair thread's nice and slice in one call (setting nice alone would reset the slice).
///
/// # Errors
/// As `sched_setattr(2)`; `InvalidInput` for a thread of another policy.
pub fn set_attr(tid: i32, attr: Attr) -> io::Result<()> {
    if !attr.fair() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "only threads of the normal or batch policy are changed",
        ));
    }
    let raw = RawAttr {
        // The first published size: the clamps, which follow it, stay as they are.
        size: std::mem::offset_of!(RawAttr, util_min) as u32,
        policy: attr.policy,
        flags: if attr.reset_on_fork { RESET_ON_FORK } else { 0 },
        nice: attr.nice,
        runtime: attr.slice_ns,
        ..RawAttr::default()
    };
    // SAFETY: the kernel reads `raw.size` bytes, which are within `raw`.
    let rc = unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const raw, 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads the pCPUs that a thread may run on.
///
/// # Errors
/// As `sched_getaffinity(2)`.
pub fn get_affinity(tid: i32) -> io::Result<CpuSet> {
    let mut words = [0u64; MAX_CPUS / 64];
    let bytes = size_of_val(&words);
    // SAFETY: the kernel writes at most `bytes` bytes into `words`.
    let rc = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, bytes, words.as_mut_ptr()) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(CpuSet::from_words(&words)) }
}

/// Sets the pCPUs that a thread may run on.
///
/// # Errors
/// As `sched_setaffinity(2)`.
pub fn set_affinity(tid: i32, cpus: &CpuSet) -> io::Result<()> {
    let words = cpus.words();
    // SAFETY: the kernel reads as many bytes as `words` has.
    let rc = unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, tid, size_of_val(words), words.as_ptr())
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// All pCPUs that there can be: what a thread is given back that was bound to none.
#[must_use]
pub fn every_cpu() -> CpuSet {
    CpuSet::from_words(&[u64::MAX; MAX_CPUS / 64])
}

/// What the kernel lets this process do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Powers {
    /// Whether nice may be lowered, and threads of others be changed (`CAP_SYS_NICE`).
    pub nice: bool,
    /// The kernel's own slice where slices can be set (Linux 6.12), nanoseconds.
    pub own_slice_ns: Option<u64>,
}

impl Powers {
    /// Tries on a thread of its own what can be tried.
    #[must_use]
    pub fn probe() -> Self {
        // A thread of its own, so that no trace of the trial is left.
        let trial = std::thread::Builder::new().name("sched-probe".into()).spawn(|| {
            let tid = gettid();
            let slice = probe_slice(tid);
            let nice = get_attr(tid)
                .and_then(|attr| set_attr(tid, Attr { nice: attr.nice.max(-19) - 1, ..attr }))
                .is_ok();
            Self { nice, own_slice_ns: slice }
        });
        let none = Self { nice: false, own_slice_ns: None };
        trial.map_or(none, |t| t.join().unwrap_or(none))
    }
}

/// Slices are known by setting one that is not the default, and finding it.
fn probe_slice(tid: i32) -> Option<u64> {
    const TRIAL_NS: u64 = 7_300_000;
    let attr = get_attr(tid).ok()?;
    set_attr(tid, Attr { slice_ns: 0, ..attr }).ok()?;
    let own = get_attr(tid).ok()?.slice_ns;
    set_attr(tid, Attr { slice_ns: TRIAL_NS, ..attr }).ok()?;
    let kept = get_attr(tid).ok()?.slice_ns == TRIAL_NS;
    set_attr(tid, Attr { slice_ns: 0, ..attr }).ok()?;
    (kept && own > 0).then_some(own)
}

/// The calling thread's number.
#[must_use]
pub fn gettid() -> i32 {
    Pid::as_raw(Some(rustix::thread::gettid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_affinity_is_set_and_given_back() {
        std::thread::spawn(|| {
            let tid = gettid();
            let before = get_affinity(tid).expect("own affinity");
            let first = before.iter().next().expect("at least one pCPU");
            set_affinity(tid, &CpuSet::single(first)).expect("to bind itself");
            assert_eq!(get_affinity(tid).expect("own affinity"), CpuSet::single(first));
            set_affinity(tid, &every_cpu()).expect("to unbind itself");
            assert!(before.is_subset(&get_affinity(tid).expect("own affinity")));
        })
        .join()
        .expect("the thread's checks");
    }

    #[test]
    fn nice_and_slice_are_set_in_one_call() {
        let powers = Powers::probe();
        std::thread::spawn(move || {
            let tid = gettid();
            let before = get_attr(tid).expect("own attributes");
            assert!(before.fair());
            let slice_ns = powers.own_slice_ns.map_or(0, |_| 5_000_000);
            let changed = Attr { nice: before.nice + 1, slice_ns, ..before };
            set_attr(tid, changed).expect("to be nicer");
            let now = get_attr(tid).expect("own attributes");
            assert_eq!(now.nice, before.nice + 1);
            if powers.own_slice_ns.is_some() {
                assert_eq!(now.slice_ns, 5_000_000);
            }
        })
        .join()
        .expect("the thread's checks");
        assert!(
            set_attr(0, Attr { policy: 1, reset_on_fork: false, nice: 0, slice_ns: 0 }).is_err()
        );
    }
}
