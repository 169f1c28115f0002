//! Models of the thesis' workloads (section 4.6.1): what their vCPUs do, and where each number
//! comes from. No number was fitted to a result.
//!
//! | workload | model | source |
//! |---|---|---|
//! | SuperPI | computes | "CPU-bound" (4.6.1) |
//! | kernbench | 0.65 us under one of two kernel locks, 8.05 % of the time | table 4.1 and the text below it; the two global locks of a 2.6.18 guest's VFS (inode, dcache) |
//! | dedup | a lock every 233 k instructions, a TLB shootdown every 4.8 ms | PARSEC: 37.1 G instructions, 158,979 locks; it reads 184 MB and frees that much twice (raw, compressed), and glibc gives memory back in steps of 128 KiB |
//! | streamcluster | a spinning barrier every 341 k instructions of each of 4 vCPUs | PARSEC: 22.12 G instructions, 129,600 barrier calls of 8 threads |
//! | x264, facesim, ferret | a lock every 1.93 M, 2.06 M, 69.3 k instructions | PARSEC: 32.43 G and 16,767; 29.9 G and 14,541; 23.97 G and 345,778 |
//! | the I/O thread of each QEMU | works 50 us about every 4 ms | assumed, without a source: where nothing disturbs run queues that fill together, they stay in lockstep |
//!
//! PARSEC is Princeton TR-811-08 (Bienia et al., 2008), table 1, input simlarge, 8 threads; its
//! numbers are quoted from memory and were not compared with the report. An instruction is taken
//! to last 0.376 ns (2.66 GHz, one a cycle); a lock of PARSEC is taken to be held for 1 us.
//! Whatever is left of a workload may be done by any of its vCPUs, as a job server, a task queue
//! or a pipeline with long queues lets it; only streamcluster's work is divided beforehand.

use std::cell::Cell;
use std::rc::Rc;

use rand::rngs::SmallRng;
use rand::{Rng, RngExt};

use super::Simulator;
use super::guest::{Level, Step};
use crate::scheduler::VmId;

/// A workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Computes without end.
    SuperPi,
    /// A parallel build.
    Kernbench,
    /// PARSEC dedup.
    Dedup,
    /// PARSEC streamcluster.
    Streamcluster,
    /// PARSEC x264.
    X264,
    /// PARSEC facesim.
    Facesim,
    /// PARSEC ferret.
    Ferret,
}

/// Nanoseconds of one instruction.
const INSTRUCTION: f64 = 1.0 / 2.66;
/// How long a lock of PARSEC is held, nanoseconds.
const HELD: f64 = 1_000.0;

/// How long the I/O thread of a machine's QEMU sleeps and works, nanoseconds: its timers.
const IO_SLEEPS: f64 = 4_000_000.0;
const IO_WORKS: f64 = 50_000.0;

