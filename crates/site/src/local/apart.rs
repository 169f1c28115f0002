//! Whether the QEMUs and relays of this site run under uids of their own, and what limits their memory.

use godwit_qemu::{Confine, MemoryGroups, UidRange};
use godwit_sched_host::cgroup::{Hierarchy, Version};
use godwit_types::{Fault, Hash};

use super::SiteDirs;

/// Which uids a site gives its QEMUs and relays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Uids {
    /// Those of [`UidRange::USUAL`], when the site may give any.
    #[default]
    Usual,
    /// None: they run as the site's user.
    Off,
    /// These.
    Of(UidRange),
}

impl std::str::FromStr for Uids {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "off" => Ok(Self::Off),
            "usual" => Ok(Self::Usual),
            range => range.parse().map(Self::Of),
        }
    }
}

/// How the QEMUs and relays of a site are confined; makes what that needs.
pub(super) fn confine(uids: Uids, dirs: &SiteDirs) -> Result<Option<Confine>, Fault> {
    let uids = match uids {
        Uids::Off => {
            tracing::warn!(
                "QEMUs and relays run as this site's user, as was asked for: a guest that breaks out of QEMU has the site"
            );
            return Ok(None);
        }
        Uids::Of(range) => range,
        Uids::Usual => UidRange::USUAL,
    };
    if !rustix::process::geteuid().is_root() {
        tracing::warn!(
            "this site does not run as root, so QEMUs and relays run as its user: a guest that breaks out of QEMU has the site"
        );
        return Ok(None);
    }
    dirs.let_through()?;
    Ok(Some(Confine { uids, scratch: dirs.scratch(), readable: Vec::new() }))
}

/// Where the QEMUs and relays of a site get control groups with memory limits; what is left of earlier ones is
/// removed. Where none can be had the site says so and does without.
pub(super) fn groups(dirs: &SiteDirs) -> Option<MemoryGroups> {
    let found = || -> Result<MemoryGroups, String> {
        let hierarchy = Hierarchy::find_of("memory").map_err(|e| godwit_types::chain(&e))?;
        let unified = hierarchy.version() == Version::V2;
        // Not below this daemon's own group: machines outlive it.
        let above = hierarchy.mount().join("godwit");
        let site = Hash::of(dirs.run.as_os_str().as_encoded_bytes()).short();
        let parent = above.join(&site);
        std::fs::create_dir_all(&parent)
            .map_err(|e| format!("making {}: {e}", parent.display()))?;
        if unified {
            let file = hierarchy.mount().join("cgroup.subtree_control");
            std::fs::write(&file, "+memory")
                .map_err(|e| format!("writing {}: {e}", file.display()))?;
        }
        Ok(MemoryGroups { parent, unified })
    };
    match found() {
        Ok(groups) => {
            groups.sweep();
            Some(groups)
        }
        Err(why) => {
            tracing::warn!(why, "no control group limits the memory of a QEMU");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_are_a_range_or_off() {
        assert_eq!("off".parse(), Ok(Uids::Off));
        assert_eq!("5-9".parse(), Ok(Uids::Of(UidRange { first: 5, last: 9 })));
        assert!("root".parse::<Uids>().is_err());
    }
}
