//! What a decision costs: ordinates by the RB index beside a walk over the queue, and whole
//! decisions with and without Algorithm 1.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use godwit_sched::policy::{Granularity, Policy};
use godwit_sched::scheduler::{CpuId, NICE_0, Scheduler};
use godwit_sched::sim::workload::Workload;
use godwit_sched::sim::{Costs, Simulator};
use godwit_sched::tree::{Node, RbTree};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

const SIZES: [usize; 6] = [2, 8, 64, 256, 1024, 4096];

fn tree_of(n: usize) -> (RbTree<u64>, Vec<Node>) {
    let mut chance = SmallRng::seed_from_u64(1);
    let mut tree = RbTree::new();
    let nodes = (0..n).map(|_| tree.insert(chance.random())).collect();
    (tree, nodes)
}

fn ordinates(c: &mut Criterion) {
    let mut g = c.benchmark_group("ordinate");
    for n in SIZES {
        let (tree, nodes) = tree_of(n);
        let mut i = 0;
        let mut next = || {
            i = (i + 7919) % n;
            nodes[i]
        };
        g.bench_function(BenchmarkId::new("rb-index", n), |b| {
            b.iter(|| black_box(tree.ordinate(next())))
        });
        g.bench_function(BenchmarkId::new("walk", n), |b| {
            b.iter(|| black_box(tree.ordinate_by_walk(next())))
        });
    }
    g.finish();
}

fn changes(c: &mut Criterion) {
    let mut g = c.benchmark_group("reposition");
    for n in SIZES {
        let (mut tree, mut nodes) = tree_of(n);
        let mut chance = SmallRng::seed_from_u64(2);
        let mut i = 0;
        g.bench_function(BenchmarkId::from_parameter(n), |b| {
            b.iter(|| {
                i = (i + 7919) % n;
                nodes[i] = tree.reposition(nodes[i], chance.random());
            })
        });
    }
    g.finish();
}

/// One decision on a pCPU with 64 tasks, of 4 pCPUs, all vCPUs of machines with 4.
fn decisions(c: &mut Criterion) {
    let mut g = c.benchmark_group("decision of 64");
    for policy in [Policy::DFT, Policy::BAL, Policy::SBCO, Policy::ADAPTIVE, Policy::EEVDF] {
        let mut s = Scheduler::new(4, policy, Granularity::linux_2_6_34(4), 1);
        for _ in 0..64 {
            let vm = s.add_vm();
            for _ in 0..4 {
                let t = s.add_task(Some(vm), NICE_0);
                s.wake(t);
            }
        }
        let mut cpu = 0;
        g.bench_function(policy.to_string(), |b| {
            b.iter(|| {
                cpu = (cpu + 1) % 4;
                s.charge(CpuId(cpu), 3_000_000);
                black_box(s.pick(CpuId(cpu)))
            })
        });
    }
    g.finish();
}

/// Events a second: 20 ms of a host in its stride.
fn simulator(c: &mut Criterion) {
    const FROM: u64 = 200_000_000;
    const FOR: u64 = 20_000_000;
    let mut g = c.benchmark_group("simulator");
    g.sample_size(10);
    for policy in [Policy::SBCO, Policy::EEVDF, Policy::ADAPTIVE] {
        for (cpus, vcpus, vms) in [(4, 4, 8_u64), (128, 16, 62)] {
            let build = || {
                let mut sim = Simulator::new(cpus, policy, Costs::DEFAULT, 1);
                for i in 0..vms {
                    let workload = if i % 2 == 0 { Workload::SuperPi } else { Workload::Kernbench };
                    workload.start(&mut sim, vcpus, u64::MAX, i * 1_000_000);
                }
                sim.run_until(FROM);
                sim
            };
            let mut sim = build();
            let before = sim.events();
            sim.run_until(FROM + FOR);
            g.throughput(Throughput::Elements(sim.events() - before));
            let name = format!("{policy}, {} vCPUs on {cpus} pCPUs", vms as usize * vcpus);
            g.bench_function(name, |b| {
                let run = |mut sim: Simulator| {
                    sim.run_until(FROM + FOR);
                    sim
                };
                b.iter_batched(build, run, BatchSize::LargeInput)
            });
        }
    }
    g.finish();
}

criterion_group!(benches, ordinates, changes, decisions, simulator);
criterion_main!(benches);
