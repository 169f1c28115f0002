//! What others do for siblings: forced co-scheduling in the two forms of section 4.5, the strict
//! form that SBCO becomes when it allows no distance, and VMware's relaxed co-scheduling.

use crate::scheduler::{CpuId, Place, Scheduler, TaskId, VmId};

/// Of a machine whose vCPUs run together: whom they follow, and which pCPUs it has claimed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gang {
    leader: Option<TaskId>,
    claims: Vec<CpuId>,
}

impl Scheduler {
    /// PROCCO: the first of a machine's vCPUs takes its siblings along.
    pub(crate) fn procco(&mut self, first: TaskId) -> TaskId {
        if let Some(vm) = self.task(first).vm
            && self.vms[vm.0 as usize].first() == Some(&first)
        {
            self.force_siblings(vm, first);
        }
        first
    }

    /// CPUCO: what pCPU 0 runs takes its siblings along.
    pub(crate) fn cpuco(&mut self, cpu: CpuId, first: TaskId) -> TaskId {
        if cpu == CpuId(0)
            && let Some(vm) = self.task(first).vm
        {
            self.force_siblings(vm, first);
        }
        first
    }

    /// SBCO. Where no distance is allowed it is strict co-start and co-stop: the vCPU that starts
    /// on a pCPU that no gang has claimed starts one. It claims its own pCPU and those on which siblings
    /// wait, and takes these along; while it runs, a claimed pCPU that decides runs a member. When it
    /// stops, the claims end and the members that are left stop. A pCPU belongs to one gang at most, so
    /// gangs of machines that are smaller than the host run side by side.
    pub(crate) fn sbco(&mut self, cpu: CpuId, first: TaskId) -> TaskId {
        if let Some(vm) = self.cpu(cpu).claimed {
            if self.leads(vm) {
                let siblings = &self.vms[vm.0 as usize];
                let may = |t: &TaskId| self.is_queued_on(*t, cpu) && self.is_fair(cpu, *t, first);
                if let Some(member) = siblings.iter().copied().find(may) {
                    return member;
                }
            } else {
                self.stop(vm);
            }
        }
        let Some(vm) = self.task(first).vm else { return first };
        match self.alpha_of(vm) {
            Some(alpha) if !alpha.is_zero() => self.algorithm_1(cpu, first, alpha),
            _ if self.cpu(cpu).claimed.is_none() && !self.leads(vm) => {
                self.stop(vm);
                self.start(cpu, vm, first);
                first
            }
            _ => first,
        }
    }

    /// Whether `vm` has a gang whose leader runs.
    fn leads(&self, vm: VmId) -> bool {
        let leader = self.gangs[vm.0 as usize].leader;
        leader.is_some_and(|t| self.task(t).place == Place::Running)
    }

    /// Whether a gang has claimed `cpu`, so that its members go first there.
    pub(crate) fn belongs_to_gang(&self, cpu: CpuId) -> bool {
        self.cpu(cpu).claimed.is_some_and(|vm| self.leads(vm))
    }

    fn start(&mut self, cpu: CpuId, vm: VmId, leader: TaskId) {
        self.ordered = true;
        self.gangs[vm.0 as usize].leader = Some(leader);
        self.claim(cpu, vm);
        for i in 0..self.vms[vm.0 as usize].len() {
            let sibling = self.vms[vm.0 as usize][i];
            let at = self.task(sibling).cpu;
            let awake = self.is_runnable(sibling);
            if sibling == leader || !awake || at == cpu || self.belongs_to_gang(at) {
                continue;
            }
            self.claim(at, vm);
            if self.task(sibling).place == Place::Running {
                continue;
            }
            self.cpu_mut(at).forced = Some(sibling);
            self.kick(at);
        }
    }

    fn claim(&mut self, cpu: CpuId, vm: VmId) {
        self.cpu_mut(cpu).claimed = Some(vm);
        self.gangs[vm.0 as usize].claims.push(cpu);
    }

