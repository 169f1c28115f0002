//! What a site takes as the center's word that it may run a machine.

use godwit_transfer::{Trust, Warrant};
use godwit_types::{Code, Fault, Generation, Name, VmId};

/// The warrants of one site.
#[derive(Clone)]
pub(super) struct Warrants {
    site: Name,
    trust: Trust,
}

impl Warrants {
    /// Of those whom `trust` believes.
    pub(super) const fn new(site: Name, trust: Trust) -> Self {
        Self { site, trust }
    }

    /// Refuses to run a machine under a generation for which there is no word of the authority. The
    /// warrant is kept in the machine's record, so that a center which has forgotten can be shown
    /// it.
    pub(super) fn check(
        &self,
        vm: VmId,
        generation: Generation,
        warrant: &Warrant,
    ) -> Result<(), Fault> {
        if !generation.is_sane() || !warrant.is_for(vm, generation, &self.site) {
            return Err(Fault::new(
                Code::Fenced,
                format!(
                    "site '{}' has no warrant for machine {vm} at generation {generation}",
                    self.site
                ),
            ));
        }
        self.trust.check_warrant(warrant).map_err(|e| Fault::of(&e))
    }
}
