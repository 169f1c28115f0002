//! The suites, by name.

mod guest;
pub mod mainjob;
pub mod sched;
pub mod trials;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context as _;
use godwit_types::Name;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::harness::{MachineInfo, Results, SCHEMA, git_revision};

pub use guest::{Guest, Witness, first_answer};
pub(crate) use guest::{SIGNS, WITNESS};

/// What a suite with guests is told.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Few rounds.
    pub quick: bool,
    /// Rounds; none: as many as the suite thinks right.
    pub rounds: Option<usize>,
    /// Directory of the image cache.
    pub images: PathBuf,
    /// Guest image.
    pub guest: Name,
    /// Memory that the witness program keeps changing, in MiB.
    pub witness_mib: u32,
    /// The same for rows beside the main ones, so that its own part of every figure is seen.
    pub witness_beside: Vec<u32>,
    /// Rate of the link in Mbit/s.
    pub rate_mbit: f64,
    /// One-way delay of the link in ms.
    pub delay_ms: f64,
    /// Downtime in ms for which stock QEMU may end its pre-copy; none: its own default.
    pub stock_downtime_ms: Option<u64>,
}

/// The present time, RFC 3339.
pub(crate) fn now() -> anyhow::Result<String> {
    OffsetDateTime::now_utc().format(&Rfc3339).context("write the time")
}

/// Runs the suite `name`, whose `measure` fills in everything that it finds.
///
/// # Errors
/// When nothing could be measured; single rounds that fail are notes in the results.
pub async fn run(
    name: &str,
    quick: bool,
    measure: impl AsyncFnOnce(&mut Results) -> anyhow::Result<()>,
) -> anyhow::Result<Results> {
    let begun = Instant::now();
    let mut results = Results {
        schema: SCHEMA,
        suite: name.to_owned(),
        started: now()?,
        took_s: 0.0,
        quick,
        machine: MachineInfo::here(),
        git_rev: std::env::current_dir().ok().and_then(|d| git_revision(&d)),
        accel: None,
        guest: None,
        link: None,
        experiments: Vec::new(),
        tables: Vec::new(),
        pictures: Vec::new(),
        reports: Default::default(),
        notes: Vec::new(),
    };
    Box::pin(measure(&mut results)).await.with_context(|| format!("suite {name}"))?;
    for e in &mut results.experiments {
        e.finish();
    }
    results.experiments.retain(|e| !e.series.is_empty());
    results.took_s = begun.elapsed().as_secs_f64();
    Ok(results)
}
