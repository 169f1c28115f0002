//! Self-boosted co-scheduling: Algorithms 1 and 2 of the thesis, section 4.4.
//!
//! **Ordinates** count from 0 in the tree of a pCPU, and `Q_size` is the number of its nodes. What
//! runs is not in the tree (CFS takes it out), so it has no ordinate and waits for nobody; when a
//! pCPU decides, what ran there is back in its tree. The farthest of n waiting tasks has ordinate
//! n - 1: two thirds are first reached where 3 wait.
//!
//! **Loans.** The fast sibling (the lender) gets `amount` added to its vruntime at once, on its
//! own run queue, which its pCPU has locked anyway. The slow one (the debtor) gets the same amount
//! taken off when *its* pCPU next decides; until then the loan stands on that pCPU's debt list.
//! No step touches two run queues. A debtor that has moved takes its loan along; one that sleeps
//! or is gone does not need it: the loan goes back to its lender the same way.
//!
//! **Where this differs from the text.**
//! - Algorithm 1 passes the candidate over before `SCHED_BLANCE` looks at its dirty tag; a dirty
//!   candidate would then be passed over at every decision until a sibling comes close. The text says
//!   that the tag prevents just that, so here a dirty candidate runs.
//! - The amount of a loan is left open. Here it is what brings the lender behind the middle of its
//!   queue, at most one slice, and of that the debtor gets what brings it to the middle of its own
//!   ("both move towards the center"); the rest goes back. Were it brought to the front, others of
//!   that queue could be overtaken time and again.
//! - The lender's tag is cleared when it runs: "each vCPU is guaranteed one time to be scheduled in a
//!   scheduling period".

use crate::policy::Alpha;
use crate::scheduler::{CpuId, Place, Scheduler, TaskId};

/// A change that is due when its pCPU next decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Debt {
    /// Whose vruntime goes down.
    to: TaskId,
    /// Who paid.
    lender: TaskId,
    /// By how much, nanoseconds of vruntime.
    amount: i64,
}

impl Debt {
    pub(crate) const fn amount(&self) -> i64 {
        self.amount
    }
}

/// A loan that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loan {
    /// Who paid at once.
    pub lender: TaskId,
    /// Who gets it when its pCPU next decides.
    pub debtor: TaskId,
    /// Nanoseconds of vruntime.
    pub amount: i64,
}

/// Loans, in nanoseconds of vruntime. Lending is zero-sum: what was lent was settled, returned,
/// is outstanding, or was lost with a lender that ended ([`Ledger::balanced`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Loans made.
    pub loans: u64,
    /// Their sum.
    pub lent: i64,
    /// What debtors got.
    pub settled: i64,
    /// What lenders got back.
    pub returned: i64,
    /// What nobody was left to get back.
    pub lost: i64,
    /// What stands on debt lists.
    pub outstanding: i64,
    /// Times that a decision compared a vCPU with its siblings.
    pub checks: u64,
    /// Times that one of them was too far.
    pub exceeded: u64,
}

impl Ledger {
    /// Whether the sums add up.
    #[must_use]
    pub const fn balanced(&self) -> bool {
        self.lent == self.settled + self.returned + self.lost + self.outstanding
    }
}

impl Scheduler {
    /// `SCHED_DISPATCH` (Algorithm 2, lines 1 to 10): the pCPUs that `task` may be put on. Where
    /// a machine has more vCPUs than there are pCPUs, those that find none left take one by
    /// chance (section 4.5).
    pub(crate) fn dispatch(&mut self, task: TaskId) -> Vec<CpuId> {
        let mut cpus = self.online(); // line 2
        let Some(vm) = self.task(task).vm.filter(|_| self.policy.distinct) else {
            return cpus;
        };
        // lines 3 to 7: a sibling occupies its pCPU while it sleeps, too.
        let siblings = &self.vms[vm.0 as usize];
        cpus.retain(|c| siblings.iter().all(|b| *b == task || self.task(*b).cpu != *c));
        if cpus.is_empty() {
            let all = self.online();
            cpus.push(all[self.draw(all.len())]);
        }
        cpus // line 9
    }

    /// Whether load balancing may put `task` on `cpu` (section 4.5, `can_migration`).
    pub(crate) fn may_run_on(&self, task: TaskId, cpu: CpuId) -> bool {
        let Some(vm) = self.task(task).vm.filter(|_| self.policy.distinct) else { return true };
        self.vms[vm.0 as usize].iter().all(|b| *b == task || self.task(*b).cpu != cpu)
    }

    /// The scheduling ordinate of a task that is queued (Algorithm 2, lines 18 to 29); `None` for
    /// one that runs, sleeps or is gone.
    #[must_use]
    pub fn ordinate(&self, task: TaskId) -> Option<usize> {
        match self.task(task).place {
            Place::Queued(node) => Some(self.cpu(self.task(task).cpu).tree.ordinate(node)),
            Place::Running | Place::Sleeping | Place::Exited => None,
        }
    }

    /// Algorithm 1: who runs on `cpu`, where `a` has the smallest vruntime.
    pub(crate) fn algorithm_1(&mut self, cpu: CpuId, a: TaskId, alpha: Alpha) -> TaskId {
        // line 4; and a candidate that has yielded once in this period runs.
        let Some(vm) = self.task(a).vm else { return a };
        if self.task(a).dirty {
            return a;
        }
        let Some(of_a) = self.ordinate(a) else { return a }; // line 5
        let mut compared = false;
        for i in 0..self.vms[vm.0 as usize].len() {
            // line 6
            let b = self.vms[vm.0 as usize][i];
            if b == a || self.task(b).dirty {
                continue; // lines 7, 8
            }
            let Some(of_b) = self.ordinate(b) else { continue }; // line 10
            compared = true;
            let distance = of_a.abs_diff(of_b); // line 11
            if alpha.reached(distance, self.cpu(self.task(b).cpu).tree.len()) {
                // line 12
                self.ledger.checks += 1;
                self.ledger.exceeded += 1;
                return match self.successor(cpu, a) {
                    Some(next) => {
                        self.sched_balance(a, b); // line 14
                        next // line 13
                    }
                    None => a,
                };
            }
        }
        self.ledger.checks += u64::from(compared);
        a // line 19
    }

