//! `godwit-standin NAME` runs a stand-in; `godwit-standin fleet` runs many.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use godwit_standin::{Config, Outcome, StandIn, cc, dedup, fleet, run, spin};

/// Stand-ins for the workloads of the dissertation's chapter 4. None of them is the program that
/// it stands in for; each does work that can be checked, and waits by spinning at user level as a
/// guest's kernel would.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Stand-in for PARSEC dedup: a pipeline over bounded queues; work is passes over 1 MiB.
    Dedup(Run),
    /// Stand-in for PARSEC streamcluster: short phases, a spinning barrier after each; work is
    /// candidates.
    Streamcluster(Run),
    /// Stand-in for kernbench: jobs with a kernel's critical sections; work is jobs.
    Kernbench(Kernbench),
    /// Stand-in for SPECjbb2005: short locks and a world that stops; work is transactions.
    Specjbb(Run),
    /// Stand-in for SuperPI: digits of pi, each thread for itself; work is computations.
    Cpu(Run),
    /// The measurement of table 4.1 at user level: how long locks are held and waited for; work is
    /// critical sections.
    Locks(Run),
    /// Many stand-ins as processes: one measured, others that disturb it.
    Fleet(Fleet),
}

#[derive(Debug, Args)]
struct Run {
    /// Threads.
    #[arg(long, default_value_t = 4)]
    threads: usize,
    /// End after so many seconds.
    #[arg(long, value_parser = seconds)]
    seconds: Option<Duration>,
    /// End when so much is done [default: what takes some seconds, if no end is given].
    #[arg(long, conflicts_with = "disturb")]
    work: Option<u64>,
    /// Go on until SIGTERM.
    #[arg(long, conflicts_with = "seconds")]
    disturb: bool,
    /// What data and choices come from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Room in each of dedup's queues, in chunks.
    #[arg(long, default_value_t = dedup::QUEUE)]
    queue: usize,
    /// Have kernbench's threads run out of jobs now and then, and sleep.
    #[arg(long)]
    halts: bool,
    /// By how much this processor is slower than a real one: operations are so much smaller.
    #[arg(long, default_value_t = 1, value_name = "TIMES")]
    slower: u32,
    /// Time every lock.
    #[arg(long)]
    time_locks: bool,
    /// Call threads as QEMU calls its vCPUs.
    #[arg(long)]
    vcpu_names: bool,
    /// Spin without the pause instruction.
    #[arg(long)]
    no_pause: bool,
    /// Print the outcome as one line of JSON.
    #[arg(long)]
    json: bool,
    /// End when this process, which started this one, has ended.
    #[arg(long, hide = true, value_name = "PID")]
    die_with_parent: Option<i32>,
}

#[derive(Debug, Args)]
struct Kernbench {
    #[command(flatten)]
    run: Run,
    /// Build a real tree with cc, with as many compilers at once as there are threads; work is
    /// units of C.
    #[arg(long, conflicts_with_all = ["seconds", "disturb", "vcpu_names", "time_locks"])]
    cc: bool,
}

#[derive(Debug, Args)]
struct Fleet {
    /// What is measured [default: nothing; the others are looked at].
    #[arg(long, value_name = "NAME")]
    measured: Option<StandIn>,
    /// What the others run.
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    others: StandIn,
    /// How many others.
    #[arg(long, default_value_t = 3)]
    count: usize,
    /// Threads of each.
    #[arg(long, default_value_t = 4)]
    threads: usize,
    /// How long the measured one runs.
    #[arg(long, default_value = "10", value_parser = seconds)]
    seconds: Duration,
    /// How long the others run before it, in seconds.
    #[arg(long, default_value = "0.5", value_parser = seconds)]
    lead: Duration,
    /// Between two samples of CPU time, in seconds.
    #[arg(long, default_value = "1", value_parser = seconds)]
    sample: Duration,
    /// Seed of the measured one.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Room in each queue of a measured dedup, in chunks.
    #[arg(long, default_value_t = dedup::QUEUE)]
    queue: usize,
    /// Have the threads of a measured kernbench sleep now and then.
    #[arg(long)]
    halts: bool,
    /// By how much this processor is slower than a real one.
    #[arg(long, default_value_t = 1, value_name = "TIMES")]
    slower: u32,
    /// Call threads as QEMU calls its vCPUs.
    #[arg(long)]
    vcpu_names: bool,
    /// Spin without the pause instruction.
    #[arg(long)]
    no_pause: bool,
}

