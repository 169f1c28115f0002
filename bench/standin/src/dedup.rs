//! Stand-in for PARSEC dedup: one thread cuts the input where a rolling hash says, others hash the
//! chunks and look them up, compress those that are new, and one writes all in order. The stages
//! are joined by bounded queues under spin locks, so each waits for the one before and after it.
//!
//! With four threads each stage has one; more threads hash and compress; with fewer, a thread does
//! several stages. The input is made from the seed: part of it repeats, part can be compressed. A
//! pass goes over all of it, and finds nothing of an earlier pass.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::mix::mix;
use crate::program::{Config, Program, Worker};
use crate::spin::{Meter, Queue, SpinLock, StopRequested, spin_loop};

/// Bytes of the input.
pub const INPUT: usize = 1 << 20;
/// Room in each queue unless told otherwise, in chunks: PARSEC's `QUEUE_SIZE`. Where the threads have
/// their turns one after the other, a short queue is all that a turn can do.
pub const QUEUE: usize = 1 << 20;
/// The least and the most bytes of a chunk; between them the hash decides, 4 KiB on average. Fewer
/// on a slower processor.
const LEAST: usize = 1 << 10;
const MOST: usize = 16 << 10;
const CUT: u64 = 1 << 12;
const BUCKETS: usize = 64;

type Fingerprint = [u8; 32];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Chunk,
    Hash,
    Compress,
    Write,
}

#[derive(Debug)]
struct Chunk {
    number: u64,
    pass: u64,
    /// Whether it is its pass' last.
    last: bool,
    bytes: Range<usize>,
    fingerprint: Fingerprint,
    /// Of the compressed bytes, where this thread of the pipeline met it first.
    packed: Option<u64>,
}

/// Where the next chunk begins.
#[derive(Debug, Default)]
struct Cutter {
    number: u64,
    pass: u64,
    at: usize,
}

#[derive(Debug, Default)]
struct Writer {
    next: u64,
    early: BTreeMap<u64, Chunk>,
    /// Of the running pass.
    seen: HashSet<Fingerprint>,
    order: blake3::Hasher,
    repeated: u64,
    packed: u64,
    packed_chunks: u64,
    firsts: u64,
}

/// The pipeline.
#[derive(Debug)]
pub struct Dedup {
    threads: usize,
    slower: u32,
    passes: Option<u64>,
    input: Vec<u8>,
    gear: [u64; 256],
    cutter: SpinLock<Cutter>,
    to_hash: Queue<Chunk>,
    to_compress: Queue<Chunk>,
    to_write: Queue<Chunk>,
    /// Content that was met, with the passes that met it and are not written yet.
    table: Vec<SpinLock<HashSet<(u64, Fingerprint)>>>,
    writer: SpinLock<Writer>,
    /// Chunks of all passes, when the last has been cut; `u64::MAX` before.
    total: AtomicU64,
    written: AtomicU64,
    done: AtomicBool,
}

