//! The main job: an environment that starts in an instant and moves while it works, beside cold
//! boot and stock QEMU on the same emulated link in the same run.

pub mod godwit;
pub mod stock;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use godwit_qemu::{Accel, Binaries, Start, accel};
use godwit_types::Name;

use super::{Guest, Plan, Witness, first_answer};
use crate::demo::world::{AP, Between, CENTER, World};
use crate::harness::{Better, Experiment, LinkInfo, Results};
use crate::link::{Link, LinkHandle, LinkSpec, Side};
use crate::prober::{Prober, Signs};
use godwit::{GodwitCli, GodwitRound, SeenMove};
use stock::StockReport;

/// Longest time for one move or one boot.
const WITHIN: Duration = Duration::from_secs(300);
const GODWIT: &str = "godwit";
const STOCK: &str = "stock";

/// What one round with stock QEMU found.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct StockRound {
    /// From the request to the guest agent's first answer.
    pub cold_boot_ms: f64,
    /// The move from A to B.
    #[serde(rename = "move")]
    pub moved: StockReport,
    /// What somebody outside saw of the guest during the move.
    pub signs: Signs,
    /// What of the memory that moved is the witness's own noise, at most.
    pub witness_bytes: u64,
    /// Whether memory and file were found whole at the destination.
    pub intact: bool,
}

/// Where Godwit's sites are, for [`run_with`].
#[derive(Debug, Clone)]
pub struct Sites {
    /// How to give commands.
    pub cli: GodwitCli,
    /// Name of the site in the link's namespace A.
    pub center: String,
    /// Name of the site in the link's namespace B.
    pub ap: String,
    /// Where either site has the sockets and logs of its machines.
    pub runs: Vec<PathBuf>,
}

/// The suite.
///
/// # Errors
/// When the guest image is missing or the link cannot be made.
pub async fn run(plan: &Plan, results: &mut Results) -> anyhow::Result<()> {
    let program = godwit::program()?;
    let between = Between::Link { rate_mbit: plan.rate_mbit, delay_ms: plan.delay_ms };
    let world = World::start(&program, between).await?;
    let runs = world.run_dirs().to_vec();
    let sites = Sites { cli: world.cli(), center: CENTER.into(), ap: AP.into(), runs };
    run_with(plan, world.link()?, Some(&sites), results).await
}

/// The suite without Godwit's side.
///
/// # Errors
/// As [`run`].
pub async fn run_stock(plan: &Plan, results: &mut Results) -> anyhow::Result<()> {
    let name = Name::new(&format!("mainjob-{}", std::process::id()))?;
    let link = Link::create(LinkSpec::new(name, plan.rate_mbit, plan.delay_ms))?;
    run_with(plan, &link, None, results).await
}

/// As [`run`], with Godwit's sites up at both ends of `link`. Each round measures every subject
/// once, so that a slow minute of the machine hits all of them.
///
/// # Errors
/// When the guest image is missing, or no round of any subject succeeds.
pub async fn run_with(
    plan: &Plan,
    link: &LinkHandle,
    sites: Option<&Sites>,
    results: &mut Results,
) -> anyhow::Result<()> {
    let guest = Guest::load(&plan.images, &plan.guest)?;
    results.guest = Some(guest.image.name.to_string());
    results.link = Some(LinkInfo::from(link.spec()));
    results.notes.push(format!(
        "The link is emulated between two network namespaces of one machine; in both guests a \
         program keeps {} MiB of memory changing and appends to a file.",
        plan.witness_mib
    ));
    if let Some(ms) = plan.stock_downtime_ms {
        results.notes.push(format!("Stock QEMU may end its pre-copy for a downtime of {ms} ms."));
    }
    let rounds = plan.rounds.unwrap_or(if plan.quick { 1 } else { 5 });
    let mut sheet = Sheet::new();
    let mut done = 0;
    let sizes: Vec<u32> = [plan.witness_mib].iter().chain(&plan.witness_beside).copied().collect();
    for (n, mib) in (0..rounds).flat_map(|_| &sizes).enumerate() {
        let round = n / sizes.len();
        let called = |subject: &str| match n % sizes.len() {
            0 => subject.to_owned(),
            _ => format!("{subject}, witness {mib} MiB"),
        };
        if let Some(s) = sites {
            let image = guest.image.name.as_str();
            match godwit::round(s, link, image, *mib, n, WITHIN).await {
                Ok(r) => {
                    sheet.godwit(&called(GODWIT), &r);
                    keep(results, &called(GODWIT), &r)?;
                    done += 1;
                }
                Err(e) => results.notes.push(format!("Round {round} with Godwit failed: {e:#}")),
            }
        }
        match stock_round(plan, &guest, link, *mib, results).await {
            Ok(r) => {
                if !r.intact {
                    results.notes.push(format!("Round {round} with stock QEMU LOST DATA."));
                }
                sheet.stock(&called(STOCK), &r);
                keep(results, &called(STOCK), &r)?;
                done += 1;
            }
            Err(e) => results.notes.push(format!("Round {round} with stock QEMU failed: {e:#}")),
        }
    }
    anyhow::ensure!(done > 0, "no round succeeded: {}", results.notes.join(" "));
    results.experiments = sheet.finish(guest.image.display);
    Ok(())
}

