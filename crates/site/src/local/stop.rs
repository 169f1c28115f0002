//! A machine is powered off. While its guest is waited for the machine's lock is free: it can be
//! looked at, and ended at once.

use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::{Life, Machine};
use godwit_types::{Fault, Generation, SubstrateId, VmId};
use tokio::sync::OwnedMutexGuard;

use super::allowed::{Action, Activity, First};
use super::machines::{into_fault, remove_file};
use super::record::{DesiredState, Unfinished};
use super::{Entry, LocalSite};
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
        let action = if force { Action::ForceStop } else { Action::Stop };
        // For as long as it is waited here.
        let (entry, machine, _waits) = {
            let (mut e, first) = self.admit(vm, generation, action).await?;
            if first == First::Start {
                e.doing.cancel_start();
            }
            e.record.generation = generation;
            if let Some(Unfinished::Docking { substrate, .. }) = e.record.unfinished
                && self.substrates.has(substrate)
            {
                return Err(self.bury_docked(&mut e, substrate).await?);
            }
            e.record.desired = DesiredState::Stopped;
            e.record.unfinished = None;
            e.record.save(&self.dirs.vm(vm))?;
            let waits = e.doing.power_off();
            let machine = e.machine.clone();
            (Arc::clone(OwnedMutexGuard::mutex(&e)), machine, waits)
        };
        if let Some(machine) = machine.as_ref().filter(|_| !force) {
            ask_guest(machine, &call).await;
        }
        let mut e = entry.lock().await;
        let process = |m: &Option<Machine>| m.as_ref().map(|m| m.process().clone());
        let same = e.machine.is_none() || process(&e.machine) == process(&machine);
        let starts = e.doing.now() == Activity::Starting;
        if !same || e.record.desired != DesiredState::Stopped || starts {
            // Whoever cut its power meanwhile may have started or removed it since.
            return Ok(());
        }
        if let Some(machine) = &machine {
            let within = if force { FORCE_WITHIN } else { QUIT_WITHIN };
            // One whose main loop hangs answers nobody.
            match tokio::time::timeout(within, machine.quit()).await {
                Ok(ended) => drop(ended.map_err(into_fault)?),
                Err(_) => drop(machine.kill().await),
            }
            e.machine = None;
        }
        // One that could not be adopted yet.
        self.end_strays(vm).await;
        remove_file(&self.dirs.vm_memory(vm))
    }

    /// A machine that is to be powered off has been docked already, and nobody has finished that:
    /// nothing of it may boot beside its substrate. Gives why there is nothing to power off.
    async fn bury_docked(&self, e: &mut Entry, substrate: SubstrateId) -> Result<Fault, Fault> {
        if let Some(machine) = &e.machine {
            machine.kill().await;
        }
        self.end_strays(e.record.vm).await;
        self.machines.visits.forget(e.record.vm);
        self.machines.bury(e).await?;
        e.machine = None;
        let name = &e.record.name;
        Ok(Fault::not_found(format!(
            "machine '{name}' was docked: it is substrate {substrate} now"
        ))
        .hint(format!("make a machine of it: godwit vm activate {substrate}")))
    }
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
