//! EEVDF as Linux has had it since 6.12: who has received less than its part is eligible, and of
//! the eligible the one with the earliest virtual deadline runs.
//!
//! After `kernel/sched/fair.c`: `avg_vruntime`, `entity_eligible`, `place_entity` (`PLACE_LAG`,
//! `PLACE_DEADLINE_INITIAL`, `PLACE_REL_DEADLINE`), `pick_eevdf` (`PICK_BUDDY`, `RUN_TO_PARITY`) and
//! `yield_task_fair`, which gives up what is left of a request.
//!
//! **Where this differs.** A sleeper that has received too much stays on its queue in Linux until
//! it is eligible again (`DELAY_DEQUEUE`); here it leaves at once, and its lag shrinks by what the
//! queue's average advances meanwhile, to zero at most (`DELAY_ZERO`). The earliest eligible
//! deadline is found by a walk from the earliest, not by an augmented tree. Ticks are exact: a
//! request ends when it is used up.

use crate::policy::Credit;
use crate::scheduler::{CpuId, NICE_0, Place, Scheduler, TaskId};

/// What became of a directed yield.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Yielded {
    /// The target is asked for; both pCPUs have to decide: that of the yielder now, the other when
    /// [`Scheduler::kicks`] says so.
    Asked,
    /// The target waits for nothing.
    No,
    /// Both are alone on their pCPUs: there is nothing to give.
    Alone,
}

impl Scheduler {
    /// How much virtual runtime a request of `task` is, nanoseconds.
    fn request(&self, task: TaskId) -> i64 {
        (self.granularity.eevdf_slice() * NICE_0 / self.task(task).weight) as i64
    }

    /// `avg_vruntime`: the virtual runtime at which everybody on `cpu` has its part.
    pub(crate) fn average(&self, cpu: CpuId) -> i64 {
        let c = self.cpu(cpu);
        if c.load == 0 { c.min_vruntime } else { c.sum.div_euclid(i128::from(c.load)) as i64 }
    }

    /// `entity_eligible`: whether `task` has received at most its part.
    pub(crate) fn eligible(&self, task: TaskId) -> bool {
        let t = self.task(task);
        let c = self.cpu(t.cpu);
        c.sum >= i128::from(t.vruntime) * i128::from(c.load)
    }

    /// `entity_lag`: what `task` is short of, negative when it has received too much.
    pub(crate) fn lag(&self, task: TaskId) -> i64 {
        let t = self.task(task);
        let limit = (self.granularity.eevdf_lag() * NICE_0 / t.weight) as i64;
        (self.average(t.cpu) - t.vruntime).clamp(-limit, limit)
    }

    /// The lag of a task that slept since its queue's average stood at `left_at`.
    pub(crate) fn lag_after_sleep(&self, task: TaskId) -> i64 {
        let t = self.task(task);
        if t.lag >= 0 {
            return t.lag;
        }
        let advanced = (self.average(t.cpu) - t.left_at).max(0);
        (t.lag + advanced).min(0)
    }

    /// `place_entity` for a task that is on no queue: at `lag` behind the average of `cpu`, which its
    /// own coming will move.
    pub(crate) fn place_with_lag(&mut self, task: TaskId, lag: i64) {
        let t = self.task(task);
        let (cpu, weight) = (t.cpu, i128::from(t.weight));
        let load = i128::from(self.cpu(cpu).load);
        let lag = if load == 0 { 0 } else { i128::from(lag) * (load + weight) / load };
        let at = self.average(cpu) - lag as i64;
        let request = self.request(task);
        let t = self.task_mut(task);
        t.vruntime = at;
        t.deadline = at + request;
    }

    /// A new task's first request is half as long (`PLACE_DEADLINE_INITIAL`).
    pub(crate) fn place_new(&mut self, task: TaskId) {
        self.place_with_lag(task, 0);
        let half = self.request(task) / 2;
        let t = self.task_mut(task);
        t.deadline = t.vruntime + half;
    }

    /// `update_deadline`: a request that is used up is followed by the next.
    pub(crate) fn renew(&mut self, task: TaskId) {
        let request = self.request(task);
        let t = self.task_mut(task);
        if t.vruntime >= t.deadline {
            t.deadline = t.vruntime + request;
        }
    }

    /// The earliest deadline among those that wait for `cpu` and are eligible.
    fn earliest(&self, cpu: CpuId) -> Option<TaskId> {
        let tree = &self.cpu(cpu).tree;
        let mut waiting = tree.iter().map(|(_, k)| TaskId(k.task));
        waiting.find(|t| self.eligible(*t)).or_else(|| self.leftmost(cpu))
    }

    /// `pick_eevdf`: who was asked for, if eligible; who has not used up its request; the earliest.
    pub(crate) fn pick_eevdf(&mut self, cpu: CpuId, previous: Option<TaskId>) -> Option<TaskId> {
        if let Some(wanted) = self.cpu(cpu).wanted {
            if !self.is_queued_on(wanted, cpu) {
                self.cpu_mut(cpu).wanted = None;
            } else if self.eligible(wanted) {
                self.cpu_mut(cpu).wanted = None;
                return Some(wanted);
            }
        }
        let goes_on = |t: &TaskId| self.is_protected(*t) && self.is_queued_on(*t, cpu);
        previous.filter(goes_on).or_else(|| self.earliest(cpu))
    }

    /// `RUN_TO_PARITY`: whether `task` is eligible and within the request that it was picked for.
    fn is_protected(&self, task: TaskId) -> bool {
        let t = self.task(task);
        t.picked_for == t.deadline && self.eligible(task)
    }

    /// Whether `woken` should run now in place of `current`.
    pub(crate) fn preempts_eevdf(&self, current: TaskId, woken: TaskId) -> bool {
        if self.is_protected(current) || self.earliest(self.task(woken).cpu) != Some(woken) {
            return false;
        }
        !self.eligible(current) || self.task(woken).deadline < self.task(current).deadline
    }

    /// `yield_to`: `from`, which runs, asks that `to` run; it gives up its own request. With
    /// [`Credit::Lag`] the target is made eligible, a request ahead, within the lag that a task
    /// may have at all. (The series lets the margin grow with the queue; its bound is the same.)
    pub fn yield_to(&mut self, from: TaskId, to: TaskId, credit: Credit) -> Yielded {
        if self.task(from).place != Place::Running
            || !matches!(self.task(to).place, Place::Queued(_))
        {
            return Yielded::No;
        }
        let (here, there) = (self.task(from).cpu, self.task(to).cpu);
        if self.cpu(here).size() == 1 && self.cpu(there).size() == 1 {
            return Yielded::Alone;
        }
        self.cpu_mut(there).wanted = Some(to);
        let margin = self.request(to);
        if credit == Credit::Lag && self.lag(to) < margin {
            self.dequeue(to);
            self.part(to);
            self.place_with_lag(to, margin);
            self.join(to);
            self.enqueue(to);
        }
        if self.cpu(here).size() > 1 && self.eligible(from) {
            let forfeit = self.task(from).deadline - self.task(from).vruntime;
            self.shift(from, forfeit);
            self.renew(from);
        }
        if there != here {
            self.kick(there);
        }
        Yielded::Asked
    }
}
