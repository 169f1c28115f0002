//! Rebuilding a substrate whose saved state no QEMU here loads any more.
//!
//! ```text
//! stored disk -> machine NAME-rebuild: boot, running -> docking -> substrate NAME (new id)
//!                                        | any failure: the machine is removed, NAME is as it was
//! registry, in one change: the new one takes the name, the machine is gone
//! old one: removed from every site, or kept under another name while a machine stands on it
//! ```

use std::sync::{Arc, PoisonError};

use godwit_site::{Call, NewMachine, Origin, SiteHost, SubstrateInfo, verbs};
use godwit_transfer::Warrant;
use godwit_types::{Code, Fault, Generation, Name, SubstrateId, UnixMs, VmId, VmState};
use serde_json::json;

use super::disks::DiskOf;
use super::lifecycle::{call_of, generalises};
use super::{Accepted, Controller, Exchange, Mode};
use crate::access::{Action, Principal};
use crate::ops::{OpHandle, OpKind};
use crate::placement::{Demand, Source};
use crate::registry::{StepKind, StepName, SubstrateRecord, VmRecord, registry_fault};

/// `base-suffix`, cut to the length that a name may have.
pub(super) fn suffixed(base: &Name, suffix: &str) -> Result<Name, Fault> {
    let room = Name::MAX_LEN - suffix.len() - 1;
    let short: String = base.as_str().chars().take(room).collect();
    Name::new(&format!("{short}-{suffix}")).map_err(|e| Fault::internal(e.to_string()))
}

/// The last digits of an id, which differ from one to the next.
pub(super) fn tail(id: SubstrateId) -> String {
    let text = id.0.simple().to_string();
    text[text.len() - 6..].to_owned()
}

/// A rebuild under way.
struct Rebuild {
    old: SubstrateRecord,
    new: SubstrateId,
    /// Its owner as sites know it.
    owner: Name,
    vm: VmRecord,
}

impl Controller {
    /// Boots the disk that a substrate stores, docks the machine and puts the new substrate in the
    /// old one's place. What was only in its memory is lost: programs start anew.
    ///
    /// # Errors
    /// What refuses it: a private substrate that runs, no room, a holder that is away.
    pub async fn substrate_rebuild(
        self: &Arc<Self>,
        who: &Principal,
        key: &str,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let old = self.finder.substrate_for(who, Action::Change, key)?;
        let who = &who.at(&old.tenant);
        let name = suffixed(&old.name, "rebuild")?;
        if self.registry.vm_named(&old.tenant, &name) {
            return Err(Fault::new(Code::Exists, format!("machine '{name}' exists already")).hint(
                format!("is it being rebuilt? see: godwit op list; else: godwit vm delete {name}"),
            ));
        }
        if let (godwit_types::SubstrateKind::Private, Some(vm)) =
            (old.kind, self.registry.vm_of(old.id))
        {
            return Err(Fault::conflict(format!(
                "substrate '{}' is private and runs as machine '{}'",
                old.name, vm.name
            ))
            .hint(format!("dock that: godwit vm dock {}", vm.name)));
        }
        // The old one is to be removed everywhere.
        for site in &old.holders {
            self.sites.host(site)?;
        }
        let placed = old.holders.iter().map(|site| {
            let demand = Demand {
                memory: old.memory,
                vcpus: old.vcpus,
                source: Source::Substrate(old.id),
                only: Some(site.clone()),
                not: None,
                barred: std::collections::BTreeMap::new(),
            };
            self.sites.choose(&demand, Some(&old))
        });
        let mut refusal = None;
        let placed = placed.filter_map(|p| p.map_err(|f| refusal = Some(f)).ok()).next();
        let site = match (placed, refusal) {
            (Some(p), _) => p.site,
            (None, Some(f)) => return Err(f),
            (None, None) => {
                let words = format!("no site holds substrate '{}'", old.name);
                return Err(Fault::unavailable(words));
            }
        };
        let plan = format!("boot the disk of substrate '{}' at {site} and dock it again", old.name);
        let target = Some(old.name.to_string());
        if mode == Mode::DryRun {
            return Ok(Accepted { op: None, plan, target });
        }
        let host = self.sites.host(&site)?;
        generalises(&*host, old.kind)?;
        // What it counts against the quotas is asked of the site: a center that was started again
        // remembers nothing of it.
        let stored = Origin::StoredDisk(old.id);
        let of = DiskOf::Substrate(old.id);
        let disk_bytes = self.exchange.disk_bytes(of, &stored, Some(host.clone())).await;
        let now = UnixMs::now();
        let private_of = old.private_of().cloned();
        let vm = VmRecord {
            id: VmId::new(),
            name,
            tenant: old.tenant.clone(),
            state: VmState::Starting,
            site,
            generation: Generation::FIRST,
            image: old.image.clone(),
            substrate: Some(old.id),
            arch: old.arch,
            memory: old.memory,
            vcpus: old.vcpus,
            disk_bytes,
            created: now,
            changed: now,
            moving_to: None,
            reason: None,
            private_of,
            arriving: None,
            returning: None,
            network: None,
            published: Vec::new(),
            ports_pending: false,
            voided: std::collections::BTreeMap::new(),
        };
        let warrant = self.warrants.warrant(&vm, vm.generation, &vm.site)?;
        let new = SubstrateId::new();
        let kind = OpKind::SubstrateRebuild { vm: vm.id, name: old.name.clone(), old: old.id, new };
        let owner = self
            .registry
            .people()
            .user(&old.tenant, &old.owner)
            .map_or(old.owner.clone(), |u| u.id);
        let (me, record) = (self.clone(), vm.clone());
        let one = self.entering.lock().unwrap_or_else(PoisonError::into_inner);
        self.once(who, Some(&old))?;
        let started = self.ops.start_new(who, &vm, kind, |op| async move {
            let job = Rebuild { old, new, owner, vm: record };
            let outcome = me.run_rebuild(&op, &job, warrant, &host).await;
            if let Err(f) = &outcome {
                me.undo_rebuild(&job.vm, f).await?;
                op.undone(StepName::Rebuild)?;
            }
            outcome
        });
        drop(one);
        let op = started.map_err(registry_fault)?;
        Ok(Accepted { op: Some(op), plan, target })
    }

