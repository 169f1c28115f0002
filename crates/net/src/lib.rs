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
mod links;
mod names;
mod networks;
mod rules;
mod types;

pub use command::NetError;
pub use godwit_qemu::MacAddress;
pub use networks::{Member, Networks, Rest, Trouble, With, lacking};
pub use types::{Attachment, Network, NetworkKind, Prefix, PrefixError};
