//! The controller: what the center does with environments, substrates and sites.
//!
//! Each method checks what can be checked at once, enters the change into the registry, and
//! leaves the long part to an operation. A migration:
//!
//! ```text
//! Running at A, generation g
//!   | state Moving (a second migration, a dock, a stop are refused from here on)
//!   | manifest from A -> prepare at B (g+1) -> send from A
//!   |        |                 |                  |
//!   |        +------ any failure before the switch: abort at both, Running at A, g
//!   v
//! switched: site B, generation g+1   (the commit point; a cancel is refused from here on)
//!   | a relay, a link or a daemon is lost: new relays at both ends, as often as it takes
//!   | B whole -> A releases what it keeps
//!   v
//! Running at B
//! ```

mod arrive;
mod ask;
pub(crate) mod authorize;
pub(crate) mod bring;
mod carry;
mod depart;
mod disks;
mod exec;
pub(crate) mod lifecycle;
mod meet;
mod moves;
mod origin;
mod people;
mod pool;
mod rebuild;
mod recover;
mod refusals;
mod settle;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod tests_arrive;
#[cfg(test)]
mod tests_belief;
#[cfg(test)]
mod tests_older;
#[cfg(test)]
mod tests_tenants;
mod warrants;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use godwit_transfer::{Authority, Revocations};
use godwit_types::{Fault, Generation, Mib, Name, OpId, SiteKind, SubstrateKind, UnixMs};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;

pub use exec::GuestProcess;
pub use people::{ApiToken, NewApiToken, NewTenant, NewUser};

use crate::clock::Moment;
use crate::ops::Ops;
use crate::registry::{Registry, SiteRecord, VmRecord, registry_fault};
use godwit_site::{Call, SiteHost, SiteReport, verbs};

pub(crate) use ask::ask_all;
pub use ask::{ANSWER_WITHIN, Unanswered};
pub(crate) use origin::Uploading;

/// How long a site stays usable without a report.
pub const LEASE: Duration = Duration::from_secs(15);

/// How often a site is asked for a report.
pub const REPORT_EVERY: Duration = Duration::from_secs(4);

/// What a new environment is made from; exactly one of the two.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// Its name; drawn from the source's when left out.
    pub name: Option<Name>,
    /// Cold boot of this image.
    pub image: Option<Name>,
    /// Activation of this substrate (name or id).
    pub substrate: Option<String>,
    /// Where; placed by the schedule manager when left out.
    pub site: Option<Name>,
    /// Guest memory in MiB, for a cold boot.
    pub memory_mib: Option<Mib>,
    /// vCPUs, for a cold boot.
    pub vcpus: Option<u8>,
}

/// How a machine becomes a substrate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DockVm {
    /// Name of the substrate; the machine's own when left out.
    pub name: Option<Name>,
    /// Who may use it; restricted when left out, private for a machine of a private substrate. What
    /// is to be public is generalised first: its host name, machine-id and SSH host keys are taken
    /// from it.
    pub kind: Option<SubstrateKind>,
}

/// Where a machine is to go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateVm {
    /// The site; placed by the schedule manager when left out.
    pub to: Option<Name>,
    /// The scheme; `hybrid` when left out.
    pub scheme: Option<String>,
}

/// The answer to a request that changes something.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    /// The operation that does it; none for a dry run.
    pub op: Option<OpId>,
    /// What is done, or would be.
    pub plan: String,
    /// The object it concerns.
    pub target: Option<String>,
}

/// Whether to do it or only to say what would be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Do it.
    Act,
    /// Check and tell.
    DryRun,
}

/// The hosts that are attached, and a number that grows with each change of them.
struct Sites {
    hosts: RwLock<BTreeMap<Name, Arc<dyn SiteHost>>>,
    changes: watch::Sender<u64>,
}

/// The controller of one center.
pub struct Controller {
    registry: Arc<Registry>,
    ops: Arc<Ops>,
    authority: Arc<Authority>,
    sites: Sites,
    bringing: bring::Bringing,
    uploads: origin::Uploads,
    disks: disks::Disks,
    refusals: refusals::Refusals,
    settled: recover::Settled,
    /// One machine at a time is entered: what may run once only is not entered twice.
    entering: std::sync::Mutex<()>,
    /// How long a machine is waited for that lacks something of a site that is away.
    patience: Duration,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("ops", &self.ops).finish_non_exhaustive()
    }
}

