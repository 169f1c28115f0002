//! The substrates of this host: its pool, and the QEMUs that wait for them.

use std::path::PathBuf;

use godwit_image::Image;
use godwit_qemu::{Confine, MemoryGroups};
use godwit_substrate::{AsyncPool, Place, Pool, PoolDirs, Shells, Substrate, SubstrateError};
use godwit_types::{DockReport, Fault, Mib, Name, SubstrateId, VmId, chain};

use super::dirs::TOP;
use super::faults::{into_fault, join_error};
use super::images::Images;
use super::record::{DiskBase, MachineRecord};
use super::room::Room;
use super::{SiteDirs, SiteOptions};
use crate::{CheckReport, PoolReport, SubstrateInfo};

/// The substrates of one site.
pub(super) struct Substrates {
    pub(super) site: Name,
    /// Where they are kept.
    data: PathBuf,
    pub(super) pool: AsyncPool,
    pub(super) shells: Shells,
    /// QEMUs that wait for each substrate that was activated recently.
    pub(super) wanted: usize,
}

impl Substrates {
    /// Those in the site's directories. QEMUs that wait are confined as machines are.
    pub(super) async fn open(
        name: Name,
        dirs: &SiteDirs,
        site: &SiteOptions,
        (confine, groups): (&Option<Confine>, &Option<MemoryGroups>),
    ) -> Result<Self, Fault> {
        let (here, options) = (dirs.clone(), site.clone());
        let opening = tokio::task::spawn_blocking(move || Self::open_pool(&here, &options));
        let pool = AsyncPool::from(opening.await.map_err(join_error)??);
        let shells = shells(&pool, dirs, confine.clone(), groups.clone());
        let data = dirs.data.clone();
        Ok(Self { site: name, data, pool, shells, wanted: site.waiting })
    }

    fn open_pool(dirs: &SiteDirs, site: &SiteOptions) -> Result<Pool, Fault> {
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

    /// The substrates that are here.
    pub(super) async fn list(&self) -> Result<Vec<SubstrateInfo>, Fault> {
        let all = self.pool.run("listing substrates", Pool::list).await.map_err(into_fault)?;
        Ok(all.iter().map(|s| info(s, None)).collect())
    }

    /// Gives up what came in part and was kept for long enough.
    pub(super) async fn forget_parts(&self) -> Result<(), Fault> {
        let forgetting = self.pool.start(|pool| pool.forget_parts(godwit_substrate::KEPT));
        forgetting.await.map_err(join_error)
    }

    /// The one of that id.
    pub(super) async fn get(&self, id: SubstrateId) -> Result<Substrate, Fault> {
        let found = self.pool.run("looking for a substrate", move |pool| pool.get(id)).await;
        found.map_err(into_fault)
    }

    /// Whether there is one of that id.
    pub(super) async fn has(&self, id: SubstrateId) -> bool {
        let found = self.pool.run("looking for a substrate", move |pool| pool.get(id)).await;
        // One that cannot be read is there all the same.
        !matches!(found, Err(SubstrateError::NotFound(_)))
    }

    /// Removes one, and the QEMUs that wait for it.
    pub(super) async fn delete(&self, id: SubstrateId) -> Result<(), Fault> {
        self.shells.drop_line(id).await;
        let removed = self.pool.run("removing a substrate", move |pool| pool.delete(id)).await;
        removed.map_err(into_fault)
    }

    /// What the pool holds.
    pub(super) async fn report(&self) -> Result<PoolReport, Fault> {
        let looking = |pool: &Pool| Ok((pool.list()?, pool.store().stats()?));
        let looked = self.pool.run("looking at the pool", looking).await;
        let (substrates, stats) = looked.map_err(into_fault)?;
        Ok(PoolReport {
            substrates: substrates.len() as u64,
            units: stats.units,
            raw_bytes: substrates.iter().map(|s| s.sizes.raw_bytes + s.sizes.disk_bytes).sum(),
            stored_bytes: stats.pack_bytes,
            memory_bytes: stats.memory_bytes,
            sealed_bytes: self.pool.sealed_bytes().0,
            sealed_limit_bytes: self.pool.memory_budget(),
            free_bytes: super::report::free_mib(&self.data)? << 20,
            waiting: self.waiting(),
        })
    }

    /// Reads all that is stored, and the images, and tells what is damaged.
    pub(super) async fn check(&self, images: &Images) -> Result<CheckReport, Fault> {
        let checking = |pool: &Pool| Ok((pool.check()?, pool.store().dir().display().to_string()));
        let checked = self.pool.run("checking the pool", checking).await;
        let (found, store) = checked.map_err(into_fault)?;
        let mut damaged: Vec<String> =
            found.store.damaged.iter().map(ToString::to_string).collect();
        let named = |what: &'static str| move |h: &godwit_types::Hash| format!("unit {h}: {what}");
        damaged.extend(found.store.index.iter().map(|why| {
            format!(
                "the index of the store in {store}: {why}; what it holds can be used until this daemon \
                 ends: export what is nowhere else before that"
            )
        }));
        damaged.extend(found.store.bad_entries.iter().map(named("its index entry is malformed")));
        damaged.extend(found.store.missing.iter().map(named("it is not there")));
        damaged.extend(found.broken.iter().map(|(id, why)| format!("substrate {id}: {why}")));
        let images = images.cache().clone();
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

    /// Ends QEMUs that wait for other substrates while there is no room for a machine of `memory`
    /// from substrate `id` beside what they keep in use, of the host's memory or of the budget.
    pub(super) async fn give_way(&self, room: &Room, memory: Mib, id: SubstrateId) {
        let mut others = self.shells.kept();
        others.retain(|other| *other != id);
        others.sort_unstable();
        for other in others {
            let fits = self.pool.start(move |pool| pool.memory_fits(id)).await;
            if fits.unwrap_or(false) && room.check_memory(memory).await.is_ok() {
                return;
            }
            self.shells.drop_line(other).await;
        }
    }

    /// The image of a machine that is to be docked or to move, and the layer below it, verified.
    pub(super) async fn sound_disk(
        &self,
        images: &Images,
        record: &MachineRecord,
    ) -> Result<Image, Fault> {
        let image = images.sound(record).await?;
        if let DiskBase::Substrate(id) = record.disk_base {
            let here = image.clone();
            let layer = move |pool: &Pool| pool.prepare_layer(id, &here).map(drop);
            self.pool.run("making sure of a disk layer", layer).await.map_err(into_fault)?;
        }
        Ok(image)
    }

    /// Makes what every activation of a substrate needs, so that the first one does not wait for it;
    /// its memory only where that is within the budget beside what is in use.
    pub(super) fn make_ready(&self, id: SubstrateId, image: Image) {
        self.pool.start(move |pool| {
            let ready = if pool.memory_fits(id) {
                pool.prepare(id, &image).map(drop)
            } else {
                pool.prepare_layer(id, &image).map(drop)
            };
            if let Err(e) = ready {
                tracing::warn!(%id, error = %chain(&e), "not made ready");
            }
        });
    }
}

/// The waiting QEMUs of a site: none yet.
fn shells(
    pool: &AsyncPool,
    dirs: &SiteDirs,
    confine: Option<Confine>,
    groups: Option<MemoryGroups>,
) -> Shells {
    let dirs = dirs.clone();
    let place = move || {
        let vm = VmId::new();
        let top = dirs.waiting().join(vm.0.simple().to_string()).join(TOP);
        let (confine, groups) = (confine.clone(), groups.clone());
        Place { vm, run_dir: dirs.waiting_run(vm), top, confine, groups }
    };
    Shells::new(pool.clone(), Box::new(place))
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
