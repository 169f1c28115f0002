//! Where a site keeps its things.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use godwit_types::{Fault, Name, VmId};
use serde::{Deserialize, Serialize};

/// The file that a machine writes its disk to.
pub(super) const TOP: &str = "top.qcow2";

/// How the run directory of a waiting QEMU begins; what follows is an id.
pub(super) const WAITING: &str = "wait-";

/// Makes sure that a directory is this user's alone, and that nobody else can put another in its
/// place: guest memory, keys and disks are below it.
/// `also` are rights of others that may stay.
fn private(dir: &Path, also: u32) -> Result<(), Fault> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let looking = |e: std::io::Error| Fault::io("looking at", dir, &e);
    let refuse = |at: &Path, why: &str| {
        Err(Fault::conflict(format!("{} {why}: {} is not safe there", at.display(), dir.display()))
            .hint("remove it or change its owner and mode, or name another place with --root"))
    };
    let me = rustix::process::geteuid().as_raw();
    let meta = std::fs::symlink_metadata(dir).map_err(looking)?;
    let real = std::fs::canonicalize(dir).map_err(looking)?;
    if meta.file_type().is_dir() {
        if meta.uid() != me {
            return refuse(dir, "belongs to another user");
        }
        if meta.mode() & 0o077 & !also != 0 {
            // Such as a file system of its own that is mounted there.
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
                .map_err(looking)?;
        }
    } else if meta.uid() != me {
        return refuse(dir, "is another user's link");
    }
    for above in real.ancestors().skip(1) {
        let meta = std::fs::metadata(above).map_err(looking)?;
        // In a sticky directory others cannot rename what is not theirs.
        let sticky = meta.mode() & 0o1000 != 0;
        if meta.uid() != me && meta.uid() != 0 {
            return refuse(above, "belongs to another user");
        }
        if meta.mode() & 0o022 != 0 && !sticky {
            return refuse(above, "may be written by others");
        }
    }
    Ok(())
}

/// The directories of one site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteDirs {
    /// Store, substrates, cow files, keys, registry.
    pub data: PathBuf,
    /// Sockets; short, since a socket path has at most 107 bytes.
    pub run: PathBuf,
    /// RAM files, on tmpfs.
    pub memory: PathBuf,
    /// Guest images; shared by the sites of one host.
    pub images: PathBuf,
}

impl SiteDirs {
    /// The usual places: `/var/lib/godwit/<site>`, `/run/godwit/<site>`,
    /// `/dev/shm/godwit/<site>` and the image cache (`GODWIT_IMAGES` overrides).
    #[must_use]
    pub fn usual(site: &Name) -> Self {
        let images = std::env::var_os("GODWIT_IMAGES")
            .map_or_else(|| PathBuf::from(godwit_image::DEFAULT_CACHE), PathBuf::from);
        Self {
            data: Path::new("/var/lib/godwit").join(site.as_str()),
            run: Path::new("/run/godwit").join(site.as_str()),
            memory: Path::new("/dev/shm/godwit").join(site.as_str()),
            images,
        }
    }

