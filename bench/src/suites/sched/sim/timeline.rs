//! A picture of who ran where, who spun and who lent.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use godwit_sched::policy::Policy;
use godwit_sched::scheduler::VmId;
use godwit_sched::sim::record::{Activity, Record, Span};
use godwit_sched::sim::workload::Workload;

use super::scenario::{CPUS, START, Scenario};
use crate::harness::{Picture, Table};

/// What to draw.
#[derive(Debug, Clone, clap::Args)]
pub struct Timeline {
    /// Policy, e.g. sbco, dft, bal, adaptive, eevdf.
    #[arg(long, default_value = "sbco")]
    policy: Policy,
    /// Workload of the measured machine, e.g. dedup, kernbench, npb-cg.
    #[arg(long, default_value = "dedup", value_parser = workload)]
    workload: Workload,
    /// Machines in all; the others compute.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u8).range(1..=100))]
    queue: u8,
    /// Seed of the run.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where the picture begins, in ms after the measured machine's start.
    #[arg(long, default_value_t = 1500)]
    from_ms: u64,
    /// How much it shows, in ms.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    for_ms: u64,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

fn workload(name: &str) -> Result<Workload, String> {
    let all = || Workload::FINITE.into_iter().chain([Workload::SuperPi]);
    let known = || all().map(Workload::name).collect::<Vec<_>>().join(", ");
    all().find(|w| w.name() == name).ok_or_else(|| format!("there are {}", known()))
}

impl Timeline {
    /// Simulates, draws and writes.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn draw(&self) -> anyhow::Result<()> {
        let scenario =
            Scenario { workload: self.workload, queue: usize::from(self.queue), work: u64::MAX };
        let svg = picture(scenario, self.policy, self.seed, self.from_ms, self.for_ms)?;
        std::fs::write(&self.out, svg).with_context(|| format!("write {}", self.out.display()))
    }
}

/// One picture for each policy that couples siblings in its own way.
pub(super) fn of_the_suite() -> anyhow::Result<Vec<Picture>> {
    let scenario = Scenario { workload: Workload::Dedup, queue: 6, work: u64::MAX };
    let draw = |(name, policy): (&str, Policy)| {
        let svg = picture(scenario, policy, 0, 1_500, 120)?;
        let about = format!("120 ms of dedup in a queue of 6 under {name}: who ran where.");
        Ok(Picture { name: format!("timeline-{name}"), about, svg })
    };
    Policy::NAMED.into_iter().map(draw).collect()
}

/// How the adaptive threshold came about, for each workload that waits.
pub(super) fn changes(quick: bool) -> Table {
    let workloads: &[(Workload, usize)] = if quick {
        &[(Workload::Dedup, 8)]
    } else {
        &[(Workload::Dedup, 8), (Workload::Kernbench, 4), (Workload::NpbCg, 6), (Workload::X264, 8)]
    };
    let mut rows = Vec::new();
    for (workload, queue) in workloads {
        let scenario = Scenario { workload: *workload, queue: *queue, work: 4_000_000_000 };
        let (mut sim, vm) = scenario.build(Policy::ADAPTIVE, 0);
        sim.run_until_end(vm, START + 100_000_000_000);
        let changes = sim.scheduler().alpha_changes(vm);
        let what = format!("{} in a queue of {queue}", workload.name());
        if changes.is_empty() {
            rows.push(vec![what.clone(), "none: it wastes too little".to_owned()]);
        }
        rows.extend(changes.iter().map(|c| vec![what.clone(), c.to_string()]));
    }
    Table {
        name: "adaptive threshold".to_owned(),
        about:
            "Each change of the measured machine's alpha, seed 0, with its reason; times are what \
                the machine had run by then."
                .to_owned(),
        head: vec!["machine".to_owned(), "change".to_owned()],
        rows,
    }
}

fn picture(
    scenario: Scenario,
    policy: Policy,
    seed: u64,
    from_ms: u64,
    for_ms: u64,
) -> anyhow::Result<String> {
    let (mut sim, vm) = scenario.build(policy, seed);
    let from = START + from_ms * 1_000_000;
    let until = from + for_ms * 1_000_000;
    sim.record(from, until);
    // What is under way at the end is accounted for when it ends.
    sim.run_until(until + 100_000_000);
    let record = sim.take_record().context("the simulator keeps no record")?;
    let Scenario { workload, queue, .. } = scenario;
    let title = format!(
        "{}: {} in a queue of {queue} on {CPUS} pCPUs, seed {seed}",
        policy,
        workload.name()
    );
    Ok(svg(&title, &record, vm))
}

const LEFT: f64 = 70.0;
const TOP: f64 = 74.0;
const WIDTH: f64 = 1400.0;
const LANE: f64 = 46.0;
const GAP: f64 = 34.0;

/// Colours of the other machines, pale: the measured one is to be seen.
const OTHERS: [&str; 6] = ["#d9e3ee", "#dfe9d8", "#efe3cf", "#e5dcea", "#d5e8e6", "#eedcdc"];
const MEASURED: &str = "#1f6fb4";
const SPINS: &str = "#d62728";
const SWITCHES: &str = "#444444";
const HOST: &str = "#9a9a9a";
const LOAN: &str = "#0a7d28";