    async fn run_rebuild(
        &self,
        op: &OpHandle,
        job: &Rebuild,
        warrant: Warrant,
        host: &Arc<dyn SiteHost>,
    ) -> Result<serde_json::Value, Fault> {
        op.begin(StepKind::Rebuild { site: job.vm.site.clone() })?;
        let machine = NewMachine {
            vm: job.vm.id,
            name: job.vm.name.clone(),
            generation: job.vm.generation,
            warrant,
            origin: Origin::StoredDisk(job.old.id),
            memory: None,
            vcpus: None,
            content: None,
        };
        host.ask(verbs::VmNew { machine }, call_of(op)).await?;
        for state in [VmState::Running, VmState::Docking] {
            self.warrants.change_vm(&job.vm, job.vm.generation, |v| {
                Ok(v.become_state(state, UnixMs::now())?)
            })?;
        }
        op.check()?;
        let request = verbs::VmDock {
            vm: job.vm.id,
            generation: job.vm.generation,
            substrate: job.new,
            // At the site the old one still has the name.
            name: suffixed(&job.old.name, &tail(job.new))?,
            kind: job.old.kind,
            owner: job.owner.clone(),
        };
        let info = host.ask(request, call_of(op)).await?;
        Exchange::is_wanted(host.name(), job.new, &info)?;
        let report = info.dock.clone();
        self.replace(&job.old, info, &job.vm).await?;
        op.done(StepName::Rebuild)?;
        Ok(json!({ "substrate": job.new, "dock": report }))
    }

    /// Puts the new substrate in the old one's place.
    async fn replace(
        &self,
        old: &SubstrateRecord,
        info: SubstrateInfo,
        vm: &VmRecord,
    ) -> Result<(), Fault> {
        let new = self.exchange.record_of(&vm.site, info, super::origin::Discovery::Reported);
        let aside = suffixed(&old.name, &format!("old-{}", tail(old.id)))?;
        let kept = self
            .registry
            .substrate_replace(old.id, &new, &aside, (vm.id, vm.generation))
            .map_err(registry_fault)?;
        if let Some(kept) = kept {
            tracing::info!(substrate = %old.name, kept = %kept.name, "rebuilt; a machine stands on the old one");
            return Ok(());
        }
        let request = verbs::SubstrateDelete { id: old.id };
        for site in &old.holders {
            let removed = match self.sites.host(site) {
                Ok(host) => host.ask(request.clone(), Call::quiet()).await,
                Err(f) => Err(f),
            };
            if let Err(error) = removed
                && error.code != Code::NotFound
            {
                tracing::warn!(substrate = %old.id, %site, %error, "the old one is still there");
            }
        }
        Ok(())
    }

    /// Removes the machine of a rebuild that failed.
    async fn undo_rebuild(&self, vm: &VmRecord, why: &Fault) -> Result<(), Fault> {
        match self.registry.vm(&vm.id.to_string()) {
            Ok(vm) => self.undo_create(&vm, why).await,
            Err(_) => Ok(()),
        }
    }

    /// After a restart of the center: what was docked takes its place, anything less is undone.
    pub(super) async fn resume_rebuild(
        &self,
        (vm, old, new): (VmId, SubstrateId, SubstrateId),
        otherwise: Fault,
    ) -> Result<serde_json::Value, Fault> {
        let (Ok(vm), Ok(old)) =
            (self.registry.vm(&vm.to_string()), self.registry.substrate(&old.to_string()))
        else {
            return match self.registry.substrate(&new.to_string()) {
                Ok(_) => Ok(json!({ "substrate": new })),
                Err(_) => Err(otherwise),
            };
        };
        let host = self.sites.await_host(&vm.site, super::recover::RETURN_LIMIT).await?;
        match host.substrates().await?.into_iter().find(|s| s.id == new) {
            Some(info) => {
                self.replace(&old, info, &vm).await?;
                Ok(json!({ "substrate": new }))
            }
            None => {
                self.undo_rebuild(&vm, &otherwise).await?;
                Err(otherwise)
            }
        }
    }
}
