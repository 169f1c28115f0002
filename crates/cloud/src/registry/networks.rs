//! Networks, and which address of which belongs to which machine.
//!
//! An address is chosen from what the registry holds and entered with its machine in one transaction
//! ([`Tables::has_place`]), which refuses one that somebody else has by then.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use godwit_site::{Attachment, MacAddress, Network, NetworkKind, Prefix};
use godwit_types::{Name, NetworkId, UnixMs, VmId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::audit::Note;
use super::file::File;
use super::tables::{Change, Tables};
use super::{RegistryError, Result, VmRecord, full_name, missing};
use crate::principal::Principal;

/// The network that each tenant has from the start.
pub const DEFAULT_NETWORK: &str = "default";

/// Networks that one tenant may have.
const MAX_NETWORKS: usize = 100;

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkRecord {
    /// Its id.
    pub id: NetworkId,
    /// Its name; unique in its tenant.
    pub name: Name,
    /// The tenant that it belongs to.
    pub tenant: Name,
    /// What its machines reach.
    pub kind: NetworkKind,
    /// Its addresses, such as `10.80.0.0/24`.
    #[schema(value_type = String)]
    pub prefix: Prefix,
    /// When it was made.
    pub created: UnixMs,
}

impl NetworkRecord {
    /// The one that `tenant` has from the start.
    pub(super) fn default_of(tenant: &Name) -> Self {
        Self {
            id: NetworkId::new(),
            name: Name::new(DEFAULT_NETWORK).unwrap_or_else(|_| unreachable!("it is a name")),
            tenant: tenant.clone(),
            kind: NetworkKind::Nat,
            prefix: Prefix::DEFAULT,
            created: UnixMs::now(),
        }
    }

    /// As sites know it.
    fn network(&self) -> Network {
        Network { id: self.id, name: self.name.clone(), kind: self.kind, prefix: self.prefix }
    }
}

/// A machine's place in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmNetwork {
    /// The network.
    pub id: NetworkId,
    /// Its name.
    pub name: Name,
    /// The machine's IPv4 address in it.
    #[schema(value_type = String)]
    pub address: Ipv4Addr,
    /// The address of its NIC.
    #[schema(value_type = String)]
    pub mac: MacAddress,
}

impl Tables {
    fn members(&self, id: NetworkId) -> impl Iterator<Item = &Arc<VmRecord>> {
        let in_it = move |v: &&Arc<VmRecord>| v.network.as_ref().is_some_and(|n| n.id == id);
        self.vms.values().map(|e| &e.vm).filter(in_it)
    }

    fn network_named(&self, tenant: &Name, name: &Name) -> Option<&Arc<NetworkRecord>> {
        self.networks.values().find(|n| n.tenant == *tenant && n.name == *name)
    }

    /// Refuses a new machine whose network is not there, or whose place in it is another's.
    pub(super) fn has_place(&self, vm: &VmRecord) -> Result<()> {
        let Some(place) = &vm.network else { return Ok(()) };
        let network = self.networks.get(&place.id).filter(|n| n.tenant == vm.tenant);
        let network = network.ok_or_else(|| missing("network", &place.name))?;
        let taken = self.members(place.id).filter(|v| v.id != vm.id).any(|v| {
            v.network.as_ref().is_some_and(|n| n.address == place.address || n.mac == place.mac)
        });
        match taken || !network.prefix.is_host(place.address) {
            false => Ok(()),
            true => Err(RegistryError::Busy(format!(
                "address {} of network '{}' is not free",
                place.address, place.name
            ))),
        }
    }

    /// The network that a new tenant has from the start.
    pub(super) fn default_network(tenant: &Name) -> Change {
        let network = NetworkRecord::default_of(tenant);
        Change::Network(network.id, Some(Arc::new(network)))
    }

    /// What forgets the networks of a tenant without machines.
    pub(super) fn forget_networks<'a>(
        &'a self,
        tenant: &'a Name,
    ) -> impl Iterator<Item = Change> + 'a {
        let own = self.networks.values().filter(move |n| n.tenant == *tenant);
        own.map(|n| Change::Network(n.id, None))
    }
}

/// The networks of a registry.
#[derive(Debug)]
pub struct Networks {
    file: Arc<File>,
}

impl Networks {
    pub(super) const fn new(file: Arc<File>) -> Self {
        Self { file }
    }

