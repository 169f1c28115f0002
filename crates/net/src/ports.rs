//! Ports of the host that lead to machines.
//!
//! ```text
//!  the world ---> host:8080 --DNAT--> inside:8080 (veth) --DNAT--> machine:80
//!                 table *_ports        the network's namespace
//! ```
//!
//! The machine sees who really asks: no source is rewritten on the way in. What the host leads on
//! reaches a machine only where the rules of its network's namespace lead it on, too, and a connection
//! that is under way is cut when its port is published no more.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::net::Ipv4Addr;
use std::num::NonZeroU16;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::command::{NetError, run};
use crate::kept::{KeptRules, Table};
use crate::links::Link;
use crate::look::Look;
use crate::names::{BRIDGE, UPLINK, VETHS};
use crate::networks::{Member, Networks};
use crate::rules::none_on_host;
use crate::types::{Network, NetworkKind};

/// Ports that one machine may publish.
pub const MOST_PORTS: usize = 64;

/// What is spoken at a port.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl FromStr for Transport {
    type Err = PortError;
    fn from_str(s: &str) -> Result<Self, PortError> {
        match s {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err(PortError::of(s)),
        }
    }
}

/// Why a text is no port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{shown}' is no port: give 1 to 65535 and tcp or udp, such as 8080:80/tcp or 8080/tcp")]
pub struct PortError {
    shown: String,
}

impl PortError {
    fn of(text: &str) -> Self {
        Self { shown: text.chars().take(40).flat_map(char::escape_debug).collect() }
    }
}

/// A port of a host, such as `8080/tcp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// Its number.
    pub number: NonZeroU16,
    /// What is spoken there.
    pub protocol: Transport,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.protocol)
    }
}

impl FromStr for HostPort {
    type Err = PortError;
    fn from_str(s: &str) -> Result<Self, PortError> {
        let bad = || PortError::of(s);
        let (number, protocol) = s.split_once('/').unwrap_or((s, "tcp"));
        let protocol = protocol.parse().map_err(|_| bad())?;
        Ok(Self { number: number.parse().map_err(|_| bad())?, protocol })
    }
}

/// A port of the host that leads to one of a machine, such as `8080:80/tcp`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(deny_unknown_fields)]
pub struct PublishedPort {
    /// The port of the host, 1 to 65535.
    #[schema(value_type = u16)]
    pub host: NonZeroU16,
    /// The port of the machine, 1 to 65535.
    #[schema(value_type = u16)]
    pub guest: NonZeroU16,
    /// What is spoken there.
    pub protocol: Transport,
}

impl PublishedPort {
    /// The host's end.
    #[must_use]
    pub const fn at(&self) -> HostPort {
        HostPort { number: self.host, protocol: self.protocol }
    }
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.guest, self.protocol)
    }
}

impl FromStr for PublishedPort {
    type Err = PortError;
    fn from_str(s: &str) -> Result<Self, PortError> {
        let bad = || PortError::of(s);
        let (host, guest) = s.split_once(':').ok_or_else(bad)?;
        let HostPort { number, protocol } = guest.parse().map_err(|_| bad())?;
        Ok(Self { host: host.parse().map_err(|_| bad())?, guest: number, protocol })
    }
}

/// What the rules of a network's namespace say of the ports of its machines.
#[derive(Debug, Default)]
pub(crate) struct InNamespace {
    /// Chains of their own.
    pub(crate) chains: String,
    /// The first line of the chain that forwards.
    pub(crate) forward: &'static str,
}

/// Those of a network.
pub(crate) fn in_namespace(network: &Network, members: &[Member]) -> InNamespace {
    // Also where none is published: what was has ended.
    if network.kind != NetworkKind::Nat {
        return InNamespace::default();
    }
    let (mut to, mut passes) = (String::new(), String::new());
    for (m, p) in members.iter().flat_map(|m| m.ports.iter().map(move |p| (m, p))) {
        let (address, PublishedPort { host, guest, protocol }) = (m.attachment.address, p);
        // Writing to a String cannot fail.
        let _ = writeln!(
            to,
            "    iifname \"{UPLINK}\" {protocol} dport {host} dnat ip to {address}:{guest}"
        );
        let by = format!("meta l4proto {protocol} ct original proto-dst {host}");
        let _ = writeln!(
            passes,
            "    iifname \"{UPLINK}\" oifname \"{BRIDGE}\" {by} ip daddr {address} {protocol} dport \
             {guest} accept\n    \
             iifname \"{BRIDGE}\" oifname \"{UPLINK}\" {by} ip saddr {address} {protocol} sport \
             {guest} accept"
        );
    }
    InNamespace {
        chains: format!(
            "  chain prerouting {{\n    type nat hook prerouting priority -100; policy accept;\n{to}  }}\n  \
             chain published {{\n    meta l4proto icmp ct state related accept\n{passes}    drop\n  }}\n"
        ),
        // Before what is established.
        forward: "    ct status dnat jump published\n",
    }
}

