//! Chapter 4 on real kernels: stand-ins for the thesis' workloads under real schedulers.
//!
//! Everything here runs in or as guests under QEMU's emulation, whose time is rough: two host CPUs
//! stand behind all of a guest's. Subjects of a comparison run one after another in each round, in
//! an order that turns from round to round, and the spread is shown.

pub mod host;
pub mod kernel;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::harness::Experiment;
use crate::harness::stats::summary;

/// A program of this workspace that was built with this one: beside it or, for a test, one folder
/// up.
///
/// # Errors
/// When it is not there; says how to build it.
pub fn program(name: &str, package: &str) -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe().context("find this program")?;
    let places = [me.with_file_name(name), me.parent().unwrap_or(&me).with_file_name(name)];
    places.into_iter().find(|p| p.is_file()).with_context(|| {
        format!("no {name} beside {}; build it first: cargo build -p {package}", me.display())
    })
}

/// The stand-in of a workload and the arguments that make it this one: `dedup-32` is dedup with room for
/// 32 chunks in each queue (PARSEC's have 1,048,576), `kernbench-halts` runs out of jobs now and then.
fn stand_in(workload: &str) -> (&str, String) {
    if let Some((name, room)) = workload.split_once('-') {
        match (name, room.parse::<usize>()) {
            ("dedup", Ok(room)) => return (name, format!("--queue {room}")),
            ("kernbench", _) if room == "halts" => return (name, "--halts".to_owned()),
            _ => {}
        }
    }
    (workload, String::new())
}

/// What a stand-in takes at most for `--slower`.
const MOST_SLOWER: f64 = 64.0;

/// By how much an operation of `workload` takes a guest longer than this host, each alone on its
/// CPU, rounded; and that in words. `guest` runs a command there and gives what it says.
///
/// An emulated CPU is ten to thirty times slower than a real one, and a scheduler's slice is not:
/// what is between two waits would be as long as a slice, and no order of vCPUs could help or harm.
/// So operations are made so much smaller (`godwit-standin --slower`).
///
/// # Errors
/// A stand-in that fails, or gets nothing done in a second.
fn slower(
    workload: &str,
    mut guest: impl FnMut(&str) -> anyhow::Result<String>,
) -> anyhow::Result<(u32, String)> {
    let (name, _) = stand_in(workload);
    let args = [name, "--threads", "1", "--seconds", "1", "--json"];
    let host = Command::new(program("godwit-standin", "godwit-standin")?)
        .args(args)
        .output()
        .context("run the stand-in on the host")?;
    ensure!(host.status.success(), "the stand-in failed: {}", host.status);
    let cost = |said: &str| {
        let report: Value = serde_json::from_str(said.lines().last().unwrap_or_default())
            .with_context(|| format!("the stand-in said {said:?}"))?;
        let of = |value: &Value| value.as_f64().with_context(|| format!("{value} is no number"));
        let operations = of(&report["operations"])?;
        ensure!(operations > 0.0, "{workload} got nothing done in a second");
        Ok(of(&report["cpu_ms"][0])? / operations)
    };
    let here = cost(&String::from_utf8_lossy(&host.stdout))?;
    let there = cost(&guest(&format!("godwit-standin {}", args.join(" ")))?)?;
    let slower = (there / here).round().clamp(1.0, MOST_SLOWER) as u32;
    let said = format!(
        "Operations of {workload} are {slower} times smaller in guests: one takes a CPU of this host \
         {here:.3} ms and one of a guest {there:.3} ms, alone; so its phases are as long beside a slice \
         as on a real CPU."
    );
    Ok((slower, said))
}

/// By how many percent `subject`'s median is below `against`'s, if both have values.
fn shorter_percent(experiment: &Experiment, subject: &str, against: &str) -> Option<f64> {
    let median = |name: &str| {
        let series = experiment.series.iter().find(|s| s.subject == name)?;
        Some(summary(&series.values)?.median)
    };
    Some(100.0 * (1.0 - median(subject)? / median(against)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_names_a_stand_in_and_how_it_is_run() {
        assert_eq!(stand_in("dedup"), ("dedup", String::new()));
        assert_eq!(stand_in("dedup-32"), ("dedup", "--queue 32".to_owned()));
        assert_eq!(stand_in("kernbench-halts"), ("kernbench", "--halts".to_owned()));
        assert_eq!(stand_in("no-such"), ("no-such", String::new()));
    }
}
