//! A pool filled with substrates that all differ, and each of them activated again.
//!
//! Clones of one substrate write noise of their own into memory and are docked, until the packs of
//! the pool hold so many bytes, or the time is up. Then each is activated, its noise compared, and
//! deleted, while the files of sealed memory are watched.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use godwit_types::{ActivateReport, Name};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{PATIENCE, substrate};
use crate::demo::report::say;
use crate::demo::world::{Between, CENTER, World};
use crate::harness::{Better, Experiment, Results, Table};
use crate::rng::SplitMix;

const SUBSTRATE: &str = "parent";
/// What keeps a machine's noise in its memory.
const OWN: &str = "/tmp/own";
/// How often the files of sealed memory are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Substrates between two lines on the terminal.
const TELL_EVERY: usize = 20;

/// What is to be tried.
#[derive(Debug, Clone)]
pub struct PoolFill {
    /// Bytes that the pool's packs are to hold.
    pub packs_bytes: u64,
    /// Noise in the memory of each substrate, in MiB.
    pub own_mib: u32,
    /// Bytes of tmpfs that sealed memory may take.
    pub budget_bytes: u64,
    /// No substrate is begun after so long.
    pub fill_within: Duration,
    /// How many are activated: the first, the last, and others by chance; none: all.
    pub activate: Option<usize>,
    /// Substrates made, and activated, side by side.
    pub side_by_side: usize,
    /// Guest image; built already.
    pub guest: Name,
    /// The `godwit` program.
    pub program: PathBuf,
}

/// Bytes that the files of a directory take on their file system.
fn taken(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|f| Some(f.metadata().ok()?.blocks() * 512)).sum()
}

/// The most that a directory's files took at once, looked at all the time.
struct Peak {
    over: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
    looks: Option<std::thread::JoinHandle<()>>,
}

impl Peak {
    fn of(dir: PathBuf) -> Self {
        let (over, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ended, seen) = (Arc::clone(&over), Arc::clone(&most));
        let looks = std::thread::spawn(move || {
            while !ended.load(Relaxed) {
                seen.fetch_max(taken(&dir), Relaxed);
                std::thread::sleep(LOOK_EVERY);
            }
        });
        Self { over, most, looks: Some(looks) }
    }

    fn bytes(&self) -> u64 {
        self.most.load(Relaxed)
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        if let Some(looks) = self.looks.take() {
            let _ = looks.join();
        }
    }
}

/// Bytes that the center's packs hold.
async fn packs(world: &World) -> anyhow::Result<u64> {
    let pools: Vec<Value> = world.ask(&["pool", "status"], PATIENCE).await?;
    let pool = pools.iter().find(|p| p["site"] == CENTER).context("find the center's pool")?;
    pool["stored_bytes"].as_u64().context("find how much the pool holds")
}

/// The first and the last of `all`, and others by chance, `wanted` in all.
fn sample(all: usize, wanted: Option<usize>) -> Vec<usize> {
    let Some(wanted) = wanted.filter(|w| *w < all) else { return (0..all).collect() };
    let mut middle: Vec<usize> = (1..all.saturating_sub(1)).collect();
    let mut rng = SplitMix::new(1);
    for i in (1..middle.len()).rev() {
        middle.swap(i, rng.below(i + 1));
    }
    let ends = [0, all - 1];
    let mut out: Vec<usize> =
        ends.into_iter().take(wanted).chain(middle).take(wanted.min(all)).collect();
    out.sort_unstable();
    out.dedup();
    out
}

fn substrate_of(n: usize) -> String {
    format!("own-{n}")
}

