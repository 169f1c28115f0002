//! What a site keeps of each machine, so that a restarted daemon knows it again.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use godwit_net::{Attachment, PublishedPort};
use godwit_qemu::{MacAddress, Nic};
use godwit_transfer::Warrant;
use godwit_types::{Arch, Fault, Generation, Hash, Mib, Name, SubstrateId, VmId};
use serde::{Deserialize, Serialize};

use super::course::Migration;

/// Name of the file in the machine's directory.
const FILE: &str = "environment.json";

/// The longest record that is read, in bytes.
const MAX_RECORD: u64 = 256 << 10;

/// What the site means a machine to be; what it is, QEMU says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DesiredState {
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
pub(crate) enum DiskBase {
    /// The base image itself.
    Image,
    /// The disk layer of a substrate, on the base image.
    Substrate(SubstrateId),
    /// The layer that was post-copied when the machine came here, on the base image.
    Mid,
}

/// What is being done to a machine and would leave it half done if the daemon died. Written before
/// its first step; the next daemon finishes it or takes it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "doing", rename_all = "kebab-case")]
pub(crate) enum Unfinished {
    /// It is being activated, and nobody has been told that it runs: it is removed.
    Activating,
    /// It is being docked. If the pool has the substrate, that is what it is; if not, it runs on.
    Docking {
        substrate: SubstrateId,
        /// The NICs that it had.
        nics: Vec<Nic>,
    },
}

/// How it ended that a machine, which had died at its destination, was to be brought back here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Back {
    /// Under which generation.
    pub(crate) generation: Generation,
    /// It runs on here, or has: written down before its first instant. If not, it never does.
    pub(crate) runs: bool,
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineRecord {
    pub(crate) vm: VmId,
    pub(crate) name: Name,
    pub(crate) generation: Generation,
    /// The center's word for this generation here; none of a machine from before there were any.
    #[serde(default)]
    pub(crate) warrant: Option<Warrant>,
    #[serde(rename = "meant")]
    pub(crate) desired: DesiredState,
    pub(crate) image: Name,
    /// Content hash of the image: a rebuilt one of the same name is another.
    pub(crate) image_hash: Hash,
    pub(crate) substrate: Option<SubstrateId>,
    pub(crate) arch: Arch,
    pub(crate) memory: Mib,
    pub(crate) vcpus: u8,
    pub(crate) mac: MacAddress,
    #[serde(rename = "below")]
    pub(crate) disk_base: DiskBase,
    pub(crate) migration: Option<Migration>,
    pub(crate) reason: Option<String>,
    #[serde(default)]
    pub(crate) unfinished: Option<Unfinished>,
    /// Its place in a network, if it is in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) attachment: Option<Attachment>,
    /// The ports of its site's host that lead to it while it runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) published: Vec<PublishedPort>,
    /// How its last way back ended, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) back: Option<Back>,
}

/// How a record file begins. What lies between this, 64 hex digits and [`BODY`], and the last brace
/// of the file, is the record; the digits are its BLAKE3 hash.
const HEAD: &[u8] = b"{\"check\":\"";
/// What follows the hash.
const BODY: &[u8] = b"\",\"record\":";
/// Hex digits of a hash.
const DIGITS: usize = 64;

/// A record as it is in its file.
fn sealed(record: &[u8]) -> Vec<u8> {
    let check = blake3::hash(record).to_hex();
    [HEAD, check.as_bytes(), BODY, record, b"}\n"].concat()
}

/// The record in the bytes of its file, if they are as they were written. One of before there were
/// hashes is taken as it is.
fn opened(file: &[u8]) -> Result<&[u8], String> {
    let Some(rest) = file.strip_prefix(HEAD) else { return Ok(file) };
    let damaged = || "it is not as it was written".to_owned();
    let (check, rest) = rest.split_at_checked(DIGITS).ok_or_else(damaged)?;
    let record =
        rest.strip_prefix(BODY).and_then(|r| r.strip_suffix(b"}\n")).ok_or_else(damaged)?;
    if blake3::hash(record).to_hex().as_bytes() == check { Ok(record) } else { Err(damaged()) }
}

