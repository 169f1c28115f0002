//! The simulator: all policies on the same machines in the same run, each figure with the thesis'
//! value beside ours. Nothing here takes real time but the simulator itself, so every value is the
//! same on every machine.

mod claims;
mod fairness;
mod reach;
mod scenario;
pub(super) mod timeline;

use godwit_sched::policy::Policy;
use godwit_sched::sim::workload::Workload;
use godwit_sched::sim::{Costs, Simulator};

use crate::harness::stats::summary;
use crate::harness::{Better, Experiment, Results, Table};
use claims::{CLAIMS, Claim, DISTURBING, SCALED, SCALING};
use scenario::{APART, CPUS, Outcome, Scenario, percent, side_by_side};

/// What a machine has to do in all, nanoseconds of undisturbed execution.
const WORK: u64 = 2_000_000_000;
/// The same for SPECjbb, which is to collect its garbage a few times.
const SPECJBB_WORK: u64 = 5_000_000_000;
/// And for what runs in ever longer queues.
const SCALING_WORK: u64 = 1_000_000_000;

/// One scenario under every policy, with every seed.
struct Measured {
    scenario: Scenario,
    figure: &'static str,
    /// By seed and policy.
    outcomes: Vec<(Policy, Outcome)>,
}

/// The simulator's part of the suite.
///
/// # Errors
/// No rounds; a picture that can't be drawn.
pub(super) fn run(quick: bool, rounds: Option<usize>, results: &mut Results) -> anyhow::Result<()> {
    let seeds = rounds.unwrap_or(if quick { 2 } else { 10 }) as u64;
    anyhow::ensure!(seeds > 0, "a suite has at least one round");
    results.notes.push(format!(
        "Simulated: discrete events, seeds 0 to {}, {CPUS} pCPUs, machines of {CPUS} vCPUs. A queue of n \
         is the measured machine and n - 1 that run SuperPI; the thesis gives three others for a \
         queue of eight, which would make one of four: both are here. Figures 4.10 and 4.11 are of half \
         the seeds.",
        seeds - 1
    ));
    let sheet = measure(quick, seeds);
    results.tables.push(side_by_side_with_the_thesis(&sheet));
    results.experiments.extend(sheet.iter().flat_map(experiments));
    results.experiments.extend(scaling(&sheet));
    results.experiments.extend(queues(seeds, if quick { 3 } else { 10 }));
    results.experiments.extend(reach::experiments(quick, seeds));
    results.experiments.extend(fairness::experiments(quick, seeds));
    results.tables.push(inputs());
    results.tables.push(timeline::changes(quick));
    results.pictures.extend(timeline::of_the_suite()?);
    Ok(())
}

/// Every scenario that a figure asks for, once.
fn measure(quick: bool, seeds: u64) -> Vec<Measured> {
    let few = seeds.div_ceil(2);
    let mut sheet: Vec<(Measured, u64)> = Vec::new();
    let mut add = |figure, workload, queue, work, seeds| {
        let scenario = Scenario { workload, queue, work };
        let known =
            |m: &(Measured, u64)| (m.0.scenario.workload, m.0.scenario.queue) == (workload, queue);
        if !sheet.iter().any(known) {
            sheet.push((Measured { scenario, figure, outcomes: Vec::new() }, seeds));
        }
    };
    for c in CLAIMS {
        match c.figure {
            "4.10" | "4.11" => {}
            "4.9" if quick => {}
            figure => add(figure, c.workload, c.queue, WORK, seeds),
        }
    }
    for disturbing in DISTURBING {
        if !quick || disturbing == 1 {
            add("4.10", Workload::SpecJbb, disturbing + 1, SPECJBB_WORK, few);
        }
    }
    for workload in SCALED {
        for queue in SCALING {
            if !quick {
                add("4.11", workload, queue, SCALING_WORK, few);
            }
        }
    }
    let mut jobs = Vec::new();
    for (at, (m, seeds)) in sheet.iter().enumerate() {
        for seed in 0..*seeds {
            jobs.extend(Policy::NAMED.map(|(_, policy)| (at, m.scenario, policy, seed)));
        }
    }
    let outcomes = side_by_side(&jobs, |(_, scenario, policy, seed)| scenario.run(*policy, *seed));
    for ((at, _, policy, _), outcome) in jobs.iter().zip(outcomes) {
        sheet[*at].0.outcomes.push((*policy, outcome));
    }
    sheet.into_iter().map(|(m, _)| m).collect()
}

