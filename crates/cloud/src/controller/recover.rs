//! Finding the truth again: after a failure, a restart of the center, or a site's return.
//!
//! The sites know what runs; the registry knows what was meant. Of two sites that both have a
//! machine, the one with the higher generation that runs it is right, if it has the center's
//! warrant for that generation: a claim alone moves nothing.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use godwit_site::{Call, MachineStatus, Request, SiteHost, UNKNOWN_GENERATION, verbs};
use godwit_types::{Code, Fault, Hash, MigrationId, Name, UnixMs, VmState};

use super::moves::Move;
use super::{Controller, Sites, Warrants};
use crate::ops::Ops;
use crate::ops::{OpHandle, OpKind};
use crate::registry::Registry;
use crate::registry::{MoveReached, OpRecord, VmRecord, all_known, move_reached, registry_fault};

/// How long a restarted center waits for a site to come back before it decides without it.
pub(super) const RETURN_LIMIT: Duration = Duration::from_secs(60);

/// How long it waits for a migration that goes on between two sites without it.
const MOVE_LIMIT: Duration = Duration::from_secs(600);

/// How long a machine may be between two states without an operation before its site's word on it
/// is taken.
pub(super) const FORSAKEN_AFTER: Duration = Duration::from_secs(30);

/// The lists of machines that were gone through and say what the registry has: by site, the hash of
/// the list and the registry's revision before it was asked for.
pub(super) type Settled = std::sync::Mutex<HashMap<Name, (Hash, u64)>>;

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl Controller {
    /// Takes up what an earlier daemon left: unfinished operations are finished or undone.
    ///
    /// # Errors
    /// When the registry fails.
    pub fn recover(self: &Arc<Self>) -> Result<usize, Fault> {
        let left = self.ops.abandoned().map_err(registry_fault)?;
        let n = left.len();
        for op in left {
            let (me, record) = (self.clone(), op.clone());
            tracing::info!(op = %op.id, what = op.kind.verb(), target = %op.kind.target(), "taking up");
            self.ops.resume(op, |op| async move { me.resume_operation(&op, record).await });
        }
        Ok(n)
    }

    async fn resume_operation(
        self: &Arc<Self>,
        handle: &OpHandle,
        op: OpRecord,
    ) -> Result<serde_json::Value, Fault> {
        all_known(&op.journal)?;
        let restarted = || Fault::unavailable("the center was restarted while this ran");
        let again = || restarted().hint("nothing is half done; ask again");
        match &op.kind {
            OpKind::ImageBuild { .. } | OpKind::SubstrateCopy { .. } | OpKind::PoolCheck { .. } => {
                Err(again())
            }
            OpKind::VmCreate { vm, .. } | OpKind::VmActivate { vm, .. } => {
                let gone = || restarted().hint("nothing is left of it; ask again");
                let Ok(record) = self.registry.vm(&vm.to_string()) else { return Err(gone()) };
                let done = self.settle_create(handle, &record, gone()).await?;
                // Its site may have told of it already.
                if self.registry.vm(&vm.to_string()).is_ok_and(|v| v.state != VmState::Running) {
                    self.warrants.change_vm(&record, record.generation, |v| {
                        Ok(v.become_state(VmState::Running, UnixMs::now())?)
                    })?;
                }
                Ok(done)
            }
            OpKind::VmStart { vm, .. } => self.expect(vm, VmState::Running, again()).await,
            OpKind::VmStop { vm, .. } => self.expect(vm, VmState::Stopped, again()).await,
            OpKind::VmDelete { vm, .. } => {
                let Ok(record) = self.registry.vm(&vm.to_string()) else {
                    return Ok(serde_json::json!({}));
                };
                let host = self.sites.await_host(&record.site, RETURN_LIMIT).await?;
                let request = verbs::VmDelete { vm: record.id, generation: record.generation };
                match host.ask(request, Call::quiet()).await {
                    Err(f) if f.code != Code::NotFound => return Err(f),
                    _ => {}
                }
                self.registry.vm_remove(record.id, record.generation).map_err(registry_fault)?;
                Ok(serde_json::json!({}))
            }
            OpKind::VmDock { vm, substrate, .. } => {
                let Ok(record) = self.registry.vm(&vm.to_string()) else {
                    return Ok(serde_json::json!({ "substrate": substrate }));
                };
                let why = restarted().hint("dock it again");
                self.settle_dock(handle, &record, *substrate, why).await
            }
            OpKind::SubstrateRebuild { vm, old, new, .. } => {
                self.resume_rebuild((*vm, *old, *new), again()).await
            }
            OpKind::VmMigrate { vm, back: true, from, to, .. } => {
                let record = self.registry.vm(&vm.to_string()).map_err(registry_fault)?;
                match &record.returning {
                    None => Err(is_where_it_is(record)),
                    // What its source has was to be given up, and is not.
                    Some(_) if from == to => Err(again()),
                    Some(_) => Err(self.moves.way_back.bring_back(handle, record).await),
                }
            }
            OpKind::VmMigrate { vm, from, to, generation, .. } => {
                let record = self.registry.vm(&vm.to_string()).map_err(registry_fault)?;
                let id = match move_reached(&op.journal) {
                    MoveReached::Send(id) => id,
                    reached @ (MoveReached::Nothing | MoveReached::Prepare(_)) => {
                        for site in [from, to] {
                            self.sites.await_host(site, RETURN_LIMIT).await?;
                        }
                        if let MoveReached::Prepare(migration) = reached {
                            self.undo_prepare(migration, to, &record).await;
                        }
                        self.warrants.void_warrant(&record, *generation, to);
                        self.settler.settle_vm(&record, &again()).await?;
                        return Err(again().hint("the machine is where it was; ask again"));
                    }
                };
                if record.returning.as_ref().is_some_and(|r| r.migration == id) {
                    return Err(self.moves.way_back.bring_back(handle, record).await);
                }
                let m = Move::found(&record, from.clone(), to.clone(), *generation, id);
                // It was brought back, or is to be started from its disk where it died, and the
                // operation's end was not written.
                let given_up = record.arriving.as_ref().is_some_and(|a| a.migration == id);
                if record.generation > *generation && (record.site == *from || given_up) {
                    return Err(is_where_it_is(record));
                }
                if record.generation > *generation {
                    // It has moved on since.
                    return Ok(serde_json::json!({ "site": record.site }));
                }
                let request = verbs::MigrateFollow { migration: id };
                let first = self.moves.follow(handle, &m, request.asking()).await;
                self.moves.conclude(handle, &m, first).await
            }
        }
    }

    /// Takes back what a migration had prepared that never sent anything.
    async fn undo_prepare(&self, migration: MigrationId, to: &Name, vm: &VmRecord) {
        let Ok(host) = self.sites.host(to) else { return };
        let abort = verbs::MigrateAbort { migration, vm: vm.id };
        if let Err(e) = host.ask(abort, Call::quiet()).await {
            tracing::warn!(site = %to, error = %e, "abort of a migration");
        }
    }

    async fn expect(
        &self,
        vm: &godwit_types::VmId,
        goal: VmState,
        otherwise: Fault,
    ) -> Result<serde_json::Value, Fault> {
        let record = self.registry.vm(&vm.to_string()).map_err(registry_fault)?;
        self.sites.await_host(&record.site, RETURN_LIMIT).await?;
        match self.settler.settle_vm(&record, &otherwise).await? {
            Some(v) if v.state == goal => Ok(serde_json::json!({})),
            _ => Err(otherwise),
        }
    }
}

