//! The networks of this site's machines: what the `net` room makes of their records.
//!
//! Which networks are here, and who is in them, follows from the machines that are here. So there is
//! nothing else to remember, and a restart, a hand that changed something, or a step that a crash
//! cut short is put right by the same call.

use std::sync::{Arc, Weak};
use std::time::Duration;

use godwit_net::{Attachment, Member, Networks, Trouble, With};
use godwit_qemu::{Machine, NicBackend};
use godwit_substrate::{GuestNetwork, set_network};
use godwit_types::{Fault, Name, VmId};

use super::LocalSite;
use super::faults::into_fault;
use super::record::MachineRecord;
use super::table::Machines;

/// How often what is in the kernel is compared with the records.
const EVERY: Duration = Duration::from_secs(10);

/// The networks of one site.
pub(super) struct SiteNetworks {
    networks: Networks,
    /// The records are read and applied by one at a time, so that none applies what is outdated.
    one: tokio::sync::Mutex<()>,
}

impl SiteNetworks {
    /// Those of the site whose things are in `data`.
    pub(super) fn of(data: &std::path::Path) -> Self {
        Self { networks: Networks::of(data), one: tokio::sync::Mutex::default() }
    }

    /// Has them be those of the machines that are here; what is wrong with them.
    async fn follow(&self, machines: &Machines) -> Vec<Trouble> {
        let _one = self.one.lock().await;
        let member = |r: MachineRecord| Some(Member::new(r.vm, r.name, r.attachment?));
        let members: Vec<Member> =
            machines.records().await.into_iter().filter_map(member).collect();
        self.networks.apply(&members).await
    }

    /// Has the network be there of a machine that is about to start, if it is in one.
    pub(super) async fn ready_for(
        &self,
        machines: &Machines,
        record: &MachineRecord,
    ) -> Result<(), Fault> {
        let Some(attachment) = &record.attachment else { return Ok(()) };
        let own = [With::Host, With::Network(attachment.network.id)];
        let mut troubles = self.follow(machines).await.into_iter();
        match troubles.find(|t| own.contains(&t.with)) {
            Some(t) => Err(Fault::of(&t.error)
                .hint("see what is missing with: godwit doctor; or make it without a network")),
            None => Ok(()),
        }
    }

    /// Puts all of them right, also after a machine went: what stays is removed by the next look.
    pub(super) async fn tidy(&self, machines: &Machines) {
        for Trouble { with, error } in self.follow(machines).await {
            tracing::warn!(?with, %error, "the networks of this site are not as they should be");
        }
    }

    /// What the NIC of a machine is joined to.
    pub(super) fn backend(&self, vm: VmId, attachment: Option<&Attachment>) -> NicBackend {
        attachment
            .map_or(NicBackend::Isolated, |a| NicBackend::Tap(self.networks.tap(a.network.id, vm)))
    }
}

/// What a guest is told of its place in a network.
pub(super) fn guest_network(attachment: &Attachment) -> GuestNetwork {
    let Attachment { network, mac, address } = attachment;
    GuestNetwork {
        mac: *mac,
        address: *address,
        bits: network.prefix.bits(),
        gateway: network.prefix.gateway(),
        domain: format!("{}.internal", network.name),
    }
}

/// Has the guest of a machine that has booted use its network, if it is in one and has an agent. One
/// without asks for it itself, by DHCP.
pub(super) async fn tell_guest(
    machine: &Machine,
    attachment: Option<&Attachment>,
    hostname: Option<&Name>,
) -> Result<(), Fault> {
    let Some(attachment) = attachment else { return Ok(()) };
    set_network(machine, &guest_network(attachment), hostname).await.map_err(into_fault)
}

/// Looks after the site's networks for as long as it is there.
pub(super) fn start(site: &Arc<LocalSite>) {
    let site: Weak<LocalSite> = Arc::downgrade(site);
    tokio::spawn(async move {
        let mut looks = tokio::time::interval(EVERY);
        loop {
            looks.tick().await;
            let Some(site) = site.upgrade() else { return };
            site.parts.networks.tidy(&site.parts.machines).await;
        }
    });
}
