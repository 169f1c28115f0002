//! An exact simulator: discrete events, one seed, one result.
//!
//! pCPUs run what the scheduler picks; a vCPU executes the steps of its program. A step that waits
//! for another vCPU spins: it uses up its pCPU and makes no progress, which is what lock-holder
//! preemption costs. A spin-lock is taken by the spinner that came first among those that run (a
//! test-and-set lock, as in the thesis' guests, Linux 2.6.18).

pub mod guest;
pub mod record;
mod run;
mod spin;
pub mod workload;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::policy::{Granularity, Policy};
use crate::scheduler::{Scheduler, TaskId, VmId};
use guest::{Level, Program};

/// What things cost, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Costs {
    /// Switching a pCPU from one task to another.
    pub switch: u64,
    /// What a task that comes to another pCPU loses until its caches are warm; until it has lost
    /// that it goes at half its speed. On the pCPU that it left it loses no more than the time
    /// that others had to displace what it needs, for they fetch as fast as it does.
    pub refill: u64,
    /// From an interrupt's sending to its being served; also an exit of a vCPU.
    pub interrupt: u64,
    /// How long a vCPU spins in its kernel before the processor tells (pause-loop exiting), where
    /// the policy makes use of it: doubled by each such exit, back to this when the vCPU is
    /// scheduled.
    pub spin_window: u64,
    /// Between two ticks of a pCPU; under CFS a turn ends at the first one after its slice. 0: at once.
    pub tick: u64,
    /// How long a pCPU has the lock under which gangs start and end.
    pub ordering: u64,
    /// How many pCPUs share one, as they share a cache; 0: all.
    pub domain: u32,
    /// Between two times that the I/O thread of a machine's QEMU works, on average. 0: it has none.
    pub io_every: u64,
}

impl Costs {
    /// The thesis measured vCPU switches at 2.5 to 3 times a plain one (section 4.3.2) and gives
    /// the figures as pictures only. Taken here: 2 us plain, so 5.5 us; 128 KiB of working set at
    /// 3 GB/s; 2 us for an interrupt. The window is KVM's: 4096 cycles (`ple_window`), here of
    /// 2.66 GHz, times 2 (`ple_window_grow`). Ticks are those of 2.6.34's configuration for x86
    /// (`HZ=1000`), each pCPU's a little later than the one's before, within half a tick. The I/O
    /// threads are a guess. The lock is had for what a decision was measured to take in the kernel.
    pub const DEFAULT: Self = Self {
        switch: 5_500,
        refill: 43_000,
        interrupt: 2_000,
        spin_window: 1_540,
        tick: 1_000_000,
        ordering: 550,
        domain: 8,
        io_every: 4_000_000,
    };

    /// When a turn on `cpu` of `cpus` that may end at `at` does.
    fn turn_end(&self, at: u64, cpu: u32, cpus: usize) -> u64 {
        if self.tick == 0 {
            return at;
        }
        let offset = self.tick / 2 * u64::from(cpu) / cpus as u64;
        at.saturating_sub(offset).div_ceil(self.tick) * self.tick + offset
    }
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
    /// Sleeps until a sibling wakes it.
    Halt,
    Ended,
}

struct Vcpu {
    vm: Option<VmId>,
    program: Box<dyn Program>,
    doing: Doing,
    /// What it executes before it makes progress again.
    overhead: u64,
    /// What it is yet to lose to cold caches.
    cold: u64,
    spun: u64,
    /// Siblings whose interrupt it answers when it next executes.
    asked_by: Vec<TaskId>,
    /// Where it ran last, and until when.
    left: Option<(u32, u64)>,
    /// It was woken and has not run since.
    woken: bool,
    loops: spin::Loops,
}

#[derive(Debug, Default)]
struct Pcpu {
    armed: u64,
    running: Option<TaskId>,
    /// Until when what runs is accounted for; later than now while the pCPU switches.
    since: u64,
    slice_end: u64,
    /// When the processor tells that what runs spins.
    told_at: u64,
    switching: u64,
    idle: u64,
}

#[derive(Debug)]
struct Lock {
    level: Level,
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
    /// Turns of vCPUs that began while a sibling waited.
    pub started: u64,
    /// Those that began while one of these was as far.
    pub started_far: u64,
}

/// What it cost that decisions which start or end gangs exclude each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Crowding {
    /// Such decisions.
    pub decisions: u64,
    /// Those that waited for another pCPU's.
    pub waited: u64,
    /// How long in all, nanoseconds.
    pub wait: u64,
    /// The longest.
    pub longest: u64,
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
    /// Of each machine, which vCPU a directed yield asked for last.
    boosted: Vec<usize>,
    /// Until when each lock for starting gangs is taken.
    ordering: Vec<u64>,
    crowding: Crowding,
    samples: Samples,
    record: Option<Box<record::Record>>,
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
            boosted: Vec::new(),
            ordering: vec![0; cpus],
            crowding: Crowding::default(),
            samples: Samples::default(),
            record: None,
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
        self.boosted.push(0);
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
            cold: 0,
            spun: 0,
            asked_by: Vec::new(),
            left: None,
            woken: false,
            loops: spin::Loops::default(),
        });
        self.at(at, Event::Wake(task.0));
        task
    }

    /// A spin-lock of the guest's kernel or of a program in it.
    pub fn add_lock(&mut self, level: Level) -> guest::LockId {
        self.locks.push(Lock { level, holder: None, spinners: Vec::new() });
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

    /// What it cost to order decisions.
    #[must_use]
    pub const fn crowding(&self) -> Crowding {
        self.crowding
    }

    /// How long a decision of `cpu` that starts or ends a gang has to wait for its lock, which it takes.
    fn order(&mut self, cpu: u32) -> u64 {
        let domain = cpu.checked_div(self.costs.domain).unwrap_or(0) as usize;
        let begins = self.ordering[domain].max(self.now);
        self.ordering[domain] = begins + self.costs.ordering;
        let wait = begins - self.now;
        let c = &mut self.crowding;
        c.decisions += 1;
        c.waited += u64::from(wait > 0);
        c.wait += wait;
        c.longest = c.longest.max(wait);
        wait
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
}
