//! One machine that is looked after.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Instant;

use crate::cgroup::{Made, Standing};
use crate::cpus::CpuSet;
use crate::discover::{Vm, VmId};
use crate::hands::{ChangeError, Hands, Restored};
use crate::lend::{Decision, Lending, Loan, Sample, Terms};
use crate::place::Wish;
use crate::proc::{SchedStat, Thread};
use crate::queues::Ready;
use crate::status::{VcpuStatus, VmStatus};
use crate::sys::{self, Attr};

/// Slices that the kernel accepts, nanoseconds.
const SLICES_NS: (u64, u64) = (100_000, 100_000_000);

/// From which share of its time on a vCPU that runs or waits is busy.
const BUSY: f64 = 0.8;

/// One of its vCPUs.
#[derive(Debug)]
pub(crate) struct Vcpu {
    thread: Thread,
    /// The pCPUs that it may use by its owner's will.
    own_cpus: CpuSet,
    /// Those that it was given.
    placed: Option<CpuSet>,
    /// Its attributes by its owner's will.
    own_attr: Attr,
    /// What it was given.
    attr: Attr,
    last: SchedStat,
    /// As of the last scan.
    at_scan: SchedStat,
    cpu: usize,
    ready: bool,
    demand: f64,
    gone: bool,
}

/// Where its vCPUs stand.
#[derive(Debug, PartialEq)]
enum Group {
    /// Not looked at yet: it has had one vCPU so far.
    Unknown,
    /// One of its own, which it came with.
    Own(PathBuf),
    /// One that was made for it, below what it came with.
    Made(Made, PathBuf),
    /// None to itself, and why.
    None(String),
    /// Another service's: nothing is done to it.
    Foreign(PathBuf),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Managed {
    pub(crate) id: VmId,
    name: String,
    vcpus: BTreeMap<u32, Vcpu>,
    group: Group,
    lending: Lending,
    refused: Option<String>,
    pub(crate) placed_at: Option<Instant>,
    skew_first: Option<f64>,
    skew: Option<f64>,
}

impl Managed {
    pub(crate) fn new(vm: &Vm, terms: Terms) -> Self {
        Self {
            id: vm.id,
            name: vm.name.clone(),
            vcpus: BTreeMap::new(),
            group: Group::Unknown,
            lending: Lending::new(terms),
            refused: None,
            placed_at: None,
            skew_first: None,
            skew: None,
        }
    }

    /// Brings the list of vCPUs up to date; whether one came or went.
    pub(crate) fn update(&mut self, vm: Vm, hands: &Hands) -> bool {
        let before = self.vcpus.len();
        let same =
            |n: &u32, v: &Vcpu| !v.gone && vm.vcpus.get(n).is_some_and(|t| t.id() == v.thread.id());
        self.vcpus.retain(|n, v| same(n, v));
        let mut changed = self.vcpus.len() != before;
        for (number, thread) in vm.vcpus {
            if self.vcpus.contains_key(&number) {
                continue;
            }
            if let Ok(vcpu) = Vcpu::new(thread, hands) {
                self.vcpus.insert(number, vcpu);
                changed = true;
            }
        }
        changed
    }

    /// The numbers of threads that it had and has no more are put out of the journal.
    pub(crate) fn threads(&self) -> impl Iterator<Item = crate::proc::ThreadId> + '_ {
        self.vcpus.values().map(|v| v.thread.id())
    }

    /// Whether there are siblings, and they are ours to look after.
    pub(crate) fn has_siblings(&self) -> bool {
        self.vcpus.len() > 1 && !matches!(self.group, Group::Foreign(_))
    }

    /// Gives it a group to itself, once, and every vCPU that came since.
    pub(crate) fn ensure_group(&mut self, hands: &mut Hands, lend: bool) {
        if self.vcpus.len() < 2 {
            return;
        }
        if self.group == Group::Unknown {
            self.group = match self.find_group(hands, lend) {
                Ok(group) => group,
                Err(e) => Group::None(words(&e)),
            };
        }
        if let Group::Made(made, above) = &self.group {
            let (dir, above) = (made.dir.clone(), above.clone());
            if let Err(e) = self.enter(hands, &dir, &above) {
                self.refused = Some(words(&e));
            }
        }
    }

