//! The networks of one site, as they are in the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use godwit_qemu::Tap;
use godwit_types::{Name, NetworkId, VmId};
use serde_json::Value;
use tracing::{info, warn};

use crate::command::{NetError, run, run_in};
use crate::dhcp::Server;
use crate::links::Link;
use crate::names::{self, BRIDGE, SiteMark, UPLINK};
use crate::rules;
use crate::types::{Attachment, Network, NetworkKind};

/// What guards the choice of addresses between the sites of a host.
const LOCK: &str = "/run/godwit-links.lock";
/// How long another site of the host may take to choose.
const LOCK_WITHIN: Duration = Duration::from_secs(5);
/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// A machine in a network at this site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its TAP.
    pub tap: String,
    /// Its name.
    pub name: Name,
    /// Its place in the network.
    pub attachment: Attachment,
}

impl Member {
    /// A machine in a network.
    #[must_use]
    pub fn new(vm: VmId, name: Name, attachment: Attachment) -> Self {
        Self { tap: names::tap(vm), name, attachment }
    }
}

/// What becomes of what the site has of machines that are not named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// It is removed.
    Goes,
    /// It is left as it is.
    Stays,
}

/// With what something is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum With {
    /// The host: no network is as it should be.
    Host,
    /// One network.
    Network(NetworkId),
    /// What is left in this namespace of a network that no machine here is in any more.
    Gone(String),
}

/// What is wrong with the networks of a site.
#[derive(Debug)]
pub struct Trouble {
    /// With what.
    pub with: With,
    /// What.
    pub error: NetError,
}

/// The networks of one site. One caller at a time changes them.
#[derive(Debug)]
pub struct Networks {
    mark: SiteMark,
    /// The rules as the kernel lists them once they were set, by namespace; the host's under "".
    listed: tokio::sync::Mutex<BTreeMap<String, String>>,
    /// Whether this process has looked after them before.
    looked: AtomicBool,
}

/// What is lacking for networks on this host, in words.
#[must_use]
pub fn lacking() -> Vec<String> {
    let has = |program: &str| {
        ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
            .iter()
            .any(|d| Path::new(d).join(program).exists())
    };
    let packages = [("ip", "iproute2"), ("nft", "nftables"), ("dnsmasq", "dnsmasq-base")];
    let mut lacking: Vec<String> = packages
        .iter()
        .filter(|(program, _)| !has(program))
        .map(|(program, package)| format!("no {program}: install the package {package}"))
        .collect();
    if !rustix::process::geteuid().is_root() {
        lacking.push("no right to make network namespaces: run as root".into());
    }
    if !Path::new("/dev/net/tun").exists() {
        lacking.push("no /dev/net/tun: the kernel has no TUN/TAP".into());
    }
    lacking
}

impl Networks {
    /// Those of the site whose things are in `data`.
    #[must_use]
    pub fn of(data: &Path) -> Self {
        let listed = tokio::sync::Mutex::default();
        Self { mark: SiteMark::of(data), listed, looked: AtomicBool::default() }
    }

    /// The TAP of a machine in a network.
    #[must_use]
    pub fn tap(&self, network: NetworkId, vm: VmId) -> Tap {
        Tap { namespace: self.mark.namespace(network), interface: names::tap(vm) }
    }

    /// Has the site's networks be those of `members`, each with these machines and, unless the `rest`
    /// stays, no others. What
    /// is right already is not touched: connections go on.
    ///
    /// One network that cannot be made right keeps no other from it: what is wrong is given.
    pub async fn apply(&self, members: &[Member], rest: Rest) -> Vec<Trouble> {
        let mut listed = self.listed.lock().await;
        let mut troubles = Vec::new();
        let mut wanted: BTreeMap<String, (Network, Vec<Member>)> = BTreeMap::new();
        for m in members {
            let network = &m.attachment.network;
            let entry = wanted.entry(self.mark.namespace(network.id));
            entry.or_insert_with(|| (network.clone(), Vec::new())).1.push(m.clone());
        }
        let there = self.namespaces();
        let first = !self.looked.swap(true, Ordering::Relaxed);
        if wanted.is_empty() && there.is_empty() && !first {
            return troubles;
        }
        let gone = there.iter().filter(|n| rest == Rest::Goes && !wanted.contains_key(*n));
        for gone in gone {
            match self.remove(gone).await {
                Ok(()) => drop(listed.remove(gone)),
                Err(error) => troubles.push(Trouble { with: With::Gone(gone.clone()), error }),
            }
        }
        let lacks = lacking();
        if wanted.is_empty() && rest == Rest::Stays {
            return troubles;
        }
        if wanted.is_empty() {
            listed.clear();
            // The one before may have ended between its last network and its rules; a host that
            // can have no networks has no rules either.
            if lacks.is_empty() {
                let none = rules::none_on_host(&self.mark.table());
                if let Err(error) = run(&["nft", "-f", "-"], &none).await {
                    troubles.push(Trouble { with: With::Host, error });
                }
            }
            return troubles;
        }
        let host = match lacks.is_empty() {
            true => self.host_rules(&mut listed, &wanted).await,
            false => Err(NetError::Lacking(lacks.join("; "))),
        };
        if let Err(error) = host {
            troubles.push(Trouble { with: With::Host, error });
            return troubles;
        }
        for (namespace, (network, members)) in &wanted {
            if let Err(error) = self.network(namespace, network, (members, rest), &mut listed).await
            {
                troubles.push(Trouble { with: With::Network(network.id), error });
            }
        }
        troubles
    }

