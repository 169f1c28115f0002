//! Making, starting, stopping, deleting and docking of environments.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use godwit_site::{Attachment, Call, GENERALISES, NewMachine, News, Origin, SiteHost, verbs};
use godwit_types::{
    Arch, Code, Fault, Generation, Mib, Name, SubstrateId, SubstrateKind, UnixMs, VmId, VmState,
};
use serde_json::json;

use super::arrive::no_move_goes_on;
use super::authorize::{allow, name_at_sites};
use super::depart::{Wanted, comes_back, half_here};
use super::disks::DiskOf;
use super::recover::FORSAKEN_AFTER;
use super::{Accepted, Controller, CreateVm, DockVm, Exchange, Mode};
use crate::access::{Action, Object, Principal, may};
use crate::ops::{OpHandle, OpKind};
use crate::placement::{Demand, Source};
use crate::registry::{StepKind, StepName, SubstrateRecord, VmRecord, registry_fault};

/// A call of a site whose progress is shown by the operation.
pub(super) fn call_of(op: &OpHandle) -> Call {
    let shown = op.clone();
    let show = move |news| {
        if let News::Progress(p) = news {
            shown.progress(p);
        }
    };
    Call::new(show, op.cancel().clone())
}

struct Shape {
    image: Name,
    arch: Arch,
    memory: Mib,
    vcpus: u8,
    origin: Origin,
    substrate: Option<SubstrateRecord>,
    /// What its disk is remembered by.
    disk: DiskOf,
}

/// Refuses to have a public substrate docked at a site of a release that does not take its identity
/// from the machine.
pub(super) fn generalises(host: &dyn SiteHost, kind: SubstrateKind) -> Result<(), Fault> {
    let (site, speaks) = (host.name(), host.speaks());
    if kind != SubstrateKind::Public || speaks >= GENERALISES {
        return Ok(());
    }
    Err(Fault::conflict(format!(
        "site '{site}' speaks protocol {speaks}, and to generalise a machine, as a public \
         substrate's must be, needs {GENERALISES}"
    ))
    .hint(format!("update '{site}', or dock it as restricted")))
}

/// What a machine is turned.
#[derive(Debug, Clone, Copy)]
enum Power {
    On,
    Off,
}

impl Controller {
    async fn shape(&self, who: &Principal, want: &CreateVm) -> Result<Shape, Fault> {
        match (&want.image, &want.substrate) {
            (Some(image), None) => {
                allow(who, Action::Use, &Object::Image, ("image", image.as_str()))?;
                let i = self.sites.image(image).await?;
                Ok(Shape {
                    image: image.clone(),
                    arch: i.arch,
                    memory: want.memory_mib.unwrap_or(i.memory),
                    vcpus: want.vcpus.unwrap_or(i.vcpus),
                    origin: Origin::Image(image.clone()),
                    substrate: None,
                    disk: DiskOf::Image(i.hash),
                })
            }
            (None, Some(key)) => {
                if want.memory_mib.is_some() || want.vcpus.is_some() {
                    return Err(Fault::invalid(
                        "memory and vCPUs of an activated machine are those of its substrate",
                    ));
                }
                let s = self.finder.substrate_for(who, Action::Use, key)?;
                Ok(Shape {
                    image: s.image.clone(),
                    arch: s.arch,
                    memory: s.memory,
                    vcpus: s.vcpus,
                    origin: Origin::Substrate(s.id),
                    disk: DiskOf::Substrate(s.id),
                    substrate: Some(s),
                })
            }
            _ => Err(Fault::invalid("name either an image or a substrate")),
        }
    }

    fn fresh_name(&self, who: &Principal, base: &Name) -> Result<Name, Fault> {
        let short: String = base.as_str().chars().take(Name::MAX_LEN - 6).collect();
        (1..10_000)
            .filter_map(|i| Name::new(&format!("{short}-{i}")).ok())
            .find(|n| !self.registry.vm_named(&who.tenant, n))
            .ok_or_else(|| Fault::invalid("give the machine a name"))
    }

