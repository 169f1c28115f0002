//! Loans between the vCPUs of one machine, from what each ran and waited. Sans-IO: samples in,
//! decisions out, time passed in.
//!
//! A vCPU's **lag** is how much less than the mean of its striving siblings it ran, nanoseconds. A
//! vCPU strives when it runs or waits; one that sleeps wants nothing and has no lag. When a vCPU lags
//! by more than the threshold, the sibling that is farthest ahead lends to it: the debtor's nice goes
//! down by as many steps as the lender's goes up, so within the machine's group of threads the
//! weights of the kernel's table shift from one to the other and their product stays.
//!
//! A loan is also made for **distance**, as Algorithm 1 of the thesis does it: a vCPU that runs finds
//! a sibling two thirds of its queue away. Ordinates count the one that runs as 0 here, so that a
//! queue of three has a farthest place, 2, that reaches 2/3 x 3; with a queue of two nothing is far.
//! Siblings whose turns alternate in step stay so by themselves on an even host, since all slices end
//! at ticks; a loan of one turn brings them out of it, and siblings whose turns coincide are left
//! alone. Such a loan lives for a few periods at most, and then its partners rest as long.
//!
//! ```text
//!            lag > threshold, a lender is ahead | far
//!   (none) ------------------------------------> [lent]
//!      ^                                            |
//!      |  caught up | lender fell behind | expired  |
//!      |  debtor asleep | one of them gone          |
//!      +--------------------------------------------+   settled: both as before
//! ```
//!
//! Invariants (each tested): the steps of a machine's vCPUs sum to 0; a vCPU takes part in at most one
//! loan, and rests after one for distance (the thesis' dirty tag); no loan outlives its expiry by
//! more than a period; what was lent was settled or is outstanding.

use std::collections::BTreeMap;

use godwit_sched::policy::Alpha;

/// How loans are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// From which lag on a loan is made, nanoseconds.
    pub threshold_ns: u64,
    /// The most steps of nice of one loan.
    pub max_steps: i32,
    /// How long a loan lives at most, nanoseconds.
    pub life_ns: u64,
    /// From which distance on a loan is made.
    pub alpha: Alpha,
    /// How long a loan for distance lives, nanoseconds; 0: there are none.
    pub turn_ns: u64,
}

/// Where a vCPU stands in its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// 0 for the one that runs.
    pub ordinate: usize,
    /// How many run or wait there.
    pub queue: usize,
}

/// What one vCPU did in the last period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Which one.
    pub vcpu: u32,
    /// Time it ran, nanoseconds.
    pub run_ns: u64,
    /// Time it waited, nanoseconds, as far as the wait has ended.
    pub wait_ns: u64,
    /// Whether it is ready now.
    pub ready: bool,
    /// Steps by which its nice may go down, and up.
    pub room: (i32, i32),
    /// Where it stands, if it is ready.
    pub standing: Option<Standing>,
}

/// A loan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loan {
    /// The lender.
    pub from: u32,
    /// The debtor.
    pub to: u32,
    /// Steps of nice, above 0.
    pub steps: i32,
    /// When it ends at the latest.
    pub expires_ns: u64,
    /// What it was made for.
    pub cause: Cause,
}

/// What a loan is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The debtor ran less than its siblings.
    Lag,
    /// The debtor stood far back in its queue while the lender ran.
    Distance,
}

/// Why a loan ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The debtor lags no more.
    CaughtUp,
    /// The lender itself is behind now.
    Exhausted,
    /// Its time was over.
    Expired,
    /// The debtor sleeps.
    Asleep,
    /// The lender or the debtor has ended.
    Gone,
    /// The kernel did not let it happen, or somebody else changed a nice.
    Refused,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Lower the debtor's nice and raise the lender's.
    Lend(Loan),
    /// Put both back.
    Settle(Loan, Why),
}

/// Sums over loans, in steps of nice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Ledger {
    /// Loans made.
    pub loans: u64,
    /// Steps lent.
    pub lent: u64,
    /// Steps settled.
    pub settled: u64,
    /// Loans that ended since the debtor had caught up.
    pub caught_up: u64,
    /// Loans that ended by their expiry.
    pub expired: u64,
    /// Loans that ended with a vCPU.
    pub gone: u64,
    /// Loans that were made for distance.
    pub for_distance: u64,
}

