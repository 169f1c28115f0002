//! What a stand-in is, and how its threads are run and counted.

use std::str::FromStr;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use crate::clock::{Ruler, thread_cpu};
use crate::spin::{HistogramNs, Meter, StopRequested, Waits};
use crate::{cpu, dedup, kernbench, locks, specjbb, streamcluster};

/// The stand-ins that run as threads of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StandIn {
    /// PARSEC dedup.
    Dedup,
    /// PARSEC streamcluster.
    Streamcluster,
    /// kernbench.
    Kernbench,
    /// SPECjbb2005.
    Specjbb,
    /// SuperPI.
    Cpu,
    /// The measurement of table 4.1.
    Locks,
}

impl StandIn {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Dedup, Self::Streamcluster, Self::Kernbench, Self::Specjbb, Self::Cpu, Self::Locks];

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dedup => "dedup",
            Self::Streamcluster => "streamcluster",
            Self::Kernbench => "kernbench",
            Self::Specjbb => "specjbb",
            Self::Cpu => "cpu",
            Self::Locks => "locks",
        }
    }

    /// What it stands in for, in words that leave no doubt.
    #[must_use]
    pub const fn stands_for(self) -> &'static str {
        match self {
            Self::Dedup => "stand-in for PARSEC dedup, not PARSEC",
            Self::Streamcluster => "stand-in for PARSEC streamcluster, not PARSEC",
            Self::Kernbench => "stand-in for kernbench, not kernbench",
            Self::Specjbb => "stand-in for SPECjbb2005, not SPECjbb",
            Self::Cpu => "stand-in for SuperPI, not SuperPI",
            Self::Locks => "stand-in for the measurement of table 4.1, at user level",
        }
    }

    /// What one operation is, and so one unit of `work`, but for `dedup`, whose unit of work is a
    /// pass over its input.
    #[must_use]
    pub const fn operation(self) -> &'static str {
        match self {
            Self::Dedup => "chunk written",
            Self::Streamcluster => "candidate tried by all threads",
            Self::Kernbench => "job",
            Self::Specjbb => "transaction",
            Self::Cpu => "computation of pi",
            Self::Locks => "critical section",
        }
    }
}

impl FromStr for StandIn {
    type Err = UnknownStandIn;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|k| k.name() == s).ok_or_else(|| UnknownStandIn(s.to_owned()))
    }
}

/// No stand-in has that name.
#[derive(Debug, thiserror::Error)]
#[error(
    "no stand-in is called {0:?}; there are dedup, streamcluster, kernbench, specjbb, cpu and locks"
)]
pub struct UnknownStandIn(String);

/// Greatest [`Config::slower`]: more would leave too little of an operation.
pub const MOST_SLOWER: u32 = 64;

/// Most room of a queue.
pub const MOST_QUEUED: usize = dedup::QUEUE;

/// Most threads of one stand-in.
pub const MOST_THREADS: usize = 1024;

/// What to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which.
    pub stand_in: StandIn,
    /// Threads, 1 to [`MOST_THREADS`].
    pub threads: usize,
    /// Units of work to do; none: until told, or until `time` is over.
    pub work: Option<u64>,
    /// Longest run.
    pub time: Option<Duration>,
    /// What data and choices come from.
    pub seed: u64,
    /// Room in each of dedup's queues.
    pub queue: usize,
    /// Whether kernbench's threads run out of jobs now and then, and sleep.
    pub halts: bool,
    /// By how much the processor is slower than a real one of today, as an emulated one is: 1 to
    /// [`MOST_SLOWER`]. An operation is so much smaller then, that its phases are as long beside a
    /// scheduler's slice as they are on a real one.
    pub slower: u32,
    /// Whether locks are timed.
    pub time_locks: bool,
    /// Whether threads are called as QEMU calls its vCPUs (`CPU 0/TCG`), so that what finds vCPUs
    /// by name finds them; else they have the program's name.
    pub vcpu_names: bool,
}

impl Config {
    /// `stand_in` with four threads, without end.
    #[must_use]
    pub const fn new(stand_in: StandIn) -> Self {
        Self {
            stand_in,
            threads: 4,
            work: None,
            time: None,
            seed: 1,
            queue: dedup::QUEUE,
            halts: false,
            slower: 1,
            time_locks: false,
            vcpu_names: false,
        }
    }
}