/// What to say of a machine whose way back is over.
fn is_where_it_is(vm: VmRecord) -> Fault {
    let why = vm.reason.unwrap_or_else(|| format!("is {} at '{}'", vm.state, vm.site));
    Fault::unavailable(format!("machine '{}' {why}", vm.name))
}

/// Brings what the registry says of machines together with what sites say.
pub(crate) struct Settler {
    pub(super) registry: Arc<Registry>,
    pub(super) ops: Arc<Ops>,
    pub(super) sites: Arc<Sites>,
    pub(super) warrants: Arc<Warrants>,
    /// What each site said last, where nothing of it was left to do.
    pub(super) settled: Settled,
}

impl Settler {
    /// Asks the sites that may have a machine what it does, and writes that down. While a site
    /// says that it is still moving, starting or docking, asks again. Answers with the record,
    /// or `None` when no site has it and it never ran.
    pub(super) async fn settle_vm(
        &self,
        vm: &VmRecord,
        why: &Fault,
    ) -> Result<Option<VmRecord>, Fault> {
        let deadline = tokio::time::Instant::now() + MOVE_LIMIT;
        let record = self.registry.vm(&vm.id.to_string()).map_err(registry_fault)?;
        let mut places = vec![record.site.clone()];
        places.extend(record.moving_to.clone());
        let (seen, asked_all) = loop {
            let (seen, asked_all) = self.look(&record, &places).await;
            let unsettled = seen.iter().any(|(_, m)| {
                matches!(m.state, VmState::Moving | VmState::Starting | VmState::Docking)
            });
            if !unsettled || tokio::time::Instant::now() >= deadline {
                break (seen, asked_all);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        };
        let best = seen
            .into_iter()
            .filter(|(site, m)| self.warrants.believed(&record, site, m))
            .max_by_key(|(_, m)| (m.state == VmState::Running, m.generation));
        if best.is_none() && record.state == VmState::Starting && asked_all {
            return Ok(None);
        }
        let now = UnixMs::now();
        self.warrants
            .change_vm(&record, record.generation, |v| {
                match best {
                    Some((site, m)) => {
                        if m.generation != UNKNOWN_GENERATION {
                            v.reach(m.generation);
                        }
                        v.site = site;
                        if v.state != m.state {
                            v.become_state(m.state, now)?;
                            v.reason = m.reason;
                        }
                        if v.state == VmState::Running {
                            v.is_back();
                        }
                    }
                    None if asked_all => {
                        v.become_state(VmState::Failed, now)?;
                        v.reason = Some(format!("no site has it any more: {}", why.message));
                    }
                    // Left as it is: a site that may run it is away, and will tell when it is back.
                    None => {}
                }
                Ok(())
            })
            .map(Some)
    }

    /// What the sites in `places` know of a machine, and whether all of them answered.
    async fn look(&self, vm: &VmRecord, places: &[Name]) -> (Vec<(Name, MachineStatus)>, bool) {
        let mut seen = Vec::new();
        let mut all = true;
        for name in places {
            let machines = match self.sites.host(name) {
                Ok(host) => host.machines().await,
                Err(f) => Err(f),
            };
            match machines {
                Ok(ms) => {
                    seen.extend(
                        ms.into_iter().filter(|m| m.vm == vm.id).map(|m| (name.clone(), m)),
                    );
                }
                Err(f) => {
                    tracing::debug!(site = %name, error = %f, "could not be asked");
                    all = false;
                }
            }
        }
        (seen, all)
    }

    /// Takes over what a site says of its machines: one that ended by itself is marked, one that
    /// runs there under a newer generation is found there, and one of an older generation is
    /// ended. Nothing is asked for while both sides report what they reported before: `list` is the
    /// hash of what the site would answer, reported after the registry's revision `reported_at`.
    pub(super) async fn settle_machines(
        &self,
        host: &Arc<dyn SiteHost>,
        list: Option<Hash>,
        reported_at: u64,
    ) -> Result<(), Fault> {
        self.end_visits(host).await?;
        if list.is_some_and(|list| self.is_settled(host.name(), list)) {
            return self
                .registry
                .sites()
                .has_no_deleted(host.name(), reported_at)
                .map_err(registry_fault);
        }
        let asked_at = self.registry.revision();
        let machines = host.machines().await?;
        let mut settled = godwit_site::digest(&machines);
        if !self.end_deleted(host, &machines, asked_at).await? {
            self.registry.sites().has_no_deleted(host.name(), asked_at).map_err(registry_fault)?;
        }
        let machines: HashMap<_, _> = machines.iter().map(|m| (m.vm, m)).collect();
        // What has changed meanwhile may be newer than the answer.
        let mut here_by_both = 0;
        let known = self.registry.vms_about(host.name(), machines.keys().copied(), asked_at);
        for vm in known {
            let here = machines.get(&vm.id).copied();
            let verdict = self.verdict(&vm, host.name(), here);
            let rests = matches!(vm.state, VmState::Running | VmState::Stopped | VmState::Failed);
            if !matches!(verdict, Verdict::Fine) || !rests {
                settled = None;
            }
            here_by_both += usize::from(here.is_some() && &vm.site == host.name());
            if matches!(verdict, Verdict::Fine)
                || self.registry.vm(&vm.id.to_string()).ok().as_ref() != Some(&*vm)
            {
                continue;
            }
            match verdict {
                Verdict::Fine => {}
                Verdict::End => {
                    let release = verbs::MigrateRelease { vm: vm.id, generation: vm.generation };
                    tracing::warn!(vm = %vm.name, site = %host.name(), "ending an older generation");
                    host.ask(release, Call::quiet()).await?;
                }
                Verdict::Become(m) => {
                    self.warrants.change_vm(&vm, vm.generation, |v| {
                        if m.generation == UNKNOWN_GENERATION {
                            tracing::warn!(vm = %v.name, site = %host.name(), "its record there is damaged");
                            v.become_state(m.state, UnixMs::now())?;
                            v.reason.clone_from(&m.reason);
                            return Ok(());
                        }
                        if v.generation != m.generation {
                            tracing::warn!(vm = %v.name, site = %host.name(), generation = %m.generation, "a newer generation runs there");
                        }
                        v.site = host.name().clone();
                        v.reach(m.generation);
                        if v.state != m.state {
                            v.become_state(m.state, UnixMs::now())?;
                        }
                        v.reason.clone_from(&m.reason);
                        // Brought back, and its operation did not live to hear of it.
                        if v.state == VmState::Running {
                            v.is_back();
                        }
                        Ok(())
                    })?;
                }
                // Docked while its center was not there to see it.
                Verdict::Lost
                    if vm.state == VmState::Docking && self.docked_as(vm.id).is_some() =>
                {
                    self.registry.vm_remove(vm.id, vm.generation).map_err(registry_fault)?;
                }
                Verdict::Lost => {
                    self.warrants.change_vm(&vm, vm.generation, |v| {
                        v.become_state(VmState::Failed, UnixMs::now())?;
                        v.reason = Some(format!("site '{}' does not know it", host.name()));
                        Ok(())
                    })?;
                }
            }
        }
        // One that is elsewhere by the registry, or that it does not know, is looked at each time.
        if let Some(list) = settled.filter(|_| here_by_both == machines.len()) {
            let mut all = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert(host.name().clone(), (list, asked_at));
        }
        Ok(())
    }

    fn is_settled(&self, site: &Name, reported: Hash) -> bool {
        let all = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(site).is_some_and(|(list, asked_at)| {
            *list == reported && self.registry.revision_at(site) <= *asked_at
        })
    }

    /// What a site runs is asked for when it reports next.
    pub(super) fn unsettle(&self, site: &Name) {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner).remove(site);
    }

