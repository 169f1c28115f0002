//! The pool of this host: docking, activating, carrying substrates in and out.

use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::NicBackend;
use godwit_substrate::{
    ActivateRequest, Identity, Place, Pool, PoolDirs, Substrate, SubstrateError, activate,
};
use godwit_types::{DockReport, Fault, SubstrateId, SubstrateKind, VmId};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::allowed::{Action, Refusal};
use super::machines::{into_fault, join_error};
use super::record::{DesiredState, DiskBase, MachineRecord, Unfinished};
use super::{Entry, LocalSite};
use crate::Progress;
use crate::{Call, CheckReport, MachineStatus, NewMachine, PoolReport, SubstrateInfo};

/// How long an activation keeps others waiting at most.
const TURN: Duration = Duration::from_secs(3);

impl LocalSite {
    pub(super) fn open_pool(
        dirs: &super::SiteDirs,
        site: &super::SiteOptions,
    ) -> Result<Pool, Fault> {
        let options = godwit_store::StoreOptions {
            memory_limit_bytes: site.store_memory_bytes,
            ..godwit_store::StoreOptions::default()
        };
        let store =
            godwit_store::Store::open(&dirs.data.join("store"), options).map_err(into_fault)?;
        let dirs = PoolDirs {
            substrates: dirs.data.join("substrates"),
            memory: dirs.memory.join("substrates"),
        };
        let memory = dirs.memory.clone();
        let pool = Pool::open(dirs, store, site.pool_bytes).map_err(into_fault)?;
        let half = rustix::fs::statvfs(&memory)
            .map(|s| s.f_blocks.saturating_mul(s.f_frsize) / 2)
            .map_err(|e| Fault::io("asking for the size of", &memory, &e.into()))?;
        pool.set_memory_budget(site.memory_cache_bytes.unwrap_or(half));
        Ok(pool)
    }

    /// Makes a machine from a substrate.
    pub(super) async fn activate(
        &self,
        new: NewMachine,
        id: SubstrateId,
        call: Call,
    ) -> Result<MachineStatus, Fault> {
        let substrate = self.pool.get(id).map_err(into_fault)?;
        if let Some(wanted) = new.content.filter(|wanted| *wanted != substrate.content()) {
            let found = substrate.content();
            return Err(into_fault(SubstrateError::OtherContent {
                name: substrate.name,
                wanted,
                found,
            }));
        }
        let mac = godwit_qemu::MacAddress::from_seed(mac_seed(new.vm));
        let record = MachineRecord {
            vm: new.vm,
            name: new.name.clone(),
            generation: new.generation,
            warrant: Some(new.warrant),
            desired: DesiredState::Running,
            image: substrate.image.clone(),
            image_hash: substrate.image_hash,
            substrate: Some(id),
            arch: substrate.shape.arch,
            memory: substrate.shape.memory,
            vcpus: substrate.shape.vcpus,
            mac,
            disk_base: DiskBase::Substrate(id),
            migration: None,
            reason: None,
            unfinished: Some(Unfinished::Activating),
        };
        self.give_way(record.memory, id).await;
        self.check_room(record.memory)?;
        let image = self.sound_image(&record).await?;
        let (entry, wanted) = self.register_starting(record.clone()).await?;
        call.progress(Progress {
            stage: "activate".into(),
            note: format!("from substrate {}", substrate.name),
            ..Progress::default()
        });
        let made = async {
            let cancel = wanted.child_token();
            let activating =
                self.activate_entered(&record, &substrate, image.clone(), cancel.clone());
            tokio::pin!(activating);
            let activated = tokio::select! {
                activated = &mut activating => activated?,
                () = call.cancel.cancelled() => {
                    cancel.cancel();
                    activating.await?
                }
            };
            let mut e = entry.lock().await;
            if wanted.is_cancelled() {
                activated.machine.kill().await;
                return Err(Fault::cancelled());
            }
            let accel = activated.machine.launch().accel;
            // Until this is written, a restart of the daemon takes the activation back.
            e.record.unfinished = None;
            if let Some(identity) = &activated.identity {
                e.record.mac = identity.mac;
            }
            if let Err(f) = e.record.save(&self.dirs.vm(record.vm)) {
                activated.machine.kill().await;
                return Err(f);
            }
            e.machine = Some(activated.machine);
            Ok((activated.report, accel))
        };
        match made.await {
            Ok((report, accel)) => {
                self.keep_waiting(id, image, accel);
                let mut status = self.started(&entry).await?;
                status.activate = Some(report);
                Ok(status)
            }
            Err(f) => {
                self.withdraw(&entry, record.vm).await;
                Err(f)
            }
        }
    }