impl Dedup {
    /// `work` is passes over the input.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            threads: config.threads,
            slower: config.slower,
            passes: config.work,
            input: input(config.seed),
            gear: std::array::from_fn(|i| mix(0x6765_6172 ^ mix(i as u64))),
            cutter: SpinLock::default(),
            to_hash: Queue::new(config.queue),
            to_compress: Queue::new(config.queue),
            to_write: Queue::new(config.queue),
            table: (0..BUCKETS).map(|_| SpinLock::default()).collect(),
            writer: SpinLock::default(),
            total: AtomicU64::new(if config.work == Some(0) { 0 } else { u64::MAX }),
            written: AtomicU64::new(0),
            done: AtomicBool::new(config.work == Some(0)),
        }
    }

    /// What thread `index` does, the last stage first: that makes room.
    fn stages(&self, index: usize) -> &'static [Stage] {
        use Stage::{Chunk, Compress, Hash, Write};
        match (self.threads, index) {
            (1, _) => &[Write, Compress, Hash, Chunk],
            (2, 0) => &[Hash, Chunk],
            (2 | 3, 1) if self.threads == 2 => &[Write, Compress],
            (3, 2) => &[Write, Compress],
            (_, 0) => &[Chunk],
            (n, i) if n >= 4 && i == n - 1 => &[Write],
            (_, i) if i % 2 == 1 => &[Hash],
            _ => &[Compress],
        }
    }

    /// Where the chunk that begins at `from` ends: a gear hash (FastCDC, ATC 2016).
    fn cut(&self, from: usize) -> usize {
        let slower = self.slower as usize;
        let end = self.input.len().min(from + MOST / slower);
        let mut hash = 0_u64;
        for at in from..end {
            hash = (hash << 1).wrapping_add(self.gear[usize::from(self.input[at])]);
            if at - from >= LEAST / slower
                && (hash >> 32).is_multiple_of(CUT / u64::from(self.slower))
            {
                return at + 1;
            }
        }
        end
    }

    /// Does one item of `stage`. False when there was nothing to do, or no room for the result.
    fn step(&self, stage: Stage, w: &mut Worker<'_>, held: &mut Held) -> bool {
        // What found no room goes first. A thread that also empties that queue goes on to do so.
        if let Some((chunk, to)) = held.take() {
            if let Err(chunk) = self.queue(to).try_push(chunk, &mut w.meter) {
                *held = Some((chunk, to));
                return false;
            }
            return true;
        }
        match stage {
            Stage::Chunk => {
                let Some(chunk) = self.next_chunk(&mut w.meter) else { return false };
                *held = Some((chunk, Stage::Hash));
            }
            Stage::Hash => {
                let Some(chunk) = self.to_hash.try_pop(&mut w.meter) else { return false };
                *held = Some(self.hash(chunk, w));
            }
            Stage::Compress => {
                let Some(mut chunk) = self.to_compress.try_pop(&mut w.meter) else {
                    return false;
                };
                let packed = lz4_flex::compress(&self.input[chunk.bytes.clone()]);
                let hash = blake3::hash(&packed);
                chunk.packed = hash.as_bytes().first_chunk().map(|b| u64::from_le_bytes(*b));
                *held = Some((chunk, Stage::Write));
            }
            Stage::Write => return self.write(w),
        }
        true
    }

    fn queue(&self, stage: Stage) -> &Queue<Chunk> {
        match stage {
            Stage::Hash => &self.to_hash,
            Stage::Compress => &self.to_compress,
            Stage::Write | Stage::Chunk => &self.to_write,
        }
    }

    fn next_chunk(&self, meter: &mut Meter) -> Option<Chunk> {
        self.cutter.with(meter, |c| {
            if self.passes.is_some_and(|p| c.pass >= p) {
                return None;
            }
            let end = self.cut(c.at);
            let last = end == self.input.len();
            let chunk = Chunk {
                number: c.number,
                pass: c.pass,
                last,
                bytes: c.at..end,
                fingerprint: Fingerprint::default(),
                packed: None,
            };
            c.number += 1;
            c.at = if last { 0 } else { end };
            c.pass += u64::from(last);
            if self.passes.is_some_and(|p| c.pass >= p) {
                self.total.store(c.number, Ordering::Release);
            }
            Some(chunk)
        })
    }

    /// Hashes a chunk and says where it goes: to be compressed if it is new in its pass.
    fn hash(&self, mut chunk: Chunk, w: &mut Worker<'_>) -> (Chunk, Stage) {
        chunk.fingerprint = *blake3::hash(&self.input[chunk.bytes.clone()]).as_bytes();
        let bucket = usize::from(chunk.fingerprint[0]) % BUCKETS;
        let key = (chunk.pass, chunk.fingerprint);
        let new = self.table[bucket].with(&mut w.meter, |met| met.insert(key));
        (chunk, if new { Stage::Compress } else { Stage::Write })
    }

    /// Writes the next chunk in order, if it is there.
    fn write(&self, w: &mut Worker<'_>) -> bool {
        let Some(chunk) = self.to_write.try_pop(&mut w.meter) else { return false };
        let (written, over) = self.writer.with(&mut w.meter, |writer| {
            writer.early.insert(chunk.number, chunk);
            let mut written = 0;
            let mut over = None;
            while let Some(chunk) = writer.early.remove(&writer.next) {
                writer.write(&chunk);
                written += 1;
                if chunk.last {
                    over = Some(chunk.pass);
                }
            }
            (written, over)
        });
        if let Some(pass) = over {
            for bucket in &self.table {
                bucket.with(&mut w.meter, |met| met.retain(|(of, _)| *of > pass));
            }
        }
        let written = self.written.fetch_add(written, Ordering::AcqRel) + written;
        if written == self.total.load(Ordering::Acquire) {
            self.done.store(true, Ordering::Release);
        }
        true
    }
}

/// A chunk that found no room, and where it goes.
type Held = Option<(Chunk, Stage)>;

