//! What the registry keeps.

use std::collections::{BTreeMap, BTreeSet};

use godwit_site::{Progress, PublishedPort, SiteReport};
use godwit_types::{
    Arch, Code, Fault, Generation, Hash, InvalidTransition, Mib, MigrationId, Name, OpId, OpState,
    SiteKind, SiteState, SubstrateId, SubstrateKind, UnixMs, VmId, VmState,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::journal::Step;
use super::networks::VmNetwork;
use crate::op_kind::OpKind;
use crate::principal::{Principal, default_tenant, operator};

/// A site that belongs to this cloud.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SiteRecord {
    /// Its name, which is also in its certificate.
    pub name: Name,
    /// What it is.
    pub kind: SiteKind,
    /// When it joined.
    pub joined: UnixMs,
    /// It is reachable until then; each report moves this on, and it ends when the site does not
    /// answer.
    pub lease_until: UnixMs,
    /// When it reported last.
    #[serde(default)]
    pub last_seen: UnixMs,
    /// Its certificate is no longer accepted.
    pub revoked: bool,
    /// What it last reported.
    pub report: SiteReport,
}

impl SiteRecord {
    /// Whether it can be used at `now`.
    #[must_use]
    pub fn state(&self, now: UnixMs) -> SiteState {
        if !self.revoked && now <= self.lease_until {
            SiteState::Ready
        } else {
            SiteState::Unreachable
        }
    }
}

/// A substrate and the sites that hold it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SubstrateRecord {
    /// Its id.
    pub id: SubstrateId,
    /// Its name; unique in its tenant.
    pub name: Name,
    /// The tenant that it belongs to.
    #[serde(default = "default_tenant")]
    pub tenant: Name,
    /// Who may use it.
    pub kind: SubstrateKind,
    /// The user of that tenant who made it.
    pub owner: Name,
    /// Other tenants that may use it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub granted: BTreeSet<Name>,
    /// The image below it.
    pub image: Name,
    /// Guest architecture.
    pub arch: Arch,
    /// Guest memory.
    pub memory: Mib,
    /// vCPUs.
    pub vcpus: u8,
    /// Bytes of memory and disk in the clear.
    pub raw_bytes: u64,
    /// Bytes as stored.
    pub stored_bytes: u64,
    /// When it was docked.
    pub created: UnixMs,
    /// Sites that hold all of it.
    pub holders: BTreeSet<Name>,
    /// The hash of all that it is; a site that holds anything else under its id does not hold it.
    #[serde(default)]
    pub content: Option<Hash>,
    /// Holders at which something of it was found damaged, and what.
    #[serde(default)]
    pub damaged: BTreeMap<Name, String>,
}

/// An execution environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmRecord {
    /// Its id.
    pub id: VmId,
    /// Its name; unique in its tenant.
    pub name: Name,
    /// The tenant that it belongs to.
    #[serde(default = "default_tenant")]
    pub tenant: Name,
    /// Where it is in its life.
    pub state: VmState,
    /// Where it runs.
    pub site: Name,
    /// The hand-over counter.
    pub generation: Generation,
    /// The image it came from.
    pub image: Name,
    /// The substrate it was activated from.
    pub substrate: Option<SubstrateId>,
    /// Guest architecture.
    pub arch: Arch,
    /// Guest memory.
    pub memory: Mib,
    /// vCPUs.
    pub vcpus: u8,
    /// Bytes of its disk as its guest sees it; not known of one that was made by a version before
    /// this, or at a site of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// When it was made.
    pub created: UnixMs,
    /// When its state last changed.
    pub changed: UnixMs,
    /// Where it is going, while it moves.
    pub moving_to: Option<Name>,
    /// Why it is in this state, when that needs words.
    pub reason: Option<String>,
    /// The user of its tenant whose alone it is: it was made of that user's private substrate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_of: Option<Name>,
    /// Its place in a network, if it is in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<VmNetwork>,
    /// The ports of its site's host that lead to it while it runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<PublishedPort>,
    /// Its site may not know yet that these are its ports.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ports_pending: bool,
    /// Part of it is still at the site that it moved from.
    #[serde(default)]
    pub arriving: Option<Arriving>,
    /// It died at the destination of a move before all of it was there, and is brought back to its
    /// site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub returning: Option<Returning>,
    /// Warrants that count no more: sites for which one was made out, and up to which generation.
    /// The machine never ran there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = Object)]
    pub voided: BTreeMap<Name, Generation>,
}

/// What a machine that runs at its destination still has elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Arriving {
    /// The migration that it came by.
    #[schema(value_type = String)]
    pub migration: MigrationId,
    /// The site that has the rest.
    pub from: Name,
    /// What is being done about a break.
    pub note: Option<String>,
}