    /// Has a site end the machines that were deleted while it was away. Answers whether it had any.
    async fn end_deleted(
        &self,
        host: &Arc<dyn SiteHost>,
        machines: &[MachineStatus],
        asked_at: u64,
    ) -> Result<bool, Fault> {
        let gone = self.registry.vms_deleted(machines.iter().map(|m| m.vm), asked_at);
        for gone in &gone {
            // One that became a substrate ends by itself.
            let here = machines.iter().find(|m| m.vm == gone.vm && m.state != VmState::Docking);
            let Some(here) = here else { continue };
            let claimed = Some(here.generation).filter(|g| g.is_sane());
            let generation = claimed.map_or(gone.generation, |g| g.max(gone.generation));
            tracing::warn!(vm = %gone.name, site = %host.name(), deleted = %gone.when.rfc3339(), "ending a machine that was deleted while its site was away");
            let request = verbs::VmDelete { vm: gone.vm, generation };
            match host.ask(request, Call::quiet()).await {
                Err(f) if f.code != Code::NotFound => {
                    tracing::warn!(vm = %gone.name, site = %host.name(), error = %f, "a deleted machine is still there");
                }
                _ => {}
            }
        }
        Ok(!gone.is_empty())
    }

    /// Has a site drop what it keeps of machines that have left it and were deleted or docked since.
    async fn end_visits(&self, host: &Arc<dyn SiteHost>) -> Result<(), Fault> {
        if self.registry.deleted_count() == 0 || host.speaks() < verbs::Visits::SINCE {
            return Ok(());
        }
        let asked_at = self.registry.revision();
        let kept = host.ask(verbs::Visits {}, Call::quiet()).await?;
        for gone in self.registry.vms_deleted(kept, asked_at) {
            let request = verbs::VmDelete { vm: gone.vm, generation: gone.generation };
            if let Err(f) = host.ask(request, Call::quiet()).await {
                tracing::warn!(vm = %gone.name, site = %host.name(), error = %f, "its memory may be kept");
            }
        }
        Ok(())
    }

