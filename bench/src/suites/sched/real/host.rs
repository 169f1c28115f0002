//! The user-space service on this host's own scheduler: real QEMU machines, more vCPUs than pCPUs,
//! with the service in three ways and without it, in turns. One machine is measured, the others compute. Then
//! tables 4.2 and 4.3 on the same machines, by the service's own observation.

use std::io::Read as _;
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use godwit_lab::{Initramfs, Kernel, Machine, Spec};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{program, shorter_percent};
use crate::harness::{Better, Experiment, Results};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Rounds.
    pub rounds: usize,
    /// Machines; the first is measured.
    pub machines: usize,
    /// vCPUs of each, and threads of its stand-in.
    pub cpus: u32,
    /// What is measured: names of stand-ins.
    pub workloads: Vec<String>,
    /// How long one run is.
    pub run: Duration,
    /// How long run queues are observed in each round; zero: not at all.
    pub observe: Duration,
    /// What runs in all machines meanwhile.
    pub observed: Vec<String>,
}

impl Plan {
    /// Three machines of two vCPUs; few rounds and short ones if `quick`.
    #[must_use]
    pub fn new(quick: bool, rounds: Option<usize>) -> Self {
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Self {
            rounds: rounds.unwrap_or(if quick { 2 } else { 5 }),
            machines: 3,
            cpus: 2,
            workloads: if quick {
                names(&["dedup-32"])
            } else {
                names(&["dedup-32", "streamcluster", "cpu"])
            },
            run: Duration::from_secs(if quick { 6 } else { 15 }),
            observe: Duration::from_secs(if quick { 5 } else { 10 }),
            observed: if quick { names(&["kernbench"]) } else { names(&["kernbench", "specjbb"]) },
        }
    }
}

/// Subjects: with the service as it is, with one that only spreads siblings and lends, with one that
/// only spreads them, and without.
const WITH: &str = "service";
const LOANS: &str = "loans";
const WITHOUT: &str = "default";
const SPREAD: &str = "spread";

const SOON: Duration = Duration::from_secs(60);

/// Runs the experiments of `plan` and adds them to `results`.
///
/// # Errors
/// What is missing (a kernel, QEMU, a program of this workspace, root), a guest or a service that
/// fails.
pub fn run(plan: &Plan, results: &mut Results) -> anyhow::Result<()> {
    ensure!(plan.rounds > 0, "a suite has at least one round");
    ensure!((2..=16).contains(&plan.machines), "2 to 16 machines, not {}", plan.machines);
    let mut host = Host::boot(plan)?;
    results.accel.get_or_insert_with(|| "tcg".to_owned());
    results.notes.push(format!(
        "Host: {} machines of {} vCPUs under TCG on this host's {} CPUs, {} rounds in turns with the \
         user-space service, which runs each machine whole for 10 ms in turn, without it, with one that spreads \
         siblings and lends, and with one that only spreads them; the machines that are not measured run \
         the stand-in for SuperPI. A stand-in has a thread for each vCPU and spins at user level.",
        plan.machines,
        plan.cpus,
        std::thread::available_parallelism().map_or(0, usize::from),
        plan.rounds
    ));
    let mut said = "With the service the measured machine's run is shorter by".to_owned();
    for workload in &plan.workloads {
        let mut sheet = Sheet::new(workload, plan);
        let slower = host.slower(workload, results)?;
        for round in 0..plan.rounds {
            for subject in turned(round) {
                let run = host.measure(workload, slower, subject, plan.run, round)?;
                sheet.push(subject, &run)?;
                if let Some(report) = run.service {
                    results
                        .reports
                        .entry(format!("host-{workload}-{subject}"))
                        .or_default()
                        .push(report);
                }
                tracing::info!("round {round}: {workload} with {subject}");
            }
        }
        said += &sheet.finish();
        results.experiments.extend([sheet.time, sheet.cpu, sheet.share]);
    }
    results.notes.push(said);
    if !plan.observe.is_zero() {
        results.experiments.extend(tables(plan, &mut host)?);
    }
    Ok(())
}

/// All subjects; who comes first turns from round to round.
fn turned(round: usize) -> [&'static str; 4] {
    let mut all = [WITH, LOANS, WITHOUT, SPREAD];
    let by = round % all.len();
    all.rotate_left(by);
    all
}

/// What is measured of one workload.
struct Sheet {
    workload: String,
    time: Experiment,
    /// What an operation costs, whatever part of the CPUs the machine got.
    cpu: Experiment,
    share: Experiment,
}

