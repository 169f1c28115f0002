//! Which scheduler: the order of a run queue, where a vCPU may be placed, and what couples
//! siblings. SBCO and its rivals are points of one space, so that they are compared on the same
//! run queues.

use std::fmt;
use std::str::FromStr;

/// A share of a run queue's size, exact: `numerator / denominator`, in lowest terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alpha {
    numerator: u32,
    denominator: u32,
}

impl Alpha {
    /// The thesis' choice, two thirds (section 4.3.3).
    pub const THESIS: Self = Self { numerator: 2, denominator: 3 };

    /// No distance at all: strict co-scheduling (section 4.7: "if such threshold is restricted to
    /// zero, ... SBCO reduces itself to be the conventional strict co-start and co-stop
    /// co-scheduling").
    pub const ZERO: Self = Self { numerator: 0, denominator: 1 };

    /// `numerator / denominator`; `None` unless it is from 0 to 1.
    #[must_use]
    pub const fn new(numerator: u32, denominator: u32) -> Option<Self> {
        if denominator == 0 || numerator > denominator {
            return None;
        }
        Some(Self::reduced(numerator, denominator))
    }

    /// Divided by the greatest common divisor, after Euclid.
    const fn reduced(numerator: u32, denominator: u32) -> Self {
        let (mut x, mut y) = (numerator, denominator);
        while y != 0 {
            (x, y) = (y, x % y);
        }
        Self { numerator: numerator / x, denominator: denominator / x }
    }

    /// What lies `step` of `steps` equal steps on the way from here to `other`.
    #[must_use]
    pub const fn towards(self, other: Self, step: u32, steps: u32) -> Self {
        let (a, b, c, d) = (self.numerator, self.denominator, other.numerator, other.denominator);
        Self::reduced(a * d * (steps - step) + c * b * step, b * d * steps)
    }

    /// The share's numerator and denominator.
    #[must_use]
    pub const fn parts(self) -> (u32, u32) {
        (self.numerator, self.denominator)
    }

    /// Whether no distance is allowed.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.numerator == 0
    }

    /// Whether `distance` reaches D_threshold = alpha x `queue_size`.
    #[must_use]
    pub const fn reached(self, distance: usize, queue_size: usize) -> bool {
        distance as u64 * self.denominator as u64 >= self.numerator as u64 * queue_size as u64
    }
}

impl PartialOrd for Alpha {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Alpha {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let cross = |a: &Self, b: &Self| u64::from(a.numerator) * u64::from(b.denominator);
        cross(self, other).cmp(&cross(other, self))
    }
}

impl fmt::Display for Alpha {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.numerator, self.denominator)
    }
}

/// What is no share of a run queue.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("alpha {text:?} is no share of a queue: write N/M with 0 <= N <= M <= 1000, such as 2/3")]
pub struct BadAlpha {
    text: String,
}

impl FromStr for Alpha {
    type Err = BadAlpha;

    fn from_str(text: &str) -> Result<Self, BadAlpha> {
        let parts = text.split_once('/');
        parts
            .and_then(|(n, m)| Self::new(n.parse().ok()?, m.parse().ok().filter(|m| *m <= 1000)?))
            .ok_or_else(|| BadAlpha { text: text.chars().take(40).collect() })
    }
}

/// In which order a run queue is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// By virtual runtime: CFS, as in Linux 2.6.34.
    Cfs,
    /// The earliest virtual deadline among the eligible: EEVDF, as in Linux 6.12 and later.
    Eevdf,
}

/// What the target of a directed yield gets beside being asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credit {
    /// Nothing: a target that is not eligible is passed over, as Linux does.
    None,
    /// As much lag as makes it eligible with a slice to spare, and KVM prefers who owes the
    /// spinner an answer to an interrupt: the series *Semantics-aware directed yield for
    /// oversubscribed KVM* (W. Li, version 3, June 2026).
    Lag,
}

/// What couples the vCPUs of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coupling {
    /// Nothing: the first in order runs.
    None,
    /// Self-boosted co-scheduling: Algorithm 1 with this alpha; strict co-scheduling where that is
    /// zero.
    Distance(Alpha),
    /// The same with an alpha for each machine, which follows what its distance costs it
    /// ([`crate::adaptive`]).
    Adaptive {
        /// The least.
        tightest: Alpha,
        /// The greatest, and the first.
        loosest: Alpha,
    },
    /// Process-based co-scheduling (section 4.5): when a machine's vCPU 0 is scheduled, its
    /// siblings are forced onto their pCPUs by an interrupt.
    Process,
    /// CPU-based co-scheduling (section 4.5): what pCPU 0 schedules decides for all pCPUs.
    Cpu,
    /// VMware's relaxed co-scheduling as of ESX 4: a vCPU that has made so many nanoseconds more
    /// progress than the slowest of its siblings stops, unless that one runs.
    Relaxed(u64),
    /// KVM's directed yield: a vCPU that spins in its kernel is made to leave (pause-loop
    /// exiting), and a sibling that waits for its pCPU is asked for.
    Yield(Credit),
}

/// Who compares itself with whom where a machine has more than two vCPUs; with two both are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lending {
    /// Each with each of its siblings, as Algorithm 1 is printed.
    Pairs,
    /// All with one of them, which they follow.
    Follow,
}

/// A scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// In which order run queues are served.
    pub order: Order,
    /// Whether siblings are kept on distinct pCPUs (Algorithm 2, `SCHED_DISPATCH`).
    pub distinct: bool,
    /// What couples siblings.
    pub coupling: Coupling,
    /// Who lends to whom, where lending couples them.
    pub lending: Lending,
}

