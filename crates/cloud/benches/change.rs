//! What a change of a machine costs, with everything that follows it: alone, and 64 at once.

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use godwit_cloud::clock::UnixMs;
use godwit_cloud::registry::{Registry, VmRecord};
use godwit_types::{Arch, Generation, Mib, Name, VmId, VmState};

fn record(i: usize) -> VmRecord {
    let name = |text: &str| Name::new(text).expect("name");
    VmRecord {
        id: VmId::new(),
        name: name(&format!("vm-{i}")),
        state: VmState::Running,
        site: name("center"),
        generation: Generation::FIRST,
        image: name("tiny"),
        substrate: None,
        arch: Arch::X86_64,
        memory: Mib(128),
        vcpus: 1,
        created: UnixMs::now(),
        changed: UnixMs::now(),
        moving_to: None,
        reason: None,
        arriving: None,
        voided: std::collections::BTreeMap::new(),
    }
}

fn change(registry: &Registry, vm: &VmRecord) {
    let next = |v: &mut VmRecord| {
        v.changed = UnixMs(v.changed.0 + 1);
        Ok(())
    };
    registry.vm_update(vm.id, vm.generation, next).expect("change");
}

fn changes(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("dir");
    let registry = Arc::new(Registry::open(&dir.path().join("r.redb")).expect("open"));
    let vms: Vec<_> = (0..64).map(record).collect();
    vms.iter().for_each(|vm| registry.vm_add(vm, None).expect("add"));
    c.bench_function("a change", |b| b.iter(|| change(&registry, &vms[0])));
    c.bench_function("64 changes at once", |b| {
        b.iter(|| {
            std::thread::scope(|s| {
                vms.iter().for_each(|vm| drop(s.spawn(|| change(&registry, vm))));
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
