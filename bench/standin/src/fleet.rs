//! Many stand-ins as processes on one machine: one that is measured and others that disturb it,
//! with the CPU time of each sampled as the thesis' kernel thread did (section 4.6, Fairness).
//!
//! A "machine" is a process here and its threads are the vCPUs. The sampler asks for a real-time
//! priority, so that no scheduler under test keeps it waiting; it says whether it got it.

use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::program::StandIn;

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The measured one; none: only the others are looked at.
    pub measured: Option<StandIn>,
    /// What the others run.
    pub others: StandIn,
    /// How many others.
    pub count: usize,
    /// Threads of each.
    pub threads: usize,
    /// How long the measured one runs, or the others are looked at.
    pub time: Duration,
    /// How long the others run before that.
    pub lead: Duration,
    /// Between two samples of CPU time.
    pub sample: Duration,
    /// The seed of the measured one; the others' follow it.
    pub seed: u64,
    /// Room in each queue of what is measured ([`crate::Config::queue`]).
    pub queue: usize,
    /// Whether what is measured sleeps now and then ([`crate::Config::halts`]).
    pub halts: bool,
    /// By how much the processor is slower than a real one ([`crate::Config::slower`]).
    pub slower: u32,
    /// Whether all threads are called as QEMU's vCPUs are.
    pub vcpu_names: bool,
    /// Whether they spin without the pause instruction.
    pub no_pause: bool,
}

/// What a fleet's run came to.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The measured one's own outcome.
    pub measured: Option<Value>,
    /// The others' outcomes.
    pub others: Vec<Value>,
    /// Whether the sampler ran with a real-time priority.
    pub sampler_realtime: bool,
    /// When each sample was taken, ms after the first.
    pub at_ms: Vec<f64>,
    /// CPU time in ms of each machine at each sample; the measured one, if any, is the first.
    pub cpu_ms: Vec<Vec<f64>>,
    /// Context switches of the whole system between first and last sample.
    pub switches: u64,
    /// Voluntary and involuntary context switches of each machine's threads in the same time.
    pub machine_switches: Vec<[u64; 2]>,
    /// CPUs that were online.
    pub cpus: usize,
}

