//! Looks at a live host without changing anything: how often siblings are stacked (table 4.2 of
//! the thesis), how often a sibling is farther away than the threshold (table 4.3), and what
//! hints at waiting for locks.
//!
//! A sample is not one instant: the threads are read one after the other, some microseconds each,
//! and the reader itself runs on one of the pCPUs (whoever ran there counts as running). To stay
//! short a sample reads the vCPUs and those other threads that ran in the last second.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use godwit_sched::policy::Alpha;

use crate::discover::{Discovery, Vm, VmId};
use crate::proc::{SchedStat, Thread, ThreadId, numbers_in, parse_cpu_times, read_bounded};
use crate::queues::{Counts, Order, Ready, queues};

/// Other threads that a sample reads at most.
const MAX_OTHERS: usize = 4096;
/// Threads that a look for busy ones reads at most.
const MAX_THREADS: usize = 32_768;
/// How often machines and busy threads are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How to observe.
#[derive(Debug, Clone)]
pub struct Config {
    /// For how long.
    pub time: Duration,
    /// How often.
    pub interval: Duration,
    /// The threshold of table 4.3.
    pub alpha: Alpha,
    /// Only these processes.
    pub only: Option<Vec<i32>>,
}

/// What was seen of one machine.
#[derive(Debug, Clone, serde::Serialize)]
pub struct VmReport {
    /// Its process.
    pub pid: i32,
    /// What it calls itself.
    pub name: String,
    /// How many vCPUs.
    pub vcpus: usize,
    /// The counts.
    #[serde(flatten)]
    pub counts: Counts,
    /// Time its vCPUs ran, milliseconds.
    pub run_ms: f64,
    /// Time they were ready and waited, milliseconds.
    pub wait_ms: f64,
    /// What the vCPU that ran most got more than the one that ran least, as a share of the former.
    pub skew: f64,
    /// The longest that a vCPU was seen waiting while a sibling ran, milliseconds.
    pub longest_wait_ms: f64,
}

/// What was seen.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// Samples taken.
    pub samples: u64,
    /// For how long, seconds.
    pub seconds: f64,
    /// What one sample took on average, milliseconds.
    pub sample_ms: f64,
    /// The mean number of threads that waited on a pCPU that was busy.
    pub waiting: f64,
    /// Of the queues with two or more waiting, the share that was ordered by virtual runtime;
    /// the others were ordered by when each last ran.
    pub by_vruntime: f64,
    /// Share of the time that a hypervisor below this host took from it.
    pub steal: f64,
    /// Share of samples in which at least one machine had siblings stacked (table 4.2).
    pub any_stacked: f64,
    /// The threshold.
    pub alpha: String,
    /// All machines.
    pub total: Counts,
    /// Each machine.
    pub vms: Vec<VmReport>,
}

impl Report {
    /// Table 4.3: of the times that a vCPU was next and had a sibling waiting elsewhere, the
    /// share in which one was too far; `None` when there was no such time.
    #[must_use]
    pub fn far(&self) -> Option<f64> {
        ratio(self.total.far, self.total.compared)
    }
}

/// `part / of`, where there is any.
#[must_use]
pub fn ratio(part: u64, of: u64) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

struct Seen {
    name: String,
    counts: Counts,
    first: HashMap<ThreadId, SchedStat>,
    last: HashMap<ThreadId, SchedStat>,
    /// Since when a vCPU was seen waiting beside a running sibling.
    waits: HashMap<i32, Instant>,
    longest: Duration,
}

/// Observes until the time is over or `stop` says so; `progress` hears the samples taken.
///
/// # Errors
/// When `/proc` can't be read.
pub fn observe(
    config: &Config,
    stop: &dyn Fn() -> bool,
    progress: &mut dyn FnMut(u64, usize),
) -> io::Result<Report> {
    let mut observer = Observer::new(config)?;
    let begin = Instant::now();
    let mut next = begin;
    while begin.elapsed() < config.time && !stop() {
        observer.sample()?;
        progress(observer.samples, observer.vms.len());
        next = (next + config.interval).max(Instant::now());
        while let Some(rest) = next.checked_duration_since(Instant::now()) {
            if stop() || rest.is_zero() {
                break;
            }
            std::thread::sleep(rest.min(Duration::from_millis(100)));
        }
    }
    Ok(observer.report(begin.elapsed()))
}

