//! What the center knows of the substrates that sites hold, and how one comes to a site that lacks
//! it: once, however many machines wait for it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError};

use godwit_site::{SiteHost, SiteReport, SubstrateInfo};
use godwit_types::{Code, Fault, Name, SiteKind, SubstrateId};
use tokio::sync::Mutex;

use super::disks::Disks;
use super::origin::Discovery;
use super::origin::Uploads;
use super::rebuild::{suffixed, tail};
use super::{Finder, Sites};
use crate::ops::OpHandle;
use crate::ops::Ops;
use crate::registry::Registry;
use crate::registry::{RegistryError, StepKind, StepName, SubstrateRecord, registry_fault};

/// The substrates that are on their way, by where they go.
pub(super) type Bringing = std::sync::Mutex<HashMap<(SubstrateId, Name), Arc<Mutex<()>>>>;

/// The substrates of all sites: which there are, what they become here, and how one comes to a site
/// that lacks it.
pub(crate) struct Exchange {
    pub(super) registry: Arc<Registry>,
    pub(super) ops: Arc<Ops>,
    pub(super) sites: Arc<Sites>,
    pub(super) finder: Arc<Finder>,
    /// Those on their way.
    pub(super) bringing: Bringing,
    /// Those that users bring.
    pub(super) uploads: Uploads,
    /// How large the disks are that machines are made of.
    pub(super) disks: Disks,
    pub(super) entering: Arc<std::sync::Mutex<()>>,
}

impl Exchange {
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
        let mut sources: Vec<_> =
            s.holders.iter().filter_map(|n| self.sites.host(n).ok()).collect();
        // A holder that is known to be damaged is asked last, the center's own site first.
        sources.sort_by_cached_key(|host| {
            let own =
                self.registry.sites().get(host.name()).is_ok_and(|s| s.kind == SiteKind::Center);
            (s.damaged.contains_key(host.name()), !own)
        });
        let mut last =
            Fault::unavailable(format!("no reachable site holds substrate '{}'", s.name));
        for from in sources {
            let from = from.name();
            op.begin(StepKind::Bring {
                from: from.clone(),
                to: to.name().clone(),
                substrate: s.id,
            })?;
            match self.carry(op, &s, from, to.name()).await {
                Ok(info) => {
                    Self::is_wanted(to.name(), id, &info)?;
                    self.adopt_substrate(to.name(), info)?;
                    op.done(StepName::Bring)?;
                    return self.sites.host(to.name());
                }
                // A bring that an earlier daemon of the center began has come to its end meanwhile.
                Err(f) if f.code == Code::Exists => {
                    let to = self.sites.host(to.name())?;
                    let there = to.substrates().await?.into_iter().find(|i| i.id == id);
                    self.adopt_substrate(to.name(), there.ok_or(f)?)?;
                    op.done(StepName::Bring)?;
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
        if self.registry.sites().knows_holdings(host.name(), &report) {
            return Ok(report);
        }
        let trusted =
            self.registry.sites().get(host.name()).is_ok_and(|s| s.kind == SiteKind::Center);
        let asked = if trusted { HashSet::new() } else { self.asked_for(host.name())? };
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

    /// Refuses what a site says to have made when it is not what it was asked for.
    pub(crate) fn is_wanted(
        site: &Name,
        wanted: SubstrateId,
        info: &SubstrateInfo,
    ) -> Result<(), Fault> {
        if info.id == wanted {
            return Ok(());
        }
        Err(Fault::new(
            Code::Damaged,
            format!("site '{site}' has substrate {} where {wanted} was asked for", info.id),
        ))
    }

    /// Enters a substrate that `site` holds. One whose name another has come by meanwhile gets a
    /// name of its own.
    pub(crate) fn adopt_substrate(
        &self,
        site: &Name,
        info: SubstrateInfo,
    ) -> Result<SubstrateRecord, Fault> {
        self.adopt(site, info, Discovery::Reported)
    }

    /// As [`Exchange::adopt_substrate`], of one that the operator has brought to `site`.
    pub(crate) fn adopt_import(
        &self,
        site: &Name,
        info: SubstrateInfo,
    ) -> Result<SubstrateRecord, Fault> {
        self.adopt(site, info, Discovery::Imported)
    }

    fn adopt(
        &self,
        site: &Name,
        info: SubstrateInfo,
        discovery: Discovery,
    ) -> Result<SubstrateRecord, Fault> {
        match self.registry.substrate_seen(info.id, site, info.content) {
            Err(RegistryError::NotFound { .. }) => {
                let mut record = self.record_of(site, info, discovery);
                let uploaded = self.uploads.has(record.id);
                let add = |record: &SubstrateRecord| match uploaded {
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