    /// The namespaces that the site has, whole or not.
    fn namespaces(&self) -> BTreeSet<String> {
        let begin = self.mark.namespaces();
        let list = std::fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
        list.filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| n.starts_with(&begin))
            .collect()
    }

    async fn remove(&self, namespace: &str) -> Result<(), NetError> {
        Server::of(namespace).remove().await;
        let path = Path::new(NAMESPACES).join(namespace);
        if is_namespace(&path) {
            run(&["ip", "netns", "del", namespace], "").await?;
        } else {
            std::fs::remove_file(&path).map_err(NetError::io("removing", &path))?;
        }
        // It goes with its other end, a moment later: the next network may want its name.
        let _ = run(&["ip", "link", "del", &self.mark.veth(namespace)], "").await;
        info!(namespace, "a network without machines here is removed");
        Ok(())
    }

    async fn host_rules(
        &self,
        listed: &mut BTreeMap<String, String>,
        wanted: &BTreeMap<String, (Network, Vec<Member>)>,
    ) -> Result<(), NetError> {
        let text = rules::on_host(&self.mark.table(), &self.mark.veths());
        let table = self.mark.table();
        let list = ["nft", "-s", "list", "table", "inet", &table];
        set_rules(&["nft"], &list, &text, ("", listed)).await?;
        match wanted.values().any(|(network, _)| network.kind == NetworkKind::Nat) {
            true => set_sysctl("/proc/sys/net/ipv4/ip_forward", "1"),
            false => Ok(()),
        }
    }

    async fn network(
        &self,
        namespace: &str,
        network: &Network,
        (members, rest): (&[Member], Rest),
        listed: &mut BTreeMap<String, String>,
    ) -> Result<(), NetError> {
        let path = Path::new(NAMESPACES).join(namespace);
        // Where one is kept, but none was put there: its making was cut short.
        if path.exists() && !is_namespace(&path) {
            warn!(namespace, "a network's namespace was not finished: it is made anew");
            std::fs::remove_file(&path).map_err(NetError::io("removing", &path))?;
        }
        if !path.exists() {
            match Server::of(namespace).pid() {
                // Somebody took its name away; its server still is in it, and so are its machines.
                Some(pid) => {
                    warn!(namespace, "somebody else removed a network's namespace: it is put back");
                    let pid = pid.as_raw_nonzero().to_string();
                    run(&["ip", "netns", "attach", namespace, &pid], "").await?;
                }
                None => {
                    run(&["ip", "netns", "add", namespace], "").await?;
                    listed.remove(namespace);
                }
            }
        }
        // Frames between ports are judged by the bridge's rules alone.
        const SWITCHES: &str = "cd /proc/sys/net && echo 1 >ipv4/ip_forward && \
            for f in bridge/bridge-nf-call-*tables; do [ ! -e $f ] || echo 0 >$f; done && \
            { [ ! -e ipv6/conf/all/disable_ipv6 ] || echo 1 >ipv6/conf/all/disable_ipv6; }";
        run_in(namespace, &["sh", "-c", SWITCHES], "").await?;
        // Before anything can send.
        let nft = ["ip", "netns", "exec", namespace, "nft"];
        let list = [&nft[..], &["-s", "list", "ruleset"]].concat();
        let text = rules::in_namespace(network, members);
        set_rules(&nft, &list, &text, (namespace, listed)).await?;
        let there = links(Some(namespace)).await?;
        let mut todo = Vec::new();
        if !there.contains_key(BRIDGE) {
            // One at every site, so that whoever moves finds the gateway where it was.
            let mac = names::gateway_mac(network.id);
            let kind = "type bridge stp_state 0 forward_delay 0";
            todo.push(format!("link add {BRIDGE} address {mac} {kind}"));
        }
        let gateway = network.prefix.gateway();
        todo.push(format!("addr replace {gateway}/{} dev {BRIDGE}", network.prefix.bits()));
        todo.push("link set lo up".into());
        todo.push(format!("link set {BRIDGE} up"));
        for m in members {
            let tap = &m.tap;
            if !there.contains_key(tap) {
                todo.push(format!("tuntap add dev {tap} mode tap vnet_hdr"));
            }
            todo.push(format!("link set {tap} master {BRIDGE} up"));
        }
        let is_known = |name: &str| rest == Rest::Stays || members.iter().any(|m| m.tap == name);
        for tap in there.keys().filter(|n| n.starts_with('t') && n.len() == 13 && !is_known(n)) {
            todo.push(format!("link del {tap}"));
        }
        batch(Some(namespace), &todo).await?;
        match network.kind {
            NetworkKind::Nat => self.uplink(namespace, &there).await?,
            NetworkKind::Private => {}
        }
        Server::of(namespace).ensure(namespace, network, members).await
    }

    /// Joins a namespace to its host.
    async fn uplink(
        &self,
        namespace: &str,
        there: &BTreeMap<String, Vec<Ipv4Addr>>,
    ) -> Result<(), NetError> {
        let veth = self.mark.veth(namespace);
        let _locked = lock().await?;
        let host = links(None).await?;
        let is_whole = host.contains_key(&veth) && there.contains_key(UPLINK);
        let known = host.get(&veth).and_then(|a| a.iter().find_map(|a| Link::with_host_end(*a)));
        if host.contains_key(&veth) && !is_whole {
            run(&["ip", "link", "del", &veth], "").await?;
        }
        let used: BTreeSet<Ipv4Addr> = host.values().flatten().copied().collect();
        let hint = u32::from_str_radix(veth.get(8..).unwrap_or_default(), 16).unwrap_or(0);
        let link = known.or_else(|| Link::free(hint, &used));
        let link = link.ok_or(NetError::NoLink(crate::links::RANGE))?;
        let mut outside = Vec::new();
        if !is_whole {
            outside.push(format!("link add {veth} type veth peer name {UPLINK} netns {namespace}"));
        }
        outside.push(format!("addr replace {}/31 dev {veth}", link.host));
        outside.push(format!("link set {veth} up"));
        batch(None, &outside).await?;
        // No address of its own by which a neighbour on the link would be reached.
        set_sysctl(&format!("/proc/sys/net/ipv6/conf/{veth}/disable_ipv6"), "1")?;
        let inside = [
            format!("addr replace {}/31 dev {UPLINK}", link.inside),
            format!("link set {UPLINK} up"),
            format!("route replace default via {}", link.host),
        ];
        batch(Some(namespace), &inside).await
    }
}

