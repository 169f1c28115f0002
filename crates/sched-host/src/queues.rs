//! What the run queues of a live host look like, from what the kernel tells of each thread: who
//! runs, who waits and in which order. Pure; [`crate::observe`] fetches.
//!
//! **Order.** A queue is ordered by virtual runtime, which is comparable within one group of
//! threads only. Where those who wait for a pCPU belong to several groups (one per machine, or
//! autogroups), they are ordered by when each last ran: with equal weights that is the order in
//! which their turns come. [`Order`] says which it was.
//!
//! **Ordinates** count as in [`godwit_sched::sbco`]: from 0 among those who wait; who runs has none.

use std::collections::BTreeMap;

use godwit_sched::policy::Alpha;

use crate::discover::VmId;

/// A thread that runs or waits for a pCPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ready {
    /// Its number.
    pub tid: i32,
    /// The pCPU on whose queue it stands.
    pub cpu: usize,
    /// Whose vCPU it is.
    pub vm: Option<VmId>,
    /// The group in which its virtual runtime counts; any number that differs between groups.
    pub group: u64,
    /// When it was last put on or taken off a pCPU, milliseconds of the pCPU's clock.
    pub exec_start_ms: f64,
    /// Its virtual runtime, milliseconds.
    pub vruntime_ms: f64,
}

/// By what a queue was ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// By virtual runtime.
    Vruntime,
    /// By when each last ran.
    LastRun,
}

/// One pCPU's run queue.
#[derive(Debug, Clone, PartialEq)]
pub struct Queue {
    /// Who runs: whoever was put on the pCPU last.
    pub running: Ready,
    /// Who waits, the next one first.
    pub waiting: Vec<Ready>,
    /// How they were ordered.
    pub order: Order,
}

/// Sorts threads that are ready into the queues of their pCPUs.
#[must_use]
pub fn queues(ready: &[Ready]) -> BTreeMap<usize, Queue> {
    let mut by_cpu: BTreeMap<usize, Vec<Ready>> = BTreeMap::new();
    for thread in ready {
        by_cpu.entry(thread.cpu).or_default().push(*thread);
    }
    by_cpu
        .into_iter()
        .filter_map(|(cpu, mut waiting)| {
            let last = waiting
                .iter()
                .enumerate()
                .max_by(|(_, a), (_, b)| a.exec_start_ms.total_cmp(&b.exec_start_ms))
                .map(|(i, _)| i)?;
            let running = waiting.swap_remove(last);
            let one_group = waiting.windows(2).all(|w| w[0].group == w[1].group);
            let order = if one_group { Order::Vruntime } else { Order::LastRun };
            waiting.sort_by(|a, b| {
                let by = match order {
                    Order::Vruntime => a.vruntime_ms.total_cmp(&b.vruntime_ms),
                    Order::LastRun => a.exec_start_ms.total_cmp(&b.exec_start_ms),
                };
                by.then(a.tid.cmp(&b.tid))
            });
            Some((cpu, Queue { running, waiting, order }))
        })
        .collect()
}

/// Counts over samples; the tables are ratios of these.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Samples in which at least two vCPUs of the machine were ready.
    pub parallel: u64,
    /// Those of them in which two stood on one pCPU's queue (table 4.2).
    pub stacked: u64,
    /// Times that a vCPU was next on its pCPU and had a sibling that waited elsewhere.
    pub compared: u64,
    /// Those of them in which a sibling was as far away as the threshold (table 4.3).
    pub far: u64,
    /// Samples in which a vCPU ran and a sibling was ready but waited: where a lock's holder may
    /// be the one that waits.
    pub waited_beside: u64,
    /// Samples in which at least two vCPUs ran at once.
    pub together: u64,
}

impl Counts {
    /// Counts one sample of the machine `vm`.
    pub fn add(&mut self, vm: VmId, queues: &BTreeMap<usize, Queue>, alpha: Alpha) {
        let (mut ready, mut running, mut waiting, mut stacked) = (0, 0, 0, false);
        for queue in queues.values() {
            let runs = usize::from(queue.running.vm == Some(vm));
            let waits = queue.waiting.iter().filter(|r| r.vm == Some(vm)).count();
            ready += runs + waits;
            running += runs;
            waiting += waits;
            stacked |= runs + waits > 1;
        }
        self.parallel += u64::from(ready > 1);
        self.stacked += u64::from(stacked);
        self.waited_beside += u64::from(running > 0 && waiting > 0);
        self.together += u64::from(running > 1);
        for (cpu, queue) in queues {
            if queue.waiting.first().is_none_or(|first| first.vm != Some(vm)) {
                continue;
            }
            let elsewhere = queues.iter().filter(|(c, _)| *c != cpu).flat_map(|(_, q)| {
                let size = q.waiting.len();
                let siblings = q.waiting.iter().enumerate().filter(|(_, r)| r.vm == Some(vm));
                siblings.map(move |(ordinate, _)| alpha.reached(ordinate, size))
            });
            if let Some(far) = elsewhere.reduce(|a, b| a | b) {
                self.compared += 1;
                self.far += u64::from(far);
            }
        }
    }

