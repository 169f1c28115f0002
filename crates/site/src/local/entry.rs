//! One machine of a site as its daemon has it, and the one way to come to change it.

use std::sync::{Arc, Weak};

use godwit_qemu::Machine;
use godwit_types::{Fault, Generation, Name, VmId};
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use super::LocalSite;
use super::allowed::{Action, Activity, First, Qemu, State};
use super::record::MachineRecord;
use super::table::Machines;

/// One machine of this site. Its lock is held while something changes it, so that two requests
/// for one machine take turns.
pub(super) struct Entry {
    pub(super) record: MachineRecord,
    pub(super) machine: Option<Machine>,
    pub(super) doing: Doing,
}

/// What somebody does to a machine without its lock.
#[derive(Debug, Default)]
pub(super) enum Doing {
    #[default]
    Nothing,
    /// Starts it; cancelled when it is not wanted any more.
    Starting(CancellationToken),
    /// Waits for its guest to power itself off, for as long as there is whoever waits.
    PoweringOff(Weak<()>),
}

impl Doing {
    /// A start begins, whatever was waited for before; what is returned is cancelled once it is not
    /// wanted any more.
    pub(super) fn start(&mut self) -> CancellationToken {
        self.cancel_start();
        let wanted = CancellationToken::new();
        *self = Self::Starting(wanted.clone());
        wanted
    }

    /// The start that was given `wanted` has come to its end; whether it was wanted until then. If
    /// not, what is done now is somebody else's.
    pub(super) fn end_start(&mut self, wanted: &CancellationToken) -> bool {
        let mine = matches!(self, Self::Starting(_)) && !wanted.is_cancelled();
        if mine {
            *self = Self::Nothing;
        }
        mine
    }

    /// Whether it is being started, and not by the start that was given `wanted`.
    pub(super) fn is_start_but(&self, wanted: &CancellationToken) -> bool {
        // A start that makes place for the next one is cancelled.
        matches!(self, Self::Starting(_)) && wanted.is_cancelled()
    }

    /// A start is not wanted any more.
    pub(super) fn cancel_start(&mut self) {
        if let Self::Starting(wanted) = self {
            wanted.cancel();
            *self = Self::Nothing;
        }
    }

    /// Somebody begins to wait for the guest to power itself off, until what is returned is dropped.
    pub(super) fn power_off(&mut self) -> Arc<()> {
        self.cancel_start();
        let waits = Arc::new(());
        *self = Self::PoweringOff(Arc::downgrade(&waits));
        waits
    }

    /// What is done now.
    pub(super) fn now(&self) -> Activity {
        match self {
            Self::Starting(_) => Activity::Starting,
            Self::PoweringOff(waits) if waits.strong_count() > 0 => Activity::PoweringOff,
            Self::PoweringOff(_) | Self::Nothing => Activity::Nothing,
        }
    }
}

impl Entry {
    pub(super) fn new(record: MachineRecord, machine: Option<Machine>) -> Self {
        Self { record, machine, doing: Doing::Nothing }
    }

    /// Its state at `site`, whose QEMU was not asked.
    pub(super) fn state(&self, site: &Name) -> State {
        let display = self.machine.as_ref().is_some_and(|m| m.launch().spec.display);
        let qemu = if self.machine.is_some() { Qemu::There } else { Qemu::Gone };
        State::of(&self.record, site, self.doing.now(), (qemu, display))
    }

    /// Whether it has a QEMU, or is about to.
    pub(super) fn takes_memory(&self) -> bool {
        let starts = self.doing.now() == Activity::Starting;
        self.machine.is_some() || starts || self.record.migration.is_some()
    }
}

/// A machine that is locked for what was asked, and what has to end before that.
pub(super) type Admitted = (OwnedMutexGuard<Entry>, First);

impl Machines {
    /// A machine locked for `action`, if its state allows that to one who knows of `generation`;
    /// `None` when there is no such machine. What has to end first has not ended yet.
    pub(super) async fn admit_if_here(
        &self,
        vm: VmId,
        generation: Generation,
        action: Action,
    ) -> Result<Option<Admitted>, Fault> {
        let Some(entry) = self.entry_if_here(vm).await else { return Ok(None) };
        let e = entry.lock_owned().await;
        let state = e.state(&self.site);
        state.fence(generation)?;
        let first = state.allows(action)?;
        Ok(Some((e, first)))
    }

    /// As [`Machines::admit_if_here`], where there has to be one.
    pub(super) async fn admit(
        &self,
        vm: VmId,
        generation: Generation,
        action: Action,
    ) -> Result<Admitted, Fault> {
        let admitted = self.admit_if_here(vm, generation, action).await?;
        admitted.ok_or_else(|| self.not_here(vm))
    }
}

impl LocalSite {
    /// A machine locked for `action`, if its state allows that to one who knows of `generation`. A
    /// move that has to end first has ended.
    pub(super) async fn admit(
        &self,
        vm: VmId,
        generation: Generation,
        action: Action,
    ) -> Result<Admitted, Fault> {
        let admitted = self.admit_if_here(vm, generation, action).await?;
        admitted.ok_or_else(|| self.parts.machines.not_here(vm))
    }

    /// As [`LocalSite::admit`]; `None` when there is no such machine.
    pub(super) async fn admit_if_here(
        &self,
        vm: VmId,
        generation: Generation,
        action: Action,
    ) -> Result<Option<Admitted>, Fault> {
        loop {
            match self.parts.machines.admit_if_here(vm, generation, action).await? {
                Some((e, First::Move)) => {
                    let (record, machine) = (e.record.clone(), e.machine.clone());
                    drop(e);
                    self.moves.quit(record, machine).await?;
                }
                admitted => return Ok(admitted),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_that_was_cancelled_does_not_end_the_next_one() {
        let mut doing = Doing::default();
        let first = doing.start();
        doing.cancel_start();
        assert!(first.is_cancelled());
        assert!(!doing.is_start_but(&first) && !doing.end_start(&first));
        let second = doing.start();
        assert!(doing.is_start_but(&first) && !doing.is_start_but(&second));
        assert!(!doing.end_start(&first), "it is told that it was cancelled");
        assert_eq!(doing.now(), Activity::Starting);
        assert!(!second.is_cancelled() && doing.end_start(&second));
        assert_eq!(doing.now(), Activity::Nothing);
        assert!(!doing.end_start(&second), "it has ended");
    }

    #[test]
    fn nobody_powers_off_once_whoever_waited_is_gone_or_it_was_started() {
        let mut doing = Doing::default();
        let waits = doing.power_off();
        assert_eq!(doing.now(), Activity::PoweringOff);
        let again = doing.power_off();
        drop(waits);
        assert_eq!(doing.now(), Activity::PoweringOff, "its power is cut meanwhile");
        drop(again);
        assert_eq!(doing.now(), Activity::Nothing);
        let waits = doing.power_off();
        let wanted = doing.start();
        assert!(doing.end_start(&wanted));
        assert_eq!(doing.now(), Activity::Nothing, "who waited for the run before has no say");
        drop(waits);
    }
}
