//! What the machines of a site may still come to need. A clone maps its parent's memory and takes a
//! page of its own for each that it writes to, and QEMU gives none of them back while it runs: so
//! every machine that runs is promised all of its memory from the first, beside what its QEMU takes.
//!
//! A site promises no more than its host has, unless its operator says otherwise: then no machine is
//! ever killed for another's sake. Who knows that clones stay small promises more.

use godwit_types::{Code, Fault, Mib, VmId};

use super::report;
use super::table::Machines;

/// What one machine costs beside its guest memory, in MiB: the QEMU process under TCG.
pub const MACHINE_OVERHEAD_MIB: u64 = 64;

/// What a machine with `memory` is promised, in MiB.
pub(super) fn share_mib(memory: Mib) -> u64 {
    u64::from(memory.0) + MACHINE_OVERHEAD_MIB
}

impl Machines {
    /// Memory that is promised to the machines of this site but for `not`, and that the sealed
    /// memory takes that they map, in MiB.
    pub(super) async fn promised_mib(&self, not: Option<VmId>) -> u64 {
        let all = self.all().await.into_iter().map(|owner| owner.now());
        let machines = all.filter(|e| Some(e.record.vm) != not && e.takes_memory());
        let machines = machines.map(|e| e.record.memory);
        let machines: u64 = machines.map(share_mib).sum();
        let (sealed, idle) = self.pool.sealed_bytes();
        machines + (sealed.saturating_sub(idle) >> 20)
    }

    /// How much may be promised in all, in MiB.
    pub(super) fn promise_limit_mib(&self) -> Result<u64, Fault> {
        match self.promise_bytes {
            Some(bytes) => Ok(bytes >> 20),
            None => report::machines_mib(),
        }
    }

    /// Refuses to promise a machine of `memory`, `vm`, what others are promised.
    pub(super) async fn check_promise(&self, vm: VmId, memory: Mib) -> Result<(), Fault> {
        let (promised, limit) = (self.promised_mib(Some(vm)).await, self.promise_limit_mib()?);
        let wanted = share_mib(memory);
        if promised + wanted <= limit {
            return Ok(());
        }
        Err(Fault::new(
            Code::NoRoom,
            format!(
                "site '{}' has promised {promised} MiB of memory to its machines, of {limit}; \
                 {wanted} more are needed",
                self.site
            ),
        )
        .hint(
            "stop a machine there, choose another site with --site, or have its daemon promise \
             more than there is: --memory-promise SIZE",
        ))
    }
}
