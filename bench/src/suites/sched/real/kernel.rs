//! The kernel's schedulers in one guest: EEVDF and each mode of `godwit-sched-ext`, in turns in one
//! boot. A machine is a process whose threads spin on shared locks (`godwit-standin`), as in the
//! thesis' scaling run (section 4.6.2); one is measured, the others compute.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use godwit_lab::{Clock, Initramfs, Kernel, Machine, Spec};
use serde_json::Value;

use super::{program, shorter_percent};
use crate::harness::{Better, Experiment, Results};

/// SBCO with a threshold for each machine, as is loaded unless another mode is asked for.
const ADAPTIVE: &str = "adaptive";
/// SBCO that allows no distance.
const STRICT: &str = "strict";
/// The kernel's own class.
pub const EEVDF: &str = "eevdf";
/// The same with turns that end at the kernel's tick, as those of sched_ext do: newer kernels end
/// EEVDF's by a timer of their own, which makes them half as long at 250 ticks a second.
pub const EEVDF_TICK: &str = "eevdf-tick";

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Rounds.
    pub rounds: usize,
    /// vCPUs of the guest, and threads of each machine in it: no more than this host has CPUs.
    pub cpus: u32,
    /// Who is compared, the one that has to be better first: [`EEVDF`] or a mode of
    /// `godwit-sched-ext`.
    pub modes: Vec<String>,
    /// What is measured: names of stand-ins.
    pub workloads: Vec<String>,
    /// Run queue lengths: the measured machine and so many others less one.
    pub queues: Vec<usize>,
    /// How long one run of the measured machine is.
    pub run: Duration,
    /// How long fairness is watched in each round; zero: not at all.
    pub fairness: Duration,
    /// By how much the guest's CPUs are taken to be slower than real ones; none: it is measured.
    /// Operations of stand-ins are so much smaller, so that their phases are as long beside a slice as
    /// they are on a real processor.
    pub slower: Option<u32>,
    /// What the guest's time is. By instructions it does not depend on what else the host does; a
    /// run takes some ten times as long then.
    pub clock: Clock,
}

impl Plan {
    /// What the thesis compares, as far as it can be run here; few rounds and short ones if `quick`.
    #[must_use]
    pub fn new(quick: bool, rounds: Option<usize>) -> Self {
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Self {
            rounds: rounds.unwrap_or(if quick { 2 } else { 5 }),
            // vCPUs that share a CPU of the host would stop each other in the middle of a lock.
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get().min(4) as u32).max(2),
            modes: names(&[ADAPTIVE, STRICT, "sbco", EEVDF, EEVDF_TICK, "dft", "bal"]),
            workloads: if quick {
                names(&["dedup", "dedup-32", "streamcluster"])
            } else {
                names(&[
                    "dedup",
                    "dedup-32",
                    "streamcluster",
                    "kernbench",
                    "kernbench-halts",
                    "specjbb",
                    "cpu",
                    "locks",
                ])
            },
            queues: if quick { vec![8] } else { vec![8, 12] },
            run: Duration::from_secs(if quick { 4 } else { 5 }),
            fairness: Duration::from_secs(if quick { 6 } else { 30 }),
            slower: None,
            clock: Clock::Host,
        }
    }
}

