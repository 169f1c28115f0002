//! Chapter 4 of the dissertation: its tables and figures, each with the thesis' value beside ours.

pub mod real;
mod sim;

use crate::harness::Results;

/// The suite.
///
/// # Errors
/// No rounds.
pub fn run(quick: bool, rounds: Option<usize>, results: &mut Results) -> anyhow::Result<()> {
    sim::run(quick, rounds, results)
}
