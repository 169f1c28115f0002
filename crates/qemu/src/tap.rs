//! TAP interfaces, opened here so that QEMU needs neither a right nor a name.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The control device of the kernel.
const TUN: &str = "/dev/net/tun";
/// Where `ip netns` keeps network namespaces.
const NAMESPACES: &str = "/run/netns";

/// A TAP interface that exists, in a named network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tap {
    /// The namespace, as `ip netns` calls it.
    pub namespace: String,
    /// The interface in it.
    pub interface: String,
}

impl Tap {
    /// Whether both are names of one component that the kernel takes.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let safe = |name: &str, longest: usize| {
            (1..=longest).contains(&name.len())
                && !name.starts_with(['.', '-'])
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        if !safe(&self.interface, 15) {
            return Err(format!("'{}' is not an interface name", self.interface.escape_debug()));
        }
        if !safe(&self.namespace, 64) {
            return Err(format!("'{}' is not a namespace name", self.namespace.escape_debug()));
        }
        Ok(())
    }

    /// Opens it as QEMU wants it: whole frames behind a virtio header.
    ///
    /// # Errors
    /// No such namespace or interface, one that somebody has open already, or no right to open it.
    pub(crate) fn open(&self) -> Result<OwnedFd> {
        let namespace = File::open(Path::new(NAMESPACES).join(&self.namespace))?;
        let name = self.interface.clone();
        // A thread of its own: the namespace is a thread's, and this one ends with it.
        let opened = std::thread::scope(|s| s.spawn(|| open_in(&namespace, &name)).join());
        opened.unwrap_or_else(|_| Err(Error::other("the thread that opens a TAP panicked")))
    }
}

fn open_in(namespace: &File, name: &str) -> Result<OwnedFd> {
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    use std::os::fd::AsFd;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    // Without this the kernel would make another interface of that name, which ends with QEMU.
    if !Path::new("/proc/thread-self/net/dev").exists() || !is_there(name)? {
        return Err(Error::new(ErrorKind::NotFound, format!("no interface {name}")));
    }
    let tun = File::options().read(true).write(true).open(TUN)?;
    // SAFETY: a plain C structure, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()).take(15) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(Error::other)?;
    // SAFETY: `request` lives through the call, and the descriptor is open.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if done < 0 {
        return Err(Error::last_os_error());
    }
    rustix::fs::fcntl_setfl(&tun, rustix::fs::OFlags::NONBLOCK)?;
    Ok(tun.into())
}

/// Whether this thread's network namespace has such an interface.
fn is_there(name: &str) -> Result<bool> {
    let all = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    Ok(all.lines().any(|l| l.trim_start().strip_prefix(name).is_some_and(|r| r.starts_with(':'))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let tap = |n: &str, i: &str| Tap { namespace: n.into(), interface: i.into() }.check();
        assert_eq!(tap("gw-0a1b-7", "t0123456789"), Ok(()));
        for (namespace, interface) in [
            ("../x", "t"),
            ("", "t"),
            ("n", ""),
            ("n", "0123456789abcdef"),
            ("n", "a/b"),
            ("n", ".."),
        ] {
            let _ = tap(namespace, interface).expect_err("refused");
        }
    }

    #[test]
    fn a_namespace_that_is_not_there_is_an_error() {
        let tap = Tap { namespace: "godwit-no-such-one".into(), interface: "t0".into() };
        assert_eq!(tap.open().expect_err("none").kind(), ErrorKind::NotFound);
    }
}
