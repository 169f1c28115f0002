//! What a substrate is: `substrate.json` and the files beside it.

use std::path::{Path, PathBuf};

use godwit_image::Image;
use godwit_qemu::{BootFile, MacAddress, MachineSpec, Manifest};
use godwit_store::PageMap;
use godwit_types::{
    Arch, BLOCK_SIZE, Hash, Mib, Name, PAGE_SIZE, SubstrateId, SubstrateKind, unseal,
};
use serde::{Deserialize, Serialize};

use crate::error::SubstrateError;

/// The form of `substrate.json` written here.
pub(crate) const FORMAT: u32 = 1;
/// The largest `substrate.json` that is read, in bytes.
pub(crate) const MAX_JSON: u64 = 128 << 10;
/// The largest device state that is taken, in bytes.
pub(crate) const MAX_STATE: u64 = 64 << 20;
/// The largest page map that is read, in bytes: 64 GiB of memory or disk, all of it written.
pub(crate) const MAX_MAP: u64 = 1 << 30;
/// The largest disk, in blocks (1 TiB).
const MAX_BLOCKS: u64 = (1 << 40) / BLOCK_SIZE as u64;

/// File names inside a substrate's directory.
pub(crate) const JSON: &str = "substrate.json";
pub(crate) const STATE: &str = "state";
pub(crate) const PAGES: &str = "pages";
pub(crate) const DISK: &str = "disk";

/// A file beside the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// BLAKE3 of its content.
    pub hash: Hash,
    /// Its length.
    pub bytes: u64,
}

impl Part {
    pub(crate) fn of(content: &[u8]) -> Self {
        Self { hash: Hash::of(content), bytes: content.len() as u64 }
    }
}

/// The guest-visible shape, from which the machine is described again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Guest architecture.
    pub arch: Arch,
    /// Guest memory.
    pub memory: Mib,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Whether it has a display.
    pub display: bool,
    /// Whether it has a disk.
    pub disk: bool,
    /// Ports for NICs.
    pub nic_ports: u8,
}

/// How large a substrate is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// Guest memory.
    pub raw_bytes: u64,
    /// Memory that is not zero.
    pub memory_bytes: u64,
    /// Disk blocks that differ from the base image.
    pub disk_bytes: u64,
    /// What the store and the pool grew by when it was docked or imported.
    pub stored_bytes: u64,
}

/// A docked machine. Never changed once it is in a pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Substrate {
    /// Version of this form.
    pub format: u32,
    /// Its id.
    pub id: SubstrateId,
    /// The name people use.
    pub name: Name,
    /// Who may use it.
    pub kind: SubstrateKind,
    /// Whose it is.
    pub owner: Name,
    /// Name of the image under it.
    pub image: Name,
    /// Hash of that image.
    pub image_hash: Hash,
    /// The shape of the machine.
    pub shape: Shape,
    /// The kernel command line.
    pub cmdline: String,
    /// The manifest of the machine that was docked.
    pub machine: Manifest,
    /// MAC addresses of the NICs that it had, by port.
    pub macs: Vec<(u8, MacAddress)>,
    /// The port of the NIC that stayed in it, of QEMU's user network, its interface down. The others
    /// were taken out, and one is plugged anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic_in: Option<u8>,
    /// Whether the machine's identity was taken from it before it was docked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub generalised: bool,
    /// Whether a guest agent answers in it.
    pub agent: bool,
    /// QEMU's device state.
    pub state: Part,
    /// The page map of its memory.
    pub pages: Part,
    /// The page map of its disk above the base image.
    pub disk: Option<Part>,
    /// When it was docked, in milliseconds since 1970.
    pub docked_unix_ms: u64,
    /// How large it is.
    pub sizes: Sizes,
}