impl Policy {
    /// The default scheduler of Linux 2.6.34, CFS.
    pub const DFT: Self = Self {
        order: Order::Cfs,
        distinct: false,
        coupling: Coupling::None,
        lending: Lending::Follow,
    };
    /// The default scheduler of Linux since 6.6, EEVDF.
    pub const EEVDF: Self = Self { order: Order::Eevdf, ..Self::DFT };
    /// Balance scheduling: siblings on distinct pCPUs, nothing else.
    pub const BAL: Self = Self { distinct: true, ..Self::DFT };
    /// SBCO with the thesis' threshold.
    pub const SBCO: Self = Self { coupling: Coupling::Distance(Alpha::THESIS), ..Self::BAL };
    /// SBCO with pairwise lending, as Algorithm 1 is printed, for any number of siblings.
    pub const SBCO_PAIRS: Self = Self { lending: Lending::Pairs, ..Self::SBCO };
    /// SBCO with half the thesis' threshold.
    pub const SBCO_3: Self =
        Self { coupling: Coupling::Distance(Alpha { numerator: 1, denominator: 3 }), ..Self::BAL };
    /// SBCO with an eighth.
    pub const SBCO_8: Self =
        Self { coupling: Coupling::Distance(Alpha { numerator: 1, denominator: 8 }), ..Self::BAL };
    /// SBCO with an adaptive threshold, from the thesis' to none.
    pub const ADAPTIVE: Self = Self {
        coupling: Coupling::Adaptive { tightest: Alpha::ZERO, loosest: Alpha::THESIS },
        ..Self::BAL
    };
    /// SBCO that allows no distance: strict co-scheduling.
    pub const STRICT: Self = Self { coupling: Coupling::Distance(Alpha::ZERO), ..Self::BAL };
    /// Process-based co-scheduling.
    pub const PROCCO: Self = Self { coupling: Coupling::Process, ..Self::BAL };
    /// CPU-based co-scheduling.
    pub const CPUCO: Self = Self { coupling: Coupling::Cpu, ..Self::BAL };
    /// VMware's relaxed co-scheduling. VMware publishes no skew; 3 ms, the shortest stint of CFS on
    /// four pCPUs, is assumed.
    pub const RELAXED: Self = Self { coupling: Coupling::Relaxed(3_000_000), ..Self::BAL };
    /// Today's Linux with KVM's directed yield.
    pub const YIELD: Self = Self { coupling: Coupling::Yield(Credit::None), ..Self::EEVDF };
    /// The same with credit for the target.
    pub const YIELD_CREDIT: Self = Self { coupling: Coupling::Yield(Credit::Lag), ..Self::EEVDF };
    /// All that have a name, with it.
    pub const NAMED: [(&'static str, Self); 14] = [
        ("sbco", Self::SBCO),
        ("sbco-pairs", Self::SBCO_PAIRS),
        ("sbco-third", Self::SBCO_3),
        ("sbco-eighth", Self::SBCO_8),
        ("dft", Self::DFT),
        ("bal", Self::BAL),
        ("procco", Self::PROCCO),
        ("cpuco", Self::CPUCO),
        ("adaptive", Self::ADAPTIVE),
        ("strict", Self::STRICT),
        ("relaxed", Self::RELAXED),
        ("eevdf", Self::EEVDF),
        ("yield", Self::YIELD),
        ("yield-credit", Self::YIELD_CREDIT),
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
#[error("there is no policy {name:?}; there are {known}", known = Policy::NAMED.map(|(n, _)| n).join(", "))]
pub struct UnknownPolicy {
    name: String,
}

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Self::NAMED
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, p)| *p)
            .ok_or_else(|| UnknownPolicy { name: name.to_owned() })
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

    /// EEVDF's slice (`base_slice_ns`): 0.7 ms times the same factor, as Linux has it since 6.15.
    #[must_use]
    pub const fn eevdf_slice(&self) -> u64 {
        self.min * 7 / 10
    }

    /// How much lag EEVDF keeps at most (`entity_lag`): two slices, at least a tick of 4 ms.
    #[must_use]
    pub const fn eevdf_lag(&self) -> u64 {
        let two = 2 * self.eevdf_slice();
        if two > 4_000_000 { two } else { 4_000_000 }
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
        assert_eq!(Alpha::new(1, 0), None);
        let step = |n| Alpha::ZERO.towards(Alpha::THESIS, n, 4);
        assert_eq!((step(0), step(4)), (Alpha::ZERO, Alpha::THESIS));
        assert_eq!([1, 2, 3].map(|n| step(n).to_string()), ["1/6", "1/3", "1/2"]);
        assert_eq!(Alpha::new(4, 3), None);
    }

    #[test]
    fn an_alpha_is_read_as_it_is_written() {
        for (text, alpha) in [("2/3", Alpha::THESIS), ("4/6", Alpha::THESIS), ("0/5", Alpha::ZERO)]
        {
            assert_eq!(text.parse(), Ok(alpha));
            assert_eq!(alpha.to_string().parse(), Ok(alpha));
        }
        for wrong in ["", "4/3", "2", "2/0", "-1/3", "2/3000", "0.66", "1/1/1"] {
            assert!(wrong.parse::<Alpha>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_are_read_and_written() {
        for (name, policy) in Policy::NAMED {
            assert_eq!(name.parse(), Ok(policy));
            assert_eq!(policy.to_string(), name);
        }
        let unknown = "fair".parse::<Policy>().expect_err("not a policy").to_string();
        assert!(unknown.contains("fair") && unknown.contains("yield-credit"), "{unknown}");
    }
}
