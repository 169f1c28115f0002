//! Stand-in for SPECjbb2005: threads serve transactions between warehouses of one company, under
//! many short locks, and the world stops now and then as for a parallel garbage collection: who
//! finds that enough has been allocated asks for it, all threads come to a spinning barrier, each
//! marks its part, and a second barrier lets them go. Its figure is throughput.
//!
//! Locks are held for 0.16 us (table 4.1, SPECjbb). That a transaction computes for 20 us, takes
//! eight locks, and that the world stops every 4096 transactions is assumed; a server of the
//! thesis' time did some 50,000 a second on each core.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::mix::{compute, mix, turns};
use crate::program::{Config, Program, Worker};
use crate::spin::{Meter, SpinBarrier, SpinLock, StopRequested, spin_loop};

/// How long a lock is held, in microseconds of a processor of 3 GHz (table 4.1).
pub const HELD_US: f64 = 0.16;
/// What a transaction computes outside locks, microseconds.
pub const COMPUTES_US: f64 = 20.0;
/// Warehouses, whatever the number of threads.
const WAREHOUSES: usize = 8;
/// Transactions between two collections.
pub const BETWEEN_COLLECTIONS: u64 = 4096;
/// Locks of one transaction: two accounts of two warehouses, in four orders.
const STEPS: u64 = 4;
/// What a collection marks, microseconds of one thread.
const COLLECTION_US: f64 = 2_000.0;

#[derive(Debug, Clone, Copy, Default)]
struct Warehouse {
    stock: i64,
    orders: u64,
}

/// The company.
#[derive(Debug)]
pub struct Specjbb {
    threads: usize,
    seed: u64,
    slower: u32,
    work: Option<u64>,
    warehouses: Vec<SpinLock<Warehouse>>,
    taken: AtomicU64,
    done: AtomicU64,
    /// Threads that found no transaction left.
    idle: AtomicUsize,
    allocated: AtomicU64,
    collect: AtomicBool,
    barrier: SpinBarrier,
    collections: AtomicU64,
}

impl Specjbb {
    /// `work` is transactions.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            threads: config.threads,
            seed: config.seed,
            slower: config.slower,
            work: config.work,
            warehouses: (0..WAREHOUSES).map(|_| SpinLock::default()).collect(),
            taken: AtomicU64::new(0),
            done: AtomicU64::new(0),
            idle: AtomicUsize::new(0),
            allocated: AtomicU64::new(0),
            collect: AtomicBool::new(false),
            barrier: SpinBarrier::new(config.threads),
            collections: AtomicU64::new(0),
        }
    }

    fn transaction(&self, n: u64, worker: &mut Worker<'_>) {
        let mut x = mix(self.seed ^ mix(n));
        let count = self.warehouses.len() as u64;
        let between = turns(COMPUTES_US / STEPS as f64, self.slower);
        for _ in 0..STEPS {
            x = compute(x, between);
            let from = x % count;
            let to = (from + 1 + (x >> 32) % (count - 1)) % count;
            let amount = (x >> 48) as i64;
            for (warehouse, amount) in [(from, -amount), (to, amount)] {
                self.warehouses[warehouse as usize].with(&mut worker.meter, |w| {
                    w.stock += amount;
                    w.orders = w.orders.wrapping_add(compute(x, turns(HELD_US, self.slower)));
                });
            }
        }
        self.done.fetch_add(1, Ordering::Relaxed);
        if (self.allocated.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(BETWEEN_COLLECTIONS)
        {
            self.collect.store(true, Ordering::Release);
        }
    }

    /// The safepoint: every thread comes by between two transactions.
    fn safepoint(&self, worker: &mut Worker<'_>) -> Result<(), StopRequested> {
        worker.go_on()?;
        if !self.collect.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.barrier.wait(worker.stop, &mut worker.meter)? {
            self.collect.store(false, Ordering::Release);
            self.collections.fetch_add(1, Ordering::Relaxed);
        }
        let part = turns(COLLECTION_US / self.threads as f64, self.slower);
        std::hint::black_box(compute(self.seed, part));
        self.barrier.wait(worker.stop, &mut worker.meter)?;
        Ok(())
    }
}

impl Program for Specjbb {
    fn thread(&self, worker: &mut Worker<'_>) -> Result<(), StopRequested> {
        loop {
            let n = self.taken.fetch_add(1, Ordering::Relaxed);
            if self.work.is_some_and(|w| n >= w) {
                break;
            }
            self.transaction(n, worker);
            self.safepoint(worker)?;
        }
        // Others may still ask for a collection, which needs all.
        self.idle.fetch_add(1, Ordering::AcqRel);
        while self.idle.load(Ordering::Acquire) < self.threads {
            self.safepoint(worker)?;
            spin_loop();
        }
        Ok(())
    }

    fn operations(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn finish(&self) -> Result<String, String> {
        let all: Vec<Warehouse> =
            self.warehouses.iter().map(|w| w.with(&mut Meter::default(), |w| *w)).collect();
        let stock: i64 = all.iter().map(|w| w.stock).sum();
        if stock != 0 || Some(self.operations()) != self.work {
            return Err(format!(
                "{} transactions of {:?} and {stock} goods that nobody had",
                self.operations(),
                self.work
            ));
        }
        let mut hash = blake3::Hasher::new();
        for w in all {
            hash.update(&w.stock.to_le_bytes());
            hash.update(&w.orders.to_le_bytes());
        }
        hash.update(&self.collections.load(Ordering::Relaxed).to_le_bytes());
        Ok(hash.finalize().to_hex().to_string())
    }
}
