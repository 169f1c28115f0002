//! What the center knows of the substrates that sites hold, and how one comes to a site that lacks
//! it: once, however many machines wait for it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, PoisonError};

use godwit_types::{Code, Name, SiteKind, SubstrateId, SubstrateKind};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Mutex;

use super::rebuild::{suffixed, tail};
use super::whose::{allow, name_at_sites};
use super::{Controller, registry_fault};
use crate::access::{Action, Object, Principal, default_tenant, may};
use crate::error::Fault;
use crate::ops::{OpHandle, OpKind};
use crate::registry::{OpRecord, RegistryError, SiteReport, SubstrateRecord};
use crate::site::{SiteHost, SubstrateInfo, Upload, bounds};

/// The substrates that are on their way, by where they go.
pub(super) type Bringing = std::sync::Mutex<HashMap<(SubstrateId, Name), Arc<Mutex<()>>>>;

/// Substrates that users bring, while they come in: tenant, user and name.
pub(super) type Uploads = std::sync::Mutex<HashMap<SubstrateId, (Name, Name, Name)>>;

/// A substrate that a user brings; dropped, it is forgotten here.
pub(crate) struct Uploading<'a> {
    of: &'a Uploads,
    /// What its site is told.
    pub(crate) want: Upload,
}

impl Drop for Uploading<'_> {
    fn drop(&mut self) {
        self.of.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.want.id);
    }
}

