//! A machine booted from the disk that a substrate stores: the way out when its saved state can no
//! longer be loaded.

use godwit_image::Image;
use godwit_qemu::MacAddress;
use godwit_types::{Fault, SubstrateId};

use super::LocalSite;
use super::faults::{into_fault, join_error};
use super::record::{DesiredState, DiskBase, MachineRecord, mac_seed};
use super::starts::Starts;
use crate::{Call, MachineStatus, NewMachine, Origin};

impl LocalSite {
    /// How large the disk of a machine is that is made of that.
    pub(super) async fn disk_of(&self, of: Origin) -> Result<u64, Fault> {
        let cache = self.parts.images.cache().clone();
        let image = self.parts.substrates.pool.start(move |pool| match of {
            Origin::Image(name) => cache.get(&name).map_err(|e| Fault::of(&e)),
            Origin::Substrate(id) | Origin::StoredDisk(id) => {
                let s = pool.get(id).map_err(into_fault)?;
                let dir = cache.dir().join("by-hash").join(s.image_hash.to_string());
                Image::open(&dir).map_err(|e| Fault::of(&e))
            }
        });
        let image = image.await.map_err(join_error)??;
        Ok(image.disk.map_or(0, |disk| disk.bytes))
    }
}

impl Starts {
    /// Makes a machine of a substrate's stored disk and boots it; the saved memory is not used.
    pub(super) async fn boot_stored(
        &self,
        new: NewMachine,
        id: SubstrateId,
        call: Call,
    ) -> Result<MachineStatus, Fault> {
        let substrate = self.parts.substrates.get(id).await?;
        let record = MachineRecord {
            vm: new.vm,
            name: new.name,
            generation: new.generation,
            warrant: Some(new.warrant),
            desired: DesiredState::Running,
            image: substrate.image.clone(),
            image_hash: substrate.image_hash,
            substrate: Some(id),
            arch: substrate.shape.arch,
            memory: substrate.shape.memory,
            vcpus: substrate.shape.vcpus,
            mac: MacAddress::from_seed(mac_seed(new.vm)),
            disk_base: DiskBase::Substrate(id),
            migration: None,
            reason: None,
            unfinished: None,
            attachment: None,
            published: Vec::new(),
            back: None,
        };
        self.parts.substrates.give_way(&self.parts.room, record.memory, id).await;
        self.parts.room.check_memory(record.memory).await?;
        let image = self.parts.substrates.sound_disk(&self.parts.images, &record).await?;
        let (owner, wanted) = self.parts.machines.register_starting(record.clone()).await?;
        self.parts.substrates.pool.note_clone(id, record.vm);
        match self.boot_new(&owner, &record, &image, &call, &wanted).await {
            Ok(()) => self.started(&owner, &wanted).await,
            Err(f) => {
                self.parts.substrates.pool.forget_clone(record.vm);
                self.withdraw(&owner, wanted).await;
                Err(f)
            }
        }
    }
}
