//! The service: a thread of its own that finds machines, spreads their vCPUs, watches what each
//! runs and waits, lends, and puts everything back at its end.
//!
//! ```text
//!   start: lock -> put back what a killed service left -> probe -> thread
//!   every scan (1 s):      find machines; those that ended: forget; new: group, place; load: re-place
//!   every period (20 ms):  read accounts -> lend/settle -> nice and slice
//!   stop, drop, error:     settle and put everything back, remove groups
//! ```

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::cgroup::Hierarchy;
use crate::config::{BadConfig, Config};
use crate::cpus::CpuSet;
use crate::discover::{Discovery, VmId};
use crate::gang::Gangs;
use crate::hands::{Hands, Restored};
use crate::journal::{Journal, JournalError};
use crate::lend::{Ledger, Sample, Standing, Terms};
use crate::place::{imbalance, place};
use crate::proc::{CpuTime, online, parse_cpu_times, read_bounded};
use crate::queues::queues;
use crate::status::Status;
use crate::sys::Powers;
use crate::vm::{Managed, words};

/// How long vCPUs stay where they were put, at least.
const STAY: Duration = Duration::from_secs(5);
/// From which imbalance on vCPUs are placed anew, in pCPUs' worth of work.
const UNEVEN: f64 = 0.6;
/// The share of a pCPU that looking at vCPUs may cost.
const MAX_COST: f64 = 0.05;

