//! Moves of freshly activated machines that do nothing.
//!
//! A guest at rest writes almost no memory, so QEMU may be done with pre-copy before anybody wants it
//! to be. Each machine is activated, left alone, moved to the AP and back, and deleted.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use godwit_types::{MoveReport, Name};
use serde_json::{Value, json};

use super::{PATIENCE, substrate};
use crate::demo::report::say;
use crate::demo::world::{AP, Between, CENTER, World};
use crate::harness::{Better, Experiment, Results, Table};

const SUBSTRATE: &str = "idle";
/// How long a machine that hung is given to go away.
const AWAY_WITHIN: Duration = Duration::from_secs(60);
/// Moves between two lines on the terminal.
const TELL_EVERY: usize = 20;

/// What is to be tried.
#[derive(Debug, Clone)]
pub struct IdleMoves {
    /// Moves in all.
    pub count: usize,
    /// Guest image; built already.
    pub guest: Name,
    /// Rate each way in Mbit/s and one-way delay in ms; none: both sites are on loopback.
    pub link: Option<(f64, f64)>,
    /// How long a machine is left alone before each move.
    pub idle: Duration,
    /// A move without an answer for so long is a hang.
    pub limit: Duration,
    /// Whether the AP holds the substrate, too.
    pub held: bool,
    /// The `godwit` program.
    pub program: PathBuf,
}

/// How the moves ended.
#[derive(Debug, Default)]
struct Tally {
    moved: usize,
    hung: usize,
    failed: usize,
    words: Vec<String>,
}

impl Tally {
    fn all(&self) -> usize {
        self.moved + self.hung + self.failed
    }
}

/// Runs the trial. The results tell of hangs and failures; who calls decides what they mean.
///
/// # Errors
/// When there is nothing to move, or a machine cannot be activated.
pub async fn idle_moves(trial: &IdleMoves, results: &mut Results) -> anyhow::Result<usize> {
    let between = match trial.link {
        Some((rate_mbit, delay_ms)) => Between::Link { rate_mbit, delay_ms },
        None => Between::Loopback,
    };
    let world = World::start(&trial.program, between).await?;
    results.guest = Some(trial.guest.to_string());
    results.accel = Some(world.accel().await?);
    results.link = world.link().ok().map(|l| l.spec().into());
    if trial.link.is_none() {
        results.notes.push("Both sites on this host's loopback.".into());
    }
    substrate(&world, trial.guest.as_str(), SUBSTRATE).await?;
    if trial.held {
        let bring = ["vm", "activate", SUBSTRATE, "--name", "held", "--site", AP];
        world.ask::<Value>(&bring, PATIENCE).await.context("bring the substrate to the AP")?;
        world.ask::<Value>(&["vm", "delete", "held"], PATIENCE).await?;
        results.notes.push("The AP holds the substrate, too.".into());
    }
    let ms = |name, about| Experiment::new(name, about, "ms", Better::Lower);
    let mut sheet = [
        ms("switch", "From the request to RESUME at the destination."),
        ms("downtime", "STOP at the source to RESUME at the destination."),
        ms("total", "From the request to independence of the source."),
    ];
    let mut tally = Tally::default();
    for machine in 0.. {
        if tally.all() >= trial.count {
            break;
        }
        one(trial, &world, machine, &mut tally, &mut sheet).await?;
        if tally.all() % TELL_EVERY < 2 {
            say(&format!("{} moves: {} hung, {} failed", tally.all(), tally.hung, tally.failed))?;
        }
    }
    results.experiments.extend(sheet);
    results.tables.push(Table {
        name: "moves".into(),
        about: format!(
            "Moves of idle machines, {} ms after the last change; no answer within {} s is a hang.",
            trial.idle.as_millis(),
            trial.limit.as_secs()
        ),
        head: ["moves", "hung", "failed"].map(String::from).to_vec(),
        rows: vec![[tally.all(), tally.hung, tally.failed].map(|n| n.to_string()).to_vec()],
    });
    let value = json!({ "moves": tally.all(), "hung": tally.hung, "failed": tally.failed });
    results.reports.entry("moves".into()).or_default().push(value);
    results.notes.append(&mut tally.words);
    Ok(tally.hung + tally.failed)
}

/// One machine from its activation to its end.
async fn one(
    trial: &IdleMoves,
    world: &World,
    machine: usize,
    tally: &mut Tally,
    sheet: &mut [Experiment; 3],
) -> anyhow::Result<()> {
    let name = format!("idle-{machine}");
    let activate = ["vm", "activate", SUBSTRATE, "--name", &name, "--site", CENTER];
    world.ask::<Value>(&activate, PATIENCE).await.with_context(|| format!("activate {name}"))?;
    for to in [AP, CENTER] {
        if tally.all() >= trial.count {
            break;
        }
        tokio::time::sleep(trial.idle).await;
        let asked = Instant::now();
        let moved: anyhow::Result<MoveReport> =
            world.ask(&["vm", "migrate", &name, "--to", to], trial.limit).await;
        match moved {
            Ok(r) => {
                tally.moved += 1;
                for (e, v) in sheet.iter_mut().zip([r.switch_ms, r.downtime_ms, r.total_ms]) {
                    e.push("idle", v);
                }
            }
            Err(e) => {
                let hung = asked.elapsed() >= trial.limit;
                let state: anyhow::Result<Value> =
                    world.ask(&["vm", "get", &name], AWAY_WITHIN).await;
                let state = state.map_or_else(|e| format!("{e:#}"), |v| v.to_string());
                let words = format!("Move {} of {name} to {to}: {e:#}; then {state}", tally.all());
                say(&words)?;
                tally.words.push(words);
                *(if hung { &mut tally.hung } else { &mut tally.failed }) += 1;
                break;
            }
        }
    }
    let gone = world.ask::<Value>(&["vm", "delete", &name], AWAY_WITHIN).await;
    match gone {
        Ok(_) => Ok(()),
        // One that hangs may stay; the next is another.
        Err(e) if tally.hung + tally.failed > 0 => {
            tally.words.push(format!("{name} could not be deleted: {e:#}"));
            Ok(())
        }
        Err(e) => Err(e.context(format!("delete {name}"))),
    }
}
