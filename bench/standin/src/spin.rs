//! Spin locks and spinning barriers at user level, with what waiting on them cost.
//!
//! A waiter never gives its CPU away: that is what a kernel's spin lock does in a guest, and what
//! makes a guest suffer when its host runs another machine in the holder's stead.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde::Serialize;

use crate::clock::ticks;

/// The program was told to end, and a wait was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopRequested;

/// Whether waiting loops leave the pause instruction out.
static BUSY: AtomicBool = AtomicBool::new(false);

/// Makes all waiting loops of this process do without the pause instruction, or with it, as they do
/// unless told. Where an emulated processor passes its turn on at a pause, a wait would cost nothing
/// with it, which no real processor does.
pub fn spin_without_pause(without: bool) {
    BUSY.store(without, Ordering::Relaxed);
}

/// One turn of a waiting loop.
pub(crate) fn spin_loop() {
    if !BUSY.load(Ordering::Relaxed) {
        std::hint::spin_loop();
    }
}

/// Waits on one kind of thing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Waits {
    /// How often the thing was passed.
    pub passed: u64,
    /// How often it could not be passed at once.
    pub waited: u64,
    /// Turns of the waiting loops.
    pub spins: u64,
}

impl Waits {
    fn count(&mut self, spins: u64) {
        self.passed += 1;
        self.waited += u64::from(spins > 0);
        self.spins += spins;
    }

    fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.waited += other.waited;
        self.spins += other.spins;
    }
}

/// Durations in [`ticks`], counted by their binary logarithm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; 64],
    sum: u64,
    most: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; 64], sum: 0, most: 0 }
    }
}

/// A [`Histogram`] in nanoseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HistogramNs {
    /// How many durations.
    pub count: u64,
    /// Their mean.
    pub mean_ns: f64,
    /// The longest.
    pub max_ns: f64,
    /// Those that are not empty: below how many nanoseconds, and how many durations.
    pub buckets: Vec<(f64, u64)>,
}

impl Histogram {
    fn record(&mut self, duration: u64) {
        let bucket = (64 - duration.leading_zeros()).min(63);
        self.buckets[bucket as usize] += 1;
        self.sum = self.sum.saturating_add(duration);
        self.most = self.most.max(duration);
    }

    fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(other.buckets) {
            *mine += theirs;
        }
        self.sum = self.sum.saturating_add(other.sum);
        self.most = self.most.max(other.most);
    }

    /// In nanoseconds, at `tick_ns` for each tick; none when nothing was recorded.
    #[must_use]
    pub fn in_ns(&self, tick_ns: f64) -> Option<HistogramNs> {
        let count: u64 = self.buckets.iter().sum();
        (count > 0).then(|| HistogramNs {
            count,
            mean_ns: self.sum as f64 * tick_ns / count as f64,
            max_ns: self.most as f64 * tick_ns,
            buckets: self
                .buckets
                .iter()
                .enumerate()
                .filter(|(_, n)| **n > 0)
                .map(|(i, n)| ((i as f64).exp2() * tick_ns, *n))
                .collect(),
        })
    }
}

/// What one thread, or all of a program's, waited for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meter {
    /// Spin locks.
    pub locks: Waits,
    /// Spinning barriers.
    pub barriers: Waits,
    /// Queues that were empty or full.
    pub queues: Waits,
    /// How long locks were held, where that is timed.
    pub hold: Histogram,
    /// How long locks were waited for, where that is timed.
    pub wait: Histogram,
    timed: bool,
}

impl Meter {
    /// A meter that times locks, or only counts: timing costs two reads of the clock a lock.
    #[must_use]
    pub fn new(time_locks: bool) -> Self {
        Self { timed: time_locks, ..Self::default() }
    }

    /// Adds another thread's.
    pub fn add(&mut self, other: &Self) {
        self.locks.add(&other.locks);
        self.barriers.add(&other.barriers);
        self.queues.add(&other.queues);
        self.hold.add(&other.hold);
        self.wait.add(&other.wait);
    }
}

/// A test-and-test-and-set lock, without any order among its waiters.
#[derive(Debug, Default)]
pub struct SpinLock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `value` is reached only in `with`, by the one thread that changed `held` from false to
// true; so a `&SpinLock<T>` in several threads lets `T` be used by one at a time, which `T: Send`
// allows.
unsafe impl<T: Send> Sync for SpinLock<T> {}

