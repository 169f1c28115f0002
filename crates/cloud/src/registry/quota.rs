//! How much a tenant may have.
//!
//! What a quota counts is counted in the change that adds to it, on top of every change that was
//! taken before it: two creations cannot both take the last place. A recovery, which writes down
//! what is so, is never refused.

use std::sync::Arc;

use godwit_types::{Name, VmState};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::audit::Note;
use super::file::File;
use super::rows::TenantRecord;
use super::tables::{Change, Tables};
use super::{RegistryError, Result, SubstrateRecord, VmRecord, missing};
use crate::principal::Principal;

pub use super::rows::Quota;

/// What a tenant has of what a [`Quota`] counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Machines, running or not.
    pub machines: u64,
    /// vCPUs of the machines that are on.
    pub vcpus: u64,
    /// Guest memory of the machines that are on, in MiB.
    pub memory_mib: u64,
    /// Bytes of its machines' disks as their guests see them; a disk that is not known counts nothing.
    #[serde(default)]
    pub disk_bytes: u64,
    /// What its substrates hold of memory and disk, in bytes; of a docking under way its guest's memory.
    pub pool_bytes: u64,
    /// Machines that move.
    pub moves: u64,
}

/// A tenant's quota and what it has of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TenantQuota {
    /// The tenant.
    pub tenant: Name,
    /// The most that it may have.
    pub quota: Quota,
    /// What it has.
    pub used: Usage,
}

fn is_on(state: VmState) -> bool {
    !matches!(state, VmState::Stopped | VmState::Failed)
}

impl Usage {
    fn of<'a>(
        vms: impl Iterator<Item = &'a VmRecord>,
        substrates: impl Iterator<Item = &'a SubstrateRecord>,
    ) -> Self {
        let mut used = Self::default();
        for vm in vms {
            used.machines += 1;
            used.disk_bytes = used.disk_bytes.saturating_add(vm.disk_bytes.unwrap_or(0));
            if is_on(vm.state) {
                used.vcpus += u64::from(vm.vcpus);
                used.memory_mib += u64::from(vm.memory.0);
            }
            used.moves += u64::from(vm.state == VmState::Moving);
            if vm.state == VmState::Docking {
                used.pool_bytes = used.pool_bytes.saturating_add(u64::from(vm.memory.0) << 20);
            }
        }
        // What is new in each would go to nobody's account when the one that it is shared with goes.
        let held = substrates.map(|s| s.raw_bytes);
        used.pool_bytes = held.fold(used.pool_bytes, u64::saturating_add);
        used
    }
}

impl Tables {
    fn usage(&self, tenant: &Name) -> Usage {
        Usage::of(
            self.vms.values().map(|e| &*e.vm).filter(|v| v.tenant == *tenant),
            self.substrates.values().map(|s| &**s).filter(|s| s.tenant == *tenant),
        )
    }

    /// Refuses the change of a machine from `old` (none: it is new) to `new` that its tenant has no
    /// room for.
    pub(super) fn has_room(&self, old: Option<&VmRecord>, new: &VmRecord) -> Result<()> {
        // That its tenant is there was asked when it was made: a damaged entry stops no recovery.
        let Some(tenant) = self.people.tenants.get(&new.tenant) else { return Ok(()) };
        let q = tenant.quota;
        let begins = |state| new.state == state && old.is_none_or(|o| o.state != state);
        let starts = begins(VmState::Starting) && old.is_none_or(|o| !is_on(o.state));
        let (moves, docks) = (begins(VmState::Moving), begins(VmState::Docking));
        if q == Quota::default() || !(starts || moves || docks) {
            return Ok(());
        }
        let used = self.usage(&new.tenant);
        let (vcpus, memory) = (u64::from(new.vcpus), u64::from(new.memory.0));
        let mut wanted = Vec::new();
        if old.is_none() {
            wanted.push(("machines", used.machines, 1, q.machines));
            let disk = new.disk_bytes.unwrap_or(0);
            wanted.push(("bytes of machines' disks", used.disk_bytes, disk, q.disk_bytes));
        }
        if starts {
            wanted.push(("running vCPUs", used.vcpus, vcpus, q.vcpus));
            wanted.push(("MiB of running memory", used.memory_mib, memory, q.memory_mib));
        }
        if moves {
            wanted.push(("moves at once", used.moves, 1, q.moves));
        }
        if docks {
            wanted.push(("bytes in the pool", used.pool_bytes, 1, q.pool_bytes));
        }
        within(&new.tenant, &wanted)
    }

    /// Refuses a substrate that comes in and that its tenant has no room for.
    pub(super) fn has_room_for(&self, s: &SubstrateRecord) -> Result<()> {
        let tenant =
            self.people.tenants.get(&s.tenant).ok_or_else(|| missing("tenant", &s.tenant))?;
        let used = self.usage(&s.tenant).pool_bytes;
        within(&s.tenant, &[("bytes in the pool", used, s.raw_bytes, tenant.quota.pool_bytes)])
    }
}

/// Refuses what is beyond a limit: what, used, asked for, the limit.
fn within(tenant: &Name, wanted: &[(&'static str, u64, u64, Option<u64>)]) -> Result<()> {
    for &(what, used, asked, limit) in wanted {
        if let Some(limit) = limit.filter(|limit| used.saturating_add(asked) > *limit) {
            let tenant = tenant.clone();
            return Err(RegistryError::OverQuota { tenant, what, used, limit });
        }
    }
    Ok(())
}

/// The quotas of a registry's tenants.
#[derive(Debug)]
pub struct Quotas {
    file: Arc<File>,
}

impl Quotas {
    pub(super) const fn new(file: Arc<File>) -> Self {
        Self { file }
    }

    /// Sets how much a tenant may have. What it has already stays.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`].
    pub fn set(&self, who: &Principal, name: &Name, quota: Quota) -> Result<TenantRecord> {
        self.file.write(|t, changes| {
            let old = t.people.tenants.get(name).ok_or_else(|| missing("tenant", name))?;
            let tenant = TenantRecord { quota, ..TenantRecord::clone(old) };
            if tenant != **old {
                let note = Note::of(who, "quota set", name.as_str());
                changes.push(t.audited(Note { tenant: name, ..note }));
                changes.push(Change::Tenant(name.clone(), Some(Arc::new(tenant.clone()))));
            }
            Ok(tenant)
        })
    }

    /// Refuses `bytes` that would come into the pool beyond what a tenant may have there.
    ///
    /// # Errors
    /// [`RegistryError::OverQuota`], [`RegistryError::NotFound`].
    pub fn pool_has_room(&self, tenant: &Name, bytes: u64) -> Result<()> {
        self.file.read(|t| {
            let record = t.people.tenants.get(tenant).ok_or_else(|| missing("tenant", tenant))?;
            let Some(limit) = record.quota.pool_bytes else { return Ok(()) };
            let used = t.usage(tenant).pool_bytes;
            within(tenant, &[("bytes in the pool", used, bytes, Some(limit))])
        })
    }

    /// How much a tenant may have, and has.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`].
    pub fn of(&self, tenant: &Name) -> Result<TenantQuota> {
        self.file.read(|t| {
            let record = t.people.tenants.get(tenant).ok_or_else(|| missing("tenant", tenant))?;
            let (tenant, quota) = (tenant.clone(), record.quota);
            Ok(TenantQuota { used: t.usage(&tenant), tenant, quota })
        })
    }
}
