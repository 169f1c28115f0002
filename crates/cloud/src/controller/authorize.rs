//! What a principal finds: its own, what is for everybody, and nothing of others.
//!
//! Whatever is not there for a principal is answered as if it did not exist, in the words of the
//! registry.

use godwit_types::{Code, Fault, Name, OpId, SubstrateId, SubstrateKind};
use tokio::sync::watch;

use crate::access::{Action, Object, Principal, Refusal, default_tenant, forbidden, may};
use crate::ops::Ops;
use crate::registry::Registry;
use crate::registry::{
    OpRecord, RegistryError, SiteRecord, SubstrateRecord, VmRecord, registry_fault,
};
use std::sync::Arc;

/// Refuses what `who` may not do with an object that it was told of by `key`.
pub(crate) fn allow(
    who: &Principal,
    action: Action,
    object: &Object<'_>,
    (what, key): (&'static str, &str),
) -> Result<(), Fault> {
    may(who, action, object).map_err(|refusal| match refusal {
        Refusal::Hidden => unseen(what, key),
        Refusal::Forbidden => Fault::new(Code::Forbidden, forbidden(who, action, object)),
    })
}

/// There is no such thing, or none for whoever asks.
pub(crate) fn unseen(what: &'static str, key: &str) -> Fault {
    registry_fault(RegistryError::not_found(what, key))
}

/// What went wrong with looking for `key`, for `who`: whether an entry of somebody else is damaged
/// is not its business.
fn looked(who: &Principal, what: &'static str, key: &str, e: RegistryError) -> Fault {
    match e {
        RegistryError::Damaged { .. } if !who.is_operator() => unseen(what, key),
        e => registry_fault(e),
    }
}

/// What is there for a principal.
pub(crate) struct Finder {
    pub(super) registry: Arc<Registry>,
    pub(super) ops: Arc<Ops>,
}

impl Finder {
    /// The machine `key` (id, name in its tenant, `TENANT/NAME`), if `who` may do `action` with it.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub(crate) fn vm_for(
        &self,
        who: &Principal,
        action: Action,
        key: &str,
    ) -> Result<VmRecord, Fault> {
        let found = self.registry.vm_in(&who.tenant, key);
        let vm = found.map_err(|e| looked(who, "machine", key, e))?;
        allow(who, action, &Object::machine(&vm), ("machine", key))?;
        Ok(vm)
    }

    /// The substrate `key` (as a machine, or the name of a public one), if `who` may do `action`
    /// with it.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub(crate) fn substrate_for(
        &self,
        who: &Principal,
        action: Action,
        key: &str,
    ) -> Result<SubstrateRecord, Fault> {
        let found = match self.registry.substrate_in(&who.tenant, key) {
            Err(RegistryError::NotFound { .. }) => {
                // What is public is called by its name everywhere, unless one's own is called so.
                let public = |s: &SubstrateRecord| s.kind == SubstrateKind::Public;
                let everywhere = self.registry.substrate_in(&default_tenant(), key);
                everywhere.ok().filter(public).ok_or_else(|| unseen("substrate", key))?
            }
            found => found.map_err(|e| looked(who, "substrate", key, e))?,
        };
        allow(who, action, &Object::substrate(&found), ("substrate", key))?;
        Ok(found)
    }

    /// An operation, if `who` may do `action` with it: its present state, which changes no more
    /// once it is final.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub(crate) fn op_for(
        &self,
        who: &Principal,
        action: Action,
        id: OpId,
    ) -> Result<watch::Receiver<OpRecord>, Fault> {
        let key = id.to_string();
        let rx = self.ops.watch(id).map_err(|e| looked(who, "operation", &key, e))?;
        allow(who, action, &Object::operation(&rx.borrow()), ("operation", &key))?;
        Ok(rx)
    }

    /// Asks an operation to stop.
    ///
    /// # Errors
    /// As [`Finder::op_for`] and [`crate::ops::Ops::cancel`]; forbidden when its machine may
    /// not be changed.
    pub(crate) fn cancel(&self, who: &Principal, id: OpId) -> Result<(), Fault> {
        let vm = self.op_for(who, Action::Change, id)?.borrow().kind.vm();
        if let Some(vm) = vm.and_then(|vm| self.registry.vm(&vm.to_string()).ok()) {
            let key = id.to_string();
            allow(who, Action::Change, &Object::machine(&vm), ("operation", &key))?;
        }
        self.ops.cancel(id)
    }

    /// The machines that are there for `who`.
    ///
    /// # Errors
    /// When the registry fails.
    pub(crate) fn vms_for(&self, who: &Principal) -> Result<Vec<VmRecord>, Fault> {
        let mut all = self.registry.vms().map_err(registry_fault)?;
        all.retain(|vm| {
            who.lists(&vm.tenant) && may(who, Action::See, &Object::machine(vm)).is_ok()
        });
        Ok(all)
    }

    /// The substrates that are there for `who`.
    ///
    /// # Errors
    /// When the registry fails.
    pub(crate) fn substrates_for(&self, who: &Principal) -> Result<Vec<SubstrateRecord>, Fault> {
        let mut all = self.registry.substrates().map_err(registry_fault)?;
        all.retain(|s| self.lists_substrate(who, s));
        Ok(all.into_iter().map(|s| visible_part(who, s)).collect())
    }

    fn lists_substrate(&self, who: &Principal, s: &SubstrateRecord) -> bool {
        let shared = s.kind == SubstrateKind::Public || s.granted.contains(&who.tenant);
        (who.lists(&s.tenant) || shared) && may(who, Action::See, &Object::substrate(s)).is_ok()
    }

    /// The operations that are there for `who`, oldest first.
    ///
    /// # Errors
    /// When the registry fails.
    pub(crate) fn ops_for(&self, who: &Principal) -> Result<Vec<OpRecord>, Fault> {
        let mut all = self.ops.list().map_err(registry_fault)?;
        all.retain(|op| {
            who.lists(&op.tenant) && may(who, Action::See, &Object::operation(op)).is_ok()
        });
        Ok(all)
    }

    /// A site as `who` may know it: of what it holds, only what is there for `who`.
    #[must_use]
    pub(crate) fn site_for(&self, who: &Principal, mut site: SiteRecord) -> SiteRecord {
        if who.is_operator() {
            return site;
        }
        let there = |id: &SubstrateId| {
            let found = self.registry.substrate(&id.to_string());
            found.is_ok_and(|s| may(who, Action::See, &Object::substrate(&s)).is_ok())
        };
        site.report.substrates.retain(there);
        site.report.damaged.retain(|id, _| there(id));
        // They change with what others have there.
        (site.report.holdings, site.report.machines) = (None, None);
        site
    }

    /// What a machine is called for `who`, who has to do with a substrate that it stands on.
    pub(super) fn called_for(&self, who: &Principal, vm: &VmRecord) -> String {
        match may(who, Action::See, &Object::machine(vm)) {
            Ok(()) => format!("machine '{}'", vm.name),
            Err(_) => "a machine of another tenant".into(),
        }
    }
}

/// A substrate as `who` may know it: to whom else it was granted is its tenant's business.
pub(crate) fn visible_part(who: &Principal, mut s: SubstrateRecord) -> SubstrateRecord {
    if s.tenant != who.tenant && !who.is_operator() {
        s.granted.retain(|t| *t == who.tenant);
    }
    s
}

/// What a substrate is called at its sites: names are per tenant, a site knows of no tenants. Those of
/// the default tenant are called the same there, unless that is how another's may be called.
pub(super) fn name_at_sites(tenant: &Name, name: &Name, id: SubstrateId) -> Result<Name, Fault> {
    let tail = name.as_str().rsplit_once('-').map(|(_, tail)| tail);
    let hex = |t: &str| t.len() == 6 && t.bytes().all(|b| b.is_ascii_hexdigit());
    match *tenant == default_tenant() && !tail.is_some_and(hex) {
        true => Ok(name.clone()),
        false => super::rebuild::suffixed(name, &super::rebuild::tail(id)),
    }
}