fn keep(results: &mut Results, subject: &str, round: &impl serde::Serialize) -> anyhow::Result<()> {
    let value = serde_json::to_value(round).context("write a round's report as JSON")?;
    results.reports.entry(subject.to_owned()).or_default().push(value);
    Ok(())
}

/// One round with stock QEMU: cold boot in namespace A, the witness at work, the move to B, and
/// the proof that nothing was lost.
///
/// # Errors
/// The first step that fails; both machines are ended all the same.
pub async fn stock_round(
    plan: &Plan,
    guest: &Guest,
    link: &LinkHandle,
    witness_mib: u32,
    results: &mut Results,
) -> anyhow::Result<StockRound> {
    // Memory files want tmpfs, and sockets short paths.
    let dir = tempfile::Builder::new()
        .prefix("gwb")
        .tempdir_in("/dev/shm")
        .context("make a directory")?;
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    for d in [&a, &b] {
        std::fs::create_dir(d).with_context(|| format!("make {}", d.display()))?;
    }
    let accel = accelerator(guest).await?;
    results.accel = Some(accel.name().to_owned());
    let start = async |dir: &Path, name: &str, start| -> anyhow::Result<_> {
        let mut launch = guest.launch(dir, Name::new(name)?).await?;
        launch.start = start;
        launch.accel = accel;
        Ok(launch)
    };
    let asked = Instant::now();
    let source = link.within(Side::A, start(&a, "stock-a", Start::Boot).await?.spawn())?.await??;
    let outcome = async {
        first_answer(&source, WITHIN).await?;
        let cold_boot_ms = asked.elapsed().as_secs_f64() * 1e3;
        Witness::start(&source, witness_mib, WITHIN).await?;
        let waiting = start(&b, "stock-b", Start::Incoming).await?;
        let there = link.within(Side::B, waiting.spawn())?.await??;
        let moved = async {
            Witness::status(&source, true).await?;
            let watched = Instant::now();
            let logs = [&source, &there].map(|m| m.launch().run_dir.join("console.log"));
            let prober = Prober::start(&logs.each_ref().map(PathBuf::as_path)).await?;
            let moved =
                stock::migrate(link, &source, &there, plan.stock_downtime_ms, WITHIN).await?;
            let signs = prober.stop().await?;
            let watched = watched.elapsed();
            source.quit().await?;
            let witness = Witness::status(&there, false).await?;
            let witness_bytes =
                witness.share(watched, moved.report.until_stop(), moved.bitmap_syncs + 1);
            let lines = Witness::check_file(&there).await?;
            anyhow::Ok(StockRound {
                cold_boot_ms,
                moved,
                signs,
                witness_bytes,
                intact: witness.memory_ok && lines >= witness.lines,
            })
        }
        .await;
        there.kill().await;
        moved
    }
    .await;
    source.kill().await;
    outcome
}

/// The accelerator that boots this guest here.
async fn accelerator(guest: &Guest) -> anyhow::Result<Accel> {
    let arch = guest.image.arch;
    let cache = Path::new("/var/cache/godwit").join(format!("accel-{arch}.json"));
    let probe = accel::probe(Binaries::default().of(arch), arch, &cache).await?;
    Ok(probe.accel)
}

/// The experiments of this suite, filled round by round.
#[derive(Debug)]
struct Sheet {
    cold_boot: Experiment,
    dock: Experiment,
    dock_pause: Experiment,
    running: Experiment,
    first_answer: Experiment,
    switch: Experiment,
    downtime: Experiment,
    stall: Experiment,
    program_stall: Experiment,
    pings_lost: Experiment,
    total: Experiment,
    link_bytes: Experiment,
    witness: Experiment,
}

