//! What this host has.

use std::collections::BTreeSet;
use std::path::Path;

use godwit_types::{Fault, Hash};

use super::LocalSite;
use crate::SiteReport;

/// Damaged substrates that a report names, and characters that it says of each.
const MOST_DAMAGED: usize = 64;
const DAMAGE_CHARS: usize = 400;

impl LocalSite {
    /// Resources and holdings at this moment.
    pub(super) async fn report(&self) -> Result<SiteReport, Fault> {
        let (memory_mib, memory_free_mib) = memory()?;
        let images: BTreeSet<_> =
            // Damaged ones, too: asked for one, the site says what is wrong with it.
            self.parts.images.list().await?.into_iter().filter(|i| i.bytes > 0).map(|i| i.name).collect();
        let machines = self.parts.machines.list(&self.parts.room).await;
        let vms = machines.iter().filter(|m| m.state == godwit_types::VmState::Running).count();
        self.parts.substrates.forget_parts().await?;
        let held = self.parts.substrates.list().await?;
        let told = postcard::to_stdvec(&held)
            .map_err(|e| Fault::internal(format!("encoding the substrates: {e}")))?;
        let kvm = self.parts.launcher.has_kvm();
        Ok(SiteReport {
            version: env!("CARGO_PKG_VERSION").into(),
            accel: if kvm { "kvm" } else { "tcg" }.into(),
            qemu: self.parts.launcher.qemu.clone(),
            cpus: std::thread::available_parallelism()
                .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
            memory_mib,
            memory_free_mib,
            ram_files_free_mib: (free_mib(&self.parts.dirs.memory)?
                + ((self.parts.substrates.pool.sealed_bytes().1
                    + self.parts.machines.visits.bytes())
                    >> 20))
                .saturating_sub(promised_mib(&self.parts.dirs.memory)?),
            disk_free_mib: free_mib(&self.parts.dirs.data)?,
            load: load()?,
            vms: u32::try_from(vms).unwrap_or(u32::MAX),
            substrates: held.iter().map(|s| s.id).collect(),
            holdings: Some(Hash::of(&told)),
            machines: crate::digest(&machines),
            damaged: self.parts.substrates.pool.damaged(MOST_DAMAGED, DAMAGE_CHARS),
            images,
            rtt_ms: None,
            memory_promised_mib: self.parts.machines.promised_mib(None).await,
            memory_promise_mib: self.parts.machines.promise_limit_mib()?,
        })
    }
}

fn read(path: &str) -> Result<String, Fault> {
    std::fs::read_to_string(path).map_err(|e| Fault::internal(format!("reading {path}: {e}")))
}

/// Memory of the host, all and available, in MiB.
fn memory() -> Result<(u64, u64), Fault> {
    let text = read("/proc/meminfo")?;
    let field = |name: &str| {
        text.lines()
            .find_map(|l| {
                l.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
            })
            .map(|kib| kib >> 10)
            .ok_or_else(|| Fault::internal(format!("/proc/meminfo has no {name}")))
    };
    Ok((field("MemTotal:")?, field("MemAvailable:")?))
}

fn load() -> Result<f64, Fault> {
    let text = read("/proc/loadavg")?;
    Ok(text.split_whitespace().next().and_then(|w| w.parse().ok()).unwrap_or(0.0))
}

pub(super) fn free_mib(path: &Path) -> Result<u64, Fault> {
    let s = rustix::fs::statvfs(path)
        .map_err(|e| Fault::internal(format!("asking for the room at {}: {e}", path.display())))?;
    Ok((s.f_bavail.saturating_mul(s.f_frsize)) >> 20)
}

/// Memory that is left to the host beside guests, in MiB.
const HOST_RESERVE_MIB: u64 = 512;

/// Memory of the host that its machines may be promised, in MiB.
pub(super) fn machines_mib() -> Result<u64, Fault> {
    Ok(memory()?.0.saturating_sub(HOST_RESERVE_MIB))
}

/// MiB that guest memory may still take: what tmpfs has left, and no more than the host's free
/// memory less a reserve, for tmpfs promises more than there is; less what the machines that are
/// here may still touch.
pub(super) fn ram_room_mib(ram: &Path) -> Result<u64, Fault> {
    let left = free_mib(ram)?.min(memory()?.1.saturating_sub(HOST_RESERVE_MIB));
    Ok(left.saturating_sub(promised_mib(ram)?))
}

/// MiB of the memory files in `ram` that their machines have not touched yet. A machine that finds
/// no room for a page of its own memory is killed.
fn promised_mib(ram: &Path) -> Result<u64, Fault> {
    use std::os::unix::fs::MetadataExt;
    let files = std::fs::read_dir(ram)
        .map_err(|e| Fault::internal(format!("reading {}: {e}", ram.display())))?;
    let untouched = files.flatten().filter_map(|f| {
        // One that goes away meanwhile promises nothing.
        let meta = f.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some(meta.len().saturating_sub(meta.blocks() * 512))
    });
    Ok(untouched.sum::<u64>() >> 20)
}

/// Refuses a place for guest memory that is not on tmpfs: post-copy needs it there.
pub(super) fn check_tmpfs(dir: &Path) -> Result<(), Fault> {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let s = rustix::fs::statfs(dir)
        .map_err(|e| Fault::internal(format!("asking what {} is on: {e}", dir.display())))?;
    if s.f_type as i64 == TMPFS_MAGIC {
        return Ok(());
    }
    Err(Fault::invalid(format!(
        "guest memory cannot be kept in {}: it is not tmpfs",
        dir.display()
    ))
    .hint("name a place on tmpfs, such as one in /dev/shm: --ram DIR"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_machines_have_not_touched_is_promised() {
        let dir = tempfile::tempdir().expect("dir");
        assert_eq!(promised_mib(dir.path()).expect("empty"), 0);
        let file = std::fs::File::create(dir.path().join("ram")).expect("a file");
        file.set_len(64 << 20).expect("sized");
        std::fs::create_dir(dir.path().join("substrates")).expect("dir");
        assert_eq!(promised_mib(dir.path()).expect("sparse"), 64);
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; 16 << 20], 0).expect("touched");
        assert_eq!(promised_mib(dir.path()).expect("touched"), 48);
    }
}