/// Gives a lock back, even when what was done under it panics: others would spin for ever.
struct Held<'a>(&'a AtomicBool);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl<T> SpinLock<T> {
    /// A free lock over `value`.
    pub const fn new(value: T) -> Self {
        Self { held: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Takes the lock, spinning for as long as it is held, and does `work` under it. `work` must
    /// not take the same lock.
    pub fn with<R>(&self, meter: &mut Meter, work: impl FnOnce(&mut T) -> R) -> R {
        let asked = if meter.timed { ticks() } else { 0 };
        let mut spins = 0;
        while self.held.swap(true, Ordering::Acquire) {
            while self.held.load(Ordering::Relaxed) {
                spin_loop();
                spins += 1;
            }
        }
        let held = Held(&self.held);
        let got = if meter.timed { ticks() } else { 0 };
        // SAFETY: `held` was false and this thread made it true, so no other thread is in here
        // until `held` is dropped, which is after the last use of the reference.
        let result = work(unsafe { &mut *self.value.get() });
        drop(held);
        meter.locks.count(spins);
        if meter.timed {
            let end = ticks();
            meter.wait.record(got.saturating_sub(asked));
            meter.hold.record(end.saturating_sub(got));
        }
        result
    }

    /// What is inside, when no thread shares it any more.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

/// A centralised sense-reversing barrier at which all but the last spin.
#[derive(Debug)]
pub struct SpinBarrier {
    threads: usize,
    arrived: AtomicUsize,
    round: AtomicUsize,
}

impl SpinBarrier {
    /// A barrier of `threads` threads.
    #[must_use]
    pub const fn new(threads: usize) -> Self {
        Self { threads, arrived: AtomicUsize::new(0), round: AtomicUsize::new(0) }
    }

    /// Waits until all threads are here. True for the last to arrive.
    ///
    /// # Errors
    /// [`StopRequested`] when `stop` was set before all had come; the barrier is of no use after that.
    pub fn wait(&self, stop: &AtomicBool, meter: &mut Meter) -> Result<bool, StopRequested> {
        let round = self.round.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round.wrapping_add(1), Ordering::Release);
            meter.barriers.count(0);
            return Ok(true);
        }
        let mut spins = 0;
        while self.round.load(Ordering::Acquire) == round {
            if stop.load(Ordering::Relaxed) {
                return Err(StopRequested);
            }
            spin_loop();
            spins += 1;
        }
        meter.barriers.count(spins);
        Ok(false)
    }
}

/// A bounded queue under a spin lock. Whether it is empty or full is seen without the lock, so that
/// who waits for the one does not keep others from the other.
#[derive(Debug)]
pub struct Queue<T> {
    room: usize,
    length: AtomicUsize,
    items: SpinLock<std::collections::VecDeque<T>>,
}

impl<T> Queue<T> {
    /// An empty queue for `room` items.
    #[must_use]
    pub fn new(room: usize) -> Self {
        let length = AtomicUsize::new(0);
        Self { room, length, items: SpinLock::new(std::collections::VecDeque::with_capacity(room)) }
    }

    /// Puts `item` at the end, or gives it back when the queue is full.
    ///
    /// # Errors
    /// The item.
    pub fn try_push(&self, item: T, meter: &mut Meter) -> Result<(), T> {
        if self.length.load(Ordering::Relaxed) >= self.room {
            return Err(item);
        }
        self.items.with(meter, |q| {
            if q.len() >= self.room {
                return Err(item);
            }
            q.push_back(item);
            self.length.store(q.len(), Ordering::Relaxed);
            Ok(())
        })
    }

    /// Takes the first item, if there is one.
    pub fn try_pop(&self, meter: &mut Meter) -> Option<T> {
        if self.length.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let item = self.items.with(meter, |q| {
            let item = q.pop_front();
            self.length.store(q.len(), Ordering::Relaxed);
            item
        });
        if item.is_some() {
            meter.queues.count(0);
        }
        item
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn no_increment_is_lost_under_the_lock() {
        let lock = SpinLock::new(0_u64);
        let meters: Vec<Meter> = thread::scope(|s| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    s.spawn(|| {
                        let mut meter = Meter::new(true);
                        for _ in 0..20_000 {
                            lock.with(&mut meter, |n| *n += 1);
                        }
                        meter
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect()
        });
        assert_eq!(lock.into_inner(), 80_000);
        let mut all = Meter::new(true);
        meters.iter().for_each(|m| all.add(m));
        assert_eq!(all.locks.passed, 80_000);
        let hold = all.hold.in_ns(1.0).expect("timed");
        assert_eq!(hold.count, 80_000);
        assert!(hold.mean_ns > 0.0 && hold.mean_ns <= hold.max_ns, "{hold:?}");
    }

    #[test]
    fn a_panic_under_the_lock_frees_it() {
        let lock = SpinLock::new(());
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            lock.with(&mut Meter::default(), |()| std::panic::resume_unwind(Box::new(())));
        }));
        assert!(caught.is_err());
        lock.with(&mut Meter::default(), |()| ());
    }

    #[test]
    fn nobody_passes_a_barrier_before_all_have_come() {
        let (barrier, stop) = (SpinBarrier::new(3), AtomicBool::new(false));
        let here = AtomicUsize::new(0);
        thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    let mut meter = Meter::default();
                    for round in 1..=50 {
                        here.fetch_add(1, Ordering::SeqCst);
                        barrier.wait(&stop, &mut meter).expect("nobody stops");
                        assert!(here.load(Ordering::SeqCst) >= 3 * round);
                        barrier.wait(&stop, &mut meter).expect("nobody stops");
                    }
                });
            }
        });
        assert_eq!(here.into_inner(), 150);
    }

    #[test]
    fn whoever_is_asked_to_end_waits_no_longer_and_a_full_queue_refuses() {
        let stop = AtomicBool::new(true);
        let mut meter = Meter::default();
        assert_eq!(SpinBarrier::new(2).wait(&stop, &mut meter), Err(StopRequested));
        let queue = Queue::new(1);
        assert_eq!(queue.try_push(1, &mut meter), Ok(()));
        assert_eq!(queue.try_push(2, &mut meter), Err(2));
        assert_eq!((queue.try_pop(&mut meter), queue.try_pop(&mut meter)), (Some(1), None));
    }
}
