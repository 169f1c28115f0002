//! What a site keeps of each machine, so that a restarted daemon knows it again.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use godwit_qemu::MacAddress;
use godwit_types::{Arch, Generation, Hash, Mib, MigrationId, Name, SubstrateId, VmId};
use serde::{Deserialize, Serialize};

use crate::error::Fault;

/// Name of the file in the machine's directory.
const FILE: &str = "environment.json";

/// The longest record that is read, in bytes.
const MAX_RECORD: u64 = 256 << 10;

/// What the site means a machine to be; what it is, QEMU says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Meant {
    /// To run.
    Running,
    /// To be off, its disk kept.
    Stopped,
    /// To be gone: it runs elsewhere or was deleted. The record stays as a tombstone, so that an
    /// older generation cannot come back.
    Gone,
}

/// What a machine's own layer stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Below {
    /// The base image itself.
    Image,
    /// The disk layer of a substrate, on the base image.
    Substrate(SubstrateId),
    /// The layer that was post-copied when the machine came here, on the base image.
    Mid,
}

/// Which end of a migration a machine is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum End {
    /// It leaves, or has left.
    Source,
    /// It comes.
    Destination,
}

/// The migration that a machine is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Migration {
    pub(crate) id: MigrationId,
    pub(crate) end: End,
    /// The site at the other end.
    pub(crate) peer: Name,
    /// How many times new relays were started for it.
    #[serde(default)]
    pub(crate) attempt: u32,
    /// Destination: the machine has run here, so it is nobody else's to run.
    #[serde(default)]
    pub(crate) runs: bool,
    /// Destination: why what is missing is not waited for any more.
    #[serde(default)]
    pub(crate) given_up: Option<String>,
    /// Destination: generation of the tombstone that the machine had left here before. It is put
    /// back when the arrival fails.
    #[serde(default)]
    pub(crate) earlier: Option<Generation>,
}

impl Migration {
    pub(crate) fn new(id: MigrationId, end: End, peer: Name) -> Self {
        Self { id, end, peer, attempt: 0, runs: false, given_up: None, earlier: None }
    }
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineRecord {
    pub(crate) vm: VmId,
    pub(crate) name: Name,
    pub(crate) generation: Generation,
    pub(crate) meant: Meant,
    pub(crate) image: Name,
    /// Content hash of the image: a rebuilt one of the same name is another.
    pub(crate) image_hash: Hash,
    pub(crate) substrate: Option<SubstrateId>,
    pub(crate) arch: Arch,
    pub(crate) memory: Mib,
    pub(crate) vcpus: u8,
    pub(crate) mac: MacAddress,
    pub(crate) below: Below,
    pub(crate) migration: Option<Migration>,
    pub(crate) reason: Option<String>,
}

impl MachineRecord {
    /// Writes it so that a crash leaves the old or the new one.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), Fault> {
        let what = format!("writing the record of machine '{}' in", self.name);
        let fail = |e: std::io::Error| Fault::io(&what, dir, &e);
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|e| Fault::internal(format!("the record of machine '{}': {e}", self.name)))?;
        let temp = dir.join("environment.json.new");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temp)
            .map_err(fail)?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(fail)?;
        std::fs::rename(&temp, dir.join(FILE)).map_err(fail)?;
        std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(fail)
    }

    /// Reads the record in `dir`; `None` when there is none.
    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, Fault> {
        let path = dir.join(FILE);
        let damaged = |why: String| {
            Fault::new(godwit_types::Code::Damaged, format!("{}: {why}", path.display()))
        };
        match std::fs::metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(damaged(e.to_string())),
            Ok(m) if m.len() > MAX_RECORD => return Err(damaged("too long".into())),
            Ok(_) => {}
        }
        let bytes = std::fs::read(&path).map_err(|e| damaged(e.to_string()))?;
        serde_json::from_slice(&bytes).map(Some).map_err(|e| damaged(e.to_string()))
    }
}
