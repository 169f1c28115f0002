//! Networks, as principals may see and change them.

use std::sync::Arc;

use godwit_site::{NetworkKind, Prefix};
use godwit_types::{Fault, Name, NetworkId, UnixMs};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::authorize::allow;
use crate::access::{Action, Object, Principal, may};
use crate::registry::{NetworkRecord, Registry, registry_fault};

/// A network to be made, in the tenant of the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewNetwork {
    /// Its name.
    pub name: Name,
    /// What its machines reach; nat when left out.
    pub kind: Option<NetworkKind>,
    /// Its addresses, 16 to 29 bits of a private range; 10.80.0.0/24 when left out. Networks may have
    /// the same.
    #[schema(value_type = Option<String>)]
    pub prefix: Option<Prefix>,
}

/// The networks of all tenants.
pub(crate) struct NetworkDesk {
    pub(super) registry: Arc<Registry>,
}

impl NetworkDesk {
    /// Those that are there for `who`.
    pub(crate) fn list_for(&self, who: &Principal) -> Vec<NetworkRecord> {
        let mut all = self.registry.networks().all();
        all.retain(|n| may(who, Action::See, &Object::network(n)).is_ok());
        all
    }

    /// The network `key`, if `who` may do `action` with it.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub(crate) fn find(
        &self,
        who: &Principal,
        action: Action,
        key: &str,
    ) -> Result<NetworkRecord, Fault> {
        let network = self.registry.networks().get(&who.tenant, key).map_err(registry_fault)?;
        allow(who, action, &Object::network(&network), ("network", key))?;
        Ok(network)
    }

    /// Makes a network.
    ///
    /// # Errors
    /// Forbidden, exists.
    pub(crate) fn create(&self, who: &Principal, new: NewNetwork) -> Result<NetworkRecord, Fault> {
        let made = Object::Network { tenant: &who.tenant };
        allow(who, Action::Create, &made, ("network", new.name.as_str()))?;
        let network = NetworkRecord {
            id: NetworkId::new(),
            name: new.name,
            tenant: who.tenant.clone(),
            kind: new.kind.unwrap_or(NetworkKind::Nat),
            prefix: new.prefix.unwrap_or(Prefix::DEFAULT),
            created: UnixMs::now(),
        };
        self.registry.networks().add(who, &network).map_err(registry_fault)?;
        Ok(network)
    }

    /// Removes a network that no machine is in.
    ///
    /// # Errors
    /// Not found, forbidden; conflict that says what is in it.
    pub(crate) fn delete(&self, who: &Principal, key: &str) -> Result<(), Fault> {
        let network = self.find(who, Action::Change, key)?;
        let who = &who.at(&network.tenant);
        self.registry.networks().remove(who, network.id).map_err(registry_fault)
    }
}
