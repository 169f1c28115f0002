//! `sched load` and `sched top`, for whichever program offers them.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use godwit_sched::policy::{Alpha, Granularity, Policy};
use godwit_sched::scheduler::{CpuId, NICE_0, Scheduler};

use crate::{Config, Mode, Refusal, VmBy, check, default_slice, serve, top};

/// Where the loader answers unless it is told otherwise.
pub const SOCKET: &str = "/run/godwit/sched.sock";

/// What can be done with the kernel scheduler.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Schedule this machine with sibling vCPUs in mind, until SIGTERM, SIGINT or the end of this program
    Load(Load),
    /// Show what the scheduler that is loaded does
    Top(Top),
    /// Say whether this machine can have the scheduler, and if not, why
    Check,
    /// Measure what a decision costs on this machine; needs root, but no sched_ext
    Cost,
}

/// Arguments of `sched load`.
#[derive(Debug, Args)]
pub struct Load {
    /// What couples the vCPUs of a machine
    #[arg(long, value_enum, default_value = "adaptive")]
    pub mode: Mode,
    /// From which share of its queue on a distance is too far (of adaptive the largest)
    #[arg(long, value_name = "N/M", default_value = "2/3")]
    pub alpha: Alpha,
    /// How long a task runs before the next has its turn
    #[arg(long, value_name = "US", default_value_t = default_slice().as_micros() as u64)]
    pub slice_us: u64,
    /// How many slices a machine may owe, or be owed (one for each vCPU where it has more)
    #[arg(long, value_name = "SLICES", default_value_t = 4)]
    pub owe: u32,
    /// What a machine is: names, process:NAME, tgid:N,... or cgroup:/sys/fs/cgroup/PATH,...
    #[arg(long, value_name = "HOW", default_value = "names")]
    pub vm_by: VmBy,
    /// The kernel takes all tasks back when one is ready for so long and does not run
    #[arg(long, value_name = "S", default_value_t = 20)]
    pub watchdog: u64,
    /// Where `sched top` finds the loader
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    pub socket: PathBuf,
    /// Unload after this time
    #[arg(long, value_name = "S")]
    pub seconds: Option<u64>,
    /// End with what was counted as one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `sched top`.
#[derive(Debug, Args)]
pub struct Top {
    /// Where the loader answers
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    pub socket: PathBuf,
    /// Show it once, since the scheduler was loaded
    #[arg(long)]
    pub once: bool,
    /// One line of JSON each time
    #[arg(long)]
    pub json: bool,
    /// Between two looks
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub interval: f64,
}

/// Why a command ended, in the classes that exit codes are made of.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The arguments make no sense: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// This machine cannot have it now: exit code 5.
    #[error(transparent)]
    Refused(Refusal),
    /// No loader answers: exit code 4.
    #[error("no scheduler is loaded here: {0}")]
    NotLoaded(String),
    /// Anything else: exit code 1.
    #[error("{0}")]
    Failed(String),
}

impl Failure {
    /// The exit code that goes with it.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::NotLoaded(_) => 4,
            Self::Refused(_) => 5,
        }
    }
}

/// Runs a command to its end; blocks.
///
/// # Errors
///
/// [`Failure`], whose Display names the whole chain of causes.
pub fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Load(args) => load(&args),
        Command::Top(args) => show(&args),
        Command::Check => check().map_err(Failure::Refused),
        Command::Cost => cost(),
    }
}

fn load(args: &Load) -> Result<(), Failure> {
    let config = Config {
        mode: args.mode,
        alpha: args.alpha,
        slice: Duration::from_micros(args.slice_us),
        owe_slices: args.owe,
        vm_by: args.vm_by.clone(),
        watchdog: Duration::from_secs(args.watchdog),
    };
    config.validate().map_err(|error| Failure::Usage(error.to_string()))?;
    let lasting = args.seconds.map(Duration::from_secs);
    let served = serve::serve(&config, &args.socket, lasting, |_| {
        let _ = writeln!(io::stderr(), "sched: {} is loaded", config.mode);
    });
    let served = served.map_err(|error| match error {
        serve::ServeError::Load(crate::LoadError::Refused(refusal))
        | serve::ServeError::Dangerous(refusal) => Failure::Refused(refusal),
        serve::ServeError::Load(crate::LoadError::Config(error)) => {
            Failure::Usage(error.to_string())
        }
        other => Failure::Failed(chain(&other)),
    })?;
    let text = if args.json {
        serde_json::to_string(&served.snapshot).map_err(|e| Failure::Failed(e.to_string()))?
    } else {
        top::screen(None, &served.snapshot)
    };
    say(text.trim_end())
}

