//! Where a site keeps its things.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use godwit_types::{Name, VmId};
use serde::{Deserialize, Serialize};

use crate::error::Fault;

/// How the run directory of a waiting QEMU begins; what follows is an id.
pub(super) const WAITING: &str = "wait-";

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
        }
        Ok(())
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

    /// RAM file of one machine.
    #[must_use]
    pub fn vm_memory(&self, vm: VmId) -> PathBuf {
        self.memory.join(vm.0.simple().to_string())
    }
}
