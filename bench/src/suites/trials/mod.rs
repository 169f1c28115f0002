//! Trials from outside, by the command line alone: many moves of idle machines, many activations at
//! once, a pool full of substrates. They look for what a short run does not show.

mod burst;
mod cpu;
mod idle_moves;
mod link_rates;
mod pool_fill;

pub use burst::{Burst, burst};
pub use idle_moves::{IdleMoves, idle_moves};
pub use link_rates::{LinkRates, link_rates};
pub use pool_fill::{PoolFill, pool_fill};

use std::time::Duration;

use anyhow::Context;
use serde_json::Value;

use crate::demo::world::{CENTER, World};

/// How long a boot, a dock or a clean-up may take.
const PATIENCE: Duration = Duration::from_secs(570);

/// Boots `image` at the center and docks it as `substrate`; nothing of the machine is left.
async fn substrate(world: &World, image: &str, substrate: &str) -> anyhow::Result<()> {
    let create = ["vm", "create", "--image", image, "--name", "first", "--site", CENTER];
    world.ask::<Value>(&create, PATIENCE).await.context("boot the machine that is docked")?;
    let dock = ["vm", "dock", "first", "--name", substrate];
    world.ask::<Value>(&dock, PATIENCE).await.context("dock it").map(drop)
}

/// The value at the share `q` of a sorted sample (nearest rank); none of an empty one.
fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_of_the_sample() {
        let all: Vec<f64> = (1..=64).map(f64::from).collect();
        let at = |q| quantile(&all, q);
        assert_eq!(
            [at(0.5), at(0.99), at(1.0), at(0.0)],
            [Some(32.0), Some(64.0), Some(64.0), Some(1.0)]
        );
        assert_eq!(quantile(&[7.0], 0.99), Some(7.0));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