impl Measured {
    fn values(&self, policy: Policy, of: impl Fn(&Outcome) -> f64) -> Vec<f64> {
        let mine = self.outcomes.iter().filter(|(p, _)| *p == policy);
        mine.map(|(_, o)| of(o)).collect()
    }

    fn experiment(
        &self,
        suffix: &str,
        about: &str,
        unit: &str,
        better: Better,
        of: impl Fn(&Outcome) -> f64,
    ) -> Experiment {
        let Scenario { workload, queue, .. } = self.scenario;
        let name = format!("{}-{queue}{suffix}", workload.name());
        let mut e = Experiment::new(&name, about, unit, better);
        for (policy, outcome) in &self.outcomes {
            e.push(&policy.to_string(), of(outcome));
        }
        e
    }
}

/// Run time (throughput for SPECjbb), and for the figures that ask for more, more.
fn experiments(m: &Measured) -> Vec<Experiment> {
    let Scenario { workload, queue, work } = m.scenario;
    let (name, figure) = (workload.name(), m.figure);
    if let Some(transactions) = workload.transactions(work) {
        let about = format!(
            "Figure 4.10: simulated throughput of {name} beside {} disturbing machines.",
            queue - 1
        );
        let of = |o: &Outcome| transactions / o.seconds;
        return vec![m.experiment("", &about, "transactions/s", Better::Higher, of)];
    }
    let about = format!("Figure {figure}: simulated run time of {name} in a queue of {queue}.");
    let runtime = m.experiment("", &about, "s", Better::Lower, |o| o.seconds);
    if figure == "4.11" {
        return vec![runtime];
    }
    let of = |what: &str| format!("{what} while {name} ran in a queue of {queue}.");
    vec![
        runtime,
        m.experiment(
            "-switches",
            &of("Figure 4.7: context switches of the host"),
            "switches/s",
            Better::Lower,
            |o| o.switches,
        ),
        m.experiment(
            "-spun",
            &of("What the measured machine spun, of what it ran,"),
            "%",
            Better::Lower,
            |o| o.spun,
        ),
        m.experiment(
            "-share",
            &of("What the measured machine had of the host, 100 % being its part; the rest is what the \
                 others had,"),
            "%",
            Better::Lower,
            |o| o.share,
        ),
        m.experiment(
            "-stacked",
            &of("How often siblings of any machine shared a run queue"),
            "%",
            Better::Lower,
            |o| o.stacked,
        ),
    ]
}

/// By how much `subject` is better than another policy, percent: of each seed.
fn better_by(m: &Measured, subject: Policy, against: Policy) -> Vec<f64> {
    let subject = m.values(subject, |o| o.seconds);
    let other = m.values(against, |o| o.seconds);
    let throughput = m.scenario.workload == Workload::SpecJbb;
    let by = |(s, o): (&f64, &f64)| if throughput { o / s - 1.0 } else { 1.0 - s / o };
    subject.iter().zip(&other).map(|pair| 100.0 * by(pair)).collect()
}

fn spread(values: &[f64], unit: &str) -> String {
    match summary(values) {
        Some(s) => format!("{:.1} {unit} ({:.1} to {:.1})", s.median, s.min, s.max),
        None => "-".to_owned(),
    }
}

