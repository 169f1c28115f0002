//! A look at what is in a network namespace, or on the host: no program is started for it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, ErrorKind};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::command::NetError;
use crate::netlink::{self, Interface};

/// Where `ip netns` keeps namespaces.
pub(crate) const NAMESPACES: &str = "/run/netns";

/// How the switches of a network's namespace are; one that the kernel lacks is none. Frames between
/// ports are judged by the bridge's rules alone.
const SWITCHES: [(&str, &str); 5] = [
    ("/proc/sys/net/ipv4/ip_forward", "1"),
    ("/proc/sys/net/bridge/bridge-nf-call-arptables", "0"),
    ("/proc/sys/net/bridge/bridge-nf-call-ip6tables", "0"),
    ("/proc/sys/net/bridge/bridge-nf-call-iptables", "0"),
    ("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"),
];

/// What there is.
#[derive(Debug)]
pub(crate) struct Look {
    /// Which namespace it is.
    pub(crate) namespace: u64,
    pub(crate) interfaces: BTreeMap<String, Interface>,
    /// Where the default route leads.
    pub(crate) gateway: Option<Ipv4Addr>,
    /// How often the rules were changed, where the kernel says so.
    pub(crate) rules: Option<u32>,
}

impl Look {
    /// One at the host, or at a network's namespace, whose switches are put right.
    pub(crate) async fn at(namespace: Option<&str>) -> Result<Self, NetError> {
        let is_network = namespace.is_some();
        within(namespace, move || {
            if is_network {
                for (path, value) in SWITCHES {
                    set_switch(Path::new(path), value)?;
                }
            }
            Ok(Self {
                namespace: std::fs::metadata("/proc/thread-self/ns/net")?.ino(),
                interfaces: netlink::interfaces()?,
                gateway: netlink::default_gateway()?,
                rules: netlink::rules_generation().ok(),
            })
        })
        .await
    }

    /// Whether an interface is there, is up and has that address.
    pub(crate) fn has(&self, interface: &str, address: (Ipv4Addr, u8)) -> bool {
        let there = self.interfaces.get(interface);
        there.is_some_and(|i| i.is_up && i.addresses.contains(&address))
    }
}

/// Does `what` in a network namespace, or on the host. Not for what may take long.
pub(crate) async fn within<T: Send + 'static>(
    namespace: Option<&str>,
    what: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, NetError> {
    let path = namespace.map(|n| Path::new(NAMESPACES).join(n));
    let shown = path.clone().unwrap_or_else(|| "/proc/self/ns/net".into());
    let enter = move || {
        if let Some(path) = path {
            let namespace = File::open(path)?;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        }
        what()
    };
    // A thread of its own: the namespace is a thread's, and this one ends with it.
    let entered = move || {
        let ended = std::thread::scope(|s| s.spawn(enter).join());
        ended.unwrap_or_else(|_| Err(Error::other("the thread that looks panicked")))
    };
    let looked = tokio::task::spawn_blocking(entered).await;
    looked.unwrap_or_else(|e| Err(Error::other(e))).map_err(NetError::io("looking at", &shown))
}

/// Sets a switch of the kernel, where there is one that is set otherwise.
pub(crate) fn set_switch(path: &Path, value: &str) -> std::io::Result<()> {
    match std::fs::read_to_string(path) {
        Ok(now) if now.trim() == value => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        _ => std::fs::write(path, value),
    }
}