impl MachineRecord {
    /// The migration that it is in, where it has to be in one.
    pub(crate) fn in_migration(&self) -> Result<&Migration, Fault> {
        self.migration.as_ref().ok_or_else(|| Fault::internal("a machine that is in no migration"))
    }

    /// Writes it so that the next daemon on this boot of the host finds it; a crash of the host may
    /// lose it.
    pub(crate) fn save_quick(&self, dir: &Path) -> Result<(), Fault> {
        self.write(dir, Durable::No)
    }

    /// Writes it so that a crash leaves the old or the new one.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), Fault> {
        self.write(dir, Durable::Yes)
    }

    fn write(&self, dir: &Path, durable: Durable) -> Result<(), Fault> {
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
        file.write_all(&sealed(&bytes)).map_err(fail)?;
        if durable == Durable::Yes {
            file.sync_all().map_err(fail)?;
        }
        std::fs::rename(&temp, dir.join(FILE)).map_err(fail)?;
        match durable {
            Durable::Yes => {
                std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(fail)?;
            }
            Durable::No => {}
        }
        Ok(())
    }

    /// Reads the record in `dir`; `None` when there is none, or when the host crashed before it was
    /// written.
    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, Fault> {
        let path = dir.join(FILE);
        let damaged = |why: String| {
            Fault::new(godwit_types::Code::Damaged, format!("{}: {why}", path.display()))
        };
        match std::fs::metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(damaged(e.to_string())),
            Ok(m) if m.len() == 0 => return Ok(None),
            Ok(m) if m.len() > MAX_RECORD => return Err(damaged("too long".into())),
            Ok(_) => {}
        }
        let bytes = std::fs::read(&path).map_err(|e| damaged(e.to_string()))?;
        let record = opened(&bytes).map_err(damaged)?;
        serde_json::from_slice(record).map(Some).map_err(|e| damaged(e.to_string()))
    }
}

/// Whether what is written has to outlive a crash of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Durable {
    Yes,
    No,
}

/// The part of a machine's id that its MAC address is made of.
pub(super) fn mac_seed(vm: VmId) -> [u8; 5] {
    let id = vm.0.as_bytes();
    [id[11], id[12], id[13], id[14], id[15]]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> MachineRecord {
        MachineRecord {
            warrant: None,
            vm: VmId::new(),
            name: Name::new("a").expect("name"),
            generation: Generation::FIRST,
            desired: DesiredState::Running,
            image: Name::new("tiny").expect("name"),
            image_hash: Hash::of(b"tiny"),
            substrate: None,
            arch: Arch::X86_64,
            memory: Mib(256),
            vcpus: 1,
            mac: MacAddress([2, 0, 0, 0, 0, 1]),
            disk_base: DiskBase::Image,
            migration: None,
            reason: None,
            unfinished: Some(Unfinished::Activating),
            attachment: None,
            published: Vec::new(),
            back: None,
        }
    }

    #[test]
    fn a_record_with_any_bit_flipped_is_damaged_and_never_another_one() {
        let dir = tempfile::tempdir().expect("dir");
        let record = record();
        record.save(dir.path()).expect("saved");
        let path = dir.path().join(FILE);
        let good = std::fs::read(&path).expect("file");
        serde_json::from_slice::<serde_json::Value>(&good).expect("it is JSON");
        assert_eq!(MachineRecord::load(dir.path()).expect("good"), Some(record));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bad).expect("flipped");
            let read = MachineRecord::load(dir.path());
            assert_eq!(read.expect_err("damaged").code, godwit_types::Code::Damaged, "byte {at}");
        }
        std::fs::write(&path, &good[..good.len() / 2]).expect("cut");
        let _ = MachineRecord::load(dir.path()).expect_err("damaged");
    }

    #[test]
    fn a_record_of_before_there_were_hashes_is_read() {
        let dir = tempfile::tempdir().expect("dir");
        let record = MachineRecord { unfinished: None, ..record() };
        let mut old = serde_json::to_value(&record).expect("json");
        old.as_object_mut().expect("fields").remove("unfinished");
        // As every release has called them in the file.
        assert_eq!((&old["meant"], &old["below"]), (&"running".into(), &"image".into()));
        std::fs::write(dir.path().join(FILE), old.to_string()).expect("written");
        assert_eq!(MachineRecord::load(dir.path()).expect("read"), Some(record));
    }
}
