//! One simulated run, and many of them at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use godwit_sched::policy::Policy;
use godwit_sched::scheduler::VmId;
use godwit_sched::sim::workload::Workload;
use godwit_sched::sim::{Costs, Simulator};

/// pCPUs of the host and vCPUs of each machine: in the thesis both are 4 (section 4.6.1).
pub(super) const CPUS: usize = 4;
/// When the measured machine starts: the others run by then.
pub(super) const START: u64 = 500_000_000;
/// Machines start this far apart, nanoseconds.
pub(super) const APART: u64 = 37_000_000;
/// Longest simulated time. A run that does not end within it counts as one that took that long.
const LIMIT: u64 = 600_000_000_000;

/// A machine with a workload among machines that compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scenario {
    pub(super) workload: Workload,
    /// Machines in all: the average length of a run queue.
    pub(super) queue: usize,
    /// What the measured machine has to do, nanoseconds of undisturbed execution.
    pub(super) work: u64,
}

/// What became of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Outcome {
    pub(super) seconds: f64,
    /// Switches of the whole host, a second.
    pub(super) switches: f64,
    /// How much of what it ran the measured machine spun, percent.
    pub(super) spun: f64,
    /// How much of the host it had, percent of its part.
    pub(super) share: f64,
    /// In how many samples siblings of any machine shared a run queue, percent.
    pub(super) stacked: f64,
    /// In how many samples one that was next had a sibling two thirds of its queue away, percent.
    pub(super) far: f64,
    /// How many turns began while a sibling that waited was as far, percent.
    pub(super) started_far: f64,
}

impl Scenario {
    pub(super) fn build(self, policy: Policy, seed: u64) -> (Simulator, VmId) {
        self.build_on(CPUS, Costs::DEFAULT, policy, seed)
    }

    /// On a host of so many pCPUs, with machines of as many vCPUs.
    fn build_on(self, cpus: usize, costs: Costs, policy: Policy, seed: u64) -> (Simulator, VmId) {
        let mut sim = Simulator::new(cpus, policy, costs, seed);
        for other in 1..self.queue {
            Workload::SuperPi.start(&mut sim, cpus, 0, other as u64 * APART);
        }
        let vm = self.workload.start(&mut sim, cpus, self.work, START);
        (sim, vm)
    }

    pub(super) fn run(self, policy: Policy, seed: u64) -> Outcome {
        self.run_on(CPUS, Costs::DEFAULT, policy, seed)
    }

    pub(super) fn run_on(self, cpus: usize, costs: Costs, policy: Policy, seed: u64) -> Outcome {
        let (mut sim, vm) = self.build_on(cpus, costs, policy, seed);
        let ended = sim.run_until_end(vm, START + LIMIT).unwrap_or(START + LIMIT);
        let seconds = (ended - START) as f64 / 1e9;
        let report = sim.report(vm);
        let ran = report.ran as f64;
        let samples = sim.samples();
        Outcome {
            seconds,
            switches: sim.scheduler().counters().switches as f64 / (ended as f64 / 1e9),
            spun: 100.0 * report.spun as f64 / ran.max(1.0),
            share: 100.0 * ran * self.queue as f64 / (seconds * 1e9 * cpus as f64),
            stacked: percent(samples.stacked, samples.taken),
            far: percent(samples.exceeded, samples.compared),
            started_far: percent(samples.started_far, samples.started),
        }
    }
}

pub(super) fn percent(n: u64, of: u64) -> f64 {
    100.0 * n as f64 / of.max(1) as f64
}

/// Runs every job on as many threads as there are processors. The order of the answers is that of
/// the jobs, whoever did them.
pub(super) fn side_by_side<J: Sync, A: Send>(jobs: &[J], run: impl Fn(&J) -> A + Sync) -> Vec<A> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len());
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(jobs.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((i, job)) = {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    jobs.get(i).map(|job| (i, job))
                } {
                    let answer = run(job);
                    // Nobody panics while holding it.
                    let mut done = done.lock().unwrap_or_else(|e| e.into_inner());
                    done.push((i, answer));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, answer)| answer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_the_order_of_the_jobs() {
        let jobs: Vec<u64> = (0..100).collect();
        assert_eq!(side_by_side(&jobs, |j| j * 2), (0..200).step_by(2).collect::<Vec<_>>());
        assert!(side_by_side(&Vec::<u64>::new(), |j| *j).is_empty());
    }
}
