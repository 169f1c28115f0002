//! Run queues after CFS, one a pCPU, and what the policies add to them.
//!
//! Sans-IO: time is what the caller says ran, interrupts are asked for through
//! [`Scheduler::kicks`], chance comes from a seed. [`crate::sbco`] has Algorithms 1
//! and 2; here are the rules of Linux 2.6.34 that they stand on, and the two kinds of forced
//! co-scheduling.

use std::collections::BTreeSet;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::policy::{Coupling, Granularity, Policy};
use crate::sbco::{Debt, Ledger};
use crate::tree::{Node, RbTree};

/// The weight of a task of nice 0.
pub const NICE_0: u64 = 1024;

/// A pCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuId(pub u32);

/// A task: a vCPU, or anything else that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(pub u32);

/// A virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub u32);

/// Where a task is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// It waits for something.
    Sleeping,
    /// It waits for its pCPU.
    Queued(Node),
    /// It runs.
    Running,
    /// It is gone.
    Exited,
}

/// Order in a run queue: vruntime, and who came first where that is equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Key {
    pub(crate) vruntime: i64,
    came: u64,
    pub(crate) task: u32,
}

#[derive(Debug, Clone)]
pub(crate) struct Task {
    pub(crate) vm: Option<VmId>,
    pub(crate) weight: u64,
    pub(crate) vruntime: i64,
    pub(crate) place: Place,
    pub(crate) cpu: CpuId,
    /// The dirty tag: a loan of this vCPU, given or promised, is not settled yet.
    pub(crate) dirty: bool,
    /// Time run in all, nanoseconds.
    total: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) tree: RbTree<Key>,
    pub(crate) current: Option<TaskId>,
    min_vruntime: i64,
    /// Weights of all that is queued and running.
    load: u64,
    pub(crate) debts: Vec<Debt>,
    /// Whom an interrupt of a sibling wants to run here.
    pub(crate) forced: Option<TaskId>,
    /// Who ran last.
    last: Option<TaskId>,
    online: bool,
}

impl Cpu {
    /// Tasks that are queued or running.
    pub(crate) fn size(&self) -> usize {
        self.tree.len() + usize::from(self.current.is_some())
    }
}

/// What was chosen to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pick {
    /// Who.
    pub task: TaskId,
    /// For how long at most, nanoseconds.
    pub slice: u64,
    /// Whether somebody else ran here before.
    pub switched: bool,
}

/// What a wake-up did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Woken {
    /// Where the task is queued.
    pub cpu: CpuId,
    /// Whether what runs there should give way now.
    pub preempts: bool,
}

/// Why a task comes to a run queue (section 4.5 names these three).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrival {
    /// It is new.
    Created,
    /// It slept.
    Woken,
    /// It comes from another run queue.
    Migrated,
}

/// What was done, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Decisions.
    pub picks: u64,
    /// Decisions after which another task ran than before.
    pub switches: u64,
    /// Interrupts sent to have a sibling scheduled.
    pub kicks: u64,
    /// Tasks that load balancing moved.
    pub moved: u64,
}

/// All run queues of a machine.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) policy: Policy,
    pub(crate) granularity: Granularity,
    pub(crate) cpus: Vec<Cpu>,
    pub(crate) tasks: Vec<Task>,
    pub(crate) vms: Vec<Vec<TaskId>>,
    pub(crate) ledger: Ledger,
    kicks: BTreeSet<CpuId>,
    counters: Counters,
    came: u64,
    chance: SmallRng,
}

impl Scheduler {
    /// `cpus` empty run queues.
    #[must_use]
    pub fn new(cpus: usize, policy: Policy, granularity: Granularity, seed: u64) -> Self {
        let new = || Cpu { online: true, ..Cpu::default() };
        Self {
            policy,
            granularity,
            cpus: (0..cpus).map(|_| new()).collect(),
            tasks: Vec::new(),
            vms: Vec::new(),
            ledger: Ledger::default(),
            kicks: BTreeSet::new(),
            counters: Counters::default(),
            came: 0,
            chance: SmallRng::seed_from_u64(seed),
        }
    }

