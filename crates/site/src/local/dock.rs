//! A machine of this site becomes a substrate. What has begun stands in its record first, and each
//! way on consumes what says so ([`Marked`]).
//!
//! ```text
//! Marked --> settled: the machine has ended, its substrate is in the pool
//!    |  \-> undone: it runs on, and the mark is gone
//!    v
//! left, when it does not run on yet: it is brought back in the background, or by the next daemon
//! ```
//!
//! Its owner answers others meanwhile; what would change the machine waits for the end. A docking that
//! ends in another way, by a panic too, leaves its mark. What the next daemon would do is done then:
//! it is finished when its substrate is in the pool, and the machine is let run on when not.

use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::{Life, Machine, Nic};
use godwit_substrate::{DockRequest, DockStop, SubstrateError, dock_convert, run_on};
use godwit_types::{Code, Fault, Generation, Name, SubstrateId, SubstrateKind, VmId, chain};

use super::allowed::{Action, First, Refusal};
use super::faults::{into_fault, join_error};
use super::net::tell_guest;
use super::owner::{Ask, Look, Needs, Owned, Owner};
use super::parts::Parts;
use super::record::{DesiredState, Unfinished};
use super::substrates::info;
use crate::{Call, Progress, SubstrateInfo};

/// The pause between two tries to let a machine run on.
const RUN_ON_AGAIN: Duration = Duration::from_secs(1);

/// The pause after one that ended by a panic, and most probably will again. Tests make one panic.
const PANICKED_PAUSE: Duration = Duration::from_secs(if cfg!(debug_assertions) { 1 } else { 60 });

/// A substrate to be docked.
pub(super) struct Dock {
    pub(super) vm: VmId,
    pub(super) generation: Generation,
    pub(super) substrate: SubstrateId,
    pub(super) name: Name,
    pub(super) kind: SubstrateKind,
    pub(super) owner: Name,
}

/// A machine whose record says that it is being docked. Dropped, it is brought back.
#[must_use = "a machine that is marked as being docked is settled, undone or left to be brought back"]
struct Marked {
    docks: Arc<Docks>,
    owner: Owner,
    substrate: SubstrateId,
    /// Whether the mark is gone.
    over: bool,
}

impl Marked {
    /// Writes down that the machine is being docked, and as what.
    async fn new(docks: Arc<Docks>, owner: &Owner, mark: Mark) -> Result<(Self, Machine), Fault> {
        let (owner, substrate) = (owner.clone(), mark.substrate);
        let mut marked = Self { docks, owner, substrate, over: false };
        match marked.owner.ask(mark).await {
            Ok(machine) => Ok((marked, machine)),
            Err(f) => {
                // One that broke off may have left its mark.
                marked.over = f.code != Code::Internal;
                Err(f)
            }
        }
    }

    /// It was not docked and runs on.
    async fn undone(mut self) {
        let undone = Undone { substrate: self.substrate, ended: None };
        self.over = self.owner.ask(undone).await.is_ok();
    }

    /// It was not docked and does not run on yet: the mark stays until it does.
    fn left(self) {}

    /// It has ended, and is its substrate now: what is left of it goes.
    async fn settled(mut self, generation: Generation) {
        let (parts, substrate) = (Arc::clone(&self.docks.parts), self.substrate);
        self.over = self.owner.ask(Docked { parts, substrate, generation }).await.is_ok();
    }
}

impl Drop for Marked {
    fn drop(&mut self) {
        // Where the daemon ends the next one does it.
        if !self.over && tokio::runtime::Handle::try_current().is_ok() {
            self.docks.bring_back(self.owner.vm(), self.substrate);
        }
    }
}

/// A machine is to be docked: it is marked, with the NICs that it has. Gives its QEMU.
struct Mark {
    generation: Generation,
    substrate: SubstrateId,
    stop: DockStop,
}

impl Ask for Mark {
    type Reply = Machine;
    const STEP: &'static str = "owner.dock";

    fn needs(&self) -> Option<Needs> {
        Some(Needs::known(Action::Dock, self.generation))
    }

    async fn answer(self, e: &mut Owned, _: First) -> Result<Machine, Fault> {
        let Self { substrate, stop, .. } = self;
        let machine = e.machine.clone();
        let machine = machine.ok_or_else(|| Refusal::NotRunning(e.record.name.clone()))?;
        let nics = machine.launch().nics;
        e.record.unfinished = Some(Unfinished::Docking { substrate, nics });
        if let Err(f) = e.save() {
            e.record.unfinished = None;
            return Err(f);
        }
        e.doing.dock(stop);
        Ok(machine)
    }
}

