//! Machines that are gone. A site that was away at that time may come back with one; what the center
//! still knows of it then says that it has to end there. A machine of which nothing at all is known
//! is left alone: the registry may have been restored from a copy that is older than the machine.
//!
//! A row is dropped when every site has told what it runs after the machine was gone. Which sites
//! have is kept in memory only, so nothing is written for a report; after a restart of the center
//! each site has to tell once more.

use std::sync::Arc;

use godwit_types::{Name, UnixMs, VmId};

use super::tables::Change;
use super::{DeletedVm, Registry, Result, Sites, VmRecord};

/// Rows that wait for revoked sites only, which may never be seen again; the oldest go first.
pub(super) const KEPT_DELETED: usize = 10_000;

const FIRST: VmId = VmId(uuid::Uuid::nil());
const LAST: VmId = VmId(uuid::Uuid::max());

/// What forgets a machine and remembers that.
pub(super) fn changes(vm: &VmRecord) -> [Change; 2] {
    let gone = DeletedVm {
        vm: vm.id,
        name: vm.name.clone(),
        generation: vm.generation,
        when: UnixMs::now(),
    };
    [Change::Vm(vm.id, None), Change::Deleted(vm.id, Some(Arc::new(gone)))]
}

impl Registry {
    /// Those of `vms` that were deleted, as far as that was by the change `revision`.
    #[must_use]
    pub fn vms_deleted(
        &self,
        vms: impl IntoIterator<Item = VmId>,
        revision: u64,
    ) -> Vec<Arc<DeletedVm>> {
        self.file.read(|t| {
            if t.deleted.is_empty() {
                return Vec::new();
            }
            vms.into_iter()
                .filter_map(|id| t.deleted.get(&id))
                .filter(|e| e.changed_by <= revision)
                .map(|e| e.vm.clone())
                .collect()
        })
    }

    /// Deleted machines that are still remembered.
    #[must_use]
    pub fn deleted_count(&self) -> usize {
        self.file.read(|t| t.deleted.len())
    }
}

impl Sites {
    /// A site was asked what it runs when the registry was at `revision`, and has nothing that was
    /// deleted. Forgets the deleted machines that no site can have any more.
    ///
    /// # Errors
    /// When the database fails.
    pub fn has_no_deleted(&self, site: &Name, revision: u64) -> Result<()> {
        self.live.seen_machines(site, revision);
        if self.file.read(|t| t.deleted.is_empty()) {
            return Ok(());
        }
        self.file.write(|t, changes| {
            let seen = |name: &Name| self.live.machines_seen(name);
            let by = |revoked: bool| {
                let sites = t.sites.values().filter(|s| s.revoked == revoked);
                sites.map(|s| seen(&s.name)).min().unwrap_or(u64::MAX)
            };
            let (trusted, revoked) = (by(false), by(true));
            let drop = |(_, id): &(u64, VmId)| Change::Deleted(*id, None);
            let of_all = t.deleted_by.range(..=(trusted.min(revoked), LAST));
            changes.extend(of_all.map(drop));
            if revoked < trusted {
                let waiting = t.deleted_by.range((revoked + 1, FIRST)..=(trusted, LAST));
                let most = waiting.clone().count().saturating_sub(KEPT_DELETED);
                changes.extend(waiting.take(most).map(drop));
            }
            Ok(())
        })
    }
}
