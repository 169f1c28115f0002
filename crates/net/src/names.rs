//! What namespaces and interfaces are called.
//!
//! A site's names carry a mark made of its directory, so that several sites of one host keep apart
//! and each finds its own again.

use std::path::Path;

use godwit_qemu::MacAddress;
use godwit_types::{NetworkId, VmId};

/// The bridge of a namespace.
pub(crate) const BRIDGE: &str = "br0";
/// The end of the veth pair in a namespace.
pub(crate) const UPLINK: &str = "up0";

/// How the names of all sites' veths begin, on the host.
pub(crate) const VETHS: &str = "gdw";

/// The mark of one site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SiteMark(String);

impl SiteMark {
    /// That of the site whose things are in `data`.
    pub(crate) fn of(data: &Path) -> Self {
        let data = std::fs::canonicalize(data).unwrap_or_else(|_| data.to_owned());
        let hash = blake3::hash(data.as_os_str().as_encoded_bytes());
        Self(hash.to_hex().chars().take(5).collect())
    }

    /// How the names of its namespaces begin.
    pub(crate) fn namespaces(&self) -> String {
        format!("godwit-{}-", self.0)
    }

    /// The namespace of a network.
    pub(crate) fn namespace(&self, network: NetworkId) -> String {
        format!("{}{}", self.namespaces(), tail(&network.0.simple().to_string(), 12))
    }

    /// How the names of its veths begin, on the host.
    pub(crate) fn veths(&self) -> String {
        format!("{VETHS}{}", self.0)
    }

    /// The host's end of the veth pair of a namespace.
    pub(crate) fn veth(&self, namespace: &str) -> String {
        format!("{}{}", self.veths(), tail(namespace, 7))
    }

    /// The table of rules on the host.
    pub(crate) fn table(&self) -> String {
        format!("godwit_{}", self.0)
    }
}

/// The TAP of a machine.
pub(crate) fn tap(vm: VmId) -> String {
    format!("t{}", tail(&vm.0.simple().to_string(), 12))
}

/// The MAC address of a network's gateway.
pub(crate) fn gateway_mac(network: NetworkId) -> MacAddress {
    let id = network.0.into_bytes();
    MacAddress([0x02, id[11], id[12], id[13], id[14], id[15]])
}

fn tail(text: &str, n: usize) -> &str {
    text.get(text.len().saturating_sub(n)..).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_sites_keep_apart() {
        let (a, b) = (SiteMark::of(Path::new("/x/a")), SiteMark::of(Path::new("/x/b")));
        let (network, vm) = (NetworkId::new(), VmId::new());
        let namespace = a.namespace(network);
        assert_ne!(namespace, b.namespace(network));
        assert!(namespace.starts_with(&a.namespaces()) && namespace.len() <= 64);
        for name in [a.veth(&namespace), tap(vm)] {
            assert!(name.len() <= 15, "{name}");
        }
        assert_ne!(a.veth(&namespace), b.veth(&namespace));
    }
}