impl Sheet {
    fn new(workload: &str, plan: &Plan) -> Self {
        let (machines, cpus) = (plan.machines, plan.cpus);
        Self {
            workload: workload.to_owned(),
            time: Experiment::new(
                &format!("host-{workload}"),
                &format!(
                    "Time of the stand-in for {workload} per operation, in one of {machines} QEMU \
                     machines of {cpus} vCPUs (TCG), with the user-space service and without."
                ),
                "ms",
                Better::Lower,
            ),
            cpu: Experiment::new(
                &format!("host-{workload}-cpu"),
                "CPU time of the measured machine's vCPUs per operation (TCG).",
                "ms",
                Better::Lower,
            ),
            share: Experiment::new(
                &format!("host-{workload}-others"),
                &format!(
                    "What the other machines got of the CPU time of all vCPUs meanwhile (TCG); fair is \
                     {:.1} %.",
                    100.0 * (machines - 1) as f64 / machines as f64
                ),
                "%",
                Better::Higher,
            ),
        }
    }

    fn push(&mut self, subject: &str, run: &Run) -> anyhow::Result<()> {
        let number = |key: &str| {
            run.outcome[key].as_f64().with_context(|| format!("no {key} in {}", run.outcome))
        };
        // A run in which nothing got done counts as one in which one operation took all the time.
        let operations = number("operations")?.max(1.0);
        self.time.push(subject, number("elapsed_ms")? / operations);
        self.cpu.push(subject, run.cpu_ms[0] / operations);
        let all: f64 = run.cpu_ms.iter().sum();
        self.share.push(subject, 100.0 * run.cpu_ms[1..].iter().sum::<f64>() / all);
        Ok(())
    }

    /// Sets targets, and says what came out.
    fn finish(&mut self) -> String {
        let median = |e: &Experiment| {
            let series = e.series.iter().find(|s| s.subject == WITHOUT)?;
            crate::harness::stats::median(&series.values)
        };
        // Dedup is to be a tenth faster, and the others keep their share within 2 %.
        if super::stand_in(&self.workload).0 == "dedup"
            && let Some(base) = median(&self.time)
        {
            self.time.target(LOANS, 0.9 * base);
            self.time.target(WITH, 0.9 * base);
        }
        if let Some(base) = median(&self.share) {
            self.share.target(LOANS, 0.98 * base);
            self.share.target(WITH, 0.98 * base);
        }
        let of = |subject: &str| {
            let time = shorter_percent(&self.time, subject, WITHOUT).unwrap_or(f64::NAN);
            let share = shorter_percent(&self.share, subject, WITHOUT).unwrap_or(f64::NAN);
            let what = &self.workload;
            format!(" {time:.1} % ({what}, {subject}; the others' share falls by {share:.1} %);")
        };
        [WITH, LOANS].map(of).concat()
    }
}

/// The running machines.
struct Host {
    machines: Vec<Machine>,
    cpus: u32,
}

/// One run of the measured machine.
struct Run {
    outcome: Value,
    /// CPU time of each machine's vCPUs, ms.
    cpu_ms: Vec<f64>,
    /// What the service says that it did.
    service: Option<Value>,
}

impl Host {
    fn boot(plan: &Plan) -> anyhow::Result<Self> {
        // Before the wait for guests, so that what is missing is said at once.
        program(SERVICE, SERVICE)?;
        let kernel = Kernel::find()?;
        let initramfs = Initramfs::new().program(program("godwit-standin", "godwit-standin")?)?;
        let boot = |i| {
            let spec = Spec::new(format!("bench-host-{i}"), plan.cpus, 256);
            Machine::boot(&kernel, &initramfs, &spec)
        };
        let machines = (0..plan.machines).map(boot).collect::<Result<_, _>>()?;
        Ok(Self { machines, cpus: plan.cpus })
    }

    /// By how much the machines' vCPUs are slower than this host's CPUs at `workload`.
    fn slower(&mut self, workload: &str, results: &mut Results) -> anyhow::Result<u32> {
        if workload == "cpu" {
            // It never waits.
            return Ok(1);
        }
        let first = &mut self.machines[0];
        let (slower, said) = super::slower(workload, |line| Ok(first.ok(line, SOON)?))?;
        results.notes.push(said);
        Ok(slower)
    }

