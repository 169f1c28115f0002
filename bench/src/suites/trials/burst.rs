//! Many activations of one substrate at once.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use godwit_types::{ActivateReport, Name};
use serde_json::{Value, json};

use super::{PATIENCE, cpu, quantile, substrate};
use crate::demo::world::{Between, CENTER, World};
use crate::harness::{Better, Experiment, Results, Table};

const SUBSTRATE: &str = "many";

/// What is to be tried.
#[derive(Debug, Clone)]
pub struct Burst {
    /// Activations at once.
    pub count: usize,
    /// Guest image; built already.
    pub guest: Name,
    /// The `godwit` program.
    pub program: PathBuf,
}

/// Memory of one process in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Memory {
    /// Its own pages and its part of the shared ones.
    proportional: u64,
    /// Pages that nobody else has.
    private: u64,
}

impl Memory {
    /// From `/proc/PID/smaps_rollup`.
    fn parse(text: &str) -> Self {
        let bytes = |keys: &[&str]| {
            text.lines()
                .filter_map(|l| l.split_once(':'))
                .filter(|(key, _)| keys.contains(&key.trim()))
                .filter_map(|(_, v)| v.split_whitespace().next()?.parse::<u64>().ok())
                .sum::<u64>()
                * 1024
        };
        Self { proportional: bytes(&["Pss"]), private: bytes(&["Private_Clean", "Private_Dirty"]) }
    }
}

/// Memory of the QEMUs whose records lie below `run`, but for those in `not`.
fn memory_of(run: &Path, not: &[i64]) -> Vec<(i64, Memory)> {
    let Ok(entries) = std::fs::read_dir(run) else { return Vec::new() };
    let pid = |dir: PathBuf| -> Option<i64> {
        let record = std::fs::read(dir.join("machine.json")).ok()?;
        serde_json::from_slice::<Value>(&record).ok()?["process"]["pid"].as_i64()
    };
    entries
        .flatten()
        .filter_map(|e| pid(e.path()))
        .filter(|pid| !not.contains(pid))
        .filter_map(|pid| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            Some((pid, Memory::parse(&text)))
        })
        .collect()
}

/// Memory that the host still has, in bytes.
fn available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|l| {
            l.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok()
        })
        .unwrap_or_default()
        * 1024
}

/// Runs the trial; gives the number of activations that failed.
///
/// # Errors
/// When there is nothing to activate, or no activation succeeds.
pub async fn burst(trial: &Burst, results: &mut Results) -> anyhow::Result<usize> {
    let world = World::start(&trial.program, Between::Loopback).await?;
    results.guest = Some(trial.guest.to_string());
    results.accel = Some(world.accel().await?);
    substrate(&world, trial.guest.as_str(), SUBSTRATE).await?;
    // Once beforehand: the first one lays the memory out that all others share.
    let first = ["vm", "activate", SUBSTRATE, "--name", "one", "--site", CENTER];
    world.ask::<Value>(&first, PATIENCE).await?;
    let run = world.run_dir(CENTER);
    let others: Vec<i64> = memory_of(&run, &[]).iter().map(|(pid, _)| *pid).collect();
    let free = available();
    let daemons = || -> f64 {
        let pid = |dir: PathBuf| std::fs::read_to_string(dir.join("daemon.pid")).ok();
        let pids = world.run_dirs().into_iter().filter_map(|d| pid(d)?.trim().parse().ok());
        pids.map(|pid| cpu::of(pid).rest).sum()
    };
    let waiting = others.iter().map(|pid| cpu::of(*pid)).sum::<cpu::Cpu>();
    let before = (daemons(), cpu::of_commands());

    let began = Instant::now();
    let mut jobs = tokio::task::JoinSet::new();
    for n in 0..trial.count {
        let cli = world.cli();
        jobs.spawn(async move {
            let name = format!("many-{n}");
            let args = ["vm", "activate", SUBSTRATE, "--name", &name, "--site", CENTER];
            let report: ActivateReport = cli.ask(&args, PATIENCE).await?;
            anyhow::Ok((began.elapsed(), report))
        });
    }
    let (mut running, mut answers, mut failed) = (Vec::new(), Vec::new(), 0);
    while let Some(done) = jobs.join_next().await {
        match done.context("activate one of many")? {
            Ok((ended, r)) => {
                // From the end back: what came before its site took it up counts as well.
                let all: f64 = r.phases.iter().map(|p| p.ms).sum();
                let at = |ms: f64| ended.as_secs_f64() * 1e3 - (all - ms).max(0.0);
                running.push(at(r.running_ms));
                answers.extend(r.first_answer_ms.map(at));
            }
            Err(e) => {
                failed += 1;
                results.notes.push(format!("An activation failed: {e:#}"));
            }
        }
    }
    let answered_all_ms = began.elapsed().as_secs_f64() * 1e3;
    let taken = free.saturating_sub(available());
    let after = (daemons(), cpu::of_commands());
    anyhow::ensure!(!running.is_empty(), "no activation succeeded: {}", results.notes.join(" "));
    let clones = memory_of(&run, &others);
    // One that waited before may be a clone now, and another may wait.
    let guests = others.iter().copied().chain(clones.iter().map(|(pid, _)| *pid));
    let guests = guests.map(cpu::of).sum::<cpu::Cpu>() - waiting;
    let memory: Vec<Memory> = clones.into_iter().map(|(_, m)| m).collect();
    sort(&mut running);
    sort(&mut answers);
    let clones = running.len() as f64;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let each = |of: fn(&Memory) -> u64| {
        mib(memory.iter().map(of).sum::<u64>() as f64) / memory.len().max(1) as f64
    };
    let all_running_ms = running.last().copied().unwrap_or_default();
    let [p50, p99, max] = [0.5, 0.99, 1.0].map(|q| quantile(&answers, q).unwrap_or_default());
    let value = json!({
        "count": running.len(), "failed": failed, "all_running_ms": all_running_ms,
        "all_answered_ms": answered_all_ms,
        "first_answer_ms": { "p50": p50, "p99": p99, "max": max },
        "memory_mib": { "proportional": each(|m| m.proportional), "private": each(|m| m.private),
            "host": mib(taken as f64) / clones },
        "cpu_ms": { "guest": guests.vcpus / clones, "qemu": guests.rest / clones,
            "daemons": (after.0 - before.0) / clones, "commands": (after.1 - before.1) / clones },
    });
    results.tables.push(table(&value));
    results.reports.entry("burst".into()).or_default().push(value);
    let mut all = Experiment::new(
        "first-answer",
        "From the beginning of the burst to each machine's first answer.",
        "ms",
        Better::Lower,
    );
    answers.iter().for_each(|ms| all.push("clones", *ms));
    let mut up = Experiment::new(
        "running",
        "From the beginning of the burst to each machine's running vCPUs.",
        "ms",
        Better::Lower,
    );
    running.iter().for_each(|ms| up.push("clones", *ms));
    results.experiments.extend([up, all]);
    remove(&world, trial.count).await;
    Ok(failed)
}

