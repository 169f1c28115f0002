//! What holds for every policy, whatever happens to the tasks.

use godwit_sched::policy::{Granularity, Policy};
use godwit_sched::scheduler::{CpuId, NICE_0, Scheduler, TaskId};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Act {
    Wake(usize),
    /// The running task of a pCPU sleeps.
    Sleep(usize),
    Exit(usize),
    /// A pCPU's task runs for so many microseconds, then the pCPU decides.
    Run(usize, u32),
    Balance(usize),
    Offline(usize),
    Online(usize),
    /// A vCPU is hot-plugged into a machine.
    Plug(usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let n = any::<usize>;
    let act = prop_oneof![
        4 => n().prop_map(Act::Wake),
        2 => n().prop_map(Act::Sleep),
        1 => n().prop_map(Act::Exit),
        12 => (n(), 0..20_000_u32).prop_map(|(c, us)| Act::Run(c, us)),
        2 => n().prop_map(Act::Balance),
        1 => n().prop_map(Act::Offline),
        1 => n().prop_map(Act::Online),
        1 => n().prop_map(Act::Plug),
    ];
    proptest::collection::vec(act, 1..250)
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (0..Policy::NAMED.len()).prop_map(|i| Policy::NAMED[i].1)
}

proptest! {
    #[test]
    fn no_task_is_lost_and_lending_is_zero_sum(
        policy in any_policy(), cpus in 1usize..6, vms in 1usize..5, acts in acts(), seed: u64,
    ) {
        let mut s = Scheduler::new(cpus, policy, Granularity::linux_2_6_34(cpus), seed);
        let mut tasks = Vec::new();
        let vms: Vec<_> = (0..vms).map(|_| s.add_vm()).collect();
        for vm in &vms {
            tasks.extend((0..cpus).map(|_| s.add_task(Some(*vm), NICE_0)));
        }
        tasks.push(s.add_task(None, 3 * NICE_0));
        let mut ended = vec![false; tasks.len()];
        for act in acts {
            let cpu = |c: usize| CpuId((c % cpus) as u32);
            match act {
                Act::Wake(t) if !ended[t % tasks.len()] => {
                    s.wake(tasks[t % tasks.len()]);
                }
                Act::Wake(_) => {}
                Act::Sleep(c) => s.sleep(cpu(c)),
                Act::Exit(t) => {
                    s.exit(tasks[t % tasks.len()]);
                    ended[t % tasks.len()] = true;
                }
                Act::Run(c, us) => {
                    s.charge(cpu(c), u64::from(us) * 1000);
                    let waiting = s.queue_size(cpu(c)) > 0;
                    let picked = s.pick(cpu(c)).is_some();
                    if policy == Policy::RELAXED {
                        prop_assert!(waiting || !picked);
                    } else {
                        prop_assert_eq!(picked, waiting, "work is never left lying");
                    }
                    for other in s.kicks() {
                        s.pick(other);
                    }
                }
                Act::Balance(c) => {
                    s.balance(cpu(c));
                }
                Act::Offline(c) => {
                    s.set_offline(cpu(c));
                }
                Act::Online(c) => s.set_online(cpu(c)),
                Act::Plug(v) => {
                    tasks.push(s.add_task(Some(vms[v % vms.len()]), NICE_0));
                    ended.push(false);
                }
            }
            prop_assert_eq!(s.audit(), Ok(()));
        }
    }

    /// No starvation: whatever a policy does for siblings, every vCPU runs within a few periods, none
    /// gets more than its part, and no vruntime runs away from its queue.
    #[test]
    fn every_vcpu_runs_and_gets_its_part(
        policy in any_policy(),
        vms in 2usize..12, offsets in proptest::collection::vec(0u64..8_000_000, 4), seed: u64,
    ) {
        const CPUS: usize = 4;
        let g = Granularity::linux_2_6_34(CPUS);
        let mut s = Scheduler::new(CPUS, policy, g, seed);
        let mut tasks: Vec<TaskId> = Vec::new();
        for _ in 0..vms {
            let vm = s.add_vm();
            for _ in 0..CPUS {
                let t = s.add_task(Some(vm), NICE_0);
                s.wake(t);
                tasks.push(t);
            }
        }
        let period = g.period(vms);
        let mut last_ran = vec![0_u64; tasks.len()];
        // The pCPUs decide at times of their own.
        let mut next: Vec<u64> = offsets;
        let mut since = [None::<u64>; CPUS];
        // CFS lets what is created first on an idle pCPU start a whole period behind; that is
        // over by then.
        let begin = 10 * period;
        // Loans go on for many periods: what one gets in 60 of them is not its part yet.
        let end = begin + 200 * period;
        let mut ran_before = vec![None::<u64>; tasks.len()];
        loop {
            let cpu = (0..CPUS).min_by_key(|c| next[*c]).expect("some");
            let now = next[cpu];
            if now > end {
                break;
            }
            if let Some(began) = since[cpu] {
                s.charge(CpuId(cpu as u32), now - began);
            }
            let pick = s.pick(CpuId(cpu as u32));
            prop_assert!(pick.is_some() || policy == Policy::RELAXED, "there is work");
            for other in s.kicks() {
                // An interrupt: that pCPU decides now, too.
                next[other.0 as usize] = now;
            }
            let Some(pick) = pick else {
                // All have to stop: until an interrupt, or the next tick.
                since[cpu] = None;
                next[cpu] = now + 1_000_000;
                continue;
            };
            let i = pick.task.0 as usize;
            if now >= begin {
                if ran_before[i].is_none() {
                    for (n, t) in tasks.iter().enumerate() {
                        ran_before[n].get_or_insert(s.ran(*t));
                    }
                }
                let waited = now - last_ran[i];
                prop_assert!(waited <= 4 * period, "vCPU {i} waited {waited} of {period} ns");
            }
            last_ran[i] = now;
            since[cpu] = Some(now);
            next[cpu] = now + pick.slice;
        }
        for (i, t) in tasks.iter().enumerate() {
            prop_assert!(end - last_ran[i] <= 4 * period, "vCPU {i} waits for ever");
            prop_assert!(s.lead(*t).unsigned_abs() <= 3 * period, "{} ahead", s.lead(*t));
            // Each pCPU has one vCPU of each machine, or as many of any.
            let part = (end - begin) as f64 / vms as f64;
            let got = (s.ran(*t) - ran_before[i].unwrap_or(0)) as f64 / part;
            // What stops leaves its pCPU idle.
            let (least, most) = match policy {
                Policy::RELAXED => (0.5, 1.15),
                // In pairs four never settle, so that loans go on for ever.
                Policy::SBCO_PAIRS => (0.75, 1.25),
                _ => (0.85, 1.15),
            };
            prop_assert!((least..most).contains(&got), "vCPU {i} got {got:.2} of its part");
        }
        prop_assert_eq!(s.audit(), Ok(()));
    }

    #[test]
    fn siblings_stay_apart(
        policy in any_policy().prop_filter("keeps siblings apart", |p| p.distinct),
        acts in acts(), seed: u64,
    ) {
        const CPUS: usize = 4;
        let mut s = Scheduler::new(CPUS, policy, Granularity::linux_2_6_34(CPUS), seed);
        let vms: Vec<_> = (0..3).map(|_| s.add_vm()).collect();
        let tasks: Vec<_> =
            (0..12).map(|i| s.add_task(Some(vms[i % 3]), NICE_0)).collect();
        for act in acts {
            match act {
                Act::Wake(t) => {
                    s.wake(tasks[t % tasks.len()]);
                }
                Act::Sleep(c) => s.sleep(CpuId((c % CPUS) as u32)),
                Act::Run(c, us) => {
                    s.charge(CpuId((c % CPUS) as u32), u64::from(us) * 1000);
                    s.pick(CpuId((c % CPUS) as u32));
                }
                Act::Balance(c) => {
                    s.balance(CpuId((c % CPUS) as u32));
                }
                _ => {}
            }
            for vm in &vms {
                prop_assert!(!s.is_stacked(*vm));
            }
        }
    }
}

/// Two machines of two vCPUs each and two of their pCPUs, on which one goes on alone until it has
/// lent.
fn until_somebody_has_lent(seed: u64) -> (Scheduler, Vec<TaskId>) {
    let mut s = Scheduler::new(2, Policy::SBCO, Granularity::linux_2_6_34(2), seed);
    let vms: Vec<_> = (0..4).map(|_| s.add_vm()).collect();
    let mut tasks = Vec::new();
    for vm in &vms {
        for _ in 0..2 {
            let t = s.add_task(Some(*vm), NICE_0);
            s.wake(t);
            tasks.push(t);
        }
    }
    s.pick(CpuId(1));
    for _ in 0..64 {
        if s.ledger().lent > 0 {
            break;
        }
        s.charge(CpuId(0), 3_000_000);
        s.pick(CpuId(0));
    }
    assert!(s.ledger().lent > 0, "seed {seed}: nothing was lent");
    (s, tasks)
}

/// Debtors that have ended get nothing; what their machines paid comes back to who is left of them.
#[test]
fn what_nobody_was_left_to_get_comes_back() {
    for seed in 0..200 {
        let (mut s, tasks) = until_somebody_has_lent(seed);
        let lent = s.ledger();
        for t in tasks {
            if s.cpu_of(t) == Some(CpuId(1)) {
                s.exit(t);
            }
        }
        for _ in 0..200 {
            s.pick(CpuId(1));
            s.charge(CpuId(0), 3_000_000);
            s.pick(CpuId(0));
            assert_eq!(s.audit(), Ok(()));
        }
        let end = s.ledger();
        assert_eq!((end.settled, end.moved), (lent.settled, lent.moved), "seed {seed}");
        let back = end.lent + end.repaid - end.settled - end.returned;
        assert_eq!((end.outstanding, back), (0, 0), "seed {seed}");
    }
}

/// A lender that is killed between the loan and its settlement: its machine's debtor gets what it
/// needs, and what was paid is accounted for; with the machine the account goes.
#[test]
fn a_lender_that_is_killed_takes_nothing_along() {
    for seed in 0..200 {
        let (mut s, tasks) = until_somebody_has_lent(seed);
        let lender = s.take_last_loan().expect("a loan").lender;
        s.exit(lender);
        assert_eq!(s.audit(), Ok(()));
        for _ in 0..20 {
            for cpu in [CpuId(1), CpuId(0)] {
                s.charge(cpu, 3_000_000);
                s.pick(cpu);
            }
            assert_eq!(s.audit(), Ok(()));
        }
        for t in tasks {
            s.exit(t);
        }
        assert_eq!(s.audit(), Ok(()));
        assert_eq!(s.ledger().outstanding, 0, "seed {seed}");
    }
}