/// A machine was not docked: it runs on, or has ended.
struct Undone {
    substrate: SubstrateId,
    /// Why it has ended.
    ended: Option<String>,
}

impl Ask for Undone {
    type Reply = ();
    const STEP: &'static str = "owner.undone";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        // Whoever ended it meanwhile has settled what it is.
        if e.record.desired == DesiredState::Gone
            || !take_docking(&mut e.record.unfinished, self.substrate)
        {
            return Ok(());
        }
        e.doing.end();
        if let Some(why) = self.ended {
            tracing::error!(vm = %e.record.name, %why, "ended while it was brought back");
            let words = format!("it ended while it was brought back from a docking: {why}");
            e.record.reason = Some(words);
        }
        if let Err(f) = e.save() {
            // The next daemon lets it run on once more, which changes nothing.
            tracing::warn!(vm = %e.record.name, error = %f, "not written that it was not docked");
        }
        Ok(())
    }
}

/// A docking has ended without having settled what its machine is: gives what is to be brought back.
struct BrokeOff {
    substrate: SubstrateId,
}

/// A machine whose docking broke off.
struct BroughtBack {
    machine: Machine,
    /// The NICs that it had.
    nics: Vec<Nic>,
    generation: Generation,
}

impl Ask for BrokeOff {
    type Reply = Option<BroughtBack>;
    const STEP: &'static str = "owner.dock-broke-off";

    async fn answer(self, e: &mut Owned, _: First) -> Result<Option<BroughtBack>, Fault> {
        let nics = match &e.record.unfinished {
            Some(Unfinished::Docking { substrate, nics }) if *substrate == self.substrate => {
                nics.clone()
            }
            _ => return Ok(None),
        };
        e.doing.end();
        if e.record.desired == DesiredState::Gone {
            return Ok(None);
        }
        let generation = e.record.generation;
        Ok(e.machine.clone().map(|machine| BroughtBack { machine, nics, generation }))
    }
}

/// A machine is its substrate now, and has ended.
struct Docked {
    parts: Arc<Parts>,
    substrate: SubstrateId,
    generation: Generation,
}

impl Ask for Docked {
    type Reply = ();
    const STEP: &'static str = "owner.docked";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        let Self { parts, substrate, generation } = self;
        // The mark stays until the machine is buried: after a panic this is tried again.
        if e.record.desired == DesiredState::Gone
            || !is_docking(e.record.unfinished.as_ref(), substrate)
        {
            return Ok(());
        }
        let vm = e.record.vm;
        e.record.generation = generation;
        parts.machines.visits.forget(vm);
        if let Err(error) = parts.machines.bury(e).await {
            tracing::error!(%error, "what is left of a docked machine goes when this site starts next");
            e.record.desired = DesiredState::Gone;
            parts.machines.delist(vm).await;
        }
        e.doing.end();
        // Whoever finds the mark after a panic finds the machine with it.
        e.machine = None;
        parts.substrates.pool.forget_clone(vm);
        Ok(())
    }
}

/// The dockings of one site.
pub(super) struct Docks {
    parts: Arc<Parts>,
}

impl Docks {
    /// None yet.
    pub(super) const fn new(parts: Arc<Parts>) -> Self {
        Self { parts }
    }

    /// Turns a machine into a substrate. The machine runs on when that fails.
    pub(super) async fn dock(
        self: &Arc<Self>,
        want: Dock,
        call: Call,
    ) -> Result<SubstrateInfo, Fault> {
        // On a task of its own: it must come to its end when the caller goes away.
        let (vm, me) = (want.vm, Arc::clone(self));
        let docking = tokio::spawn(async move { me.dock_here(want, call).await });
        docking.await.unwrap_or_else(|panic| {
            let fault = join_error(panic);
            tracing::error!(%vm, error = %fault, "a docking broke off");
            Err(fault)
        })
    }

