//! Whose a thing is, and who may do what with it.
//!
//! A request is made by a [`Principal`]. Whether it may do an [`Action`] with an [`Object`] is said
//! by one pure table, [`may`]. What a principal may not see is [`Refusal::Hidden`]: for it the
//! object is not there, in every answer and in every message.
//!
//! ```text
//!             own tenant                         other tenants
//! viewer      sees machines, their screens       sees public substrates and images,
//!             and consoles, operations           and what was granted
//! member      + makes, drives, moves, docks      + makes machines of those
//! admin       + users, tokens, the audit log
//! operator    everything, everywhere
//! ```

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use godwit_types::{Name, SubstrateKind};

pub use crate::principal::{DEFAULT_TENANT, OPERATOR, Principal, Role, default_tenant, operator};
use crate::registry::{NetworkRecord, OpRecord, SubstrateRecord, VmRecord};

/// What is done with an [`Object`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Learn that it is there, and what it is.
    See,
    /// Read what a machine shows: its console, its screen.
    Look,
    /// Use it: drive a machine, make a machine of a substrate or an image, export a substrate.
    Use,
    /// Make one.
    Create,
    /// Change or remove it.
    Change,
    /// Give it to others: make a substrate public.
    Publish,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::See, Self::Look, Self::Use, Self::Create, Self::Change, Self::Publish];

    const fn as_str(self) -> &'static str {
        match self {
            Self::See => "see",
            Self::Look => "look at",
            Self::Use => "use",
            Self::Create => "make",
            Self::Change => "change or remove",
            Self::Publish => "publish",
        }
    }
}

/// With what it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object<'a> {
    /// A machine, and what runs in it.
    Machine {
        /// Whose.
        tenant: &'a Name,
        /// The user of that tenant whose alone it is: it stands on a private substrate.
        private_of: Option<&'a Name>,
    },
    /// A network.
    Network {
        /// Whose.
        tenant: &'a Name,
    },
    /// A substrate.
    Substrate {
        /// Whose.
        tenant: &'a Name,
        /// The user of that tenant who made it.
        owner: &'a Name,
        /// Who may use it.
        kind: SubstrateKind,
        /// The tenants that it was granted to.
        granted: &'a BTreeSet<Name>,
    },
    /// An operation.
    Operation {
        /// Whose.
        tenant: &'a Name,
    },
    /// An image: for everybody.
    Image,
    /// A site.
    Site,
    /// What is about the cloud as a whole: pools, join tokens, metrics.
    Cloud,
    /// An operation on the cloud as a whole: a pool's check, an image's build.
    CloudOperation,
    /// What a tenant's users did.
    Audit {
        /// Whose.
        tenant: &'a Name,
    },
    /// A tenant.
    Tenant {
        /// Which.
        name: &'a Name,
    },
    /// A user.
    User {
        /// Whose.
        tenant: &'a Name,
        /// What it is, or is to be.
        role: Role,
    },
    /// A token for the API.
    Token {
        /// The tenant of its user.
        tenant: &'a Name,
        /// Its user.
        user: &'a Name,
        /// What it allows.
        role: Role,
    },
}

impl<'a> Object<'a> {
    /// A machine.
    #[must_use]
    pub const fn machine(vm: &'a VmRecord) -> Self {
        Self::Machine { tenant: &vm.tenant, private_of: vm.private_of.as_ref() }
    }

    /// A network.
    #[must_use]
    pub const fn network(network: &'a NetworkRecord) -> Self {
        Self::Network { tenant: &network.tenant }
    }

    /// A substrate.
    #[must_use]
    pub const fn substrate(s: &'a SubstrateRecord) -> Self {
        Self::Substrate { tenant: &s.tenant, owner: &s.owner, kind: s.kind, granted: &s.granted }
    }

    /// An operation.
    #[must_use]
    pub const fn operation(op: &'a OpRecord) -> Self {
        match op.kind.is_of_cloud() {
            true => Self::CloudOperation,
            false => Self::Operation { tenant: &op.tenant },
        }
    }

    const fn what(&self) -> &'static str {
        match self {
            Self::Machine { private_of: Some(_), .. } => "this private machine",
            Self::Machine { private_of: None, .. } => "machines",
            Self::Network { .. } => "networks",
            Self::Substrate { .. } => "this substrate",
            Self::Operation { .. } | Self::CloudOperation => "operations",
            Self::Image => "images",
            Self::Site => "sites",
            Self::Cloud => "what concerns the whole cloud",
            Self::Audit { .. } => "the audit log",
            Self::Tenant { .. } => "tenants",
            Self::User { .. } => "such users",
            Self::Token { .. } => "such tokens",
        }
    }
}

