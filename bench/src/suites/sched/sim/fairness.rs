//! Figure 4.12: the maximum absolute lag (MAL) between four machines, and its relative standard
//! deviation.

use godwit_sched::policy::Policy;
use godwit_sched::sim::workload::Workload;
use godwit_sched::sim::{Costs, Simulator};

use super::scenario::{APART, CPUS, side_by_side};
use crate::harness::{Better, Experiment};

/// Who is compared: simulating 120 s windows takes long, so those that matter most.
const POLICIES: [Policy; 6] =
    [Policy::SBCO, Policy::DFT, Policy::BAL, Policy::ADAPTIVE, Policy::STRICT, Policy::EEVDF];

/// Mean and relative standard deviation of the lag in windows of that many seconds.
fn lags(policy: Policy, seed: u64, windows: &[u64], seconds: u64) -> Vec<(f64, f64)> {
    let mut sim = Simulator::new(CPUS, policy, Costs::DEFAULT, seed);
    let vms: Vec<_> =
        (0..4).map(|i| Workload::NpbCg.start(&mut sim, CPUS, u64::MAX, i * APART)).collect();
    // The first second has the machines' start in it.
    let mut ran: Vec<Vec<u64>> = Vec::new();
    for second in 1..=seconds + 1 {
        sim.run_until(second * 1_000_000_000);
        ran.push(vms.iter().map(|vm| sim.report(*vm).ran).collect());
    }
    let lag = |before: &[u64], after: &[u64]| {
        let in_this = || after.iter().zip(before).map(|(a, b)| a - b);
        in_this().max().unwrap_or(0) - in_this().min().unwrap_or(0)
    };
    let of = |window: u64| {
        let ends: Vec<&Vec<u64>> = ran.iter().step_by(window as usize).collect();
        let lags: Vec<f64> = ends.windows(2).map(|w| lag(w[0], w[1]) as f64 / 1e6).collect();
        let n = lags.len() as f64;
        let mean = lags.iter().sum::<f64>() / n;
        let spread = (lags.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / n).sqrt();
        (mean, 100.0 * spread / mean)
    };
    windows.iter().map(|w| of(*w)).collect()
}

/// Lag and its deviation for each window.
pub(super) fn experiments(quick: bool, seeds: u64) -> Vec<Experiment> {
    let (windows, seconds): (&[u64], u64) = if quick { (&[1, 5], 15) } else { (&[1, 5, 120], 240) };
    let seeds = if quick { 1 } else { seeds.min(3) };
    let jobs: Vec<(u64, Policy)> = (0..seeds).flat_map(|s| POLICIES.map(|p| (s, p))).collect();
    let found = side_by_side(&jobs, |(seed, policy)| lags(*policy, *seed, windows, seconds));
    let mut all = Vec::new();
    for (i, window) in windows.iter().enumerate() {
        let mut mal = Experiment::new(
            &format!("lag-{window}s"),
            &format!(
                "Figure 4.12: mean of the largest difference of what four machines with NPB CG ran \
                 within {window} s (thesis: 20 ms by default, 15 to 25 ms with SBCO)."
            ),
            "ms",
            Better::Lower,
        );
        let mut rsd = Experiment::new(
            &format!("lag-{window}s-rsd"),
            "Its relative standard deviation (thesis: 7 to 14 %, at most 15 %).",
            "%",
            Better::Lower,
        );
        for ((_, policy), lags) in jobs.iter().zip(&found) {
            mal.push(&policy.to_string(), lags[i].0);
            rsd.push(&policy.to_string(), lags[i].1);
        }
        mal.target("sbco", 25.0);
        rsd.target("sbco", 15.0);
        all.extend([mal, rsd]);
    }
    all
}