impl Substrate {
    /// The hash of all that it is: machine, device state, page map and disk map, id, name, kind
    /// and owner. Only what storing it cost differs between sites and is left out.
    #[must_use]
    pub fn content(&self) -> Hash {
        let sizes = Sizes { stored_bytes: 0, ..self.sizes };
        Hash::of(&Self { sizes, ..self.clone() }.to_json())
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// Reads a manifest from a file or an archive and checks every bound; `what` names it in
    /// errors.
    ///
    /// # Errors
    /// [`SubstrateError::Damaged`].
    pub fn parse(text: &[u8], what: &str) -> Result<Self, SubstrateError> {
        #[derive(Deserialize)]
        struct Form {
            format: u32,
        }
        let bad = |why: String| SubstrateError::damaged(what, why);
        if text.len() as u64 > MAX_JSON {
            return Err(bad(format!("longer than {MAX_JSON} bytes")));
        }
        let form: Form = serde_json::from_slice(text).map_err(|e| bad(e.to_string()))?;
        if form.format != FORMAT {
            return Err(bad(format!("form {} is not known here ({FORMAT} is)", form.format)));
        }
        let s: Self = serde_json::from_slice(text).map_err(|e| bad(e.to_string()))?;
        s.check(what)?;
        Ok(s)
    }

    fn check(&self, what: &str) -> Result<(), SubstrateError> {
        let bad = |why: &str| Err(SubstrateError::damaged(what, why));
        if self.machine.format != Manifest::FORMAT {
            return bad("its machine manifest has a form that is not known here");
        }
        if self.state.bytes > MAX_STATE || self.pages.bytes > MAX_MAP {
            return bad("a part is larger than allowed");
        }
        if self.disk.is_some_and(|d| d.bytes > MAX_MAP) {
            return bad("a part is larger than allowed");
        }
        // A map has 32 bytes for a page, and not many more for where it stands.
        if self.pages.bytes > self.shape.memory.bytes() / PAGE_SIZE as u64 * 48 + 4096 {
            return bad("its page map is longer than its memory allows");
        }
        if self.disk.is_some() != self.shape.disk {
            return bad("its disk and its shape disagree");
        }
        if self.shape.memory.0 != self.machine.memory_mib || self.shape.vcpus != self.machine.vcpus
        {
            return bad("its shape and its machine manifest disagree");
        }
        if self.cmdline != self.machine.cmdline {
            return bad("its shape and its machine manifest disagree");
        }
        if self.macs.iter().any(|(port, _)| *port >= self.shape.nic_ports) || self.macs.len() > 8 {
            return bad("it has a NIC in a port that its shape lacks");
        }
        if self.nic_in.is_some_and(|inside| self.macs.iter().all(|(port, _)| *port != inside)) {
            return bad("a NIC stayed in it that it did not have");
        }
        let file = |hash| BootFile { path: PathBuf::new(), hash };
        self.spec_of(file(self.machine.kernel), self.machine.initrd.map(file))
            .check()
            .map_err(|e| SubstrateError::damaged(what, e.to_string()))
    }

    fn spec_of(&self, kernel: BootFile, initrd: Option<BootFile>) -> MachineSpec {
        let Shape { arch, memory, vcpus, display, disk, nic_ports } = self.shape;
        let cmdline = self.cmdline.clone();
        MachineSpec { arch, memory, vcpus, kernel, initrd, cmdline, display, disk, nic_ports }
    }

    /// The machine's description on this host, with the files of `image`.
    ///
    /// # Errors
    /// [`SubstrateError::WrongImage`].
    pub fn spec(&self, image: &Image) -> Result<MachineSpec, SubstrateError> {
        if image.hash != self.image_hash {
            return Err(SubstrateError::WrongImage {
                name: self.name.clone(),
                wanted: self.image_hash,
                found: image.hash,
            });
        }
        let kernel = BootFile { path: image.kernel_path(), hash: image.kernel.hash };
        let initrd = image
            .initrd_path()
            .zip(image.initrd.as_ref())
            .map(|(path, f)| BootFile { path, hash: f.hash });
        Ok(self.spec_of(kernel, initrd))
    }

    /// Refuses a machine of another shape than the one that was docked.
    pub(crate) fn fits(&self, here: &Manifest) -> Result<(), SubstrateError> {
        self.machine
            .check(here)
            .map_err(|e| SubstrateError::Shape { name: self.name.clone(), source: Box::new(e) })
    }
}

/// A substrate in the pool's directory: its manifest and where the files lie.
#[derive(Debug, Clone)]
pub struct Docked {
    /// The manifest.
    pub substrate: Substrate,
    pub(crate) dir: PathBuf,
}

impl Docked {
    pub(crate) fn open(dir: &Path) -> Result<Self, SubstrateError> {
        let path = dir.join(JSON);
        let what = path.display().to_string();
        let file = read_bounded(&path, MAX_JSON)?;
        let text = unseal(&file).map_err(|e| SubstrateError::damaged(&what, e.to_string()))?;
        let substrate = Substrate::parse(text, &what)?;
        Ok(Self { substrate, dir: dir.to_owned() })
    }

    /// The device state, checked against its hash.
    pub(crate) fn state(&self) -> Result<Vec<u8>, SubstrateError> {
        self.part(STATE, self.substrate.state, MAX_STATE)
    }

    /// The page map of the memory.
    pub(crate) fn pages(&self) -> Result<PageMap, SubstrateError> {
        let text = self.part(PAGES, self.substrate.pages, MAX_MAP)?;
        memory_map(&text, self.substrate.shape.memory, &self.name_of(PAGES))
    }

    /// The page map of the disk.
    pub(crate) fn disk(&self) -> Result<Option<PageMap>, SubstrateError> {
        let Some(part) = self.substrate.disk else { return Ok(None) };
        let text = self.part(DISK, part, MAX_MAP)?;
        disk_map(&text, &self.name_of(DISK)).map(Some)
    }

    pub(crate) fn part(
        &self,
        file: &'static str,
        part: Part,
        max: u64,
    ) -> Result<Vec<u8>, SubstrateError> {
        let path = self.dir.join(file);
        let content = read_bounded(&path, max)?;
        if Part::of(&content) != part {
            return Err(SubstrateError::damaged(
                path.display().to_string(),
                "its hash is not the one in the manifest",
            ));
        }
        Ok(content)
    }

    fn name_of(&self, file: &str) -> String {
        self.dir.join(file).display().to_string()
    }
}

pub(crate) fn memory_map(text: &[u8], memory: Mib, what: &str) -> Result<PageMap, SubstrateError> {
    let pages = memory.bytes() / PAGE_SIZE as u64;
    let map = PageMap::decode(text, pages)
        .map_err(|source| SubstrateError::Pages { what: what.to_owned(), source })?;
    if map.units() != pages {
        return Err(SubstrateError::damaged(what, "it is not the map of a memory of that size"));
    }
    Ok(map)
}

pub(crate) fn disk_map(text: &[u8], what: &str) -> Result<PageMap, SubstrateError> {
    PageMap::decode(text, MAX_BLOCKS)
        .map_err(|source| SubstrateError::Pages { what: what.to_owned(), source })
}

pub(crate) fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>, SubstrateError> {
    use std::io::Read;
    let file = std::fs::File::open(path).map_err(SubstrateError::io("opening", path))?;
    let mut content = Vec::new();
    file.take(max + 1).read_to_end(&mut content).map_err(SubstrateError::io("reading", path))?;
    if content.len() as u64 > max {
        return Err(SubstrateError::damaged(
            path.display().to_string(),
            format!("longer than {max} bytes"),
        ));
    }
    Ok(content)
}
