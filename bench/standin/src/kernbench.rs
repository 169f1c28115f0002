//! Stand-in for kernbench, a parallel build: a job server deals out compilations; each computes,
//! and every few microseconds enters its kernel: a critical section under one of two global spin
//! locks, as a 2.6 kernel's inode and directory caches had. Sections last 0.65 us and take 8.05 %
//! of the time, which table 4.1 and the text below it say of kernbench. `kernbench --cc` builds a
//! real program with the machine's own compiler instead (see [`crate::cc`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::mix::{compute, mix, turns};
use crate::program::{Config, Program, Worker};
use crate::spin::{Meter, SpinLock, StopRequested};

/// Critical sections of a job.
pub const SECTIONS: u64 = 64;
/// How long one is, in microseconds of a processor of 3 GHz (table 4.1).
pub const HELD_US: f64 = 0.65;
/// The share of the time that they take (below table 4.1).
pub const HELD_SHARE: f64 = 0.0805;
/// Jobs whose results one more job, the link of their directory, needs.
const DIRECTORY: u64 = 16;

/// How long a thread that runs out of jobs sleeps, and after how many: a published run sleeps 351 times
/// a second for 0.21 ms (the simulator's model of kernbench says which), and a job lasts 0.52 ms.
const HALT: Duration = Duration::from_micros(210);
const JOBS_A_HALT: u64 = 5;

const LOCKS: usize = 2;
const ENTRIES: usize = 64;

/// A cache of the stand-in's kernel: what goes in is added up, so that the order does not matter.
#[derive(Debug, Clone)]
pub(crate) struct Cache([u64; ENTRIES]);

/// The caches of one kernel, each under its lock.
#[derive(Debug)]
pub(crate) struct Kernel {
    caches: [SpinLock<Cache>; LOCKS],
    /// Turns of a critical section.
    held: u32,
}

impl Kernel {
    pub(crate) fn new(slower: u32) -> Self {
        Self {
            caches: std::array::from_fn(|_| SpinLock::new(Cache([0; ENTRIES]))),
            held: turns(HELD_US, slower),
        }
    }

    /// One critical section for `x`.
    pub(crate) fn enter(&self, x: u64, meter: &mut Meter) {
        let lock = &self.caches[(x % LOCKS as u64) as usize];
        lock.with(meter, |cache| {
            let y = compute(x, self.held);
            let entry = &mut cache.0[(y % ENTRIES as u64) as usize];
            *entry = entry.wrapping_add(y);
        });
    }

    pub(crate) fn digest(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for lock in &self.caches {
            let cache = lock.with(&mut Meter::default(), |c| c.clone());
            cache.0.iter().for_each(|e| {
                hash.update(&e.to_le_bytes());
            });
        }
        hash.finalize().to_hex().to_string()
    }
}

#[derive(Debug, Default)]
struct Make {
    next: u64,
    finished: u64,
    /// Jobs that are done in each directory that is not linked yet, and the sum of their objects.
    directories: std::collections::BTreeMap<u64, (u64, u64)>,
    /// Sum of what was linked.
    linked: u64,
}

/// The build.
#[derive(Debug)]
pub struct Kernbench {
    seed: u64,
    slower: u32,
    work: Option<u64>,
    halts: bool,
    make: SpinLock<Make>,
    kernel: Kernel,
    done: AtomicU64,
}

impl Kernbench {
    /// `work` is jobs.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            seed: config.seed,
            slower: config.slower,
            work: config.work,
            halts: config.halts,
            make: SpinLock::new(Make::default()),
            kernel: Kernel::new(config.slower),
            done: AtomicU64::new(0),
        }
    }

    fn job(&self, job: u64, worker: &mut Worker<'_>) -> Result<u64, StopRequested> {
        let between = turns(HELD_US * (1.0 / HELD_SHARE - 1.0), self.slower);
        let mut x = mix(self.seed ^ mix(job));
        for _ in 0..SECTIONS {
            x = compute(x, between);
            self.kernel.enter(x, &mut worker.meter);
            worker.go_on()?;
        }
        Ok(x)
    }
}

impl Program for Kernbench {
    fn thread(&self, worker: &mut Worker<'_>) -> Result<(), StopRequested> {
        let mut jobs = 0;
        loop {
            // It waits for a disk, or for a job.
            jobs += 1;
            if self.halts && jobs % JOBS_A_HALT == 0 {
                std::thread::sleep(HALT);
            }
            let job = self.make.with(&mut worker.meter, |m| {
                let job = m.next;
                m.next += 1;
                job
            });
            if self.work.is_some_and(|w| job >= w) {
                return Ok(());
            }
            let object = self.job(job, worker)?;
            // Who brings a directory's last object links it.
            let of =
                self.work.map_or(DIRECTORY, |w| DIRECTORY.min(w - job / DIRECTORY * DIRECTORY));
            let link = self.make.with(&mut worker.meter, |m| {
                m.finished += 1;
                let (done, sum) = m.directories.entry(job / DIRECTORY).or_default();
                *done += 1;
                *sum = sum.wrapping_add(object);
                let ready = *done == of;
                if ready {
                    m.directories.remove(&(job / DIRECTORY)).map(|(_, sum)| sum)
                } else {
                    None
                }
            });
            if let Some(objects) = link {
                let linked = compute(objects, turns(HELD_US / HELD_SHARE, self.slower));
                self.make.with(&mut worker.meter, |m| m.linked = m.linked.wrapping_add(linked));
            }
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn operations(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn finish(&self) -> Result<String, String> {
        let (finished, left, linked) =
            self.make.with(&mut Meter::default(), |m| (m.finished, m.directories.len(), m.linked));
        if Some(finished) != self.work || left != 0 {
            return Err(format!(
                "{finished} jobs of {:?}, {left} directories not linked",
                self.work
            ));
        }
        let mut hash = blake3::Hasher::new();
        hash.update(&linked.to_le_bytes());
        hash.update(self.kernel.digest().as_bytes());
        Ok(hash.finalize().to_hex().to_string())
    }
}
