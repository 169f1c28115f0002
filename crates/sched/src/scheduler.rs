//! Run queues after CFS, one a pCPU, and what the policies add to them.
//!
//! Sans-IO: time is what the caller says ran, interrupts are asked for through
//! [`Scheduler::kicks`], chance comes from a seed. Here are the rules of Linux 2.6.34 that all
//! policies stand on; [`crate::placement`] says where a task runs, [`crate::sbco`] has Algorithms 1
//! and 2, [`crate::eevdf`] the other order, [`crate::rivals`] what else couples siblings.

use std::collections::BTreeSet;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::adaptive::Adaptive;
use crate::policy::{Coupling, Granularity, Order, Policy};
use crate::rivals::Gang;
use crate::sbco::{Debt, Ledger, Loan};
use crate::tree::{Node, RbTree};

/// How often the skew of relaxed co-scheduling is looked at, nanoseconds: about a tick.
const SKEW_CHECKED: u64 = 1_000_000;

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

/// Order in a run queue: vruntime (the deadline under EEVDF), and who came first where that is equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Key {
    pub(crate) by: i64,
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
    /// The dirty tag: this vCPU has lent since it ran last, or is to be moved.
    pub(crate) dirty: bool,
    /// How often it was scheduled.
    pub(crate) turns: u64,
    /// Time run in all, nanoseconds; and by the time it was scheduled last.
    total: u64,
    began: u64,
    /// Progress as relaxed co-scheduling counts it: sleeping is as good as running.
    pub(crate) progress: u64,
    /// EEVDF: the virtual time by which its request is to be served, and that for which it was
    /// picked last.
    pub(crate) deadline: i64,
    pub(crate) picked_for: i64,
    /// EEVDF: its lag when it went to sleep, and its queue's average then.
    pub(crate) lag: i64,
    pub(crate) left_at: i64,
}

impl Task {
    /// How long its turn is, or its last turn was, nanoseconds.
    pub(crate) const fn last_turn(&self) -> u64 {
        self.total - self.began
    }
}

