//! Self-boosted co-scheduling: Algorithms 1 and 2 of the thesis, section 4.4.
//!
//! **Ordinates and ranks.** Ordinates count from 0 in the tree of a pCPU. What runs is not in the
//! tree (CFS takes it out). The *rank* of a vCPU is how many have their turn before it: 0 for one that
//! runs or is about to, and for one that waits its ordinate and one more if its pCPU runs somebody.
//! `Q_size` counts what runs, too. The candidate has rank 0, so the distance is its sibling's rank; two
//! thirds are first reached where one runs and two wait. The scheduler in the kernel counts the same.
//!
//! **Loans.** The candidate and a sibling that is too far meet half-way, a number of turns from now
//! that both reach: each is moved by what *it* needs for that, at most a turn. The candidate (the
//! lender) is moved at once, on its own run queue, which its pCPU has locked anyway; the sibling (the
//! debtor) when *its* pCPU next decides, until when that stands on its debt list. No step touches two
//! run queues. A debtor that has moved takes its debt along; one that has run since, sleeps or is gone
//! needs nothing.
//!
//! **Zero-sum.** What the two need differs: one that has just run needs a turn, one at the end of a
//! row of equals next to nothing. The difference stands in an account of their machine, which its vCPUs
//! pay off (or get back) in instalments of a sixteenth of what they run. All siblings run about as much,
//! so paying moves none of them away from the others. An account is bounded, and what a machine that
//! ends owes or is owed is written off.
//!
//! **More than two siblings.** Pairwise lending does not settle: whoever comes close to one goes away
//! from another. So where a machine has more than two vCPUs, all follow one of them
//! ([`Lending::Follow`]): the one that ran first, until it sleeps. It is not moved itself. When it is
//! about to run, siblings that are too far are asked to have their turn next; a sibling that is about
//! to run while it is too far waits for it. [`Lending::Pairs`] is Algorithm 1 as it is printed.
//!
//! **Where this differs from the text.**
//! - Algorithm 1 passes the candidate over before `SCHED_BLANCE` looks at its dirty tag; a dirty
//!   candidate would then be passed over at every decision until a sibling comes close. The text says
//!   that the tag prevents just that, so here a dirty candidate runs.
//! - The amount of a loan is left open ("certain amount of vruntime", "both move towards the center");
//!   above is what it is here.
//! - A vCPU's tag is cleared when it runs: "each vCPU is guaranteed one time to be scheduled in a
//!   scheduling period".
//! - `SCHED_DISPATCH` keeps off the pCPUs of siblings that sleep, too. Here these are only wanted less,
//!   since otherwise a pCPU idles while a vCPU waits for another.

use crate::policy::{Alpha, Lending};
use crate::scheduler::{CpuId, Place, Scheduler, TaskId, VmId};

/// How many turns a machine may owe or be owed; one for each vCPU where it has more.
const MOST_OWED: i64 = 4;
/// Of what a vCPU runs, the part that pays its machine's account off.
const INSTALMENT: i64 = 16;

/// A change that is due when its pCPU next decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Debt {
    /// Whose vruntime goes down.
    to: TaskId,
    /// How often it had run when that was decided.
    turns: u64,
    /// How many are to be before it at most.
    meet: usize,
}

/// A loan that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loan {
    /// Who was about to run.
    pub lender: TaskId,
    /// Who was too far.
    pub debtor: TaskId,
    /// What the lender has paid at once, nanoseconds of vruntime. What the debtor gets is known when
    /// its pCPU decides.
    pub amount: i64,
}

