//! Networks of machines.
//!
//! ```text
//!  the site's host            | the network's namespace             | the machine
//!                             |                                     |
//!  eth0 - nat - veth gw...----|---- up0 - nat - br0 (gateway) - t...|--- NIC
//!                             |               dnsmasq               |
//! ```
//!
//! Each network has a network namespace of its own at each site, so that two of them share neither
//! an address, a bridge nor a table: they may have the same prefix, and no frame of one can reach
//! the other, whatever a guest forges. What is in it follows from the networks and the machines that
//! a site tells ([`Networks::apply`]); it outlives the daemon, and is put right when it is
//! found to be otherwise.

mod command;
mod dhcp;
mod firewall;
mod kept;
mod links;
mod look;
mod names;
mod netlink;
mod networks;
mod ports;
mod rules;
mod types;

pub use command::{NetError, programs_started};
pub use firewall::forward_drops;
pub use godwit_qemu::MacAddress;
pub use networks::{Member, Networks, Rest, Trouble, With, lacking, lacking_parts};
pub use ports::{HostPort, MOST_PORTS, PortError, PublishedPort, Transport};
pub use types::{Attachment, Network, NetworkKind, Prefix, PrefixError};