/// Runs the experiments of `plan` and adds them to `results`.
///
/// # Errors
/// What is missing (a kernel, QEMU, a program of this workspace), or more than [`MOST_FAILURES`]
/// failures: of a guest, or of a scheduler that leaves while it is measured.
pub fn run(plan: &Plan, results: &mut Results) -> anyhow::Result<()> {
    ensure!(plan.rounds > 0, "a suite has at least one round");
    ensure!(plan.queues.iter().all(|q| (1..=64).contains(q)), "a queue has 1 to 64 entries");
    let mut guest = Guest::boot(plan)?;
    results.accel.get_or_insert_with(|| "tcg".to_owned());
    let time = match plan.clock {
        Clock::Host => "its time is this host's, whose CPUs its vCPUs share, and rough".to_owned(),
        Clock::Instructions(shift) => format!(
            "its time is instructions, {} ns each: vCPUs take turns, and a stand-in spins without a \
             pause, which would end its vCPU's turn",
            1 << shift
        ),
    };
    results.notes.push(format!(
        "Kernel: {} in a guest of {} vCPUs under TCG; {time}. A machine is a process of {} threads that \
         spin at user level; the others run the stand-in for SuperPI. {} rounds, schedulers in turns in \
         one boot; context switches are the whole guest's.",
        guest.release, plan.cpus, plan.cpus, plan.rounds
    ));
    let mut sheets: Vec<Sheet> = Vec::new();
    for workload in &plan.workloads {
        for queue in &plan.queues {
            sheets.push(Sheet::new(workload, *queue));
        }
        if workload == "cpu" && !plan.queues.contains(&1) {
            sheets.push(Sheet::new(workload, 1));
        }
    }
    for sheet in &mut sheets {
        sheet.slower = guest.slower(plan, &sheet.workload, results)?;
    }
    let mut fairness = Fairness::new(plan);
    for round in 0..plan.rounds {
        for sheet in &mut sheets {
            let what = format!("{}-{}", sheet.workload, sheet.queue);
            let fleet = sheet.fleet(plan, round);
            let Some(runs) = guest.round(plan, round, &what, &fleet, plan.run, results)? else {
                continue;
            };
            for (mode, run) in runs {
                sheet.push(&mode, &run.report)?;
                if let Some(stats) = run.stats {
                    let of = format!("kernel-{what}-{mode}");
                    results.reports.entry(of).or_default().push(stats);
                }
            }
        }
        if !plan.fairness.is_zero() {
            let fleet = format!(
                "--others cpu --count {MACHINES} --threads {} --seconds {} --lead 2 --seed {round}",
                plan.cpus,
                plan.fairness.as_secs_f64()
            );
            let runs = guest.round(plan, round, "fairness", &fleet, plan.fairness, results)?;
            for (mode, run) in runs.into_iter().flatten() {
                fairness.push(&mode, &run.report)?;
            }
        }
    }
    results.experiments.extend(guest.decisions(plan)?);
    let mut said = "A run in the guest's kernel is shorter than with EEVDF by".to_owned();
    for sheet in &mut sheets {
        // Lock-heavy ones are to be a quarter faster, CPU-bound ones at most 2 % slower.
        let share = match super::stand_in(&sheet.workload).0 {
            "cpu" | "kernbench" => 1.02,
            _ => 0.75,
        };
        let (workload, queue) = (&sheet.workload, sheet.queue);
        for mode in [ADAPTIVE, STRICT, "sbco"] {
            let Some(percent) = shorter_percent(&sheet.time, mode, EEVDF) else { continue };
            // Writing to a string does not fail.
            let _ = write!(said, " {percent:.1} % ({mode}, {workload} in a queue of {queue});");
        }
        if let Some(base) = sheet.median_of(EEVDF) {
            for mode in [ADAPTIVE, STRICT] {
                sheet.time.target(mode, share * base);
            }
        }
    }
    results.notes.push(said);
    for sheet in sheets {
        results.experiments.extend([sheet.time, sheet.cpu, sheet.share, sheet.switches]);
        results.experiments.extend(sheet.held);
    }
    results.experiments.extend(fairness.finish());
    Ok(())
}

/// `modes`, beginning at another one in each round.
fn turned(modes: &[String], round: usize) -> impl Iterator<Item = &String> {
    let at = round % modes.len().max(1);
    modes[at..].iter().chain(&modes[..at])
}

/// Whether the kernel's own class schedules in `mode`.
fn is_stock(mode: &str) -> bool {
    [EEVDF, EEVDF_TICK].contains(&mode)
}

/// The booted guest.
struct Guest {
    machine: Machine,
    release: String,
    clock: Clock,
    /// By how much its CPUs are slower than this host's, by workload.
    slower: BTreeMap<String, u32>,
    /// Rounds that failed, in earlier guests too.
    failures: usize,
}

/// What one run of a fleet gave.
struct Run {
    report: Value,
    /// The scheduler's own counters, where it is one of ours.
    stats: Option<Value>,
}

/// Rounds that may fail before the whole does.
const MOST_FAILURES: usize = 3;

const SOON: Duration = Duration::from_secs(60);

impl Guest {
    fn boot(plan: &Plan) -> anyhow::Result<Self> {
        let kernel = Kernel::find()?;
        let mut initramfs =
            Initramfs::new().program(program("godwit-standin", "godwit-standin")?)?;
        if plan.modes.iter().any(|m| !is_stock(m)) {
            initramfs = initramfs.program(program("godwit-sched-ext", "godwit-sched-ext")?)?;
        }
        let mut spec = Spec::new("bench-sched", plan.cpus, 1024);
        spec.clock = plan.clock;
        if plan.clock != Clock::Host {
            // Timers at different times on each CPU make the vCPUs' turns shorter where they take
            // turns.
            spec.append = "skew_tick=1".to_owned();
            spec.boot_within = 10 * SOON;
        }
        let machine = Machine::boot(&kernel, &initramfs, &spec)?;
        Ok(Self {
            machine,
            release: kernel.release().to_owned(),
            clock: plan.clock,
            slower: BTreeMap::new(),
            failures: 0,
        })
    }

