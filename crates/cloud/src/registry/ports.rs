//! Which port of which host leads to which machine.
//!
//! A port and protocol is one machine's in the whole cloud, since machines move: wherever one goes, its
//! ports are free there. What a site was told last may be another than what is entered; the record
//! says so until that site has said that it knows.

use std::sync::Arc;

use godwit_site::{HostPort, MOST_PORTS, NetworkKind, PublishedPort};
use godwit_types::{VmId, VmState};

use super::audit::Note;
use super::file::File;
use super::tables::{Change, Tables};
use super::{RegistryError, Result, VmRecord, missing};
use crate::principal::Principal;

impl Tables {
    fn machine(&self, id: VmId) -> Result<&Arc<VmRecord>> {
        self.vms.get(&id).map(|e| &e.vm).ok_or_else(|| missing("machine", &id))
    }

    /// The machine whose port it is.
    fn publisher(&self, port: HostPort) -> Option<&Arc<VmRecord>> {
        let mut all = self.vms.values().map(|e| &e.vm);
        all.find(|v| v.published.iter().any(|p| p.at() == port))
    }
}

/// Refuses a machine that is in a change, after which its ports may be another site's to open.
fn is_in_none_of(vm: &VmRecord, changes: &[VmState]) -> Result<()> {
    match changes.contains(&vm.state) {
        true => Err(RegistryError::Busy(format!("machine '{}' is {}", vm.name, vm.state))),
        false => Ok(()),
    }
}

/// The published ports of a registry.
#[derive(Debug)]
pub struct Ports {
    file: Arc<File>,
}

impl Ports {
    pub(super) const fn new(file: Arc<File>) -> Self {
        Self { file }
    }

    /// Enters a port that is to lead to a machine.
    ///
    /// # Errors
    /// [`RegistryError::Busy`] for a machine that is in no network of kind `nat`, or starts, moves or is
    /// being docked, and for a port that is taken.
    pub fn publish(&self, who: &Principal, id: VmId, port: PublishedPort) -> Result<VmRecord> {
        self.file.write(|t, changes| {
            let old = t.machine(id)?;
            is_in_none_of(old, &[VmState::Starting, VmState::Moving, VmState::Docking])?;
            let network = old.network.as_ref().and_then(|n| t.networks.get(&n.id));
            if network.is_none_or(|n| n.kind != NetworkKind::Nat) {
                return Err(RegistryError::Busy(format!(
                    "machine '{}' is in no network of kind nat: only those publish ports",
                    old.name
                )));
            }
            if let Some(by) = t.publisher(port.at()) {
                let by = match by.tenant == old.tenant {
                    true => format!("machine '{}'", by.name),
                    false => "a machine of another tenant".into(),
                };
                let words = format!("port {} is published already, by {by}", port.at());
                return Err(RegistryError::Busy(words));
            }
            if old.published.len() >= MOST_PORTS {
                let words = format!("machine '{}' has {MOST_PORTS} ports, the most", old.name);
                return Err(RegistryError::Busy(words));
            }
            let mut vm = VmRecord::clone(old);
            vm.published.push(port);
            vm.ports_pending = true;
            let object = format!("{} {port}", vm.name);
            changes.push(t.audited(Note::of(who, "vm publish", &object)));
            changes.push(Change::Vm(id, Some(Arc::new(vm.clone()))));
            Ok(vm)
        })
    }

    /// Takes a port out again.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] for one that does not lead to the machine; [`RegistryError::Busy`] while
    /// that moves.
    pub fn unpublish(&self, who: &Principal, id: VmId, port: HostPort) -> Result<VmRecord> {
        self.file.write(|t, changes| {
            let old = t.machine(id)?;
            is_in_none_of(old, &[VmState::Moving])?;
            let mut vm = VmRecord::clone(old);
            vm.published.retain(|p| p.at() != port);
            if vm.published.len() == old.published.len() {
                return Err(missing("port", &format!("{port} of machine '{}'", vm.name)));
            }
            vm.ports_pending = true;
            let object = format!("{} {port}", vm.name);
            changes.push(t.audited(Note::of(who, "vm unpublish", &object)));
            changes.push(Change::Vm(id, Some(Arc::new(vm.clone()))));
            Ok(vm)
        })
    }

    /// Its site knows that these are the ports of a machine. Gives the record, of which that may not
    /// be true any more.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn told(&self, id: VmId, told: &[PublishedPort]) -> Result<VmRecord> {
        self.file.write(|t, changes| {
            let old = t.machine(id)?;
            let mut vm = VmRecord::clone(old);
            if vm.published == told && vm.ports_pending {
                vm.ports_pending = false;
                changes.push(Change::Vm(id, Some(Arc::new(vm.clone()))));
            }
            Ok(vm)
        })
    }
}
