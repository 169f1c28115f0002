//! `make demo`: the main scenario, run on real machines over an emulated link, and measured.
//!
//! ```text
//! cold boot -> dock -> activate -> type, witness -> move to the AP -> and back -> AP removed
//!                         \-> four more at once, each with an identity of its own
//! ```
//!
//! Everything goes through the `godwit` command, as a user would do it.

mod display;
mod film;
mod glyph;
pub(crate) mod guest;
pub(crate) mod report;
pub(crate) mod world;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use godwit_types::{ActivateReport, DockReport, MoveReport, Name};
use serde_json::Value;

use display::Display;
use film::{ALONE, Typist};
use glyph::Glyph;
use guest::{Screen, Witness};
use report::{Activation, Clones, Intact, Link, Move, Report};
use world::{AP, Between, CENTER, World};

use crate::harness::git_revision;
use crate::prober::Prober;
use crate::suites;
use crate::suites::mainjob::godwit::PASSES;

/// How long one command may take; a desktop boots slowly under emulation.
const PATIENCE: Duration = Duration::from_secs(570);

/// How long a desktop that boots may take to show a letter that is typed.
const LETTER_WITHIN: Duration = Duration::from_secs(300);

/// Environments that are activated at once.
const CLONES: usize = 4;

/// What the demo is to do.
#[derive(Debug, Clone)]
pub struct Demo {
    /// Guest image; built already.
    pub guest: Name,
    /// Rate of the link each way in Mbit/s.
    pub rate_mbit: f64,
    /// One-way delay in ms.
    pub delay_ms: f64,
    /// Memory that the witness keeps changing, in MiB.
    pub witness_mib: u32,
    /// Where the report and the pictures go.
    pub out: PathBuf,
    /// The `godwit` program.
    pub program: PathBuf,
}

/// Runs the main scenario and writes `report.json` and the pictures.
///
/// # Errors
/// The first thing that does not work, in words. What was started is ended either way.
pub async fn play(demo: &Demo) -> anyhow::Result<()> {
    std::fs::create_dir_all(&demo.out).with_context(|| format!("make {}", demo.out.display()))?;
    let between = Between::Link { rate_mbit: demo.rate_mbit, delay_ms: demo.delay_ms };
    let world = World::start(&demo.program, between).await?;
    let played = scenes(demo, &world).await;
    if let Err(e) = &played {
        world.keep_logs(&demo.out);
        report::say(&format!("the demo stopped: {e:#}"))?;
    }
    let report = played?;
    report.write(&demo.out)?;
    report.show(&demo.out)
}

