//! What became of a docking or an activation whose site could not tell: its daemon or the center was
//! restarted, or the link between them broke.
//!
//! ```text
//! look: machines, then substrates   (a site publishes a substrate before its machine goes away)
//!   site away, machine in a change --> look again
//!   docking:     substrate there ----> done          machine there ----> it runs on, failed
//!   activation:  machine runs -------> done          no machine -------> undone, failed
//! ```

use std::sync::Arc;
use std::time::Duration;

use godwit_site::{MachineStatus, SiteHost};
use godwit_types::{Fault, Name, SubstrateId, VmId, VmState};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Controller, Settler};
use crate::ops::{OpHandle, OpKind};
use crate::registry::{VmRecord, registry_fault};

/// How long a site that is away is waited for.
const RETURN_LIMIT: Duration = Duration::from_secs(60);

/// How long a site may take to bring a machine out of a change.
const CHANGE_LIMIT: Duration = Duration::from_secs(600);

/// How often it is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

impl Controller {
    /// Finds out what became of a docking that ended by `why`, and writes it down.
    ///
    /// # Errors
    /// `why` with what the machine is now, unless it was docked after all.
    pub(super) async fn settle_dock(
        &self,
        op: &OpHandle,
        vm: &VmRecord,
        substrate: SubstrateId,
        why: Fault,
    ) -> Result<Value, Fault> {
        let Some(host) = self.settler.await_settled(op, &vm.site, vm.id).await else {
            return Err(Fault {
                message: format!("'{}' was being docked: {}", vm.name, why.message),
                ..why
            }
            .hint(format!(
                "it is a substrate, or runs on, as soon as '{}' is back; see: godwit vm list",
                vm.site
            )));
        };
        let there = host.substrates().await?.into_iter().find(|s| s.id == substrate);
        if let Some(info) = there {
            let dock = info.dock.clone();
            self.exchange.adopt_substrate(&vm.site, info)?;
            self.registry.vm_remove(vm.id, vm.generation).map_err(registry_fault)?;
            return Ok(json!({ "substrate": substrate, "dock": dock }));
        }
        let now = self.settler.settle_vm(vm, &why).await?;
        Err(match now.map(|v| v.state) {
            Some(VmState::Running) => Fault {
                message: format!("'{}' was not docked and runs on: {}", vm.name, why.message),
                ..why
            },
            _ => Fault {
                message: format!("'{}' was not docked and does not run: {}", vm.name, why.message),
                ..why
            },
        })
    }

    /// Finds out what became of a machine that was being made when its site failed by `why`. One
    /// that does not run is removed.
    ///
    /// # Errors
    /// `why`, unless it runs.
    pub(super) async fn settle_create(
        &self,
        op: &OpHandle,
        vm: &VmRecord,
        why: Fault,
    ) -> Result<Value, Fault> {
        if let Some(host) = self.settler.await_settled(op, &vm.site, vm.id).await {
            let here = host.machine(vm.id).await?;
            if here.is_some_and(|m| m.state == VmState::Running) {
                return Ok(json!({ "site": vm.site }));
            }
        }
        self.undo_create(vm, &why).await?;
        Err(why)
    }
}

impl Settler {
    /// The site, once it answers and the machine is in no change there; `None` when it does not
    /// come back in time, or the operation is asked to stop.
    async fn await_settled(
        &self,
        op: &OpHandle,
        site: &Name,
        vm: VmId,
    ) -> Option<Arc<dyn SiteHost>> {
        let begun = Instant::now();
        let mut heard = begun;
        let settled = |m: &MachineStatus| {
            !matches!(m.state, VmState::Docking | VmState::Starting | VmState::Moving)
        };
        loop {
            if let Ok(host) = self.sites.host(site)
                && let Ok(machine) = host.machine(vm).await
            {
                if machine.as_ref().is_none_or(settled) {
                    return Some(host);
                }
                heard = Instant::now();
            }
            if heard.elapsed() > RETURN_LIMIT || begun.elapsed() > CHANGE_LIMIT {
                return None;
            }
            tokio::select! {
                // What was asked for before the site went away is in no hurry.
                () = op.cancel().cancelled(), if heard.elapsed() > LOOK_EVERY * 2 => return None,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// The substrate that a machine which its site does not know any more has become.
    pub(super) fn docked_as(&self, vm: VmId) -> Option<SubstrateId> {
        let ops = self.ops.list().ok()?;
        let docked = ops.iter().rev().find_map(|o| match &o.kind {
            OpKind::VmDock { vm: of, substrate, .. } if *of == vm => Some(*substrate),
            _ => None,
        })?;
        self.registry.substrate(&docked.to_string()).ok().map(|s| s.id)
    }
}
