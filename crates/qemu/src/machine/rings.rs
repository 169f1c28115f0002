//! Where the machine's virtio queues lie in its memory.
//!
//! A destination's QEMU reads them when it loads the devices' state, before the machine runs: the
//! pages that a post-copy is stopped by first.

use std::collections::BTreeSet;
use std::ops::Range;

use godwit_types::{Arch, Mib, PAGE_SIZE};
use serde_json::{Value, json};

use super::Machine;
use crate::error::QemuError;

/// Name of the RAM block that a machine's memory is.
pub const RAM_BLOCK: &str = "m0";
/// The most queues of a device, and pages in all, that are looked at.
const MOST_QUEUES: u64 = 64;
const MOST_PAGES: usize = 1024;

const GIB: u64 = 1 << 30;

/// Offset within the machine's memory of guest physical address `address`: QEMU's memory maps of
/// `pc-q35` (RAM below 4 GiB ends at 2 GiB once there is more than 2.75 GiB of it, the rest follows
/// at 4 GiB) and `virt` (RAM begins at 1 GiB).
fn offset(arch: Arch, memory: Mib, address: u64) -> Option<u64> {
    let bytes = memory.bytes();
    let at = match arch {
        Arch::Aarch64 => address.checked_sub(GIB)?,
        Arch::X86_64 => {
            let low = if bytes >= 0xb000_0000 { 2 * GIB } else { bytes };
            match address.checked_sub(4 * GIB) {
                Some(above) => above + low,
                None if address < low => address,
                None => return None,
            }
        }
    };
    (at < bytes).then_some(at)
}

/// The pages that hold `bytes` bytes, at least one, from guest physical address `address` on; none
/// when they do not all lie in the machine's memory. The guest's driver chose the address.
fn span(arch: Arch, memory: Mib, address: u64, bytes: u64) -> Range<u64> {
    let last = address.checked_add(bytes - 1).and_then(|last| offset(arch, memory, last));
    match (offset(arch, memory, address), last) {
        (Some(first), Some(last)) => first / PAGE_SIZE as u64..last / PAGE_SIZE as u64 + 1,
        _ => 0..0,
    }
}

impl Machine {
    /// The pages of [`RAM_BLOCK`] that hold the queues of the machine's virtio devices, in order.
    /// Each is where QEMU's `x-query-virtio-queue-status` says.
    ///
    /// # Errors
    /// When QEMU does not answer, or does not know the commands.
    pub async fn ring_pages(&self) -> Result<Vec<u64>, QemuError> {
        let spec = self.launch().spec;
        let mut pages = BTreeSet::new();
        let devices = self.qmp("x-query-virtio", Value::Null).await?;
        for device in devices.as_array().into_iter().flatten() {
            let Some(path) = device["path"].as_str() else { continue };
            let status = self.qmp("x-query-virtio-status", json!({ "path": path })).await?;
            for queue in 0..status["num-vqs"].as_u64().unwrap_or(0).min(MOST_QUEUES) {
                let which = json!({ "path": path, "queue": queue });
                // A queue that the guest does not use has none.
                let Ok(ring) = self.qmp("x-query-virtio-queue-status", which).await else {
                    continue;
                };
                let entries = ring["vring-num"].as_u64().unwrap_or(0).min(1 << 15);
                // Sizes of the three parts: virtio 1.2, section 2.7.
                for (part, bytes) in [
                    ("vring-desc", 16 * entries),
                    ("vring-avail", 6 + 2 * entries),
                    ("vring-used", 6 + 8 * entries),
                ] {
                    let address = ring[part].as_u64().filter(|a| *a > 0 && entries > 0);
                    let Some(address) = address else { continue };
                    pages.extend(span(spec.arch, spec.memory, address, bytes));
                }
            }
        }
        Ok(pages.into_iter().take(MOST_PAGES).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_offsets_of_the_memory() {
        let x86 = |mib, address| offset(Arch::X86_64, Mib(mib), address);
        assert_eq!(x86(256, 0x57e_c000), Some(0x57e_c000));
        assert_eq!(x86(256, 256 << 20), None);
        assert_eq!(x86(4096, 2 * GIB - 1), Some(2 * GIB - 1));
        assert_eq!(x86(4096, 2 * GIB), None, "the hole");
        assert_eq!(x86(4096, 4 * GIB), Some(2 * GIB));
        assert_eq!(x86(4096, 6 * GIB), None);
        let arm = |address| offset(Arch::Aarch64, Mib(256), address);
        assert_eq!(arm(GIB + 4096), Some(4096));
        assert_eq!(arm(4096), None);
        assert_eq!(arm(GIB + (256 << 20)), None);
    }

    #[test]
    fn a_queue_is_where_the_guest_says_or_nowhere() {
        let pages = |address, bytes| span(Arch::X86_64, Mib(256), address, bytes);
        assert_eq!(pages(0x1000, 4096), 1..2);
        assert_eq!(pages(0x1ffe, 6), 1..3);
        assert_eq!(pages((256 << 20) - 4, 8), 0..0, "beyond its end");
        assert_eq!(pages(u64::MAX - 1, 4096), 0..0, "beyond all addresses");
        let large = |address, bytes| span(Arch::X86_64, Mib(4096), address, bytes);
        assert_eq!(large(2 * GIB - 4, 8), 0..0, "into the hole");
    }
}
