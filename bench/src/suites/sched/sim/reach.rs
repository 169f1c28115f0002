//! Whether loans reach: how far siblings are apart under SBCO, what two and four of them gain at barriers,
//! what a host that is less quiet changes, and what it costs to order decisions on a large one.

use godwit_sched::policy::Policy;
use godwit_sched::sim::workload::Workload;
use godwit_sched::sim::{Costs, Simulator};

use super::scenario::{APART, CPUS, Scenario, percent, side_by_side};
use crate::harness::{Better, Experiment};

/// Who lends, beside who does not.
const LENDING: [Policy; 4] = [Policy::SBCO, Policy::SBCO_3, Policy::SBCO_8, Policy::SBCO_PAIRS];
/// What a measured machine has to do here, nanoseconds.
const WORK: u64 = 1_000_000_000;
/// Between two times that an I/O thread works, nanoseconds; 0: there is none.
const NOISE: [u64; 4] = [0, 1_000_000, 4_000_000, 16_000_000];

pub(super) fn experiments(quick: bool, seeds: u64) -> Vec<Experiment> {
    let mut all = distance(seeds);
    all.extend(barriers(seeds));
    if !quick {
        all.push(noise(seeds.div_ceil(2)));
        all.extend(crowding(seeds.min(3)));
    }
    all
}

/// Table 4.3 measured under SBCO.
fn distance(seeds: u64) -> Vec<Experiment> {
    let mut e = Experiment::new(
        "distance-under-sbco",
        "Table 4.3 under each policy: how often a vCPU that was next had a sibling two thirds of its queue \
         away, all machines counted, one with dedup among others that compute.",
        "%",
        Better::Lower,
    );
    let mut started = Experiment::new(
        "distance-at-start-under-sbco",
        "How many turns of vCPUs began while a sibling that waited was two thirds of its queue away, the same \
         machines.",
        "%",
        Better::Lower,
    );
    let mut jobs = Vec::new();
    for seed in 0..seeds {
        for queue in [6, 10] {
            let policies = [Policy::BAL].into_iter().chain(LENDING).chain([Policy::ADAPTIVE]);
            jobs.extend(policies.map(|p| (seed, queue, p)));
        }
    }
    let scenario = |queue| Scenario { workload: Workload::Dedup, queue, work: WORK };
    let found = side_by_side(&jobs, |(seed, queue, p)| scenario(*queue).run(*p, *seed));
    for ((_, queue, policy), outcome) in jobs.iter().zip(found) {
        let subject = format!("{policy}, queue of {queue}");
        e.push(&subject, outcome.far);
        started.push(&subject, outcome.started_far);
    }
    vec![e, started]
}

/// What a policy gains over BAL, percent of BAL's time.
fn gains(
    e: &mut Experiment,
    seeds: u64,
    cases: &[(String, usize, Costs, Scenario)],
    policies: &[Policy],
) {
    let mut jobs = Vec::new();
    for seed in 0..seeds {
        for case in cases {
            jobs.extend([Policy::BAL].iter().chain(policies).map(|p| (seed, case, *p)));
        }
    }
    let found = side_by_side(&jobs, |(seed, (_, cpus, costs, scenario), policy)| {
        scenario.run_on(*cpus, *costs, *policy, *seed)
    });
    let mut bal = None;
    for ((_, (name, ..), policy), outcome) in jobs.iter().zip(found) {
        if *policy == Policy::BAL {
            e.push(&format!("ceiling, {name}"), outcome.spun);
            bal = Some(outcome.seconds);
        } else if let Some(bal) = bal {
            e.push(&format!("{policy}, {name}"), 100.0 * (1.0 - outcome.seconds / bal));
        }
    }
}

fn barriers(seeds: u64) -> Vec<Experiment> {
    let of = |cpus: usize, workload: Workload| {
        let mut e = Experiment::new(
            &format!("reach-{}-{cpus}", workload.name()),
            &format!(
                "By how much {} with {cpus} vCPUs on {cpus} pCPUs is faster than with BAL; the ceiling is \
                 what it spins under BAL.",
                workload.name()
            ),
            "%",
            Better::Higher,
        );
        let case = |queue| {
            let scenario = Scenario { workload, queue, work: WORK };
            (format!("queue of {queue}"), cpus, Costs::DEFAULT, scenario)
        };
        let policies = [&LENDING[..], &[Policy::ADAPTIVE]].concat();
        gains(&mut e, seeds, &[2, 4, 8].map(case), &policies);
        e
    };
    vec![
        of(2, Workload::Streamcluster),
        of(CPUS, Workload::Streamcluster),
        of(CPUS, Workload::Dedup4),
    ]
}

fn noise(seeds: u64) -> Experiment {
    let mut e = Experiment::new(
        "reach-noise",
        "By how much streamcluster in a queue of 8 on four pCPUs is faster than with BAL, by how often the \
         I/O thread of each machine works (50 us at a time).",
        "%",
        Better::Higher,
    );
    let case = |io_every: u64| {
        let scenario = Scenario { workload: Workload::Streamcluster, queue: 8, work: WORK };
        let name = match io_every {
            0 => "never".to_owned(),
            ns => format!("every {} ms", ns / 1_000_000),
        };
        (name, CPUS, Costs { io_every, ..Costs::DEFAULT }, scenario)
    };
    gains(&mut e, seeds, &NOISE.map(case), &[Policy::SBCO, Policy::SBCO_8]);
    e
}

/// A large host whose machines all run whole.
fn crowding(seeds: u64) -> [Experiment; 2] {
    const HOST: usize = 128;
    let mut share = Experiment::new(
        "ordering-waits",
        "128 pCPUs, 48 machines of 16 vCPUs under `strict`, 2 s: how many of the decisions that start or \
         end a gang waited for another pCPU's, with one lock for all and one for each 8 pCPUs that share \
         a cache; a lock is had for 0.55 us.",
        "%",
        Better::Lower,
    );
    let mut longest =
        Experiment::new("ordering-longest", "The longest such wait.", "us", Better::Lower);
    let jobs: Vec<(u64, u32)> = (0..seeds).flat_map(|s| [(s, 0), (s, 8)]).collect();
    let found = side_by_side(&jobs, |(seed, domain)| {
        let costs = Costs { domain: *domain, ..Costs::DEFAULT };
        let mut sim = Simulator::new(HOST, Policy::STRICT, costs, *seed);
        for i in 0..48 {
            Workload::SuperPi.start(&mut sim, 16, 0, i * APART / 37);
        }
        sim.run_until(2_000_000_000);
        sim.crowding()
    });
    for ((_, domain), c) in jobs.iter().zip(found) {
        let name = if *domain == 0 { "one lock" } else { "one for each 8 pCPUs" };
        share.push(name, percent(c.waited, c.decisions));
        longest.push(name, c.longest as f64 / 1e3);
    }
    [share, longest]
}