struct Observer<'a> {
    config: &'a Config,
    discovery: Discovery,
    vms: Vec<Vm>,
    others: Vec<Thread>,
    /// Times each other thread was put on a pCPU, as of the last look.
    ran: HashMap<ThreadId, u64>,
    groups: HashMap<ThreadId, u64>,
    looked: Option<Instant>,
    seen: BTreeMap<VmId, Seen>,
    samples: u64,
    any_stacked: u64,
    spent: Duration,
    waiting: (u64, u64),
    ordered: (u64, u64),
    cpu_before: (u64, u64),
}

impl<'a> Observer<'a> {
    fn new(config: &'a Config) -> io::Result<Self> {
        Ok(Self {
            config,
            discovery: Discovery::new(config.only.clone()),
            vms: Vec::new(),
            others: Vec::new(),
            ran: HashMap::new(),
            groups: HashMap::new(),
            looked: None,
            seen: BTreeMap::new(),
            samples: 0,
            any_stacked: 0,
            spent: Duration::ZERO,
            waiting: (0, 0),
            ordered: (0, 0),
            cpu_before: steal_and_all()?,
        })
    }

    fn look(&mut self) -> io::Result<()> {
        self.vms = self.discovery.scan()?;
        for vm in &self.vms {
            let seen = self.seen.entry(vm.id).or_insert_with(|| Seen {
                name: vm.name.clone(),
                counts: Counts::default(),
                first: HashMap::new(),
                last: HashMap::new(),
                waits: HashMap::new(),
                longest: Duration::ZERO,
            });
            for vcpu in vm.vcpus.values() {
                if let Ok(stat) = vcpu.schedstat() {
                    seen.first.entry(vcpu.id()).or_insert(stat);
                }
            }
        }
        self.look_for_busy_threads()?;
        let known: Vec<&Thread> =
            self.vms.iter().flat_map(|vm| vm.vcpus.values()).chain(&self.others).collect();
        self.groups = known.into_iter().map(|t| (t.id(), group_of(t))).collect();
        self.looked = Some(Instant::now());
        Ok(())
    }

    /// Threads that were put on a pCPU since the last look, the vCPUs left out.
    fn look_for_busy_threads(&mut self) -> io::Result<()> {
        let vcpus: Vec<ThreadId> = self.vms.iter().flat_map(Vm::threads).collect();
        let me = crate::sys::gettid();
        let mut ran = HashMap::new();
        let mut busy = Vec::new();
        'all: for pid in numbers_in(Path::new("/proc"), MAX_THREADS)? {
            let Ok(tids) = numbers_in(Path::new(&format!("/proc/{pid}/task")), MAX_THREADS) else {
                continue;
            };
            for tid in tids {
                let Ok(thread) = Thread::open(pid, tid) else { continue };
                let Ok(stat) = thread.schedstat() else { continue };
                if tid == me || vcpus.contains(&thread.id()) {
                    continue;
                }
                ran.insert(thread.id(), stat.times);
                let before = self.ran.get(&thread.id()).copied();
                if before.is_none_or(|b| b != stat.times) || is_ready(&thread) {
                    busy.push(thread);
                }
                if busy.len() >= MAX_OTHERS || ran.len() >= MAX_THREADS {
                    break 'all;
                }
            }
        }
        self.ran = ran;
        self.others = busy;
        Ok(())
    }

    fn sample(&mut self) -> io::Result<()> {
        if self.looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY) {
            self.look()?;
        }
        let begin = Instant::now();
        let mut ready = Vec::new();
        let vcpus = self.vms.iter().flat_map(|vm| vm.vcpus.values().map(|t| (Some(vm.id), t)));
        for (vm, thread) in vcpus.chain(self.others.iter().map(|t| (None, t))) {
            let Ok(stat) = thread.stat() else { continue };
            if stat.state != b'R' {
                continue;
            }
            let Ok(position) = thread.position() else { continue };
            ready.push(Ready {
                tid: thread.id().tid,
                cpu: stat.cpu,
                vm,
                group: self.groups.get(&thread.id()).copied().unwrap_or_default(),
                exec_start_ms: position.exec_start_ms,
                vruntime_ms: position.vruntime_ms,
            });
        }
        let queues = queues(&ready);
        self.spent += begin.elapsed();
        self.samples += 1;
        for queue in queues.values() {
            self.waiting.0 += queue.waiting.len() as u64;
            self.waiting.1 += 1;
            if queue.waiting.len() > 1 {
                self.ordered.0 += u64::from(queue.order == Order::Vruntime);
                self.ordered.1 += 1;
            }
        }
        let mut any = false;
        for vm in &self.vms {
            let Some(seen) = self.seen.get_mut(&vm.id) else { continue };
            let before = seen.counts.stacked;
            seen.counts.add(vm.id, &queues, self.config.alpha);
            any |= seen.counts.stacked > before;
            for vcpu in vm.vcpus.values() {
                if let Ok(stat) = vcpu.schedstat() {
                    seen.last.insert(vcpu.id(), stat);
                }
            }
            let runs = queues.values().any(|q| q.running.vm == Some(vm.id));
            let waits =
                |tid: i32| runs && queues.values().any(|q| q.waiting.iter().any(|r| r.tid == tid));
            seen.waits.retain(|tid, _| waits(*tid));
            for thread in vm.threads().filter(|t| waits(t.tid)) {
                let since = *seen.waits.entry(thread.tid).or_insert(begin);
                seen.longest = seen.longest.max(begin - since);
            }
        }
        self.any_stacked += u64::from(any);
        Ok(())
    }

    fn report(self, time: Duration) -> Report {
        let (steal, all) = steal_and_all().unwrap_or(self.cpu_before);
        let (steal, all) =
            (steal.saturating_sub(self.cpu_before.0), all.saturating_sub(self.cpu_before.1));
        let vms: Vec<VmReport> = self.seen.into_iter().map(|(id, s)| vm_report(id, s)).collect();
        Report {
            samples: self.samples,
            seconds: time.as_secs_f64(),
            sample_ms: self.spent.as_secs_f64() * 1e3 / self.samples.max(1) as f64,
            waiting: ratio(self.waiting.0, self.waiting.1).unwrap_or_default(),
            by_vruntime: ratio(self.ordered.0, self.ordered.1).unwrap_or(1.0),
            steal: ratio(steal, all).unwrap_or_default(),
            any_stacked: ratio(self.any_stacked, self.samples).unwrap_or_default(),
            alpha: self.config.alpha.to_string(),
            total: vms.iter().fold(Counts::default(), |sum, vm| sum.plus(vm.counts)),
            vms,
        }
    }
}

