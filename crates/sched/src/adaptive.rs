//! The online adaptive threshold (the thesis' future work, section 4.7): each machine's alpha after
//! what its distance costs it.
//!
//! ```text
//!   window ends:  wasted > 2 %    ──▶ a step tighter, and longer until the next try to loosen
//!                 wasted < 0.5 %  ──▶ a step looser, once the time since the last failure is over
//!                 tightest does not waste less than the loosest did ──▶ loosest
//! ```
//!
//! *Wasted* is what a machine's vCPUs ran spinning while a sibling stood in a queue
//! ([`Scheduler::spun`]): that is what a smaller distance could save. A window is 200 ms that the
//! machine ran, some ten turns of four vCPUs. Each try to loosen that fails doubles the time until
//! the next, so an alpha comes to rest. Nothing depends on a clock.

use std::fmt;

use crate::policy::{Alpha, Coupling};
use crate::scheduler::{Place, Scheduler, TaskId, VmId};

/// What a machine runs between two looks, nanoseconds.
const WINDOW: u64 = 200_000_000;
/// From which share on waste is worth a tighter alpha: parts in a thousand. It is what a machine
/// that does not wait may lose by being co-scheduled.
const COSTLY: u64 = 20;
/// Below which share a looser alpha is tried.
const CHEAP: u64 = 5;
/// Steps between the bounds.
const STEPS: u32 = 4;
/// Windows until a looser alpha is tried, at first and at most.
const PATIENCE: u32 = 4;
const MOST_PATIENCE: u32 = 4096;
/// Changes that are remembered of a machine.
const REMEMBERED: usize = 64;

/// Why an alpha was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its distance costs the machine more than 2 %.
    Costly,
    /// It costs less than 0.5 %, and the last try to loosen it is long enough ago.
    Cheap,
    /// At the tightest alpha the machine wastes as much as it did at the loosest.
    Useless,
}

/// One change of a machine's alpha.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// What the machine's vCPUs had run by then, nanoseconds.
    pub after: u64,
    /// The alpha before.
    pub from: Alpha,
    /// And from then on.
    pub to: Alpha,
    /// What was wasted in the window before, parts in a thousand of what it ran.
    pub wasted: u64,
    /// Why.
    pub reason: Reason,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, tenth) = (self.wasted / 10, self.wasted % 10);
        let why = match self.reason {
            Reason::Costly => "tighter",
            Reason::Cheap => "a looser one is tried",
            Reason::Useless => "no less than at the loosest, to which it returns",
        };
        let Self { after, from, to, .. } = self;
        let ms = after / 1_000_000;
        write!(f, "after {ms} ms: {from} to {to}: {whole}.{tenth} % wasted on distance: {why}")
    }
}

/// A machine's alpha and what it rests on.
#[derive(Debug, Clone)]
pub(crate) struct Adaptive {
    level: u32,
    ran: u64,
    wasted: u64,
    ran_before: u64,
    patience: u32,
    waits: u32,
    tries: bool,
    /// What was wasted in the last window at the loosest alpha.
    at_loosest: u64,
    changes: Vec<Change>,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self {
            level: STEPS,
            ran: 0,
            wasted: 0,
            ran_before: 0,
            patience: PATIENCE,
            waits: 0,
            tries: false,
            at_loosest: 0,
            changes: Vec::new(),
        }
    }
}

impl Adaptive {
    fn alpha(&self, tightest: Alpha, loosest: Alpha) -> Alpha {
        tightest.towards(loosest, self.level, STEPS)
    }

    /// The machine ran so much more; at a window's end its alpha may change.
    fn runs(&mut self, ns: u64, tightest: Alpha, loosest: Alpha) {
        self.ran += ns;
        if self.ran < WINDOW {
            return;
        }
        let wasted = self.wasted * 1000 / self.ran;
        self.ran_before += self.ran;
        (self.ran, self.wasted) = (0, 0);
        let from = self.alpha(tightest, loosest);
        let Some(reason) = self.judge(wasted) else { return };
        let to = self.alpha(tightest, loosest);
        if self.changes.len() == REMEMBERED {
            self.changes.remove(0);
        }
        self.changes.push(Change { after: self.ran_before, from, to, wasted, reason });
    }

