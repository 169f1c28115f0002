//! An exact simulator: discrete events, one seed, one result.
//!
//! pCPUs run what the scheduler picks; a vCPU executes the steps of its program. A step that waits
//! for another vCPU spins: it uses up its pCPU and makes no progress, which is what lock-holder
//! preemption costs. A spin-lock is taken by the spinner that came first among those that run (a
//! test-and-set lock, as in the thesis' guests, Linux 2.6.18).

pub mod guest;
pub mod workload;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::policy::{Alpha, Granularity, Policy};
use crate::scheduler::{CpuId, Scheduler, TaskId, VmId};
use guest::{Program, Step};

/// What things cost, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Costs {
    /// Switching a pCPU from one task to another.
    pub switch: u64,
    /// What a task that comes back after others ran, or on another pCPU, loses until its caches
    /// are warm.
    pub refill: u64,
    /// From an interrupt's sending to its being served.
    pub interrupt: u64,
}

impl Costs {
    /// The thesis measured vCPU switches at 2.5 to 3 times a plain one (section 4.3.2) and gives
    /// the figures as pictures only. Taken here: 2 us plain, so 5.5 us; 128 KiB of working set at
    /// 3 GB/s; 2 us for an interrupt.
    pub const DEFAULT: Self = Self { switch: 5_500, refill: 43_000, interrupt: 2_000 };
}

/// How often things are looked at, in nanoseconds.
const BALANCE_EVERY: u64 = 64_000_000;
const SAMPLE_EVERY: u64 = 10_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A pCPU's slice or step ends, if it was not armed anew since.
    Timer(u32, u64),
    /// An interrupt reaches a pCPU.
    Interrupt(u32),
    /// A task's sleep ends.
    Wake(u32),
    /// A pCPU looks for work elsewhere.
    Balance(u32),
    /// The run queues are looked at for tables 4.2 and 4.3.
    Sample,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// The program has not said yet.
    Ready,
    Compute(u64),
    Hold(usize, u64),
    /// Spins on a lock that it will hold for that long.
    SpinLock(usize, u64),
    SpinBarrier(usize, u64),
    SpinPut(usize),
    SpinGet(usize),
    /// Spins until so many siblings have answered an interrupt.
    SpinAnswers(usize),
    Sleep,
    Ended,
}

struct Vcpu {
    vm: Option<VmId>,
    program: Box<dyn Program>,
    doing: Doing,
    /// What it executes before it makes progress again.
    overhead: u64,
    spun: u64,
    /// Siblings whose interrupt it answers when it next executes.
    asked_by: Vec<TaskId>,
}

#[derive(Debug, Default)]
struct Pcpu {
    armed: u64,
    running: Option<TaskId>,
    /// Until when what runs is accounted for; later than now while the pCPU switches.
    since: u64,
    slice_end: u64,
    switching: u64,
    idle: u64,
}

#[derive(Debug, Default)]
struct Lock {
    holder: Option<TaskId>,
    spinners: Vec<TaskId>,
}

#[derive(Debug, Default)]
struct Barrier {
    joins: usize,
    come: usize,
    generation: u64,
    spinners: Vec<TaskId>,
}

#[derive(Debug, Default)]
struct Fifo {
    holds: usize,
    capacity: usize,
    spinners: Vec<TaskId>,
}

/// What a machine's run queues looked like, over all samples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Samples {
    /// Samples of the machine.
    pub taken: u64,
    /// Those in which siblings shared a run queue.
    pub stacked: u64,
    /// Samples of pCPUs whose first task was a vCPU with queued or running siblings.
    pub compared: u64,
    /// Those in which one of these was as far as two thirds of its queue.
    pub exceeded: u64,
}

/// What became of one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmReport {
    /// When its last vCPU ended.
    pub ended: Option<u64>,
    /// What its vCPUs ran, nanoseconds.
    pub ran: u64,
    /// How much of that they spun.
    pub spun: u64,
}

/// A simulated host.
pub struct Simulator {
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    sequence: u64,
    handled: u64,
    scheduler: Scheduler,
    costs: Costs,
    cpus: Vec<Pcpu>,
    vcpus: Vec<Vcpu>,
    locks: Vec<Lock>,
    barriers: Vec<Barrier>,
    fifos: Vec<Fifo>,
    ended: Vec<Option<u64>>,
    left: Vec<usize>,
    samples: Samples,
    chance: SmallRng,
}