    /// Refuses a private substrate that runs already: the second machine would be the same one.
    pub(super) fn once(
        &self,
        who: &Principal,
        substrate: Option<&SubstrateRecord>,
    ) -> Result<(), Fault> {
        let Some(s) = substrate.filter(|s| s.kind == SubstrateKind::Private) else { return Ok(()) };
        let all = self.registry.vms().map_err(registry_fault)?;
        let Some(vm) = all.into_iter().find(|v| v.substrate == Some(s.id)) else { return Ok(()) };
        let is = self.finder.called_for(who, &vm);
        let refusal = Fault::conflict(format!(
            "substrate '{}' is private and runs once at a time: it is {is} at '{}'",
            s.name, vm.site
        ));
        Err(match may(who, Action::See, &Object::machine(&vm)) {
            Ok(()) => refusal.hint(format!(
                "use that one, or first: godwit vm dock {0}, godwit vm delete {0}",
                vm.name
            )),
            Err(_) => refusal,
        })
    }

    /// Makes an environment: cold boot or activation.
    ///
    /// # Errors
    /// What was wrong with the request, or why there is no room.
    pub async fn create(
        self: &Arc<Self>,
        who: &Principal,
        want: CreateVm,
        mode: Mode,
    ) -> Result<(Accepted, Option<VmRecord>), Fault> {
        let made = Object::Machine { tenant: &who.tenant, private_of: None };
        allow(who, Action::Create, &made, ("tenant", ""))?;
        if let Some(site) = &want.site {
            allow(who, Action::Use, &Object::Site, ("site", site.as_str()))?;
        }
        let shape = self.shape(who, &want).await?;
        if !(16..=1 << 20).contains(&shape.memory.0) {
            return Err(Fault::invalid("guest memory must be 16 MiB to 1 TiB"));
        }
        if !(1..=64).contains(&shape.vcpus) {
            return Err(Fault::invalid("a machine has 1 to 64 vCPUs"));
        }
        let base = shape.substrate.as_ref().map_or(&shape.image, |s| &s.name);
        let name = want.name.map_or_else(|| self.fresh_name(who, base), Ok)?;
        if self.registry.vm_named(&who.tenant, &name) {
            return Err(Fault::new(Code::Exists, format!("machine '{name}' exists already")));
        }
        let demand = Demand {
            memory: shape.memory,
            vcpus: shape.vcpus,
            source: match &shape.origin {
                Origin::Image(i) => Source::Image(i.clone()),
                Origin::Substrate(s) | Origin::StoredDisk(s) => Source::Substrate(*s),
            },
            only: want.site,
            not: None,
            barred: self.sites.barred(want.network.is_some()),
        };
        let now = UnixMs::now();
        let placed = self.sites.choose(&demand, shape.substrate.as_ref())?;
        let plan = match &shape.substrate {
            Some(s) if placed.holds => {
                format!("activate '{name}' from substrate '{}' at {}", s.name, placed.site)
            }
            Some(s) => format!(
                "bring substrate '{}' to {} and activate '{name}' from it",
                s.name, placed.site
            ),
            None => format!("boot '{name}' from image '{}' at {}", shape.image, placed.site),
        };
        let network = want.network.as_deref();
        let network = network.map(|key| self.networks.find(who, Action::Use, key)).transpose()?;
        self.once(who, shape.substrate.as_ref())?;
        if mode == Mode::DryRun {
            return Ok((Accepted { op: None, plan, target: Some(name.to_string()) }, None));
        }
        let host = self.sites.host(&placed.site)?;
        let holder = match &shape.substrate {
            Some(s) if !placed.holds => s.holders.iter().find_map(|n| self.sites.host(n).ok()),
            _ => Some(host.clone()),
        };
        let disk_bytes = self.exchange.disk_bytes(shape.disk, &shape.origin, holder).await;
        let private = shape.substrate.as_ref().and_then(|s| s.private_of().map(|of| (s, of)));
        let private_of = private.map(|(s, of)| match s.tenant == who.tenant {
            true => of.clone(),
            // A name says who that is in its tenant alone.
            false => self.finder.owner_for(who),
        });
        let mut vm = VmRecord {
            id: VmId::new(),
            name: name.clone(),
            tenant: who.tenant.clone(),
            state: VmState::Starting,
            site: placed.site,
            generation: Generation::FIRST,
            image: shape.image,
            substrate: shape.substrate.as_ref().map(|s| s.id),
            arch: shape.arch,
            memory: shape.memory,
            vcpus: shape.vcpus,
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
        let kind = match &shape.substrate {
            Some(s) => OpKind::VmActivate { vm: vm.id, name: name.clone(), substrate: s.id },
            None => OpKind::VmCreate { vm: vm.id, name: name.clone() },
        };
        let new = NewMachine {
            vm: vm.id,
            name: name.clone(),
            generation: vm.generation,
            warrant,
            origin: shape.origin,
            memory: want.memory_mib,
            vcpus: want.vcpus,
            content: None,
        };
        let substrate = shape.substrate;
        let _one = self.entering.lock().unwrap_or_else(PoisonError::into_inner);
        let networks = self.registry.networks();
        let place = network.map(|n| networks.place(&n, vm.id)).transpose();
        vm.network = place.map_err(registry_fault)?;
        let attachment = networks.attachment(&vm).map_err(registry_fault)?;
        let (me, record) = (self.clone(), vm.clone());
        let bring = substrate.clone().filter(|_| !placed.holds);
        let job = |op: OpHandle| async move {
            let outcome = me.run_create(&op, host, (new, attachment), bring).await;
            me.end_create(&op, &record, outcome).await
        };
        self.once(who, substrate.as_ref())?;
        let op = self.ops.start_new(who, &vm, kind, job).map_err(registry_fault)?;
        Ok((Accepted { op: Some(op), plan, target: Some(name.to_string()) }, Some(vm)))
    }

    async fn run_create(
        &self,
        op: &OpHandle,
        mut host: Arc<dyn SiteHost>,
        (mut new, attachment): (NewMachine, Option<Attachment>),
        bring: Option<SubstrateRecord>,
    ) -> Result<serde_json::Value, Fault> {
        if let Some(s) = bring {
            host = self.exchange.bring_substrate(op, s.id, &host).await?;
        }
        if let Origin::Substrate(id) = new.origin {
            let record = self.registry.substrate(&id.to_string()).map_err(registry_fault)?;
            new.content = record.content;
        }
        op.check()?;
        op.begin(StepKind::Start { site: host.name().clone() })?;
        let status = match attachment {
            Some(attachment) => {
                let request = verbs::VmNewOn { machine: new, attachment };
                host.ask(request, call_of(op)).await?
            }
            None => host.ask(verbs::VmNew { machine: new }, call_of(op)).await?,
        };
        op.done(StepName::Start)?;
        Ok(json!({ "site": host.name(), "activate": status.activate }))
    }

    async fn end_create(
        &self,
        op: &OpHandle,
        vm: &VmRecord,
        outcome: Result<serde_json::Value, Fault>,
    ) -> Result<serde_json::Value, Fault> {
        let outcome = match outcome {
            Ok(v) => Ok(v),
            Err(f) => self.settle_create(op, vm, f).await,
        };
        match outcome {
            Ok(v) => {
                self.warrants.change_vm(vm, vm.generation, |v| {
                    Ok(v.become_state(VmState::Running, UnixMs::now())?)
                })?;
                Ok(v)
            }
            Err(f) => {
                op.undone(StepName::Start)?;
                Err(f)
            }
        }
    }

    /// Removes a machine that did not come to run; if the site cannot be asked, the record stays
    /// as failed.
    pub(super) async fn undo_create(&self, vm: &VmRecord, why: &Fault) -> Result<(), Fault> {
        let removed = match self.sites.host(&vm.site) {
            Ok(h) => {
                let request = verbs::VmDelete { vm: vm.id, generation: vm.generation };
                h.ask(request, Call::quiet()).await
            }
            Err(f) => Err(f),
        };
        match removed {
            Ok(()) => self.registry.vm_remove(vm.id, vm.generation).map_err(registry_fault),
            Err(f) if f.code == Code::NotFound => {
                self.registry.vm_remove(vm.id, vm.generation).map_err(registry_fault)
            }
            Err(_) => self
                .warrants
                .change_vm(vm, vm.generation, |v| {
                    v.become_state(VmState::Failed, UnixMs::now())?;
                    v.reason = Some(why.message.clone());
                    Ok(())
                })
                .map(|_| ()),
        }
    }

    /// Starts a stopped or failed environment from its disk.
    ///
    /// # Errors
    /// What refuses it.
    pub fn start(
        self: &Arc<Self>,
        who: &Principal,
        key: &str,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let vm = self.finder.vm_for(who, Action::Use, key)?;
        let who = &who.at(&vm.tenant);
        vm.state.to(VmState::Starting).map_err(|e| state_fault(&vm, &e))?;
        // What brings the rest of it, or brings it back, would be cut off.
        let from = vm.arriving.as_ref().map(|a| &a.from);
        if let Some(from) = from.or(vm.returning.as_ref().map(|r| &r.from)) {
            no_move_goes_on(&self.ops, &vm, from)?;
        }
        let host = self.sites.host(&vm.site)?;
        let plan = format!("start '{}' at {}", vm.name, vm.site);
        if mode == Mode::DryRun {
            return Ok(dry(plan, &vm));
        }
        let generation = vm.next_generation();
        let warrant = self.warrants.warrant(&vm, generation, &vm.site)?;
        let vm = self.warrants.change_vm(&vm, vm.generation, |v| {
            v.become_state(VmState::Starting, UnixMs::now())?;
            v.reach(generation);
            Ok(())
        })?;
        let kind = OpKind::VmStart { vm: vm.id, name: vm.name.clone() };
        let me = self.clone();
        self.launch(who, kind, plan, vm, Power::On, |vm, op| async move {
            let request = verbs::VmStart { vm: vm.id, generation: vm.generation, warrant };
            host.ask(request, call_of(&op)).await?;
            // One that never became whole was started from its disk: its source is of no use now.
            me.moves.release_source(&vm).await;
            me.moves.way_back.release_fallen(&vm).await;
            Ok(json!({}))
        })
    }

    /// Powers an environment off.
    ///
    /// # Errors
    /// What refuses it.
    pub fn stop(
        self: &Arc<Self>,
        who: &Principal,
        key: &str,
        force: bool,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let vm = self.finder.vm_for(who, Action::Use, key)?;
        let who = &who.at(&vm.tenant);
        if force && self.moves.is_moving(&vm)? {
            return self.moves.stop_moving(who, vm, mode);
        }
        self.may_stop(&vm, force)?;
        let host = self.sites.host(&vm.site)?;
        let plan = format!("stop '{}' at {}", vm.name, vm.site);
        if mode == Mode::DryRun {
            return Ok(dry(plan, &vm));
        }
        let kind = OpKind::VmStop { vm: vm.id, name: vm.name.clone() };
        self.launch(who, kind, plan, vm, Power::Off, move |vm, op| async move {
            let request = verbs::VmStop { vm: vm.id, generation: vm.generation, force };
            host.ask(request, call_of(&op)).await?;
            Ok(json!({}))
        })
    }

    /// Refuses to turn off what is in the midst of something, and says what leads out of that.
    fn may_stop(&self, vm: &VmRecord, force: bool) -> Result<(), Fault> {
        let (name, state) = (&vm.name, vm.state);
        if let Some(a) = vm.arriving.as_ref().filter(|_| state != VmState::Moving) {
            return Err(half_here(vm, &a.from));
        }
        if let Some(back) = vm.returning.as_ref().filter(|_| state == VmState::Failed) {
            return Err(comes_back(vm, back));
        }
        // Not at once: an operation that is about to begin is not there yet.
        let forsaken = UnixMs::now().since(vm.changed) > FORSAKEN_AFTER;
        let hint = match state {
            VmState::Running => return Ok(()),
            // One that no operation works on was left behind: its site ends what there is of it.
            VmState::Starting | VmState::Docking
                if force && forsaken && !self.ops.works_on(vm.id) =>
            {
                return Ok(());
            }
            VmState::Starting | VmState::Docking => {
                format!(
                    "wait for it, or cancel it: godwit op list; or delete it: godwit vm delete {name}"
                )
            }
            VmState::Moving => {
                format!("wait for its move, or end that: godwit vm stop {name} --force")
            }
            VmState::Stopped | VmState::Failed => format!(
                "boot it from its disk: godwit vm start {name}; or delete it: godwit vm delete \
                 {name}"
            ),
        };
        Err(Fault::conflict(format!("machine '{name}' is {state}")).hint(hint))
    }

    /// Ends an environment and removes all it has.
    ///
    /// # Errors
    /// What refuses it.
    pub fn delete(
        self: &Arc<Self>,
        who: &Principal,
        key: &str,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let vm = self.finder.vm_for(who, Action::Change, key)?;
        let who = &who.at(&vm.tenant);
        // One that no operation works on was left behind: this is the way out.
        let changing = matches!(vm.state, VmState::Docking | VmState::Starting);
        if changing && self.ops.works_on(vm.id) {
            return Err(Fault::conflict(format!("machine '{}' is {}", vm.name, vm.state))
                .hint("wait for it or cancel it: godwit op list"));
        }
        let moving = self.moves.is_moving(&vm)?;
        let host = self.sites.host(&vm.site)?;
        let plan = match moving {
            true => format!("end the move of '{}' and delete it with its disk", vm.name),
            false => format!("delete '{}' at {} with its disk", vm.name, vm.site),
        };
        if mode == Mode::DryRun {
            return Ok(dry(plan, &vm));
        }
        let kind = OpKind::VmDelete { vm: vm.id, name: vm.name.clone() };
        let (me, id) = (self.clone(), vm.name.to_string());
        let op = self
            .ops
            .start(who, kind, |op| async move {
                let (vm, host) = if moving {
                    let now = me.moves.end_move(&op, &vm, Wanted::Nothing).await?;
                    let host = me.sites.host(&now.site)?;
                    (now, host)
                } else {
                    (vm, host)
                };
                op.begin(StepKind::Delete { site: vm.site.clone() })?;
                let request = verbs::VmDelete { vm: vm.id, generation: vm.generation };
                match host.ask(request, call_of(&op)).await {
                    Err(f) if f.code != Code::NotFound => return Err(f),
                    _ => {}
                }
                me.moves.release_source(&vm).await;
                me.moves.way_back.release_fallen(&vm).await;
                me.registry.vm_remove(vm.id, vm.generation).map_err(registry_fault)?;
                op.done(StepName::Delete)?;
                Ok(json!({}))
            })
            .map_err(registry_fault)?;
        Ok(Accepted { op: Some(op), plan, target: Some(id) })
    }

    /// Turns an environment into a substrate.
    ///
    /// # Errors
    /// What refuses it.
    pub fn dock(
        self: &Arc<Self>,
        who: &Principal,
        key: &str,
        how: DockVm,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let vm = self.finder.vm_for(who, Action::Use, key)?;
        let who = &who.at(&vm.tenant);
        let substrate = SubstrateId::new();
        let kind = how.kind.unwrap_or(match vm.private_of {
            Some(_) => SubstrateKind::Private,
            None => SubstrateKind::Restricted,
        });
        let owner = match (&vm.private_of, kind) {
            (Some(of), SubstrateKind::Private) => of.clone(),
            _ => self.finder.owner_for(who),
        };
        let (none, tenant) = (BTreeSet::new(), &vm.tenant);
        let made = Object::Substrate { tenant, owner: &owner, kind, granted: &none };
        let action = match kind {
            SubstrateKind::Public => Action::Publish,
            SubstrateKind::Restricted | SubstrateKind::Private => Action::Create,
        };
        allow(who, action, &made, ("machine", key))?;
        vm.state.to(VmState::Docking).map_err(|e| state_fault(&vm, &e))?;
        let name = how.name.unwrap_or_else(|| vm.name.clone());
        self.exchange.is_new_substrate(&vm.tenant, &name)?;
        let host = self.sites.host(&vm.site)?;
        generalises(&*host, kind)?;
        let plan = format!("dock '{}' at {} as substrate '{name}'", vm.name, vm.site);
        if mode == Mode::DryRun {
            return Ok(dry(plan, &vm));
        }
        let at_sites = name_at_sites(&vm.tenant, &name, substrate)?;
        // Until the operation is entered, so that no two get one name.
        let one = self.entering.lock().unwrap_or_else(PoisonError::into_inner);
        self.exchange.is_new_substrate(&vm.tenant, &name)?;
        let vm = self.warrants.change_vm(&vm, vm.generation, |v| {
            Ok(v.become_state(VmState::Docking, UnixMs::now())?)
        })?;
        let request = verbs::VmDock {
            vm: vm.id,
            generation: vm.generation,
            substrate,
            name: at_sites,
            kind,
            owner: self.registry.people().user(&vm.tenant, &owner).map_or(owner.clone(), |u| u.id),
        };
        let kind = OpKind::VmDock {
            vm: vm.id,
            name: vm.name.clone(),
            substrate,
            called: Some(name),
            becomes: Some(kind),
            owner: Some(owner),
        };
        let (me, record) = (self.clone(), vm.clone());
        let started = self.ops.start(who, kind, |op| async move {
            op.begin(StepKind::Dock { site: record.site.clone(), substrate })?;
            let outcome = host.ask(request, call_of(&op)).await;
            match outcome {
                Ok(info) => {
                    let report = info.dock.clone();
                    Exchange::is_wanted(&record.site, substrate, &info)?;
                    me.exchange.adopt_substrate(&record.site, info)?;
                    me.registry.vm_remove(record.id, record.generation).map_err(registry_fault)?;
                    op.done(StepName::Dock)?;
                    Ok(json!({ "substrate": substrate, "dock": report }))
                }
                Err(f) => {
                    let settled = me.settle_dock(&op, &record, substrate, f).await;
                    if settled.is_ok() {
                        op.done(StepName::Dock)?
                    } else {
                        op.undone(StepName::Dock)?
                    }
                    settled
                }
            }
        });
        drop(one);
        match started {
            Ok(op) => Ok(Accepted { op: Some(op), plan, target: Some(vm.name.to_string()) }),
            Err(e) => {
                self.warrants.change_vm(&vm, vm.generation, |v| {
                    Ok(v.become_state(VmState::Running, UnixMs::now())?)
                })?;
                Err(registry_fault(e))
            }
        }
    }

    /// Runs a job that turns a machine on or off; after a failure its state is asked of its site.
    fn launch<F, Fut>(
        self: &Arc<Self>,
        who: &Principal,
        kind: OpKind,
        plan: String,
        vm: VmRecord,
        power: Power,
        job: F,
    ) -> Result<Accepted, Fault>
    where
        F: FnOnce(VmRecord, OpHandle) -> Fut + Send + 'static,
        Fut: Future<Output = Result<serde_json::Value, Fault>> + Send + 'static,
    {
        let (me, name) = (self.clone(), vm.name.to_string());
        let (goal, step) = match power {
            Power::On => (VmState::Running, StepName::VmStart),
            Power::Off => (VmState::Stopped, StepName::VmStop),
        };
        let op = self
            .ops
            .start(who, kind, |op| async move {
                let (site, generation) = (vm.site.clone(), vm.generation);
                op.begin(match power {
                    Power::On => StepKind::VmStart { site, generation },
                    Power::Off => StepKind::VmStop { site, generation },
                })?;
                match job(vm.clone(), op.clone()).await {
                    Ok(v) => {
                        me.warrants.change_vm(&vm, vm.generation, |v| {
                            if v.state != goal {
                                v.become_state(goal, UnixMs::now())?;
                            }
                            Ok(())
                        })?;
                        op.done(step)?;
                        Ok(v)
                    }
                    Err(f) => {
                        me.settler.settle_vm(&vm, &f).await?;
                        op.undone(step)?;
                        Err(f)
                    }
                }
            })
            .map_err(registry_fault)?;
        Ok(Accepted { op: Some(op), plan, target: Some(name) })
    }
}

pub(super) fn dry(plan: String, vm: &VmRecord) -> Accepted {
    Accepted { op: None, plan, target: Some(vm.name.to_string()) }
}

pub(super) fn state_fault(vm: &VmRecord, e: &godwit_types::InvalidTransition) -> Fault {
    let what = match e.to.as_str() {
        "moving" => "moved",
        "docking" => "docked",
        "starting" => "started",
        other => other,
    };
    let f = Fault::conflict(format!(
        "machine '{}' is {}, so it cannot be {what} now",
        vm.name, vm.state
    ));
    match vm.state {
        VmState::Stopped | VmState::Failed => {
            f.hint(format!("start it first: godwit vm start {}", vm.name))
        }
        VmState::Starting | VmState::Docking | VmState::Moving => {
            f.hint("wait for it or cancel it: godwit op list")
        }
        VmState::Running => f,
    }
}
