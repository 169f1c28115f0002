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
//! A docking that panics leaves its mark, too. Whoever awaits it then does what the next daemon
//! would: finishes it when its substrate is in the pool, and lets the machine run on when not.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::{Life, Machine, Nic};
use godwit_substrate::{DockRequest, DockStop, SubstrateError, dock_convert, run_on};
use godwit_types::{Fault, Generation, Name, SubstrateId, SubstrateKind, VmId, chain};
use tokio::sync::OwnedMutexGuard;

use super::allowed::Action;
use super::images::Images;
use super::machines::{into_fault, join_error};
use super::moving::Parts;
use super::record::{DesiredState, Unfinished};
use super::substrates::{Substrates, info};
use super::table::Machines;
use super::{Entry, SiteDirs};
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

/// A machine whose record says that it is being docked.
#[must_use = "a machine that is marked as being docked is settled, undone or left to be brought back"]
struct Marked {
    entry: OwnedMutexGuard<Entry>,
    dir: PathBuf,
}

impl Marked {
    /// Writes down that the machine is being docked, as what, and with which NICs.
    fn new(
        mut entry: OwnedMutexGuard<Entry>,
        dir: PathBuf,
        substrate: SubstrateId,
        nics: Vec<Nic>,
    ) -> Result<Self, Fault> {
        entry.record.unfinished = Some(Unfinished::Docking { substrate, nics });
        if let Err(f) = entry.record.save(&dir) {
            entry.record.unfinished = None;
            return Err(f);
        }
        Ok(Self { entry, dir })
    }

    /// It was not docked and runs on.
    fn undone(mut self) {
        self.entry.record.unfinished = None;
        if let Err(f) = self.entry.record.save(&self.dir) {
            // The next daemon lets it run on once more, which changes nothing.
            tracing::warn!(vm = %self.entry.record.name, error = %f, "not written that it runs on");
        }
    }

    /// It was not docked and does not run on yet: the mark stays until it does.
    fn left(self) {}

    /// It has ended, and is its substrate now: what is left of it goes.
    async fn settled(mut self, site: &Docks, generation: Generation) {
        let e = &mut *self.entry;
        let vm = e.record.vm;
        e.record.generation = generation;
        site.machines.visits.forget(vm);
        if let Err(error) = site.machines.bury(e).await {
            tracing::error!(%error, "what is left of a docked machine goes when this site starts next");
            e.record.desired = DesiredState::Gone;
            site.machines.delist(vm).await;
        }
        // Whoever finds the mark after a panic finds the machine with it.
        e.machine = None;
        site.substrates.pool.forget_clone(vm);
    }
}

/// The dockings of one site.
pub(super) struct Docks {
    dirs: SiteDirs,
    images: Arc<Images>,
    machines: Arc<Machines>,
    substrates: Arc<Substrates>,
}

impl Docks {
    /// None yet.
    pub(super) fn new(parts: &Parts) -> Self {
        Self {
            dirs: parts.dirs.clone(),
            images: Arc::clone(&parts.images),
            machines: Arc::clone(&parts.machines),
            substrates: Arc::clone(&parts.substrates),
        }
    }

    /// Turns a machine into a substrate. The machine runs on when that fails.
    pub(super) async fn dock(
        self: &Arc<Self>,
        want: Dock,
        call: Call,
    ) -> Result<SubstrateInfo, Fault> {
        // On a task of its own: it must come to its end when the caller goes away.
        let site = Arc::clone(self);
        let awaited = async move {
            let (vm, substrate, me) = (want.vm, want.substrate, Arc::clone(&site));
            let docking = tokio::spawn(async move { me.dock_here(want, call).await });
            match docking.await {
                Ok(done) => done,
                Err(panic) => {
                    let fault = join_error(panic);
                    tracing::error!(%vm, error = %fault, "a docking broke off");
                    site.after_panic(vm, substrate).await;
                    Err(fault)
                }
            }
        };
        tokio::spawn(awaited).await.map_err(join_error)?
    }