/// The way back of a machine that died at its destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Returning {
    /// The migration that it left by.
    #[schema(value_type = String)]
    pub migration: MigrationId,
    /// The site where it died.
    pub from: Name,
    /// The generation under which its source runs it on.
    pub generation: Generation,
    /// What of its work is undone then, in words.
    pub undone: String,
}

impl VmRecord {
    /// Whether it starts, moves or is being docked, so that either end may need what it came from.
    #[must_use]
    pub fn is_on_its_way(&self) -> bool {
        matches!(self.state, VmState::Starting | VmState::Moving | VmState::Docking)
            || self.arriving.is_some()
            || self.returning.is_some()
    }

    /// The next generation that the machine may have anywhere: none for which there was ever a
    /// warrant, also a void one.
    #[must_use]
    pub fn next_generation(&self) -> Generation {
        self.voided.values().fold(self.generation, |a, b| a.max(*b)).next()
    }

    /// From now on the machine has this generation; what is below it needs no mention any more.
    pub fn reach(&mut self, generation: Generation) {
        self.generation = generation;
        self.voided.retain(|_, g| *g > generation);
    }

    /// It runs where the registry has it: a way back is over. What is undone is said of a machine that
    /// was brought back; one that was started from its disk instead is told of nothing.
    pub fn is_back(&mut self) {
        if let Some(back) = self.returning.take()
            && back.generation == self.generation
        {
            self.reason = Some(back.undone);
        }
    }

    /// Changes the state by the table of [`VmState`].
    ///
    /// # Errors
    /// [`InvalidTransition`] with both states.
    pub fn become_state(&mut self, to: VmState, now: UnixMs) -> Result<(), InvalidTransition> {
        self.state = self.state.to(to)?;
        self.changed = now;
        if to != VmState::Moving {
            self.moving_to = None;
        }
        if !matches!(to, VmState::Failed | VmState::Stopped) {
            self.reason = None;
        }
        Ok(())
    }
}

impl SubstrateRecord {
    /// The user of its tenant whose alone it is, if it is private.
    #[must_use]
    pub fn private_of(&self) -> Option<&Name> {
        (self.kind == SubstrateKind::Private).then_some(&self.owner)
    }

    /// Whether whoever may use `other` may use this one, too.
    #[must_use]
    pub fn is_read_by_all_of(&self, other: &Self) -> bool {
        let reads = |tenant: &Name| *tenant == self.tenant || self.granted.contains(tenant);
        let all_read = || reads(&other.tenant) && other.granted.iter().all(reads);
        match (self.kind, other.kind) {
            (SubstrateKind::Public, _) => true,
            (_, SubstrateKind::Public) => false,
            (SubstrateKind::Restricted, SubstrateKind::Restricted) => all_read(),
            (SubstrateKind::Restricted, SubstrateKind::Private) => reads(&other.tenant),
            (SubstrateKind::Private, SubstrateKind::Private) => {
                self.tenant == other.tenant && self.owner == other.owner
            }
            (SubstrateKind::Private, SubstrateKind::Restricted) => false,
        }
    }
}

/// A machine that was deleted or docked, remembered until every site has been seen without it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletedVm {
    /// Its id.
    pub vm: VmId,
    /// What it was called.
    pub name: Name,
    /// The last generation that the center knew.
    pub generation: Generation,
    /// When it went.
    pub when: UnixMs,
}

/// A long job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OpRecord {
    /// Its id.
    pub id: OpId,
    /// The tenant that it belongs to.
    #[serde(default = "default_tenant")]
    pub tenant: Name,
    /// The user who asked for it.
    #[serde(default = "operator")]
    pub user: Name,
    /// The site that handed the request over; none where the center was asked itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<Name>,
    /// What it does, with its parameters.
    pub kind: OpKind,
    /// Where it is.
    pub state: OpState,
    /// When it was asked for.
    pub started: UnixMs,
    /// When it ended.
    pub ended: Option<UnixMs>,
    /// What it does right now, by stage, latest figures of each.
    pub progress: Vec<Progress>,
    /// Its steps.
    pub journal: Vec<Step>,
    /// Why it failed.
    pub error: Option<Fault>,
    /// What it gave.
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
}

impl OpRecord {
    /// One that begins now.
    #[must_use]
    pub fn begun(who: &Principal, kind: OpKind) -> Self {
        Self {
            id: OpId::new(),
            tenant: who.tenant.clone(),
            user: who.user.clone(),
            by: who.by.clone(),
            kind,
            state: OpState::Running,
            started: UnixMs::now(),
            ended: None,
            progress: Vec::new(),
            journal: Vec::new(),
            error: None,
            result: None,
        }
    }

    /// Class of the failure, if it failed.
    #[must_use]
    pub fn failure(&self) -> Option<Code> {
        self.error.as_ref().map(|e| e.code)
    }
}