    fn judge(&mut self, wasted: u64) -> Option<Reason> {
        if self.level == STEPS {
            self.at_loosest = wasted;
        }
        let failed = std::mem::take(&mut self.tries);
        if wasted > COSTLY {
            if failed {
                self.patience = (self.patience * 2).min(MOST_PATIENCE);
            }
            if self.level == 0 {
                // A fifth less is the least that counts as help.
                if wasted * 5 > self.at_loosest * 4 && self.at_loosest > 0 {
                    self.patience = (self.patience * 2).min(MOST_PATIENCE);
                    (self.level, self.waits) = (STEPS, self.patience);
                    return Some(Reason::Useless);
                }
                return None;
            }
            if self.level == STEPS && self.waits > 0 && !failed {
                // Tightening was of no use lately.
                self.waits -= 1;
                return None;
            }
            self.level -= 1;
            self.waits = self.patience;
            return Some(Reason::Costly);
        }
        if wasted >= CHEAP || self.level == STEPS {
            return None;
        }
        if self.waits > 0 {
            self.waits -= 1;
            return None;
        }
        self.level += 1;
        self.tries = true;
        Some(Reason::Cheap)
    }
}

impl Scheduler {
    /// The alpha of `vm`; `None` where the policy has none.
    #[must_use]
    pub fn alpha_of(&self, vm: VmId) -> Option<Alpha> {
        match self.policy.coupling {
            Coupling::Distance(alpha) => Some(alpha),
            Coupling::Adaptive { tightest, loosest } => {
                Some(self.adaptive[vm.0 as usize].alpha(tightest, loosest))
            }
            _ => None,
        }
    }

    /// How the alpha of `vm` came about: its last changes.
    #[must_use]
    pub fn alpha_changes(&self, vm: VmId) -> &[Change] {
        &self.adaptive[vm.0 as usize].changes
    }

    /// Of what `task` was charged, it spun so long. It counts as wasted if a sibling stood in a
    /// queue; hosts learn of it by pause-loop exits.
    pub fn spun(&mut self, task: TaskId, ns: u64) {
        let Some(vm) = self.task(task).vm else { return };
        let queued = |t: TaskId| matches!(self.task(t).place, Place::Queued(_));
        if matches!(self.policy.coupling, Coupling::Adaptive { .. })
            && self.siblings(task).any(queued)
        {
            self.adaptive[vm.0 as usize].wasted += ns;
        }
    }

    /// Accounts for what a vCPU ran.
    pub(crate) fn adapt(&mut self, task: TaskId, ns: u64) {
        if let Coupling::Adaptive { tightest, loosest } = self.policy.coupling
            && let Some(vm) = self.task(task).vm
        {
            self.adaptive[vm.0 as usize].runs(ns, tightest, loosest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOSEST: Alpha = Alpha::THESIS;

    fn windows(a: &mut Adaptive, shares: impl IntoIterator<Item = u64>) {
        for share in shares {
            a.wasted = WINDOW / 1000 * share;
            a.runs(WINDOW, Alpha::ZERO, LOOSEST);
        }
    }

    #[test]
    fn waste_tightens_down_to_the_bound_and_no_further() {
        let mut a = Adaptive { at_loosest: 900, ..Adaptive::default() };
        windows(&mut a, [500, 400, 300, 200, 100, 100, 100]);
        assert_eq!(a.alpha(Alpha::ZERO, LOOSEST), Alpha::ZERO);
        assert_eq!(a.changes.len(), STEPS as usize);
        let said = a.changes[0].to_string();
        assert_eq!(said, "after 200 ms: 2/3 to 1/2: 50.0 % wasted on distance: tighter");
    }

    #[test]
    fn who_does_not_wait_stays_loose() {
        let mut a = Adaptive::default();
        windows(&mut a, [0; 100]);
        assert_eq!((a.level, a.changes.len()), (STEPS, 0));
    }

    /// A machine that wastes nothing at the tightest and much at any other comes to rest.
    #[test]
    fn tries_to_loosen_become_rare() {
        let mut a = Adaptive::default();
        let mut tries = Vec::new();
        for window in 0..4000 {
            let share = if a.level == 0 { 0 } else { 300 };
            let before = a.level;
            windows(&mut a, [share]);
            if before == 0 && a.level == 1 {
                tries.push(window);
            }
        }
        assert!(tries.len() < 12, "{tries:?}");
        assert!(tries[4] - tries[3] > 2 * (tries[1] - tries[0]), "{tries:?}");
    }

    #[test]
    fn what_does_not_help_is_given_up() {
        let mut a = Adaptive::default();
        windows(&mut a, [300; 5]);
        assert_eq!(a.changes.last().map(|c| c.reason), Some(Reason::Useless));
        assert_eq!(a.level, STEPS);
        let before = a.changes.len();
        windows(&mut a, [300; 6]);
        assert_eq!(a.changes.len(), before, "{:?}", a.changes);
    }

    #[test]
    fn the_record_is_bounded() {
        let mut a = Adaptive::default();
        for i in 0..100_000_u64 {
            windows(&mut a, [if i % 7 < 3 { 300 } else { 0 }]);
        }
        assert!(a.changes.len() <= REMEMBERED);
    }
}
