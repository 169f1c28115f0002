//! The registry: sites, substrates, execution environments and operations, in one
//! embedded database file (redb) and, as it is there, in memory.
//!
//! Every change is on disk when the call returns, so a daemon that is killed at any moment finds a
//! whole state; changes that come at the same time share one transaction. A change of an execution
//! environment carries the generation its author believes in; an older one is refused
//! ([`RegistryError::Fenced`]), which is what keeps a machine from being claimed by two places.
//!
//! What sites report all the time (that they are there, their load and room) is kept in memory
//! only: nothing is written while nothing changes. Questions are answered from memory.
//!
//! After an input or output error, as on a full disk, the database is opened anew and comes up
//! with the last change that is whole: the call fails, and the next one finds a registry.
//!
//! Values are JSON: new optional fields do not break an older file, and an operator can read it.
//! A change waits for one `fsync` of a thread of its own; a worker thread of a runtime hands its
//! other tasks over meanwhile.

mod audience;
pub(crate) mod audit;
mod deleted;
mod error;
mod feed;
mod file;
mod journal;
mod layout;
mod live;
mod networks;
mod operations;
pub(crate) mod people;
mod ports;
mod quota;
mod records;
mod rows;
mod saved;
mod sites;
mod tables;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod tests_feed;
#[cfg(test)]
mod tests_tenants;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use godwit_types::{Generation, Hash, Name, SubstrateId, SubstrateKind, VmId};

use audit::Note;
use file::File;
use live::Live;
use tables::Change;

pub use audience::{Audience, Reader};
pub use audit::{AuditEnd, AuditEntry, AuditLog, MAX_AUDIT, MAX_READ};
pub use error::RegistryError;
pub(crate) use error::registry_fault;
pub use feed::{Event, EventId, EventKind, Forgotten, NoEventId, Object, Summary, Watcher, What};
pub use journal::{MoveReached, Step, StepKind, StepName, StepState, all_known, move_reached};
pub use networks::{DEFAULT_NETWORK, NetworkRecord, Networks, VmNetwork};
pub use operations::{KEPT_OPS, Operations};
pub use people::{Drawn, MAX_TOKENS, People, TenantRecord, TokenInfo, TokenRecord, UserRecord};
pub use ports::Ports;
pub use quota::{Quota, Quotas, TenantQuota, Usage};
pub use records::{
    Arriving, DeletedVm, OpRecord, Returning, SiteRecord, SubstrateRecord, VmRecord,
};
pub use sites::{LEASE, Sites};

use crate::clock::Moment;
use crate::principal::{Principal, default_tenant};

type Result<T> = std::result::Result<T, RegistryError>;

/// The registry of one center.
#[derive(Debug)]
pub struct Registry {
    file: Arc<File>,
    live: Arc<Live>,
    sites: Sites,
    ops: Operations,
    people: People,
    quotas: Quotas,
    networks: Networks,
    ports: Ports,
    audit: AuditLog,
}

fn missing(what: &'static str, key: &impl ToString) -> RegistryError {
    RegistryError::NotFound { what, key: key.to_string() }
}

