//! The machines of this host: started again, removed.

use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::{Layer, Machine};
use godwit_transfer::Warrant;
use godwit_types::{Fault, Generation, VmId};
use tokio_util::sync::CancellationToken;

use super::LocalSite;
use super::adopt::end_strays;
use super::allowed::{Action, First};
use super::entry::Entry;
use super::faults::into_fault;
use super::owner::{Ask, Needs, Owned, Owner};
use super::parts::Parts;
use super::record::{DesiredState, MachineRecord};
use super::steps::end_arrival;
use super::travellers::Found;
use crate::{Call, MachineStatus};

/// How often a boot is looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(250);

impl LocalSite {
    /// Boots a machine that is off from its disk.
    pub(super) async fn restart(
        &self,
        vm: VmId,
        generation: Generation,
        warrant: Warrant,
        call: Call,
    ) -> Result<MachineStatus, Fault> {
        self.parts.warrants.check(vm, generation, &warrant)?;
        let owner = self.parts.machines.owner(vm).await?;
        let parts = Arc::clone(&self.parts);
        let (record, wanted) =
            self.ask_out_of_move(&owner, Start { parts, generation, warrant }).await?;
        match self.starts.boot_again(&owner, &record, &call, &wanted).await {
            Ok(()) => self.starts.started(&owner, &wanted).await,
            Err(f) => {
                owner.ask(StartFailed { wanted, why: f.message.clone() }).await?;
                Err(f)
            }
        }
    }

    /// Ends a machine and removes what it has; its generation is kept as a tombstone.
    pub(super) async fn remove(&self, vm: VmId, generation: Generation) -> Result<(), Fault> {
        self.parts.machines.visits.forget(vm);
        let ended = self.end_machine(vm, generation, false).await;
        // Whoever removed it before may have kept something meanwhile.
        self.parts.machines.visits.forget(vm);
        ended
    }

    /// As [`LocalSite::remove`], of one that has left: its memory may be kept.
    pub(super) async fn remove_left(&self, vm: VmId, generation: Generation) -> Result<(), Fault> {
        self.end_machine(vm, generation, true).await
    }

    async fn end_machine(&self, vm: VmId, generation: Generation, keep: bool) -> Result<(), Fault> {
        let machines = &self.parts.machines;
        let Some(owner) = machines.owner_if_here(vm).await else {
            return machines.remove_again(vm, generation);
        };
        let parts = Arc::clone(&self.parts);
        self.ask_out_of_move(&owner, Delete { parts, generation, keep }).await
    }

    /// Asks what may have to wait for the end of a move, and ends that then.
    pub(super) async fn ask_out_of_move<T: Send + 'static>(
        &self,
        owner: &Owner,
        ask: impl Ask<Reply = OutOfMove<T>> + Clone,
    ) -> Result<T, Fault> {
        loop {
            match owner.ask(ask.clone()).await? {
                OutOfMove::Done(done) => return Ok(done),
                OutOfMove::MoveFirst(found) => {
                    let (record, machine) = *found;
                    self.moves.quit(record, machine).await?;
                }
            }
        }
    }
}

/// What comes of something that is not done to a machine in a move.
pub(super) enum OutOfMove<T> {
    /// It was done.
    Done(T),
    /// The move of this machine has to end before.
    MoveFirst(Box<Found>),
}

impl<T> OutOfMove<T> {
    /// That the move of `e` has to end before.
    pub(super) fn move_first(e: &Entry) -> Self {
        Self::MoveFirst(Box::new((e.record.clone(), e.machine.clone())))
    }
}

/// A machine is to be booted from its disk: it starts from then on. Gives its record, and what is
/// cancelled once its start is not wanted any more.
#[derive(Clone)]
struct Start {
    parts: Arc<Parts>,
    generation: Generation,
    warrant: Warrant,
}

impl Ask for Start {
    type Reply = OutOfMove<(MachineRecord, CancellationToken)>;
    const STEP: &'static str = "owner.start";

    fn needs(&self) -> Option<Needs> {
        Some(Needs::known(Action::Start, self.generation))
    }

    async fn answer(self, e: &mut Owned, first: First) -> Result<Self::Reply, Fault> {
        let Self { parts, generation, warrant } = self;
        match first {
            First::Move => return Ok(OutOfMove::move_first(e)),
            First::Arrival => end_arrival(&parts, e, true).await?,
            First::Nothing | First::Start | First::Docking => {}
        }
        if let Some(m) = e.machine.clone() {
            let life = m.life().await.map_err(into_fault)?;
            let _ = e.state(&parts.name).asked(Some(life)).allows(Action::Start)?;
            m.quit().await.map_err(into_fault)?;
            e.machine = None;
        }
        e.record.generation = generation;
        e.record.warrant = Some(warrant);
        let vm = e.record.vm;
        let one = match parts.machines.promise(vm, e.record.memory).await {
            Ok(one) => one,
            Err(f) => {
                // It stays stopped, at the generation at which it was asked.
                e.save()?;
                return Err(f);
            }
        };
        e.record.desired = DesiredState::Running;
        e.record.reason = None;
        e.record.unfinished = None;
        e.save()?;
        let wanted = e.doing.start();
        // Its memory counts from here on.
        e.publish();
        drop(one);
        // One that did not answer when this daemon came.
        end_strays(&parts.dirs, vm).await;
        Ok(OutOfMove::Done((e.record.clone(), wanted)))
    }
}

/// A start has failed.
struct StartFailed {
    wanted: CancellationToken,
    why: String,
}

impl Ask for StartFailed {
    type Reply = ();
    const STEP: &'static str = "owner.start-failed";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        if e.doing.end_start(&self.wanted) {
            e.record.reason = Some(self.why);
            e.save()?;
        }
        Ok(())
    }
}

/// A machine is to be ended, and all that it has removed.
#[derive(Clone)]
struct Delete {
    parts: Arc<Parts>,
    generation: Generation,
    /// It has left: its memory may be kept.
    keep: bool,
}

impl Ask for Delete {
    type Reply = OutOfMove<()>;
    const STEP: &'static str = "owner.delete";

    fn needs(&self) -> Option<Needs> {
        Some(Needs::known(Action::Delete, self.generation))
    }

    async fn answer(self, e: &mut Owned, first: First) -> Result<OutOfMove<()>, Fault> {
        let Self { parts, generation, keep } = self;
        let (vm, desired) = (e.record.vm, e.record.desired);
        // One without a tombstone is there yet: to remove it broke off.
        if desired == DesiredState::Gone && parts.machines.left(vm).is_some() {
            return parts.machines.remove_again(vm, generation).map(OutOfMove::Done);
        }
        match first {
            First::Move => return Ok(OutOfMove::move_first(e)),
            First::Start => e.doing.cancel_start(),
            First::Nothing | First::Arrival | First::Docking => {}
        }
        // Nobody who looks meanwhile takes it for one that failed.
        e.record.desired = DesiredState::Gone;
        e.publish();
        if let Some(m) = e.machine.take() {
            if keep {
                parts.machines.keep_own_visit(&e.record, generation, &m).await;
            }
            m.kill().await;
        }
        end_strays(&parts.dirs, vm).await;
        e.record.generation = generation;
        if keep {
            parts.machines.keep_visit(vm, generation).await;
        }
        if let Err(f) = parts.machines.bury(e).await {
            e.record.desired = desired;
            return Err(f);
        }
        Ok(OutOfMove::Done(()))
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
