//! What one site's report costs the center when the registry has 100,000 machines.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use godwit_cloud::controller::Controller;
use godwit_cloud::registry::{Registry, VmRecord};
use godwit_site::{
    ByteStream, Call, MachineStatus, SiteHost, SiteReply, SiteReport, SiteRequest, StreamRequest,
};
use godwit_transfer::Authority;
use godwit_types::Fault;
use godwit_types::UnixMs;
use godwit_types::{Arch, Generation, Mib, Name, SiteKind, VmId, VmState};

const MACHINES: usize = 100_000;

fn name(text: &str) -> Name {
    Name::new(text).expect("name")
}

/// A site that answers from a list.
struct Listed {
    name: Name,
    machines: Vec<MachineStatus>,
    /// None: one that does not say whether anything has changed.
    digest: Option<godwit_types::Hash>,
}

#[async_trait::async_trait]
impl SiteHost for Listed {
    fn name(&self) -> &Name {
        &self.name
    }
    async fn answer(&self, request: SiteRequest, _: Call) -> Result<SiteReply, Fault> {
        Ok(match request {
            SiteRequest::Report(_) => SiteReply::Report(SiteReport {
                holdings: Some(godwit_types::Hash::of(b"none")),
                machines: self.digest,
                ..SiteReport::default()
            }),
            SiteRequest::Substrates(_) => SiteReply::Substrates(Vec::new()),
            SiteRequest::Machines(_) => SiteReply::Machines(self.machines.clone()),
            _ => SiteReply::Done(()),
        })
    }
    async fn open(&self, _: StreamRequest) -> Result<ByteStream, Fault> {
        Err(Fault::invalid("no streams"))
    }
}

fn record(i: usize, site: &Name) -> VmRecord {
    VmRecord {
        id: VmId::new(),
        name: name(&format!("vm-{i}")),
        tenant: godwit_cloud::access::default_tenant(),
        state: VmState::Running,
        site: site.clone(),
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

fn status(vm: &VmRecord) -> MachineStatus {
    MachineStatus {
        vm: vm.id,
        name: vm.name.clone(),
        generation: vm.generation,
        state: vm.state,
        image: vm.image.clone(),
        arch: vm.arch,
        memory: vm.memory,
        vcpus: vm.vcpus,
        reason: None,
        warrant: None,
        activate: None,
    }
}

fn reports(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("dir");
    let registry = Arc::new(Registry::open(&dir.path().join("r.redb")).expect("open"));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    // The rest is elsewhere.
    for (here, says) in [(100, false), (1000, false), (1000, true), (MACHINES, true)] {
        let label = if says { "unchanged" } else { "unknown" };
        let (site, other) = (name(&format!("site-{here}-{label}")), name("elsewhere"));
        let have = registry.vms().expect("list").len();
        let vms: Vec<_> = (0..here)
            .map(|i| record(have + i, &site))
            .chain((here..MACHINES.saturating_sub(have)).map(|i| record(have + i, &other)))
            .collect();
        std::thread::scope(|s| {
            for part in vms.chunks(vms.len().div_ceil(256)) {
                let registry = &registry;
                s.spawn(move || part.iter().for_each(|vm| registry.vm_add(vm, None).expect("add")));
            }
        });
        let machines: Vec<_> = vms.iter().filter(|v| v.site == site).map(status).collect();
        let digest = godwit_site::digest(&machines).filter(|_| says);
        let host: Arc<dyn SiteHost> = Arc::new(Listed { name: site, machines, digest });
        let authority = Authority::create(&dir.path().join(host.name().as_str()));
        let authority = Arc::new(authority.expect("authority"));
        let controller = Controller::new(registry.clone(), authority);
        runtime.block_on(controller.attach(host.clone(), SiteKind::Ap)).expect("attach");
        let commits = registry.commits();
        c.bench_function(&format!("report of {here} machines, {label}, among {MACHINES}"), |b| {
            b.iter(|| black_box(runtime.block_on(controller.refresh(&host)).expect("report")));
        });
        assert_eq!(registry.commits(), commits, "a report that tells nothing new is not written");
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(3));
    targets = reports
}
criterion_main!(benches);
