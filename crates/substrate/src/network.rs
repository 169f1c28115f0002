//! What a guest is told of its network.

use std::net::Ipv4Addr;

use godwit_qemu::{MacAddress, Machine};
use godwit_types::Name;

use crate::agent::{AFTER_ACTIVATE, SCRIPT_WITHIN, SHELL, run_script};
use crate::error::SubstrateError;
use crate::identity::environment;

/// The network of a guest's card. It is set without DHCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestNetwork {
    /// The card's address.
    pub mac: MacAddress,
    /// Its IPv4 address.
    pub address: Ipv4Addr,
    /// How many bits those of the network share.
    pub bits: u8,
    /// The gateway, which resolves names, too.
    pub gateway: Ipv4Addr,
    /// The domain of the network's machines.
    pub domain: String,
}

impl GuestNetwork {
    /// What the guest's agent is told beside the identity.
    pub(crate) fn settings(&self) -> [String; 2] {
        [
            format!("GODWIT_ADDRESS={}/{}", self.address, self.bits),
            format!("GODWIT_GATEWAY={}", self.gateway),
        ]
    }
}

/// Has a running guest use its network, under `hostname` where one is given. A card that is not there
/// yet is brought up once it is.
///
/// # Errors
/// A guest that does not answer, or could not.
pub async fn set_network(
    machine: &Machine,
    network: &GuestNetwork,
    hostname: Option<&Name>,
) -> Result<(), SubstrateError> {
    const DOING: &str = "setting the network";
    let mut set = environment(None, false)?;
    set.extend(network.settings());
    set.extend(hostname.map(|name| format!("GODWIT_HOSTNAME={name}")));
    let asked = machine.agent().renew(&set, SCRIPT_WITHIN).await;
    let agent = asked.map_err(|e| SubstrateError::machine(DOING)(e.into()))?;
    let mut agent = match agent {
        Some(mut agent) => {
            run_script(&mut agent, AFTER_ACTIVATE, &[], &set, SCRIPT_WITHIN).await?;
            agent
        }
        None => {
            let agent = machine.agent().connect("guest-exec", SCRIPT_WITHIN).await;
            agent.map_err(|e| SubstrateError::machine(DOING)(e.into()))?
        }
    };
    // The way out that the guest chose at its boot leads nowhere here.
    let script = format!(
        "ip route del default via 10.0.2.2; rm -f /etc/resolv.conf; \
         printf 'nameserver {}\\nsearch {}\\n' >/etc/resolv.conf",
        network.gateway, network.domain
    );
    run_script(&mut agent, SHELL, &["-c", &script], &[], SCRIPT_WITHIN).await.map(drop)
}