    /// A machine without vCPUs.
    pub fn add_vm(&mut self) -> VmId {
        self.vms.push(Vec::new());
        VmId(self.vms.len() as u32 - 1)
    }

    /// A task that sleeps; a vCPU when `vm` says whose. It is placed as new when it first wakes.
    pub fn add_task(&mut self, vm: Option<VmId>, weight: u64) -> TaskId {
        let id = TaskId(self.tasks.len() as u32);
        if let Some(vm) = vm {
            self.vms[vm.0 as usize].push(id);
        }
        self.tasks.push(Task {
            vm,
            weight,
            vruntime: 0,
            place: Place::Sleeping,
            cpu: CpuId(u32::MAX),
            dirty: false,
            total: 0,
        });
        id
    }

    /// Counters so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Loans so far.
    #[must_use]
    pub const fn ledger(&self) -> Ledger {
        self.ledger
    }

    /// Who runs on `cpu`.
    #[must_use]
    pub fn current(&self, cpu: CpuId) -> Option<TaskId> {
        self.cpu(cpu).current
    }

    /// Tasks on `cpu`, queued and running.
    #[must_use]
    pub fn queue_size(&self, cpu: CpuId) -> usize {
        self.cpu(cpu).size()
    }

    /// What `task` has run in all, nanoseconds.
    #[must_use]
    pub fn ran(&self, task: TaskId) -> u64 {
        self.task(task).total
    }

    /// How far the vruntime of `task` is ahead of its run queue's smallest, nanoseconds.
    #[must_use]
    pub fn lead(&self, task: TaskId) -> i64 {
        let t = self.task(task);
        let cpu = self.cpus.get(t.cpu.0 as usize);
        t.vruntime - cpu.map_or(0, |c| c.min_vruntime)
    }

    /// The run queue that `task` is on or was last on; `None` before its first.
    #[must_use]
    pub fn cpu_of(&self, task: TaskId) -> Option<CpuId> {
        let cpu = self.task(task).cpu;
        (cpu.0 != u32::MAX).then_some(cpu)
    }

    /// Whether `task` is queued or runs.
    #[must_use]
    pub fn is_runnable(&self, task: TaskId) -> bool {
        matches!(self.task(task).place, Place::Queued(_) | Place::Running)
    }

    /// pCPUs that have to decide anew because a sibling of what is queued there was scheduled;
    /// each call gives what came since the last.
    pub fn kicks(&mut self) -> Vec<CpuId> {
        std::mem::take(&mut self.kicks).into_iter().collect()
    }

    pub(crate) fn kick(&mut self, cpu: CpuId) {
        self.counters.kicks += 1;
        self.kicks.insert(cpu);
    }

    pub(crate) fn cpu(&self, cpu: CpuId) -> &Cpu {
        &self.cpus[cpu.0 as usize]
    }

    pub(crate) fn cpu_mut(&mut self, cpu: CpuId) -> &mut Cpu {
        &mut self.cpus[cpu.0 as usize]
    }

    pub(crate) fn task(&self, task: TaskId) -> &Task {
        &self.tasks[task.0 as usize]
    }

    pub(crate) fn task_mut(&mut self, task: TaskId) -> &mut Task {
        &mut self.tasks[task.0 as usize]
    }

    /// Wakes `task` at the place that the policy gives it. What is awake already stays.
    pub fn wake(&mut self, task: TaskId) -> Woken {
        let t = self.task(task);
        if t.place != Place::Sleeping {
            return Woken { cpu: t.cpu, preempts: false };
        }
        let why = if t.cpu.0 == u32::MAX { Arrival::Created } else { Arrival::Woken };
        let cpu = self.place(task, why);
        self.task_mut(task).cpu = cpu;
        self.arrive(task, why);
        let preempts = match self.cpu(cpu).current {
            None => true,
            Some(current) => {
                let (c, t) = (self.task(current), self.task(task));
                let ahead = c.vruntime - t.vruntime;
                ahead > (self.granularity.wakeup * NICE_0 / t.weight) as i64
            }
        };
        Woken { cpu, preempts }
    }