async fn scenes(demo: &Demo, world: &World) -> anyhow::Result<Report> {
    let image = world.image(&demo.guest).await?;
    let display = image["display"] == true;

    report::say(&format!("cold boot of {} at the center", demo.guest))?;
    let began = Instant::now();
    world
        .ask::<Value>(
            &["vm", "create", "--image", demo.guest.as_str(), "--name", "first", "--site", CENTER],
            PATIENCE,
        )
        .await?;
    let answered_ms = ms(began);
    let (cold_boot_ms, glyph) = match display {
        true => match first_letter(world, "first").await {
            Ok((seen, glyph)) => (seen.duration_since(began).as_secs_f64() * 1e3, Some(glyph)),
            Err(e) => {
                report::say(&format!("keys on the screen are not measured: {e:#}"))?;
                Screen::settled(world, "first", PATIENCE).await?;
                (answered_ms, None)
            }
        },
        false => (answered_ms, None),
    };

    report::say("dock: the machine becomes a substrate")?;
    let witness = Witness::start(world, "first", demo.witness_mib).await?;
    let dock: DockReport = world.ask(&["vm", "dock", "first", "--name", "demo"], PATIENCE).await?;
    let substrate: Value = world.ask(&["substrate", "get", "demo"], PATIENCE).await?;
    report::say(&format!(
        "substrate demo: raw {}, stored {}",
        godwit_types::human_bytes(substrate["raw_bytes"].as_u64().unwrap_or_default()),
        godwit_types::human_bytes(substrate["stored_bytes"].as_u64().unwrap_or_default()),
    ))?;

    report::say("activate it")?;
    let began = Instant::now();
    let activate: ActivateReport = world
        .ask(&["vm", "activate", "demo", "--name", "report", "--site", CENTER], PATIENCE)
        .await?;
    let screen_ms = match &glyph {
        Some(glyph) => match one_letter(world, "report", glyph).await {
            Ok(seen) => Some(seen.duration_since(began).as_secs_f64() * 1e3),
            Err(e) => {
                report::say(&format!("a key on the screen is not measured: {e:#}"))?;
                None
            }
        },
        None => None,
    };
    let warm_running_ms = warm_activation(world).await?;
    let activation = Activation {
        running_ms: activate.running_ms,
        warm_running_ms: Some(warm_running_ms),
        first_answer_ms: activate.first_answer_ms,
        screen_ms,
        faster_than_cold_boot: screen_ms.map(|ms| cold_boot_ms / ms),
    };

    let typed = match display {
        true => Some(Typed::type_in(world).await?),
        false => None,
    };
    if let Some(t) = &typed {
        t.before.save(&demo.out.join("before.png"))?;
    }

    let mut moves = Vec::new();
    for (from, to) in [(CENTER, AP), (AP, CENTER)] {
        report::say(&format!("move it live from {from} to {to}"))?;
        moves.push(move_once(world, &witness, "report", (from, to)).await?);
    }
    if display {
        report::say("type while it moves once more, for the moving picture")?;
        if let Err(e) = moving_picture(demo, world, &witness).await {
            report::say(&format!("no moving picture: {e:#}"))?;
        }
    }

    report::say("the AP is stopped and what it kept is removed")?;
    world.remove_ap().await?;
    let (memory, lines) = witness.check(world, "report").await?;
    let text = match &typed {
        Some(t) => {
            let after = Screen::take(world, "report").await?;
            after.save(&demo.out.join("after.png"))?;
            Some(t.before.same_text(&after))
        }
        None => None,
    };
    let still = witness.grows(world, "report").await?;
    let intact = Intact { memory, disk: lines > 0, lines, text, freed_from_source: still };

    report::say(&format!("{CLONES} more from the substrate at once"))?;
    let clones = clone_many(world).await?;

    let report = Report {
        suite: "demo",
        started: suites::now()?,
        git_rev: std::env::current_dir().ok().and_then(|d| git_revision(&d)),
        guest: demo.guest.to_string(),
        accel: world.accel().await?,
        emulated:
            "guest CPU by QEMU's translator unless accel says kvm; link by a user-space emulator"
                .into(),
        link: Link { rate_mbit: demo.rate_mbit, rtt_ms: 2.0 * demo.delay_ms },
        cold_boot_ms,
        dock,
        activate: activation,
        moves,
        intact,
        clones,
    };
    ensure!(report.intact.memory, "the memory pattern is damaged");
    ensure!(
        report.intact.text != Some(false),
        "the typed text is not what it was: compare before.png and after.png"
    );
    ensure!(report.clones.distinct_identity, "two clones share an identity");
    ensure!(report.intact.freed_from_source, "the machine stopped when its source was removed");
    Ok(report)
}

/// Types into a machine that boots until a letter is seen: when that was, and what it looks like.
async fn first_letter(world: &World, vm: &str) -> anyhow::Result<(Instant, Glyph)> {
    let mut screen = Display::open(world, vm).await?;
    screen.first_letter(LETTER_WITHIN).await
}

/// Types one letter into a machine that has just been activated: when it was seen.
async fn one_letter(world: &World, vm: &str, glyph: &Glyph) -> anyhow::Result<Instant> {
    Display::open(world, vm).await?.type_letter(glyph).await
}

/// Text on the screen before the moves.
struct Typed {
    before: Screen,
}

impl Typed {
    async fn type_in(world: &World) -> anyhow::Result<Self> {
        report::say("type into the editor")?;
        let blank = Screen::take(world, "report").await?;
        let text = "Godwit carries this text from site to site while you read it.\nEvery word is where it was.";
        world.tell(&["vm", "type", "report", text], PATIENCE).await?;
        blank.changed(world, "report", Duration::from_secs(60)).await?;
        Ok(Self { before: Screen::settled(world, "report", Duration::from_secs(120)).await? })
    }
}

/// Activates once more from the QEMU that waits since the first activation, and removes what came
/// of it. Gives the time to running vCPUs in ms.
async fn warm_activation(world: &World) -> anyhow::Result<f64> {
    report::say("once more, from a waiting QEMU")?;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let pools: Vec<Value> = world.ask(&["pool", "status"], PATIENCE).await?;
        if pools.iter().any(|p| p["site"] == CENTER && p["waiting"].as_u64() >= Some(1)) {
            break;
        }
        ensure!(Instant::now() < deadline, "no QEMU waits for the substrate");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let args = ["vm", "activate", "demo", "--name", "warm", "--site", CENTER];
    let report: ActivateReport = world.ask(&args, PATIENCE).await?;
    ensure!(report.warm, "the waiting QEMU was not taken");
    world.ask::<Value>(&["vm", "delete", "warm"], PATIENCE).await?;
    Ok(report.running_ms)
}