#[derive(Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) tree: RbTree<Key>,
    pub(crate) current: Option<TaskId>,
    pub(crate) min_vruntime: i64,
    /// Weights of all that is queued and running.
    pub(crate) load: u64,
    /// EEVDF: the sum of their virtual runtimes, each times its weight.
    pub(crate) sum: i128,
    pub(crate) debts: Vec<Debt>,
    /// Whose gang it runs members of.
    pub(crate) claimed: Option<VmId>,
    /// Whom an interrupt of a sibling wants to run here.
    pub(crate) forced: Option<TaskId>,
    /// Whom a directed yield asks for here (the "next" buddy).
    pub(crate) wanted: Option<TaskId>,
    /// Who was interrupted for one that woke (the "last" buddy): its turn goes on afterwards.
    pub(crate) interrupted: Option<TaskId>,
    /// Who ran last.
    last: Option<TaskId>,
    pub(crate) online: bool,
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
pub(crate) enum Arrival {
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
    pub(crate) last_loan: Option<Loan>,
    /// Of each machine.
    pub(crate) gangs: Vec<Gang>,
    /// Whether the last decision started or ended a gang, for which the pCPUs of a cache have one lock.
    pub(crate) ordered: bool,
    pub(crate) adaptive: Vec<Adaptive>,
    /// Of each machine: what its vCPUs paid for loans less what they got, nanoseconds of vruntime.
    pub(crate) accounts: Vec<i64>,
    /// Of each machine: the vCPU that its others follow.
    pub(crate) followed: Vec<Option<TaskId>>,
    kicks: BTreeSet<CpuId>,
    pub(crate) counters: Counters,
    came: u64,
    pub(crate) chance: SmallRng,
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
            last_loan: None,
            gangs: Vec::new(),
            ordered: false,
            adaptive: Vec::new(),
            accounts: Vec::new(),
            followed: Vec::new(),
            kicks: BTreeSet::new(),
            counters: Counters::default(),
            came: 0,
            chance: SmallRng::seed_from_u64(seed),
        }
    }

    /// A machine without vCPUs.
    pub fn add_vm(&mut self) -> VmId {
        self.vms.push(Vec::new());
        self.adaptive.push(Adaptive::default());
        self.accounts.push(0);
        self.followed.push(None);
        self.gangs.push(Gang::default());
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
            turns: 0,
            total: 0,
            began: 0,
            progress: 0,
            deadline: 0,
            picked_for: i64::MIN,
            lag: 0,
            left_at: 0,
        });
        id
    }

    /// The vCPUs of `vm` that have not ended.
    #[must_use]
    pub fn vcpus(&self, vm: VmId) -> &[TaskId] {
        &self.vms[vm.0 as usize]
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

    /// Whether a decision since the last call started or ended a gang. Such decisions exclude each other
    /// among pCPUs that share a cache, where pCPUs decide at the same time.
    pub fn take_ordered(&mut self) -> bool {
        std::mem::take(&mut self.ordered)
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

    /// Wakes `task` where [`Scheduler::target`] says, nobody in particular having woken it. What is
    /// awake already stays.
    pub fn wake(&mut self, task: TaskId) -> Woken {
        match self.target(task, None) {
            Some(cpu) => self.wake_on(task, cpu),
            None => Woken { cpu: self.task(task).cpu, preempts: false },
        }
    }

    /// Wakes `task` on `cpu`, whose running task must have been charged until now.
    pub fn wake_on(&mut self, task: TaskId, cpu: CpuId) -> Woken {
        let t = self.task(task);
        if t.place != Place::Sleeping {
            return Woken { cpu: t.cpu, preempts: false };
        }
        let why = if t.cpu.0 == u32::MAX { Arrival::Created } else { Arrival::Woken };
        if why == Arrival::Woken && self.policy.order == Order::Eevdf {
            self.task_mut(task).lag = self.lag_after_sleep(task);
        }
        self.task_mut(task).cpu = cpu;
        self.catch_up(task);
        self.arrive(task, why);
        let preempts = match (self.cpu(cpu).current, self.policy.order) {
            (None, _) => true,
            (Some(current), Order::Eevdf) => self.preempts_eevdf(current, task),
            (Some(current), Order::Cfs) => {
                let (c, t) = (self.task(current), self.task(task));
                let ahead = c.vruntime - t.vruntime;
                ahead > (self.granularity.wakeup * NICE_0 / t.weight) as i64
            }
        };
        // `LAST_BUDDY`: only where more run than the period has room for.
        let many = self.granularity.latency / self.granularity.min;
        if preempts && self.policy.order == Order::Cfs && self.cpu(cpu).size() as u64 > many {
            let c = self.cpu_mut(cpu);
            c.interrupted = c.current;
        }
        Woken { cpu, preempts }
    }

    /// Whose turn was interrupted and goes on before that of `first`: who is ahead of it by less than it
    /// would take a woken task to preempt it.
    fn goes_on(&mut self, cpu: CpuId, first: TaskId) -> Option<TaskId> {
        let task = self.cpu(cpu).interrupted?;
        if !self.is_queued_on(task, cpu) {
            self.cpu_mut(cpu).interrupted = None;
            return None;
        }
        let ahead = self.task(task).vruntime - self.task(first).vruntime;
        let may = ahead <= (self.granularity.wakeup * NICE_0 / self.task(first).weight) as i64;
        if may {
            self.cpu_mut(cpu).interrupted = None;
        }
        may.then_some(task)
    }

    /// `place_entity`: under CFS a new task starts a slice behind, a sleeper gets at most half a
    /// period (`GENTLE_FAIR_SLEEPERS`).
    pub(crate) fn arrive(&mut self, task: TaskId, why: Arrival) {
        let cpu = self.task(task).cpu;
        let min = self.cpu(cpu).min_vruntime;
        let weight = self.task(task).weight;
        match (self.policy.order, why) {
            (Order::Cfs, Arrival::Created) => {
                let slice = self.slice_of(cpu, weight, self.cpu(cpu).load + weight, 1);
                self.task_mut(task).vruntime = min + (slice * NICE_0 / weight) as i64;
            }
            (Order::Cfs, Arrival::Woken) => {
                let credit = (self.granularity.latency / 2) as i64;
                let t = self.task_mut(task);
                t.vruntime = t.vruntime.max(min - credit);
            }
            (Order::Eevdf, Arrival::Created) => self.place_new(task),
            (Order::Eevdf, Arrival::Woken) => self.place_with_lag(task, self.task(task).lag),
            (_, Arrival::Migrated) => {}
        }
        self.join(task);
        self.enqueue(task);
    }

    /// `task` counts on its pCPU from now on.
    pub(crate) fn join(&mut self, task: TaskId) {
        let (cpu, weight, vruntime) = self.counted(task);
        let c = self.cpu_mut(cpu);
        c.load += weight;
        c.sum += i128::from(weight) * i128::from(vruntime);
    }

    /// `task` counts on its pCPU no more.
    pub(crate) fn part(&mut self, task: TaskId) {
        let (cpu, weight, vruntime) = self.counted(task);
        let c = self.cpu_mut(cpu);
        c.load -= weight;
        c.sum -= i128::from(weight) * i128::from(vruntime);
    }

    fn counted(&self, task: TaskId) -> (CpuId, u64, i64) {
        let t = self.task(task);
        (t.cpu, t.weight, t.vruntime)
    }

    /// The running task of `cpu` goes to sleep.
    pub fn sleep(&mut self, cpu: CpuId) {
        if let Some(task) = self.leave(cpu) {
            self.task_mut(task).place = Place::Sleeping;
            self.left(task);
        }
    }

    /// `task` ends, wherever it is. What was asked for it is nobody's.
    pub fn exit(&mut self, task: TaskId) {
        let cpu = self.task(task).cpu;
        match self.task(task).place {
            Place::Running => {
                self.leave(cpu);
            }
            Place::Queued(_) => {
                self.dequeue(task);
                self.part(task);
            }
            Place::Sleeping | Place::Exited => {}
        }
        self.task_mut(task).place = Place::Exited;
        self.left(task);
        if let Some(vm) = self.task(task).vm {
            self.vms[vm.0 as usize].retain(|t| *t != task);
            if self.vms[vm.0 as usize].is_empty() {
                self.write_off(vm);
            }
        }
    }

    fn leave(&mut self, cpu: CpuId) -> Option<TaskId> {
        let task = self.cpu_mut(cpu).current.take()?;
        if self.policy.order == Order::Eevdf {
            let (lag, left_at) = (self.lag(task), self.average(cpu));
            let t = self.task_mut(task);
            (t.lag, t.left_at) = (lag, left_at);
        }
        self.part(task);
        Some(task)
    }

    /// `task` has left its queue: who stopped for it may start.
    fn left(&mut self, task: TaskId) {
        if let Coupling::Relaxed(skew) = self.policy.coupling {
            self.relaxed_kicks(task, skew);
        }
    }

    /// The running task of `cpu` has run for `ns` nanoseconds more.
    pub fn charge(&mut self, cpu: CpuId, ns: u64) {
        let Some(task) = self.cpu(cpu).current else { return };
        let t = self.task_mut(task);
        t.total += ns;
        t.progress += ns;
        let by = if t.weight == NICE_0 {
            ns as i64
        } else {
            (u128::from(ns) * u128::from(NICE_0) / u128::from(t.weight)) as i64
        };
        let by = by + self.instalment(task, by);
        self.shift(task, by);
        self.adapt(task, ns);
        if self.policy.order == Order::Eevdf {
            self.renew(task);
        }
        self.advance(cpu);
    }

    /// `min_vruntime` never goes back. Under EEVDF it is what everybody has its part of.
    fn advance(&mut self, cpu: CpuId) {
        let c = self.cpu(cpu);
        let least = if self.policy.order == Order::Eevdf {
            self.average(cpu)
        } else {
            let running = c.current.map(|t| self.task(t).vruntime);
            let first = c.tree.first().map(|n| c.tree.key(n).by);
            match (running, first) {
                (Some(a), Some(b)) => a.min(b),
                (Some(a), None) | (None, Some(a)) => a,
                (None, None) => return,
            }
        };
        let c = self.cpu_mut(cpu);
        c.min_vruntime = c.min_vruntime.max(least);
    }

    /// Decides who runs on `cpu` next. What ran there is queued again first. `None` when nobody
    /// waits, or (relaxed co-scheduling) when all that wait have to stop for a sibling.
    pub fn pick(&mut self, cpu: CpuId) -> Option<Pick> {
        let previous = self.cpu_mut(cpu).current.take();
        let pick = self.pick_after(cpu, previous);
        if let Coupling::Relaxed(skew) = self.policy.coupling {
            let now = pick.map(|p| p.task);
            if now != previous {
                for task in previous.into_iter().chain(now) {
                    self.relaxed_kicks(task, skew);
                }
            }
        }
        pick
    }

    fn pick_after(&mut self, cpu: CpuId, previous: Option<TaskId>) -> Option<Pick> {
        if let Some(previous) = previous {
            self.enqueue(previous);
        }
        if !self.cpu(cpu).online {
            return None;
        }
        self.settle(cpu);
        let task = match self.cpu_mut(cpu).forced.take() {
            Some(t) if self.may_be_forced(t, cpu) => t,
            _ => self.choose(cpu, previous)?,
        };
        let Place::Queued(node) = self.task(task).place else { return None };
        self.cpu_mut(cpu).tree.remove(node);
        let t = self.task_mut(task);
        t.place = Place::Running;
        // It has its turn: what was asked for it is no longer needed, and it may lend again.
        t.turns += 1;
        t.began = t.total;
        t.dirty = false;
        t.picked_for = t.deadline;
        let weight = t.weight;
        let left = (t.deadline - t.vruntime).max(1) as u64 * weight / NICE_0;
        let c = self.cpu_mut(cpu);
        c.current = Some(task);
        let switched = c.last != Some(task);
        c.last = Some(task);
        self.counters.picks += 1;
        self.counters.switches += u64::from(switched);
        self.advance(cpu);
        let slice = match (self.policy.order, self.policy.coupling) {
            (Order::Eevdf, _) => left.max(1),
            (Order::Cfs, Coupling::Relaxed(_)) => {
                self.slice_of(cpu, weight, self.cpu(cpu).load, 0).min(SKEW_CHECKED)
            }
            (Order::Cfs, _) => self.slice_of(cpu, weight, self.cpu(cpu).load, 0),
        };
        Some(Pick { task, slice, switched })
    }

    fn may_be_forced(&self, task: TaskId, cpu: CpuId) -> bool {
        let coupling = self.policy.coupling;
        let bound = matches!(coupling, Coupling::Distance(_) | Coupling::Adaptive { .. });
        self.is_queued_on(task, cpu)
            && (!bound || self.leftmost(cpu).is_some_and(|first| self.is_fair(cpu, task, first)))
    }

    fn choose(&mut self, cpu: CpuId, previous: Option<TaskId>) -> Option<TaskId> {
        let first = match self.policy.order {
            Order::Cfs => self.leftmost(cpu)?,
            Order::Eevdf => self.pick_eevdf(cpu, previous)?,
        };
        if self.policy.order == Order::Cfs
            && !matches!(self.policy.coupling, Coupling::Relaxed(_))
            && !self.belongs_to_gang(cpu)
            && let Some(interrupted) = self.goes_on(cpu, first)
        {
            return Some(interrupted);
        }
        Some(match self.policy.coupling {
            Coupling::None | Coupling::Yield(_) => first,
            Coupling::Distance(_) | Coupling::Adaptive { .. } => self.sbco(cpu, first),
            Coupling::Process => self.procco(first),
            Coupling::Cpu => self.cpuco(cpu, first),
            Coupling::Relaxed(skew) => self.relaxed(cpu, skew)?,
        })
    }

    pub(crate) fn is_queued_on(&self, task: TaskId, cpu: CpuId) -> bool {
        let t = self.task(task);
        t.cpu == cpu && matches!(t.place, Place::Queued(_))
    }

    pub(crate) fn leftmost(&self, cpu: CpuId) -> Option<TaskId> {
        let tree = &self.cpu(cpu).tree;
        tree.first().map(|n| TaskId(tree.key(n).task))
    }

    /// Puts a task that is to wait for `cpu` into its tree, where its vruntime (its deadline) says.
    pub(crate) fn enqueue(&mut self, task: TaskId) {
        self.came += 1;
        let (came, t) = (self.came, self.task(task));
        let by = if self.policy.order == Order::Cfs { t.vruntime } else { t.deadline };
        let (cpu, key) = (t.cpu, Key { by, came, task: task.0 });
        let node = self.cpu_mut(cpu).tree.insert(key);
        self.task_mut(task).place = Place::Queued(node);
    }

    /// Takes a queued task out of its tree; whoever calls says what it is from then on.
    pub(crate) fn dequeue(&mut self, task: TaskId) {
        let cpu = self.task(task).cpu;
        if let Place::Queued(node) = self.task(task).place {
            self.cpu_mut(cpu).tree.remove(node);
        }
    }

    /// Changes the vruntime of a task that is not on another pCPU's queue, and its position.
    pub(crate) fn shift(&mut self, task: TaskId, by: i64) {
        let t = self.task_mut(task);
        t.vruntime += by;
        let (cpu, weight, place) = (t.cpu, t.weight, t.place);
        if matches!(place, Place::Queued(_) | Place::Running) {
            self.cpu_mut(cpu).sum += i128::from(weight) * i128::from(by);
        }
        if matches!(place, Place::Queued(_)) {
            self.dequeue(task);
            self.enqueue(task);
        }
    }

    /// The part of the period that a weight has in a load, `more` tasks counted on top.
    fn slice_of(&self, cpu: CpuId, weight: u64, load: u64, more: usize) -> u64 {
        let period = self.granularity.period(self.cpu(cpu).size() + more);
        (period * weight / load.max(1)).max(1)
    }

    /// One of `n` by chance.
    pub(crate) fn draw(&mut self, n: usize) -> usize {
        self.chance.random_range(0..n)
    }

    /// Whether siblings share a run queue (table 4.2 counts that).
    #[must_use]
    pub fn is_stacked(&self, vm: VmId) -> bool {
        let runnable = self.vms[vm.0 as usize].iter().filter(|t| self.is_runnable(**t));
        let mut seen = BTreeSet::new();
        runnable.into_iter().any(|t| !seen.insert(self.task(*t).cpu))
    }
}
