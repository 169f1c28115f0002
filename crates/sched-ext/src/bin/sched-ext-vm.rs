//! A stand-in for virtual machines, for tests of the scheduler in guests: processes whose threads
//! spin on a lock they share, as the vCPUs of a machine do.

use std::hint::spin_loop;
use std::io::{self, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand, ValueEnum};
use godwit_sched_ext::{Config, Scheduler, VmBy};

type Failure = Box<dyn std::error::Error>;

/// Stand-ins for virtual machines
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Machines that run for a time; each ends with a line of JSON
    Run {
        #[arg(long, default_value_t = 1)]
        vms: u32,
        #[arg(long, default_value_t = 4)]
        threads: u32,
        #[arg(long, default_value_t = 1.0)]
        seconds: f64,
        #[arg(long, value_enum, default_value = "lock")]
        kind: Kind,
        /// Threads are named as those of QEMU are
        #[arg(long)]
        named: bool,
        /// Whole seconds since the system started: the threads work before, and the time and the CPU
        /// time that are told count from then
        #[arg(long)]
        from: Option<u32>,
    },
    /// Machines that end as soon as they have begun, some at a time
    Flash {
        #[arg(long)]
        count: u32,
    },
    /// A thread that is ready on a CPU and cannot run there, until no scheduler is loaded: another
    /// of a higher class keeps the CPU busy
    Starve {
        #[arg(long)]
        cpu: usize,
    },
    /// Loads the scheduler itself and has one thread yield to another
    Yield,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Short sections under one lock
    Lock,
    /// No lock
    Cpu,
    /// As `lock`, and each thread ends soon and is replaced by another
    Churn,
    /// As `lock`, but the first thread sleeps all the time and the second half of it
    Uneven,
}

fn main() -> Result<(), Failure> {
    match Args::parse().command {
        What::Run { vms: 1, threads, seconds, kind, named, from } => {
            machine(threads, (from, Duration::from_secs_f64(seconds)), kind, named)
        }
        What::Run { vms, threads, seconds, kind, named, from } => {
            let kind = kind.to_possible_value().ok_or("a kind")?.get_name().to_owned();
            let (threads, seconds) = (threads.to_string(), seconds.to_string());
            let mut args =
                vec!["run", "--threads", &threads, "--seconds", &seconds, "--kind", &kind];
            args.extend(named.then_some("--named"));
            let from = from.map(|from| from.to_string());
            args.extend(from.iter().flat_map(|from| ["--from", from]));
            let machines: io::Result<Vec<Child>> = (0..vms).map(|_| start(&args)).collect();
            end(machines?)
        }
        What::Flash { count } => flash(count),
        What::Starve { cpu } => starve(cpu),
        What::Yield => yield_once(),
    }
}

fn start(args: &[&str]) -> io::Result<Child> {
    Command::new(std::env::current_exe()?).args(args).stdin(Stdio::null()).spawn()
}

fn end(machines: Vec<Child>) -> Result<(), Failure> {
    for mut machine in machines {
        if !machine.wait()?.success() {
            return Err("a machine failed".into());
        }
    }
    Ok(())
}

/// Twenty at a time; without exec, which under emulation takes longer than all they do.
fn flash(count: u32) -> Result<(), Failure> {
    let mut left = count;
    while left > 0 {
        let now = left.min(20);
        for _ in 0..now {
            // SAFETY: this process has one thread, so its child may do all that it may.
            let pid = unsafe { libc::fork() };
            match pid {
                0 => {
                    let done = machine(2, (None, Duration::from_millis(3)), Kind::Lock, true);
                    std::process::exit(done.is_err().into());
                }
                -1 => return Err(io::Error::last_os_error().into()),
                _ => {}
            }
        }
        for _ in 0..now {
            let ended = rustix::process::wait(rustix::process::WaitOptions::empty())?;
            if ended.is_none_or(|(_, status)| status.exit_status() != Some(0)) {
                return Err("a machine failed".into());
            }
        }
        left -= now;
    }
    Ok(())
}

/// What the threads of a machine share.
#[derive(Default)]
struct Shared {
    lock: AtomicBool,
    stop: AtomicBool,
    operations: AtomicU64,
}