    /// `place_entity`: a new task starts a slice behind, a sleeper gets at most half a period.
    fn arrive(&mut self, task: TaskId, why: Arrival) {
        let cpu = self.task(task).cpu;
        let min = self.cpu(cpu).min_vruntime;
        let weight = self.task(task).weight;
        match why {
            Arrival::Created => {
                let slice = self.slice_of(cpu, weight, self.cpu(cpu).load + weight, 1);
                self.task_mut(task).vruntime = min + (slice * NICE_0 / weight) as i64;
            }
            Arrival::Woken => {
                let credit = (self.granularity.latency / 2) as i64;
                let t = self.task_mut(task);
                t.vruntime = t.vruntime.max(min - credit);
            }
            Arrival::Migrated => {}
        }
        self.enqueue(task);
        self.cpu_mut(cpu).load += weight;
    }

    /// The running task of `cpu` goes to sleep.
    pub fn sleep(&mut self, cpu: CpuId) {
        if let Some(task) = self.leave(cpu) {
            self.task_mut(task).place = Place::Sleeping;
        }
    }

    /// `task` ends, wherever it is. A loan that it was promised goes back when it would have been
    /// settled.
    pub fn exit(&mut self, task: TaskId) {
        let cpu = self.task(task).cpu;
        match self.task(task).place {
            Place::Running => {
                self.leave(cpu);
            }
            Place::Queued(node) => {
                let weight = self.task(task).weight;
                let c = self.cpu_mut(cpu);
                c.tree.remove(node);
                c.load -= weight;
            }
            Place::Sleeping | Place::Exited => {}
        }
        self.task_mut(task).place = Place::Exited;
        if let Some(vm) = self.task(task).vm {
            self.vms[vm.0 as usize].retain(|t| *t != task);
        }
    }

    fn leave(&mut self, cpu: CpuId) -> Option<TaskId> {
        let task = self.cpu_mut(cpu).current.take()?;
        let weight = self.task(task).weight;
        self.cpu_mut(cpu).load -= weight;
        Some(task)
    }

    /// The running task of `cpu` has run for `ns` nanoseconds more.
    pub fn charge(&mut self, cpu: CpuId, ns: u64) {
        let Some(task) = self.cpu(cpu).current else { return };
        let t = self.task_mut(task);
        t.total += ns;
        t.vruntime += (u128::from(ns) * u128::from(NICE_0) / u128::from(t.weight)) as i64;
        self.advance(cpu);
    }

    /// `min_vruntime` never goes back.
    fn advance(&mut self, cpu: CpuId) {
        let c = self.cpu(cpu);
        let running = c.current.map(|t| self.task(t).vruntime);
        let first = c.tree.first().map(|n| c.tree.key(n).vruntime);
        let least = match (running, first) {
            (Some(a), Some(b)) => a.min(b),
            (Some(a), None) | (None, Some(a)) => a,
            (None, None) => return,
        };
        let c = self.cpu_mut(cpu);
        c.min_vruntime = c.min_vruntime.max(least);
    }

    /// Decides who runs on `cpu` next. What ran there is queued again first.
    pub fn pick(&mut self, cpu: CpuId) -> Option<Pick> {
        if let Some(previous) = self.cpu_mut(cpu).current.take() {
            self.enqueue(previous);
        }
        if !self.cpu(cpu).online {
            return None;
        }
        self.settle(cpu);
        let task = match self.cpu_mut(cpu).forced.take() {
            Some(t) if self.is_queued_on(t, cpu) => t,
            _ => self.choose(cpu)?,
        };
        let Place::Queued(node) = self.task(task).place else { return None };
        self.cpu_mut(cpu).tree.remove(node);
        let t = self.task_mut(task);
        t.place = Place::Running;
        let weight = t.weight;
        let c = self.cpu_mut(cpu);
        c.current = Some(task);
        let switched = c.last != Some(task);
        c.last = Some(task);
        self.counters.picks += 1;
        self.counters.switches += u64::from(switched);
        self.ran_once(task);
        self.advance(cpu);
        let slice = self.slice_of(cpu, weight, self.cpu(cpu).load, 0);
        Some(Pick { task, slice, switched })
    }

