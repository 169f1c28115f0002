//! The rivals do what they are known for.

use godwit_sched::eevdf::Yielded;
use godwit_sched::policy::{Alpha, Coupling, Credit, Granularity, Policy};
use godwit_sched::scheduler::{CpuId, NICE_0, Scheduler, TaskId, VmId};
use godwit_sched::sim::guest::{Level, Program, Step};
use godwit_sched::sim::workload::Workload;
use godwit_sched::sim::{Costs, Simulator};
use rand::rngs::SmallRng;

const MS: u64 = 1_000_000;
const CPUS: usize = 4;

/// How often, of a thousand looks, all pCPUs run the same machine.
fn together(policy: Policy, seed: u64) -> usize {
    let mut sim = Simulator::new(CPUS, policy, Costs::DEFAULT, seed);
    let vms: Vec<VmId> =
        (0..4).map(|i| Workload::SuperPi.start(&mut sim, CPUS, 0, i * 37 * MS)).collect();
    let mut together = 0;
    for look in 0..1000 {
        sim.run_until(1_000 * MS + look * 5 * MS);
        let s = sim.scheduler();
        let current: Vec<_> = (0..CPUS as u32).filter_map(|c| s.current(CpuId(c))).collect();
        let all = |vm: &VmId| current.iter().all(|t| s.vcpus(*vm).contains(t));
        together += usize::from(vms.iter().any(all));
    }
    together
}

/// Section 4.7: a threshold of zero is strict co-scheduling.
#[test]
fn without_distance_siblings_run_together() {
    assert_eq!(Policy::STRICT.coupling, Coupling::Distance(Alpha::new(0, 1).expect("zero")));
    for seed in 0..3 {
        let strict = together(Policy::STRICT, seed);
        let balanced = together(Policy::BAL, seed);
        assert!(strict > 900, "seed {seed}: {strict} of 1000");
        assert!(balanced < strict / 2, "seed {seed}: {balanced} beside {strict} of 1000");
    }
}

/// How far siblings of two machines get apart within 5 s, where the host keeps one pCPU busier.
fn skew(policy: Policy, seed: u64) -> u64 {
    let mut sim = Simulator::new(CPUS, policy, Costs::DEFAULT, seed);
    let vms: Vec<VmId> = (0..2).map(|_| Workload::SuperPi.start(&mut sim, CPUS, 0, 0)).collect();
    sim.add_host_task(Box::new(|_: &mut SmallRng| Step::Compute(100 * MS)), 0);
    let mut most = 0;
    for look in 100..1000 {
        sim.run_until(look * 5 * MS);
        let s = sim.scheduler();
        for vm in &vms {
            let ran = || s.vcpus(*vm).iter().map(|t| s.ran(*t));
            most = most.max(ran().max().unwrap_or(0) - ran().min().unwrap_or(0));
        }
    }
    most
}

#[test]
fn relaxed_co_scheduling_bounds_the_skew() {
    for seed in 0..3 {
        let (free, bound) = (skew(Policy::BAL, seed), skew(Policy::RELAXED, seed));
        assert!(bound < free / 4, "seed {seed}: {} beside {} ms", bound / MS, free / MS);
        assert!(bound < 3 * 15 * MS, "seed {seed}: {} ms", bound / MS);
    }
}

fn queues(policy: Policy, vms: usize) -> (Scheduler, Vec<TaskId>) {
    let mut s = Scheduler::new(2, policy, Granularity::linux_2_6_34(2), 7);
    let mut tasks = Vec::new();
    for _ in 0..vms {
        let vm = s.add_vm();
        for _ in 0..2 {
            let t = s.add_task(Some(vm), NICE_0);
            s.wake(t);
            tasks.push(t);
        }
    }
    (s, tasks)
}

