//! Clocks.

use std::time::{Duration, Instant};

/// A cheap clock that runs evenly, in ticks of an unknown length; a [`Ruler`] finds it. A guest's
/// kernel may keep time by a device whose registers cost microseconds to read, so what lies inside
/// a lock is timed by the processor's own counter where there is one.
#[must_use]
pub fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: RDTSC has no operands and changes no memory; Linux leaves it to all programs.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        let since = START.get_or_init(Instant::now).elapsed();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Finds how long a tick is by running beside the real clock.
#[derive(Debug, Clone, Copy)]
pub struct Ruler {
    start: Instant,
    tick: u64,
}

impl Ruler {
    /// Starts now.
    #[must_use]
    pub fn start() -> Self {
        Self { start: Instant::now(), tick: ticks() }
    }

    /// Since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Nanoseconds of a tick, as far as the time since the start tells.
    #[must_use]
    pub fn tick_ns(&self) -> f64 {
        let ticks = ticks().saturating_sub(self.tick).max(1);
        self.start.elapsed().as_nanos() as f64 / ticks as f64
    }
}

/// CPU time of the calling thread.
#[must_use]
pub fn thread_cpu() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(t.tv_sec).unwrap_or(0), u32::try_from(t.tv_nsec).unwrap_or(0))
}