    fn find_group(&mut self, hands: &mut Hands, lend: bool) -> Result<Group, ChangeError> {
        let Some(hierarchy) = hands.hierarchy().cloned() else {
            return Ok(Group::None("no control groups".into()));
        };
        let failed =
            |source: io::Error| ChangeError::Kernel { what: "group", tid: self.id.pid, source };
        let threads = self.vcpus.values().map(|v| &v.thread);
        let above = match hierarchy.standing(self.id, threads).map_err(failed)? {
            Standing::Own(dir) => return Ok(Group::Own(dir)),
            Standing::Foreign(dir) => return Ok(Group::Foreign(dir)),
            Standing::Split => {
                return Ok(Group::None("each of its vCPUs has a control group of its own".into()));
            }
            Standing::Shared(_) if !lend => {
                return Ok(Group::None("no group is needed without loans".into()));
            }
            Standing::Shared(above) => above,
        };
        let Some(made) = hands.plan(self.id, &above) else {
            return Ok(Group::None("no control groups".into()));
        };
        let done = hands.make(&made).and_then(|()| self.enter(hands, &made.dir, &above));
        if let Err(e) = done {
            let mut report = Restored::default();
            for thread in self.threads().collect::<Vec<_>>() {
                hands.restore(thread, &mut report);
            }
            hands.remove(&made, &mut report);
            return Err(e);
        }
        Ok(Group::Made(made, above))
    }

