//! A machine is powered off. While its guest is waited for, and its QEMU ends, its owner answers
//! others: it can be looked at, and ended at once.

use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::{Life, Machine};
use godwit_types::{Fault, Generation, SubstrateId, VmId};

use super::LocalSite;
use super::adopt::end_strays;
use super::allowed::{Action, Activity, First};
use super::dirs::remove_file;
use super::faults::into_fault;
use super::machines::OutOfMove;
use super::owner::{Ask, Needs, Owned};
use super::parts::Parts;
use super::record::{DesiredState, Unfinished};
use crate::Call;
use crate::Progress;

/// How long a guest may take to power itself off before the power is cut.
const OFF_WITHIN: Duration = Duration::from_secs(40);

/// How long QEMU may take to end in good order, and how long when its end is forced.
const QUIT_WITHIN: Duration = Duration::from_secs(60);
const FORCE_WITHIN: Duration = Duration::from_secs(5);

impl LocalSite {
    /// Has a guest power itself off, or cuts its power: by `force`, when it does not in time, or when
    /// the call is cancelled.
    pub(super) async fn power_off(
        &self,
        vm: VmId,
        generation: Generation,
        force: bool,
        call: Call,
    ) -> Result<(), Fault> {
        let owner = self.parts.machines.owner(vm).await?;
        let parts = Arc::clone(&self.parts);
        let asked = PowerOff { parts: Arc::clone(&parts), generation, force };
        // For as long as it is waited here.
        let (machine, _waits) = self.ask_out_of_move(&owner, asked).await?;
        if let Some(machine) = &machine {
            if !force {
                ask_guest(machine, &call).await;
            }
            if !owner.ask(StillOff { machine: Some(machine.clone()) }).await? {
                return Ok(());
            }
            let within = if force { FORCE_WITHIN } else { QUIT_WITHIN };
            // One whose main loop hangs answers nobody.
            match tokio::time::timeout(within, machine.quit()).await {
                Ok(ended) => drop(ended.map_err(into_fault)?),
                Err(_) => drop(machine.kill().await),
            }
        }
        owner.ask(PoweredOff { parts, machine }).await
    }
}

/// A machine is to be off: gives its QEMU, and what is held by whoever waits until it is.
#[derive(Clone)]
struct PowerOff {
    parts: Arc<Parts>,
    generation: Generation,
    force: bool,
}

impl Ask for PowerOff {
    type Reply = OutOfMove<(Option<Machine>, Arc<()>)>;
    const STEP: &'static str = "owner.power-off";

    fn needs(&self) -> Option<Needs> {
        let action = if self.force { Action::ForceStop } else { Action::Stop };
        Some(Needs::known(action, self.generation))
    }

    async fn answer(self, e: &mut Owned, first: First) -> Result<Self::Reply, Fault> {
        match first {
            First::Move => return Ok(OutOfMove::move_first(e)),
            First::Start => e.doing.cancel_start(),
            First::Nothing | First::Arrival | First::Docking => {}
        }
        e.record.generation = self.generation;
        if let Some(Unfinished::Docking { substrate, .. }) = e.record.unfinished
            && self.parts.substrates.has(substrate).await
        {
            return Err(bury_docked(&self.parts, e, substrate).await?);
        }
        e.record.desired = DesiredState::Stopped;
        e.record.unfinished = None;
        e.save()?;
        let waits = e.doing.power_off();
        Ok(OutOfMove::Done((e.machine.clone(), waits)))
    }
}

/// Whether a machine that was to be off still is, and has no other QEMU than that by now.
struct StillOff {
    machine: Option<Machine>,
}

impl StillOff {
    fn holds(&self, e: &Owned) -> bool {
        let process = |m: &Option<Machine>| m.as_ref().map(|m| m.process().clone());
        let same = e.machine.is_none() || process(&e.machine) == process(&self.machine);
        let starts = e.doing.activity() == Activity::Starting;
        // Whoever cut its power meanwhile may have started or removed it since.
        same && e.record.desired == DesiredState::Stopped && !starts
    }
}

impl Ask for StillOff {
    type Reply = bool;
    const STEP: &'static str = "owner.still-off";

    async fn answer(self, e: &mut Owned, _: First) -> Result<bool, Fault> {
        Ok(self.holds(e))
    }
}

/// The QEMU of a machine that was to be off has ended.
struct PoweredOff {
    parts: Arc<Parts>,
    machine: Option<Machine>,
}

impl Ask for PoweredOff {
    type Reply = ();
    const STEP: &'static str = "owner.powered-off";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        let Self { parts, machine } = self;
        if !(StillOff { machine }).holds(e) {
            return Ok(());
        }
        e.machine = None;
        let vm = e.record.vm;
        // One that could not be adopted yet.
        end_strays(&parts.dirs, vm).await;
        remove_file(&parts.dirs.vm_memory(vm))
    }
}

/// A machine that is to be powered off has been docked already, and nobody has finished that:
/// nothing of it may boot beside its substrate. Gives why there is nothing to power off.
async fn bury_docked(parts: &Parts, e: &mut Owned, substrate: SubstrateId) -> Result<Fault, Fault> {
    if let Some(machine) = &e.machine {
        machine.kill().await;
    }
    end_strays(&parts.dirs, e.record.vm).await;
    parts.machines.visits.forget(e.record.vm);
    parts.machines.bury(e).await?;
    e.machine = None;
    let name = &e.record.name;
    Ok(Fault::not_found(format!("machine '{name}' was docked: it is substrate {substrate} now"))
        .hint(format!("make a machine of it: godwit vm activate {substrate}")))
}

/// Asks a guest to power itself off and waits until it has, the time is over, or nobody wants to
/// wait any more.
async fn ask_guest(machine: &Machine, call: &Call) {
    call.progress(Progress {
        stage: "power off".into(),
        note: "waiting for the guest to power itself off".into(),
        ..Progress::default()
    });
    godwit_hold::at("stop.asking").await;
    if let Err(error) = machine.power_button().await {
        tracing::debug!(%error, "the power button was not pressed");
    }
    // A guest without a daemon for the button has its agent.
    let asked = async {
        if let Err(error) = machine.agent().power_off(OFF_WITHIN).await {
            tracing::debug!(%error, "the guest agent was not asked to power off");
        }
        std::future::pending::<()>().await;
    };
    let off = machine.wait_life("powering the guest off", Life::PoweredOff, OFF_WITHIN);
    tokio::select! {
        () = call.cancel.cancelled() => {}
        () = asked => {}
        outcome = off => if let Err(error) = outcome {
            let vm = machine.launch().name;
            tracing::info!(%vm, %error, "the guest did not power itself off");
        },
    }
}
