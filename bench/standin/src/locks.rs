//! The measurement of table 4.1 at user level: every thread enters kernbench's critical sections
//! one after another, with kernbench's computing between them, and each is timed.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::kernbench::{HELD_SHARE, HELD_US, Kernel};
use crate::mix::{compute, mix, turns};
use crate::program::{Config, Program, Worker};
use crate::spin::StopRequested;

/// Sections that a thread takes at once.
const BATCH: u64 = 16;

/// The critical sections.
#[derive(Debug)]
pub struct Locks {
    seed: u64,
    work: Option<u64>,
    kernel: Kernel,
    slower: u32,
    taken: AtomicU64,
    done: AtomicU64,
}

impl Locks {
    /// `work` is critical sections.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            seed: config.seed,
            work: config.work,
            kernel: Kernel::new(config.slower),
            slower: config.slower,
            taken: AtomicU64::new(0),
            done: AtomicU64::new(0),
        }
    }
}

impl Program for Locks {
    fn thread(&self, worker: &mut Worker<'_>) -> Result<(), StopRequested> {
        let between = turns(HELD_US * (1.0 / HELD_SHARE - 1.0), self.slower);
        loop {
            let first = self.taken.fetch_add(BATCH, Ordering::Relaxed);
            let end = self.work.map_or(first + BATCH, |w| w.min(first + BATCH));
            if first >= end {
                return Ok(());
            }
            for n in first..end {
                worker.go_on()?;
                let x = compute(mix(self.seed ^ mix(n)), between);
                self.kernel.enter(x, &mut worker.meter);
                self.done.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn operations(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn finish(&self) -> Result<String, String> {
        if Some(self.operations()) != self.work {
            return Err(format!("{} sections of {:?}", self.operations(), self.work));
        }
        Ok(self.kernel.digest())
    }
}