impl Writer {
    fn write(&mut self, chunk: &Chunk) {
        self.next += 1;
        self.order.update(&chunk.fingerprint);
        if self.seen.insert(chunk.fingerprint) {
            self.firsts += 1;
        } else {
            self.repeated += 1;
        }
        // Which of several equal chunks was compressed is chance; that one was, and to what, is not.
        if let Some(packed) = chunk.packed {
            self.packed = self.packed.wrapping_add(packed);
            self.packed_chunks += 1;
        }
        if chunk.last {
            self.seen.clear();
        }
    }
}

impl Program for Dedup {
    fn thread(&self, w: &mut Worker<'_>) -> Result<(), StopRequested> {
        let stages = self.stages(w.index);
        let mut held: Vec<Held> = stages.iter().map(|_| None).collect();
        let mut spins = 0;
        while !self.done.load(Ordering::Acquire) {
            w.go_on()?;
            let mut moved = false;
            for (stage, held) in stages.iter().zip(&mut held) {
                moved |= self.step(*stage, w, held);
            }
            if moved {
                w.meter.queues.waited += u64::from(spins > 0);
                w.meter.queues.spins += spins;
                spins = 0;
            } else {
                spin_loop();
                spins += 1;
            }
        }
        Ok(())
    }

    fn operations(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    fn finish(&self) -> Result<String, String> {
        let cut = self.cutter.with(&mut Meter::default(), |c| c.number);
        self.writer.with(&mut Meter::default(), |w| {
            if w.next != cut || !w.early.is_empty() {
                return Err(format!("{cut} chunks were cut and {} written", w.next));
            }
            if w.packed_chunks != w.firsts {
                return Err(format!(
                    "{} chunks are new and {} were compressed",
                    w.firsts, w.packed_chunks
                ));
            }
            w.order.update(&w.packed.to_le_bytes());
            w.order.update(&w.repeated.to_le_bytes());
            Ok(w.order.finalize().to_hex().to_string())
        })
    }
}

/// The input: blocks of 8 KiB, of which about a third are copies of earlier ones, a third are words
/// of a small vocabulary and the rest is noise.
fn input(seed: u64) -> Vec<u8> {
    const BLOCK: usize = 8 << 10;
    let mut bytes: Vec<u8> = Vec::with_capacity(INPUT);
    for block in 0..(INPUT / BLOCK) as u64 {
        let choice = mix(seed ^ mix(block));
        match choice % 3 {
            0 if block > 0 => {
                let from = (mix(choice) % block) as usize * BLOCK;
                bytes.extend_from_within(from..from + BLOCK);
            }
            1 => {
                for i in 0..(BLOCK / 8) as u64 {
                    let word = mix(choice ^ i) % 64;
                    bytes.extend_from_slice(&mix(seed ^ word).to_le_bytes());
                }
            }
            _ => {
                for i in 0..(BLOCK / 8) as u64 {
                    bytes.extend_from_slice(&mix(choice ^ mix(i)).to_le_bytes());
                }
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::StandIn;

    #[test]
    fn chunks_cover_the_input_and_repeat() {
        let dedup = Dedup::new(&Config { work: Some(1), ..Config::new(StandIn::Dedup) });
        let mut at = 0;
        let mut fingerprints = Vec::new();
        while let Some(chunk) = dedup.next_chunk(&mut Meter::default()) {
            assert_eq!(chunk.bytes.start, at);
            at = chunk.bytes.end;
            fingerprints.push(blake3::hash(&dedup.input[chunk.bytes]));
        }
        assert_eq!(at, INPUT);
        let distinct: HashSet<_> = fingerprints.iter().collect();
        let share = distinct.len() as f64 / fingerprints.len() as f64;
        assert!((0.5..0.95).contains(&share), "{share} of {} are new", fingerprints.len());
        let mean = INPUT / fingerprints.len();
        assert!((2 << 10..8 << 10).contains(&mean), "{mean} bytes a chunk");
    }

    #[test]
    fn every_stage_has_a_thread() {
        for threads in 1..=9 {
            let config = Config { threads, ..Config::new(StandIn::Dedup) };
            let dedup = Dedup::new(&config);
            for stage in [Stage::Chunk, Stage::Hash, Stage::Compress, Stage::Write] {
                let with = (0..threads).filter(|i| dedup.stages(*i).contains(&stage)).count();
                assert!(with >= 1, "{stage:?} of {threads}");
                assert!(with == 1 || !matches!(stage, Stage::Chunk | Stage::Write));
            }
        }
    }
}