impl Registry {
    /// Opens the file, making it if it is not there. One of the earlier format is brought to the
    /// present one.
    ///
    /// # Errors
    /// When the file is held by another daemon, damaged, or of another format.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, live) = (Arc::new(File::open(path)?), Arc::new(Live::default()));
        Ok(Self {
            sites: Sites::new(file.clone(), live.clone()),
            ops: Operations::new(file.clone()),
            people: People::new(file.clone()),
            quotas: Quotas::new(file.clone()),
            networks: Networks::new(file.clone()),
            ports: Ports::new(file.clone()),
            audit: AuditLog::new(file.clone()),
            file,
            live,
        })
    }

    /// Its sites.
    #[must_use]
    pub const fn sites(&self) -> &Sites {
        &self.sites
    }

    /// Its operations.
    #[must_use]
    pub const fn ops(&self) -> &Operations {
        &self.ops
    }

    /// Its tenants, their users and the tokens of these.
    #[must_use]
    pub const fn people(&self) -> &People {
        &self.people
    }

    /// Its networks.
    #[must_use]
    pub const fn networks(&self) -> &Networks {
        &self.networks
    }

    /// The ports that its machines publish.
    #[must_use]
    pub const fn ports(&self) -> &Ports {
        &self.ports
    }

    /// How much each tenant may have.
    #[must_use]
    pub const fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// Who did what.
    #[must_use]
    pub const fn audit(&self) -> &AuditLog {
        &self.audit
    }

    /// Write transactions that were made since it was opened: each costs an `fsync`.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.file.commits()
    }

    /// The last event of the feed. What is read after this call shows everything up to it.
    #[must_use]
    pub fn now(&self) -> EventId {
        self.file.feed().now()
    }

    /// Follows what is changed after an event, or from now on.
    ///
    /// # Errors
    /// [`Forgotten`] when what came after that event is not kept, or it is none of this registry.
    pub fn watch(&self, after: Option<EventId>) -> std::result::Result<Watcher, Forgotten> {
        match after {
            Some(id) => self.file.feed().watch_after(id),
            None => Ok(self.watch_now()),
        }
    }

    /// Follows what is changed from now on.
    #[must_use]
    pub fn watch_now(&self) -> Watcher {
        self.file.feed().watch_now()
    }

    /// Keys of entries that do not parse and were left out.
    #[must_use]
    pub fn damaged(&self) -> Vec<String> {
        self.file.read(|t| t.damaged.keys().cloned().collect())
    }

    // ---- substrates --------------------------------------------------------------------

    /// All substrates.
    ///
    /// # Errors
    /// When the database fails.
    pub fn substrates(&self) -> Result<Vec<SubstrateRecord>> {
        let rows: Vec<_> = self.file.read(|t| t.substrates.values().cloned().collect());
        Ok(rows.into_iter().map(Arc::unwrap_or_clone).collect())
    }

    /// A substrate by id, or by its name in the default tenant.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn substrate(&self, key: &str) -> Result<SubstrateRecord> {
        self.substrate_in(&default_tenant(), key)
    }

    /// A substrate by id, by its name in `tenant`, or as `TENANT/NAME`.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn substrate_in(&self, tenant: &Name, key: &str) -> Result<SubstrateRecord> {
        self.file.read(|t| {
            let named = || full_name(tenant, key).and_then(|(of, n)| t.substrate_named(&of, &n));
            let id = key.parse::<SubstrateId>().ok().or_else(named);
            id.and_then(|id| t.substrates.get(&id))
                .map(|s| SubstrateRecord::clone(s))
                .ok_or_else(|| t.missing_or_damaged("substrate", key))
        })
    }

    /// Whether a tenant has a substrate of that name.
    #[must_use]
    pub fn substrate_named(&self, tenant: &Name, name: &Name) -> bool {
        self.file.read(|t| t.substrate_named(tenant, name).is_some())
    }

    /// Enters a new substrate.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when the name or id is taken.
    pub fn substrate_add(&self, s: &SubstrateRecord) -> Result<()> {
        self.substrate_enter(s, false)
    }

    /// As [`Registry::substrate_add`], of one that a user brings: refused when its tenant has no
    /// room for it.
    ///
    /// # Errors
    /// As [`Registry::substrate_add`]; [`RegistryError::OverQuota`].
    pub fn substrate_bring(&self, s: &SubstrateRecord) -> Result<()> {
        self.substrate_enter(s, true)
    }

    fn substrate_enter(&self, s: &SubstrateRecord, counted: bool) -> Result<()> {
        self.file.write(|t, changes| {
            t.has_tenant(&s.tenant)?;
            if counted {
                t.has_room_for(s)?;
            }
            let taken = t.substrate_named(&s.tenant, &s.name).is_some();
            if taken || t.substrates.contains_key(&s.id) {
                return Err(RegistryError::Exists { what: "substrate", key: s.name.to_string() });
            }
            for site in &s.holders {
                self.live.holds(s.id, site, Moment::now());
            }
            changes.push(Change::Substrate(s.id, Some(Arc::new(s.clone()))));
            Ok(())
        })
    }

    /// Enters a new substrate in place of `old`, which it takes the name of; `vm`, the machine that
    /// it was docked from, is gone with that. When another environment was activated from the old
    /// one, that is kept under `aside`, and given back.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] without `old`; [`RegistryError::Exists`] when `aside` is needed
    /// and taken; as [`Registry::vm_remove`].
    pub fn substrate_replace(
        &self,
        old: SubstrateId,
        new: &SubstrateRecord,
        aside: &Name,
        vm: (VmId, Generation),
    ) -> Result<Option<SubstrateRecord>> {
        self.file.write(|t, changes| {
            let before = t.substrates.get(&old).ok_or_else(|| missing("substrate", &old))?;
            let gone = t.fence(vm.0, vm.1)?;
            changes.extend(deleted::changes(gone));
            let kept = if t.vms_of(old).any(|id| *id != vm.0) {
                if t.substrate_named(&before.tenant, aside).is_some() {
                    let key = aside.to_string();
                    return Err(RegistryError::Exists { what: "substrate", key });
                }
                Some(SubstrateRecord { name: aside.clone(), ..SubstrateRecord::clone(before) })
            } else {
                None
            };
            changes.push(Change::Substrate(old, kept.clone().map(Arc::new)));
            let mut new = SubstrateRecord {
                name: before.name.clone(),
                tenant: before.tenant.clone(),
                owner: before.owner.clone(),
                granted: before.granted.clone(),
                kind: before.kind,
                ..new.clone()
            };
            // A report may have told of it already.
            if let Some(known) = t.substrates.get(&new.id) {
                new.holders.extend(known.holders.iter().cloned());
            }
            for site in &new.holders {
                self.live.holds(new.id, site, Moment::now());
            }
            changes.push(Change::Substrate(new.id, Some(Arc::new(new))));
            Ok(kept)
        })
    }

    /// Adds or removes one holder.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn substrate_holder(&self, id: SubstrateId, site: &Name, holds: bool) -> Result<()> {
        self.file.write(|t, changes| {
            let s = t.substrates.get(&id).ok_or_else(|| missing("substrate", &id))?;
            let mut s = SubstrateRecord::clone(s);
            let changed = if holds {
                self.live.holds(id, site, Moment::now());
                s.holders.insert(site.clone())
            } else {
                s.damaged.remove(site);
                s.holders.remove(site)
            };
            if changed {
                changes.push(Change::Substrate(id, Some(Arc::new(s))));
            }
            Ok(())
        })
    }

    /// Enters `site` as a holder of a substrate with this content. The first to tell of a substrate
    /// says what its content is. Writes only what is new.
    ///
    /// # Errors
    /// [`RegistryError::OtherContent`]: the site holds something else, and is no holder.
    pub fn substrate_seen(
        &self,
        id: SubstrateId,
        site: &Name,
        content: Hash,
    ) -> Result<SubstrateRecord> {
        let seen = self.file.write(|t, changes| {
            let old = t.substrates.get(&id).ok_or_else(|| missing("substrate", &id))?;
            let mut s = SubstrateRecord::clone(old);
            let other = s.content.filter(|wanted| *wanted != content);
            if other.is_some() {
                s.holders.remove(site);
                s.damaged.remove(site);
            } else {
                if s.holders.insert(site.clone()) {
                    self.live.holds(id, site, Moment::now());
                }
                s.content = Some(content);
            }
            if s != **old {
                changes.push(Change::Substrate(id, Some(Arc::new(s.clone()))));
            }
            Ok((s, other))
        })?;
        match seen {
            (s, None) => Ok(s),
            (s, Some(wanted)) => Err(RegistryError::OtherContent {
                site: site.clone(),
                name: s.name,
                wanted,
                found: content,
            }),
        }
    }

    /// Takes a site's word of which substrates are damaged there. Writes only what is new.
    ///
    /// # Errors
    /// When the database fails.
    pub fn substrates_damaged(
        &self,
        site: &Name,
        damaged: &BTreeMap<SubstrateId, String>,
    ) -> Result<()> {
        self.file.write(|t, changes| {
            let held: BTreeSet<_> = t.held_at(site).chain(damaged.keys()).copied().collect();
            for s in held.iter().filter_map(|id| t.substrates.get(id)) {
                let why = damaged.get(&s.id);
                if s.damaged.get(site) == why {
                    continue;
                }
                let mut s = SubstrateRecord::clone(s);
                match why {
                    Some(why) => s.damaged.insert(site.clone(), why.clone()),
                    None => s.damaged.remove(site),
                };
                changes.push(Change::Substrate(s.id, Some(Arc::new(s))));
            }
            Ok(())
        })
    }

    /// Lets another tenant use a restricted substrate, or no longer.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`]; [`RegistryError::Busy`] for one that is not restricted.
    pub fn substrate_grant(
        &self,
        who: &Principal,
        id: SubstrateId,
        tenant: &Name,
        may: bool,
    ) -> Result<SubstrateRecord> {
        self.file.write(|t, changes| {
            let old = t.substrates.get(&id).ok_or_else(|| missing("substrate", &id))?;
            let mut s = SubstrateRecord::clone(old);
            if may {
                t.has_tenant(tenant)?;
                if s.kind != SubstrateKind::Restricted {
                    let words = format!(
                        "substrate '{}' is {}: only restricted ones are granted",
                        s.name, s.kind
                    );
                    return Err(RegistryError::Busy(words));
                }
                s.granted.insert(tenant.clone());
            } else if !s.granted.remove(tenant) {
                return Err(missing("grant to", tenant));
            }
            if s != **old {
                let action = if may { "grant create" } else { "grant delete" };
                let object = format!("{} to {tenant}", s.name);
                let note = Note::of(who, action, &object);
                changes.push(t.audited(Note { tenant: &s.tenant, ..note }));
                changes.push(Change::Substrate(id, Some(Arc::new(s.clone()))));
            }
            Ok(s)
        })
    }

    /// Forgets a substrate. Whether an environment at rest still stands on it, its sites know.
    ///
    /// # Errors
    /// [`RegistryError::Busy`] that names an environment on its way, which may.
    pub fn substrate_remove(&self, who: &Principal, id: SubstrateId) -> Result<()> {
        self.file.write(|t, changes| {
            let s = t.substrates.get(&id).ok_or_else(|| missing("substrate", &id))?;
            if let Some(vm) = t.passing(id) {
                let by = match vm.tenant == s.tenant {
                    true => format!("machine '{}'", vm.name),
                    false => "a machine of another tenant".into(),
                };
                let words = format!("substrate '{}' is in use by {by}", s.name);
                return Err(RegistryError::Busy(words));
            }
            let note = Note::of(who, "substrate delete", s.name.as_str());
            changes.push(t.audited(Note { tenant: &s.tenant, ..note }));
            changes.push(Change::Substrate(id, None));
            Ok(())
        })?;
        self.live.forget(id);
        Ok(())
    }

    // ---- execution environments --------------------------------------------------------

    /// All execution environments.
    ///
    /// # Errors
    /// When the database fails.
    pub fn vms(&self) -> Result<Vec<VmRecord>> {
        let rows: Vec<_> = self.file.read(|t| t.vms.values().map(|e| e.vm.clone()).collect());
        Ok(rows.into_iter().map(Arc::unwrap_or_clone).collect())
    }

    /// An execution environment by id, or by its name in the default tenant.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn vm(&self, key: &str) -> Result<VmRecord> {
        self.vm_in(&default_tenant(), key)
    }

    /// An execution environment by id, by its name in `tenant`, or as `TENANT/NAME`.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn vm_in(&self, tenant: &Name, key: &str) -> Result<VmRecord> {
        self.file.read(|t| {
            let named = || full_name(tenant, key).and_then(|(of, n)| t.vm_named(&of, &n));
            let id = key.parse::<VmId>().ok().or_else(named);
            id.and_then(|id| t.vms.get(&id))
                .map(|e| VmRecord::clone(&e.vm))
                .ok_or_else(|| t.missing_or_damaged("machine", key))
        })
    }

    /// Whether a tenant has an execution environment of that name.
    #[must_use]
    pub fn vm_named(&self, tenant: &Name, name: &Name) -> bool {
        self.file.read(|t| t.vm_named(tenant, name).is_some())
    }

    /// An environment that was activated from a substrate, if there is one.
    #[must_use]
    pub fn vm_of(&self, substrate: SubstrateId) -> Option<VmRecord> {
        self.file.read(|t| t.vm_of(substrate).map(|vm| VmRecord::clone(vm)))
    }

    /// Counts the changes of environments, for [`Registry::vms_about`].
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.file.read(|t| t.revision)
    }

    /// The last of those changes that was of an environment which is, or was, at `site`.
    #[must_use]
    pub fn revision_at(&self, site: &Name) -> u64 {
        self.file.read(|t| t.changed_at(site))
    }

    /// The environments of a site and those of `others` that are known, without those that have
    /// changed after `revision`.
    #[must_use]
    pub fn vms_about(
        &self,
        site: &Name,
        others: impl IntoIterator<Item = VmId>,
        revision: u64,
    ) -> Vec<Arc<VmRecord>> {
        self.file.read(|t| {
            let elsewhere = others.into_iter().filter_map(|id| t.vms.get(&id));
            t.vms_at(site)
                .filter_map(|id| t.vms.get(id))
                .chain(elsewhere.filter(|e| e.vm.site != *site))
                .filter(|e| e.changed_by <= revision)
                .map(|e| e.vm.clone())
                .collect()
        })
    }

    /// Enters a new execution environment and the operation that makes it, both or neither.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when the name is taken.
    pub fn vm_add(&self, vm: &VmRecord, op: Option<&OpRecord>) -> Result<()> {
        self.file.write(|t, changes| {
            t.has_tenant(&vm.tenant)?;
            if t.vm_named(&vm.tenant, &vm.name).is_some() {
                return Err(RegistryError::Exists { what: "machine", key: vm.name.to_string() });
            }
            t.has_place(vm)?;
            t.has_room(None, vm)?;
            changes.push(Change::Vm(vm.id, Some(Arc::new(vm.clone()))));
            changes.extend(op.and_then(|op| t.audited_op(op)));
            changes.extend(op.map(|op| Change::Op(op.id, Some(Arc::new(op.clone())))));
            Ok(())
        })
    }

    /// Changes an execution environment, if `generation` is the one the registry has. `change`
    /// may fail, and then nothing is written; nor is a change that changes nothing.
    ///
    /// # Errors
    /// [`RegistryError::Fenced`] for another generation; whatever `change` refuses.
    pub fn vm_update(
        &self,
        id: VmId,
        generation: Generation,
        change: impl FnOnce(&mut VmRecord) -> Result<()>,
    ) -> Result<VmRecord> {
        self.file.write(|t, changes| {
            let old = t.fence(id, generation)?;
            let mut vm = VmRecord::clone(old);
            change(&mut vm)?;
            let same = (vm.id, &vm.name, &vm.tenant) == (id, &old.name, &old.tenant);
            debug_assert!(same, "identity of a machine is fixed");
            if vm.generation < generation {
                return Err(RegistryError::Fenced {
                    name: vm.name,
                    current: generation,
                    given: vm.generation,
                });
            }
            t.has_room(Some(old), &vm)?;
            if vm != **old {
                changes.push(Change::Vm(id, Some(Arc::new(vm.clone()))));
            }
            Ok(vm)
        })
    }

    /// Forgets an execution environment, if `generation` is the one the registry has. That it is
    /// gone is remembered until no site can have it any more ([`Registry::vms_deleted`]).
    ///
    /// # Errors
    /// As [`Registry::vm_update`].
    pub fn vm_remove(&self, id: VmId, generation: Generation) -> Result<()> {
        self.file.write(|t, changes| {
            changes.extend(deleted::changes(t.fence(id, generation)?));
            Ok(())
        })
    }
}

/// `TENANT/NAME`, or a name in `tenant`.
pub(crate) fn full_name(tenant: &Name, key: &str) -> Option<(Name, Name)> {
    match key.split_once('/') {
        Some((of, name)) => Some((Name::new(of).ok()?, Name::new(name).ok()?)),
        None => Some((tenant.clone(), Name::new(key).ok()?)),
    }
}

/// A key from outside, safe to print.
fn shown(key: &str) -> String {
    key.chars().take(60).flat_map(char::escape_debug).collect()
}
