//! Chapter 4 of the dissertation: its tables and figures, each with the thesis' value beside ours.

pub mod real;
mod sim;

use crate::harness::Results;
pub use sim::timeline::Timeline;

/// The suite.
///
/// # Errors
/// No rounds; a picture that can't be drawn.
pub fn run(quick: bool, rounds: Option<usize>, results: &mut Results) -> anyhow::Result<()> {
    sim::run(quick, rounds, results)
}