    fn enter(
        &self,
        hands: &mut Hands,
        dir: &std::path::Path,
        above: &std::path::Path,
    ) -> Result<(), ChangeError> {
        let Some(hierarchy) = hands.hierarchy().cloned() else { return Ok(()) };
        for vcpu in self.vcpus.values() {
            match hierarchy.dir_of(&vcpu.thread) {
                Ok(now) if now == dir => {}
                Ok(now) if now == above => {
                    hands.enter(&vcpu.thread, now, dir.to_owned())?;
                }
                // Somebody else has moved it, or it has ended.
                Ok(_) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Reads every vCPU's account; samples of those that live.
    pub(crate) fn sample(&mut self, lend: bool) -> Vec<Sample> {
        let mut samples = Vec::with_capacity(self.vcpus.len());
        for (number, vcpu) in &mut self.vcpus {
            let (Ok(stat), Ok(account)) = (vcpu.thread.stat(), vcpu.thread.schedstat()) else {
                vcpu.gone = true;
                continue;
            };
            vcpu.cpu = stat.cpu;
            vcpu.ready = stat.state == b'R';
            let room = match vcpu.own_attr.fair() && lend {
                true => (vcpu.own_attr.nice + 20, 19 - vcpu.own_attr.nice),
                false => (0, 0),
            };
            samples.push(Sample {
                vcpu: *number,
                run_ns: account.run_ns.saturating_sub(vcpu.last.run_ns),
                wait_ns: account.wait_ns.saturating_sub(vcpu.last.wait_ns),
                ready: vcpu.ready,
                room,
                standing: None,
            });
            vcpu.last = account;
        }
        samples
    }

    /// Its vCPUs that are ready, with their positions, and their numbers.
    pub(crate) fn ready(&self) -> Vec<(u32, Ready)> {
        let ready = |(number, vcpu): (&u32, &Vcpu)| {
            let position =
                (vcpu.ready && !vcpu.gone).then(|| vcpu.thread.position().ok()).flatten()?;
            let ready = Ready {
                tid: vcpu.thread.id().tid,
                cpu: vcpu.cpu,
                vm: Some(self.id),
                group: u64::from(self.id.pid.unsigned_abs()),
                exec_start_ms: position.exec_start_ms,
                vruntime_ms: position.vruntime_ms,
            };
            Some((*number, ready))
        };
        self.vcpus.iter().filter_map(ready).collect()
    }

    /// Whether its vCPUs may lend to each other at nobody else's cost.
    pub(crate) fn may_lend(&self) -> bool {
        self.has_siblings()
            && self.skew_first.is_some()
            && matches!(self.group, Group::Own(_) | Group::Made(..))
    }

    /// Its group, if it may be run whole in turns: one that was made here, for a machine that keeps
    /// every pCPU busy.
    pub(crate) fn gang(&self, pcpus: usize) -> Option<&std::path::Path> {
        let Group::Made(made, _) = &self.group else { return None };
        let busy = self.vcpus.values().filter(|v| !v.gone && v.demand >= BUSY).count();
        (busy >= pcpus.max(2)).then_some(made.dir.as_path())
    }

    /// How many pCPUs its vCPUs want.
    pub(crate) fn demand(&self) -> f64 {
        self.vcpus.values().filter(|v| !v.gone).map(|v| v.demand).sum()
    }

    /// One period has passed.
    pub(crate) fn period(
        &mut self,
        now_ns: u64,
        window_ns: u64,
        samples: &[Sample],
        hands: &mut Hands,
    ) {
        for decision in self.lending.period(now_ns, window_ns, samples) {
            match decision {
                Decision::Settle(loan, _) => {
                    for vcpu in [loan.from, loan.to] {
                        self.set_steps(vcpu, hands);
                    }
                }
                Decision::Lend(loan) => self.lend(loan, hands),
            }
        }
    }

    /// The lender first: if the debtor can't be helped, the lender is put back.
    fn lend(&mut self, loan: Loan, hands: &mut Hands) {
        let done = self.set_steps(loan.from, hands) && self.set_steps(loan.to, hands);
        if !done {
            self.lending.refuse(loan);
            for vcpu in [loan.from, loan.to] {
                self.set_steps(vcpu, hands);
            }
        }
    }

    /// Gives a vCPU the nice and slice that its loans say.
    fn set_steps(&mut self, number: u32, hands: &mut Hands) -> bool {
        let steps = self.lending.steps(number);
        let own_slice = hands.powers().own_slice_ns;
        let Some(vcpu) = self.vcpus.get_mut(&number).filter(|v| !v.gone) else { return false };
        let set = with_steps(vcpu.own_attr, steps, own_slice);
        if set == vcpu.attr {
            return true;
        }
        match hands.set_attr(&vcpu.thread, vcpu.own_attr, vcpu.attr, set) {
            Ok(()) => {
                vcpu.attr = set;
                true
            }
            Err(ChangeError::Gone(_)) => {
                vcpu.gone = true;
                false
            }
            Err(ChangeError::Meddled(_)) => {
                // Its owner's will has changed: that is its own now, and no loan is on it.
                if let Ok(attr) = hands.attr(&vcpu.thread) {
                    (vcpu.own_attr, vcpu.attr) = (attr, attr);
                }
                false
            }
            Err(e) => {
                self.refused = Some(words(&e));
                false
            }
        }
    }

    /// Brings demand and skew up to date, once per scan, from what happened since the last one.
    pub(crate) fn at_scan(&mut self, window_ns: u64) {
        let mut ran = Vec::new();
        for vcpu in self.vcpus.values_mut() {
            let run = vcpu.last.run_ns.saturating_sub(vcpu.at_scan.run_ns);
            let wait = vcpu.last.wait_ns.saturating_sub(vcpu.at_scan.wait_ns);
            vcpu.at_scan = vcpu.last;
            let of = |ns: u64| ns as f64 / window_ns.max(1) as f64;
            vcpu.demand = of(run.saturating_add(wait)).min(1.0);
            if vcpu.demand >= 0.5 {
                ran.push(of(run));
            }
        }
        let most = ran.iter().copied().fold(0.0, f64::max);
        let least = ran.iter().copied().fold(f64::INFINITY, f64::min);
        if ran.len() > 1 && most > 0.0 {
            let skew = (most - least) / most;
            self.skew_first.get_or_insert(skew);
            self.skew = Some(self.skew.map_or(skew, |old| old + (skew - old) / 4.0));
        }
    }

    /// What its vCPUs want of pCPUs. Masks that somebody else has set meanwhile are its owner's
    /// will from now on.
    pub(crate) fn wishes(&mut self, online: &CpuSet) -> Vec<Wish> {
        let mut wishes = Vec::with_capacity(self.vcpus.len());
        for (number, vcpu) in &mut self.vcpus {
            let Ok(now) = sys::get_affinity(vcpu.thread.id().tid) else { continue };
            let expected = vcpu.placed.as_ref().unwrap_or(&vcpu.own_cpus);
            let expected = expected.intersection(online);
            // A thread all of whose pCPUs went offline is let run anywhere by the kernel.
            if !expected.is_empty() && now != expected {
                vcpu.own_cpus = now;
                vcpu.placed = None;
                self.placed_at = None;
            }
            let (allowed, cpu, demand) = (vcpu.own_cpus.clone(), vcpu.cpu, vcpu.demand);
            wishes.push(Wish { vcpu: *number, allowed, cpu, demand });
        }
        wishes
    }

    /// The pCPUs that its vCPUs were given.
    pub(crate) fn placed(&self) -> BTreeMap<u32, CpuSet> {
        self.vcpus.iter().filter_map(|(n, v)| Some((*n, v.placed.clone()?))).collect()
    }

    /// What its vCPUs want of each pCPU, added to `load`; and what they ran on each, in `ran`.
    pub(crate) fn add_load(&self, load: &mut BTreeMap<usize, f64>, online: &CpuSet) {
        for vcpu in self.vcpus.values() {
            let set = vcpu.placed.as_ref().unwrap_or(&vcpu.own_cpus).intersection(online);
            let share = vcpu.demand / set.len().max(1) as f64;
            for cpu in set.iter() {
                *load.entry(cpu).or_default() += share;
            }
        }
    }

    /// Binds its vCPUs; how many were bound anew.
    pub(crate) fn bind(&mut self, placed: &BTreeMap<u32, CpuSet>, hands: &mut Hands) -> u64 {
        let mut bound = 0;
        for (number, set) in placed {
            let Some(vcpu) = self.vcpus.get_mut(number).filter(|v| !v.gone) else { continue };
            if vcpu.placed.as_ref() == Some(set) {
                continue;
            }
            match hands.bind(&vcpu.thread, &vcpu.own_cpus, set) {
                Ok(()) => {
                    vcpu.placed = Some(set.clone());
                    bound += 1;
                }
                Err(ChangeError::Gone(_)) => vcpu.gone = true,
                Err(e) => self.refused = Some(words(&e)),
            }
        }
        self.placed_at = Some(Instant::now());
        bound
    }

    /// It has ended or is let go: everything of it is put back and forgotten.
    pub(crate) fn release(&mut self, hands: &mut Hands, report: &mut Restored) -> bool {
        for thread in self.threads().collect::<Vec<_>>() {
            hands.restore(thread, report);
        }
        match &self.group {
            Group::Made(made, _) => {
                let before = report.groups;
                hands.remove(made, report);
                report.groups > before
            }
            _ => true,
        }
    }

    /// It has ended: so have its loans.
    pub(crate) fn end(&mut self) {
        self.lending.period(u64::MAX, 1, &[]);
    }

    pub(crate) fn ledger(&self) -> crate::lend::Ledger {
        self.lending.ledger()
    }

    pub(crate) fn status(&self) -> VmStatus {
        let (group, mut without) = match &self.group {
            Group::Unknown => ("-".to_owned(), Vec::new()),
            Group::Own(dir) => (dir.display().to_string(), Vec::new()),
            Group::Made(made, _) => (made.dir.display().to_string(), Vec::new()),
            Group::None(why) => ("-".to_owned(), vec![format!("loans: {why}")]),
            Group::Foreign(dir) => {
                let why = "everything: it is in a group that another service made; if none runs, \
                           start one with that service's --state-dir to have it put back";
                (dir.display().to_string(), vec![why.to_owned()])
            }
        };
        if self.vcpus.len() < 2 {
            without.push("everything: it has no sibling vCPUs".to_owned());
        }
        without.extend(self.refused.clone());
        let vcpu = |(number, v): (&u32, &Vcpu)| VcpuStatus {
            vcpu: *number,
            tid: v.thread.id().tid,
            cpus: v.placed.as_ref().unwrap_or(&v.own_cpus).to_string(),
            steps: self.lending.steps(*number),
        };
        VmStatus {
            pid: self.id.pid,
            name: self.name.clone(),
            vcpus: self.vcpus.iter().map(vcpu).collect(),
            group,
            without,
            loans: self.lending.ledger(),
            skew_first: self.skew_first,
            skew: self.skew,
        }
    }
}

impl Vcpu {
    fn new(thread: Thread, hands: &Hands) -> io::Result<Self> {
        let tid = thread.id().tid;
        let attr = hands.attr(&thread)?;
        let stat = thread.stat()?;
        let account = thread.schedstat()?;
        Ok(Self {
            own_cpus: sys::get_affinity(tid)?,
            placed: None,
            own_attr: attr,
            attr,
            last: account,
            at_scan: account,
            cpu: stat.cpu,
            ready: stat.state == b'R',
            demand: 1.0,
            gone: false,
            thread,
        })
    }
}

/// The attributes of a vCPU with loans on it: nice by as many steps, and where the kernel knows
/// slices, half a slice for a debtor, so that its turn comes sooner, and a double one for a lender.
fn with_steps(own: Attr, steps: i32, own_slice_ns: Option<u64>) -> Attr {
    let slice_ns = match own_slice_ns {
        Some(kernels) if steps != 0 => {
            let base = if own.slice_ns == 0 { kernels } else { own.slice_ns };
            let slice = if steps < 0 { base / 2 } else { base.saturating_mul(2) };
            slice.clamp(SLICES_NS.0, SLICES_NS.1)
        }
        _ => own.slice_ns,
    };
    Attr { nice: (own.nice + steps).clamp(-20, 19), slice_ns, ..own }
}

/// An error and what it comes from.
pub(crate) fn words(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(s) = source {
        text += &format!(": {s}");
        source = s.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loan_is_nice_and_slice_together() {
        let own = Attr { policy: 0, reset_on_fork: true, nice: 2, slice_ns: 0 };
        assert_eq!(with_steps(own, 0, Some(3_000_000)), own);
        let debtor = with_steps(own, -2, Some(3_000_000));
        assert_eq!((debtor.nice, debtor.slice_ns, debtor.reset_on_fork), (0, 1_500_000, true));
        let lender = with_steps(own, 2, Some(3_000_000));
        assert_eq!((lender.nice, lender.slice_ns), (4, 6_000_000));
        assert_eq!(with_steps(own, -2, None).slice_ns, 0);
        let long = with_steps(Attr { slice_ns: 90_000_000, ..own }, 1, Some(3_000_000));
        assert_eq!(long.slice_ns, 100_000_000);
    }
}