    /// Whether `a`, the first of `cpu`, has a sibling as far away as `alpha` allows at most
    /// (what table 4.3 counts); `None` when nothing could be compared.
    #[must_use]
    pub fn exceeds(&self, cpu: CpuId, alpha: Alpha) -> Option<bool> {
        let a = self.leftmost(cpu)?;
        let vm = self.task(a).vm?;
        let of_a = self.ordinate(a)?;
        let siblings = self.vms[vm.0 as usize].iter().filter(|b| **b != a);
        let far = |b: &TaskId| {
            let of_b = self.ordinate(*b)?;
            let size = self.cpu(self.task(*b).cpu).tree.len();
            Some(alpha.reached(of_a.abs_diff(of_b), size))
        };
        siblings.filter_map(far).reduce(|x, y| x | y)
    }

    fn successor(&self, cpu: CpuId, a: TaskId) -> Option<TaskId> {
        let Place::Queued(node) = self.task(a).place else { return None };
        let tree = &self.cpu(cpu).tree;
        tree.next(node).map(|n| TaskId(tree.key(n).task))
    }

    /// `SCHED_BLANCE` (Algorithm 2, lines 11 to 17): `a` lends to `b`.
    fn sched_balance(&mut self, a: TaskId, b: TaskId) {
        let cpu = self.task(a).cpu;
        let tree = &self.cpu(cpu).tree;
        let middle = tree.select(tree.len() / 2).map_or(0, |n| tree.key(n).by);
        let slice = self.granularity.period(tree.len()) / tree.len().max(1) as u64;
        let amount = (middle + 1 - self.task(a).vruntime).clamp(1, slice.max(1) as i64);
        self.shift(a, amount); // lines 13, 14
        let debt = Debt { to: b, lender: a, amount };
        let at = self.task(b).cpu;
        self.cpu_mut(at).debts.push(debt); // line 15
        self.task_mut(a).dirty = true;
        self.task_mut(b).dirty = true;
        self.last_loan = Some(Loan { lender: a, debtor: b, amount });
        self.ledger.loans += 1;
        self.ledger.lent += amount;
        self.ledger.outstanding += amount;
    }

    /// The last loan, if none was asked for since; at most one is made by a decision.
    pub fn take_last_loan(&mut self) -> Option<Loan> {
        self.last_loan.take()
    }

    /// Applies the debt list of `cpu`: the first thing of each decision.
    pub(crate) fn settle(&mut self, cpu: CpuId) {
        for debt in std::mem::take(&mut self.cpu_mut(cpu).debts) {
            let Debt { to, lender, amount } = debt;
            let (place, at) = (self.task(to).place, self.task(to).cpu);
            let back = to == lender;
            match place {
                Place::Queued(_) | Place::Running if at == cpu && back => {
                    self.pay_back(to, amount);
                }
                Place::Queued(_) | Place::Running if at == cpu => {
                    self.settle_loan(to, lender, amount);
                }
                Place::Queued(_) | Place::Running => self.cpu_mut(at).debts.push(debt),
                Place::Sleeping | Place::Exited => {
                    self.task_mut(to).dirty = false;
                    self.give_back(lender, amount);
                }
            }
        }
    }

    fn give_back(&mut self, lender: TaskId, amount: i64) {
        match self.task(lender).place {
            // Its vruntime is on no queue.
            Place::Sleeping => self.pay_back(lender, amount),
            Place::Queued(_) | Place::Running => {
                let at = self.task(lender).cpu;
                self.cpu_mut(at).debts.push(Debt { to: lender, lender, amount });
            }
            Place::Exited => {
                self.ledger.outstanding -= amount;
                self.ledger.lost += amount;
            }
        }
    }

    /// Takes what was lent off the vruntime of a debtor, as far as that brings it to the middle
    /// of its queue; what is left over goes back. So who stands in the front half is overtaken by
    /// nobody.
    fn settle_loan(&mut self, to: TaskId, lender: TaskId, amount: i64) {
        let tree = &self.cpu(self.task(to).cpu).tree;
        let middle = tree.select(tree.len() / 2).map_or(0, |n| tree.key(n).by);
        let used = (self.task(to).vruntime - middle).clamp(0, amount);
        self.task_mut(to).dirty = false;
        if used > 0 {
            self.shift(to, -used);
            self.ledger.outstanding -= used;
            self.ledger.settled += used;
        }
        if used < amount {
            self.give_back(lender, amount - used);
        }
    }

    fn pay_back(&mut self, to: TaskId, amount: i64) {
        self.shift(to, -amount);
        self.ledger.outstanding -= amount;
        self.ledger.returned += amount;
    }

    /// A lender that is scheduled may lend again: it had its turn in this period.
    pub(crate) fn ran_once(&mut self, task: TaskId) {
        let owes = |d: &Debt| d.to == task && d.lender != task;
        let at = self.task(task).cpu;
        if self.task(task).dirty && !self.cpu(at).debts.iter().any(owes) {
            self.task_mut(task).dirty = false;
        }
    }
}
