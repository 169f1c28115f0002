//! Who needs an image or a substrate here, and the removal of images.

use godwit_types::{Fault, Name, SubstrateId};

use super::LocalSite;
use super::machines::{into_fault, join_error};
use super::record::{DesiredState, DiskBase, MachineRecord};

impl LocalSite {
    /// The records of the machines that are here, as they are kept: nobody is waited for.
    async fn kept_records(&self) -> Vec<MachineRecord> {
        let ids: Vec<_> = self.machines.read().await.keys().copied().collect();
        let kept = ids.into_iter().filter_map(|vm| {
            // One that is being made has no record yet; it is refused what it needs when that is gone.
            MachineRecord::load(&self.dirs.vm(vm)).ok().flatten()
        });
        kept.filter(|r| r.desired != DesiredState::Gone).collect()
    }

    /// The machines whose disk stands on a substrate. One that came from it and has moved or was
    /// merged since is none of them.
    pub(super) async fn substrate_users(&self, id: SubstrateId) -> Vec<Name> {
        let all = self.kept_records().await.into_iter();
        all.filter(|r| r.disk_base == DiskBase::Substrate(id)).map(|r| r.name).collect()
    }

    /// Removes every build of an image from this host's cache.
    pub(super) async fn image_delete(&self, name: Name) -> Result<(), Fault> {
        let substrates = self.substrates()?.into_iter().filter(|s| s.image == name);
        let used: Vec<String> = substrates
            .map(|s| format!("substrate '{}'", s.name))
            .chain(
                self.kept_records()
                    .await
                    .into_iter()
                    .filter(|r| r.image == name)
                    .map(|r| format!("machine '{}'", r.name)),
            )
            .collect();
        if !used.is_empty() {
            return Err(in_use(&name, &used));
        }
        let cache = self.images.clone();
        tokio::task::spawn_blocking(move || cache.remove(&name))
            .await
            .map_err(join_error)?
            .map_err(into_fault)
    }
}

/// The refusal to remove an image that is used, with who uses it.
pub fn in_use(image: &Name, users: &[String]) -> Fault {
    const SHOWN: usize = 5;
    let mut shown = users.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if users.len() > SHOWN {
        shown.push_str(&format!(" and {} more", users.len() - SHOWN));
    }
    Fault::conflict(format!("image '{image}' is in use by {shown}"))
        .hint("delete those first: godwit vm delete, godwit substrate delete")
}
