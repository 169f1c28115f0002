//! The simulator: nothing is made of nothing, and one seed gives one result.

use godwit_sched::policy::Policy;
use godwit_sched::sim::guest::{Level, Step};
use godwit_sched::sim::workload::Workload;
use godwit_sched::sim::{Costs, Simulator};
use rand::rngs::SmallRng;

const MS: u64 = 1_000_000;
const FREE: Costs =
    Costs { switch: 0, refill: 0, interrupt: 0, tick: 0, ordering: 0, ..Costs::DEFAULT };

fn steps(steps: Vec<Step>) -> Box<dyn godwit_sched::sim::guest::Program> {
    let mut left = steps.into_iter();
    Box::new(move |_: &mut SmallRng| left.next().unwrap_or(Step::Exit))
}

#[test]
fn alone_a_program_takes_what_it_takes() {
    let mut sim = Simulator::new(2, Policy::DFT, FREE, 1);
    let vm = sim.add_vm();
    let lock = sim.add_lock(Level::Kernel);
    sim.add_vcpu(vm, steps(vec![Step::Compute(7 * MS), Step::Critical(lock, 2 * MS)]), 0);
    assert_eq!(sim.run_until_end(vm, 1000 * MS), Some(9 * MS));
    assert_eq!(sim.report(vm).spun, 0);
}

#[test]
fn a_spinner_waits_for_the_holder() {
    let mut sim = Simulator::new(2, Policy::BAL, FREE, 1);
    let vm = sim.add_vm();
    let lock = sim.add_lock(Level::Kernel);
    sim.add_vcpu(vm, steps(vec![Step::Critical(lock, 5 * MS)]), 0);
    sim.add_vcpu(vm, steps(vec![Step::Compute(MS), Step::Critical(lock, MS)]), 0);
    assert_eq!(sim.run_until_end(vm, 1000 * MS), Some(6 * MS));
    assert_eq!(sim.report(vm).spun, 4 * MS);
}

/// Lock-holder preemption, the thesis' problem: with one pCPU for both, the spinner burns its
/// slices while the holder waits.
#[test]
fn a_stacked_spinner_burns_its_slice() {
    let mut sim = Simulator::new(1, Policy::DFT, FREE, 1);
    let vm = sim.add_vm();
    let lock = sim.add_lock(Level::Kernel);
    sim.add_vcpu(vm, steps(vec![Step::Critical(lock, 40 * MS)]), 0);
    sim.add_vcpu(vm, steps(vec![Step::Critical(lock, MS)]), 0);
    let ended = sim.run_until_end(vm, 1000 * MS).expect("ends");
    let spun = sim.report(vm).spun;
    assert!(spun > 20 * MS, "spun {spun}");
    assert_eq!(ended, 41 * MS + spun);
}

#[test]
fn a_barrier_joins_and_a_pipeline_hands_on() {
    let mut sim = Simulator::new(2, Policy::BAL, FREE, 1);
    let vm = sim.add_vm();
    let barrier = sim.add_barrier(2);
    let fifo = sim.add_fifo(1);
    let put = vec![Step::Compute(3 * MS), Step::Barrier(barrier), Step::Put(fifo), Step::Put(fifo)];
    let get = vec![Step::Barrier(barrier), Step::Compute(2 * MS), Step::Get(fifo), Step::Get(fifo)];
    sim.add_vcpu(vm, steps(put), 0);
    sim.add_vcpu(vm, steps(get), 0);
    assert_eq!(sim.run_until_end(vm, 1000 * MS), Some(5 * MS));
    // One waited 3 ms at the barrier, the other 2 ms for room.
    assert_eq!(sim.report(vm).spun, 5 * MS);
}

