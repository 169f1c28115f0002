//! What a stretch of a simulation looked like: who ran where, who spun, who lent.

use super::{Doing, Simulator};
use crate::sbco::Loan;
use crate::scheduler::{CpuId, TaskId, VmId};

/// What a pCPU did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// A task made progress, or paid for an interrupt.
    Works,
    /// A vCPU waited for a sibling.
    Spins,
    /// It changed from one task to another.
    Switches,
    /// Nothing.
    Idles,
}

/// A pCPU did one thing for some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Where.
    pub cpu: CpuId,
    /// From when, nanoseconds.
    pub from: u64,
    /// Until when.
    pub until: u64,
    /// What.
    pub activity: Activity,
    /// Who; nobody when it idled.
    pub task: Option<TaskId>,
    /// Whose vCPU that is.
    pub vm: Option<VmId>,
}

/// A loan, and where it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lent {
    /// When, nanoseconds.
    pub at: u64,
    /// Where the lender gave way.
    pub from: CpuId,
    /// Where the debtor waits.
    pub to: CpuId,
    /// Who lent what to whom.
    pub loan: Loan,
}

/// A record of `from` to `until`.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// Its beginning, nanoseconds.
    pub from: u64,
    /// Its end.
    pub until: u64,
    /// What the pCPUs did, in the order in which it ended.
    pub spans: Vec<Span>,
    /// What was lent.
    pub lent: Vec<Lent>,
    /// It was full before its end.
    pub truncated: bool,
    /// The last span of each pCPU.
    last: Vec<Option<usize>>,
}

/// Spans that a record holds at most.
const MOST: usize = 200_000;

impl Record {
    fn add(&mut self, span: Span) {
        let (from, until) = (span.from.max(self.from), span.until.min(self.until));
        if from >= until {
            return;
        }
        let cpu = span.cpu.0 as usize;
        if let Some(last) = self.last[cpu].map(|i| &mut self.spans[i])
            && (last.until, last.activity, last.task) == (from, span.activity, span.task)
        {
            last.until = until;
            return;
        }
        if self.spans.len() == MOST {
            self.truncated = true;
            return;
        }
        self.last[cpu] = Some(self.spans.len());
        self.spans.push(Span { from, until, ..span });
    }
}

impl Simulator {
    /// Keeps a record of `from` to `until` nanoseconds, from now on.
    pub fn record(&mut self, from: u64, until: u64) {
        let last = vec![None; self.cpus.len()];
        self.record = Some(Box::new(Record { from, until, last, ..Record::default() }));
    }

    /// Ends a record and gives it.
    pub fn take_record(&mut self) -> Option<Record> {
        self.record.take().map(|r| *r)
    }

    /// `cpu` did what it does from `from` until now.
    pub(super) fn note(&mut self, cpu: u32, from: u64) {
        let Some(record) = &mut self.record else { return };
        let task = self.cpus[cpu as usize].running;
        let v = task.map(|t| &self.vcpus[t.0 as usize]);
        let activity = match v.map(|v| v.doing) {
            None => Activity::Idles,
            Some(
                Doing::SpinLock(..)
                | Doing::SpinBarrier(..)
                | Doing::SpinPut(_)
                | Doing::SpinGet(_)
                | Doing::SpinAnswers(_),
            ) => Activity::Spins,
            Some(_) => Activity::Works,
        };
        let vm = v.and_then(|v| v.vm);
        record.add(Span { cpu: CpuId(cpu), from, until: self.now, activity, task, vm });
    }

    /// `cpu` changes to what it runs now; that takes until `until`.
    pub(super) fn note_switch(&mut self, cpu: u32, from: u64, until: u64) {
        let Some(record) = &mut self.record else { return };
        let task = self.cpus[cpu as usize].running;
        let vm = task.and_then(|t| self.vcpus[t.0 as usize].vm);
        let activity = Activity::Switches;
        record.add(Span { cpu: CpuId(cpu), from, until, activity, task, vm });
    }

    /// `cpu` has decided: somebody may have lent.
    pub(super) fn note_loan(&mut self, cpu: u32) {
        let now = self.now;
        let Some(record) = &mut self.record else { return };
        let Some(loan) = self.scheduler.take_last_loan() else { return };
        let to = self.scheduler.cpu_of(loan.debtor).unwrap_or(CpuId(cpu));
        if (record.from..record.until).contains(&now) && record.lent.len() < MOST {
            record.lent.push(Lent { at: now, from: CpuId(cpu), to, loan });
        }
    }
}