impl Sheet {
    fn new() -> Self {
        let ms = |name, about| Experiment::new(name, about, "ms", Better::Lower);
        Self {
            cold_boot: ms(
                "cold-boot",
                "From the request to the guest's first answer, from power-on.",
            ),
            dock: ms("dock", "From the request to the substrate's being in the pool."),
            dock_pause: ms("dock-pause", "How long the vCPUs stood still while docking."),
            running: ms("activate", "From the request to running vCPUs."),
            first_answer: ms(
                "first-answer",
                "From the request to the guest's first answer: activation beside cold boot.",
            ),
            switch: ms("switch", "Switch time: from the request to RESUME at the destination."),
            downtime: ms(
                "downtime",
                "STOP at the source to RESUME at the destination, by QEMU's own event time stamps.",
            ),
            stall: ms(
                "longest-stall",
                "Longest time without a sign of life of the guest during the move, as somebody outside sees it by the host's clock, downtime included.",
            ),
            program_stall: ms(
                "program-stall",
                "The same of the program that changes memory and appends to its file.",
            ),
            pings_lost: Experiment::new(
                "pings-lost",
                "Pings at ten a second during the move that no sign of life answered before the next; there is no network to the guest, and a sign on its serial console is the answer.",
                "pings",
                Better::Lower,
            ),
            total: ms("total", "From the request to independence of the source."),
            link_bytes: Experiment::new(
                "link-bytes",
                "What both ends put on the link during the move, headers and acknowledgements included.",
                "MB",
                Better::Lower,
            ),
            witness: Experiment::new(
                "witness-share",
                "What of the memory that moved is the noise of the program that measures, at most.",
                "MB",
                Better::Lower,
            ),
        }
    }

    fn godwit(&mut self, subject: &str, r: &GodwitRound) {
        self.cold_boot.push(subject, r.cold_boot_ms);
        self.dock.push(subject, r.dock.total_ms);
        self.dock_pause.push(subject, r.dock.pause_ms);
        self.running.push(subject, r.activate.running_ms);
        if let Some(ms) = r.activate.first_answer_ms {
            self.first_answer.push(subject, ms);
            self.first_answer.push("cold boot", r.cold_boot_ms);
        }
        // The move from A to B is the one that stock makes too.
        self.moved(subject, &r.there);
        self.moved(&format!("{subject}, the way back"), &r.back);
        self.moved(&format!("{subject}, substrate at both"), &r.held);
    }

    fn moved(&mut self, subject: &str, m: &SeenMove) {
        self.switch.push(subject, m.report.switch_ms);
        self.downtime.push(subject, m.report.downtime_ms);
        self.total.push(subject, m.report.total_ms);
        self.seen(subject, &m.signs, m.link_bytes, m.witness_bytes);
    }

    fn stock(&mut self, subject: &str, r: &StockRound) {
        let m = &r.moved.report;
        self.cold_boot.push(subject, r.cold_boot_ms);
        self.switch.push(subject, m.switch_ms);
        self.downtime.push(subject, m.downtime_ms);
        self.total.push(subject, m.total_ms);
        self.seen(subject, &r.signs, r.moved.wire_bytes, r.witness_bytes);
    }

    fn seen(&mut self, subject: &str, signs: &Signs, link_bytes: u64, witness_bytes: u64) {
        self.stall.push(subject, signs.longest_stall_ms);
        self.program_stall.push(subject, signs.program_stall_ms);
        self.pings_lost.push(subject, signs.pings_lost as f64);
        self.link_bytes.push(subject, link_bytes as f64 / 1e6);
        self.witness.push(subject, witness_bytes as f64 / 1e6);
    }

    /// `desktop`: whether the guest has a display; it may take longer to start.
    fn finish(mut self, desktop: bool) -> Vec<Experiment> {
        self.downtime.target(GODWIT, 150.0);
        self.running.target(GODWIT, if desktop { 400.0 } else { 150.0 });
        if !desktop {
            self.dock.target(GODWIT, 500.0);
        }
        vec![
            self.cold_boot,
            self.dock,
            self.dock_pause,
            self.running,
            self.first_answer,
            self.switch,
            self.downtime,
            self.stall,
            self.program_stall,
            self.pings_lost,
            self.total,
            self.link_bytes,
            self.witness,
        ]
    }
}