/// The loans of one machine.
#[derive(Debug, Clone)]
pub struct Lending {
    terms: Terms,
    lag_ns: BTreeMap<u32, i64>,
    /// vCPUs that were ready a period ago and had not run.
    starved: BTreeMap<u32, bool>,
    loans: Vec<Loan>,
    ledger: Ledger,
    /// Until when a vCPU takes part in no loan for distance.
    rests: BTreeMap<u32, u64>,
}

impl Lending {
    /// No loans yet.
    #[must_use]
    pub const fn new(terms: Terms) -> Self {
        Self {
            terms,
            lag_ns: BTreeMap::new(),
            starved: BTreeMap::new(),
            loans: Vec::new(),
            ledger: Ledger {
                loans: 0,
                lent: 0,
                settled: 0,
                caught_up: 0,
                expired: 0,
                gone: 0,
                for_distance: 0,
            },
            rests: BTreeMap::new(),
        }
    }

    /// The steps by which a vCPU's nice differs from its own: below 0 for a debtor.
    #[must_use]
    pub fn steps(&self, vcpu: u32) -> i32 {
        let of = |l: &Loan| match vcpu {
            v if v == l.from => l.steps,
            v if v == l.to => -l.steps,
            _ => 0,
        };
        self.loans.iter().map(of).sum()
    }

    /// Loans that stand.
    #[must_use]
    pub fn outstanding(&self) -> &[Loan] {
        &self.loans
    }

    /// The sums.
    #[must_use]
    pub const fn ledger(&self) -> Ledger {
        self.ledger
    }

    /// How far a vCPU is behind its siblings, nanoseconds; below 0 when it is ahead.
    #[must_use]
    pub fn lag_ns(&self, vcpu: u32) -> i64 {
        self.lag_ns.get(&vcpu).copied().unwrap_or_default()
    }

    /// A period of `window_ns` has ended at `now_ns` with these samples, one per vCPU that lives.
    pub fn period(&mut self, now_ns: u64, window_ns: u64, samples: &[Sample]) -> Vec<Decision> {
        let striving = self.account(window_ns, samples);
        let mut decisions = self.settle(now_ns, samples, &striving);
        self.rests.retain(|_, until| *until > now_ns);
        let loan = self.lend(now_ns, samples, &striving);
        if let Some(loan) = loan.or_else(|| self.lend_for_distance(now_ns, samples)) {
            self.loans.push(loan);
            self.ledger.loans += 1;
            self.ledger.for_distance += u64::from(loan.cause == Cause::Distance);
            self.ledger.lent += u64::from(loan.steps.unsigned_abs());
            decisions.push(Decision::Lend(loan));
        }
        decisions
    }

    /// A loan that could not be made, or was undone by somebody else.
    pub fn refuse(&mut self, loan: Loan) {
        if let Some(i) = self.loans.iter().position(|l| *l == loan) {
            self.loans.swap_remove(i);
            self.ledger.settled += u64::from(loan.steps.unsigned_abs());
        }
    }

    /// Brings the lags up to date; the vCPUs that strive.
    fn account(&mut self, window_ns: u64, samples: &[Sample]) -> Vec<u32> {
        let strives = |s: &Sample| {
            let accounted = s.run_ns.saturating_add(s.wait_ns);
            // A wait that has not ended is in no account: ready twice in a row, and never on.
            let starves = s.ready && self.starved.get(&s.vcpu).copied().unwrap_or_default();
            accounted >= window_ns / 2 || starves
        };
        let striving: Vec<&Sample> = samples.iter().filter(|s| strives(s)).collect();
        let runs = |s: &Sample| s.run_ns.min(window_ns.saturating_mul(2)) as i64;
        let mean = striving.iter().map(|s| runs(s)).sum::<i64>() / striving.len().max(1) as i64;
        let cap = self.terms.threshold_ns.saturating_mul(8).min(i64::MAX as u64 / 2) as i64;
        let mut lags = BTreeMap::new();
        for s in &striving {
            let old = self.lag_ns(s.vcpu);
            // A lag is forgotten by an eighth per period: what is long past helps nobody.
            let new = (old - old / 8 + mean - runs(s)).clamp(-cap, cap);
            lags.insert(s.vcpu, new);
        }
        self.lag_ns = lags;
        self.starved = samples.iter().map(|s| (s.vcpu, s.ready && s.run_ns == 0)).collect();
        striving.iter().map(|s| s.vcpu).collect()
    }