    /// Within which time everything has to happen that takes seconds at most.
    fn soon(&self) -> Duration {
        match self.clock {
            Clock::Host => SOON,
            Clock::Instructions(_) => 10 * SOON,
        }
    }

    /// By how much an operation of `workload` takes this guest longer than this host, each alone on
    /// its CPU.
    fn slower(
        &mut self,
        plan: &Plan,
        workload: &str,
        results: &mut Results,
    ) -> anyhow::Result<u32> {
        if workload == "cpu" {
            // It never waits.
            return Ok(1);
        }
        if let Some(known) = plan.slower.or_else(|| self.slower.get(workload).copied()) {
            return Ok(known);
        }
        let within = 100 * self.soon();
        let (slower, said) = super::slower(workload, |line| self.say(line, within))?;
        results.notes.push(said);
        self.slower.insert(workload.to_owned(), slower);
        Ok(slower)
    }

    /// Runs a fleet under every mode in turn. None when one of them failed, which is a note: rounds
    /// are compared whole. The next round has a new guest then.
    fn round(
        &mut self,
        plan: &Plan,
        round: usize,
        what: &str,
        fleet: &str,
        time: Duration,
        results: &mut Results,
    ) -> anyhow::Result<Option<Vec<(String, Run)>>> {
        let mut runs = Vec::new();
        for mode in turned(&plan.modes, round) {
            let run = self.fleet(mode, fleet, time);
            match run.with_context(|| format!("round {round}: {what} under {mode}")) {
                Ok(run) => runs.push((mode.clone(), run)),
                Err(e) if self.failures < MOST_FAILURES => {
                    tracing::warn!("{e:#}");
                    results.notes.push(format!("Failed, with all of its round: {e:#}"));
                    let failures = self.failures + 1;
                    *self = Self { failures, ..Self::boot(plan)? };
                    return Ok(None);
                }
                Err(e) => return Err(e),
            }
            tracing::info!("round {round}: {what} under {mode}");
        }
        // Whoever ran first, the first subject is the plan's.
        runs.sort_by_key(|(mode, _)| plan.modes.iter().position(|m| m == mode));
        Ok(Some(runs))
    }

    /// Runs a fleet under `mode`, which is gone again afterwards.
    fn fleet(&mut self, mode: &str, args: &str, run: Duration) -> anyhow::Result<Run> {
        let stock = is_stock(mode);
        if !stock {
            self.load(mode).with_context(|| format!("load the scheduler in mode {mode}"))?;
        }
        if mode == EEVDF_TICK {
            self.hrtick(false)?;
        }
        let (busy, slow) = match self.clock {
            Clock::Host => ("", 1),
            Clock::Instructions(_) => ("--no-pause", 100),
        };
        let fleet = format!("godwit-standin fleet {busy} {args}");
        let said = self.say(&fleet, slow * run + 2 * self.soon())?;
        let line = said.lines().last().unwrap_or_default();
        let report =
            serde_json::from_str(line).with_context(|| format!("the fleet said {said:?}"))?;
        if mode == EEVDF_TICK {
            self.hrtick(true)?;
        }
        let stats = if stock {
            let state = self.say("cat /sys/kernel/sched_ext/state", self.soon())?;
            ensure!(state.trim() == "disabled", "sched_ext is {state:?} while EEVDF is measured");
            None
        } else {
            Some(self.unload().with_context(|| format!("unload the scheduler in mode {mode}"))?)
        };
        Ok(Run { report, stats })
    }

    /// Runs a command in the guest and gives what it says.
    fn say(&mut self, command: &str, within: Duration) -> anyhow::Result<String> {
        Ok(self.machine.ok(command, within)?)
    }

    /// Switches EEVDF's own timer on or off; without it turns end at the kernel's tick, as those of
    /// sched_ext do.
    fn hrtick(&mut self, on: bool) -> anyhow::Result<()> {
        let feature = if on { "HRTICK" } else { "NO_HRTICK" };
        let line = format!(
            "cd /sys/kernel/debug; [ -d sched ] || mount -t debugfs none .; \
             cd /sys/kernel/debug/sched; echo {feature} >features; grep -qw {feature} features"
        );
        self.say(&line, self.soon()).map(drop).with_context(|| format!("set {feature}"))
    }