/// The program cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bad number of threads.
    #[error("{0} threads: a stand-in has 1 to {MOST_THREADS}")]
    Threads(usize),
    /// Bad room.
    #[error("a queue has room for 1 to {MOST_QUEUED} items, not {0}")]
    Queue(usize),
    /// Bad speed.
    #[error("a processor is 1 to {MOST_SLOWER} times slower, not {0}")]
    Slower(u32),
    /// The system gave no thread.
    #[error("could not start a thread")]
    Spawn(#[source] std::io::Error),
    /// A thread panicked: a check of the stand-in's own work failed.
    #[error("a thread of {} failed its checks; its message is on stderr", .0.name())]
    Failed(StandIn),
    /// The result is not what the work must give.
    #[error("{stand_in}: {why}", stand_in = .stand_in.name())]
    Wrong {
        /// Which stand-in.
        stand_in: StandIn,
        /// What is wrong.
        why: String,
    },
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// All work is done.
    Done,
    /// Its time was over.
    Time,
    /// Somebody set the flag, as SIGTERM does.
    #[serde(rename = "told")]
    StopRequested,
}

/// What a run came to: one line of JSON.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Which stand-in.
    pub standin: StandIn,
    /// [`StandIn::stands_for`].
    pub stands_for: &'static str,
    /// [`StandIn::operation`].
    pub operation: &'static str,
    /// Threads.
    pub threads: usize,
    /// The seed.
    pub seed: u64,
    /// Units of work asked for.
    pub work: Option<u64>,
    /// Why it ended.
    pub ended: EndReason,
    /// From when all threads were ready to the last one's end.
    pub elapsed_ms: f64,
    /// What was done.
    pub operations: u64,
    /// Hash of the result; only of finished work, where it belongs to seed and work alone.
    pub digest: Option<String>,
    /// Waits for spin locks.
    pub locks: Waits,
    /// Waits at spinning barriers.
    pub barriers: Waits,
    /// Waits for a queue that was full or empty.
    pub queues: Waits,
    /// CPU time of each thread.
    pub cpu_ms: Vec<f64>,
    /// Context switches of the process: voluntary and involuntary.
    pub switches: [u64; 2],
    /// How long locks were held, if timed.
    pub hold: Option<HistogramNs>,
    /// How long locks were waited for, if timed.
    pub wait: Option<HistogramNs>,
}

/// What a thread of a stand-in may use.
#[derive(Debug)]
pub struct Worker<'a> {
    /// Which thread, from 0.
    pub index: usize,
    /// Set when all must end.
    pub stop: &'a AtomicBool,
    /// What it waited for.
    pub meter: Meter,
}

impl Worker<'_> {
    /// # Errors
    /// [`StopRequested`] when all must end.
    pub fn go_on(&self) -> Result<(), StopRequested> {
        if self.stop.load(Ordering::Relaxed) { Err(StopRequested) } else { Ok(()) }
    }
}

/// A stand-in with its shared data.
pub trait Program: Sync {
    /// One thread's part, until the work is done.
    ///
    /// # Errors
    /// [`StopRequested`] when it was told to end before that.
    fn thread(&self, worker: &mut Worker<'_>) -> Result<(), StopRequested>;

    /// Operations so far; exact once all threads have ended.
    fn operations(&self) -> u64;

    /// Checks the finished work and gives the hash of its result.
    ///
    /// # Errors
    /// What is wrong with it.
    fn finish(&self) -> Result<String, String>;
}

fn program(config: &Config) -> Box<dyn Program> {
    match config.stand_in {
        StandIn::Dedup => Box::new(dedup::Dedup::new(config)),
        StandIn::Streamcluster => Box::new(streamcluster::Streamcluster::new(config)),
        StandIn::Kernbench => Box::new(kernbench::Kernbench::new(config)),
        StandIn::Specjbb => Box::new(specjbb::Specjbb::new(config)),
        StandIn::Cpu => Box::new(cpu::Cpu::new(config)),
        StandIn::Locks => Box::new(locks::Locks::new(config)),
    }
}

/// Tells the others when a thread ends, and ends them all when it ends by a panic: they might spin
/// for it for ever.
struct Leaving<'a> {
    stop: &'a AtomicBool,
    running: &'a AtomicUsize,
    main: thread::Thread,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.stop.store(true, Ordering::Relaxed);
        }
        self.running.fetch_sub(1, Ordering::AcqRel);
        self.main.unpark();
    }
}