/// Draws `record`: a lane for each pCPU; what the measured machine does is dark blue, red where it
/// spins; green marks show who lent to whom.
fn svg(title: &str, record: &Record, measured: VmId) -> String {
    let cpus = record.spans.iter().map(|s| s.cpu.0 as usize + 1).max().unwrap_or(CPUS);
    let span = (record.until - record.from).max(1) as f64;
    let x = |at: u64| LEFT + WIDTH * (at.saturating_sub(record.from)) as f64 / span;
    let y = |cpu: u32| TOP + f64::from(cpu) * (LANE + GAP);
    let height = TOP + cpus as f64 * (LANE + GAP) + 30.0;
    let width = LEFT + WIDTH + 45.0;
    let mut t = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"17\">{title}</text>\n"
    );
    legend(&mut t);
    for cpu in 0..cpus as u32 {
        let at = y(cpu);
        let _ = writeln!(
            t,
            "<text x=\"8\" y=\"{:.1}\">pCPU {cpu}</text>\n<rect x=\"{LEFT}\" y=\"{at:.1}\" \
             width=\"{WIDTH}\" height=\"{LANE}\" fill=\"none\" stroke=\"#cccccc\"/>",
            at + LANE / 2.0 + 5.0
        );
    }
    for s in &record.spans {
        let (colour, tall) = look(s, measured);
        if let Some(colour) = colour {
            let _ = writeln!(
                t,
                "<rect x=\"{:.2}\" y=\"{:.1}\" width=\"{:.2}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                x(s.from),
                y(s.cpu.0) + LANE * (1.0 - tall),
                (x(s.until) - x(s.from)).max(0.15),
                LANE * tall
            );
        }
    }
    for l in &record.lent {
        let (at, from, to) = (x(l.at), y(l.from.0), y(l.to.0));
        let (from, to) = if from < to { (from + LANE, to) } else { (from, to + LANE) };
        let _ = writeln!(
            t,
            "<line x1=\"{at:.2}\" y1=\"{from:.1}\" x2=\"{at:.2}\" y2=\"{to:.1}\" stroke=\"{LOAN}\" \
             stroke-width=\"1.2\"/>\n<circle cx=\"{at:.2}\" cy=\"{to:.1}\" r=\"2.6\" fill=\"{LOAN}\"/>"
        );
    }
    axis(&mut t, record, TOP + cpus as f64 * (LANE + GAP) - GAP + 16.0);
    t.push_str("</svg>\n");
    t
}

/// How a span is drawn: in which colour, and how much of its lane.
fn look(s: &Span, measured: VmId) -> (Option<&'static str>, f64) {
    match (s.activity, s.vm) {
        (Activity::Idles, _) => (None, 0.0),
        (Activity::Switches, _) => (Some(SWITCHES), 1.0),
        (Activity::Spins, _) => (Some(SPINS), 1.0),
        (Activity::Works, Some(vm)) if vm == measured => (Some(MEASURED), 1.0),
        (Activity::Works, Some(vm)) => (Some(OTHERS[vm.0 as usize % OTHERS.len()]), 0.8),
        (Activity::Works, None) => (Some(HOST), 0.5),
    }
}

fn legend(t: &mut String) {
    let entries = [
        (MEASURED, "the measured machine works"),
        (SPINS, "it spins"),
        (OTHERS[0], "others work"),
        (HOST, "I/O threads"),
        (SWITCHES, "a switch"),
        (LOAN, "a loan, from the lender to the dot"),
    ];
    let mut x = LEFT;
    for (colour, what) in entries {
        let _ = writeln!(
            t,
            "<rect x=\"{x}\" y=\"36\" width=\"14\" height=\"14\" fill=\"{colour}\"/>\n\
             <text x=\"{}\" y=\"48\">{what}</text>",
            x + 20.0
        );
        x += 50.0 + 7.2 * what.len() as f64;
    }
}

fn axis(t: &mut String, record: &Record, y: f64) {
    const STEPS: u64 = 12;
    let span = record.until - record.from;
    for i in 0..=STEPS {
        let at = LEFT + WIDTH * i as f64 / STEPS as f64;
        let ms = (record.from + span * i / STEPS).saturating_sub(START) as f64 / 1e6;
        let _ = writeln!(
            t,
            "<text x=\"{at:.1}\" y=\"{y:.1}\" text-anchor=\"middle\" fill=\"#555555\">{ms:.0} ms</text>"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_shows_work_waiting_and_loans() {
        let scenario = Scenario { workload: Workload::Dedup, queue: 6, work: u64::MAX };
        let svg = picture(scenario, Policy::SBCO, 0, 500, 200).expect("drawn");
        for what in [MEASURED, SPINS, LOAN, SWITCHES, "pCPU 3", "sbco: dedup in a queue of 6"] {
            assert!(svg.matches(what).count() > 1 || what.contains(' '), "{what} is missing");
        }
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
        assert!(workload("nothing").expect_err("none").contains("npb-cg"));
    }
}
