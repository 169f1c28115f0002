//! Whose a substrate is that comes into being, and what it is to be: said by who asked for it, never
//! by the site that made it.
//!
//! | how it came | whose | who may use it |
//! |---|---|---|
//! | docked, rebuilt | of the operation that made it | as the operation says |
//! | a user's file | the user's | restricted, or private as the file says |
//! | the operator's file, the center's site | as the file says, else the operator's | as the file says |
//! | the operator's file, another site | the operator's | never everybody |
//! | found at the center's site | as it says there, else the operator's alone | as it says there |

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use godwit_site::{SubstrateInfo, Upload};
use godwit_types::{Code, Fault, Name, SiteKind, SubstrateId, SubstrateKind};

use super::authorize::{allow, name_at_sites};
use super::{Exchange, Finder};
use crate::access::{Action, Object, Principal, default_tenant, may, operator};
use crate::ops::OpKind;
use crate::registry::{OpRecord, SubstrateRecord, registry_fault};

/// How the center hears of a substrate that it does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Discovery {
    /// A site tells of it: it was docked there, or a user has brought it.
    Reported,
    /// The operator has brought it.
    Imported,
}

/// A file that a user brings.
#[derive(Debug, Clone)]
struct FileUpload {
    tenant: Name,
    user: Name,
    name: Name,
    /// What has come of it, in bytes.
    bytes: u64,
}

/// The files that users bring, while they come in.
#[derive(Debug, Default)]
pub(super) struct Uploads(Mutex<HashMap<SubstrateId, FileUpload>>);

impl Uploads {
    fn all(&self) -> MutexGuard<'_, HashMap<SubstrateId, FileUpload>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has(&self, id: SubstrateId) -> bool {
        self.all().contains_key(&id)
    }
}

/// A file that a user brings; dropped, it is forgotten.
pub(crate) struct Uploading {
    exchange: Arc<Exchange>,
    /// What its site is told.
    pub(crate) want: Upload,
}

impl Drop for Uploading {
    fn drop(&mut self) {
        self.exchange.uploads.all().remove(&self.want.id);
    }
}

impl Uploading {
    /// Counts `more` bytes that have come, with what else comes in for the same tenant.
    ///
    /// # Errors
    /// No room, by the tenant's quota.
    pub(crate) fn count(&self, more: u64) -> Result<(), Fault> {
        let mut all = self.exchange.uploads.all();
        let Some(this) = all.get_mut(&self.want.id) else { return Ok(()) };
        this.bytes += more;
        let tenant = this.tenant.clone();
        let coming = all.values().filter(|u| u.tenant == tenant).map(|u| u.bytes).sum();
        drop(all);
        self.exchange.registry.quotas().pool_has_room(&tenant, coming).map_err(registry_fault)
    }
}

/// Whose a substrate is, and what it is to be.
struct Origin {
    tenant: Name,
    owner: Name,
    /// What it is called; as at its site when none was asked for.
    name: Option<Name>,
    kind: SubstrateKind,
}

/// What is not made public by an operator's request is not public.
const fn not_public(kind: SubstrateKind) -> SubstrateKind {
    match kind {
        SubstrateKind::Public => SubstrateKind::Restricted,
        kind => kind,
    }
}

impl Finder {
    /// Whose it is what `who` makes in the tenant that it acts in: names are per tenant, so of an
    /// operator of another tenant it is the operator's.
    pub(super) fn owner_for(&self, who: &Principal) -> Name {
        match self.registry.people().user_of(&who.id) {
            Some((of, user)) if of == who.tenant => user,
            _ => operator(),
        }
    }
}

impl Exchange {
    /// Refuses a name that a substrate of the tenant has, or one that is being docked or brought
    /// will have.
    pub(super) fn is_new_substrate(&self, tenant: &Name, name: &Name) -> Result<(), Fault> {
        let docking = |o: &Arc<OpRecord>| {
            !o.state.is_final()
                && o.tenant == *tenant
                && matches!(&o.kind, OpKind::VmDock { called: Some(n), .. } if n == name)
        };
        let coming = |u: &FileUpload| (&u.tenant, &u.name) == (tenant, name);
        let exists = self.registry.substrate_named(tenant, name);
        if exists || self.uploads.all().values().any(coming) {
            return Err(Fault::new(Code::Exists, format!("substrate '{name}' exists already"))
                .hint("give it another name with --name"));
        }
        if self.registry.ops().shared().iter().any(docking) {
            let words = format!("substrate '{name}' is being docked already");
            return Err(Fault::new(Code::Exists, words).hint("give it another name with --name"));
        }
        Ok(())
    }