impl Controller {
    /// A controller on `registry`; `authority` signs warrants.
    #[must_use]
    pub fn new(registry: Arc<Registry>, authority: Arc<Authority>) -> Arc<Self> {
        Self::with_patience(registry, authority, arrive::RECOVER_LIMIT)
    }

    /// As [`Controller::new`]; a machine that lacks something of a site that is away is waited for
    /// no longer than `patience`.
    #[must_use]
    pub fn with_patience(
        registry: Arc<Registry>,
        authority: Arc<Authority>,
        patience: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            patience,
            authority,
            ops: Ops::new(registry.clone()),
            registry,
            sites: Sites { hosts: RwLock::default(), changes: watch::Sender::new(0) },
            bringing: bring::Bringing::default(),
            uploads: origin::Uploads::default(),
            disks: disks::Disks::default(),
            refusals: refusals::Refusals::default(),
            settled: recover::Settled::default(),
            entering: std::sync::Mutex::default(),
        })
    }

    /// The registry.
    #[must_use]
    pub const fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// The operations.
    #[must_use]
    pub const fn ops(&self) -> &Arc<Ops> {
        &self.ops
    }

    /// Makes a site reachable: its record is entered or renewed, and what it runs and holds is
    /// taken over. An earlier host of that name is replaced.
    ///
    /// # Errors
    /// When the site does not answer, is revoked, or the registry fails.
    pub async fn attach(&self, host: Arc<dyn SiteHost>, kind: SiteKind) -> Result<(), Fault> {
        let now = UnixMs::now();
        let name = host.name().clone();
        let asked_at = self.registry.revision();
        let report = host.report().await?;
        let old = self.registry.site(&name).ok();
        if old.as_ref().is_some_and(|s| s.revoked) {
            return Err(Fault::new(
                godwit_types::Code::Unauthenticated,
                format!("site '{name}' was revoked"),
            ));
        }
        let record = SiteRecord {
            name: name.clone(),
            kind,
            joined: old.map_or(now, |s| s.joined),
            lease_until: UnixMs::default(),
            last_seen: now,
            revoked: false,
            report: report.clone(),
        };
        self.registry.site_put(&record).map_err(registry_fault)?;
        // What it runs is asked for once, whatever it said when it was here before.
        self.unsettle(&name);
        self.sites
            .hosts
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.clone(), host.clone());
        if let Err(f) = self.adopt_site_state(&host, &report, asked_at).await {
            self.detach(&host);
            return Err(f);
        }
        self.sites.changes.send_modify(|n| *n += 1);
        tracing::info!(site = %name, "attached");
        Ok(())
    }

    /// Takes a host away, if it is still the attached one.
    pub fn detach(&self, host: &Arc<dyn SiteHost>) {
        let mut hosts = self.sites.hosts.write().unwrap_or_else(PoisonError::into_inner);
        let name = host.name();
        if hosts.get(name).is_some_and(|h| Arc::ptr_eq(h, host)) {
            hosts.remove(name);
            drop(hosts);
            if let Err(error) = self.registry.site_away(name) {
                tracing::warn!(site = %name, %error, "when it was seen last is not written down");
            }
            self.sites.changes.send_modify(|n| *n += 1);
            tracing::warn!(site = %name, "not reachable any more");
        }
    }

    /// Sends the list of revoked certificates to every site that is attached. One that cannot be
    /// told now is told when it comes back.
    pub async fn spread_revocations(&self, list: &Revocations) {
        let hosts = self.hosts();
        futures::future::join_all(hosts.iter().map(|h| self.tell_revocations(h, list))).await;
    }

    /// Sends the list of revoked certificates to one site.
    pub async fn tell_revocations(&self, host: &Arc<dyn SiteHost>, list: &Revocations) {
        let request = verbs::Revoke { list: list.clone() };
        let told = tokio::time::timeout(ANSWER_WITHIN, host.ask(request, Call::quiet())).await;
        let told = told.unwrap_or_else(|_| Err(Fault::unavailable("it did not answer")));
        if let Err(error) = told {
            tracing::warn!(site = %host.name(), %error, "not told of revoked certificates");
        }
    }

    /// Whether `host` is the one by which its site is reached.
    fn is_attached(&self, host: &Arc<dyn SiteHost>) -> bool {
        let hosts = self.sites.hosts.read().unwrap_or_else(PoisonError::into_inner);
        hosts.get(host.name()).is_some_and(|h| Arc::ptr_eq(h, host))
    }

    /// Waits until `host` is not the attached one any more: its link is gone, or replaced.
    async fn gone(&self, host: &Arc<dyn SiteHost>) {
        let mut changes = self.sites.changes.subscribe();
        loop {
            changes.borrow_and_update();
            if !self.is_attached(host) || changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Takes a site's report and what it says of its machines and substrates.
    ///
    /// # Errors
    /// When it does not answer, or the registry fails.
    pub async fn refresh(&self, host: &Arc<dyn SiteHost>) -> Result<SiteReport, Fault> {
        let asked_at = self.registry.revision();
        let report = host.report().await?;
        self.adopt_site_state(host, &report, asked_at).await?;
        Ok(report)
    }

    /// Enters what a site has reported, holds and runs; `asked_at` is the registry's revision before
    /// the report was asked for.
    async fn adopt_site_state(
        &self,
        host: &Arc<dyn SiteHost>,
        report: &SiteReport,
        asked_at: u64,
    ) -> Result<(), Fault> {
        let report = self.adopt_substrates(host, report.clone()).await?;
        self.registry
            .site_report(host.name(), report.clone(), Moment::now(), LEASE)
            .map_err(registry_fault)?;
        self.registry.substrates_damaged(host.name(), &report.damaged).map_err(registry_fault)?;
        self.settle_machines(host, report.machines, asked_at).await
    }

    /// Keeps a site's lease fresh until it stops answering, when it is detached, or until another
    /// link to it has replaced this one.
    pub async fn keep(self: Arc<Self>, host: Arc<dyn SiteHost>) {
        let mut tick = tokio::time::interval(REPORT_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut missed = 0;
        loop {
            tick.tick().await;
            if !self.is_attached(&host) {
                return;
            }
            self.registry.site_lapsed(host.name(), Moment::now());
            let report = tokio::time::timeout(LEASE, self.refresh(&host));
            // A site that takes long to tell what it has is there; one that is stopped is not.
            let (reported, ()) = tokio::join!(report, self.check_answers(&host));
            match reported {
                Ok(Ok(_)) => missed = 0,
                // It is there, and what it says of itself is not used: its lease runs out.
                Ok(Err(f)) if f.code == godwit_types::Code::Damaged => {
                    missed = 0;
                    tracing::warn!(site = %host.name(), error = %f, "its report is refused");
                }
                Ok(Err(f)) => {
                    missed += 1;
                    tracing::debug!(site = %host.name(), error = %f, "no report");
                }
                Err(_) => missed += 1,
            }
            if missed >= 3 {
                self.detach(&host);
                return;
            }
        }
    }

    /// The attached host of that name.
    ///
    /// # Errors
    /// Not found for a site that never joined, unavailable for one that is away.
    pub fn host(&self, name: &Name) -> Result<Arc<dyn SiteHost>, Fault> {
        let hosts = self.sites.hosts.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(h) = hosts.get(name) {
            return Ok(h.clone());
        }
        drop(hosts);
        let site = self.registry.site(name).map_err(registry_fault)?;
        if site.revoked {
            return Err(Fault::conflict(format!("site '{}' was revoked", site.name)).hint(format!(
                "let it join anew: godwit site token {0}, then godwit site join --replace there",
                site.name
            )));
        }
        Err(Fault::unavailable(format!(
            "site '{}' is not connected (last heard of {})",
            site.name,
            site.last_seen.rfc3339()
        ))
        .hint("its daemon reconnects by itself; see: godwit site list"))
    }

    /// All attached hosts, by name.
    #[must_use]
    pub fn hosts(&self) -> Vec<Arc<dyn SiteHost>> {
        let hosts = self.sites.hosts.read().unwrap_or_else(PoisonError::into_inner);
        hosts.values().cloned().collect()
    }

    /// Waits until a site is attached.
    async fn await_host(&self, name: &Name, limit: Duration) -> Result<Arc<dyn SiteHost>, Fault> {
        let mut changes = self.sites.changes.subscribe();
        let wait = async {
            loop {
                changes.borrow_and_update();
                if let Ok(h) = self.host(name) {
                    return h;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        match tokio::time::timeout(limit, wait).await {
            Ok(h) => Ok(h),
            Err(_) => self.host(name),
        }
    }

    /// Changes a machine's record under its generation.
    fn change_vm(
        &self,
        vm: &VmRecord,
        generation: Generation,
        change: impl FnOnce(&mut VmRecord) -> Result<(), crate::registry::RegistryError>,
    ) -> Result<VmRecord, Fault> {
        self.registry.vm_update(vm.id, generation, change).map_err(registry_fault)
    }
}