/// Loans, in nanoseconds of vruntime. Lending is zero-sum: what was paid was given, or machines are
/// still owed it ([`Ledger::balanced`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Loans made.
    pub loans: u64,
    /// What lenders paid at once.
    pub lent: i64,
    /// What debtors got.
    pub settled: i64,
    /// What machines that had got more paid in instalments.
    pub repaid: i64,
    /// What machines that had paid more got back in instalments.
    pub returned: i64,
    /// What was owed to machines that ended, less what they owed.
    pub lost: i64,
    /// What machines are owed, less what they owe.
    pub outstanding: i64,
    /// Debtors that were moved.
    pub moved: u64,
    /// Times that a decision compared a vCPU with its siblings.
    pub checks: u64,
    /// Times that one of them was too far.
    pub exceeded: u64,
}

impl Ledger {
    /// Whether the sums add up.
    #[must_use]
    pub const fn balanced(&self) -> bool {
        self.lent + self.repaid == self.settled + self.returned + self.lost + self.outstanding
    }
}

impl Scheduler {
    /// `SCHED_DISPATCH` (Algorithm 2, lines 1 to 10): the pCPUs that `task` may be put on. Where
    /// a machine has more vCPUs than there are pCPUs, those that find none left take one by
    /// chance (section 4.5).
    pub(crate) fn dispatch(&mut self, task: TaskId) -> Vec<CpuId> {
        let mut cpus = self.online(); // line 2
        if self.task(task).vm.is_none() || !self.policy.distinct {
            return cpus;
        }
        cpus.retain(|c| self.may_run_on(task, *c)); // lines 3 to 7
        if cpus.is_empty() {
            let all = self.online();
            cpus.push(all[self.draw(all.len())]);
        }
        // To where a sibling sleeps, which will come back there, only if nobody else is there.
        let free = |c: &CpuId| self.cpu(*c).size() == 0;
        let vacant = |c: &CpuId| !self.siblings(task).any(|b| self.task(b).cpu == *c);
        if cpus.iter().any(vacant) && !cpus.iter().any(|c| free(c) && !vacant(c)) {
            cpus.retain(vacant);
        }
        cpus // line 9
    }

    /// Whether load balancing may put `task` on `cpu` (section 4.5, `can_migration`).
    pub(crate) fn may_run_on(&self, task: TaskId, cpu: CpuId) -> bool {
        let there = |b: TaskId| self.task(b).cpu == cpu && self.is_runnable(b);
        !self.policy.distinct || !self.siblings(task).any(there)
    }

    /// How many have their turn before `task`, what runs on its pCPU among them; `None` for one that
    /// does not wait.
    pub(crate) fn rank(&self, task: TaskId) -> Option<usize> {
        let ordinate = self.ordinate(task)?;
        let running = self.cpu(self.task(task).cpu).current.is_some();
        Some(ordinate + usize::from(running))
    }

    /// Whether `task` is so far from having its turn that `alpha` does not allow it; its rank then.
    fn too_far(&self, task: TaskId, alpha: Alpha) -> Option<(usize, bool)> {
        let rank = self.rank(task)?;
        Some((rank, alpha.reached(rank, self.cpu(self.task(task).cpu).size())))
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
        let Some(vm) = self.task(a).vm.filter(|_| !self.task(a).dirty) else { return a };
        let far = match self.policy.lending {
            Lending::Follow if self.vms[vm.0 as usize].len() > 2 => self.follow(vm, a, alpha),
            Lending::Follow | Lending::Pairs => self.meet(vm, a, alpha),
        };
        if let Some(far) = far {
            self.ledger.checks += 1;
            self.ledger.exceeded += u64::from(far);
        }
        // Line 19; or, where it has lent, whoever is first now (line 13).
        if self.task(a).dirty { self.leftmost(cpu).unwrap_or(a) } else { a }
    }

    /// Lines 6 to 18: `a` meets the first of its siblings that is too far half-way. Whether one is;
    /// `None` when there was nobody to compare with.
    fn meet(&mut self, vm: VmId, a: TaskId, alpha: Alpha) -> Option<bool> {
        let mut compared = None;
        for i in 0..self.vms[vm.0 as usize].len() {
            let b = self.vms[vm.0 as usize][i];
            if b == a || self.task(b).dirty {
                continue; // lines 7, 8
            }
            let Some((rank, far)) = self.too_far(b, alpha) else { continue }; // lines 10, 11
            compared = Some(far);
            if far {
                let paid = self.delay(vm, a, rank / 2); // line 14
                self.ask(b, rank / 2);
                self.note(a, b, paid);
                break;
            }
        }
        compared
    }

