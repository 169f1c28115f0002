//! What sites report all the time, in memory only.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_types::{Hash, Name, SubstrateId};

use super::tables::SiteRow;
use super::{SiteRecord, SiteReport};
use crate::clock::UnixMs;

#[derive(Debug, Clone, Default)]
struct Site {
    lease_until: UnixMs,
    last_seen: UnixMs,
    report: SiteReport,
}

#[derive(Debug, Default)]
struct Inner {
    sites: HashMap<Name, Site>,
    /// Since when a site is known to hold a substrate, where that was seen.
    held: HashMap<(SubstrateId, Name), UnixMs>,
}

/// The last reports of all sites.
#[derive(Debug, Default)]
pub(super) struct Live(Mutex<Inner>);

impl Live {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Each entry is whole between any two statements that could panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A site with what it last reported. One that has not reported since this daemon started has
    /// no lease.
    pub(super) fn record(&self, row: &SiteRow) -> SiteRecord {
        let site = self.inner().sites.get(&row.name).cloned().unwrap_or_default();
        SiteRecord {
            name: row.name.clone(),
            kind: row.kind,
            joined: row.joined,
            lease_until: site.lease_until,
            last_seen: site.last_seen.max(row.last_seen),
            revoked: row.revoked,
            report: site.report,
        }
    }

    pub(super) fn put(&self, record: &SiteRecord) {
        let site = Site {
            lease_until: record.lease_until,
            last_seen: record.last_seen,
            report: record.report.clone(),
        };
        self.inner().sites.insert(record.name.clone(), site);
    }

    pub(super) fn report(&self, name: &Name, report: SiteReport, now: UnixMs, ttl: Duration) {
        let mut inner = self.inner();
        let site = inner.sites.entry(name.clone()).or_default();
        site.lease_until = site.lease_until.max(now.plus(ttl));
        site.last_seen = site.last_seen.max(now);
        site.report = report;
    }

    pub(super) fn silent(&self, name: &Name, asked: UnixMs) -> bool {
        match self.inner().sites.get_mut(name) {
            Some(site) if site.last_seen < asked => {
                std::mem::take(&mut site.lease_until) != UnixMs::default()
            }
            _ => false,
        }
    }

    pub(super) fn last_seen(&self, name: &Name) -> UnixMs {
        self.inner().sites.get(name).map_or(UnixMs::default(), |s| s.last_seen)
    }

    /// What the last report said of its substrates.
    pub(super) fn holdings(&self, name: &Name) -> Option<Hash> {
        self.inner().sites.get(name).and_then(|s| s.report.holdings)
    }

    pub(super) fn holds(&self, id: SubstrateId, site: &Name, now: UnixMs) {
        self.inner().held.insert((id, site.clone()), now);
    }

    pub(super) fn forget(&self, id: SubstrateId) {
        self.inner().held.retain(|(held, _), _| *held != id);
    }

    pub(super) fn held_since(&self, id: SubstrateId, site: &Name) -> UnixMs {
        self.inner().held.get(&(id, site.clone())).copied().unwrap_or_default()
    }
}