/// The rules on the host: each port with the end of the way into its network's namespace.
fn on_host(table: &str, ports: &[(HostPort, Ipv4Addr)]) -> String {
    let mut lines = String::new();
    for (HostPort { number, protocol }, inside) in ports {
        let _ = writeln!(
            lines,
            "    meta nfproto ipv4 fib daddr type local {protocol} dport {number} dnat ip to {inside}"
        );
    }
    format!(
        r#"table inet {table}
delete table inet {table}
table inet {table} {{
  chain ports {{
{lines}  }}
  chain prerouting {{
    type nat hook prerouting priority -100; policy accept;
    iifname != "{VETHS}*" jump ports
  }}
  chain output {{
    type nat hook output priority -100; policy accept;
    ip daddr != 127.0.0.0/8 jump ports
  }}
}}
"#
    )
}

impl Networks {
    /// Has the ports of the host lead to the machines that publish them, and no others. `first`:
    /// this process has not looked before.
    pub(crate) async fn publish(
        &self,
        wanted: &BTreeMap<String, (Network, Vec<Member>)>,
        kept: &mut KeptRules,
        first: bool,
    ) -> Result<(), NetError> {
        let name = self.mark.ports_table();
        let publishing = |members: &[Member]| members.iter().any(|m| !m.ports.is_empty());
        let networks: Vec<_> = wanted
            .iter()
            .filter(|(_, (network, members))| {
                network.kind == NetworkKind::Nat && publishing(members)
            })
            .collect();
        if networks.is_empty() {
            if first || kept.has(&name) {
                run(&["nft", "-f", "-"], &none_on_host(&name)).await?;
                kept.forget(&name);
            }
            return Ok(());
        }
        let look = Look::at(None).await?;
        let mut ports = BTreeMap::new();
        for (namespace, (_, members)) in networks {
            let end = look.interfaces.get(&self.mark.veth(namespace));
            let link = end.and_then(|i| i.addresses.iter().find_map(|a| Link::with_host_end(a.0)));
            // One that could not be made has no way in; that is told of it.
            let Some(link) = link else { continue };
            for port in members.iter().flat_map(|m| &m.ports) {
                ports.entry(port.at()).or_insert(link.inside);
            }
        }
        let ports: Vec<_> = ports.into_iter().collect();
        let list = ["-s", "list", "table", "inet", &name];
        let table = Table { namespace: None, name: &name, list: &list };
        kept.set(&table, &look, &on_host(&name, &ports)).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ports_are_read_as_they_are_written() {
        for good in ["8080:80/tcp", "1:65535/udp"] {
            assert_eq!(good.parse::<PublishedPort>().map(|p| p.to_string()).as_deref(), Ok(good));
        }
        assert_eq!("8080:80".parse::<PublishedPort>(), "8080:80/tcp".parse());
        assert_eq!("53/udp".parse::<HostPort>().map(|p| p.to_string()).as_deref(), Ok("53/udp"));
        for bad in
            ["", "80", ":80", "80:", "0:80/tcp", "80:0/tcp", "65536:1", "80:80/sctp", "1:2:3"]
        {
            let _ = bad.parse::<PublishedPort>().expect_err(bad);
        }
        for bad in ["", "0/tcp", "80/", "80/icmp", "-1/tcp", "80/tcp/"] {
            let _ = bad.parse::<HostPort>().expect_err(bad);
        }
        let none = r#"{"host":0,"guest":80,"protocol":"tcp"}"#;
        assert!(serde_json::from_str::<PublishedPort>(none).is_err(), "there is no port 0");
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser(s in "\\PC{0,24}") {
            let _ = s.parse::<PublishedPort>();
        }
    }
}
