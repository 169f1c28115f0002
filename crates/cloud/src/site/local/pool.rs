//! The pool of this host: docking, activating, carrying substrates in and out.

use std::sync::Arc;

use godwit_qemu::NicBackend;
use godwit_substrate::{
    ActivateRequest, Becomes, DockRequest, Identity, Place, Pool, PoolDirs, Substrate,
    SubstrateError, activate, dock_convert,
};
use godwit_types::{DockReport, Generation, Name, SubstrateId, SubstrateKind, VmId};
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::sync::Mutex;
use tokio_util::io::SyncIoBridge;

use super::machines::{coded, joined, status};
use super::record::{Below, MachineRecord, Meant};
use super::{Entry, LocalSite};
use crate::error::Fault;
use crate::ops::Progress;
use crate::site::{
    ByteStream, Call, CheckReport, MachineStatus, NewMachine, PoolReport, SubstrateInfo,
};

/// Bytes that a substrate's stream buffers between its two ends.
const PIPE: usize = 1 << 20;

/// A substrate to be docked.
pub(super) struct Dock {
    pub(super) vm: VmId,
    pub(super) generation: Generation,
    pub(super) substrate: SubstrateId,
    pub(super) name: Name,
    pub(super) kind: SubstrateKind,
    pub(super) owner: Name,
}

impl LocalSite {
    pub(super) fn open_pool(
        dirs: &super::SiteDirs,
        site: &super::SiteOptions,
    ) -> Result<Pool, Fault> {
        let options = godwit_store::StoreOptions {
            memory_limit_bytes: site.store_memory_bytes,
            ..godwit_store::StoreOptions::default()
        };
        let store = godwit_store::Store::open(&dirs.data.join("store"), options).map_err(coded)?;
        let dirs = PoolDirs {
            substrates: dirs.data.join("substrates"),
            memory: dirs.memory.join("substrates"),
        };
        Pool::open(dirs, store, site.pool_bytes).map_err(coded)
    }

    /// Turns a machine into a substrate. The machine runs on when that fails.
    pub(super) async fn dock(&self, want: Dock, call: Call) -> Result<SubstrateInfo, Fault> {
        let entry = self.entry(want.vm).await?;
        let mut e = entry.lock().await;
        Self::fence(&e.record, want.generation)?;
        Self::steady(&e.record)?;
        let machine = super::running(&e)?.clone();
        let image = self.image_by_hash(&e.record)?;
        call.progress(Progress {
            stage: "dock".into(),
            note: "the guest is being quiesced, then its memory is stored".into(),
            ..Progress::default()
        });
        let request = DockRequest {
            id: want.substrate,
            name: want.name,
            kind: want.kind,
            owner: want.owner,
            image,
        };
        let image = request.image.clone();
        let (substrate, report) =
            dock_convert(&machine, &self.pool, request).await.map_err(coded)?;
        // What every activation needs is made now, so that the first one does not wait for it.
        let (pool, id) = (self.pool.clone(), substrate.id);
        tokio::task::spawn_blocking(move || {
            if let Err(e) = pool.prepare(id, &image) {
                tracing::warn!(%id, error = %crate::error::chain(&e), "not made ready");
            }
        });
        // The machine has ended; what is left of it is its substrate.
        e.machine = None;
        e.record.generation = want.generation;
        self.bury(&mut e)?;
        self.pool.forget_clone(want.vm);
        Ok(info(&substrate, Some(report)))
    }

