//! The networks of one site, as they are in the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use godwit_qemu::{Tap, join_tap_again, namespace_of_open_tap};
use godwit_types::{Name, NetworkId, VmId};
use tracing::{info, warn};

use crate::command::{NetError, run};
use crate::dhcp::Server;
use crate::firewall::forward_drops;
use crate::kept::{KeptRules, Table};
use crate::links::Link;
use crate::look::{Look, NAMESPACES, set_switch, within};
use crate::names::{self, BRIDGE, SiteMark, UPLINK};
use crate::netlink::{self, Interface};
use crate::ports::PublishedPort;
use crate::rules;
use crate::types::{Attachment, Network, NetworkKind};

/// What guards the choice of addresses between the sites of a host.
const LOCK: &str = "/run/godwit-links.lock";
/// How long another site of the host may take to choose.
const LOCK_WITHIN: Duration = Duration::from_secs(5);
/// A machine in a network at this site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its TAP.
    pub tap: String,
    /// Its name.
    pub name: Name,
    /// Its place in the network.
    pub attachment: Attachment,
    /// The pid of its QEMU, if it runs: that has the TAP open.
    pub qemu: Option<i32>,
    /// The ports of the host that lead to it; in a network of kind `nat` only.
    pub ports: Vec<PublishedPort>,
}

impl Member {
    /// A machine in a network.
    #[must_use]
    pub fn new(vm: VmId, name: Name, attachment: Attachment) -> Self {
        Self { tap: names::tap(vm), name, attachment, qemu: None, ports: Vec::new() }
    }

    /// It, run by the QEMU with this pid, if by any.
    #[must_use]
    pub fn run_by(self, qemu: Option<i32>) -> Self {
        Self { qemu, ..self }
    }

    /// The same, with these ports of the host.
    #[must_use]
    pub fn publishing(self, ports: Vec<PublishedPort>) -> Self {
        Self { ports, ..self }
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
    /// The ports of the host that lead to machines.
    Ports,
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
    pub(crate) mark: SiteMark,
    /// The rules as they were right.
    kept: tokio::sync::Mutex<KeptRules>,
    /// Whether this process has looked after them before.
    looked: AtomicBool,
    /// Whether it has looked at the host's own firewall.
    asked: AtomicBool,
}

/// What is lacking for networks on this host, in words.
#[must_use]
pub fn lacking() -> Vec<String> {
    lacks_of_host().into_iter().map(|(_, words)| words).collect()
}

/// What is lacking for networks on this host, each as one word: a package, `root`, `dev-net-tun`.
#[must_use]
pub fn lacking_parts() -> Vec<Name> {
    lacks_of_host().into_iter().filter_map(|(part, _)| Name::new(part).ok()).collect()
}

fn lacks_of_host() -> Vec<(&'static str, String)> {
    let has = |program: &str| {
        ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
            .iter()
            .any(|d| Path::new(d).join(program).exists())
    };
    let packages = [("ip", "iproute2"), ("nft", "nftables"), ("dnsmasq", "dnsmasq-base")];
    let mut lacking: Vec<(&str, String)> = packages
        .iter()
        .filter(|(program, _)| !has(program))
        .map(|(program, package)| {
            (*package, format!("no {program}: install the package {package}"))
        })
        .collect();
    if !rustix::process::geteuid().is_root() {
        lacking.push(("root", "no right to make network namespaces: run as root".into()));
    }
    if !Path::new("/dev/net/tun").exists() {
        lacking.push(("dev-net-tun", "no /dev/net/tun: the kernel has no TUN/TAP".into()));
    }
    lacking
}

impl Networks {
    /// Those of the site whose things are in `data`.
    #[must_use]
    pub fn of(data: &Path) -> Self {
        let kept = tokio::sync::Mutex::default();
        Self {
            mark: SiteMark::of(data),
            kept,
            looked: AtomicBool::default(),
            asked: AtomicBool::default(),
        }
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
        let mut kept = self.kept.lock().await;
        let mut troubles = Vec::new();
        let wanted = self.wanted(members);
        let there = self.namespaces();
        let first = !self.looked.swap(true, Ordering::Relaxed);
        if wanted.is_empty() && there.is_empty() && !first {
            return troubles;
        }
        let gone = there.iter().filter(|n| rest == Rest::Goes && !wanted.contains_key(*n));
        for gone in gone {
            match self.remove(gone).await {
                Ok(()) => kept.forget(gone),
                Err(error) => troubles.push(Trouble { with: With::Gone(gone.clone()), error }),
            }
        }
        if wanted.is_empty() && rest == Rest::Stays {
            return troubles;
        }
        if wanted.is_empty() {
            let tables = [self.mark.table(), self.mark.ports_table()];
            for table in &tables {
                kept.forget(table);
            }
            // The one before may have ended between its last network and its rules; a host that
            // can have no networks has no rules either.
            if lacking().is_empty() {
                let none = tables.map(|t| rules::none_on_host(&t)).concat();
                if let Err(error) = run(&["nft", "-f", "-"], &none).await {
                    troubles.push(Trouble { with: With::Host, error });
                }
            }
            return troubles;
        }
        self.put_right(&mut kept, &wanted, rest, &mut troubles).await;
        if !troubles.iter().any(|t| t.with == With::Host)
            && let Err(error) = self.publish(&wanted, &mut kept, first).await
        {
            troubles.push(Trouble { with: With::Ports, error });
        }
        troubles
    }

