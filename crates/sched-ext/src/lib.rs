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
