//! What the registry holds, in memory, with the indexes that its questions need.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_types::{Generation, Name, NetworkId, OpId, SiteKind, SubstrateId, UnixMs, VmId};
use serde::{Deserialize, Serialize};

use super::networks::NetworkRecord;
use super::rows::{AuditEnd, AuditEntry, TenantRecord, TokenRecord, UserRecord};
use super::{
    DeletedVm, OpRecord, RegistryError, Result, SubstrateRecord, VmRecord, missing, shown,
};
use crate::op_kind::OpKind;

/// What is durable of a site. The rest of a [`super::SiteRecord`] is what it last reported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SiteRow {
    pub(super) name: Name,
    pub(super) kind: SiteKind,
    pub(super) joined: UnixMs,
    pub(super) revoked: bool,
    /// When it went away last, as far as that was written down.
    #[serde(default)]
    pub(super) last_seen: UnixMs,
    /// Format 1 only: the end of its lease, moved on by every report.
    #[serde(default, skip_serializing)]
    pub(super) lease_until: UnixMs,
}

/// One changed row: its key and its new value, or none when it is gone.
#[derive(Debug, Clone)]
pub(super) enum Change {
    Site(Name, Option<Arc<SiteRow>>),
    Substrate(SubstrateId, Option<Arc<SubstrateRecord>>),
    Vm(VmId, Option<Arc<VmRecord>>),
    Op(OpId, Option<Arc<OpRecord>>),
    Deleted(VmId, Option<Arc<DeletedVm>>),
    Tenant(Name, Option<Arc<TenantRecord>>),
    User(Name, Option<Arc<UserRecord>>),
    Token(String, Option<Arc<TokenRecord>>),
    Network(NetworkId, Option<Arc<NetworkRecord>>),
    /// Only ever added.
    Audit(Arc<AuditEntry>),
}

/// A machine and the number of the change that made it as it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct VmEntry {
    pub(super) vm: Arc<VmRecord>,
    pub(super) changed_by: u64,
}

/// A machine that is gone and the number of the change that made it so.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DeletedEntry {
    pub(super) vm: Arc<DeletedVm>,
    pub(super) changed_by: u64,
}

/// Tenants, users and tokens, in memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct PeopleTables {
    pub(super) tenants: BTreeMap<Name, Arc<TenantRecord>>,
    /// By their ids.
    pub(super) users: BTreeMap<Name, Arc<UserRecord>>,
    /// Tokens for the API, by their ids.
    pub(super) tokens: BTreeMap<String, Arc<TokenRecord>>,
}

/// All rows.
#[derive(Debug, Clone, Default)]
pub(super) struct Tables {
    pub(super) sites: BTreeMap<Name, Arc<SiteRow>>,
    pub(super) substrates: BTreeMap<SubstrateId, Arc<SubstrateRecord>>,
    pub(super) vms: BTreeMap<VmId, VmEntry>,
    pub(super) ops: BTreeMap<OpId, Arc<OpRecord>>,
    /// Machines that are gone and that a site may still have.
    pub(super) deleted: BTreeMap<VmId, DeletedEntry>,
    /// The same by the change that made them so.
    pub(super) deleted_by: BTreeSet<(u64, VmId)>,
    pub(super) people: PeopleTables,
    pub(super) networks: BTreeMap<NetworkId, Arc<NetworkRecord>>,
    /// Where the audit log ends; its entries are read from the file.
    pub(super) audit: AuditEnd,
    /// Entries that do not parse, by key: what the parser said.
    pub(super) damaged: BTreeMap<String, String>,
    /// Counts the changes of machines.
    pub(super) revision: u64,
    /// By tenant and name.
    substrate_names: BTreeMap<(Name, Name), SubstrateId>,
    vm_names: BTreeMap<(Name, Name), VmId>,
    /// The last change of a machine that is, or was, at each site.
    changed_at: BTreeMap<Name, u64>,
    /// The machines of each site.
    vms_at: BTreeMap<Name, BTreeSet<VmId>>,
    /// The machines that were activated from each substrate.
    vms_of: BTreeMap<SubstrateId, BTreeSet<VmId>>,
    /// The substrates that each site holds.
    held_at: BTreeMap<Name, BTreeSet<SubstrateId>>,
    /// The operations of each tenant that have ended, oldest first.
    ended: BTreeMap<Name, BTreeSet<OpId>>,
}

