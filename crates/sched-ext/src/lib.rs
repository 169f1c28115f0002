//! Co-scheduling of sibling vCPUs in the kernel, as a sched_ext scheduler.
//!
//! The scheduler itself is BPF, in `src/bpf/` (GPL-2.0); this crate loads it, follows it and gives
//! it up again. While it is loaded it schedules every normal task of the machine; when its owner
//! ends in any way, the kernel's own class takes all of them back.
//!
//! ```text
//!   check --refused--> Refusal
//!     | ok
//!   load --> loaded --tick--> loaded
//!              |-- stop, SIGTERM, SIGINT ----> unloaded, the kernel's class schedules
//!              |-- SIGKILL (the link closes) -> the same
//!              |-- error, watchdog ----------> ejected: the reason is reported
//!              '-- a CPU came or went -------> ejected, loaded anew
//! ```
//!
//! - [`Config`]: the mode, its threshold, and what a virtual machine is;
//! - [`check`] and [`Refusal`]: where loading would be impossible or dangerous;
//! - [`Scheduler`]: one that is loaded;
//! - [`Snapshot`]: what it counted, loans, distances, lag between machines;
//! - [`cli`]: `sched load` and `sched top`.
//!
//! What is not there: weights of cgroups are not looked at, and placement knows nothing of SMT or
//! caches for vCPUs. KVM's directed yield (pause-loop exits) reaches the scheduler by its `yield`
//! callback; the callback's inner part is tested, the way from a real exit to it is not, since
//! that takes a machine with KVM.
//!
//! # How it works
//!
//! One vruntime-ordered queue per CPU, siblings on distinct CPUs, and the coupling of the mode
//! loaded. What a CPU runs has rank 0 and the first that waits rank 1; the candidate is about to
//! run, so the distance is the sibling's rank; the library counts the same. The lender is re-sorted
//! at once, the debtor by its own CPU at its next dispatch, the only place where the kernel lets a
//! queued task be moved. Turns end by a timer of each CPU, since the kernel looks at slices at its
//! ticks only. The default mode gives each machine a threshold of its own: tighter where KVM tells
//! that its vCPUs spin or, where nobody tells, where they never sleep by themselves; looser where
//! they do. Where no distance is allowed (mode `strict`) the vCPU that a CPU would run next becomes
//! the leader of a gang: it claims the CPUs on which siblings wait, and while it runs they prefer
//! its siblings; a claim ends with its leader's slice. The timers of a gang's members end with that
//! of its leader: the first of its CPUs to decide starts the next gang for all, one CPU of those
//! that share a cache decides at a time (waiting for it is bounded), and only a CPU whose turn does
//! not end by itself is interrupted. Ordinates are counted in an array that mirrors the vruntimes
//! of each queue, since walking a queue takes its lock at every step. Verification has to be quick,
//! too: whatever loops is a function that the verifier sees once. Whatever happens to the loader,
//! the kernel's own class schedules on; when a CPU comes or goes, the kernel ends the scheduler and
//! the loader starts it anew.

mod check;
pub mod cli;
mod config;
mod scheduler;
mod serve;
mod stats;
mod top;

pub use check::{Refusal, check};
pub use config::{Config, ConfigError, Mode, VmBy, default_slice};
pub use scheduler::{Exit, LoadError, Scheduler, decision_cost};
pub use stats::{Counters, Lag, Snapshot, Vcpu, Vm};

/// What libbpf's generator writes: one type for each map and program of the object.
#[allow(
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    unused
)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/sched.skel.rs"));
}