    /// The same where all follow one: it takes along whoever is too far, and others wait for it.
    fn follow(&mut self, vm: VmId, a: TaskId, alpha: Alpha) -> Option<bool> {
        let followed = self.followed[vm.0 as usize].filter(|t| self.is_runnable(*t)).unwrap_or(a);
        self.followed[vm.0 as usize] = Some(followed);
        if followed != a {
            let (rank, far) = self.too_far(followed, alpha)?;
            if far {
                let paid = self.delay(vm, a, rank);
                self.note(a, followed, paid);
            }
            return Some(far);
        }
        let mut compared = None;
        for i in 0..self.vms[vm.0 as usize].len() {
            let b = self.vms[vm.0 as usize][i];
            if b == a || self.task(b).dirty {
                continue;
            }
            let Some((_, far)) = self.too_far(b, alpha) else { continue };
            compared = Some(far || compared == Some(true));
            if far {
                self.ask(b, 0);
                self.note(a, b, 0);
            }
        }
        compared
    }

    /// Whether `a`, the first of `cpu`, has a sibling as far away as `alpha` allows at most
    /// (what table 4.3 counts); `None` when nothing could be compared.
    #[must_use]
    pub fn exceeds(&self, cpu: CpuId, alpha: Alpha) -> Option<bool> {
        let a = self.leftmost(cpu)?;
        let of_a = self.rank(a)?;
        let far = |b: TaskId| {
            let size = self.cpu(self.task(b).cpu).size();
            Some(alpha.reached(of_a.abs_diff(self.rank(b)?), size))
        };
        let queued = |b: &TaskId| self.ordinate(*b).is_some();
        self.siblings(a).filter(queued).filter_map(far).reduce(|x, y| x | y)
    }

    /// Whether `task`, which begins to run, has a sibling whose turn is farther away than `alpha` allows;
    /// `None` when none waits.
    #[must_use]
    pub fn starts_far(&self, task: TaskId, alpha: Alpha) -> Option<bool> {
        let far = self.siblings(task).filter_map(|b| self.too_far(b, alpha));
        far.map(|(_, far)| far).reduce(|x, y| x | y)
    }

    /// What the vCPUs of `vm` paid for loans less what they got, and did not pay off or get back yet;
    /// nanoseconds of vruntime.
    #[must_use]
    pub fn account(&self, vm: VmId) -> i64 {
        self.accounts[vm.0 as usize]
    }

    /// The virtual runtime of `task`, nanoseconds.
    #[must_use]
    pub fn vruntime(&self, task: TaskId) -> i64 {
        self.task(task).vruntime
    }

    /// What `task` may be moved by at most: a slice, or its last turn where that was longer, since ticks
    /// end turns.
    fn most(&self, task: TaskId) -> i64 {
        let size = self.cpu(self.task(task).cpu).size().max(1);
        let slice = self.granularity.period(size) / size as u64;
        let turn = self.task(task).last_turn().min(2 * slice);
        slice.max(turn).max(1) as i64
    }

    /// What `vm` may owe or be owed at most, in moves of `most`.
    fn bound(&self, vm: VmId, most: i64) -> i64 {
        most * MOST_OWED.max(self.vms[vm.0 as usize].len() as i64)
    }