fn vm_report(id: VmId, seen: Seen) -> VmReport {
    let of = |thread: &ThreadId, last: &SchedStat| {
        let first = seen.first.get(thread).copied().unwrap_or_default();
        let run = last.run_ns.saturating_sub(first.run_ns);
        (run, last.wait_ns.saturating_sub(first.wait_ns))
    };
    let accounts: Vec<(u64, u64)> = seen.last.iter().map(|(t, s)| of(t, s)).collect();
    let most = accounts.iter().map(|a| a.0).max().unwrap_or_default();
    let least = accounts.iter().map(|a| a.0).min().unwrap_or_default();
    let ms = |ns: u64| ns as f64 / 1e6;
    VmReport {
        pid: id.pid,
        name: seen.name,
        vcpus: accounts.len(),
        counts: seen.counts,
        run_ms: ms(accounts.iter().map(|a| a.0).sum()),
        wait_ms: ms(accounts.iter().map(|a| a.1).sum()),
        skew: ratio(most - least, most).unwrap_or_default(),
        longest_wait_ms: seen.longest.as_secs_f64() * 1e3,
    }
}

fn is_ready(thread: &Thread) -> bool {
    thread.stat().is_ok_and(|s| s.state == b'R')
}

/// A number for the group of threads in which a thread's virtual runtime counts: its control
/// group, and its autogroup, which counts where that is the root.
fn group_of(thread: &Thread) -> u64 {
    let mut hash = DefaultHasher::new();
    let cgroups = thread.cgroups().unwrap_or_default();
    crate::cgroup::cpu_path(&cgroups).hash(&mut hash);
    let autogroup = format!("/proc/{}/autogroup", thread.id().pid);
    read_bounded(Path::new(&autogroup)).unwrap_or_default().hash(&mut hash);
    hash.finish()
}

/// Clock ticks stolen, and stolen or used, over all pCPUs.
fn steal_and_all() -> io::Result<(u64, u64)> {
    let text = read_bounded(Path::new("/proc/stat"))?;
    let times = parse_cpu_times(&String::from_utf8_lossy(&text));
    let steal = times.iter().map(|(_, t)| t.steal_ticks).sum();
    Ok((steal, times.iter().map(|(_, t)| t.busy_ticks + t.steal_ticks).sum()))
}
