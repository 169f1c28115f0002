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
mod live;
pub(crate) mod people;
mod quota;
mod records;
mod saved;
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
use std::time::Duration;

use godwit_site::SiteReport;
use godwit_types::{Generation, Hash, Name, OpId, SubstrateId, UnixMs, VmId};

use audit::Note;
use file::File;
use live::Live;
use tables::{Change, SiteRow, Tables};

pub use audience::{Audience, Reader};
pub use audit::{AuditEnd, AuditEntry, MAX_AUDIT, MAX_READ};
pub use error::RegistryError;
pub(crate) use error::registry_fault;
pub use feed::{Event, EventId, EventKind, Forgotten, NoEventId, Object, Summary, Watcher, What};
pub use journal::{MoveReached, Step, StepKind, StepName, StepState, all_known, move_reached};
pub use people::{Drawn, MAX_TOKENS, TenantRecord, TokenInfo, TokenRecord, UserRecord};
pub use quota::{Quota, TenantQuota, Usage};
pub use records::{Arriving, DeletedVm, OpRecord, SiteRecord, SubstrateRecord, VmRecord};

use crate::access::{Principal, default_tenant};
use crate::clock::Moment;

/// Finished operations of each tenant that are kept; the oldest go first.
pub const KEPT_OPS: usize = 1000;

type Result<T> = std::result::Result<T, RegistryError>;

/// The registry of one center.
#[derive(Debug)]
pub struct Registry {
    file: File,
    live: Live,
}

