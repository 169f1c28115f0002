//! One machine of a site as its daemon has it.

use std::sync::{Arc, Weak};

use godwit_qemu::Machine;
use godwit_substrate::DockStop;
use godwit_types::Name;
use tokio_util::sync::CancellationToken;

use super::allowed::{Activity, Qemu, State};
use super::record::MachineRecord;

/// What is known of one machine of this site. Its owner has the one that counts; what others have is
/// what it was at some moment.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// How many times it has changed since this daemon has it.
    pub(super) revision: u64,
    pub(super) record: MachineRecord,
    pub(super) machine: Option<Machine>,
    /// This daemon has seen its last QEMU end, and knows whether that was its guest's doing.
    pub(super) saw_end: bool,
    pub(super) doing: Doing,
}

/// What goes on with a machine while its owner answers other requests.
#[derive(Debug, Clone, Default)]
pub(super) enum Doing {
    #[default]
    Nothing,
    /// It is started; cancelled when it is not wanted any more.
    Starting(CancellationToken),
    /// Its arrival is made ready.
    Preparing,
    /// It is made a substrate; stopped when it is to end before its commit.
    Docking(DockStop),
    /// Its guest is waited for to power itself off, for as long as there is whoever waits.
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

    /// A start that was cancelled is none.
    pub(super) fn end_cancelled(&mut self) {
        if matches!(self, Self::Starting(wanted) if wanted.is_cancelled()) {
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

    /// A docking begins, which `stop` stops.
    pub(super) fn dock(&mut self, stop: DockStop) {
        self.cancel_start();
        *self = Self::Docking(stop);
    }

    /// A docking has come to its end, or what was prepared is ready.
    pub(super) fn end(&mut self) {
        if let Self::Docking(_) | Self::Preparing = self {
            *self = Self::Nothing;
        }
    }

    /// What is done at this moment.
    pub(super) fn activity(&self) -> Activity {
        match self {
            Self::Starting(_) => Activity::Starting,
            Self::Preparing => Activity::Preparing,
            Self::Docking(_) => Activity::Docking,
            Self::PoweringOff(waits) if waits.strong_count() > 0 => Activity::PoweringOff,
            Self::PoweringOff(_) | Self::Nothing => Activity::Nothing,
        }
    }
}

impl Entry {
    pub(super) const fn new(record: MachineRecord, machine: Option<Machine>) -> Self {
        Self { revision: 0, record, machine, saw_end: false, doing: Doing::Nothing }
    }

    /// Its state at `site`, whose QEMU was not asked.
    pub(super) fn state(&self, site: &Name) -> State {
        let display = self.machine.as_ref().is_some_and(|m| m.launch().spec.display);
        let qemu = if self.machine.is_some() { Qemu::There } else { Qemu::Gone };
        State::of(&self.record, site, self.doing.activity(), (qemu, display))
    }

    /// Whether it has a QEMU, or is about to.
    pub(super) fn takes_memory(&self) -> bool {
        let starts = self.doing.activity() == Activity::Starting;
        self.machine.is_some() || starts || self.record.migration.is_some()
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
        assert_eq!(doing.activity(), Activity::Starting);
        assert!(!second.is_cancelled() && doing.end_start(&second));
        assert_eq!(doing.activity(), Activity::Nothing);
        assert!(!doing.end_start(&second), "it has ended");
    }

    #[test]
    fn nobody_powers_off_once_whoever_waited_is_gone_or_it_was_started() {
        let mut doing = Doing::default();
        let waits = doing.power_off();
        assert_eq!(doing.activity(), Activity::PoweringOff);
        let again = doing.power_off();
        drop(waits);
        assert_eq!(doing.activity(), Activity::PoweringOff, "its power is cut meanwhile");
        drop(again);
        assert_eq!(doing.activity(), Activity::Nothing);
        let waits = doing.power_off();
        let wanted = doing.start();
        assert!(doing.end_start(&wanted));
        assert_eq!(doing.activity(), Activity::Nothing, "who waited for the run before has no say");
        drop(waits);
    }
}