    fn load(&mut self, mode: &str) -> anyhow::Result<()> {
        // Names go into a shell.
        ensure!(mode.bytes().all(|b| b.is_ascii_alphanumeric()), "{mode:?} is no mode");
        self.say(
            &format!(
                "godwit-sched-ext load --mode {mode} --vm-by process:godwit-standin \
                 >/tmp/ext.log 2>&1 & echo $! >/tmp/ext.pid"
            ),
            self.soon(),
        )?;
        self.state("enabled")
    }

    /// The counters of the scheduler that is loaded, which must not have left; then it goes.
    /// What a decision costs in the guest: time, or instructions where the guest's time is that.
    fn decisions(&mut self, plan: &Plan) -> anyhow::Result<Vec<Experiment>> {
        if plan.modes.iter().all(|m| is_stock(m)) {
            return Ok(Vec::new());
        }
        let (unit, each) = match self.clock {
            Clock::Host => ("ns", 1.0),
            Clock::Instructions(shift) => ("instructions", f64::from(1_u32 << shift)),
        };
        let of = |name: &str, what: &str| {
            let about =
                format!("A decision in a guest (TCG), by tasks queued on each CPU: {what}.");
            Experiment::new(name, &about, unit, Better::Lower)
        };
        let mut both = vec![
            of("kernel-decision-bpf", "comparing a candidate with three siblings, in BPF"),
            of("kernel-decision-library", "charging a task and choosing the next, in the library"),
        ];
        let said = self.say("godwit-sched-ext cost", 10 * self.soon())?;
        for line in said.lines().skip(1) {
            let row: Result<Vec<f64>, _> = line.split_whitespace().map(str::parse).collect();
            let row = row.with_context(|| format!("a cost is {line:?}"))?;
            let [queued, _siblings, figures @ ..] = &row[..] else { bail!("a cost is {line:?}") };
            for (experiment, three) in both.iter_mut().zip(figures.chunks(3)) {
                for ns in three {
                    experiment.push(&format!("{queued} queued"), ns / each);
                }
            }
        }
        Ok(both)
    }

    fn unload(&mut self) -> anyhow::Result<Value> {
        let soon = self.soon();
        let answer =
            self.machine.run("cat /sys/kernel/sched_ext/state; tail -n 15 /tmp/ext.log", soon)?;
        ensure!(
            answer.output.starts_with("enabled"),
            "the scheduler left while it was measured: {}",
            answer.output
        );
        let said = self.say("godwit-sched-ext top --once --json", self.soon())?;
        let stats = serde_json::from_str(said.trim())
            .with_context(|| format!("the scheduler's counters are {said:?}"))?;
        self.say("kill $(cat /tmp/ext.pid)", self.soon())?;
        self.state("disabled")?;
        Ok(stats)
    }

    /// Waits until sched_ext is in `state`.
    fn state(&mut self, state: &str) -> anyhow::Result<()> {
        // A loader that has ended, and so has no command line any more, will not bring it about.
        let wait = format!(
            "until grep -q {state} /sys/kernel/sched_ext/state; do \
             grep -q . /proc/$(cat /tmp/ext.pid)/cmdline 2>/dev/null || {{ sleep 1; grep -q {state} \
             /sys/kernel/sched_ext/state && exit 0; tail -n 15 /tmp/ext.log; exit 1; }}; sleep 0.1; done"
        );
        self.say(&wait, self.soon()).map(drop).with_context(|| format!("wait for {state}"))
    }
}

/// What is measured of one workload in one queue.
struct Sheet {
    workload: String,
    queue: usize,
    slower: u32,
    time: Experiment,
    /// What an operation costs, whatever part of the CPUs the machine got.
    cpu: Experiment,
    share: Experiment,
    switches: Experiment,
    /// How long locks were held and waited for, where that was timed.
    held: [Experiment; 2],
}