    /// Runs `workload` in the first machine while the others compute.
    fn measure(
        &mut self,
        workload: &str,
        slower: u32,
        subject: &str,
        time: Duration,
        round: usize,
    ) -> anyhow::Result<Run> {
        let cpus = self.cpus;
        let others = 1..self.machines.len();
        self.disturb("cpu", others.clone())?;
        let service = Service::start(self, subject, time)?;
        let before = self.cpu_ms()?;
        let seconds = time.as_secs_f64();
        let (name, args) = super::stand_in(workload);
        let said = self.machines[0].ok(
            &format!(
                "godwit-standin {name} {args} --threads {cpus} --seconds {seconds} --seed {round} \
                 --slower {slower} --json"
            ),
            time + 2 * SOON,
        )?;
        let after = self.cpu_ms()?;
        let service = service.map(|s| s.stop(self)).transpose()?;
        self.calm(others)?;
        let outcome = serde_json::from_str(said.trim())
            .with_context(|| format!("the stand-in said {said:?}"))?;
        let cpu_ms = after.iter().zip(&before).map(|(a, b)| a - b).collect();
        Ok(Run { outcome, cpu_ms, service })
    }

    /// Starts `what` in some of the machines, without end.
    fn disturb(&mut self, what: &str, which: Range<usize>) -> anyhow::Result<()> {
        let start = format!(
            "godwit-standin {what} --threads {} --disturb --json >/tmp/other 2>&1 & echo $! >/tmp/other.pid",
            self.cpus
        );
        for machine in &mut self.machines[which] {
            machine.ok(&start, SOON)?;
        }
        Ok(())
    }

    /// Ends what [`disturb`](Self::disturb) started; each must have done something.
    fn calm(&mut self, which: Range<usize>) -> anyhow::Result<()> {
        for machine in &mut self.machines[which] {
            let end = "p=$(cat /tmp/other.pid); kill $p; while kill -0 $p 2>/dev/null; do sleep 0.05; \
                       done; cat /tmp/other";
            let said = machine.ok(end, SOON)?;
            let outcome: Value = serde_json::from_str(said.trim())
                .with_context(|| format!("the stand-in in {} said {said:?}", machine.name()))?;
            ensure!(
                outcome["operations"].as_u64() > Some(0),
                "{} got nothing done: {outcome}",
                machine.name()
            );
        }
        Ok(())
    }

    /// CPU time of each machine's vCPU threads so far, ms.
    fn cpu_ms(&self) -> anyhow::Result<Vec<f64>> {
        let of = |machine: &Machine| {
            let mut ns = 0;
            for tid in machine.vcpu_threads()? {
                let path = format!("/proc/{}/task/{tid}/schedstat", machine.pid());
                let text =
                    std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
                let ran = text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok());
                ns += ran.with_context(|| format!("{path} says {text:?}"))?;
            }
            Ok(ns as f64 / 1e6)
        };
        self.machines.iter().map(of).collect()
    }

    /// Which CPUs each vCPU thread of each machine may use.
    fn affinities(&self) -> anyhow::Result<Vec<Vec<String>>> {
        let of = |machine: &Machine| {
            let mut all = Vec::new();
            for tid in machine.vcpu_threads()? {
                let path = format!("/proc/{}/task/{tid}/status", machine.pid());
                let text =
                    std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
                let list = text.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
                all.push(list.with_context(|| format!("no CPUs in {path}"))?.trim().to_owned());
            }
            Ok(all)
        };
        self.machines.iter().map(of).collect()
    }

    /// Arguments that confine the service to these machines.
    fn pids(&self, which: Range<usize>) -> Vec<String> {
        let of = self.machines[which].iter();
        of.flat_map(|m| ["--pid".to_owned(), m.pid().to_string()]).collect()
    }
}

const SERVICE: &str = "godwit-sched-host";

/// The running service; it looks after the machines of this experiment and no others.
struct Service {
    child: Child,
    before: Vec<Vec<String>>,
    /// Of its lock and journal.
    _state: tempfile::TempDir,
}

