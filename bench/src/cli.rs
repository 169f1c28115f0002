//! The command line.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use godwit_bench::harness::{self, Results};
use godwit_bench::link::{Link, LinkSpec, Reply, Request, Side, control_path, request, serve};
use godwit_bench::suites::{self, Plan};
use godwit_types::Name;

/// Godwit's evaluation.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Emulate a WAN link between two network namespaces, or talk to a running emulator.
    Link(LinkArgs),
    /// Play the main job once, on a center and an AP that it starts, and show it.
    Demo(DemoArgs),
    /// Draw who ran where, who spun and who lent in a simulated host, as SVG.
    Timeline(suites::sched::Timeline),
    /// Cold boot, dock, activate and move an environment, beside stock QEMU.
    Mainjob(SuiteArgs),
    /// Fill in the figures of SPECIFICATION.md from the files of runs, and write them as tables.
    Spec(SpecArgs),
    /// Move freshly activated, idle machines to the AP and back, and count those that hang.
    IdleMoves(IdleMovesArgs),
    /// Activate many machines of one substrate at once.
    Burst(BurstArgs),
    /// Fill links that lose packets, with each congestion control.
    LinkRates(LinkRatesArgs),
    /// Fill a pool with substrates that differ, and activate each again.
    PoolFill(PoolFillArgs),
    /// Co-scheduling of sibling vCPUs: the dissertation's tables and figures in the simulator, and
    /// on real kernels where asked.
    Sched(SchedArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Few rounds.
    #[arg(long)]
    quick: bool,
    /// Directory for results.json, the plots and the report; made if need be.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of rounds.
    #[arg(long)]
    rounds: Option<usize>,
}

#[derive(Debug, Args)]
struct SchedArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Measure on real kernels too: in a guest's kernel with sched_ext, or the threads of QEMU
    /// machines on this host.
    #[arg(long, value_delimiter = ',', value_name = "WHERE")]
    real: Vec<Real>,
    /// Leave the simulator out.
    #[arg(long, requires = "real")]
    no_sim: bool,
    /// Run queue lengths of the real measurements, e.g. 8,12.
    #[arg(long, value_delimiter = ',', value_name = "N", requires = "real")]
    queues: Option<Vec<usize>>,
    /// Stand-ins that the real measurements run, e.g. dedup,streamcluster.
    #[arg(long, value_delimiter = ',', value_name = "NAME", requires = "real")]
    workloads: Option<Vec<String>>,
    /// Schedulers that are compared in the guest's kernel, e.g. sbco,eevdf,bal.
    #[arg(long, value_delimiter = ',', value_name = "MODE", requires = "real")]
    modes: Option<Vec<String>>,
    /// By how much the guest's CPUs are taken to be slower than real ones, for the size of an
    /// operation [default: what is measured]
    #[arg(long, requires = "real", value_name = "TIMES")]
    slower: Option<u32>,
    /// Let the guest's time be instructions of 2^N ns, so that it does not depend on what else this
    /// host does. Takes some ten times as long, with N = 0.
    #[arg(long, value_name = "N", requires = "real", value_parser = clap::value_parser!(u8).range(0..=10))]
    instructions: Option<u8>,
    /// How long fairness is watched in the guest in each round, in seconds; 0: not at all.
    #[arg(long, value_name = "N", requires = "real")]
    fairness: Option<u64>,
    /// How long run queues of the host's machines are observed for each of tables 4.2 and 4.3, in
    /// seconds; 0: not at all.
    #[arg(long, value_name = "N", requires = "real")]
    observe: Option<u64>,
    /// vCPUs of the guest whose kernel schedules.
    #[arg(long, requires = "real")]
    cpus: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Real {
    /// EEVDF and the modes of godwit-sched-ext in a guest.
    Kernel,
    /// This host's kernel with the user-space service and without, on QEMU machines.
    Host,
}