impl Sheet {
    fn new(workload: &str, queue: usize) -> Self {
        let name = format!("kernel-{workload}-{queue}");
        let place = if queue == 1 { "alone".to_owned() } else { format!("in a queue of {queue}") };
        let figure = match (workload, queue) {
            ("dedup" | "dedup-32" | "streamcluster", 8) => "Figures 4.8 and 4.11",
            ("dedup" | "dedup-32" | "streamcluster", 12) => "Figures 4.9 and 4.11",
            ("kernbench" | "kernbench-halts", _) => "Figure 4.6",
            ("specjbb", _) => "Figure 4.10",
            _ => "What it costs who does not wait",
        };
        Self {
            time: Experiment::new(
                &name,
                &format!(
                    "{figure}, in a guest's kernel (TCG): time of the stand-in for {workload}, {place}, per operation."
                ),
                "ms",
                Better::Lower,
            ),
            cpu: Experiment::new(
                &format!("{name}-cpu"),
                &format!("CPU time of all threads of {workload} per operation, {place} (TCG)."),
                "ms",
                Better::Lower,
            ),
            share: Experiment::new(
                &format!("{name}-share"),
                &format!(
                    "The measured machine's part of the guest's CPUs while it worked (TCG); fair is {:.1} %.",
                    100.0 / queue as f64
                ),
                "%",
                Better::Higher,
            ),
            switches: Experiment::new(
                &format!("{name}-switches"),
                &format!("Context switches of the whole guest while {workload} ran {place} (TCG)."),
                "switches/s",
                Better::Lower,
            ),
            held: [
                Experiment::new(
                    &format!("{name}-held"),
                    &format!(
                        "Table 4.1 at user level, in a guest (TCG): mean time that a spin lock was held, \
                         {place} (thesis, in a kernel: 0.650 us with kernbench). A holder that lost its CPU \
                         counts too.",
                    ),
                    "us",
                    Better::Lower,
                ),
                Experiment::new(
                    &format!("{name}-waited"),
                    &format!("Mean time that a spin lock was waited for, {place} (TCG)."),
                    "us",
                    Better::Lower,
                ),
            ],
            workload: workload.to_owned(),
            queue,
            slower: 1,
        }
    }

    /// The arguments of its fleet.
    fn fleet(&self, plan: &Plan, round: usize) -> String {
        let (name, args) = super::stand_in(&self.workload);
        format!(
            "--measured {name} {args} --others cpu --count {} --threads {} --seconds {} --lead 0.5 \
             --seed {round} --slower {}",
            self.queue - 1,
            plan.cpus,
            plan.run.as_secs_f64(),
            self.slower
        )
    }

    fn push(&mut self, mode: &str, report: &Value) -> anyhow::Result<()> {
        let measured = &report["measured"];
        // A run in which nothing got done counts as one in which one operation took all the time.
        let operations = number(&measured["operations"])?.max(1.0);
        self.time.push(mode, number(&measured["elapsed_ms"])? / operations);
        let threads = measured["cpu_ms"].as_array().context("CPU time of the threads")?;
        let cpu = threads.iter().map(number).sum::<anyhow::Result<f64>>()?;
        self.cpu.push(mode, cpu / operations);
        for (experiment, key) in self.held.iter_mut().zip(["hold", "wait"]) {
            if let Some(ns) = measured[key]["mean_ns"].as_f64() {
                experiment.push(mode, ns / 1e3);
            }
        }
        let samples = Samples::of(report)?;
        let all = number(&measured["elapsed_ms"])? * number(&report["cpus"])?;
        self.share.push(mode, 100.0 * cpu / all);
        self.switches.push(mode, number(&report["switches"])? / (samples.span_ms() / 1e3));
        Ok(())
    }

    fn median_of(&self, mode: &str) -> Option<f64> {
        let series = self.time.series.iter().find(|s| s.subject == mode)?;
        crate::harness::stats::median(&series.values)
    }
}

fn number(value: &Value) -> anyhow::Result<f64> {
    value.as_f64().with_context(|| format!("{value} is no number"))
}

/// CPU time of each machine over time, ms.
struct Samples {
    at_ms: Vec<f64>,
    cpu_ms: Vec<Vec<f64>>,
}

impl Samples {
    fn of(report: &Value) -> anyhow::Result<Self> {
        let part = |key: &str| report[key].clone();
        let at_ms: Vec<f64> = serde_json::from_value(part("at_ms")).context("times of samples")?;
        let cpu_ms: Vec<Vec<f64>> = serde_json::from_value(part("cpu_ms")).context("samples")?;
        ensure!(
            at_ms.len() == cpu_ms.len() && at_ms.len() >= 3,
            "a fleet with {} samples",
            at_ms.len()
        );
        Ok(Self { at_ms, cpu_ms })
    }

    fn last(&self) -> usize {
        self.at_ms.len() - 1
    }

    fn span_ms(&self) -> f64 {
        self.at_ms[self.last()] - self.at_ms[0]
    }

