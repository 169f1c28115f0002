//! What must hold of all run queues at any time; for the tests.

use crate::scheduler::{CpuId, Place, Scheduler, Task, TaskId};

impl Scheduler {
    /// Whether every task is where it says, and every load is the sum that it should be; for the
    /// tests.
    ///
    /// # Errors
    /// What is wrong.
    #[doc(hidden)]
    pub fn audit(&self) -> Result<(), &'static str> {
        let mut found = 0;
        for (i, cpu) in self.cpus.iter().enumerate() {
            cpu.tree.audit()?;
            let here = |t: &TaskId| self.task(*t).cpu == CpuId(i as u32);
            let queued: Vec<TaskId> = cpu.tree.iter().map(|(_, k)| TaskId(k.task)).collect();
            if !queued.iter().all(|t| here(t) && matches!(self.task(*t).place, Place::Queued(_))) {
                return Err("what is in a tree says so");
            }
            if !cpu.current.iter().all(|t| here(t) && self.task(*t).place == Place::Running) {
                return Err("what runs says so");
            }
            let all = queued.iter().chain(cpu.current.iter());
            if all.clone().map(|t| self.task(*t).weight).sum::<u64>() != cpu.load {
                return Err("a load is the sum of its weights");
            }
            let each =
                |t: &TaskId| i128::from(self.task(*t).weight) * i128::from(self.task(*t).vruntime);
            if all.clone().map(each).sum::<i128>() != cpu.sum {
                return Err("a sum is that of its virtual runtimes");
            }
            if !cpu.online && all.clone().next().is_some() {
                return Err("nothing is left on a pCPU that is gone");
            }
            found += all.count();
        }
        let awake = |t: &&Task| matches!(t.place, Place::Queued(_) | Place::Running);
        if found != self.tasks.iter().filter(awake).count() {
            return Err("what is runnable is on one run queue");
        }
        let owed: i64 = self.accounts.iter().sum();
        if owed != self.ledger.outstanding || !self.ledger.balanced() {
            return Err("lending is zero-sum");
        }
        Ok(())
    }
}
