//! What namespaces and interfaces are called.
//!
//! A site's names carry a mark that is kept in its directory, so that several sites of one host keep
//! apart and each finds its own again, also after its directory was moved.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use godwit_qemu::MacAddress;
use godwit_types::{NetworkId, VmId};
use tracing::warn;

/// Where it is kept.
const FILE: &str = "network-mark";

/// The bridge of a namespace.
pub(crate) const BRIDGE: &str = "br0";
/// The end of the veth pair in a namespace.
pub(crate) const UPLINK: &str = "up0";

/// How the names of all sites' veths begin, on the host.
pub(crate) const VETHS: &str = "gdw";

/// The mark of one site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SiteMark(String);

impl SiteMark {
    /// That of the site whose things are in `data`: it stays with them wherever they are moved. A copy
    /// of them gets another one.
    pub(crate) fn of(data: &Path) -> Self {
        let at = std::fs::canonicalize(data).unwrap_or_else(|_| data.to_owned());
        let kept = Self::kept(&at);
        let is_new = kept.is_none();
        if let Some((mark, was)) = kept {
            if was == at {
                return mark;
            }
            let is_copy = Self::kept(&was).is_some_and(|(other, _)| other == mark);
            if !is_copy {
                mark.keep(&at);
                return mark;
            }
            warn!(data = %at.display(), of = %was.display(), "a copy of a site: its networks are its own");
        }
        // Sites of the first release with machines have theirs by the place where they were.
        let old = Self::by(at.as_os_str().as_encoded_bytes());
        let machines = std::fs::read_dir(at.join("vms"));
        let is_first = is_new && machines.is_ok_and(|mut all| all.next().is_some());
        let mark = if is_first { old.clone() } else { Self::by(NetworkId::new().0.as_bytes()) };
        // Who cannot keep it finds the same one by the place.
        if mark.keep(&at) { mark } else { old }
    }

    fn by(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).to_hex().chars().take(5).collect())
    }

    /// The one that is kept in `data`, and where that was then.
    fn kept(data: &Path) -> Option<(Self, PathBuf)> {
        let bytes = std::fs::read(data.join(FILE)).ok()?;
        let (mark, was) = bytes.split_at_checked(5)?;
        let mark = std::str::from_utf8(mark).ok()?;
        let is_mark = mark.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase());
        let was = was.strip_prefix(b"\n")?.strip_suffix(b"\n")?;
        is_mark.then(|| (Self(mark.to_owned()), OsStr::from_bytes(was).into()))
    }

    /// Keeps it in `data`; whether that was possible.
    fn keep(&self, data: &Path) -> bool {
        let (file, new) = (data.join(FILE), data.join(format!("{FILE}.new")));
        let text = [self.0.as_bytes(), b"\n", data.as_os_str().as_bytes(), b"\n"].concat();
        let kept = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &file));
        if let Err(error) = &kept {
            warn!(path = %file.display(), %error, "the mark of this site's networks is not kept");
        }
        kept.is_ok()
    }

    /// How the names of its namespaces begin.
    pub(crate) fn namespaces(&self) -> String {
        format!("godwit-{}-", self.0)
    }

    /// The namespace of a network.
    pub(crate) fn namespace(&self, network: NetworkId) -> String {
        format!("{}{}", self.namespaces(), tail(&network.0.simple().to_string(), 12))
    }

    /// How the names of its veths begin, on the host.
    pub(crate) fn veths(&self) -> String {
        format!("{VETHS}{}", self.0)
    }

    /// The host's end of the veth pair of a namespace.
    pub(crate) fn veth(&self, namespace: &str) -> String {
        format!("{}{}", self.veths(), tail(namespace, 7))
    }

    /// The table of ports on the host.
    pub(crate) fn ports_table(&self) -> String {
        format!("{}_ports", self.table())
    }

    /// The table of rules on the host.
    pub(crate) fn table(&self) -> String {
        format!("godwit_{}", self.0)
    }
}

/// The TAP of a machine.
pub(crate) fn tap(vm: VmId) -> String {
    format!("t{}", tail(&vm.0.simple().to_string(), 12))
}

/// The MAC address of a network's gateway.
pub(crate) fn gateway_mac(network: NetworkId) -> MacAddress {
    let id = network.0.into_bytes();
    MacAddress([0x02, id[11], id[12], id[13], id[14], id[15]])
}

fn tail(text: &str, n: usize) -> &str {
    text.get(text.len().saturating_sub(n)..).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_sites_keep_apart() {
        let dirs = [(); 2].map(|()| tempfile::tempdir().expect("dir"));
        let [a, b] = dirs.each_ref().map(|dir| SiteMark::of(dir.path()));
        let (network, vm) = (NetworkId::new(), VmId::new());
        let namespace = a.namespace(network);
        assert_ne!(namespace, b.namespace(network));
        assert!(namespace.starts_with(&a.namespaces()) && namespace.len() <= 64);
        for name in [a.veth(&namespace), tap(vm)] {
            assert!(name.len() <= 15, "{name}");
        }
        assert_ne!(a.veth(&namespace), b.veth(&namespace));
    }

    #[test]
    fn a_mark_stays_with_its_directory_and_is_no_copys() {
        let dir = tempfile::tempdir().expect("dir");
        let [first, moved, copy] = ["first", "moved", "copy"].map(|name| dir.path().join(name));
        std::fs::create_dir(&first).expect("made");
        let mark = SiteMark::of(&first);
        assert_eq!(SiteMark::of(&first), mark);
        std::fs::rename(&first, &moved).expect("moved");
        assert_eq!(SiteMark::of(&moved), mark);
        // Another one in the old place has another mark, and does not take that one's.
        std::fs::create_dir(&first).expect("made");
        assert_ne!(SiteMark::of(&first), mark);
        assert_eq!(SiteMark::of(&moved), mark);
        std::fs::create_dir(&copy).expect("made");
        std::fs::copy(moved.join(FILE), copy.join(FILE)).expect("copied");
        let other = SiteMark::of(&copy);
        assert_ne!(other, mark);
        assert_eq!((SiteMark::of(&copy), SiteMark::of(&moved)), (other, mark));
    }

    #[test]
    fn a_site_of_the_first_release_keeps_the_mark_of_its_place() {
        let dir = tempfile::tempdir().expect("dir");
        let at = std::fs::canonicalize(dir.path()).expect("there");
        std::fs::create_dir_all(at.join("vms/one")).expect("made");
        let old = SiteMark::by(at.as_os_str().as_encoded_bytes());
        assert_eq!((SiteMark::of(&at), SiteMark::of(&at)), (old.clone(), old));
    }
}