/// A TLB shootdown waits for a sibling that has no pCPU, not for one that runs or sleeps.
#[test]
fn a_shootdown_waits_for_who_waits() {
    let run = |sibling: Vec<Step>, cpus| {
        let mut sim = Simulator::new(cpus, Policy::DFT, FREE, 1);
        let vm = sim.add_vm();
        sim.add_vcpu(
            vm,
            steps(vec![Step::Compute(40 * MS), Step::Shootdown, Step::Compute(MS)]),
            0,
        );
        sim.add_vcpu(vm, steps(sibling), 0);
        sim.run_until_end(vm, 10_000 * MS).expect("ends");
        sim.report(vm).spun
    };
    assert_eq!(run(vec![Step::Compute(200 * MS)], 2), 0);
    assert_eq!(run(vec![Step::Sleep(200 * MS)], 1), 0);
    assert!(run(vec![Step::Compute(200 * MS)], 1) > 0);
}

#[test]
fn pcpu_time_is_neither_made_nor_lost() {
    for (name, policy) in Policy::NAMED {
        for workload in Workload::FINITE {
            let mut sim = Simulator::new(4, policy, Costs::DEFAULT, 7);
            let vms = [
                Workload::SuperPi.start(&mut sim, 4, 0, 0),
                workload.start(&mut sim, 4, 300 * MS, 5 * MS),
            ];
            sim.run_until(2_000 * MS);
            let ran: u64 = vms.iter().map(|vm| sim.report(*vm).ran).sum();
            // What the I/O threads ran, and what is under way, is in neither report.
            let told = ran + sim.idle() + sim.switching();
            let all = 4 * 2_000 * MS;
            assert!(told <= all, "{name} {}: {told} of {all}", workload.name());
            assert!(told > all * 95 / 100, "{name} {}: {told} of {all}", workload.name());
            assert_eq!(sim.scheduler().audit(), Ok(()));
        }
    }
}

#[test]
fn one_seed_gives_one_result() {
    let run = |seed| {
        let mut sim = Simulator::new(4, Policy::SBCO, Costs::DEFAULT, seed);
        Workload::SuperPi.start(&mut sim, 4, 0, 0);
        let vm = Workload::Kernbench.start(&mut sim, 4, 400 * MS, 10 * MS);
        let ended = sim.run_until_end(vm, 60_000 * MS).expect("ends");
        (ended, sim.events(), sim.scheduler().ledger(), sim.scheduler().counters())
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

#[test]
fn a_thousand_vcpus_are_a_normal_run() {
    let mut sim = Simulator::new(128, Policy::SBCO, Costs::DEFAULT, 1);
    for i in 0..62 {
        Workload::SuperPi.start(&mut sim, 16, 0, i * MS);
    }
    let vm = Workload::Ferret.start(&mut sim, 16, 200 * MS, 100 * MS);
    assert!(sim.run_until_end(vm, 10_000 * MS).is_some());
    assert_eq!(sim.scheduler().audit(), Ok(()));
}

/// A record leaves nothing out: each pCPU's spans follow each other without a gap.
#[test]
fn a_record_is_whole_and_changes_nothing() {
    use godwit_sched::sim::record::Activity;
    let (from, until) = (700 * MS, 1_200 * MS);
    let run = |recorded: bool| {
        let mut sim = Simulator::new(4, Policy::SBCO, Costs::DEFAULT, 5);
        for i in 1..6 {
            Workload::SuperPi.start(&mut sim, 4, 0, i * 37 * MS);
        }
        let vm = Workload::Dedup.start(&mut sim, 4, u64::MAX, 0);
        if recorded {
            sim.record(from, until);
        }
        // Whatever is under way at the end is accounted for later.
        sim.run_until(until + 100 * MS);
        (sim.events(), sim.take_record(), vm)
    };
    let (events, record, vm) = run(true);
    assert_eq!(events, run(false).0);
    let record = record.expect("recorded");
    assert!(!record.truncated && !record.lent.is_empty());
    for cpu in 0..4 {
        let mut at = from;
        for span in record.spans.iter().filter(|s| s.cpu.0 == cpu) {
            assert_eq!(span.from, at);
            at = span.until;
        }
        assert_eq!(at, until);
    }
    let spun: u64 = record
        .spans
        .iter()
        .filter(|s| s.vm == Some(vm) && s.activity == Activity::Spins)
        .map(|s| s.until - s.from)
        .sum();
    assert!(spun > 0);
}
