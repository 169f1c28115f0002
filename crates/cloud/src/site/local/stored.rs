//! A machine booted from the disk that a substrate stores: the way out when its saved state can no
//! longer be loaded.

use godwit_disk::image::{Backing, create_overlay};
use godwit_image::Image;
use godwit_qemu::{MacAddress, Machine};
use godwit_types::SubstrateId;

use super::LocalSite;
use super::machines::{TOP, coded, joined, status};
use super::pool::mac_seed;
use super::record::{Below, MachineRecord, Meant};
use crate::error::Fault;
use crate::site::{Call, MachineStatus, NewMachine};

impl LocalSite {
    /// Makes a machine of a substrate's stored disk and boots it; the saved memory is not used.
    pub(super) async fn boot_stored(
        &self,
        new: NewMachine,
        id: SubstrateId,
        call: Call,
    ) -> Result<MachineStatus, Fault> {
        let substrate = self.pool.get(id).map_err(coded)?;
        let record = MachineRecord {
            vm: new.vm,
            name: new.name,
            generation: new.generation,
            meant: Meant::Running,
            image: substrate.image.clone(),
            image_hash: substrate.image_hash,
            substrate: Some(id),
            arch: substrate.shape.arch,
            memory: substrate.shape.memory,
            vcpus: substrate.shape.vcpus,
            mac: MacAddress::from_seed(mac_seed(new.vm)),
            below: Below::Substrate(id),
            migration: None,
            reason: None,
        };
        self.check_room(record.memory)?;
        let image = self.sound_image(&record).await?;
        let entry = self.enter(record.clone()).await?;
        let mut locked = entry.lock().await;
        self.pool.note_clone(id, record.vm);
        match self.boot_stored_entered(&record, id, &image, &call).await {
            Ok(machine) => {
                locked.machine = Some(machine);
                Ok(status(&mut locked).await)
            }
            Err(f) => {
                self.pool.forget_clone(record.vm);
                drop(locked);
                self.leave(record.vm).await;
                Err(f)
            }
        }
    }

    async fn boot_stored_entered(
        &self,
        record: &MachineRecord,
        id: SubstrateId,
        image: &Image,
        call: &Call,
    ) -> Result<Machine, Fault> {
        let dir = self.dirs.vm(record.vm);
        std::fs::create_dir_all(&dir).map_err(|e| Fault::io("making", &dir, &e))?;
        record.save(&dir)?;
        if let Some(base) = image.disk_path() {
            let (pool, image, top) = (self.pool.clone(), image.clone(), dir.join(TOP));
            tokio::task::spawn_blocking(move || {
                let ready = pool.prepare(id, &image).map_err(coded)?;
                let bytes = std::fs::metadata(&base)
                    .map_err(|e| Fault::io("reading the size of", &base, &e))?
                    .len();
                let below = ready.layer().map_or(Backing::Raw(&base), Backing::Qcow2);
                create_overlay(&top, below, bytes).map_err(coded)
            })
            .await
            .map_err(joined)??;
        }
        self.boot(record, image, call).await
    }
}