    /// What each machine ran between two samples.
    fn window(&self, from: usize, to: usize) -> Vec<f64> {
        self.cpu_ms[to].iter().zip(&self.cpu_ms[from]).map(|(to, from)| to - from).collect()
    }

    /// The maximum absolute lag in each window of `length` samples, ms.
    fn lags(&self, length: usize) -> Vec<f64> {
        let lag = |from: usize| {
            let ran = self.window(from, from + length);
            let most = ran.iter().copied().fold(f64::MIN, f64::max);
            most - ran.iter().copied().fold(f64::MAX, f64::min)
        };
        (0..).map(|i| i * length).take_while(|from| from + length <= self.last()).map(lag).collect()
    }
}

/// Machines of the fairness experiment, as in section 4.6, "Fairness".
const MACHINES: usize = 4;

/// Figure 4.12: windows in samples, which are a second apart.
struct Fairness {
    windows: Vec<(usize, Experiment, Experiment)>,
}

impl Fairness {
    fn new(plan: &Plan) -> Self {
        let whole = usize::try_from(plan.fairness.as_secs()).unwrap_or(usize::MAX);
        let mut lengths: Vec<usize> = [1, 5, whole].into_iter().filter(|n| *n <= whole).collect();
        lengths.dedup();
        let of = |n: usize| {
            let lag = Experiment::new(
                &format!("kernel-lag-{n}s"),
                &format!(
                    "Figure 4.12 in a guest's kernel (TCG): mean of the largest difference of what \
                     {MACHINES} CPU-bound machines ran in {n} s (thesis: 20 ms by default, 15 to 25 ms \
                     with SBCO)."
                ),
                "ms",
                Better::Lower,
            );
            let rsd = Experiment::new(
                &format!("kernel-lag-{n}s-rsd"),
                "Its relative standard deviation (thesis: at most 15 %).",
                "%",
                Better::Lower,
            );
            (n, lag, rsd)
        };
        Self { windows: lengths.into_iter().filter(|n| *n > 0).map(of).collect() }
    }

    fn push(&mut self, mode: &str, report: &Value) -> anyhow::Result<()> {
        let samples = Samples::of(report)?;
        for (n, lag, rsd) in &mut self.windows {
            let lags = samples.lags(*n);
            let count = lags.len() as f64;
            if lags.is_empty() {
                continue;
            }
            let mean = lags.iter().sum::<f64>() / count;
            lag.push(mode, mean);
            // One window has no spread.
            if lags.len() > 1 && mean > 0.0 {
                let spread = (lags.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / count).sqrt();
                rsd.push(mode, 100.0 * spread / mean);
            }
        }
        Ok(())
    }

    fn finish(self) -> Vec<Experiment> {
        let mut all = Vec::new();
        for (_, mut lag, mut rsd) in self.windows {
            lag.target(ADAPTIVE, 25.0);
            rsd.target(ADAPTIVE, 15.0);
            all.extend([lag, rsd].into_iter().filter(|e| !e.series.is_empty()));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Value {
        serde_json::json!({
            "measured": { "operations": 50, "elapsed_ms": 2000.0, "cpu_ms": [400.0, 100.0] },
            "switches": 300,
            "cpus": 2,
            "at_ms": [0.0, 1000.0, 2000.0, 3000.0],
            "cpu_ms": [[0.0, 10.0], [500.0, 610.0], [1000.0, 1010.0], [1500.0, 1510.0]],
        })
    }

    #[test]
    fn a_report_becomes_figures() {
        let mut sheet = Sheet::new("dedup", 2);
        sheet.push("sbco", &report()).expect("a whole report");
        let first = |e: &Experiment| e.series[0].values.clone();
        assert_eq!(first(&sheet.time), [40.0]);
        assert_eq!(first(&sheet.cpu), [10.0]);
        assert_eq!(first(&sheet.share), [12.5]);
        assert_eq!(first(&sheet.switches), [100.0]);
        assert_eq!(Samples::of(&report()).expect("samples").lags(1), [100.0, 100.0, 0.0]);
        assert_eq!(Samples::of(&report()).expect("samples").lags(2), [0.0]);
        sheet.push("sbco", &Value::Null).expect_err("no report");
    }

    #[test]
    fn every_round_has_all_modes_and_another_first() {
        let modes: Vec<String> = ["a", "b", "c"].map(str::to_owned).into();
        let in_round = |n| turned(&modes, n).cloned().collect::<String>();
        assert_eq!([in_round(0), in_round(1), in_round(5)], ["abc", "bca", "cab"]);
    }
}
