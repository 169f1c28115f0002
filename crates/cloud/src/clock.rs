//! Wall-clock time as the registry keeps it.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Milliseconds since 1970-01-01 UTC. Passed in wherever a decision depends on time.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(transparent)]
pub struct UnixMs(pub u64);

impl UnixMs {
    /// The present time.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    /// This time plus `by`.
    #[must_use]
    pub fn plus(self, by: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(by.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this is; zero if it is not after it.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// RFC 3339 in UTC, to the second.
    #[must_use]
    pub fn rfc3339(self) -> String {
        let secs = i64::try_from(self.0 / 1000).unwrap_or(i64::MAX);
        time::OffsetDateTime::from_unix_timestamp(secs)
            .ok()
            .and_then(|t| t.format(&time::format_description::well_known::Rfc3339).ok())
            .unwrap_or_else(|| self.0.to_string())
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_never_go_below_zero_and_print_as_rfc3339() {
        assert_eq!(UnixMs(5).since(UnixMs(9)), Duration::ZERO);
        assert_eq!(UnixMs(9).since(UnixMs(5)), Duration::from_millis(4));
        assert_eq!(UnixMs(1_700_000_000_123).rfc3339(), "2023-11-14T22:13:20Z");
        assert_eq!(UnixMs(1).plus(Duration::from_secs(2)), UnixMs(2001));
    }
}