impl Workload {
    /// All that end.
    pub const FINITE: [Self; 6] = [
        Self::Kernbench,
        Self::Dedup,
        Self::Streamcluster,
        Self::X264,
        Self::Facesim,
        Self::Ferret,
    ];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SuperPi => "superpi",
            Self::Kernbench => "kernbench",
            Self::Dedup => "dedup",
            Self::Streamcluster => "streamcluster",
            Self::X264 => "x264",
            Self::Facesim => "facesim",
            Self::Ferret => "ferret",
        }
    }

    /// Adds a machine with `vcpus` vCPUs that does `work` nanoseconds of this work in all, and
    /// starts them at `at` nanoseconds, a millisecond apart.
    pub fn start(self, sim: &mut Simulator, vcpus: usize, work: u64, at: u64) -> VmId {
        let vm = sim.add_vm();
        let left = Rc::new(Cell::new(work));
        let locked = |every: f64| Locked {
            locks: 1,
            level: Level::User,
            every,
            held: HELD,
            shootdown_every: 0.0,
        };
        let model = match self {
            Self::SuperPi => Model::Compute,
            Self::Kernbench => {
                let held = 650.0;
                let every = held * (1.0 / 0.0805 - 1.0);
                Model::Locked(Locked {
                    locks: 2,
                    level: Level::Kernel,
                    every,
                    held,
                    shootdown_every: 0.0,
                })
            }
            Self::Dedup => {
                let instructions = 37.1e9;
                let shootdowns = 2.0 * 184e6 / f64::from(128 << 10);
                Model::Locked(Locked {
                    shootdown_every: instructions * INSTRUCTION / shootdowns,
                    ..locked(instructions / 158_979.0 * INSTRUCTION)
                })
            }
            Self::Streamcluster => {
                let barriers = 129_600.0 / 8.0;
                Model::Barrier(22.12e9 / barriers / vcpus as f64 * INSTRUCTION)
            }
            Self::X264 => Model::Locked(locked(32.43e9 / 16_767.0 * INSTRUCTION)),
            Self::Facesim => Model::Locked(locked(29.9e9 / 14_541.0 * INSTRUCTION)),
            Self::Ferret => Model::Locked(locked(23.97e9 / 345_778.0 * INSTRUCTION)),
        };
        let locks: Vec<_> = match model {
            Model::Locked(l) => (0..l.locks).map(|_| sim.add_lock(l.level)).collect(),
            _ => Vec::new(),
        };
        let barrier = sim.add_barrier(vcpus);
        let mut works = false;
        let io_thread = move |chance: &mut SmallRng| {
            works = !works;
            if works {
                Step::Compute(about(IO_WORKS, chance))
            } else {
                Step::Sleep(about(IO_SLEEPS, chance))
            }
        };
        sim.add_host_task(Box::new(io_thread), at);
        for i in 0..vcpus {
            let at = at + i as u64 * 1_000_000;
            let (left, locks) = (Rc::clone(&left), locks.clone());
            match model {
                Model::Compute => {
                    sim.add_vcpu(vm, Box::new(|_: &mut SmallRng| Step::Compute(100_000_000)), at);
                }
                Model::Barrier(every) => {
                    let mut phases = (work as f64 / vcpus as f64 / every) as u64;
                    let mut computed = false;
                    let program = move |chance: &mut SmallRng| {
                        computed = !computed;
                        if phases == 0 {
                            return Step::Exit;
                        }
                        if computed {
                            // Threads of one loop differ by little.
                            return Step::Compute((every * chance.random_range(0.9..1.1)) as u64);
                        }
                        phases -= 1;
                        Step::Barrier(barrier)
                    };
                    sim.add_vcpu(vm, Box::new(program), at);
                }
                Model::Locked(l) => {
                    let mut turn = 0_u8;
                    let mut until_shootdown = l.shootdown_every;
                    let program = move |chance: &mut SmallRng| {
                        turn = (turn + 1) % 3;
                        match turn {
                            1 if left.get() == 0 => Step::Exit,
                            1 => {
                                let ns = about(l.every, chance).min(left.get());
                                left.set(left.get() - ns);
                                until_shootdown -= ns as f64;
                                Step::Compute(ns)
                            }
                            2 => {
                                let lock = locks[chance.random_range(0..locks.len())];
                                Step::Critical(lock, about(l.held, chance))
                            }
                            _ if l.shootdown_every > 0.0 && until_shootdown <= 0.0 => {
                                until_shootdown += about(l.shootdown_every, chance) as f64;
                                Step::Shootdown
                            }
                            _ => Step::Compute(1),
                        }
                    };
                    sim.add_vcpu(vm, Box::new(program), at);
                }
            }
        }
        vm
    }
}

#[derive(Debug, Clone, Copy)]
struct Locked {
    locks: usize,
    level: Level,
    /// Mean time between two locks, nanoseconds.
    every: f64,
    /// Mean time that one is held.
    held: f64,
    /// Mean time between two TLB shootdowns; none when 0.
    shootdown_every: f64,
}

#[derive(Debug, Clone, Copy)]
enum Model {
    Compute,
    Locked(Locked),
    /// A barrier after that much computing.
    Barrier(f64),
}

/// An exponentially distributed time of that mean, nanoseconds.
fn about(mean: f64, chance: &mut impl Rng) -> u64 {
    let u: f64 = chance.random();
    (-(1.0 - u).ln() * mean) as u64
}
