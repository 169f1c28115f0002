//! What the machines of a site may still come to need. A clone maps its parent's memory and takes a
//! page of its own for each that it writes to, and QEMU gives none of them back while it runs: so
//! every machine that runs is promised all of its memory from the first, beside what its QEMU takes.
//!
//! A site promises no more than its host has, unless its operator says otherwise: then no machine is
//! ever killed for another's sake. Who knows that clones stay small promises more.

use std::sync::Arc;

use godwit_qemu::{Machine, MemorySource};
use godwit_substrate::{OpenMemory, Pool};
use godwit_types::{Code, Fault, Generation, Mib, SubstrateId, VmId};

use super::faults::into_fault;
use super::record::MachineRecord;
use super::report;
use super::table::Machines;
use super::visits::{Lent, Under};

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

    /// Bytes that may be kept of machines that have left, beside what all are promised but `not`.
    async fn room_for_visits(&self, not: Option<VmId>) -> u64 {
        match self.promise_limit_mib() {
            Ok(limit) => limit.saturating_sub(self.promised_mib(not).await) << 20,
            Err(error) => {
                tracing::warn!(%error, "no memory is kept of a machine that has left");
                0
            }
        }
    }

    /// Keeps the memory of a machine that has left and whose QEMU has ended, where no promise needs
    /// the room.
    pub(super) async fn keep_visit(&self, vm: VmId, generation: Generation) {
        if self.visits.has_left(vm, generation) {
            let _one = self.promising().await;
            let room = self.room_for_visits(Some(vm)).await;
            let (visits, ram) = (Arc::clone(&self.visits), self.dirs.vm_memory(vm));
            let keep = move || visits.keep((vm, generation), &ram, room);
            let _ = tokio::task::spawn_blocking(keep).await;
        }
    }

    /// As [`Machines::keep_visit`], of a machine that left for that generation, if it shares a
    /// substrate's memory; its QEMU is there yet.
    pub(super) async fn keep_own_visit(
        &self,
        record: &MachineRecord,
        generation: Generation,
        machine: &Machine,
    ) {
        let of = (record.vm, generation);
        let shares = matches!(machine.launch().memory, MemorySource::PrivateOf { .. });
        if !shares || !self.visits.has_left(of.0, of.1) {
            return;
        }
        let under = async {
            let id = record.substrate?;
            let substrate =
                self.pool.run("seeing a substrate", move |pool| pool.get(id)).await.ok()?;
            Some((substrate.id, substrate.content()))
        };
        let under = under.await;
        let _one = self.promising().await;
        // Its own pages are there twice for a moment, and take pages that memory files have not touched.
        let promised = self.room_for_visits(None).await;
        let untouched = report::ram_room_mib(&self.dirs.memory).unwrap_or(0) << 20;
        let room = promised.min(untouched.saturating_add(self.visits.bytes()));
        match machine.memory() {
            Ok(memory) => {
                let visits = Arc::clone(&self.visits);
                let keep = move || visits.keep_own(of, (&memory, under), room);
                let _ = tokio::task::spawn_blocking(keep).await;
            }
            Err(error) => tracing::warn!(vm = %of.0, %error, "its own pages are not kept"),
        }
    }

    /// What was kept of a machine that comes back, for its relay, with the sealed memory under it. Where
    /// that cannot be had only the rest of the machine's memory is sent once more.
    pub(super) async fn lend_visit(&self, record: &MachineRecord) -> Option<Lent> {
        let (mut lent, under) = self.visits.lend(record.vm)?;
        if let Some(under) = under {
            let vm = record.vm;
            match self.open_under(under, record.memory).await {
                Ok(memory) => lent.under = Some(memory),
                Err(error) => {
                    tracing::info!(%vm, %error, "only its own pages are known of its visit")
                }
            }
        }
        Some(lent)
    }

    /// Opens sealed memory, made if need be, unless a machine needs the room: one of `memory` that
    /// comes, whose own is not touched yet, or one that is promised it.
    async fn open_under(&self, (id, content): Under, memory: Mib) -> Result<OpenMemory, Fault> {
        self.check_under(id, memory).await?;
        // No promise waits while it is laid out, which may be GiBs: what has been promised meanwhile
        // is seen after, and comes first. It is in use as long as it is open, so it counts then.
        let opening = move |pool: &Pool| pool.open_memory(id, content);
        let opened = self.pool.run("opening memory under a visit", opening).await;
        let opened = opened.map_err(into_fault)?;
        self.check_under(id, memory).await?;
        Ok(opened)
    }

    /// Refuses to open the sealed memory of a substrate where a machine needs the room.
    async fn check_under(&self, id: SubstrateId, memory: Mib) -> Result<(), Fault> {
        let _one = self.promising().await;
        let taking = move |pool: &Pool| pool.memory_to_open(id);
        let taken = self.pool.run("seeing what memory takes", taking).await;
        let (more_in_use, to_be_made) = taken.map_err(into_fault)?;
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let promised = self.promised_mib(None).await + mib(more_in_use);
        let room = report::ram_room_mib(&self.dirs.memory)?;
        if promised > self.promise_limit_mib()? || room < u64::from(memory.0) + mib(to_be_made) {
            return Err(Fault::new(Code::NoRoom, "no room for the memory of its substrate"));
        }
        Ok(())
    }

    /// Refuses to promise a machine of `memory`, `vm`, what others are promised.
    pub(super) async fn check_promise(&self, vm: VmId, memory: Mib) -> Result<(), Fault> {
        let (promised, limit) = (self.promised_mib(Some(vm)).await, self.promise_limit_mib()?);
        let wanted = share_mib(memory);
        if promised + wanted <= limit {
            // What is kept of machines that have left is not among that.
            self.visits.fit((limit - promised - wanted) << 20);
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