/// Each claim of the thesis with what the simulator says; the last column is for real kernels.
fn side_by_side_with_the_thesis(sheet: &[Measured]) -> Table {
    let mut rows = Vec::new();
    let find = |w, q| sheet.iter().find(|m| (m.scenario.workload, m.scenario.queue) == (w, q));
    let mut row = |figure: &str, what: String, thesis: &str, ceiling: String, here: [String; 3]| {
        let mut cells = vec![figure.to_owned(), what, thesis.to_owned(), ceiling];
        cells.extend(here);
        rows.push(cells);
    };
    let all = |of: &dyn Fn(Policy) -> Vec<f64>| {
        [Policy::SBCO, Policy::SBCO_8, Policy::ADAPTIVE].map(|p| spread(&of(p), "%"))
    };
    let ceiling = |m: &Measured, against| spread(&m.values(against, |o| o.spun), "%");
    for Claim { figure, workload, queue, against, thesis } in CLAIMS {
        let Some(m) = find(*workload, *queue) else { continue };
        let what = format!("{} in a queue of {queue}: over {against}", workload.name());
        row(figure, what, thesis, ceiling(m, *against), all(&|p| better_by(m, p, *against)));
    }
    if let Some(m) = find(Workload::Kernbench, 4) {
        let switches = |p| m.values(p, |o| o.switches);
        let fewer = |p| {
            let pairs = switches(p).into_iter().zip(switches(Policy::DFT));
            pairs.map(|(s, d)| 100.0 * (1.0 - s / d)).collect()
        };
        let what = "kernbench in a queue of 4: context switches a second fewer than DFT";
        row("4.7", what.to_owned(), "at least 3 %", String::new(), all(&fewer));
        let what = "kernbench in a queue of 4: CPUCO's context switches a second fewer than DFT's";
        let cpuco = spread(&fewer(Policy::CPUCO), "%");
        let here = [cpuco, String::new(), String::new()];
        row("4.7", what.to_owned(), "tremendously more", String::new(), here);
    }
    for disturbing in DISTURBING {
        let Some(m) = find(Workload::SpecJbb, disturbing + 1) else { continue };
        for (against, thesis) in [
            (Policy::DFT, "better, and better beside more"),
            (Policy::PROCCO, "6 %, and better beside more"),
            (Policy::BAL, "4 %, and better beside more"),
        ] {
            let what = format!("specjbb beside {disturbing}: throughput over {against}");
            row("4.10", what, thesis, ceiling(m, against), all(&|p| better_by(m, p, against)));
        }
    }
    Table {
        name: "thesis and simulator".to_owned(),
        about: "By how much SBCO is better, with the thesis' threshold, with an eighth and with the \
                adaptive one, of each seed: median (least to greatest). Negative: it is worse. The \
                ceiling is what the machine spent spinning for siblings under whom it is compared with: \
                no co-scheduling can win more. Figures 4.1 and 4.2 are \
                inputs; 4.3 to 4.5 show the algorithm and are tests of the crate; tables 4.2 and 4.3 \
                and figure 4.12 are experiments of their own."
            .to_owned(),
        head: ["figure", "what", "thesis", "ceiling", "sbco", "sbco-eighth", "adaptive"]
            .map(str::to_owned)
            .to_vec(),
        rows,
    }
}

/// What the thesis measured and the simulator takes as given.
fn inputs() -> Table {
    let costs = Costs::DEFAULT;
    let us = |ns: u64| format!("{:.1} us", ns as f64 / 1e3);
    let rows = [
        (
            "4.1 (table)",
            "spin_lock held by kernbench, SPECjbb",
            "0.65, 0.16 us",
            "the same".to_owned(),
        ),
        ("4.1 (table)", "time of kernbench under spin_lock", "8.05 %", "the same".to_owned()),
        (
            "4.1 (table)",
            "time under spin_lock: 371,309,982 times 0.65 us, in five samples of 3 s on 8 cores",
            "241 s in at most 120 core-seconds",
            "contradicts itself; only the share is taken".to_owned(),
        ),
        ("4.1, 4.2", "a switch between vCPUs", "2.5 to 3 times a plain one", us(costs.switch)),
        ("-", "caches warm again after", "-", us(costs.refill)),
        ("-", "an interrupt, an exit", "-", us(costs.interrupt)),
        ("-", "KVM's window of pause-loop exiting", "-", us(costs.spin_window)),
    ];
    Table {
        name: "inputs".to_owned(),
        about: "What the simulator takes as given.".to_owned(),
        head: ["figure", "what", "thesis", "simulator"].map(str::to_owned).to_vec(),
        rows: rows
            .into_iter()
            .map(|(f, w, t, s)| vec![f.to_owned(), w.to_owned(), t.to_owned(), s])
            .collect(),
    }
}