impl Controller {
    /// Prepares to take in, as `name`, a substrate that `who` brings as a file.
    ///
    /// # Errors
    /// Forbidden; exists.
    pub(crate) fn begin_upload(
        &self,
        who: &Principal,
        name: &Name,
    ) -> Result<Uploading<'_>, Fault> {
        let made = Object::Substrate {
            tenant: &who.tenant,
            owner: &who.user,
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
            owner: who.id.clone(),
            among,
        };
        let whose = (who.tenant.clone(), who.user.clone(), name.clone());
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner).insert(id, whose);
        Ok(Uploading { of: &self.uploads, want })
    }

    /// Brings a substrate to `to` from a site that holds it, and answers with that site, whose link
    /// may have become another one. Whoever wants the same meanwhile waits for the first, and finds
    /// it there.
    pub(super) async fn bring_substrate(
        &self,
        op: &OpHandle,
        id: SubstrateId,
        to: &Arc<dyn SiteHost>,
    ) -> Result<Arc<dyn SiteHost>, Fault> {
        let key = (id, to.name().clone());
        let one = {
            let mut all = self.bringing.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|k, one| *k == key || Arc::strong_count(one) > 1);
            Arc::clone(all.entry(key).or_default())
        };
        let _one = tokio::select! {
            one = one.lock() => one,
            () = op.cancel().cancelled() => return Err(Fault::cancelled()),
        };
        let s = self.registry.substrate(&id.to_string()).map_err(registry_fault)?;
        // Brought by another, or just docked there: the site's next report says so too.
        if s.holders.contains(to.name()) {
            return Ok(Arc::clone(to));
        }
        let mut sources: Vec<_> = s.holders.iter().filter_map(|n| self.host(n).ok()).collect();
        // A holder that is known to be damaged is asked last, the center's own site first.
        sources.sort_by_cached_key(|host| {
            let own = self.registry.site(host.name()).is_ok_and(|s| s.kind == SiteKind::Center);
            (s.damaged.contains_key(host.name()), !own)
        });
        let mut last =
            Fault::unavailable(format!("no reachable site holds substrate '{}'", s.name));
        for from in sources {
            let from = from.name();
            op.begin("bring", json!({ "from": from, "to": to.name(), "substrate": s.id }))?;
            match self.carry(op, &s, from, to.name()).await {
                Ok(info) => {
                    self.adopt_substrate(to.name(), info)?;
                    op.done("bring")?;
                    return self.host(to.name());
                }
                // A bring that an earlier daemon of the center began has come to its end meanwhile.
                Err(f) if f.code == Code::Exists => {
                    let to = self.host(to.name())?;
                    let there = to.substrates().await?.into_iter().find(|i| i.id == id);
                    self.adopt_substrate(to.name(), there.ok_or(f)?)?;
                    op.done("bring")?;
                    return Ok(to);
                }
                Err(f) if matches!(f.code, Code::Damaged | Code::Unavailable | Code::TimedOut) => {
                    tracing::warn!(substrate = %s.name, %from, error = %f, "not brought from there");
                    last = f;
                }
                Err(f) => return Err(f),
            }
        }
        Err(last)
    }

    /// Enters what a site holds. What it holds under the id of something else is taken out of its
    /// report.
    pub(super) async fn adopt_substrates(
        &self,
        host: &Arc<dyn SiteHost>,
        mut report: SiteReport,
    ) -> Result<SiteReport, Fault> {
        if self.registry.knows_holdings(host.name(), &report) {
            return Ok(report);
        }
        let trusted = self.registry.site(host.name()).is_ok_and(|s| s.kind == SiteKind::Center);
        let asked = if trusted { HashSet::new() } else { self.asked_for()? };
        let mut unasked = 0u64;
        for s in host.substrates().await? {
            let id = s.id;
            let known = || match self.registry.substrate(&id.to_string()) {
                Ok(_) => Ok(true),
                Err(RegistryError::NotFound { .. }) => Ok(false),
                Err(e) => Err(registry_fault(e)),
            };
            if !trusted && !asked.contains(&id) && !known()? {
                unasked += 1;
                report.substrates.remove(&id);
                continue;
            }
            if let Err(f) = self.adopt_substrate(host.name(), s) {
                // One substrate costs a site neither its report nor its lease.
                if !matches!(f.code, Code::Damaged | Code::Exists | Code::NotFound | Code::Invalid)
                {
                    return Err(f);
                }
                tracing::warn!(site = %host.name(), %id, "not listed: {f}");
                report.substrates.remove(&id);
            }
        }
        if unasked > 0 {
            tracing::warn!(site = %host.name(), unasked, "substrates that nobody asked it to hold are not listed");
        }
        Ok(report)
    }

    /// A substrate that is new to the registry, as its first holder tells of it.
    pub(super) fn record_of(&self, site: &Name, info: SubstrateInfo) -> SubstrateRecord {
        // The operation that made it says whose it is; what came otherwise has its owner's id.
        let (tenant, owner, called) = match self.made_by(info.id) {
            Some((tenant, owner, called)) => (tenant, owner, called),
            None => match self.registry.who(&info.owner) {
                Some((tenant, owner)) => (tenant, owner, None),
                None => (default_tenant(), info.owner, None),
            },
        };
        let name = called.unwrap_or(info.name);
        SubstrateRecord {
            id: info.id,
            name,
            tenant,
            kind: info.kind,
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

    /// Tenant and user who had this substrate made, and the name that they asked for.
    fn made_by(&self, id: SubstrateId) -> Option<(Name, Name, Option<Name>)> {
        let taken = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((tenant, user, name)) = taken.get(&id).cloned() {
            return Some((tenant, user, Some(name)));
        }
        drop(taken);
        let made = |o: &Arc<OpRecord>| {
            let called = match &o.kind {
                OpKind::VmDock { substrate, called, .. } if *substrate == id => called.clone(),
                OpKind::SubstrateRebuild { new, .. } if *new == id => None,
                _ => return None,
            };
            Some((o.tenant.clone(), o.user.clone(), called))
        };
        self.registry.ops_shared().iter().rev().find_map(made)
    }

    /// The substrates that the center has asked sites to dock: a site publishes nothing by itself.
    fn asked_for(&self) -> Result<HashSet<SubstrateId>, Fault> {
        let ops = self.ops().list().map_err(registry_fault)?;
        Ok(ops
            .iter()
            .filter_map(|o| match &o.kind {
                OpKind::VmDock { substrate: made, .. }
                | OpKind::SubstrateRebuild { new: made, .. } => Some(*made),
                _ => None,
            })
            .collect())
    }

    /// Refuses what a site says to have made when it is not what it was asked for.
    pub(super) fn is_wanted(
        site: &Name,
        wanted: SubstrateId,
        info: &SubstrateInfo,
    ) -> Result<(), Fault> {
        if info.id == wanted {
            return Ok(());
        }
        Err(Fault::new(
            Code::Damaged,
            format!("site '{site}' made substrate {} where {wanted} was asked for", info.id),
        ))
    }

    /// Enters a substrate that `site` holds. One whose name another has come by meanwhile gets a
    /// name of its own.
    pub(crate) fn adopt_substrate(
        &self,
        site: &Name,
        info: SubstrateInfo,
    ) -> Result<SubstrateRecord, Fault> {
        match self.registry.substrate_seen(info.id, site, info.content) {
            Err(RegistryError::NotFound { .. }) => {
                let mut record = self.record_of(site, info);
                let brought = {
                    let taken = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
                    taken.contains_key(&record.id)
                };
                let add = |record: &SubstrateRecord| match brought {
                    true => self.registry.substrate_bring(record),
                    false => self.registry.substrate_add(record),
                };
                let mut added = add(&record);
                if matches!(added, Err(RegistryError::Exists { .. }))
                    && self.registry.substrate(&record.id.to_string()).is_err()
                {
                    // Docked under that name at another site at the same time.
                    record.name = suffixed(&record.name, &tail(record.id))?;
                    added = add(&record);
                }
                // The site's report and the answer to its docking may both come now.
                match (added, self.registry.substrate(&record.id.to_string())) {
                    (Ok(()), _) => Ok(record),
                    (Err(_), Ok(there)) => Ok(there),
                    (Err(e), Err(_)) => Err(registry_fault(e)),
                }
            }
            seen => seen.map_err(registry_fault),
        }
    }
}

pub(super) fn cut(doing: &str, name: &Name, e: &std::io::Error) -> Fault {
    Fault::unavailable(format!("{doing} substrate '{name}': {e}"))
}

/// Ends an import: no more bytes, then the site's verdict as JSON.
///
/// # Errors
/// The site's refusal, or a broken stream.
pub(crate) async fn finish_import(
    mut into: crate::site::ByteStream,
    name: &Name,
) -> Result<SubstrateInfo, Fault> {
    into.shutdown().await.map_err(|e| cut("writing", name, &e))?;
    verdict(into, name).await
}

/// Reads a site's verdict on a substrate that it took in, up to the end of the stream.
///
/// # Errors
/// The site's refusal, or a broken stream.
pub(super) async fn verdict(
    from: impl tokio::io::AsyncRead + Unpin,
    name: &Name,
) -> Result<SubstrateInfo, Fault> {
    let mut verdict = Vec::new();
    from.take(64 << 10).read_to_end(&mut verdict).await.map_err(|e| cut("writing", name, &e))?;
    if verdict.is_empty() {
        return Err(cut("writing", name, &std::io::ErrorKind::UnexpectedEof.into()));
    }
    let verdict = serde_json::from_slice::<Result<SubstrateInfo, Fault>>(&verdict)
        .map_err(|e| Fault::new(Code::Damaged, format!("the verdict on '{name}': {e}")))?;
    let mut info = verdict.map_err(bounds::fault)?;
    bounds::substrate(&mut info)?;
    Ok(info)
}
