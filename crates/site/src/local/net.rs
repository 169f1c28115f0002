//! The networks of this site's machines: what the `net` room makes of their records.
//!
//! Which networks are here, and who is in them, follows from the machines that are here. So there is
//! nothing else to remember, and a restart, a hand that changed something, or a step that a crash
//! cut short is put right by the same call.

use std::sync::{Arc, Weak};
use std::time::Duration;

use godwit_net::{Attachment, Member, Networks, Rest, Trouble, With};
use godwit_qemu::{Machine, NicBackend};
use godwit_substrate::{GuestNetwork, set_network};
use godwit_types::{Code, Fault, Name, VmId};

use super::LocalSite;
use super::faults::into_fault;
use super::parts::Parts;
use super::record::MachineRecord;
use super::table::Machines;
use crate::UNKNOWN_GENERATION;

/// How often what is in the kernel is compared with the records.
const EVERY: Duration = Duration::from_secs(10);

/// How long an answer waits until the network of a machine that went is tidied.
const TIDY_WITHIN: Duration = Duration::from_secs(2);
/// How long a machine that is to start waits for its network.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// How long a guest may take to do what it is told of its network.
const TELL_WITHIN: Duration = Duration::from_secs(30);

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
        let records = machines.records().await;
        // Nobody knows in which network a machine is whose record is damaged: nothing goes.
        let rest = match records.iter().any(|r| r.generation == UNKNOWN_GENERATION) {
            true => Rest::Stays,
            false => Rest::Goes,
        };
        let member = |r: MachineRecord| Some(Member::new(r.vm, r.name, r.attachment?));
        let members: Vec<Member> = records.into_iter().filter_map(member).collect();
        self.networks.apply(&members, rest).await
    }

    /// Has the network be there of a machine that is about to start, if it is in one.
    pub(super) async fn ready_for(
        &self,
        machines: &Machines,
        record: &MachineRecord,
    ) -> Result<(), Fault> {
        let Some(attachment) = &record.attachment else { return Ok(()) };
        let own = [With::Host, With::Network(attachment.network.id)];
        let looked = tokio::time::timeout(READY_WITHIN, self.follow(machines)).await;
        let looked = looked.map_err(|_| {
            let name = &attachment.network.name;
            let message = format!("network '{name}' was not made within {READY_WITHIN:?}");
            Fault::new(Code::TimedOut, message).hint("see the log of this site, and try again")
        })?;
        match looked.into_iter().find(|t| own.contains(&t.with)) {
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

/// Whether a machine that is here is in a network, which may have to go with it.
pub(super) async fn is_in_one(parts: &Parts, vm: VmId) -> bool {
    let owner = parts.machines.owner_if_here(vm).await;
    owner.is_some_and(|owner| owner.now().record.attachment.is_some())
}

/// Puts the networks right after a machine went; `had`: it was in one. What takes longer than a
/// moment goes on by itself, so that no answer waits for a network.
pub(super) async fn tidy_after(parts: &Arc<Parts>, had: bool) {
    if !had {
        return;
    }
    let parts = Arc::clone(parts);
    let tidied = tokio::spawn(async move { parts.networks.tidy(&parts.machines).await });
    // What breaks off there is made up for by the next look.
    let _ = tokio::time::timeout(TIDY_WITHIN, tidied).await;
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
    let network = guest_network(attachment);
    match tokio::time::timeout(TELL_WITHIN, set_network(machine, &network, hostname)).await {
        Ok(told) => told.map_err(into_fault),
        Err(_) => Err(Fault::new(Code::TimedOut, "the guest did not take its network in time")),
    }
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
