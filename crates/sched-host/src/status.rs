//! What the service has seen and done, as it is shown.

use crate::hands::Restored;
use crate::lend::Ledger;
use crate::sys::Powers;

/// The service as a whole.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Status {
    /// For how long it has worked, seconds.
    pub seconds: f64,
    /// Periods that have passed.
    pub periods: u64,
    /// The length of one now, milliseconds; longer than asked for where the host has so many vCPUs
    /// that looking at them would cost too much.
    pub period_ms: f64,
    /// Share of one pCPU that the service itself uses.
    pub cost: f64,
    /// What the kernel allows it.
    pub powers: Powers,
    /// What it does without, and why.
    pub lesser: Vec<String>,
    /// What a former service had left behind and was put back.
    pub at_start: Restored,
    /// What was put back at the end.
    pub at_end: Option<Restored>,
    /// Loans of all machines, those that have ended included.
    pub loans: Ledger,
    /// Times that vCPUs were bound.
    pub placements: u64,
    /// Machines that are run whole in turns, now.
    pub gangs: usize,
    /// Such turns so far.
    pub gang_turns: u64,
    /// Machines.
    pub vms: Vec<VmStatus>,
}

/// One machine.
#[derive(Debug, Clone, serde::Serialize)]
pub struct VmStatus {
    /// Its process.
    pub pid: i32,
    /// What it calls itself.
    pub name: String,
    /// Where its vCPUs are, by number.
    pub vcpus: Vec<VcpuStatus>,
    /// Its group, and whose it is.
    pub group: String,
    /// What is not done for it, and why.
    pub without: Vec<String>,
    /// Its loans.
    pub loans: Ledger,
    /// What the vCPU that ran least lacked of the one that ran most, as a share of the latter,
    /// among those that strove in the first second.
    pub skew_first: Option<f64>,
    /// The same, recently.
    pub skew: Option<f64>,
}

/// One vCPU.
#[derive(Debug, Clone, serde::Serialize)]
pub struct VcpuStatus {
    /// Its number.
    pub vcpu: u32,
    /// Its thread.
    pub tid: i32,
    /// The pCPUs that it is bound to.
    pub cpus: String,
    /// Steps of nice that it has lent (above 0) or borrowed (below 0).
    pub steps: i32,
}
