//! The sites of a cloud: what is durable of them, and what they report all the time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use godwit_site::SiteReport;
use godwit_types::{Name, SubstrateId, UnixMs};

use super::file::File;
use super::live::Live;
use super::tables::{Change, SiteRow};
use super::{RegistryError, Result, SiteRecord, SubstrateRecord, missing};
use crate::clock::Moment;

/// How long a site stays usable without a report.
pub const LEASE: Duration = Duration::from_secs(15);

/// The oldest that a report may be when it arrives.
pub(super) const REPORT_AGE: Duration = Duration::from_secs(30);

/// The sites of a registry.
#[derive(Debug)]
pub struct Sites {
    pub(super) file: Arc<File>,
    pub(super) live: Arc<Live>,
}

impl Sites {
    pub(super) const fn new(file: Arc<File>, live: Arc<Live>) -> Self {
        Self { file, live }
    }

    /// All sites.
    ///
    /// # Errors
    /// When the database fails.
    pub fn all(&self) -> Result<Vec<SiteRecord>> {
        let rows: Vec<_> = self.file.read(|t| t.sites.values().cloned().collect());
        let now = Moment::now();
        Ok(rows.iter().map(|r| self.live.record(r, now)).collect())
    }

    /// One site.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn get(&self, name: &Name) -> Result<SiteRecord> {
        self.at(name, Moment::now())
    }

    pub(super) fn at(&self, name: &Name, now: Moment) -> Result<SiteRecord> {
        let row = self.file.read(|t| {
            t.sites.get(name).cloned().ok_or_else(|| t.missing_or_damaged("site", name.as_str()))
        })?;
        Ok(self.live.record(&row, now))
    }

    /// Enters a site, or renews the entry of one that joins again. Its lease comes with its first
    /// report.
    ///
    /// # Errors
    /// When the database fails.
    pub fn put(&self, site: &SiteRecord) -> Result<()> {
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
    pub fn report(
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
    pub fn silent(&self, name: &Name, asked: Moment) -> bool {
        self.live.silent(name, asked.run, self.file.feed())
    }

    /// Ends a site's lease that has run out by itself, and tells of that.
    pub fn lapsed(&self, name: &Name, now: Moment) {
        self.live.lapsed(name, now.run, self.file.feed());
    }

    /// Ends a site's lease for it has gone away, and writes down when it was seen last.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn away(&self, name: &Name) -> Result<()> {
        self.live.silent(name, Duration::MAX, self.file.feed());
        let seen = self.live.last_seen(name);
        self.change(name, |row| {
            row.last_seen = seen.unwrap_or(row.last_seen);
        })
    }

    /// Marks a site as no longer trusted.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn revoke(&self, name: &Name) -> Result<()> {
        self.change(name, |row| row.revoked = true)
    }

    /// Marks a revoked site as trusted again: it has joined anew.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn readmit(&self, name: &Name) -> Result<()> {
        self.change(name, |row| row.revoked = false)
    }

    fn change(&self, name: &Name, change: impl FnOnce(&mut SiteRow)) -> Result<()> {
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
}
