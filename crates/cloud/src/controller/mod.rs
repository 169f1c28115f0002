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
//!   | B's QEMU dies first -> Running at A, generation g+2 (see `back`)
//!   v
//! Running at B
//! ```
//!
//! It is made of parts, each of which owns what it knows and is called by its field: `sites` (who is
//! reachable), `warrants` (the records of machines and where each may run), `finder` (what is there
//! for whom), `accounts` (people and the log), `programs` (in guests), `exchange` (substrates from
//! site to site), `moves`, `settler` (what sites say of machines), `pool`. What needs several of them
//! is here: to make, start, stop, dock and delete a machine, and to go on after a restart.

mod arrive;
mod ask;
pub(crate) mod authorize;
mod back;
pub(crate) mod bring;
mod carry;
mod depart;
mod disks;
mod exec;
pub(crate) mod lifecycle;
mod meet;
mod moves;
mod networks;
mod origin;
mod people;
mod pool;
mod ports;
mod rebuild;
mod recover;
mod refusals;
mod settle;
mod sites;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod tests_arrive;
#[cfg(test)]
mod tests_back;
#[cfg(test)]
mod tests_belief;
#[cfg(test)]
mod tests_older;
#[cfg(test)]
mod tests_ports;
#[cfg(test)]
mod tests_tenants;
mod warrants;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use godwit_transfer::Authority;
use godwit_types::{Fault, Mib, Name, OpId, SiteKind, SubstrateKind, UnixMs};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;

use authorize::Finder;
pub(crate) use bring::Exchange;
use exec::Programs;
use moves::Moves;
use networks::NetworkDesk;
use people::Accounts;
use pool::Pool;
use ports::PortDesk;
use recover::Settler;
use sites::Sites;
use warrants::Warrants;

pub use exec::GuestProcess;
pub use networks::NewNetwork;
pub use people::{ApiToken, NewApiToken, NewTenant, NewUser};

use crate::clock::Moment;
use crate::ops::Ops;
pub use crate::registry::LEASE;
use crate::registry::{Registry, SiteRecord, registry_fault};
use godwit_site::{SiteHost, SiteReport};

pub(crate) use ask::ask_all;
pub use ask::{ANSWER_WITHIN, Unanswered};
pub(crate) use origin::Uploading;

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
    /// The network that it is in (name or id); none when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
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

/// The controller of one center: parts that own what they know, and what needs several of them.
pub struct Controller {
    registry: Arc<Registry>,
    ops: Arc<Ops>,
    /// The sites that are reachable.
    pub(crate) sites: Arc<Sites>,
    /// The center's word on where machines may run.
    pub(crate) warrants: Arc<Warrants>,
    /// What is there for whom.
    pub(crate) finder: Arc<Finder>,
    /// Who there is, and what each has done.
    pub(crate) accounts: Arc<Accounts>,
    pub(crate) networks: NetworkDesk,
    pub(crate) ports: PortDesk,
    /// Programs in guests.
    pub(crate) programs: Arc<Programs>,
    /// Substrates, wherever they are.
    pub(crate) exchange: Arc<Exchange>,
    /// Machines on their way.
    pub(crate) moves: Arc<Moves>,
    /// What sites say of machines.
    pub(crate) settler: Arc<Settler>,
    /// Images and pools.
    pub(crate) pool: Arc<Pool>,
    /// One machine at a time is entered: what may run once only is not entered twice.
    entering: Arc<std::sync::Mutex<()>>,
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
        let ops = Ops::new(registry.clone());
        let entering = Arc::<std::sync::Mutex<()>>::default();
        let sites = Arc::new(Sites {
            registry: registry.clone(),
            hosts: RwLock::default(),
            lacking: RwLock::default(),
            changes: watch::Sender::new(0),
        });
        let warrants = Arc::new(Warrants { registry: registry.clone(), authority });
        let finder = Arc::new(Finder { registry: registry.clone(), ops: ops.clone() });
        let accounts = Arc::new(Accounts {
            registry: registry.clone(),
            finder: finder.clone(),
            refusals: refusals::Refusals::default(),
        });
        let programs = Arc::new(Programs {
            registry: registry.clone(),
            sites: sites.clone(),
            finder: finder.clone(),
            accounts: accounts.clone(),
        });
        let exchange = Arc::new(Exchange {
            registry: registry.clone(),
            ops: ops.clone(),
            sites: sites.clone(),
            finder: finder.clone(),
            bringing: bring::Bringing::default(),
            uploads: origin::Uploads::default(),
            disks: disks::Disks::default(),
            entering: entering.clone(),
        });
        let settler = Arc::new(Settler {
            registry: registry.clone(),
            ops: ops.clone(),
            sites: sites.clone(),
            warrants: warrants.clone(),
            settled: recover::Settled::default(),
        });
        let moves = Arc::new(Moves {
            registry: registry.clone(),
            ops: ops.clone(),
            sites: sites.clone(),
            warrants: warrants.clone(),
            finder: finder.clone(),
            settler: settler.clone(),
            way_back: Arc::new(back::WayBack {
                registry: registry.clone(),
                ops: ops.clone(),
                sites: sites.clone(),
                warrants: warrants.clone(),
                patience,
            }),
            patience,
        });
        let pool = Arc::new(Pool {
            registry: registry.clone(),
            ops: ops.clone(),
            sites: sites.clone(),
            finder: finder.clone(),
            accounts: accounts.clone(),
        });
        let networks = NetworkDesk { registry: registry.clone() };
        let ports =
            PortDesk { registry: registry.clone(), sites: sites.clone(), finder: finder.clone() };
        Arc::new(Self {
            registry,
            ops,
            sites,
            warrants,
            finder,
            accounts,
            networks,
            ports,
            programs,
            exchange,
            moves,
            settler,
            pool,
            entering,
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
        let old = self.registry.sites().get(&name).ok();
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
        self.registry.sites().put(&record).map_err(registry_fault)?;
        // What it runs is asked for once, whatever it said when it was here before.
        self.settler.unsettle(&name);
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
            if let Err(error) = self.registry.sites().away(name) {
                tracing::warn!(site = %name, %error, "when it was seen last is not written down");
            }
            self.sites.changes.send_modify(|n| *n += 1);
            tracing::warn!(site = %name, "not reachable any more");
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
        self.ports.tell_pending(host.name()).await;
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
        let report = self.exchange.adopt_substrates(host, report.clone()).await?;
        self.registry
            .sites()
            .report(host.name(), report.clone(), Moment::now(), LEASE)
            .map_err(registry_fault)?;
        self.sites.ask_of_networks(host).await;
        self.registry.substrates_damaged(host.name(), &report.damaged).map_err(registry_fault)?;
        self.settler.settle_machines(host, report.machines, asked_at).await
    }

    /// Keeps a site's lease fresh until it stops answering, when it is detached, or until another
    /// link to it has replaced this one.
    pub async fn keep(self: Arc<Self>, host: Arc<dyn SiteHost>) {
        let mut tick = tokio::time::interval(REPORT_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut missed = 0;
        loop {
            tick.tick().await;
            if !self.sites.is_attached(&host) {
                return;
            }
            self.registry.sites().lapsed(host.name(), Moment::now());
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
}
