//! Warrants: the center's signed word on where a machine may run, and what a site's claim is worth.
//!
//! ```text
//!  generation raised (create, activate, start, move) --> warrant {vm, generation, site} --> site
//!  a move ends before its switch -----------------------> void: that site is not believed with it
//!  a site claims a generation above the registry's -----> believed with a warrant that is not void
//! ```
//! The claim is needed when the registry is older than the truth: it was restored from a copy, or
//! the news of a switch was lost.

use godwit_site::{MachineStatus, UNKNOWN_GENERATION};
use godwit_transfer::Warrant;
use godwit_types::{Fault, Generation, Name};

use crate::registry::Registry;
use crate::registry::VmRecord;
use crate::registry::registry_fault;
use godwit_transfer::Authority;
use std::sync::Arc;

/// The records of machines, and the center's word on where each may run.
pub(crate) struct Warrants {
    pub(super) registry: Arc<Registry>,
    pub(super) authority: Arc<Authority>,
}

impl Warrants {
    /// Changes a machine's record under its generation.
    pub(super) fn change_vm(
        &self,
        vm: &VmRecord,
        generation: Generation,
        change: impl FnOnce(&mut VmRecord) -> Result<(), crate::registry::RegistryError>,
    ) -> Result<VmRecord, Fault> {
        self.registry.vm_update(vm.id, generation, change).map_err(registry_fault)
    }

    /// The center's word that `site` may run a machine under `generation`.
    pub(super) fn warrant(
        &self,
        vm: &VmRecord,
        generation: Generation,
        site: &Name,
    ) -> Result<Warrant, Fault> {
        if generation >= Generation::LAST {
            return Err(Fault::internal(format!("machine '{}' has had all generations", vm.name)));
        }
        self.authority.warrant(vm.id, generation, site).map_err(|e| Fault::of(&e))
    }

    /// A machine has never run at a site that has a warrant for it, and will not: the warrant is
    /// void, also when that site keeps it.
    pub(super) fn void_warrant(&self, vm: &VmRecord, generation: Generation, site: &Name) {
        let done = self.change_vm(vm, vm.generation, |v| {
            v.voided.insert(site.clone(), generation);
            Ok(())
        });
        if let Err(error) = done {
            tracing::warn!(vm = %vm.name, %site, %error, "a warrant is not made void");
        }
    }

    /// Whether a site may say of a machine that it has it under that generation: it is there by the
    /// registry, or the center's warrant says so.
    pub(super) fn believed(&self, vm: &VmRecord, site: &Name, claim: &MachineStatus) -> bool {
        if claim.generation == vm.generation || claim.generation == UNKNOWN_GENERATION {
            return *site == vm.site;
        }
        if claim.generation < vm.generation {
            return false;
        }
        let refused = |why: &str| {
            tracing::warn!(
                vm = %vm.name, %site, claimed = %claim.generation, known = %vm.generation, why,
                "a site's claim to a machine is not believed"
            );
            false
        };
        if !claim.generation.is_sane() {
            return refused("there is no such generation");
        }
        let Some(warrant) = &claim.warrant else { return refused("it shows no warrant") };
        if !warrant.is_for(vm.id, claim.generation, site) {
            return refused("its warrant is for something else");
        }
        if let Err(error) = self.authority.trust().check_warrant(warrant) {
            return refused(&error.to_string());
        }
        if vm.voided.get(site).is_some_and(|v| claim.generation <= *v) {
            return refused("its warrant is void: the machine never ran there");
        }
        true
    }
}
