//! Who may know of an event.
//!
//! Said when the event is made, of what the object was and of what it is: so a substrate that is
//! granted appears, one whose grant is taken back is gone, and whoever reads an old event later sees
//! no more of it than whoever read it at once. A tenant is named with the time when it was made: one
//! that is made anew under the name of another reads nothing of that one's.

use std::collections::{BTreeSet, HashMap};

use godwit_types::{Name, SubstrateKind, UnixMs};
use serde::{Deserialize, Serialize};

use super::tables::{Change, Tables};
use super::{OpRecord, SubstrateRecord, VmRecord};
use crate::principal::Principal;

/// Who may know of it; operators in any case.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Audience {
    /// Nobody else: of the cloud as a whole, or from a version that knew no tenants.
    #[default]
    Operators,
    /// Everybody.
    All,
    /// These tenants, with the times when they were made.
    Tenants(BTreeSet<(Name, UnixMs)>),
}

impl Audience {
    pub(super) const fn is_default(&self) -> bool {
        matches!(self, Self::Operators)
    }
}

/// Whoever reads events.
#[derive(Debug, Clone)]
pub struct Reader {
    /// None for an operator who reads everything.
    tenant: Option<(Name, UnixMs)>,
}

impl Reader {
    /// `who`, whose tenant was made at that time.
    #[must_use]
    pub fn new(who: &Principal, created: UnixMs) -> Self {
        let all = who.is_operator() && !who.narrowed;
        Self { tenant: (!all).then(|| (who.tenant.clone(), created)) }
    }

    /// Whether it belongs to the audience.
    #[must_use]
    pub fn may_read(&self, audience: &Audience) -> bool {
        match (&self.tenant, audience) {
            (None, _) | (Some(_), Audience::All) => true,
            (Some(_), Audience::Operators) => false,
            (Some(tenant), Audience::Tenants(all)) => all.contains(tenant),
        }
    }
}

/// The tenants as they are after some changes that are not in the tables yet.
pub(super) struct Tenants<'a> {
    tables: &'a Tables,
    new: HashMap<Name, UnixMs>,
}

impl<'a> Tenants<'a> {
    pub(super) fn of(tables: &'a Tables) -> Self {
        Self { tables, new: HashMap::new() }
    }

    /// A change that comes before those that are asked about next.
    pub(super) fn apply(&mut self, change: &Change) {
        if let Change::Tenant(name, Some(tenant)) = change {
            self.new.insert(name.clone(), tenant.created);
        }
    }

    fn tenants_named<'n>(&self, names: impl Iterator<Item = &'n Name>) -> Audience {
        let created = |name: &Name| {
            let there = || self.tables.people.tenants.get(name).map(|t| t.created);
            self.new.get(name).copied().or_else(there).map(|created| (name.clone(), created))
        };
        Audience::Tenants(names.filter_map(created).collect())
    }

    /// Who sees a machine.
    pub(super) fn vm(&self, vm: &VmRecord) -> Audience {
        self.tenants_named(std::iter::once(&vm.tenant))
    }

    /// Who sees a substrate, as [`crate::access::may`] has it.
    pub(super) fn substrate(&self, s: &SubstrateRecord) -> Audience {
        let own = std::iter::once(&s.tenant);
        match s.kind {
            SubstrateKind::Public => Audience::All,
            SubstrateKind::Restricted => self.tenants_named(own.chain(&s.granted)),
            SubstrateKind::Private => self.tenants_named(own),
        }
    }

    /// Who sees an operation.
    pub(super) fn op(&self, op: &OpRecord) -> Audience {
        match op.kind.is_of_cloud() {
            true => Audience::Operators,
            false => self.tenants_named(std::iter::once(&op.tenant)),
        }
    }
}
