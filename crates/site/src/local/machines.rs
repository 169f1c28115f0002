//! The machines of this host: started again, removed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::{Layer, Machine};
use godwit_transfer::Warrant;
use godwit_types::{Fault, Generation, VmId};
use tokio::sync::OwnedMutexGuard;

use super::LocalSite;
use super::allowed::{Action, First};
use super::record::DesiredState;
use crate::{Call, MachineStatus};

/// How often a boot is looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The file that a machine writes its disk to.
pub(super) const TOP: &str = "top.qcow2";

pub(super) fn into_fault<E: godwit_types::CodedError>(e: E) -> Fault {
    Fault::of(&e)
}

pub(super) fn join_error(e: tokio::task::JoinError) -> Fault {
    Fault::internal(format!("a job ended by a panic: {e}"))
}

impl LocalSite {
    /// Boots a machine that is off from its disk.
    pub(super) async fn restart(
        &self,
        vm: VmId,
        generation: Generation,
        warrant: Warrant,
        call: Call,
    ) -> Result<MachineStatus, Fault> {
        self.warrants.check(vm, generation, &warrant)?;
        let (mut e, first) = self.admit(vm, generation, Action::Start).await?;
        if first == First::Arrival {
            self.moves.arrivals.end_arrival(&mut e, true).await?;
        }
        if let Some(m) = e.machine.clone() {
            let life = m.life().await.map_err(into_fault)?;
            let _ = e.state(&self.name).asked(Some(life)).allows(Action::Start)?;
            m.quit().await.map_err(into_fault)?;
            e.machine = None;
        }
        e.record.generation = generation;
        e.record.warrant = Some(warrant);
        {
            let _one = match self.machines.promise(vm, e.record.memory).await {
                Ok(one) => one,
                Err(f) => {
                    // It stays stopped, at the generation at which it was asked.
                    e.record.save(&self.dirs.vm(vm))?;
                    return Err(f);
                }
            };
            e.record.desired = DesiredState::Running;
            e.record.reason = None;
            e.record.unfinished = None;
            e.record.save(&self.dirs.vm(vm))?;
        }
        let image = self.images.sound(&e.record).await?;
        // One that did not answer when this daemon came.
        self.end_strays(vm).await;
        let wanted = e.doing.start();
        let record = e.record.clone();
        // Not held while the guest boots: whoever looks at it need not wait.
        let entry = Arc::clone(OwnedMutexGuard::mutex(&e));
        drop(e);
        match self.starts.boot(&entry, &record, &image, &call, &wanted).await {
            Ok(()) => self.starts.started(&entry, &wanted).await,
            Err(f) => {
                let mut e = entry.lock().await;
                if e.doing.end_start(&wanted) {
                    e.record.reason = Some(f.message.clone());
                    e.record.save(&self.dirs.vm(vm))?;
                }
                Err(f)
            }
        }
    }

    /// Ends a machine and removes what it has; its generation is kept as a tombstone.
    pub(super) async fn remove(&self, vm: VmId, generation: Generation) -> Result<(), Fault> {
        self.machines.visits.forget(vm);
        self.end_machine(vm, generation, false).await
    }

    /// As [`LocalSite::remove`], of one that has left: its memory may be kept.
    pub(super) async fn remove_left(&self, vm: VmId, generation: Generation) -> Result<(), Fault> {
        self.end_machine(vm, generation, true).await
    }

    async fn end_machine(&self, vm: VmId, generation: Generation, keep: bool) -> Result<(), Fault> {
        let Some((mut e, first)) = self.admit_if_here(vm, generation, Action::Delete).await? else {
            return self.machines.remove_again(vm, generation);
        };
        if e.record.desired == DesiredState::Gone {
            return self.machines.remove_again(vm, generation);
        }
        if first == First::Start {
            e.doing.cancel_start();
        }
        if let Some(m) = e.machine.take() {
            if keep {
                self.machines.keep_own_visit((vm, generation), &m).await;
            }
            m.kill().await;
        }
        self.end_strays(vm).await;
        e.record.generation = generation;
        if keep {
            self.machines.keep_visit(vm, generation).await;
        }
        self.machines.bury(&mut e).await
    }
}

/// Bytes on the disk of what a machine has above its base image.
pub(super) fn layer_bytes(machine: &Machine) -> Result<u64, Fault> {
    use std::os::unix::fs::MetadataExt;
    let Some(chain) = machine.launch().disk else { return Ok(0) };
    let layers = chain.layers.iter().filter_map(|l| match &l.layer {
        Layer::Qcow2 { path } => Some(path),
        Layer::Raw { .. } | Layer::Nbd { .. } => None,
    });
    layers.chain([&chain.top]).try_fold(0, |sum, path| {
        let meta = std::fs::metadata(path).map_err(|e| Fault::io("reading", path, &e))?;
        Ok(sum + meta.blocks() * 512)
    })
}

pub(super) fn remove_file(path: &Path) -> Result<(), Fault> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Fault::internal(format!("removing {}: {e}", path.display())))
        }
        _ => Ok(()),
    }
}