/// Activates one machine more, types into it, moves it to the AP meanwhile, and draws what is seen.
/// The machine is removed either way.
async fn moving_picture(demo: &Demo, world: &World, witness: &Witness) -> anyhow::Result<()> {
    const VM: &str = "picture";
    let args = ["vm", "activate", "demo", "--name", VM, "--site", CENTER];
    world.ask::<Value>(&args, PATIENCE).await?;
    let drawn = async {
        let mut typist = Typist::at(world, VM).await?;
        typist.says("somebody types; the machine is in the cloud center");
        typist.types_for(ALONE).await?;
        let (rate, delay) = (demo.rate_mbit, 2.0 * demo.delay_ms);
        typist.says(&format!("it moves to the cafe, {rate} Mbit/s and {delay} ms away"));
        let migrating = Box::pin(typist.types_until(migrate(world, VM, AP)));
        let moved = measured(world, witness, VM, (CENTER, AP), migrating).await?;
        typist.film.write(&moved, &demo.out.join("move.svg"))
    };
    let drawn = drawn.await;
    if drawn.is_err() {
        // Whatever it is at, nothing of it is wanted any more; the deletion says what is left.
        let _ = world.ask::<Value>(&["vm", "stop", "--force", VM], PATIENCE).await;
    }
    let deleted = world.ask::<Value>(&["vm", "delete", VM], PATIENCE).await;
    drawn?;
    deleted.map(drop)
}

async fn migrate(world: &World, vm: &str, to: &str) -> anyhow::Result<MoveReport> {
    world.ask(&["vm", "migrate", vm, "--to", to], PATIENCE).await
}

async fn move_once(
    world: &World,
    witness: &Witness,
    vm: &str,
    (from, to): (&str, &str),
) -> anyhow::Result<Move> {
    measured(world, witness, vm, (from, to), migrate(world, vm, to)).await
}

/// Measures a move that `migrating` does.
async fn measured(
    world: &World,
    witness: &Witness,
    vm: &str,
    (from, to): (&str, &str),
    migrating: impl Future<Output = anyhow::Result<MoveReport>>,
) -> anyhow::Result<Move> {
    witness.reset(world, vm).await?;
    let began = Instant::now();
    let consoles = guest::consoles(&world.cli(), &world.run_dirs(), vm).await?;
    let consoles: Vec<&Path> = consoles.iter().map(PathBuf::as_path).collect();
    let prober = Prober::start(&consoles).await?;
    let before = world.link_bytes();
    let report = migrating.await?;
    let link_bytes = world.link_bytes().zip(before).map(|(after, before)| after - before);
    let signs = prober.stop().await?;
    let watched = began.elapsed();
    let after = witness.healthy(world, vm).await?;
    let witness_bytes = after.share(watched, report.until_stop(), PASSES);
    report::say(&format!(
        "switched after {:.2} s, down {}, longest stall {:.0} ms, independent after {:.2} s",
        report.switch_ms / 1e3,
        report.downtime_text(),
        signs.longest_stall_ms,
        report.total_ms / 1e3
    ))?;
    Ok(Move { from: from.into(), to: to.into(), report, signs, link_bytes, witness_bytes })
}

async fn clone_many(world: &World) -> anyhow::Result<Clones> {
    let began = Instant::now();
    let names: Vec<String> = (1..=CLONES).map(|n| format!("clone-{n}")).collect();
    let mut jobs = tokio::task::JoinSet::new();
    for name in names.clone() {
        let cli = world.cli();
        jobs.spawn(async move {
            let args = ["vm", "activate", "demo", "--name", &name, "--site", CENTER];
            let asked = ms(began);
            let report: ActivateReport = cli.ask(&args, PATIENCE).await?;
            Ok::<f64, anyhow::Error>(asked + report.running_ms)
        });
    }
    let mut all_running_ms = 0f64;
    while let Some(done) = jobs.join_next().await {
        all_running_ms = all_running_ms.max(done.context("activate a clone")??);
    }
    let mut identities = Vec::new();
    for name in names.iter().map(String::as_str).chain(["report"]) {
        identities.push(guest::identity(world, name).await?);
    }
    Ok(Clones {
        count: CLONES,
        all_running_ms,
        distinct_identity: guest::all_distinct(&identities),
        identities,
    })
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
