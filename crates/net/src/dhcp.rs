//! The DHCP and name server of a network: dnsmasq, in the network's namespace.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use godwit_types::Name;

use crate::command::{NetError, run_in};
use crate::names::BRIDGE;
use crate::networks::Member;
use crate::types::{Network, NetworkKind};

/// Where the host says who resolves names.
const RESOLV: [&str; 2] = ["/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"];

/// The files of one server. They hold nothing secret: it reads them as `nobody`.
pub(crate) struct Server {
    dir: PathBuf,
}

impl Server {
    pub(crate) fn of(namespace: &str) -> Self {
        Self { dir: Path::new("/run/godwit-net").join(namespace) }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// Has it run as `network` and its `members` ask for.
    pub(crate) async fn ensure(
        &self,
        namespace: &str,
        network: &Network,
        members: &[Member],
    ) -> Result<(), NetError> {
        std::fs::create_dir_all(&self.dir).map_err(NetError::io("making", &self.dir))?;
        let upstream = match network.kind {
            NetworkKind::Nat => resolvers(),
            NetworkKind::Private => Vec::new(),
        };
        let conf = self.write("conf", &self.config(network, &upstream))?;
        let hosts = self.write("hosts", &hosts(network, members))?;
        let leases = self.write("leases-by-mac", &fixed_leases(members))?;
        match self.pid() {
            Some(_) if !conf && !hosts && !leases => return Ok(()),
            Some(pid) if !conf && !leases => {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::HUP);
                return Ok(());
            }
            _ => self.end().await,
        }
        self.forget_leases(members)?;
        let conf = format!("--conf-file={}", self.path("conf").display());
        run_in(namespace, &["dnsmasq", &conf], "").await.map(drop)
    }

    /// Takes out the leases of machines that are gone: their addresses may be others' now.
    fn forget_leases(&self, members: &[Member]) -> Result<(), NetError> {
        let path = self.path("leases");
        let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
        let macs: Vec<String> = members.iter().map(|m| m.attachment.mac.to_string()).collect();
        let kept =
            |line: &&str| line.split(' ').nth(1).is_some_and(|mac| macs.iter().any(|m| m == mac));
        let kept: String = text.lines().filter(kept).map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, kept).map_err(NetError::io("writing", &path))
    }

    /// Its process, if it runs.
    pub(crate) fn pid(&self) -> Option<rustix::process::Pid> {
        let pid: i32 = std::fs::read_to_string(self.path("pid")).ok()?.trim().parse().ok()?;
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let ours = format!("--conf-file={}", self.path("conf").display());
        let is_ours = line.split(|b| *b == 0).any(|arg| arg == ours.as_bytes());
        is_ours.then(|| rustix::process::Pid::from_raw(pid)).flatten()
    }

    /// Ends it.
    async fn end(&self) {
        let Some(pid) = self.pid() else { return };
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        for _ in 0..200 {
            if self.pid().is_none() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    /// Ends it and removes what it has.
    pub(crate) async fn remove(&self) {
        self.end().await;
        let _ = std::fs::remove_dir_all(&self.dir);
    }

    /// Writes a file, readable by all; whether it was another before.
    fn write(&self, name: &str, text: &str) -> Result<bool, NetError> {
        use std::os::unix::fs::PermissionsExt;
        let path = self.path(name);
        if std::fs::read(&path).is_ok_and(|now| now == text.as_bytes()) {
            return Ok(false);
        }
        let new = self.path(&format!("{name}.new"));
        std::fs::write(&new, text).map_err(NetError::io("writing", &new))?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o644))
            .map_err(NetError::io("opening", &new))?;
        std::fs::rename(&new, &path).map_err(NetError::io("writing", &path))?;
        Ok(true)
    }

    fn config(&self, network: &Network, upstream: &[Ipv4Addr]) -> String {
        let (prefix, name) = (network.prefix, &network.name);
        let (gateway, first, mask) = (prefix.gateway(), prefix.first(), prefix.mask());
        let mut text = format!(
            "interface={BRIDGE}\nexcept-interface=lo\nlisten-address={gateway}\nbind-interfaces\n\
             no-hosts\nno-resolv\nno-ping\nuser=nobody\npid-file={pid}\naddn-hosts={hosts}\n\
             dhcp-hostsfile={by_mac}\ndhcp-leasefile={leases}\ndhcp-authoritative\n\
             dhcp-range={first},static,{mask},1h\ndhcp-option=6,{gateway}\n\
             domain={name}.internal\nlocal=/internal/\nbogus-priv\ndns-forward-max=150\n",
            pid = self.path("pid").display(),
            hosts = self.path("hosts").display(),
            by_mac = self.path("leases-by-mac").display(),
            leases = self.path("leases").display(),
        );
        // Writing to a String cannot fail.
        let _ = match network.kind {
            NetworkKind::Nat => writeln!(text, "dhcp-option=3,{gateway}"),
            NetworkKind::Private => writeln!(text, "dhcp-option=3"),
        };
        for server in upstream {
            let _ = writeln!(text, "server={server}");
        }
        text
    }
}

fn full_name(name: &Name, network: &Network) -> String {
    format!("{name}.{}.internal", network.name)
}

/// The names of machines.
fn hosts(network: &Network, members: &[Member]) -> String {
    let line = |m: &Member| {
        format!("{} {} {}\n", m.attachment.address, full_name(&m.name, network), m.name)
    };
    members.iter().map(line).collect()
}

/// Which MAC address gets which address.
fn fixed_leases(members: &[Member]) -> String {
    let line = |m: &Member| {
        let (mac, address, name) = (m.attachment.mac, m.attachment.address, m.name.as_str());
        // What it would take for a time or a word of its own; such a machine knows its name itself.
        let is_word = name.starts_with(|c: char| c.is_ascii_digit())
            || ["ignore", "infinite"].contains(&name);
        if is_word { format!("{mac},{address}\n") } else { format!("{mac},{address},{name}\n") }
    };
    members.iter().map(line).collect()
}

/// Whom the host asks for names, as far as a namespace can reach them.
fn resolvers() -> Vec<Ipv4Addr> {
    let read = |path: &&str| std::fs::read_to_string(path).ok();
    RESOLV
        .iter()
        .filter_map(read)
        .map(|text| reachable(&text))
        .find(|l| !l.is_empty())
        .unwrap_or_default()
}

fn reachable(text: &str) -> Vec<Ipv4Addr> {
    let server = |line: &str| line.trim().strip_prefix("nameserver")?.trim().parse().ok();
    text.lines().filter_map(server).filter(|a: &Ipv4Addr| !a.is_loopback()).take(3).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_resolvers_that_a_namespace_reaches_are_asked() {
        let text = "# x\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver ::1\nsearch a\n";
        assert_eq!(reachable(text), [Ipv4Addr::new(192, 0, 2, 1)]);
    }
}