    /// Prepares to take in, as `name`, a substrate that `who` brings as a file of `bytes`, if that
    /// is known.
    ///
    /// # Errors
    /// Forbidden; exists; no room, by the tenant's quota.
    pub(crate) fn begin_upload(
        self: &Arc<Self>,
        who: &Principal,
        name: &Name,
        bytes: Option<u64>,
    ) -> Result<Uploading, Fault> {
        let user = self.finder.owner_for(who);
        let made = Object::Substrate {
            tenant: &who.tenant,
            owner: &user,
            kind: SubstrateKind::Restricted,
            granted: &BTreeSet::new(),
        };
        allow(who, Action::Create, &made, ("substrate", name.as_str()))?;
        let all = self.registry.substrates().map_err(registry_fault)?;
        let usable = |s: &&SubstrateRecord| may(who, Action::Use, &Object::substrate(s)).is_ok();
        let among = all.iter().filter(usable).map(|s| s.id).collect();
        let id = SubstrateId::new();
        let want = Upload {
            name: name_at_sites(&who.tenant, name, id)?,
            id,
            owner: self.registry.people().user(&who.tenant, &user).map_or(user.clone(), |u| u.id),
            among,
        };
        let one = self.entering.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_new_substrate(&who.tenant, name)?;
        let (tenant, name) = (who.tenant.clone(), name.clone());
        self.uploads.all().insert(id, FileUpload { tenant, user, name, bytes: 0 });
        drop(one);
        let upload = Uploading { exchange: self.clone(), want };
        let room = self.registry.quotas().pool_has_room(&who.tenant, bytes.unwrap_or_default());
        room.map_err(registry_fault)?;
        Ok(upload)
    }

    /// A substrate that is new to the registry, as its first holder tells of it.
    pub(super) fn record_of(
        &self,
        site: &Name,
        info: SubstrateInfo,
        discovery: Discovery,
    ) -> SubstrateRecord {
        let Origin { tenant, owner, name, kind } = self.origin(site, &info, discovery);
        SubstrateRecord {
            id: info.id,
            name: name.unwrap_or(info.name),
            tenant,
            kind,
            owner,
            granted: BTreeSet::new(),
            image: info.image,
            arch: info.arch,
            memory: info.memory,
            vcpus: info.vcpus,
            raw_bytes: info.raw_bytes,
            stored_bytes: info.stored_bytes,
            created: info.created,
            holders: [site.clone()].into(),
            content: Some(info.content),
            damaged: BTreeMap::new(),
        }
    }

    fn origin(&self, site: &Name, info: &SubstrateInfo, discovery: Discovery) -> Origin {
        if discovery == Discovery::Reported
            && let Some(made) = self.asked_by(info)
        {
            return made;
        }
        let own = self.registry.sites().get(site).is_ok_and(|s| s.kind == SiteKind::Center);
        if own && let Some((tenant, owner)) = self.registry.people().user_of(&info.owner) {
            return Origin { tenant, owner, name: None, kind: info.kind };
        }
        let kind = match (discovery, own) {
            (Discovery::Imported, true) => info.kind,
            (Discovery::Imported, false) => not_public(info.kind),
            // Nobody knows whose it is.
            (Discovery::Reported, _) => SubstrateKind::Private,
        };
        Origin { tenant: default_tenant(), owner: operator(), name: None, kind }
    }

    /// What whoever had this substrate made has asked for.
    fn asked_by(&self, info: &SubstrateInfo) -> Option<Origin> {
        if let Some(u) = self.uploads.all().get(&info.id).cloned() {
            let (tenant, owner, name) = (u.tenant, u.user, Some(u.name));
            return Some(Origin { tenant, owner, name, kind: not_public(info.kind) });
        }
        let made = |o: &Arc<OpRecord>| match &o.kind {
            OpKind::VmDock { substrate, called, becomes, owner, .. } if *substrate == info.id => {
                Some(Origin {
                    tenant: o.tenant.clone(),
                    owner: owner.clone().unwrap_or_else(|| o.user.clone()),
                    name: called.clone(),
                    kind: becomes.unwrap_or_else(|| not_public(info.kind)),
                })
            }
            OpKind::SubstrateRebuild { old, new, .. } if *new == info.id => {
                let old = self.registry.substrate(&old.to_string()).ok();
                let (owner, kind) = old.map_or_else(
                    || (o.user.clone(), SubstrateKind::Private),
                    |old| (old.owner, old.kind),
                );
                Some(Origin { tenant: o.tenant.clone(), owner, name: None, kind })
            }
            _ => None,
        };
        self.registry.ops().shared().iter().rev().find_map(made)
    }

    /// The substrates that the center has asked a site to dock: a site publishes nothing by itself.
    pub(super) fn asked_for(&self, site: &Name) -> Result<HashSet<SubstrateId>, Fault> {
        let ops = self.ops.list().map_err(registry_fault)?;
        let here = |o: &OpRecord| o.journal.iter().any(|s| s.what.docks_at() == Some(site));
        Ok(ops
            .iter()
            .filter_map(|o| match &o.kind {
                OpKind::VmDock { substrate: made, .. }
                | OpKind::SubstrateRebuild { new: made, .. } => here(o).then_some(*made),
                _ => None,
            })
            .collect())
    }
}
