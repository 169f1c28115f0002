//! Ports of hosts that lead to machines.
//!
//! The registry says which they are, and the machine's site is told all of them at once, so that
//! whatever was lost on the way is made up for by the next time.

use std::sync::Arc;

use godwit_site::{Call, HostPort, PublishedPort, verbs};
use godwit_types::{Code, Fault, Name, VmId, VmState};

use super::Sites;
use super::ask::ANSWER_WITHIN;
use super::authorize::Finder;
use crate::access::{Action, Principal};
use crate::registry::{Registry, VmRecord, registry_fault};

/// How many times a site is told of a machine whose ports change meanwhile.
const ROUNDS: usize = 8;

/// The published ports of all machines.
#[derive(Clone)]
pub(crate) struct PortDesk {
    pub(super) registry: Arc<Registry>,
    pub(super) sites: Arc<Sites>,
    pub(super) finder: Arc<Finder>,
}

/// The machine is in something that ends.
fn waits(f: Fault) -> Fault {
    match f.hint {
        None if f.code == Code::Conflict => f.hint("see the machine with: godwit vm get"),
        _ => f,
    }
}

impl PortDesk {
    /// Has a port of the host of its site lead to the machine `key`.
    ///
    /// # Errors
    /// Not found, forbidden; conflict for a port that is taken; what the site refuses, after which
    /// nothing is published.
    pub(crate) async fn publish(
        &self,
        who: &Principal,
        key: &str,
        port: PublishedPort,
    ) -> Result<VmRecord, Fault> {
        let vm = self.finder.vm_for(who, Action::Use, key)?;
        let who = who.at(&vm.tenant);
        let _ = self.sites.host(&vm.site)?;
        self.registry.ports().publish(&who, vm.id, port).map_err(|e| waits(registry_fault(e)))?;
        let me = self.clone();
        // Whoever asked may go away meanwhile.
        let told = tokio::spawn(async move {
            let told = me.tell(vm.id).await;
            if told.is_err()
                && let Err(error) = me.registry.ports().unpublish(&who, vm.id, port.at())
            {
                tracing::warn!(vm = %vm.name, %port, %error, "a port that its site refused");
            }
            told
        });
        told.await.map_err(|e| Fault::internal(format!("publishing a port: {e}")))?
    }

    /// Has a port lead to the machine `key` no more. A site that is away closes it when it is back.
    ///
    /// # Errors
    /// Not found, forbidden; conflict while the machine moves.
    pub(crate) async fn unpublish(
        &self,
        who: &Principal,
        key: &str,
        port: HostPort,
    ) -> Result<VmRecord, Fault> {
        let vm = self.finder.vm_for(who, Action::Use, key)?;
        let who = &who.at(&vm.tenant);
        let taken = self.registry.ports().unpublish(who, vm.id, port);
        let taken = taken.map_err(|e| waits(registry_fault(e)))?;
        let me = self.clone();
        match tokio::spawn(async move { me.tell(vm.id).await }).await {
            Ok(Ok(told)) => Ok(told),
            Ok(Err(error)) => {
                tracing::info!(vm = %taken.name, %port, %error, "its site is told again");
                Ok(taken)
            }
            Err(e) => Err(Fault::internal(format!("closing a port: {e}"))),
        }
    }

    /// Tells its site which ports lead to a machine.
    async fn tell(&self, id: VmId) -> Result<VmRecord, Fault> {
        for _ in 0..ROUNDS {
            let vm = self.registry.vm(&id.to_string()).map_err(registry_fault)?;
            if vm.state == VmState::Moving {
                // Its destination is told with the move.
                return Ok(vm);
            }
            let host = self.sites.host(&vm.site)?;
            let (generation, ports) = (vm.generation, vm.published.clone());
            let request = verbs::VmPublish { vm: id, generation, ports };
            match host.ask(request, Call::quiet()).await {
                Ok(()) => {}
                // It has left or was started again since.
                Err(f) if f.code == Code::Fenced => continue,
                Err(f) => return Err(f),
            }
            let now = self.registry.ports().told(id, &vm.published).map_err(registry_fault)?;
            if !now.ports_pending {
                return Ok(now);
            }
        }
        Err(Fault::conflict("the machine changes all the time").hint("try again"))
    }

    /// Tells a site of the machines there of which it may know other ports than the registry.
    pub(super) async fn tell_pending(&self, site: &Name) {
        let Ok(mut vms) = self.registry.vms() else { return };
        vms.retain(|v| v.ports_pending && v.site == *site && v.state != VmState::Moving);
        for vm in vms {
            let told = tokio::time::timeout(ANSWER_WITHIN, self.tell(vm.id)).await;
            if let Ok(Err(error)) = told {
                tracing::debug!(vm = %vm.name, %site, %error, "its site does not take its ports");
            }
        }
    }
}