impl Shared {
    /// Works until told to stop, or for `life`.
    fn work(&self, n: u32, kind: Kind, life: Option<Duration>) {
        let begun = Instant::now();
        let mut slept = begun;
        while !self.stop.load(Ordering::Relaxed) && life.is_none_or(|l| begun.elapsed() < l) {
            if kind == Kind::Uneven && n < 2 && slept.elapsed() > Duration::from_millis(1) {
                let nap = if n == 0 { 10 } else { 1 };
                thread::sleep(Duration::from_millis(nap));
                slept = Instant::now();
            }
            if kind == Kind::Uneven && n == 0 {
                continue;
            }
            if kind != Kind::Cpu {
                while self.lock.swap(true, Ordering::Acquire) {
                    while self.lock.load(Ordering::Relaxed) {
                        if self.stop.load(Ordering::Relaxed) {
                            return;
                        }
                        spin_loop();
                    }
                }
                burn(500);
                self.lock.store(false, Ordering::Release);
            }
            burn(500);
            self.operations.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn burn(turns: u32) {
    for turn in 0..turns {
        std::hint::black_box(turn);
    }
}

fn spawn(
    shared: &Arc<Shared>,
    n: u32,
    kind: Kind,
    named: bool,
    life: Option<Duration>,
) -> io::Result<JoinHandle<()>> {
    let shared = Arc::clone(shared);
    let name = if named { format!("CPU {n}/KVM") } else { format!("worker {n}") };
    thread::Builder::new().name(name).spawn(move || shared.work(n, kind, life))
}

/// CPU time of this process in milliseconds.
fn cpu_ms() -> f64 {
    let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    cpu.tv_sec as f64 * 1e3 + cpu.tv_nsec as f64 / 1e6
}

/// Sleeps until the system has run for `from` seconds.
fn await_uptime(from: u32) -> Result<(), Failure> {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = Duration::new(now.tv_sec.cast_unsigned(), u32::try_from(now.tv_nsec)?);
    let ahead = Duration::from_secs(from.into()).checked_sub(now);
    thread::sleep(ahead.ok_or("it started too late to count from then")?);
    Ok(())
}

fn machine(
    threads: u32,
    (from, lasting): (Option<u32>, Duration),
    kind: Kind,
    named: bool,
) -> Result<(), Failure> {
    let shared = Arc::new(Shared::default());
    let mut begun = Instant::now();
    let life =
        |n: u32| (kind == Kind::Churn).then(|| Duration::from_millis(5 + u64::from(n * 7 % 23)));
    let mut started = threads;
    let mut running = (0..threads)
        .map(|n| spawn(&shared, n, kind, named, life(n)))
        .collect::<io::Result<Vec<_>>>()?;
    let mut before = 0.0;
    if let Some(from) = from {
        await_uptime(from)?;
        (begun, before) = (Instant::now(), cpu_ms());
    }
    while begun.elapsed() < lasting {
        thread::sleep(Duration::from_millis(5).min(lasting));
        for (n, thread) in running.iter_mut().enumerate() {
            if thread.is_finished() {
                started += 1;
                *thread = spawn(&shared, n as u32, kind, named, life(started))?;
            }
        }
    }
    let cpu_ms = cpu_ms() - before;
    shared.stop.store(true, Ordering::Relaxed);
    for thread in running {
        thread.join().map_err(|_| "a thread panicked")?;
    }
    let line = serde_json::json!({
        "operations": shared.operations.load(Ordering::Relaxed),
        "cpu_ms": cpu_ms,
        "threads": started,
    });
    writeln!(io::stdout(), "{line}")?;
    Ok(())
}

fn starve(cpu: usize) -> Result<(), Failure> {
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(cpu);
    rustix::thread::sched_setaffinity(None, &cpus)?;
    let shared = Arc::new(Shared::default());
    let starved = spawn(&shared, 0, Kind::Cpu, false, None)?;
    let most = libc::sched_param { sched_priority: 50 };
    // SAFETY: reads one structure, which outlives the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const most) } != 0 {
        return Err(io::Error::last_os_error().into());
    }
    let until = Instant::now() + Duration::from_secs(60);
    while std::fs::read_to_string("/sys/kernel/sched_ext/state")?.trim() == "enabled" {
        if Instant::now() > until {
            return Err("the scheduler is still there".into());
        }
        burn(100_000);
    }
    shared.stop.store(true, Ordering::Relaxed);
    starved.join().map_err(|_| "the thread panicked")?;
    Ok(())
}

/// Several threads on one CPU: while one runs, another waits in its queue, and somebody yields to
/// that one.
fn yield_once() -> Result<(), Failure> {
    let config = Config { vm_by: VmBy::Tgid(vec![std::process::id()]), ..Config::default() };
    let scheduler = Scheduler::load(&config)?;
    let shared = Arc::new(Shared::default());
    let tids: Vec<Arc<AtomicU32>> = (0..8).map(|_| Arc::default()).collect();
    let threads: Vec<JoinHandle<()>> = tids
        .iter()
        .map(|tid| {
            let (tid, shared) = (Arc::clone(tid), Arc::clone(&shared));
            thread::spawn(move || {
                let me = rustix::thread::gettid().as_raw_nonzero().get();
                tid.store(me.unsigned_abs(), Ordering::Release);
                shared.work(0, Kind::Cpu, None);
            })
        })
        .collect();
    let until = Instant::now() + Duration::from_secs(20);
    // The first two may lend before the last has begun.
    let tids: Vec<i32> = tids
        .iter()
        .map(|tid| {
            loop {
                match tid.load(Ordering::Acquire) {
                    0 if Instant::now() < until => thread::yield_now(),
                    tid => break tid.cast_signed(),
                }
            }
        })
        .collect();
    let mut lent = false;
    while !lent && Instant::now() < until {
        for pair in tids.windows(2) {
            lent |= scheduler.test_yield(pair[0], pair[1])?;
        }
    }
    // From a thread of another machine, or to oneself, nothing is lent.
    let me = rustix::thread::gettid().as_raw_nonzero().get();
    let stranger = scheduler.test_yield(me, tids[0])?;
    let none = scheduler.test_yield(me, i32::MAX);
    thread::yield_now();
    shared.stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")?;
    }
    let counters = scheduler.unload()?;
    let line = serde_json::json!({
        "lent": lent,
        "stranger": stranger,
        "no_such_thread": none.is_err(),
        "counters": counters,
    });
    writeln!(io::stdout(), "{line}")?;
    Ok(())
}