/// The oldest that a report may be when it arrives.
const REPORT_AGE: Duration = Duration::from_secs(30);

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
        Ok(Self { file: File::open(path)?, live: Live::default() })
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

    /// Tells those who follow of an operation that is asked to stop, which is not written down.
    pub(crate) fn op_cancelling(&self, op: &OpRecord) {
        let audience = self.file.read(|t| audience::Tenants::of(t).op(op));
        self.file.feed().op_cancelling(op, audience);
    }

    /// Keys of entries that do not parse and were left out.
    #[must_use]
    pub fn damaged(&self) -> Vec<String> {
        self.file.read(|t| t.damaged.keys().cloned().collect())
    }

    fn missing_or_damaged(t: &Tables, what: &'static str, key: &str) -> RegistryError {
        match t.damaged.get(key) {
            Some(why) => {
                RegistryError::Damaged { key: shown(key), source: serde::de::Error::custom(why) }
            }
            None => RegistryError::NotFound { what, key: shown(key) },
        }
    }

    // ---- sites -------------------------------------------------------------------------

    /// All sites.
    ///
    /// # Errors
    /// When the database fails.
    pub fn sites(&self) -> Result<Vec<SiteRecord>> {
        let rows: Vec<_> = self.file.read(|t| t.sites.values().cloned().collect());
        let now = Moment::now();
        Ok(rows.iter().map(|r| self.live.record(r, now)).collect())
    }

    /// One site.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn site(&self, name: &Name) -> Result<SiteRecord> {
        self.site_at(name, Moment::now())
    }

    fn site_at(&self, name: &Name, now: Moment) -> Result<SiteRecord> {
        let row = self.file.read(|t| {
            t.sites
                .get(name)
                .cloned()
                .ok_or_else(|| Self::missing_or_damaged(t, "site", name.as_str()))
        })?;
        Ok(self.live.record(&row, now))
    }

    /// Enters a site, or renews the entry of one that joins again. Its lease comes with its first
    /// report.
    ///
    /// # Errors
    /// When the database fails.
    pub fn site_put(&self, site: &SiteRecord) -> Result<()> {
        let row = SiteRow {
            name: site.name.clone(),
            kind: site.kind,
            joined: site.joined,
            revoked: site.revoked,
            last_seen: site.last_seen,
            lease_until: UnixMs::default(),
        };
        self.file.write(|t, changes| {
            // When it was seen last is written when it goes away.
            let same = t.sites.get(&row.name).is_some_and(|old| {
                (old.kind, old.joined, old.revoked) == (row.kind, row.joined, row.revoked)
            });
            if !same {
                changes.push(Change::Site(row.name.clone(), Some(Arc::new(row))));
            }
            Ok(())
        })?;
        self.live.put(site, Moment::now());
        Ok(())
    }

    /// Takes a site's report and gives it a fresh lease of `ttl` from `now`. A report cannot
    /// shorten a lease, and a revoked site gets none. Nothing is written unless the site holds
    /// other substrates than before.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`]; [`RegistryError::Revoked`].
    pub fn site_report(
        &self,
        name: &Name,
        report: SiteReport,
        now: Moment,
        ttl: Duration,
    ) -> Result<SiteRecord> {
        // What a site holds is known from its own word; the substrate table follows it.
        let row = self.file.write(|t, changes| {
            let row = t.sites.get(name).cloned().ok_or_else(|| missing("site", name))?;
            if row.revoked {
                return Err(RegistryError::Revoked(name.clone()));
            }
            let mut hold = |id: &SubstrateId, holds| {
                if let Some(s) = t.substrates.get(id) {
                    let mut s = SubstrateRecord::clone(s);
                    let changed = if holds {
                        s.holders.insert(name.clone())
                    } else {
                        s.damaged.remove(name);
                        s.holders.remove(name)
                    };
                    if changed {
                        changes.push(Change::Substrate(*id, Some(Arc::new(s))));
                    }
                }
            };
            let known: BTreeSet<_> = t.held_at(name).collect();
            for id in report.substrates.iter().filter(|id| !known.contains(id)) {
                self.live.holds(*id, name, now);
                hold(id, true);
            }
            for id in known.into_iter().filter(|id| !report.substrates.contains(id)) {
                // The report may have been made before the substrate was, or came there.
                if self.live.held_for(*id, name, now).is_none_or(|held| held >= REPORT_AGE) {
                    hold(id, false);
                }
            }
            Ok(row)
        })?;
        self.live.report(name, report, now, ttl, self.file.feed());
        Ok(self.live.record(&row, now))
    }

    /// Whether a report names no substrate that the site is not known to hold, and nothing has
    /// happened to those since its last report.
    #[must_use]
    pub fn knows_holdings(&self, site: &Name, report: &SiteReport) -> bool {
        report.holdings.is_some()
            && self.live.holdings(site) == report.holdings
            && self.file.read(|t| {
                let held = |id| t.substrates.get(id).is_some_and(|s| s.holders.contains(site));
                report.substrates.iter().all(held)
            })
    }

    /// Ends a site's lease, for it has not answered since `asked`; unless it has reported since.
    /// Answers whether there was a lease to end.
    pub fn site_silent(&self, name: &Name, asked: Moment) -> bool {
        self.live.silent(name, asked.run, self.file.feed())
    }

    /// Ends a site's lease that has run out by itself, and tells of that.
    pub fn site_lapsed(&self, name: &Name, now: Moment) {
        self.live.lapsed(name, now.run, self.file.feed());
    }

    /// Ends a site's lease for it has gone away, and writes down when it was seen last.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn site_away(&self, name: &Name) -> Result<()> {
        self.live.silent(name, Duration::MAX, self.file.feed());
        let seen = self.live.last_seen(name);
        self.site_change(name, |row| {
            row.last_seen = seen.unwrap_or(row.last_seen);
        })
    }

    /// Marks a site as no longer trusted.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn site_revoke(&self, name: &Name) -> Result<()> {
        self.site_change(name, |row| row.revoked = true)
    }

    /// Marks a revoked site as trusted again: it has joined anew.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn site_readmit(&self, name: &Name) -> Result<()> {
        self.site_change(name, |row| row.revoked = false)
    }

    fn site_change(&self, name: &Name, change: impl FnOnce(&mut SiteRow)) -> Result<()> {
        self.file.write(|t, changes| {
            let old = t.sites.get(name).ok_or_else(|| missing("site", name))?;
            let mut row = SiteRow::clone(old);
            change(&mut row);
            if row != **old {
                changes.push(Change::Site(name.clone(), Some(Arc::new(row))));
            }
            Ok(())
        })
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
                .ok_or_else(|| Self::missing_or_damaged(t, "substrate", key))
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
            let gone = Self::fence(t, vm.0, vm.1)?;
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
                .ok_or_else(|| Self::missing_or_damaged(t, "machine", key))
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
            let old = Self::fence(t, id, generation)?;
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
            changes.extend(deleted::changes(Self::fence(t, id, generation)?));
            Ok(())
        })
    }

    fn fence(t: &Tables, id: VmId, given: Generation) -> Result<&Arc<VmRecord>> {
        let vm = t.vms.get(&id).map(|e| &e.vm).ok_or_else(|| missing("machine", &id))?;
        if vm.generation == given {
            Ok(vm)
        } else {
            let (name, current) = (vm.name.clone(), vm.generation);
            Err(RegistryError::Fenced { name, current, given })
        }
    }

    // ---- operations --------------------------------------------------------------------

    /// All operations that are kept, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub fn ops(&self) -> Result<Vec<OpRecord>> {
        Ok(self.ops_shared().into_iter().map(Arc::unwrap_or_clone).collect())
    }

    /// As [`Registry::ops`], without a copy of each.
    #[must_use]
    pub fn ops_shared(&self) -> Vec<Arc<OpRecord>> {
        self.file.read(|t| t.ops.values().cloned().collect())
    }

    /// One operation.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn op(&self, id: OpId) -> Result<OpRecord> {
        self.file.read(|t| {
            t.ops
                .get(&id)
                .map(|o| OpRecord::clone(o))
                .ok_or_else(|| Self::missing_or_damaged(t, "operation", &id.to_string()))
        })
    }

    /// Writes an operation as it is now. When one ends, the oldest finished ones of its tenant
    /// beyond [`KEPT_OPS`] are dropped in the same transaction.
    ///
    /// # Errors
    /// When the database fails.
    pub fn op_put(&self, op: &OpRecord) -> Result<()> {
        self.file.write(|t, changes| {
            changes.extend(t.audited_op(op));
            changes.push(Change::Op(op.id, Some(Arc::new(op.clone()))));
            if op.state.is_final() {
                // With this one there is one more, unless it had ended before.
                let before = t.ops.get(&op.id).is_some_and(|o| o.state.is_final());
                let old = t.ended_beyond(&op.tenant, KEPT_OPS - usize::from(!before));
                changes.extend(old.filter(|id| **id != op.id).map(|id| Change::Op(*id, None)));
            }
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