/// The hint is dropped where its target has had more than its part; credit makes it hold.
#[test]
fn credit_makes_a_directed_yield_hold() {
    let mut held = [0, 0];
    for round in 0..20 {
        for (i, credit) in [Credit::None, Credit::Lag].into_iter().enumerate() {
            let (mut s, _) = queues(Policy::YIELD, 4);
            for step in 0..20 + round {
                for cpu in [CpuId(0), CpuId(1)] {
                    s.charge(cpu, 1_400_000 - step * 10_000);
                    s.pick(cpu);
                }
            }
            let from = s.current(CpuId(0)).expect("busy");
            // Who ran there just before has had more than its part.
            let to = s.current(CpuId(1)).expect("busy");
            s.charge(CpuId(1), 3_000_000);
            s.pick(CpuId(1));
            if s.current(CpuId(1)) == Some(to) {
                continue;
            }
            assert_eq!(s.yield_to(from, to, credit), Yielded::Asked);
            assert_eq!(s.kicks(), [CpuId(1)]);
            s.pick(CpuId(1));
            held[i] += usize::from(s.current(CpuId(1)) == Some(to));
            assert_eq!(s.audit(), Ok(()));
        }
    }
    assert_eq!(held[0], 0, "of {held:?}");
    assert!(held[1] >= 10, "{held:?}");
}

#[test]
fn nothing_is_given_where_all_are_alone_or_awake() {
    let (mut s, tasks) = queues(Policy::YIELD, 1);
    s.pick(CpuId(0));
    let (from, to) = (s.current(CpuId(0)).expect("busy"), tasks[1]);
    let to = if to == from { tasks[0] } else { to };
    assert_eq!(s.yield_to(from, to, Credit::None), Yielded::Alone);
    s.pick(CpuId(1));
    assert_eq!(s.yield_to(from, to, Credit::None), Yielded::No);
}

fn steps(steps: Vec<Step>) -> Box<dyn Program> {
    let mut left = steps.into_iter();
    Box::new(move |_: &mut SmallRng| left.next().unwrap_or(Step::Exit))
}

/// Pause-loop exiting tells of the guest's kernel: with one pCPU for both, the spinner on a lock of
/// the kernel leaves to its holder at once, the one on a program's lock burns its slices.
#[test]
fn a_spinner_in_the_kernel_leaves_to_the_holder() {
    let spun = |policy, level| {
        let mut sim = Simulator::new(1, policy, Costs::DEFAULT, 1);
        let vm = sim.add_vm();
        let lock = sim.add_lock(level);
        sim.add_vcpu(vm, steps(vec![Step::Critical(lock, 40 * MS)]), 0);
        sim.add_vcpu(vm, steps(vec![Step::Critical(lock, MS)]), 0);
        sim.run_until_end(vm, 1000 * MS).expect("ends");
        sim.report(vm).spun
    };
    let burnt = spun(Policy::EEVDF, Level::Kernel);
    assert!(burnt > 20 * MS, "{burnt}");
    for policy in [Policy::YIELD, Policy::YIELD_CREDIT] {
        let kernel = spun(policy, Level::Kernel);
        assert!(kernel < burnt / 10, "{policy}: {kernel} beside {burnt}");
        assert_eq!(spun(policy, Level::User), burnt);
    }
}

/// No pair of spinners may hand a pCPU to and fro for ever while the holder waits, or drive it off
/// before its caches are warm.
#[test]
fn directed_yields_come_to_an_end() {
    for policy in [Policy::YIELD, Policy::YIELD_CREDIT] {
        for (seed, others) in [(0, 1), (1, 1), (0, 3)] {
            let run = |policy| {
                let mut sim = Simulator::new(CPUS, policy, Costs::DEFAULT, seed);
                for i in 1..=others {
                    Workload::SuperPi.start(&mut sim, CPUS, 0, i * 37 * MS);
                }
                let vm = Workload::Kernbench.start(&mut sim, CPUS, 500 * MS, 300 * MS);
                sim.run_until_end(vm, 60_000 * MS).expect("ends")
            };
            let (with, without) = (run(policy), run(Policy::EEVDF));
            assert!(with < 2 * without, "{policy}: {with} beside {without}");
        }
    }
}