/// Figure 4.11: run time as a part of DFT's, in ever longer queues.
fn scaling(sheet: &[Measured]) -> Vec<Experiment> {
    let mut all = Vec::new();
    for workload in SCALED {
        let name = format!("scaling-{}", workload.name());
        let about = format!(
            "Figure 4.11: run time of {} under SBCO (and the adaptive threshold) as a part of \
             DFT's, by the length of the run queue.",
            workload.name()
        );
        let mut e = Experiment::new(&name, &about, "%", Better::Lower);
        for (queue, policy) in
            SCALING.iter().flat_map(|q| [(q, Policy::SBCO), (q, Policy::ADAPTIVE)])
        {
            let scenario = (workload, *queue);
            let m = sheet.iter().find(|m| (m.scenario.workload, m.scenario.queue) == scenario);
            let Some(m) = m else { continue };
            let of = |p| m.values(p, |o| o.seconds);
            for (here, dft) in of(policy).iter().zip(of(Policy::DFT)) {
                e.push(&format!("{policy} {queue}"), 100.0 * here / dft);
            }
        }
        all.push(e);
    }
    all
}

/// Tables 4.2 and 4.3: what the default scheduler's run queues look like.
fn queues(seeds: u64, seconds: u64) -> [Experiment; 2] {
    let mut stacked = Experiment::new(
        "stacking",
        "Table 4.2: how often siblings shared a run queue under the default scheduler, with 2 and 3 \
         machines (thesis: SPECjbb 20.25 and 31.63 %, kernbench 33.19 and 42.84 %).",
        "%",
        Better::Lower,
    );
    let mut far = Experiment::new(
        "distance",
        "Table 4.3: how often a vCPU that was next had a sibling two thirds of its queue away, under \
         the default scheduler, in queues of 6 and 10 (thesis: kernbench 42.36 and 48.21 %, PARSEC, \
         here dedup, 40.75 and 45.13 %).",
        "%",
        Better::Lower,
    );
    let mut jobs = Vec::new();
    for seed in 0..seeds {
        for workload in [Workload::SpecJbb, Workload::Kernbench] {
            jobs.extend([2, 3].map(|machines| (seed, workload, machines, true)));
        }
        for workload in [Workload::Kernbench, Workload::Dedup] {
            jobs.extend([6, 10].map(|queue| (seed, workload, queue, false)));
        }
    }
    let found = side_by_side(&jobs, |(seed, workload, n, alike)| {
        let mut sim = Simulator::new(CPUS, Policy::DFT, Costs::DEFAULT, *seed);
        for i in 1..*n {
            let other = if *alike { *workload } else { Workload::SuperPi };
            other.start(&mut sim, CPUS, u64::MAX, i * APART);
        }
        workload.start(&mut sim, CPUS, u64::MAX, 0);
        sim.run_until(seconds * 1_000_000_000);
        let s = sim.samples();
        if *alike { percent(s.stacked, s.taken) } else { percent(s.exceeded, s.compared) }
    });
    for ((_, workload, n, alike), value) in jobs.iter().zip(found) {
        let name = workload.name();
        if *alike {
            stacked.push(&format!("{name}, {n} machines"), value);
        } else {
            far.push(&format!("{name}, queue of {n}"), value);
        }
    }
    [stacked, far]
}
