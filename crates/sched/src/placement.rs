//! Where a task runs: on creation, on waking, and when the load is balanced.
//!
//! After Linux 2.6.34: `find_idlest_cpu` for what is new, `select_task_rq_fair` with
//! `select_idle_sibling` and `wake_affine` for what wakes (all pCPUs share a cache, `SD_BALANCE_WAKE`
//! is off), and a pull from the busiest queue. Algorithm 2, `SCHED_DISPATCH`, takes pCPUs out of
//! `cpus_allowed` first where the policy keeps siblings apart.

use rand::seq::IndexedRandom;

use crate::policy::Order;
use crate::scheduler::{Arrival, CpuId, Place, Scheduler, TaskId};

/// `imbalance_pct` of 125, halved as `wake_affine` does: how much fuller the waker's queue may be.
const AFFINE_PERCENT: u64 = 112;

impl Scheduler {
    /// Where `task`, which sleeps, would be queued if it were woken from `waker` (by a timer or a
    /// device on its own pCPU when `None`). `None` if it is awake or gone.
    pub fn target(&mut self, task: TaskId, waker: Option<CpuId>) -> Option<CpuId> {
        let t = self.task(task);
        if t.place != Place::Sleeping {
            return None;
        }
        if t.cpu.0 == u32::MAX { Some(self.idlest(task)) } else { Some(self.woken(task, waker)) }
    }

    /// `find_idlest_cpu`; among equals by chance, since where the creator runs is chance.
    pub(crate) fn idlest(&mut self, task: TaskId) -> CpuId {
        let allowed = self.dispatch(task);
        let size = |c: &CpuId| self.cpu(*c).size();
        let least = allowed.iter().map(size).min().unwrap_or(0);
        let best: Vec<CpuId> = allowed.into_iter().filter(|c| size(c) == least).collect();
        best.choose(&mut self.chance).copied().unwrap_or(CpuId(0))
    }

    /// `select_task_rq_fair` of a wake-up.
    fn woken(&mut self, task: TaskId, waker: Option<CpuId>) -> CpuId {
        let before = self.task(task).cpu;
        let this = waker.unwrap_or(before);
        let allowed = self.dispatch(task);
        if allowed.contains(&this) {
            let idle = |c: &CpuId| self.cpu(*c).size() == 0;
            if allowed.contains(&before) && idle(&before) {
                return before;
            }
            if let Some(idle) = allowed.iter().copied().find(idle) {
                return idle;
            }
            if this == before || self.is_affine(task, this, before) {
                return this;
            }
        }
        if allowed.contains(&before) { before } else { self.idlest(task) }
    }

    /// `wake_affine`: whether `task` may come to `this`, from where it is woken.
    fn is_affine(&self, task: TaskId, this: CpuId, before: CpuId) -> bool {
        let (here, there) = (self.cpu(this), self.cpu(before));
        let weight = self.task(task).weight;
        let each = here.load.checked_div(here.size() as u64).unwrap_or(0);
        here.load == 0
            || 100 * (here.load + weight) <= AFFINE_PERCENT * there.load
            || (here.load <= there.load && here.load + there.load <= each)
    }

    pub(crate) fn online(&self) -> Vec<CpuId> {
        let all = self.cpus.iter().enumerate();
        all.filter(|(_, c)| c.online).map(|(i, _)| CpuId(i as u32)).collect()
    }

    /// Load balancing of `cpu`: takes one task from the busiest run queue when that has at least
    /// two more (one queued, when this one is idle). Siblings stay apart if the policy says so.
    pub fn balance(&mut self, cpu: CpuId) -> Option<TaskId> {
        if !self.cpu(cpu).online {
            return None;
        }
        let mine = self.cpu(cpu).size();
        let load = |c: &CpuId| {
            let other = self.cpu(*c);
            if other.tree.is_empty() { 0 } else { other.size() }
        };
        let others = (0..self.cpus.len() as u32).map(CpuId);
        let busiest = others.filter(|c| *c != cpu && self.cpu(*c).online).max_by_key(load)?;
        if self.cpu(busiest).size() < mine + 2 || self.cpu(busiest).tree.is_empty() {
            return None;
        }
        // The one that would wait longest is the first that may go.
        let tree = &self.cpu(busiest).tree;
        let candidates: Vec<TaskId> = tree.iter().map(|(_, k)| TaskId(k.task)).collect();
        let task = candidates.into_iter().rev().find(|t| self.may_run_on(*t, cpu))?;
        self.migrate(task, cpu);
        self.counters.moved += 1;
        Some(task)
    }

    /// Moves a queued task; its vruntime keeps its distance to the queue's (its lag and what is left
    /// of its request, under EEVDF).
    pub(crate) fn migrate(&mut self, task: TaskId, to: CpuId) {
        if !matches!(self.task(task).place, Place::Queued(_)) {
            return;
        }
        let from = self.task(task).cpu;
        let by = self.cpu(to).min_vruntime - self.cpu(from).min_vruntime;
        let lag = self.lag(task);
        self.dequeue(task);
        self.part(task);
        self.task_mut(task).cpu = to;
        if self.policy.order == Order::Cfs {
            self.task_mut(task).vruntime += by;
        } else {
            let t = self.task(task);
            let left = t.deadline - t.vruntime;
            self.place_with_lag(task, lag);
            let t = self.task_mut(task);
            t.deadline = t.vruntime + left;
        }
        self.arrive(task, Arrival::Migrated);
    }

    /// Takes a pCPU away; what was there goes to others. The last one stays.
    ///
    /// Returns whether it went.
    pub fn set_offline(&mut self, cpu: CpuId) -> bool {
        if !self.cpu(cpu).online || self.online().len() < 2 {
            return false;
        }
        if let Some(running) = self.cpu_mut(cpu).current.take() {
            self.enqueue(running);
        }
        let gone = self.cpu_mut(cpu);
        gone.online = false;
        (gone.forced, gone.wanted, gone.interrupted) = (None, None, None);
        gone.claimed = None;
        while let Some(task) = self.leftmost(cpu) {
            let to = self.idlest(task);
            self.migrate(task, to);
        }
        self.settle(cpu);
        true
    }

    /// Gives a pCPU back.
    pub fn set_online(&mut self, cpu: CpuId) {
        self.cpu_mut(cpu).online = true;
    }
}
