//! What a machine that comes needs room for on this host.

use godwit_substrate::AsyncPool;
use godwit_types::{Code, Fault, Mib, Name};

use super::{SiteDirs, report};

/// Disk that a machine that comes leaves free, in MiB.
const DISK_MARGIN_MIB: u64 = 16;

/// The room of one site, for memory and for disks.
#[derive(Debug)]
pub(super) struct Room {
    site: Name,
    dirs: SiteDirs,
    pool: AsyncPool,
}

impl Room {
    /// Of the host with these directories; `pool` gives up memory that no machine maps.
    pub(super) const fn new(site: Name, dirs: SiteDirs, pool: AsyncPool) -> Self {
        Self { site, dirs, pool }
    }

    /// Refuses when a machine's RAM does not fit into what the host has left.
    pub(super) async fn check_memory(&self, memory: Mib) -> Result<(), Fault> {
        let mut free = report::ram_room_mib(&self.dirs.memory)?;
        if free < u64::from(memory.0) {
            // Memory that no machine maps is made again when it is needed.
            let lacking = (u64::from(memory.0) - free) << 20;
            let _ = self.pool.start(move |pool| pool.reclaim(lacking)).await;
            free = report::ram_room_mib(&self.dirs.memory)?;
        }
        if u64::from(memory.0) <= free {
            return Ok(());
        }
        Err(Fault::new(
            Code::NoRoom,
            format!(
                "site '{}' has room for {free} MiB of guest memory at {}; {} are needed",
                self.site,
                self.dirs.memory.display(),
                memory.0
            ),
        )
        .hint("stop a machine there, or choose another site with --site"))
    }

    /// Refuses when the disk has less than that left for a machine that comes.
    pub(super) fn check_disk(&self, bytes: u64) -> Result<(), Fault> {
        let needed = (bytes >> 20) + 1 + DISK_MARGIN_MIB;
        let free = report::free_mib(&self.dirs.data)?;
        if needed <= free {
            return Ok(());
        }
        Err(Fault::new(
            Code::NoRoom,
            format!(
                "site '{}' has {free} MiB of disk left at {}; {needed} are needed",
                self.site,
                self.dirs.data.display()
            ),
        ))
    }

    /// The same failure, or that this site has become full, which explains it.
    pub(super) fn blame(&self, f: Fault) -> Fault {
        for (what, dir) in [("guest memory", &self.dirs.memory), ("disks", &self.dirs.data)] {
            if report::free_mib(dir).is_ok_and(|free| free == 0) {
                let words = format!("no room left for {what} at {}", dir.display());
                let message = format!("site '{}' has {words}: {}", self.site, f.message);
                return super::advise(&self.site, Fault::new(Code::NoRoom, message));
            }
        }
        f
    }
}