impl SchedArgs {
    fn measure(&self, results: &mut harness::Results) -> anyhow::Result<()> {
        let (quick, rounds) = (self.run.quick, self.run.rounds);
        if !self.no_sim {
            suites::sched::run(quick, rounds, results)?;
        }
        if self.real.contains(&Real::Kernel) {
            let mut plan = suites::sched::real::kernel::Plan::new(quick, rounds);
            plan.workloads = self.workloads.clone().unwrap_or(plan.workloads);
            plan.modes = self.modes.clone().unwrap_or(plan.modes);
            plan.queues = self.queues.clone().unwrap_or(plan.queues);
            plan.cpus = self.cpus.unwrap_or(plan.cpus);
            plan.fairness = self.fairness.map_or(plan.fairness, Duration::from_secs);
            plan.slower = self.slower;
            if let Some(shift) = self.instructions {
                plan.clock = godwit_lab::Clock::Instructions(shift);
            }
            suites::sched::real::kernel::run(&plan, results)?;
        }
        if self.real.contains(&Real::Host) {
            let mut plan = suites::sched::real::host::Plan::new(quick, rounds);
            plan.workloads = self.workloads.clone().unwrap_or(plan.workloads);
            plan.observe = self.observe.map_or(plan.observe, Duration::from_secs);
            suites::sched::real::host::run(&plan, results)?;
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
struct SuiteArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Guest image.
    #[arg(long, default_value = "tiny")]
    guest: Name,
    /// Directory of the image cache.
    #[arg(long, env = "GODWIT_IMAGES", default_value = "/var/cache/godwit/images")]
    images: PathBuf,
    /// Memory that a program in the guest keeps changing, in MiB; it is noise, so that much of every
    /// figure is its own.
    #[arg(long, default_value_t = 8)]
    witness_mib: u32,
    /// The same again for rows beside the main ones, e.g. 32.
    #[arg(long, value_delimiter = ',', value_name = "MIB")]
    witness_beside: Vec<u32>,
    /// Rate of the link each way in Mbit/s.
    #[arg(long, default_value_t = 100.0)]
    rate: f64,
    /// One-way delay of the link in ms.
    #[arg(long, default_value_t = 17.5)]
    delay: f64,
    /// Downtime for which stock QEMU may end its pre-copy, in ms [default: QEMU's, 300]; raise it for
    /// guests whose memory changes too fast for pre-copy to come to an end.
    #[arg(long)]
    stock_downtime_ms: Option<u64>,
}

#[derive(Debug, Args)]
struct DemoArgs {
    /// Guest image; built already.
    #[arg(long, default_value = "abiword")]
    guest: Name,
    /// Rate of the link each way in Mbit/s.
    #[arg(long, default_value_t = 100.0)]
    rate: f64,
    /// One-way delay of the link in ms.
    #[arg(long, default_value_t = 17.5)]
    delay: f64,
    /// Memory that a program in the guest keeps changing, in MiB; it is noise, so that much of every
    /// figure is its own.
    #[arg(long, default_value_t = 8)]
    witness_mib: u32,
    /// Directory for report.json and the pictures.
    #[arg(long, default_value = "target/demo", value_name = "DIR")]
    out: PathBuf,
    /// The godwit program [default: beside this one].
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

impl DemoArgs {
    fn play(self) -> anyhow::Result<()> {
        let program = program_or_sibling(self.program)?;
        let demo = godwit_bench::demo::Demo {
            guest: self.guest,
            rate_mbit: self.rate,
            delay_ms: self.delay,
            witness_mib: self.witness_mib,
            out: self.out,
            program,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(godwit_bench::demo::play(&demo))
    }
}

#[derive(Debug, Args)]
struct IdleMovesArgs {
    /// Moves in all.
    #[arg(long, default_value_t = 1000)]
    count: usize,
    /// Guest image; built already.
    #[arg(long, default_value = "tiny")]
    guest: Name,
    /// Rate of the link each way in Mbit/s.
    #[arg(long, default_value_t = 1000.0)]
    rate: f64,
    /// One-way delay of the link in ms.
    #[arg(long, default_value_t = 0.1)]
    delay: f64,
    /// Both sites on this host's loopback, without a link.
    #[arg(long, conflicts_with_all = ["rate", "delay"])]
    loopback: bool,
    /// How long a machine is left alone before each move, in ms.
    #[arg(long, default_value_t = 1000)]
    idle_ms: u64,
    /// A move without an answer for this many seconds is a hang.
    #[arg(long, default_value_t = 120)]
    limit_s: u64,
    /// The AP holds the substrate, too.
    #[arg(long)]
    held: bool,
    /// Directory for results.json and the report; made if need be.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The godwit program [default: beside this one].
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct BurstArgs {
    /// Activations at once.
    #[arg(long, default_value_t = 64)]
    count: usize,
    /// Guest image; built already.
    #[arg(long, default_value = "tiny")]
    guest: Name,
    /// Directory for results.json and the report; made if need be.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The godwit program [default: beside this one].
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct PoolFillArgs {
    /// What the pool's packs are to hold, in GB (10^9 bytes).
    #[arg(long, default_value_t = 8.0)]
    packs_gb: f64,
    /// Memory for substrates that no machine runs from, in MiB of tmpfs.
    #[arg(long, default_value_t = 1024)]
    memory_budget: u64,
    /// Noise that each has in its memory and nobody else, in MiB.
    #[arg(long, default_value_t = 16)]
    own_mib: u32,
    /// Begin no substrate after so many minutes.
    #[arg(long, default_value_t = 120)]
    minutes: u64,
    /// Activate so many: the first, the last, and others by chance [default: all]
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..))]
    sample: Option<u32>,
    /// Substrates made, and activated, side by side.
    #[arg(long, default_value_t = 2)]
    side_by_side: usize,
    /// Guest image; built already.
    #[arg(long, default_value = "tiny")]
    guest: Name,
    /// Directory for results.json and the report; made if need be.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The godwit program [default: beside this one].
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct SpecArgs {
    /// The figures; changed when something is taken.
    #[arg(default_value = "docs/figures.json", value_name = "FILE")]
    figures: PathBuf,
    /// Take figures from every results.json and report.json below this folder, later ones by name
    /// over earlier ones.
    #[arg(long, value_name = "DIR")]
    take: Vec<PathBuf>,
    /// Where the tables go: between the marks of a page that has them, or a file of their own
    /// [default: stdout]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl SpecArgs {
    fn run(self) -> anyhow::Result<()> {
        let mut all = harness::figures::Figures::read(&self.figures)?;
        for dir in &self.take {
            for (path, run) in harness::figures::runs_below(dir)? {
                let taken = all.take(&run);
                tracing::info!("{taken} figures from {}", path.display());
            }
        }
        let page = all.markdown()?;
        let put = |path: &std::path::Path, text: &str| {
            std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
        };
        if !self.take.is_empty() {
            put(&self.figures, &all.json()?)?;
        }
        match &self.out {
            Some(path) => {
                let there = std::fs::read_to_string(path).unwrap_or_default();
                put(path, &harness::figures::within(&there, &page).unwrap_or(page))
            }
            None => std::io::stdout().write_all(page.as_bytes()).context("write to stdout"),
        }
    }
}

fn program_or_sibling(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    given.map_or_else(suites::mainjob::godwit::program, Ok)
}

impl IdleMovesArgs {
    fn run(self) -> anyhow::Result<()> {
        let trial = suites::trials::IdleMoves {
            count: self.count,
            guest: self.guest,
            link: (!self.loopback).then_some((self.rate, self.delay)),
            idle: Duration::from_millis(self.idle_ms),
            limit: Duration::from_secs(self.limit_s),
            held: self.held,
            program: program_or_sibling(self.program)?,
        };
        let mut bad = 0;
        suite("idle-moves", false, &self.out, async |r| {
            bad = suites::trials::idle_moves(&trial, r).await?;
            Ok(())
        })?;
        anyhow::ensure!(bad == 0, "{bad} of {} moves hung or failed", trial.count);
        Ok(())
    }
}

impl PoolFillArgs {
    fn run(self) -> anyhow::Result<()> {
        let trial = suites::trials::PoolFill {
            packs_bytes: (self.packs_gb * 1e9) as u64,
            own_mib: self.own_mib,
            budget_bytes: self.memory_budget << 20,
            fill_within: Duration::from_secs(self.minutes * 60),
            activate: self.sample.map(|n| n as usize),
            side_by_side: self.side_by_side,
            guest: self.guest,
            program: program_or_sibling(self.program)?,
        };
        let mut failed = 0;
        suite("pool-fill", false, &self.out, async |r| {
            failed = suites::trials::pool_fill(&trial, r).await?;
            Ok(())
        })?;
        anyhow::ensure!(failed == 0, "{failed} substrates were not made or not activated");
        Ok(())
    }
}

#[derive(Debug, Args)]
struct LinkRatesArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Rate of the link each way in Mbit/s.
    #[arg(long, default_value_t = 100.0)]
    rate: f64,
    /// One-way delay of the link in ms.
    #[arg(long, default_value_t = 17.5)]
    delay: f64,
    /// Shares of packets that are lost, each way.
    #[arg(long, value_delimiter = ',', default_values_t = [0.0, 0.01, 0.05])]
    loss: Vec<f64>,
    /// How long each is measured, in seconds.
    #[arg(long, default_value_t = 8)]
    seconds: u64,
}

impl LinkRatesArgs {
    fn run(self) -> anyhow::Result<()> {
        let trial = suites::trials::LinkRates {
            rate_mbit: self.rate,
            delay_ms: self.delay,
            losses: self.loss,
            time: std::time::Duration::from_secs(self.seconds),
            rounds: self.run.rounds.unwrap_or(if self.run.quick { 1 } else { 3 }),
        };
        suite("link-rates", self.run.quick, &self.run.out, async |r| {
            suites::trials::link_rates(&trial, r).await
        })
    }
}

impl BurstArgs {
    fn run(self) -> anyhow::Result<()> {
        let program = program_or_sibling(self.program)?;
        let trial = suites::trials::Burst { count: self.count, guest: self.guest, program };
        let mut failed = 0;
        suite("burst", false, &self.out, async |r| {
            failed = suites::trials::burst(&trial, r).await?;
            Ok(())
        })?;
        anyhow::ensure!(failed == 0, "{failed} of {} activations failed", trial.count);
        Ok(())
    }
}

#[derive(Debug, Args)]
struct LinkArgs {
    #[command(flatten)]
    action: LinkAction,
    /// Name of the link; its namespaces are gw-NAME-a and gw-NAME-b.
    #[arg(long, default_value = "demo")]
    name: Name,
    /// Rate each way in Mbit/s [default: 100].
    #[arg(long)]
    rate: Option<f64>,
    /// One-way delay in ms [default: 17.5].
    #[arg(long)]
    delay: Option<f64>,
    /// Up to this many ms are added to the delay [default: 0].
    #[arg(long)]
    jitter: Option<f64>,
    /// Share of packets lost by chance, 0 to 1 [default: 0].
    #[arg(long)]
    loss: Option<f64>,
    /// Room in the queue, in ms at the full rate [default: 50].
    #[arg(long)]
    queue: Option<f64>,
    /// What loss and jitter are drawn from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct LinkAction {
    /// Bring the link up; it stays until SIGTERM or SIGINT.
    #[arg(long)]
    up: bool,
    /// Show the running link and its counters.
    #[arg(long)]
    status: bool,
    /// Cut the running link for this many seconds; 0: until --restore.
    #[arg(long, value_name = "SECONDS")]
    cut: Option<f64>,
    /// End a cut.
    #[arg(long)]
    restore: bool,
    /// Change the running link in both directions to the figures given; others stay.
    #[arg(long)]
    set: bool,
}

pub(crate) fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .init();
    let cli = Cli::parse();
    let done = match cli.what {
        What::Link(args) => link(&args),
        What::Demo(args) => args.play(),
        What::Timeline(args) => args.draw(),
        What::Mainjob(args) => {
            let plan = args.plan();
            let measure = async |r: &mut Results| suites::mainjob::run(&plan, r).await;
            suite("mainjob", args.run.quick, &args.run.out, measure)
        }
        What::Spec(args) => args.run(),
        What::IdleMoves(args) => args.run(),
        What::Burst(args) => args.run(),
        What::LinkRates(args) => args.run(),
        What::PoolFill(args) => args.run(),
        What::Sched(args) => {
            suite("sched", args.run.quick, &args.run.out, async |r| args.measure(r))
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

impl SuiteArgs {
    fn plan(&self) -> Plan {
        Plan {
            quick: self.run.quick,
            rounds: self.run.rounds,
            images: self.images.clone(),
            guest: self.guest.clone(),
            witness_mib: self.witness_mib,
            witness_beside: self.witness_beside.clone(),
            stock_downtime_ms: self.stock_downtime_ms,
            rate_mbit: self.rate,
            delay_ms: self.delay,
        }
    }
}

fn suite(
    name: &str,
    quick: bool,
    out: &std::path::Path,
    measure: impl AsyncFnOnce(&mut Results) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let results = runtime.block_on(suites::run(name, quick, measure))?;
    harness::write(&results, out)?;
    writeln!(std::io::stdout(), "{}", out.join("report.md").display()).context("write to stdout")
}

fn show(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value).context("write the answer as JSON")?;
    writeln!(std::io::stdout(), "{text}").context("write to stdout")
}

impl LinkArgs {
    fn apply(&self, lane: &mut godwit_bench::link::LaneSpec) {
        let set = |to: &mut f64, from: Option<f64>| *to = from.unwrap_or(*to);
        set(&mut lane.rate_mbit, self.rate);
        set(&mut lane.delay_ms, self.delay);
        set(&mut lane.jitter_ms, self.jitter);
        set(&mut lane.loss, self.loss);
        set(&mut lane.queue_ms, self.queue);
    }
}

fn link(args: &LinkArgs) -> anyhow::Result<()> {
    let path = control_path(&args.name);
    let ask = |r: &Request| -> anyhow::Result<Reply> {
        match request(&path, r)? {
            Reply::Refused { why } => anyhow::bail!("the emulator refused: {why}"),
            state => Ok(state),
        }
    };
    let action = &args.action;
    if action.up {
        let mut spec = LinkSpec::new(args.name.clone(), 100.0, 17.5).both(|l| args.apply(l));
        spec.seed = args.seed;
        return up(spec, path);
    }
    let reply = if let Some(seconds) = action.cut {
        let for_ms = (seconds > 0.0).then_some((seconds * 1e3) as u64);
        ask(&Request::Cut { for_ms })?
    } else if action.restore {
        ask(&Request::Restore)?
    } else if action.set {
        let Reply::State { a_to_b, b_to_a, .. } = ask(&Request::Status)? else {
            anyhow::bail!("the emulator gave no state");
        };
        let change = |mut lane| {
            args.apply(&mut lane);
            lane
        };
        ask(&Request::Set { from: Side::A, lane: change(a_to_b) })?;
        ask(&Request::Set { from: Side::B, lane: change(b_to_a) })?
    } else {
        ask(&Request::Status)?
    };
    show(&reply)
}

fn up(spec: LinkSpec, socket: PathBuf) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut int = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let link = Arc::new(Link::create(spec)?);
        tracing::info!(
            "link up: {} ({}) and {} ({})",
            link.ns_a(),
            link.addr_a(),
            link.ns_b(),
            link.addr_b()
        );
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            failed = serve(Arc::clone(&link), &socket) => failed?,
        }
        // The socket may have been replaced by nobody else: the name is locked while we are up.
        let _ = std::fs::remove_file(&socket);
        show(&link.counters())
    })
}
