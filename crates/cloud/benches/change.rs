//! What a change of a machine costs until it is on disk, and what the change feed adds: alone, with
//! 64 who follow it until all have read it, and 64 changes at once, which share their way to disk.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use godwit_cloud::registry::{Registry, VmRecord};
use godwit_types::{Arch, Generation, Mib, Name, UnixMs, VmId, VmState};

/// Machines, and followers.
const MANY: usize = 64;

fn record(i: usize) -> VmRecord {
    let name = |text: &str| Name::new(text).expect("name");
    VmRecord {
        id: VmId::new(),
        name: name(&format!("vm-{i}")),
        tenant: godwit_cloud::access::default_tenant(),
        state: VmState::Running,
        site: name("center"),
        generation: Generation::FIRST,
        image: name("tiny"),
        substrate: None,
        arch: Arch::X86_64,
        memory: Mib(128),
        vcpus: 1,
        disk_bytes: None,
        created: UnixMs::now(),
        changed: UnixMs::now(),
        moving_to: None,
        reason: None,
        private_of: None,
        arriving: None,
        returning: None,
        network: None,
        published: Vec::new(),
        ports_pending: false,
        voided: std::collections::BTreeMap::new(),
    }
}

/// One that followers hear of.
fn change(registry: &Registry, vm: &VmRecord) {
    let next = |v: &mut VmRecord| {
        let to = if v.state == VmState::Running { VmState::Moving } else { VmState::Running };
        Ok(v.become_state(to, UnixMs(v.changed.0 + 1))?)
    };
    registry.vm_update(vm.id, vm.generation, next).expect("change");
}

fn changes(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("dir");
    let registry = Registry::open(&dir.path().join("r.redb")).expect("open");
    let vms: Vec<_> = (0..MANY).map(record).collect();
    vms.iter().for_each(|vm| registry.vm_add(vm, None).expect("add"));
    c.bench_function("a change", |b| b.iter(|| change(&registry, &vms[0])));
    c.bench_function("a change that 64 follow", |b| {
        let mut followers: Vec<_> = (0..MANY).map(|_| registry.watch_now()).collect();
        b.iter(|| {
            change(&registry, &vms[0]);
            for follower in &mut followers {
                follower.read().expect("kept").expect("an event");
            }
        });
    });
    c.bench_function("64 changes at once", |b| {
        b.iter(|| {
            std::thread::scope(|s| {
                for vm in &vms {
                    s.spawn(|| change(&registry, vm));
                }
            });
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(5));
    targets = changes
}
criterion_main!(benches);
