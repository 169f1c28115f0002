//! Stand-in for PARSEC streamcluster: points are assigned to the nearest centre; candidates for a
//! new centre are tried one after another. For each, every thread finds what its points would
//! gain, a barrier, one thread decides, a barrier. All threads spin at barriers.
//!
//! By table 1 of PARSEC's report a barrier comes every 341 k instructions of each of 4 threads, as
//! the simulator's model has it; [`POINTS`] points of [`DIMENSIONS`] dimensions give about that.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::mix::mix;
use crate::program::{Config, Program, Worker};
use crate::spin::{SpinBarrier, SpinLock, StopRequested};

/// Points; each thread has an equal part. Fewer on a slower processor.
pub const POINTS: usize = 8192;
/// Dimensions of a point.
pub const DIMENSIONS: usize = 32;
/// What opening a centre costs in squared distance, where there are all points.
const OPENING: u64 = 40_000_000;

type Point = [u16; DIMENSIONS];

/// The clustering.
#[derive(Debug)]
pub struct Streamcluster {
    threads: usize,
    seed: u64,
    work: Option<u64>,
    points: Vec<Point>,
    /// What opening a centre costs.
    opening: u64,
    barrier: SpinBarrier,
    /// What all points together would gain from the candidate.
    gain: AtomicU64,
    opened: AtomicBool,
    tried: AtomicU64,
    /// Each thread's distances, left here at its end.
    ends: SpinLock<Vec<(usize, Vec<u64>)>>,
    centres: AtomicU64,
}

impl Streamcluster {
    /// `work` is candidates.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let point = |i: usize| {
            let at = |d: usize| {
                // A cloud around one of sixteen places.
                let cloud = mix(config.seed ^ mix((i % 16 * DIMENSIONS + d) as u64)) % 1000;
                (cloud + mix(config.seed ^ mix((1 << 32) + (i * DIMENSIONS + d) as u64)) % 100)
                    as u16
            };
            std::array::from_fn(at)
        };
        Self {
            threads: config.threads,
            seed: config.seed,
            work: config.work,
            points: (0..POINTS / config.slower as usize).map(point).collect(),
            opening: OPENING / u64::from(config.slower),
            barrier: SpinBarrier::new(config.threads),
            gain: AtomicU64::new(0),
            opened: AtomicBool::new(false),
            tried: AtomicU64::new(0),
            ends: SpinLock::new(Vec::new()),
            centres: AtomicU64::new(1),
        }
    }

    fn candidate(&self, n: u64) -> &Point {
        &self.points[(mix(self.seed ^ n) % self.points.len() as u64) as usize]
    }
}

fn squared_distance(a: &Point, b: &Point) -> u64 {
    a.iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum()
}

impl Program for Streamcluster {
    fn thread(&self, worker: &mut Worker<'_>) -> Result<(), StopRequested> {
        let points = self.points.len();
        let from = worker.index * points / self.threads;
        let to = (worker.index + 1) * points / self.threads;
        let mine = &self.points[from..to];
        let mut nearest: Vec<u64> =
            mine.iter().map(|p| squared_distance(p, &self.points[0])).collect();
        let mut candidates = vec![0; mine.len()];
        let mut n = 0;
        while self.work.is_none_or(|w| n < w) {
            // A thread alone never waits at a barrier, where the others are told.
            worker.go_on()?;
            let centre = self.candidate(n);
            let mut gain = 0;
            for ((p, best), new) in mine.iter().zip(&nearest).zip(&mut candidates) {
                *new = squared_distance(p, centre);
                gain += best.saturating_sub(*new);
            }
            self.gain.fetch_add(gain, Ordering::Relaxed);
            if self.barrier.wait(worker.stop, &mut worker.meter)? {
                let open = self.gain.swap(0, Ordering::Relaxed) > self.opening;
                self.opened.store(open, Ordering::Relaxed);
                self.centres.fetch_add(u64::from(open), Ordering::Relaxed);
                self.tried.fetch_add(1, Ordering::Relaxed);
            }
            self.barrier.wait(worker.stop, &mut worker.meter)?;
            if self.opened.load(Ordering::Relaxed) {
                for (best, new) in nearest.iter_mut().zip(&candidates) {
                    *best = (*best).min(*new);
                }
            }
            n += 1;
        }
        self.ends.with(&mut worker.meter, |ends| ends.push((from, nearest)));
        Ok(())
    }

    fn operations(&self) -> u64 {
        self.tried.load(Ordering::Relaxed)
    }

    fn finish(&self) -> Result<String, String> {
        let mut ends = self.ends.with(&mut crate::spin::Meter::default(), std::mem::take);
        ends.sort();
        let all: Vec<u64> = ends.into_iter().flat_map(|(_, nearest)| nearest).collect();
        if all.len() != self.points.len() {
            return Err(format!("{} points of {} have a centre", all.len(), self.points.len()));
        }
        let centres = self.centres.load(Ordering::Relaxed);
        let mut hash = blake3::Hasher::new();
        hash.update(&centres.to_le_bytes());
        for d in all {
            hash.update(&d.to_le_bytes());
        }
        Ok(hash.finalize().to_hex().to_string())
    }
}