/// Runs a stand-in. Its threads end soon after `stop` is set, by whomever.
///
/// # Errors
/// [`Error`].
pub fn run(config: &Config, stop: &AtomicBool) -> Result<Outcome, Error> {
    if !(1..=MOST_THREADS).contains(&config.threads) {
        return Err(Error::Threads(config.threads));
    }
    if !(1..=MOST_QUEUED).contains(&config.queue) {
        return Err(Error::Queue(config.queue));
    }
    if !(1..=MOST_SLOWER).contains(&config.slower) {
        return Err(Error::Slower(config.slower));
    }
    let program = program(config);
    let program = &*program;
    let gate = &RwLock::new(());
    let running = &AtomicUsize::new(config.threads);
    let main = thread::current();
    let before = switches();
    let (ruler, in_time, ends) = thread::scope(|scope| {
        // Threads start when all of them are there.
        let closed = gate.write();
        let mut threads = Vec::with_capacity(config.threads);
        for index in 0..config.threads {
            let leaving = Leaving { stop, running, main: main.clone() };
            let mut builder = thread::Builder::new();
            if config.vcpu_names {
                builder = builder.name(format!("CPU {index}/TCG"));
            }
            let body = move || {
                let _leaving = leaving;
                let mut worker = Worker { index, stop, meter: Meter::new(config.time_locks) };
                drop(gate.read());
                let cpu = thread_cpu();
                let done = program.thread(&mut worker).is_ok();
                (done, thread_cpu() - cpu, worker.meter)
            };
            match builder.spawn_scoped(scope, body) {
                Ok(t) => threads.push(t),
                Err(e) => {
                    stop.store(true, Ordering::Relaxed);
                    return Err(Error::Spawn(e));
                }
            }
        }
        let ruler = Ruler::start();
        drop(closed);
        let in_time = wait(config.time, &ruler, running, stop);
        let ends: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        Ok((ruler, in_time, ends))
    })?;
    let elapsed = ruler.elapsed();
    let mut meter = Meter::default();
    let mut cpu_ms = Vec::new();
    let mut done = true;
    for end in ends {
        let (finished, cpu, its) = end.map_err(|_| Error::Failed(config.stand_in))?;
        done &= finished;
        meter.add(&its);
        cpu_ms.push(cpu.as_secs_f64() * 1e3);
    }
    let digest = if done {
        let wrong = |why| Error::Wrong { stand_in: config.stand_in, why };
        Some(program.finish().map_err(wrong)?)
    } else {
        None
    };
    let after = switches();
    let tick_ns = ruler.tick_ns();
    Ok(Outcome {
        standin: config.stand_in,
        stands_for: config.stand_in.stands_for(),
        operation: config.stand_in.operation(),
        threads: config.threads,
        seed: config.seed,
        work: config.work,
        ended: match (done, in_time) {
            (true, _) => EndReason::Done,
            (false, true) => EndReason::StopRequested,
            (false, false) => EndReason::Time,
        },
        elapsed_ms: elapsed.as_secs_f64() * 1e3,
        operations: program.operations(),
        digest,
        locks: meter.locks,
        barriers: meter.barriers,
        queues: meter.queues,
        cpu_ms,
        switches: [after[0] - before[0], after[1] - before[1]],
        hold: meter.hold.in_ns(tick_ns),
        wait: meter.wait.in_ns(tick_ns),
    })
}

/// Waits for the threads' end, and makes them end when the time is over. False in that case.
fn wait(time: Option<Duration>, ruler: &Ruler, running: &AtomicUsize, stop: &AtomicBool) -> bool {
    while running.load(Ordering::Acquire) > 0 {
        match time.map(|t| t.saturating_sub(ruler.elapsed())) {
            None => thread::park(),
            Some(Duration::ZERO) => {
                // Asked just before the time was over counts as asked.
                return stop.swap(true, Ordering::Relaxed);
            }
            Some(left) => thread::park_timeout(left),
        }
    }
    true
}

/// Voluntary and involuntary context switches of this process.
fn switches() -> [u64; 2] {
    // SAFETY: all-zero bytes are a valid `rusage`, which is made of integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a whole `rusage` of ours. The call fails only for a bad pointer or
    // a bad `who`, and leaves zeros then.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    [usage.ru_nvcsw, usage.ru_nivcsw].map(|n| u64::try_from(n).unwrap_or(0))
}
