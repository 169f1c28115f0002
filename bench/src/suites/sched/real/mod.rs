//! Chapter 4 on real kernels: stand-ins for the thesis' workloads under real schedulers.
//!
//! Everything here runs in or as guests under QEMU's emulation, whose time is rough: two host CPUs
//! stand behind all of a guest's. Subjects of a comparison run one after another in each round, in
//! an order that turns from round to round, and the spread is shown.

pub mod host;
pub mod kernel;

use std::path::PathBuf;

use anyhow::Context as _;

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

/// By how many percent `subject`'s median is below `against`'s, if both have values.
fn shorter_percent(experiment: &Experiment, subject: &str, against: &str) -> Option<f64> {
    let median = |name: &str| {
        let series = experiment.series.iter().find(|s| s.subject == name)?;
        Some(summary(&series.values)?.median)
    };
    Some(100.0 * (1.0 - median(subject)? / median(against)?))
}