    /// What a site's word on a machine means beside what the registry has of it. A machine that an
    /// operation works on is that operation's to settle.
    fn verdict<'a>(
        &self,
        vm: &VmRecord,
        site: &Name,
        here: Option<&'a MachineStatus>,
    ) -> Verdict<'a> {
        let settled = |s| matches!(s, VmState::Running | VmState::Stopped | VmState::Failed);
        // Left behind by an operation whose end could not be written.
        let forsaken =
            UnixMs::now().since(vm.changed) > FORSAKEN_AFTER && !self.ops.works_on(vm.id);
        let free = settled(vm.state) || forsaken;
        let may = |m: &MachineStatus| m.state == vm.state || vm.state.may_become(m.state);
        match here {
            Some(m) if m.generation == UNKNOWN_GENERATION => {
                let news = &vm.site == site && free && m.state != vm.state && may(m);
                if news { Verdict::Become(m) } else { Verdict::Fine }
            }
            // One that is on its way is the migration's to end; what is left of one that is over
            // has an older generation.
            Some(m)
                if m.state == VmState::Moving
                    && (&vm.site == site || vm.arriving.is_some() || !settled(vm.state)) =>
            {
                Verdict::Fine
            }
            // What its source still keeps is needed.
            Some(_) if vm.arriving.as_ref().is_some_and(|a| &a.from == site) => Verdict::Fine,
            Some(_) if !free => Verdict::Fine,
            Some(m) if m.generation > vm.generation => {
                let ran = matches!(m.state, VmState::Running | VmState::Stopped);
                if ran && may(m) && self.warrants.believed(vm, site, m) {
                    Verdict::Become(m)
                } else {
                    Verdict::Fine
                }
            }
            Some(m) if &vm.site != site => {
                // Until a machine that died there runs elsewhere, it may be started there after all.
                let kept = vm.returning.as_ref().is_some_and(|r| &r.from == site);
                let old = m.generation < vm.generation && settled(vm.state) && !kept;
                if old { Verdict::End } else { Verdict::Fine }
            }
            Some(m) if m.generation == vm.generation => {
                let news = settled(m.state) && m.state != vm.state && may(m);
                if news { Verdict::Become(m) } else { Verdict::Fine }
            }
            Some(_) => Verdict::Fine,
            None if &vm.site == site
                && (vm.state == VmState::Running || forsaken && !settled(vm.state)) =>
            {
                Verdict::Lost
            }
            None => Verdict::Fine,
        }
    }
}

/// What follows from a site's word on a machine.
enum Verdict<'a> {
    /// Nothing.
    Fine,
    /// It is of an older generation and has to end there.
    End,
    /// It is as the site says.
    Become(&'a MachineStatus),
    /// The site that should have it does not know it.
    Lost,
}