    fn choose(&mut self, cpu: CpuId) -> Option<TaskId> {
        let first = self.leftmost(cpu)?;
        match self.policy.coupling {
            Coupling::None => Some(first),
            Coupling::Distance(alpha) => Some(self.algorithm_1(cpu, first, alpha)),
            Coupling::Process => {
                if let Some(vm) = self.task(first).vm
                    && self.vms[vm.0 as usize].first() == Some(&first)
                {
                    self.force_siblings(vm, first);
                }
                Some(first)
            }
            Coupling::Cpu => {
                if cpu == CpuId(0)
                    && let Some(vm) = self.task(first).vm
                {
                    self.force_siblings(vm, first);
                }
                Some(first)
            }
        }
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

    pub(crate) fn is_queued_on(&self, task: TaskId, cpu: CpuId) -> bool {
        let t = self.task(task);
        t.cpu == cpu && matches!(t.place, Place::Queued(_))
    }

    pub(crate) fn leftmost(&self, cpu: CpuId) -> Option<TaskId> {
        let tree = &self.cpu(cpu).tree;
        tree.first().map(|n| TaskId(tree.key(n).task))
    }

    /// Puts a task that is to wait for `cpu` into its tree, where its vruntime says.
    pub(crate) fn enqueue(&mut self, task: TaskId) {
        self.came += 1;
        let (came, t) = (self.came, self.task(task));
        let (cpu, key) = (t.cpu, Key { vruntime: t.vruntime, came, task: task.0 });
        let node = self.cpu_mut(cpu).tree.insert(key);
        self.task_mut(task).place = Place::Queued(node);
    }

    /// Changes the vruntime of a task that is not on another pCPU's queue, and its position.
    pub(crate) fn shift(&mut self, task: TaskId, by: i64) {
        self.task_mut(task).vruntime += by;
        if let Place::Queued(node) = self.task(task).place {
            let cpu = self.task(task).cpu;
            self.cpu_mut(cpu).tree.remove(node);
            self.enqueue(task);
        }
    }

    /// The part of the period that a weight has in a load, `more` tasks counted on top.
    fn slice_of(&self, cpu: CpuId, weight: u64, load: u64, more: usize) -> u64 {
        let period = self.granularity.period(self.cpu(cpu).size() + more);
        (period * weight / load.max(1)).max(1)
    }

    /// Where `task` is to run. Algorithm 2, `SCHED_DISPATCH`, leaves pCPUs out when the policy
    /// keeps siblings apart; among those that are left: where it was if that is idle, an idle
    /// one, and else where it was (on waking) or the least loaded (on creation).
    fn place(&mut self, task: TaskId, why: Arrival) -> CpuId {
        let allowed = self.dispatch(task);
        let before = self.task(task).cpu;
        let size = |c: &CpuId| self.cpu(*c).size();
        if allowed.contains(&before) && size(&before) == 0 {
            return before;
        }
        let least = allowed.iter().map(size).min().unwrap_or(0);
        if why == Arrival::Woken && least > 0 && allowed.contains(&before) {
            return before;
        }
        let best: Vec<CpuId> = allowed.into_iter().filter(|c| size(c) == least).collect();
        let chance = &mut self.chance;
        best.choose(chance).copied().unwrap_or(CpuId(0))
    }

    pub(crate) fn online(&self) -> Vec<CpuId> {
        let all = self.cpus.iter().enumerate();
        all.filter(|(_, c)| c.online).map(|(i, _)| CpuId(i as u32)).collect()
    }

    /// One of `n` by chance.
    pub(crate) fn draw(&mut self, n: usize) -> usize {
        self.chance.random_range(0..n)
    }

    /// Load balancing of `cpu`: takes one task from the busiest run queue when that has at least
    /// two more (one queued, when this one is idle). Siblings stay apart if the policy says so.
    pub fn balance(&mut self, cpu: CpuId) -> Option<TaskId> {
        if !self.cpu(cpu).online {
            return None;
        }
        let mine = self.cpu(cpu).size();
        let busiest = self.online().into_iter().filter(|c| *c != cpu).max_by_key(|c| {
            let other = self.cpu(*c);
            if other.tree.is_empty() { 0 } else { other.size() }
        })?;
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

    /// Moves a queued task; its vruntime keeps its distance to the queue's.
    pub(crate) fn migrate(&mut self, task: TaskId, to: CpuId) {
        let (from, weight) = (self.task(task).cpu, self.task(task).weight);
        let Place::Queued(node) = self.task(task).place else { return };
        let by = self.cpu(to).min_vruntime - self.cpu(from).min_vruntime;
        let c = self.cpu_mut(from);
        c.tree.remove(node);
        c.load -= weight;
        let t = self.task_mut(task);
        t.vruntime += by;
        t.cpu = to;
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
        self.cpu_mut(cpu).online = false;
        self.cpu_mut(cpu).forced = None;
        while let Some(task) = self.leftmost(cpu) {
            let to = self.place(task, Arrival::Migrated);
            self.migrate(task, to);
        }
        self.settle(cpu);
        true
    }

    /// Gives a pCPU back.
    pub fn set_online(&mut self, cpu: CpuId) {
        self.cpu_mut(cpu).online = true;
    }

    /// Whether every task is where it says, and every load is the sum that it should be; for the
    /// tests.
    ///
    /// # Errors
    /// What is wrong.
    #[doc(hidden)]
    pub fn audit(&self) -> Result<(), &'static str> {
        let mut found = 0;
        for (i, cpu) in self.cpus.iter().enumerate() {
            cpu.tree.audit()?;
            let here = |t: &TaskId| self.task(*t).cpu == CpuId(i as u32);
            let queued: Vec<TaskId> = cpu.tree.iter().map(|(_, k)| TaskId(k.task)).collect();
            if !queued.iter().all(|t| here(t) && matches!(self.task(*t).place, Place::Queued(_))) {
                return Err("what is in a tree says so");
            }
            if !cpu.current.iter().all(|t| here(t) && self.task(*t).place == Place::Running) {
                return Err("what runs says so");
            }
            let all = queued.iter().chain(cpu.current.iter());
            if all.clone().map(|t| self.task(*t).weight).sum::<u64>() != cpu.load {
                return Err("a load is the sum of its weights");
            }
            if !cpu.online && all.clone().next().is_some() {
                return Err("nothing is left on a pCPU that is gone");
            }
            found += all.count();
        }
        let awake = |t: &&Task| matches!(t.place, Place::Queued(_) | Place::Running);
        if found != self.tasks.iter().filter(awake).count() {
            return Err("what is runnable is on one run queue");
        }
        let owed: i64 = self.cpus.iter().flat_map(|c| &c.debts).map(Debt::amount).sum();
        if owed != self.ledger.outstanding || !self.ledger.balanced() {
            return Err("lending is zero-sum");
        }
        Ok(())
    }

    /// Whether siblings share a run queue (table 4.2 counts that).
    #[must_use]
    pub fn is_stacked(&self, vm: VmId) -> bool {
        let runnable = self.vms[vm.0 as usize].iter().filter(|t| self.is_runnable(**t));
        let mut seen = BTreeSet::new();
        runnable.into_iter().any(|t| !seen.insert(self.task(*t).cpu))
    }
}