    /// Moves `a` back so that `meet` others of its queue have their turn before it; by a turn at
    /// most. What it paid.
    fn delay(&mut self, vm: VmId, a: TaskId, meet: usize) -> i64 {
        let at = self.task(a).cpu;
        let tree = &self.cpu(at).tree;
        if meet == 0 || tree.len() < 2 {
            return 0;
        }
        let there = tree.select(meet.min(tree.len() - 1)).map_or(0, |n| tree.key(n).by);
        let most = self.most(a);
        let room = (self.bound(vm, most) - self.accounts[vm.0 as usize]).clamp(0, most);
        let paid = (there - self.task(a).vruntime).clamp(0, room);
        self.shift(a, paid);
        self.task_mut(a).dirty = true;
        self.accounts[vm.0 as usize] += paid;
        self.ledger.lent += paid;
        self.ledger.outstanding += paid;
        paid
    }

    /// Has the pCPU of `b` move it forward, so that `meet` others have their turn before it at most.
    fn ask(&mut self, b: TaskId, meet: usize) {
        let debt = Debt { to: b, turns: self.task(b).turns, meet };
        let at = self.task(b).cpu;
        self.cpu_mut(at).debts.push(debt); // line 15
        self.task_mut(b).dirty = true;
    }

    fn note(&mut self, lender: TaskId, debtor: TaskId, amount: i64) {
        self.ledger.loans += 1;
        self.last_loan = Some(Loan { lender, debtor, amount });
    }

    /// The last loan, if none was asked for since.
    pub fn take_last_loan(&mut self) -> Option<Loan> {
        self.last_loan.take()
    }

    /// Applies the debt list of `cpu`: the first thing of each decision.
    pub(crate) fn settle(&mut self, cpu: CpuId) {
        for debt in std::mem::take(&mut self.cpu_mut(cpu).debts) {
            let t = self.task(debt.to);
            let at = t.cpu;
            match t.place {
                // It has had a turn, and may be dirty for another reason.
                _ if t.turns != debt.turns => {}
                Place::Queued(_) if at == cpu => self.settle_one(debt),
                Place::Queued(_) => self.cpu_mut(at).debts.push(debt),
                Place::Running | Place::Sleeping | Place::Exited => {
                    self.task_mut(debt.to).dirty = false;
                }
            }
        }
    }

    /// Moves a debtor as far forward as it needs, a turn at most. Who stands near enough overtakes
    /// nobody.
    fn settle_one(&mut self, debt: Debt) {
        let Debt { to, meet, .. } = debt;
        self.task_mut(to).dirty = false;
        let Some(vm) = self.task(to).vm else { return };
        let at = self.task(to).cpu;
        if self.ordinate(to).is_none_or(|o| o <= meet) {
            return;
        }
        let tree = &self.cpu(at).tree;
        let there = tree.select(meet).map_or(0, |n| tree.key(n).by);
        let most = self.most(to);
        let room = (self.bound(vm, most) + self.accounts[vm.0 as usize]).clamp(0, most);
        // Before whoever is there, and before who stands exactly where that one does.
        let got = (self.task(to).vruntime - there + 1).clamp(0, room);
        self.shift(to, -got);
        self.accounts[vm.0 as usize] -= got;
        self.ledger.moved += 1;
        self.ledger.settled += got;
        self.ledger.outstanding -= got;
    }

    /// What a vCPU that was charged `by` nanoseconds of vruntime pays for its machine on top, or gets
    /// back.
    pub(crate) fn instalment(&mut self, task: TaskId, by: i64) -> i64 {
        let Some(vm) = self.task(task).vm else { return 0 };
        let account = self.accounts[vm.0 as usize];
        if account == 0 {
            return 0;
        }
        let part = by / INSTALMENT;
        let pays = (-account).clamp(-part, part);
        self.accounts[vm.0 as usize] += pays;
        self.ledger.outstanding += pays;
        if pays > 0 {
            self.ledger.repaid += pays;
        } else {
            self.ledger.returned -= pays;
        }
        pays
    }

    /// The last vCPU of `vm` has ended.
    pub(crate) fn write_off(&mut self, vm: VmId) {
        let account = std::mem::take(&mut self.accounts[vm.0 as usize]);
        self.ledger.lost += account;
        self.ledger.outstanding -= account;
    }
}