    /// All of them, by tenant and name.
    #[must_use]
    pub fn all(&self) -> Vec<NetworkRecord> {
        let mut all: Vec<NetworkRecord> =
            self.file.read(|t| t.networks.values().map(|n| NetworkRecord::clone(n)).collect());
        all.sort_by(|a, b| (&a.tenant, &a.name).cmp(&(&b.tenant, &b.name)));
        all
    }

    /// The network `key`: an id, a name in `tenant`, or `TENANT/NAME`.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`].
    pub fn get(&self, tenant: &Name, key: &str) -> Result<NetworkRecord> {
        self.file.read(|t| {
            let by_id = || t.networks.get(&key.parse().ok()?);
            let by_name =
                || full_name(tenant, key).and_then(|(of, name)| t.network_named(&of, &name));
            let found = by_name().or_else(by_id);
            found
                .map(|n| NetworkRecord::clone(n))
                .ok_or_else(|| RegistryError::not_found("network", key))
        })
    }

    /// Enters a network.
    ///
    /// # Errors
    /// [`RegistryError::Exists`]; [`RegistryError::OverQuota`] beyond 100 of one tenant.
    pub fn add(&self, who: &Principal, network: &NetworkRecord) -> Result<()> {
        self.file.write(|t, changes| {
            let (tenant, name) = (&network.tenant, &network.name);
            t.has_tenant(tenant)?;
            if t.network_named(tenant, name).is_some() {
                return Err(RegistryError::Exists { what: "network", key: name.to_string() });
            }
            let used = t.networks.values().filter(|n| n.tenant == *tenant).count();
            if used >= MAX_NETWORKS {
                let (used, limit) = (used as u64, MAX_NETWORKS as u64);
                let tenant = tenant.clone();
                return Err(RegistryError::OverQuota { tenant, what: "networks", used, limit });
            }
            changes.push(t.audited(Note::of(who, "network create", name.as_str())));
            changes.push(Change::Network(network.id, Some(Arc::new(network.clone()))));
            Ok(())
        })
    }

    /// Forgets a network that no machine is in.
    ///
    /// # Errors
    /// [`RegistryError::Busy`] for one in use, and for the one that each tenant has.
    pub fn remove(&self, who: &Principal, id: NetworkId) -> Result<()> {
        self.file.write(|t, changes| {
            let network = t.networks.get(&id).ok_or_else(|| missing("network", &id))?;
            if network.name.as_str() == DEFAULT_NETWORK {
                return Err(RegistryError::Busy(format!(
                    "network '{DEFAULT_NETWORK}' is there as long as its tenant"
                )));
            }
            if let Some(vm) = t.members(id).next() {
                return Err(RegistryError::Busy(format!(
                    "network '{}' is in use by machine '{}'",
                    network.name, vm.name
                )));
            }
            changes.push(t.audited(Note::of(who, "network delete", network.name.as_str())));
            changes.push(Change::Network(id, None));
            Ok(())
        })
    }

    /// A free place for the machine `vm` in a network.
    ///
    /// # Errors
    /// [`RegistryError::NoAddress`] when all addresses are taken.
    pub fn place(&self, network: &NetworkRecord, vm: VmId) -> Result<VmNetwork> {
        self.file.read(|t| {
            let places = || t.members(network.id).filter_map(|v| v.network.as_ref());
            let taken: BTreeSet<Ipv4Addr> = places().map(|n| n.address).collect();
            let address = network.prefix.hosts().find(|a| !taken.contains(a)).ok_or_else(|| {
                RegistryError::NoAddress {
                    network: network.name.clone(),
                    prefix: network.prefix.to_string(),
                }
            })?;
            let id = vm.0.as_bytes();
            let mac = MacAddress::from_seed([id[11], id[12], id[13], id[14], id[15]]);
            Ok(VmNetwork { id: network.id, name: network.name.clone(), address, mac })
        })
    }

    /// What a site is told of a machine's place, if that is in a network.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] for a network that is not there.
    pub fn attachment(&self, vm: &VmRecord) -> Result<Option<Attachment>> {
        let Some(place) = &vm.network else { return Ok(None) };
        self.file.read(|t| {
            let network =
                t.networks.get(&place.id).ok_or_else(|| missing("network", &place.name))?;
            let (mac, address) = (place.mac, place.address);
            Ok(Some(Attachment { network: network.network(), mac, address }))
        })
    }
}