impl std::fmt::Debug for Simulator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Simulator").field("now", &self.now).finish_non_exhaustive()
    }
}

impl Simulator {
    /// A host of `cpus` pCPUs.
    #[must_use]
    pub fn new(cpus: usize, policy: Policy, costs: Costs, seed: u64) -> Self {
        let granularity = Granularity::linux_2_6_34(cpus);
        let mut s = Self {
            now: 0,
            events: BinaryHeap::new(),
            sequence: 0,
            handled: 0,
            scheduler: Scheduler::new(cpus, policy, granularity, seed),
            costs,
            cpus: (0..cpus).map(|_| Pcpu::default()).collect(),
            vcpus: Vec::new(),
            locks: Vec::new(),
            barriers: Vec::new(),
            fifos: Vec::new(),
            ended: Vec::new(),
            left: Vec::new(),
            samples: Samples::default(),
            chance: SmallRng::seed_from_u64(seed ^ 0x5bc0),
        };
        for cpu in 0..cpus as u32 {
            // Not all at once, as on a real host.
            s.at(BALANCE_EVERY * u64::from(cpu + 1) / cpus as u64, Event::Balance(cpu));
        }
        s.at(SAMPLE_EVERY, Event::Sample);
        s
    }

    /// A machine without vCPUs.
    pub fn add_vm(&mut self) -> VmId {
        self.ended.push(None);
        self.left.push(0);
        self.scheduler.add_vm()
    }

    /// A vCPU of `vm` that executes `program` from `at` nanoseconds on.
    pub fn add_vcpu(&mut self, vm: VmId, program: Box<dyn Program>, at: u64) -> TaskId {
        self.left[vm.0 as usize] += 1;
        self.add(Some(vm), program, at)
    }

    /// A task of the host itself, such as the I/O thread of a QEMU: no vCPU.
    pub fn add_host_task(&mut self, program: Box<dyn Program>, at: u64) -> TaskId {
        self.add(None, program, at)
    }

    fn add(&mut self, vm: Option<VmId>, program: Box<dyn Program>, at: u64) -> TaskId {
        let task = self.scheduler.add_task(vm, crate::scheduler::NICE_0);
        self.vcpus.push(Vcpu {
            vm,
            program,
            doing: Doing::Ready,
            overhead: 0,
            spun: 0,
            asked_by: Vec::new(),
        });
        self.at(at, Event::Wake(task.0));
        task
    }

    /// A spin-lock.
    pub fn add_lock(&mut self) -> guest::LockId {
        self.locks.push(Lock::default());
        guest::LockId(self.locks.len() - 1)
    }

    /// A barrier that joins `joins` vCPUs.
    pub fn add_barrier(&mut self, joins: usize) -> guest::BarrierId {
        self.barriers.push(Barrier { joins, ..Barrier::default() });
        guest::BarrierId(self.barriers.len() - 1)
    }

    /// A queue that holds `capacity` items.
    pub fn add_fifo(&mut self, capacity: usize) -> guest::FifoId {
        self.fifos.push(Fifo { capacity, ..Fifo::default() });
        guest::FifoId(self.fifos.len() - 1)
    }

    /// Nanoseconds simulated.
    #[must_use]
    pub const fn now(&self) -> u64 {
        self.now
    }

    /// Events handled.
    #[must_use]
    pub const fn events(&self) -> u64 {
        self.handled
    }

    /// The scheduler, to be read.
    #[must_use]
    pub const fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// What the run queues looked like.
    #[must_use]
    pub const fn samples(&self) -> Samples {
        self.samples
    }

    /// Nanoseconds that pCPUs had nothing to do, all together.
    #[must_use]
    pub fn idle(&self) -> u64 {
        self.cpus.iter().map(|c| c.idle).sum()
    }

    /// Nanoseconds that pCPUs spent switching, all together.
    #[must_use]
    pub fn switching(&self) -> u64 {
        self.cpus.iter().map(|c| c.switching).sum()
    }

    /// What became of `vm`.
    #[must_use]
    pub fn report(&self, vm: VmId) -> VmReport {
        let mine = || self.vcpus.iter().enumerate().filter(|(_, v)| v.vm == Some(vm));
        let under_way = |task| {
            let on = self.cpus.iter().find(|c| c.running == Some(task));
            on.map_or(0, |c| self.now.saturating_sub(c.since))
        };
        let ran = |i: usize| {
            let task = TaskId(i as u32);
            self.scheduler.ran(task) + under_way(task)
        };
        VmReport {
            ended: self.ended[vm.0 as usize],
            ran: mine().map(|(i, _)| ran(i)).sum(),
            spun: mine().map(|(_, v)| v.spun).sum(),
        }
    }

