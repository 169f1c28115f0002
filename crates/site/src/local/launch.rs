//! How this host runs a machine: which QEMU, how accelerated, how confined, on which disk.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use godwit_image::Image;
use godwit_qemu::{
    Accel, BootFile, Confine, DiskChain, Launch, Layer, MachineSpec, MemoryGroups, MemorySource,
    Nic, Start,
};
use godwit_substrate::{AsyncPool, Pool};
use godwit_types::{Arch, Fault, Name};

use super::SiteDirs;
use super::dirs::TOP;
use super::faults::into_fault;
use super::filling::MID;
use super::net::SiteNetworks;
use super::record::{DiskBase, MachineRecord};

/// What every machine of one site is started with.
pub(super) struct Launcher {
    site: Name,
    dirs: SiteDirs,
    pool: AsyncPool,
    networks: Arc<SiteNetworks>,
    /// The version of QEMU.
    pub(super) qemu: String,
    accel: BTreeMap<&'static str, Accel>,
    pub(super) confine: Option<Confine>,
    pub(super) groups: Option<MemoryGroups>,
}

const fn arch_key(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "x86-64",
        Arch::Aarch64 => "aarch64",
    }
}

impl Launcher {
    /// Finds out how guests are run here.
    pub(super) async fn probe(
        site: Name,
        dirs: SiteDirs,
        pool: AsyncPool,
        networks: Arc<SiteNetworks>,
        (confine, groups): (Option<Confine>, Option<MemoryGroups>),
    ) -> Result<Self, Fault> {
        let binaries = godwit_qemu::Binaries::default();
        let qemu = godwit_qemu::doctor::qemu_version(binaries.of(Arch::X86_64))
            .await
            .map_err(|e| Fault::of(&e).hint("see what is missing with: godwit doctor"))?;
        let mut accel = BTreeMap::new();
        for arch in [Arch::X86_64, Arch::Aarch64] {
            let cache = dirs.accel_probe(arch_key(arch));
            match godwit_qemu::accel::probe(binaries.of(arch), arch, &cache).await {
                Ok(p) => {
                    accel.insert(arch_key(arch), p.accel);
                }
                Err(e) => tracing::info!(%arch, error = %e, "guests of this kind cannot run here"),
            }
        }
        Ok(Self { site, dirs, pool, networks, qemu, accel, confine, groups })
    }

    /// How guests of that kind are run.
    pub(super) fn accel(&self, arch: Arch) -> Result<Accel, Fault> {
        self.accel.get(arch_key(arch)).copied().ok_or_else(|| {
            Fault::unavailable(format!("site '{}' cannot run {arch} guests", self.site))
                .hint("see what is missing with: godwit doctor")
        })
    }

    /// Whether the processor helps to run some.
    pub(super) fn has_kvm(&self) -> bool {
        self.accel.values().any(|a| *a == Accel::Kvm)
    }

    /// The machine that a record describes.
    pub(super) fn spec_of(record: &MachineRecord, image: &Image) -> MachineSpec {
        let initrd = match (image.initrd_path(), &image.initrd) {
            (Some(path), Some(f)) => Some(BootFile { path, hash: f.hash }),
            _ => None,
        };
        MachineSpec {
            arch: image.arch,
            memory: record.memory,
            vcpus: record.vcpus,
            kernel: BootFile { path: image.kernel_path(), hash: image.kernel.hash },
            initrd,
            cmdline: image.cmdline.clone(),
            display: image.display,
            disk: image.disk.is_some(),
            nic_ports: MachineSpec::DEFAULT_NIC_PORTS,
        }
    }

    /// A boot of the machine that a record describes.
    pub(super) async fn launch(
        &self,
        record: &MachineRecord,
        image: &Image,
    ) -> Result<Launch, Fault> {
        let memory = MemorySource::Shared { path: self.dirs.vm_memory(record.vm) };
        let spec = Self::spec_of(record, image);
        let mut launch =
            Launch::new(spec, self.dirs.vm_run(record.vm), record.name.clone(), memory);
        if let Some(base) = image.disk_path() {
            let dir = self.dirs.vm(record.vm);
            let mut layers = vec![Layer::Raw { path: base }];
            match record.disk_base {
                DiskBase::Image => {}
                DiskBase::Substrate(id) => {
                    // Its memory is of no use to a guest that boots.
                    let image = image.clone();
                    let layer = move |pool: &Pool| pool.prepare_layer(id, &image);
                    let layer = self.pool.run("making sure of a disk layer", layer).await;
                    layers.extend(layer.map_err(into_fault)?.map(|path| Layer::Qcow2 { path }));
                }
                DiskBase::Mid => layers.push(Layer::Qcow2 { path: dir.join(MID) }),
            }
            launch.disk = Some(DiskChain::over(layers, dir.join(TOP)));
        }
        launch.start = Start::Boot;
        launch.groups.clone_from(&self.groups);
        launch.confine = self.confine.clone().map(|c| Confine {
            readable: image.kernel_path().parent().map(Path::to_owned).into_iter().collect(),
            ..c
        });
        launch.accel = self.accel(image.arch)?;
        let backend = self.networks.backend(record.vm, record.attachment.as_ref());
        launch.nics = vec![Nic { port: 0, mac: record.mac, backend }];
        Ok(launch)
    }
}