impl Service {
    /// Starts it, if `subject` has one, for a run of `time`, and waits until siblings are apart.
    fn start(host: &Host, subject: &str, time: Duration) -> anyhow::Result<Option<Self>> {
        let how: &[&str] = match subject {
            WITHOUT => return Ok(None),
            SPREAD => &["--no-loans"],
            LOANS => &["--gang-ms", "0"],
            _ => &[],
        };
        let before = host.affinities()?;
        let state = tempfile::tempdir().context("make a state directory")?;
        let child = Command::new(program(SERVICE, SERVICE)?)
            .args(["run", "--json"])
            .args(how)
            .arg("--state-dir")
            .arg(state.path())
            .args(host.pids(0..host.machines.len()))
            // Should this program be killed, the service ends by itself.
            .args(["--seconds", &(time + 4 * SOON).as_secs().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start the service")?;
        let mut service = Self { child, before, _state: state };
        let begun = Instant::now();
        loop {
            let apart = host.affinities()?.iter().all(|of| of.windows(2).all(|w| w[0] != w[1]));
            if apart {
                return Ok(Some(service));
            }
            if let Some(status) = service.child.try_wait().context("look after the service")? {
                let mut why = String::new();
                if let Some(mut err) = service.child.stderr.take() {
                    err.read_to_string(&mut why).context("read what the service said")?;
                }
                bail!("the service ended with {status}: {}", why.trim());
            }
            ensure!(
                begun.elapsed() < SOON,
                "the service has not put siblings apart in {} s",
                SOON.as_secs()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it as an operator would, and checks that the threads may run where they might before.
    fn stop(mut self, host: &Host) -> anyhow::Result<Value> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("a process id")?, Signal::TERM).context("end the service")?;
        let mut said = String::new();
        if let Some(mut out) = self.child.stdout.take() {
            out.read_to_string(&mut said).context("read what the service did")?;
        }
        let status = self.child.wait().context("wait for the service")?;
        ensure!(status.success(), "the service ended with {status}: {said}");
        let after = host.affinities()?;
        ensure!(after == self.before, "the service left {after:?} where {:?} was", self.before);
        serde_json::from_str(&said).with_context(|| format!("the service said {said:?}"))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Only where `stop` was not reached. Asked nicely, it puts everything back.
        if let Ok(None) = self.child.try_wait() {
            if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::TERM);
            }
            let _ = self.child.wait();
        }
    }
}

/// Tables 4.2 and 4.3 by observation, all machines running the same.
fn tables(plan: &Plan, host: &mut Host) -> anyhow::Result<[Experiment; 2]> {
    let mut stacked = Experiment::new(
        "host-stacking",
        "Table 4.2 on this host's kernel (QEMU machines under TCG, stand-ins): how often siblings \
         shared a run queue (thesis: kernbench 33.19 % with 2 machines, 42.84 % with 3; SPECjbb \
         20.25 % and 31.63 %).",
        "%",
        Better::Lower,
    );
    let mut far = Experiment::new(
        "host-distance",
        "Table 4.3 on this host's kernel: how often a sibling was two thirds of its queue away; a \
         queue is as long as there are machines (thesis: kernbench 42.36 % in queues of 6).",
        "%",
        Better::Lower,
    );
    for what in &plan.observed {
        for machines in (2..=plan.machines).take(2) {
            host.disturb(what, 0..machines)?;
            // An observation is of hundreds of samples already.
            for round in 0..plan.rounds.min(3) {
                for subject in turned(round) {
                    let service = Service::start(host, subject, plan.observe)?;
                    let report = observe(host, machines, plan.observe)?;
                    service.map(|s| s.stop(host)).transpose()?;
                    let name = format!("{what}, {machines} machines, {subject}");
                    let share = number(&report, &report["any_stacked"])?;
                    stacked.push(&name, 100.0 * share);
                    let compared = number(&report, &report["total"]["compared"])?;
                    if compared > 0.0 {
                        far.push(
                            &name,
                            100.0 * number(&report, &report["total"]["far"])? / compared,
                        );
                    }
                    tracing::info!("round {round}: {name} observed");
                }
            }
            host.calm(0..machines)?;
        }
    }
    Ok([stacked, far])
}

fn number(report: &Value, value: &Value) -> anyhow::Result<f64> {
    value.as_f64().with_context(|| format!("{value} is no number in {report}"))
}

fn observe(host: &Host, machines: usize, time: Duration) -> anyhow::Result<Value> {
    let out = Command::new(program(SERVICE, SERVICE)?)
        .args(["observe", "--json", "--seconds", &time.as_secs_f64().to_string()])
        .args(host.pids(0..machines))
        .stdin(Stdio::null())
        .output()
        .context("start the observation")?;
    let why = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "the observation ended with {}: {}", out.status, why.trim());
    serde_json::from_slice(&out.stdout).context("read the observation")
}
