//! The pool of this host: docking, activating, carrying substrates in and out.

use std::time::Duration;

use godwit_net::Attachment;
use godwit_substrate::{ActivateRequest, Identity, Place, Substrate, SubstrateError, activate};
use godwit_types::{Fault, Name, SubstrateId, SubstrateKind};
use tokio_util::sync::CancellationToken;

use super::LocalSite;
use super::faults::{into_fault, join_error};
use super::net::guest_network;
use super::record::{DesiredState, DiskBase, MachineRecord, Unfinished, mac_seed};
use super::starts::{Booting, Starts};
use crate::Progress;
use crate::{Call, MachineStatus, NewMachine};

/// How long an activation keeps others waiting at most.
const TURN: Duration = Duration::from_secs(3);

impl Starts {
    /// Makes a machine from a substrate.
    pub(super) async fn activate(
        &self,
        new: NewMachine,
        id: SubstrateId,
        attachment: Option<Attachment>,
        call: Call,
    ) -> Result<MachineStatus, Fault> {
        let substrate = self.parts.substrates.get(id).await?;
        if let Some(wanted) = new.content.filter(|wanted| *wanted != substrate.content()) {
            let found = substrate.content();
            return Err(into_fault(SubstrateError::OtherContent {
                name: substrate.name,
                wanted,
                found,
            }));
        }
        let own = || godwit_qemu::MacAddress::from_seed(mac_seed(new.vm));
        let mac = attachment.as_ref().map_or_else(own, |a| a.mac);
        let record = MachineRecord {
            vm: new.vm,
            name: new.name.clone(),
            generation: new.generation,
            warrant: Some(new.warrant),
            desired: DesiredState::Running,
            image: substrate.image.clone(),
            image_hash: substrate.image_hash,
            substrate: Some(id),
            arch: substrate.shape.arch,
            memory: substrate.shape.memory,
            vcpus: substrate.shape.vcpus,
            mac,
            disk_base: DiskBase::Substrate(id),
            migration: None,
            reason: None,
            unfinished: Some(Unfinished::Activating),
            attachment,
            published: Vec::new(),
            back: None,
        };
        self.parts.substrates.give_way(&self.parts.room, record.memory, id).await;
        self.parts.room.check_memory(record.memory).await?;
        let image = self.parts.images.sound(&record).await?;
        let (owner, wanted) = self.parts.machines.register_starting(record.clone()).await?;
        call.progress(Progress {
            stage: "activate".into(),
            note: format!("from substrate {}", substrate.name),
            ..Progress::default()
        });
        let made = async {
            let cancel = wanted.child_token();
            let activating =
                self.activate_registered(&record, &substrate, image.clone(), cancel.clone());
            tokio::pin!(activating);
            let activated = tokio::select! {
                activated = &mut activating => activated?,
                () = call.cancel.cancelled() => {
                    cancel.cancel();
                    activating.await?
                }
            };
            let machine = activated.machine;
            let accel = machine.launch().accel;
            let given = record.attachment.as_ref().map(|a| a.mac);
            let own = || activated.identity.map_or(record.mac, |identity| identity.mac);
            let mac = given.unwrap_or_else(own);
            let there = Booting::activated(machine.clone(), &wanted, mac);
            if let Err(f) = owner.ask(there).await {
                machine.kill().await;
                return Err(f);
            }
            Ok((activated.report, accel))
        };
        match made.await {
            Ok((report, accel)) => {
                self.parts.substrates.keep_waiting(id, image, accel);
                let mut status = self.started(&owner, &wanted).await?;
                status.activate = Some(report);
                Ok(status)
            }
            Err(f) => {
                self.withdraw(&owner, wanted).await;
                Err(f)
            }
        }
    }

    async fn activate_registered(
        &self,
        record: &MachineRecord,
        substrate: &Substrate,
        image: godwit_image::Image,
        cancel: CancellationToken,
    ) -> Result<godwit_substrate::Activated, Fault> {
        let dir = self.parts.dirs.vm(record.vm);
        let (at, first) = (dir.clone(), record.clone());
        let recording = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&at).map_err(|e| Fault::io("making", &at, &e))?;
            // A crash of the host leaves no machine that it could tell of.
            first.save_quick(&at)
        });
        recording.await.map_err(join_error)??;
        godwit_hold::at("activate.recorded").await;
        self.parts.networks.ready_for(&self.parts.machines, record).await?;
        let identity = match substrate.kind {
            SubstrateKind::Private => None,
            SubstrateKind::Public | SubstrateKind::Restricted => {
                let fresh = Identity::fresh(record.name.clone()).map_err(into_fault)?;
                Some(Identity { mac: record.mac, ..fresh })
            }
        };
        let request = ActivateRequest {
            substrate: substrate.id,
            image,
            place: Place {
                confine: self.parts.launcher.confine.clone(),
                groups: self.parts.launcher.groups.clone(),
                vm: record.vm,
                run_dir: self.parts.dirs.vm_run(record.vm),
                top: dir.join(super::dirs::TOP),
            },
            name: record.name.clone(),
            identity,
            nic: Some(self.parts.networks.backend(record.vm, record.attachment.as_ref())),
            network: record.attachment.as_ref().map(guest_network),
            accel: self.parts.launcher.accel(record.arch)?,
            cancel,
        };
        // More at once than the host has CPUs would make each of them slower, and ask the guests
        // oftener how far they are. One that hangs lets the next one in all the same.
        let asked = std::time::Instant::now();
        let turn = self.turns.clone().acquire_owned().await.map_err(|_| Fault::cancelled())?;
        let waited = asked.elapsed();
        let turn = tokio::spawn(async move {
            tokio::time::sleep(TURN).await;
            drop(turn);
        });
        let activated =
            activate(&self.parts.substrates.pool, Some(&self.parts.substrates.shells), request)
                .await;
        turn.abort();
        let mut activated = activated.map_err(|e| {
            let outdated = matches!(e, SubstrateError::Shape { .. });
            let fault = into_fault(e);
            if outdated {
                let name = &substrate.name;
                return fault.hint(format!(
                    "boot its disk and dock it again: godwit substrate rebuild {name}"
                ));
            }
            fault
        })?;
        activated.report.waited(waited);
        godwit_hold::at("activate.plugged").await;
        Ok(activated)
    }
}

impl LocalSite {
    /// Who needs an image here, in words.
    pub(super) async fn image_users(&self, name: &Name) -> Result<Vec<String>, Fault> {
        let substrates =
            self.parts.substrates.list().await?.into_iter().filter(|s| s.image == *name);
        let machines = self.parts.machines.records().await.into_iter().filter(|r| r.image == *name);
        Ok(substrates
            .map(|s| format!("substrate '{}'", s.name))
            .chain(machines.map(|r| format!("machine '{}'", r.name)))
            .collect())
    }
}