fn seconds(s: &str) -> Result<Duration, String> {
    let n: f64 = s.parse().map_err(|e| format!("{e}"))?;
    if !(0.0..=1e6).contains(&n) {
        return Err("give 0 to 1000000 seconds".to_owned());
    }
    Ok(Duration::from_secs_f64(n))
}

/// Some seconds' work for four threads on a machine of two cores.
const fn some_work(what: StandIn) -> u64 {
    match what {
        StandIn::Dedup => 1_000,
        StandIn::Streamcluster => 20_000,
        StandIn::Kernbench => 8_000,
        StandIn::Specjbb => 200_000,
        StandIn::Cpu => 10_000,
        StandIn::Locks => 500_000,
    }
}

impl Run {
    fn config(&self, stand_in: StandIn) -> Config {
        let endless = self.disturb || self.seconds.is_some();
        Config {
            stand_in,
            threads: self.threads,
            work: self.work.or_else(|| (!endless).then(|| some_work(stand_in))),
            time: self.seconds,
            seed: self.seed,
            queue: self.queue,
            halts: self.halts,
            slower: self.slower,
            time_locks: self.time_locks || stand_in == StandIn::Locks,
            vcpu_names: self.vcpu_names,
        }
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("write to stdout")
}

fn words(o: &Outcome) -> String {
    let hold = o.hold.as_ref().map_or_else(String::new, |h| {
        format!("; held for {:.3} us on average, at most {:.0} us", h.mean_ns / 1e3, h.max_ns / 1e3)
    });
    let wait = o.wait.as_ref().map_or_else(String::new, |w| {
        format!("; waited {:.3} us on average, at most {:.0} us", w.mean_ns / 1e3, w.max_ns / 1e3)
    });
    format!(
        "{} ({}): {} in {:.0} ms (one: {}), {} threads, {:?}; {} locks, {} waits, {} turns; \
         {} turns at barriers, {} at queues{hold}{wait}",
        o.standin.name(),
        o.stands_for,
        o.operations,
        o.elapsed_ms,
        o.operation,
        o.threads,
        o.ended,
        o.locks.passed,
        o.locks.waited,
        o.locks.spins,
        o.barriers.spins,
        o.queues.spins,
    )
}

fn work(cli: Cli) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("listen for signals")?;
    }
    let (stand_in, args) = match cli.what {
        What::Dedup(args) => (StandIn::Dedup, args),
        What::Streamcluster(args) => (StandIn::Streamcluster, args),
        What::Kernbench(Kernbench { run, cc: true }) => {
            let built = cc::build(run.work.unwrap_or(64), run.threads, run.seed, &stop)?;
            let line = serde_json::to_string(&built).context("write the outcome as JSON")?;
            return say(&line);
        }
        What::Kernbench(args) => (StandIn::Kernbench, args.run),
        What::Specjbb(args) => (StandIn::Specjbb, args),
        What::Cpu(args) => (StandIn::Cpu, args),
        What::Locks(args) => (StandIn::Locks, args),
        What::Fleet(f) => {
            let plan = fleet::Plan {
                measured: f.measured,
                others: f.others,
                count: f.count,
                threads: f.threads,
                time: f.seconds,
                lead: f.lead,
                sample: f.sample,
                seed: f.seed,
                queue: f.queue,
                halts: f.halts,
                slower: f.slower,
                vcpu_names: f.vcpu_names,
                no_pause: f.no_pause,
            };
            let me = std::env::current_exe().context("find this program")?;
            let report = fleet::run(&plan, &me, &stop)?;
            return say(&serde_json::to_string(&report).context("write the report as JSON")?);
        }
    };
    if let Some(parent) = args.die_with_parent {
        use rustix::process::{Signal, getppid, set_parent_process_death_signal};
        set_parent_process_death_signal(Some(Signal::TERM))
            .context("ask to die with the parent")?;
        // It may have died just before.
        let now = getppid().map_or(0, |p| p.as_raw_nonzero().get());
        anyhow::ensure!(now == parent, "process {parent}, which started this one, has ended");
    }
    spin::spin_without_pause(args.no_pause);
    let outcome = run(&args.config(stand_in), &stop)?;
    if args.json {
        say(&serde_json::to_string(&outcome).context("write the outcome as JSON")?)
    } else {
        say(&words(&outcome))
    }
}

fn main() -> ExitCode {
    match work(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // There is nowhere else to say it, should that fail too.
            let _ = writeln!(std::io::stderr(), "godwit-standin: {e:#}");
            ExitCode::FAILURE
        }
    }
}