    /// All of them below `root`.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        Self {
            data: root.join("data"),
            run: root.join("run"),
            memory: root.join("memory"),
            images: root.join("images"),
        }
    }

    /// Makes them, readable by the owner only.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn make(&self) -> Result<(), Fault> {
        for dir in [
            &self.data,
            &self.run,
            &self.memory,
            &self.data.join("vms"),
            &self.waiting(),
            &self.keys(),
        ] {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| {
                Fault::internal(format!("making {}: {e}", dir.display()))
                    .hint("run as root, or name another place with --root")
            })?;
            // Confined QEMUs go through the directory of sockets.
            private(dir, if dir == &self.run { 0o011 } else { 0 })?;
        }
        Ok(())
    }

    /// Where it is kept how guests of an architecture run on this host: beside the images, where its
    /// other sites find it, or in the site's own data where that may not be written.
    pub(super) fn accel_probe(&self, arch: &str) -> PathBuf {
        let (name, shared) = (format!("accel-{arch}.json"), self.images.parent());
        let writable = |dir: &&Path| rustix::fs::access(*dir, rustix::fs::Access::WRITE_OK).is_ok();
        shared.filter(writable).unwrap_or(&self.data).join(name)
    }

    /// Lets confined QEMUs go through the directory of sockets and the one for states on their way,
    /// in which each opens its own files alone.
    pub(super) fn let_through(&self) -> Result<(), Fault> {
        use std::os::unix::fs::PermissionsExt;
        let scratch = self.scratch();
        match std::fs::create_dir(&scratch) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Fault::io("making", &scratch, &e));
            }
            _ => private(&scratch, 0o011)?,
        }
        for dir in [&self.run, &scratch] {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711))
                .map_err(|e| Fault::io("opening", dir, &e))?;
        }
        Ok(())
    }

    /// States on their way between QEMUs and the pool, by uid.
    pub(super) fn scratch(&self) -> PathBuf {
        self.memory.join("scratch")
    }

    /// Certificates and keys.
    #[must_use]
    pub fn keys(&self) -> PathBuf {
        self.data.join("keys")
    }

    /// The list of certificates that are no longer good, as the center sent it.
    #[must_use]
    pub fn revoked(&self) -> PathBuf {
        self.keys().join("revoked.json")
    }

    /// What relays read while they work, which is no secret.
    pub(super) fn for_relays(&self) -> PathBuf {
        self.run.join("for-relays")
    }

    /// What is kept of one machine.
    #[must_use]
    pub fn vm(&self, vm: VmId) -> PathBuf {
        self.data.join("vms").join(vm.0.simple().to_string())
    }

    /// The generations of the machines that left.
    #[must_use]
    pub fn tombs(&self) -> PathBuf {
        self.data.join("vms.left")
    }

    /// Sockets of one machine.
    #[must_use]
    pub fn vm_run(&self, vm: VmId) -> PathBuf {
        self.run.join(vm.0.simple().to_string())
    }

    /// Sockets of the QEMU that waits under `vm`.
    #[must_use]
    pub fn waiting_run(&self, vm: VmId) -> PathBuf {
        self.run.join(format!("{WAITING}{}", vm.0.simple()))
    }

    /// Top images of the QEMUs that wait; on the same file system as those of the machines.
    #[must_use]
    pub fn waiting(&self) -> PathBuf {
        self.data.join("waiting")
    }

    /// Memory of machines that have left.
    pub(super) fn visits(&self) -> PathBuf {
        self.memory.join("visits")
    }

    /// RAM file of one machine.
    #[must_use]
    pub fn vm_memory(&self, vm: VmId) -> PathBuf {
        self.memory.join(vm.0.simple().to_string())
    }
}

/// Removes a file that may be gone already.
pub(super) fn remove_file(path: &Path) -> Result<(), Fault> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Fault::internal(format!("removing {}: {e}", path.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn sites_of_one_host_find_one_answer_of_the_boot_probe() {
        let root = tempfile::tempdir().expect("dir");
        let [a, b] = ["a", "b"].map(|site| {
            let images = root.path().join("cache/images");
            SiteDirs { images, ..SiteDirs::below(&root.path().join(site)) }
        });
        assert_eq!(a.accel_probe("x"), a.data.join("accel-x.json"), "there is no such place yet");
        std::fs::create_dir(root.path().join("cache")).expect("made");
        assert_eq!(a.accel_probe("x"), root.path().join("cache/accel-x.json"));
        assert_eq!(a.accel_probe("x"), b.accel_probe("x"));
    }

    #[test]
    fn a_place_that_others_can_change_is_refused() {
        let root = tempfile::tempdir().expect("dir");
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        };
        let dirs = SiteDirs::below(&root.path().join("site"));
        dirs.make().expect("fresh");
        // Mounted with the mode that a tmpfs has.
        mode(&dirs.memory, 0o1777);
        dirs.make().expect("ours to close");
        let now = std::fs::metadata(&dirs.memory).expect("there").permissions().mode();
        assert_eq!(now & 0o7777, 0o700);
        mode(root.path(), 0o777);
        let f = dirs.make().expect_err("anybody can put another in its place");
        assert!(f.message.contains("may be written by others"), "{f}");
        mode(root.path(), 0o1777);
        dirs.make().expect("as below /tmp");
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&dirs.memory, Some(65_534), None).expect("chown");
            let f = dirs.make().expect_err("made by somebody else before us");
            assert!(f.message.contains("belongs to another user"), "{f}");
        }
    }
}