    /// The gang's leader has stopped: its siblings are to stop, too.
    fn stop(&mut self, vm: VmId) {
        self.ordered = true;
        let gang = std::mem::take(&mut self.gangs[vm.0 as usize]);
        for cpu in gang.claims {
            // Another gang may have it by now.
            if self.cpu(cpu).claimed != Some(vm) {
                continue;
            }
            self.cpu_mut(cpu).claimed = None;
            if self.cpu(cpu).current.is_some_and(|t| self.task(t).vm == Some(vm)) {
                self.kick(cpu);
            }
        }
    }

    /// Whether `task` may run before `first`: it is ahead by a period at most. Without this bound,
    /// what belongs to no machine would never run on a pCPU that only follows.
    pub(crate) fn is_fair(&self, cpu: CpuId, task: TaskId, first: TaskId) -> bool {
        let ahead = self.task(task).vruntime - self.task(first).vruntime;
        ahead <= self.granularity.period(self.cpu(cpu).size()) as i64
    }

    /// Has every queued sibling of `leader` on another pCPU scheduled there now.
    fn force_siblings(&mut self, vm: VmId, leader: TaskId) {
        for i in 0..self.vms[vm.0 as usize].len() {
            let sibling = self.vms[vm.0 as usize][i];
            let at = self.task(sibling).cpu;
            let queued = matches!(self.task(sibling).place, Place::Queued(_));
            if sibling != leader && queued && at != self.task(leader).cpu {
                self.cpu_mut(at).forced = Some(sibling);
                self.kick(at);
            }
        }
    }

    /// Relaxed co-scheduling: whether `task` leads so far that it has to stop. It need not while the
    /// slowest of its siblings runs: then it may as well run with it.
    fn must_stop(&self, task: TaskId, skew: u64) -> bool {
        let awake = self.siblings(task).filter(|t| self.is_runnable(*t));
        let Some(slowest) = awake.min_by_key(|t| self.task(*t).progress) else { return false };
        let s = self.task(slowest);
        s.place != Place::Running && self.task(task).progress > s.progress + skew
    }

    /// The first of `cpu` that need not stop; nobody, where all have to.
    pub(crate) fn relaxed(&self, cpu: CpuId, skew: u64) -> Option<TaskId> {
        let mut waiting = self.cpu(cpu).tree.iter().map(|(_, k)| TaskId(k.task));
        waiting.find(|t| !self.must_stop(*t, skew))
    }

    /// `task` started or stopped: has the pCPUs decide where that lets a sibling start, or makes it
    /// stop.
    pub(crate) fn relaxed_kicks(&mut self, task: TaskId, skew: u64) {
        let Some(vm) = self.task(task).vm else { return };
        for i in 0..self.vms[vm.0 as usize].len() {
            let sibling = self.vms[vm.0 as usize][i];
            let (place, cpu) = (self.task(sibling).place, self.task(sibling).cpu);
            let decide = match place {
                Place::Running => self.must_stop(sibling, skew),
                Place::Queued(_) => {
                    self.cpu(cpu).current.is_none() && !self.must_stop(sibling, skew)
                }
                Place::Sleeping | Place::Exited => false,
            };
            if decide && sibling != task {
                self.kick(cpu);
            }
        }
    }

    /// What idles makes progress: a vCPU that wakes is where the fastest of its siblings is.
    pub(crate) fn catch_up(&mut self, task: TaskId) {
        let most = self.siblings(task).map(|t| self.task(t).progress).max().unwrap_or(0);
        let t = self.task_mut(task);
        t.progress = t.progress.max(most);
    }

    /// The other vCPUs of the machine of `task`.
    pub(crate) fn siblings(&self, task: TaskId) -> impl Iterator<Item = TaskId> + '_ {
        let vm = self.task(task).vm.map(|vm| &self.vms[vm.0 as usize]);
        vm.into_iter().flatten().copied().filter(move |t| *t != task)
    }
}