    /// The docking of a machine panicked: if that was between its marks, it is finished or taken
    /// back.
    async fn after_panic(self: &Arc<Self>, vm: VmId, substrate: SubstrateId) {
        let Some(entry) = self.machines.entry_if_here(vm).await else { return };
        let e = entry.lock().await;
        let marked = is_docking(e.record.unfinished.as_ref(), substrate);
        if let Some(machine) = e.machine.clone().filter(|_| marked) {
            self.bring_back(vm, machine);
        }
    }

    async fn dock_here(self: &Arc<Self>, want: Dock, call: Call) -> Result<SubstrateInfo, Fault> {
        let (entry, _) = self.machines.admit(want.vm, want.generation, Action::Dock).await?;
        let machine = entry.machine.clone().ok_or_else(|| self.machines.not_here(want.vm))?;
        // What the guest has read from a damaged base or layer is in its memory, too.
        let image = self.substrates.sound_disk(&self.images, &entry.record).await?;
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
        let (dir, nics) = (self.dirs.vm(want.vm), machine.launch().nics);
        let marked = Marked::new(entry, dir, want.substrate, nics)?;
        godwit_hold::at("dock.marked").await;
        let docked = {
            let docking = dock_convert(&machine, &self.substrates.pool, request);
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
                self.substrates.make_ready(substrate.id, image);
                marked.settled(self, want.generation).await;
                Ok(info(&substrate, Some(report)))
            }
            Err(error @ SubstrateError::NotRunningOn { .. }) => {
                marked.left();
                self.bring_back(want.vm, machine);
                Err(into_fault(error))
            }
            Err(error) => {
                marked.undone();
                Err(into_fault(error))
            }
        }
    }

    /// Lets a machine run on whose docking broke off, in the background; until it does, it is being
    /// docked by its state.
    pub(super) fn bring_back(self: &Arc<Self>, vm: VmId, machine: Machine) {
        let me = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                let (site, machine) = (Arc::clone(&me), machine.clone());
                let back = tokio::spawn(async move { site.bring_back_now(vm, machine).await });
                match back.await {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => {
                        tracing::error!(%vm, %error, "a machine that was not docked");
                        return;
                    }
                    Err(panic) => {
                        let error = join_error(panic);
                        tracing::error!(%vm, %error, "a machine is not brought back yet");
                        tokio::time::sleep(PANICKED_PAUSE).await;
                    }
                }
            }
        });
    }

    async fn bring_back_now(&self, vm: VmId, machine: Machine) -> Result<(), Fault> {
        let entry = self.machines.entry(vm).await?;
        let Some(Unfinished::Docking { nics, substrate }) =
            entry.lock().await.record.unfinished.clone()
        else {
            return Ok(());
        };
        if self.substrates.has(substrate) {
            // Its docking ended behind the commit without a word.
            let entry = entry.lock_owned().await;
            // The mark stays until the machine is buried: after a panic this is tried again.
            if entry.record.desired == DesiredState::Gone
                || !is_docking(entry.record.unfinished.as_ref(), substrate)
            {
                return Ok(());
            }
            let generation = entry.record.generation;
            machine.kill().await;
            godwit_hold::at("dock.finishing").await;
            Marked { entry, dir: self.dirs.vm(vm) }.settled(self, generation).await;
            return Ok(());
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
        let mut e = entry.lock().await;
        // Whoever ended it meanwhile has settled what it is.
        if e.record.desired == DesiredState::Gone
            || !take_docking(&mut e.record.unfinished, substrate)
        {
            return Ok(());
        }
        match &ended {
            None => tracing::info!(vm = %e.record.name, "runs on: it was not docked"),
            Some(why) => {
                tracing::error!(vm = %e.record.name, %why, "ended while it was brought back");
                let words = format!("it ended while it was brought back from a docking: {why}");
                e.record.reason = Some(words);
            }
        }
        e.record.save(&self.dirs.vm(vm))
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