fn enter<K: Ord, V: Ord>(index: &mut BTreeMap<K, BTreeSet<V>>, key: K, value: V) {
    index.entry(key).or_default().insert(value);
}

fn remove<K: Ord, V: Ord>(index: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = index.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            index.remove(key);
        }
    }
}

fn put<K: Ord + Clone, V>(rows: &mut BTreeMap<K, Arc<V>>, key: &K, row: Option<&Arc<V>>) {
    match row {
        Some(row) => {
            rows.insert(key.clone(), row.clone());
        }
        None => {
            rows.remove(key);
        }
    }
}

impl Tables {
    /// Makes a change, and the indexes follow.
    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Site(name, row) => put(&mut self.sites, name, row.as_ref()),
            Change::Substrate(id, row) => self.substrate(*id, row.as_ref()),
            Change::Vm(id, row) => self.vm(*id, row.as_ref()),
            Change::Deleted(id, row) => self.deleted(*id, row.as_ref()),
            Change::Tenant(name, row) => put(&mut self.people.tenants, name, row.as_ref()),
            Change::User(id, row) => put(&mut self.people.users, id, row.as_ref()),
            Change::Token(id, row) => put(&mut self.people.tokens, id, row.as_ref()),
            Change::Network(id, row) => put(&mut self.networks, id, row.as_ref()),
            Change::Audit(e) => self.audit = AuditEnd { entries: e.number, last: e.hash() },
            Change::Op(id, row) => {
                if let Some(old) = self.ops.get(id) {
                    remove(&mut self.ended, &old.tenant, id);
                }
                if let Some(o) = row.as_ref().filter(|o| o.state.is_final()) {
                    enter(&mut self.ended, o.tenant.clone(), *id);
                }
                put(&mut self.ops, id, row.as_ref());
            }
        }
    }

    fn substrate(&mut self, id: SubstrateId, row: Option<&Arc<SubstrateRecord>>) {
        let old = match row {
            Some(row) => self.substrates.insert(id, row.clone()),
            None => self.substrates.remove(&id),
        };
        if let Some(old) = old {
            for site in &old.holders {
                remove(&mut self.held_at, site, &id);
            }
            // Unless another has taken the name in the same change.
            let key = (old.tenant.clone(), old.name.clone());
            if self.substrate_names.get(&key) == Some(&id) {
                self.substrate_names.remove(&key);
            }
        }
        if let Some(row) = row {
            for site in &row.holders {
                enter(&mut self.held_at, site.clone(), id);
            }
            self.substrate_names.insert((row.tenant.clone(), row.name.clone()), id);
        }
    }

    fn vm(&mut self, id: VmId, row: Option<&Arc<VmRecord>>) {
        self.revision += 1;
        let entry = row.map(|vm| VmEntry { vm: vm.clone(), changed_by: self.revision });
        let old = match entry {
            Some(entry) => self.vms.insert(id, entry),
            None => self.vms.remove(&id),
        };
        if let Some(VmEntry { vm: old, .. }) = old {
            self.changed_at.insert(old.site.clone(), self.revision);
            remove(&mut self.vms_at, &old.site, &id);
            if let Some(s) = &old.substrate {
                remove(&mut self.vms_of, s, &id);
            }
            let key = (old.tenant.clone(), old.name.clone());
            if self.vm_names.get(&key) == Some(&id) {
                self.vm_names.remove(&key);
            }
        }
        if let Some(vm) = row {
            self.changed_at.insert(vm.site.clone(), self.revision);
            enter(&mut self.vms_at, vm.site.clone(), id);
            if let Some(s) = vm.substrate {
                enter(&mut self.vms_of, s, id);
            }
            self.vm_names.insert((vm.tenant.clone(), vm.name.clone()), id);
        }
    }

    fn deleted(&mut self, id: VmId, row: Option<&Arc<DeletedVm>>) {
        if let Some(old) = self.deleted.remove(&id) {
            self.deleted_by.remove(&(old.changed_by, id));
        }
        if let Some(vm) = row {
            self.revision += 1;
            let entry = DeletedEntry { vm: vm.clone(), changed_by: self.revision };
            self.deleted.insert(id, entry);
            self.deleted_by.insert((self.revision, id));
        }
    }

    pub(super) fn substrate_named(&self, tenant: &Name, name: &Name) -> Option<SubstrateId> {
        self.substrate_names.get(&(tenant.clone(), name.clone())).copied()
    }

    pub(super) fn vm_named(&self, tenant: &Name, name: &Name) -> Option<VmId> {
        self.vm_names.get(&(tenant.clone(), name.clone())).copied()
    }

    /// That a row is not there, or is damaged.
    pub(super) fn missing_or_damaged(&self, what: &'static str, key: &str) -> RegistryError {
        match self.damaged.get(key) {
            Some(why) => {
                RegistryError::Damaged { key: shown(key), source: serde::de::Error::custom(why) }
            }
            None => RegistryError::NotFound { what, key: shown(key) },
        }
    }

    /// A machine, to one who knows of its generation.
    pub(super) fn fence(&self, id: VmId, given: Generation) -> Result<&Arc<VmRecord>> {
        let vm = self.vms.get(&id).map(|e| &e.vm).ok_or_else(|| missing("machine", &id))?;
        if vm.generation == given {
            Ok(vm)
        } else {
            let (name, current) = (vm.name.clone(), vm.generation);
            Err(RegistryError::Fenced { name, current, given })
        }
    }

    /// The last change of a machine that is, or was, at a site.
    pub(super) fn changed_at(&self, site: &Name) -> u64 {
        self.changed_at.get(site).copied().unwrap_or_default()
    }

    /// The machines of a site.
    pub(super) fn vms_at(&self, site: &Name) -> impl Iterator<Item = &VmId> {
        self.vms_at.get(site).into_iter().flatten()
    }

    /// The machines that were activated from a substrate.
    pub(super) fn vms_of(&self, substrate: SubstrateId) -> impl Iterator<Item = &VmId> {
        self.vms_of.get(&substrate).into_iter().flatten()
    }

    /// One of them that is on its way.
    pub(super) fn passing(&self, substrate: SubstrateId) -> Option<&Arc<VmRecord>> {
        let all = self.vms_of(substrate).filter_map(|id| self.vms.get(id));
        all.map(|e| &e.vm).find(|vm| vm.is_on_its_way())
    }

    /// One of them.
    pub(super) fn vm_of(&self, substrate: SubstrateId) -> Option<&Arc<VmRecord>> {
        let id = self.vms_of(substrate).next()?;
        self.vms.get(id).map(|e| &e.vm)
    }

    /// The substrates that a site holds.
    pub(super) fn held_at(&self, site: &Name) -> impl Iterator<Item = &SubstrateId> {
        self.held_at.get(site).into_iter().flatten()
    }

    /// The oldest operations of a tenant that have ended, beyond the newest `keep`. One that says
    /// what a machine has become stays while that is there, until there are twice as many.
    pub(super) fn ended_beyond<'a>(
        &'a self,
        tenant: &Name,
        keep: usize,
    ) -> impl Iterator<Item = &'a OpId> + use<'a> {
        let ended = self.ended.get(tenant);
        let all = ended.map_or(0, BTreeSet::len);
        let old = ended.into_iter().flatten().take(all.saturating_sub(keep));
        old.filter(move |id| all > 2 * keep || !self.says_what_became(id))
    }

    fn says_what_became(&self, id: &OpId) -> bool {
        let vm = self.ops.get(id).and_then(|o| match &o.kind {
            OpKind::VmDock { vm, .. } | OpKind::SubstrateRebuild { vm, .. } => Some(vm),
            _ => None,
        });
        vm.is_some_and(|vm| self.vms.contains_key(vm))
    }

    /// Takes every machine as changed by `revision`.
    pub(super) fn renumber(&mut self, revision: u64) {
        self.revision = revision;
        for name in self.sites.keys() {
            self.changed_at.insert(name.clone(), revision);
        }
        for entry in self.vms.values_mut() {
            entry.changed_by = revision;
        }
        for entry in self.deleted.values_mut() {
            entry.changed_by = revision;
        }
        self.deleted_by = self.deleted.keys().map(|id| (revision, *id)).collect();
    }

    /// Whether the rows are the same; the numbers of changes may differ.
    pub(super) fn same_rows(&self, other: &Self) -> bool {
        self.sites == other.sites
            && self.substrates == other.substrates
            && self.ops == other.ops
            && self.people == other.people
            && self.audit == other.audit
            && self.vms.len() == other.vms.len()
            && self.vms.iter().all(|(id, e)| other.vms.get(id).is_some_and(|o| o.vm == e.vm))
            && self.deleted.len() == other.deleted.len()
            && self
                .deleted
                .iter()
                .all(|(id, e)| other.deleted.get(id).is_some_and(|o| o.vm == e.vm))
    }
}