    async fn dock_here(self: &Arc<Self>, want: Dock, call: Call) -> Result<SubstrateInfo, Fault> {
        let owner = self.parts.machines.owner(want.vm).await?;
        let needs = Some(Needs::known(Action::Dock, want.generation));
        let e = owner.ask(Look { needs }).await?;
        // What the guest has read from a damaged base or layer is in its memory, too.
        let image = self.parts.substrates.sound_disk(&self.parts.images, &e.record).await?;
        call.progress(Progress {
            stage: "dock".into(),
            note: "the guest is being quiesced, then its memory is stored".into(),
            ..Progress::default()
        });
        let request = DockRequest {
            id: want.substrate,
            name: want.name,
            kind: want.kind,
            owner: want.owner,
            image: image.clone(),
            stop: DockStop::default(),
        };
        let stop = request.stop.clone();
        let (vm, generation, substrate) = (want.vm, want.generation, want.substrate);
        let mark = Mark { generation, substrate, stop: stop.clone() };
        let (marked, machine) = Marked::new(Arc::clone(self), &owner, mark).await?;
        godwit_hold::at("dock.marked").await;
        let docked = {
            let docking = dock_convert(&machine, &self.parts.substrates.pool, request);
            tokio::pin!(docking);
            tokio::select! {
                docked = &mut docking => docked,
                () = call.cancel.cancelled() => {
                    // Comes to its end either way: undone, or docked when the commit came first.
                    stop.stop();
                    docking.await
                }
            }
        };
        match docked {
            Ok((substrate, report)) => {
                godwit_hold::at("dock.settling").await;
                self.parts.substrates.make_ready(substrate.id, image);
                marked.settled(generation).await;
                Ok(info(&substrate, Some(report)))
            }
            Err(error @ SubstrateError::NotRunningOn { .. }) => {
                // It is brought back.
                marked.left();
                Err(into_fault(error))
            }
            Err(error) => {
                let attachment = owner.now().record.attachment;
                if let Err(error) = tell_guest(&machine, attachment.as_ref(), None).await {
                    tracing::warn!(%vm, %error, "its guest does not know its network");
                }
                marked.undone().await;
                Err(into_fault(error))
            }
        }
    }

    /// Lets a machine run on whose docking broke off, or finishes that, in the background; until it
    /// does, it is being docked by its state.
    pub(super) fn bring_back(self: &Arc<Self>, vm: VmId, substrate: SubstrateId) {
        let me = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                let site = Arc::clone(&me);
                let back = tokio::spawn(async move { site.bring_back_now(vm, substrate).await });
                let broke_off = match back.await {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error,
                    Err(panic) => join_error(panic),
                };
                tracing::error!(%vm, error = %broke_off, "a machine is not brought back yet");
                if broke_off.code != Code::Internal {
                    return;
                }
                tokio::time::sleep(PANICKED_PAUSE).await;
            }
        });
    }

    async fn bring_back_now(&self, vm: VmId, substrate: SubstrateId) -> Result<(), Fault> {
        let owner = self.parts.machines.owner(vm).await?;
        let Some(BroughtBack { machine, nics, generation }) =
            owner.ask(BrokeOff { substrate }).await?
        else {
            return Ok(());
        };
        if self.parts.substrates.has(substrate).await {
            // Its docking ended behind the commit without a word.
            machine.kill().await;
            godwit_hold::at("dock.finishing").await;
            let parts = Arc::clone(&self.parts);
            return owner.ask(Docked { parts, substrate, generation }).await;
        }
        godwit_hold::at("dock.bring-back").await;
        let mut ended = None;
        loop {
            let Err(error) = run_on(&machine, &nics).await else { break };
            tracing::warn!(%vm, error = %chain(&error), "it was not docked and does not run on yet");
            let life = machine.life().await;
            if matches!(life, Ok(Life::Exited | Life::PoweredOff | Life::Broken)) {
                ended = Some(chain(&error));
                break;
            }
            tokio::time::sleep(RUN_ON_AGAIN).await;
        }
        if ended.is_none() {
            let attachment = owner.now().record.attachment;
            if let Err(error) = tell_guest(&machine, attachment.as_ref(), None).await {
                tracing::warn!(%vm, %error, "its guest does not know its network");
            }
            tracing::info!(%vm, "runs on: it was not docked");
        }
        owner.ask(Undone { substrate, ended }).await
    }
}

/// Ends the mark of one docking. That of another, which began once this one was settled by whoever
/// ended the machine, stays.
fn take_docking(unfinished: &mut Option<Unfinished>, of: SubstrateId) -> bool {
    is_docking(unfinished.as_ref(), of) && unfinished.take().is_some()
}

/// Whether a mark is of the docking that makes that substrate.
fn is_docking(unfinished: Option<&Unfinished>, of: SubstrateId) -> bool {
    matches!(unfinished, Some(Unfinished::Docking { substrate, .. }) if *substrate == of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_docking_that_is_taken_back_late_leaves_the_mark_of_the_next() {
        let (first, second) = (SubstrateId::new(), SubstrateId::new());
        let docking = |substrate| Some(Unfinished::Docking { substrate, nics: Vec::new() });
        let mut mark = docking(second);
        assert!(!take_docking(&mut mark, first));
        assert!(mark.is_some(), "what becomes of a crash in the second depends on it");
        assert!(take_docking(&mut mark, second) && mark.is_none());
        assert!(!take_docking(&mut mark, second));
        assert!(!take_docking(&mut Some(Unfinished::Activating), second));
    }
}