    /// Ends QEMUs that wait for other substrates while there is no room for a machine of `memory`
    /// from substrate `id` beside what they keep in use, of the host's memory or of the budget.
    pub(super) async fn give_way(&self, memory: godwit_types::Mib, id: SubstrateId) {
        let mut others = self.shells.kept();
        others.retain(|other| *other != id);
        others.sort_unstable();
        for other in others {
            if self.pool.memory_fits(id) && self.check_room(memory).is_ok() {
                return;
            }
            self.shells.drop_line(other).await;
        }
    }

    async fn activate_entered(
        &self,
        record: &MachineRecord,
        substrate: &Substrate,
        image: godwit_image::Image,
        cancel: CancellationToken,
    ) -> Result<godwit_substrate::Activated, Fault> {
        let dir = self.dirs.vm(record.vm);
        std::fs::create_dir_all(&dir).map_err(|e| Fault::io("making", &dir, &e))?;
        // A crash of the host leaves no machine that it could tell of.
        record.save_quick(&dir)?;
        godwit_hold::at("activate.recorded").await;
        let identity = match substrate.kind {
            SubstrateKind::Private => None,
            SubstrateKind::Public | SubstrateKind::Restricted => {
                let fresh = Identity::fresh(record.name.clone()).map_err(into_fault)?;
                Some(Identity { mac: record.mac, ..fresh })
            }
        };
        let request = ActivateRequest {
            substrate: substrate.id,
            image,
            place: Place {
                confine: self.confine.clone(),
                groups: self.groups.clone(),
                vm: record.vm,
                run_dir: self.dirs.vm_run(record.vm),
                top: dir.join(super::machines::TOP),
            },
            name: record.name.clone(),
            identity,
            nic: Some(NicBackend::Isolated),
            accel: self.accel(record.arch)?,
            cancel,
        };
        // More at once than the host has CPUs would make each of them slower, and ask the guests
        // oftener how far they are. One that hangs lets the next one in all the same.
        let asked = std::time::Instant::now();
        let turn = self.turns.clone().acquire_owned().await.map_err(|_| Fault::cancelled())?;
        let waited = asked.elapsed();
        let turn = tokio::spawn(async move {
            tokio::time::sleep(TURN).await;
            drop(turn);
        });
        let activated = activate(&self.pool, Some(&self.shells), request).await;
        turn.abort();
        let mut activated = activated.map_err(|e| {
            let outdated = matches!(e, SubstrateError::Shape { .. });
            let fault = into_fault(e);
            if outdated {
                let name = &substrate.name;
                return fault.hint(format!(
                    "boot its disk and dock it again: godwit substrate rebuild {name}"
                ));
            }
            fault
        })?;
        activated.report.waited(waited);
        godwit_hold::at("activate.plugged").await;
        Ok(activated)
    }

    /// The image of a machine that is to be docked or to move, and the layer below it, verified.
    pub(super) async fn sound_disk(
        &self,
        record: &MachineRecord,
    ) -> Result<godwit_image::Image, Fault> {
        let image = self.sound_image(record).await?;
        if let DiskBase::Substrate(id) = record.disk_base {
            let (pool, here) = (self.pool.clone(), image.clone());
            blocking(move || pool.prepare_layer(id, &here).map(drop)).await?;
        }
        Ok(image)
    }

    /// The substrates that are here.
    pub(super) fn substrates(&self) -> Result<Vec<SubstrateInfo>, Fault> {
        let all = self.pool.list().map_err(into_fault)?;
        Ok(all.iter().map(|s| info(s, None)).collect())
    }

    pub(super) async fn substrate_delete(&self, id: SubstrateId) -> Result<(), Fault> {
        self.shells.drop_line(id).await;
        let pool = self.pool.clone();
        blocking(move || pool.delete(id)).await
    }

