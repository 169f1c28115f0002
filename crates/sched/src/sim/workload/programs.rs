//! The programs that the models are made of.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use rand::rngs::SmallRng;
use rand::{Rng, RngExt};

use super::Shared;
use crate::sim::guest::{BarrierId, LockId, Program, Step};

/// Locks of which one is taken now and then.
#[derive(Debug, Clone)]
pub(super) struct Locks {
    pub(super) locks: Vec<LockId>,
    /// Mean time between two, nanoseconds.
    pub(super) every: f64,
    /// Mean time that one is held.
    pub(super) held: f64,
    /// In how many cases it is one of the vCPU's own part of them.
    pub(super) own: f64,
    pub(super) until: f64,
}

impl Locks {
    pub(super) fn new(locks: Vec<LockId>, every: f64, held: f64) -> Self {
        Self { locks, every, held, own: 0.0, until: 0.0 }
    }

    fn draw(&self, vcpu: usize, vcpus: usize, chance: &mut SmallRng) -> LockId {
        let mine = self.locks.len() / vcpus.max(1);
        let at = if self.own > 0.0 && mine > 0 && chance.random_bool(self.own) {
            vcpu * mine + chance.random_range(0..mine)
        } else {
            chance.random_range(0..self.locks.len())
        };
        self.locks[at % self.locks.len()]
    }
}

/// A vCPU runs out of work now and then, until a sibling has some.
#[derive(Debug, Clone, Copy)]
pub(super) struct Halts {
    /// Mean time of work between two, nanoseconds.
    pub(super) every: f64,
    /// Mean time of one.
    pub(super) lasts: f64,
}

/// All vCPUs stop their work together now and then for something that they do in parts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Collections {
    pub(super) barrier: BarrierId,
    /// After how much work of all, nanoseconds.
    pub(super) every: u64,
    /// What each vCPU computes in a part.
    pub(super) part: u64,
    pub(super) parts: usize,
}

/// Does shared work: computes, takes locks, has its siblings forget mappings, halts.
#[derive(Debug, Clone)]
pub(super) struct Worker {
    pub(super) work: u64,
    pub(super) left: Shared,
    pub(super) locks: Vec<Locks>,
    /// Mean time of work between two TLB shootdowns, nanoseconds.
    pub(super) shootdown_every: Option<f64>,
    pub(super) halts: Option<Halts>,
    pub(super) collections: Option<Collections>,
    pub(super) vcpu: usize,
    pub(super) collected: u64,
    pub(super) until_shootdown: f64,
    pub(super) until_halt: f64,
    pub(super) next: VecDeque<Step>,
}

/// vCPUs that share the locks of which each has a part.
const PARTS: usize = 4;

impl Worker {
    pub(super) fn new(work: u64) -> Self {
        Self {
            work,
            left: Rc::new(Cell::new(work)),
            locks: Vec::new(),
            shootdown_every: None,
            halts: None,
            collections: None,
            vcpu: 0,
            collected: 0,
            until_shootdown: 0.0,
            until_halt: 0.0,
            next: VecDeque::new(),
        }
    }

    /// The same on another vCPU: what is left is shared.
    pub(super) fn on(&self, vcpu: usize) -> Self {
        Self {
            vcpu,
            until_shootdown: self.shootdown_every.unwrap_or(0.0),
            until_halt: self.halts.map_or(0.0, |h| h.every),
            ..self.clone()
        }
    }

    /// Puts what comes next in a row: work up to the next lock, the lock, and what else is due.
    fn plan(&mut self, chance: &mut SmallRng) {
        if let Some(c) = self.collections
            && (self.work - self.left.get()) / c.every > self.collected
        {
            self.collected += 1;
            for _ in 0..c.parts {
                self.next.push_back(Step::Barrier(c.barrier));
                self.next.push_back(Step::Compute(c.part));
            }
            self.next.push_back(Step::Barrier(c.barrier));
            return;
        }
        if self.left.get() == 0 {
            self.next.push_back(Step::Exit);
            return;
        }
        for l in &mut self.locks {
            if l.until <= 0.0 {
                l.until += about(l.every, chance) as f64;
            }
        }
        let soonest = self.locks.iter().map(|l| l.until).fold(f64::INFINITY, f64::min);
        let ns = (soonest as u64).max(1).min(self.left.get());
        self.left.set(self.left.get() - ns);
        self.next.push_back(Step::Compute(ns));
        for l in &mut self.locks {
            l.until -= ns as f64;
            if l.until < 1.0 {
                l.until = 0.0;
                let lock = l.draw(self.vcpu, PARTS, chance);
                self.next.push_back(Step::Critical(lock, about(l.held, chance)));
            }
        }
        self.until_shootdown -= ns as f64;
        if let Some(every) = self.shootdown_every.filter(|_| self.until_shootdown <= 0.0) {
            self.until_shootdown += about(every, chance) as f64;
            self.next.push_back(Step::Shootdown);
        }
        self.until_halt -= ns as f64;
        if let Some(h) = self.halts.filter(|_| self.until_halt <= 0.0) {
            self.until_halt += about(h.every, chance) as f64;
            self.next.push_back(Step::Halt(about(h.lasts, chance)));
        }
    }
}

impl Program for Worker {
    fn next(&mut self, chance: &mut SmallRng) -> Step {
        if self.next.is_empty() {
            self.plan(chance);
        }
        self.next.pop_front().unwrap_or(Step::Exit)
    }
}

/// Phases of equal work, each ended by a barrier.
#[derive(Debug, Clone)]
pub(super) struct Barriers {
    pub(super) barrier: BarrierId,
    /// What a vCPU computes in a phase, nanoseconds.
    pub(super) every: f64,
    pub(super) phases: u64,
    pub(super) computed: bool,
}

impl Program for Barriers {
    fn next(&mut self, chance: &mut SmallRng) -> Step {
        self.computed = !self.computed;
        if self.phases == 0 {
            Step::Exit
        } else if self.computed {
            // Threads of one loop differ by little.
            Step::Compute((self.every * chance.random_range(0.9..1.1)) as u64)
        } else {
            self.phases -= 1;
            Step::Barrier(self.barrier)
        }
    }
}

/// How long the I/O thread of a machine's QEMU works at a time, nanoseconds: its timers.
const IO_WORKS: f64 = 50_000.0;

/// The I/O thread of a QEMU.
#[derive(Debug, Clone, Copy)]
pub(super) struct IoThread {
    /// How long it sleeps in between.
    pub(super) sleeps: f64,
    pub(super) works: bool,
}

impl Program for IoThread {
    fn next(&mut self, chance: &mut SmallRng) -> Step {
        self.works = !self.works;
        if self.works {
            Step::Compute(about(IO_WORKS, chance))
        } else {
            Step::Sleep(about(self.sleeps, chance))
        }
    }
}

/// An exponentially distributed time of that mean, nanoseconds.
fn about(mean: f64, chance: &mut impl Rng) -> u64 {
    let u: f64 = chance.random();
    (-(1.0 - u).ln() * mean) as u64
}