/// Takes the lock: two sites of one host would choose the same addresses.
async fn lock() -> Result<std::fs::File, NetError> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = Path::new(LOCK);
    // Nobody else may open it, and so hold it.
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
    let file = options.open(path).map_err(NetError::io("opening", path))?;
    let begun = tokio::time::Instant::now();
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_WITHIN => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            locked => {
                return locked.map(|()| file).map_err(|e| NetError::io("locking", path)(e.into()));
            }
        }
    }
}

/// Whether a namespace is kept at a path (`NSFS_MAGIC` of `linux/magic.h`).
fn is_namespace(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|s| s.f_type as u64 == 0x6e73_6673)
}

/// Has a table of rules be what `text` says, unless it is.
async fn set_rules(
    nft: &[&str],
    list: &[&str],
    text: &str,
    (key, listed): (&str, &mut BTreeMap<String, String>),
) -> Result<(), NetError> {
    // What it was made of comes along: other machines make other rules.
    let state = |now: &str| format!("{text}\n{now}");
    let now = run(list, "").await.unwrap_or_default();
    match listed.get(key) {
        Some(before) if *before == state(&now) => return Ok(()),
        Some(before) if before.starts_with(text) => {
            warn!(
                namespace = key,
                "somebody else changed the rules of a network: they are put right"
            );
        }
        _ => {}
    }
    run(&[nft, &["-f", "-"]].concat(), text).await?;
    let now = run(list, "").await?;
    listed.insert(key.to_owned(), state(&now));
    Ok(())
}

/// Sets a switch of the kernel, where there is one.
fn set_sysctl(path: &str, value: &str) -> Result<(), NetError> {
    let path = Path::new(path);
    match std::fs::write(path, value) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(NetError::io("writing", path)),
    }
}

/// Gives `ip` several commands in one run.
async fn batch(namespace: Option<&str>, commands: &[String]) -> Result<(), NetError> {
    let of: Vec<&str> = namespace.iter().flat_map(|n| ["-n", n]).collect();
    run(&[&["ip"], &of[..], &["-batch", "-"]].concat(), &commands.join("\n")).await.map(drop)
}

/// The interfaces of a namespace, or of the host, with their IPv4 addresses.
async fn links(namespace: Option<&str>) -> Result<BTreeMap<String, Vec<Ipv4Addr>>, NetError> {
    let of: Vec<&str> = namespace.iter().flat_map(|n| ["-n", n]).collect();
    let text = run(&[&["ip"], &of[..], &["-j", "addr", "show"]].concat(), "").await?;
    let all: Vec<Value> = serde_json::from_str(&text)
        .map_err(|e| NetError::Command { command: "ip -j addr show".into(), why: e.to_string() })?;
    let addresses = |link: &Value| {
        let all = link["addr_info"].as_array().into_iter().flatten();
        all.filter_map(|a| a["local"].as_str()?.parse().ok()).collect()
    };
    let name = |link: &Value| link["ifname"].as_str().map(str::to_owned);
    Ok(all.iter().filter_map(|link| Some((name(link)?, addresses(link)))).collect())
}