    /// Runs until `vm` has ended, or until `limit` nanoseconds. Returns when it ended.
    pub fn run_until_end(&mut self, vm: VmId, limit: u64) -> Option<u64> {
        while self.ended[vm.0 as usize].is_none() && self.step(limit) {}
        self.ended[vm.0 as usize]
    }

    /// Runs until `limit` nanoseconds.
    pub fn run_until(&mut self, limit: u64) {
        while self.step(limit) {}
    }

    fn at(&mut self, time: u64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((time, self.sequence, event)));
    }

    fn step(&mut self, limit: u64) -> bool {
        match self.events.peek() {
            Some(Reverse((time, ..))) if *time <= limit => {}
            _ => return false,
        }
        let Some(Reverse((time, _, event))) = self.events.pop() else { return false };
        self.now = time;
        self.handled += 1;
        match event {
            Event::Timer(cpu, armed) if self.cpus[cpu as usize].armed == armed => self.timer(cpu),
            Event::Timer(..) => {}
            Event::Interrupt(cpu) => self.decide(cpu),
            Event::Wake(task) => self.wake(TaskId(task)),
            Event::Balance(cpu) => {
                self.at(time + BALANCE_EVERY, Event::Balance(cpu));
                if self.scheduler.balance(CpuId(cpu)).is_some()
                    && self.cpus[cpu as usize].running.is_none()
                {
                    self.decide(cpu);
                }
            }
            Event::Sample => self.sample(),
        }
        true
    }

    fn sample(&mut self) {
        self.at(self.now + SAMPLE_EVERY, Event::Sample);
        for vm in 0..self.left.len() {
            if self.left[vm] > 0 {
                self.samples.taken += 1;
                self.samples.stacked += u64::from(self.scheduler.is_stacked(VmId(vm as u32)));
            }
        }
        for cpu in 0..self.cpus.len() {
            if let Some(far) = self.scheduler.exceeds(CpuId(cpu as u32), Alpha::THESIS) {
                self.samples.compared += 1;
                self.samples.exceeded += u64::from(far);
            }
        }
    }

    fn wake(&mut self, task: TaskId) {
        if self.vcpus[task.0 as usize].doing == Doing::Sleep {
            self.vcpus[task.0 as usize].doing = Doing::Ready;
        }
        let woken = self.scheduler.wake(task);
        if woken.preempts {
            self.decide(woken.cpu.0);
        }
    }

    /// Accounts for what `cpu` did until now.
    fn account(&mut self, cpu: u32) {
        let c = &mut self.cpus[cpu as usize];
        let elapsed = self.now.saturating_sub(c.since);
        c.since = c.since.max(self.now);
        let Some(task) = c.running else {
            c.idle += elapsed;
            return;
        };
        if elapsed == 0 {
            return;
        }
        self.scheduler.charge(CpuId(cpu), elapsed);
        let v = &mut self.vcpus[task.0 as usize];
        let lost = v.overhead.min(elapsed);
        v.overhead -= lost;
        match &mut v.doing {
            Doing::Compute(left) | Doing::Hold(_, left) => *left -= (elapsed - lost).min(*left),
            Doing::SpinLock(..)
            | Doing::SpinBarrier(..)
            | Doing::SpinPut(_)
            | Doing::SpinGet(_)
            | Doing::SpinAnswers(_) => v.spun += elapsed,
            Doing::Ready | Doing::Sleep | Doing::Ended => {}
        }
    }

    fn timer(&mut self, cpu: u32) {
        self.account(cpu);
        if self.now >= self.cpus[cpu as usize].slice_end {
            self.decide(cpu);
        } else {
            self.go_on(cpu);
        }
    }

    /// Asks the scheduler who runs on `cpu` from now on.
    fn decide(&mut self, cpu: u32) {
        self.account(cpu);
        let mut pick = self.scheduler.pick(CpuId(cpu));
        if pick.is_none() && self.scheduler.balance(CpuId(cpu)).is_some() {
            pick = self.scheduler.pick(CpuId(cpu));
        }
        let c = &mut self.cpus[cpu as usize];
        c.running = pick.map(|p| p.task);
        if let Some(p) = pick {
            let v = &mut self.vcpus[p.task.0 as usize];
            let mut start = self.now.max(c.since);
            if p.switched {
                start += self.costs.switch;
                c.switching += self.costs.switch;
                v.overhead = self.costs.refill;
            }
            c.since = start;
            c.slice_end = start + p.slice;
        }
        for other in self.scheduler.kicks() {
            self.at(self.now + self.costs.interrupt, Event::Interrupt(other.0));
        }
        self.go_on(cpu);
    }

    /// Lets what runs on `cpu` take its next steps, and arms the timer for the one that lasts.
    fn go_on(&mut self, cpu: u32) {
        while let Some(task) = self.cpus[cpu as usize].running {
            // While the pCPU switches, nothing is executed yet.
            if self.cpus[cpu as usize].since > self.now {
                break;
            }
            self.answer(task);
            match self.advance(cpu, task) {
                Progress::Next => {}
                Progress::Lasts => break,
                Progress::Left => return self.decide(cpu),
            }
        }
        self.arm(cpu);
    }

    /// Sets the timer of `cpu` to when something happens there next.
    fn arm(&mut self, cpu: u32) {
        let c = &mut self.cpus[cpu as usize];
        c.armed += 1;
        let (armed, start) = (c.armed, c.since.max(self.now));
        let Some(task) = c.running else { return };
        let v = &self.vcpus[task.0 as usize];
        let next = match v.doing {
            _ if start > self.now && !v.asked_by.is_empty() => start,
            Doing::Compute(left) | Doing::Hold(_, left) => {
                c.slice_end.min(start + v.overhead + left)
            }
            _ if start > self.now => start,
            _ => c.slice_end,
        };
        self.at(next, Event::Timer(cpu, armed));
    }

    /// Has those of `spinners` that run look again at what they wait for, now.
    fn stir(&mut self, spinners: &[TaskId]) {
        for task in spinners {
            if let Some(cpu) = self.runs_on(*task) {
                let c = &mut self.cpus[cpu as usize];
                c.armed += 1;
                let armed = c.armed;
                self.at(self.now, Event::Timer(cpu, armed));
            }
        }
    }

    /// The pCPU that executes `task` at this moment.
    fn runs_on(&self, task: TaskId) -> Option<u32> {
        let cpu = self.scheduler.cpu_of(task)?.0;
        let c = &self.cpus[cpu as usize];
        (c.running == Some(task) && c.since <= self.now).then_some(cpu)
    }

    /// One step of a vCPU that runs.
    fn advance(&mut self, cpu: u32, task: TaskId) -> Progress {
        let i = task.0 as usize;
        let done = match self.vcpus[i].doing {
            Doing::Ready | Doing::Compute(0) => {
                let step = self.vcpus[i].program.next(&mut self.chance);
                return self.begin(cpu, task, step);
            }
            Doing::Hold(lock, 0) => {
                self.release(lock);
                true
            }
            Doing::SpinLock(lock, hold) => {
                let l = &mut self.locks[lock];
                if l.holder.is_none() {
                    l.holder = Some(task);
                    l.spinners.retain(|t| *t != task);
                    self.vcpus[i].doing = Doing::Hold(lock, hold);
                }
                false
            }
            Doing::SpinBarrier(barrier, generation) => {
                self.barriers[barrier].generation > generation
            }
            Doing::SpinPut(fifo) => self.try_fifo(fifo, task, true),
            Doing::SpinGet(fifo) => self.try_fifo(fifo, task, false),
            Doing::SpinAnswers(left) => left == 0,
            Doing::Compute(_) | Doing::Hold(..) | Doing::Sleep | Doing::Ended => false,
        };
        if done {
            self.vcpus[i].doing = Doing::Ready;
            Progress::Next
        } else {
            Progress::Lasts
        }
    }

    fn begin(&mut self, cpu: u32, task: TaskId, step: Step) -> Progress {
        let i = task.0 as usize;
        // What computes or holds does so for a nanosecond at least, so that time goes on.
        self.vcpus[i].doing = match step {
            Step::Compute(ns) => Doing::Compute(ns.max(1)),
            Step::Critical(lock, ns) => {
                let l = &mut self.locks[lock.0];
                if l.holder.is_none() {
                    l.holder = Some(task);
                    Doing::Hold(lock.0, ns.max(1))
                } else {
                    l.spinners.push(task);
                    Doing::SpinLock(lock.0, ns.max(1))
                }
            }
            Step::Barrier(barrier) => {
                let b = &mut self.barriers[barrier.0];
                b.come += 1;
                if b.come == b.joins {
                    b.come = 0;
                    b.generation += 1;
                    let spinners = std::mem::take(&mut b.spinners);
                    self.stir(&spinners);
                    Doing::Ready
                } else {
                    b.spinners.push(task);
                    Doing::SpinBarrier(barrier.0, b.generation)
                }
            }
            Step::Put(fifo) => Doing::SpinPut(fifo.0),
            Step::Get(fifo) => Doing::SpinGet(fifo.0),
            Step::Shootdown => Doing::SpinAnswers(self.ask_siblings(task)),
            Step::Sleep(ns) => {
                self.at(self.now + ns.max(1), Event::Wake(task.0));
                self.vcpus[i].doing = Doing::Sleep;
                self.scheduler.sleep(CpuId(cpu));
                return Progress::Left;
            }
            Step::Exit => {
                self.vcpus[i].doing = Doing::Ended;
                self.scheduler.exit(task);
                if let Some(vm) = self.vcpus[i].vm.map(|v| v.0 as usize) {
                    self.left[vm] -= 1;
                    if self.left[vm] == 0 {
                        self.ended[vm] = Some(self.now);
                    }
                }
                return Progress::Left;
            }
        };
        match self.vcpus[i].doing {
            Doing::Compute(_) | Doing::Hold(..) => Progress::Lasts,
            Doing::SpinLock(..) | Doing::SpinBarrier(..) => Progress::Lasts,
            _ => Progress::Next,
        }
    }

    /// The holder lets go: the spinner that runs and came first has the lock now.
    fn release(&mut self, lock: usize) {
        let spinners = &self.locks[lock].spinners;
        let next = spinners.iter().position(|t| self.runs_on(*t).is_some());
        let Some(at) = next else {
            self.locks[lock].holder = None;
            return;
        };
        let task = self.locks[lock].spinners.remove(at);
        self.locks[lock].holder = Some(task);
        if let Some(cpu) = self.runs_on(task) {
            self.account(cpu);
            if let Doing::SpinLock(_, hold) = self.vcpus[task.0 as usize].doing {
                self.vcpus[task.0 as usize].doing = Doing::Hold(lock, hold);
            }
            self.arm(cpu);
        }
    }

    /// Interrupts the siblings of `task`; how many of them are yet to answer. What executes now
    /// answers at once (its interrupt costs the asker what [`Costs::interrupt`] says), what
    /// waits for a pCPU when it gets one, what sleeps has nothing to forget.
    fn ask_siblings(&mut self, task: TaskId) -> usize {
        let vm = self.vcpus[task.0 as usize].vm;
        self.vcpus[task.0 as usize].overhead += self.costs.interrupt;
        let mut left = 0;
        for i in 0..self.vcpus.len() {
            let sibling = TaskId(i as u32);
            let other = sibling != task && self.vcpus[i].vm == vm;
            if other && self.scheduler.is_runnable(sibling) && self.runs_on(sibling).is_none() {
                self.vcpus[i].asked_by.push(task);
                left += 1;
            }
        }
        left
    }

    /// `task` executes: it answers who interrupted it.
    fn answer(&mut self, task: TaskId) {
        for asker in std::mem::take(&mut self.vcpus[task.0 as usize].asked_by) {
            if let Doing::SpinAnswers(left) = &mut self.vcpus[asker.0 as usize].doing {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    self.stir(&[asker]);
                }
            }
        }
    }

    fn try_fifo(&mut self, fifo: usize, task: TaskId, put: bool) -> bool {
        let f = &mut self.fifos[fifo];
        let can = if put { f.holds < f.capacity } else { f.holds > 0 };
        if can {
            f.holds = if put { f.holds + 1 } else { f.holds - 1 };
            f.spinners.retain(|t| *t != task);
            let waiting = f.spinners.clone();
            self.stir(&waiting);
        } else if !f.spinners.contains(&task) {
            f.spinners.push(task);
        }
        can
    }
}

/// What a step came to.
enum Progress {
    /// It is done; the next follows.
    Next,
    /// It takes time.
    Lasts,
    /// The vCPU gave its pCPU up.
    Left,
}