    pub(super) async fn pool_report(&self) -> Result<PoolReport, Fault> {
        let substrates = self.pool.list().map_err(into_fault)?;
        let stats = self.pool.store().stats().map_err(into_fault)?;
        Ok(PoolReport {
            substrates: substrates.len() as u64,
            units: stats.units,
            raw_bytes: substrates.iter().map(|s| s.sizes.raw_bytes + s.sizes.disk_bytes).sum(),
            stored_bytes: stats.pack_bytes,
            memory_bytes: stats.memory_bytes,
            sealed_bytes: self.pool.sealed_bytes().0,
            sealed_limit_bytes: self.pool.memory_budget(),
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
        damaged.extend(found.store.index.iter().map(|why| {
            format!(
                "the index of the store in {}: {why}; what it holds can be used until this daemon ends: \
                 export what is nowhere else before that",
                self.pool.store().dir().display()
            )
        }));
        damaged.extend(found.store.bad_entries.iter().map(named("its index entry is malformed")));
        damaged.extend(found.store.missing.iter().map(named("it is not there")));
        damaged.extend(found.broken.iter().map(|(id, why)| format!("substrate {id}: {why}")));
        let images = self.images.clone();
        let check = move || {
            let all = images.list().map_err(|e| Fault::of(&e))?;
            Ok::<_, Fault>(
                all.into_iter()
                    .filter_map(|image| {
                        let found = images.scrub(&image).err()?;
                        Some(format!("image {}: {}", image.name, godwit_types::chain(&found)))
                    })
                    .collect::<Vec<_>>(),
            )
        };
        damaged.extend(tokio::task::spawn_blocking(check).await.map_err(join_error)??);
        Ok(CheckReport { units: found.store.units, damaged })
    }

    /// Enters a machine that is being made, and promises it its memory; nobody else can make it
    /// meanwhile. No machine's lock is waited for while the list of all is locked, or a promise is
    /// being made.
    pub(super) async fn register(
        &self,
        record: MachineRecord,
        starting: Option<CancellationToken>,
    ) -> Result<Arc<Mutex<Entry>>, Fault> {
        let entry = Arc::new(Mutex::new(Entry { starting, ..Entry::new(record.clone(), None) }));
        let there = {
            let _one = self.promising.lock().await;
            self.check_promise(record.vm, record.memory).await?;
            let mut all = self.machines.write().await;
            match all.get(&record.vm) {
                Some(e) => Some(Arc::clone(e)),
                None => {
                    // One that left at this generation or a later one does not come back by it.
                    if let Some(seen) = self.tombs.get(record.vm)
                        && record.generation <= seen
                    {
                        let (machine, site) = (record.name.to_string(), self.name.clone());
                        let given = record.generation;
                        return Err(Refusal::Left { machine, site, seen, given }.into());
                    }
                    all.insert(record.vm, Arc::clone(&entry));
                    self.remember_size(record.vm, record.memory);
                    None
                }
            }
        };
        let Some(there) = there else { return Ok(entry) };
        let state = there.lock().await.state(&self.name);
        state.fence(record.generation)?;
        let _ = state.allows(Action::Arrive)?;
        Ok(there)
    }

    /// As [`LocalSite::register`], a machine that starts until [`LocalSite::started`]; what is also
    /// returned is cancelled once it is not wanted any more.
    pub(super) async fn register_starting(
        &self,
        record: MachineRecord,
    ) -> Result<(Arc<Mutex<Entry>>, CancellationToken), Fault> {
        let wanted = CancellationToken::new();
        let entry = self.register(record, Some(wanted.clone())).await?;
        Ok((entry, wanted))
    }

    /// Takes back [`LocalSite::register`] with all files; what is known of earlier generations stays.
    pub(super) async fn unregister(&self, vm: VmId) {
        self.clear(vm);
        self.delist(vm).await;
    }

    /// As [`LocalSite::unregister`], unless somebody has removed it already.
    pub(super) async fn withdraw(&self, entry: &Mutex<Entry>, vm: VmId) {
        let mut e = entry.lock().await;
        if e.record.desired != DesiredState::Gone {
            e.record.desired = DesiredState::Gone;
            e.starting = None;
            self.unregister(vm).await;
        }
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> Result<T, SubstrateError> + Send + 'static,
) -> Result<T, Fault> {
    tokio::task::spawn_blocking(job).await.map_err(join_error)?.map_err(into_fault)
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
        created: godwit_types::UnixMs(s.docked_unix_ms),
        content: s.content(),
        dock,
    }
}