fn show(args: &Top) -> Result<(), Failure> {
    if !(0.1..=3600.0).contains(&args.interval) {
        return Err(Failure::Usage("--interval takes 0.1 to 3600 seconds".to_owned()));
    }
    let mut earlier = None;
    loop {
        let now = serve::ask(&args.socket).map_err(|error| Failure::NotLoaded(chain(&error)))?;
        if args.json {
            say(&serde_json::to_string(&now).map_err(|e| Failure::Failed(e.to_string()))?)?;
        } else {
            // Home, and what was there before is cleared.
            let home = if io::stdout().is_terminal() && !args.once { "\x1b[H\x1b[2J" } else { "" };
            say(&format!("{home}{}", top::screen(earlier.as_ref(), &now).trim_end()))?;
        }
        if args.once {
            return Ok(());
        }
        earlier = Some(now);
        std::thread::sleep(Duration::from_secs_f64(args.interval));
    }
}

/// One line for each size of the queues: of some rounds the least, the median and the most, of the
/// comparison in the kernel and of a whole decision in the library.
fn cost() -> Result<(), Failure> {
    const ROUNDS: usize = 9;
    const SIBLINGS: u32 = 3;
    const TURNS: u32 = 20_000;
    say("QUEUED  SIBLINGS  LEAST NS  MEDIAN NS  MOST NS  LIBRARY: LEAST NS  MEDIAN NS  MOST NS")?;
    for queued in [2, 8, 12, 24, 64, 128] {
        let kernel: Result<Vec<f64>, _> =
            (0..ROUNDS).map(|_| crate::decision_cost(queued, SIBLINGS, TURNS)).collect();
        let kernel = spread(kernel.map_err(|error| Failure::Failed(chain(&error)))?);
        let library = (0..ROUNDS).map(|_| library_cost(queued, SIBLINGS, TURNS)).collect();
        let [least, median, most] = kernel;
        let [l_least, l_median, l_most] = spread(library);
        say(&format!(
            "{queued:>6}  {SIBLINGS:>8}  {least:>8.0}  {median:>9.0}  {most:>7.0}  \
             {l_least:>17.0}  {l_median:>9.0}  {l_most:>7.0}"
        ))?;
    }
    Ok(())
}

/// The least, the median and the most.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    [at(0), at(values.len() / 2), at(values.len().saturating_sub(1))]
}

/// What charging a task and choosing the next costs in the library under Algorithm 1, nanoseconds,
/// with `queued` tasks on each of as many pCPUs as a machine has vCPUs.
fn library_cost(queued: u32, siblings: u32, turns: u32) -> f64 {
    let cpus = siblings + 1;
    let all = cpus as usize;
    let mut s = Scheduler::new(all, Policy::SBCO, Granularity::linux_2_6_34(all), 1);
    for _ in 0..queued {
        let vm = s.add_vm();
        for _ in 0..cpus {
            let task = s.add_task(Some(vm), NICE_0);
            s.wake(task);
        }
    }
    let mut decide = |turn: u32| {
        let cpu = CpuId(turn % cpus);
        s.charge(cpu, 3_000_000);
        std::hint::black_box(s.pick(cpu));
    };
    (0..queued * 8).for_each(&mut decide);
    let begun = Instant::now();
    (0..turns).for_each(&mut decide);
    begun.elapsed().as_nanos() as f64 / f64::from(turns)
}

fn say(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    written.map_err(|error| Failure::Failed(format!("writing to stdout: {error}")))
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