/// A running stand-in, ended when dropped.
struct Member {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Drop for Member {
    fn drop(&mut self) {
        // It may have ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Member {
    fn start(
        program: &Path,
        what: StandIn,
        seed: u64,
        plan: &Plan,
        time: bool,
    ) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command
            .arg(what.name())
            .args([
                "--json",
                "--die-with-parent",
                &std::process::id().to_string(),
                "--threads",
                &plan.threads.to_string(),
                "--seed",
                &seed.to_string(),
                "--slower",
                &plan.slower.to_string(),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        if time {
            command.args(["--seconds", &plan.time.as_secs_f64().to_string()]);
            command.args(["--queue", &plan.queue.to_string()]);
            if plan.halts {
                command.arg("--halts");
            }
        } else {
            command.arg("--disturb");
        }
        if plan.vcpu_names {
            command.arg("--vcpu-names");
        }
        if plan.no_pause {
            command.arg("--no-pause");
        }
        let mut child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        let out = child.stdout.take().context("the stand-in's output")?;
        Ok(Self { child, out: BufReader::new(out) })
    }

    fn outcome(mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        (&mut self.out).take(1 << 20).read_line(&mut line).context("read a stand-in's outcome")?;
        let status = self.child.wait().context("wait for a stand-in")?;
        ensure!(status.success(), "a stand-in failed: {status}; it said {line:?}");
        serde_json::from_str(&line).with_context(|| format!("a stand-in said {line:?}"))
    }

    fn terminate(&self) -> anyhow::Result<()> {
        let pid = i32::try_from(self.child.id()).context("a process id")?;
        // SAFETY: no memory is involved. The process is our child and not waited for yet, so its
        // id is still its own.
        let sent = unsafe { libc::kill(pid, libc::SIGTERM) };
        ensure!(sent == 0, "SIGTERM: {}", std::io::Error::last_os_error());
        Ok(())
    }
}

/// Runs `plan`; `program` is this program. All members have ended when it returns.
///
/// # Errors
/// A member that cannot be started or fails; `stop` set meanwhile.
pub fn run(plan: &Plan, program: &Path, stop: &AtomicBool) -> anyhow::Result<Report> {
    ensure!(plan.measured.is_some() || plan.count > 0, "a fleet has at least one machine");
    ensure!(plan.count <= 1024, "a fleet has at most 1024 other machines, not {}", plan.count);
    ensure!(plan.sample >= Duration::from_millis(10), "samples are at least 10 ms apart");
    let sampler_realtime = realtime();
    let mut others = Vec::new();
    for i in 0..plan.count {
        let seed = plan.seed + 1 + i as u64;
        others.push(Member::start(program, plan.others, seed, plan, false)?);
    }
    pause(plan.lead, stop)?;
    let measured = match plan.measured {
        Some(what) => Some(Member::start(program, what, plan.seed, plan, true)?),
        None => None,
    };
    let members: Vec<&Member> = measured.iter().chain(&others).collect();
    let pids: Vec<u32> = members.iter().map(|m| m.child.id()).collect();
    let begun = Instant::now();
    let (mut at_ms, mut cpu_ms) = (Vec::new(), Vec::new());
    let (first, first_of) = (system_switches()?, switches_of(&pids));
    loop {
        let now = begun.elapsed();
        // One that has just ended cannot be asked any more; what it used is in its outcome.
        let Some(sample) = pids.iter().map(|p| cpu_time_ms(*p)).collect::<Option<Vec<f64>>>()
        else {
            break;
        };
        at_ms.push(now.as_secs_f64() * 1e3);
        cpu_ms.push(sample);
        let next = plan.sample * u32::try_from(at_ms.len()).unwrap_or(u32::MAX);
        if next > plan.time {
            break;
        }
        pause(next.saturating_sub(begun.elapsed()), stop)?;
    }
    let (last, last_of) = (system_switches()?, switches_of(&pids));
    let measured = measured.map(Member::outcome).transpose()?;
    for member in &others {
        member.terminate()?;
    }
    let others = others.into_iter().map(Member::outcome).collect::<anyhow::Result<Vec<_>>>()?;
    let machine_switches = first_of
        .iter()
        .zip(&last_of)
        .map(|(a, b)| [b[0].saturating_sub(a[0]), b[1].saturating_sub(a[1])])
        .collect();
    Ok(Report {
        measured,
        others,
        sampler_realtime,
        at_ms,
        cpu_ms,
        switches: last.saturating_sub(first),
        machine_switches,
        cpus: std::thread::available_parallelism().map_or(0, usize::from),
    })
}

/// Lets so much time pass, or fails as soon as `stop` is set.
fn pause(time: Duration, stop: &AtomicBool) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        ensure!(!stop.load(Ordering::Relaxed), "told to end");
        let left = time.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Ok(());
        }
        // A signal's handler only sets the flag, so this looks at it now and then.
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// Asks for the lowest real-time priority, which is above every ordinary task, for this process
/// and not for its children.
fn realtime() -> bool {
    let param = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the pointer is to a whole `sched_param` of ours.
    unsafe { libc::sched_setscheduler(0, policy, &raw const param) == 0 }
}

/// CPU time of all threads of a process, in ms; none when it is gone.
fn cpu_time_ms(pid: u32) -> Option<f64> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both pointers are to whole values of ours of the type that each call fills in.
    let found = unsafe {
        libc::clock_getcpuclockid(i32::try_from(pid).ok()?, &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut time) == 0
    };
    found.then(|| time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6)
}

fn system_switches() -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    stat.lines()
        .find_map(|l| l.strip_prefix("ctxt "))
        .and_then(|n| n.trim().parse().ok())
        .context("/proc/stat counts no context switches")
}

/// Voluntary and involuntary switches of the live threads of each process.
fn switches_of(pids: &[u32]) -> Vec<[u64; 2]> {
    let of = |pid: &u32| {
        let mut sum = [0; 2];
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return sum };
        for task in tasks.flatten() {
            let Ok(status) = std::fs::read_to_string(task.path().join("status")) else { continue };
            for line in status.lines() {
                let number = |key| line.strip_prefix(key)?.trim().parse::<u64>().ok();
                sum[0] += number("voluntary_ctxt_switches:").unwrap_or(0);
                sum[1] += number("nonvoluntary_ctxt_switches:").unwrap_or(0);
            }
        }
        sum
    };
    pids.iter().map(of).collect()
}
