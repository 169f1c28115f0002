//! What a clone's guest frees is free on the host.
//!
//! A clone maps a sealed file privately, and QEMU gives nothing of such a mapping back: it would
//! have to punch holes in the file. A small library (`preload/discard.rs`) that is loaded into it
//! lets it drop the clone's own copy of a page and leaves the file alone. The page is then what it
//! is in the file. A guest that zeroes what it frees (`init_on_free`) counts on zeros there; it says
//! so to the balloon, and nothing is dropped.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::MemfdFlags;
use serde_json::json;

use crate::error::QemuError;
use crate::machine::Machine;
use crate::process::Process;

/// The library, as `build.rs` compiles it.
const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/discard.so"));
/// Its name in memory.
const NAME: &str = "godwit-discard.so";
/// How QEMU names the balloon's feature with which a guest asks for certain content in free pages.
const POISON: &str = "VIRTIO_BALLOON_F_PAGE_POISON";
/// The same of reports of free pages.
const REPORTING: &str = "VIRTIO_BALLOON_F_REPORTING";
const BALLOON: &str = "/machine/peripheral/balloon0/virtio-backend";

/// Lets a QEMU drop its copies of free pages. Held by who started it; what QEMU has of it is the
/// same file, so nothing that QEMU does with its descriptors leads elsewhere.
#[derive(Debug)]
pub(crate) struct DiscardSwitch(File);

impl DiscardSwitch {
    fn turn_on(&mut self) -> std::io::Result<()> {
        self.0.write_all(&[1])
    }
}

/// The library and the switch for one start of QEMU.
#[derive(Debug)]
pub(crate) struct Preload {
    library: OwnedFd,
    switch: File,
}

impl Preload {
    /// Makes both, in memory; none where a host lets nothing in memory be run: a clone keeps what its
    /// guest frees then.
    pub(crate) fn new() -> Option<Self> {
        let never = std::fs::read_to_string("/proc/sys/vm/memfd_noexec");
        if never.is_ok_and(|level| level.trim() == "2") {
            return None;
        }
        let make = |name: &str, more| rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | more);
        let both = || {
            let library = match make(NAME, MemfdFlags::EXEC) {
                // A kernel before 6.3, where all may be run.
                Err(rustix::io::Errno::INVAL) => make(NAME, MemfdFlags::empty()),
                made => made,
            };
            let mut library = File::from(library?);
            library.write_all(LIBRARY)?;
            let switch = File::from(make("godwit-discards", MemfdFlags::empty())?);
            Ok::<_, std::io::Error>(Self { library: library.into(), switch })
        };
        both().inspect_err(|error| tracing::warn!(%error, "clones keep what guests free")).ok()
    }

    /// What QEMU inherits.
    pub(crate) fn descriptors(&self) -> [RawFd; 2] {
        [self.library.as_raw_fd(), self.switch.as_raw_fd()]
    }

    /// The variables of a QEMU whose memory is `memory`.
    pub(crate) fn environment(&self, memory: &Path) -> [(&'static str, String); 3] {
        let [library, switch] = self.descriptors();
        [
            ("LD_PRELOAD", format!("/proc/self/fd/{library}")),
            ("GODWIT_MEMORY", memory.to_string_lossy().into_owned()),
            ("GODWIT_DISCARDS", switch.to_string()),
        ]
    }

    /// The switch, off.
    pub(crate) fn into_switch(self) -> DiscardSwitch {
        DiscardSwitch(self.switch)
    }
}

/// Whether the library is loaded into a process.
pub(crate) fn is_loaded(process: &Process) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.pid)).unwrap_or_default();
    maps.contains(NAME)
}

impl Machine {
    /// Lets QEMU drop a clone's copies of pages that its guest reports as free, unless the guest
    /// counts on what is in them. Does nothing for a machine that is no clone.
    pub(crate) async fn let_free_memory_go(&self) -> Result<(), QemuError> {
        let Some(mut switch) = self.take_discard_switch() else { return Ok(()) };
        let status = self.qmp("x-query-virtio-status", json!({ "path": BALLOON })).await?;
        if takes_any_content(&status)? {
            switch.turn_on().map_err(QemuError::file("writing to", Path::new("discards")))?;
        }
        Ok(())
    }
}

/// Whether a guest whose balloon has `status` reports free pages, and counts on nothing in them.
fn takes_any_content(status: &serde_json::Value) -> Result<bool, QemuError> {
    let features = status["guest-features"]["dev-features"].as_array();
    let features = features.ok_or_else(|| QemuError::Unexpected {
        what: "what QEMU says of the balloon",
        why: "it names no features of the guest".to_owned(),
    })?;
    let has = |name| features.iter().filter_map(|f| f.as_str()).any(|f| f.starts_with(name));
    Ok(has(REPORTING) && !has(POISON))
}