    /// Makes a machine from a substrate.
    pub(super) async fn activate(
        &self,
        new: NewMachine,
        id: SubstrateId,
        call: Call,
    ) -> Result<MachineStatus, Fault> {
        let substrate = self.pool.get(id).map_err(coded)?;
        let mac = godwit_qemu::MacAddress::from_seed(mac_seed(new.vm));
        let record = MachineRecord {
            vm: new.vm,
            name: new.name.clone(),
            generation: new.generation,
            meant: Meant::Running,
            image: substrate.image.clone(),
            image_hash: substrate.image_hash,
            substrate: Some(id),
            arch: substrate.shape.arch,
            memory: substrate.shape.memory,
            vcpus: substrate.shape.vcpus,
            mac,
            below: Below::Substrate(id),
            migration: None,
            reason: None,
        };
        self.check_room(record.memory)?;
        let image = self.sound_image(&record).await?;
        let entry = self.enter(record.clone()).await?;
        let mut locked = entry.lock().await;
        call.progress(Progress {
            stage: "activate".into(),
            note: format!("from substrate {}", substrate.name),
            ..Progress::default()
        });
        let made = self.activate_entered(&record, &substrate, image.clone()).await;
        match made {
            Ok(activated) => {
                self.keep_waiting(id, image, activated.machine.launch().accel);
                locked.machine = Some(activated.machine);
                let mut status = status(&mut locked).await;
                status.activate = Some(activated.report);
                Ok(status)
            }
            Err(f) => {
                drop(locked);
                self.leave(record.vm).await;
                Err(f)
            }
        }
    }

    async fn activate_entered(
        &self,
        record: &MachineRecord,
        substrate: &Substrate,
        image: godwit_image::Image,
    ) -> Result<godwit_substrate::Activated, Fault> {
        let dir = self.dirs.vm(record.vm);
        std::fs::create_dir_all(&dir).map_err(|e| Fault::io("making", &dir, &e))?;
        record.save(&dir)?;
        let identity = match substrate.kind {
            SubstrateKind::Private => None,
            SubstrateKind::Public | SubstrateKind::Restricted => {
                let fresh = Identity::fresh(record.name.clone()).map_err(coded)?;
                Some(Identity { mac: record.mac, ..fresh })
            }
        };
        let request = ActivateRequest {
            substrate: substrate.id,
            image,
            place: Place {
                vm: record.vm,
                run_dir: self.dirs.vm_run(record.vm),
                top: dir.join(super::machines::TOP),
            },
            name: record.name.clone(),
            identity,
            nic: Some(NicBackend::Isolated),
            accel: self.accel(record.arch)?,
        };
        let activated = activate(&self.pool, Some(&self.shells), request).await;
        activated.map_err(|e| {
            let outdated = matches!(e, SubstrateError::Shape { .. });
            let fault = coded(e);
            if outdated {
                let name = &substrate.name;
                return fault.hint(format!(
                    "boot its disk and dock it again: godwit substrate rebuild {name}"
                ));
            }
            fault
        })
    }

    /// The substrates that are here.
    pub(super) fn substrates(&self) -> Result<Vec<SubstrateInfo>, Fault> {
        let all = self.pool.list().map_err(coded)?;
        Ok(all.iter().map(|s| info(s, None)).collect())
    }

    pub(super) async fn substrate_delete(&self, id: SubstrateId) -> Result<(), Fault> {
        self.shells.drop_line(id).await;
        let pool = self.pool.clone();
        blocking(move || pool.delete(id)).await
    }

    pub(super) async fn pool_report(&self) -> Result<PoolReport, Fault> {
        let substrates = self.pool.list().map_err(coded)?;
        let stats = self.pool.store().stats().map_err(coded)?;
        Ok(PoolReport {
            substrates: substrates.len() as u64,
            units: stats.units,
            raw_bytes: substrates.iter().map(|s| s.sizes.raw_bytes + s.sizes.disk_bytes).sum(),
            stored_bytes: stats.pack_bytes,
            memory_bytes: stats.memory_bytes,
            free_bytes: super::report::free_mib(&self.dirs.data)? << 20,
            waiting: self.waiting(),
        })
    }

    pub(super) async fn pool_check(&self) -> Result<CheckReport, Fault> {
        let pool = self.pool.clone();
        let found = blocking(move || pool.check()).await?;
        let mut damaged: Vec<String> =
            found.store.damaged.iter().map(ToString::to_string).collect();
        let named = |what: &'static str| move |h: &godwit_types::Hash| format!("unit {h}: {what}");
        damaged.extend(found.store.bad_entries.iter().map(named("its index entry is malformed")));
        damaged.extend(found.store.missing.iter().map(named("it is not there")));
        damaged.extend(found.broken.iter().map(|(id, why)| format!("substrate {id}: {why}")));
        Ok(CheckReport { units: found.store.units, damaged })
    }

