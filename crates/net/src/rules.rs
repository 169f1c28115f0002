//! What may pass, as nftables text. A table is replaced as a whole, in one transaction.

use std::fmt::Write as _;

use crate::links::RANGE;
use crate::names::{BRIDGE, UPLINK, VETHS};
use crate::networks::Member;
use crate::types::{Network, NetworkKind};

/// What is no place in the world: this host, the link (where clouds keep their hosts' keys), groups.
const NOWHERE: &str = "0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3";

/// The rules in the namespace of a network.
pub(crate) fn in_namespace(network: &Network, members: &[Member]) -> String {
    let gateway = network.prefix.gateway();
    let (mut macs, mut sources, mut arps) = (String::new(), String::new(), String::new());
    for Member { tap, attachment, .. } in members {
        let (mac, address) = (attachment.mac, attachment.address);
        // Writing to a String cannot fail.
        let _ = writeln!(macs, "      \"{tap}\" . {mac},");
        let _ = writeln!(sources, "      \"{tap}\" . {mac} . {address},");
        let _ = writeln!(arps, "      \"{tap}\" . {mac} . {mac} . {address},");
    }
    let elements = |list: &str| match list.is_empty() {
        true => String::new(),
        false => format!("    elements = {{\n{list}    }}\n"),
    };
    let out = match network.kind {
        NetworkKind::Nat => format!(
            "    ct state established,related accept\n    \
             iifname \"{BRIDGE}\" oifname \"{UPLINK}\" ip daddr != {{ {RANGE}, {NOWHERE} }} accept\n"
        ),
        NetworkKind::Private => String::new(),
    };
    format!(
        r#"table bridge godwit
delete table bridge godwit
table bridge godwit {{
  set macs {{
    typeof iifname . ether saddr
{macs}  }}
  set sources {{
    typeof iifname . ether saddr . ip saddr
{sources}  }}
  set arps {{
    typeof iifname . ether saddr . arp saddr ether . arp saddr ip
{arps}  }}
  chain port {{
    type filter hook prerouting priority -300; policy drop;
    iifname . ether saddr != @macs drop
    ether type arp arp saddr ip 0.0.0.0 accept
    ether type arp iifname . ether saddr . arp saddr ether . arp saddr ip @arps accept
    ether type 0x8035 accept
    ether type ip udp sport 67 drop
    ether type ip ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
    ether type ip iifname . ether saddr . ip saddr @sources accept
  }}
}}
table inet godwit
delete table inet godwit
table inet godwit {{
  chain input {{
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    ct state established,related accept
    iifname "{BRIDGE}" udp dport 67 accept
    iifname "{BRIDGE}" ip daddr {gateway} udp dport 53 accept
    iifname "{BRIDGE}" ip daddr {gateway} tcp dport 53 accept
    iifname "{BRIDGE}" ip daddr {gateway} icmp type echo-request accept
  }}
  chain forward {{
    type filter hook forward priority 0; policy drop;
{out}  }}
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    oifname "{UPLINK}" masquerade
  }}
}}
"#,
        macs = elements(&macs),
        sources = elements(&sources),
        arps = elements(&arps),
    )
}

/// The rules on the host: what comes from the networks of a site leaves the host, and reaches
/// neither the host itself, nor what it publishes for others, nor another network.
pub(crate) fn on_host(table: &str, veths: &str) -> String {
    format!(
        r#"table inet {table}
delete table inet {table}
table inet {table} {{
  chain input {{
    type filter hook input priority -10; policy accept;
    iifname "{veths}*" drop
  }}
  chain forward {{
    type filter hook forward priority -10; policy accept;
    iifname "{veths}*" oifname "{VETHS}*" drop
    iifname "{veths}*" ct status dnat drop
    oifname "{veths}*" ct state established,related accept
    oifname "{veths}*" drop
  }}
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    ip saddr {RANGE} oifname != "{VETHS}*" masquerade
  }}
}}
"#
    )
}

/// Takes a table away, there or not.
pub(crate) fn none_on_host(table: &str) -> String {
    format!("table inet {table}\ndelete table inet {table}\n")
}
