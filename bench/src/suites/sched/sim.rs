//! The simulator: all policies on the same machines in the same run, each figure with the thesis'
//! value beside ours. Nothing here takes real time but the simulator itself, so every value is the
//! same on every machine.

use std::fmt::Write as _;

use godwit_sched::policy::Policy;
use godwit_sched::sim::workload::Workload;
use godwit_sched::sim::{Costs, Simulator};

use crate::harness::stats::summary;
use crate::harness::{Better, Experiment, Results};

/// pCPUs of the host and vCPUs of each machine: in the thesis both are 4 (section 4.6.1).
const CPUS: usize = 4;
/// What a finite workload has to do in all, nanoseconds of undisturbed execution.
const WORK: u64 = 4_000_000_000;
/// When the measured machine starts: the others run by then.
const START: u64 = 500_000_000;
/// Longest simulated time.
const LIMIT: u64 = 600_000_000_000;

/// One comparison that the thesis makes: how much shorter SBCO's run is than `against`'s, percent.
struct Claim {
    figure: &'static str,
    workload: Workload,
    queue: usize,
    against: Policy,
    percent: f64,
}

const CLAIMS: [Claim; 10] = [
    Claim::new("4.6", Workload::Kernbench, 4, Policy::DFT, 14.0),
    Claim::new("4.6", Workload::Kernbench, 4, Policy::BAL, 6.0),
    Claim::new("4.8", Workload::Dedup, 8, Policy::DFT, 68.0),
    Claim::new("4.8", Workload::Dedup, 8, Policy::BAL, 7.0),
    Claim::new("4.8", Workload::Streamcluster, 8, Policy::DFT, 52.0),
    Claim::new("4.8", Workload::Streamcluster, 8, Policy::BAL, 9.0),
    Claim::new("4.8", Workload::X264, 8, Policy::BAL, 0.0),
    Claim::new("4.8", Workload::Facesim, 8, Policy::BAL, 0.0),
    Claim::new("4.8", Workload::Ferret, 8, Policy::BAL, 0.0),
    Claim::new("4.9", Workload::Dedup, 12, Policy::DFT, 70.0),
];

impl Claim {
    const fn new(
        figure: &'static str,
        workload: Workload,
        queue: usize,
        against: Policy,
        percent: f64,
    ) -> Self {
        Self { figure, workload, queue, against, percent }
    }
}

/// The simulator's part of the suite.
///
/// # Errors
/// No rounds.
pub(super) fn run(quick: bool, rounds: Option<usize>, results: &mut Results) -> anyhow::Result<()> {
    let seeds = rounds.unwrap_or(if quick { 3 } else { 10 }) as u64;
    anyhow::ensure!(seeds > 0, "a suite has at least one round");
    results.notes.push(format!(
        "Simulated: discrete events, seeds 0 to {}, {CPUS} pCPUs, machines of {CPUS} vCPUs. A queue of n \
         is the measured machine and n - 1 that run SuperPI; the thesis gives three others for a \
         queue of eight, which 4 pCPUs would not make.",
        seeds - 1
    ));
    let mut sheet: Vec<(Workload, usize, Experiment, Experiment)> = Vec::new();
    for claim in &CLAIMS {
        if !sheet.iter().any(|(w, q, ..)| (*w, *q) == (claim.workload, claim.queue)) {
            let (runtime, switches) = measure(claim.figure, claim.workload, claim.queue, seeds);
            sheet.push((claim.workload, claim.queue, runtime, switches));
        }
    }
    let deviations = deviations(&sheet);
    for (.., mut runtime, mut switches) in sheet {
        runtime.finish();
        switches.finish();
        results.experiments.extend([runtime, switches]);
    }
    results.notes.push(deviations);
    results.experiments.extend(queues(seeds));
    results.experiments.extend(fairness(if quick { 20 } else { 120 }, seeds));
    Ok(())
}

/// Run time and context switches of `workload` under every policy, SBCO first.
fn measure(figure: &str, workload: Workload, queue: usize, seeds: u64) -> (Experiment, Experiment) {
    let name = workload.name();
    let mut runtime = Experiment::new(
        &format!("{name}-{queue}"),
        &format!("Figure {figure}: simulated run time of {name} in a queue of {queue}."),
        "s",
        Better::Lower,
    );
    let mut switches = Experiment::new(
        &format!("{name}-{queue}-switches"),
        &format!("Context switches of the host while {name} ran in a queue of {queue}."),
        "switches/s",
        Better::Lower,
    );
    for seed in 0..seeds {
        for policy in policies() {
            let mut sim = Simulator::new(CPUS, policy, Costs::DEFAULT, seed);
            for other in 1..queue {
                Workload::SuperPi.start(&mut sim, CPUS, 0, other as u64 * 37_000_000);
            }
            let vm = workload.start(&mut sim, CPUS, WORK, START);
            // A run that does not end within the limit counts as one that took that long.
            let ended = sim.run_until_end(vm, LIMIT).unwrap_or(LIMIT);
            let seconds = (ended - START) as f64 / 1e9;
            runtime.push(&policy.to_string(), seconds);
            let all = sim.scheduler().counters().switches as f64;
            switches.push(&policy.to_string(), all / (ended as f64 / 1e9));
        }
    }
    (runtime, switches)
}