    /// As [`Networks::apply`], one network of them, and what it needs of the host but its ports: no other
    /// is looked at.
    pub async fn apply_one(
        &self,
        network: NetworkId,
        members: &[Member],
        rest: Rest,
    ) -> Vec<Trouble> {
        let mut kept = self.kept.lock().await;
        let mut wanted = self.wanted(members);
        wanted.retain(|_, (one, _)| one.id == network);
        let mut troubles = Vec::new();
        if !wanted.is_empty() {
            self.put_right(&mut kept, &wanted, rest, &mut troubles).await;
        }
        troubles
    }

    /// The networks of `members`, by their namespaces.
    fn wanted(&self, members: &[Member]) -> BTreeMap<String, (Network, Vec<Member>)> {
        let mut wanted: BTreeMap<String, (Network, Vec<Member>)> = BTreeMap::new();
        for m in members {
            let network = &m.attachment.network;
            let entry = wanted.entry(self.mark.namespace(network.id));
            entry.or_insert_with(|| (network.clone(), Vec::new())).1.push(m.clone());
        }
        wanted
    }

    /// Has the host and these networks be as they should.
    async fn put_right(
        &self,
        kept: &mut KeptRules,
        wanted: &BTreeMap<String, (Network, Vec<Member>)>,
        rest: Rest,
        troubles: &mut Vec<Trouble>,
    ) {
        let lacks = lacking();
        let host = match lacks.is_empty() {
            true => self.host(kept, wanted).await,
            false => Err(NetError::Lacking(lacks.join("; "))),
        };
        let host = match host {
            Ok(host) => host,
            Err(error) => return troubles.push(Trouble { with: With::Host, error }),
        };
        for (namespace, (network, members)) in wanted {
            let whose = (namespace.as_str(), network);
            if let Err(error) = self.network(whose, (members, rest), &host, kept).await {
                troubles.push(Trouble { with: With::Network(network.id), error });
            }
        }
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

    /// Has the host let the networks through, and nothing else; gives what it has.
    async fn host(
        &self,
        kept: &mut KeptRules,
        wanted: &BTreeMap<String, (Network, Vec<Member>)>,
    ) -> Result<Look, NetError> {
        let look = Look::at(None).await?;
        let name = self.mark.table();
        let text = rules::on_host(&name, &self.mark.veths());
        let list = ["-s", "list", "table", "inet", &name];
        let table = Table { namespace: None, name: &name, list: &list };
        let changed = kept.set(&table, &look, &text).await?;
        if wanted.values().any(|(network, _)| network.kind == NetworkKind::Nat) {
            set_sysctl("/proc/sys/net/ipv4/ip_forward", "1")?;
            if !self.asked.swap(true, Ordering::Relaxed) || changed {
                for words in forward_drops(None).await? {
                    warn!("{words}");
                }
            }
        }
        Ok(look)
    }

    async fn network(
        &self,
        (namespace, network): (&str, &Network),
        (members, rest): (&[Member], Rest),
        host: &Look,
        kept: &mut KeptRules,
    ) -> Result<(), NetError> {
        self.namespace(namespace, members).await?;
        let look = Look::at(Some(namespace)).await?;
        // Before anything can send.
        let text = rules::in_namespace(network, members);
        let list = ["-s", "list", "ruleset"];
        let table = Table { namespace: Some(namespace), name: namespace, list: &list };
        kept.set(&table, &look, &text).await?;
        let todo = lacks(network, (members, rest), &look);
        if !todo.is_empty() {
            batch(Some(namespace), &todo).await?;
        }
        for m in members.iter().filter(|m| !look.interfaces.contains_key(&m.tap)) {
            join_again(namespace, m).await;
        }
        match network.kind {
            NetworkKind::Nat => self.uplink(namespace, &look, host).await?,
            NetworkKind::Private => {}
        }
        Server::of(namespace).ensure(namespace, network, members).await
    }

    /// Has a network's namespace be there, under its name.
    async fn namespace(&self, namespace: &str, members: &[Member]) -> Result<(), NetError> {
        let path = Path::new(NAMESPACES).join(namespace);
        // Where one is kept, but none was put there: its making was cut short.
        if path.exists() && !is_namespace(&path) {
            warn!(namespace, "a network's namespace was not finished: it is made anew");
            std::fs::remove_file(&path).map_err(NetError::io("removing", &path))?;
        }
        if path.exists() {
            return Ok(());
        }
        if let Some(pid) = Server::of(namespace).pid() {
            // Somebody took its name away; its server still is in it, and so are its machines.
            warn!(namespace, "somebody else removed a network's namespace: it is put back");
            let pid = pid.as_raw_nonzero().to_string();
            return run(&["ip", "netns", "attach", namespace, &pid], "").await.map(drop);
        }
        // A machine that runs is in it, too.
        let running = members.iter().filter_map(|m| Some((m, m.qemu?)));
        let mut cut_off = Vec::new();
        for (member, qemu) in running {
            match name_again(&path, qemu, &member.tap) {
                Ok(true) => {
                    warn!(namespace, "somebody else removed a network's namespace: it is put back");
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => cut_off.push((&member.name, error)),
            }
        }
        for (vm, error) in cut_off {
            warn!(
                namespace, %vm, %error,
                "somebody else removed the network of a running machine, which is cut off: stop and start it"
            );
        }
        run(&["ip", "netns", "add", namespace], "").await.map(drop)
    }

    /// Joins a namespace to its host.
    async fn uplink(&self, namespace: &str, look: &Look, host: &Look) -> Result<(), NetError> {
        let veth = self.mark.veth(namespace);
        let link_of = |host: &BTreeMap<String, Interface>| {
            let addresses = &host.get(&veth)?.addresses;
            addresses.iter().find_map(|(a, _)| Link::with_host_end(*a))
        };
        let no_ipv6 = format!("/proc/sys/net/ipv6/conf/{veth}/disable_ipv6");
        if let Some(link) = link_of(&host.interfaces)
            && host.has(&veth, (link.host, 31))
            && look.has(UPLINK, (link.inside, 31))
            && look.gateway == Some(link.host)
        {
            return set_sysctl(&no_ipv6, "1");
        }
        let _locked = lock().await?;
        let host = within(None, netlink::interfaces).await?;
        let is_whole = host.contains_key(&veth) && look.interfaces.contains_key(UPLINK);
        let known = link_of(&host);
        if host.contains_key(&veth) && !is_whole {
            run(&["ip", "link", "del", &veth], "").await?;
        }
        let used: BTreeSet<Ipv4Addr> =
            host.values().flat_map(|i| &i.addresses).map(|(address, _)| *address).collect();
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
        set_sysctl(&no_ipv6, "1")?;
        let inside = [
            format!("addr replace {}/31 dev {UPLINK}", link.inside),
            format!("link set {UPLINK} up"),
            format!("route replace default via {}", link.host),
        ];
        batch(Some(namespace), &inside).await
    }
}

/// What `ip` has to do in a network's namespace until it is as it should be.
fn lacks(network: &Network, (members, rest): (&[Member], Rest), look: &Look) -> Vec<String> {
    let mut todo = Vec::new();
    let bridge = look.interfaces.get(BRIDGE);
    if bridge.is_none() {
        // One at every site, so that whoever moves finds the gateway where it was.
        let mac = names::gateway_mac(network.id);
        let kind = "type bridge stp_state 0 forward_delay 0";
        todo.push(format!("link add {BRIDGE} address {mac} {kind}"));
    }
    let (gateway, bits) = (network.prefix.gateway(), network.prefix.bits());
    if !look.has(BRIDGE, (gateway, bits)) {
        todo.push(format!("addr replace {gateway}/{bits} dev {BRIDGE}"));
        todo.push(format!("link set {BRIDGE} up"));
    }
    if !look.interfaces.get("lo").is_some_and(|lo| lo.is_up) {
        todo.push("link set lo up".into());
    }
    for Member { tap, .. } in members {
        let there = look.interfaces.get(tap);
        if there.is_none() {
            todo.push(format!("tuntap add dev {tap} mode tap vnet_hdr"));
        }
        let is_port = |i: &Interface| i.is_up && bridge.is_some_and(|b| i.master == b.index);
        if !there.is_some_and(is_port) {
            todo.push(format!("link set {tap} master {BRIDGE} up"));
        }
    }
    let is_known = |name: &str| rest == Rest::Stays || members.iter().any(|m| m.tap == name);
    let taps = look.interfaces.keys().filter(|n| n.starts_with('t') && n.len() == 13);
    todo.extend(taps.filter(|n| !is_known(n)).map(|tap| format!("link del {tap}")));
    todo
}

/// Gives the namespace in which a QEMU has its TAP open its name again; whether it has one.
fn name_again(path: &Path, qemu: i32, tap: &str) -> std::io::Result<bool> {
    use std::os::fd::AsRawFd;
    let Some(namespace) = namespace_of_open_tap(qemu, tap)? else { return Ok(false) };
    std::fs::File::options().write(true).create_new(true).open(path)?;
    let at = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    rustix::mount::mount_bind(&at, path)?;
    Ok(true)
}

/// Joins a running machine to its TAP, which was not there before.
async fn join_again(namespace: &str, member: &Member) {
    let Some(qemu) = member.qemu else { return };
    let tap = Tap { namespace: namespace.to_owned(), interface: member.tap.clone() };
    let joined = tokio::task::spawn_blocking(move || join_tap_again(qemu, &tap)).await;
    let error = match joined.unwrap_or_else(|e| Err(std::io::Error::other(e))) {
        Ok(true) => {
            let vm = &member.name;
            return warn!(namespace, %vm, "somebody else removed a machine's TAP: it is joined again");
        }
        // It has it open elsewhere, or is about to open it.
        Ok(false) => "its QEMU has none of this network open".to_owned(),
        Err(e) => e.to_string(),
    };
    let vm = &member.name;
    warn!(namespace, %vm, error, "a machine may be cut off from its network: stop and start it");
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

/// Sets a switch of the host's kernel, where there is one.
fn set_sysctl(path: &str, value: &str) -> Result<(), NetError> {
    let path = Path::new(path);
    set_switch(path, value).map_err(NetError::io("writing", path))
}

/// Gives `ip` several commands in one run.
async fn batch(namespace: Option<&str>, commands: &[String]) -> Result<(), NetError> {
    let of: Vec<&str> = namespace.iter().flat_map(|n| ["-n", n]).collect();
    run(&[&["ip"], &of[..], &["-batch", "-"]].concat(), &commands.join("\n")).await.map(drop)
}
