//! A moment by the clock on the wall and by one that only goes on.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use godwit_types::UnixMs;

/// A moment by both clocks: that of the wall, which somebody may set, for what is told and written
/// down; and one that only goes on, for what is measured within a run of this daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// By the clock on the wall.
    pub wall: UnixMs,
    /// Since this daemon began to measure.
    pub run: Duration,
}

impl Moment {
    /// The present.
    #[must_use]
    pub fn now() -> Self {
        static BEGUN: OnceLock<Instant> = OnceLock::new();
        // Never zero: that is before everything.
        let run = BEGUN.get_or_init(Instant::now).elapsed() + Duration::from_millis(1);
        Self { wall: UnixMs::now(), run }
    }

    /// What the clock on the wall would have shown at another time of this run, had it been as it is
    /// now; to the millisecond.
    #[must_use]
    pub fn wall_at(self, run: Duration) -> UnixMs {
        match run.checked_sub(self.run) {
            Some(later) => self.wall.plus(later),
            None => {
                let ago = u64::try_from((self.run - run).as_millis()).unwrap_or(u64::MAX);
                // What is over by less than a millisecond is over.
                UnixMs(self.wall.0.saturating_sub(ago.max(1)))
            }
        }
    }
}