fn sort(values: &mut [f64]) {
    values.sort_by(f64::total_cmp);
}

fn table(v: &Value) -> Table {
    let s = |v: &Value| format!("{:.2} s", v.as_f64().unwrap_or_default() / 1e3);
    let mib = |v: &Value| format!("{:.1} MiB", v.as_f64().unwrap_or_default());
    let (answer, memory, cpu) = (&v["first_answer_ms"], &v["memory_mib"], &v["cpu_ms"]);
    let rows = [
        ("activated at once", v["count"].to_string()),
        ("failed", v["failed"].to_string()),
        ("all running after", s(&v["all_running_ms"])),
        ("all commands answered after", s(&v["all_answered_ms"])),
        ("first answer, median", s(&answer["p50"])),
        ("first answer, P99", s(&answer["p99"])),
        ("first answer, last", s(&answer["max"])),
        ("memory of a clone's QEMU (PSS)", mib(&memory["proportional"])),
        ("of it private", mib(&memory["private"])),
        ("host memory taken for each clone", mib(&memory["host"])),
        ("processor time of a clone: its guest, emulated", s(&cpu["guest"])),
        ("of its QEMU beside that", s(&cpu["qemu"])),
        ("of both daemons", s(&cpu["daemons"])),
        ("of the command", s(&cpu["commands"])),
    ];
    Table {
        name: "burst".into(),
        about: "Times from the beginning of the burst; every activation is a command of its own."
            .into(),
        head: ["what", "figure"].map(String::from).to_vec(),
        rows: rows.map(|(what, figure)| vec![what.to_owned(), figure]).to_vec(),
    }
}

/// Ends the machines; what cannot be ended goes with the sites.
async fn remove(world: &World, count: usize) {
    for n in 0..count {
        let name = format!("many-{n}");
        let gone = world.ask::<Value>(&["vm", "delete", &name], Duration::from_secs(60)).await;
        if let Err(error) = gone {
            tracing::warn!(%name, %error, "a machine could not be deleted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_the_kernel_writes_it() {
        let text = "55d0-7ffc ---p 00000000 00:00 0    [rollup]\nRss:  340000 kB\nPss:  48 kB\n\
            Pss_Anon:  40 kB\nShared_Clean:  1 kB\nPrivate_Clean:  2 kB\nPrivate_Dirty:  30 kB\n";
        let m = Memory::parse(text);
        assert_eq!((m.proportional, m.private), (48 << 10, 32 << 10));
        assert_eq!(Memory::parse("no such process"), Memory::default());
        assert!(memory_of(Path::new("/nonexistent"), &[]).is_empty());
    }
}