fn policies() -> [Policy; 5] {
    [Policy::SBCO, Policy::DFT, Policy::BAL, Policy::PROCCO, Policy::CPUCO]
}

/// Each claim of the thesis with what the simulator says.
fn deviations(sheet: &[(Workload, usize, Experiment, Experiment)]) -> String {
    let mut text = "SBCO's run is shorter by (thesis; here):".to_owned();
    for claim in &CLAIMS {
        let found = sheet.iter().find(|(w, q, ..)| (*w, *q) == (claim.workload, claim.queue));
        let median = |policy: Policy| {
            let runtime = &found?.2;
            let s = runtime.series.iter().find(|s| s.subject == policy.to_string())?;
            Some(summary(&s.values)?.median)
        };
        let here = median(Policy::SBCO).zip(median(claim.against));
        let here = here.map_or(f64::NAN, |(sbco, other)| 100.0 * (1.0 - sbco / other));
        // Writing to a string does not fail.
        let _ = write!(
            text,
            " figure {} {} in a queue of {} against {}: {:.0} %; {here:.1} %.",
            claim.figure,
            claim.workload.name(),
            claim.queue,
            claim.against,
            claim.percent,
        );
    }
    text
}

/// Tables 4.2 and 4.3: what the default scheduler's run queues look like.
fn queues(seeds: u64) -> [Experiment; 2] {
    let mut stacked = Experiment::new(
        "stacking",
        "Table 4.2: how often siblings shared a run queue under the default scheduler, with 2 and 3 \
         machines running kernbench (thesis: 33.19 and 42.84 %).",
        "%",
        Better::Lower,
    );
    let mut far = Experiment::new(
        "distance",
        "Table 4.3: how often a vCPU that was next had a sibling two thirds of its queue away, under \
         the default scheduler, in queues of 6 and 10 (thesis: 42.36 and 48.21 % with kernbench).",
        "%",
        Better::Lower,
    );
    let percent = |n: u64, of: u64| 100.0 * n as f64 / of.max(1) as f64;
    for seed in 0..seeds {
        for machines in [2, 3] {
            let mut sim = Simulator::new(CPUS, Policy::DFT, Costs::DEFAULT, seed);
            for i in 0..machines {
                Workload::Kernbench.start(&mut sim, CPUS, u64::MAX, i * 37_000_000);
            }
            sim.run_until(10_000_000_000);
            let s = sim.samples();
            stacked.push(&format!("{machines} machines"), percent(s.stacked, s.taken));
        }
        for queue in [6, 10] {
            let mut sim = Simulator::new(CPUS, Policy::DFT, Costs::DEFAULT, seed);
            for i in 1..queue {
                Workload::SuperPi.start(&mut sim, CPUS, 0, i * 37_000_000);
            }
            Workload::Kernbench.start(&mut sim, CPUS, u64::MAX, 0);
            sim.run_until(10_000_000_000);
            let s = sim.samples();
            far.push(&format!("queue of {queue}"), percent(s.exceeded, s.compared));
        }
    }
    [stacked, far]
}

/// Figure 4.12: the maximum absolute lag between four CPU-bound machines, sampled every second.
fn fairness(seconds: u64, seeds: u64) -> [Experiment; 2] {
    let mut lag = Experiment::new(
        "lag",
        "Figure 4.12: mean of the largest difference of what four CPU-bound machines ran in a second \
         (thesis: 20 ms by default, 15 to 25 ms with SBCO).",
        "ms",
        Better::Lower,
    );
    let mut rsd = Experiment::new(
        "lag-rsd",
        "Figure 4.12: its relative standard deviation (thesis: 7 to 14 %, at most 15 %).",
        "%",
        Better::Lower,
    );
    for seed in 0..seeds {
        for policy in [Policy::SBCO, Policy::DFT, Policy::BAL] {
            let mut sim = Simulator::new(CPUS, policy, Costs::DEFAULT, seed);
            let vms: Vec<_> = (0..4)
                .map(|i| Workload::SuperPi.start(&mut sim, CPUS, 0, i * 37_000_000))
                .collect();
            let mut before = vec![0; vms.len()];
            let mut lags = Vec::new();
            for second in 1..=seconds {
                sim.run_until(second * 1_000_000_000);
                let ran: Vec<u64> = vms.iter().map(|vm| sim.report(*vm).ran).collect();
                let in_this: Vec<u64> = ran.iter().zip(&before).map(|(r, b)| r - b).collect();
                before = ran;
                let most = in_this.iter().max().copied().unwrap_or(0);
                let least = in_this.iter().min().copied().unwrap_or(0);
                // The first second has the machines' start in it.
                if second > 1 {
                    lags.push((most - least) as f64 / 1e6);
                }
            }
            let n = lags.len() as f64;
            let mean = lags.iter().sum::<f64>() / n;
            let spread = (lags.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / n).sqrt();
            lag.push(&policy.to_string(), mean);
            rsd.push(&policy.to_string(), 100.0 * spread / mean);
        }
    }
    lag.target("sbco", 25.0);
    rsd.target("sbco", 15.0);
    [lag, rsd]
}