    /// The sum of two.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            parallel: self.parallel + other.parallel,
            stacked: self.stacked + other.stacked,
            compared: self.compared + other.compared,
            far: self.far + other.far,
            waited_beside: self.waited_beside + other.waited_beside,
            together: self.together + other.together,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vm(pid: i32) -> VmId {
        VmId { pid, start: 1 }
    }

    /// `(pCPU, machine, group, when it last ran, vruntime)`
    fn ready(tid: i32, (cpu, of, group, at, vruntime): (usize, i32, u64, f64, f64)) -> Ready {
        Ready {
            tid,
            cpu,
            vm: (of > 0).then(|| vm(of)),
            group,
            exec_start_ms: at,
            vruntime_ms: vruntime,
        }
    }

    fn snapshot(threads: &[(usize, i32, u64, f64, f64)]) -> BTreeMap<usize, Queue> {
        let threads: Vec<Ready> = threads.iter().zip(1..).map(|(t, tid)| ready(tid, *t)).collect();
        queues(&threads)
    }

    #[test]
    fn one_group_is_ordered_by_vruntime_and_several_by_their_last_turn() {
        let q = snapshot(&[(0, 1, 7, 30.0, 9.0), (0, 2, 7, 10.0, 5.0), (0, 3, 7, 20.0, 4.0)]);
        assert_eq!(q[&0].running.tid, 1);
        assert_eq!(q[&0].waiting.iter().map(|r| r.tid).collect::<Vec<_>>(), [3, 2]);
        assert_eq!(q[&0].order, Order::Vruntime);
        let q = snapshot(&[(0, 1, 7, 30.0, 9.0), (0, 2, 8, 10.0, 5.0), (0, 3, 9, 20.0, 4.0)]);
        assert_eq!(q[&0].waiting.iter().map(|r| r.tid).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(q[&0].order, Order::LastRun);
    }

    #[test]
    fn siblings_on_one_queue_are_stacked() {
        let q = snapshot(&[(0, 1, 1, 2.0, 0.0), (0, 1, 1, 1.0, 0.0), (1, 2, 1, 1.0, 0.0)]);
        let mut counts = Counts::default();
        counts.add(vm(1), &q, Alpha::THESIS);
        assert_eq!((counts.parallel, counts.stacked, counts.waited_beside), (1, 1, 1));
        assert_eq!((counts.together, counts.compared), (0, 0));
        let mut other = Counts::default();
        other.add(vm(2), &q, Alpha::THESIS);
        assert_eq!(other, Counts::default());
    }

    #[test]
    fn a_sibling_two_thirds_of_its_queue_away_is_far() {
        let mut threads = vec![(0, 9, 1, 9.0, 9.0), (0, 1, 1, 1.0, 1.0), (1, 9, 1, 9.0, 9.0)];
        // On pCPU 1 three others wait before the sibling: ordinate 3 of 4.
        threads.extend([(1, 2, 1, 1.0, 1.0), (1, 3, 1, 2.0, 2.0), (1, 4, 1, 3.0, 3.0)]);
        threads.push((1, 1, 1, 4.0, 4.0));
        let mut counts = Counts::default();
        counts.add(vm(1), &snapshot(&threads), Alpha::THESIS);
        assert_eq!((counts.compared, counts.far), (1, 1));
        // Two before it: ordinate 2 of 4, below 2.67.
        threads.swap_remove(3);
        threads.push((1, 5, 1, 5.0, 5.0));
        let mut counts = Counts::default();
        counts.add(vm(1), &snapshot(&threads), Alpha::THESIS);
        assert_eq!((counts.compared, counts.far), (1, 0));
    }

    proptest! {
        #[test]
        fn every_vcpu_is_on_exactly_one_queue(
            threads in proptest::collection::vec(
                (0usize..4, 0i32..4, 0u64..3, -1e9f64..1e9, -1e9f64..1e9), 0..60)
        ) {
            let q = snapshot(&threads);
            let mut seen: Vec<i32> = q.values()
                .flat_map(|q| q.waiting.iter().chain([&q.running]).map(|r| r.tid)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (1..=threads.len() as i32).collect::<Vec<_>>());
            for of in 1..4 {
                let mut counts = Counts::default();
                counts.add(vm(of), &q, Alpha::THESIS);
                prop_assert!(counts.stacked <= counts.parallel && counts.far <= counts.compared);
                prop_assert!(counts.together <= counts.parallel);
            }
        }
    }
}