/// Makes substrate `n`; gives the digest of its noise.
async fn make(world: &World, n: usize, own_mib: u32) -> anyhow::Result<String> {
    let name = format!("maker-{n}");
    let activate = ["vm", "activate", SUBSTRATE, "--name", &name, "--site", CENTER];
    world.ask::<Value>(&activate, PATIENCE).await?;
    let line =
        format!("dd if=/dev/urandom of={OWN} bs=1M count={own_mib} 2>/dev/null && md5sum <{OWN}");
    let digest = world.exec(&name, &["/bin/busybox", "sh", "-c", &line]).await?;
    let substrate = substrate_of(n);
    world.ask::<Value>(&["vm", "dock", &name, "--name", &substrate], PATIENCE).await?;
    Ok(digest.trim().to_owned())
}

/// Activates substrate `n` and sees that its noise is what it was; gives how long its vCPUs took.
async fn activate(world: &World, n: usize, digest: &str) -> anyhow::Result<f64> {
    let (name, of) = (format!("again-{n}"), substrate_of(n));
    let activate = ["vm", "activate", &of, "--name", &name, "--site", CENTER];
    let report: ActivateReport = world.ask(&activate, PATIENCE).await?;
    let line = format!("md5sum <{OWN}");
    let found = world.exec(&name, &["/bin/busybox", "sh", "-c", &line]).await;
    let gone = world.ask::<Value>(&["vm", "delete", &name], PATIENCE).await;
    let found = found?;
    gone?;
    ensure!(found.trim() == digest, "the memory of {of} is not what was docked");
    Ok(report.running_ms)
}