    /// A substrate as a stream to read; an archive.
    pub(super) fn export(&self, id: SubstrateId) -> Result<ByteStream, Fault> {
        self.pool.get(id).map_err(coded)?;
        let (near, far) = tokio::io::duplex(PIPE);
        let pool = self.pool.clone();
        tokio::task::spawn_blocking(move || {
            // A reader that sees the stream end early finds the archive truncated and refuses it.
            if let Err(e) = pool.export(id, SyncIoBridge::new(far)) {
                tracing::warn!(%id, error = %crate::error::chain(&e), "an export broke off");
            }
        });
        Ok(Box::pin(near))
    }

    /// A stream to write a substrate to; after its end the site answers with one event.
    pub(super) fn import(&self, name: Option<Name>) -> ByteStream {
        let (near, far) = tokio::io::duplex(PIPE);
        let (pool, site) = (self.pool.clone(), self.name.clone());
        tokio::spawn(async move {
            let becomes = Becomes { owner: None, name };
            if let Err(e) = take_in(pool, site, becomes, far).await {
                tracing::warn!(error = %e, "an import's answer could not be delivered");
            }
        });
        Box::pin(near)
    }

    /// Enters a machine that is being made; nobody else can make it meanwhile.
    pub(super) async fn enter(&self, record: MachineRecord) -> Result<Arc<Mutex<Entry>>, Fault> {
        let mut all = self.machines.write().await;
        if let Some(e) = all.get(&record.vm) {
            let e = e.lock().await;
            Self::fence(&e.record, record.generation)?;
            if e.record.meant != Meant::Gone {
                return Err(Fault::new(
                    godwit_types::Code::Exists,
                    format!("machine '{}' is here already", e.record.name),
                ));
            }
        }
        let entry = Arc::new(Mutex::new(Entry { record: record.clone(), machine: None }));
        all.insert(record.vm, entry.clone());
        Ok(entry)
    }

    /// Takes back [`LocalSite::enter`] with all files.
    pub(super) async fn leave(&self, vm: VmId) {
        self.clear(vm);
        self.machines.write().await.remove(&vm);
    }
}

async fn take_in(
    pool: Pool,
    site: Name,
    becomes: Becomes,
    far: DuplexStream,
) -> std::io::Result<()> {
    let (read, mut write) = tokio::io::split(far);
    let reader = SyncIoBridge::new(read);
    let outcome = tokio::task::spawn_blocking(move || pool.import(reader, becomes)).await;
    let verdict: Result<SubstrateInfo, Fault> = match outcome {
        Ok(Ok(s)) => Ok(info(&s, None)),
        Ok(Err(e)) => Err(super::advise(&site, Fault::of(&e))),
        Err(e) => Err(joined(e)),
    };
    let text = serde_json::to_vec(&verdict)?;
    write.write_all(&text).await?;
    write.shutdown().await
}

async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> Result<T, SubstrateError> + Send + 'static,
) -> Result<T, Fault> {
    tokio::task::spawn_blocking(job).await.map_err(joined)?.map_err(coded)
}

/// The part of a machine's id that its MAC address is made of.
pub(super) fn mac_seed(vm: VmId) -> [u8; 5] {
    let id = vm.0.as_bytes();
    [id[11], id[12], id[13], id[14], id[15]]
}

pub(super) fn info(s: &Substrate, dock: Option<DockReport>) -> SubstrateInfo {
    SubstrateInfo {
        id: s.id,
        name: s.name.clone(),
        kind: s.kind,
        owner: s.owner.clone(),
        image: s.image.clone(),
        arch: s.shape.arch,
        memory: s.shape.memory,
        vcpus: s.shape.vcpus,
        raw_bytes: s.sizes.raw_bytes,
        stored_bytes: s.sizes.stored_bytes,
        created: crate::clock::UnixMs(s.docked_unix_ms),
        dock,
    }
}