    fn settle(&mut self, now_ns: u64, samples: &[Sample], striving: &[u32]) -> Vec<Decision> {
        let lives = |vcpu: u32| samples.iter().any(|s| s.vcpu == vcpu);
        let threshold = self.terms.threshold_ns as i64;
        let why = |loan: &Loan| {
            if !lives(loan.from) || !lives(loan.to) {
                Some(Why::Gone)
            } else if now_ns >= loan.expires_ns {
                Some(Why::Expired)
            } else if loan.cause == Cause::Distance {
                None
            } else if !striving.contains(&loan.to) {
                Some(Why::Asleep)
            } else if self.lag_ns(loan.to) <= 0 {
                Some(Why::CaughtUp)
            } else if self.lag_ns(loan.from) > threshold {
                Some(Why::Exhausted)
            } else {
                None
            }
        };
        let ended: Vec<(Loan, Why)> =
            self.loans.iter().filter_map(|l| Some((*l, why(l)?))).collect();
        for (loan, why) in &ended {
            self.loans.retain(|l| l != loan);
            if loan.cause == Cause::Distance {
                let until = now_ns.saturating_add(self.terms.turn_ns);
                self.rests.extend([(loan.from, until), (loan.to, until)]);
            }
            self.ledger.settled += u64::from(loan.steps.unsigned_abs());
            match why {
                Why::CaughtUp => self.ledger.caught_up += 1,
                Why::Expired => self.ledger.expired += 1,
                Why::Gone => self.ledger.gone += 1,
                Why::Exhausted | Why::Asleep | Why::Refused => {}
            }
        }
        ended.into_iter().map(|(loan, why)| Decision::Settle(loan, why)).collect()
    }

    /// At most one loan per period: its effect is seen before the next is made.
    fn lend(&self, now_ns: u64, samples: &[Sample], striving: &[u32]) -> Option<Loan> {
        let dirty = |v: u32| self.loans.iter().any(|l| l.from == v || l.to == v);
        let free = || striving.iter().copied().filter(|v| !dirty(*v));
        let to = free().max_by_key(|v| (self.lag_ns(*v), std::cmp::Reverse(*v)))?;
        let from = free().filter(|v| *v != to).min_by_key(|v| (self.lag_ns(*v), *v))?;
        let (behind, ahead) = (self.lag_ns(to), -self.lag_ns(from));
        let threshold = self.terms.threshold_ns as i64;
        if behind < threshold || ahead <= 0 {
            return None;
        }
        let room = |v: u32| samples.iter().find(|s| s.vcpu == v).map(|s| s.room);
        let most = room(to)?.0.min(room(from)?.1).min(self.terms.max_steps);
        let wanted = i32::try_from(behind / threshold.max(1)).unwrap_or(i32::MAX);
        let steps = wanted.min(most);
        let expires_ns = now_ns.saturating_add(self.terms.life_ns);
        (steps > 0).then_some(Loan { from, to, steps, expires_ns, cause: Cause::Lag })
    }