/// Runs the trial; gives the number of substrates that could not be made or activated.
///
/// # Errors
/// When there is nothing to clone.
pub async fn pool_fill(trial: &PoolFill, results: &mut Results) -> anyhow::Result<usize> {
    let budget = format!("--memory-cache={}M", trial.budget_bytes >> 20);
    let world = World::with(&trial.program, Between::Loopback, &[&budget]).await?;
    let world = Arc::new(world);
    results.guest = Some(trial.guest.to_string());
    results.accel = Some(world.accel().await?);
    substrate(&world, trial.guest.as_str(), SUBSTRATE).await?;
    let peak = Peak::of(world.memory_dir(CENTER).join("substrates"));
    let empty = packs(&world).await?;

    let began = Instant::now();
    let digests: Arc<Mutex<BTreeMap<usize, String>>> = Arc::default();
    let (next, words) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
    let mut jobs = JoinSet::new();
    for _ in 0..trial.side_by_side.max(1) {
        let (world, trial) = (Arc::clone(&world), trial.clone());
        let (digests, next, words) = (Arc::clone(&digests), Arc::clone(&next), Arc::clone(&words));
        jobs.spawn(async move {
            loop {
                let held = packs(&world).await?;
                if held >= trial.packs_bytes || began.elapsed() >= trial.fill_within {
                    return anyhow::Ok(());
                }
                let n = next.fetch_add(1, Relaxed);
                match make(&world, n, trial.own_mib).await {
                    Ok(digest) => {
                        digests.lock().unwrap_or_else(PoisonError::into_inner).insert(n, digest);
                    }
                    Err(e) => {
                        let why = format!("Substrate {n} was not made: {e:#}");
                        say(&why)?;
                        words.lock().unwrap_or_else(PoisonError::into_inner).push(why);
                        // A pool that is full takes no more.
                        return Ok(());
                    }
                }
                if n % TELL_EVERY == TELL_EVERY - 1 {
                    say(&format!("{} substrates, {} MiB of packs", n + 1, held >> 20))?;
                }
            }
        });
    }
    while let Some(job) = jobs.join_next().await {
        job.context("fill the pool")??;
    }
    let filled_s = began.elapsed().as_secs_f64();
    let held = packs(&world).await?;
    let made = digests.lock().unwrap_or_else(PoisonError::into_inner).clone();
    ensure!(!made.is_empty(), "no substrate was made");
    let not_made = next.load(Relaxed) - made.len();
    say(&format!("{} substrates in {filled_s:.0} s; {} MiB of packs", made.len(), held >> 20))?;

    let made: Vec<(usize, String)> = made.into_iter().collect();
    let chosen: Vec<(usize, String)> =
        sample(made.len(), trial.activate).into_iter().map(|i| made[i].clone()).collect();
    let asked = chosen.len();
    let left = Arc::new(Mutex::new(chosen.into_iter()));
    let took: Arc<Mutex<Vec<f64>>> = Arc::default();
    let mut jobs = JoinSet::new();
    for _ in 0..trial.side_by_side.max(1) {
        let (world, left) = (Arc::clone(&world), Arc::clone(&left));
        let (took, words) = (Arc::clone(&took), Arc::clone(&words));
        jobs.spawn(async move {
            loop {
                let one = left.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((n, digest)) = one else { return anyhow::Ok(()) };
                match activate(&world, n, &digest).await {
                    Ok(ms) => took.lock().unwrap_or_else(PoisonError::into_inner).push(ms),
                    Err(e) => {
                        let why = format!("Substrate {n} was not activated: {e:#}");
                        say(&why)?;
                        words.lock().unwrap_or_else(PoisonError::into_inner).push(why);
                    }
                }
            }
        });
    }
    while let Some(job) = jobs.join_next().await {
        job.context("activate what the pool holds")??;
    }
    let took = took.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let not_activated = asked - took.len();
    let count = made.len();
    let each = held.saturating_sub(empty) as f64 / count as f64;
    let value = json!({
        "packs_wanted_bytes": trial.packs_bytes, "packs_bytes": held, "filled_s": filled_s,
        "own_mib": trial.own_mib, "substrates": count, "not_made": not_made,
        "packs_gb": held as f64 / 1e9, "failed": not_made + not_activated,
        "substrate_bytes": each, "substrate_mb": each / 1e6,
        "activated": took.len(), "not_activated": not_activated,
        "all_tried": asked == count,
        "tmpfs_peak_bytes": peak.bytes(), "tmpfs_budget_bytes": trial.budget_bytes,
        "tmpfs_of_budget": peak.bytes() as f64 / trial.budget_bytes as f64,
    });
    results.tables.push(table(&value));
    results.reports.entry("pool-fill".into()).or_default().push(value);
    let mut up = Experiment::new(
        "activate",
        "From the request to running vCPUs, of substrates that had to be laid out.",
        "ms",
        Better::Lower,
    );
    took.iter().for_each(|ms| up.push("running", *ms));
    results.experiments.push(up);
    results.notes.append(&mut words.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(not_made + not_activated)
}

fn table(v: &Value) -> Table {
    let mib = |key: &str| format!("{:.1} MiB", v[key].as_f64().unwrap_or(0.0) / 1_048_576.0);
    let plain = |key: &str| v[key].to_string();
    let rows = [
        ("packs, at the end", mib("packs_bytes")),
        ("of the packs that were wanted", mib("packs_wanted_bytes")),
        ("substrates", plain("substrates")),
        ("not made", plain("not_made")),
        ("noise in each, in MiB", plain("own_mib")),
        ("packs for each", mib("substrate_bytes")),
        ("activated, each with its noise", plain("activated")),
        ("not activated", plain("not_activated")),
        ("all of them were tried", plain("all_tried")),
        ("tmpfs for sealed memory, at most", mib("tmpfs_peak_bytes")),
        ("of its budget", mib("tmpfs_budget_bytes")),
    ];
    Table {
        name: "pool-fill".into(),
        about:
            "Clones that differ by their own noise, docked until the packs are full or the time \
                is up; then activated one after the other."
                .into(),
        head: ["what", "figure"].map(String::from).to_vec(),
        rows: rows.map(|(what, figure)| vec![what.to_owned(), figure]).to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_both_ends_and_none_twice() {
        assert_eq!(sample(3, None), [0, 1, 2]);
        assert_eq!(sample(3, Some(50)), [0, 1, 2]);
        assert_eq!(sample(1, Some(1)), [0]);
        let some = sample(400, Some(50));
        assert_eq!(some.len(), 50);
        assert_eq!((some[0], some[49]), (0, 399));
        assert!(some.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(some, sample(400, Some(50)), "the same each time");
    }
}
