//! Pause-loop exiting and KVM's choice of whom a spinner yields to.
//!
//! After `kvm_vcpu_on_spin` of Linux 6.12 and later: siblings are looked at from the one behind the
//! last that was asked for; one that has itself left a loop is passed over every other time
//! (`dy_eligible`); one that was preempted in user mode is passed over unless an interrupt waits
//! for it; after three futile attempts the vCPU goes on.

use super::guest::Level;
use super::{Doing, Simulator};
use crate::eevdf::Yielded;
use crate::policy::{Coupling, Credit};
use crate::scheduler::TaskId;

/// What KVM remembers of a vCPU's spinning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Loops {
    /// How long it spins before the processor tells.
    window: u64,
    /// It left a loop by a directed yield and has not run since.
    inside: bool,
    eligible: bool,
}

impl Loops {
    /// The vCPU gets a pCPU.
    pub(super) fn scheduled(&mut self, window: u64) {
        *self = Self { window, inside: false, eligible: false };
    }

    /// The vCPU kept its pCPU.
    pub(super) fn went_on(&mut self) {
        (self.inside, self.eligible) = (false, false);
    }
}

/// `kvm_vcpu_on_spin` stops after so many failures.
const ATTEMPTS: usize = 3;

impl Simulator {
    /// Whether what `task` does is spinning in its kernel.
    fn spins_in_kernel(&self, task: TaskId) -> bool {
        match self.vcpus[task.0 as usize].doing {
            Doing::SpinLock(lock, _) => self.locks[lock].level == Level::Kernel,
            Doing::SpinAnswers(_) => true,
            _ => false,
        }
    }

    fn credit(&self) -> Option<Credit> {
        match self.scheduler.policy.coupling {
            Coupling::Yield(credit) => Some(credit),
            _ => None,
        }
    }

    /// When the processor tells that what runs on `cpu` spins; never, where nobody would listen.
    pub(super) fn told_at(&self, cpu: u32) -> u64 {
        let c = &self.cpus[cpu as usize];
        match c.running {
            Some(task) if self.credit().is_some() && self.spins_in_kernel(task) => {
                c.since.max(self.now) + self.vcpus[task.0 as usize].loops.window
            }
            _ => u64::MAX,
        }
    }

    /// Whether what runs on `cpu` has spun for its window and gives way to a sibling.
    pub(super) fn leaves_its_loop(&mut self, cpu: u32) -> bool {
        let Some(credit) = self.credit() else { return false };
        let Some(task) = self.cpus[cpu as usize].running else { return false };
        if self.now < self.cpus[cpu as usize].told_at || !self.spins_in_kernel(task) {
            return false;
        }
        let v = &mut self.vcpus[task.0 as usize];
        v.loops.window = v.loops.window.saturating_mul(2);
        v.overhead += self.costs.interrupt;
        let asked = self.on_spin(task, credit);
        self.vcpus[task.0 as usize].loops.inside = asked;
        self.vcpus[task.0 as usize].loops.eligible = false;
        asked
    }

    /// `kvm_vcpu_on_spin`: whether a sibling was asked for.
    fn on_spin(&mut self, me: TaskId, credit: Credit) -> bool {
        let Some(vm) = self.vcpus[me.0 as usize].vm else { return false };
        let n = self.scheduler.vcpus(vm).len();
        let start = self.boosted[vm.0 as usize] + 1;
        let mut attempts = ATTEMPTS;
        // With credit: first who owes an answer, last whoever was preempted at all.
        let passes: &[Pass] = match credit {
            Credit::None => &[Pass::InKernel],
            Credit::Lag => &[Pass::Answers, Pass::InKernel, Pass::Preempted],
        };
        for pass in passes {
            for i in 0..n {
                let at = (start + i) % n;
                let sibling = self.scheduler.vcpus(vm)[at];
                if sibling == me || !self.is_candidate(me, sibling, *pass) {
                    continue;
                }
                match self.scheduler.yield_to(me, sibling, credit) {
                    Yielded::Asked => {
                        self.boosted[vm.0 as usize] = at;
                        return true;
                    }
                    Yielded::Alone if attempts == 1 => return false,
                    Yielded::Alone => attempts -= 1,
                    Yielded::No => {}
                }
            }
        }
        false
    }

    fn is_candidate(&mut self, me: TaskId, sibling: TaskId, pass: Pass) -> bool {
        if self.scheduler.ordinate(sibling).is_none() {
            return false;
        }
        let in_kernel = match self.vcpus[sibling.0 as usize].doing {
            Doing::Hold(lock, _) => self.locks[lock].level == Level::Kernel,
            _ => self.spins_in_kernel(sibling),
        };
        let v = &mut self.vcpus[sibling.0 as usize];
        let may = match pass {
            Pass::Answers => v.asked_by.contains(&me),
            Pass::InKernel => v.woken || in_kernel || !v.asked_by.is_empty(),
            Pass::Preempted => true,
        };
        if !may {
            return false;
        }
        let eligible = !v.loops.inside || v.loops.eligible;
        if v.loops.inside {
            v.loops.eligible = !v.loops.eligible;
        }
        eligible
    }
}

/// Whom `kvm_vcpu_on_spin` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// Who was interrupted by the spinner and has not answered.
    Answers,
    /// Who was preempted in its kernel, has an interrupt to serve, or was woken.
    InKernel,
    /// Whoever waits.
    Preempted,
}