    /// Algorithm 1: one that runs, and a sibling that is too far.
    fn lend_for_distance(&self, now_ns: u64, samples: &[Sample]) -> Option<Loan> {
        if self.terms.turn_ns == 0 {
            return None;
        }
        let dirty = |s: &&Sample| {
            let in_loan = |l: &Loan| l.from == s.vcpu || l.to == s.vcpu;
            self.rests.contains_key(&s.vcpu) || self.loans.iter().any(in_loan)
        };
        let stands = |s: &Sample| s.standing.map_or((0, 0), |at| (at.ordinate, at.queue));
        let free = || samples.iter().filter(|s| s.standing.is_some() && !dirty(s));
        let from = free().find(|s| stands(s).0 == 0)?;
        let far = |s: &&Sample| {
            let (ordinate, queue) = stands(s);
            ordinate > 0 && self.terms.alpha.reached(ordinate, queue)
        };
        let to = free().filter(far).max_by_key(|s| stands(s).0)?;
        let steps = to.room.0.min(from.room.1).min(self.terms.max_steps);
        let expires_ns = now_ns.saturating_add(self.terms.turn_ns);
        let loan = Loan { from: from.vcpu, to: to.vcpu, steps, expires_ns, cause: Cause::Distance };
        (steps > 0).then_some(loan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: u64 = 1_000_000;
    const WINDOW: u64 = 50 * MS;
    const TERMS: Terms = Terms {
        threshold_ns: 10 * MS,
        max_steps: 3,
        life_ns: 200 * MS,
        alpha: Alpha::THESIS,
        turn_ns: 50 * MS,
    };

    fn ran(vcpu: u32, run_ms: u64, wait_ms: u64) -> Sample {
        let (run_ns, wait_ns) = (run_ms * MS, wait_ms * MS);
        Sample { vcpu, run_ns, wait_ns, ready: true, room: (20, 19), standing: None }
    }

    #[test]
    fn a_starved_sibling_is_lent_to_and_pays_back_when_it_has_caught_up() {
        let mut lending = Lending::new(TERMS);
        let first = lending.period(50 * MS, WINDOW, &[ran(0, 40, 10), ran(1, 10, 40)]);
        let Some(Decision::Lend(loan)) = first.first().copied() else { panic!("{first:?}") };
        assert_eq!((loan.from, loan.to, loan.steps), (0, 1, 1));
        assert_eq!((lending.steps(0), lending.steps(1)), (1, -1));
        let second = lending.period(100 * MS, WINDOW, &[ran(0, 5, 45), ran(1, 45, 5)]);
        assert_eq!(second, [Decision::Settle(loan, Why::CaughtUp)]);
        assert_eq!((lending.steps(0), lending.steps(1)), (0, 0));
        assert_eq!(lending.ledger().caught_up, 1);
    }

    #[test]
    fn a_loan_expires() {
        let mut lending = Lending::new(TERMS);
        let mut ended = None;
        for i in 1..20 {
            let d = lending.period(i * 50 * MS, WINDOW, &[ran(0, 40, 10), ran(1, 10, 40)]);
            if let Some(Decision::Settle(loan, why)) = d.first() {
                ended = Some((i * 50 * MS, *loan, *why));
                break;
            }
        }
        let (at, loan, why) = ended.expect("an end");
        assert_eq!((at, why), (loan.expires_ns, Why::Expired));
    }

    #[test]
    fn who_sleeps_gets_no_loan_and_who_waits_without_end_does() {
        let mut lending = Lending::new(TERMS);
        let asleep = Sample { ready: false, ..ran(1, 0, 0) };
        for i in 1..10 {
            assert!(lending.period(i * 50 * MS, WINDOW, &[ran(0, 50, 0), asleep]).is_empty());
        }
        // Its wait has not ended, so the kernel's account does not show it.
        let starved = ran(1, 0, 0);
        let lent = (10..14).any(|i| {
            let d = lending.period(i * 50 * MS, WINDOW, &[ran(0, 50, 0), starved]);
            d.iter().any(|d| matches!(d, Decision::Lend(l) if l.to == 1))
        });
        assert!(lent);
    }

    #[test]
    fn a_vcpu_that_ends_settles_its_loan() {
        for gone in [0, 1] {
            let mut lending = Lending::new(TERMS);
            let both = [ran(0, 40, 10), ran(1, 10, 40)];
            assert_eq!(lending.period(50 * MS, WINDOW, &both).len(), 1);
            let d = lending.period(100 * MS, WINDOW, &[both[1 - gone]]);
            assert!(matches!(d[..], [Decision::Settle(_, Why::Gone)]), "{d:?}");
            assert!(lending.outstanding().is_empty());
        }
    }

    #[test]
    fn there_is_no_loan_without_room() {
        let mut lending = Lending::new(TERMS);
        let full = Sample { room: (0, 19), ..ran(1, 10, 40) };
        assert!(lending.period(50 * MS, WINDOW, &[ran(0, 40, 10), full]).is_empty());
    }

    fn at(ordinate: usize, queue: usize, sample: Sample) -> Sample {
        Sample { standing: Some(Standing { ordinate, queue }), ..sample }
    }

    #[test]
    fn a_sibling_two_thirds_of_its_queue_away_is_lent_a_turn() {
        let even = |v| ran(v, 20, 30);
        for (ordinate, queue, lent) in
            [(2, 3, true), (1, 3, false), (1, 2, false), (0, 3, false), (4, 6, true), (3, 6, false)]
        {
            let mut lending = Lending::new(TERMS);
            let samples = [at(0, 3, even(0)), at(ordinate, queue, even(1))];
            let d = lending.period(50 * MS, WINDOW, &samples);
            assert_eq!(!d.is_empty(), lent, "ordinate {ordinate} of {queue}: {d:?}");
            if lent {
                assert_eq!((lending.steps(0), lending.steps(1)), (3, -3));
                // It is settled after its turn, and then both rest for one.
                let d = lending.period(100 * MS, WINDOW, &samples);
                assert!(matches!(d[..], [Decision::Settle(_, Why::Expired)]), "{d:?}");
                assert!(lending.period(140 * MS, WINDOW, &samples).is_empty());
                assert_eq!(lending.period(160 * MS, WINDOW, &samples).len(), 1);
                assert_eq!(lending.ledger().for_distance, 2);
            }
        }
    }

    fn samples() -> impl Strategy<Value = Vec<Sample>> {
        let standing = (any::<bool>(), 0usize..6, 1usize..6);
        let one = (0u64..60, 0u64..60, any::<bool>(), 0i32..20, 0i32..20, any::<bool>(), standing);
        proptest::collection::vec(one, 2..6).prop_map(|all| {
            all.into_iter()
                .zip(0u32..)
                .filter(|((.., gone, _), _)| !gone)
                .map(|((run, wait, ready, down, up, _, (stands, ordinate, queue)), vcpu)| Sample {
                    ready,
                    room: (down, up),
                    standing: stands.then_some(Standing { ordinate, queue }),
                    ..ran(vcpu, run, wait)
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn loans_are_zero_sum_bounded_and_end(
            periods in proptest::collection::vec(samples(), 1..60)
        ) {
            let mut lending = Lending::new(TERMS);
            // What a skin would have set, from the decisions alone.
            let mut nice: BTreeMap<u32, i32> = BTreeMap::new();
            for (i, samples) in periods.iter().enumerate() {
                let now = (i as u64 + 1) * WINDOW;
                for decision in lending.period(now, WINDOW, samples) {
                    let (loan, sign) = match decision {
                        Decision::Lend(l) => {
                            prop_assert!(l.steps > 0 && l.steps <= TERMS.max_steps);
                            prop_assert!(l.from != l.to);
                            for v in [l.from, l.to] {
                                prop_assert!(samples.iter().any(|s| s.vcpu == v));
                            }
                            (l, 1)
                        }
                        Decision::Settle(l, _) => (l, -1),
                    };
                    *nice.entry(loan.from).or_default() += sign * loan.steps;
                    *nice.entry(loan.to).or_default() -= sign * loan.steps;
                }
                prop_assert_eq!(nice.values().sum::<i32>(), 0);
                for (vcpu, steps) in &nice {
                    prop_assert_eq!(*steps, lending.steps(*vcpu));
                    prop_assert!(steps.abs() <= TERMS.max_steps);
                }
                for loan in lending.outstanding() {
                    prop_assert!(loan.expires_ns > now);
                }
                let sums = lending.ledger();
                let out: i32 = lending.outstanding().iter().map(|l| l.steps).sum();
                prop_assert_eq!(sums.lent, sums.settled + out as u64);
            }
            // Without vCPUs nothing stays lent.
            lending.period(u64::MAX, WINDOW, &[]);
            prop_assert!(lending.outstanding().is_empty());
        }
    }
}