/// Why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// For this principal it is not there.
    Hidden,
    /// It is there, and that may not be done with it.
    Forbidden,
}

/// Whether `who` may do `action` with `object`.
///
/// # Errors
/// Why not.
pub fn may(who: &Principal, action: Action, object: &Object<'_>) -> Result<(), Refusal> {
    if who.is_operator() {
        return Ok(());
    }
    if !sees(who, object) {
        return Err(Refusal::Hidden);
    }
    match needed(who, action, object) {
        Some(role) if who.role >= role => Ok(()),
        _ => Err(Refusal::Forbidden),
    }
}

/// The words of a [`Refusal::Forbidden`].
#[must_use]
pub fn forbidden(who: &Principal, action: Action, object: &Object<'_>) -> String {
    let (user, role, tenant) = (&who.user, who.role, &who.tenant);
    let (action, what) = (action.as_str(), object.what());
    format!("user '{user}', {role} of tenant '{tenant}', may not {action} {what}")
}

/// Whether it is there for `who`, who is no operator.
fn sees(who: &Principal, object: &Object<'_>) -> bool {
    match *object {
        Object::Machine { tenant, .. }
        | Object::Network { tenant }
        | Object::Operation { tenant }
        | Object::Audit { tenant }
        | Object::User { tenant, .. } => *tenant == who.tenant,
        Object::Tenant { name } => *name == who.tenant,
        Object::Token { tenant, user, .. } => {
            // No admin of the operator's tenant has the operator's in hand.
            let others = who.role >= Role::Admin && user.as_str() != OPERATOR;
            *tenant == who.tenant && (*user == who.user || others)
        }
        Object::Substrate { tenant, kind, granted, .. } => {
            *tenant == who.tenant
                || match kind {
                    SubstrateKind::Public => true,
                    SubstrateKind::Restricted => granted.contains(&who.tenant),
                    SubstrateKind::Private => false,
                }
        }
        Object::CloudOperation => false,
        // That they are there is no secret.
        Object::Image | Object::Site | Object::Cloud => true,
    }
}

/// The role that is needed for it; none where only an operator may. `who` sees the object.
fn needed(who: &Principal, action: Action, object: &Object<'_>) -> Option<Role> {
    use Action::{Change, Create, Look, Publish, See, Use};
    use Role::{Admin, Member, Viewer};
    match (*object, action) {
        (_, Publish) | (Object::Cloud | Object::CloudOperation, _) => None,
        (Object::Machine { .. }, See) => Some(Viewer),
        (Object::Machine { private_of: Some(owner), .. }, Look | Use) if *owner != who.user => None,
        (Object::Machine { private_of: Some(owner), .. }, Change) if *owner != who.user => {
            Some(Admin)
        }
        (Object::Machine { .. }, Look) => Some(Viewer),
        (Object::Machine { .. }, Use | Create | Change) => Some(Member),
        (Object::Network { .. }, See) => Some(Viewer),
        (Object::Network { .. }, Use | Create | Change) => Some(Member),
        (Object::Operation { .. }, See) => Some(Viewer),
        (Object::Operation { .. }, Change) => Some(Member),
        (Object::Substrate { .. } | Object::Image, See) => Some(Viewer),
        (Object::Image, Use) => Some(Member),
        (Object::Substrate { tenant, owner, kind, .. }, Use) => match kind {
            SubstrateKind::Private if *tenant != who.tenant || *owner != who.user => None,
            _ => Some(Member),
        },
        (Object::Substrate { kind: SubstrateKind::Public, .. }, Create | Change) => None,
        (Object::Substrate { .. }, Create) => Some(Member),
        (Object::Substrate { tenant, owner, kind, .. }, Change) => match kind {
            _ if *tenant != who.tenant => None,
            SubstrateKind::Private if *owner != who.user => Some(Admin),
            _ => Some(Member),
        },
        (Object::Audit { .. }, See) => Some(Admin),
        (Object::Site, See) => Some(Viewer),
        (Object::Site, Use) => Some(Member),
        (Object::Tenant { .. } | Object::User { .. }, See) => Some(Viewer),
        (Object::User { role, .. }, Create | Change) => (role <= who.role).then_some(Admin),
        (Object::Token { .. }, See) => Some(Viewer),
        (Object::Token { user, role, .. }, Create | Change) => match role <= who.role {
            true if *user == who.user => Some(Viewer),
            true => Some(Admin),
            false => None,
        },
        (Object::Operation { .. } | Object::Substrate { .. } | Object::Image, _)
        | (
            Object::Audit { .. }
            | Object::Network { .. }
            | Object::Site
            | Object::Tenant { .. }
            | Object::User { .. }
            | Object::Token { .. },
            _,
        ) => None,
    }
}
