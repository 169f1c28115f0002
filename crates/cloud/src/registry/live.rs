//! What sites report all the time, in memory only.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_site::SiteReport;
use godwit_types::{Hash, Name, SiteState, SubstrateId, UnixMs};

use super::SiteRecord;
use super::feed::Feed;
use super::tables::SiteRow;
use crate::clock::Moment;

/// Times of this run, except what is told.
#[derive(Debug, Clone, Default)]
struct Site {
    /// When its lease ends; zero without one.
    lease_until: Duration,
    heard: Duration,
    last_seen: UnixMs,
    report: SiteReport,
}

#[derive(Debug, Default)]
struct Inner {
    sites: HashMap<Name, Site>,
    /// Since when a site is known to hold a substrate, where that was seen.
    held: HashMap<(SubstrateId, Name), Duration>,
    /// At which revision of the registry each site was last asked what it runs and had nothing that
    /// was deleted.
    machines_seen: HashMap<Name, u64>,
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
    pub(super) fn record(&self, row: &SiteRow, now: Moment) -> SiteRecord {
        let site = self.inner().sites.get(&row.name).cloned().unwrap_or_default();
        let lease_until = match site.lease_until {
            Duration::ZERO => UnixMs::default(),
            // However the clock on the wall was set since, so much of it is left.
            until => now.wall_at(until),
        };
        SiteRecord {
            name: row.name.clone(),
            kind: row.kind,
            joined: row.joined,
            lease_until,
            last_seen: if site.heard == Duration::ZERO { row.last_seen } else { site.last_seen },
            revoked: row.revoked,
            report: site.report,
        }
    }

    /// A site that is there; its lease comes with its report.
    pub(super) fn put(&self, record: &SiteRecord, now: Moment) {
        let mut inner = self.inner();
        let site = inner.sites.entry(record.name.clone()).or_default();
        site.heard = site.heard.max(now.run);
        site.last_seen = record.last_seen;
        site.report = record.report.clone();
    }

    /// Tells the feed when the site had no lease. It is told while nobody else can change that.
    pub(super) fn report(
        &self,
        name: &Name,
        report: SiteReport,
        now: Moment,
        ttl: Duration,
        feed: &Feed,
    ) {
        let mut inner = self.inner();
        let site = inner.sites.entry(name.clone()).or_default();
        let back = site.lease_until == Duration::ZERO;
        site.lease_until = site.lease_until.max(now.run + ttl);
        site.heard = site.heard.max(now.run);
        site.last_seen = now.wall;
        site.report = report;
        if back {
            feed.site(name, SiteState::Ready);
        }
    }

    /// Ends a lease that has run out by itself.
    pub(super) fn lapsed(&self, name: &Name, now: Duration, feed: &Feed) {
        self.end_if(name, |site| site.lease_until < now, feed);
    }

    fn end_if(&self, name: &Name, is_over: impl FnOnce(&Site) -> bool, feed: &Feed) -> bool {
        let mut inner = self.inner();
        let Some(site) = inner.sites.get_mut(name).filter(|s| is_over(s)) else { return false };
        let ended = std::mem::take(&mut site.lease_until) != Duration::ZERO;
        if ended {
            feed.site(name, SiteState::Unreachable);
        }
        ended
    }

    /// Ends the lease of a site that was not heard of since `asked`; answers whether it had one.
    pub(super) fn silent(&self, name: &Name, asked: Duration, feed: &Feed) -> bool {
        self.end_if(name, |site| site.heard < asked, feed)
    }

    pub(super) fn seen_machines(&self, name: &Name, revision: u64) {
        let mut inner = self.inner();
        let seen = inner.machines_seen.entry(name.clone()).or_default();
        *seen = revision.max(*seen);
    }

    /// Zero for a site that was not asked since this daemon started.
    pub(super) fn machines_seen(&self, name: &Name) -> u64 {
        self.inner().machines_seen.get(name).copied().unwrap_or_default()
    }

    /// When it was heard of last, if that was in this run.
    pub(super) fn last_seen(&self, name: &Name) -> Option<UnixMs> {
        self.inner().sites.get(name).map(|s| s.last_seen)
    }

    /// What the last report said of its substrates.
    pub(super) fn holdings(&self, name: &Name) -> Option<Hash> {
        self.inner().sites.get(name).and_then(|s| s.report.holdings)
    }

    pub(super) fn holds(&self, id: SubstrateId, site: &Name, now: Moment) {
        self.inner().held.insert((id, site.clone()), now.run);
    }

    pub(super) fn forget(&self, id: SubstrateId) {
        self.inner().held.retain(|(held, _), _| *held != id);
    }

    /// How long ago a site came to hold a substrate, if that was in this run.
    pub(super) fn held_for(&self, id: SubstrateId, site: &Name, now: Moment) -> Option<Duration> {
        let since = self.inner().held.get(&(id, site.clone())).copied()?;
        Some(now.run.saturating_sub(since))
    }
}