/// Why the service does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration makes no sense.
    #[error(transparent)]
    Config(#[from] BadConfig),
    /// The state directory can't be had.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The host can't be read.
    #[error("reading the threads of this host")]
    Proc(#[source] io::Error),
}

/// A running service. Dropping it stops it.
#[derive(Debug)]
pub struct Service {
    stop: Option<Sender<()>>,
    worker: Option<JoinHandle<()>>,
    status: Arc<Mutex<Status>>,
}

impl Service {
    /// Starts one. What a killed one left behind is put back first.
    ///
    /// # Errors
    /// When the configuration makes no sense, another service holds the state directory, or the
    /// host can't be read. Missing powers are no error: [`Status::lesser`] says what is not done.
    pub fn start(config: Config) -> Result<Self, StartError> {
        config.check()?;
        let journal = Journal::open(&config.state_dir)?;
        let powers = Powers::probe();
        let mut lesser = Vec::new();
        let hierarchy = match Hierarchy::find() {
            Ok(hierarchy) => Some(hierarchy),
            Err(e) => {
                lesser.push(format!("no loans and no groups: {}", words(&e)));
                None
            }
        };
        if !powers.nice {
            lesser.push(
                "no loans, and only machines of this user: CAP_SYS_NICE is missing; run as root"
                    .to_owned(),
            );
        } else if powers.own_slice_ns.is_none() {
            lesser.push("loans by nice alone: slices can be set from Linux 6.12 on".to_owned());
        }
        let version = hierarchy.as_ref().map(Hierarchy::version);
        let mut hands = Hands::new(journal, hierarchy, powers);
        let at_start = hands.restore_all();
        let before = cpu_times().map_err(StartError::Proc)?;
        let status = Arc::new(Mutex::new(Status {
            seconds: 0.0,
            periods: 0,
            period_ms: config.period.as_secs_f64() * 1e3,
            cost: 0.0,
            powers,
            lesser,
            at_start,
            at_end: None,
            loans: Ledger::default(),
            placements: 0,
            gangs: 0,
            gang_turns: 0,
            vms: Vec::new(),
        }));
        let gangs = match version {
            Some(version) if config.lend && !config.gang.is_zero() => {
                Some(Gangs::start(version, config.gang).map_err(StartError::Proc)?)
            }
            _ => None,
        };
        let worker = Worker {
            gangs,
            discovery: Discovery::new(config.only.clone()).marked(config.mark.clone()),
            vms: BTreeMap::new(),
            leaving: Vec::new(),
            before,
            online: online().map_err(StartError::Proc)?,
            ended: Ledger::default(),
            placements: 0,
            spent: Duration::ZERO,
            began: Instant::now(),
            scanned: None,
            periods: 0,
            period: config.period,
            status: Arc::clone(&status),
            config,
            hands,
        };
        let (stop, stopped) = channel();
        let worker = std::thread::Builder::new()
            .name("sched-host".into())
            .spawn(move || worker.work(&stopped))
            .map_err(StartError::Proc)?;
        Ok(Self { stop: Some(stop), worker: Some(worker), status })
    }

    /// What it has seen and done so far, as of its last scan.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it still works; it ends by itself only on a fault of its own.
    #[must_use]
    pub fn works(&self) -> bool {
        self.worker.as_ref().is_some_and(|w| !w.is_finished())
    }

    /// Stops it and puts everything back; what it has done in all.
    #[must_use]
    pub fn stop(mut self) -> Status {
        self.end();
        self.status()
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if self.worker.take().is_some_and(|worker| worker.join().is_err()) {
            tracing::error!("the co-scheduling service ended by a fault; all was put back");
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.end();
    }
}

struct Worker {
    // The first to end: groups that are removed have no weight any more.
    gangs: Option<Gangs>,
    config: Config,
    hands: Hands,
    discovery: Discovery,
    vms: BTreeMap<VmId, Managed>,
    /// Machines that have ended and whose group is not empty yet.
    leaving: Vec<Managed>,
    /// Each pCPU's account as of the last scan.
    before: BTreeMap<usize, CpuTime>,
    online: CpuSet,
    /// Loans of machines that have ended.
    ended: Ledger,
    placements: u64,
    spent: Duration,
    began: Instant,
    scanned: Option<Instant>,
    periods: u64,
    period: Duration,
    status: Arc<Mutex<Status>>,
}

impl Worker {
    fn work(mut self, stopped: &Receiver<()>) {
        let mut last = Instant::now();
        let mut due = last;
        loop {
            let begin = Instant::now();
            if self.scanned.is_none_or(|at| at.elapsed() >= self.config.scan) {
                self.scan();
                self.publish(None);
            }
            let now = Instant::now();
            self.watch(now, now - last);
            last = now;
            let took = begin.elapsed();
            self.spent += took;
            self.periods += 1;
            self.adapt(took);
            // Without siblings there is nothing to watch.
            let idle = !self.vms.values().any(Managed::has_siblings);
            due = (due + if idle { self.config.scan } else { self.period }).max(Instant::now());
            match stopped.recv_timeout(due - Instant::now()) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.publish(None);
        drop(self.gangs.take());
        let report = self.hands.restore_all();
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.at_end = Some(report);
    }

    /// A longer period where a look costs too much; back to what was asked for where it does not.
    fn adapt(&mut self, took: Duration) {
        let least = took.div_f64(MAX_COST).max(self.config.period);
        let eased = self.period.mul_f64(0.9).max(self.config.period);
        self.period = least.min(Duration::from_secs(1)).max(eased.min(self.period));
    }

    fn watch(&mut self, now: Instant, window: Duration) {
        let now_ns = u64::try_from((now - self.began).as_nanos()).unwrap_or(u64::MAX);
        let window_ns = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX).max(1);
        let lend = self.config.lend && self.hands.powers().nice;
        let mut samples: BTreeMap<VmId, Vec<Sample>> = BTreeMap::new();
        for (id, vm) in &mut self.vms {
            // Who may not lend (any more) settles what it has lent.
            let lends = lend && vm.may_lend();
            samples.insert(*id, vm.sample(lends));
        }
        // Who runs whole is at no distance.
        let whole = self.gangs.as_ref().is_some_and(|g| g.members() > 1);
        if lend && !self.config.turn.is_zero() && !whole {
            self.stand(&mut samples);
        }
        for (id, vm) in &mut self.vms {
            let samples = samples.remove(id).unwrap_or_default();
            vm.period(now_ns, window_ns, &samples, &mut self.hands);
        }
    }

    /// Where each ready vCPU stands among all vCPUs of its pCPU. Other threads are left out: to read
    /// them all would cost more than it tells.
    fn stand(&self, samples: &mut BTreeMap<VmId, Vec<Sample>>) {
        let mut numbers = BTreeMap::new();
        let mut ready = Vec::new();
        for (id, vm) in &self.vms {
            for (number, thread) in vm.ready() {
                numbers.insert(thread.tid, (*id, number));
                ready.push(thread);
            }
        }
        for queue in queues(&ready).values() {
            let length = 1 + queue.waiting.len();
            let all = std::iter::once(&queue.running).chain(&queue.waiting);
            for (ordinate, thread) in all.enumerate() {
                let Some((id, number)) = numbers.get(&thread.tid) else { continue };
                let of_vm = samples.get_mut(id).into_iter().flatten();
                for sample in of_vm.filter(|s| s.vcpu == *number) {
                    sample.standing = Some(Standing { ordinate, queue: length });
                }
            }
        }
    }

    fn scan(&mut self) {
        let now = Instant::now();
        let window = self.scanned.map_or(self.config.scan, |at| now - at);
        let first = self.scanned.replace(now).is_none();
        let found = match self.discovery.scan() {
            Ok(found) => found,
            Err(e) => {
                tracing::warn!("machines can't be looked for: {e}");
                return;
            }
        };
        let mut report = Restored::default();
        let mut known = std::mem::take(&mut self.vms);
        let mut changed = Vec::new();
        for vm in found {
            let id = vm.id;
            let mut managed = known.remove(&id).unwrap_or_else(|| Managed::new(&vm, self.terms()));
            let before: Vec<_> = managed.threads().collect();
            if managed.update(vm, &self.hands) {
                changed.push(id);
                let now: Vec<_> = managed.threads().collect();
                for gone in before.into_iter().filter(|t| !now.contains(t)) {
                    self.hands.restore(gone, &mut report);
                }
            }
            managed.ensure_group(&mut self.hands, self.config.lend);
            self.vms.insert(id, managed);
        }
        for vm in known.values_mut() {
            vm.end();
            self.ended = sum(self.ended, vm.ledger());
        }
        self.leaving.extend(known.into_values());
        self.leaving.retain_mut(|vm| !vm.release(&mut self.hands, &mut report));
        if !first {
            let window_ns = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX);
            self.vms.values_mut().for_each(|vm| vm.at_scan(window_ns));
        }
        if self.config.spread {
            self.spread(window, &changed);
        }
        self.gang();
    }

    /// Chooses the machines that run whole in turns: those of one group above that are as wide as the
    /// host, where all want more pCPUs than there are.
    fn gang(&self) {
        let Some(gangs) = &self.gangs else { return };
        let wanted: f64 = self.vms.values().map(Managed::demand).sum();
        let mut members = Vec::new();
        if wanted > self.online.len() as f64 + 0.5 {
            let may: Vec<&Path> =
                self.vms.values().filter_map(|vm| vm.gang(self.online.len())).collect();
            let above = may.first().and_then(|dir| dir.parent());
            let beside = may.iter().filter(|dir| dir.parent() == above);
            members.extend(beside.take(crate::gang::MOST).map(|dir| dir.to_path_buf()));
        }
        gangs.set(members);
    }

    fn terms(&self) -> Terms {
        let ns = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        Terms {
            threshold_ns: ns(self.config.threshold),
            max_steps: self.config.max_steps,
            life_ns: ns(self.config.life),
            alpha: self.config.alpha,
            turn_ns: ns(self.config.turn),
        }
    }

    /// Places the vCPUs of machines that are new or changed, and of those that could stand much
    /// better.
    fn spread(&mut self, window: Duration, changed: &[VmId]) {
        let Ok(online) = online() else { return };
        let plugged = online != self.online;
        self.online = online;
        let others = self.others(window);
        let ids: Vec<VmId> = self.vms.keys().copied().collect();
        for id in ids {
            // What all the others want of each pCPU.
            let mut load = others.clone();
            for (_, vm) in self.vms.iter().filter(|(other, _)| **other != id) {
                vm.add_load(&mut load, &self.online);
            }
            load.retain(|cpu, _| self.online.contains(*cpu));
            let Some(vm) = self.vms.get_mut(&id).filter(|vm| vm.has_siblings()) else { continue };
            let wishes = vm.wishes(&self.online);
            let settled = vm.placed_at.is_some_and(|at| at.elapsed() < STAY);
            let uneven = || imbalance(&wishes, &vm.placed(), &load) > UNEVEN;
            let must = plugged || changed.contains(&id) || vm.placed_at.is_none();
            if !must && (settled || !uneven()) {
                continue;
            }
            let placed = place(&wishes, &load);
            let gain =
                || imbalance(&wishes, &vm.placed(), &load) - imbalance(&wishes, &placed, &load);
            if must || gain() > UNEVEN / 2.0 {
                self.placements += vm.bind(&placed, &mut self.hands);
            }
        }
    }

    /// What threads other than vCPUs use of each pCPU that is online.
    fn others(&mut self, window: Duration) -> BTreeMap<usize, f64> {
        let mut load: BTreeMap<usize, f64> = self.online.iter().map(|c| (c, 0.0)).collect();
        let Ok(now) = cpu_times() else { return load };
        let ticks = window.as_secs_f64() * rustix::param::clock_ticks_per_second() as f64;
        let mut ours = BTreeMap::new();
        for vm in self.vms.values() {
            vm.add_load(&mut ours, &self.online);
        }
        for (cpu, want) in &mut load {
            let busy = |of: &BTreeMap<usize, CpuTime>| of.get(cpu).map_or(0, |t| t.busy_ticks);
            let used = busy(&now).saturating_sub(busy(&self.before)) as f64 / ticks.max(1.0);
            // Of a pCPU that vCPUs want more of than there is, nothing is known to be others'.
            let vcpus = ours.get(cpu).copied().unwrap_or_default();
            *want = (used.min(1.0) - vcpus).max(0.0);
        }
        self.before = now;
        load
    }

    fn publish(&self, at_end: Option<Restored>) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.seconds = self.began.elapsed().as_secs_f64();
        status.periods = self.periods;
        status.period_ms = self.period.as_secs_f64() * 1e3;
        status.cost = self.spent.as_secs_f64() / status.seconds.max(1e-3);
        status.placements = self.placements;
        status.gangs = self.gangs.as_ref().map_or(0, Gangs::members);
        status.gang_turns = self.gangs.as_ref().map_or(status.gang_turns, Gangs::turns);
        status.loans = self.vms.values().fold(self.ended, |all, vm| sum(all, vm.ledger()));
        status.vms = self.vms.values().map(Managed::status).collect();
        status.at_end = at_end;
    }
}

fn sum(a: Ledger, b: Ledger) -> Ledger {
    Ledger {
        loans: a.loans + b.loans,
        lent: a.lent + b.lent,
        settled: a.settled + b.settled,
        caught_up: a.caught_up + b.caught_up,
        expired: a.expired + b.expired,
        gone: a.gone + b.gone,
        for_distance: a.for_distance + b.for_distance,
    }
}

fn cpu_times() -> io::Result<BTreeMap<usize, CpuTime>> {
    let text = read_bounded(Path::new("/proc/stat"))?;
    Ok(parse_cpu_times(&String::from_utf8_lossy(&text)).into_iter().collect())
}
