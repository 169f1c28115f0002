//! Which scheduler: the order of a run queue, where a vCPU may be placed, and what couples
//! siblings. SBCO and its rivals are points of one space, so that they are compared on the same
//! run queues.

use std::fmt;
use std::str::FromStr;

/// A share of a run queue's size, exact: `numerator / denominator`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alpha {
    numerator: u32,
    denominator: u32,
}

impl Alpha {
    /// The thesis' choice, two thirds (section 4.3.3).
    pub const THESIS: Self = Self { numerator: 2, denominator: 3 };

    /// `numerator / denominator`; `None` unless it is above 0 and at most 1.
    #[must_use]
    pub const fn new(numerator: u32, denominator: u32) -> Option<Self> {
        if numerator == 0 || numerator > denominator {
            return None;
        }
        Some(Self { numerator, denominator })
    }

    /// Whether `distance` reaches D_threshold = alpha x `queue_size`.
    #[must_use]
    pub const fn reached(self, distance: usize, queue_size: usize) -> bool {
        distance as u64 * self.denominator as u64 >= self.numerator as u64 * queue_size as u64
    }
}

impl fmt::Display for Alpha {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.numerator, self.denominator)
    }
}

/// What couples the vCPUs of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coupling {
    /// Nothing: the task with the smallest vruntime runs.
    None,
    /// Self-boosted co-scheduling: Algorithm 1 with this alpha.
    Distance(Alpha),
    /// Process-based co-scheduling (section 4.5): when a machine's vCPU 0 is scheduled, its
    /// siblings are forced onto their pCPUs by an interrupt.
    Process,
    /// CPU-based co-scheduling (section 4.5): what pCPU 0 schedules decides for all pCPUs.
    Cpu,
}

/// A scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Whether siblings are kept on distinct pCPUs (Algorithm 2, `SCHED_DISPATCH`).
    pub distinct: bool,
    /// What couples siblings.
    pub coupling: Coupling,
}

impl Policy {
    /// The default scheduler of Linux 2.6.34, CFS.
    pub const DFT: Self = Self { distinct: false, coupling: Coupling::None };
    /// Balance scheduling: siblings on distinct pCPUs, nothing else.
    pub const BAL: Self = Self { distinct: true, coupling: Coupling::None };
    /// SBCO with the thesis' threshold.
    pub const SBCO: Self = Self { distinct: true, coupling: Coupling::Distance(Alpha::THESIS) };
    /// Process-based co-scheduling.
    pub const PROCCO: Self = Self { distinct: true, coupling: Coupling::Process };
    /// CPU-based co-scheduling.
    pub const CPUCO: Self = Self { distinct: true, coupling: Coupling::Cpu };
    /// All that have a name, with it.
    pub const NAMED: [(&'static str, Self); 5] = [
        ("dft", Self::DFT),
        ("bal", Self::BAL),
        ("procco", Self::PROCCO),
        ("cpuco", Self::CPUCO),
        ("sbco", Self::SBCO),
    ];
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMED.iter().find(|(_, p)| p == self) {
            Some((name, _)) => f.write_str(name),
            None => match self.coupling {
                Coupling::Distance(alpha) => write!(f, "sbco {alpha}"),
                other => write!(f, "{other:?}"),
            },
        }
    }
}

/// No policy of that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no policy {0:?}; there are dft, bal, procco, cpuco and sbco")]
pub struct UnknownPolicy(String);

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Self::NAMED
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, p)| *p)
            .ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

/// The constants of CFS, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granularity {
    /// `sched_latency`: the period in which every task runs once, while they are few.
    pub latency: u64,
    /// `sched_min_granularity`: the shortest stint.
    pub min: u64,
    /// `sched_wakeup_granularity`: how far behind a woken task must be to preempt.
    pub wakeup: u64,
}

impl Granularity {
    /// Those of Linux 2.6.34: 5, 1 and 1 ms, times 1 + log2 of the number of pCPUs, of which at
    /// most 8 count.
    #[must_use]
    pub const fn linux_2_6_34(cpus: usize) -> Self {
        let counted = if cpus > 8 {
            8
        } else if cpus == 0 {
            1
        } else {
            cpus
        };
        let factor = 1 + counted.ilog2() as u64;
        Self { latency: 5_000_000 * factor, min: 1_000_000 * factor, wakeup: 1_000_000 * factor }
    }

    /// T_p of section 4.3.3: in which time every one of `running` tasks is scheduled once.
    #[must_use]
    pub const fn period(&self, running: usize) -> u64 {
        let few = self.latency / self.min;
        if running as u64 <= few { self.latency } else { running as u64 * self.min }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_period_is_that_of_section_4_3_3() {
        let g = Granularity::linux_2_6_34(4);
        assert_eq!((g.latency, g.min), (15_000_000, 3_000_000));
        assert_eq!(g.period(1), 15_000_000);
        assert_eq!(g.period(5), 15_000_000);
        assert_eq!(g.period(8), 24_000_000);
        assert_eq!(Granularity::linux_2_6_34(128), Granularity::linux_2_6_34(8));
    }

    #[test]
    fn two_thirds_are_exact() {
        // Ordinates count from 0, so the farthest of n tasks is n - 1 away from the first.
        let reached: Vec<bool> = (1..=9).map(|n| Alpha::THESIS.reached(n - 1, n)).collect();
        assert_eq!(reached, [false, false, true, true, true, true, true, true, true]);
        assert!(Alpha::THESIS.reached(4, 6) && !Alpha::THESIS.reached(3, 6));
        assert_eq!(Alpha::new(0, 3), None);
        assert_eq!(Alpha::new(4, 3), None);
    }

    #[test]
    fn names_are_read_and_written() {
        for (name, policy) in Policy::NAMED {
            assert_eq!(name.parse(), Ok(policy));
            assert_eq!(policy.to_string(), name);
        }
        assert!("fair".parse::<Policy>().is_err());
    }
}
