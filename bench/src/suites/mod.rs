//! The suites, by name.

mod guest;
pub mod mainjob;
pub mod sched;

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Instant;

use anyhow::Context as _;
use godwit_types::Name;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::harness::{MachineInfo, Results, SCHEMA, git_revision};

pub use guest::{Guest, Witness, first_answer};

/// A suite at work.
pub type Running<'a> = Pin<Box<dyn Future<Output = anyhow::Result<()>> + 'a>>;

/// What a suite is told.
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
    /// Rate of the link in Mbit/s.
    pub rate_mbit: f64,
    /// One-way delay of the link in ms.
    pub delay_ms: f64,
    /// Downtime in ms for which stock QEMU may end its pre-copy; none: its own default.
    pub stock_downtime_ms: Option<u64>,
}

impl Plan {
    /// All of a suite's rounds, with the command line's defaults.
    #[must_use]
    pub fn new(guest: Name) -> Self {
        Self {
            quick: false,
            rounds: None,
            images: PathBuf::from("/var/cache/godwit/images"),
            guest,
            witness_mib: 32,
            rate_mbit: 100.0,
            delay_ms: 17.5,
            stock_downtime_ms: None,
        }
    }
}

/// One suite.
#[derive(Debug, Clone, Copy)]
pub struct Suite {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// Fills in everything that it measures.
    pub run: for<'a> fn(&'a Plan, &'a mut Results) -> Running<'a>,
}

/// All suites.
pub const SUITES: &[Suite] = &[
    Suite {
        name: "mainjob",
        about: "cold boot, dock, activate and move an environment, beside stock QEMU",
        run: |plan, results| Box::pin(mainjob::run(plan, results)),
    },
    Suite {
        name: "sched",
        about: "co-scheduling of sibling vCPUs in the simulator, beside the dissertation",
        run: |plan, results| Box::pin(sched::run(plan, results)),
    },
];

/// Runs `suite` and gives what it found.
///
/// # Errors
/// When nothing could be measured; single rounds that fail are notes in the results.
pub async fn run(suite: &Suite, plan: &Plan) -> anyhow::Result<Results> {
    let begun = Instant::now();
    let mut results = Results {
        schema: SCHEMA,
        suite: suite.name.to_owned(),
        started: OffsetDateTime::now_utc().format(&Rfc3339).context("write the time")?,
        took_s: 0.0,
        quick: plan.quick,
        machine: MachineInfo::here(),
        git_rev: std::env::current_dir().ok().and_then(|d| git_revision(&d)),
        accel: None,
        guest: None,
        link: None,
        experiments: Vec::new(),
        reports: Default::default(),
        notes: Vec::new(),
    };
    (suite.run)(plan, &mut results).await.with_context(|| format!("suite {}", suite.name))?;
    for e in &mut results.experiments {
        e.finish();
    }
    results.experiments.retain(|e| !e.series.is_empty());
    results.took_s = begun.elapsed().as_secs_f64();
    Ok(results)
}
